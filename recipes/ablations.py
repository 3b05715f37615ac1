"""What each part of FibecFed does, and where it does it: one part changed at a time, everything else as in recipes/core.py.

    python recipes/ablations.py parts                        FibecFed without each of its three ideas, and without all of them
    python recipes/ablations.py pacing layers --jobs 2       several, one after the other
    python recipes/ablations.py devices --seeds 1            from 20 to 1,000 devices
    python recipes/ablations.py model --model FOLDER         MiniLM and another model: a folder or a name, as for fedloom run
    python recipes/ablations.py head --model FOLDER          a new head and the pre-trained one, of a masked or causal language model
    python recipes/ablations.py parts --data FOLDER          on another data set than TREC
    python recipes/ablations.py --list                       what there is

Each makes a folder under --out with the tables and the report of a comparison (comparison.md, report.html). Where parts of FibecFed are
changed the learning rate is the one that the core table's search found for it and MiniLM on TREC (docs/results/fibecfed.md), for plain
LoRA beside it too, whose own is lower: it is not searched again, so another model or data set may want another, --lr. Where skew, devices,
cohort, model or head are changed, each method's rate is searched anew in each, among the core table's three, on validation; --lr takes one
for all.
Stop it and run it again: finished runs are used as they are.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from core import TABLE as CORE
from places import place, refusing

from fedloom.client.curricula.everything import Everything
from fedloom.methods.fedavg import FedAvg
from fedloom.methods.fibecfed import Curriculum, FibecFed, Gal
from fedloom.run.comparison.compare import compare
from fedloom.run.comparison.plan import Plan
from fedloom.run.experiment import Experiment

WHOLE = FibecFed()
SHAPE = Experiment(
    WHOLE, clients=100, cohort=10, rounds=30, max_train=1600, max_validation=400, max_test=500, max_length=64, evaluate_every=6
)
OPEN = Curriculum(start=1.0)
"""Everything is open from the start, easy batches first; the head is warmed up and the batches stay as they were cut."""
OFF = replace(OPEN, granularity="unsorted")
"""Nor is anything sorted: all that is left of the curriculum is what comes before it, the head's warm-up and one cut for ever."""


RATE = 8e-3
"""FibecFed's, by the core table's search on TREC."""
GRID = tuple(map(float, CORE.rates))
"""The core table's."""


def variants(**changes: Mapping[str, Any]) -> dict[str, FibecFed]:
    """FibecFed, and FibecFed with each named change; underscores in names become hyphens."""
    return {"fibecfed": WHOLE, **{name.replace("_", "-"): replace(WHOLE, **change) for name, change in changes.items()}}


VARIANTS: dict[str, Callable[[], dict[str, Any]]] = {
    "parts": lambda: {
        **variants(
            no_pacing={"curriculum": OPEN},
            no_curriculum={"curriculum": OFF},
            all_layers_global={"gal": Gal(fraction=1.0)},
            no_mask={"keep": 1.0},
            none_of_them={"curriculum": OFF, "gal": Gal(fraction=1.0), "keep": 1.0},
        ),
        "lora": FedAvg(),
    },
    "pacing": lambda: variants(**{p: {"curriculum": Curriculum(pacing=p)} for p in ("sqrt", "quadratic", "exp", "none")}),
    "order": lambda: variants(
        by_example={"curriculum": Curriculum(granularity="example")},
        refreshed={"curriculum": Curriculum(refresh=10)},
        head_left_out={"curriculum": Curriculum(head="left-out")},
        head_as_is={"curriculum": Curriculum(head="as-is")},
        unsorted={"curriculum": Curriculum(granularity="unsorted")},
        off={"curriculum": OFF},
        off_and_no_warm_up={"curriculum": Everything(), "inner": FedAvg(reshuffle=False)},
        off_no_warm_up_and_cut_anew={"curriculum": Everything()},
    ),
    "layers": lambda: variants(
        quarter={"gal": Gal(fraction=0.25)},
        half={"gal": Gal(fraction=0.5)},
        all={"gal": Gal(fraction=1.0)},
        most={"gal": Gal(which="most")},
        random={"gal": Gal(which="random")},
    ),
    "keep": lambda: variants(**{f"keep_{int(share * 100)}": {"keep": share} for share in (0.1, 0.25, 0.75, 1.0)}),
}
"""By name, the methods of one comparison."""

