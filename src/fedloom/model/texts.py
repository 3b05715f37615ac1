"""What a model is called with: a padded batch, or the texts of many owners one after another, and what their losses are.

Nothing here knows models, clients or methods. Shapes: n texts, T tokens, S owners, C classes.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import NamedTuple

import numpy as np
import torch
from torch.nn import functional

from fedloom.model.asked import Asked
from fedloom.model.layout import RowsKept
from fedloom.model.spans import Spans

FILL = 32
"""Packed passes hold a multiple of this many tokens: oneDNN makes, and keeps, a program for every number of rows that it meets."""


class Batch(NamedTuple):
    """Tensors of one padded batch.

    ids, segments: int64 (B, L); mask: bool (B, L); labels: int64 (B,); weights: float32 (B,).
    """

    ids: torch.Tensor
    mask: torch.Tensor
    segments: torch.Tensor
    labels: torch.Tensor
    weights: torch.Tensor


def as_batch(arrays: Mapping[str, np.ndarray], device: torch.device) -> Batch:
    """A batch from arrays named as its fields."""
    return Batch(**{name: torch.from_numpy(arrays[name]).to(device) for name in Batch._fields})


@dataclass(frozen=True)
class Texts:
    """n texts, those of one owner next to each other.

    ids, segments: int64 (T,). labels: int64 (n,). weights: float32 (n,), what each text's loss counts in its owner's sum.
    lengths, owners (ascending, 0..S−1), rows: int64 (n,), numpy; ``rows`` is the text's place in its owner's batch.
    keys: int64 (S,), the owners' dropout keys, or None. kept: of linear layers' weights (by parameter name) of which owners have only
    some rows, which. asked: the tokens that are read and what is due after them; None where each text is read at one place and has a label.
    """

    ids: torch.Tensor
    segments: torch.Tensor
    labels: torch.Tensor
    weights: torch.Tensor
    lengths: np.ndarray
    owners: np.ndarray
    rows: np.ndarray
    keys: torch.Tensor | None = None
    kept: Mapping[str, RowsKept] = field(default_factory=dict)
    asked: Asked | Spans | None = None

    @cached_property
    def count(self) -> int:
        """S."""
        return int(self.owners[-1]) + 1

    @cached_property
    def text_owners(self) -> torch.Tensor:
        """(n,) the texts' owners."""
        return torch.from_numpy(self.owners).to(self.ids.device)

    @cached_property
    def token_owners(self) -> torch.Tensor:
        """(T,) the tokens' owners."""
        return torch.from_numpy(np.repeat(self.owners, self.lengths)).to(self.ids.device)

    @cached_property
    def read_owners(self) -> torch.Tensor:
        """The owners of what is read: (n,), or (r,) of answers' tokens."""
        return self.text_owners if self.asked is None else self.text_owners[self.asked.texts]

    @cached_property
    def reads(self) -> np.ndarray:
        """How much of each text is read, int64 (n,)."""
        if self.asked is None:
            return np.ones_like(self.lengths)
        return np.bincount(self.asked.texts.cpu().numpy(), minlength=len(self.lengths))

    def per_owner(self, of_texts: torch.Tensor) -> torch.Tensor:
        """Sums (S, …) over each owner's texts of (n, …)."""
        return of_texts.new_zeros(self.count, *of_texts.shape[1:]).index_add(0, self.text_owners, of_texts)

    def losses(self, logits: torch.Tensor) -> torch.Tensor:
        """Each owner's weighted sum (S,) of its texts' losses: cross-entropies of logits (n, C), or those of what is asked, (r, V)."""
        each = functional.cross_entropy(logits, self.labels, reduction="none") if self.asked is None else self.asked.losses(logits)
        return self.per_owner(each * self.weights)

    def told(self, logits: torch.Tensor) -> torch.Tensor:
        """What is kept of a prediction: the logits (n, C), or what is told of what is asked (n, k)."""
        return logits if self.asked is None else self.asked.told(logits)


def filled(texts: Texts) -> Texts:
    """The texts and one more, of no owner's account, that makes T a multiple of :data:`FILL`."""
    missing = -len(texts.ids) % FILL
    if not missing:
        return texts
    return replace(
        texts,
        ids=functional.pad(texts.ids, (0, missing)),
        segments=functional.pad(texts.segments, (0, missing)),
        labels=functional.pad(texts.labels, (0, 1)),
        weights=functional.pad(texts.weights, (0, 1)),
        lengths=np.append(texts.lengths, missing),
        owners=np.append(texts.owners, texts.owners[-1]),
        rows=np.append(texts.rows, 0),
    )


def padded(texts: Texts, left: bool, pad_id: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """ids, mask, segments (n, L), padded on the left or the right."""
    width = int(texts.lengths.max())
    within = np.arange(width) - (width - texts.lengths[:, None] if left else 0)
    mask = torch.from_numpy((within >= 0) & (within < texts.lengths[:, None])).to(texts.ids.device)
    ids = torch.full(mask.shape, pad_id, dtype=torch.int64, device=mask.device)
    segments = torch.zeros_like(ids)
    ids[mask], segments[mask] = texts.ids, texts.segments
    return ids, mask, segments
