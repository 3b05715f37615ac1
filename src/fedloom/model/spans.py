"""Spans: of a context's tokens a model tells where the answer to a question begins and where it ends.

    ℓ(w) = −½ (log softmax(b)[i] + log softmax(e)[j])        b, e (|w|,): the two logits of every token of window w
    answer = the i ≤ j < i + LONGEST of all windows of a question with the highest b_i + e_j, both tokens of the context

As BERT reads SQuAD (1810.04805, section 4.2): question and context are one pair, [CLS] question [SEP] context [SEP]. A context that does
not fit into the length is cut into windows, each with the whole question; neighbours share :func:`overlap` tokens of context. Every window
is an example. In one that does not hold the whole answer [CLS] is due as begin and as end, so that its context's scores are low (section
4.3). Softmax is over all tokens of the window.

An answer that no window holds whole is torn: it is longer than what neighbours share, and across a border, or longer than a window. Windows
with a part of it have no loss, ℓ = 0: "not here" would be wrong of each. An answer goes from the first to the last character that a token
has; those that the tokenizer drops (an accent, a soft hyphen) are not looked for. One of such characters alone is torn in all windows.

An example's segments are bits: :data:`SECOND` is what the model is given as token type, the others say what is due. This file knows
tokenizers by what they do, not transformers. Shapes: n windows, T tokens, r tokens that are read (all), B rows, L columns.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby, pairwise
from typing import Any, NamedTuple

import numpy as np
import torch

from fedloom.model.reader import Encoded, First

SECOND, CONTEXT, BEGIN, END, FIRST, TORN = 1, 2, 4, 8, 16, 32
"""Of a token: of the second kind to the model; of the context; where the answer begins; its last; and of a window's first token: it is a
question's first window; it has no loss, for it holds a part of a torn answer."""
LONGEST = 30
"""Tokens of an answer at most, when one is looked for."""
NOWHERE = -1e30
"""The score where there is no token to choose."""


class SpanError(ValueError):
    """A tokenizer, a length or a question that no answer can be looked for with; the message says what could."""


class Spans(NamedTuple):
    """at: int64 (r,), places of all tokens among those of a pass, or of a padded batch laid flat. texts: int64 (r,), whose they are.
    place: int64 (r,), which of its window's it is. begin, end: int64 (n,), what is due in each window, as places in ``at``. inside: bool
    (r,), the context's. torn: bool (n,), the windows without a loss. count: number of windows."""

    at: torch.Tensor
    texts: torch.Tensor
    place: torch.Tensor
    begin: torch.Tensor
    end: torch.Tensor
    inside: torch.Tensor
    torn: torch.Tensor
    count: int

    def padded(self, mask: torch.Tensor) -> Spans:
        """The same tokens where the windows are rows of a padded batch with this ``mask`` (B, L)."""
        return self._replace(at=mask.flatten().nonzero()[:, 0][self.at])

    def losses(self, logits: torch.Tensor) -> torch.Tensor:
        """Each window's ℓ (n,), of the ``logits`` (r, 2)."""
        whose = self.texts[:, None].expand_as(logits)
        top = logits.new_full((self.count, 2), -torch.inf).scatter_reduce(0, whose, logits.detach(), "amax")
        sums = logits.new_zeros(self.count, 2).index_add(0, self.texts, (logits - top[self.texts]).exp())
        whole = top + sums.log()
        lost = ((whole[:, 0] - logits[self.begin, 0]) + (whole[:, 1] - logits[self.end, 1])) / 2
        return torch.where(self.torn, 0.0, lost)

    def told(self, logits: torch.Tensor) -> torch.Tensor:
        """What is kept of a prediction, float32 (n, 4): the loss; the highest b_i + e_j of the window; and i and j, as places in it."""
        lost, said, inside = self.losses(logits).float(), logits.float().cpu().numpy(), self.inside.cpu().numpy()
        texts, place = self.texts.cpu().numpy(), self.place.cpu().numpy()
        ends = np.searchsorted(texts, np.arange(self.count + 1))
        best = np.zeros((self.count, 3), np.float32)
        for text, (low, high) in enumerate(pairwise(ends)):
            mine = low + np.flatnonzero(inside[low:high])
            score, i, j = best_span(said[mine, 0], said[mine, 1])
            best[text] = (score, place[mine[i]], place[mine[j]]) if len(mine) else (NOWHERE, 0, 0)
        return torch.cat([lost[:, None], torch.from_numpy(best).to(lost.device)], 1)


