"""Simulation on this machine: the whole cohort goes to one host in one call, so its compute can stack it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from fedloom.client.host import Host
from fedloom.messages import Failure, Replies, Task, Traffic, Update
from fedloom.wire import WireError, pack, unpack


class Local:
    """An :class:`~fedloom.engines.engine.Engine` over one in-process host."""

    def __init__(self, host: Host) -> None:
        self.host = host

    def run(self, tasks: Sequence[Task]) -> Replies:
        """Pack every task, let the host answer all of them at once, unpack every reply.

        Raises:
            WireError: a task may not cross the wire; that is the method's fault and ends the run.
        """
        blobs = [pack(task, self.host.digest) for task in tasks]
        return gather(tasks, blobs, self.host.answer(blobs), self.host.digest)


def gather(tasks: Sequence[Task], sent: Sequence[bytes], answers: Sequence[bytes | Failure], digest: str) -> Replies:
    """Replies from what was sent and what came back for each task, in task order."""
    updates, failures, traffic = [], [], []
    for task, down, answer in zip(tasks, sent, answers, strict=True):
        update = answer if isinstance(answer, Failure) else _opened(answer, task.client, digest)
        if isinstance(update, Update):
            updates.append(update)
            traffic.append(Traffic(task.client, len(down), len(answer), update.flops, update.examples))  # type: ignore[arg-type]
        else:
            failures.append(replace(update, client=task.client))
            traffic.append(Traffic(task.client, len(down), 0, 0.0, 0))
    return Replies(tuple(updates), tuple(failures), tuple(traffic))


def _opened(blob: bytes, client: int, digest: str) -> Update | Failure:
    try:
        update = unpack(blob, digest)
    except WireError as error:
        return Failure(client, f"WireError: {error}")
    if not isinstance(update, Update) or update.client != client:
        return Failure(client, "WireError: the reply is not this client's update")
    return update
