"""The rows of one split: named columns over an Arrow table, and the class names that a file says its label columns have.

Knows nothing of splits, labels or tasks. The ``datasets`` library can make a data set of :attr:`Rows.table`; it is not needed here, and
loading it takes a third of a second.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa


@dataclass(frozen=True)
class Rows:
    """Rows with named columns: ``rows["text"]`` is a list, iterating gives one dict a row."""

    table: pa.Table

    def __len__(self) -> int:
        return self.table.num_rows

    def __getitem__(self, column: str) -> list[Any]:
        return self.table[column].to_pylist()

    def __iter__(self) -> Iterator[dict[str, Any]]:
        return (row for batch in self.table.to_batches() for row in batch.to_pylist())

    @property
    def column_names(self) -> list[str]:
        """The columns, in order."""
        return self.table.column_names


def class_names(schema: pa.Schema) -> dict[str, list[str]]:
    """Column -> its class names, where ``datasets`` wrote the file and a column's integers, or lists of them, stand for classes."""
    said = json.loads((schema.metadata or {}).get(b"huggingface", b"{}"))
    features = said.get("info", {}).get("features", {})
    each = {column: kind.get("feature", kind) for column, kind in features.items() if isinstance(kind, dict)}
    return {column: list(kind["names"]) for column, kind in each.items() if isinstance(kind, dict) and kind.get("_type") == "ClassLabel"}


def whole_numbers(numbers: np.ndarray) -> pa.Array:
    """int64 (n,) as Arrow has them. ``pa.array`` of a NumPy array would load pandas, which takes a third of a second."""
    numbers = np.ascontiguousarray(numbers, np.int64)
    return pa.Array.from_buffers(pa.int64(), len(numbers), [None, pa.py_buffer(numbers)])
