"""The one seam between methods and machines, and its laws.

An engine carries tasks to clients and brings their updates back. The six laws (each a conformance test over engines x methods):

- **order**: updates come in task order, whatever order they arrived in;
- **isolation**: every task and update passes the wire, in simulation too;
- **strictness**: what deployment refuses, simulation refuses;
- **failure**: a failed client is absent from the updates, never stale or partial, and its reason is told;
- **durability**: a client's state is stored if and only if its operation returned;
- **determinism**: the same tasks give the same updates, whatever the engine, number of workers or arrival order (same threads and stack).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from typing import Protocol, TypeVar

from fedloom.messages import Asking, CohortFailed, Failure, Flow, Replies, Take, Task, quorum_of, whole
from fedloom.tensors import Weightless

T = TypeVar("T")


class Engine(Protocol):
    """``Local``, ``Workers`` and ``FlowerGrid`` are engines; so is anything that wraps one."""

    def run(self, tasks: Sequence[Task], take: Take = whole) -> Replies:
        """Carry out the tasks, each client at most once, and return what came back: of every update what ``take`` returns, which is called
        in task order, as soon as may be."""
        ...


def drive(
    flow: Flow[T],
    engine: Engine,
    quorum: float = 1.0,
    seen: Callable[[Sequence[Task], Replies], None] | None = None,
    patient: Engine | None = None,
) -> T:
    """Run a flow to its end against an engine. ``quorum`` is the share of each asking that must answer (0: the flow insists itself),
    unless an asking says how many.

    ``seen`` is called with every asking and its replies (the ledger's ear). ``patient``: the engine for askings that say how many must
    answer, where ``engine`` waits for no more than a quorum: they want everyone, and ask again whoever did not answer.

    Raises:
        CohortFailed: fewer clients answered than must, by default ``ceil(quorum * asked)``; none who did has examples; or the flow gave up.
        ValueError: one asking names a client twice.
    """
    try:
        asked = next(flow)
        while True:
            asking = asked if isinstance(asked, Asking) else Asking(asked, whole)
            tasks = asking.tasks
            twice = sorted(client for client, times in Counter(task.client for task in tasks).items() if times > 1)
            if twice:
                raise ValueError(f"clients {twice} are asked twice at once; ask one task a client, then ask again")
            replies = (engine if asking.needed is None else patient or engine).run(tasks, asking.take)
            if seen is not None:
                seen(tasks, replies)
            needed = asking.needed if asking.needed is not None else quorum_of(len(tasks), quorum) if quorum > 0 else 0
            if len(replies.updates) < needed:
                raise CohortFailed(replies.failures, len(replies.updates), needed)
            try:
                asked = flow.send(list(replies.updates))
            except Weightless as error:
                idle = [Failure(update.client, f"its answer has no weight ({error})") for update in replies.updates]
                raise CohortFailed([*replies.failures, *idle], 0, max(needed, 1)) from error
            except CohortFailed as failed:  # `insist` gave up; it is not given the reasons
                raise failed.because(replies.failures) from None
    except StopIteration as done:
        return done.value
