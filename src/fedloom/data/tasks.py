"""Tasks: which columns are read and how predictions are scored; here classification of single sentences and sentence pairs.

Knows nothing of where the data came from (``sources.py``), of tokenizers or of devices. Other kinds of task are in ``instructions.py``,
``tagging.py`` and ``questions.py``.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, NamedTuple, Protocol, get_args

import numpy as np

from fedloom.messages import DIVERGED
from fedloom.telling import Tellable

if TYPE_CHECKING:  # PyArrow is not needed to know what tasks there are
    from fedloom.data.rows import Rows

Split = Literal["train", "validation", "test"]
SPLITS: tuple[Split, ...] = ("train", "validation", "test")
HELD_OUT: tuple[Split, ...] = ("validation", "test")
METRICS = ("accuracy", "mcc", "f1")
TOKEN_ACCURACY, ENTITY_F1, ANSWER_F1 = "token_accuracy", "entity_f1", "answer_f1"
"""The headlines of answers, of tags, and of answers that are found: one each, whatever is asked for."""
TaskKind = Literal["auto", "classification", "instructions", "text", "chat", "tagging", "qa"]
LISTS = (
    "several labels a row (multi-label) are not supported; lists are read as tags, beside lists of as many words (--task tagging); "
    f"--task is one of {', '.join(get_args(TaskKind))}"
)
"""What to say where labels are lists."""

PAIRS = (
    ("sentence1", "sentence2"),
    ("premise", "hypothesis"),
    ("question", "sentence"),
    ("question1", "question2"),
    ("text_a", "text_b"),
    ("text1", "text2"),
    ("sentence_a", "sentence_b"),
    ("question", "passage"),
    ("question", "context"),
)
TEXTS = (
    "text", "sentence", "question", "content", "review", "tweet", "comment", "utterance", "query", "message", "document",
    "body", "headline", "description",
)  # fmt: skip
LABELS = ("label", "labels", "coarse_label", "class", "target", "category", "intent")


class DataError(Tellable, ValueError):
    """Something about the data is wrong. The message says what was found, what would be right and what exists, so it may quote the data.
    Another machine is told in words that are not the data's what is wrong and in which row of which split, or nothing."""

    others = ""


