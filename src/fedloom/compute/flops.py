"""Floating-point operations of work items, counted on the model's real graph.

PyTorch's counter runs one example at three lengths; the operations of a transformer on L tokens are a quadratic polynomial in L, which
three counts determine. Element-wise operations are not counted. A backward pass counts what it needs for the tensors trained and no more.
"""

from __future__ import annotations

import numpy as np
import torch
from torch.utils.flop_counter import FlopCounterMode

from fedloom.model.base import Batch, Model

LENGTHS = (4, 8, 16)


class Flops:
    """Operations per example of a forward pass, or a forward and backward pass, by number of tokens. Counts are cached."""

    def __init__(self, model: Model) -> None:
        self.model = model
        self._fits: dict[frozenset[str], np.ndarray] = {}

    def forward(self, length: int | np.ndarray) -> float | np.ndarray:
        """Operations of one example's forward pass on ``length`` tokens."""
        return self._at(frozenset(), length)

    def step(self, names: frozenset[str], length: int | np.ndarray) -> float | np.ndarray:
        """Operations of one example's forward and backward pass for the gradient of the tensors ``names``."""
        return self._at(names, length)

    def _at(self, names: frozenset[str], length: int | np.ndarray) -> float | np.ndarray:
        if names not in self._fits:
            counts = [self._count(names, n) for n in LENGTHS]
            self._fits[names] = np.polyfit(np.array(LENGTHS, float), np.array(counts, float), 2)
        return np.polyval(self._fits[names], length)

    def _count(self, names: frozenset[str], length: int) -> int:
        ids = torch.ones((1, length), dtype=torch.int64, device=self.model.device)
        one = torch.ones(1, device=self.model.device)
        batch = Batch(ids, ids > 0, torch.zeros_like(ids), torch.zeros_like(ids[:, 0]), one)
        given = {n: self.model.initial[n].to(self.model.device).requires_grad_(True) for n in names}
        with FlopCounterMode(display=False) as counter:
            if given:
                torch.autograd.grad(self.model.loss(given, batch, torch.float32), list(given.values()), allow_unused=True)
            else:
                with torch.no_grad():
                    self.model.forward({}, batch, torch.float32)
        for tensor in given.values():
            tensor.requires_grad_(False)
        return int(counter.get_total_flops())
