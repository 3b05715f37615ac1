"""Tokenised examples: flat arrays that every view shares. A client's shard is a set of row numbers, not a copy."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import chain

import numpy as np


@dataclass(frozen=True)
class Padded:
    """A rectangular batch. ids, mask, segments: (B, L); labels: (B,); weights: (B,), what each example's loss counts, which is 1."""

    ids: np.ndarray
    mask: np.ndarray
    segments: np.ndarray
    labels: np.ndarray
    weights: np.ndarray


def flat(ids: Sequence[Sequence[int]], segments: Sequence[Sequence[int]] | None = None) -> dict[str, np.ndarray]:
    """``tokens``, ``segments`` (all 0 if none are given) and ``offsets`` of :class:`Examples`, from the token ids of each text.

    Raises:
        ValueError: a text has no token, or there is not one segment id a token.
    """
    lengths = np.fromiter(map(len, ids), np.int64, len(ids))
    if (lengths == 0).any():
        raise ValueError(f"text {int(np.argmin(lengths))} has no tokens; every text needs at least one")
    tokens = np.fromiter(chain.from_iterable(ids), np.int32, int(lengths.sum()))
    kinds = np.zeros(len(tokens), np.int8) if segments is None else np.fromiter(chain.from_iterable(segments), np.int8)
    if len(kinds) != len(tokens):
        raise ValueError(f"{len(kinds)} segment ids came with {len(tokens)} tokens; there must be one a token")
    return {"tokens": tokens, "segments": kinds, "offsets": np.concatenate([[0], np.cumsum(lengths)])}


@dataclass(frozen=True)
class Examples:
    """n examples as rows of shared flat arrays.

    ``tokens`` (int32) and ``segments`` (int8) hold the token ids and token-type ids of all texts one after another; text j is
    ``tokens[offsets[j]:offsets[j + 1]]``. ``store_labels`` (int64) has one label per text. ``rows`` (int64, (n,)) are the
    texts that this view shows. ``pairs``: whether each is a pair of texts, of which the second one's tokens are of segment 1 where the
    tokenizer tells the two apart.
    """

    tokens: np.ndarray
    segments: np.ndarray
    offsets: np.ndarray
    store_labels: np.ndarray
    rows: np.ndarray
    pairs: bool = False

    @staticmethod
    def of(ids: Sequence[Sequence[int]], labels: Sequence[int], segments: Sequence[Sequence[int]] | None = None) -> Examples:
        """Pack lists of token ids (none empty) with one label each.

        Raises:
            ValueError: lengths disagree, or a text has no token.
        """
        if len(ids) != len(labels):
            raise ValueError(f"{len(ids)} texts came with {len(labels)} labels; there must be one label a text")
        return Examples.over(flat(ids, segments), labels)

    @staticmethod
    def over(texts: Mapping[str, np.ndarray], labels: Sequence[int], pairs: bool = False) -> Examples:
        """All of the texts that :func:`flat` packed, with one label each."""
        return Examples(**texts, store_labels=np.asarray(labels, np.int64), rows=np.arange(len(labels), dtype=np.int64), pairs=pairs)

    def __len__(self) -> int:
        return len(self.rows)

    def subset(self, indices: np.ndarray | Sequence[int]) -> Examples:
        """The view that shows only these positions, sharing the arrays."""
        return replace(self, rows=self.rows[np.asarray(indices, np.int64)])

    def truncated(self, length: int) -> Examples:
        """The examples with texts of at most ``length`` tokens: of a longer one the first ``length`` − 1 tokens stay, and the last.

        The last token is the one that tokenizers end a text with ([SEP], </s>) and that models look for; so what is left of a single
        text is what the tokenizer's own truncation leaves. Where a tokenizer ends texts with no such token, the text's last word stays
        in its place. Of a pair the longer text is cut, then both alike, and each keeps its last token, as the tokenizer does it; where
        it does not tell the two apart they are one text. Everything that counts tokens counts those that are left.
        This view itself comes back if no text is longer; otherwise the tokens of its texts (not of the whole store) are copied.

        Raises:
            ValueError: fewer than two tokens.
        """
        if length < 2:
            raise ValueError(f"a text cannot be cut to {length} tokens; its first and its last one stay")
        if self.lengths.max(initial=0) <= length:
            return self
        first, begin = self._of_the_first(), self.offsets[self.rows]
        second = self.lengths - first
        half, odd = divmod(length - 3, 2)  # of the words that stay, which three tokens are not; one more of the longer text
        shared = np.minimum(2 + half + odd * (first > second + 1), length - 1)
        most = np.where(second > 0, np.maximum(length - second, shared), length)
        kept = np.minimum(self.lengths, length)
        kept_of_first = np.minimum(first, most)
        begins, wholes, keeps = (
            np.stack(of, axis=1).ravel() for of in ((begin, begin + first), (first, second), (kept_of_first, kept - kept_of_first))
        )
        within = np.arange(keeps.sum()) - np.repeat(np.cumsum(keeps) - keeps, keeps)  # position in the shorter text
        is_last = (within == np.repeat(keeps - 1, keeps)) & ((within > 0) | np.repeat(np.arange(len(keeps)) % 2 == 1, keeps))
        source = np.repeat(begins, keeps) + np.where(is_last, np.repeat(wholes - 1, keeps), within)
        offsets = np.concatenate([[0], np.cumsum(kept)])
        return Examples(self.tokens[source], self.segments[source], offsets, self.labels, np.arange(len(self)), self.pairs)

    def _of_the_first(self) -> np.ndarray:
        """Tokens of each example that are its first text's, int64 (n,)."""
        if not self.pairs:
            return self.lengths
        whole = self.lengths
        ends = np.cumsum(whole)
        of_mine = np.repeat(self.offsets[self.rows] - ends + whole, whole) + np.arange(ends[-1])
        before = np.concatenate([[0], np.cumsum(self.segments[of_mine] == 0)])
        return before[ends] - before[ends - whole]

    @property
    def labels(self) -> np.ndarray:
        """int64 (n,)."""
        return self.store_labels[self.rows]

    @property
    def lengths(self) -> np.ndarray:
        """Tokens of each example, int64 (n,)."""
        return self.offsets[self.rows + 1] - self.offsets[self.rows]

    def pad(self, indices: np.ndarray, *, pad_id: int, side: str = "right") -> Padded:
        """The examples at ``indices`` as one rectangle, as wide as the longest.

        Raises:
            ValueError: no index, or an unknown side.
        """
        indices = np.asarray(indices, np.int64)
        if not len(indices):
            raise ValueError("a batch needs at least one example; no index came")
        if side not in ("left", "right"):
            raise ValueError(f"padding goes to the 'left' or the 'right', not '{side}'")
        rows = self.rows[indices]
        begin, lengths = self.offsets[rows], self.offsets[rows + 1] - self.offsets[rows]
        width = int(lengths.max())
        shift = width - lengths if side == "left" else np.zeros(len(rows), np.int64)
        within = np.arange(width) - shift[:, None]  # (B, L): position in the text
        mask = (within >= 0) & (within < lengths[:, None])
        source = (begin[:, None] + within)[mask]
        ids, segments = np.full(mask.shape, pad_id, np.int64), np.zeros(mask.shape, np.int64)
        ids[mask], segments[mask] = self.tokens[source], self.segments[source]
        return Padded(ids, mask, segments, self.store_labels[rows], np.ones(len(rows), np.float32))
