"""Carrying out runs, here or in several processes, each with its own folder, until nothing more is wanted.

What is wanted may depend on what has ended (``plan.py``), so it is asked again after each. One run that fails does not lose the others.
With one job runs are carried out in this process, one after another; with more, each of so many processes (``job.py``) is given one run
at a time and has one PyTorch thread, if ``--engine.threads`` does not say otherwise. A process that dies takes its run's last round with
it and nothing else. However this side ends, the processes end, because their standard input is closed then.
"""

from __future__ import annotations

import json
import os
import queue
import subprocess
import sys
import threading
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Protocol

import torch

from fedloom.engines.environment import environment
from fedloom.model.machine import free_bytes
from fedloom.run.adopt import TAKEN_OVER
from fedloom.run.checkpoint import holds_training, write_atomically
from fedloom.run.comparison.job import Event, perform
from fedloom.run.comparison.plan import Ended, Run
from fedloom.run.costs.memory import Portion
from fedloom.run.errors import ExperimentError
from fedloom.run.experiment import Experiment, as_json
from fedloom.run.folder import DIVERGED, check, claim, told_at_the_end
from fedloom.run.recipes import file_of
from fedloom.run.terminal.ending import TRACEBACK

LAST_BREATH = 5.0
"""Seconds that a process may take to end once its standard input is closed."""

TAIL = 20
"""Last lines of a process's error output that are kept, to be told if it dies."""

ITSELF = "its best score and its costs to a target are those of that round; delete {} to have it train itself"
"""What is said besides, without ``--share-training``, of a finished run that took another's training over."""

Wanted = Callable[[Mapping[str, Ended]], Mapping[str, Run]]


class Watch(Protocol):
    """To whom it is told how the runs go."""

    def started(self, run: str) -> None: ...

    def heard(self, run: str, event: Event) -> None: ...

    def ended(self, run: str, how: Ended, before: bool) -> None: ...

    def idle(self) -> None: ...


def carry_out(
    wanted: Wanted,
    folder: Callable[[Run], Path],
    jobs: int,
    watch: Watch,
    track: Sequence[str] = (),
    expected: int | None = None,
) -> dict[str, Ended]:
    """Carry out every run that ``wanted`` asks for, ``jobs`` at a time, and say how each ended. ``track``: trackers that are told.
    ``expected``: how many there will be at the most, if that is known; fewer than ``jobs`` of them share the memory among themselves."""
    ended: dict[str, Ended] = {}
    looked: set[str] = set()
    with Crew(jobs, track, jobs if expected is None else expected) as crew:
        waiting = _from_before(wanted, folder, ended, looked, watch)
        while True:
            busy = crew.names()
            ready = [run for name, run in waiting.items() if name not in ended and name not in busy]
            ready = [run for run in ready if not run.trained or run.trained in ended]
            if not ready and not busy:
                return ended
            if ready and len(busy) < jobs:
                told = _begun(ready[0], waiting, ended, folder, crew, watch)
            else:
                told = crew.hear()
                if told is None:
                    watch.idle()
                else:
                    watch.heard(*told)
            if told is not None and told[1]["kind"] in ("done", "failed"):
                name, event = told
                ended[name] = _outcome(event, folder(waiting[name]), waiting[name].experiment)
                watch.ended(name, ended[name], before=False)
                waiting = _from_before(wanted, folder, ended, looked, watch)


def _from_before(
    wanted: Wanted, folder: Callable[[Run], Path], ended: dict[str, Ended], looked: set[str], watch: Watch
) -> Mapping[str, Run]:
    """What is wanted now. A run that had ended before joins ``ended``, which may decide what else is wanted."""
    while True:
        waiting = wanted(ended)
        new = [run for name, run in waiting.items() if name not in looked]
        if not new:
            return waiting
        for run in new:
            looked.add(run.name)
            before = ended_before(folder(run), run.experiment)
            if before is not None:
                ended[run.name] = before
                if not run.trained and (note := _taken_over(before)):
                    watch.heard(run.name, {"kind": "note", "text": f"{note}: {ITSELF.format(folder(run))}"})
                watch.ended(run.name, ended[run.name], before=True)


