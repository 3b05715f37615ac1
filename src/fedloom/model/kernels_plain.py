"""The kernels of a packed pass as PyTorch operations with hand-written gradients: for accelerators, for dropped attention weights, and
where there is no C compiler. Rows are gathered into padded groups of like sizes (``layout.py``), so that a group is one product.

What is computed for a row depends on that row alone: a text's attention is padded to a length that is a function of its own, an owner's
rows to a width that is a function of its own number, and an owner's gradients are sums over its own rows.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch.autograd import Function
from torch.autograd.function import once_differentiable

from fedloom.model.layout import Attention, Owners


class OwnedLinear(Function):
    """See ``kernels.owned_linear``."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, owners: Owners) -> torch.Tensor:
        blocks = owners.blocks(x)
        ctx.owners, ctx.biased = owners, bias is not None
        ctx.save_for_backward(weight, *blocks)
        made = [_product(block, theirs.transpose(1, 2)) for block, theirs in zip(blocks, owners.theirs(weight), strict=True)]
        if bias is not None:
            made = [part.add_(theirs[:, None]) for part, theirs in zip(made, owners.theirs(bias), strict=True)]
        return owners.rows(made, x, weight.shape[1])

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor | None, torch.Tensor, torch.Tensor | None, None]:
        (weight, *blocks), owners = ctx.saved_tensors, ctx.owners
        upstream, to_x, to_bias = owners.upstream(gradient), None, None
        if ctx.needs_input_grad[0]:
            to_x = owners.rows(
                [_product(g, theirs) for g, theirs in zip(upstream, owners.theirs(weight), strict=True)], gradient, weight.shape[2]
            )
        to_weight = owners.everyones([_product(g.transpose(1, 2), x) for g, x in zip(upstream, blocks, strict=True)], weight)
        if ctx.biased:
            to_bias = owners.everyones([g.sum(1) for g in upstream], weight[:, :, 0])
        return to_x, to_weight, to_bias, None


def _product(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """a (k, m, i) times b (k, i, o), each of the k the same to the bit whatever k is.

    Where the product is tall it is computed lying down: up to three times as fast. Two threads cut a lone product of a few rows (or into
    one column) another way than one among several, and a product of one row in another comes out another way among many than among few:
    the former is done twice, the latter term by term.
    """
    rows, columns = a.shape[1], b.shape[2]
    if columns < rows:
        return _product(b.transpose(1, 2), a.transpose(1, 2)).transpose(1, 2)
    if rows == 1:
        return torch.sum(a.transpose(1, 2) * b, 1, keepdim=True)
    if len(a) == 1 and rows < 16 and rows % 8:
        return torch.bmm(a.expand(2, -1, -1), b.expand(2, -1, -1))[:1]
    return torch.bmm(a, b)


class Ragged(Function):
    """See ``kernels.ragged_attention``."""

    @staticmethod
    def forward(
        ctx: Any,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        within: Attention,
        scale: float,
        causal: bool,
        window: int,
        dropped: Sequence[torch.Tensor] | None,
    ) -> torch.Tensor:
        (_, heads, size), shared = q.shape, k.shape[1]
        masks = within.masks(q.dtype, heads, causal, window)
        flat_q, flat_k, flat_v = (x.reshape(-1, size) for x in (q, k, v))
        saved, outs = [], []
        for i, (asked, read) in enumerate(zip(within.queries.taken(heads, heads), within.keys.taken(heads, shared), strict=True)):
            asks, keys = ((-1, side.real[i].shape[1], size) for side in (within.queries, within.keys))
            a, b, c = (
                flat_q.index_select(0, asked).view(asks),
                flat_k.index_select(0, read).view(keys),
                flat_v.index_select(0, read).view(keys),
            )
            weights = torch.baddbmm(masks[i], a, b.transpose(1, 2), alpha=scale).softmax(-1)
            outs.append(torch.bmm(weights if dropped is None else weights * dropped[i], c))
            saved += [a, b, c, weights]
        ctx.save_for_backward(*saved, *(dropped or ()))
        ctx.within, ctx.scale, ctx.drops, ctx.heads, ctx.shared = within, scale, dropped is not None, heads, shared
        return within.queries.given(outs, heads)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[Any, ...]:
        within, heads, size = ctx.within, ctx.heads, gradient.shape[-1]
        flat = gradient.reshape(-1, size)
        to_q, to_k, to_v = [], [], []
        saved = ctx.saved_tensors  # asked for once: of a layer that is computed again they are not there a second time
        dropped = saved[4 * len(within.queries.real) :]
        for i, (asked, real) in enumerate(zip(within.queries.taken(heads, heads), within.queries.real, strict=True)):
            a, b, c, weights = saved[4 * i : 4 * i + 4]
            texts, width = real.shape
            g = flat.index_select(0, asked).view(texts, heads, width, size)
            g = g.mul_(real[:, None, :, None]).view(-1, width, size)  # padding sends nothing back
            used, to_weights = weights, torch.bmm(g, c.transpose(1, 2))
            if ctx.drops:
                used, to_weights = weights * dropped[i], to_weights * dropped[i]
            to_scores = torch.ops.aten._softmax_backward_data(to_weights, weights, -1, weights.dtype).mul_(ctx.scale)
            to_q.append(torch.bmm(to_scores, b))
            to_k.append(torch.bmm(to_scores.transpose(1, 2), a))
            to_v.append(torch.bmm(used.transpose(1, 2), g))
        back = [within.queries.given(to_q, heads), *(within.keys.given(part, heads) for part in (to_k, to_v))]
        if ctx.shared != heads:
            back[1:] = [x.view(len(x), ctx.shared, -1, size).sum(2) for x in back[1:]]
        return (*back, None, None, None, None, None)
