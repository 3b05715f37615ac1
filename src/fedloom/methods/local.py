"""No federation: each device trains alone on its own data. The floor of every table.

A device trains when the cohort of a federated run would have drawn it, from its own tensors; nothing is uploaded. There is no global model.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import ClassVar

from fedloom.client.client import Client
from fedloom.messages import Flow, Task, Tensors, Update, Work, ask, on_client
from fedloom.methods.fedavg import FedAvg
from fedloom.methods.method import Predictor, State, hand_out, predict, receive
from fedloom.model.base import Model
from fedloom.server.participation import Pool, uniform


@dataclass(frozen=True)
class Local:
    """``inner``: local training and its optimiser."""

    name: ClassVar[str] = "local"
    paper: ClassVar[str] = "baseline: no federation"
    joins_late: ClassVar[bool] = True

    inner: FedAvg = field(default_factory=FedAvg)

    def __post_init__(self) -> None:
        self.inner.insist_on_no_prox(self.name)

    def init(self, model: Model) -> State:
        """The common start."""
        return State(0, model.initial)

    def setup(self, state: State, pool: Pool) -> Flow[State]:
        """Every device receives the start once; afterwards nothing is shared."""
        pool.insist_on_the_mean(self.name, "nothing is averaged")
        yield from hand_out(self.receive, pool.clients, state.shared)
        return (yield from self.inner.setup(replace(state, shared={}), pool))

    def round(self, state: State, pool: Pool) -> Flow[State]:
        """The cohort trains, each for itself."""
        yield [ask(self.train, k, {}, **self.inner.clock(state.round, pool)) for k in uniform(pool, state.round)]
        return state.after_round({})

    @on_client
    def train(self, c: Client, task: Task) -> Work[Update]:
        """Train on from where this device was."""
        fitted = yield from self.inner.learn(c, c.private, task)
        c.private = fitted.tensors
        return Update(c.id, len(c.train), metrics={"loss": fitted.loss})

    def personalise(self, client: Client, shared: Tensors) -> Work[Predictor]:
        """The device's own model."""
        yield from ()
        return Predictor(client.private)

    def assembled(self, state: State) -> Tensors | None:
        """None: there is no global model."""
        return None

    receive = receive
    predict = predict
