"""Data from a name, a folder, a file or memory as three clean splits and their task.

Train, validation and test are never mixed: a split that is missing is cut from the training rows by seed. Whatever was decided
here is said in :attr:`Source.notes`. A name is the packaged "trec" or a data set of the Hugging Face Hub; only the latter
touches the network.
Knows nothing of tokenizers (``tokenise`` is given one), models or devices.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial
from hashlib import sha256
from typing import TYPE_CHECKING

import numpy as np
import pyarrow as pa

from fedloom.cache import remembered
from fedloom.data.examples import Examples, flat
from fedloom.data.opening import Table, read
from fedloom.data.questions import Questions
from fedloom.data.reading import Wanted, read_as_task
from fedloom.data.rows import Rows, whole_numbers
from fedloom.data.splits import capped, tell_blank, tell_overlap, three_splits
from fedloom.data.tasks import SPLITS, Classification, DataError, Split, Task, TaskKind, metric_told

if TYPE_CHECKING:
    from fedloom.data.opening import Data

Encode = Callable[[list[str], list[str] | None], tuple[list[list[int]], list[list[int]]]]
"""(texts, their pairs or None) -> (token ids, token-type ids) of each example, truncated to the model's length."""


@dataclass(frozen=True)
class Source:
    """A data set ready for a task: three splits with text and label columns checked, labels 0..C-1, and what was decided."""

    name: str
    splits: dict[Split, Rows]
    task: Task
    notes: tuple[str, ...]


@dataclass(frozen=True)
class Names:
    """Columns by their names: of texts, and of labels. Empty: nothing is said of them."""

    text: tuple[str, ...] = ()
    label: str = ""


def load(
    data: Data,
    *,
    seed: int,
    text: tuple[str, ...] = (),
    label: str = "",
    elsewhere: Names = Names(),
    metric: str = "auto",
    task: TaskKind = "auto",
    max_train: int = 0,
    max_validation: int = 0,
    max_test: int = 0,
    classes: tuple[str, ...] = (),
    tags: tuple[str, ...] = (),
) -> Source:
    """Read ``data``, find its columns and make three splits.

    ``text`` and ``label`` override the columns found, ``metric`` ("accuracy", "mcc", "f1") the one the name suggests. A cap
    of 0 keeps all rows; otherwise that many are drawn by seed, in their order. ``task``: classification; instructions (a prompt and its
    answer); text (all of it to be learnt); chat (conversations, the assistant's turns to be learnt); tagging (a tag for every word); qa (a
    question's answer in a context); or, left to the columns, one of them but text. ``classes`` and
    ``tags``: their names in order where somebody else has fixed them; a file may then hold few of them, and a held-out split no row.
    ``elsewhere``: the columns that somebody else reads, read here too where none are named and these data have them.

    Raises:
        DataError: whatever is wrong with the data, with what would be right.
    """
    name, tables, notes = read(data)
    if "train" not in tables or not tables["train"].rows.num_rows:
        held = ", ".join(tables) or "none"
        raise DataError(f"'{name}' has no training rows; its splits are: {held}. Give a training split, or one split alone")
    text, label = _as_elsewhere(tables["train"].rows.column_names, Names(text, label), elsewhere, notes)
    made, tables = read_as_task(tables, Wanted(name, text, label, metric, task, classes, tags), notes)
    notes.append(f"columns: {made.told}; metric {metric_told(made)}")
    tables = three_splits(tables, seed, notes, made.context if isinstance(made, Questions) else "")
    for split, most in zip(SPLITS, (max_train, max_validation, max_test), strict=True):
        tables[split] = capped(tables[split], split, most, made, seed, notes)
    tell_overlap(tables, made, notes)
    tell_blank(tables, made, notes)
    return Source(name, {split: _rows(tables[split], made.label) for split in SPLITS}, made, tuple(notes))


def _as_elsewhere(columns: Iterable[str], own: Names, elsewhere: Names, notes: list[str]) -> tuple[tuple[str, ...], str]:
    """The names of text and label columns that are to be read: ``own`` ones, else those read ``elsewhere`` if they are all here."""
    text, label = own.text, own.label
    if not text and elsewhere.text:
        if {*elsewhere.text} <= {*columns} - {label}:
            text = elsewhere.text
        else:
            notes.append(f"the server reads text {' + '.join(elsewhere.text)}, which is not here: what to read was found")
    if not label and elsewhere.label:
        if elsewhere.label in {*columns} - {*text}:
            label = elsewhere.label
        else:
            notes.append(f"the server reads label {elsewhere.label}, which is not here: the label was found")
    return text, label


def tokenise(
    source: Source, encode: Encode, identity: str = "", first: Callable[[np.ndarray, np.ndarray], np.ndarray] | None = None
) -> dict[Split, Examples]:
    """Every split's texts as token ids, one call of ``encode`` a split. ``first``: where a row may become several examples, finds the first
    of each row, and their number, from segments and offsets.

    ``identity`` names all that ``encode`` depends on but the texts: its tokenizer, the length it truncates to. Then what it returned is
    found in the cache the next time; with "" nothing is cached.

    Raises:
        DataError: ``encode`` returned another number of examples, or one without tokens.
    """
    examples: dict[Split, Examples] = {}
    for split, rows in source.splits.items():
        columns = source.task.written(rows)
        if identity:
            key = sha256(json.dumps([identity, columns]).encode()).hexdigest()
            texts = remembered("tokens", key, partial(_encoded, split, columns, encode, first is not None))
        else:
            texts = _encoded(split, columns, encode, first is not None)
        labels = np.asarray(rows[source.task.label], np.int64)
        if first is not None:
            labels = np.repeat(labels, np.diff(first(texts["segments"], texts["offsets"])))
        pairs = isinstance(source.task, Classification) and len(source.task.texts) == 2
        examples[split] = Examples.over(texts, labels.tolist(), pairs)
    return examples


def _encoded(split: Split, columns: list[list[str]], encode: Encode, several: bool = False) -> dict[str, np.ndarray]:
    """One split's texts as :func:`~fedloom.data.examples.flat` packs them; ``several`` of a row, if need be."""
    ids, segments = encode(columns[0], columns[1] if len(columns) == 2 else None)
    if len(ids) != len(segments) or (len(ids) != len(columns[0]) and not several):
        came = f"{len(ids)} ids and {len(segments)} segments"
        raise DataError(f"encode returned {came} for the {len(columns[0])} texts of the {split} split; it must return one each")
    empty = next((i for i, tokens in enumerate(ids) if not len(tokens)), None)
    if empty is not None:
        raise DataError(
            f"row {empty} of the {split} split has no tokens (its text is {columns[0][empty][:60]!r}), and this tokenizer "
            "adds none of its own; remove the row",
            f"row {empty} of the {split} split has no tokens",
        )
    return flat(ids, segments)


def _rows(table: Table, label: str) -> Rows:
    """A split as the user sees it: labels as ids, plain columns kept (a partition may use one), nested ones left out."""
    plain = [field.name for field in table.rows.schema if not pa.types.is_nested(field.type)]
    rows = table.rows.select(plain).replace_schema_metadata(None)
    return Rows(rows.set_column(plain.index(label), label, whole_numbers(table.ids)))
