"""The protocol of a compute: work items in, one result and its cost for each, in order."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from fedloom.compute.work import WorkItem


@dataclass(frozen=True)
class Done:
    """A work item's result (type as its docstring says), its floating-point operations and the examples *trained on*."""

    result: Any
    flops: float
    examples: int


class Compute(Protocol):
    """Does work items. Two computes given the same items agree within the tolerance of ``docs/engines.md``."""

    def run(self, items: Sequence[WorkItem]) -> list[Done]:
        """One :class:`Done` an item, in order."""
        ...
