"""A device's own data: shards as files, and labels that somebody else has numbered."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest

from fedloom.data.instructions import Instructions
from fedloom.data.labels import given_ids
from fedloom.data.partition import partition
from fedloom.data.shards import write_shards
from fedloom.data.sources import load
from fedloom.data.tasks import SPLITS, DataError


def made(tmp_path: Path, clients: int = 5):
    source = load("trec", seed=3, max_train=90, max_validation=20, max_test=20)
    labels = {
        split: np.asarray(rows["label"] if "label" in rows.column_names else rows[source.task.label])
        for split, rows in source.splits.items()
    }
    shards = partition("label", labels, clients=clients, alpha=0.3, beta=5.0, seed=3, minimum=2)
    write_shards(source, shards, tmp_path / "shards")
    return source, shards, labels


def test_a_device_reads_from_its_shard_what_it_would_hold_in_a_simulation(tmp_path: Path) -> None:
    source, shards, labels = made(tmp_path)
    empty = 0
    for k in range(5):
        mine = load(tmp_path / "shards" / str(k), seed=3, task="classification", metric="accuracy", classes=source.task.classes)
        for split in SPLITS:
            rows = shards.shards(split)[k]
            assert mine.splits[split][mine.task.texts[0]] == [source.splits[split][source.task.texts[0]][row] for row in rows]
            assert list(mine.splits[split][mine.task.label]) == labels[split][rows].tolist()
            empty += not len(rows)
        assert mine.task.classes == source.task.classes
    assert empty, "a shard without a row is among them, and stays so"


def test_conversations_are_written_as_they_are_read(tmp_path: Path) -> None:
    chats = [
        {"messages": [{"role": "user", "content": f'q {i} "ä"'}, {"role": "assistant", "content": f"a {i}"}], "topic": ["x", "y"][i % 2]}
        for i in range(24)
    ]
    (tmp_path / "chat.jsonl").write_text("\n".join(map(json.dumps, chats)))
    source = load(tmp_path / "chat.jsonl", seed=3, label="topic")
    labels = {split: np.asarray(rows["topic"]) for split, rows in source.splits.items()}
    write_shards(source, partition("iid", labels, clients=2, alpha=1.0, beta=5.0, seed=3, minimum=2), tmp_path / "shards")
    mine = load(tmp_path / "shards" / "0", seed=3)
    assert isinstance(mine.task, Instructions) and mine.task.chats
    assert set(mine.splits["train"][mine.task.answer]) <= set(source.splits["train"][source.task.answer])
    told = pq.ParquetFile(tmp_path / "shards" / "0" / "train.parquet").read()["messages"].to_pylist()
    assert told[0][0]["role"] == "user" and '"ä"' in told[0][0]["content"]


def test_labels_are_written_as_names(tmp_path: Path) -> None:
    source, *_ = made(tmp_path)
    told = pq.ParquetFile(tmp_path / "shards" / "0" / "train.parquet").read()[source.task.label].to_pylist()
    assert set(told) <= set(source.task.classes)


def test_a_folder_that_holds_something_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "shards").mkdir()
    (tmp_path / "shards" / "mine").write_text("")
    with pytest.raises(DataError, match="is not empty"):
        made(tmp_path)


def test_given_classes_are_found_by_name_or_by_value() -> None:
    ids = given_ids({"train": ["b", "a"], "test": []}, ["a", "b", "c"], "label")
    assert {split: of.tolist() for split, of in ids.items()} == {"train": [1, 0], "test": []}
    assert given_ids({"train": [5, "7", "5.0"]}, ["5", "7"], "label")["train"].tolist() == [0, 1, 0]


@pytest.mark.parametrize(("label", "said"), [("d", "the label 'd'"), (None, "no label")])
def test_a_label_that_is_none_of_the_given_classes_is_named(label: str | None, said: str) -> None:
    with pytest.raises(DataError, match=f"row 1 of the train split has {said} in column 'kind'; the classes are: a, b"):
        given_ids({"train": ["a", label]}, ["a", "b"], "kind")
