"""Columns of tables: of what kind each is, whether it is what a task needs, and labels as ids.

Knows nothing of tasks but that they need texts, lists or answers; the words for what is wrong are here, so that they are the same for all.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pyarrow as pa

from fedloom.data import chats
from fedloom.data.labels import Label, class_ids, given_ids, label_values
from fedloom.data.opening import Table
from fedloom.data.tasks import Column, DataError, Split


def describe(table: Table, name: str) -> Column:
    """What kind of column it is, with its number of distinct values."""
    column = table.rows[name]
    if _holds_chats(column, name):
        return Column("chats", 0, len(column))
    if is_text(column.type):
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
        kind = "words" if is_text(inner) else "numbers" if pa.types.is_integer(inner) else "answers" if places else "other"
        return Column(kind, 0, len(column))
    else:
        return Column("other", 0, len(column))
    return Column(kind, len(column.unique()), len(column))


def as_long(table: Table, one: str, other: str) -> bool:
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


def is_text(kind: pa.DataType) -> bool:
    """Whether a column of this type holds texts."""
    return pa.types.is_string(kind) or pa.types.is_large_string(kind)


def insist_text(table: Table, column: str, split: Split) -> None:
    """Insist that a column is there, without gaps and of texts."""
    insist_whole(table, column, split)
    if table.rows.num_rows and not is_text(table.rows[column].type):
        raise _other_kind(table, column, split, "text")


def insist_kind(table: Table, column: str, split: Split, kinds: Sequence[str], what: str) -> None:
    """Insist that a column is of one of these kinds, as the training split's is; where nothing is in it there is none."""
    kind, nothing = table.rows[column].type, pa.types.is_null
    if nothing(kind) or (pa.types.is_list(kind) and nothing(kind.value_type)) or not table.rows.num_rows:
        return
    if describe(table, column).kind not in kinds:
        raise _other_kind(table, column, split, what)


def insist_whole(table: Table, column: str, split: Split) -> None:
    """Insist that a column is there, without gaps."""
    if column not in table.rows.column_names:
        listed = ", ".join(table.rows.column_names)
        raise DataError(f"the {split} split has no column '{column}', which the training split has; its columns are: {listed}")
    if table.rows[column].null_count:
        row = int(np.flatnonzero(table.rows[column].is_null().to_numpy())[0])
        where = f"row {row} of the {split} split has no text"
        raise DataError(f"{where} in column '{column}'; give it one ('' is fine) or remove it", where)


def _other_kind(table: Table, column: str, split: Split, what: str) -> DataError:
    held = next((value for value in table.rows[column].to_pylist() if value is not None), None)
    came = f"column '{column}' of the {split} split holds {table.rows[column].type}, such as {str(held)[:60]}"
    return DataError(
        f"{came}; {what} would be right, as in the training split: write it so, or leave the split out",
        f"a column of the {split} split does not hold {what}",
    )


def labelled(
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
            insist_text(tables[split], column, split)
    return {split: Table(tables[split].rows, tables[split].names, of) for split, of in ids.items()}, classes
