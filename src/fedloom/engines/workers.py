"""Simulation in several processes: each has a model and a host of its own, and waves go to whichever is free.

The order in which answers count does not depend on how many workers there are, nor, unless they share by load, what a wave is: the same
tasks give the same updates for any number of workers. Packed tasks and packed updates cross a socket each.
A client's state does not: the worker is told the name of its file, writes the new one beside it and tells its name, and the store on
this side, which owns the index, takes it when the answer is here. So a worker that dies leaves nothing half done: its wave is done
again by another.

Workers are started when there is something for them to do. They end with this process, however it ends: their standard input, to
which nothing is ever written, is closed then. What a worker is to build is said in a JSON object, the *order*, which this module
passes on and does not read.
"""

from __future__ import annotations

import json
import logging
import os
import socket
import subprocess
import sys
import weakref
from collections import Counter, deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from itertools import count, islice
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any, Protocol

from fedloom.client.store import ClientStore
from fedloom.encodings import EXACT, Encoding, Sender
from fedloom.engines.heap import give_memory_back
from fedloom.engines.local import BREATH, gather, joined, may_cross, taken, waves
from fedloom.messages import Failure, Replies, Take, Task, Traffic, Update, whole
from fedloom.telling import Tellable
from fedloom.wire import Blob

log = logging.getLogger("fedloom")

ATTEMPTS = 2
"""How often a wave is begun before its clients fail: a worker that dies takes nobody's answer with it the first time."""

AHEAD = 2
"""How many parts for each worker may be answered before the first that is not: their updates wait in memory."""

LAST_BREATH = 5.0
"""Seconds that a process may take to end once it has hung up."""

READY, FAILED, SAID, ANSWERS = "ready", "failed", "said", "answers"
"""What a worker tells: it can begin; why it cannot; a line for the log; the answers to a wave."""


class WorkerError(ChildProcessError, Tellable):
    """A worker that could not start, and why."""


class Answering(Protocol):
    """What answers packed tasks in a worker: a :class:`~fedloom.client.host.Host`. Its store is replaced for each wave."""

    store: ClientStore

    def answer(self, blobs: Sequence[Blob]) -> Sequence[Blob | Failure]:
        """One packed update or one failure for each packed task, in order."""
        ...


@dataclass(frozen=True)
class Start:
    """How worker i starts: ``command`` with the number of its socket as last word, ``environment(i)`` over that of this process.

    ``order`` is JSON and all that it is told; see :func:`ordered` and :func:`serve`.
    """

    command: Sequence[str]
    order: Mapping[str, Any]
    environment: Callable[[int], Mapping[str, str]]


