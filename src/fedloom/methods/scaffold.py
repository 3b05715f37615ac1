"""SCAFFOLD: stochastic controlled averaging (1910.06378) on what the adapter trains and the task head.

Each device knows which way its own loss pulls (c_k), the server which way all do (c); training goes by the difference:

    w^k  <- AdamW on device k from w_t, every step's gradient g replaced by g − c_k + c
    c_k+ <- ∇F_k(w_t), over all of the device's examples                     option I of the paper
    w_t+1 <- Σ_{k in S_t} p_k w^k,   p_k = n_k / Σ_{j in S_t} n_j
    c     <- c + (1/K) Σ_{k in S_t} (c_k+ − c_k)                             K devices in all

c and every c_k begin at zero; c_k stays on its device. A participation sends and receives twice what `lora`'s does.

Deviations: AdamW, fresh at each participation, instead of SGD. Option II, c_k+ = c_k − c + (w_t − w^k)/(steps·lr), is a mean of gradients
only if the steps are SGD's, so there is option I alone, which costs one more pass over the device's examples (and counts one more example
trained on for each). The paper averages devices alike; here p_k is FedAvg's.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import ClassVar

import numpy as np
import torch

from fedloom.client.client import Client
from fedloom.compute.work import AdamW
from fedloom.messages import Asking, Flow, Task, Tensors, Update, Work, ask, on_client
from fedloom.methods.fedavg import FedAvg
from fedloom.methods.method import Predictor, State, predict
from fedloom.model.base import Model
from fedloom.server.participation import Pool, uniform

CONTROL = "control/"
"""Before a tensor's name: c or c_k for it."""


@dataclass(frozen=True)
class Scaffold:
    """``inner``: local training and its optimiser."""

    name: ClassVar[str] = "scaffold"
    paper: ClassVar[str] = "SCAFFOLD 1910.06378"

    inner: FedAvg = field(default_factory=FedAvg)

    def __post_init__(self) -> None:
        if not isinstance(self.inner, FedAvg):
            raise ValueError(
                f"SCAFFOLD corrects the gradients of plain federated LoRA, and inner is {type(self.inner).__name__}; it takes FedAvg or "
                "FedProx, with any curriculum, start (--adapter.start svd is FeDeRA's), kind of adapter and server step (--server.rule)"
            )

    def init(self, model: Model) -> State:
        """Every trainable tensor is shared; c = 0."""
        started = self.inner.init(model)
        return replace(started, server={f"{CONTROL}{n}": torch.zeros_like(t) for n, t in started.shared.items()})

    def setup(self, state: State, pool: Pool) -> Flow[State]:
        """As inner."""
        return self.inner.setup(state, pool)

    def round(self, state: State, pool: Pool) -> Flow[State]:
        """S_t trains; the server averages the models and adds what the devices' controls moved to its own."""
        models, moved, answered = pool.average(state.shared), pool.average(), 0

        def take(update: Update) -> Update:
            nonlocal answered
            answered += 1
            controls, model = parted(update.tensors)
            moved.take(replace(update, tensors=controls, num_examples=1))
            return models.take(replace(update, tensors=model))

        clock = self.inner.clock(state.round, pool)
        yield Asking([ask(self.train, k, {**state.shared, **state.server}, **clock) for k in uniform(pool, state.round)], take)
        share, change = answered / len(pool.clients), moved.value()
        control = {n: c + share * change[n] for n, c in state.server.items()}
        return replace(state, server=control).after_round(models.value())

    @on_client
    def train(self, c: Client, task: Task) -> Work[Update]:
        """Train against the difference of the controls; take the device's own anew; send the model and how that moved."""
        common, shared = parted(task.tensors)
        own = {n: c.memory[n] if n in c.memory else torch.zeros_like(t) for n, t in common.items()}
        correction = {n: common[f"{CONTROL}{n}"] - own[f"{CONTROL}{n}"] for n in shared}
        fitted = yield from self.inner.learn(c, shared, task, correction=correction)
        still = AdamW(0.0, clip=0.0)
        whole = replace(self.inner.fit(c, shared, [np.arange(len(c.train))], 0), optimizer=still, penalty=None)
        at = (yield whole).moments.first  # (1 − β₁)·∇F_k(w_t), as the first step's mean has it
        c.memory |= {f"{CONTROL}{n}": g / (1 - still.betas[0]) for n, g in at.items()}
        moved = {n: c.memory[n] - was for n, was in own.items()}
        return Update(c.id, len(c.train), {**fitted.tensors, **moved}, {"loss": float(fitted.losses.mean())})

    def personalise(self, client: Client, shared: Tensors) -> Work[Predictor]:
        """The shared model as it is."""
        return self.inner.personalise(client, shared)

    def assembled(self, state: State) -> Tensors | None:
        """The shared model."""
        return self.inner.assembled(state)

    predict = predict


def parted(tensors: Tensors) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    """Controls and the rest."""
    controls = {n: t for n, t in tensors.items() if n.startswith(CONTROL)}
    return controls, {n: t for n, t in tensors.items() if n not in controls}
