"""One self-contained HTML page about one run or several: figures, tables, configuration. It asks nothing of the network.

The page is a pure function of the run folders' files (``reading.py``). A run that has not ended yet is shown as far as it went,
and the page says so.

This module does not know how a run is made, nor matplotlib (``drawing.py``). Nothing else imports jinja2.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from jinja2 import Environment, PackageLoader, StrictUndefined

from fedloom.run.checkpoint import write_atomically
from fedloom.run.pages import drawing, figures
from fedloom.run.pages.comparison_page import comparison_of, solved_curves
from fedloom.run.pages.spent import spent
from fedloom.run.reading import RunFolder, flat_settings, label_runs, read
from fedloom.run.terminal.console import human_bytes, human_seconds, score_text

DRAWN_FACTS = ("layer_scores", "pacing", "opens", "gal_history", "adapted")
"""Facts that are shown as figures rather than as text."""

SHOWN_DEVICES = 200
SHOWN_RUNS = 12


def write_report(folders: Sequence[Path], out: Path, summary: Mapping[str, Any] | None = None) -> Path:
    """Write the page about these run folders to ``out``, replacing it in one step, and return ``out``. ``summary``: of the comparison
    whose runs they are; not all of them are then shown one by one.

    Raises:
        FileNotFoundError: a folder without ``experiment.json`` or ``rounds.jsonl``.
        ValueError: no folder was named, ``out`` is a folder, or a file is corrupt; the message names the file.
    """
    if not folders:
        raise ValueError("a report needs at least one run folder; none was named")
    if out.is_dir():
        raise ValueError(f"{out} is a folder; name the file to write, such as {out / 'report.html'}")
    page = page_of([read(Path(folder)) for folder in folders], summary)
    write_atomically(out, page, f"{os.getpid()}.tmp")
    return out


def page_of(runs: Sequence[RunFolder], summary: Mapping[str, Any] | None = None) -> str:
    """The HTML of the page about these runs, and the comparison that they make."""
    compared = None if summary is None else comparison_of(summary, runs)
    kept = runs if compared is None else _some(runs)
    omitted, runs = len(runs) - len(kept), kept
    environment = Environment(
        loader=PackageLoader("fedloom.run.pages", "templates"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters.update(bytes=human_bytes, seconds=human_seconds, score=score_text)
    labels = label_runs(runs)
    return environment.get_template("report.html.j2").render(
        comparison=compared,
        omitted=omitted,
        title=", ".join(dict.fromkeys(run.method for run in runs)) + f" on {runs[0].experiment['data']}",
        experiment=runs[0].experiment,
        runs=[_headline(run, label, i) for i, (run, label) in enumerate(zip(runs, labels, strict=True))],
        highest=_highest(runs),
        metrics=sorted({run.results["metric"] for run in runs if run.results}),
        differing=_differing(runs),
        uncertainty=_uncertainty(runs),
        curves=_curves(runs, labels),
        partitions=_partitions(runs, labels),
        facts=[(label, *_facts(run, f"facts{i}")) for i, (run, label) in enumerate(zip(runs, labels, strict=True))],
        samples=[(label, told) for run, label in zip(runs, labels, strict=True) if (told := (run.results or {}).get("samples"))],
        solved=[(label, told) for run, label in zip(runs, labels, strict=True) if (told := (run.results or {}).get("exact_match"))],
        devices=[(label, _devices(run)) for run, label in zip(runs, labels, strict=True) if run.results],
        shown=SHOWN_DEVICES,
        notes=[(label, _notes(run)) for run, label in zip(runs, labels, strict=True)],
        configuration=_configuration(runs),
        labels=labels,
    )


def _some(runs: Sequence[RunFolder]) -> list[RunFolder]:
    """Those of a comparison that are shown one by one: of the first case, and, if these are many, of the first seed."""
    kept = [
        run
        for run in runs
        if (run.experiment["data"], run.experiment["alpha"]) == (runs[0].experiment["data"], runs[0].experiment["alpha"])
    ]
    return kept if len(kept) <= SHOWN_RUNS else [run for run in kept if run.experiment["seed"] == runs[0].experiment["seed"]]


def _headline(run: RunFolder, label: str, i: int) -> dict[str, Any]:
    """The run's line in the first table. A run that has not ended shows its last evaluated scores and the costs so far."""
    total = {key: sum(row[key] for row in run.rows) for key in ("bytes_up", "bytes_down", "device_seconds", "host_seconds")}
    nothing = {"personalised": None, "global": None, "round": None}
    evaluated = [row for row in run.rows if row["personalised"] is not None or row["global"] is not None]
    setup = dict.fromkeys(("setup_bytes_up", "setup_bytes_down", "setup_device_seconds"))
    colour, dash, _ = drawing.appearance(i)
    known = run.results or {"final": evaluated[-1] if evaluated else nothing, "best": nothing, **total, **setup}
    return {
        "label": label,
        "colour": colour,
        "dash": {"-": "none", "--": "5 3", ":": "2 2", "-.": "6 2 2 2"}[dash],
        "ended": run.results is not None,
        "done": run.done,
        "rounds": run.experiment["rounds"],
        "setup_host_seconds": known.get("setup_host_seconds"),
        **{key: known[key] for key in ("final", "best", *total, *setup)},
    }


