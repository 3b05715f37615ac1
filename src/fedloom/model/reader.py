"""Readers: how a task's texts are put before a model, which of their tokens its head reads, and what is due there.

There are five. Two are read at one place: :class:`Whole`, for classes of whole texts, and ``Filler`` (``cloze.py``), for the same as a
language model's own task. Of three many tokens are read (:class:`ReadsMany`): ``Speaker`` (``answers.py``), ``Tagger`` (``tags.py``) and
``Finder`` (``spans.py``). A model has one of them, :attr:`~fedloom.model.base.Model.reader`.

This file knows tokenizers by what they do, not transformers. Shapes: n texts, T tokens in all, B rows, L columns.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
import torch

from fedloom.telling import Tellable

if TYPE_CHECKING:
    from fedloom.model.asked import Asked
    from fedloom.model.spans import Spans

Encoded = tuple[list[list[int]], list[list[int]]]
"""Token ids and segment ids of each example."""
First = Callable[[np.ndarray, np.ndarray], np.ndarray]
"""(segments, offsets) -> the first example of every row, int64, and last the number of examples."""


class TextError(ValueError, Tellable):
    """Texts that cannot be put before a model; the message says what would help."""


class Reader(Protocol):
    """What every model asks of its task."""

    @property
    def place(self) -> int:
        """Where one token is read, as a position in texts that are padded on the right."""
        ...

    @property
    def cut_from(self) -> int | None:
        """Tokens that every text has at least which was cut; None where long ones become several examples."""
        ...

    @property
    def says(self) -> list[Any]:
        """What the tokens depend on beside texts, tokenizer and length, as plain JSON."""
        ...

    def encode(self, texts: Sequence[str], others: Sequence[str] | None) -> Encoded:
        """Token ids and segment ids of each text with what comes with it: its pair, answer, tags or context."""
        ...


class ReadsMany(Reader, Protocol):
    """What a model asks whose head reads many tokens of a text: those before each of an answer, every word's first, or all."""

    @property
    def width(self) -> int:
        """Numbers kept of each example's prediction."""
        ...

    @property
    def segment(self) -> int:
        """The segment number of all tokens of a made-up text: as the task's have, and of the first kind to the model."""
        ...

    @property
    def first_of(self) -> First | None:
        """Where a row may become several examples, what finds the first of each row."""
        ...

    def kinds_of(self, segments: torch.Tensor) -> torch.Tensor:
        """The token types among what ``segments`` say; those also say what is due."""
        ...

    def due(self, ids: np.ndarray, segments: np.ndarray, lengths: np.ndarray, device: torch.device) -> Asked | Spans:
        """Which of the tokens (T,) of texts of ``lengths`` (n,), one after another, are read, and what is due there."""
        ...

    def due_in_rows(self, ids: torch.Tensor, segments: torch.Tensor, mask: torch.Tensor) -> Asked | Spans:
        """The same from a padded batch (B, L)."""
        ...


@dataclass(frozen=True)
class Whole:
    """Texts, or pairs of texts, each of one class. ``length``: tokens of an example at most."""

    tokenizer: Any
    length: int

    place = 0

    @property
    def cut_from(self) -> int:
        """A full length."""
        return self.length

    @property
    def says(self) -> list[Any]:
        """Nothing more."""
        return []

    def encode(self, texts: Sequence[str], others: Sequence[str] | None) -> Encoded:
        """Token ids and segment ids of each text or pair, cut to ``length``; at least one token each.

        Raises:
            TextError: the tokens that the tokenizer adds to a text take all of ``length``.
        """
        if (added := self.tokenizer.num_special_tokens_to_add(pair=others is not None)) >= self.length:
            what = "pair of texts" if others is not None else "text"
            raise TextError(f"--max-length {self.length} leaves no room for a {what}: {added} tokens are added to each; give more")
        made = self.tokenizer(texts, others, truncation=True, max_length=self.length, return_token_type_ids=True)
        ids = [row or [self.tokenizer.pad_token_id] for row in made["input_ids"]]
        return ids, [row or [0] for row in made["token_type_ids"]]
