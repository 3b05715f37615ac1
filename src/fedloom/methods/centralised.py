"""All data in one place: the ceiling of every table. Simulation only; no real federation has such a client.

One round trains on as many examples as a cohort of average devices would (share ``cohort / K`` of the data, E epochs), taken in turn
from seeded shuffles of all training data (always shuffled anew). AdamW's state is kept over the rounds. Nothing travels: no bytes are
booked, and a wire that loses something is refused.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar

import numpy as np
import torch

from fedloom.client.client import Client
from fedloom.client.curriculum import shuffled
from fedloom.compute.work import Moments
from fedloom.messages import CENTRE, Flow, Task, Tensors, Update, Work, ask, on_client
from fedloom.methods.fedavg import FedAvg
from fedloom.methods.method import Predictor, State, nothing_to_set_up, predict, round_of
from fedloom.model.base import Model
from fedloom.server.participation import Pool


@dataclass(frozen=True)
class Centralised:
    """``inner``: local training and its optimiser."""

    name: ClassVar[str] = "centralised"
    paper: ClassVar[str] = "baseline: all data in one place"

    inner: FedAvg = field(default_factory=FedAvg)

    def __post_init__(self) -> None:
        if self.inner.has_curriculum:
            raise ValueError(f"'centralised' takes no curriculum, and {self.inner.curriculum} was given; curricula are devices' own")

    def init(self, model: Model) -> State:
        """The common start."""
        return State(0, model.initial)

    def setup(self, state: State, pool: Pool) -> Flow[State]:
        """Nothing.

        Raises:
            ValueError: what is asked for is of devices: a mask, a wire, another rule than the mean, layers that stay.
        """
        if not self.inner.reshuffle:
            raise ValueError(f"'{self.name}' shuffles all data anew in every epoch; leave --method.inner.no-reshuffle out")
        pool.insist_on_the_mean(self.name, "nothing is averaged")
        pool.insist_on_no_mask(self.name, "which neurons matter is every device's own choice")
        if not pool.encoding.exact:
            raise ValueError(f"'{self.name}' has all data in one place, and nothing there goes over a wire; leave --wire out")
        return nothing_to_set_up(state)

    def round(self, state: State, pool: Pool) -> Flow[State]:
        """One stretch of ordinary training."""
        share = pool.cohort / len(pool.clients)
        (update,) = yield [ask(self.train, CENTRE, state.shared, round=state.round, share=share)]
        return state.after_round(update.tensors)

    @on_client
    def train(self, c: Client, task: Task) -> Work[Update]:
        """Batches ``begin``..``end`` of the endless sequence of shuffled epochs."""
        t, share = round_of(task), float(task.settings["share"])  # type: ignore[arg-type]
        a_round = max(1, round(share * len(c.train) * self.inner.local_epochs / self.inner.batch_size))
        batches = self._batches(c, t * a_round, (t + 1) * a_round)
        fitted = yield self.inner.fit(c, task.tensors, batches, t, moments=_remembered(c))
        m = fitted.moments
        c.memory = {
            **{f"m/{n}": v for n, v in m.first.items()},
            **{f"v/{n}": v for n, v in m.second.items()},
            "steps": torch.tensor(m.steps),
        }
        return Update(c.id, len(c.train), fitted.tensors, {"loss": fitted.loss})

    def _batches(self, c: Client, begin: int, end: int) -> list[np.ndarray]:
        size = self.inner.batch_size
        per_epoch = -(-len(c.train) // size)
        epochs = {e: shuffled(len(c.train), size, c.seed, "centralised", e) for e in range(begin // per_epoch, end // per_epoch + 1)}
        return [epochs[i // per_epoch][i % per_epoch] for i in range(begin, end)]

    def personalise(self, client: Client, shared: Tensors) -> Work[Predictor]:
        """The one model."""
        yield from ()
        return Predictor(shared)

    def assembled(self, state: State) -> Tensors | None:
        """The one model."""
        return state.shared

    predict = predict


def _remembered(c: Client) -> Moments | None:
    if "steps" not in c.memory:
        return None
    first = {n.removeprefix("m/"): t for n, t in c.memory.items() if n.startswith("m/")}
    second = {n.removeprefix("v/"): t for n, t in c.memory.items() if n.startswith("v/")}
    return Moments(first, second, int(c.memory["steps"]))
