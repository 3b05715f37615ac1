"""The ways in which architectures want a ready attention mask and positions. ``base.py`` tries them; none is looked up by a model's name.

Each is a pure function of the (B, L) token mask and the model's :class:`Shape`, without data-dependent branches: it runs under ``vmap``.
What a model makes of the token mask itself may not; that is tried last (decision 0037).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch


class Shape(NamedTuple):
    """What the ways need to know of a model: whether it is causal, its padding token, and the width of its local attention (0: none)."""

    causal: bool
    pad_id: int
    window: int


def _seen(mask: torch.Tensor, causal: bool, window: int = 0) -> torch.Tensor:
    """bool (B, 1, L, L): whether query i may see key j."""
    length = mask.shape[-1]
    at = torch.arange(length, device=mask.device)
    far = at[:, None] - at[None, :]
    allowed = far >= 0 if causal else torch.ones_like(far, dtype=torch.bool)
    if window:
        allowed = allowed & (far.abs() <= window)
    return mask[..., None, None, :] & allowed


def _additive(seen: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    nothing, lowest = (torch.full((), value, dtype=dtype, device=seen.device) for value in (0.0, torch.finfo(dtype).min))
    return torch.where(seen, nothing, lowest)


def _one_mask(shape: Shape, mask: torch.Tensor, dtype: torch.dtype) -> object:
    return _additive(_seen(mask, shape.causal), dtype)


def _window_masks(shape: Shape, mask: torch.Tensor, dtype: torch.dtype) -> object:
    full, sliding = (_additive(_seen(mask, shape.causal, w), dtype) for w in (0, shape.window // 2))
    return {"full_attention": full, "sliding_attention": sliding}


def _key_mask(shape: Shape, mask: torch.Tensor, dtype: torch.dtype) -> object:
    return mask[..., None, None, :].long()


def _token_mask(shape: Shape, mask: torch.Tensor, dtype: torch.dtype) -> object:
    """As a plain call has it: for models that count ALiBi's distances in it, or make masks of several kinds."""
    return mask.to(torch.int64)


def from_zero(shape: Shape, mask: torch.Tensor) -> torch.Tensor | None:
    """Positions 0, 1, … over the real tokens of each row, int64 (B, L)."""
    return (mask.long().cumsum(-1) - 1).clamp(min=0)


def _after_padding(shape: Shape, mask: torch.Tensor) -> torch.Tensor | None:
    return mask.long().cumsum(-1) * mask.long() + shape.pad_id


def _no_positions(shape: Shape, mask: torch.Tensor) -> torch.Tensor | None:
    return None


MaskOf = Callable[[Shape, torch.Tensor, torch.dtype], object]
PositionsOf = Callable[[Shape, torch.Tensor], torch.Tensor | None]
Call = tuple[MaskOf, PositionsOf]
_READY = ((mask, positions) for positions in (from_zero, _after_padding, _no_positions) for mask in (_one_mask, _window_masks, _key_mask))
CALLS: tuple[Call, ...] = (*_READY, (_token_mask, from_zero), (_token_mask, _no_positions))
"""Every way: a mask and positions, the commonest first."""