def _begun(
    run: Run, waiting: Mapping[str, Run], ended: Mapping[str, Ended], folder: Callable[[Run], Path], crew: Crew, watch: Watch
) -> tuple[str, Event] | None:
    """Give a run to a process of the crew, or carry it out here: (its name, its last event), if it has ended."""
    trainer = ended[run.trained] if run.trained else None
    if trainer is not None and trainer.results is None:
        text = f"{run.trained}, whose training it was to take over, failed"
        return run.name, {"kind": "failed", "text": text, "diverged": trainer.diverged}
    watch.started(run.name)
    trained = folder(waiting[run.trained]) if run.trained else None
    if trained is not None and not holds_training(trained):
        watch.heard(run.name, {"kind": "note", "text": f"{run.trained} has no checkpoint any more to take over; this one trains itself"})
        trained = None
    if crew.count > 1:
        crew.give(run, folder(run), trained)
        return None
    last: deque[Event] = deque(maxlen=1)

    def tell(event: Event) -> None:
        last.append(event)
        watch.heard(run.name, event)

    perform(run.experiment, folder(run), trained, tell, crew.track)
    return run.name, last[0]


def _taken_over(before: Ended) -> str:
    """The note of a run that took another's training over, which says so; "" of any other."""
    notes = before.results.get("notes") or () if before.results is not None else ()
    return next((note for note in notes if note.startswith(TAKEN_OVER)), "")


def finished(folder: Path, experiment: Experiment) -> Mapping[str, Any] | None:
    """The results of a run that has ended there before.

    Raises:
        CheckpointError: they are torn, or of another experiment.
    """
    path = folder / "results.json"
    return told_at_the_end(path) if path.exists() and check(folder, experiment) else None


def ended_before(folder: Path, experiment: Experiment) -> Ended | None:
    """How a run ended there before, if running it again could not change that: with results, or diverged (``diverged.json``).

    Raises:
        CheckpointError: the file that says so is torn, or of another experiment.
    """
    found, path = finished(folder, experiment), folder / DIVERGED
    if found is not None:
        return Ended(found)
    if not (path.exists() and check(folder, experiment)):
        return None
    return Ended(None, str(told_at_the_end(path).get("failure", "")), diverged=True)


def _outcome(event: Event, folder: Path, experiment: Experiment) -> Ended:
    """What the last event of a run comes to. That it diverged is kept in its folder, so that it need not be found out again."""
    if event["kind"] == "failed":
        if event["diverged"]:
            claim(folder, experiment)
            write_atomically(folder / DIVERGED, json.dumps({"failure": event["text"]}))
        return Ended(None, event["text"], event["diverged"])
    found = finished(folder, experiment)
    return Ended(found) if found is not None else Ended(None, f"{folder} holds no results although the run ended; was it deleted?")


@dataclass
class Process:
    """One process and the run it carries out ("": none)."""

    process: subprocess.Popen[str]
    run: str = ""
    tail: deque[str] = field(default_factory=lambda: deque(maxlen=TAIL))
    readers: list[threading.Thread] = field(default_factory=list)

    def hang_up(self) -> None:
        """Close its standard input, whereupon it ends."""
        if self.process.stdin is not None:
            with suppress(BrokenPipeError):  # it has ended already, before it read what it was given
                self.process.stdin.close()

    def end(self) -> int:
        """See it end, by force if need be; its exit code."""
        self.hang_up()
        try:
            self.process.wait(LAST_BREATH)
        except subprocess.TimeoutExpired:
            self.process.kill()
        code = self.process.wait()
        for reader in self.readers:
            reader.join(LAST_BREATH)
        return code


