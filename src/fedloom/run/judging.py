"""From windows to what was cut into them. Of a text their sums; of a question the best span of all its windows, as the words of the
context, against the answers that are due."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np

from fedloom.data.examples import Examples
from fedloom.data.questions import Questions, golds, marks
from fedloom.data.sources import Source
from fedloom.data.tasks import Split
from fedloom.model.base import Model
from fedloom.model.spans import first_of


class _Known(NamedTuple):
    """Of a split: each question's first window (and their number), the characters (T, 2) of all tokens, contexts, answers due."""

    first: np.ndarray
    places: np.ndarray
    contexts: list[str]
    due: list[list[str]]


@dataclass(frozen=True)
class Judge:
    """What predictions come to by rows of the data. ``splits``: all of the source's examples. Nothing changes where a row is an example."""

    source: Source
    splits: dict[Split, Examples]
    model: Model
    _known: dict[Split, _Known] = field(default_factory=dict)

    def examples(self, split: Split, rows: np.ndarray) -> np.ndarray:
        """The places of these rows' examples among the split's, row by row."""
        if self.model.first_of is None:
            return rows
        first = self.model.first_of(self.splits[split].segments, self.splits[split].offsets)
        counts = first[rows + 1] - first[rows]
        return np.repeat(first[rows] - (np.cumsum(counts) - counts), counts) + np.arange(counts.sum())

    def judged(self, split: Split, rows: np.ndarray, made: np.ndarray) -> np.ndarray:
        """``made`` of these rows' examples as the task's scores take it: of questions (n, 3), the mean loss of their windows, F1, exact
        match; of texts the sums over their windows."""
        if self.model.first_of is None:
            return made
        if self.model.finder is None:
            first = self.model.first_of(self.splits[split].segments, self.splits[split].offsets)
            ends = np.concatenate([[0], np.cumsum(first[rows + 1] - first[rows])])
            sums = np.concatenate([np.zeros((1, made.shape[1])), np.cumsum(made, 0, dtype=np.float64)])
            return sums[ends[1:]] - sums[ends[:-1]]
        known, offsets = self._of(split), self.splits[split].offsets
        told, at = np.zeros((len(rows), 3)), 0
        for i, row in enumerate(rows):
            count = int(known.first[row + 1] - known.first[row])
            windows = made[at : at + count]
            best = int(windows[:, 1].argmax())  # the first of equals
            begin = offsets[known.first[row] + best]
            one, last = (known.places[begin + int(of)] if np.isfinite(of) else (0, 0) for of in windows[best, 2:])
            told[i] = (windows[:, 0].mean(dtype=np.float64), *marks(known.contexts[row][one[0] : last[1]], known.due[row]))
            at += count
        return told

    def _of(self, split: Split) -> _Known:
        if split not in self._known:
            assert self.model.finder is not None and isinstance(self.source.task, Questions)
            task, rows, examples = self.source.task, self.source.splits[split], self.splits[split]
            asked, written = task.written(rows)
            places = self.model.finder.places(asked, written)
            first = first_of(examples.segments, examples.offsets)
            self._known[split] = _Known(first, places, rows[task.context], [golds(of) for of in rows[task.answers]])
        return self._known[split]