def best_span(begin: np.ndarray, end: np.ndarray, longest: int = LONGEST) -> tuple[float, int, int]:
    """(score, i, j) of the i ≤ j < i + ``longest`` with the highest begin_i + end_j, float (k,) each; of equals the first i, then j."""
    if not len(begin):
        return NOWHERE, 0, 0
    after = np.concatenate([end, np.full(longest - 1, -np.inf, end.dtype)])
    both = begin[:, None] + np.lib.stride_tricks.sliding_window_view(after, longest)
    i, more = divmod(int(both.argmax()), longest)
    return float(both[i, more]), i, min(i + more, len(end) - 1)  # beyond the end only where nothing is a number


def overlap(length: int) -> int:
    """Tokens of context that neighbouring windows of ``length`` share: a quarter of it."""
    return length // 4


def first_of(segments: np.ndarray, offsets: np.ndarray) -> np.ndarray:
    """The first window of every question, int64, and last the number of windows."""
    return np.append(np.flatnonzero(segments[offsets[:-1]] & FIRST), len(offsets) - 1)


def torn(segments: np.ndarray, offsets: np.ndarray) -> np.ndarray:
    """Of every question whether no window holds its answer whole, bool."""
    first = first_of(segments, offsets)
    before = np.append(0, np.cumsum((segments[offsets[:-1]] & TORN) > 0))
    return before[first[1:]] > before[first[:-1]]


