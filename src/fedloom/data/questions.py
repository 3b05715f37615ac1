"""Questions: of a context that is given, the words that answer a question (extractive question answering); scored as SQuAD scores them.

Of SQuAD (1606.05250), section 6.1: both what is found and what is due are lowered in case and lose punctuation, the articles a, an, the
and superfluous white space (:func:`normalised`); *exact match* is whether they are then equal, *F1* the harmonic mean of the shares of
words that they have in common. Of several answers that are due the best counts, for each of the two by itself.

Devices are skewed by the article that a question's context is from. Knows nothing of tokenizers, windows, models or devices.
"""

from __future__ import annotations

import json
import re
import string
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from fedloom.data.tasks import ANSWER_F1, Column, DataError, Outcomes
from fedloom.messages import DIVERGED

if TYPE_CHECKING:
    from fedloom.data.rows import Rows

QUESTIONS = ("question", "query")
CONTEXTS = ("context", "passage", "paragraph")
ANSWERS = ("answers", "answer")
HELD = ("answers", "string", "words")
"""In which kinds of column answers come."""
ARTICLES = ("title", "article", "category", "topic", "article of the context")
EXACT = "exact_match"
ARTICLE = "article of the context"
"""The column that is made: what a question is counted as, where devices are skewed by labels."""
OTHER = "(others)"
"""The articles that no training question is about."""
EVERYTHING = "all"
"""The one article of data that names none."""
PARTS = 100_000
"""In how many parts a question's F1 is counted, for counts are whole numbers."""


@dataclass(frozen=True)
class Questions:
    """A question, its context, and the answers that are due. ``question``, ``context``, ``answers``: their columns. ``classes``: the
    articles."""

    question: str
    context: str
    answers: str
    classes: tuple[str, ...]
    label: str = ARTICLE

    @property
    def metric(self) -> str:
        """The headline."""
        return ANSWER_F1

    @property
    def further(self) -> tuple[str, ...]:
        """The share of exact matches."""
        return (EXACT,)

    @property
    def unit(self) -> int:
        """Counts that make one question."""
        return PARTS

    @property
    def texts(self) -> tuple[str, ...]:
        """Every column that is read."""
        return (self.question, self.context, self.answers)

    @property
    def told(self) -> str:
        """What is read, for a person."""
        return f"question {self.question}, context {self.context}, answers {self.answers}, skewed by {self.label} ({len(self.classes)})"

    def written(self, rows: Rows) -> list[list[str]]:
        """The questions; and the contexts, each with where its answer is, as :func:`with_place` writes them."""
        places = (place_of(json.loads(answers)) for answers in rows[self.answers])
        return [rows[self.question], [with_place(text, place) for text, place in zip(rows[self.context], places, strict=True)]]

    def scores(self, labels: np.ndarray, made: np.ndarray) -> dict[str, float]:
        """The means over questions of F1 (:data:`ANSWER_F1`) and of exact match, from ``made`` (n, 3): loss, F1, exact match.

        Raises:
            DataError: no question, or a number that is not finite.
        """
        if made.ndim != 2 or made.shape[1] != 3 or not len(made):
            raise DataError(f"scores take what was found for n > 0 questions, (n, 3), and got {made.shape}")
        if not np.isfinite(made).all():
            row = int(np.flatnonzero(~np.isfinite(made).all(1))[0])
            where = f"the loss of example {row} is not finite; {DIVERGED}"
            raise DataError(where, where)
        return {ANSWER_F1: float(made[:, 1].mean(dtype=np.float64)), EXACT: float(made[:, 2].mean(dtype=np.float64))}

    def loss(self, labels: np.ndarray, made: np.ndarray) -> float:
        """The mean over questions of the mean over a question's windows."""
        return float(made[:, 0].mean(dtype=np.float64))

    def outcomes(self, labels: np.ndarray, made: np.ndarray) -> Outcomes:
        """Of each question :data:`PARTS` parts, as many of them right (class 0 told as 0) as its F1 says and the rest not (0 told as 1)."""
        right = np.rint(made[:, 1] * PARTS).astype(np.int64)
        example, zero = np.arange(len(made)), np.zeros(len(made), np.int64)
        return Outcomes(np.tile(example, 2), np.tile(zero, 2), np.concatenate([zero, zero + 1]), np.concatenate([right, PARTS - right]))


def normalised(text: str) -> str:
    """The text as SQuAD's script compares it.

    >>> normalised("The  U.S. Army's")
    'us armys'
    """
    bare = "".join(character for character in text.lower() if character not in string.punctuation)
    return " ".join(re.sub(r"\b(a|an|the)\b", " ", bare).split())


def exact(said: str, due: str) -> float:
    """1 where the two are equal once normalised, else 0."""
    return float(normalised(said) == normalised(due))


def f1(said: str, due: str) -> float:
    """2 · common / (said + due), in words once normalised; 0 where they have none in common, as SQuAD's script has it."""
    mine, theirs = normalised(said).split(), normalised(due).split()
    common = sum((Counter(mine) & Counter(theirs)).values())
    return 2 * common / (len(mine) + len(theirs)) if common else 0.0


