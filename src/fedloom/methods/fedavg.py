"""Federated LoRA: average the factors. FedIT (2305.05644), FedLR elsewhere; FedAvg (1602.05629) on the adapter and the task head.

    w^k   <- AdamW on device k from w_t, E epochs of seeded shuffled batches     w: every A (r, d_in), B (d_out, r) and the head
    w_t+1 <- Σ_{k in S_t} p_k w^k,   p_k = n_k / Σ_{j in S_t} n_j

The mean of products is not the product of means: mean(B)·mean(A) differs from mean(B·A). That error belongs to the method.
Optimiser state is fresh at each participation.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import torch

from fedloom.client.client import Client
from fedloom.client.curriculum import shuffled
from fedloom.compute.work import AdamW, Fit, Moments, Penalty
from fedloom.messages import Asking, Flow, Task, Tensors, Update, Work, ask, on_client
from fedloom.methods.method import Predictor, State, nothing_to_set_up, predict
from fedloom.model.base import Model
from fedloom.seeds import derive_int
from fedloom.server.aggregation import Average
from fedloom.server.participation import Pool, uniform


@dataclass(frozen=True)
class FedAvg:
    """FedAvg of an adapter and its head; also the local training that other methods hold as ``inner``.

    Attributes:
        lr: AdamW's learning rate.
        local_epochs: epochs E over the device's data in one participation.
        batch_size: examples a step.
        weight_decay: AdamW's decoupled weight decay.
        clip: limit of the gradient's 2-norm (0: none).
        reshuffle: cut new batches in every epoch; otherwise one seeded cut per device for ever, as FibecFed has it.
    """

    name: ClassVar[str] = "lora"
    paper: ClassVar[str] = "FedIT 2305.05644, FedAvg 1602.05629"

    lr: float = 2e-3
    local_epochs: int = 2
    batch_size: int = 8
    weight_decay: float = 0.0
    clip: float = 1.0
    reshuffle: bool = True

    def init(self, model: Model) -> State:
        """Every trainable tensor is shared."""
        return State(0, model.initial)

    def setup(self, state: State, pool: Pool) -> Flow[State]:
        """Nothing."""
        return nothing_to_set_up(state)

    def round(self, state: State, pool: Pool) -> Flow[State]:
        """S_t trains; the server takes the mean by numbers of examples."""
        cohort = uniform(pool, state.round)
        mean = Average()
        yield Asking([ask(self.train, k, state.shared, round=state.round) for k in cohort], mean.take)
        return state.after_round(mean.value())

    @on_client
    def train(self, c: Client, task: Task) -> Work[Update]:
        """ClientUpdate(k, w_t)."""
        fitted = yield self.fit(c, task.tensors, self.batches(c, int(task.settings["round"])), int(task.settings["round"]))  # type: ignore[arg-type]
        return Update(c.id, len(c.train), fitted.tensors, {"loss": float(fitted.losses.mean())})

    def personalise(self, client: Client, shared: Tensors) -> Work[Predictor]:
        """The shared model as it is."""
        yield from ()
        return Predictor(shared)

    def assembled(self, state: State) -> Tensors | None:
        """The shared model."""
        return state.shared

    predict = predict

    def batches(self, c: Client, round: int) -> list[np.ndarray]:
        """The batches of all local epochs of one participation, in order."""
        cut = [self.cut(c, "batches", round, epoch) if self.reshuffle else self.cut(c, "batches") for epoch in range(self.local_epochs)]
        return [batch for epoch in cut for batch in epoch]

    def cut(self, c: Client, purpose: str, *path: int) -> list[np.ndarray]:
        """One epoch of seeded batches of the device's training data."""
        return shuffled(len(c.train), self.batch_size, c.seed, purpose, c.id, *path)

    def fit(
        self,
        c: Client,
        start: Tensors,
        batches: Sequence[np.ndarray],
        round: int,
        mask: dict[str, torch.Tensor] | None = None,
        penalty: Penalty | None = None,
        moments: Moments | None = None,
        fixed: Tensors | None = None,
    ) -> Fit:
        """The work item of local training with this method's optimiser."""
        seed = derive_int(c.seed, "fit", round, c.id)
        return Fit(start, c.train, batches, self.optimizer, mask or {}, penalty, moments, fixed or {}, seed)

    @property
    def optimizer(self) -> AdamW:
        """AdamW with this method's settings."""
        return AdamW(self.lr, weight_decay=self.weight_decay, clip=self.clip)
