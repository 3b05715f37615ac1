"""No curriculum: everything in every round, in shuffled batches, as plain FedAvg (1602.05629) has it."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from typing import Any, ClassVar

from fedloom.client.client import Client
from fedloom.client.curriculum import Opened, Turn, shuffled_epochs
from fedloom.messages import Tensors, Work


@dataclass(frozen=True)
class Everything:
    """No curriculum: it has no settings."""

    name: ClassVar[str] = "none"
    paper: ClassVar[str] = "FedAvg 1602.05629"

    def prepare(self, c: Client, at: Tensors, round: int, trained: Collection[str] = ()) -> Work[None]:
        """Nothing."""
        yield from ()

    def open(self, c: Client, turn: Turn) -> Opened:
        """All examples, shuffled."""
        return Opened(c.train, shuffled_epochs(c, turn))

    def facts(self, rounds: int) -> dict[str, Any]:
        """Nothing."""
        return {}
