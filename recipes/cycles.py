"""FedCyBGD beside what its paper compares it with, at equal numbers of examples: the tables of docs/results/fedcybgd.md about whole models.

    python recipes/cycles.py --data PATH/TO/dolly15k --model PATH/TO/stories260K --jobs 2          answers, skewed by category
    python recipes/cycles.py --data PATH/TO/dolly15k --model PATH/TO/stories260K --skew iid        the same, dealt at random
    python recipes/cycles.py --rates 4e-5 2e-4 1e-3                                                the packaged questions, MiniLM
    python recipes/cycles.py --skip thinner centre one-client                                      without some groups of methods

24 devices, 4 cycles: every device trains 4 times for 2 epochs, whoever else does so at once. Every method is given the same three learning
rates, chosen on validation with the first seed, LoRA four times as high ones. Beside the federations two hold all data in one place: the
whole model (centralised), and its blocks in turn, an epoch each (badam, after BAdam, 2404.02827); and FedCyBGD runs with each of the ways
in which less can go down. What comes out: OUT/cycles.md, the validation loss after 1/3, 1, 2, 3 and 4 cycles, what travelled, and the loss
when as many bytes had passed as FedCyBGD's whole run takes. Stop it and run it again: finished runs are used as they are.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from statistics import mean
from typing import Any

from places import place, refusing

from fedloom.methods.centralised import Centralised
from fedloom.methods.fedavg import FedAvg
from fedloom.methods.fedbavg import FedBAvg
from fedloom.methods.fedcybgd import FedCyBGD
from fedloom.methods.galore import GaLore
from fedloom.methods.handover import Handover
from fedloom.methods.kinds import FedFFT
from fedloom.methods.lisa import Lisa
from fedloom.model.adapters import Adapter
from fedloom.run.checkpoint import write_atomically
from fedloom.run.comparison.compare import compare
from fedloom.run.comparison.plan import Plan
from fedloom.run.comparison.statistics import spread
from fedloom.run.experiment import Experiment
from fedloom.run.reading import read

CLIENTS, CYCLES, COHORT = 24, 4, 4
TURNS = CLIENTS * CYCLES
TOLD = (8, 24, 48, 72, 96)
"""Turns after which the loss is told."""

RATES = (2e-4, 1e-3, 5e-3)
LOWER = FedAvg(lr=2e-4, schedule="cosine", local_epochs=1)
GROUPS: dict[str, tuple[dict[str, Any], dict[str, Any], int]] = {
    "turns": (
        {"fedcybgd": FedCyBGD(), "fedcybgd-random": FedCyBGD(order="random"), "handover": Handover()},
        {"cohort": 1, "rounds": TURNS, "evaluate_every": 8},
        1,
    ),
    "thinner": (
        {
            "fedcybgd-subset": FedCyBGD(subset=0.5),
            "fedcybgd-drop": FedCyBGD(drop=0.25),
            "fedcybgd-prune": FedCyBGD(prune=0.5),
            "fedcybgd-int8": FedCyBGD(rest="int8"),
            "fedcybgd-nf4": FedCyBGD(rest="nf4"),
        },
        {"cohort": 1, "rounds": TURNS, "evaluate_every": 8},
        1,
    ),
    "cohorts": (
        {"fedbavg": FedBAvg(), "fedfft": FedFFT()},
        {"cohort": COHORT, "rounds": TURNS // COHORT, "evaluate_every": 2},
        COHORT,
    ),
    "sparing": (
        {"galore": GaLore(), "lisa": Lisa()},
        {"cohort": COHORT, "rounds": TURNS // COHORT, "evaluate_every": 2},
        COHORT,
    ),
    "lora": ({"lora": FedAvg()}, {"cohort": COHORT, "rounds": TURNS // COHORT, "evaluate_every": 2}, COHORT),
    "centre": (
        {"centralised": Centralised()},
        {"cohort": CLIENTS, "rounds": CYCLES, "evaluate_every": 1, "adapter": Adapter(kind="full")},
        CLIENTS,
    ),
    "one-client": (
        {"badam": FedCyBGD(LOWER)},
        {"clients": 1, "cohort": 1, "partition": "iid", "rounds": 2 * CYCLES, "evaluate_every": 1},
        CLIENTS // 2,
    ),
}
"""By name: methods, what differs from the base, and how many turns' worth of examples a round is."""

FEWER = "‡"
"""Behind a loss at FedCyBGD's bytes of a method that never sent as many."""
PLACES = ("centre", "one-client")
"""Groups that hold all data in one place: what passes there is no federation's traffic."""


def base_of(given: argparse.Namespace) -> Experiment:
    """What all of them have in common."""
    size: dict[str, Any] = {"max_train": given.train, "max_validation": 96, "max_test": 96, "max_length": given.length}
    skew = {"partition": "iid"} if given.skew == "iid" else {"alpha": float(given.skew)}
    return Experiment(FedCyBGD(), data=given.data, model=given.model, clients=CLIENTS, min_examples=4, beta=50.0, **size, **skew)


