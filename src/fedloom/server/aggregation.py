"""How the server makes one set of tensors out of many that it believes. Where it does not: ``robust.py``."""

from __future__ import annotations

from dataclasses import replace

import torch

from fedloom.messages import Update
from fedloom.tensors import Mean, Weightless

HELD = 2**25
"""Bytes of updates that wait to be summed together: summing each by itself would read and write all sums each time."""


class Average:
    """Σ_k p_k x^k with p_k = n_k / Σ_j n_j (FedAvg, 1602.05629): each named tensor averaged by the clients' numbers of examples.

    Sums in float64, returns each tensor in its own dtype, and keeps no update: ``yield Asking(tasks, average.take)``.

    However many clients a round has, in memory are the first one's update, ``held`` bytes of others, and the sums.
    """

    def __init__(self, held: int = HELD) -> None:
        self._mean, self._clients = Mean(held), list[int]()

    def take(self, update: Update) -> Update:
        """Take an update in; what is kept of it has no tensors.

        Raises:
            ValueError: it differs from the first in names or shapes.
        """
        self._mean.add(float(update.num_examples), update.tensors)
        self._clients.append(update.client)
        return replace(update, tensors={})

    def value(self) -> dict[str, torch.Tensor]:
        """The mean.

        Raises:
            Weightless: no updates, or no examples.
        """
        if self._clients and not any(self._mean.weights):
            raise Weightless(f"clients {self._clients} trained on no examples; their mean has no weight")
        return self._mean.value()
