"""Several experiments beside each other: each in a folder of its own, one table, one report. A finished run is used as it is.

One experiment that fails does not lose the others. This module does not know the command line.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import mean, stdev
from typing import Any

from fedloom.run.checkpoint import write_atomically
from fedloom.run.experiment import Experiment, ExperimentError
from fedloom.run.failures import explain
from fedloom.run.loop import check, run
from fedloom.run.world import read_data

PLACES = tuple((at, protocol) for at in ("final", "best") for protocol in ("personalised", "global"))


@dataclass(frozen=True)
class Comparison:
    """The results in order, the folders that hold them, what failed (folder name -> paragraph), and the report if anything ended."""

    results: list[dict[str, Any]]
    failed: dict[str, str]
    report: Path | None


def named_experiments(methods: Sequence[Any], seeds: Sequence[int], make: Callable[[Any, int], Experiment]) -> dict[str, Experiment]:
    """Folder name -> experiment: METHOD, or METHOD-seedS where there are several seeds.

    Raises:
        ExperimentError: a method or a seed was named twice.
    """
    names = [str(type(method).name) for method in methods]
    twice = sorted({str(v) for v in [*names, *seeds] if [*names, *seeds].count(v) > 1})
    if twice:
        raise ExperimentError(f"named twice: {', '.join(twice)}; a comparison has each method and each seed once")
    several = len(seeds) > 1
    return {f"{name}-seed{s}" if several else name: make(method, s) for s in seeds for name, method in zip(names, methods, strict=True)}


def compare(experiments: Mapping[str, Experiment], out: Path, plain: bool | None = None) -> Comparison:
    """Run each experiment in ``out / name``, then write ``comparison.json`` and ``report.html``.

    Raises:
        CheckpointError: a folder belongs to something else; nothing was started.
        DataError: the data cannot be read or partitioned; nothing was started.
    """
    for name, experiment in experiments.items():
        check(out / name, experiment)
    for experiment in {e.seed: e for e in experiments.values()}.values():
        read_data(experiment)
    results, failed = {}, {}
    for name, experiment in experiments.items():
        try:
            results[name] = run(experiment, out / name, plain)
        except Exception as error:
            explained = explain(error)
            if explained is None:
                raise
            failed[name] = explained[0]
    if not results:
        return Comparison([], failed, None)
    write_atomically(out / "comparison.json", json.dumps(list(results.values()), indent=1))
    from fedloom.run.report import write_report  # loads matplotlib, which no run should wait for

    return Comparison(list(results.values()), failed, write_report([out / name for name in results], out / "report.html"))


def over_seeds(results: Sequence[Mapping[str, Any]]) -> list[list[str]]:
    """One row a method: name, number of seeds, then mean ± standard deviation over its seeds for each of ``PLACES``."""
    rows = []
    for method in dict.fromkeys(str(r["method"]) for r in results):
        of = [r for r in results if r["method"] == method]
        rows.append([method, str(len(of)), *(_spread([r[at][protocol] for r in of]) for at, protocol in PLACES)])
    return rows


def labelled(results: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """The results with the seed beside the method's name where there are several seeds."""
    several = len({r["seed"] for r in results}) > 1
    return [{**r, "method": f"{r['method']}, seed {r['seed']}" if several else r["method"]} for r in results]


def _spread(scores: Sequence[float | None]) -> str:
    known = [s for s in scores if s is not None]
    if not known:
        return "-"
    return f"{mean(known):.4f}" + (f" ± {stdev(known):.4f}" if len(known) > 1 else "")


def run_folders(places: Sequence[Path]) -> list[Path]:
    """The run folders that ``places`` mean: each itself, or, for the folder of a comparison, those in it, in the comparison's order."""
    found: list[Path] = []
    for place in places:
        inside = [p.parent for p in sorted(place.glob("*/experiment.json"))] if not (place / "experiment.json").exists() else []
        found += inside or [place]
    return found
