"""Label columns as ids 0..C-1 and class names, the same for every split.

Class names come from the column where it carries them, else from the sorted values of the training split.
Knows nothing of files or of which column is the label; values in, ids and notes out.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pyarrow as pa

from fedloom.data.tasks import LISTS, SPLITS, DataError, Split

Label = str | int
"""A label as the data has it: a class name or a whole number (a truth value is one)."""

WHOLE = re.compile(r"-?(0|[1-9]\d{0,17})(\.0)?")
"""How CSV writes a whole number, or a column of them that once had a gap."""


DENIALS = ("no", "not", "non", "none", "un")
"""What makes a class's name the denial of another's, or, by itself, of whatever the other is."""


def label_values(column: pa.ChunkedArray, names: Sequence[str] | None, where: str) -> list[Label | None]:
    """The labels of one split; None where a row has none (missing, blank, or -1 in a column with class names).

    ``names`` are the class names that the column's integers stand for, if it carries them.

    Raises:
        DataError: a value that is no word and no whole number, or an integer without a name.
    """
    values: list[Any] = column.to_pylist()
    if names is not None:
        odd = next((v for v in values if v is not None and not -1 <= v < len(names)), None)
        if odd is not None:
            row = values.index(odd)
            raise DataError(
                f"{where} holds {odd}, and its class names number 0 to {len(names) - 1}: {some(names)}",
                f"row {row}: a label without a name",
            )
        return [None if v is None or v < 0 else str(names[v]) for v in values]
    values = [None if (isinstance(v, str) and not v.strip()) or v != v else v for v in values]  # NaN is how pandas writes a gap
    if all(v is None or (isinstance(v, float) and v.is_integer()) for v in values):
        values = [None if v is None else int(v) for v in values]
    odd = next((v for v in values if v is not None and not isinstance(v, (str, int))), None)
    if odd is not None:
        raise DataError(
            f"{where} holds {str(odd)[:60]}; a label is one word or one whole number a row{f': {LISTS}' if isinstance(odd, list) else ''}",
            f"row {values.index(odd)}: a label that is neither one word nor one whole number",
        )
    return values


def class_ids(
    values: Mapping[Split, list[Label | None]], names: Sequence[str] | None, label: str, denied_first: bool = False
) -> tuple[dict[Split, np.ndarray], tuple[str, ...], list[str]]:
    """(int64 ids of the splits that have labels, class names, notes). A held-out split without any label is left out and said. With
    ``denied_first``, of two classes one that denies the other is class 0 (:func:`denies`).

    Raises:
        DataError: no training labels, a row without one, or a held-out label that no training row has.
    """
    trained = [v for v in values["train"] if v is not None]
    whole = names is None and all(type(v) is int or (isinstance(v, str) and WHOLE.fullmatch(v.strip())) for v in trained)
    truths = {str(v).strip().casefold(): v for v in trained} if names is None else {}
    truths = truths if truths.keys() <= {"true", "false"} and len(truths) == len(set(trained)) else {}
    kept: dict[Split, list[Label]] = {}
    notes = []
    for split in SPLITS:
        least = -1 in kept.get("train", ())
        if split in values and (labels := _of_kind(values[split], names, whole, truths, least, f"the {split} split", label)):
            kept[split] = labels
        elif split == "train":
            raise DataError(f"the training split has no labels in column '{label}'; name the label column with label= (--label)")
        elif split in values:
            notes.append(f"the {split} split has {'no labels' if values[split] else 'no rows'} and is not used")
    seen = set(kept["train"])
    original = list(names) if names is not None else sorted(seen, key=lambda v: (isinstance(v, str), v))
    if denied_first and len(original) == 2 and denies(str(original[1]), str(original[0])):
        original.reverse()
    for split, labels in kept.items():
        unknown = [str(v) for v in dict.fromkeys(labels) if v not in seen]
        if unknown:
            raise DataError(
                f"the {split} split has label {some(unknown)}, which no training row has; the training labels are: "
                f"{some([str(v) for v in original if v in seen])}. Remove those rows, or add such rows to the training split"
            )
    classes = tuple(str(v) for v in original)
    if all(type(v) is int for v in original) and original != list(range(len(original))):
        notes.append(f"integer labels {some(classes)} became ids 0 to {len(classes) - 1}")
    ids = {value: i for i, value in enumerate(original)}
    return {split: np.asarray([ids[v] for v in labels], np.int64) for split, labels in kept.items()}, classes, notes


def given_ids(values: Mapping[Split, list[Label | None]], classes: Sequence[str], label: str) -> dict[Split, np.ndarray]:
    """int64 ids of every split's labels where the classes are given: by their names, or, where those are whole numbers, by their values.

    Raises:
        DataError: a row without a label, or one that is none of the classes.
    """
    ids = {name: i for i, name in enumerate(classes)}
    made: dict[Split, np.ndarray] = {}
    for split, told in values.items():
        named = [str(int(float(v))) if isinstance(v, str) and v not in ids and WHOLE.fullmatch(v.strip()) else str(v) for v in told]
        odd = next((row for row, name in enumerate(named) if name not in ids), None)
        if odd is not None:
            had = "no label" if told[odd] is None else f"the label {named[odd]!r}"
            row = f"row {odd} of the {split} split"
            raise DataError(
                f"{row} has {had} in column '{label}'; the classes are: {some(list(classes))}",
                f"{row} has a label that is no class, or none",
            )
        made[split] = np.asarray([ids[name] for name in named], np.int64)
    return made


def _of_kind(
    values: Sequence[Label | None],
    names: Sequence[str] | None,
    whole: bool,
    truths: Mapping[str, Label],
    least: bool,
    where: str,
    label: str,
) -> list[Label]:
    """One split's labels in the training split's terms; empty if it has none (all missing, or all -1 where that is no class, ``least``).

    Where training labels carry names, plain integers are their numbers; where those are whole numbers in text, so are these; where they are
    truth values, in text or not, these are the same ``truths``.
    """
    labels: list[Label] = []
    missing: list[int] = []
    for row, value in enumerate(values):
        if value is None:
            missing.append(row)
        elif names is not None and type(value) is int and 0 <= value < len(names):
            labels.append(names[value])
        elif truths:
            labels.append(truths.get(str(value).strip().casefold(), value))
        else:
            labels.append(int(float(value)) if whole and isinstance(value, str) and WHOLE.fullmatch(value.strip()) else value)
    if not least and all(type(value) is int and value == -1 for value in labels):
        return []
    if missing:
        row = f"row {missing[0]} of {where} has no label"
        raise DataError(f"{row} in column '{label}'; label the row or remove it", row)
    return labels


def denies(name: str, other: str) -> bool:
    """Whether a class's name says no more than that it is not the other.

    >>> denies("not_equivalent", "equivalent"), denies("Non-toxic", "toxic"), denies("no", "Yes"), denies("spam", "ham")
    (True, True, True, False)
    """
    bare, said = (re.sub(r"[\W_]+", "", text.casefold()) for text in (name, other))
    return bare in DENIALS or (bool(said) and bare in {denial + said for denial in DENIALS})


def some(values: Sequence[str], most: int = 12) -> str:
    """A list for a message, cut where it grows long."""
    return ", ".join(values[:most]) + (f" and {len(values) - most} more" if len(values) > most else "")
