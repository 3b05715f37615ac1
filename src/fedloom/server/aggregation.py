"""How the server makes one set of tensors out of many."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch

from fedloom.messages import Update
from fedloom.tensors import Mean

HELD = 2**28
"""Bytes of updates that wait to be summed together: summing each by itself would read and write all sums each time."""


def weighted_mean(updates: Sequence[Update]) -> dict[str, torch.Tensor]:
    """Σ_k p_k x^k with p_k = n_k / Σ_j n_j (FedAvg, 1602.05629): each named tensor averaged by the clients' numbers of examples.

    Sums in float64 and returns each tensor in its own dtype.

    Raises:
        ValueError: no updates, no examples, or updates that differ in names or shapes.
    """
    mean = Average(held=0)
    for update in updates:
        mean.take(update)
    return mean.value()


class Average:
    """The same of updates that come one after another and are not kept: ``yield Asking(tasks, average.take)``.

    However many clients a round has, in memory are the first one's update, ``held`` bytes of others, and the sums.
    """

    def __init__(self, held: int = HELD) -> None:
        self._mean, self._clients = Mean(held), list[int]()

    def take(self, update: Update) -> Update:
        """Take an update in; what is kept of it has no tensors."""
        self._mean.add(float(update.num_examples), update.tensors)
        self._clients.append(update.client)
        return replace(update, tensors={})

    def value(self) -> dict[str, torch.Tensor]:
        """The mean.

        Raises:
            ValueError: no updates, or no examples.
        """
        if self._clients and not any(self._mean.weights):
            raise ValueError(f"clients {self._clients} trained on no examples; their mean has no weight")
        return self._mean.value()
