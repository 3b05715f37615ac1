"""Federated LoRA, then each device fine-tunes the result on its own data before it predicts. The cheapest personalisation there is.

Training is FedAvg's (``fedavg.py``). At evaluation a device trains ``epochs`` more epochs from the shared tensors and throws them away
afterwards; nothing of it is sent. Every personalised evaluation pays for that training on every device. Under ``--mask.keep`` these
epochs train all rows: a mask is of the rounds (decision 0042).
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar

from fedloom.client.client import Client
from fedloom.messages import Flow, Task, Tensors, Update, Work, on_client
from fedloom.methods.fedavg import FedAvg
from fedloom.methods.method import Predictor, State, predict
from fedloom.model.base import Model
from fedloom.server.participation import Pool


@dataclass(frozen=True)
class FineTuned:
    """FedAvg, then local fine-tuning.

    Attributes:
        inner: the federated method.
        epochs: epochs of local fine-tuning before a device predicts.
    """

    name: ClassVar[str] = "lora-finetuned"
    paper: ClassVar[str] = "baseline: FedIT, then local fine-tuning"
    trains_as_inner: ClassVar[bool] = True

    inner: FedAvg = field(default_factory=FedAvg)
    epochs: int = 2

    def __post_init__(self) -> None:
        if self.epochs < 0:
            raise ValueError(f"epochs is {self.epochs}; it must be 0 or more (0: a device predicts with the shared model)")

    def init(self, model: Model) -> State:
        """As inner."""
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
        """``epochs`` epochs from the shared tensors."""
        batches = [b for epoch in range(self.epochs) for b in self.inner.cut(client, "finetune", epoch)]
        fitted = yield self.inner.fit(client, shared, batches, -1)
        return Predictor(fitted.tensors)

    def assembled(self, state: State) -> Tensors | None:
        """As inner."""
        return self.inner.assembled(state)

    predict = predict
