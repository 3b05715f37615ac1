"""The three kernels of a packed pass: a linear layer whose weights are frozen, one whose weights every owner has its own of, and
attention within each text. Plain PyTorch operations with hand-written gradients; nothing here knows models, clients or methods.

Packed rows: all tokens (or all texts) of a pass, one after another, without padding. N rows in all, S owners, T tokens, n texts.

What is computed for a row depends on that row alone, never on how many others share the pass: frozen layers run on oneDNN weights packed
once (whose blocking is fixed), a text's attention is padded to a length that is a function of its own, an owner's gradients are sums over
its own rows. On a CPU in float32 this makes results equal to the bit whatever the stack (docs/engines.md says what was measured).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import numpy as np
import torch
from torch.autograd import Function
from torch.autograd.function import once_differentiable

ROUND = 8
"""Attention pads a text to a multiple of this many tokens."""

HINT = 1024
"""The number of rows that oneDNN's packed weights are laid out for; any number may come."""


# ---- frozen weights -------------------------------------------------------------------------------------------------------------


def onednn(weight: torch.Tensor) -> bool:
    """Whether oneDNN's kernels can take this weight: a CPU's, in a precision that it computes in."""
    if weight.device.type != "cpu" or not torch.backends.mkldnn.is_available():
        return False
    return weight.dtype == torch.float32 or (weight.dtype == torch.bfloat16 and bool(torch.ops.mkldnn._is_mkldnn_bf16_supported()))


