"""The ways in which a model is called on the texts of many owners at once, each owner with trainable tensors of its own.

``Packed``: the module runs on one row of T tokens without padding. What makes that the same function as calling it for each owner on a
padded batch is in ``passes.py``, and two things here: positions start anew with each text, and the last transformer layer is asked only for
the tokens that the head reads, one a text, so that the head sees n rows.

An architecture whose attention cannot be replaced runs on padded rows instead, its linear layers the same (``Rows``); one that trains or
drops what rows do not carry runs under ``vmap`` (``Mapped``). Which of them works is found by trying (``trials.py``): logits and layer
outputs of two owners must equal the model's own, called for each of them.

This file does not know transformers, PEFT, clients or methods. Shapes: n texts, T tokens, S owners, C classes, d hidden size.
"""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Callable
from contextlib import nullcontext
from functools import partial
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

import numpy as np
import torch
from torch import nn
from torch.func import functional_call, vmap
from torch.nn import functional

from fedloom.messages import Tensors
from fedloom.model import dropout
from fedloom.model.kernels import computes_bf16
from fedloom.model.layout import Attention, Owners
from fedloom.model.machine import own_part
from fedloom.model.outputs import last_caught, logits_of, of_layers
from fedloom.model.passes import ATTENTION, Layout, OneRow, Pass, Seen, Unpackable, Weights, packed_now
from fedloom.model.recomputed import Recomputed
from fedloom.model.skipped import stack_of
from fedloom.model.texts import FILL, Texts, filled, padded

if TYPE_CHECKING:
    from fedloom.model.base import Model


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


class Extent(NamedTuple):
    """What decides how large a pass' tensors are: its texts, in how many parts, how many a part has at most, how long the longest is, and
    their tokens."""

    parts: int = 0
    texts: int = 0
    most: int = 0
    longest: int = 0
    tokens: int = 0

    def and_of(self, lengths: np.ndarray) -> Extent:
        """With a part of texts of so many tokens, int64 (n,)."""
        n = len(lengths)
        longest = max(self.longest, int(lengths.max(initial=0)))
        return Extent(self.parts + 1, self.texts + n, max(self.most, n), longest, self.tokens + int(lengths.sum()))


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
        try:
            with Pass(layout, self.weights, self.rate if texts.keys is not None else 0.0, tensors), again, catching as caught:
                call = {**given, "output_hidden_states": layers}
                out = functional_call(self.module, dict(tensors), (), call, tie_weights=not self.tied.isdisjoint(tensors))
        finally:
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
        now, row = packed_now()
        site, now.last = now.site, "look"
        try:
            layer.forward(*args, **kwargs)
            raise Unpackable(f"{type(layer).__name__} does not call the library's attention")
        except Seen as seen:
            seen.__traceback__ = None  # it would hold its frames, and with them every tensor of the layer
            now.last, now.site = seen, site
        total, read = len(now.layout.texts.ids), row.read
        return tuple(_only(a, total, read) for a in args), {name: _only(a, total, read) for name, a in kwargs.items()}

    @staticmethod
    def _after_last(layer: nn.Module, args: tuple[Any, ...], made: Any) -> Any:
        """(1, n, d) or (1, T, d) -> (n, 1, d): from here on the module sees n rows of one token."""
        now, row = packed_now()
        hidden = made[0] if isinstance(made, tuple) else made
        rows = hidden[0] if isinstance(now.last, Seen) else hidden[0, row.read]
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

        begins = np.searchsorted(texts.owners, np.arange(texts.count))  # of a batch in parts only the first begins with its first row
        first = torch.from_numpy(texts.rows[begins].astype(np.int64)).to(keys.device)

        def one(
            named: Tensors,
            ids: torch.Tensor,
            mask: torch.Tensor,
            segments: torch.Tensor,
            given: torch.Tensor | None,
            key: torch.Tensor,
            row: torch.Tensor,
        ) -> tuple[torch.Tensor, tuple[torch.Tensor, ...]]:
            with dropout.SeededDropout(key, rate, self.causal, row) if rate else nullcontext():
                return self.call(named, ids, mask, segments, given, layers)

        each = vmap(one, in_dims=(0, 0, 0, 0, None if embeddings is None else 0, 0, 0))
        whole = {name: texts.kept[name].whole(tensor) if name in texts.kept else tensor for name, tensor in tensors.items()}
        logits, hidden = each(whole, *self._padded(texts), embeddings, keys, first)
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


