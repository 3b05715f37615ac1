"""Each device's rows as a folder of files of its own: what a device of a real federation would hold.

Labels are written as their classes' names, so that a file means the same wherever it lies.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from fedloom.data.chats import as_turns
from fedloom.data.instructions import Instructions
from fedloom.data.partition import Partition
from fedloom.data.questions import Questions, placed
from fedloom.data.rows import whole_numbers
from fedloom.data.sources import Source
from fedloom.data.tagging import Tagging
from fedloom.data.tasks import SPLITS, DataError
from fedloom.folders import whole_or_gone

TURNS = pa.list_(pa.struct([("role", pa.string()), ("content", pa.string())]))
"""A conversation, as it is read."""


def write_shards(source: Source, partition: Partition, folder: Path) -> list[Path]:
    """Write ``folder/K/train.parquet``, ``validation.parquet`` and ``test.parquet`` for every device K; an empty shard as an empty file.

    Raises:
        DataError: a task whose rows cannot be written so, or a folder that is not new or empty.
    """
    if isinstance(source.task, Tagging):
        raise DataError(
            f"shards are written for classification, instructions, conversations and questions, and '{source.name}' has {source.task.told}"
        )
    if folder.exists() and any(folder.iterdir()):
        raise DataError(f"{folder} is not empty; give a new folder for the shards")
    with whole_or_gone(folder):
        return _written(source, partition, folder)


def _written(source: Source, partition: Partition, folder: Path) -> list[Path]:
    """The folders, one a device."""
    task = source.task
    label, classes = source.task.label, np.array(source.task.classes, object)
    made = []
    for k in range(len(partition.train)):
        place = folder / str(k)
        place.mkdir(parents=True)
        for split in SPLITS:
            rows = source.splits[split].table.take(whole_numbers(partition.shards(split)[k]))
            kept = rows.select([name for name in rows.column_names if name in (*source.task.texts, label)])
            if isinstance(task, Questions):
                told = pa.array([placed(answers) for answers in kept[task.answers].to_pylist()])
                kept = kept.set_column(kept.column_names.index(task.answers), task.answers, told)
            if isinstance(task, Instructions) and task.chats:
                turns = pa.array([as_turns(text) for text in kept[task.answer].to_pylist()], TURNS)
                kept = kept.set_column(kept.column_names.index(task.answer), task.answer, turns)
            names = pa.array(classes[np.asarray(kept[label].to_pylist(), np.int64)].tolist(), pa.string())
            pq.write_table(
                kept.set_column(kept.column_names.index(label), label, names).replace_schema_metadata(), place / f"{split}.parquet"
            )
        made.append(place)
    return made
