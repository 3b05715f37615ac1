"""SLoRA: sparse full tuning first, then LoRA from its singular vectors (SLoRA: Federated Parameter Efficient Fine-Tuning of Language
Models, 2308.06522).

    t < R_1:   W^k <- AdamW on device k from W_t, at the entries of one random mask M, the same everywhere, density δ
               W_t+1 <- Σ_{k in S_t} p_k W^k                                 W (d_out, d_in): the weights that LoRA would stand on
    t = R_1:   W_R1 − W_0 = U S Vᵀ,   B = U_r (S_r/s)^(1/2),   A = (S_r/s)^(1/2) V_rᵀ
    t ≥ R_1:   federated LoRA from (A, B) on W_0                             A (r, d_in), B (d_out, r),   p_k = n_k / Σ_{j in S_t} n_j

The task head is trained and averaged throughout. In the first stage only the δ entries of W − W_0 travel, both ways, and their places do
not: M is drawn from the experiment's seed on both sides. W_0 is the model's own and every device has it.

Deviations: what lies under the pairs is tuned, not every weight; the first stage has a rate of its own (``sparse_lr``); AdamW, fresh at
each participation; a moment of AdamW is kept for every entry of W while a device trains, though M lets few of them move.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import ClassVar

import numpy as np
import torch

from fedloom.client.client import Client
from fedloom.compute.work import Pretrained
from fedloom.messages import Asking, Flow, Task, Tensors, Update, Work, ask, due, on_client
from fedloom.methods.fedavg import FedAvg
from fedloom.methods.method import Predictor, State, predict
from fedloom.model.base import Model
from fedloom.model.factors import need_room, need_zero_start, refactored
from fedloom.model.names import is_beneath, is_factor, need_pairs
from fedloom.seeds import derive_int
from fedloom.server.participation import Pool, uniform
from fedloom.tensors import only, rounded_up, without

MOVED = "moved/"
"""Before the name of a weight: its entries under the mask, less those of W_0 (⌈δ·d_out·d_in⌉,)."""


@dataclass(frozen=True)
class SLora:
    """SLoRA.

    Attributes:
        inner: local training and its optimiser.
        first: R_1 as a share of all rounds, rounded up.
        density: δ, the share of the entries that are tuned in the first stage.
        sparse_lr: the learning rate of the first stage, its own: ``inner.lr``, and what searches it, are of the second.
    """

    name: ClassVar[str] = "slora"
    paper: ClassVar[str] = "SLoRA 2308.06522"
    rounds_differ: ClassVar[bool] = True

    inner: FedAvg = field(default_factory=FedAvg)
    first: float = 0.2
    density: float = 0.01
    sparse_lr: float = 2e-3

    def __post_init__(self) -> None:
        if not (0 < self.first < 1 and 0 < self.density <= 1 and self.sparse_lr > 0):
            raise ValueError(
                f"SLoRA needs first in (0, 1), density in (0, 1] and sparse_lr above 0; got {self.first}, {self.density}, {self.sparse_lr}"
            )

    def init(self, model: Model) -> State:
        """What moved, nothing yet, and the head are shared; the server keeps W_0 and the pairs' start.

        Raises:
            ValueError: no LoRA is trained, one that does not start at zero, or one of a higher rank than a weight has; a base in few
                bits.
        """
        need_pairs(model.initial, self.name)
        model.need_own_weights(self.name)
        need_room(model.initial, self.name)
        need_zero_start(model.initial, self.name)
        pairs = only(model.initial, list(filter(is_factor, model.initial)))
        none = {f"{MOVED}{n}": torch.zeros(self.count(w)) for n, w in model.weights.items()}
        return State(0, {**without(model.initial, pairs), **none}, {**pairs, **model.weights}, {"scaling": model.beneath.scaling})

    def setup(self, state: State, pool: Pool) -> Flow[State]:
        """As inner; and the seed of the mask."""
        pool.insist_on_every_layer(self.name, "the pairs begin after its first stage, and then not at the model's start")
        state = yield from self.inner.setup(state, pool)
        return replace(state, facts={**state.facts, "seed": pool.seed})

    def round(self, state: State, pool: Pool) -> Flow[State]:
        """FedAvg of what is shared; after R_1 rounds, missed ones too, what moved becomes the pairs' start."""
        state = self.staged(state, pool)  # the round before may have been missed
        cohort, mean = uniform(pool, state.round), pool.average(state.shared)
        op = self.tune if any(n.startswith(MOVED) for n in state.shared) else self.train
        yield Asking([due(ask(op, k, state.shared, **self.inner.clock(state.round, pool))) for k in cohort], mean.take)
        return self.staged(state.after_round(mean.value()), pool)

    def staged(self, state: State, pool: Pool) -> State:
        """The state in the stage that its round is of, t < R_1 or t ≥ R_1."""
        first = any(n.startswith(MOVED) for n in state.shared)
        return self.begun(state, pool.seed) if first and state.round >= rounded_up(self.first, pool.rounds) else state

    def begun(self, state: State, seed: int) -> State:
        """The second stage's start."""
        weights = only(state.server, list(filter(is_beneath, state.server)))
        now = self.weights(state.shared, weights, seed)
        pairs = without(state.server, weights)
        start = refactored({n: now[n].double() - w.double() for n, w in weights.items()}, pairs, float(state.facts["scaling"]))
        rest = {n: t for n, t in state.shared.items() if not n.startswith(MOVED)}
        return replace(state, shared={**rest, **start}, server={})

    @on_client
    def tune(self, c: Client, task: Task) -> Work[Update]:
        """Train the weights' entries under the mask, and the head; send what moved."""
        own = yield Pretrained()
        now = self.weights(task.tensors, own, c.seed)
        heads = {n: t for n, t in task.tensors.items() if not n.startswith(MOVED)}
        masks = {n: torch.zeros(w.numel()).index_fill_(0, self.places(n, w, c.seed), 1.0).view(w.shape) for n, w in own.items()}
        slow = replace(self.inner, lr=self.sparse_lr)
        fitted = yield from slow.learn(c, {**heads, **now}, task, mask=masks)
        change = {f"{MOVED}{n}": (fitted.tensors[n] - w).reshape(-1)[self.places(n, w, c.seed)] for n, w in own.items()}
        return Update(c.id, len(c.train), {**only(fitted.tensors, list(heads)), **change}, {"loss": fitted.loss})

    @on_client
    def train(self, c: Client, task: Task) -> Work[Update]:
        """As inner."""
        return self.inner.train(c, task)

    def personalise(self, client: Client, shared: Tensors) -> Work[Predictor]:
        """The shared model: in the first stage W_t and the head, then LoRA on W_0."""
        if not any(n.startswith(MOVED) for n in shared):
            return Predictor(shared)
        own = yield Pretrained()
        return Predictor(self.model(shared, own, client.seed))

    def assembled(self, state: State) -> Tensors | None:
        """The shared model."""
        if not any(n.startswith(MOVED) for n in state.shared):
            return state.shared
        return self.model(state.shared, only(state.server, list(filter(is_beneath, state.server))), int(state.facts["seed"]))

    def model(self, shared: Tensors, own: Tensors, seed: int) -> dict[str, torch.Tensor]:
        """W_t and the head."""
        return {**{n: t for n, t in shared.items() if not n.startswith(MOVED)}, **self.weights(shared, own, seed)}

    def weights(self, shared: Tensors, own: Tensors, seed: int) -> dict[str, torch.Tensor]:
        """W_t (d_out, d_in): W_0 with what moved added at the mask's places."""
        return {n: w.reshape(-1).index_add(0, self.places(n, w, seed), shared[f"{MOVED}{n}"]).view(w.shape) for n, w in own.items()}

    def places(self, name: str, weight: torch.Tensor, seed: int) -> torch.Tensor:
        """Where M is 1 in a weight, ascending int64: at the smallest of as many raw numbers, which NumPy promises to leave as they are."""
        raw = np.random.PCG64(derive_int(seed, "mask", name)).random_raw(weight.numel())
        return torch.from_numpy(np.sort(np.argpartition(raw, self.count(weight) - 1)[: self.count(weight)]))

    def count(self, weight: torch.Tensor) -> int:
        """⌈δ·d_out·d_in⌉."""
        return rounded_up(self.density, weight.numel())

    predict = predict