def _only(value: Any, total: int, read: torch.Tensor) -> Any:
    """What belongs to the tokens ``read``, of whatever has one entry for each of ``total`` tokens on its second axis."""
    if isinstance(value, torch.Tensor) and value.dim() > 1 and value.shape[0] == 1 and value.shape[1] == total:
        return value.index_select(1, read)
    return type(value)(_only(part, total, read) for part in value) if type(value) in (tuple, list) else value


# ---- made of a model --------------------------------------------------------------------------------------------------------------


def packed(model: Model, dtype: torch.dtype, trims: bool = True) -> Packed:
    """The model's pass as one row."""
    return Packed(
        model.base(dtype),
        depth=model.depth,
        causal=model.causal,
        kinds=model.kinds,
        positions=partial(_positions, model),
        rate=model.dropout,
        weights=_weights(model, dtype),
        trims=trims,
        reads=max(0, model.pooled),
        many=model.reads_many,
        kinds_of=model.kinds_of,
        recomputes=model.recomputes,
    )


def rows(model: Model, dtype: torch.dtype) -> Rows:
    """The model's pass on padded rows."""
    module: Any = model.base(dtype)
    how: dict[str, Any] = {"causal": model.causal, "pad_id": model.pad_id, "rate": model.dropout, "reads": model.pooled}
    return Rows(partial(model.on_rows, module, dtype), module.get_input_embeddings(), weights=_weights(model, dtype), **how)


def mapped(model: Model, dtype: torch.dtype) -> Mapped:
    """The model's pass under ``vmap``; its operations can be differentiated twice."""
    module: Any = model.base(dtype)
    how: dict[str, Any] = {"causal": model.causal, "pad_id": model.pad_id, "rate": model.dropout, "reads": model.pooled}
    return Mapped(partial(model.on_rows, module, dtype, twice=True), module.get_input_embeddings(), **how)


WAYS: dict[str, Callable[[Model, torch.dtype], Way]] = {
    "packed": packed,
    "packed, whole last layer": partial(packed, trims=False),
    "padded rows": rows,
    "vmap": mapped,
}
"""All there are, the fastest first. Which of them a model can be called by is found by trying (``trials.py``)."""


def computed(by: str, extent: Extent) -> int:
    """Tokens that a pass by this way computes, padding among them."""
    match by:
        case "padded rows":
            return extent.texts * extent.longest
        case "vmap":
            return extent.parts * extent.most * extent.longest
        case _:
            return extent.tokens


def _positions(model: Model, length: int) -> torch.Tensor | None:
    """Those of a text of so many tokens (L,), or None where the model takes none."""
    made = model.call[1](model.shape, torch.ones(1, length, dtype=torch.bool, device=model.device))
    return None if made is None else made[0]


def _weights(model: Model, dtype: torch.dtype) -> Weights | None:
    """Where packed weights are kept; None if two more copies of the base would take more than a quarter of the free memory, and of a model
    held in 16 bits of which everything is trained: devices bring their own weights to it."""
    if model.dtype is not torch.float32 and model.is_whole:
        return None
    wide = 4 if dtype is torch.bfloat16 and not computes_bf16() else torch.empty(0, dtype=dtype).element_size()
    copies = 2 * wide * sum(p.numel() for p in model.module.parameters())  # of what is held in few bits none is kept
    return {} if copies < own_part(model.device) / 4 else None
