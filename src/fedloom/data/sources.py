"""Data from a name, a folder, a file or memory as three clean splits and their task.

Train, validation and test are never mixed: a split that is missing is cut from the training rows by seed. Whatever was decided
here is said in :attr:`Source.notes`. A name is the packaged "trec" or a data set of the Hugging Face Hub; only the latter
touches the network.
Knows nothing of tokenizers (``tokenise`` is given one), models or devices.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from hashlib import sha256
from typing import TYPE_CHECKING

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from fedloom.cache import remembered
from fedloom.data import chats, instructions, questions, tagging
from fedloom.data.examples import Examples, flat
from fedloom.data.instructions import EVERYTHING, Instructions
from fedloom.data.labels import Label, class_ids, given_ids, label_values, some
from fedloom.data.opening import Table, read
from fedloom.data.questions import ARTICLE, HELD, OTHER, Questions
from fedloom.data.rows import Rows, whole_numbers
from fedloom.data.tagging import TYPE, Tagging
from fedloom.data.tasks import (
    ANSWER_F1,
    ENTITY_F1,
    HELD_OUT,
    SPLITS,
    TOKEN_ACCURACY,
    Classification,
    Column,
    DataError,
    Split,
    Task,
    TaskKind,
    choose_columns,
    metric_for,
    metric_told,
)
from fedloom.seeds import derive

if TYPE_CHECKING:
    from fedloom.data.opening import Data

Encode = Callable[[list[str], list[str] | None], tuple[list[list[int]], list[list[int]]]]
"""(texts, their pairs or None) -> (token ids, token-type ids) of each example, truncated to the model's length."""

CUT = 0.1
"""The share of the training rows that becomes a missing split."""


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
    columns = {column: _describe(tables["train"], column) for column in tables["train"].rows.column_names}
    text, label = _as_elsewhere(columns, Names(text, label), elsewhere, notes)
    if task == "tagging" or (task == "auto" and tagging.looks_like_tagging(columns, partial(_as_long, tables["train"]))):
        if metric != "auto":
            raise DataError(f"tags are scored by {ENTITY_F1}, not by {metric}; leave metric (--metric) at auto")
        words, tagged = tagging.choose_columns(columns, text, label)
        tags = tags or _tag_names(tables["train"], tagged)
        kinds = tagging.types_of(tags)
        for split in tables:
            tables[split] = _flattened(tables[split], words, tagged, tags, kinds, split)
        tables, classes = _labelled(tables if classes else _tagged_only(tables, notes), (words, tagged), TYPE, notes, kinds)
        made: Task = Tagging(words, tagged, tags, classes)
    elif task == "qa" or (task == "auto" and questions.looks_like_questions(columns)):
        if metric != "auto":
            raise DataError(f"found answers are scored by {ANSWER_F1}, not by {metric}; leave metric (--metric) at auto")
        made, tables = _questions(tables, questions.choose_columns(columns, text, label), bool(classes), notes)
    elif task == "chat" or (task == "auto" and chats.looks_like_chats(columns)):
        if metric not in ("auto", TOKEN_ACCURACY):
            raise DataError(f"answers are scored by {TOKEN_ACCURACY}, not by {metric}; leave metric (--metric) at auto")
        made, tables = _chats(tables, chats.choose_columns(columns, text), columns, label, notes)
    elif task == "classification" or (task == "auto" and (label or not instructions.looks_like_instructions(columns))):
        texts, label = choose_columns(columns, text, label)
        metric = metric_for(name) if metric == "auto" else metric
        tables, classes = _labelled(tables, texts, label, notes, classes, metric == "f1")
        made = Classification(texts, label, classes, metric)
    else:
        if metric not in ("auto", TOKEN_ACCURACY):
            raise DataError(f"answers are scored by {TOKEN_ACCURACY}, not by {metric}; leave metric (--metric) at auto")
        prompts, answer, label = instructions.choose_columns(columns, text, label, task == "text")
        label = label or EVERYTHING
        for split in tables:
            tables[split] = _prepared(tables[split], prompts[1:], label)
        tables, classes = _labelled(tables, (*prompts, answer), label, notes)
        made = Instructions(prompts, answer, label, classes)
    notes.append(f"columns: {made.told}; metric {metric_told(made)}")
    tables = _three_splits(tables, seed, notes, made.context if isinstance(made, Questions) else "")
    for split, most in zip(SPLITS, (max_train, max_validation, max_test), strict=True):
        tables[split] = _capped(tables[split], split, most, made, seed, notes)
    _tell_overlap(tables, made, notes)
    _tell_blank(tables, made, notes)
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


