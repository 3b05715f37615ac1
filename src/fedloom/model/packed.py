"""A model called on the texts of many owners at once, each owner with trainable tensors of its own, without padding.

The module runs on one row of T tokens. Four things make that the same function as calling it for each owner on a padded batch:
its attention stays within a text (``kernels.ragged_attention``, put in as the library's attention function); positions start anew with each
text; linear layers read every row's own owner's weights (``kernels.owned_linear``) or frozen ones (``kernels.Frozen``); and the last
transformer layer is asked only for the tokens that the head reads, one a text, so that the head sees n rows. Dropout masks are those of
``dropout.py``, entry by entry.

An architecture whose attention cannot be replaced runs on padded rows instead, its linear layers the same (``Rows``); one that trains or
drops what rows do not carry runs under ``vmap`` (``Mapped``). Which of them works is found by trying (``base.py``): logits and layer
outputs of two owners must equal the model's own, called for each of them.

This file does not know transformers, PEFT, clients or methods. Shapes: n texts, T tokens, S owners, C classes, d hidden size.
"""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple, Protocol

import numpy as np
import torch
from torch import nn
from torch.func import functional_call, vmap
from torch.nn import functional

from fedloom.messages import Tensors
from fedloom.model import dropout
from fedloom.model.kernels import Frozen, gelu, owned_linear, packable, ragged_attention
from fedloom.model.layout import Attention, Owners
from fedloom.model.modes import Mode, entered
from fedloom.model.outputs import last_caught, of_layers
from fedloom.model.recomputed import Recomputed
from fedloom.model.skipped import stack_of
from fedloom.model.texts import FILL, Texts, filled, padded

ATTENTION = "fedloom"
"""The name under which :func:`attend` is known to the library."""


class Unpackable(RuntimeError):
    """Something in a model that packed passes cannot do; the message says what."""


class Way(Protocol):
    """A way to call a model on :class:`Texts`."""

    def __call__(
        self, tensors: Tensors, texts: Texts, embeddings: torch.Tensor | None = None, layers: bool = False
    ) -> tuple[torch.Tensor, tuple[torch.Tensor, ...]]:
        """(logits (n, C) float32, outputs (n, d) of every layer at the tokens that the head reads if ``layers``, else ()).

        Of answers (``texts.asked``) (r, V) and (r, d). ``tensors`` (S, …) by parameter name. ``embeddings``: the input embeddings to use,
        shaped as :meth:`embed` gives them.
        """
        ...

    def embed(self, texts: Texts) -> tuple[torch.Tensor, torch.Tensor]:
        """Input embeddings (…, d) of all tokens, detached, zero at padding; and every entry's owner (…,)."""
        ...


class Kept(NamedTuple):
    """A frozen parameter as it was at a version of it, packed."""

    parameter: torch.Tensor
    version: int
    frozen: Frozen


Weights = dict[int, Kept]
"""Frozen weights packed so far, by the parameter's id (the parameter is kept, so that the id stays its own)."""


# ---- inside a pass ----------------------------------------------------------------------------------------------------------------


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
        self.last: _Seen | Literal["look"] | None = None

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


def _packed_now() -> tuple[Pass, OneRow]:
    now = next((mode for mode in reversed(entered()) if isinstance(mode, Pass)), None)
    if now is None or now.layout.packed is None:
        raise Unpackable("this module runs inside a packed pass only")
    return now, now.layout.packed


class _Seen(Exception):
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
    now, row = _packed_now()
    if softcap is not None:
        raise Unpackable("packed attention caps no scores")
    q, k, v = (x.transpose(1, 2).flatten(0, 1) for x in (query, key, value))
    within = row.attention
    if now.last == "look":
        raise _Seen(k, v)
    if isinstance(now.last, _Seen):
        k, v, within = now.last.keys, now.last.values, row.last_attention
    dtype = q.dtype
    if q.device.type == "cpu":
        q, k, v = q.float(), k.float(), v.float()  # products of this size, and above all softmax, are several times slower in bfloat16
    dropped = now.attention_entries(within, q.shape[1], q.dtype) if now.rate else None
    scale = q.shape[-1] ** -0.5 if scaling is None else scaling
    made = ragged_attention(q, k, v, within, scale, now.layout.causal, sliding_window or 0, dropped)
    return made.to(dtype)[None], None


# ---- the ways ---------------------------------------------------------------------------------------------------------------------


