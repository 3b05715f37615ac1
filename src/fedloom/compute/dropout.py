"""Dropout whose masks are a function of (key, site, position) and of nothing else.

A mask entry is a hash of the client's key, the number of the dropout site in the forward pass, and the entry's coordinates. So it is
the same one by one and stacked, whatever the stack size, padding or the order of clients, and needs no generator state.
The rate replaces that of every site that the architecture calls; rate 0 must be handled by not entering the mode.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch.nn import functional
from torch.overrides import TorchFunctionMode


def _mix(h: torch.Tensor) -> torch.Tensor:
    """A 32-bit integer finaliser: each output bit depends on every input bit. int32 in, int32 out (wrapping)."""
    h = h ^ ((h >> 16) & 0xFFFF)
    h = h * 0x7FEB352D
    h = h ^ ((h >> 15) & 0x1FFFF)
    h = h * -0x7B935975
    return h ^ ((h >> 16) & 0xFFFF)


def keep_mask(key: torch.Tensor, site: int, shape: torch.Size, rate: float, from_end: bool) -> torch.Tensor:
    """bool mask of ``shape``, True with probability 1 − rate. Dimension 0 counts from the start, the others from the end if ``from_end``
    (left padding), so that padding never moves an entry's coordinates."""
    h = _mix(key.to(torch.int32) + (0x632BE5 * (site + 1) & 0x7FFFFFFF))
    for i, size in enumerate(shape):
        at = torch.arange(size, dtype=torch.int32, device=key.device)
        at = (size - 1 - at) if from_end and i > 0 else at
        h = _mix(h[..., None] + at * 0x3C6EF35F + i)
    return (h & 0x7FFFFFFF) >= int(rate * 2**31)


class SeededDropout(TorchFunctionMode):
    """Inside this mode every ``torch.nn.functional.dropout`` uses :func:`keep_mask` with this key and rate (0 < rate < 1)."""

    def __init__(self, key: torch.Tensor, rate: float, from_end: bool) -> None:
        self.key, self.rate, self.from_end, self.site = key, rate, from_end, 0

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        if func is functional.dropout:
            x: torch.Tensor = args[0] if args else kwargs["input"]  # type: ignore[index]
            keep = keep_mask(self.key, self.site, x.shape, self.rate, self.from_end)
            self.site += 1
            return torch.where(keep, x / (1 - self.rate), 0.0).to(x.dtype)
        return func(*args, **(kwargs or {}))
