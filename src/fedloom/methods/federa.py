"""FeDeRA: federated LoRA that starts from the singular vectors of the pre-trained weights (2404.18848).

    W0 = U S Vᵀ,   B_0 = U_r (S_r/s)^(1/2),   A_0 = (S_r/s)^(1/2) V_rᵀ,   W_res = W0 − s·B_0·A_0          (eqs. 3, 4; s = α/r)
    A^k, B^k <- AdamW on device k from A_t, B_t, with W_res frozen
    A_t+1 <- Σ_{k in S_t} p_k A^k,   B_t+1 <- Σ_{k in S_t} p_k B^k,   p_k = n_k / Σ_{j in S_t} n_j

The start is the adapter's (``--adapter.start svd``, ``model/principal.py``), so every other method can take it as well; this one insists
on it, and is plain federated LoRA beyond. mean(B)·mean(A) is not mean(B·A) here either. The first step moves both factors, weighted by
singular values, so a learning rate that suits LoRA's zero start need not suit this one: search it.

Nothing is sent for the start: every device has the weights and decomposes them itself, with fixed signs, which the paper's server does once
for all. Exactly, or fast by random subspace iteration (``--adapter.start fast-svd``), in which all draw the same numbers. Either way two
machines may differ in last digits, and averages are right all the same: what is averaged is A and B, and under them each device has its own
W_res,k with W_res,k + s·B_0,k·A_0,k = W0, so that W_res,k + s·B·A is one weight on all, to rounding.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar

from fedloom.client.client import Client
from fedloom.messages import Flow, Task, Tensors, Update, Work, on_client
from fedloom.methods.fedavg import FedAvg
from fedloom.methods.method import Predictor, State, predict
from fedloom.model.base import Model
from fedloom.model.names import is_up, need_pairs
from fedloom.server.participation import Pool


@dataclass(frozen=True)
class FeDeRA:
    """``inner``: local training and its optimiser."""

    name: ClassVar[str] = "federa"
    paper: ClassVar[str] = "FeDeRA 2404.18848"
    adapter_start: ClassVar[str] = "svd"
    joins_late: ClassVar[bool] = True

    inner: FedAvg = field(default_factory=FedAvg)

    def init(self, model: Model) -> State:
        """Every trainable tensor is shared.

        Raises:
            ValueError: no LoRA is trained, or one that starts at zero.
        """
        need_pairs(model.initial, self.name)
        if not all(bool(tensor.any()) for name, tensor in model.initial.items() if is_up(name)):
            raise ValueError(
                "'federa' is LoRA that starts from singular vectors, and this one starts at zero; give it --adapter.start svd or fast-svd"
            )
        return self.inner.init(model)

    def setup(self, state: State, pool: Pool) -> Flow[State]:
        """As inner."""
        return self.inner.setup(state, pool)

    def round(self, state: State, pool: Pool) -> Flow[State]:
        """As inner."""
        return self.inner.round(state, pool)

    @on_client
    def train(self, c: Client, task: Task) -> Work[Update]:
        """As inner."""
        return self.inner.train(c, task)

    def personalise(self, client: Client, shared: Tensors) -> Work[Predictor]:
        """As inner."""
        return self.inner.personalise(client, shared)

    def assembled(self, state: State) -> Tensors | None:
        """As inner."""
        return self.inner.assembled(state)

    predict = predict
