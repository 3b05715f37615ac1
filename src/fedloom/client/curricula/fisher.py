"""Easy first by Fisher information: the curriculum of FibecFed (2410.00131) without the rest of that method.

    d_i = tr F_i = ‖∇_P ℓ(s_i; P)‖²     difficulty of example i: the trace of its empirical Fisher information, true label (n_k numbers)
    d(batch) = mean of its d_i           batches are cut once per device and sorted, easy ones first
    share(t) = β₀ + (1 − β₀)·t/(αT)      and other pacings (``client/curriculum.py``, ``fraction``); capped at 1

In round t of T a device trains on its first ⌈share(t) · #batches⌉ batches in each local epoch. It scores at the tensors that it has when
it first takes part, and anew when the scores are ``refresh`` rounds old.

A freshly initialised head has most of the gradient, whatever the example; so P is the adapter alone unless told otherwise. FibecFed
itself warms the head up before anybody scores (``methods/fibecfed.py``). ℓ is the loss of the model alone: a bias of the logits that a
method trains under (FedEven's log π_k) is not in it.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import numpy as np
import torch

from fedloom.client.client import Client
from fedloom.client.curriculum import Granularity, Opened, Pacing, Turn, easy_first, fraction, insist_on_shares, told
from fedloom.compute.work import Score
from fedloom.messages import Tensors, Work
from fedloom.model.names import is_head


@dataclass(frozen=True)
class ByFisher:
    """Easy first, by the squared norm of an example's gradient.

    Attributes:
        start: share of batches open in the first round, β₀.
        full_at: share of the rounds after which all are open, α.
        pacing: how the share grows between them.
        granularity: sort fixed batches, or sort examples and then cut, or sort nothing: batches as they were cut.
        refresh: score anew at the current model when the scores are this many rounds old (0: never).
        over: whose gradient is the score, of what the device is about to train when it scores (of FFA-LoRA B, of FedCyBGD a block): of all
            of it but the head (unless that is all), or of the head too. A mask leaves nothing out: of SLoRA's first stage it is the whole
            weights; of LISA it is the whole model, and of Fed-SB and AdaLoRA the pairs that they make.
    """

    name: ClassVar[str] = "fisher"
    paper: ClassVar[str] = "FibecFed 2410.00131"

    start: float = 0.6
    full_at: float = 0.8
    pacing: Pacing = "linear"
    granularity: Granularity = "batch"
    refresh: int = 0
    over: Literal["adapter", "all"] = "adapter"

    def __post_init__(self) -> None:
        insist_on_shares(start=self.start, full_at=self.full_at)
        if self.refresh < 0:
            raise ValueError(f"refresh is {self.refresh}; it is a number of rounds from 1 on, or 0 for never")
        if self.refresh and self.granularity == "unsorted":
            raise ValueError(f"refresh is {self.refresh}, and unsorted batches have no scores to refresh; leave it at 0, or sort them")

    def prepare(self, c: Client, at: Tensors, round: int, trained: Collection[str] = ()) -> Work[None]:
        """d_i of every example, at the first participation and whenever the scores are too old; of none where nothing is sorted."""
        if self.granularity == "unsorted":
            return
        known = "difficulty" in c.memory
        if known and not (self.refresh and round - int(c.memory["scored_at"]) >= self.refresh):
            return
        mine = frozenset(trained or at)
        over = (frozenset(n for n in mine if not is_head(n)) or mine) if self.over == "adapter" else mine if trained else None
        difficulty = yield Score(at, c.train, over)
        c.memory |= {"difficulty": torch.from_numpy(difficulty), "scored_at": torch.tensor(round)}

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