def _highest(runs: Sequence[RunFolder]) -> dict[str, float | None]:
    """The highest score of each column, to be set in bold; none for one run or where the metrics differ."""
    ended = [run.results for run in runs if run.results]
    comparable = len(ended) > 1 and len({result["metric"] for result in ended}) == 1
    columns = [(at, protocol) for at in ("final", "best") for protocol in ("personalised", "global")]
    scores = {column: [r[column[0]][column[1]] for r in ended if r[column[0]][column[1]] is not None] for column in columns}
    return {f"{at}.{protocol}": max(scores[at, protocol], default=None) if comparable else None for at, protocol in columns}


def _uncertainty(runs: Sequence[RunFolder]) -> tuple[int, float] | None:
    """Test examples and one standard error of the first run's final accuracy, where there is one."""
    result = runs[0].results
    if result is None or result["metric"] != "accuracy" or not result["per_device"]:
        return None
    score = result["final"]["personalised"]
    examples = sum(device["test"] for device in result["per_device"])
    return (examples, math.sqrt(score * (1 - score) / examples)) if examples and score is not None else None


def _differing(runs: Sequence[RunFolder]) -> list[str]:
    """Settings in which the runs are not alike, but for the method's and the engine's (which says how, not what)."""
    flat = [flat_settings(run.experiment) for run in runs]
    keys = dict.fromkeys(key for each in flat for key in each if key.split(".")[0] not in ("method", "engine"))
    return [key for key in keys if len({json.dumps(each.get(key)) for each in flat}) > 1]


def _picture(svg: bytes, name: str) -> str:
    """An SVG as part of the page. The template does not escape it: matplotlib has escaped the text in it."""
    return drawing.inline(svg, name)


def _curves(runs: Sequence[RunFolder], labels: Sequence[str]) -> dict[str, list[str]]:
    """Pictures under the heading they stand under; empty while no round has been written."""
    tracks = [_track(run, label) for run, label in zip(runs, labels, strict=True) if run.rows]
    if not tracks:
        return {}
    metric = " / ".join(dict.fromkeys(str(run.results["metric"]) for run in runs if run.results)) or "score"
    headings: dict[str, figures.Against] = {
        "Against rounds": "round",
        "Against bytes": "bytes",
        "Against device time": "device",
    }
    protocols: tuple[figures.Protocol, ...] = ("personalised", "global")
    pictures = {
        heading: [_picture(figures.metric_curve(tracks, p, against, metric), f"{p}-{against}") for p in protocols]
        for heading, against in headings.items()
    }
    return {**pictures, **solved_curves(tracks, "numbers", ["round"]), "Training": [_picture(figures.loss_curve(tracks), "loss")]}


