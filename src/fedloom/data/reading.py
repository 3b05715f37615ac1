"""Tables as one kind of task reads them: which columns, which rows, and what its texts and labels are then.

One reader a kind, in the order in which they are tried where nothing is said: tags, questions, conversations, classes, instructions. What
the columns of a kind are called, and how its rows are written, is in that kind's own file (``tagging.py`` and so on).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from fedloom.data import chats, instructions, questions, tagging
from fedloom.data.columns import as_long, describe, insist_kind, insist_text, insist_whole, is_text, labelled
from fedloom.data.instructions import EVERYTHING, Instructions
from fedloom.data.opening import Table
from fedloom.data.questions import ARTICLE, HELD, OTHER, Questions
from fedloom.data.rows import whole_numbers
from fedloom.data.tagging import TYPE, Tagging
from fedloom.data.tasks import (
    ANSWER_F1,
    ENTITY_F1,
    TOKEN_ACCURACY,
    Classification,
    Column,
    DataError,
    Split,
    Task,
    TaskKind,
    choose_columns,
    metric_for,
)

Tables = dict[Split, Table]
Read = tuple[Task, Tables]
"""The task, and the splits that have labels, with their ids."""


@dataclass(frozen=True)
class Wanted:
    """What is said of how data are to be read; "auto" or empty: nothing. ``name``: the data's. ``text``, ``label``: columns. ``classes``,
    ``tags``: their names in order, where somebody else has fixed them."""

    name: str
    text: tuple[str, ...] = ()
    label: str = ""
    metric: str = "auto"
    task: TaskKind = "auto"
    classes: tuple[str, ...] = ()
    tags: tuple[str, ...] = ()

    def insist_on_metric(self, what: str, headline: str) -> None:
        """Insist that nothing but a task's own headline is asked for.

        Raises:
            DataError: it is.
        """
        if self.metric not in ("auto", headline):
            raise DataError(f"{what} are scored by {headline}, not by {self.metric}; leave metric (--metric) at auto")


def read_as_task(tables: Tables, wanted: Wanted, notes: list[str]) -> Read:
    """The tables as the task that is wanted, or as the first that they look like.

    Raises:
        DataError: they cannot be read so.
    """
    training = tables["train"]
    columns = {name: describe(training, name) for name in training.rows.column_names}
    reader = next(r for r in READERS if wanted.task in r.kinds or (wanted.task == "auto" and r.fits(columns, training, wanted)))
    return reader.read(tables, columns, wanted, notes)


def _tagging(tables: Tables, columns: dict[str, Column], wanted: Wanted, notes: list[str]) -> Read:
    wanted.insist_on_metric("tags", ENTITY_F1)
    words, tagged = tagging.choose_columns(columns, wanted.text, wanted.label)
    tags = wanted.tags or _tag_names(tables["train"], tagged)
    kinds = tagging.types_of(tags)
    flattened: Tables = {split: _flattened(table, words, tagged, tags, kinds, split) for split, table in tables.items()}
    kept, classes = labelled(flattened if wanted.classes else _tagged_only(flattened, notes), (words, tagged), TYPE, notes, kinds)
    return Tagging(words, tagged, tags, classes), kept


def _questions(tables: Tables, columns: dict[str, Column], wanted: Wanted, notes: list[str]) -> Read:
    """Answers as texts, and each question's article. A held-out split without rows is left out, unless somebody else has fixed the
    articles."""
    wanted.insist_on_metric("found answers", ANSWER_F1)
    question, context, answers, article = questions.choose_columns(columns, wanted.text, wanted.label)
    empty: list[Split] = [s for s in tables if s != "train" and not tables[s].rows.num_rows and not wanted.classes]
    for split in empty:
        tables.pop(split)
        notes.append(f"the {split} split has no rows and is not used")
    names: dict[Split, list[str | None]] = {}
    for split, table in tables.items():
        for column in (question, context):
            insist_text(table, column, split)
        for column in (answers, *([article] if article else [])):
            insist_whole(table, column, split)
        insist_kind(table, answers, split, HELD, "answers, as texts or with their places")
        names[split] = [str(name) for name in table.rows[article].to_pylist()] if article else [questions.EVERYTHING] * len(table.rows)
        made = questions.as_texts(table.rows[context].to_pylist(), table.rows[answers].to_pylist(), f"the {split} split")
        rows = table.rows.set_column(table.rows.column_names.index(answers), answers, pa.array(made, pa.string()))
        tables[split] = replace(table, rows=rows)
    known = sorted({str(name) for name in names["train"]})
    numbers = {split: questions.articles_of(of, known) for split, of in names.items()}
    classes = (*known, *([OTHER] if any(len(known) in of for of in numbers.values()) else []))
    for split, table in tables.items():
        rows = table.rows.drop_columns([ARTICLE]) if ARTICLE in table.rows.column_names else table.rows
        rows = rows.append_column(ARTICLE, whole_numbers(np.asarray(numbers[split], np.int64)))
        tables[split] = replace(table, rows=rows, ids=np.asarray(numbers[split], np.int64))
    return Questions(question, context, answers, classes), tables


def _chats(tables: Tables, columns: dict[str, Column], wanted: Wanted, notes: list[str]) -> Read:
    """Conversations as texts."""
    wanted.insist_on_metric("answers", TOKEN_ACCURACY)
    column = chats.choose_columns(columns, wanted.text)
    label = wanted.label or instructions.category(columns, (column,)) or EVERYTHING
    for split, table in tables.items():
        if column not in table.rows.column_names:
            continue  # told with the other columns
        said, cut = chats.as_texts(table.rows[column].to_pylist(), f"the {split} split")
        notes += [f"{cut} conversations of the {split} split end without an answer, and are read up to their last one"] if cut else []
        rows = table.rows.set_column(table.rows.column_names.index(column), column, pa.array(said, pa.string()))
        tables[split] = _prepared(replace(table, rows=rows), (), label)
    tables, classes = labelled(tables, (column,), label, notes)
    return Instructions((), column, label, classes, chats=True), tables


def _classification(tables: Tables, columns: dict[str, Column], wanted: Wanted, notes: list[str]) -> Read:
    texts, label = choose_columns(columns, wanted.text, wanted.label)
    metric = metric_for(wanted.name) if wanted.metric == "auto" else wanted.metric
    tables, classes = labelled(tables, texts, label, notes, wanted.classes, metric == "f1")
    return Classification(texts, label, classes, metric), tables


def _instructions(tables: Tables, columns: dict[str, Column], wanted: Wanted, notes: list[str]) -> Read:
    wanted.insist_on_metric("answers", TOKEN_ACCURACY)
    prompts, answer, label = instructions.choose_columns(columns, wanted.text, wanted.label, wanted.task == "text")
    label = label or EVERYTHING
    prepared: Tables = {split: _prepared(table, prompts[1:], label) for split, table in tables.items()}
    tables, classes = labelled(prepared, (*prompts, answer), label, notes)
    return Instructions(prompts, answer, label, classes), tables


def _prepared(table: Table, contexts: Sequence[str], label: str) -> Table:
    """Missing contexts as empty ones, and one label for all where there is none."""
    rows = table.rows
    for name in contexts:
        if name not in rows.column_names:
            continue  # told with the other columns, as what is no text is
        told = rows[name].cast(pa.string()) if pa.types.is_null(rows[name].type) else rows[name]
        if is_text(told.type):
            rows = rows.set_column(rows.column_names.index(name), name, pc.fill_null(told, ""))
    if label == EVERYTHING and EVERYTHING not in rows.column_names:
        rows = rows.append_column(EVERYTHING, pa.array([EVERYTHING] * rows.num_rows, pa.string()))
    return replace(table, rows=rows)


def _tag_names(table: Table, column: str) -> tuple[str, ...]:
    """The tags' names: those that the file gives its numbers, else the words that the training split has, O first."""
    if column in table.names:
        return tuple(table.names[column])
    seen = {tag for tags in table.rows[column].to_pylist() for tag in tags or ()}
    if None in seen:
        row = next(i for i, tags in enumerate(table.rows[column].to_pylist()) if None in (tags or ()))
        raise DataError(
            f"row {row} of the train split has a word without a tag in column '{column}'; every word needs one, O if it is none"
        )
    if not all(isinstance(tag, str) for tag in seen):
        raise DataError(f"the tags in column '{column}' are numbers without names; give them as words: O, B-TYPE, I-TYPE")
    return tuple(sorted(seen, key=lambda tag: (tag != "O", tag[2:], tag)))


