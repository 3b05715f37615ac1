"""FedSA-LoRA: federated share-A LoRA (Selective Aggregation for Low-Rank Adaptation in Federated Learning, 2410.01463, ICLR 2025).

A is taken for what all devices have in common and B for what is a device's own. Both are trained, A alone is averaged:

    A^k, B^k, head^k <- AdamW on device k from A_t, B^k, head^k              A (r, d_in), B (d_out, r)
    A_t+1            <- Σ_{k in S_t} p_k A^k,   p_k = n_k / Σ_{j in S_t} n_j

B and the head persist on their device between its participations. That the head stays there too is how the authors' code for GLUE has it:
its ``local_param`` names the classifier beside the local factor. A device that never took part has B = 0 and the start's head. There is
no global B, so there is no global model.

The start's B and head are sent to every device once, in the set-up, as with a personal head. B = 0 need not travel for LoRA's usual
start; it does, so that any other start of B is common as well.

Deviations: AdamW, fresh at each participation, and epochs instead of a number of steps.
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
class FedSaLora:
    """``inner``: local training and its optimiser."""

    name: ClassVar[str] = "fedsa"
    paper: ClassVar[str] = "FedSA-LoRA 2410.01463"
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
        """Every device receives the start's B and head once; A alone is shared from then on."""
        common = only(state.shared, [name for name in state.shared if is_down(name)])
        yield from hand_out(self.receive, pool.clients, without(state.shared, common))
        return (yield from self.inner.setup(replace(state, shared=common), pool))

    def round(self, state: State, pool: Pool) -> Flow[State]:
        """FedAvg on A."""
        return self.inner.round(state, pool)

    @on_client
    def train(self, c: Client, task: Task) -> Work[Update]:
        """Train A, B and the head; keep B and the head; send A."""
        fitted = yield from self.inner.learn(c, {**c.private, **task.tensors}, task)
        c.private = without(fitted.tensors, task.tensors.keys())
        return Update(c.id, len(c.train), only(fitted.tensors, task.tensors.keys()), {"loss": fitted.loss})

    def personalise(self, client: Client, shared: Tensors) -> Work[Predictor]:
        """The device's B and head on the shared A."""
        yield from ()
        return Predictor({**client.private, **shared})

    def assembled(self, state: State) -> Tensors | None:
        """None: there is neither a global B nor a global head."""
        return None

    receive = receive
    predict = predict