class Crew:
    """At most ``count`` processes, started when there is something for them to do. ``track``: trackers that are told of every run.
    ``expected``: runs there will be; no more than these are ever at work at once."""

    def __init__(self, count: int, track: Sequence[str] = (), expected: int | None = None) -> None:
        self.count, self.track = count, track
        self.at_once = count if expected is None else max(1, min(count, expected))
        self.room: int | None = None
        self.processes: dict[int, Process] = {}
        self.events: queue.Queue[tuple[Process, Event | None]] = queue.Queue()

    def __enter__(self) -> Crew:
        return self

    def __exit__(self, *_: object) -> None:
        for one in self.processes.values():
            one.hang_up()
        for one in self.processes.values():
            one.end()

    def names(self) -> set[str]:
        """The runs being carried out."""
        return {one.run for one in self.processes.values() if one.run}

    def portion(self) -> Portion:
        """Each run's part of the machine: of the memory that is free when this is first asked, before a process has taken any."""
        if self.room is None:
            self.room = free_bytes(torch.device("cpu")) // self.at_once
        return Portion(self.at_once, self.room, -(-self.at_once // (torch.cuda.device_count() or self.at_once)))

    def give(self, run: Run, folder: Path, trained: Path | None) -> None:
        """Give a run to a process that has none."""
        portion = self.portion()
        slot = next(i for i in range(self.count) if i not in self.processes or not self.processes[i].run)
        if slot not in self.processes:
            self.processes[slot] = self._start(slot, run.experiment.engine.threads)
        one = self.processes[slot]
        one.run = run.name
        assert one.process.stdin is not None
        with suppress(BrokenPipeError):  # it has died; that is heard, with what it said
            one.process.stdin.write(json.dumps(order_of(run.experiment, folder, trained, self.track, portion)) + "\n")
            one.process.stdin.flush()

    def hear(self, patience: float = 1.0) -> tuple[str, Event] | None:
        """(run, event) of whichever process tells something next; None if none does within ``patience`` seconds."""
        try:
            one, event = self.events.get(timeout=patience)
        except queue.Empty:
            return None
        name = one.run or "a process"  # (what it warns of may be heard when its run has ended)
        if event is None:
            self.processes = {slot: other for slot, other in self.processes.items() if other is not one}
            code = one.end()
            if not one.run:
                return None
            event = {"kind": "failed", "text": _death(code, one.tail), "diverged": False}
        if event["kind"] in ("done", "failed"):
            one.run = ""
        return name, event

    def _start(self, slot: int, threads: int) -> Process:
        words, own = [sys.executable, "-m", "fedloom.run.comparison.job"], environment(slot, threads, self.at_once)
        pipe = subprocess.PIPE
        started = subprocess.Popen(words, stdin=pipe, stdout=pipe, stderr=pipe, text=True, env={**os.environ, **own})
        one = Process(started)
        one.readers += [threading.Thread(target=target, args=(one,), daemon=True) for target in (self._events, self._lines)]
        for reader in one.readers:
            reader.start()
        return one

    def _events(self, one: Process) -> None:
        assert one.process.stdout is not None
        with one.process.stdout as lines:
            for line in lines:
                self.events.put((one, json.loads(line)))
        self.events.put((one, None))

    def _lines(self, one: Process) -> None:
        """Keep what a process prints; what the program itself warns of is told at once."""
        assert one.process.stderr is not None
        with one.process.stderr as lines:
            for line in lines:
                one.tail.append(line.rstrip())
                if one.run and (line.startswith("warning: ") or os.environ.get(TRACEBACK)):
                    self.events.put((one, {"kind": "note", "text": line.rstrip()}))


def order_of(
    experiment: Experiment, folder: Path, trained: Path | None, track: Sequence[str] = (), portion: Portion | None = None
) -> dict[str, object]:
    """What a process is told (JSON). ``portion``: the run's part of the machine's memory.

    Raises:
        ExperimentError: a method that no file defines.
    """
    recipe = file_of(experiment.method)
    if recipe == "":
        raise ExperimentError(f"--jobs needs method '{experiment.method_name}' in a Python file, from which every process can load it")
    where: dict[str, object] = {"folder": str(folder), "trained": None if trained is None else str(trained), "track": list(track)}
    where |= {"portion": None if portion is None else asdict(portion)}
    return {"experiment": as_json(experiment), "recipe": recipe, "digest": experiment.digest(), **where}


def _death(code: int, tail: deque[str]) -> str:
    """What is told of a process that ended in the middle of a run."""
    how = f"by signal {-code}{' (out of memory?)' if code == -9 else ''}" if code < 0 else f"with code {code}"
    said = f" The last it said: {tail[-1]}" if tail else ""
    return f"its process was ended {how}; the rounds before are saved, and the same command goes on from there.{said}"