class Workers:
    """An :class:`~fedloom.engines.engine.Engine` over ``count`` processes, ``wave`` clients at a time each at most.

    ``load``: how much work a client is, in any unit. The clients of one asking are then dealt out so that all workers are done at about
    the same time. For computes whose results do not depend on what is stacked with what; without it waves are cut as in one process.

    Raises:
        ValueError: a store without a folder, through which no state can pass from process to process.
    """

    def __init__(
        self,
        start: Start,
        count: int,
        store: ClientStore,
        digest: str,
        wave: int,
        load: Callable[[int], float] | None = None,
        encoding: Encoding = EXACT,
    ) -> None:
        if store.folder is None:
            raise ValueError("workers need a client store with a folder; this one keeps everything in the memory of one process")
        self.start, self.count, self.store, self.digest = start, count, store, digest
        self.wave, self.load, self.encoding = wave, load, encoding
        self.workers: list[Worker] = []

    def run(self, tasks: Sequence[Task], take: Take = whole) -> Replies:
        """Give every wave to a worker that is free. A wave whose worker died is begun again; after ``ATTEMPTS`` its clients fail.
        Updates are taken in when all tasks up to the end of their wave are answered; where they are shared by load, up to the end of a
        wave for each worker.

        Raises:
            WireError: a task may not cross the wire; that is the method's fault and ends the run. No task was carried out then.
            WorkerError: a worker could not start.
        """
        may_cross(tasks)
        place = {task.client: i for i, task in enumerate(tasks)}
        turns: list[Sequence[Sequence[Task]]] = [[part] for part in waves(tasks, self.wave)]
        if self.load is not None:
            turns = [dealt(turn, self.count, self.wave, self.load) for turn in waves(tasks, self.count * self.wave)]
        try:
            answers = self._answered([part for turn in turns for part in turn])
            return joined(taken(in_order(joined(islice(answers, len(turn))), place), take) for turn in turns)
        except BaseException:
            self.close()  # what they are still doing is nobody's answer any more
            raise

    def close(self) -> None:
        """End the workers. The next ``run`` starts others."""
        for worker in self.workers:
            worker.end()
        self.workers.clear()

    def _answered(self, parts: Sequence[Sequence[Task]]) -> Iterator[Replies]:
        """The replies of each part, in order, each as soon as it and all before it are here."""
        sender, begun = Sender(self.digest, self.encoding), Counter[int]()
        waiting, replies, due = deque(range(len(parts))), dict[int, Replies](), 0
        while due < len(parts):
            self._start(len(waiting))
            for worker in [w for w in self.workers if w.ready and not w.sent]:
                if not waiting or waiting[0] >= due + AHEAD * self.count:
                    break
                worker.wave = waiting.popleft()
                begun[worker.wave] += 1
                tasks = parts[worker.wave]
                if not worker.give(self.store, tasks, [sender.pack(task) for task in tasks]):
                    self._lost(worker, parts, begun, waiting, replies)
            while due in replies:  # what is yielded is summed here while the workers compute
                yield replies.pop(due)
                due += 1
            for worker in self._heard() if due < len(parts) else ():
                try:
                    told, blobs = receive(worker.line)
                except (EOFError, OSError):
                    self._lost(worker, parts, begun, waiting, replies)
                    continue
                if told["kind"] == ANSWERS:
                    replies[worker.wave] = self._taken(parts[worker.wave], worker, told["clients"], blobs)
                else:
                    worker.hear(told)

    def _start(self, waiting: int) -> None:
        """Have as many live workers as there is work for, ``count`` at most."""
        for worker in [w for w in self.workers if w.ready and not w.sent and w.process.poll() is not None]:
            log.warning("%s %s while it had nothing to do; another takes its place", worker.name, worker.ended())
            self.workers.remove(worker)
        free = sum(not worker.sent for worker in self.workers)
        for _ in range(min(self.count - len(self.workers), waiting - free)):
            taken = {worker.number for worker in self.workers}
            number = next(i for i in range(self.count) if i not in taken)
            self.workers.append(Worker(number, self.start))

    def _heard(self) -> list[Worker]:
        """The workers that have something to tell, or died; waits for the first. Those that are idle are not listened to."""
        expected: dict[Any, Worker] = {w.line: w for w in self.workers if w.sent or not w.ready}
        return [expected[line] for line in wait(list(expected))] if expected else []

    def _taken(self, tasks: Sequence[Task], worker: Worker, told: Sequence[Mapping[str, str]], blobs: Sequence[Blob]) -> Replies:
        """The replies of a wave; from here on the new states are the clients'."""
        sent, arrived = worker.sent, iter(blobs)
        worker.sent = []
        answers: list[Blob | Failure] = []
        for task, one in zip(tasks, told, strict=True):
            if "reason" in one:
                answers.append(Failure(task.client, one["reason"]))
            else:
                self.store.take(task.client, one["state"])
                answers.append(next(arrived))
        return gather(tasks, sent, answers, self.digest, self.encoding)

    def _lost(
        self, worker: Worker, parts: Sequence[Sequence[Task]], begun: Counter[int], waiting: deque[int], replies: dict[int, Replies]
    ) -> None:
        """A worker died: its wave waits again, or fails.

        Raises:
            WorkerError: it had not begun; another would fare no better.
        """
        how = worker.ended()
        self.workers.remove(worker)
        if not worker.ready:
            raise WorkerError(f"{worker.name} {how} before it could begin; what it said of it, if anything, is above")
        tasks = parts[worker.wave]
        if begun[worker.wave] < ATTEMPTS:
            log.warning("%s %s while it computed clients %s; another does them again", worker.name, how, [t.client for t in tasks])
            waiting.appendleft(worker.wave)
        else:
            reason = f"WorkerError: {worker.name} {how} while it computed this client's wave, as did the one before"
            replies[worker.wave] = gather(tasks, worker.sent, [Failure(task.client, reason) for task in tasks], self.digest)