class Packed:
    """The whole pass as one row of T tokens. ``trims``: whether the last layer computes the tokens that the head reads only."""

    def __init__(
        self,
        module: Any,
        *,
        depth: int,
        causal: bool,
        kinds: int,
        positions: Callable[[int], torch.Tensor | None],
        rate: float,
        weights: Weights | None,
        trims: bool,
        reads: int = 0,
        many: bool = False,
        kinds_of: Callable[[torch.Tensor], torch.Tensor] = lambda segments: segments,
        recomputes: bool = False,
    ) -> None:
        """``module`` is not changed: a copy that shares its tensors is. ``kinds``: number of token types (0: none).
        ``positions``: those of a text of so many tokens (L,). ``reads``: the place in a text that the head reads, if it is not causal.
        ``many``: whether it reads many tokens of a text instead (``texts.asked``); ``kinds_of``: token types from the texts'
        segments; ``recomputes``: whether layers are computed again in the backward pass, but for a last one that is trimmed."""
        if trims and (reads or many):
            raise Unpackable("the last layer is trimmed to the first token or the last")
        shared = {id(t): t for t in (*module.parameters(), *module.buffers())}
        self.module: Any = copy.deepcopy(module, shared)
        for part in self.module.modules():
            if "config" in vars(part):
                vars(part)["config"]._attn_implementation = ATTENTION
        try:
            stack = stack_of(self.module, depth)
        except LookupError as none:
            raise Unpackable(str(none)) from none
        self.causal, self.kinds, self.positions, self.rate, self.weights, self.reads = causal, kinds, positions, rate, weights, reads
        self.kinds_of = kinds_of
        self.table = self.module.get_input_embeddings()
        self.table.register_forward_pre_hook(lambda _, __: (self._ids,))
        self.table.register_forward_hook(lambda _, __, made: made if self._given is None else self._given)
        if trims:
            stack[-1].register_forward_pre_hook(self._before_last, with_kwargs=True)
        stack[-1].register_forward_hook(self._after_last)
        self.depth, self._ids, self._given = depth, torch.zeros(1, 1, dtype=torch.int64), None
        self.recomputed = Recomputed(self.module, depth, int(trims)) if recomputes else None
        names = [(name, id(parameter)) for name, parameter in self.module.named_parameters(remove_duplicate=False)]
        times = Counter(of for _, of in names)
        self.tied = {name for name, of in names if times[of] > 1}

    def __call__(
        self, tensors: Tensors, texts: Texts, embeddings: torch.Tensor | None = None, layers: bool = False
    ) -> tuple[torch.Tensor, tuple[torch.Tensor, ...]]:
        """See :class:`Way`."""
        given_texts, texts = texts, filled(texts)
        device, total = texts.ids.device, len(texts.ids)
        longest, ends = int(given_texts.lengths.max()), np.cumsum(texts.lengths)
        within = np.arange(total) - np.repeat(ends - texts.lengths, texts.lengths)
        places = np.repeat(ends, texts.lengths) - 1 - np.arange(total) if self.causal else within
        read = torch.from_numpy(ends - 1 if self.causal else ends - texts.lengths + np.minimum(self.reads, texts.lengths - 1)).to(device)
        if texts.asked is not None:
            read = functional.pad(texts.asked.at, (0, -len(texts.asked.at) % FILL))
            read = functional.pad(read, (0, FILL)) if len(read) == total else read  # rows are told apart by how many there are
        count = len(read)
        per_owner = np.bincount(given_texts.owners, weights=given_texts.reads, minlength=texts.count).astype(np.int64)
        of_tokens = np.bincount(given_texts.owners, weights=given_texts.lengths, minlength=texts.count).astype(np.int64)
        layout = Layout(
            texts,
            self.causal,
            {total: Owners(of_tokens, total, device), count: Owners(per_owner, count, device)},
            OneRow(
                Attention(texts.lengths, device),
                Attention(texts.lengths, device, "last" if self.causal else "first"),
                torch.from_numpy(places).to(device),
                read,
            ),
        )
        positions = self.positions(longest)
        given: dict[str, Any] = {"input_ids": torch.zeros(count, 1, dtype=torch.int64, device=device)}
        if positions is not None:
            given["position_ids"] = positions.to(device)[torch.from_numpy(np.minimum(within, longest - 1)).to(device)][None]
        if self.kinds:
            given["token_type_ids"] = self.kinds_of(texts.segments).clamp(max=self.kinds - 1)[None]
        self._ids, self._given = texts.ids[None], embeddings
        if embeddings is not None:
            self._given = functional.pad(embeddings, (0, 0, 0, total - embeddings.shape[1]))
        again = nullcontext() if self.recomputed is None else self.recomputed.forward()
        catching = last_caught(self.module, self.depth) if layers else nullcontext([])
        with Pass(layout, self.weights, self.rate if texts.keys is not None else 0.0, tensors), again, catching as caught:
            call = {**given, "output_hidden_states": layers}
            out = functional_call(self.module, dict(tensors), (), call, tie_weights=not self.tied.isdisjoint(tensors))
        self._given = None
        hidden = (h.flatten(0, -2) for h in of_layers(out.hidden_states, caught)) if layers else ()
        real = slice(0, int(given_texts.reads.sum()))
        logits = logits_of(out).float()
        return (logits[:, 0] if logits.dim() > 2 else logits)[real], tuple((h if len(h) == count else h[read])[real] for h in hidden)

    def embed(self, texts: Texts) -> tuple[torch.Tensor, torch.Tensor]:
        """See :class:`Way`."""
        self._ids, self._given = texts.ids[None], None
        return self.table(texts.ids[None]).detach(), texts.token_owners[None]

    def _before_last(self, layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Have the layer make its keys and values, then give it the tokens that the head reads and nothing else."""
        now, row = _packed_now()
        site, now.last = now.site, "look"
        try:
            layer.forward(*args, **kwargs)
            raise Unpackable(f"{type(layer).__name__} does not call the library's attention")
        except _Seen as seen:
            seen.__traceback__ = None  # it would hold its frames, and with them every tensor of the layer
            now.last, now.site = seen, site
        total, read = len(now.layout.texts.ids), row.read
        return tuple(_only(a, total, read) for a in args), {name: _only(a, total, read) for name, a in kwargs.items()}

    @staticmethod
    def _after_last(layer: nn.Module, args: tuple[Any, ...], made: Any) -> Any:
        """(1, n, d) or (1, T, d) -> (n, 1, d): from here on the module sees n rows of one token."""
        now, row = _packed_now()
        hidden = made[0] if isinstance(made, tuple) else made
        rows = hidden[0] if isinstance(now.last, _Seen) else hidden[0, row.read]
        return (rows[:, None], *made[1:]) if isinstance(made, tuple) else rows[:, None]


class Rows:
    """Padded rows, for architectures whose attention cannot be replaced: a call as always, its linear layers by owner."""

    def __init__(
        self,
        call: Callable[..., tuple[torch.Tensor, tuple[torch.Tensor, ...]]],
        table: Callable[[torch.Tensor], torch.Tensor],
        *,
        causal: bool,
        pad_id: int,
        rate: float,
        weights: Weights | None,
        reads: int,
    ) -> None:
        """``call``: (tensors, ids (n, L), mask, segments, embeddings or None, layers) -> (logits, layers' outputs (n, L, d)).
        ``reads``: the place that the head reads."""
        self.call, self.table, self.causal, self.pad_id, self.rate, self.weights = call, table, causal, pad_id, rate, weights
        self.reads = reads

    def __call__(
        self, tensors: Tensors, texts: Texts, embeddings: torch.Tensor | None = None, layers: bool = False
    ) -> tuple[torch.Tensor, tuple[torch.Tensor, ...]]:
        """See :class:`Way`."""
        ids, mask, segments = padded(texts, self.causal, self.pad_id)
        per_owner = np.bincount(texts.owners, minlength=texts.count)
        rows = (per_owner * ids.shape[1], per_owner)
        layout = Layout(texts, self.causal, {int(of.sum()): Owners(of, int(of.sum()), ids.device) for of in rows})
        with Pass(layout, self.weights, self.rate if texts.keys is not None else 0.0, tensors):
            logits, hidden = self.call(tensors, ids, mask, segments, embeddings, layers)
            logits = logits if texts.asked is None else _read(logits, texts, mask, self.reads)
        return logits, tuple(_read(h, texts, mask, self.reads) for h in hidden)

    def embed(self, texts: Texts) -> tuple[torch.Tensor, torch.Tensor]:
        """See :class:`Way`."""
        ids, mask, _ = padded(texts, self.causal, self.pad_id)
        return self.table(ids).detach() * mask[..., None], texts.text_owners[:, None].expand_as(ids)


class Mapped:
    """``torch.func.vmap`` over the owners, each with a padded batch of the same size. Slower, and for trainable tensors of any kind in any
    place."""

    def __init__(
        self,
        call: Callable[..., tuple[torch.Tensor, tuple[torch.Tensor, ...]]],
        table: Callable[[torch.Tensor], torch.Tensor],
        *,
        causal: bool,
        pad_id: int,
        rate: float,
        reads: int,
    ) -> None:
        """``call`` and ``reads`` as for :class:`Rows`."""
        self.call, self.table, self.causal, self.pad_id, self.rate, self.reads = call, table, causal, pad_id, rate, reads

    def __call__(
        self, tensors: Tensors, texts: Texts, embeddings: torch.Tensor | None = None, layers: bool = False
    ) -> tuple[torch.Tensor, tuple[torch.Tensor, ...]]:
        """See :class:`Way`."""
        rate = self.rate if texts.keys is not None else 0.0
        keys = texts.keys if texts.keys is not None else torch.zeros(texts.count, dtype=torch.int64, device=texts.ids.device)

        def one(
            named: Tensors, ids: torch.Tensor, mask: torch.Tensor, segments: torch.Tensor, given: torch.Tensor | None, key: torch.Tensor
        ) -> tuple[torch.Tensor, tuple[torch.Tensor, ...]]:
            with dropout.SeededDropout(key, rate, self.causal) if rate else nullcontext():
                return self.call(named, ids, mask, segments, given, layers)

        each = vmap(one, in_dims=(0, 0, 0, 0, None if embeddings is None else 0, 0))
        whole = {name: texts.kept[name].whole(tensor) if name in texts.kept else tensor for name, tensor in tensors.items()}
        logits, hidden = each(whole, *self._padded(texts), embeddings, keys)
        where, mask = self._where(texts), padded(texts, self.causal, self.pad_id)[1]
        logits = logits[where] if texts.asked is None else _read(logits[where], texts, mask, self.reads)
        return logits, tuple(_read(h[where], texts, mask, self.reads) for h in hidden)

    def embed(self, texts: Texts) -> tuple[torch.Tensor, torch.Tensor]:
        """See :class:`Way`."""
        ids, mask, _ = self._padded(texts)
        real = torch.zeros(ids.shape[:2], dtype=torch.bool, device=ids.device)
        real[self._where(texts)] = True
        owners = torch.arange(len(ids), device=ids.device)[:, None, None].expand_as(ids)
        return self.table(ids).detach() * (mask & real[..., None])[..., None], owners

    @staticmethod
    def _where(texts: Texts) -> tuple[torch.Tensor, torch.Tensor]:
        """Each text's owner, and which of that owner's texts it is."""
        counts = np.bincount(texts.owners, minlength=texts.count)
        place = np.arange(len(texts.owners)) - np.repeat(np.cumsum(counts) - counts, counts)
        return texts.text_owners, torch.from_numpy(place).to(texts.ids.device)

    def _padded(self, texts: Texts) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """ids, mask, segments (S, b, L). Filler rows hold one token each."""
        owners, place = self._where(texts)
        shape = (texts.count, int(place.max()) + 1)
        rows = padded(texts, self.causal, self.pad_id)
        whole = tuple(
            torch.full((*shape, rows[0].shape[1]), fill, dtype=r.dtype, device=r.device)
            for r, fill in zip(rows, (0, False, 0), strict=True)
        )
        whole[1][..., -1 if self.causal else 0] = True
        for to, of in zip(whole, rows, strict=True):
            to[owners, place] = of
        return whole  # type: ignore[return-value]


def _read(of: torch.Tensor, texts: Texts, mask: torch.Tensor, place: int) -> torch.Tensor:
    """What the head reads of (n, L, …): one ``place`` of each text, or the tokens of answers (r, …)."""
    return of[:, place] if texts.asked is None else of.flatten(0, 1)[texts.asked.padded(mask).at]


def logits_of(out: Any) -> torch.Tensor:
    """The logits of a call of the module; those of begin and end side by side (…, 2), which the library tells apart."""
    return torch.stack([out.start_logits, out.end_logits], -1) if "start_logits" in out else out.logits


def _only(value: Any, total: int, read: torch.Tensor) -> Any:
    """What belongs to the tokens ``read``, of whatever has one entry for each of ``total`` tokens on its second axis."""
    if isinstance(value, torch.Tensor) and value.dim() > 1 and value.shape[0] == 1 and value.shape[1] == total:
        return value.index_select(1, read)
    return type(value)(_only(part, total, read) for part in value) if type(value) in (tuple, list) else value
