"""Dropout whose masks are a function of (key, site, position) and of nothing else.

A mask entry is a hash of the client's key, the number of the dropout site in the forward pass, and the entry's coordinates: the text's
row in its client's batch, the token's place in its text, the feature. So it is the same one by one and packed, whatever the neighbours,
the padding or the order of clients, and needs no generator state.
The rate replaces that of every site that the architecture calls; rate 0 must be handled by not entering the mode.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch.nn import functional

from fedloom.model.modes import Mode


def _mix(h: torch.Tensor) -> torch.Tensor:
    """A 32-bit integer finaliser: each output bit depends on every input bit. int32 in, int32 out (wrapping)."""
    h = h ^ ((h >> 16) & 0xFFFF)
    h = h * 0x7FEB352D
    h = h ^ ((h >> 15) & 0x1FFFF)
    h = h * -0x7B935975
    return h ^ ((h >> 16) & 0xFFFF)


def seeded(key: torch.Tensor, site: int) -> torch.Tensor:
    """The hash that a site's coordinates are mixed into, one a key: int32, shaped as ``key``."""
    return _mix(key.to(torch.int32) + (0x632BE5 * (site + 1) & 0x7FFFFFFF))


def at_each(h: torch.Tensor, places: torch.Tensor, dimension: int) -> torch.Tensor:
    """Mix coordinate ``dimension`` of every entry in; ``h`` and ``places`` (integers) broadcast."""
    return _mix(h + places.to(torch.int32) * 0x3C6EF35F + dimension)


def along(h: torch.Tensor, size: int, dimension: int, from_end: bool) -> torch.Tensor:
    """A new last axis of ``size`` entries, mixed in; they count from the end if ``from_end``."""
    places = torch.arange(size, dtype=torch.int32, device=h.device)
    return at_each(h[..., None], size - 1 - places if from_end else places, dimension)


def kept(h: torch.Tensor, rate: float) -> torch.Tensor:
    """bool, True with probability 1 − rate."""
    return (h & 0x7FFFFFFF) >= int(rate * 2**31)


def keep_mask(key: torch.Tensor, site: int, shape: torch.Size, rate: float, from_end: bool, first: torch.Tensor | int = 0) -> torch.Tensor:
    """bool mask of ``shape`` for one client's rectangular batch, or for its rows from the ``first`` on. Dimension 0 counts from the start,
    the others from the end if ``from_end`` (left padding), so that padding never moves an entry's coordinates."""
    h = at_each(seeded(key, site)[..., None], first + torch.arange(shape[0], dtype=torch.int32, device=key.device), 0)
    for i, size in enumerate(shape[1:], 1):
        h = along(h, size, i, from_end)
    return kept(h, rate)


class SeededDropout(Mode):
    """Inside this mode every ``torch.nn.functional.dropout`` uses :func:`keep_mask` with this key and rate (0 < rate < 1); rows are
    numbered from ``first`` on."""

    def __init__(self, key: torch.Tensor, rate: float, from_end: bool, first: torch.Tensor | int = 0) -> None:
        self.key, self.rate, self.from_end, self.first, self.site = key, rate, from_end, first, 0

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        if func is functional.dropout:
            x: torch.Tensor = args[0] if args else kwargs["input"]  # type: ignore[index]
            keep = keep_mask(self.key, self.site, x.shape, self.rate, self.from_end, self.first)
            self.site += 1
            return torch.where(keep, x / (1 - self.rate), 0.0).to(x.dtype)
        return func(*args, **(kwargs or {}))