def dealt(tasks: Sequence[Task], count: int, size: int, load: Callable[[int], float]) -> list[list[Task]]:
    """The tasks in parts of at most ``size`` whose loads are alike, as many for each of ``count`` workers: the heaviest task first, each to
    the part that has least. Tasks keep their order within a part."""
    if not tasks:
        return []
    number = min(len(tasks), count * -(-len(tasks) // (count * size)))
    parts: list[list[int]] = [[] for _ in range(number)]
    total = [0.0] * number
    loads = [load(task.client) for task in tasks]
    for i in sorted(range(len(tasks)), key=lambda i: (-loads[i], i)):
        least = min((p for p in range(number) if len(parts[p]) < size), key=lambda p: (total[p], len(parts[p]), p))
        parts[least].append(i)
        total[least] += loads[i]
    return [[tasks[i] for i in sorted(part)] for part in parts if part]


def in_order(replies: Replies, place: Mapping[int, int]) -> Replies:
    """The replies in the order of their clients' places."""

    def at(one: Update | Failure | Traffic) -> int:
        return place[one.client]

    return Replies(tuple(sorted(replies.updates, key=at)), tuple(sorted(replies.failures, key=at)), tuple(sorted(replies.traffic, key=at)))


class Worker:
    """One process, seen from here. ``sent``: the bytes of each packed task that it is busy with; ``wave``: which they are."""

    def __init__(self, number: int, start: Start) -> None:
        self.number, self.ready, self.wave, self.sent = number, False, -1, list[int]()
        ours, theirs = socket.socketpair()
        path = os.pathsep.join(os.path.abspath(place) for place in sys.path)  # it imports what this process would
        with theirs:
            self.process = subprocess.Popen(
                [*start.command, str(theirs.fileno())],
                stdin=subprocess.PIPE,
                stdout=2,
                env={**os.environ, "PYTHONPATH": path, **start.environment(number)},
                pass_fds=[theirs.fileno()],
                start_new_session=True,  # Ctrl-C is for this process, which then ends its workers
            )
        self.line = Connection(ours.detach())
        self._end = weakref.finalize(self, _ended, self.process, self.line)
        with suppress(OSError):  # dead already: that is seen when it is listened to
            send(self.line, start.order)

    @property
    def name(self) -> str:
        """What messages call it."""
        return f"worker {self.number} (process {self.process.pid})"

    def give(self, store: ClientStore, tasks: Sequence[Task], blobs: Sequence[Blob]) -> bool:
        """Hand over a wave; False if the worker is dead."""
        self.sent = list(map(len, blobs))
        clients = [{"client": task.client, "state": store.name(task.client)} for task in tasks]
        try:
            send(self.line, {"folder": str(store.folder), "aside": str(store.aside or ""), "clients": clients}, blobs)
        except OSError:
            return False
        return True

    def hear(self, told: Mapping[str, Any]) -> None:
        """Take in what is no answer.

        Raises:
            WorkerError: it cannot begin.
        """
        if told["kind"] == FAILED:
            raise WorkerError(f"worker {self.number} could not start: {told['text']}")
        if told["kind"] == SAID:
            log.log(told["level"], "worker %d: %s", self.number, told["text"])
        self.ready = self.ready or told["kind"] == READY

    def end(self) -> None:
        """End the process, whatever it is doing."""
        self._end()

    def ended(self) -> str:
        """How a process that hung up has ended."""
        with suppress(subprocess.TimeoutExpired):
            self.process.wait(LAST_BREATH)
        self.end()
        code = self.process.returncode
        return f"ended with signal {-code}" if code < 0 else f"ended with exit code {code}"


def _ended(process: subprocess.Popen[bytes], line: Connection) -> None:
    line.close()
    assert process.stdin is not None
    process.stdin.close()
    if process.poll() is None:
        process.kill()
    process.wait()


def send(line: Connection, head: Mapping[str, Any], blobs: Sequence[Blob] = ()) -> None:
    """One message: a JSON object, and as many blobs as it says."""
    line.send_bytes(json.dumps({**head, "blobs": len(blobs)}).encode())
    for blob in blobs:
        line.send_bytes(blob)


def receive(line: Connection) -> tuple[dict[str, Any], list[bytearray]]:
    """What :func:`send` sent, each blob for one to unpack.

    Raises:
        EOFError, OSError: the other side is gone, or says what :func:`send` does not.
    """
    try:
        head = json.loads(line.recv_bytes())
        count = head["blobs"]
    except (ValueError, TypeError, KeyError, RecursionError) as error:
        raise OSError(f"not what a worker says ({type(error).__name__}: {error})") from error
    if type(count) is not int or not isinstance(head, dict):
        raise OSError(f"not what a worker says ({str(head)[:200]})")
    return head, [bytearray(line.recv_bytes()) for _ in range(count)]


# ---- in the worker ----------------------------------------------------------------------------------------------------------


def ordered(number: str) -> tuple[Connection, dict[str, Any]]:
    """The worker's socket, whose number is the last word of its command, and its order."""
    line = Connection(int(number))
    return line, receive(line)[0]


def refuse(line: Connection, reason: str) -> None:
    """Tell why this worker cannot begin."""
    send(line, {"kind": FAILED, "text": reason})


def serve(line: Connection, host: Answering, facts: Mapping[str, Any] | None = None) -> None:
    """Say that one is ready, and these facts; answer waves until nobody asks any more."""
    log.addHandler(Forwarded(line))
    log.propagate = False
    send(line, {**(facts or {}), "kind": READY})
    for number in count(1):
        try:
            asked, blobs = receive(line)
        except (EOFError, OSError):
            return
        clients = asked["clients"]
        host.store = ClientStore(Path(asked["folder"]), Path(asked["aside"]) if asked["aside"] else None)
        host.store.restore({str(one["client"]): one["state"] for one in clients if one["state"]})
        answers = host.answer(blobs)
        told = [
            {"reason": answer.reason} if isinstance(answer, Failure) else {"state": host.store.name(one["client"])}
            for one, answer in zip(clients, answers, strict=True)
        ]
        send(line, {"kind": ANSWERS, "clients": told}, [answer for answer in answers if not isinstance(answer, Failure)])
        if number % BREATH == 0:
            give_memory_back()


class Forwarded(logging.Handler):
    """Log lines, to the process that started this worker."""

    def __init__(self, line: Connection) -> None:
        logging.Handler.__init__(self)
        self.line = line
        self.setFormatter(_OneLine())

    def emit(self, record: logging.LogRecord) -> None:
        """Send the line."""
        send(self.line, {"kind": SAID, "level": record.levelno, "text": self.format(record)})


class _OneLine(logging.Formatter):
    """The message, and of an exception its kind and text."""

    def formatException(self, ei: Any) -> str:
        return f"  {ei[0].__name__}: {ei[1]}"
