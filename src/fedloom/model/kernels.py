"""The kernels of a packed pass: a linear layer whose weights are frozen, one whose weights every owner has its own of, attention within
each text, and the activation. Nothing here knows models, clients or methods. ``layout.py`` says where rows lie.

What is computed for a row depends on that row alone, never on how many others share the pass: frozen layers run on oneDNN weights packed
once (whose blocking is fixed), attention looks at one text, an owner's gradients are sums over its own rows. On a CPU in float32 this makes
results equal to the bit whatever the stack (docs/engines.md says what was measured).

Each is there twice: as loops in C for processors (``kernels_native.py``), and as PyTorch operations for all else (``kernels_plain.py``).
Which of them runs depends on the machine alone, not on what it is given; only dropped attention weights always take the second.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import torch
from torch.autograd import Function
from torch.autograd.function import once_differentiable
from torch.nn import functional

from fedloom.model import kernels_native, kernels_plain
from fedloom.model.layout import Attention, Owners, RowsKept
from fedloom.native.library import takes

HINT = 1024
"""The number of rows that oneDNN's packed weights are laid out for; any number may come."""


def owned_linear(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, owners: Owners, kept: RowsKept | None = None
) -> torch.Tensor:
    """(N, d_out): row i of x (N, d_in) times the weight (and plus the bias) of the owner it belongs to; nobody's rows become zero.

    ``weight``: (S, d_out, d_in). ``bias``: (S, d_out) or None. ``kept``: the weight is (S, most, d_in) and holds these rows only. In C
    nothing is computed for the others; as PyTorch operations they are multiplied as zeros.
    """
    native = takes(x, weight) if bias is None else takes(x, weight, bias)
    if native:
        return kernels_native.OwnedLinear.apply(x.contiguous(), weight, bias, owners, kept)  # type: ignore[return-value]
    return kernels_plain.OwnedLinear.apply(x.contiguous(), weight if kept is None else kept.whole(weight), bias, owners)  # type: ignore[return-value]


def ragged_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    within: Attention,
    scale: float,
    causal: bool,
    window: int,
    dropped: Sequence[torch.Tensor] | None = None,
) -> torch.Tensor:
    """softmax(scale · q kᵀ) v within each text, (N, H, D).

    q: (N, H, D), a row a query; k, v: (T, H_k, D) with H a multiple of H_k. ``causal``: nobody sees who comes later. ``window``: 0, or the
    distance from which on keys are not seen. ``dropped``: what each group's weights (m·H, L_q, L) are multiplied by.
    """
    if dropped is None and scale > 0 and takes(q, k, v) and q.dtype is torch.float32:
        return kernels_native.Ragged.apply(q, k, v, within, scale, causal, window)  # type: ignore[return-value]
    return kernels_plain.Ragged.apply(q, k, v, within, scale, causal, window, dropped)  # type: ignore[return-value]


def gelu(x: torch.Tensor) -> torch.Tensor:
    """x Φ(x), Φ the normal distribution (1606.08415)."""
    return kernels_native.Gelu.apply(x) if takes(x) else functional.gelu(x)  # type: ignore[return-value]


# ---- frozen weights -------------------------------------------------------------------------------------------------------------


def packable(weight: torch.Tensor) -> bool:
    """Whether oneDNN's kernels can take this weight: a processor's, in a precision that they know."""
    return weight.device.type == "cpu" and torch.backends.mkldnn.is_available() and weight.dtype in (torch.float32, torch.bfloat16)


@functools.cache
def computes_bf16() -> bool:
    """Whether this processor multiplies bfloat16 numbers. Where it does not, PyTorch's products of them are many times slower than
    float32's (docs/log.md, 2026-11-26: training at 5 examples a second instead of 75)."""
    return bool(torch.backends.mkldnn.is_available() and torch.ops.mkldnn._is_mkldnn_bf16_supported())


class Frozen:
    """A frozen weight (d_out, d_in) packed for both directions. It costs two copies of the weight, and on processors where the BLAS
    that ships with PyTorch takes a slow path (AMD with AVX-512, float32) it is more than twice as fast.

    bfloat16 on a processor that does not compute in it: rows and weight are widened, and the sums rounded to bfloat16 at the end, which is
    what processors that do compute in it make of the same numbers."""

    def __init__(self, weight: torch.Tensor) -> None:
        self.widens = _widened(weight)
        self.forth, self.back = _packed(weight), _packed(weight.t())

    def __call__(self, x: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        """x Wᵀ + bias for rows x (N, d_in)."""
        return _FrozenLinear.apply(x, self, bias)  # type: ignore[return-value]


def times(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """x Wᵀ for rows x (N, d_in) and a weight (d_out, d_in) that is there for this product alone: what :class:`Frozen` makes of them, where
    it can be made. No gradient."""
    return _rows_times(x, _packed(weight), None, _widened(weight)) if packable(weight) else functional.linear(x, weight)


def _packed(weight: torch.Tensor) -> torch.Tensor:
    weight = weight.float() if _widened(weight) else weight
    return torch.ops.mkldnn._reorder_linear_weight(weight.contiguous(), HINT)


def _widened(of: torch.Tensor) -> bool:
    return of.dtype is torch.bfloat16 and not computes_bf16()


def _rows_times(x: torch.Tensor, packed: torch.Tensor, bias: torch.Tensor | None, widens: bool) -> torch.Tensor:
    """x (N, …) times a packed weight, which was widened to float32 if ``widens``."""
    if len(x) == 1:  # a lone row would take another kernel, with other last bits
        return _rows_times(x.expand(2, -1), packed, bias, widens)[:1]
    if widens:
        wide = torch.ops.mkldnn._linear_pointwise(x.float(), packed, None if bias is None else bias.float(), "none", [], "")
        return wide.to(x.dtype)
    return torch.ops.mkldnn._linear_pointwise(x.contiguous(), packed, bias, "none", [], "")


class _FrozenLinear(Function):
    """The gradient goes to the rows only; the weight and bias are frozen."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, weight: Frozen, bias: torch.Tensor | None) -> torch.Tensor:
        ctx.weight = weight
        return _rows_times(x, weight.forth, bias, weight.widens)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor, None, None]:
        return _rows_times(gradient, ctx.weight.back, None, ctx.weight.widens), None, None
