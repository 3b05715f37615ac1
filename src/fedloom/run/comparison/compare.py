"""A comparison from its plan to its files: runs, ``comparison.json``, ``summary.json``, ``comparison.csv``, ``.md``, ``.tex``, the page.

Each run has a folder of its own in the comparison's. A finished run is used as it is, whatever its folder is called, so a comparison can
grow by methods, seeds, rates; an interrupted one goes on. One run that fails does not lose the others. This module does not know the
command line.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from itertools import combinations
from pathlib import Path
from typing import Any

from fedloom.run.checkpoint import data_of, holds_training, model_of, same_data, write_atomically
from fedloom.run.comparison.as_csv import as_csv
from fedloom.run.comparison.as_tex import as_tex
from fedloom.run.comparison.jobs import carry_out, ended_before, order_of
from fedloom.run.comparison.plan import Ended, Plan, Run
from fedloom.run.comparison.rehearsal import rehearse
from fedloom.run.comparison.summary import summarise
from fedloom.run.comparison.tables import as_markdown
from fedloom.run.comparison.watching import Watching
from fedloom.run.errors import CheckpointError, ExperimentError
from fedloom.run.experiment import as_meant, completed, digest_of
from fedloom.run.folder import check
from fedloom.run.lock import only_one
from fedloom.run.tracking import insist_on_trackers
from fedloom.run.world import adapter_of, read_data


@dataclass(frozen=True)
class Comparison:
    """The results that the table tells, in order; the summary; what failed (run -> paragraph); the report if anything ended."""

    results: list[Mapping[str, Any]]
    summary: Mapping[str, Any] | None
    failed: dict[str, str]
    report: Path | None


def compare(
    plan: Plan,
    out: Path,
    jobs: int = 1,
    plain: bool | None = None,
    reference: str = "",
    target: float | None = None,
    track: Sequence[str] = (),
) -> Comparison:
    """Carry out ``plan`` in ``out``, ``jobs`` runs at a time. ``reference``: the method that others are set against ("": the first).
    ``track``: trackers that are told of every run that is carried out, by name (``tracking.py``).

    Raises:
        ExperimentError: something asked for makes no sense, or a method refuses it; nothing was started.
        CheckpointError: a folder belongs to something else; nothing was started.
        DataError: the data cannot be read or partitioned; nothing was started.
    """
    insist_on_trackers(track)
    reference = reference or next(iter(plan.methods))
    if reference not in plan.methods:
        raise ExperimentError(f"--reference {reference} is not compared; there are {', '.join(plan.methods)}")
    if jobs < 1:
        raise ExperimentError(f"--jobs is {jobs}; it must be at least 1")
    if out.exists() and not out.is_dir():
        raise CheckpointError(f"{out} is a file; --out must name a folder")
    if holds_training(out) or (out / "results.json").exists():
        raise CheckpointError(f"{out} is the folder of one run, whose report would be written over; give another --out")
    folder = homes(out)
    runs = [*plan.wanted({}).values(), *plan.every()]
    for run in runs:
        check(folder(run), run.experiment)
        if jobs > 1:
            order_of(run.experiment, folder(run), None)
    known = {run.name: how for run in runs if (how := ended_before(folder(run), run.experiment)) is not None}
    if plan.wanted(known).keys() - known.keys():  # rates that no search chose need not have been run with every seed
        unread = [run.experiment for run in runs if run.name not in known]
        for experiment in {(e.data, e.alpha, e.seed): e for e in unread}.values():
            read_data(experiment)
    with only_one(out):
        title = f"{', '.join(plan.methods)} on {', '.join(plan.labels.values())} -> {out}"
        with Watching(title, plan.base.rounds, plan.expected, plain) as watch:
            insist_on_the_same_data(runs, folder)
            wanted = plan.wanted(known)
            ahead = [run for name, run in wanted.items() if name not in known]
            if len(begin := {(run.experiment.data, run.method): run.experiment for run in ahead}) > 1:
                watch.before(f"seeing that all of {len(begin)} take what is asked")
                rehearse([(method, experiment) for (_, method), experiment in begin.items()])
            ended = carry_out(plan.wanted, folder, jobs, watch, track, plan.expected(known) - len(wanted.keys() & known.keys()))
        insist_on_the_same_data(runs, folder)
        return _told(plan, ended, folder, out, reference, target)


def insist_on_the_same_data(runs: Sequence[Run], folder: Callable[[Run], Path]) -> None:
    """A table sets methods beside each other that saw the same examples and began with the same pre-trained weights. Checkpoints tell what
    they saw and began with; runs without one do not.

    Raises:
        CheckpointError: of one data set, α and seed some runs saw other data, because files changed in between; or of one data set, seed
            and adapter some began with another model (what is drawn by seed, or split by the adapter's start, is in its fingerprint).
    """
    read: dict[tuple[str, Any], dict[str, list[str]]] = {}
    for run in runs:
        e, place = run.experiment, folder(run)
        data = f"the data behind '{e.data}'", (e.alpha, e.seed)
        model = f"the model '{e.model}'", (e.data, e.seed, e.head, e.precision, adapter_of(e))
        for what, found in ((data, data_of(place)), (model, model_of(place))):
            if found is not None:
                names = read.setdefault(what, {}).setdefault(found, [])
                names += [place.name] if place.name not in names else []
    for (what, _), each in read.items():
        if not all(same_data(one, other) for one, other in combinations(each, 2)):
            told = " and ".join(f"{', '.join(names[:3])}{' …' if len(names) > 3 else ''} ({found})" for found, names in each.items())
            raise CheckpointError(
                f"{what} changed between runs that would stand in one table: {told}. Give another --out, or delete the folders of those "
                "that are out of date"
            )


def _told(
    plan: Plan, ended: Mapping[str, Ended], folder: Callable[[Run], Path], out: Path, reference: str, target: float | None
) -> Comparison:
    """Write what there is to tell."""
    chosen = [(case, m, run) for case in plan.cases for m in plan.methods for run in plan.chosen(case, m, ended)]
    chosen.sort(key=lambda one: (plan.cases.index(one[0]), plan.seeds.index(one[2].experiment.seed)))
    told = [(run, how.results) for _, _, run in chosen if (how := ended.get(run.name)) and how.results is not None]
    lost = {
        name: how.failure for name, how in ended.items() if how.results is None and (not how.diverged or not _outlived(plan, ended, name))
    }
    if not told:
        return Comparison([], None, lost, None)
    summary = summarise(plan, ended, folder, reference, target)
    write_atomically(out / "comparison.json", json.dumps([results for _, results in told], indent=1))
    write_atomically(out / "summary.json", json.dumps(summary, indent=1))
    write_atomically(out / "comparison.csv", as_csv(summary))
    write_atomically(out / "comparison.md", as_markdown(summary))
    write_atomically(out / "comparison.tex", as_tex(summary))
    from fedloom.run.pages.report import write_report  # loads matplotlib, which no run should wait for

    return Comparison([results for _, results in told], summary, lost, write_report(run_folders([out]), out / "report.html", summary))


def _outlived(plan: Plan, ended: Mapping[str, Ended], name: str) -> bool:
    """Whether a run that diverged was one of a search that found a rate nevertheless: that is what a search is for."""
    pairs = [(case, method) for case in plan.cases for method in plan.methods]
    chosen = {run.name for case, method in pairs for run in plan.chosen(case, method, ended)}
    tried = [(pair, run) for pair in pairs for run in plan.tries(*pair).values()]
    return name not in chosen and any(plan.choice(*pair, ended).made for pair, run in tried if name in (run.name, run.trained))


def homes(out: Path) -> Callable[[Run], Path]:
    """The folder of a run: the one in ``out`` that holds its experiment already, whatever it is called, else one of the run's name. Its
    method may be of a Python file: what is saved there is read as of the class that is compared."""
    saved: list[tuple[Path, Mapping[str, Any]]] = []
    for path in sorted(out.glob("*/experiment.json")):
        try:
            saved.append((path.parent, dict(json.loads(path.read_text(encoding="utf-8")))))
        except (ValueError, TypeError):
            continue  # told when it is needed

    @cache
    def there(kind: type[Any]) -> Mapping[str, Path]:
        mine = [(place, e) for place, e in saved if isinstance(e.get("method"), Mapping) and e["method"].get("name") == kind.name]
        return {digest_of(completed(e, {kind.name: kind})): place for place, e in reversed(mine)}  # of equals the first

    return lambda run: there(type(run.experiment.method)).get(digest_of(as_meant(run.experiment)), out / run.name)


def run_folders(places: Sequence[Path]) -> list[Path]:
    """The run folders that ``places`` mean: each itself, or, for the folder of a comparison, those of its table, in order."""
    found: list[Path] = []
    for place in places:
        if (place / "experiment.json").exists():
            found.append(place)
            continue
        summary = summary_in(place)
        told = [place / name for c in summary["cases"] for row in c["rows"] for name in row["runs"].values()] if summary else []
        inside = told or [p.parent for p in sorted(place.glob("*/experiment.json"))]
        found += inside or [place]
    return found


def summary_in(place: Path) -> Mapping[str, Any] | None:
    """The summary of the comparison in that folder.

    Raises:
        ValueError: it is corrupt.
    """
    path = place / "summary.json"
    if not path.is_file():
        return None
    try:
        return dict(json.loads(path.read_text(encoding="utf-8")))
    except (ValueError, TypeError) as error:
        raise ValueError(f"{path} is corrupt: {error}; run the comparison again to mend it") from error
