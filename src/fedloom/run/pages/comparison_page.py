"""What the page says of a comparison as a whole: the tables of its summary and curves of means over seeds, case by case.

This module does not know HTML; ``report.py`` puts what it gives into the page.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from statistics import mean
from typing import Any

from fedloom.data.numbers import EXACT
from fedloom.run.comparison.standing import PROTOCOLS
from fedloom.run.comparison.statistics import spread
from fedloom.run.comparison.tables import terminal
from fedloom.run.comparison.targets import personalising
from fedloom.run.pages import figures
from fedloom.run.pages.drawing import inline
from fedloom.run.pages.standings import standings
from fedloom.run.reading import RunFolder, solved

COSTS = ("bytes_up", "bytes_down", "device_seconds")
AGAINST: tuple[figures.Against, ...] = ("device", "up", "bytes")


def comparison_of(summary: Mapping[str, Any], runs: Sequence[RunFolder]) -> dict[str, Any]:
    """What the template needs; ``runs`` are those of the table, found by their folders' names."""
    by_name = {run.folder.name: run for run in runs}
    return {
        "seeds": len(summary["seeds"]),
        "reference": summary["reference"],
        "confidence": f"{summary['confidence']:.0%}",
        "resamples": f"{summary['resamples']:,}",
        "resampled": summary["resampled"],
        "searched": len(summary["rates"]) > 1,
        "chosen_by": summary["chosen_by"],
        "tables": terminal(summary),
        "standings": inline(standings(summary["cases"], [row["method"] for row in summary["cases"][0]["rows"]]), "standings")
        if len(summary["cases"]) > 1
        else None,
        "lost": [*summary["failed"].items(), *((name, f"diverged. {why}") for name, why in summary["diverged"].items())],
        "curves": [(case["label"], _pictures(case, by_name, f"case{i}")) for i, case in enumerate(summary["cases"])],
    }


def _pictures(case: Mapping[str, Any], by_name: Mapping[str, RunFolder], name: str) -> list[str]:
    """Both protocols against device time, against uploaded bytes and against bytes both ways."""
    tracks = [
        track_of(row["method"], found) for row in case["rows"] if (found := [by_name[f] for f in row["runs"].values() if f in by_name])
    ]
    if not tracks:
        return []
    pictures = []
    for against in AGAINST:
        for protocol in PROTOCOLS:
            goals = [goal for goal in case["target"][protocol].values() if goal is not None]
            svg = figures.metric_curve(tracks, protocol, against, case["metric"], target=mean(goals) if goals else None)
            pictures.append(inline(svg, f"{name}-{protocol}-{against}"))
    return [*pictures, *(one for of in solved_curves(tracks, f"{name}-numbers", AGAINST).values() for one in of)]


def solved_curves(tracks: Sequence[figures.Track], name: str, against: Sequence[figures.Against]) -> dict[str, list[str]]:
    """Curves of exact match, by their heading; nothing where no row tells any."""
    told = [replace(t, rows=[{**row, **{p: solved(row, p) for p in PROTOCOLS}} for row in t.rows], deviations=t.solved) for t in tracks]
    known: list[figures.Protocol] = [p for p in PROTOCOLS if any(row[p] is not None for track in told for row in track.rows)]
    if not known:
        return {}
    pictures = [(p, a, figures.metric_curve(told, p, a, "exact match")) for a in against for p in known]
    return {"Exact match": [inline(svg, f"{name}-{p}-{a}") for p, a, svg in pictures]}


def track_of(label: str, runs: Sequence[RunFolder]) -> figures.Track:
    """The mean of a method's runs, row by row, with the deviations of its scores. A score that one run lacks is left out."""
    rows, deviations, apart = [], {p: [] for p in PROTOCOLS}, {p: [] for p in PROTOCOLS}
    for together in zip(*(run.rows for run in runs), strict=False):
        row: dict[str, Any] = {"round": together[0]["round"], **{key: mean(one[key] for one in together) for key in COSTS}}
        own = [personalising(one) for one in together]
        row["personalising"] = None if None in own else {"device_seconds": mean(own)}  # type: ignore[type-var]
        for p in PROTOCOLS:
            scores = [one[p] for one in together]
            found = spread(scores)
            row[p] = found.mean if None not in scores else None
            deviations[p].append(found.deviation if None not in scores else None)
            shares = [solved(one, p) for one in together]
            found = spread(shares)
            row.setdefault(EXACT, {})[p] = found.mean if None not in shares else None
            apart[p].append(found.deviation if None not in shares else None)
        rows.append(row)
    results = [run.results for run in runs if run.results is not None]
    up, down, seconds = (mean(r[f"setup_{key}"] for r in results) if results else 0.0 for key in COSTS)
    return figures.Track(label, rows, up + down, seconds, setup_up=up, deviations=deviations, solved=apart)
