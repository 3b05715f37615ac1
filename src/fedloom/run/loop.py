"""One run: set-up, rounds, evaluation, checkpoint after every round, results. Running it again in the same folder resumes it."""

from __future__ import annotations

import gc
import json
import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import count
from pathlib import Path
from typing import Any

import numpy as np

from fedloom.client.elsewhere import Elsewhere, Store
from fedloom.client.store import DiskError
from fedloom.compute.flops import start_operations
from fedloom.data.numbers import EXACT
from fedloom.data.tasks import FURTHER
from fedloom.engines.engine import Engine, drive
from fedloom.engines.heap import give_memory_back
from fedloom.messages import CENTRE, CohortFailed, Replies, Take, Task, whole
from fedloom.methods.centralised import Centralised
from fedloom.methods.method import State, one_round, set_up
from fedloom.run import checkpoint
from fedloom.run.checkpoint import Saved, write_atomically
from fedloom.run.costs.holdings import held
from fedloom.run.costs.ledger import Ledger, Section, forget_peak
from fedloom.run.costs.memory import RUN, SERVER, Asker, Need, Portion, Sizes, insist_on_room, sizes_before, sizes_of, told
from fedloom.run.costs.payback import paid_back
from fedloom.run.errors import CheckpointError
from fedloom.run.evaluation import Evaluation, evaluate, nothing
from fedloom.run.experiment import Experiment, as_json
from fedloom.run.export import write_global
from fedloom.run.folder import check, claim, told_at_the_end
from fedloom.run.late import Late, Remembering, welcome
from fedloom.run.lock import only_one
from fedloom.run.numbers import as_told
from fedloom.run.parts import Part
from fedloom.run.samples import samples
from fedloom.run.starting import OR_ANOTHER, begin_on_disk, identity, stand_at, start_of
from fedloom.run.terminal.console import Progress, Show
from fedloom.run.tracking import Tracking, insist_on_trackers, track_ended
from fedloom.run.world import World, build

log = logging.getLogger("fedloom")

LARGE = 10**9
"""Bytes from which on a run tells beforehand how much memory it will take; ``fedloom describe`` always does."""

MISSES = 10
"""Rounds in a row to which too few devices came after which a federation stops."""


@dataclass(frozen=True)
class OneDisk:
    """An engine over devices that keep their state with the run: what the disk does not take is no device's failure but the run's end."""

    inner: Engine

    def run(self, tasks: Sequence[Task], take: Take = whole) -> Replies:
        """As inner.

        Raises:
            DiskError: a device's state could not be written.
        """
        replies = self.inner.run(tasks, take)
        for failure in replies.failures:
            if failure.reason.startswith(f"{DiskError.__name__}: "):
                raise DiskError(failure.reason.removeprefix(f"{DiskError.__name__}: "))
        return replies


@dataclass(frozen=True)
class Told:
    """An engine that says what it is about to do."""

    inner: Engine
    show: Show

    def run(self, tasks: Sequence[Task], take: Take = whole) -> Replies:
        """As inner."""
        if tasks:
            self.show.phase(f"set-up: {tasks[0].op.replace('_', ' ')} on {len(tasks)} devices")
        return self.inner.run(tasks, take)


def run(
    experiment: Experiment,
    folder: Path,
    plain: bool | None = None,
    show: Show | None = None,
    built: Callable[[Experiment], World] | None = None,
    track: Sequence[str] = (),
    portion: Portion | None = None,
) -> dict[str, Any]:
    """Run ``experiment`` in ``folder`` (or go on where it stopped) and return what ``results.json`` holds. ``show``: to whom the progress
    is told, instead of a display of its own. ``built``: how its world is made, where devices are elsewhere. ``track``: trackers that are
    told too, by name (``tracking.py``). ``portion``: its part of the machine's memory, where others run beside it.

    Raises:
        CheckpointError: the folder belongs to another experiment, another process, other data, or its checkpoint is corrupt.
        ExperimentError: there is no such tracker, or its library is missing.
    """
    insist_on_trackers(track)
    check(folder, experiment)
    with only_one(folder):
        results = folder / "results.json"
        if check(folder, experiment) and results.exists():
            found = told_at_the_end(results)
            track_ended(track, experiment, folder, found)
            return found
        title = f"{experiment.method_name} on {experiment.data}, {experiment.clients} devices, {experiment.asked} a round -> {folder}"
        try:
            if show is not None:
                return _loaded(experiment, folder, show, built, track, portion)
            with Progress(experiment.rounds, title, plain) as display:
                return _loaded(experiment, folder, display, built, track, portion)
        finally:
            gc.collect()  # a model's parts hold each other
            give_memory_back()


