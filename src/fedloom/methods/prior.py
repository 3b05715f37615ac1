"""Federated LoRA with label-prior correction: each device adds the logarithm of its own label prior to the logits. Free of training.

    logits_k(x) = logits(x) + log π_k − log π̄,   π_k[c] = (n_{k,c} + ε) / (n_k + C·ε)

π̄ is the cohort-wide prior, (Σ_k n_k π_k) / n: the set-up asks every device for its label counts (C numbers), once.
Logit adjustment: Menon et al., 2007.07314. ε = ``smoothing`` keeps unseen labels possible.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar

import numpy as np
import torch

from fedloom.client.client import Client
from fedloom.messages import Flow, Task, Tensors, Update, Work, ask, insist, on_client
from fedloom.methods.fedavg import FedAvg
from fedloom.methods.method import Predictor, State, hand_out, predict
from fedloom.model.base import Model
from fedloom.server.participation import Pool


@dataclass(frozen=True)
class PriorCorrected:
    """FedAvg with logit adjustment.

    Attributes:
        inner: the federated method.
        smoothing: examples of each label that every device is taken to have besides its own, ε.
    """

    name: ClassVar[str] = "lora-prior"
    paper: ClassVar[str] = "baseline: FedIT with logit adjustment 2007.07314"
    trains_as_inner: ClassVar[bool] = True

    inner: FedAvg = field(default_factory=FedAvg)
    smoothing: float = 1.0

    def __post_init__(self) -> None:
        if not self.smoothing > 0:
            raise ValueError(
                f"smoothing is {self.smoothing}; it must be positive, or the logarithm of a missing label's prior is not finite"
            )

    def init(self, model: Model) -> State:
        """As inner; ``facts["classes"]`` is C."""
        model.need_classes(self.name)
        started = self.inner.init(model)
        return State(0, started.shared, facts={"classes": model.num_labels})

    def setup(self, state: State, pool: Pool) -> Flow[State]:
        """Gather the label priors; send back their mean."""
        classes = int(state.facts["classes"])
        answers = yield from insist([ask(self.count, k, classes=classes) for k in pool.clients])
        yield from hand_out(self.receive, pool.clients, pool.mean(answers))
        return (yield from self.inner.setup(state, pool))

    def round(self, state: State, pool: Pool) -> Flow[State]:
        """As inner."""
        return self.inner.round(state, pool)

    @on_client
    def count(self, c: Client, task: Task) -> Work[Update]:
        """π_k of the training labels."""
        yield from ()
        c.memory["prior"] = label_prior(c.train.labels, int(task.settings["classes"]), self.smoothing)  # type: ignore[arg-type]
        return Update(c.id, len(c.train), {"prior": c.memory["prior"]})

    @on_client
    def receive(self, c: Client, task: Task) -> Work[Update]:
        """Keep log π_k − log π̄."""
        yield from ()
        c.memory["bias"] = c.memory["prior"].log() - task.tensors["prior"].log()
        return Update(c.id, len(c.train))

    @on_client
    def train(self, c: Client, task: Task) -> Work[Update]:
        """As inner."""
        return self.inner.train(c, task)

    def personalise(self, client: Client, shared: Tensors) -> Work[Predictor]:
        """The shared model with this device's bias on the logits."""
        yield from ()
        return Predictor(shared, client.memory["bias"])

    def assembled(self, state: State) -> Tensors | None:
        """As inner."""
        return self.inner.assembled(state)

    predict = predict


def label_prior(labels: np.ndarray, classes: int, smoothing: float) -> torch.Tensor:
    """π[c] = (n_c + ε) / (n + C·ε) of ``labels`` (n,), float32 (C,)."""
    counts = np.bincount(labels, minlength=classes) + smoothing
    return torch.from_numpy(counts / counts.sum()).float()
