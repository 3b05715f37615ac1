"""One call of a model on the texts of many owners: whose weights a row is multiplied by, how far attention reaches, whose dropout it is.

Three things make such a call the same function as one for each owner: attention stays within a text (``kernels.ragged_attention``, put in
as the library's attention function); linear layers read every row's own owner's weights (``kernels.owned_linear``) or frozen ones
(``kernels.Frozen``); and dropout masks are those of ``dropout.py``, entry by entry. How a model is called so is in ``ways.py``.

This file does not know transformers, PEFT, clients or methods. Shapes: n texts, T tokens, S owners, C classes, d hidden size.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import torch
from torch import nn
from torch.nn import functional

from fedloom.messages import Tensors
from fedloom.model import dropout
from fedloom.model.kernels import Frozen, gelu, owned_linear, packable, ragged_attention
from fedloom.model.layout import Attention, Owners
from fedloom.model.modes import Mode, entered
from fedloom.model.texts import Texts

ATTENTION = "fedloom"
"""The name under which :func:`attend` is known to the library."""


class Unpackable(RuntimeError):
    """Something in a model that packed passes cannot do; the message says what."""


class Kept(NamedTuple):
    """A frozen parameter as it was at a version of it, packed."""

    parameter: torch.Tensor
    version: int
    frozen: Frozen


Weights = dict[int, Kept]
"""Frozen weights packed so far, by the parameter's id (the parameter is kept, so that the id stays its own)."""


@dataclass(frozen=True)
class OneRow:
    """What a packed pass adds: attention in all layers and in the last, each token's place in its text as dropout counts it (T,), and the
    tokens that the head reads (n,)."""

    attention: Attention
    last_attention: Attention
    places: torch.Tensor
    read: torch.Tensor


@dataclass(frozen=True)
class Layout:
    """How a pass' tensors lie. ``owners``: whose rows are whose, by number of rows. ``packed``: for packed passes."""

    texts: Texts
    causal: bool
    owners: Mapping[int, Owners]
    packed: OneRow | None = None


