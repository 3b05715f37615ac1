"""How the server makes one set of tensors out of many."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from fedloom.messages import Update
from fedloom.tensors import weighted_mean as mean_of


def weighted_mean(updates: Sequence[Update]) -> dict[str, torch.Tensor]:
    """Σ_k p_k x^k with p_k = n_k / Σ_j n_j (FedAvg, 1602.05629): each named tensor averaged by the clients' numbers of examples.

    Sums in float64 and returns each tensor in its own dtype.

    Raises:
        ValueError: no updates, no examples, or updates that differ in names or shapes.
    """
    if updates and not any(update.num_examples for update in updates):
        raise ValueError(f"clients {[u.client for u in updates]} trained on no examples; their mean has no weight")
    return mean_of((float(update.num_examples), update.tensors) for update in updates)