def loaded(
    experiment: Experiment, built: Callable[[Experiment], World], portion: Portion | None, asker: Asker = RUN
) -> tuple[World, Sizes, Need]:
    """The world of an experiment for which there is room, by the model's files before they are read and by the model itself.

    Raises:
        ExperimentError: there is not.
    """
    if (before := sizes_before(experiment)) is not None:
        insist_on_room(before, experiment, portion=portion, asker=asker)
    world = built(experiment)
    sizes = sizes_of(world.model, experiment.method)
    return world, sizes, insist_on_room(sizes, experiment, loaded=True, portion=portion, asker=asker)


def _loaded(
    experiment: Experiment,
    folder: Path,
    show: Show,
    built: Callable[[Experiment], World] | None,
    track: Sequence[str],
    portion: Portion | None,
) -> dict[str, Any]:
    """Load everything, then run. Whatever was loaded is gone when this returns, and the peak of memory begins anew with it."""
    forget_peak()
    show.phase("loading data and model")
    world, sizes, need = loaded(experiment, built or build, portion, RUN if built is None else SERVER)
    claim(folder, experiment)
    notes = [f"{what}: {text}" for what, text in told(need, sizes)]
    for note in (*world.notes, *_idle(world), *(notes if need.total > LARGE else [])):
        show.note(note)
    with Tracking(track, experiment, folder) as tracking:
        return _run(world, folder, show, tracking)


def _idle(world: World) -> list[str]:
    """What to say when most workers would have nothing to do in a round."""
    e, workers = world.experiment, world.experiment.engine.workers
    if workers < 2 or world.alone_or_together or e.cohort > world.wave:
        return []
    share = f"--engine.stack {-(-e.cohort // workers)} shares it out"
    return [f"a round of {e.cohort} devices goes to one of the {workers} workers as a whole; {share}"]


def _run(world: World, folder: Path, show: Show, tracking: Tracking) -> dict[str, Any]:
    """The round loop."""
    e, method, store, missed = world.experiment, world.experiment.method, world.store(folder), 0
    engine, data, model, unknown = engine_of(world, store), world.fingerprint(), identity(world.model), nothing(world)
    hurried = engine if world.far is None else world.far.hurried(engine)
    saved = checkpoint.load(folder, store)
    if saved is not None and not checkpoint.same_data(saved.data, data):
        raise CheckpointError(f"the data behind {folder} changed since it began (fingerprint {saved.data}, now {data}); give another --out")
    ledger, begun = Ledger(folder, world.fleet, saved.totals if saved else None), begin_on_disk(world.model, folder)

    def kept(state: State, late: Late | None, parts: tuple[Part, ...]) -> Saved:
        needed = begun if state.round < e.rounds else ()
        return checkpoint.save(
            folder, Saved(state, ledger.totals, data, late, start_of(world.model), parts, needed, model, world.outputs), store
        )

    if saved is None:
        ledger.rewind(-1)
        section = ledger.section()
        state, late = _set_up(world, Told(engine, show), store, section, show)
        ledger.set_up(section)
        section, found = ledger.section(), _evaluated(world, state, engine, show, late, store)
        show.round(row := ledger.write(0, section, 0.0, found.scores if found else unknown, told_of(late, world, found)))
        saved = kept(state, late, begun)
        tracking.round(row)
    else:
        found = None
        if said := stand_at(world.model, saved.start, folder, saved.model, OR_ANOTHER):
            show.note(said)
        show.resume(rows := ledger.rewind(saved.state.round))
        tracking.resume(rows)
    state, late = saved.state, saved.late
    while state.round < e.rounds:
        show.phase(f"round {state.round + 1}/{e.rounds}")
        if late is not None and (came := _let_in(world, late, engine, store, ledger, state.round + 1, show)):
            saved = kept(
                state, late.with_these(came, state.round + 1, world.pool), saved.parts
            )  # whatever becomes of the round, they are in
            state, late = saved.state, saved.late
        section, pool = ledger.section(), world.pool if late is None else late.pool(world.pool)
        try:
            state, missed = drive(one_round(method, state, pool), hurried, e.quorum, section.hear, engine), 0
        except CohortFailed as failed:
            state, missed = _missed(state, store, section, missed + 1, failed, show), missed + 1
        trained, found = section.seconds, _evaluated(world, state, engine, show, late, store)
        show.round(row := ledger.write(state.round, section, trained, found.scores if found else unknown, told_of(late, world, found)))
        saved = kept(state, late, saved.parts)
        state, late = saved.state, saved.late
        tracking.round(row)
    found = found or evaluate(world, state, engine, None if late is None else [*late.since], store)
    results = finish(world, folder, state, ledger, found, store)
    tracking.end(results)
    return results


