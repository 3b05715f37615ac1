"""FFA-LoRA: federated freeze-A LoRA (Improving LoRA in Privacy-preserving Federated Learning, 2403.12313).

A is frozen at its random start, the same on every device; B and the task head are trained and averaged:

    w^k   <- AdamW on device k from w_t = {B_t, head_t}, under A_0           A_0 (r, d_in), B (d_out, r)
    w_t+1 <- Σ_{k in S_t} p_k w^k,   p_k = n_k / Σ_{j in S_t} n_j

The average is exact, because every device has the same A: s·(Σ p_k B_k)·A_0 = Σ p_k s·B_k A_0, the mean of the devices' updates of W.

A_0 is sent to every device once, in the set-up, exactly, and insisted on: a device with another A would train another function without any
error.
From then on B and the head travel, nothing else. Devices could draw A_0 from the experiment's seed and save that one message; they do not,
because random numbers need not be the same in another version of PyTorch (decision 0011).

Deviations: the paper's noise and clipping for differential privacy are not here; the optimiser is AdamW, fresh at each participation. The
head, which a classification needs, is trained and averaged like B.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import ClassVar

from fedloom.client.client import Client
from fedloom.messages import Flow, Task, Tensors, Update, Work, on_client
from fedloom.methods.fedavg import FedAvg
from fedloom.methods.method import Predictor, State, hand_out, predict, receive
from fedloom.model.base import Model
from fedloom.model.names import is_down, need_pairs
from fedloom.server.participation import Pool
from fedloom.tensors import only, without


@dataclass(frozen=True)
class FfaLora:
    """``inner``: local training and its optimiser."""

    name: ClassVar[str] = "ffa"
    paper: ClassVar[str] = "FFA-LoRA 2403.12313"
    joins_late: ClassVar[bool] = True

    inner: FedAvg = field(default_factory=FedAvg)

    def init(self, model: Model) -> State:
        """The common start.

        Raises:
            ValueError: no LoRA is trained.
        """
        need_pairs(model.initial, self.name)
        return State(0, model.initial)

    def setup(self, state: State, pool: Pool) -> Flow[State]:
        """Every device receives A_0 once. The server keeps it too: its global model needs it."""
        frozen = only(state.shared, [name for name in state.shared if is_down(name)])
        yield from hand_out(self.receive, pool.clients, frozen)
        return (yield from self.inner.setup(replace(state, shared=without(state.shared, frozen), server=frozen), pool))

    def round(self, state: State, pool: Pool) -> Flow[State]:
        """FedAvg on B and the head."""
        return self.inner.round(state, pool)

    @on_client
    def train(self, c: Client, task: Task) -> Work[Update]:
        """Train B and the head under A_0; send them."""
        fitted = yield from self.inner.learn(c, task.tensors, task, fixed=c.private)
        return Update(c.id, len(c.train), fitted.tensors, {"loss": fitted.loss})

    def personalise(self, client: Client, shared: Tensors) -> Work[Predictor]:
        """The shared model: B and the head over A_0."""
        yield from ()
        return Predictor({**client.private, **shared})

    def assembled(self, state: State) -> Tensors | None:
        """The shared model."""
        return {**state.server, **state.shared}

    receive = receive
    predict = predict