@dataclass(frozen=True)
class Finder:
    """Questions and contexts as tokens: a :class:`~fedloom.model.reader.ReadsMany`. ``length``: tokens of a window at most.

    Raises:
        SpanError: a tokenizer that tells no characters, or one without a first token of its own; or a length with no room.
    """

    tokenizer: Any
    length: int

    width = 4
    segment = CONTEXT
    place = 0
    cut_from = None

    def __post_init__(self) -> None:
        if not self.tokenizer.is_fast:
            raise SpanError("answers are looked for with a fast tokenizer, which tells the characters of each token")
        made = self.tokenizer("a", "a")
        if made.sequence_ids(0)[0] is not None:
            raise SpanError("this tokenizer puts no token before a question, which would stand for 'no answer here'; give an encoder")
        if self.length < 12:
            raise SpanError(f"--max-length {self.length} leaves no room for a question and its context; give 12 or more")

    @property
    def first_of(self) -> First:
        """:func:`first_of`."""
        return first_of

    @property
    def says(self) -> list[Any]:
        """That they are spans, what windows share, and that torn answers are told apart."""
        return ["spans", overlap(self.length), TORN]

    def encode(self, texts: Sequence[str], others: Sequence[str] | None) -> Encoded:
        """Token ids and segments of all windows of each question, in order. ``others``: the contexts, each after the characters
        [begin, end) of its answer, "BEGIN END CONTEXT".

        Raises:
            SpanError: a question that leaves no room for context, or a context without tokens.
        """
        ids: list[list[int]] = []
        segments: list[list[int]] = []
        contexts = others or [""] * len(texts)
        due = [tuple(map(int, told.split(" ", 2)[:2])) for told in contexts]
        for question, of in groupby(self._windows(texts, contexts), lambda window: window.question):
            windows = list(of)
            begin, end = _covered(windows, *due[question])
            bounds = [window.bounds for window in windows]
            whole = [low <= begin < end <= high for low, high in bounds]
            parts = [not any(whole) and (begin == end or (low < end and begin < high)) for low, high in bounds]
            for window, holds, part in zip(windows, whole, parts, strict=True):
                said = [kind & SECOND | CONTEXT * here for kind, here in zip(window.kinds, window.inside, strict=True)]
                if holds:
                    said[next(i for i in window.mine if window.places[i][1] > begin)] |= BEGIN
                    said[next(i for i in reversed(window.mine) if window.places[i][0] < end)] |= END
                said[0] |= FIRST * (window is windows[0]) | TORN * part
                ids.append(window.ids)
                segments.append(said)
        return ids, segments

    def places(self, questions: Sequence[str], contexts: Sequence[str]) -> np.ndarray:
        """The characters [begin, end) of every token of all windows, int64 (T, 2), as :meth:`encode` cuts them."""
        made = [np.asarray(window.places, np.int64) for window in self._windows(questions, contexts)]
        return np.concatenate([np.zeros((0, 2), np.int64), *made])

    def _windows(self, questions: Sequence[str], contexts: Sequence[str]) -> Iterator[_Window]:
        shared, bare = overlap(self.length), [told.split(" ", 2)[2] for told in contexts]
        asked = self.tokenizer(list(questions), add_special_tokens=False)["input_ids"] if len(questions) else []
        added = self.tokenizer.num_special_tokens_to_add(pair=True)
        for question, tokens in zip(questions, asked, strict=True):
            if self.length - added - len(tokens) <= shared:
                room = max(0, self.length - added - len(tokens))
                raise SpanError(
                    f"a question of {len(tokens)} tokens leaves {room} of the {self.length} of --max-length (or of the model) for its "
                    f"context; more than {shared} must be left, which neighbouring windows share. Give more, or remove the question: "
                    f"{question[:80]!r}"
                )
        if not len(questions):
            return
        how = {"truncation": "only_second", "max_length": self.length, "stride": shared, "return_token_type_ids": True}
        made = self.tokenizer(list(questions), bare, return_overflowing_tokens=True, return_offsets_mapping=True, **how)
        for i, question in enumerate(made["overflow_to_sample_mapping"]):
            inside = [of == 1 for of in made.sequence_ids(i)]
            mine = [at for at, here in enumerate(inside) if here]
            if not mine:
                raise SpanError(f"a context has no tokens ({bare[question][:60]!r}); remove the question {questions[question][:60]!r}")
            yield _Window(question, made["input_ids"][i], made["token_type_ids"][i], inside, mine, made["offset_mapping"][i])

    def kinds_of(self, segments: torch.Tensor) -> torch.Tensor:
        """The bit that tells the two texts apart."""
        return segments & SECOND

    def due(self, ids: np.ndarray, segments: np.ndarray, lengths: np.ndarray, device: torch.device) -> Spans:
        """All of the tokens (T,) of windows of ``lengths`` (n,), one after another, and where answers begin and end."""
        texts = np.repeat(np.arange(len(lengths)), lengths)
        made = (torch.from_numpy(np.asarray(of, np.int64)).to(device) for of in (segments, np.arange(len(segments)), texts, lengths))
        return _spans(*made)

    def due_in_rows(self, ids: torch.Tensor, segments: torch.Tensor, mask: torch.Tensor) -> Spans:
        """The same from a padded batch (B, L)."""
        at = mask.flatten().nonzero()[:, 0]
        return _spans(segments.flatten()[at], at, at // segments.shape[1], mask.sum(1))


def _spans(segments: torch.Tensor, at: torch.Tensor, texts: torch.Tensor, lengths: torch.Tensor) -> Spans:
    """Of tokens with these ``segments``, places and windows (r,), windows of ``lengths`` (n,)."""
    starts, rows = torch.cumsum(lengths, 0) - lengths, torch.arange(len(segments), device=segments.device)
    begin, end = (
        torch.full_like(starts, -1).scatter_reduce(0, texts, torch.where((segments & bit) > 0, rows, -1), "amax") for bit in (BEGIN, END)
    )
    whole = (begin >= 0) & (end >= 0)  # a window that was cut short may have lost one of the two
    due, lost = (torch.where(whole, of, starts) for of in (begin, end)), (segments[starts] & TORN) > 0
    return Spans(at, texts, rows - starts[texts], *due, inside=(segments & CONTEXT) > 0, torn=lost, count=len(lengths))


class _Window(NamedTuple):
    """Number of its question; of each token: id, kind, whether it is the context's; which these are; of each token: characters."""

    question: int
    ids: list[int]
    kinds: list[int]
    inside: list[bool]
    mine: list[int]
    places: list[tuple[int, int]]

    @property
    def bounds(self) -> tuple[int, int]:
        """The characters of the context that the window goes from and to."""
        return self.places[self.mine[0]][0], self.places[self.mine[-1]][1]


def _covered(windows: Sequence[_Window], begin: int, end: int) -> tuple[int, int]:
    """Of an answer's characters [begin, end) those from the first to the last that a token has; [begin, begin) where none has any."""
    of = [window.places[i] for window in windows for i in window.mine]
    held = [(max(begin, low), min(end, high)) for low, high in of if max(begin, low) < min(end, high)]
    return (min(low for low, _ in held), max(high for _, high in held)) if held else (begin, begin)
