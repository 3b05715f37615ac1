"""Tagging: a tag for every word of a sentence, such as the names in it; scored by whole entities.

A sentence is a list of words, with a list of tags beside it: O, and B-TYPE and I-TYPE for the words that begin and go on an entity. Devices
are skewed by a sentence's type: that of its first entity, or "none". Knows nothing of tokenizers, models or devices.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from fedloom.data.tasks import ENTITY_F1, Column, DataError, Outcomes
from fedloom.messages import DIVERGED

if TYPE_CHECKING:
    from fedloom.data.rows import Rows

WORDS = ("tokens", "words", "text", "sentence")
TAGS = ("ner_tags", "tags", "labels", "label", "ner", "pos_tags", "chunk_tags")
WORD_ACCURACY = "word_accuracy"
COUNTED, RIGHT = "words", "words_right"
"""What a device that is elsewhere tells of its words: how many there are, and how many are tagged rightly."""
TYPE = "entity type"
"""The column that is made: what a sentence is counted as, where devices are skewed by labels."""
NONE = "none"
BETWEEN = "\x1f"
"""Between the words of a sentence, where it is kept as one text: a character that no word holds."""


@dataclass(frozen=True)
class Tagging:
    """A tag a word. ``words``, ``tagged``: the columns of words and of their tags. ``tags``: the tags' names; the index is the id.
    ``classes``: the entities' types, and none."""

    words: str
    tagged: str
    tags: tuple[str, ...]
    classes: tuple[str, ...]
    label: str = TYPE

    @property
    def metric(self) -> str:
        """The headline."""
        return ENTITY_F1

    @property
    def further(self) -> tuple[str, ...]:
        """The share of words that are tagged rightly."""
        return (WORD_ACCURACY,)

    @property
    def unit(self) -> int:
        """Entities are counted."""
        return 1

    @property
    def texts(self) -> tuple[str, ...]:
        """Every column that is read."""
        return (self.words, self.tagged)

    @property
    def told(self) -> str:
        """What is read, for a person."""
        return f"words {self.words}, tags {self.tagged} ({len(self.tags)}: {', '.join(self.tags[:4])} …), skewed by {self.label}"

    def written(self, rows: Rows) -> list[list[str]]:
        """The words and the tags of all sentences, each as one text."""
        return [rows[self.words], rows[self.tagged]]

    def scores(self, labels: np.ndarray, made: np.ndarray) -> dict[str, float]:
        """F1 of whole entities (:data:`ENTITY_F1`; 0 where there are none and none is predicted), and the share of words tagged rightly.

        Raises:
            DataError: no word, or a number that is not finite.
        """
        words = float(made[:, 2].sum(dtype=np.float64)) if made.ndim == 2 and made.shape[1] == 6 else 0.0
        if not words:
            raise DataError(f"scores take what was predicted of sentences, (n, 6), with a word at least, and got {made.shape}")
        if not np.isfinite(made).all():
            row = int(np.flatnonzero(~np.isfinite(made).all(1))[0])
            where = f"the loss of example {row} is not finite; {DIVERGED}"
            raise DataError(where, where)
        right, predicted, true = made[:, 3:].sum(0, dtype=np.float64)
        return {ENTITY_F1: float(2 * right / max(predicted + true, 1)), WORD_ACCURACY: float(made[:, 1].sum(dtype=np.float64) / words)}

    def loss(self, labels: np.ndarray, made: np.ndarray) -> float:
        """The mean over all words of −log softmax."""
        return float(made[:, 0].sum(dtype=np.float64) / made[:, 2].sum(dtype=np.float64))

    def outcomes(self, labels: np.ndarray, made: np.ndarray) -> Outcomes:
        """Entities of every sentence: found (class 1 told as 1), missed (1 as 0), and predicted where there are none (0 as 1)."""
        right, predicted, true = np.rint(made[:, 3:]).astype(np.int64).T
        n = len(made)
        each = np.concatenate([right, true - right, predicted - right])
        return Outcomes(np.tile(np.arange(n), 3), np.repeat([1, 1, 0], n), np.repeat([1, 0, 1], n), each)


