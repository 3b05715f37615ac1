"""Reading run folders: ``experiment.json``, ``rounds.jsonl``, and ``results.json`` once the run has ended.

This module does not know who reads, nor how a run is made; it never writes.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fedloom.data.numbers import EXACT

EXPERIMENT_KEYS = ("method", "data", "model", "clients", "cohort", "rounds", "partition", "alpha", "seed", "device")
ROW_KEYS = (
    *("round", "loss", "personalised", "global", "examples", "train_seconds", "bytes_up", "bytes_down"),
    *("host_seconds", "device_seconds", "peak_rss_bytes", "answered", "failed", "validation"),
)
RESULT_KEYS = (
    *("method", "metric", "rounds", "seed", "final", "best", "bytes_up", "bytes_down", "setup_bytes_up", "setup_bytes_down"),
    *("examples", "setup_examples", "host_seconds", "device_seconds", "setup_device_seconds", "peak_rss_bytes"),
    *("notes", "per_device", "partition", "facts"),
)

MEND = "Restore its folder from a copy, or delete it and run anew: the same command would go on from what is there"
"""What to do about a corrupt file of a run."""


@dataclass(frozen=True)
class RunFolder:
    """What a run folder says. ``results`` is None while the run has not ended; ``torn``: its last row is only half written."""

    folder: Path
    experiment: Mapping[str, Any]
    rows: Sequence[Mapping[str, Any]]
    results: Mapping[str, Any] | None
    torn: bool = False

    @property
    def method(self) -> str:
        """The method's name, with its curriculum's; an experiment holds it as text or as an object."""
        method = self.experiment["method"]
        return full_name(method) if isinstance(method, Mapping) else str(method)

    @property
    def done(self) -> int:
        return int(self.rows[-1]["round"]) if self.rows else 0


def full_name(method: Mapping[str, Any]) -> str:
    """The name that an experiment's method (as JSON) goes by: METHOD, or METHOD+CURRICULUM where it was given another than its own."""
    holder: Any = method
    while isinstance(holder, Mapping) and "curriculum" not in holder:
        holder = holder.get("inner")
    chosen = holder["curriculum"].get("name") if isinstance(holder, Mapping) else None  # one without a name is a method's own
    its_own = chosen is None or (chosen == "none" and "inner" not in holder)
    return str(method["name"]) if its_own else f"{method['name']}+{chosen}"


def read(folder: Path) -> RunFolder:
    """Read and check a run folder. A last row without its line end is a row being written, not an error.

    Raises:
        FileNotFoundError: no ``experiment.json`` or ``rounds.jsonl``.
        ValueError: a file that is not what it should be, with its line where it has lines.
    """
    experiment = _object(_text(folder / "experiment.json"), EXPERIMENT_KEYS, str(folder / "experiment.json"))
    path = folder / "rounds.jsonl"
    *lines, rest = _text(path).split("\n")
    rows = [_object(line, ROW_KEYS, f"{path}, line {i}") for i, line in enumerate(lines, 1) if line.strip()]
    results = folder / "results.json"
    ended = _object(_text(results), RESULT_KEYS, str(results)) if results.exists() else None
    return RunFolder(folder, experiment, rows, ended, torn=bool(rest.strip()))


def _text(path: Path) -> str:
    if not path.is_file():
        raise FileNotFoundError(f"{path} is missing; a run folder has experiment.json and rounds.jsonl, and results.json once ended")
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is corrupt: {error}. {MEND}") from error


def _object(text: str, keys: Sequence[str], place: str) -> dict[str, Any]:
    try:
        value = json.loads(text)
    except json.JSONDecodeError as error:
        raise ValueError(f"{place} is corrupt: it is not JSON ({error}). {MEND}") from error
    if not isinstance(value, dict):
        raise ValueError(f"{place} is corrupt: a JSON object is needed, a {type(value).__name__} came. {MEND}")
    if missing := [key for key in keys if key not in value]:
        raise ValueError(f"{place} is corrupt: it lacks {missing}; it has {sorted(value)}. {MEND}")
    return value


def solved(row: Mapping[str, Any], protocol: str) -> float | None:
    """The exact match that a row, or a result's ``final`` or ``best``, tells; None where it tells none."""
    return (row.get(EXACT) or {}).get(protocol)


def label_runs(runs: Sequence[RunFolder]) -> list[str]:
    """A short label for each run that no other has: its method, with its seed if needed, else its folder."""
    candidates = (
        [run.method for run in runs],
        [f"{run.method}, seed {run.experiment['seed']}" for run in runs],
        [f"{run.method}, {run.folder.name}" for run in runs],
    )
    return next((c for c in candidates if len(set(c)) == len(runs)), [f"{run.method}, {run.folder}" for run in runs])


def flat_settings(value: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested settings under dotted names, in their order."""
    flat: dict[str, Any] = {}
    for key, inner in value.items():
        if isinstance(inner, Mapping) and inner:
            flat |= flat_settings(inner, f"{prefix}{key}.")
        else:
            flat[f"{prefix}{key}"] = inner
    return flat