class Frozen:
    """A frozen weight (d_out, d_in) packed for both directions. It costs two copies of the weight, and on processors where the BLAS
    that ships with PyTorch takes a slow path (AMD, float32) it is more than twice as fast."""

    def __init__(self, weight: torch.Tensor) -> None:
        pack = torch.ops.mkldnn._reorder_linear_weight
        self.forth, self.back = pack(weight.contiguous(), HINT), pack(weight.t().contiguous(), HINT)

    def __call__(self, x: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        """x Wᵀ + bias for rows x (N, d_in)."""
        return _FrozenLinear.apply(x, self, bias)  # type: ignore[return-value]


def _rows_times(x: torch.Tensor, packed: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    if len(x) == 1:  # a lone row would take another kernel, with other last bits
        return _rows_times(x.expand(2, -1), packed, bias)[:1]
    return torch.ops.mkldnn._linear_pointwise(x.contiguous(), packed, bias, "none", [], "")


class _FrozenLinear(Function):
    """The gradient goes to the rows only; the weight and bias are frozen."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, weight: Frozen, bias: torch.Tensor | None) -> torch.Tensor:
        ctx.weight = weight
        return _rows_times(x, weight.forth, bias)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor, None, None]:
        return _rows_times(gradient, ctx.weight.back, None), None, None


# ---- weights that every owner has its own of --------------------------------------------------------------------------------------


class Owners:
    """Whose rows are whose: ``counts`` (S,) rows of each owner, one owner after another, then rows of nobody up to ``total``.

    Owners are dealt into a few groups by their numbers of rows, each padded to its group's width, so that a group is one product.
    """

    def __init__(self, counts: np.ndarray, total: int, device: torch.device) -> None:
        widths = np.array([_width(int(n)) for n in counts])
        groups = [np.flatnonzero(widths == width) for width in np.unique(widths[widths > 0])]
        self.counts, self.total, self.owned = counts, total, int(counts.sum())
        self.all = len(groups) == 1 and len(groups[0]) == len(counts)
        self.groups = [torch.from_numpy(group).to(device) for group in groups]
        self.side = Side(counts, groups, [int(widths[group[0]]) for group in groups], np.zeros_like(counts), device)
        self._last: tuple[torch.Tensor, int, list[torch.Tensor]] | None = None

    def blocks(self, x: torch.Tensor) -> list[torch.Tensor]:
        """Each group's rows of x (N, d) as (m, L, d); padding repeats a row. The last answer is kept: layers often share their input."""
        if self._last is not None:
            of, version, made = self._last
            if (of.data_ptr(), of.shape, of.dtype, version) == (x.data_ptr(), x.shape, x.dtype, x._version):
                return made
        made = [x.index_select(0, rows.reshape(-1)).view(*rows.shape, x.shape[1]) for rows in self.side.rows]
        self._last = (x.detach(), x._version, made)  # its graph would hold this pass, and this pass it
        return made

    def upstream(self, gradient: torch.Tensor) -> list[torch.Tensor]:
        """As :meth:`blocks`, padding zero: it sends nothing back."""
        gathered = (gradient.index_select(0, rows.reshape(-1)).view(*rows.shape, gradient.shape[1]) for rows in self.side.rows)
        return [part.mul_(real[..., None]) for part, real in zip(gathered, self.side.real, strict=True)]

    def rows(self, parts: Sequence[torch.Tensor], like: torch.Tensor, width: int) -> torch.Tensor:
        """(N, width) from the groups' (m, L, width); nobody's rows are zero."""
        if self.owned < self.total:
            parts = [*parts, like.new_zeros(1, width)]
        return self.side.given(parts, 1, self.total)[:, 0] if parts else like.new_empty(0, width)

    def theirs(self, of: torch.Tensor) -> list[torch.Tensor]:
        """Each group's part (m, …) of what every owner has one of (S, …), copied: the last bits of a product depend on where in memory its
        factors begin, and in the clients' matrix that depends on who they are."""
        return [of.clone(memory_format=torch.contiguous_format)] if self.all else [of.index_select(0, group) for group in self.groups]

    def everyones(self, parts: Sequence[torch.Tensor], like: torch.Tensor) -> torch.Tensor:
        """(S, …) from the groups' parts; zero for who has no rows."""
        if self.all:
            return parts[0]
        made = torch.zeros_like(like)
        for group, part in zip(self.groups, parts, strict=True):
            made.index_copy_(0, group, part)
        return made


def _width(rows: int) -> int:
    """Rows that an owner with that many is given: a function of its own number, of which there are few, at most half as many more (from
    16 on), and a multiple of 8: products of other numbers of rows are cut in ways that depend on who else is there."""
    step = max(8, 2 ** (rows.bit_length() - 2)) if rows else 1
    return -(-rows // step) * step


def owned_linear(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, owners: Owners) -> torch.Tensor:
    """(N, d_out): row i of x (N, d_in) times the weight (and plus the bias) of the owner it belongs to; nobody's rows become zero.

    ``weight``: (S, d_out, d_in). ``bias``: (S, d_out) or None.
    """
    return _OwnedLinear.apply(x.contiguous(), weight, bias, owners)  # type: ignore[return-value]


class _OwnedLinear(Function):
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


# ---- attention within each text ---------------------------------------------------------------------------------------------------


class Side:
    """The queries' or the keys' rows, as texts padded to their group's length.

    For each group of m texts: ``rows`` (m, L), which row of the pass each entry is (padding repeats the text's first), ``real`` (m, L)
    bool, and ``at`` (m, L), its place in the text.
    """

    def __init__(
        self, counts: np.ndarray, groups: Sequence[np.ndarray], widths: Sequence[int], first: np.ndarray, device: torch.device
    ) -> None:
        starts = np.cumsum(counts) - counts
        base, offset, width_of = 0, np.empty(len(counts), np.int64), np.empty(len(counts), np.int64)
        self.rows, self.real, self.at = [], [], []
        for texts, width in zip(groups, widths, strict=True):
            real = np.arange(width) < counts[texts, None]
            within = np.where(real, np.arange(width), 0)
            for kept, made in zip(
                (self.rows, self.real, self.at), (starts[texts, None] + within, real, first[texts, None] + within), strict=True
            ):
                kept.append(torch.from_numpy(made).to(device))
            offset[texts], width_of[texts] = base + np.arange(len(texts)) * width, width
            base += real.size
        inverse = (np.repeat(offset, counts), np.arange(int(counts.sum())) - np.repeat(starts, counts), np.repeat(width_of, counts))
        self._inverse = [torch.from_numpy(a).to(device)[:, None] for a in inverse]
        self._kept: dict[tuple[str, int, int], Any] = {}

    def taken(self, heads: int, of: int) -> list[torch.Tensor]:
        """For each group the rows (m·heads·L,) to take from (N·of, D), head by head; ``heads / of`` heads read each of the ``of``."""
        if ("taken", heads, of) not in self._kept:
            head = torch.arange(heads, device=self._inverse[0].device)[:, None] // (heads // of)
            self._kept["taken", heads, of] = [(rows[:, None, :] * of + head).reshape(-1) for rows in self.rows]
        return self._kept["taken", heads, of]

    def given(self, parts: Sequence[torch.Tensor], heads: int, total: int = 0) -> torch.Tensor:
        """(N, heads, D) from the groups' (m·heads, L, D); or ``total`` rows, of which those beyond N are the last of the parts' rows."""
        rows = [part.reshape(-1, part.shape[-1]) for part in parts]
        joined = rows[0] if len(rows) == 1 else torch.cat(rows)
        key = ("given", heads, total)
        if key not in self._kept:
            before, at, width = self._inverse
            mine = (before * heads + torch.arange(heads, device=at.device) * width + at).reshape(-1)
            self._kept[key] = torch.cat([mine, mine.new_full((max(0, total - len(at)) * heads,), len(joined) - 1)])
        return joined.index_select(0, self._kept[key]).view(-1, heads, joined.shape[-1])


class Attention:
    """Who attends to whom: every query to the keys of its own text. ``texts``: for each group the numbers (m,) of its texts."""

    def __init__(self, lengths: np.ndarray, device: torch.device, only: Literal["all", "first", "last"] = "all") -> None:
        """Texts of ``lengths`` (n,) tokens lie one after another; ``only`` says which of their tokens ask."""
        padded = -(-lengths // ROUND) * ROUND
        widths = [int(width) for width in np.unique(padded)]
        groups = [np.flatnonzero(padded == width) for width in widths]
        zero = np.zeros_like(lengths)
        self.texts = [torch.from_numpy(group).to(device) for group in groups]
        self.keys = Side(lengths, groups, widths, zero, device)
        at = lengths - 1 if only == "last" else zero
        self.queries = self.keys if only == "all" else Side(np.ones_like(lengths), groups, [1] * len(widths), at, device)
        self._masks: dict[Any, list[torch.Tensor]] = {}

    def masks(self, dtype: torch.dtype, heads: int, causal: bool, window: int) -> list[torch.Tensor]:
        """For each group what is added to its scores, (m·heads, 1 or L_q, L): 0 where a query may see a key. ``window``: 0, or the distance
        from which on keys are not seen."""
        key = (dtype, heads, causal, window)
        if key not in self._masks:
            made = []
            for asks, at, real in zip(self.queries.at, self.keys.at, self.keys.real, strict=True):
                seen, far = real[:, None, :], asks[:, :, None] - at[:, None, :]
                if causal:
                    seen = seen & (far >= 0)
                if window:
                    seen = seen & (far.abs() < window)
                mask = torch.zeros_like(seen, dtype=dtype).masked_fill_(~seen, torch.finfo(dtype).min)
                made.append(mask.repeat_interleave(heads, 0))
            self._masks[key] = made
        return self._masks[key]


def ragged_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    within: Attention,
    masks: Sequence[torch.Tensor],
    scale: float,
    dropped: Sequence[torch.Tensor] | None = None,
) -> torch.Tensor:
    """softmax(scale · q kᵀ + mask) v within each text, (N, H, D).

    q: (N, H, D), a row a query; k, v: (T, H_k, D) with H a multiple of H_k. ``dropped``: what each group's weights (m·H, L_q, L) are
    multiplied by.
    """
    return _Ragged.apply(q, k, v, within, masks, scale, dropped)  # type: ignore[return-value]


class _Ragged(Function):
    @staticmethod
    def forward(
        ctx: Any,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        within: Attention,
        masks: Sequence[torch.Tensor],
        scale: float,
        dropped: Sequence[torch.Tensor] | None,
    ) -> torch.Tensor:
        (_, heads, size), shared = q.shape, k.shape[1]
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
        ctx.save_for_backward(*saved)
        ctx.within, ctx.scale, ctx.dropped, ctx.heads, ctx.shared = within, scale, dropped, heads, shared
        return within.queries.given(outs, heads)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[Any, ...]:
        within, heads, size = ctx.within, ctx.heads, gradient.shape[-1]
        flat = gradient.reshape(-1, size)
        to_q, to_k, to_v = [], [], []
        for i, (asked, real) in enumerate(zip(within.queries.taken(heads, heads), within.queries.real, strict=True)):
            a, b, c, weights = ctx.saved_tensors[4 * i : 4 * i + 4]
            texts, width = real.shape
            g = flat.index_select(0, asked).view(texts, heads, width, size)
            g = g.mul_(real[:, None, :, None]).view(-1, width, size)  # padding sends nothing back
            used, to_weights = weights, torch.bmm(g, c.transpose(1, 2))
            if ctx.dropped is not None:
                used, to_weights = weights * ctx.dropped[i], to_weights * ctx.dropped[i]
            to_scores = torch.ops.aten._softmax_backward_data(to_weights, weights, -1, weights.dtype).mul_(ctx.scale)
            to_q.append(torch.bmm(to_scores, b))
            to_k.append(torch.bmm(to_scores.transpose(1, 2), a))
            to_v.append(torch.bmm(used.transpose(1, 2), g))
        back = [within.queries.given(to_q, heads), *(within.keys.given(part, heads) for part in (to_k, to_v))]
        if ctx.shared != heads:
            back[1:] = [x.view(len(x), ctx.shared, -1, size).sum(2) for x in back[1:]]
        return (*back, None, None, None, None)
