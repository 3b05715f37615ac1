"""A device's compute in a process of its own: the model is loaded once and stays, whatever happens to messages and connections.

Flower starts a process for every message. A :class:`Resident` has one for an experiment, started when the device is greeted, talks to it
over a pair of sockets that no other process can open (they have no name), and looks after it: if it dies another begins its task again, if
it does not answer in time it is ended. It ends with the process that started it, however that ends.

**Memory**: what the process holds (its resident set) is looked at every :data:`LOOK` seconds while it computes, and after each answer.
One that holds more than its bound is ended before the system, which has other programs to run, ends something else. Within a task, the
task has failed with that reason; after it, its answer counts, and the next task finds a new process. A limit of the system's
(``RLIMIT_AS``) would not do: it counts addresses, of which libraries reserve many times what they use.

A device's states are files named by their content in ``folder``. Which of them a task starts from the server says, so a task can be
done twice, or again, with the same outcome. Kept are the state that the last task of an experiment began with, the one it made, the one
that the server has in its checkpoint, from which it may ask again whatever became of the round, and that of the last prediction, which is
kept too (``asked.py``).
"""

from __future__ import annotations

import json
import logging
import math
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from multiprocessing.connection import wait
from pathlib import Path
from typing import Any

import psutil

from fedloom.client.store import FILE, ClientStore, flush
from fedloom.engines.asked import PREDICTS, Asked, state_in
from fedloom.engines.device import Ungreeted
from fedloom.engines.workers import ANSWERS, ATTEMPTS, READY, Start, Worker, WorkerError, receive, send
from fedloom.messages import Failure
from fedloom.model.machine import all_bytes
from fedloom.wire import SHORT, Blob, WireError, digest_of, op_of

LOOK = 0.5
"""Seconds between two looks at what the worker holds."""

GIB = 2**30
SHARE = 0.9
"""Of the machine's memory that a worker may hold where nothing is said."""

log = logging.getLogger("fedloom")


class TooLarge(MemoryError):
    """The worker holds more than it may."""


def bytes_of(gib: float) -> int:
    """The bound in bytes; of 0, nine tenths of what this machine has, or of what the control group allows this process.

    Raises:
        ValueError: no finite number from 0 on.
    """
    if not (gib >= 0 and math.isfinite(gib)):
        raise ValueError(f"--memory is {gib}; it must be a number of GiB above 0, or 0 for nine tenths of this machine's")
    return int(gib * GIB) or int(SHARE * all_bytes())


