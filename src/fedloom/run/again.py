"""Evaluating the last checkpoint of a run once more, and saying whether that gives what was recorded. Writes nothing.

The same trained tensors can also be evaluated as another method that trains alike but predicts otherwise (``lora`` as ``lora-finetuned``).
"""

from __future__ import annotations

import dataclasses
import json
import logging
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from fedloom.data.numbers import EXACT as NUMBERS
from fedloom.data.tasks import FURTHER
from fedloom.methods.method import says
from fedloom.run import checkpoint
from fedloom.run.adopt import prepared_for
from fedloom.run.errors import CheckpointError, ExperimentError
from fedloom.run.evaluation import evaluate
from fedloom.run.experiment import Experiment
from fedloom.run.lock import only_one
from fedloom.run.reading import read
from fedloom.run.starting import stand_at
from fedloom.run.world import build, store_in

log = logging.getLogger("fedloom")


@dataclass(frozen=True)
class Again:
    """Scores by split and protocol, what had been recorded for the same round (None: nothing, or another method), and the round."""

    method: str
    metric: str
    round: int
    scores: dict[str, dict[str, Any]]
    recorded: dict[str, dict[str, Any]] | None

    @property
    def equal(self) -> bool:
        """Whether every recorded number came out again, bit for bit."""
        return self.scores == self.recorded


def evaluate_again(experiment: Experiment, folder: Path, kind: type[Any] | None = None) -> Again:
    """Both protocols at the last completed round of the run in ``folder``; ``kind``: as that method instead.

    Raises:
        CheckpointError: no completed round, a corrupt checkpoint, other data than the run had, or a server's run.
        ExperimentError: a method that cannot use what was trained.
    """
    if checkpoint.is_served(folder):
        raise CheckpointError(
            f"{folder} is a server's: its devices have their data and states, and only they can predict again. What they told is in "
            "results.json; 'fedloom export' gives the shared model"
        )
    other = _as_method(experiment, kind) if kind and kind is not type(experiment.method) else None
    with only_one(folder, reading=True), TemporaryDirectory(prefix="fedloom-") as aside:
        store = store_in(folder, Path(aside))
        saved = checkpoint.load(folder, store)
        if saved is None:
            raise CheckpointError(f"{folder} holds no completed round yet; run it first")
        world = build(other or experiment)
        if not checkpoint.same_data(saved.data, world.fingerprint()):
            raise CheckpointError(f"the data behind {folder} changed since it was trained (fingerprint {saved.data}); restore the data")
        if said := stand_at(world.model, saved.start, folder, saved.model):
            log.warning(said)
        engine, state = world.engine(store), saved.state
        if other is not None:
            state = prepared_for(world, engine, state)
        recorded = None if other else _recorded(folder, state.round)
        writes = recorded is None or NUMBERS in recorded["test"]  # a run of an earlier version has told no numbers
        found = evaluate(world, state, engine, store=store if writes else None)
    if recorded is not None and FURTHER not in recorded["test"]:  # nor further scores
        found = dataclasses.replace(found, scores={s: {k: v for k, v in of.items() if k != FURTHER} for s, of in found.scores.items()})
    name = (other or experiment).method_name
    return Again(name, world.source.task.metric, state.round, json.loads(json.dumps(found.scores)), recorded)


def _as_method(experiment: Experiment, kind: type[Any]) -> Experiment:
    held = {f.name for f in dataclasses.fields(kind)}
    if "inner" not in held:
        raise ExperimentError(f"'{kind.name}' holds no inner method, so it cannot take over what '{experiment.method_name}' trained")
    if type(kind().inner) is not type(experiment.method):
        raise ExperimentError(
            f"'{kind.name}' trains by '{type(kind().inner).name}', and the run by '{experiment.method_name}'; "
            "give a method that trains alike"
        )
    if not says(kind(), "trains_as_inner"):
        raise ExperimentError(
            f"'{kind.name}' does not train as '{experiment.method_name}' does, whatever it shares; it must be trained. "
            "A method that only predicts otherwise says so: trains_as_inner = True"
        )
    return dataclasses.replace(experiment, method=kind(inner=experiment.method))


def _recorded(folder: Path, round: int) -> dict[str, dict[str, Any]] | None:
    row = next((r for r in read(folder).rows if r["round"] == round), None)
    if row is None or row["validation"]["personalised"] is None:
        return None
    test = {key: row[key] for key in ("personalised", "global", NUMBERS, FURTHER) if key in row}
    return {"validation": dict(row["validation"]), "test": test}