def marks(said: str, due: Sequence[str]) -> tuple[float, float]:
    """(F1, exact match) against the best of the answers that are due."""
    return max(f1(said, one) for one in due), max(exact(said, one) for one in due)


def with_place(context: str, place: tuple[int, int]) -> str:
    """Context and the characters [begin, end) of its answer, as one text."""
    return f"{place[0]} {place[1]} {context}"


def place_of(answers: Sequence[tuple[str, int]]) -> tuple[int, int]:
    """The characters of the first answer whose place is known."""
    return next((begin, begin + len(text)) for text, begin in answers if begin >= 0)


def golds(answers: str) -> list[str]:
    """The texts of the answers as :func:`as_texts` keeps them."""
    return [text for text, _ in json.loads(answers)]


def placed(answers: str) -> dict[str, list[Any]]:
    """The same as data sets of the Hub have it."""
    found = json.loads(answers)
    return {"text": [text for text, _ in found], "answer_start": [begin for _, begin in found]}


def as_texts(contexts: Sequence[str | None], answers: Sequence[Any], where: str) -> list[str]:
    """Of every question its answers, as JSON of [text, first character]; −1 where a text is not in the context.

    Where the data names no place, or one that holds something else, it is the first place in the context that holds the text.

    Raises:
        DataError: no answer, or none that is in the context.
    """
    made = []
    for row, (context, given) in enumerate(zip(contexts, answers, strict=True)):
        found = []
        for text, begin in _each(given):
            if not text or not (bare := text.strip()):
                continue
            begin = -1 if begin is None else int(begin) + len(text) - len(text.lstrip())
            held = begin >= 0 and (context or "")[begin : begin + len(bare)] == bare
            found.append((bare, begin if held else (context or "").find(bare)))
        if not found:
            what = f"row {row} of {where} has no answer"
            raise DataError(f"{what}; every question needs one that stands in its context: remove the row", what)
        if all(begin < 0 for _, begin in found):
            what = f"row {row} of {where} has an answer that is not in its context"
            raise DataError(f"{what}: {found[0][0][:60]!r}; remove the row", what)
        made.append(json.dumps(found, ensure_ascii=False))
    return made


def _each(given: Any) -> Iterable[tuple[str | None, int | None]]:
    """(text, first character or None) of each answer, in any of the shapes that answers come in."""
    if isinstance(given, dict):
        texts, begins = given.get("text"), given.get("answer_start")
        if isinstance(texts, list):
            begins = begins if isinstance(begins, list) and len(begins) == len(texts) else [None] * len(texts)
            return zip(texts, begins, strict=True)
        return [(texts, begins)]
    if isinstance(given, list):
        return [pair for one in given for pair in _each(one)]
    return [(given, None)]


def articles_of(names: Sequence[str | None], known: Sequence[str]) -> list[int]:
    """The number of each question's article among the ``known``; of one that is not among them the number of :data:`OTHER`."""
    number = {name: i for i, name in enumerate(known)}
    return [number.get(str(name), len(known)) for name in names]


def choose_columns(columns: Mapping[str, Column], text: Sequence[str], label: str) -> tuple[str, str, str, str]:
    """(question, context, answers, article or ""): the columns that are named, else by name.

    Raises:
        DataError: a named column does not exist or holds something else, or nothing fits.
    """
    listed = ", ".join(columns) or "none"
    for name in (*text, *([label] if label else [])):
        if name not in columns:
            raise DataError(f"the training data has no column '{name}'; its columns are: {listed}")
    if text and not len(set(text)) == len(text) == 3:
        raise DataError(f"questions are read from three columns, question, context and answers, not {list(text)}: --text and three names")
    kinds = (("string",), ("string",), HELD)
    found = list(text) or [_named(columns, names, of) for names, of in zip((QUESTIONS, CONTEXTS, ANSWERS), kinds, strict=True)]
    for what, name, of in zip(("question", "context", "answers"), found, kinds, strict=True):
        if not name or columns[name].kind not in of:
            had = f"'{name}' is none" if name else "no column looks like it"
            raise DataError(
                f"a question has a column with its {what}, and {had}; name the three (--text QUESTION CONTEXT ANSWERS): {listed}"
            )
    article = label or _named({name: c for name, c in columns.items() if c.repeats and name not in found}, ARTICLES, None)
    return found[0], found[1], found[2], article


def _named(columns: Mapping[str, Column], names: Sequence[str], kinds: Sequence[str] | None) -> str:
    lower = {name.lower(): name for name, column in reversed(list(columns.items())) if kinds is None or column.kind in kinds}
    return next((lower[name] for name in names if name in lower), "")


def looks_like_questions(columns: Mapping[str, Column]) -> bool:
    """Whether there are a question, a context, and answers with their places."""
    named = [_named(columns, names, kinds) for names, kinds in ((QUESTIONS, ["string"]), (CONTEXTS, ["string"]), (ANSWERS, ["answers"]))]
    return all(named)