def _track(run: RunFolder, label: str) -> figures.Track:
    if run.results is None:
        return figures.Track(f"{label} (not ended)", run.rows)
    setup = run.results["setup_bytes_up"] + run.results["setup_bytes_down"]
    return figures.Track(label, run.rows, setup, run.results["setup_device_seconds"], run.results["best"]["round"])


def _partitions(runs: Sequence[RunFolder], labels: Sequence[str]) -> list[tuple[str, str]]:
    """One picture for each distinct partition, with the runs that have it."""
    groups: dict[str, list[str]] = {}
    for run, label in zip(runs, labels, strict=True):
        if run.results:
            groups.setdefault(json.dumps(run.results["partition"]), []).append(label)
    pictures = []
    for i, (text, names) in enumerate(groups.items()):
        partition = json.loads(text)
        svg = figures.partition_picture(np.array(partition["train_counts"]), partition["classes"])
        pictures.append((", ".join(names), _picture(svg, f"partition{i}")))
    return pictures


def _facts(run: RunFolder, name: str) -> tuple[list[str], dict[str, str]]:
    """What only this method has to tell: pictures of what can be drawn, and the rest as text."""
    facts = run.results["facts"] if run.results else {}
    pictures = []
    if facts.get("layer_scores") and facts.get("gal"):
        pictures.append(_picture(figures.layer_scores(facts["layer_scores"], facts["gal"]), f"{name}-layers"))
    if facts.get("pacing"):
        pictures.append(_picture(figures.pacing(facts["pacing"], facts.get("opens", "batches")), f"{name}-pacing"))
    if facts.get("gal_history"):
        chosen = {entry["round"]: entry["gal"] for entry in facts["gal_history"]}
        pictures.append(_picture(figures.shared_layers(chosen, facts["depth"], run.experiment["rounds"]), f"{name}-history"))
    texts = {key: _plain(value) for key, value in facts.items() if key not in DRAWN_FACTS or not pictures}
    return pictures, {**texts, **spent(run.results)} if run.results else texts


def _devices(run: RunFolder) -> list[dict[str, Any]]:
    """The per-device table, each row with its most common training label and that label's share."""
    assert run.results is not None
    classes = run.results["partition"]["classes"]
    return [{**device, **_common(device["labels"], classes)} for device in run.results["per_device"]]


def _common(labels: Sequence[int], classes: Sequence[str]) -> dict[str, Any]:
    if not sum(labels):
        return {"common": None, "share": None, "held": 0}
    top = int(np.argmax(labels))
    return {"common": classes[top], "share": labels[top] / sum(labels), "held": sum(count > 0 for count in labels)}


def _notes(run: RunFolder) -> list[str]:
    """The run's own notes, and what its rows say that a reader must know."""
    notes = [str(note) for note in run.results["notes"]] if run.results else ["This run has not ended: there is no results.json yet."]
    if run.torn:
        notes.append("The last line of rounds.jsonl is half written and left out.")
    failed = [(row["round"], client, reason) for row in run.rows for client, reason in row["failed"].items()]
    if failed:
        named = "; ".join(f"round {t}, device {client}: {reason}" for t, client, reason in failed[:5])
        more = f"; and {len(failed) - 5} more" if len(failed) > 5 else ""
        notes.append(f"{len(failed)} answers failed: {named}{more}.")
    return notes


def _configuration(runs: Sequence[RunFolder]) -> list[tuple[str, list[str], bool]]:
    """(setting, its value in each run, whether they differ) for every setting that a run has."""
    flat = [flat_settings(run.experiment) for run in runs]
    rows = []
    for key in dict.fromkeys(key for each in flat for key in each):
        values = [_plain(each[key]) if key in each else "–" for each in flat]
        rows.append((key, values, len(set(values)) > 1))
    return rows


def _plain(value: Any) -> str:
    """A value as a person writes it: text bare, everything else as JSON."""
    return value if isinstance(value, str) and value else json.dumps(value, ensure_ascii=False)
