"""What a run tells to trackers: its settings once, the numbers of every round, the scores at the end.

A tracker is told of a round once the round is in the checkpoint, so it never has one that is taken back; what it lacks when a run goes on
is filled in from ``rounds.jsonl``. It belongs to no experiment: neither the digest nor any result depends on it. One that fails is warned
of and told no more, and the run goes on; the same command later fills in what it lacks.

This module imports no tracker's library. Each has its file in ``trackers/``, which is the library's door.
"""

from __future__ import annotations

import importlib.util
import json
import logging
import os
import shutil
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any, Literal, Protocol, Self
from uuid import uuid4

from fedloom.run.checkpoint import write_atomically
from fedloom.run.errors import ExperimentError
from fedloom.run.experiment import Experiment, as_json

log = logging.getLogger("fedloom")

Name = Literal["tensorboard", "mlflow", "wandb"]
"""The trackers there are, as ``--track`` names them."""

ALWAYS = "bytes_up"
"""A number that every round has: by it a tracker knows which rounds it has."""


@dataclass(frozen=True)
class Subject:
    """The run that a tracker is told of. ``folder``: where the tracker writes; ``id``: 32 hex digits, the same whenever the run goes on;
    ``settings``: the experiment's, flat, and its digest."""

    folder: Path
    name: str
    id: str
    settings: Mapping[str, Any]


class Tracker(Protocol):
    """One tracker, open for one run."""

    def known(self) -> Collection[int]:
        """The rounds that it has already."""
        ...

    def round(self, round: int, numbers: Mapping[str, float]) -> None:
        """The numbers of one round: all of them are kept, or none."""
        ...

    def end(self, round: int, numbers: Mapping[str, float]) -> None:
        """The scores of a run whose last round was ``round``."""
        ...

    def close(self, failed: bool) -> None:
        """No more is told for now. ``failed``: the run has not ended, but stopped."""
        ...


@dataclass(frozen=True)
class Kind:
    """A kind of tracker: how it is opened, the libraries that it needs, and what its environment has where the user has not set it."""

    open: Callable[[Subject], Tracker]
    libraries: tuple[str, ...]
    environment: Mapping[str, str] = field(default_factory=dict)


def _tensorboard(subject: Subject) -> Tracker:
    from fedloom.run.trackers.tensorboard import TensorBoard

    return TensorBoard(subject)


def _mlflow(subject: Subject) -> Tracker:
    from fedloom.run.trackers.mlflow import MLflow

    return MLflow(subject)


def _wandb(subject: Subject) -> Tracker:
    from fedloom.run.trackers.wandb import WandB

    return WandB(subject)


