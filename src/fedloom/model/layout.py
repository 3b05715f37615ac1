"""Where the rows of a packed pass lie: whose they are (:class:`Owners`) and to which texts they belong (:class:`Attention`); and which rows
of a weight are there at all (:class:`RowsKept`).

The first two say it twice: as boundaries, for kernels that loop, and as padded groups of like sizes, for PyTorch operations; the groups
are made when somebody asks. Nothing here knows models, clients or methods.

Packed rows: all tokens (or all texts) of a pass, one after another, without padding. N rows in all, S owners, T tokens, n texts.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal

import numpy as np
import torch

ROUND = 8
"""Attention pads a text to a multiple of this many tokens."""


@dataclass(frozen=True)
class RowsKept:
    """Which output rows of a linear layer each owner has; the others of its ``tall`` rows are zero, or something else, and stay so.

    counts: int64 (S,), how many. index: int64 (S, most), which, ascending; what follows an owner's last one means nothing.
    """

    counts: np.ndarray
    index: np.ndarray
    tall: int

    @staticmethod
    def of(rows: Sequence[np.ndarray], tall: int) -> RowsKept:
        """From each owner's rows."""
        counts = np.array([len(mine) for mine in rows], np.int64)
        index = np.zeros((len(rows), int(counts.max(initial=0))), np.int64)
        for place, mine in zip(index, rows, strict=True):
            place[: len(mine)] = mine
        return RowsKept(counts, index, tall)

    def whole(self, weight: torch.Tensor, others: torch.Tensor | None = None) -> torch.Tensor:
        """(S, tall, …) of (S, most, …): every row in its place, among zeros or ``others`` (S, tall, …)."""
        owner, at = np.nonzero(np.arange(self.index.shape[1]) < self.counts[:, None])
        to = torch.from_numpy(owner * self.tall + self.index[owner, at]).to(weight.device)
        flat = weight.new_zeros(len(weight) * self.tall, *weight.shape[2:]) if others is None else others.flatten(0, 1)
        return flat.index_copy(0, to, weight[owner, at]).view(len(weight), self.tall, *weight.shape[2:])


class Owners:
    """Whose rows are whose: ``counts`` (S,) rows of each owner, one owner after another, then rows of nobody up to ``total``.

    Owners are dealt into a few groups by their numbers of rows, each padded to its group's width, so that a group is one product.
    """

    def __init__(self, counts: np.ndarray, total: int, device: torch.device) -> None:
        self.counts, self.total, self.device, self.owned = counts, total, device, int(counts.sum())
        self._last: tuple[torch.Tensor, int, list[torch.Tensor]] | None = None

    @cached_property
    def starts(self) -> np.ndarray:
        """int64 (S + 1,): owner s has the rows from its entry to the next."""
        return boundaries(self.counts)

    @cached_property
    def side(self) -> Side:
        """The groups' rows."""
        groups, widths = self._groups
        return Side(self.counts, groups, widths, np.zeros_like(self.counts), self.device)

    @cached_property
    def groups(self) -> list[torch.Tensor]:
        """For each group the numbers (m,) of its owners."""
        return [torch.from_numpy(group).to(self.device) for group in self._groups[0]]

    @property
    def all(self) -> bool:
        """Whether one group holds every owner."""
        return len(self.groups) == 1 and len(self.groups[0]) == len(self.counts)

    @cached_property
    def _groups(self) -> tuple[list[np.ndarray], list[int]]:
        widths = np.array([_width(int(n)) for n in self.counts])
        return _alike(widths, widths > 0)

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


def boundaries(counts: np.ndarray) -> np.ndarray:
    """int64 (n + 1,): where each of n begins, and where the last one ends."""
    return np.concatenate([[0], np.cumsum(counts)]).astype(np.int64)


def _alike(widths: np.ndarray, among: np.ndarray | bool = True) -> tuple[list[np.ndarray], list[int]]:
    """Who has which width, narrow first: positions of each group, and its width."""
    each = [int(width) for width in np.unique(widths[among])]
    return [np.flatnonzero(widths == width) for width in each], each


def _width(rows: int) -> int:
    """Rows that an owner with that many is given: a function of its own number, of which there are few, at most half as many more (from
    16 on), and a multiple of 8: products of other numbers of rows are cut in ways that depend on who else is there."""
    step = max(8, 2 ** (rows.bit_length() - 2)) if rows else 1
    return -(-rows // step) * step


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
    """Who attends to whom: every query to the keys of its own text."""

    def __init__(self, lengths: np.ndarray, device: torch.device, only: Literal["all", "first", "last"] = "all") -> None:
        """Texts of ``lengths`` (n,) tokens lie one after another; ``only`` says which of their tokens ask."""
        self.lengths, self.device, self.only = lengths, device, only
        self.first = lengths - 1 if only == "last" else np.zeros_like(lengths)
        self._kept: dict[Any, Any] = {}

    # ---- as boundaries

    @cached_property
    def reads(self) -> np.ndarray:
        """int64 (n + 1,): text t has the keys from its entry to the next."""
        return boundaries(self.lengths)

    @cached_property
    def asks(self) -> np.ndarray:
        """int64 (n + 1,): and these queries."""
        return self.reads if self.only == "all" else np.arange(len(self.lengths) + 1, dtype=np.int64)

    def weights(self, heads: int) -> np.ndarray:
        """int64 (n + 1,): where each text's weights lie, (heads, asked, keys rounded up to 8), one text after another."""
        if ("weights", heads) not in self._kept:
            self._kept["weights", heads] = boundaries(heads * np.diff(self.asks) * _rounded(self.lengths))
        return self._kept["weights", heads]

    # ---- as groups

    @cached_property
    def texts(self) -> list[torch.Tensor]:
        """For each group the numbers (m,) of its texts."""
        return [torch.from_numpy(group).to(self.device) for group in self._groups[0]]

    @cached_property
    def keys(self) -> Side:
        """The groups' keys."""
        return Side(self.lengths, *self._groups, np.zeros_like(self.lengths), self.device)

    @cached_property
    def queries(self) -> Side:
        """The groups' queries."""
        groups, widths = self._groups
        return self.keys if self.only == "all" else Side(np.ones_like(self.lengths), groups, [1] * len(widths), self.first, self.device)

    @cached_property
    def _groups(self) -> tuple[list[np.ndarray], list[int]]:
        return _alike(_rounded(self.lengths))

    def masks(self, dtype: torch.dtype, heads: int, causal: bool, window: int) -> list[torch.Tensor]:
        """For each group what is added to its scores, (m·heads, 1 or L_q, L): 0 where a query may see a key. ``window``: 0, or the distance
        from which on keys are not seen."""
        key = (dtype, heads, causal, window)
        if key not in self._kept:
            made = []
            for asks, at, real in zip(self.queries.at, self.keys.at, self.keys.real, strict=True):
                seen, far = real[:, None, :], asks[:, :, None] - at[:, None, :]
                if causal:
                    seen = seen & (far >= 0)
                if window:
                    seen = seen & (far.abs() < window)
                mask = torch.zeros_like(seen, dtype=dtype).masked_fill_(~seen, torch.finfo(dtype).min)
                made.append(mask.repeat_interleave(heads, 0))
            self._kept[key] = made
        return self._kept[key]


def _rounded(lengths: np.ndarray) -> np.ndarray:
    return -(-lengths // ROUND) * ROUND
