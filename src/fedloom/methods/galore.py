"""GaLore as local training: full-parameter tuning whose Adam lives in a few directions of each gradient (2403.03507), averaged as FedAvg.

    device k, from w_t and nothing remembered, steps τ = 0, 1, …; of each layer's matrix W (m, n), m ≤ n, with the gradient G_τ:
        P  <- the first r left singular vectors of G_τ, if τ mod T = 0         otherwise as it is
        R  <- PᵀG_τ
        M  <- β1·M + (1 − β1)·R;   V <- β2·V + (1 − β2)·R²                       (r, n): what is saved of Adam's memory
        W  <- (1 − η·λ)·W − η·α·P·[(M/(1 − β1^{τ+1})) / (√(V/(1 − β2^{τ+1})) + ε)]
    w_t+1 <- Σ_{k in S_t} p_k w^k,   p_k = n_k / Σ_{j in S_t} n_j

If m > n, P are right singular vectors and R = G·P. All else (embeddings, norms, biases, the head, a matrix that has no more than r
rows or columns) takes AdamW's own step.

Deviations: G is clipped by the whole gradient's norm before it is projected; M, V and τ start at nothing in every participation, as
FedAvg's do here; singular vectors have a sign of their own (``compute/lowrank.py``). No 8-bit states, and no updates layer by layer.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import ClassVar

import torch

from fedloom.client.client import Client
from fedloom.compute.lowrank import projected
from fedloom.compute.work import LowRank
from fedloom.messages import Flow, Task, Tensors, Update, Work, on_client
from fedloom.methods.fedavg import FedAvg
from fedloom.methods.method import Predictor, State, predict
from fedloom.model.base import Model
from fedloom.server.participation import Pool


@dataclass(frozen=True)
class GaLore:
    """GaLore.

    Attributes:
        inner: local training and its optimiser (η, λ, clip).
        rank: directions r of each matrix.
        every: local steps T after which they are found anew.
        scale: α, by which what comes back is multiplied.
    """

    name: ClassVar[str] = "galore"
    paper: ClassVar[str] = "GaLore 2403.03507 in FedAvg 1602.05629"
    adapter_kind: ClassVar[str] = "full"

    inner: FedAvg = field(default_factory=lambda: FedAvg(lr=1e-3))
    rank: int = 4
    every: int = 200
    scale: float = 0.25

    def __post_init__(self) -> None:
        _ = self.low_rank

    @property
    def low_rank(self) -> LowRank:
        """r, T and α."""
        return LowRank(self.rank, self.every, self.scale)

    def init(self, model: Model) -> State:
        """w_0.

        Raises:
            ValueError: nothing that is trained can be projected.
        """
        self.insist_on_matrices(model.initial)
        return self.inner.init(model)

    def setup(self, state: State, pool: Pool) -> Flow[State]:
        """As inner."""
        pool.insist_on_no_mask(self.name, "it projects whole matrices")
        return self.inner.setup(state, pool)

    def round(self, state: State, pool: Pool) -> Flow[State]:
        """S_t trains; the server takes the mean by numbers of examples."""
        return self.inner.round(state, pool)

    @on_client
    def train(self, c: Client, task: Task) -> Work[Update]:
        """ClientUpdate(k, w_t) by GaLore's steps."""
        optimizer = replace(self.inner.optimizer, low_rank=self.low_rank)
        fitted = yield from self.inner.learn(c, task.tensors, task, optimizer=optimizer)
        return Update(c.id, len(c.train), fitted.tensors, {"loss": fitted.loss})

    def personalise(self, client: Client, shared: Tensors) -> Work[Predictor]:
        """The shared model as it is."""
        return self.inner.personalise(client, shared)

    def assembled(self, state: State) -> Tensors | None:
        """The shared model."""
        return state.shared

    def insist_on_matrices(self, tensors: Mapping[str, torch.Tensor]) -> None:
        """Whether there is a matrix that GaLore is for.

        Raises:
            ValueError: there is none.
        """
        if not projected({n: t.shape for n, t in tensors.items()}, self.low_rank):
            raise ValueError(
                f"'{self.name}' projects matrices of transformer layers to rank {self.rank}, and none of the {len(tensors)} trainable "
                f"tensors has more rows and columns ({sorted(tensors)[:3]}); give --adapter.kind full, or a smaller --method.rank"
            )

    predict = predict
