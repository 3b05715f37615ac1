"""Devices that come into a federation when it has begun: who is in, and what set-up asked of everybody, to be asked of them as well.

A set-up is a conversation whose outcome the server's state keeps; what it gave devices it gave by tasks. :class:`Remembering` hears it and
keeps every task that all devices were asked alike, but for their number (FibecFed: score your examples and layers, at these tensors; adopt
these layers). A device that comes later is asked the same, in the same order, before the first round in which it takes part
(:func:`welcome`); but not to train, which a task tells by its round: what a warm-up brought is in the state. What it answers changes
nothing that was decided: the layers stay those that the first devices chose.

From then on it is one of those among whom cohorts are drawn, and its number of examples counts like anybody's. So a cohort is a pure
function of the seed, the round and who is in, which the checkpoint and every row of ``rounds.jsonl`` tell.

A method says whether that is right for it (``joins_late``): not where its server keeps something for each device of the set-up, or changes
later what the set-up handed out.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from fedloom.engines.engine import Engine
from fedloom.messages import Asking, Flow, Replies, Setting, Take, Task, Tensors, whole
from fedloom.methods import all_methods
from fedloom.methods.method import says
from fedloom.server.participation import Pool
from fedloom.tensors import identical


@dataclass(frozen=True)
class Step:
    """What everybody was asked, and whether its tensors travel as they are, whatever the wire."""

    op: str
    tensors: Tensors = field(default_factory=dict)
    settings: Mapping[str, Setting] = field(default_factory=dict)
    exact: bool = False

    def of(self, client: int) -> Task:
        """The same, asked of this client."""
        return Task(self.op, client, self.tensors, self.settings, exact=self.exact)


@dataclass(frozen=True)
class Late:
    """Who is in, by the round from which on (0: from the set-up), and what the others are to be asked first."""

    since: Mapping[int, int]
    steps: tuple[Step, ...] = ()

    def pool(self, everyone: Pool) -> Pool:
        """Those who are in."""
        return replace(everyone, clients=tuple(sorted(self.since)))

    def missing(self, everyone: Pool) -> list[int]:
        """Those who are not."""
        return [k for k in everyone.clients if k not in self.since]

    def with_these(self, clients: Sequence[int], round: int, everyone: Pool) -> Late:
        """These are in from ``round`` on. Nothing is kept for others once all are."""
        since = dict(sorted({**self.since, **dict.fromkeys(clients, round)}.items()))
        return Late(since, self.steps if len(since) < len(everyone.clients) else ())

    def told(self, everyone: Pool) -> dict[str, Any]:
        """As a row, the results and ``fedloom status`` tell it: who came after the set-up, and who has not come."""
        return {"joined": {str(k): at for k, at in self.since.items() if at}, "missing": self.missing(everyone)}


class Remembering:
    """An engine that remembers what it asked everybody alike. ``clients``: who everybody is."""

    def __init__(self, inner: Engine, clients: Sequence[int]) -> None:
        self.inner, self.clients = inner, frozenset(clients)
        self._asked: list[tuple[Step, set[int]]] = []

    def run(self, tasks: Sequence[Task], take: Take = whole) -> Replies:
        """As inner."""
        replies = self.inner.run(tasks, take)
        answered = {update.client for update in replies.updates}
        for task in tasks:
            if task.client in answered and "round" not in task.settings:
                self._those_asked(task).add(task.client)
        return replies

    @property
    def steps(self) -> tuple[Step, ...]:
        """The tasks that all have answered, in the order in which they were asked first."""
        return tuple(step for step, answered in self._asked if answered >= self.clients)

    def _those_asked(self, task: Task) -> set[int]:
        """Those who have answered this task but for their number, tried again or not: its tensors are the same objects then."""
        for step, answered in self._asked:
            if (step.op, step.settings) == (task.op, task.settings) and identical(step.tensors, task.tensors):
                return answered
        self._asked.append((Step(task.op, task.tensors, task.settings, task.exact), answered := set[int]()))
        return answered


def welcome(steps: Sequence[Step], clients: Sequence[int]) -> Flow[list[int]]:
    """Ask these clients what everybody was asked. Returns those who have answered everything; nobody waits for the others."""
    left = list(clients)
    for step in steps:
        if left:
            left = [update.client for update in (yield Asking([step.of(k) for k in left], whole, 0))]
    return left


def may_join_late(method: Any) -> bool:
    """Whether devices may come to this method after its set-up."""
    return bool(says(method, "joins_late"))


def those_who_may() -> list[str]:
    """The package's methods to which devices may come late, as they are by default."""
    return [name for name, kind in all_methods().items() if may_join_late(kind())]
