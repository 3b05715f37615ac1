"""Easy first by the loss of the model itself. A baseline; no paper's experiment.

    d_i = −log softmax(logits_i)[y_i]     at the tensors that the device has when it first takes part; one forward pass an example

A bias of the logits that a method trains under (FedEven's log π_k) is not in it.

Batches, order and pacing are those of ``fisher.py``, so the two differ in the score alone. The score is never taken anew.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import torch
from torch.nn import functional

from fedloom.client.client import Client
from fedloom.client.curriculum import Granularity, Opened, Pacing, Turn, easy_first, fraction, insist_on_shares, told
from fedloom.compute.work import Predict
from fedloom.messages import Tensors, Work


@dataclass(frozen=True)
class ByLoss:
    """Easy first, by an example's loss.

    Attributes:
        start: share of batches open in the first round.
        full_at: share of the rounds after which all are open.
        pacing: how the share grows between them.
        granularity: sort fixed batches, or sort examples and then cut, or sort nothing: batches as they were cut.
    """

    name: ClassVar[str] = "loss"
    paper: ClassVar[str] = "baseline: sorted by loss"

    start: float = 0.6
    full_at: float = 0.8
    pacing: Pacing = "linear"
    granularity: Granularity = "batch"

    def __post_init__(self) -> None:
        insist_on_shares(start=self.start, full_at=self.full_at)

    def prepare(self, c: Client, at: Tensors, round: int, trained: Collection[str] = ()) -> Work[None]:
        """The loss of every example, once."""
        if self.granularity == "unsorted" or "difficulty" in c.memory:
            return
        logits = yield Predict(at, c.train)
        c.memory |= {"difficulty": functional.cross_entropy(logits.double(), torch.from_numpy(c.train.labels), reduction="none")}

    def open(self, c: Client, turn: Turn) -> Opened:
        """The easiest batches."""
        known = np.zeros(len(c.train)) if self.granularity == "unsorted" else c.memory["difficulty"].numpy()
        return easy_first(c, known, self.share(turn.round, turn.rounds), turn, self.granularity)

    def facts(self, rounds: int) -> dict[str, Any]:
        """The share of batches open in each round."""
        return told([self.share(t, rounds) for t in range(rounds)], self.granularity)

    def share(self, round: int, rounds: int) -> float:
        """The share of batches open in round t of T."""
        return fraction(self.pacing, round, rounds, self.start, self.full_at)
