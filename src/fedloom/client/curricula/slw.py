"""All texts, cut to a length that grows round by round. Sequence length warm-up (2108.06084); SLW.

Li et al., *The Stability-Efficiency Dilemma: Investigating Sequence Length Warmup for Training GPT Models*, NeurIPS 2022.

    L(t) = L_s + (L_e − L_s)·min(1, t/T)     texts are cut to L(t) tokens; T = ``full_at`` times the number of rounds

Shorter texts come first because they are cut shorter, not because they are sorted: every example takes part in every round, in shuffled
batches. Cut texts cost what their tokens cost.

Deviations: the clock is the round, the paper's the step. L_e is the device's longest text, since texts here are shorter than the model's
context, which is the paper's L_e. L(t) is rounded down to a whole token, in the paper to a multiple of 8 for its hardware. What is cut is
said by ``Examples.truncated``.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from typing import Any, ClassVar

from fedloom.client.client import Client
from fedloom.client.curriculum import Opened, Turn, elapsed, insist_on_shares, shuffled_epochs
from fedloom.messages import Tensors, Work


@dataclass(frozen=True)
class LengthWarmup:
    """Short texts first: all texts, cut to a length that grows.

    Attributes:
        start: tokens that a text is cut to in the first round, L_s.
        full_at: share of the rounds after which texts are whole.
    """

    name: ClassVar[str] = "slw"
    paper: ClassVar[str] = "sequence length warm-up 2108.06084"

    start: int = 8
    full_at: float = 0.8

    def __post_init__(self) -> None:
        if self.start < 2:
            raise ValueError(f"texts are cut to at least 2 tokens; start is {self.start}")
        insist_on_shares(full_at=self.full_at)

    def prepare(self, c: Client, at: Tensors, round: int, trained: Collection[str] = ()) -> Work[None]:
        """Nothing."""
        yield from ()

    def open(self, c: Client, turn: Turn) -> Opened:
        """All examples, cut to L(t) tokens."""
        grown = max(0, int(c.train.lengths.max()) - self.start) * elapsed(turn.round, turn.rounds, self.full_at)
        return Opened(c.train.truncated(self.start + int(grown + 1e-9)), shuffled_epochs(c, turn))

    def facts(self, rounds: int) -> dict[str, Any]:
        """How far texts have grown in each round: 0 at ``start`` tokens, 1 when they are whole."""
        return {"pacing": [elapsed(t, rounds, self.full_at) for t in range(rounds)], "opens": "length"}