def engine_of(world: World, store: Store) -> Engine:
    """The engine that the experiment asks for, over devices whose states are in ``store``."""
    engine = world.engine(store)
    return OneDisk(engine) if world.far is None else engine


def _set_up(world: World, engine: Engine, store: Store, section: Section, show: Show) -> tuple[State, Late | None]:
    """The state after set-up, and who is in if not all are. Devices that are elsewhere are given more than one chance, each from the
    start."""
    method = world.experiment.method
    for attempt in count(1):
        there = world.pool.clients if world.far is None else world.far.gather()
        heard = Remembering(engine, there) if there != world.pool.clients else None
        pool = replace(world.pool, clients=there)
        try:
            state = drive(set_up(method, world.model, pool), heard or engine, quorum=0, seen=section.hear)
            begin(section, world, there)
            return state, None if heard is None else Late(dict.fromkeys(there, 0), heard.steps)
        except CohortFailed as failed:
            if not isinstance(store, Elsewhere) or attempt == MISSES:
                raise
            store.forget()
            show.note(f"the set-up begins again: {failed}")
    raise AssertionError


def begin(section: Section, world: World, clients: Sequence[int]) -> None:
    """Book the start that each of these makes for itself, once; where all data are in one place, that place's."""
    section.begin([CENTRE] if isinstance(world.experiment.method, Centralised) else clients, start_operations(world.model))


def _let_in(world: World, late: Late, engine: Engine, store: Store, ledger: Ledger, round: int, show: Show) -> list[int]:
    """Those who have come since and have answered what the set-up asked of the others. Whoever has not answered all of it begins with it
    anew another time. What it costs is booked with the set-up."""
    waiting = sorted(set(late.missing(world.pool)) & world.far.here()) if world.far is not None else []
    if not waiting:
        return []
    section = ledger.section()
    came = drive(welcome(late.steps, waiting), engine, quorum=0, seen=section.hear)
    begin(section, world, came)
    ledger.set_up(section)
    for k in waiting:
        if k in came:
            show.note(f"device {k} takes part from round {round} on")
        else:
            show.note(f"device {k} did not get through the set-up: {section.failed.get(str(k), 'it did not answer')}")
            store.take(k, "")
    return came


def told_of(late: Late | None, world: World, found: Evaluation | None) -> dict[str, Any]:
    """What a row says of what personalising took, if it was evaluated, and of who is in, where some were not from the start."""
    return {"personalising": found.personalising if found else None, **({} if late is None else late.told(world.pool))}


