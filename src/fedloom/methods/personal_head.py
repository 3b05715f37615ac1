"""Federated LoRA with a personal task head (FedPer, 1912.00818, on the adapter): A and B are averaged, the head stays on the device.

A device's head starts from the common start and persists between its participations. A device that never took part predicts with
the start's head. There is no global head, so there is no global model.

Deviations: the task head alone is personal, where FedPer keeps the last few layers, as many as one chooses; a cohort trains in a round,
where all of its devices do; AdamW, where it has SGD.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import ClassVar

from fedloom.client.client import Client
from fedloom.messages import Flow, Task, Tensors, Update, Work, on_client
from fedloom.methods.fedavg import FedAvg
from fedloom.methods.method import Predictor, State, hand_out, predict, receive
from fedloom.model.base import Model
from fedloom.model.names import is_head, need_head
from fedloom.server.participation import Pool
from fedloom.tensors import only, without


@dataclass(frozen=True)
class PersonalHead:
    """``inner``: local training and its optimiser."""

    name: ClassVar[str] = "lora-personal-head"
    paper: ClassVar[str] = "baseline: FedIT with FedPer's 1912.00818 personal head"
    joins_late: ClassVar[bool] = True

    inner: FedAvg = field(default_factory=FedAvg)

    def init(self, model: Model) -> State:
        """The common start.

        Raises:
            ValueError: there is no head that could be personal.
        """
        need_head(model.initial, self.name)
        return State(0, model.initial)

    def setup(self, state: State, pool: Pool) -> Flow[State]:
        """Every device receives the start's head once."""
        head = [name for name in state.shared if is_head(name)]
        yield from hand_out(self.receive, pool.clients, only(state.shared, head))
        return (yield from self.inner.setup(replace(state, shared=without(state.shared, head)), pool))

    def round(self, state: State, pool: Pool) -> Flow[State]:
        """FedAvg on the factors."""
        return self.inner.round(state, pool)

    @on_client
    def train(self, c: Client, task: Task) -> Work[Update]:
        """Train factors and head; send the factors."""
        fitted = yield from self.inner.learn(c, {**c.private, **task.tensors}, task)
        c.private = without(fitted.tensors, task.tensors.keys())
        return Update(c.id, len(c.train), only(fitted.tensors, task.tensors.keys()), {"loss": fitted.loss})

    def personalise(self, client: Client, shared: Tensors) -> Work[Predictor]:
        """The device's head on the shared factors."""
        yield from ()
        return Predictor({**client.private, **shared})

    def assembled(self, state: State) -> Tensors | None:
        """None: there is no global head."""
        return None

    receive = receive
    predict = predict
