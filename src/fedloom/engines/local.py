"""Simulation on this machine: clients go to one host in waves, so that its compute can stack those of a wave.

However many clients are asked, what is in memory at a time is one wave: its packed tasks, its clients' state, its packed updates.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from sys import intern

import torch

from fedloom.client.host import Host
from fedloom.encodings import EXACT, Encoding, Sender
from fedloom.engines.heap import give_memory_back
from fedloom.messages import Failure, Replies, Take, Task, Traffic, Update, whole
from fedloom.tensors import nbytes
from fedloom.wire import Blob, WireError, checked_settings, checked_tensors, unpack

WAVE = 32
"""Clients in one wave: enough to fill a stacked pass. The number of clients must not change it: the memory that a run takes depends on
it, and for some models what a client gets, by who is stacked with whom."""

HEAVY = 2**29
"""Bytes of tensors that one wave carries at most, unless a single client's are more: whole models go to few clients at a time."""

BREATH = 8
"""Waves after which freed memory is given back."""


SMALL = 4096
"""Bytes up to which an update is copied out of its message: there may be one of every client in memory, and a message costs more."""


class Local:
    """An :class:`~fedloom.engines.engine.Engine` over one in-process host, ``wave`` clients at a time."""

    def __init__(self, host: Host, wave: int = WAVE) -> None:
        self.host, self.wave = host, wave
        # The C library gives every freed megabyte back to the system and takes it anew, page by page, until it has seen a larger one freed;
        # messages of that size then cost half as much. What is kept so is given back between waves.
        torch.empty(2**25 - 2**16, dtype=torch.uint8)

    def run(self, tasks: Sequence[Task], take: Take = whole) -> Replies:
        """Pack the tasks of a wave, let the host answer all of them at once, unpack their replies; then the next wave.

        Raises:
            WireError: a task may not cross the wire; that is the method's fault and ends the run. No task was carried out then.
        """
        may_cross(tasks)
        sender = Sender(self.host.digest, self.host.encoding)
        return joined(taken(self._wave(i, part, sender), take) for i, part in enumerate(waves(tasks, self.wave), 1))

    def _wave(self, number: int, tasks: Sequence[Task], sender: Sender) -> Replies:
        if number % BREATH == 0:
            give_memory_back()
        sizes: list[int] = []

        def packed(task: Task) -> bytearray:
            blob = sender.pack(task)
            sizes.append(len(blob))
            return blob

        answers = self.host.answer([packed(task) for task in tasks])  # which nobody here holds: a message stands once
        return gather(tasks, sizes, answers, self.host.digest, self.host.encoding)


def waves(tasks: Sequence[Task], size: int) -> list[Sequence[Task]]:
    """The tasks in order, ``size`` at a time, or fewer where their tensors are ``HEAVY``."""
    made: list[list[Task]] = []
    carried = 0
    for task in tasks:
        weight = nbytes(task.tensors)
        if not made or len(made[-1]) == size or carried + weight > HEAVY:
            made.append([])
            carried = 0
        made[-1].append(task)
        carried += weight
    return list(made)


def may_cross(tasks: Iterable[Task]) -> None:
    """Look at every task before the first is sent. Tensors that many tasks carry are looked at once.

    Raises:
        WireError: what the first that may not cross would raise when packed.
    """
    seen: set[tuple[int, ...]] = set()
    for task in tasks:
        checked_settings(task.settings)
        same = _identity(task)
        if same not in seen:
            checked_tensors(task.tensors, finite=False)
            seen.add(same)


def _identity(task: Task) -> tuple[int, ...]:
    """Equal for two tasks that carry the same tensor objects under the same names, as long as both live."""
    return (*map(id, task.tensors.values()), hash(tuple(task.tensors)))


def taken(replies: Replies, take: Take) -> Replies:
    """The replies with what ``take`` makes of every update."""
    return replies if take is whole else replace(replies, updates=tuple(map(take, replies.updates)))


def joined(parts: Iterable[Replies]) -> Replies:
    """The replies of all waves, in order."""
    updates: list[Update] = []
    failures: list[Failure] = []
    traffic: list[Traffic] = []
    for part in parts:
        updates += part.updates
        failures += part.failures
        traffic += part.traffic
    return Replies(tuple(updates), tuple(failures), tuple(traffic))


ANOTHER = "the answer is to another task"
"""Why an answer does not count that does not repeat its task's nonce."""


def gather(
    tasks: Sequence[Task],
    sent: Sequence[int],
    answers: Sequence[Blob | Failure],
    digest: str,
    encoding: Encoding = EXACT,
    whose: Callable[[Task, str], str] = lambda task, nonce: ANOTHER,
) -> Replies:
    """Replies from the bytes that were sent and what came back for each task, in task order. ``whose``: what an answer to a task is that
    came with this nonce, which is not the task's."""
    updates, failures, traffic = [], [], []
    for task, down, answer in zip(tasks, sent, answers, strict=True):
        update = answer if isinstance(answer, Failure) else _opened(answer, task, digest, encoding, whose)
        if isinstance(update, Update):
            updates.append(update)
            traffic.append(Traffic(task.client, down, len(answer), update.flops, update.examples))  # type: ignore[arg-type]
        else:
            failures.append(replace(update, client=task.client))
            traffic.append(Traffic(task.client, down, 0, 0.0, 0))
    return Replies(tuple(updates), tuple(failures), tuple(traffic))


def _opened(blob: Blob, task: Task, digest: str, encoding: Encoding, whose: Callable[[Task, str], str]) -> Update | Failure:
    client = task.client
    try:
        update = unpack(blob, digest)
        if isinstance(update, Update) and update.client == client and update.nonce != task.nonce:
            return Failure(client, f"WireError: {whose(task, update.nonce)}")
        update = encoding.received(update, task) if isinstance(update, Update) else update
    except WireError as error:
        return Failure(client, f"WireError: {error}")
    if not isinstance(update, Update) or update.client != client:
        return Failure(client, "WireError: the reply is not this client's update")
    small = nbytes(update.tensors) <= SMALL
    return replace(update, nonce="", tensors={intern(n): t.clone() for n, t in update.tensors.items()} if small else update.tensors)
