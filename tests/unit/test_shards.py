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
from fedloom.methods.fedavg import FedAvg
from fedloom.run.deployment.greeting import Own, source_of, task_of
from fedloom.run.experiment import Experiment
from fedloom.run.world import read_data


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


def test_a_device_is_tested_on_the_rows_of_its_own_source_where_a_column_names_it(tmp_path: Path) -> None:
    rows = [{"text": f"t {i}", "label": i % 2, "client": f"c{i % 3}"} for i in range(60)]
    for split, of in {"train": rows, "test": [*rows[:12], {**rows[0], "client": "c9"}], "validation": rows[:6]}.items():
        held = [{n: v for n, v in row.items() if n != "client"} for row in of] if split == "validation" else of
        (tmp_path / f"{split}.jsonl").write_text("\n".join(map(json.dumps, held)))
    source, dealt = read_data(Experiment(FedAvg(), data=str(tmp_path), partition="column:client", clients=3, cohort=2, seed=3))
    for k, shard in enumerate(dealt.test):
        assert {source.splits["test"]["client"][row] for row in shard} - {"c9"} == {f"c{k}"}
    assert sum(map(len, dealt.test)) == 13
    assert source.notes[-2:] == (
        "the validation split has no column 'client': its rows are dealt by label",
        "1 of the 13 test rows have a 'client' that no training row has, and are dealt by label",
    )


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


def three_columns(path: Path, n: int = 30) -> str:
    """Two columns of texts, of which by name the first would be taken, and two that could be labels."""
    rows = [{"text": f"t {i}", "summary": f"s {i}", "label": i % 2, "mood": ["good", "bad"][i // 2 % 2]} for i in range(n)]
    path.write_text("\n".join(map(json.dumps, rows)))
    return str(path)


def test_a_device_reads_the_columns_that_the_server_reads(tmp_path: Path) -> None:
    """It looked for columns of its own, and trained on others than --text and --label of the server name."""
    server = load(three_columns(tmp_path / "server.jsonl"), seed=3, text=("summary",), label="mood")
    told = json.loads(json.dumps({"task": task_of(server)}))
    here = three_columns(tmp_path / "device.jsonl")
    mine = source_of(told, Own(here), 3)
    assert mine.task == server.task and mine.task.texts == ("summary",) and not any("server" in note for note in mine.notes)
    other = source_of(told, Own(here, text=("text",)), 3)
    assert (other.task.texts, other.task.label) == (("text",), "mood"), "what its owner names comes first"
    told["task"] = {name: value for name, value in told["task"].items() if name not in ("text", "label")} | {"classes": ["0", "1"]}
    earlier = source_of(told, Own(here), 3)
    assert (earlier.task.texts, earlier.task.label) == (("text",), "label"), "a server that does not say which"


def test_a_device_without_the_servers_columns_finds_its_own_and_says_so(tmp_path: Path) -> None:
    server = load(three_columns(tmp_path / "server.jsonl"), seed=3, text=("summary",), label="mood")
    told = {"task": task_of(server)}
    (tmp_path / "device.jsonl").write_text("\n".join(json.dumps({"review": f"r {i}", "class": ["good", "bad"][i % 2]}) for i in range(30)))
    mine = source_of(told, Own(str(tmp_path / "device.jsonl")), 3)
    assert (mine.task.texts, mine.task.label) == (("review",), "class")
    assert "the server reads text summary, which is not here: what to read was found" in mine.notes
    assert "the server reads label mood, which is not here: the label was found" in mine.notes


def test_a_devices_answers_and_tags_are_in_the_servers_columns(tmp_path: Path) -> None:
    asked = [{"instruction": f"i {i}", "question": f"q {i}", "output": f"o {i}", "reply": f"r {i}"} for i in range(30)]
    tagged = [{"tokens": ["a", "b"], "words": ["c", "d"], "ner_tags": ["O", "B-x"], "tags": ["B-y", "O"]} for _ in range(30)]
    for rows, text, label in ((asked, ("question", "reply"), ""), (tagged, ("words",), "tags")):
        (tmp_path / "data.jsonl").write_text("\n".join(map(json.dumps, rows)))
        kind = "tagging" if label else "instructions"
        server = load(tmp_path / "data.jsonl", seed=3, text=text, label=label, task=kind)  # type: ignore[arg-type]
        mine = source_of({"task": task_of(server)}, Own(str(tmp_path / "data.jsonl")), 3)
        assert mine.task == server.task and mine.task.texts[: len(text)] == text
