"""Engines around an engine: one remembers, one loses tasks, one loses answers, one has devices that lie. For tests and rehearsals.

They do not know what they wrap. ``fails(task, attempt)`` decides: a reason to fail, or None to let pass; ``attempt`` counts,
from 0, the earlier askings of this operation at this client through this wrapper.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import replace

import torch

from fedloom.engines.engine import Engine
from fedloom.engines.local import taken
from fedloom.messages import Failure, Replies, Take, Task, Tensors, Traffic, Update, whole
from fedloom.seeds import derive

Fails = Callable[[Task, int], str | None]

Lies = Callable[[Task, Update], Tensors]
"""What a device says instead of the tensors that it made."""


class Recording:
    """Passes everything on and keeps it: ``calls`` holds (tasks, replies) of every run, in order, updates as they came."""

    def __init__(self, inner: Engine) -> None:
        self.inner = inner
        self.calls: list[tuple[tuple[Task, ...], Replies]] = []

    def run(self, tasks: Sequence[Task], take: Take = whole) -> Replies:
        """What the inner engine says."""
        updates: list[Update] = []

        def heard(update: Update) -> Update:
            updates.append(update)
            return take(update)

        replies = self.inner.run(tasks, heard)
        self.calls.append((tuple(tasks), replace(replies, updates=tuple(updates))))
        return replies


class Faulty:
    """Drops tasks on their way: the device never runs them, nothing was sent, and the server is told the reason."""

    def __init__(self, inner: Engine, fails: Fails) -> None:
        self.inner, self.fails, self.asked = inner, fails, Counter[tuple[str, int]]()

    def run(self, tasks: Sequence[Task], take: Take = whole) -> Replies:
        """Let the inner engine run the tasks that are not dropped."""
        reasons = _reasons(tasks, self.fails, self.asked)
        return _without(tasks, reasons, self.inner.run([task for task in tasks if task.client not in reasons], take), reached=False)


class Lossy:
    """Drops answers on their way back: the device ran and keeps its new state, but the server hears only the reason."""

    def __init__(self, inner: Engine, fails: Fails) -> None:
        self.inner, self.fails, self.asked = inner, fails, Counter[tuple[str, int]]()

    def run(self, tasks: Sequence[Task], take: Take = whole) -> Replies:
        """Let the inner engine run every task, then lose some of the answers."""
        return taken(_without(tasks, _reasons(tasks, self.fails, self.asked), self.inner.run(tasks), reached=True), take)


class Hostile:
    """Devices that do what they are asked and then say something else, where they send tensors at all."""

    def __init__(self, inner: Engine, who: Collection[int], lies: Lies) -> None:
        self.inner, self.who, self.lies = inner, frozenset(who), lies

    def run(self, tasks: Sequence[Task], take: Take = whole) -> Replies:
        """What the inner engine says, but for the tensors of those who lie."""
        asked = {task.client: task for task in tasks}

        def heard(update: Update) -> Update:
            lies = update.client in self.who and update.tensors
            return take(replace(update, tensors=self.lies(asked[update.client], update)) if lies else update)

        return self.inner.run(tasks, heard)


def scaled(by: float) -> Lies:
    """The way from what was sent to what was made, taken ``by`` times (below 0: backwards)."""

    def lies(task: Task, update: Update) -> Tensors:
        came = {n: task.tensors[n] if n in task.tensors else torch.zeros_like(t) for n, t in update.tensors.items()}
        return {n: came[n] + by * (t - came[n]) if t.is_floating_point() else t for n, t in update.tensors.items()}

    return lies


def noise(size: float, seed: int) -> Lies:
    """Instead of that way, one of ``size`` times its length in a direction of its own."""

    def lies(task: Task, update: Update) -> Tensors:
        rng, made = derive(seed, "noise", update.client), {}
        for n, t in update.tensors.items():
            came = task.tensors[n] if n in task.tensors else torch.zeros_like(t)
            drawn = torch.from_numpy(rng.standard_normal(t.numel())).view(t.shape).to(t.dtype) if t.is_floating_point() else t
            length = (t - came).norm() / drawn.norm().clamp(min=1e-30) if t.is_floating_point() else 0
            made[n] = came + size * length * drawn if t.is_floating_point() else t
        return made

    return lies


def _reasons(tasks: Sequence[Task], fails: Fails, asked: Counter[tuple[str, int]]) -> dict[int, str]:
    """Reasons by client, of those who fail this time; counts this asking."""
    reasons = {}
    for task in tasks:
        reason = fails(task, asked[task.op, task.client])
        asked[task.op, task.client] += 1
        if reason is not None:
            reasons[task.client] = reason
    return reasons


def _without(tasks: Sequence[Task], reasons: Mapping[int, str], replies: Replies, reached: bool) -> Replies:
    """The replies without those of the clients in ``reasons``, who become failures; all in task order."""
    failures = {failure.client: failure for failure in replies.failures}
    failures |= {client: Failure(client, reason) for client, reason in reasons.items()}
    traffic = {entry.client: entry for entry in replies.traffic}
    for client in reasons:
        traffic[client] = Traffic(client, traffic[client].bytes_down if reached else 0, 0, 0.0, 0)
    return Replies(
        tuple(update for update in replies.updates if update.client not in reasons),
        tuple(failures[task.client] for task in tasks if task.client in failures),
        tuple(traffic[task.client] for task in tasks),
    )
