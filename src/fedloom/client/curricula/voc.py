"""Texts of frequent words first, more as competence grows. Competence-based curriculum learning (1903.09848); VOC.

Platanios et al., *Competence-based Curriculum Learning for Neural Machine Translation*, NAACL 2019.

    p̂(w) = #w / #tokens                        relative frequency in the device's own training texts
    d(s) = −Σ_{w in s} log p̂(w)                difficulty of a text: long texts of rare words are hard
    d̄(s) = share of the texts s' with d(s') ≤ d(s)     its place in the distribution of difficulties, in (0, 1]
    c(t) = min(1, √(t·(1 − c₀²)/T + c₀²))      competence in round t; T = ``full_at`` times the number of rounds

In round t a device trains on the texts with d̄(s) ≤ c(t), in shuffled batches. No model is asked, so scoring costs no work.

Deviations: words are the tokenizer's tokens (its special ones occur once in every text and shift all difficulties alike); an epoch is one
pass over what is open, where the paper draws each batch from it; and never less than one batch is open, as c₀ of few texts would have it.
Of the paper's competences there is the square root, its recommendation.
"""

from __future__ import annotations

import math
from collections.abc import Collection
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np

from fedloom.client.client import Client
from fedloom.client.curriculum import Opened, Turn, elapsed, insist_on_shares, shuffled_epochs
from fedloom.data.examples import Examples
from fedloom.messages import Tensors, Work


@dataclass(frozen=True)
class ByRarity:
    """Frequent words first.

    Attributes:
        start: competence in the first round, c₀: the share of the texts that is open then.
        full_at: share of the rounds after which all are open.
    """

    name: ClassVar[str] = "voc"
    paper: ClassVar[str] = "competence-based curriculum 1903.09848"

    start: float = 0.01
    full_at: float = 0.8

    def __post_init__(self) -> None:
        insist_on_shares(start=self.start, full_at=self.full_at)

    def prepare(self, c: Client, at: Tensors, round: int, trained: Collection[str] = ()) -> Work[None]:
        """Nothing: difficulty depends on the texts alone."""
        yield from ()

    def open(self, c: Client, turn: Turn) -> Opened:
        """The texts that the device is competent for, shuffled."""
        difficulty = rarity(c.train)
        place = np.searchsorted(np.sort(difficulty), difficulty, side="right") / len(difficulty)
        able = place <= self.competence(turn.round, turn.rounds) + 1e-9
        able[np.argsort(difficulty, kind="stable")[: turn.size]] = True
        return Opened(c.train, shuffled_epochs(c, turn, np.flatnonzero(able)))

    def facts(self, rounds: int) -> dict[str, Any]:
        """The competence of each round."""
        return {"pacing": [self.competence(t, rounds) for t in range(rounds)], "opens": "examples"}

    def competence(self, round: int, rounds: int) -> float:
        """c(t)."""
        return min(1.0, math.sqrt(elapsed(round, rounds, self.full_at) * (1 - self.start**2) + self.start**2))


def rarity(examples: Examples) -> np.ndarray:
    """d(s) of every text among these, (n,)."""
    spans = zip(examples.offsets[examples.rows], examples.offsets[examples.rows + 1], strict=True)
    texts = [examples.tokens[begin:end] for begin, end in spans]
    _, words, counts = np.unique(np.concatenate(texts), return_inverse=True, return_counts=True)
    return np.add.reduceat(-np.log(counts / counts.sum())[words], np.cumsum([0, *map(len, texts[:-1])]))
