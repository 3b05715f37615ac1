"""Three splits of tables, whatever came: those that are missing are cut from training, all are capped, and what they share is told."""

from __future__ import annotations

from collections import Counter

import numpy as np

from fedloom.data.labels import some
from fedloom.data.opening import Table
from fedloom.data.questions import Questions
from fedloom.data.tasks import HELD_OUT, SPLITS, Classification, DataError, Split, Task
from fedloom.seeds import derive

CUT = 0.1
"""The share of the training rows that becomes a missing split."""


def three_splits(tables: dict[Split, Table], seed: int, notes: list[str], together: str = "") -> dict[Split, Table]:
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


def capped(table: Table, split: Split, most: int, task: Task, seed: int, notes: list[str]) -> Table:
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


def tell_overlap(tables: dict[Split, Table], task: Task, notes: list[str]) -> None:
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


def tell_blank(tables: dict[Split, Table], task: Task, notes: list[str]) -> None:
    """Say how many texts have no word to classify by: a gap in a file is easily one."""
    if not isinstance(task, Classification):
        return
    for split in SPLITS:
        columns = [tables[split].rows[name].to_pylist() for name in task.texts]
        if blank := sum(not any(text.strip() for text in texts) for texts in zip(*columns, strict=True)):
            notes.append(f"{blank} of the {tables[split].rows.num_rows} {split} texts are empty; they are kept")
