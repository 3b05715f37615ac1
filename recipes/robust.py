"""What each rule of aggregation withstands: a quarter of the devices lies, every rule has to do with the same lies.

    python recipes/robust.py                          the table, for lora on TREC: 8 devices, all in every round, two hostile
    python recipes/robust.py fibecfed --alphas 0.1    another method, other skews

Devices train as they should and then send something else (engines/wrap.py):

    backwards    ten times the way that they went, in the opposite direction
    noise        a way of ten times that length in a random direction
    subtle       half of the way, backwards: small enough to hide among devices whose data differ

Told is the shared model's score on the test split after the last round. Nothing is chosen by it: rules have no settings but the share.
"""

from __future__ import annotations

import argparse
import sys
from dataclasses import replace

from fedloom.client.store import ClientStore
from fedloom.engines.engine import drive
from fedloom.engines.wrap import Hostile, Lies, noise, scaled
from fedloom.methods import named
from fedloom.run.evaluation import evaluate
from fedloom.run.experiment import Experiment
from fedloom.run.recipes import with_learning_rate
from fedloom.run.world import World, build
from fedloom.server.robust import RULES

LIES: dict[str, Lies | None] = {"nobody lies": None, "backwards": scaled(-10.0), "noise": noise(10.0, 1), "subtle": scaled(-0.5)}
HOSTILE = (1, 6)


def score(world: World, rule: str, lies: Lies | None) -> float:
    """The shared model's score on the test split, after all rounds under this rule."""
    e = replace(world.experiment, aggregation=rule)
    world = replace(world, experiment=e)
    honest = world.engine(ClientStore())
    engine = honest if lies is None else Hostile(honest, HOSTILE, lies)
    state = drive(e.method.setup(e.method.init(world.model), world.pool), engine, quorum=0)
    for _ in range(e.rounds):
        state = drive(e.method.round(state, world.pool), engine)
    scores = evaluate(world, state, honest).scores["test"]
    return float(scores["global"] if scores["global"] is not None else scores["personalised"])


def main() -> int:
    """Print the table as Markdown, a row as soon as it is there."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("method", nargs="?", default="lora", help="the method (default: lora)")
    parser.add_argument("--alphas", type=float, nargs="+", default=[1.0], help="label skews (default: 1)")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--lr", type=float, default=8e-3)
    parser.add_argument("--max-train", type=int, default=320)
    given = parser.parse_args()
    method = with_learning_rate(named(given.method)(), given.lr)
    print(f"| alpha | rule | {' | '.join(LIES)} |\n|---|---|{'---|' * len(LIES)}")
    for alpha in given.alphas:
        size = {"max_train": given.max_train, "max_validation": 40, "max_test": 300, "max_length": 32}
        world = build(Experiment(method, clients=8, cohort=8, rounds=given.rounds, alpha=alpha, seed=1, **size))
        for rule in RULES:
            scores = [f"{100 * score(world, rule, lies):.1f}" for lies in LIES.values()]
            print(f"| {alpha:g} | {rule} | {' | '.join(scores)} |", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
