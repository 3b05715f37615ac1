"""A device's compute in a process of its own: the model is loaded once and stays, whatever happens to messages and connections.

Flower starts a process for every message. A :class:`Resident` has one for an experiment, started when the device is greeted, talks to it
over a pair of sockets that no other process can open (they have no name), and looks after it: if it dies another begins its task again, if
it does not answer in time it is ended. It ends with the process that started it, however that ends.

A device's states are files named by their content in ``folder``. Which of them a task starts from the server says, so a task can be
done twice, or again, with the same outcome. Kept are the state that the last task of an experiment began with and the one it made.
"""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Callable, Mapping
from multiprocessing.connection import wait
from pathlib import Path
from typing import Any

from fedloom.client.store import FILE, ClientStore, flush
from fedloom.engines.federation import Ungreeted
from fedloom.engines.workers import ANSWERS, ATTEMPTS, READY, Start, Worker, WorkerError, receive, send
from fedloom.messages import Failure
from fedloom.wire import SHORT, WireError, digest_of

log = logging.getLogger("fedloom")


class Resident:
    """A :class:`~fedloom.engines.federation.Device`.

    ``start``: how a process for the experiment of a greeting starts; it may refuse the greeting. ``deadline``: seconds for one task, and
    for getting ready.
    """

    def __init__(self, folder: Path, start: Callable[[Mapping[str, Any]], Start], deadline: float = 3600.0) -> None:
        self.folder, self.start, self.deadline = folder, start, deadline
        self.greeting: dict[str, Any] = {}
        self.told: dict[str, Any] = {}
        self._text = ""
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

    def answer(self, client: int, state: str, blob: bytes) -> tuple[bytes | Failure, str]:
        """Have the task done, starting from ``state``.

        Raises:
            Ungreeted: a task of an experiment that this device has not been told of.
            WireError: no message, or no name of a state of this client.
        """
        digest = digest_of(blob)
        if digest != self.greeting.get("digest"):
            raise Ungreeted(f"this device has not been greeted for experiment {digest!r}")
        found = FILE.fullmatch(state)
        if state and (found is None or int(found[1]) != client):
            raise WireError(f"state {SHORT.repr(state)} is none of client {client}")
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
            self._keep(folder, state, one["state"])
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
        self._worker = Worker(0, self.start(self.greeting))
        try:
            self.told, _ = self._heard(self._worker, READY)
        except WorkerError:
            raise
        except (EOFError, OSError) as error:
            how = self._worker.ended()
            self.close()
            raise WorkerError(f"the worker {how} before it could begin ({error})") from error

    def _heard(self, worker: Worker, kind: str) -> tuple[dict[str, Any], list[bytes]]:
        """The next thing of this kind that the worker tells; what it tells meanwhile is passed on.

        Raises:
            EOFError, OSError: it is gone.
            TimeoutError: it tells nothing.
            WorkerError: it cannot begin.
        """
        until = time.monotonic() + self.deadline
        while True:
            if not wait([worker.line], max(0.0, until - time.monotonic())):
                raise TimeoutError(f"no answer within {self.deadline:g} s; the worker was ended")
            told, blobs = receive(worker.line)
            if told["kind"] == kind:
                return told, blobs
            worker.hear(told)

    def _keep(self, folder: Path, before: str, after: str) -> None:
        """Have the new state survive a power cut before anybody hears of it; forget what can no longer be asked for."""
        if after and after != before:
            flush(folder / after)
            flush(folder)
            ClientStore(folder).keep({before, after})
