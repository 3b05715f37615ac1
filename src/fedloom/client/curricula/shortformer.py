"""All texts, cut short in a first stage and whole in a second. Shortformer's staged training (2012.15832).

Press et al., *Shortformer: Better Language Modeling using Shorter Inputs*, ACL 2021. Of that paper this is the curriculum; its
position-infused attention is another model and not here.

    L(t) = L_s for t < T₁, whole texts afterwards     T₁ = ``full_at`` times the number of rounds

Every example takes part in every round, in shuffled batches; in the first stage its text is cut to L_s tokens and costs what these cost.

Deviations: a language model's first stage splits its corpus into short pieces and loses none; a piece of a labelled text has no label of
its own, so here the rest of a text is left out (``Examples.truncated`` says what stays). The paper's stages are epochs, here rounds.
Its authors' steps have as many tokens in both stages, so that of short texts there are more in one; here a step has as many texts.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from typing import Any, ClassVar

from fedloom.client.client import Client
from fedloom.client.curriculum import Opened, Turn, elapsed, insist_on_shares, shuffled_epochs
from fedloom.messages import Tensors, Work


@dataclass(frozen=True)
class Staged:
    """Short texts in a first stage, whole ones afterwards.

    Attributes:
        start: tokens that a text is cut to in the first stage, L_s.
        full_at: share of the rounds that the first stage takes.
    """

    name: ClassVar[str] = "shortformer"
    paper: ClassVar[str] = "Shortformer's staged training 2012.15832"

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
        """All examples, cut to L_s tokens in the first stage."""
        return Opened(c.train if self.is_second(turn.round, turn.rounds) else c.train.truncated(self.start), shuffled_epochs(c, turn))

    def facts(self, rounds: int) -> dict[str, Any]:
        """0 in the rounds of the first stage, 1 in those of the second."""
        return {"pacing": [float(self.is_second(t, rounds)) for t in range(rounds)], "opens": "length"}

    def is_second(self, round: int, rounds: int) -> bool:
        """Whether the first stage is over in round t of T."""
        return elapsed(round, rounds, self.full_at) > 1 - 1e-9
