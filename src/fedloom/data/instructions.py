"""Instructions: a prompt (with its context, if there is one) and the answer that is due; plain text, all of it due; or conversations.

Which columns hold them, and how what was predicted of answers is scored: by tokens. Knows nothing of tokenizers, models or devices.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import numpy as np

from fedloom.data.tasks import TEXTS, TOKEN_ACCURACY, Column, DataError, Outcomes
from fedloom.messages import DIVERGED

if TYPE_CHECKING:
    from fedloom.data.rows import Rows

ANSWERS = ("response", "output", "answer", "completion", "answers", "reply")
PROMPTS = ("instruction", "prompt", "question", "query", "input")
CONTEXTS = ("context", "input")
CATEGORIES = ("category", "topic", "task")
PERPLEXITY = "perplexity"
Form = Literal["instructions", "text", "chat"]
EVERYTHING = "all"
"""The one label of data that has none."""


@dataclass(frozen=True)
class Instructions:
    """A prompt and its answer.

    ``prompts``: the prompt's columns, none of plain text, or a second one with its context. ``answer``: the answer's column. ``label``: the
    column by which devices are skewed; ``classes``: its values. ``chats``: the answer's column, and no other, holds conversations, as
    :func:`fedloom.data.chats.as_texts` writes them.
    """

    prompts: tuple[str, ...]
    answer: str
    label: str
    classes: tuple[str, ...]
    chats: bool = False

    @property
    def form(self) -> Form:
        """What is given to a model's ``encode``."""
        return "chat" if self.chats else "instructions" if self.prompts else "text"

    @property
    def metric(self) -> str:
        """The headline."""
        return TOKEN_ACCURACY

    @property
    def further(self) -> tuple[str, ...]:
        """e to the mean loss."""
        return (PERPLEXITY,)

    @property
    def unit(self) -> int:
        """Tokens are counted."""
        return 1

    @property
    def texts(self) -> tuple[str, ...]:
        """Every column that is read."""
        return (*self.prompts, self.answer)

    @property
    def told(self) -> str:
        """What is read, for a person."""
        skewed = f"skewed by {self.label} ({len(self.classes)} values)" if self.label != EVERYTHING else "no labels"
        if self.chats:
            return f"conversations {self.answer}, {skewed}"
        return f"prompt {' + '.join(self.prompts) or '(none: plain text)'}, answer {self.answer}, {skewed}"

    def written(self, rows: Rows) -> list[list[str]]:
        """The prompts and the answers of all rows; the context stands after an empty line, where there is one. Plain
        texts and conversations are answers without a prompt."""
        columns = [rows[name] for name in self.prompts] or [[""] * len(rows)]
        return [["\n\n".join(part for part in parts if part) for parts in zip(*columns, strict=True)], list(rows[self.answer])]

    def scores(self, labels: np.ndarray, made: np.ndarray) -> dict[str, float]:
        """The share of the answers' tokens that were the likeliest ones ("token_accuracy"), and e to :meth:`loss` ("perplexity").

        Raises:
            DataError: no example, or a number that is not finite.
        """
        _, right, tokens = made.sum(0, dtype=np.float64) if made.ndim == 2 and made.shape[1] == 3 else (0.0, 0.0, 0.0)
        if not tokens:
            raise DataError(f"scores take what was predicted of n > 0 answers, (n, 3), and got {made.shape}")
        if not np.isfinite(made).all():
            row = int(np.flatnonzero(~np.isfinite(made).all(1))[0])
            where = f"the loss of example {row} is not finite; {DIVERGED}"
            raise DataError(where, where)
        return {TOKEN_ACCURACY: float(right / tokens), PERPLEXITY: perplexity(self.loss(labels, made))}

    def loss(self, labels: np.ndarray, made: np.ndarray) -> float:
        """The mean over all answers' tokens of −log softmax, natural logarithm."""
        return float(made[:, 0].sum(dtype=np.float64) / made[:, 2].sum(dtype=np.float64))

    def outcomes(self, labels: np.ndarray, made: np.ndarray) -> Outcomes:
        """Tokens, right (class 0 told as 0) and wrong (0 told as 1), of every example."""
        right, wrong = np.rint(made[:, 1]).astype(np.int64), np.rint(made[:, 2] - made[:, 1]).astype(np.int64)
        example, zero = np.arange(len(made)), np.zeros(len(made), np.int64)
        return Outcomes(np.tile(example, 2), np.tile(zero, 2), np.concatenate([zero, zero + 1]), np.concatenate([right, wrong]))


def perplexity(loss: float) -> float:
    """e to the mean loss of a token; as large as it can be told where that is too large."""
    return float(np.exp(min(loss, 700.0)))


def looks_like_instructions(columns: Mapping[str, Column]) -> bool:
    """Whether a column is named like a prompt and another like its answer."""
    strings = {name.lower() for name, c in columns.items() if c.kind == "string"}
    return any(name in strings for name in ANSWERS) and any(name in strings for name in PROMPTS)


def choose_columns(columns: Mapping[str, Column], text: Sequence[str], label: str, plain: bool) -> tuple[tuple[str, ...], str, str]:
    """(prompt columns, answer column, label column or ""): those named, else by name. ``text``: the prompt's, its context's if there is
    one, and last the answer's; of ``plain`` text one column.

    Raises:
        DataError: a named column does not exist or holds no text, or nothing fits.
    """
    strings, listed = [name for name, c in columns.items() if c.kind == "string"], ", ".join(columns) or "none"
    for name in (*text, *([label] if label else [])):
        if name not in columns:
            raise DataError(f"the training data has no column '{name}'; its columns are: {listed}")
    for name in text:
        if name not in strings:
            raise DataError(f"column '{name}' does not hold text; name text columns with text= (--text), among: {', '.join(strings)}")
    lower = {name.lower(): name for name in reversed(strings) if name != label}
    if plain:
        found = list(text) or [lower[name] for name in TEXTS if name in lower][:1] or (strings if len(strings) == 1 else [])
        if len(found) != 1:
            raise DataError(f"plain text is one column; name it with text= (--text), among: {listed}")
        prompts, answer = (), found[0]
    elif text:
        if not 2 <= len(set(text)) == len(text) <= 3:
            raise DataError(f"instructions are a prompt, its context if there is one, and the answer: 2 or 3 columns, not {list(text)}")
        prompts, answer = tuple(text[:-1]), text[-1]
    else:
        found = [[lower[name] for name in names if name in lower] for names in (PROMPTS, ANSWERS)]
        if not all(found):
            raise DataError(
                f"no columns look like a prompt and its answer; name them with text= (--text PROMPT ANSWER, or PROMPT CONTEXT ANSWER), "
                f"among: {listed}"
            )
        prompt, answer = found[0][0], found[1][0]
        context = [lower[name] for name in CONTEXTS if name in lower and lower[name] != prompt]
        prompts = (prompt, *context[:1])
    return prompts, answer, label or category(columns, (*prompts, answer))


def category(columns: Mapping[str, Column], read: Sequence[str]) -> str:
    """The column by which devices can be skewed, none of those that are ``read``; "" if there is none."""
    everything = {name.lower(): name for name, c in columns.items() if c.repeats and name not in read}
    return next((everything[name] for name in CATEGORIES if name in everything), "")
