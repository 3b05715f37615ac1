"""Tokens that are read, many of a text, and what is due at each: before every token of an answer (``answers.py``), at every word of a
sentence (``tags.py``).

Shapes: n texts, r tokens that are read, C words of a vocabulary, or tags.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import torch
from torch.nn import functional

Counted = Callable[[np.ndarray, np.ndarray], np.ndarray]
"""What else is counted of a text: (predicted (r,), due (r,)) -> (k,)."""


class Asked(NamedTuple):
    """at: int64 (r,), places among the tokens of a pass, or of a padded batch laid flat. wanted: int64 (r,), what is due there. texts:
    int64 (r,), whose they are. count: number of texts. also: what else is counted of each text, k numbers, or nothing."""

    at: torch.Tensor
    wanted: torch.Tensor
    texts: torch.Tensor
    count: int
    also: Counted | None = None

    def padded(self, mask: torch.Tensor) -> Asked:
        """The same tokens where the texts are rows of a padded batch with this ``mask`` (B, L)."""
        return self._replace(at=mask.flatten().nonzero()[:, 0][self.at])

    def losses(self, logits: torch.Tensor) -> torch.Tensor:
        """Each text's mean over what is read of it (n,) of −log softmax of ``logits`` (r, C)."""
        due = self._sums(functional.cross_entropy(logits, self.wanted, reduction="none"))
        return due / self._sums(torch.ones_like(self.wanted, dtype=due.dtype)).clamp(min=1)

    def told(self, logits: torch.Tensor) -> torch.Tensor:
        """What is kept of a prediction, float32 (n, 3 + k): the sum of −log softmax, tokens where the likeliest was the one due, tokens;
        and what else is counted."""
        likeliest = logits.argmax(1)
        right = likeliest == self.wanted
        each = [functional.cross_entropy(logits, self.wanted, reduction="none"), right.float(), torch.ones_like(right).float()]
        sums = torch.stack([self._sums(of.float()) for of in each], 1)
        if self.also is None:
            return sums
        predicted, due, texts = (of.cpu().numpy() for of in (likeliest, self.wanted, self.texts))
        mine = (texts == text for text in range(self.count))
        more = np.stack([self.also(predicted[read], due[read]) for read in mine])
        return torch.cat([sums, torch.from_numpy(more).to(sums)], 1)

    def _sums(self, of: torch.Tensor) -> torch.Tensor:
        return of.new_zeros(self.count).index_add(0, self.texts, of)