def table(folder: Path, groups: Collection[str]) -> str:
    """Mean and deviation over seeds of the validation loss, and what travelled in all, from the comparisons' folders."""
    lines = ["| method | lr | " + " | ".join(f"{t / CLIENTS:.2g} cycles" for t in TOLD) + " | up, MB | down, MB | at FedCyBGD's bytes |"]
    lines += ["|" + " --- |" * (5 + len(TOLD))]
    budgets: list[float] = []
    ended_before = False
    for group in groups:
        worth = GROUPS[group][2]
        (case,) = json.loads((folder / group / "summary.json").read_text(encoding="utf-8"))["cases"]
        for row in case["rows"]:
            runs = [read(folder / group / name).rows for name in row["runs"].values()]
            budgets = budgets or [sum(map(_bytes, rows)) for rows in runs]  # of the first row, which is FedCyBGD's
            losses = [_told([_after(rows, turns / worth) for rows in runs]) for turns in TOLD]
            moved = [mean(sum(r[key] for r in rows) for rows in runs) / 1e6 for key in ("bytes_up", "bytes_down")]
            within = [_within(rows, budget) for rows, budget in zip(runs, budgets, strict=True)]
            fewer = group not in PLACES and any(sum(map(_bytes, rows)) < budget for rows, budget in zip(runs, budgets, strict=True))
            ended_before |= fewer
            at_bytes = f"{_told(within)}{FEWER if fewer else ''}"
            travelled = ["-"] * 3 if group in PLACES else [f"{moved[0]:.1f}", f"{moved[1]:.1f}", at_bytes]
            lines.append(f"| {row['method']} | {row['lr']:g} | {' | '.join([*losses, *travelled])} |")
    lines += (
        ["", f"{FEWER}: the whole run, or that of some seeds, sent fewer bytes; then it is the loss at its end."] if ended_before else []
    )
    return "\n".join(lines) + "\n"


def _told(losses: Sequence[float | None]) -> str:
    found = spread(losses)
    return "-" if found.mean is None else f"{found.mean:.4f} ± {found.deviation or 0:.4f}"


def _after(rows: Sequence[Mapping[str, Any]], round: float) -> float | None:
    return next((row["validation"]["loss"] for row in rows if row["round"] == round), None)


def _within(rows: Sequence[Mapping[str, Any]], budget: float) -> float | None:
    """The loss when it was last evaluated before more than ``budget`` bytes had passed; a thousandth more, which is how names are written
    in messages, counts as the same."""
    passed, loss = 0, None
    for row in rows:
        passed += _bytes(row)
        if passed > 1.001 * budget:
            break
        loss = loss if row["validation"]["loss"] is None else row["validation"]["loss"]
    return loss


def _bytes(row: Mapping[str, Any]) -> int:
    return row["bytes_up"] + row["bytes_down"]


def main() -> int:
    """Run what is missing and write the table; the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", default="trec")
    parser.add_argument("--model", default="minilm")
    parser.add_argument("--skew", default="0.1", help="Dirichlet concentration of the devices' labels, or iid (default: 0.1)")
    parser.add_argument("--train", type=int, default=480, help="training examples (default: 480)")
    parser.add_argument("--length", type=int, default=96, help="tokens of an example at most (default: 96)")
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3])
    parser.add_argument(
        "--rates", type=float, nargs="+", default=RATES, help="learning rates to choose from (default: those of the small Llama)"
    )
    parser.add_argument("--jobs", type=int, default=1, help="runs at a time")
    first, *others = GROUPS  # the first is FedCyBGD, by whose bytes the others are told
    parser.add_argument("--skip", nargs="+", choices=others, default=[], help="groups of methods to leave out: " + ", ".join(others))
    parser.add_argument(
        "--out", type=Path, help="where runs and the table go (default: runs/cycles, with what is given otherwise behind it)"
    )
    given = parser.parse_args()
    with refusing(parser):
        out = place(parser, given, "cycles", ("data", "model", "skew", "train", "length"))
        return _carried_out(given, [first, *(group for group in others if group not in given.skip)], out)


def _carried_out(given: argparse.Namespace, groups: Sequence[str], out: Path) -> int:
    base, failed = base_of(given), 0
    for group in groups:
        methods, change, _ = GROUPS[group]
        rates = tuple(4 * rate if group == "lora" else rate for rate in given.rates)
        plan = Plan(replace(base, **change), methods, (base.data,), (base.alpha,), tuple(given.seeds), rates)
        ended = compare(plan, out / group, given.jobs)
        failed += len(ended.failed)
        for run, why in ended.failed.items():
            print(f"{run} failed: {why}")
    if not failed:
        write_atomically(out / "cycles.md", table(out, groups))
        print(out / "cycles.md")
    return 1 if failed else 0


if __name__ == "__main__":
    raise SystemExit(main())