class Resident:
    """A :class:`~fedloom.engines.federation.Device`.

    ``start``: how a process for the experiment of a greeting starts; it may refuse the greeting. ``deadline``: seconds for one task, and
    for getting ready. ``memory``: bytes that the process may hold (0: nine tenths of the machine's).
    """

    def __init__(self, folder: Path, start: Callable[[Mapping[str, Any]], Start], deadline: float = 3600.0, memory: int = 0) -> None:
        self.folder, self.start, self.deadline, self.memory = folder, start, deadline, memory or bytes_of(0.0)
        self.greeting: dict[str, Any] = {}
        self.told: dict[str, Any] = {}
        self._text = ""
        self._order: Mapping[str, Any] = {}
        self._worker: Worker | None = None

    def greet(self, greeting: str) -> Mapping[str, Any]:
        """Start the process for this experiment, if it is not there already. Returns what it says of itself.

        Raises:
            WireError: no greeting.
            WorkerError: the process could not begin, and why.
        """
        if greeting == self._text and self._alive:
            return self.told
        try:
            read = json.loads(greeting)
            digest = read["digest"]
        except (ValueError, TypeError, KeyError, RecursionError) as error:
            raise WireError(f"a greeting that cannot be read ({type(error).__name__}: {error})") from error
        if not (isinstance(digest, str) and digest.isascii() and digest.isalnum() and len(digest) <= 64):
            raise WireError(f"a greeting of experiment {SHORT.repr(digest)}; an experiment is named by letters and digits")
        self.close()
        self.greeting, self._text = read, greeting
        self._begin()
        return self.told

    def answer(self, client: int, state: str, committed: str, blob: Blob) -> tuple[Blob | Failure, str]:
        """Have the task done, starting from ``state``. ``committed``: that of the server's checkpoint, which is kept.

        Raises:
            Ungreeted: a task of an experiment that this device has not been told of.
            WireError: no message, or no name of a state of this client.
        """
        digest = digest_of(blob)
        if digest != self.greeting.get("digest"):
            raise Ungreeted(f"this device has not been greeted for experiment {digest!r}")
        for name in filter(None, (state, committed)):
            found = FILE.fullmatch(name)
            if found is None or int(found[1]) != client:
                raise WireError(f"state {SHORT.repr(name)} is none of client {client}")
        folder = self.folder / digest
        clients = [{"client": client, "state": state}]
        for _ in range(ATTEMPTS):
            try:
                if not self._alive:
                    self._begin()
                worker = self._worker
                assert worker is not None
                send(worker.line, {"folder": str(folder), "aside": "", "clients": clients}, [blob])
                told, blobs = self._heard(worker, ANSWERS)
            except TooLarge as error:
                log.warning("%s; it was ended, and another takes its place for the next task", error)
                self.close()
                return Failure(client, f"MemoryError: {error}"), state
            except (TimeoutError, WorkerError) as error:
                self.close()
                return Failure(client, f"{type(error).__name__}: {error}"), state
            except (EOFError, OSError) as error:
                how = self._worker.ended() if self._worker is not None else str(error)
                log.warning("the worker %s; another takes its place", how)
                self.close()
                continue
            (one,) = told["clients"]
            if "reason" in one:
                return Failure(client, one["reason"]), state
            if op_of(blob) == PREDICTS:
                self._remember(folder, Asked(client, state, self._order, blob))
            self._keep(folder, committed, state, one["state"])
            self._replace_if_too_large(worker)
            return blobs[0], one["state"]
        return Failure(client, f"WorkerError: the worker died {ATTEMPTS} times while it computed this task"), state

    def close(self) -> None:
        """End the process."""
        if self._worker is not None:
            self._worker.end()
            self._worker = None

    @property
    def _alive(self) -> bool:
        return self._worker is not None and self._worker.process.poll() is None

    def _begin(self) -> None:
        self.close()
        start = self.start(self.greeting)
        self._order, self._worker = start.order, Worker(0, start)
        try:
            told, _ = self._heard(self._worker, READY)
        except WorkerError:
            self.close()
            raise
        except TooLarge as error:
            self.close()
            raise WorkerError(f"{error}, before it could begin; give it more: --memory GIB") from error
        except (EOFError, OSError) as error:
            how = self._worker.ended()
            self.close()
            raise WorkerError(f"the worker {how} before it could begin ({error})") from error
        for note in told.pop("notes", ()):  # of the device's own data, so for whom they belong to and nobody else
            log.warning("note: %s", note)
        self.told = told

    def _heard(self, worker: Worker, kind: str) -> tuple[dict[str, Any], list[bytearray]]:
        """The next thing of this kind that the worker tells; what it tells meanwhile is passed on.

        Raises:
            EOFError, OSError: it is gone.
            TimeoutError: it tells nothing.
            TooLarge: it holds more than it may.
            WorkerError: it cannot begin.
        """
        until = time.monotonic() + self.deadline
        while True:
            if not wait([worker.line], max(0.0, min(LOOK, until - time.monotonic()))):
                if time.monotonic() >= until:
                    raise TimeoutError(f"no answer within {self.deadline:g} s; the worker was ended")
                self._insist_small(worker)
                continue
            told, blobs = receive(worker.line)
            if told["kind"] == kind:
                return told, blobs
            worker.hear(told)

    def _insist_small(self, worker: Worker) -> None:
        """Insist that the worker holds no more than it may.

        Raises:
            TooLarge: it does.
        """
        with suppress(psutil.Error):  # it is gone: that is seen when it is listened to
            held = psutil.Process(worker.process.pid).memory_info().rss
            if held > self.memory:
                raise TooLarge(f"the worker held {held / GIB:.2f} GiB, and may hold {self.memory / GIB:.2f}")

    def _replace_if_too_large(self, worker: Worker) -> None:
        """Between two tasks: nothing is lost by ending it now."""
        try:
            self._insist_small(worker)
        except TooLarge as error:
            log.warning("%s; its answer counts, and another takes its place", error)
            self.close()

    def _keep(self, folder: Path, committed: str, before: str, after: str) -> None:
        """Have the new state survive a power cut before anybody hears of it; forget what can no longer be asked for."""
        if after and after != before:
            flush(folder / after)
            flush(folder)
            ClientStore(folder).keep({committed, before, after, state_in(folder)})

    def _remember(self, folder: Path, asked: Asked) -> None:
        """Keep the prediction. Its answer counts, whether or not the disk takes this."""
        try:
            asked.write(folder)
        except OSError as error:
            log.warning("what this device predicted with last is not kept for 'fedloom export' (%s)", error)
