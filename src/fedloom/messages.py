"""What server and clients say to each other, and the two kinds of conversation.

A **flow** is the server's side of a round: a generator that yields tasks and receives the updates that came back.
**Work** is a client operation: a generator that yields work items (``compute/work.py``) and receives their results.
Neither does I/O, knows a device or draws an unseeded number; an engine drives both.

This module does not know what a method is, how tensors travel (``wire.py``) or who computes (``compute/``).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Generator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from types import FunctionType, MethodType
from typing import Any, TypeVar

import torch

Tensors = Mapping[str, torch.Tensor]
"""Named tensors. Names are the ones PEFT saves, so any subset can be written as a loadable adapter."""

Scalar = str | int | float | bool
Setting = Scalar | Sequence[str] | Sequence[int] | Sequence[float]
"""A value small enough to be a setting. No None, dict or tuple: what deployment refuses, simulation refuses."""

CENTRE = -1
"""The client id of the place that holds all training data. It exists in simulation only (``methods/centralised.py``)."""

T = TypeVar("T")
F = TypeVar("F", bound=Callable[..., Any])


def as_it_came(tensors: Tensors) -> Tensors:
    """The tensors unchanged: what :attr:`Task.complete` is unless a task says otherwise."""
    return tensors


@dataclass(frozen=True)
class Task:
    """Server to client: run the client operation ``op`` with these tensors and settings.

    ``nonce`` (32 hex digits, or empty) is what the answer must repeat. An engine draws it where something lies between it and the device.
    ``complete`` stays with the server: what a device's tensors are, if it is asked to leave out what is as it came or what it does without
    (rows, directions, whole tensors). So answers can be held against what was sent and against each other by whoever knows no method; it
    raises on what no honest device answers.
    ``exact`` stays there too: the tensors are sent as they are, whatever the wire loses of others.
    """

    op: str
    client: int
    tensors: Tensors = field(default_factory=dict)
    settings: Mapping[str, Setting] = field(default_factory=dict)
    nonce: str = ""
    complete: Callable[[Tensors], Tensors] = field(default=as_it_came, compare=False, repr=False)
    exact: bool = field(default=False, compare=False, repr=False)


@dataclass(frozen=True)
class Update:
    """Client to server: what the operation made. ``num_examples`` is n_k, the client's weight.

    ``flops`` and ``examples`` say what the device's compute did for it, ``nonce`` which task it answers; the device's host fills them in.
    """

    client: int
    num_examples: int
    tensors: Tensors = field(default_factory=dict)
    metrics: Mapping[str, Setting] = field(default_factory=dict)
    flops: float = 0.0
    examples: int = 0
    nonce: str = ""


DIVERGED = "training diverged"
"""Words in every message about numbers that have stopped being finite. Of a failure nothing but its reason travels, whatever lies between
the device and the server, and it is by these words that what a smaller learning rate may mend is known there."""


@dataclass(frozen=True)
class Failure:
    """A client that did not answer, and why."""

    client: int
    reason: str


@dataclass(frozen=True)
class Traffic:
    """What one task cost: whole messages in bytes as packed, floating-point operations and examples on the device.

    What a device did is told by its update alone. So of one whose update did not come, or could not be read, there is what was sent down
    and nothing else, also where it had trained to the end.
    """

    client: int
    bytes_down: int
    bytes_up: int
    flops: float
    examples: int


@dataclass(frozen=True)
class Replies:
    """The updates that came back, in task order, and the clients that failed: each task has one entry in one of the two.

    ``traffic`` has one entry a task, in task order.
    """

    updates: tuple[Update, ...]
    failures: tuple[Failure, ...] = ()
    traffic: tuple[Traffic, ...] = ()


Take = Callable[[Update], Update]
"""What is done with an update when it is here. What it returns is what anybody sees of the update later."""


def whole(update: Update) -> Update:
    """The :data:`Take` that leaves every update as it is."""
    return update


@dataclass(frozen=True)
class Asking:
    """Tasks whose updates are taken in as they come, in task order, so that all of them need not be in memory at once.

    ``take`` is called once for every client that answered, also if too few did, and then nothing that it gathered may be used.
    ``needed``: how many must answer, where that is not the experiment's to say. Everyone is waited for then.
    """

    tasks: list[Task]
    take: Take
    needed: int | None = None


Flow = Generator[list[Task] | Asking, list[Update], T]
"""Server side of a conversation: yields tasks, receives updates in task order (failed clients absent), returns T."""

Work = Generator[Any, Any, T]
"""Client side: yields work items or lists of them, receives one result per item, returns T."""


class CohortFailed(RuntimeError):
    """Too few clients answered. The message names every one that did not, with its reason."""

    def __init__(self, failures: Sequence[Failure], answered: int, needed: int) -> None:
        named = "; ".join(f"client {f.client}: {f.reason}" for f in failures)
        super().__init__(f"{answered} of {answered + len(failures)} clients answered, {needed} are needed. {named}")
        self.failures, self.answered, self.needed = tuple(failures), answered, needed

    def because(self, last: Sequence[Failure]) -> CohortFailed:
        """The same, with why each of these clients failed ``last``."""
        known = {f.client: f" (the last time: {f.reason})" for f in last}
        told = [Failure(f.client, f"{f.reason}{known.get(f.client, '')}") for f in self.failures]
        return CohortFailed(told, self.answered, self.needed)


def on_client(operation: F) -> F:
    """Mark a method's function as a client operation. The mark is the allow-list: nothing else is callable by a task."""
    operation.on_client = True  # type: ignore[attr-defined]
    return operation


