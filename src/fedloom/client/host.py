"""The device's side of every engine: packed tasks in, packed updates out.

A host starts the client operations that the tasks name, advances all of them together, hands the work items they yield to the
compute in one call (which may stack them) and packs what they return. The local engine gives it a wave of clients at a time; a
deployed device gives it one task. It does not know the server, the transport or what the operations mean.

Durability: a client's state is stored if and only if its operation returned and its update could be packed.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

from fedloom.client.client import Client
from fedloom.client.store import ClientStore
from fedloom.encodings import EXACT, Encoding
from fedloom.messages import Failure, Task, Tensors, Update, Work, is_client_operation
from fedloom.telling import in_full
from fedloom.wire import Blob, WireError, pack, unpack

if TYPE_CHECKING:  # it brings the model's libraries, and whoever only carries messages needs none of them
    from fedloom.compute.compute import Compute, Done

log = logging.getLogger("fedloom")


def operations(method: object) -> dict[str, Callable[[Client, Task], Work[Update]]]:
    """The client operations of a method by name: what it marked with ``@on_client`` and nothing else."""
    names = [name for name in dir(type(method)) if is_client_operation(vars_of(type(method), name))]
    return {name: getattr(method, name) for name in names}


def vars_of(kind: type, name: str) -> object:
    """The attribute as the class (or a base) defines it, without evaluating properties."""
    return next((vars(base)[name] for base in kind.__mro__ if name in vars(base)), None)


@dataclass
class Running:
    """One operation under way: its client, its task, its generator, what its device still owes the server, what it last yielded and what it
    cost so far."""

    client: Client
    task: Task
    work: Work[Update]
    unsent: Tensors = field(default_factory=dict)
    asked: Any = None
    answer: Any = None
    flops: float = 0.0
    examples: int = 0


UNSENT = "unsent/"
"""Before the names in a device's memory of what an encoding has not sent yet; methods do not see it."""

Leaving = Callable[[Client, Task, Update], Update]
"""What of an update leaves the device."""


Doing = Callable[[Callable[[Client, Task], Work[Update]], Client, Task], Work[Update]]
"""How an operation is carried out."""


def as_it_is(operation: Callable[[Client, Task], Work[Update]], client: Client, task: Task) -> Work[Update]:
    """The :data:`Doing` that adds nothing."""
    return operation(client, task)


def everything(client: Client, task: Task, update: Update) -> Update:
    """The :data:`Leaving` that leaves every update as it is."""
    return update


class Host:
    """Runs a method's client operations for the devices that ``devices`` makes (by client id)."""

    def __init__(
        self,
        method: object,
        devices: Callable[[int], Client],
        compute: Compute,
        store: ClientStore,
        digest: str,
        leaving: Leaving = everything,
        encoding: Encoding = EXACT,
        doing: Doing = as_it_is,
        besides: Sequence[Callable[[Client, Task], Work[Update]]] = (),
        telling: Callable[[BaseException], str] = in_full,
    ) -> None:
        """``besides``: client operations that are the experiment's and not the method's. ``telling``: what of an error leaves the device
        as the reason of a failure; the log has it in full."""
        self.operations = {**operations(method), **{one.__name__: one for one in besides}}
        self.method_name, self.leaving = type(method).__name__, leaving
        self.devices, self.compute, self.store, self.digest, self.encoding = devices, compute, store, digest, encoding
        self.doing, self.telling = doing, telling

    def answer(self, blobs: Sequence[Blob]) -> list[Blob | Failure]:
        """One packed update or one failure for each packed task, in order. Each client at most once a call. The tasks are let go once they
        are unpacked: whoever does not hold them has each in memory once."""
        begun = [self._start(blob) for blob in blobs]
        del blobs
        replies: list[Blob | Failure | None] = [one if isinstance(one, Failure) else None for one in begun]
        running = {i: one for i, one in enumerate(begun) if isinstance(one, Running)}
        del begun
        while running:
            for i in list(running):
                finished = self._advance(running[i])
                if finished is not None:
                    replies[i] = finished
                    del running[i]
            if running:
                self._compute(running, replies)
        return [reply if reply is not None else Failure(-1, "no reply") for reply in replies]

    def _start(self, blob: Blob) -> Running | Failure:
        try:
            task = unpack(blob, self.digest)
        except WireError as error:
            return Failure(-1, f"WireError: {error}")
        if not isinstance(task, Task):
            return Failure(task.client, "WireError: an update came where a task was expected")
        try:
            task = self.encoding.arrived(task)
        except WireError as error:
            return Failure(task.client, f"WireError: {error}")
        if task.op not in self.operations:
            return Failure(
                task.client,
                f"ValueError: {self.method_name} has no client operation '{task.op}'; it has {sorted(self.operations)}",
            )
        try:
            client = self.devices(task.client)
            client.private, memory = self.store.load(task.client)
            unsent = {n.removeprefix(UNSENT): t for n, t in memory.items() if n.startswith(UNSENT)}
            client.memory = {n: t for n, t in memory.items() if not n.startswith(UNSENT)}
            return Running(client, task, self.doing(self.operations[task.op], client, task), unsent)
        except Exception as error:
            return self._failed(task.client, error)

    def _advance(self, run: Running) -> Blob | Failure | None:
        """Give the operation its last answer. None while it asks for more work."""
        try:
            run.asked = run.work.send(run.answer)
            return None
        except StopIteration as done:
            return self._finish(run, done.value)
        except Exception as error:
            return self._failed(run.client.id, error)

    def _finish(self, run: Running, update: object) -> Blob | Failure:
        try:
            if not isinstance(update, Update) or update.client != run.client.id:
                raise TypeError(f"the operation returned {update!r}; an Update of client {run.client.id} is due")
            told = self.leaving(run.client, run.task, replace(update, flops=run.flops, examples=run.examples, nonce=run.task.nonce))
            told, unsent = self.encoding.up(told, run.task, run.unsent)
            blob = pack(told, self.digest)
            self.store.save(run.client.id, run.client.private, {**run.client.memory, **{UNSENT + n: t for n, t in unsent.items()}})
            return blob
        except Exception as error:
            return self._failed(run.client.id, error)

    def _compute(self, running: dict[int, Running], replies: list[Blob | Failure | None]) -> None:
        """Do the items of all operations in one call; if that fails, one operation at a time, so the one at fault is named."""
        asked = {i: run.asked if isinstance(run.asked, list) else [run.asked] for i, run in running.items()}
        try:
            done = self.compute.run([item for items in asked.values() for item in items])
        except Exception as error:
            if len(asked) == 1:
                (only,) = running
                replies[only] = self._failed(running[only].client.id, error)
                del running[only]
                return
            log.warning("a stacked pass failed (%s); its clients run one by one", in_full(error))
            done = None
        if done is None:  # not where the error still is: it holds the failed pass, and with it the memory of all of them
            for i in list(running):
                self._compute({i: running[i]}, replies)
            for i in [i for i in running if replies[i] is not None]:
                del running[i]
            return
        for i, items in asked.items():
            mine, done = done[: len(items)], done[len(items) :]
            _hand_over(running[i], mine)

    def _failed(self, client: int, error: Exception) -> Failure:
        log.warning("client %d failed", client, exc_info=error)
        return Failure(client, self.telling(error))


def _hand_over(run: Running, done: Sequence[Done]) -> None:
    results = [d.result for d in done]
    run.answer = results if isinstance(run.asked, list) else results[0]
    run.flops += sum(d.flops for d in done)
    run.examples += sum(d.examples for d in done)
