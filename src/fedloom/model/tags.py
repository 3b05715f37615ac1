"""Tags: a model tells one of C tags for every word, read at the word's first piece.

    ℓ(s) = −(1/|s|) Σ_w log softmax(z_w)[t_w]      z_w (C,): the logits at the first piece of word w, as in BERT (1810.04805, section 5.3)

Of an example's tokens the first piece of a word with tag t has segment t + 1, all others 0; the model itself is given no segments. Words
that do not fit into the length are neither trained nor scored. The mean over an example's words makes every example count alike.

This file knows tokenizers by what they do, not transformers. Shapes: n texts, r words, C tags.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from fedloom.model.asked import Asked
from fedloom.model.reader import Encoded
from fedloom.telling import Tellable

MOST = 126
"""Tags at most: a segment is kept in a byte."""


class TagError(ValueError, Tellable):
    """A tokenizer or tags that words cannot be tagged with; the message says what could."""


def entities(tags: np.ndarray, names: Sequence[str]) -> set[tuple[str, int, int]]:
    """(type, first word, word behind the last) of every entity that tags (r,) tell, as CoNLL's script reads them: one begins at B-TYPE, and
    at I-TYPE behind anything but that type; it ends before anything but I-TYPE of its own."""
    found, begun, kind = set(), 0, ""
    for place, tag in enumerate([*tags.tolist(), None]):
        name = "O" if tag is None else names[tag]
        mine = name[2:] if name != "O" else ""
        if kind and (name[:2] != "I-" or mine != kind):
            found.add((kind, begun, place))
            kind = ""
        if mine and not kind:
            kind, begun = mine, place
    return found


@dataclass(frozen=True)
class Tagger:
    """Sentences of words as tokens: a :class:`~fedloom.model.reader.ReadsMany`. ``between``: what stands between the words of a text.
    ``length``: tokens of an example at most.

    Raises:
        TagError: a tokenizer that tells no words, or more tags than a byte holds.
    """

    tokenizer: Any
    tags: tuple[str, ...]
    between: str
    length: int

    width = 6
    segment = 1
    place = 0
    first_of = None

    def __post_init__(self) -> None:
        if not self.tokenizer.is_fast:
            raise TagError("tagging needs a fast tokenizer, which tells the word of each piece")
        if len(self.tags) > MOST:
            raise TagError(f"{len(self.tags)} tags came; at most {MOST} can be kept")
        if (added := self.tokenizer.num_special_tokens_to_add()) >= self.length:
            raise TagError(f"--max-length {self.length} leaves no room for a word: {added} tokens are added to each sentence; give more")

    @property
    def cut_from(self) -> int:
        """A full length."""
        return self.length

    @property
    def says(self) -> list[Any]:
        """That they are tags, and what stands between words."""
        return ["tags", self.between]

    def encode(self, texts: Sequence[str], others: Sequence[str] | None) -> Encoded:
        """Token ids and segments (t + 1 at a word's first piece, else 0) of each sentence, ``length`` at most. ``others``: their tags."""
        tags = others or [""] * len(texts)
        words = [text.split(self.between) for text in texts]
        made = self.tokenizer(words, is_split_into_words=True, truncation=True, max_length=self.length)
        segments = []
        for i, due in enumerate(tags):
            ids, before, mine = [int(tag) for tag in due.split()], None, []
            for word in made.word_ids(i):
                mine.append(ids[word] + 1 if word is not None and word != before and word < len(ids) else 0)
                before = word
            segments.append(mine)
        return made["input_ids"], segments

    def kinds_of(self, segments: torch.Tensor) -> torch.Tensor:
        """One kind: segments tell tags."""
        return torch.zeros_like(segments)

    def due(self, ids: np.ndarray, segments: np.ndarray, lengths: np.ndarray, device: torch.device) -> Asked:
        """The words' first pieces, from the segments (T,) of texts of ``lengths`` (n,), one after another."""
        at = np.flatnonzero(segments > 0)
        texts = np.repeat(np.arange(len(lengths)), lengths)[at]
        made = (torch.from_numpy(np.asarray(of, np.int64)).to(device) for of in (at, segments[at] - 1, texts))
        return Asked(*made, count=len(lengths), also=self.counted)

    def due_in_rows(self, ids: torch.Tensor, segments: torch.Tensor, mask: torch.Tensor) -> Asked:
        """The same from a padded batch (B, L)."""
        at = (mask & (segments > 0)).flatten().nonzero()[:, 0]
        return Asked(at, segments.flatten()[at] - 1, at // segments.shape[1], len(segments), self.counted)

    def counted(self, predicted: np.ndarray, due: np.ndarray) -> np.ndarray:
        """Of a sentence's tags (r,): entities found, predicted, and there, float32 (3,)."""
        said, true = entities(predicted, self.tags), entities(due, self.tags)
        return np.array([len(said & true), len(said), len(true)], np.float32)