def _chats(
    tables: dict[Split, Table], column: str, columns: dict[str, Column], label: str, notes: list[str]
) -> tuple[Instructions, dict[Split, Table]]:
    """The task, and the splits with conversations as texts."""
    label = label or instructions.category(columns, (column,)) or EVERYTHING
    for split, table in tables.items():
        if column not in table.rows.column_names:
            continue  # told with the other columns
        said, cut = chats.as_texts(table.rows[column].to_pylist(), f"the {split} split")
        notes += [f"{cut} conversations of the {split} split end without an answer, and are read up to their last one"] if cut else []
        rows = table.rows.set_column(table.rows.column_names.index(column), column, pa.array(said, pa.string()))
        tables[split] = _prepared(replace(table, rows=rows), (), label)
    tables, classes = _labelled(tables, (column,), label, notes)
    return Instructions((), column, label, classes, chats=True), tables


def _prepared(table: Table, contexts: Sequence[str], label: str) -> Table:
    """Missing contexts as empty ones, and one label for all where there is none."""
    rows = table.rows
    for name in contexts:
        if name not in rows.column_names:
            continue  # told with the other columns, as what is no text is
        told = rows[name].cast(pa.string()) if pa.types.is_null(rows[name].type) else rows[name]
        if _is_text(told.type):
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


def _tagged_only(tables: dict[Split, Table], notes: list[str]) -> dict[Split, Table]:
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
        _insist_kind(table, name, split, kinds_of, what)
    made = tagging.as_texts(rows[words].to_pylist(), rows[tagged].to_pylist(), tags, f"the {split} split", table.names.get(tagged))
    for name, column in zip((words, tagged), made[:2], strict=True):
        rows = rows.set_column(rows.column_names.index(name), name, pa.array(column, pa.string()))
    number = {kind: i for i, kind in enumerate(kinds)}
    if TYPE in rows.column_names:
        rows = rows.drop_columns([TYPE])
    rows = rows.append_column(TYPE, pa.array([number[kind] for kind in made[2]], pa.int64()))
    return replace(table, rows=rows, names={**{n: k for n, k in table.names.items() if n != tagged}, TYPE: list(kinds)})


def _questions(
    tables: dict[Split, Table], columns: tuple[str, str, str, str], keeps: bool, notes: list[str]
) -> tuple[Questions, dict[Split, Table]]:
    """The task, and the splits with answers as texts and each question's article. A held-out split without rows is left out, unless it is
    somebody's who ``keeps`` it."""
    question, context, answers, article = columns
    empty: list[Split] = [s for s in tables if s != "train" and not tables[s].rows.num_rows and not keeps]
    for split in empty:
        tables.pop(split)
        notes.append(f"the {split} split has no rows and is not used")
    names: dict[Split, list[str | None]] = {}
    for split, table in tables.items():
        for column in (question, context):
            _insist_text(table, column, split)
        for column in (answers, *([article] if article else [])):
            _insist_whole(table, column, split)
        _insist_kind(table, answers, split, HELD, "answers, as texts or with their places")
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


def _describe(table: Table, name: str) -> Column:
    """What kind of column it is, with its number of distinct values."""
    column = table.rows[name]
    if _holds_chats(column, name):
        return Column("chats", 0, len(column))
    if _is_text(column.type):
        kind = "string"
    elif name in table.names and not pa.types.is_nested(column.type):
        kind = "classes"
    elif pa.types.is_integer(column.type) or pa.types.is_boolean(column.type):
        kind = "integer"
    elif pa.types.is_struct(column.type) and {"text", "answer_start"} <= {field.name for field in column.type}:
        return Column("answers", 0, len(column))
    elif pa.types.is_list(column.type) or pa.types.is_large_list(column.type):
        inner = column.type.value_type
        places = pa.types.is_struct(inner) and {"text", "answer_start"} <= {field.name for field in inner}
        kind = "words" if _is_text(inner) else "numbers" if pa.types.is_integer(inner) else "answers" if places else "other"
        return Column(kind, 0, len(column))
    else:
        return Column("other", 0, len(column))
    return Column(kind, len(column.unique()), len(column))