@dataclass(frozen=True)
class Column:
    """What column detection needs to know of a column: what it holds, and how many distinct values in how many rows."""

    kind: Literal["classes", "integer", "string", "words", "numbers", "answers", "chats", "other"]
    distinct: int
    rows: int

    @property
    def repeats(self) -> bool:
        """Whether it could be a label: 2 to 1000 distinct values, each twice on average."""
        return self.kind not in ("words", "numbers", "answers", "chats", "other") and 2 <= self.distinct <= min(1000, self.rows // 2)


FURTHER = "further"
"""Under which rows and results tell scores beside the headline: by name, then by protocol."""


class Outcomes(NamedTuple):
    """Predictions, counted: each (m,) int64. Of ``example`` so many (``count``) were of class ``true`` and told as ``predicted``."""

    example: np.ndarray
    true: np.ndarray
    predicted: np.ndarray
    count: np.ndarray


class Task(Protocol):
    """What a data set is for. ``texts``: the columns that are read. ``label``: the column by which devices are skewed; ``classes``: the
    names of its values. ``metric``: the headline. Below, ``made`` (n, …) is what :class:`~fedloom.compute.work.Predict` gives."""

    @property
    def texts(self) -> tuple[str, ...]: ...

    @property
    def label(self) -> str: ...

    @property
    def classes(self) -> tuple[str, ...]: ...

    @property
    def metric(self) -> str: ...

    @property
    def further(self) -> tuple[str, ...]:
        """What :meth:`scores` tells beside the headline, by name."""
        ...

    @property
    def unit(self) -> int:
        """How many counts of :meth:`outcomes` make one of what is counted."""
        ...

    @property
    def told(self) -> str:
        """What is read, for a person."""
        ...

    def written(self, rows: Rows) -> list[list[str]]:
        """One or two texts of every row, as they are given to a model's ``encode``."""
        ...

    def scores(self, labels: np.ndarray, made: np.ndarray) -> dict[str, float]:
        """The headline by its name, and what else is worth telling."""
        ...

    def loss(self, labels: np.ndarray, made: np.ndarray) -> float:
        """The mean loss."""
        ...

    def outcomes(self, labels: np.ndarray, made: np.ndarray) -> Outcomes:
        """What was right and what was not."""
        ...


@dataclass(frozen=True)
class Classification:
    """One label for one text, or for a pair of texts.

    ``texts``: one or two column names. ``label``: the label's column. ``classes``: class names; the index is the label id.
    ``metric``: the headline, "accuracy", "mcc" or "f1".
    """

    texts: tuple[str, ...]
    label: str
    classes: tuple[str, ...]
    metric: str

    def __post_init__(self) -> None:
        if not 1 <= len(self.texts) <= 2:
            raise DataError(f"classification reads one text column or two, not {len(self.texts)}: {list(self.texts)}")
        if len(self.classes) < 2:
            raise DataError(f"classification needs at least two classes; the data has {list(self.classes)}")
        if self.metric not in METRICS:
            raise DataError(f"no metric '{self.metric}'; there are {', '.join(METRICS)}, or 'auto'")

    @property
    def further(self) -> tuple[str, ...]:
        """The share of right predictions, where that is not the headline."""
        return ("accuracy",) if self.metric != "accuracy" else ()

    @property
    def unit(self) -> int:
        """Examples are counted."""
        return 1

    @property
    def told(self) -> str:
        """What is read, for a person."""
        return f"text {' + '.join(self.texts)}, label {self.label} ({len(self.classes)} classes)"

    def written(self, rows: Rows) -> list[list[str]]:
        """The text columns."""
        return [rows[name] for name in self.texts]

    def loss(self, labels: np.ndarray, made: np.ndarray) -> float:
        """Mean cross-entropy of the logits (n, C)."""
        top = made.max(1, keepdims=True).astype(np.float64)
        return float((top[:, 0] + np.log(np.exp(made - top).sum(1)) - made[np.arange(len(labels)), labels]).mean())

    def outcomes(self, labels: np.ndarray, made: np.ndarray) -> Outcomes:
        """One for each example."""
        return Outcomes(np.arange(len(labels)), labels, made.argmax(1), np.ones_like(labels))

    def scores(self, labels: np.ndarray, made: np.ndarray) -> dict[str, float]:
        """``metric`` and "accuracy" of the argmax of the logits ``made`` (n, C) against ``labels`` (n,).

        "mcc" is Matthews' correlation; "f1" is that of class 1 with two classes, with more the mean over those that occur or are predicted.

        Raises:
            DataError: shapes disagree, there is no example, a label is no class, or a logit is not finite.
        """
        labels, logits = np.asarray(labels), np.asarray(made)
        shape = (len(labels), len(self.classes))
        if labels.ndim != 1 or logits.shape != shape or not len(labels):
            got = f"{labels.shape} and {logits.shape}"
            raise DataError(f"scores take labels (n,) and logits (n, {shape[1]}) with n > 0, and got {got}")
        outside = labels[(labels < 0) | (labels >= shape[1])]
        if len(outside):
            raise DataError(f"label {outside[0]} is no class; there are 0 to {shape[1] - 1}")
        if not np.isfinite(logits).all():
            row = int(np.flatnonzero(~np.isfinite(logits).all(1))[0])
            where = f"the logits of example {row} are not finite"
            raise DataError(f"{where}: {logits[row].tolist()}; {DIVERGED}", f"{where}; {DIVERGED}")
        predicted = logits.argmax(1)
        scores = {"accuracy": float((predicted == labels).mean())}
        counts = np.bincount(shape[1] * labels + predicted, minlength=shape[1] ** 2).reshape(shape[1], shape[1])
        if self.metric != "accuracy":
            scores[self.metric] = float(headline(self.metric, np.diag(counts), counts.sum(1), counts.sum(0)))
        return scores


def headline(metric: str, right: np.ndarray, true: np.ndarray, predicted: np.ndarray) -> np.ndarray:
    """The metric of pooled predictions from counts a class, each (..., C): predicted and right, of this class, predicted. Gives (...).

    Counts can be added before: those of several devices make the score of all their predictions.

    Raises:
        DataError: there is no such metric.
    """
    n = true.sum(-1)
    if metric in ("accuracy", TOKEN_ACCURACY, ANSWER_F1):
        return right.sum(-1) / np.maximum(n, 1)
    if metric == "mcc":
        return _matthews(right.sum(-1), true, predicted, n)
    if metric == "f1":
        each = 2 * right / np.maximum(true + predicted, 1)
        return each[..., 1] if each.shape[-1] == 2 else each.sum(-1) / np.maximum((true + predicted > 0).sum(-1), 1)
    if metric == ENTITY_F1:  # class 1 are entities, class 0 what is none
        return 2 * right[..., 1] / np.maximum(true[..., 1] + predicted[..., 1], 1)
    raise DataError(f"no metric '{metric}'; there are {', '.join(METRICS)}")


def _matthews(right: np.ndarray, true: np.ndarray, predicted: np.ndarray, n: np.ndarray) -> np.ndarray:
    """Matthews' correlation for any number of classes (Gorodkin 2004); 0 where it has none."""
    spread = (n**2 - (true * true).sum(-1)).astype(float) * (n**2 - (predicted * predicted).sum(-1)).astype(float)
    agreement = right * n - (true * predicted).sum(-1)
    return np.where(spread > 0, agreement / np.sqrt(np.where(spread > 0, spread, 1)), 0.0)


def metric_told(task: Task) -> str:
    """The headline for a person, and of which class F1 is where there are two."""
    return f"{task.metric} (of class '{task.classes[1]}')" if task.metric == "f1" and len(task.classes) == 2 else task.metric


def metric_for(name: str) -> str:
    """The headline metric a data set is known by: "mcc" for CoLA, "f1" for MRPC and QQP, else "accuracy".

    The set is recognised by a whole word of its name: ``glue:cola`` is CoLA, ``chocolate`` is not.
    """
    words = set(re.split(r"[^a-z0-9]+", name.lower()))
    return "mcc" if "cola" in words else "f1" if words & {"mrpc", "qqp"} else "accuracy"


def choose_columns(columns: Mapping[str, Column], text: Sequence[str], label: str) -> tuple[tuple[str, ...], str]:
    """The text columns (one or two) and the label column: the named ones, else by name, else the only one it can be.

    Raises:
        DataError: a named column does not exist, or nothing or more than one thing fits.
    """
    listed = ", ".join(columns) or "none"
    for name in (*text, *([label] if label else [])):
        if name not in columns:
            raise DataError(f"the training data has no column '{name}'; its columns are: {listed}")
    if len(set(text)) < len(text) or label in text:
        raise DataError(f"text columns {list(text)} and label column '{label}' must be different columns")
    texts = tuple(text) or _named_texts(columns, label)
    label = label or _label(columns, texts, listed)
    texts = texts or _only_text(columns, label, listed)
    for name in texts:
        if columns[name].kind != "string":
            raise DataError(f"column '{name}' does not hold text; name the text column with text= (--text), among: {listed}")
    return texts, label


def _named_texts(columns: Mapping[str, Column], label: str) -> tuple[str, ...]:
    """The first pair, else the first single column, of the known names, whatever their case."""
    strings = {name.lower(): name for name, c in columns.items() if c.kind == "string" and name != label}
    for names in (*PAIRS, *((name,) for name in TEXTS)):
        if all(name in strings for name in names):
            return tuple(strings[name] for name in names)
    return ()


def _label(columns: Mapping[str, Column], texts: Sequence[str], listed: str) -> str:
    """The column named like a label, else the only column of classes, else the only one whose values repeat."""
    left = {name: column for name, column in columns.items() if name not in texts}
    lower = {name.lower(): name for name in left}
    named = [lower[name] for name in LABELS if name in lower]
    if named:
        return named[0]
    found = [name for name, column in left.items() if column.kind == "classes"]
    found = found or [name for name, column in left.items() if column.repeats]
    if len(found) == 1:
        return found[0]
    what = f"columns {', '.join(found)} could each be the label" if found else "no column looks like a label"
    if not found and (lists := [name for name, column in left.items() if column.kind in ("words", "numbers")]):
        raise DataError(f"{what}, and {lists[0]} holds lists: {LISTS}. Or name a label with label= (--label), among: {listed}")
    raise DataError(f"{what}; name it with label= (--label), among: {listed}")


def _only_text(columns: Mapping[str, Column], label: str, listed: str) -> tuple[str, ...]:
    """The only column of strings beside the label, or the only one whose values do not repeat."""
    strings = [name for name, column in columns.items() if column.kind == "string" and name != label]
    found = strings if len(strings) == 1 else [name for name in strings if not columns[name].repeats]
    if len(found) == 1:
        return (found[0],)
    what = f"columns {', '.join(found)} could each be the text" if found else "no column looks like text"
    raise DataError(f"{what}; name one, or two for a pair, with text= (--text), among: {listed}")
