"""Ditto (Fair and Robust Federated Learning Through Personalization, 2012.04221, ICML 2021) on the adapter and the task head.

The global model w is FedAvg's. Beside it every device k keeps a personal model v_k that is held to the global one:

    v_k = argmin F_k(v) + (λ/2)·‖v − w‖²

Each round t, device k in S_t receives w_t and does two things with the same batches, neither of which depends on the other:

    w^k <- AdamW from w_t on F_k                                     sent back;  w_t+1 <- Σ p_k w^k,  p_k = n_k / Σ_{j in S_t} n_j
    v_k <- AdamW from v_k on F_k(v) + (λ/2)·‖v − w_t‖²               stays

v_k starts at w_0, as in the authors' code, and moves only when its device takes part: a device that never did predicts with w_0. Every
device receives w_0 once, in the set-up. Personal predictions are v_k's, whatever w has become since; the global model is w.
λ = 0 is training alone (``local``). The loss that is told is the global model's.

Deviations: AdamW, fresh at each participation, instead of SGD; the gradient that is clipped is the whole sum's. The paper lets a device
choose λ on its validation data; here it is one setting, by default the paper's for devices with little such data and no strong attack.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import ClassVar

import torch

from fedloom.client.client import Client
from fedloom.messages import Flow, Task, Tensors, Update, Work, on_client
from fedloom.methods.fedavg import FedAvg
from fedloom.methods.method import Predictor, State, hand_out, predict, receive, round_of
from fedloom.model.base import Model
from fedloom.seeds import derive_int
from fedloom.server.participation import Pool


@dataclass(frozen=True)
class Ditto:
    """Ditto.

    Attributes:
        inner: FedAvg of the global model; also the local training of both models.
        pull: λ, how strongly a personal model is held to the global one.
    """

    name: ClassVar[str] = "ditto"
    paper: ClassVar[str] = "Ditto 2012.04221"
    joins_late: ClassVar[bool] = True

    inner: FedAvg = field(default_factory=FedAvg)
    pull: float = 1.0

    def __post_init__(self) -> None:
        if not self.pull >= 0:
            raise ValueError(f"Ditto's pull must be 0 or more, since it draws a device towards the global model; got {self.pull}")

    def init(self, model: Model) -> State:
        """w_0."""
        return self.inner.init(model)

    def setup(self, state: State, pool: Pool) -> Flow[State]:
        """v_k = w_0 on every device."""
        pool.insist_on_every_layer(self.name, "each device has a model of its own already, all of it")
        pool.insist_on_no_mask(self.name, "a personal model is held to the global one by a term that rows do not have")
        yield from hand_out(self.receive, pool.clients, state.shared)
        return (yield from self.inner.setup(state, pool))

    def round(self, state: State, pool: Pool) -> Flow[State]:
        """FedAvg of w; what becomes of v_k is the device's own affair."""
        return self.inner.round(state, pool)

    @on_client
    def train(self, c: Client, task: Task) -> Work[Update]:
        """Train w^k and send it; train v_k and keep it."""
        t = round_of(task)
        examples, batches = yield from self.inner.open(c, task.tensors, task)
        personal = self.inner.fit(c, c.private, batches, t, penalty=self.proximal, examples=examples)
        personal = replace(personal, anchor=task.tensors, dropout_seed=derive_int(c.seed, "fit personal", t, c.id))
        common, own = yield [self.inner.fit(c, task.tensors, batches, t, examples=examples), personal]
        c.private = own.tensors
        return Update(c.id, len(c.train), common.tensors, {"loss": common.loss})

    def proximal(self, now: Tensors, anchor: Tensors) -> torch.Tensor:
        """(λ/2)·‖v − w_t‖²."""
        return self.pull / 2 * torch.stack([(now[name] - anchor[name]).square().sum() for name in now]).sum()

    def personalise(self, client: Client, shared: Tensors) -> Work[Predictor]:
        """v_k."""
        yield from ()
        return Predictor(client.private)

    def assembled(self, state: State) -> Tensors | None:
        """w."""
        return state.shared

    receive = receive
    predict = predict