def _tagged_only(tables: Tables, notes: list[str]) -> Tables:
    """The splits that have sentences with tags; of the others it is said that they have none."""
    without: dict[Split, str] = {
        split: "no labels" if table.rows.num_rows else "no rows"
        for split, table in tables.items()
        if TYPE not in table.names or not table.rows.num_rows
    }
    notes += [f"the {split} split has {what} and is not used" for split, what in without.items()]
    return {split: table for split, table in tables.items() if split not in without}


def _flattened(table: Table, words: str, tagged: str, tags: tuple[str, ...], kinds: tuple[str, ...], split: Split) -> Table:
    """Words, tags and their sentence's type as texts; numbers are read by the names that this very split gives them. A split without tags
    comes back without types."""
    rows = table.rows
    if words not in rows.column_names or tagged not in rows.column_names:
        return table
    for name, kinds_of, what in ((words, ("words",), "lists of words"), (tagged, ("words", "numbers"), "lists of tags")):
        insist_kind(table, name, split, kinds_of, what)
    made = tagging.as_texts(rows[words].to_pylist(), rows[tagged].to_pylist(), tags, f"the {split} split", table.names.get(tagged))
    for name, column in zip((words, tagged), made[:2], strict=True):
        rows = rows.set_column(rows.column_names.index(name), name, pa.array(column, pa.string()))
    number = {kind: i for i, kind in enumerate(kinds)}
    if TYPE in rows.column_names:
        rows = rows.drop_columns([TYPE])
    rows = rows.append_column(TYPE, pa.array([number[kind] for kind in made[2]], pa.int64()))
    return replace(table, rows=rows, names={**{n: k for n, k in table.names.items() if n != tagged}, TYPE: list(kinds)})


@dataclass(frozen=True)
class Reader:
    """How one kind of task reads tables. ``kinds``: what asks for it by name. ``fits``: whether training's columns look like it."""

    kinds: tuple[TaskKind, ...]
    fits: Callable[[dict[str, Column], Table, Wanted], bool]
    read: Callable[[Tables, dict[str, Column], Wanted, list[str]], Read]


READERS = (
    Reader(("tagging",), lambda columns, table, wanted: tagging.looks_like_tagging(columns, partial(as_long, table)), _tagging),
    Reader(("qa",), lambda columns, table, wanted: questions.looks_like_questions(columns), _questions),
    Reader(("chat",), lambda columns, table, wanted: chats.looks_like_chats(columns), _chats),
    Reader(
        ("classification",),
        lambda columns, table, wanted: bool(wanted.label) or not instructions.looks_like_instructions(columns),
        _classification,
    ),
    Reader(("instructions", "text"), lambda columns, table, wanted: True, _instructions),
)