def choose_columns(columns: Mapping[str, Column], text: Sequence[str], label: str) -> tuple[str, str]:
    """(words' column, tags' column): those named, else by name, else the only one of its kind.

    Raises:
        DataError: a named column does not exist or is none, or nothing fits.
    """
    listed = ", ".join(columns) or "none"
    for name in (*text, *([label] if label else [])):
        if name not in columns:
            raise DataError(f"the training data has no column '{name}'; its columns are: {listed}")
    lists = {name: c.kind for name, c in columns.items() if c.kind in ("words", "numbers")}
    words = list(text) or _best([n for n, kind in lists.items() if kind == "words" and n != label], WORDS)
    tags = [label] if label else _best([n for n in lists if n not in words], TAGS)
    if len(words) != 1 or lists.get(words[0]) != "words":
        raise DataError(f"tagging needs one column of lists of words, and {words or 'none'} came; name it with text= (--text): {listed}")
    if len(tags) != 1 or tags[0] not in lists or tags == words:
        raise DataError(f"tagging needs one column of lists of tags, and {tags or 'none'} came; name it with label= (--label): {listed}")
    return words[0], tags[0]


def _best(found: list[str], known: Sequence[str]) -> list[str]:
    lower = {name.lower(): name for name in reversed(found)}
    return [lower[name] for name in known if name in lower][:1] or (found if len(found) == 1 else [])


def looks_like_tagging(columns: Mapping[str, Column], alike: Callable[[str, str], bool]) -> bool:
    """Whether there is a column named like tags and another of words beside it, ``alike`` in how long their lists are."""
    words = [name for name, column in columns.items() if column.kind == "words"]
    tags = [name for name, column in columns.items() if column.kind in ("words", "numbers") and name.lower() in TAGS]
    return any(alike(word, tag) for tag in tags for word in words if word != tag)


def as_texts(
    words: Sequence[Sequence[str] | None],
    tags: Sequence[Sequence[str | int] | None],
    names: Sequence[str],
    where: str,
    numbered: Sequence[str] | None = None,
) -> tuple[list[str], list[str], list[str]]:
    """Of every sentence: its words as one text, the ids of its tags as one text, and its type. An id is a tag's place among ``names``. A
    sentence may have no word, as the empty lines of CoNLL's files are one: it is of the type "none", and nothing of it is read.

    ``numbered``: the names that numbers in ``tags`` stand for, which the very file must give them that they are from.

    Raises:
        DataError: a sentence whose words or tags are missing, other numbers of them, a word that is missing, a number that stands for no
            name, or a tag that is none of the ``names``.
    """
    ids = {name: i for i, name in enumerate(names)}
    made: tuple[list[str], list[str], list[str]] = ([], [], [])
    for row, (mine, theirs) in enumerate(zip(words, tags, strict=True)):
        if mine is None or theirs is None or len(mine) != len(theirs):
            had = f"{'no' if mine is None else len(mine)} words and {'no' if theirs is None else len(theirs)} tags"
            raise DataError(f"row {row} of {where} has {had}; every word needs a tag", f"row {row} of {where} has words without a tag each")
        if any(word is None or BETWEEN in word for word in mine):
            what = f"row {row} of {where} has a word that is missing or holds the character U+001F"
            raise DataError(what, what)
        if numbered is None and any(isinstance(tag, int) for tag in theirs):
            what = f"row {row} of {where} has tags that are numbers without names"
            raise DataError(f"{what}; give them as words: O, B-TYPE, I-TYPE", what)
        known = numbered or ()
        if beyond := [tag for tag in theirs if isinstance(tag, int) and not 0 <= tag < len(known)]:
            raise DataError(
                f"row {row} of {where} has the tag {beyond[0]}, and its names number 0 to {len(known) - 1}: {', '.join(known)}",
                f"row {row} of {where} has a tag without a name",
            )
        told = [known[tag] if isinstance(tag, int) else tag for tag in theirs]
        if odd := [tag for tag in told if tag not in ids]:
            raise DataError(
                f"row {row} of {where} has the tag {odd[0]!r}; the tags are: {', '.join(names)}",
                f"row {row} of {where} has a tag that is none of the server's",
            )
        first = next((str(tag) for tag in told if tag != "O"), "")
        made[0].append(BETWEEN.join(mine))
        made[1].append(" ".join(str(ids[tag]) for tag in told))  # type: ignore[index]
        made[2].append(first.partition("-")[2] or first or NONE)
    return made


def types_of(tags: Sequence[str]) -> tuple[str, ...]:
    """The entities' types that tags tell, in order, and none.

    Raises:
        DataError: no tag O, or one that is neither B-TYPE nor I-TYPE.
    """
    if odd := [tag for tag in tags if tag != "O" and tag[:2] not in ("B-", "I-")]:
        raise DataError(f"tags are O, B-TYPE and I-TYPE, and {odd[0]!r} is none of them; the data has: {', '.join(tags)}")
    if "O" not in tags or len(tags) < 2:
        raise DataError(f"tags are O, B-TYPE and I-TYPE; the data has: {', '.join(tags) or 'none'}")
    return (*dict.fromkeys(tag[2:] for tag in tags if tag != "O"), NONE)
