"""Sentences and tags: which columns, what is read of them, and what is wrong with them."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from fedloom.data.partition import partition
from fedloom.data.sources import load
from fedloom.data.tagging import BETWEEN, NONE, TYPE, Tagging, as_texts, choose_columns, types_of
from fedloom.data.tasks import Column, DataError, Split, headline

NAMES = ("O", "B-x", "I-x", "B-y", "I-y")


def write(folder: Path, train: list[dict[str, Any]], **splits: list[dict[str, Any]]) -> Path:
    for split, rows in {"train": train, **splits}.items():
        (folder / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def row(words: str, tags: str) -> dict[str, Any]:
    return {"tokens": words.split(), "ner_tags": tags.split()}


SOME = [row("a b c", "O B-y I-y"), row("d e", "O O"), row("f i", "B-x B-y"), row("g h", "I-x O")] * 3


def test_a_folder_of_sentences_is_found_to_be_tagging(tmp_path: Path) -> None:
    source = load(write(tmp_path, SOME, validation=SOME[:2], test=SOME[:3]), seed=1)
    assert isinstance(source.task, Tagging)
    assert source.task.tags == ("O", "B-x", "I-x", "B-y", "I-y")
    assert source.task.classes == ("x", "y", NONE) and source.task.metric == "entity_f1"
    rows = source.splits["test"]
    assert rows["tokens"] == [BETWEEN.join("abc"), BETWEEN.join("de"), BETWEEN.join("fi")]
    assert rows["ner_tags"] == ["0 3 4", "0 0", "1 3"]
    assert rows[TYPE] == [1, 2, 0], "the type of a sentence's first entity"
    assert source.task.written(rows) == [rows["tokens"], rows["ner_tags"]]
    assert any("metric entity_f1" in note for note in source.notes)


def test_numbers_have_the_names_that_the_file_gives_them(tmp_path: Path) -> None:
    kind = {"feature": {"names": list(NAMES), "_type": "ClassLabel"}, "_type": "List"}
    said = {b"huggingface": json.dumps({"info": {"features": {"ner_tags": kind}}}).encode()}
    table = pa.table({"tokens": [["a", "b"], ["c"]] * 6, "ner_tags": [[0, 1], [3]] * 6}).replace_schema_metadata(said)
    for split in ("train", "validation", "test"):
        pq.write_table(table, tmp_path / f"{split}.parquet")
    task = load(tmp_path, seed=1).task
    assert isinstance(task, Tagging) and task.tags == NAMES and task.classes == ("x", "y", NONE)
    pq.write_table(table.replace_schema_metadata(None), tmp_path / "train.parquet")
    with pytest.raises(DataError, match="numbers without names; give them as words"):
        load(tmp_path, seed=1)


def numbered(rows: list[list[int]], names: Sequence[str]) -> pa.Table:
    """Sentences whose tags are numbers, as the library ``datasets`` writes them; without ``names`` they stand for nothing."""
    kind = {"feature": {"names": list(names), "_type": "ClassLabel"}, "_type": "List"}
    said = {b"huggingface": json.dumps({"info": {"features": {"ner_tags": kind}}}).encode()} if names else None
    words = [[f"w{i}" for i in range(len(tags))] for tags in rows]
    return pa.table({"tokens": words, "ner_tags": pa.array(rows, pa.list_(pa.int64()))}).replace_schema_metadata(said)


OTHERWISE = ("B-y", "I-y", "O", "I-x", "B-x")


def test_numbers_of_a_split_are_read_by_the_names_of_that_split(tmp_path: Path) -> None:
    pq.write_table(numbered([[0, 1], [3]] * 6, NAMES), tmp_path / "train.parquet")
    pq.write_table(numbered([[2, 4], [0]], OTHERWISE), tmp_path / "validation.parquet")
    (tmp_path / "test.jsonl").write_text(json.dumps(row("a b", "O B-y")) + "\n")
    source = load(tmp_path, seed=1)
    assert isinstance(source.task, Tagging) and source.task.tags == NAMES
    assert source.splits["validation"]["ner_tags"] == ["0 1", "3"], "O B-x, B-y"
    assert source.splits["test"]["ner_tags"] == ["0 3"], "words need no names"
    (tmp_path / "test.jsonl").write_text(json.dumps({"tokens": ["a"], "ner_tags": [3]}) + "\n")
    with pytest.raises(DataError, match="row 0 of the test split has tags that are numbers without names; give them as words: O, B-TYPE"):
        load(tmp_path, seed=1)
    pq.write_table(numbered([[0, 5]], (*NAMES, "B-z")), tmp_path / "validation.parquet")
    with pytest.raises(DataError, match="row 0 of the validation split has the tag 'B-z'; the tags are: O, B-x"):
        load(tmp_path, seed=1)


def test_a_devices_numbers_are_read_by_its_own_names_and_none_by_the_servers(tmp_path: Path) -> None:
    fixed: dict[str, Any] = {"task": "tagging", "tags": NAMES, "classes": ("x", "y", NONE)}
    for split in ("train", "validation", "test"):
        pq.write_table(numbered([[2, 4], [0]], OTHERWISE), tmp_path / f"{split}.parquet")
    source = load(tmp_path, seed=1, **fixed)
    assert isinstance(source.task, Tagging) and source.task.tags == NAMES
    assert all(source.splits[split]["ner_tags"] == ["0 1", "3"] for split in source.splits)
    pq.write_table(numbered([[0, 1]], ()), tmp_path / "train.parquet")
    with pytest.raises(DataError, match="row 0 of the train split has tags that are numbers without names"):
        load(tmp_path, seed=1, **fixed)


def test_missing_splits_are_cut_as_for_any_task(tmp_path: Path) -> None:
    source = load(write(tmp_path, SOME * 4), seed=1, max_train=9)
    assert [len(source.splits[s]) for s in ("train", "validation", "test")] == [9, 5, 5]


@pytest.mark.parametrize(
    ("bad", "says"),
    [
        ({"tokens": ["a", "b"], "ner_tags": ["O"]}, "row 3 of the train split has 2 words and 1 tags; every word needs a tag"),
        ({"tokens": None, "ner_tags": ["O"]}, "has no words and 1 tags"),
        ({"tokens": ["a", "b"], "ner_tags": ["O", None]}, "row 3 of the train split has a word without a tag in column 'ner_tags'"),
        ({"tokens": ["a\x1fb"], "ner_tags": ["O"]}, r"U\+001F"),
    ],
)
def test_a_bad_row_is_named(tmp_path: Path, bad: dict[str, Any], says: str) -> None:
    with pytest.raises(DataError, match=says):
        load(write(tmp_path, [*SOME[:3], bad, *SOME]), seed=1)


def test_a_held_out_tag_that_no_training_sentence_has_is_named(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="row 0 of the test split has the tag 'B-z'; the tags are: O, B-x"):
        load(write(tmp_path, SOME, test=[row("q", "B-z")]), seed=1)


@pytest.mark.parametrize(
    ("train", "test", "of_test"),
    [
        ([("a b", "B-x B-y"), ("c", "B-x"), ("d", "O")], ("e", "B-y"), "y"),
        ([("a b", "B-x O"), ("c", "B-y"), ("d", "B-x")], ("e", "O"), NONE),
    ],
)
def test_a_sentence_may_be_of_a_type_that_no_training_sentence_is_of(
    tmp_path: Path, train: list[tuple[str, str]], test: tuple[str, str], of_test: str
) -> None:
    """The type serves the skew alone; its tags are what must be known."""
    known = [row(*of) for of in train]
    source = load(write(tmp_path, known * 2, validation=known[1:2], test=[row(*test)]), seed=1)
    assert isinstance(source.task, Tagging) and source.task.classes == ("x", "y", NONE)
    assert [source.task.classes[i] for i in source.splits["test"][TYPE]] == [of_test]
    labels: dict[Split, np.ndarray] = {split: np.asarray(rows[TYPE], np.int64) for split, rows in source.splits.items()}
    dealt = partition("label", labels, clients=2, alpha=1.0, beta=1.0, seed=1, minimum=1)
    assert sorted(len(rows) for rows in dealt.test) == [0, 1]


def test_a_held_out_split_without_tags_or_rows_is_left_out_and_said(tmp_path: Path) -> None:
    untagged = write(tmp_path, SOME * 4, validation=SOME[:2], test=[{"tokens": ["a"]}])
    assert "the test split has no labels and is not used" in load(untagged, seed=1).notes
    pq.write_table(numbered([[0, 1], [3]] * 6, NAMES), tmp_path / "train.parquet")
    for split in ("train", "validation", "test"):
        (tmp_path / f"{split}.jsonl").unlink()
        pq.write_table(numbered([[0, 1], [3]] * 6 if split == "train" else [], NAMES), tmp_path / f"{split}.parquet")
    assert {f"the {split} split has no rows and is not used" for split in ("validation", "test")} <= set(load(tmp_path, seed=1).notes)
    kept = load(tmp_path, seed=1, task="tagging", tags=NAMES, classes=("x", "y", NONE))
    assert [len(kept.splits[split]) for split in ("train", "validation", "test")] == [12, 0, 0], "a device may have none"


@pytest.mark.parametrize(
    ("name", "beside", "says"),
    [
        ("labels", {}, r"column 'labels' .* holds \['[ab]'.*\]; a label is .*multi-label.* not supported.*--task tagging.*qa$"),
        ("tags", {}, "no column looks like a label, and tags holds lists: several labels a row.*not supported.*--task is one of auto, cl"),
        ("tags", {"keywords": ["k"] * 5}, "no column looks like a label, and"),
        ("tags", {"topic": "x", "keywords": ["k"] * 5}, ""),
    ],
)
def test_lists_of_labels_beside_a_text_are_no_tags(name: str, beside: dict[str, Any], says: str, tmp_path: Path) -> None:
    """They were taken for tags, and a column of words was asked for."""
    rows = [{"text": f"t {i}", name: ["a", "b"][: 1 + i % 2], **beside} for i in range(12)]
    if says:
        with pytest.raises(DataError, match=says):
            load(write(tmp_path, rows), seed=1)
        return
    source = load(write(tmp_path, [{**row, "topic": "xy"[i % 2]} for i, row in enumerate(rows)]), seed=1)
    assert (source.task.texts, source.task.label) == (("text",), "topic")


def test_tags_that_are_no_entities_are_refused() -> None:
    with pytest.raises(DataError, match="'NOUN' is none of them"):
        types_of(("O", "NOUN"))
    with pytest.raises(DataError, match="the data has: B-x"):
        types_of(("B-x",))
    with pytest.raises(DataError, match="row 1 of train has the tag 9, and its names number 0 to 4"):
        as_texts([["a"], ["b"]], [[4], [9]], NAMES, "train", NAMES)
    with pytest.raises(DataError, match="scored by entity_f1, not by f1"):
        load("trec", seed=1, task="tagging", metric="f1")


def test_columns_can_be_named() -> None:
    given = {"w": Column("words", 0, 9), "v": Column("words", 0, 9), "pos": Column("numbers", 0, 9), "s": Column("string", 3, 9)}
    assert choose_columns(given, ("w",), "pos") == ("w", "pos")
    assert choose_columns(given, ("w",), "v") == ("w", "v")
    for text, label, says in (
        ((), "pos", "one column of lists of words, and none came"),
        (("s",), "pos", "lists of words, and .*'s'"),
        (("w",), "s", "lists of tags, and .*'s'"),
        (("w",), "w", "lists of tags"),
        (("zzz",), "", "no column 'zzz'"),
    ):
        with pytest.raises(DataError, match=says):
            choose_columns(given, text, label)


def test_the_headline_of_counts_added_over_devices_is_that_of_all_sentences() -> None:
    """(predicted and right, there, predicted) by class: class 1 are entities."""
    one, other = np.array([[0, 3], [2, 5], [2, 5]]), np.array([[0, 1], [0, 1], [3, 4]])
    whole = one + other
    assert headline("entity_f1", whole[0], whole[1], whole[2]) == pytest.approx(2 * 4 / (6 + 9))
    assert headline("entity_f1", *np.zeros((3, 2))) == 0


def test_scores_need_words_and_finite_numbers() -> None:
    task = Tagging("w", "t", NAMES, ("x", "y", NONE))
    with pytest.raises(DataError, match="with a word at least"):
        task.scores(np.zeros(1), np.zeros((1, 6)))
    with pytest.raises(DataError, match="training diverged"):
        task.scores(np.zeros(1), np.array([[np.nan, 1, 2, 0, 0, 0]]))
