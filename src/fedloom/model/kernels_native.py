"""The kernels of a packed pass in C (``native/kernels.c``), for processors: loops over owners and texts, nothing gathered or padded."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch.autograd import Function
from torch.autograd.function import once_differentiable

from fedloom.model.layout import Attention, Owners, RowsKept
from fedloom.native.library import call


def _half(x: torch.Tensor) -> bool:
    return x.dtype is torch.bfloat16


class OwnedLinear(Function):
    """See ``kernels.owned_linear``. Gradients are sums over an owner's rows, in their order."""

    @staticmethod
    def forward(
        ctx: Any, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, owners: Owners, kept: RowsKept | None
    ) -> torch.Tensor:
        weight, bias = weight.contiguous(), None if bias is None else bias.contiguous()
        owner, most, size = weight.shape
        made = x.new_empty(len(x), most if kept is None else kept.tall)
        which = (None, None) if kept is None else (kept.counts, kept.index)
        call("owned_forward", owner, owners.starts, len(x), size, made.shape[1], most, *which, x, weight, bias, made, _half(x))
        ctx.save_for_backward(x, weight)
        ctx.owners, ctx.biased, ctx.which = owners, bias is not None, which
        return made

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor | None, torch.Tensor, torch.Tensor | None, None, None]:
        (x, weight), gradient = ctx.saved_tensors, gradient.contiguous()
        (owner, most, size), out = weight.shape, gradient.shape[1]
        to_x, to_weight = torch.empty_like(x) if ctx.needs_input_grad[0] else None, torch.empty_like(weight)
        to_bias = weight.new_empty(owner, out) if ctx.biased else None
        made = (to_x, to_weight, to_bias, _half(x))
        call("owned_backward", owner, ctx.owners.starts, len(x), size, out, most, *ctx.which, gradient, x, weight, *made)
        return to_x, to_weight, to_bias, None, None


class Ragged(Function):
    """See ``kernels.ragged_attention``; float32."""

    @staticmethod
    def forward(
        ctx: Any, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, within: Attention, scale: float, causal: bool, window: int
    ) -> torch.Tensor:
        q, k, v = q.contiguous(), k.contiguous(), v.contiguous()
        (_, heads, size), shared = q.shape, k.shape[1]
        places, made = within.weights(heads), torch.empty_like(q)
        kept = q.new_empty(int(places[-1]))
        bounds = (len(within.lengths), within.asks, within.reads, np.ascontiguousarray(within.first, np.int64), places)
        call("attention_forward", *bounds, heads, shared, size, q, k, v, made, kept, scale, causal, window)
        ctx.save_for_backward(q, k, v, kept)
        ctx.within, ctx.scale = within, scale
        return made

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[Any, ...]:
        (q, k, v, kept), within = ctx.saved_tensors, ctx.within
        (_, heads, size), shared = q.shape, k.shape[1]
        to_q, to_k, to_v = (torch.empty_like(of) for of in (q, k, v))
        bounds = (len(within.lengths), within.asks, within.reads, within.weights(heads))
        call(
            "attention_backward", *bounds, heads, shared, size, gradient.contiguous(), q, k, v, kept, to_q, to_k, to_v, ctx.scale
        )  # fmt: skip
        return to_q, to_k, to_v, None, None, None, None


class Gelu(Function):
    """See ``kernels.gelu``."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
        x, made = x.contiguous(), torch.empty_like(x, memory_format=torch.contiguous_format)
        call("gelu", x.numel(), x, None, made, _half(x))
        ctx.save_for_backward(x)
        return made

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: torch.Tensor) -> torch.Tensor:
        (x,) = ctx.saved_tensors
        made = torch.empty_like(x)
        call("gelu", x.numel(), x, gradient.contiguous(), made, _half(x))
        return made