def _missed(state: State, store: Store, section: Section, times: int, failed: CohortFailed, show: Show) -> State:
    """The state after a round to which too few devices came: as before. In one process that is an error; of devices that are elsewhere it
    is told, and what those who did come have done has not happened.

    Raises:
        CohortFailed: as it came, or for the ``MISSES``-th time in a row.
    """
    if not isinstance(store, Elsewhere) or times == MISSES:
        raise failed
    store.forget()
    section.failed |= {str(k): "it answered, but too few others did" for k in section.answered}
    section.answered.clear()
    section.losses.clear()
    show.note(f"round {state.round + 1} changes nothing: {failed}")
    return replace(state, round=state.round + 1)


def finish(
    world: World, folder: Path, state: State, ledger: Ledger, found: Evaluation, store: Store, notes: Sequence[str] = ()
) -> dict[str, Any]:
    """Write the global model and ``results.json``, with these notes after the data's, and return what it holds."""
    outcome = results_of(world, state, ledger, found)
    outcome["setup_paid_back"] = paid_back(world, ledger.fleet, ledger.totals, ledger.rows())
    outcome["device_state"] = held(world, store)
    sizes = sizes_of(world.model, world.experiment.method)
    outcome["numbers"] = {"model": sizes.model, "trained": sizes.trained, "at_once": sizes.at_once}
    outcome["devices"] = world.fleet.as_json(world.pool.clients)
    outcome["notes"] += notes
    assembled = world.experiment.method.assembled(state)
    outcome["samples"], outcome["exact_match"] = samples(world, state, store), as_told(world, found.solved)
    if assembled is not None:
        outcome["notes"] += write_global(world.model, assembled, world.classes, folder)
    write_atomically(folder / "results.json", json.dumps(outcome, indent=1))
    return outcome


def _evaluated(world: World, state: State, engine: Engine, show: Show, late: Late | None, store: Store) -> Evaluation | None:
    """The evaluation after this round, if it is due: every ``evaluate_every`` rounds from 0 on, and after the last."""
    every, last = world.experiment.evaluate_every, world.experiment.rounds
    if state.round < last and (not every or state.round % every):
        return None
    show.phase(f"evaluating after round {state.round}")
    return evaluate(world, state, engine, None if late is None else [*late.since], store)


def results_of(world: World, state: State, ledger: Ledger, found: Evaluation) -> dict[str, Any]:
    """What ``results.json`` holds. ``final`` is the last round, ``best`` the one with the highest personalised validation score, the first
    of equals; without any such score, as where no device that is elsewhere had one to tell, the last round."""
    e, rows, totals = world.experiment, ledger.rows(), dict(ledger.totals)
    scored = [row for row in rows if row["validation"]["personalised"] is not None]
    best = max(scored, key=lambda row: (row["validation"]["personalised"], -row["round"]), default=rows[-1])
    participations = totals.pop("participations")
    counts = world.partition.counts(world.labels("train"), len(world.classes))
    of_late = {name: rows[-1][name] for name in ("joined", "missing") if name in rows[-1]}
    per_device = []
    for k in world.pool.clients:
        held, right = int(found.held[k]), float(found.correct[k])
        one = {
            "client": k,
            "train": world.examples_of(k),
            "test": held,
            "correct": int(right) if right.is_integer() else right,
            "score": right / held if held else None,
        }
        told = {protocol: None if of is None else of[k] for protocol, of in found.confusion.items()}
        per_device.append({**one, "participations": participations.get(str(k), 0), "labels": counts[k].tolist(), "confusion": told})
    picked = [key for key in ("round", "personalised", "global", "loss", EXACT, FURTHER, "personalising") if key in rows[-1]]
    return {
        "method": e.method_name,
        "metric": world.source.task.metric,
        "rounds": e.rounds,
        "seed": e.seed,
        "digest": e.digest(),
        "final": {key: rows[-1][key] for key in picked},
        "best": {key: best.get(key) for key in picked},
        **totals,
        "validation": {"final": rows[-1]["validation"], "best": best["validation"]},
        "notes": list(world.notes),
        **of_late,
        "per_device": per_device,
        "partition": {"classes": list(world.classes), "train_counts": np.asarray(counts).tolist()},
        "facts": dict(state.facts),
        "experiment": as_json(e),
    }
