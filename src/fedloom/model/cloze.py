"""Cloze heads: classification as a language model's own task. The text is put into a template, and the model's answer at the gap is read
for one word a class (Schick & Schütze, 2001.07676).

    logits[c] = w_c · t(h_gap) + b_c,    (w_c, b_c): the language model's output row of class c's word, t: its transform before that

A masked model fills ``{mask}``, which stands *before* the text, so that it is at the same place in every example; a causal model continues
after the template, whose ``{mask}`` is at its end. A word of several pieces is represented by the mean of their rows. Only the rows of the
words are ever multiplied: the output layer is replaced by one of C rows. Nothing of the head is new and nothing of it is trained.

This file knows tokenizers and modules by what they do, not transformers.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import nn

from fedloom.model.reader import Encoded, Whole
from fedloom.telling import Tellable

FIELD = re.compile(r"\{(\w*)\}")


class ClozeError(ValueError, Tellable):
    """A template or words that do not make a cloze; the message says what would."""


@dataclass(frozen=True)
class Cloze:
    """``template``: a sentence with ``{mask}``, ``{text}`` and, if examples are ``paired``, ``{pair}``; a causal model's is ``after``, if
    there is one. ``words``: one for each class, in order."""

    template: str
    words: tuple[str, ...]
    paired: bool = False
    after: str = ""

    def check(self, causal: bool, classes: int) -> None:
        """Refuse what makes no cloze.

        Raises:
            ClozeError: a field is missing, unknown, there twice or in the wrong place; not one word a class, or two alike.
        """
        fields = FIELD.findall(self.template)
        due = ["mask", "text", *(["pair"] if self.paired else [])]
        if sorted(fields) != sorted(due):
            raise ClozeError(f"the template {self.template!r} has the fields {fields}; it must have each of {due} once")
        if causal and not self.template.endswith("{mask}"):
            raise ClozeError(f"the template {self.template!r} must end with {{mask}}: a causal model answers after it")
        if not causal and fields[0] != "mask":
            raise ClozeError(
                f"the template {self.template!r} must have {{mask}} before {{{fields[0]}}}: the gap is at one place in all texts"
            )
        if len(self.words) != classes or len(set(self.words)) != classes or not all(word.strip() for word in self.words):
            raise ClozeError(f"there are {classes} classes and the words {list(self.words)}; each class needs one of its own")


@dataclass(frozen=True)
class Filler:
    """A cloze and the tokenizer that it is filled for: a :class:`~fedloom.model.reader.Reader`. ``length``: tokens of an example."""

    cloze: Cloze
    tokenizer: Any
    causal: bool
    length: int

    def __post_init__(self) -> None:
        if not self.tokenizer.is_fast:
            raise ClozeError("a cloze needs a fast tokenizer, which tells the characters of each token")
        if not self.causal and self.tokenizer.mask_token is None:
            raise ClozeError("this tokenizer has no mask token, and a masked model fills that; give a causal model, or --head linear")
        if self.room < 1:
            raise ClozeError(f"the template {self.cloze.template!r} alone fills the {self.length} tokens of --max-length; give more")

    @cached_property
    def template(self) -> str:
        """The template with its gap: the mask token, or nothing after a causal model's."""
        return self.cloze.template.replace("{mask}", "" if self.causal else self.tokenizer.mask_token).rstrip()

    @cached_property
    def room(self) -> int:
        """Tokens that are left for texts."""
        empty = FIELD.sub("", self.template)
        return self.length - len(self.tokenizer(empty)["input_ids"]) - 2  # where a text meets the template, pieces may part otherwise

    @property
    def cut_from(self) -> int:
        """Texts are cut between characters, and some tokens stay free: counted as eight, which is more than there were."""
        return self.length - 8

    @property
    def says(self) -> list[Any]:
        """The template."""
        return [self.template]

    @property
    def place(self) -> int:
        """The gap."""
        return self.gap

    @cached_property
    def gap(self) -> int:
        """The place of the answer in every example: the mask's, or the last."""
        if self.causal:
            return -1
        return self.tokenizer(FIELD.sub("", self.template))["input_ids"].index(self.tokenizer.mask_token_id)

    def fill(self, texts: Sequence[str], pairs: Sequence[str] | None) -> list[str]:
        """The template with each text in it, the longer one of a pair cut at its end until both fit. The template is never cut."""
        columns = [
            [text.replace(self.tokenizer.mask_token or "\0", " ") for text in column] for column in (texts, pairs) if column is not None
        ]
        starts = [[self._ends(text) for text in column] for column in columns]
        made = []
        for i in range(len(texts)):
            counts = [len(column[i]) for column in starts]
            while sum(counts) > self.room:
                over = sum(counts) - self.room
                longest = max(range(len(counts)), key=lambda j: counts[j])
                other = max((c for j, c in enumerate(counts) if j != longest), default=0)
                counts[longest] -= min(over, max(1, counts[longest] - other))
            cut = [column[i][: ends[i][n - 1] if n else 0] for column, ends, n in zip(columns, starts, counts, strict=True)]
            fields: dict[str, str] = dict(zip(["text", "pair"], cut, strict=False))
            made.append(FIELD.sub(lambda found, fields=fields: fields[found[1]], self.template))
        return made

    def encode(self, texts: Sequence[str], others: Sequence[str] | None) -> Encoded:
        """Each text, or pair, in the template."""
        return Whole(self.tokenizer, self.length).encode(self.fill(texts, others), None)

    def _ends(self, text: str) -> list[int]:
        """Where each token of a text ends, in characters."""
        return [end for _, end in self.tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)["offset_mapping"]]

    def pieces(self, word: str) -> list[int]:
        """The token ids of a word as it stands after a space, by whichever way of asking gives fewer."""
        ways = [self.tokenizer(text, add_special_tokens=False)["input_ids"] for text in (f" {word}", word)]
        found = min(ways, key=len)
        if not found or self.tokenizer.unk_token_id in found:
            raise ClozeError(f"the tokenizer does not know the word {word!r} ({found}); name another with --label-words")
        return found


def keep_rows(lm: Any, filler: Filler) -> None:
    """Replace the output layer of ``lm`` by the words' rows, in place: (…, V) becomes (…, C).

    Raises:
        ClozeError: the model has no output layer, or two words the same pieces.
    """
    old = lm.get_output_embeddings()
    if old is None:
        raise ClozeError(f"{type(lm).__name__} tells no output layer; give --head linear")
    ids = [filler.pieces(word) for word in filler.cloze.words]
    if len({tuple(sorted(one)) for one in ids}) < len(ids):
        raise ClozeError(f"two of the words {list(filler.cloze.words)} are the same to this tokenizer; name others with --label-words")
    bias = old.bias
    new = nn.Linear(old.weight.shape[1], len(ids), bias=bias is not None)
    with torch.no_grad():
        new.weight.copy_(torch.stack([old.weight[one].mean(0) for one in ids]))
        if bias is not None:
            new.bias.copy_(torch.stack([bias[one].mean() for one in ids]))
    lm.set_output_embeddings(new)