class Pass(Mode):
    """One call of the module: linear layers by owner, frozen ones on packed weights (None: as they are), dropout by owner (rate 0: none).

    ``last``: "look" while the last layer is asked for its keys and values, then those. ``tensors``: what the module is called with.
    """

    def __init__(self, layout: Layout, weights: Weights | None, rate: float, tensors: Tensors) -> None:
        self.layout, self.weights, self.rate, self.site = layout, weights, rate, 0
        self.kept = {id(tensors[name]): kept for name, kept in layout.texts.kept.items()}
        self.last: Seen | Literal["look"] | None = None

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        if func is functional.linear:
            return self._linear(*args, **(kwargs or {}))
        if func is torch.addmm and len(args) == 3 and not kwargs:  # GPT-2 keeps its weights the other way round
            bias, x, weight = args
            return self._linear(x, weight.transpose(-1, -2), bias, of=weight)
        if func is functional.gelu and len(args) == 1 and not kwargs:
            return gelu(args[0])
        if func is functional.dropout and self.rate:
            x = args[0] if args else kwargs["input"]  # type: ignore[index]
            return torch.where(dropout.kept(self._entries(x), self.rate), x / (1 - self.rate), 0.0).to(x.dtype)
        return func(*args, **(kwargs or {}))

    def _linear(
        self, input: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None, of: torch.Tensor | None = None
    ) -> torch.Tensor:
        rows = input.reshape(-1, input.shape[-1])
        own_bias = bias if bias is not None and bias.dim() == 2 else None
        if weight.dim() == 3:
            made = owned_linear(rows, weight, own_bias, self._owners(rows), self.kept.get(id(weight)))
            if bias is not None and own_bias is None:
                made = made + bias
        else:
            plain = None if own_bias is not None else bias
            frozen = self._frozen(weight, weight if of is None else of)
            made = functional.linear(rows, weight, plain) if frozen is None else frozen(rows, plain)
            if own_bias is not None:
                owners = self._owners(rows)
                counts = torch.from_numpy(owners.counts).to(rows.device)
                made = made + functional.pad(own_bias.repeat_interleave(counts, 0), (0, 0, 0, owners.total - owners.owned))
        return made.view(*input.shape[:-1], made.shape[-1])

    def _frozen(self, weight: torch.Tensor, of: torch.Tensor) -> Frozen | None:
        if self.weights is None or not isinstance(of, nn.Parameter) or of.requires_grad or not packable(of):
            return None
        kept = self.weights.get(id(of))
        if kept is None or kept.version != of._version:  # changed in place since it was packed
            kept = self.weights[id(of)] = Kept(of, of._version, Frozen(weight.detach()))
        return kept.frozen

    def _owners(self, rows: torch.Tensor) -> Owners:
        if len(rows) not in self.layout.owners:
            raise Unpackable(f"a trained linear layer saw {len(rows)} rows; rows of tokens or texts are {sorted(self.layout.owners)}")
        return self.layout.owners[len(rows)]

    def _entries(self, x: torch.Tensor) -> torch.Tensor:
        """The hash of every entry of x: (1, T, d) or (1, n, d), (n, 1, d), (n, d), or padded rows (n, …)."""
        texts, layout = self.layout.texts, self.layout
        assert texts.keys is not None
        h = dropout.at_each(dropout.seeded(texts.keys, self.site)[texts.text_owners], self._rows(texts), 0)
        self.site += 1
        if layout.packed is None or x.dim() == 2:
            for dimension, size in enumerate(x.shape[1:], 1):
                h = dropout.along(h, size, dimension, layout.causal)
            return h
        if x.numel() // x.shape[-1] == len(layout.packed.places):
            h = dropout.at_each(h.repeat_interleave(torch.from_numpy(texts.lengths).to(h.device)), layout.packed.places, 1)
        else:
            h = dropout.at_each(
                h, torch.zeros((), device=h.device), 1
            )  # the token that the head reads: the first, or the first from the end
        return dropout.along(h, x.shape[-1], 2, layout.causal).view(x.shape)

    def attention_entries(self, within: Attention, heads: int, dtype: torch.dtype) -> list[torch.Tensor]:
        """For each group of the attention what its weights (m·H, L_q, L) are multiplied by: 0, or 1 / (1 − rate)."""
        texts, causal = self.layout.texts, self.layout.causal
        assert texts.keys is not None
        whole = dropout.at_each(dropout.seeded(texts.keys, self.site)[texts.text_owners], self._rows(texts), 0)
        self.site += 1
        lengths, made = torch.from_numpy(texts.lengths).to(whole.device), []
        for group, asks, at in zip(within.texts, within.queries.at, within.keys.at, strict=True):
            q_places, k_places = ((lengths[group, None] - 1 - place) if causal else place for place in (asks, at))
            h = dropout.along(whole[group], heads, 1, causal)
            h = dropout.at_each(h[..., None], q_places[:, None, :], 2)
            h = dropout.at_each(h[..., None], k_places[:, None, None, :], 3)
            made.append((dropout.kept(h, self.rate) / (1 - self.rate)).to(dtype).flatten(0, 1))
        return made

    @staticmethod
    def _rows(texts: Texts) -> torch.Tensor:
        return torch.from_numpy(texts.rows).to(texts.ids.device)


def packed_now() -> tuple[Pass, OneRow]:
    """The pass that is under way, and how its one row lies.

    Raises:
        Unpackable: there is none.
    """
    now = next((mode for mode in reversed(entered()) if isinstance(mode, Pass)), None)
    if now is None or now.layout.packed is None:
        raise Unpackable("this module runs inside a packed pass only")
    return now, now.layout.packed


class Seen(Exception):
    """The last layer's keys and values (T, H_k, D): all that its tokens are needed for."""

    def __init__(self, keys: torch.Tensor, values: torch.Tensor) -> None:
        self.keys, self.values = keys, values


def attend(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    sliding_window: int | None = None,
    softcap: float | None = None,
    **_: Any,
) -> tuple[torch.Tensor, None]:
    """Attention as the library calls it: query (1, H, N, D), key and value (1, H_k, N, D) -> (1, N, H, D). Only inside a packed pass.

    Raises:
        Unpackable: outside of a pass, or a capped softmax.
    """
    now, row = packed_now()
    if softcap is not None:
        raise Unpackable("packed attention caps no scores")
    q, k, v = (x.transpose(1, 2).flatten(0, 1) for x in (query, key, value))
    within = row.attention
    if now.last == "look":
        raise Seen(k, v)
    if isinstance(now.last, Seen):
        k, v, within = now.last.keys, now.last.values, row.last_attention
    dtype = q.dtype
    if q.device.type == "cpu":
        q, k, v = q.float(), k.float(), v.float()  # products of this size, and above all softmax, are several times slower in bfloat16
    dropped = now.attention_entries(within, q.shape[1], q.dtype) if now.rate else None
    scale = q.shape[-1] ** -0.5 if scaling is None else scaling
    made = ragged_attention(q, k, v, within, scale, now.layout.causal, sliding_window or 0, dropped)
    return made.to(dtype)[None], None