KINDS: dict[str, Kind] = {
    "tensorboard": Kind(_tensorboard, ("tensorboard",)),
    "mlflow": Kind(
        _mlflow,
        ("mlflow", "sqlalchemy", "alembic"),
        # No report of its own use over the network; and a server that is away holds a run up for seconds, not for minutes.
        {"MLFLOW_DISABLE_TELEMETRY": "true", "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "2", "MLFLOW_HTTP_REQUEST_TIMEOUT": "20"},
    ),
    "wandb": Kind(_wandb, ("wandb",), {"WANDB_ERROR_REPORTING": "false"}),
}
"""Every kind by its name."""


def insist_on_trackers(names: Sequence[str]) -> None:
    """Check, before anything is computed, that these trackers exist and that what they need is installed. Imports nothing.

    Raises:
        ExperimentError: one does not exist, or a library is missing.
    """
    unknown = [name for name in names if name not in KINDS]
    if unknown:
        raise ExperimentError(f"--track {' '.join(unknown)}: there is no such tracker; there are {', '.join(KINDS)}")
    missing = {name: [each for each in KINDS[name].libraries if not _installed(each)] for name in names}
    told = [f"--track {name} needs {', '.join(libraries)}" for name, libraries in missing.items() if libraries]
    if told:
        raise ExperimentError(
            f"{'; '.join(told)}, which is not installed; pip install -e '.[track]' in Fedloom's folder installs what trackers need"
        )


def _installed(library: str) -> bool:
    """Whether there is such a library; a folder of its name, as ``wandb`` makes one wherever it runs, is none."""
    found = importlib.util.find_spec(library)
    return found is not None and found.origin is not None


class Tracking:
    """The trackers of one run, as a context manager. The run's folder must be claimed; ``folder/NAME`` is where each writes.

    Call :meth:`resume` with the rows there are, :meth:`round` with each that is added, and :meth:`end` with what ``results.json`` holds.
    """

    def __init__(self, names: Sequence[str], experiment: Experiment, folder: Path) -> None:
        insist_on_trackers(names)
        self.folder, self.last = folder, 0
        self.settings = {**flat(as_json(experiment), "."), "digest": experiment.digest()} if names else {}
        self.names = [name for name in dict.fromkeys(names) if not (folder / name / COMPLETE).exists()]
        self.open: dict[str, Tracker] = {}

    def __enter__(self) -> Self:
        for name in self.names:
            self._try(name, lambda name: self.open.update({name: KINDS[name].open(self._subject(name))}))
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        for name in list(self.open):
            self._try(name, lambda name: self.open[name].close(failed=kind is not None))

    def resume(self, rows: Sequence[Mapping[str, Any]]) -> None:
        """Fill in these rows of ``rounds.jsonl`` where a tracker lacks them."""
        for name in list(self.open):
            self._try(name, lambda name: self._fill(self.open[name], rows))
        self.last = max([self.last, *(int(row["round"]) for row in rows)])

    def round(self, row: Mapping[str, Any]) -> None:
        """One more row of ``rounds.jsonl``, of a round that is in the checkpoint."""
        for name in list(self.open):
            self._try(name, lambda name: self.open[name].round(int(row["round"]), numbers(row)))
        self.last = int(row["round"])

    def end(self, results: Mapping[str, Any]) -> None:
        """The run has ended; its folder is marked, so that nothing is told twice."""
        told = {key: value for at in ("final", "best") for key, value in flat({at: results[at]}).items() if is_number(value)}
        for name in list(self.open):
            self._try(name, lambda name: self._end(name, told))

    def _fill(self, tracker: Tracker, rows: Sequence[Mapping[str, Any]]) -> None:
        known = tracker.known()
        for row in rows:
            if row["round"] not in known:
                tracker.round(int(row["round"]), numbers(row))

    def _end(self, name: str, told: Mapping[str, float]) -> None:
        self.open[name].end(self.last, told)
        self.open.pop(name).close(failed=False)
        (self.folder / name / COMPLETE).touch()

    def _subject(self, name: str) -> Subject:
        for variable, value in KINDS[name].environment.items():
            os.environ.setdefault(variable, value)
        place = self.folder / name
        if not (place / ID).exists():
            write_atomically(place / ID, uuid4().hex)
        return Subject(place, self.folder.resolve().name, (place / ID).read_text(), self.settings)

    def _try(self, name: str, action: Callable[[str], None]) -> None:
        """Let a tracker do something. One that fails is warned of and told no more."""
        try:
            action(name)
        except Exception as error:
            self.open.pop(name, None)
            said = " ".join(str(error).split())[:MOST]
            mend = "the run goes on without it. Given again once that is mended, the same command fills in what it lacks"
            log.warning(f"--track {name} failed ({type(error).__name__}: {said}); {mend}")


def forget(folder: Path) -> None:
    """Delete what trackers keep in a run's folder: it was of another experiment. A folder without our mark is the user's."""
    for name in KINDS:
        if (folder / name / ID).is_file():
            shutil.rmtree(folder / name)


COMPLETE, ID = "complete", "id"
"""Files in a tracker's folder: it has been told everything; by what it knows the run again."""

MOST = 300
"""Characters of a library's error that are told."""


def track_ended(names: Sequence[str], experiment: Experiment, folder: Path, results: Mapping[str, Any]) -> None:
    """Tell trackers what they lack of a run that has ended in ``folder`` with these results."""
    with Tracking(names, experiment, folder) as tracking:
        tracking.resume([json.loads(line) for line in (folder / "rounds.jsonl").read_text(encoding="utf-8").splitlines()])
        tracking.end(results)


def numbers(row: Mapping[str, Any]) -> dict[str, float]:
    """Every number of a row of ``rounds.jsonl``, by its name there, with ``/`` where one lies in another. Of devices it is how many.

    >>> numbers({"round": 3, "loss": 0.5, "bytes_up": 8, "global": None, "answered": [4, 1], "failed": {}, "validation": {"global": 0.25}})
    {'loss': 0.5, 'bytes_up': 8, 'answered': 2, 'failed': 0, 'validation/global': 0.25}
    """
    counted = {**row, "answered": len(set(row["answered"])), "failed": len(row["failed"])}
    return {key: value for key, value in flat(counted).items() if is_number(value) and key != "round"}


def flat(nested: Mapping[str, Any], joint: str = "/", before: str = "") -> dict[str, Any]:
    """An object of objects as one.

    >>> flat({"a": 1, "b": {"c": "x"}}, ".")
    {'a': 1, 'b.c': 'x'}
    """
    found: dict[str, Any] = {}
    for key, value in nested.items():
        found |= flat(value, joint, f"{before}{key}{joint}") if isinstance(value, Mapping) else {f"{before}{key}": value}
    return found


def is_number(value: Any) -> bool:
    """Whether it can be drawn."""
    return isinstance(value, int | float) and not isinstance(value, bool)
