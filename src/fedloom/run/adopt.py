"""A run that takes over what another method trained: a method that trains as the one it holds does, and only predicts otherwise.

Its folder is a run folder like any other, with a checkpoint. Rows, bytes, examples and times of the rounds are the trained run's; set-up
is its own. Only the last round is evaluated, because the models of the rounds before it are gone: ``best`` is ``final``.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from fedloom.data.tasks import Split
from fedloom.engines.engine import Engine, drive
from fedloom.messages import Replies, Task
from fedloom.methods.method import State, set_up
from fedloom.run import checkpoint
from fedloom.run.checkpoint import Saved, write_atomically
from fedloom.run.costs.ledger import Ledger
from fedloom.run.costs.memory import Portion
from fedloom.run.errors import CheckpointError, ExperimentError
from fedloom.run.evaluation import Evaluation, evaluate, nothing
from fedloom.run.experiment import Experiment
from fedloom.run.folder import check, claim, told_at_the_end
from fedloom.run.lock import only_one
from fedloom.run.loop import Told, begin, engine_of, finish, loaded
from fedloom.run.starting import OR_ANOTHER, stand_at, start_of
from fedloom.run.terminal.console import Show
from fedloom.run.tracking import insist_on_trackers, track_ended
from fedloom.run.world import World, build, store_in

TAKEN_OVER = "trained by "
"""How the last note of such a run begins: its rounds' costs are the trained run's, and were spent once."""


def adopt(
    experiment: Experiment, folder: Path, trained: Path, show: Show, track: Sequence[str] = (), portion: Portion | None = None
) -> dict[str, Any]:
    """Evaluate ``experiment`` in ``folder`` on what its method's inner method trained in ``trained``; what ``results.json`` then holds.
    ``track``: trackers that are told, by name (``tracking.py``). ``portion``: its part of the machine's memory, where others run beside it.

    Raises:
        CheckpointError: a folder belongs to another experiment, the training has not ended, or the data changed since.
        ExperimentError: the method shares other tensors than were trained, layers stay on devices, there is no room for the model, or a
            tracker does not exist or lacks its library.
    """
    insist_on_trackers(track)
    if experiment.share.some:
        raise ExperimentError(
            "layers that stay on devices (--share) lie in the folder of the run that trained them and nowhere else; train "
            f"'{experiment.method_name}' itself, or evaluate that run: fedloom evaluate RUN --method"
        )
    with only_one(folder):
        if check(folder, experiment) and (folder / "results.json").exists():
            found = told_at_the_end(folder / "results.json")
            track_ended(track, experiment, folder, found)
            return found
        check(trained, replace(experiment, method=experiment.method.inner))
        saved = checkpoint.load(trained, store_in(trained))
        if saved is None or saved.state.round < experiment.rounds:
            raise CheckpointError(f"the training in {trained} has not ended; run it first")
        show.phase("loading data and model")
        world, _, _ = loaded(experiment, build, portion)
        if not checkpoint.same_data(saved.data, world.fingerprint()):
            raise CheckpointError(f"the data behind {trained} changed since it was trained (fingerprint {saved.data}); give another --out")
        if said := stand_at(world.model, saved.start, trained, saved.model, OR_ANOTHER):
            show.note(said)
        claim(folder, experiment)
        store = store_in(folder)
        ledger = Ledger(folder, world.fleet, saved.totals)
        ledger.totals.update({name: 0 for name in ledger.totals if name.startswith("setup_")})
        section, engine = ledger.section(), engine_of(world, store)
        state = prepared_for(world, Told(engine, show), saved.state, section.hear)
        begin(section, world, world.pool.clients)
        ledger.set_up(section)
        show.phase(f"evaluating what {trained.name} trained")
        found = evaluate(world, state, engine, store=store)
        write_atomically(ledger.path, "".join(json.dumps(row) + "\n" for row in _rows(trained, found, nothing(world))))
        checkpoint.save(
            folder, Saved(state, ledger.totals, saved.data, start=start_of(world.model), model=saved.model, names=world.outputs), store
        )
        results = finish(world, folder, state, ledger, found, store, [f"{TAKEN_OVER}{trained.name}; evaluated after the last round only"])
        track_ended(track, experiment, folder, results)
        return results


def prepared_for(world: World, engine: Engine, trained: State, seen: Callable[[Sequence[Task], Replies], None] | None = None) -> State:
    """What was ``trained``, as the world's method takes it over: what its own set-up makes for the server is its own, all else stays.
    ``seen``: who hears that set-up, as of :func:`~fedloom.engines.engine.drive`.

    Raises:
        ExperimentError: the method shares other tensors than were trained.
    """
    e = world.experiment
    prepared = drive(set_up(e.method, world.model, world.pool), engine, quorum=0, seen=seen)
    if prepared.shared.keys() != trained.shared.keys():
        did = replace(e, method=e.method.inner).method_name
        raise ExperimentError(f"'{e.method_name}' shares other tensors than '{did}' did; it must be trained")
    return replace(trained, server=prepared.server, facts=prepared.facts)


def _rows(trained: Path, found: Evaluation, unknown: Mapping[Split, dict[str, Any]]) -> list[dict[str, Any]]:
    """The trained run's rows with what was ``found`` in the last and ``unknown`` scores in the others."""
    rows = [json.loads(line) for line in (trained / "rounds.jsonl").read_text().splitlines()]
    blank = {**unknown["test"], "validation": unknown["validation"], "personalising": None}
    last = {**found.scores["test"], "validation": found.scores["validation"], "personalising": found.personalising}
    return [{**row, **blank} for row in rows[:-1]] + [{**rows[-1], **last}]