SETTINGS: dict[str, dict[str, dict[str, Any]]] = {
    "skew": {f"alpha-{alpha:g}": {"alpha": alpha} for alpha in (0.1, 1.0, 10.0)},
    "devices": {f"devices-{n}": {"clients": n, "max_train": 0} for n in (20, 50, 100, 200, 500, 1000)},
    "cohort": {f"cohort-{n}": {"cohort": n} for n in (5, 10, 20, 50)},
    "model": {"model-minilm": {"model": "minilm"}},
    "head": {"head-linear": {"head": "linear"}, "head-cloze": {"head": "cloze"}},
}
"""By name, what is changed for all methods, a comparison for each. Of models there is one more, which is given; it has both heads."""
OF_A_MODEL = ("model", "head")
"""Settings that need one given."""


def settings(model: str) -> dict[str, dict[str, dict[str, Any]]]:
    """What is changed for all methods where ``model`` (a folder or a name; "": none) is set beside MiniLM, and read by either head."""
    other = {"model": model} if model else {}
    heads = {value: {**change, **other} for value, change in SETTINGS["head"].items()}
    return {**SETTINGS, "model": {**SETTINGS["model"], **({f"model-{Path(model).name}": other} if model else {})}, "head": heads}


def main() -> int:
    """Run what was asked for; the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"what to vary: {', '.join([*VARIANTS, *SETTINGS])}")
    parser.add_argument("--data", default=SHAPE.data, help=f"the data set, as for fedloom run (default: {SHAPE.data})")
    parser.add_argument("--alpha", type=float, default=0.1, help="label skew, where it is not varied (default: 0.1)")
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3])
    parser.add_argument("--lr", type=float, help=f"the rate of every method (default: {RATE}, of settings each method's best of {GRID})")
    parser.add_argument("--model", default="", help="the model, a folder or a name, of 'model' and 'head'")
    parser.add_argument("--jobs", type=int, default=1, help="runs at a time")
    parser.add_argument("--out", type=Path, help="where they go (default: runs/ablations, with another data set, alpha or rate behind it)")
    parser.add_argument("--list", action="store_true", help="say what there is")
    given = parser.parse_args()
    if given.list:
        for name, make in VARIANTS.items():
            print(f"{name}: {', '.join(make())}")
        for name, values in SETTINGS.items():
            more = {"model": " and that of --model", "head": " of the model of --model"}.get(name, "")
            print(f"{name}: lora and fibecfed at {', '.join(values)}{more}")
        return 0
    unknown = [name for name in given.names if name not in {*VARIANTS, *SETTINGS}]
    if unknown or not given.names:
        parser.error(f"{f'there is no {unknown[0]}' if unknown else 'nothing is named'}; there are {', '.join([*VARIANTS, *SETTINGS])}")
    if bool(given.model) != any(name in given.names for name in OF_A_MODEL):
        parser.error("'model' compares MiniLM with another model, 'head' that model's own head with a new one: model head --model FOLDER")
    changes = settings(given.model)
    if "model" in given.names and len(changes["model"]) < 2:
        parser.error(f"--model {given.model} is called as the one that it is set beside; give another")
    with refusing(parser):
        return _carried_out(given, changes, place(parser, given, "ablations", ("data", "alpha", "lr")))


def _carried_out(given: argparse.Namespace, changes: Mapping[str, Mapping[str, Mapping[str, Any]]], out: Path) -> int:
    failed = 0
    for name in given.names:
        within = f"head-{Path(given.model).name}" if name == "head" else name  # all of it is of that model
        if name in VARIANTS:
            todo = {name: (VARIANTS[name](), {})}
        else:
            todo = {f"{within}/{value}": ({"lora": FedAvg(), "fibecfed": WHOLE}, change) for value, change in changes[name].items()}
        for where, (methods, change) in todo.items():
            base = replace(SHAPE, **{"data": given.data, "alpha": given.alpha, **change})
            rates = (given.lr,) if given.lr is not None else (RATE,) if name in VARIANTS else GRID
            plan = Plan(base, methods, (base.data,), (base.alpha,), tuple(given.seeds), rates)
            reference = "lora" if "lora" in methods else "fibecfed"
            ended = compare(plan, out / where, given.jobs, reference=reference)
            failed += len(ended.failed)
            print(f"{where}: {ended.report}")
            for run, why in ended.failed.items():
                print(f"{run} failed: {why}")
    return 1 if failed else 0


if __name__ == "__main__":
    raise SystemExit(main())
