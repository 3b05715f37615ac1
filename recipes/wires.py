"""What a wire saves and what it costs: bytes a round and accuracy for each ``--wire``, lora and fibecfed on the packaged questions.

    python recipes/wires.py                       every wire, two seeds: 24 small runs, each about half a minute of one core
    python recipes/wires.py --jobs 2              the same, two at a time
    python recipes/wires.py --wires exact top-k:0.01 --alpha 1.0

Twenty devices, five of them a round, MiniLM with LoRA r8. Every wire is a comparison of the two methods in a folder of its own under --out
(comparison.md, report.html), and the table of all wires is printed and written there (wires.md): bytes of a round, all devices' messages
together, set-up and evaluation not among them; their share of what the exact wire takes; the accuracy on the test questions after the last
round, of each device's own model, in per cent, mean over seeds with the seeds' own beside it. Nothing is chosen by it: one learning rate,
the one that the core table's search found on TREC (docs/results/fibecfed.md). Stop it and run it again: finished runs are used as they are.
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from statistics import mean
from typing import Any

from places import place, refusing

from fedloom.encodings import NAMES
from fedloom.methods.fedavg import FedAvg
from fedloom.methods.fibecfed import FibecFed
from fedloom.run.checkpoint import write_atomically
from fedloom.run.comparison.compare import compare
from fedloom.run.comparison.plan import Plan
from fedloom.run.experiment import Experiment

METHODS = {"lora": FedAvg(), "fibecfed": FibecFed()}
SHAPE = Experiment(
    METHODS["lora"], clients=20, cohort=5, rounds=10, max_train=600, max_validation=100, max_test=300, max_length=32, evaluate_every=0
)
LR = 8e-3
HEADS = ("wire", "method", "down, kB a round", "up, kB a round", "of exact", "accuracy", "by seed")


def plan(wire: str, alpha: float, seeds: Sequence[int]) -> Plan:
    """One wire's runs."""
    return Plan(replace(SHAPE, wire=wire, alpha=alpha), METHODS, (SHAPE.data,), (alpha,), tuple(seeds), (LR,))


def folder(wire: str) -> str:
    """What a wire's folder is called."""
    return wire.replace(":", "-")


def table(found: Mapping[str, Sequence[Mapping[str, Any]]]) -> str:
    """The table as Markdown: ``found`` holds each wire's results. A method of which there are none is left out."""
    lines = [f"| {' | '.join(HEADS)} |", "|---" * len(HEADS) + "|"]
    for wire, results in found.items():
        for method in METHODS:
            runs, exact = _of(results, method), _of(found.get("exact", ()), method)
            if not runs:
                continue
            down, up = (mean(run[key] / run["rounds"] for run in runs) for key in ("bytes_down", "bytes_up"))
            whole = mean((run["bytes_down"] + run["bytes_up"]) / run["rounds"] for run in exact) if exact else None
            scores = [100 * run["final"]["personalised"] for run in runs]
            share = "-" if whole is None else f"{100 * (down + up) / whole:.1f} %"
            cells = (wire, method, f"{down / 1e3:,.1f}", f"{up / 1e3:,.1f}", share, f"{mean(scores):.1f}")
            lines.append(f"| {' | '.join(cells)} | {', '.join(f'{score:.1f}' for score in scores)} |")
    return "\n".join(lines) + "\n"


def _of(results: Sequence[Mapping[str, Any]], method: str) -> list[Mapping[str, Any]]:
    return sorted((run for run in results if run["method"] == method), key=lambda run: run["seed"])


def main() -> int:
    """Run what is missing, and tell; the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--wires", nargs="+", default=list(NAMES), metavar="WIRE", help=f"default: {' '.join(NAMES)}; top-k:SHARE too")
    parser.add_argument("--alpha", type=float, default=0.1, help="label skew (default: 0.1)")
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--jobs", type=int, default=1, help="runs at a time")
    parser.add_argument("--out", type=Path, help="where runs and tables go (default: runs/wires, with another alpha runs/wires-alphaALPHA)")
    given = parser.parse_args()
    with refusing(parser):
        return _carried_out(given, place(parser, given, "wires", ("alpha",)))


def _carried_out(given: argparse.Namespace, out: Path) -> int:
    plans = {wire: plan(wire, given.alpha, given.seeds) for wire in given.wires}  # a wire that is none is refused before anything runs
    found: dict[str, list[Mapping[str, Any]]] = {}
    failed = 0
    for wire, asked in plans.items():
        ended = compare(asked, out / folder(wire), given.jobs)
        found[wire] = ended.results
        failed += len(ended.failed)
        for run, why in ended.failed.items():
            print(f"{wire}, {run} failed: {why}")
        write_atomically(out / "wires.md", table(found))
    print(table(found), end="")
    return 1 if failed else 0


if __name__ == "__main__":
    raise SystemExit(main())