def _as_long(table: Table, one: str, other: str) -> bool:
    """Whether the lists of two columns are of the same lengths in most rows; of those few that are not it is told later which they are."""
    lengths = ([len(value or ()) for value in table.rows[name].to_pylist()] for name in (one, other))
    return 2 * sum(a == b for a, b in zip(*lengths, strict=True)) > table.rows.num_rows


def _holds_chats(column: pa.ChunkedArray, name: str) -> bool:
    """Whether a column's lists are of turns. One of a telling name, in a file where not all of them are, holds their JSON."""
    if pa.types.is_list(column.type) or pa.types.is_large_list(column.type):
        inner = column.type.value_type
        return pa.types.is_struct(inner) and any(set(form) & {field.name for field in inner} for form in chats.FORMS)
    text = name.lower() in chats.COLUMNS and pa.types.is_string(column.type)
    return text and any(str(value).startswith("[{") for value in column[:16].to_pylist())


def _labelled(
    tables: dict[Split, Table],
    texts: tuple[str, ...],
    label: str,
    notes: list[str],
    given: tuple[str, ...] = (),
    denied_first: bool = False,
) -> tuple[dict[Split, Table], tuple[str, ...]]:
    """The splits that have labels, with their ids, and the class names; all splits where the names are given."""
    values: dict[Split, list[Label | None]] = {}
    for split, table in tables.items():
        has = label in table.rows.column_names
        where = f"column '{label}' of the {split} split"
        values[split] = label_values(table.rows[label], table.names.get(label), where) if has else [None] * table.rows.num_rows
    if given:
        ids, classes = given_ids(values, given, label), given
    else:
        ids, classes, said = class_ids(values, tables["train"].names.get(label), label, denied_first)
        notes += said
    for split in ids:
        for column in texts:
            _insist_text(tables[split], column, split)
    return {split: Table(tables[split].rows, tables[split].names, of) for split, of in ids.items()}, classes


def _is_text(kind: pa.DataType) -> bool:
    return pa.types.is_string(kind) or pa.types.is_large_string(kind)


def _insist_text(table: Table, column: str, split: Split) -> None:
    """Insist that a column is there, without gaps and of texts."""
    _insist_whole(table, column, split)
    if table.rows.num_rows and not _is_text(table.rows[column].type):
        raise _other_kind(table, column, split, "text")


def _insist_kind(table: Table, column: str, split: Split, kinds: Sequence[str], what: str) -> None:
    """Insist that a column is of one of these kinds, as the training split's is; where nothing is in it there is none."""
    kind, nothing = table.rows[column].type, pa.types.is_null
    if nothing(kind) or (pa.types.is_list(kind) and nothing(kind.value_type)) or not table.rows.num_rows:
        return
    if _describe(table, column).kind not in kinds:
        raise _other_kind(table, column, split, what)


def _other_kind(table: Table, column: str, split: Split, what: str) -> DataError:
    held = next((value for value in table.rows[column].to_pylist() if value is not None), None)
    came = f"column '{column}' of the {split} split holds {table.rows[column].type}, such as {str(held)[:60]}"
    return DataError(
        f"{came}; {what} would be right, as in the training split: write it so, or leave the split out",
        f"a column of the {split} split does not hold {what}",
    )


def _insist_whole(table: Table, column: str, split: Split) -> None:
    if column not in table.rows.column_names:
        listed = ", ".join(table.rows.column_names)
        raise DataError(f"the {split} split has no column '{column}', which the training split has; its columns are: {listed}")
    if table.rows[column].null_count:
        row = int(np.flatnonzero(table.rows[column].is_null().to_numpy())[0])
        where = f"row {row} of the {split} split has no text"
        raise DataError(f"{where} in column '{column}'; give it one ('' is fine) or remove it", where)


def _three_splits(tables: dict[Split, Table], seed: int, notes: list[str], together: str = "") -> dict[Split, Table]:
    """Make the missing splits: a lone validation split becomes the test split; the rest is cut from the training rows. ``together``: a
    column whose rows with the same value are not parted, if that can be."""
    tables = dict(tables)
    if "test" not in tables and "validation" in tables:
        tables["test"] = tables.pop("validation")
        notes.append("no labelled test split: the validation split is the test split")
    rows = len(tables["train"].ids)
    missing: list[Split] = [split for split in SPLITS if split not in tables]
    for split in missing:
        kept, tables[split] = _cut(tables["train"], max(1, round(CUT * rows)), seed, split, together)
        tables["train"] = kept
        notes.append(f"no {split} split: 10 % of train ({len(tables[split].ids)} rows) cut by seed {seed}")
    return tables


