"""Sequential full tuning: one client at a time trains the whole model and hands it on (Fed-full of 2406.11187; cyclic weight transfer).

    turn t: client t mod K,   w_t+1 <- AdamW on its data from w_t, m = v = 0, every weight trained

What FedCyBGD does with one block, done with all of them. Its other half, the average of whole models, is ``fedfft``.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar

from fedloom.client.client import Client
from fedloom.messages import Asking, Flow, Task, Tensors, Update, Work, ask, due, on_client, whole
from fedloom.methods.fedavg import FedAvg
from fedloom.methods.method import Predictor, State, predict
from fedloom.model.base import Model
from fedloom.server.participation import Pool


@dataclass(frozen=True)
class Handover:
    """``inner``: local training and its optimiser."""

    name: ClassVar[str] = "handover"
    paper: ClassVar[str] = "sequential Fed-full of FedCyBGD 2406.11187"
    adapter_kind: ClassVar[str] = "full"
    one_at_a_time: ClassVar[bool] = True

    inner: FedAvg = field(default_factory=lambda: FedAvg(lr=2e-4, schedule="cosine"))

    def init(self, model: Model) -> State:
        """w_0."""
        return self.inner.init(model)

    def setup(self, state: State, pool: Pool) -> Flow[State]:
        """As inner."""
        pool.insist_on_the_mean(self.name, "one client at a time hands the model on, and nothing is averaged")
        return self.inner.setup(state, pool)

    def round(self, state: State, pool: Pool) -> Flow[State]:
        """One turn. A client that does not answer costs its turn and nothing else."""
        client = pool.clients[state.round % len(pool.clients)]
        task = due(ask(self.train, client, state.shared, **self.inner.clock(state.round, pool)))
        came = yield Asking([task], whole, needed=0)
        return state.after_round(came[0].tensors if came else state.shared)

    @on_client
    def train(self, c: Client, task: Task) -> Work[Update]:
        """As inner."""
        return self.inner.train(c, task)

    def personalise(self, client: Client, shared: Tensors) -> Work[Predictor]:
        """The shared model."""
        return self.inner.personalise(client, shared)

    def assembled(self, state: State) -> Tensors | None:
        """The shared model."""
        return self.inner.assembled(state)

    predict = predict