def is_client_operation(value: object) -> bool:
    """Whether ``value`` carries the mark of :func:`on_client`."""
    function = value.__func__ if isinstance(value, MethodType) else value
    return isinstance(function, FunctionType) and "on_client" in vars(function)


def ask(operation: Callable[..., Any], client: int, tensors: Tensors | None = None, **settings: Setting) -> Task:
    """A task for ``client`` to run ``operation``, which must be marked with :func:`on_client`.

    Raises:
        TypeError: the function is not a client operation.
    """
    if not is_client_operation(operation):
        raise TypeError(f"{operation!r} is not a client operation; decorate it with @on_client")
    return Task(operation.__name__, client, dict(tensors or {}), settings)


def due(task: Task, like: Tensors | None = None) -> Task:
    """The task, with a check of its answers: completed, they must have exactly the tensors named in ``like`` (None: all that were sent).
    Those not sent must have the shape and type that they have in ``like``. So a device that answers alone is judged too, with nobody to be
    compared with."""
    wanted = task.tensors if like is None else like

    def complete(came: Tensors) -> Tensors:
        made = task.complete(came)
        missing, more = sorted(wanted.keys() - made.keys()), sorted(made.keys() - wanted.keys())
        if missing or more:
            raise ValueError(f"{missing[:3]} missing, {more[:3]} more than are due")
        for name in sorted(wanted.keys() - task.tensors.keys()):
            found, of = made[name], wanted[name]
            if (found.dtype, found.shape) != (of.dtype, of.shape):
                raise ValueError(f"'{name}' is {found.dtype} of shape {tuple(found.shape)}; {of.dtype} of {tuple(of.shape)} is due")
        return made

    return replace(task, complete=complete)


def through(flow: Flow[T], change: Callable[[Asking], Asking]) -> Flow[T]:
    """The same flow, whose askings are changed on their way: what is the experiment's and not the method's goes into its tasks, and is
    taken out of its updates."""
    answer: Any = None
    while True:
        try:
            asked = flow.send(answer)
        except StopIteration as ended:
            return ended.value
        answer = yield change(asked if isinstance(asked, Asking) else Asking(asked, whole))


def done_by(work: Work[T], way: Callable[[list[Any]], Work[list[Any]]]) -> Work[T]:
    """The same work, whose items are done by ``way``: it is given those that are asked for together, in order, and returns a result for
    each. What it changes of items and results the work knows nothing of."""
    answer: Any = None
    while True:
        try:
            asked = work.send(answer)
        except StopIteration as ended:
            return ended.value
        made = yield from way(asked if isinstance(asked, list) else [asked])
        answer = made if isinstance(asked, list) else made[0]


def insist(tasks: Sequence[Task], attempts: int = 3, take: Take = whole) -> Flow[list[Update]]:
    """Ask, and ask again whoever did not answer; every client must have answered once.

    A client that missed a broadcast would train another function without any error. How many must answer an attempt is not the
    experiment's to say: who is missing is asked again.
    Updates come back in task order, as ``take`` leaves them, which sees each as it comes.

    Raises:
        CohortFailed: naming whoever never answered in ``attempts`` attempts.
    """
    answered: dict[int, Update] = {}
    for _ in range(attempts):
        missing = [task for task in tasks if task.client not in answered]
        if not missing:
            break
        answered |= {update.client: update for update in (yield Asking(missing, take, 0))}
    never = [Failure(t.client, f"no answer to '{t.op}' in {attempts} attempts") for t in tasks if t.client not in answered]
    if never:
        raise CohortFailed(never, len(answered), len(tasks))
    return [answered[task.client] for task in tasks]


def quorum_of(asked: int, share: float) -> int:
    """How many of ``asked`` clients must answer for a round to count: ``ceil(share * asked)``, at least one. Float noise below 1e-9 asks
    for no further one."""
    return max(1, math.ceil(share * asked - 1e-9)) if asked else 0