def _cut(table: Table, size: int, seed: int, split: str, together: str) -> tuple[Table, Table]:
    """(what stays, ``size`` rows drawn by seed). One row of every label stays, so that no label is held out only."""
    order = derive(seed, "split", split).permutation(len(table.ids))
    _, first = np.unique(table.ids[order], return_index=True)
    drawn = _unparted(table, together, order, size) if together else order[:0]
    if not len(drawn):
        drawn = np.delete(order, first)[:size]
    if not len(drawn):
        raise DataError(
            f"{len(order)} training rows with {len(first)} different labels are too few to cut a {split} split from, for one row of every "
            f"label stays; add rows, or a {split} file, or name a column of classes with label= (--label)"
        )
    kept = np.setdiff1d(order, drawn)
    return table.take(kept), table.take(np.sort(drawn))


def _unparted(table: Table, column: str, order: np.ndarray, size: int) -> np.ndarray:
    """At most ``size`` rows: all with the same value in ``column`` or none, in the ``order`` of the values' first rows. None where a label
    would lose its last row by any."""
    groups: dict[str, list[int]] = {}
    values = table.rows[column].to_pylist()
    for row in order.tolist():
        groups.setdefault(values[row], []).append(row)
    left, drawn = Counter(table.ids.tolist()), list[int]()
    for rows in groups.values():
        labels = Counter(table.ids[rows].tolist())
        if len(drawn) + len(rows) <= size and all(left[label] > count for label, count in labels.items()):
            drawn += rows
            left.subtract(labels)
    return np.asarray(drawn, np.int64)


def _capped(table: Table, split: Split, most: int, task: Task, seed: int, notes: list[str]) -> Table:
    """At most ``most`` rows, drawn by seed (0: all)."""
    if most < 0:
        raise DataError(f"max_{split} must be 0 (all rows) or more, not {most}")
    if not most or most >= len(table.ids):
        return table
    rows = np.sort(derive(seed, "cap", split).choice(len(table.ids), most, replace=False))
    gone = np.setdiff1d(table.ids, table.ids[rows])
    notes.append(f"{most} of {len(table.ids)} {split} rows drawn by seed {seed}")
    if len(gone) and split == "train":
        notes.append(f"no drawn training row has the label {some([task.classes[i] for i in gone])}")
    return table.take(rows)


def _tell_overlap(tables: dict[Split, Table], task: Task, notes: list[str]) -> None:
    """Say how many held-out texts, and contexts of questions, also occur in train."""
    content = {split: list(zip(*(tables[split].rows[name].to_pylist() for name in task.texts), strict=True)) for split in SPLITS}
    trained = set(content["train"])
    for split in HELD_OUT:
        shared = sum(text in trained for text in content[split])
        if shared:
            notes.append(f"{shared} of the {len(content[split])} {split} texts also occur in train")
    if isinstance(task, Questions):
        contexts = {split: set(tables[split].rows[task.context].to_pylist()) for split in SPLITS}
        for split in HELD_OUT:
            if both := len(contexts[split] & contexts["train"]):
                notes.append(f"{both} of the {len(contexts[split])} contexts of the {split} split also occur in train")


def _tell_blank(tables: dict[Split, Table], task: Task, notes: list[str]) -> None:
    """Say how many texts have no word to classify by: a gap in a file is easily one."""
    if not isinstance(task, Classification):
        return
    for split in SPLITS:
        columns = [tables[split].rows[name].to_pylist() for name in task.texts]
        if blank := sum(not any(text.strip() for text in texts) for texts in zip(*columns, strict=True)):
            notes.append(f"{blank} of the {tables[split].rows.num_rows} {split} texts are empty; they are kept")


def _rows(table: Table, label: str) -> Rows:
    """A split as the user sees it: labels as ids, plain columns kept (a partition may use one), nested ones left out."""
    plain = [field.name for field in table.rows.schema if not pa.types.is_nested(field.type)]
    rows = table.rows.select(plain).replace_schema_metadata(None)
    return Rows(rows.set_column(plain.index(label), label, whole_numbers(table.ids)))
