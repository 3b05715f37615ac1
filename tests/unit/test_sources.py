"""Data from files, folders, memory and (a stand-in for) the Hub: what is decided is said, what is wrong is named."""

from __future__ import annotations

import csv
import json
import math
import socket
import subprocess
import sys
from pathlib import Path

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from datasets import config

from fedloom import hub as online
from fedloom.data import numbers
from fedloom.data.sources import load, tokenise
from fedloom.data.tagging import BETWEEN
from fedloom.data.tasks import DataError

SHARED = Path(__file__).parents[3] / "shared" / "data"


@pytest.fixture(autouse=True)
def no_network(monkeypatch):
    """Any look-up of a host is a failure of the test that makes it; the Hub then counts as unreachable."""
    asked = []
    monkeypatch.setattr(online, "getproxies", dict)
    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)

    def refuse(host, *_):
        asked.append(host)
        raise OSError("no network in unit tests")

    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    return asked


def rows(n=40, **more):
    return {"text": [f"text {i}" for i in range(n)], "label": [i % 2 for i in range(n)]} | more


def write_csv(path, columns, delimiter=","):
    with path.open("w", newline="", encoding="utf-8") as out:
        writer = csv.writer(out, delimiter=delimiter)
        writer.writerow(columns)
        writer.writerows(zip(*columns.values(), strict=True))


def write(path, columns):
    suffix = path.suffix
    if suffix == ".parquet":
        pq.write_table(pa.table(columns), path)
    elif suffix in (".csv", ".tsv"):
        write_csv(path, columns, "," if suffix == ".csv" else "\t")
    elif suffix == ".json":
        path.write_text(json.dumps(columns))
    else:
        records = [dict(zip(columns, values, strict=True)) for values in zip(*columns.values(), strict=True)]
        path.write_text("\n".join(map(json.dumps, records)) + "\n\n")


def sizes(source):
    return {split: len(rows) for split, rows in source.splits.items()}


def said(source):
    return " | ".join(source.notes)


def dataset(columns, names=("no", "yes")):
    features = datasets.Features({"text": datasets.Value("string"), "label": datasets.ClassLabel(names=list(names))})
    return datasets.Dataset.from_dict(columns, features=features)


# ---- where data comes from


def test_trec_is_packaged_and_its_validation_split_is_cut_by_seed(no_network, capfd):
    trec = load("trec", seed=42)
    assert (trec.name, sizes(trec)) == ("trec", {"train": 4907, "validation": 545, "test": 500})
    assert trec.task.classes == ("ABBR", "ENTY", "DESC", "HUM", "LOC", "NUM")
    assert (trec.task.texts, trec.task.label, trec.task.metric) == (("text",), "label", "accuracy")
    assert next(iter(trec.splits["test"])) == {"text": "How far is it from Denver to Aspen ?", "label": 5, "fine_label": "NUM:dist"}
    assert np.bincount(trec.splits["test"]["label"]).tolist() == [9, 94, 138, 65, 81, 113]
    assert "no validation split: 10 % of train (545 rows) cut by seed 42" in trec.notes
    assert "9 of the 500 test texts also occur in train" in trec.notes
    assert no_network == []
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize("suffix", [".parquet", ".csv", ".tsv", ".json", ".jsonl", ".ndjson"])
def test_a_folder_of_any_kind_of_file_is_read(tmp_path, suffix, no_network, capfd):
    write(tmp_path / f"train{suffix}", rows(30, source=["a", "b"] * 15))
    write(tmp_path / f"dev{suffix}", rows(6, source=["a"] * 6))
    write(tmp_path / f"test{suffix}", rows(8, source=["b"] * 8))
    (tmp_path / "README.md").write_text("not data")
    source = load(tmp_path, seed=0)
    assert (source.name, sizes(source)) == (tmp_path.name, {"train": 30, "validation": 6, "test": 8})
    assert list(source.splits["train"])[3] == {"text": "text 3", "label": 1, "source": "b"}
    assert source.task.classes == ("0", "1")
    assert no_network == []
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize("name", ["validation", "valid", "val", "dev", "eval", "my-val_v2", "Validation", "validation-00000-of-00001"])
def test_a_validation_file_goes_by_many_names(tmp_path, name):
    write(tmp_path / "train-00000-of-00002.csv", rows(10))
    write(tmp_path / "train-00001-of-00002.csv", rows(20))
    write(tmp_path / f"{name}.csv", rows(6))
    write(tmp_path / "test.csv", rows(8))
    assert sizes(load(str(tmp_path), seed=0)) == {"train": 30, "validation": 6, "test": 8}


def test_a_whole_name_wins_over_a_part_of_one_and_other_files_are_said(tmp_path):
    for name, count in {"train": 20, "train_small": 4, "test": 6, "labels": 2, "val": 4}.items():
        write(tmp_path / f"{name}.csv", rows(count))
    source = load(tmp_path, seed=0)
    assert sizes(source) == {"train": 20, "validation": 4, "test": 6}
    assert "not used: labels.csv, train_small.csv" in source.notes


def test_one_file_or_a_folder_with_one_is_cut_in_three(tmp_path):
    folder = tmp_path / "reviews"
    folder.mkdir()
    write(folder / "all.csv", rows(100))
    for data, name in ((folder, "reviews"), (folder / "all.csv", "all")):
        source = load(data, seed=1)
        assert (source.name, sizes(source)) == (name, {"train": 80, "validation": 10, "test": 10})
        assert "no test split: 10 % of train (10 rows) cut by seed 1" in source.notes
        assert "no validation split: 10 % of train (10 rows) cut by seed 1" in source.notes
    (folder / "all.csv").rename(folder / "test.csv")
    assert "the only file, test.csv, is the training data" in load(folder, seed=1).notes
    assert load(folder / "test.csv", seed=1).name == "reviews"


def test_the_splits_that_are_cut_are_disjoint_and_depend_on_the_seed_alone():
    made = [load(datasets.Dataset.from_dict(rows(100)), seed=seed) for seed in (1, 1, 2)]
    parts = [{split: set(s.splits[split]["text"]) for split in s.splits} for s in made]
    assert parts[0] == parts[1]
    assert parts[0]["test"] != parts[2]["test"]
    assert parts[0]["validation"] != parts[2]["validation"]
    for part in parts:
        assert set.union(*part.values()) == {f"text {i}" for i in range(100)}
        assert sum(map(len, part.values())) == 100


def test_no_label_is_cut_out_of_train():
    labels = ["common"] * 60 + [f"rare {i}" for i in range(10)]
    for seed in range(5):
        source = load(datasets.Dataset.from_dict({"text": list(map(str, range(70))), "label": labels}), seed=seed)
        assert set(source.splits["train"]["label"]) == set(range(11))


def test_a_lone_validation_split_becomes_the_test_split():
    both = datasets.DatasetDict({"train": dataset(rows(50)), "validation": dataset({"text": ["x", "y"], "label": [0, 1]})})
    source = load(both, seed=0)
    assert sizes(source) == {"train": 45, "validation": 5, "test": 2}
    assert list(source.splits["test"]["text"]) == ["x", "y"]
    assert "no labelled test split: the validation split is the test split" in source.notes
    assert list(both) == ["train", "validation"]


@pytest.mark.parametrize("test", [{"label": [-1, -1]}, {"label": [None, None]}, {}])
def test_an_unlabelled_test_split_is_not_used(test):
    splits = {"train": datasets.Dataset.from_dict(rows(50)), "validation": datasets.Dataset.from_dict(rows(4))}
    source = load(datasets.DatasetDict(splits | {"test": datasets.Dataset.from_dict({"text": ["u", "v"]} | test)}), seed=0)
    assert "the test split has no labels and is not used" in source.notes
    assert sizes(source) == {"train": 45, "validation": 5, "test": 4}
    glue = datasets.DatasetDict({"train": dataset(rows(50)), "test": dataset({"text": ["u", "v"], "label": [-1, -1]})})
    assert sizes(load(glue, seed=0)) == {"train": 40, "validation": 5, "test": 5}


def test_an_empty_split_counts_as_missing():
    source = load(datasets.DatasetDict({"train": dataset(rows(50)), "test": dataset({"text": [], "label": []})}), seed=0)
    assert "the test split has no rows and is not used" in source.notes
    assert sizes(source)["test"] == 5


def test_a_dataset_in_memory_and_one_on_disk_are_read(tmp_path, capfd):
    shuffled = dataset(rows(30)).select(list(range(29, -1, -1)))
    source = load(shuffled, seed=0)
    assert source.task.classes == ("no", "yes")
    assert all(int(r["text"].split()[1]) % 2 == r["label"] for r in source.splits["train"])
    capfd.readouterr()
    datasets.DatasetDict({"train": shuffled}).save_to_disk(str(tmp_path / "saved"))
    capfd.readouterr()
    assert load(tmp_path / "saved", seed=0).splits["test"]["text"][:] == source.splits["test"]["text"][:]
    assert capfd.readouterr() == ("", "")


def test_a_folder_named_as_a_packaged_set_is_reached_by_its_path(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("trec").mkdir()
    write(tmp_path / "trec" / "train.csv", rows(20))
    assert "for the folder of that name write ./trec" in said(load("trec", seed=0))
    assert sizes(load("./trec", seed=0))["train"] == 16


@pytest.mark.parametrize("beside", [None, "dataset_infos.json", "dataset_info.json"])
def test_a_folder_with_a_data_folder_is_read(tmp_path, beside):
    """What describes the data set is not taken for it."""
    (tmp_path / "data").mkdir()
    write(tmp_path / "data" / "train.csv", rows(20))
    if beside:
        (tmp_path / beside).write_text(json.dumps({"default": {"description": "", "features": {}}}))
    assert sizes(load(tmp_path, seed=0))["train"] == 16


def test_class_names_are_read_from_the_files_that_the_datasets_library_writes(tmp_path):
    dataset(rows(40), names=("no", "yes", "never")).to_parquet(str(tmp_path / "train.parquet"))
    source = load(tmp_path, seed=0)
    assert source.task.classes == ("no", "yes", "never")
    assert set(source.splits["train"]["label"]) == {0, 1}
    assert source.splits["train"].column_names == ["text", "label"]


def test_files_are_read_without_the_datasets_library():
    """Nor pandas: each takes a third of a second to load."""
    code = "import sys; from fedloom.data.sources import load; load('trec', seed=0); print({'datasets', 'pandas'} & set(sys.modules))"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "set()\n"


def test_what_is_no_data_is_refused():
    with pytest.raises(DataError, match="data is a int; give a name, a path, or a Dataset or DatasetDict"):
        load(3, seed=0)


def test_a_csv_that_changes_under_its_name_is_read_anew(tmp_path):
    path = tmp_path / "x.csv"
    write(path, rows(20))
    assert load(path, seed=0).task.classes == ("0", "1")
    write(path, {"text": [f"new {i}" for i in range(20)], "label": ["a", "b"] * 10})
    source = load(path, seed=0)
    assert source.task.classes == ("a", "b")
    assert all(text.startswith("new") for text in source.splits["train"]["text"])


def test_a_hub_name_is_loaded_with_its_config(monkeypatch):
    asked = []

    def hub(path, name):
        asked.append((path, name, config.HF_HUB_OFFLINE))
        names = {"train": 30, "validation_matched": 4, "validation_mismatched": 4, "test_matched": 6, "test_mismatched": 6}
        return datasets.DatasetDict({name: dataset(rows(n)) for name, n in names.items()})

    monkeypatch.setattr(datasets, "load_dataset", hub)
    monkeypatch.setattr(config, "HF_HUB_OFFLINE", False)
    source = load("glue:cola", seed=0)
    assert (source.name, source.task.metric) == ("glue:cola", "mcc")
    assert sizes(source) == {"train": 30, "validation": 4, "test": 6}
    assert "splits not used: validation_mismatched, test_mismatched" in source.notes
    monkeypatch.setattr(socket, "getaddrinfo", lambda *_: ["an address"])
    load("owner/set", seed=0)
    monkeypatch.setattr(online, "getproxies", lambda: {"https": "proxy"})
    load("set", seed=0)
    assert asked == [("glue", "cola", True), ("owner/set", None, False), ("set", None, False)]
    assert config.HF_HUB_OFFLINE is False


# ---- columns, labels, texts


@pytest.mark.parametrize(
    ("labels", "classes", "note"),
    [
        (["b", "a"] * 20, ("a", "b"), ""),
        ([3, 1] * 20, ("1", "3"), "integer labels 1, 3 became ids 0 to 1"),
        ([-1, 1] * 20, ("-1", "1"), "integer labels -1, 1 became ids 0 to 1"),
        ([10, 9, 2, 1] * 10, ("1", "2", "9", "10"), "became ids"),
        ([True, False] * 20, ("False", "True"), ""),
        ([1.0, 0.0] * 20, ("0", "1"), ""),
        ([7, 8, 9, 10] * 10, ("7", "8", "9", "10"), "integer labels 7, 8, 9, 10 became ids 0 to 3"),
    ],
)
def test_labels_become_ids_in_the_order_of_their_values(labels, classes, note, tmp_path):
    columns = {"text": [f"{label} {i}" for i, label in enumerate(labels)], "label": labels}
    write(tmp_path / "a.parquet", columns)
    write(tmp_path / "b.csv", columns)
    for path in (tmp_path / "a.parquet", tmp_path / "b.csv"):
        source = load(path, seed=0)
        assert source.task.classes == classes
        assert note in said(source)
        if not note:
            assert "became" not in said(source)
        for row in source.splits["train"]:
            word = row["text"].split()[0]
            assert classes[row["label"]] == (word if word in classes else str(int(float(word))))


def test_a_label_that_is_only_sometimes_a_number_stays_a_word():
    train = datasets.Dataset.from_dict({"text": list("abcdefgh"), "label": ["1", "x"] * 4})
    test = datasets.Dataset.from_dict({"text": list("ij"), "label": ["1", "1"]})
    source = load(datasets.DatasetDict({"train": train, "test": test}), seed=0)
    assert source.task.classes == ("1", "x")
    assert list(source.splits["test"]["label"]) == [0, 0]


def test_class_names_are_kept_even_of_a_class_without_rows_and_number_the_other_splits_integers():
    splits = {"train": dataset(rows(40), names=("no", "yes", "never")), "test": datasets.Dataset.from_dict(rows(3))}
    source = load(datasets.DatasetDict(splits), seed=0)
    assert source.task.classes == ("no", "yes", "never")
    assert list(source.splits["test"]["label"]) == [0, 1, 0]
    swapped = dataset({"text": ["a"], "label": [0]}, names=("yes", "no"))
    source = load(datasets.DatasetDict({"train": dataset(rows(40)), "test": swapped}), seed=0)
    assert list(source.splits["test"]["label"]) == [1]


def test_columns_and_metric_can_be_named():
    data = datasets.Dataset.from_dict(rows(40, title=["t"] * 40, topic=["x", "y"] * 20))
    source = load(data, seed=0, text=("title", "text"), label="topic", metric="f1")
    assert (source.task.texts, source.task.label, source.task.metric) == (("title", "text"), "topic", "f1")
    assert "columns: text title + text, label topic (2 classes); metric f1 (of class 'y')" in source.notes


@pytest.mark.parametrize(
    ("words", "classes"),
    [
        (("equivalent", "not_equivalent"), ("not_equivalent", "equivalent")),
        (("duplicate", "not duplicate"), ("not duplicate", "duplicate")),
        (("hate", "Non-hate"), ("Non-hate", "hate")),
        (("Yes", "no"), ("no", "Yes")),
        (("ham", "spam"), ("ham", "spam")),
        (("0", "1"), ("0", "1")),
    ],
)
def test_f1_is_of_the_class_that_is_not_the_others_denial(words, classes):
    """By the alphabet it was of not_equivalent. Other metrics are of no class, and number the classes as they did."""
    data = datasets.Dataset.from_dict({"text": [f"t {i}" for i in range(40)], "label": [words[i % 3 // 2] for i in range(40)]})
    source = load(data, seed=0, metric="f1")
    assert source.task.classes == classes and f"metric f1 (of class '{classes[1]}')" in said(source)
    assert all(classes[row["label"]] == words[int(row["text"][2:]) % 3 // 2] for row in source.splits["train"])
    assert load(data, seed=0).task.classes == tuple(sorted(words))
    named = dataset({"text": [f"t {i}" for i in range(40)], "label": [i % 2 for i in range(40)]}, names=words)
    source = load(datasets.DatasetDict({"train": named, "test": datasets.Dataset.from_dict(rows(4))}), seed=0, metric="f1")
    assert source.task.classes == classes
    assert [classes[label] for label in source.splits["test"]["label"]] == [words[0], words[1]] * 2


def test_nested_columns_are_left_out_and_empty_texts_are_texts():
    data = datasets.Dataset.from_dict(rows(20, tokens=[[1]] * 20, score=[0.5] * 20) | {"text": ["", " "] * 10})
    source = load(data, seed=0)
    assert source.splits["train"].column_names == ["text", "label", "score"]
    assert set(source.splits["train"]["text"]) == {"", " "}


def test_caps_draw_rows_by_seed_in_their_order():
    data = datasets.DatasetDict({s: dataset({"text": [f"{s} {i:02}" for i in range(40)], "label": [0, 1] * 20})
                                 for s in ("train", "validation", "test")})  # fmt: skip
    made = [load(data, seed=s, max_train=10, max_validation=4, max_test=40) for s in (0, 0, 1)]
    assert sizes(made[0]) == {"train": 10, "validation": 4, "test": 40}
    texts = [list(s.splits["train"]["text"]) for s in made]
    assert texts[0] == texts[1] == sorted(texts[0])
    assert texts[0] != texts[2]
    assert "10 of 40 train rows drawn by seed 0" in made[0].notes
    assert "40 test rows" not in said(made[0])
    assert "no drawn training row has the label" in said(load(data, seed=0, max_train=1))
    with pytest.raises(DataError, match=r"max_test must be 0 \(all rows\) or more, not -1"):
        load(data, seed=0, max_test=-1)


def test_texts_that_also_occur_in_train_are_counted_but_kept():
    test = {"text": ["text 3", "text 3", "other", "text 4"], "label": [1, 1, 0, 0]}
    source = load(datasets.DatasetDict({"train": dataset(rows(8)), "validation": dataset(rows(2)), "test": dataset(test)}), seed=0)
    assert "3 of the 4 test texts also occur in train" in source.notes
    assert "2 of the 2 validation texts also occur in train" in source.notes
    assert sizes(source)["test"] == 4


# ---- what is wrong is named


def bad(tmp_path, data, match, **options):
    with pytest.raises(DataError, match=match) as caught:
        load(data, seed=0, **options)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("suffix", [".jsonl", ".json"])
def test_a_nan_in_json_is_nothing_and_no_word(tmp_path, suffix):
    """Python writes it so; JSON has no such word. As a class and as a text it is refused by its row, as null is."""
    records = [{"text": f"text {i}", "label": ["pos", "neg"][i % 2]} for i in range(20)]
    for column in ("label", "text"):
        spoilt = [{**record, column: float("nan")} if i == 7 else record for i, record in enumerate(records)]
        told = json.dumps(spoilt) if suffix == ".json" else "\n".join(map(json.dumps, spoilt))
        assert "NaN" in told
        (tmp_path / f"{column}{suffix}").write_text(told)
        with pytest.raises(DataError, match="row 7 "):
            load(str(tmp_path / f"{column}{suffix}"), seed=0)


def test_numbers_beyond_64_bits_are_text_and_half_a_character_is_named(tmp_path):
    records = [{"text": f"text {i}", "label": i % 2, "id": 2**70 + i} for i in range(20)]
    (tmp_path / "big.jsonl").write_text("\n".join(map(json.dumps, records)))
    assert load(str(tmp_path / "big.jsonl"), seed=0).splits["train"]["id"][0].startswith(str(2**70)[:12])
    records[3]["text"] = "\ud83d cut"
    (tmp_path / "cut.jsonl").write_text("\n".join(map(json.dumps, records)))
    with pytest.raises(DataError, match=r"column 'text' of '.*cut.jsonl' holds half a character in row 3 .*'.ud83d'.*; write it whole"):
        load(str(tmp_path / "cut.jsonl"), seed=0)


@pytest.mark.parametrize("cell", [["whole", "\ud83d cut"], {"role": "user", "content": "\ud83d"}, [{"\ud83d": 1}]])
def test_half_a_character_within_lists_and_objects_is_named(tmp_path, cell):
    """It was a bare StopIteration."""
    whole = json.loads(json.dumps(cell).replace("\\ud83d", "x"))
    records = [{"text": f"text {i}", "label": i % 2, "more": cell if i == 3 else whole} for i in range(20)]
    (tmp_path / "cut.jsonl").write_text("\n".join(map(json.dumps, records)))
    bad(tmp_path, tmp_path / "cut.jsonl", r"column 'more' of '.*cut.jsonl' holds half a character in row 3 .*'.ud83d'.*; write it whole")
    (tmp_path / "name.jsonl").write_text("\n".join(json.dumps({"text": "t", "label": i % 2, "\ud83d": 1}) for i in range(20)))
    bad(tmp_path, tmp_path / "name.jsonl", r"a column's name in '.*name.jsonl' holds half a character: '.ud83d'")


def test_a_parquet_file_with_a_broken_page_is_named(tmp_path):
    path = tmp_path / "all.parquet"
    columns = {"text": [f"a text of some length {i}" for i in range(400)], "label": [0, 1] * 200}
    pq.write_table(pa.table(columns), path, compression="snappy")
    content = bytearray(path.read_bytes())
    content[40:1200] = bytes([255] * 1160)
    path.write_bytes(bytes(content))
    with pytest.raises(DataError, match="all.parquet' is not a readable Parquet file"):
        load(str(path), seed=0)


def test_a_text_that_is_not_utf8_is_named_with_its_offset_and_the_mend(tmp_path):
    (tmp_path / "train.csv").write_bytes(b"text,label\ncaf\xe9,0\n")
    bad(tmp_path, tmp_path, r"train.csv' is not UTF-8: byte 0xe9 at offset 14 .*iconv -f WINDOWS-1252 -t UTF-8 'train.csv'")


@pytest.mark.parametrize(
    ("name", "content", "match"),
    [
        ("a.csv", 'text,label\n"open,0\n', "not well-formed CSV: unexpected end of data"),
        ("a.csv", "text,label\nx,y,0\n", "line 2 of .* has 3 cells, and the first line names 2: text, label"),
        ("a.csv", "", "must name each column once; it is: \\[\\]"),
        ("a.csv", "text,text\n", "must name each column once"),
        ("a.tsv", "text\tlabel\nx\t0\t1\n", "line 2 of .* has 3 cells"),
        ("a.jsonl", '{"text": "x", "label": 0}\n{"text": \n', "line 2 of .* is not JSON"),
        ("a.jsonl", "[1]\n", r"record 0 of .* is \[1\]; each must be an object"),
        ("a.json", '{"text": ["x"], "label": [0, 1]}', "differ in length: {'text': 1, 'label': 2}"),
        ("a.json", "[1, 2]", "record 0 of .* is 1"),
        (
            "a.json",
            '[\n{"text": "x", "label": 0},\n{"text": "y" "label": 1}]',
            "a.json' is not JSON: .*delimiter in line 3, column 14: {\"text",
        ),
        ("a.json", '{"text": "x", "label": 0}\n{"text": \n', "line 2 of .*a.json' is not JSON"),
        ("a.json", '{\n"version": 1,\n"rows": {}}', "no column looks like a label.*among: version, rows"),
        (
            "a.json",
            '{"version": "1", "data": [{"title": "t", "paragraphs": []}]}',
            "is nested by articles and paragraphs.*a question a line",
        ),
        ("a.json", '{"data": [{"title": "t", "paragraphs": []}]}', "is nested by articles and paragraphs, as SQuAD's"),
        ("a.parquet", "PAR1", "not a readable Parquet file"),
        ("a.xlsx", "?", "data files end in .parquet, .csv"),
        ("a.csv", "text,label\n", "no training rows"),
        ("a.csv", "text,label\nx,\ny,\n", "training split has no labels in column 'label'"),
        ("a.csv", "text,label\nx,0\ny,\n", "row 1 of the train split has no label in column 'label'"),
        ("a.csv", "text,label\nx,0\ny,0\nz,0\n", "at least two classes; the data has \\['0'\\]"),
        ("a.csv", "text,label\nx,0\ny,1\n", "2 training rows with 2 different labels are too few to cut a validation split"),
        ("a.jsonl", '{"text": "x", "label": 0.5}', "holds 0.5; a label is one word or one whole number"),
        ("a.jsonl", '{"text": "x", "label": [0]}', r"holds \[0\]; a label is one word"),
        ("a.jsonl", '{"text": "x", "label": 0}\n{"label": 1}', "row 1 of the train split has no text in column 'text'"),
    ],
)
def test_a_file_that_is_wrong_is_named(tmp_path, name, content, match):
    (tmp_path / name).write_text(content)
    bad(tmp_path, tmp_path / name, match)


def test_what_is_not_there_is_named_with_what_is(tmp_path, monkeypatch, no_network):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "rte").mkdir()
    bad(tmp_path, "./nosuch", r"no file or folder './nosuch'; '.*' has: data")
    bad(tmp_path, "data/nosuch", r"no file or folder 'data/nosuch'; '.*data' has: rte")
    bad(tmp_path, "nosuch.csv", "no file or folder 'nosuch.csv'")
    bad(tmp_path, tmp_path / "a" / "b", r"no file or folder .* has: data")
    bad(tmp_path, "data/rte", r"has no data file \(.parquet, .*\); it has: nothing")
    assert no_network == []
    bad(tmp_path, "nosuch", r"'nosuch' is no local file or folder, and the Hugging Face Hub did not give it .*'.*' has: data")


def test_a_folder_that_is_unclear_is_named(tmp_path):
    write(tmp_path / "x.csv", rows(4))
    write(tmp_path / "y.csv", rows(4))
    bad(tmp_path, tmp_path, "has no training file; call it train.csv .* it has: x.csv, y.csv")
    write(tmp_path / "train.csv", rows(4))
    write(tmp_path / "train.json", rows(4))
    bad(tmp_path, tmp_path, "has both train.csv and train.json; leave only the one to use")
    (tmp_path / "train.json").unlink()
    write(tmp_path / "dev.csv", rows(4))
    write(tmp_path / "val.csv", rows(4))
    bad(tmp_path, tmp_path, "more than one validation split: dev, val; leave only")
    shards = tmp_path / "shards"
    shards.mkdir()
    write(shards / "train-00000-of-00002.parquet", rows(4))
    write(shards / "train-00001-of-00002.parquet", {"body": ["x"]})
    bad(tmp_path, shards, "do not have the same columns")


def test_splits_that_do_not_fit_are_named():
    train = dataset(rows(20))
    for match, test in {
        "test split has label b, which no training row has; the training labels are: 0, 1": {"text": ["x"], "label": ["b"]},
        "test split has no column 'text', .* its columns are: body, label": {"body": ["x"], "label": [0]},
        "row 1 of the test split has no text": {"text": ["x", None], "label": [0, 1]},
        "row 1 of the test split has no label": {"text": ["x", "y"], "label": [0, None]},
    }.items():
        plain = datasets.Dataset.from_dict(rows(20))
        bad(None, datasets.DatasetDict({"train": plain, "test": datasets.Dataset.from_dict(test)}), match)
    names = dataset({"text": ["x"], "label": [2]}, names=("no", "yes", "maybe"))
    bad(None, datasets.DatasetDict({"train": train, "test": names}), "has label maybe, .* are: no, yes")
    bad(None, datasets.DatasetDict({"validation": train, "test": train}), "no training rows; its splits are: validation, test")
    bad(None, train, "no column 'body'; its columns are: text, label", text=("body",))
    bad(None, train, "no metric 'auc'", metric="auc")
    odd = pa.table(rows(4) | {"label": [0, 1, 5, 0]}).replace_schema_metadata(train.data.table.schema.metadata)
    bad(None, datasets.Dataset(datasets.table.InMemoryTable(odd)), "holds 5, and its class names number 0 to 1: no, yes")
    many = {"text": list(map(str, range(60))), "label": [f"c{i:02}" for i in range(60)]}
    both = {"train": datasets.Dataset.from_dict(many), "test": datasets.Dataset.from_dict({"text": ["x"], "label": ["z"]})}
    bad(None, datasets.DatasetDict(both), r"c11 and 48 more\. Remove those rows")


@pytest.mark.parametrize(
    ("columns", "other", "match"),
    [
        ({"text": "t", "label": "ab"}, {"text": 7}, "column 'text' of the test split holds int64, such as 7; text would be right"),
        ({"instruction": "i", "input": "c", "output": "o"}, {"input": 3}, "'input' of the test split holds int64, such as 3; text"),
        ({"instruction": "i", "output": "o"}, {"output": 3}, "'output' of the test split holds int64, such as 3; text"),
        ({"question": "q", "context": "c", "answer": "c"}, {"answer": 3}, "such as 3; answers, as texts or with their places"),
        ({"question": "q", "context": "c", "answer": "c"}, {"question": 1}, "'question' of the test split .* 1; text"),
        ({"tokens": ["a", "b"], "tags": ["O", "B-x"]}, {"tokens": "ab"}, "holds string, such as ab; lists of words"),
        ({"tokens": ["a", "b"], "tags": ["O", "B-x"]}, {"tags": "O"}, "holds string, such as O; lists of tags"),
    ],
)
def test_a_held_out_column_of_another_kind_is_named(tmp_path, columns, other, match):
    """It was an AttributeError, or Arrow's own words."""
    train = [{**columns, **({"label": "ab"[i % 2]} if "label" in columns else {})} for i in range(24)]
    (tmp_path / "train.jsonl").write_text("\n".join(map(json.dumps, train)))
    (tmp_path / "test.jsonl").write_text("\n".join(map(json.dumps, [{**train[0], **other}] * 3)))
    bad(tmp_path, tmp_path, match, task="qa" if "question" in columns else "auto")


def test_contexts_that_are_all_missing_are_empty_ones(tmp_path):
    train = [{"instruction": f"i {i}", "input": "c" if i else "", "output": "o"} for i in range(20)]
    (tmp_path / "train.jsonl").write_text("\n".join(map(json.dumps, train)))
    (tmp_path / "test.jsonl").write_text("\n".join(map(json.dumps, [{**train[1], "input": None}] * 2)))
    source = load(tmp_path, seed=0)
    assert source.splits["test"]["input"] == ["", ""] and source.task.written(source.splits["test"])[0] == ["i 1"] * 2


def test_texts_and_labels_as_arrows_other_types_are_texts_and_labels(tmp_path):
    """pandas' categories come as dictionaries, and Polars writes views."""
    columns = {"text": [f"text {i}" for i in range(20)], "label": [["no", "yes"][i % 2] for i in range(20)]}
    plain, views = pa.table(columns), pa.table({name: pa.array(values, pa.string_view()) for name, values in columns.items()})
    coded = pa.table({name: pa.array(values).dictionary_encode() for name, values in columns.items()})
    due = load(datasets.Dataset.from_dict(columns), seed=0)
    for name, table in {"plain": plain, "views": views, "coded": coded}.items():
        pq.write_table(table, tmp_path / f"{name}.parquet")
        source = load(tmp_path / f"{name}.parquet", seed=0)
        assert (source.task, list(source.splits["test"])) == (due.task, list(due.splits["test"]))
    kind = pa.list_(pa.dictionary(pa.int8(), pa.string()))
    tagged = {"tokens": pa.array([["a", "b"]] * 20, kind), "tags": pa.array([["O", "B-x"]] * 20, kind)}
    pq.write_table(pa.table(tagged), tmp_path / "tagged.parquet")
    assert load(tmp_path / "tagged.parquet", seed=0).task.metric == "entity_f1"


# ---- the finer points of files


def test_csv_cells_are_kept_as_they_stand(tmp_path):
    texts = ["null", "NA", "007", 'a "quoted" word', "two\nlines", "comma, here", "", "ünï", "x" * 200_000, "1e5"]
    write_csv(tmp_path / "a.csv", {"text": texts, "label": [0, 1] * 5})
    limit = csv.field_size_limit()
    source = load(tmp_path / "a.csv", seed=0)
    assert sorted(t for rows in source.splits.values() for t in rows["text"]) == sorted(texts)
    assert csv.field_size_limit() == limit
    (tmp_path / "b.csv").write_text("\ufefftext;label\n" + "".join(f"a, {i};{i % 2}\n\n" for i in range(20)), encoding="utf-8")
    assert load(tmp_path / "b.csv", seed=0).splits["train"]["text"][0].startswith("a, ")
    (tmp_path / "c.csv").write_text('"text, ""long""";label\n' + "".join(f"a, {i};{i % 2}\n" for i in range(20)), encoding="utf-8")
    assert load(tmp_path / "c.csv", seed=0).task.texts == ('text, "long"',), "a comma within quotes parts no cells"


def test_a_tsv_with_stray_quotes_is_read_as_it_stands_and_a_quoted_one_unquoted(tmp_path):
    stray = [f'"{i}" he said' if i % 2 else f'so " {i}' for i in range(20)]
    (tmp_path / "a.tsv").write_text("text\tlabel\n" + "".join(f"{t}\t{i % 2}\n" for i, t in enumerate(stray)))
    assert set(load(tmp_path / "a.tsv", seed=0).splits["train"]["text"]) <= set(stray)
    write_csv(tmp_path / "b.tsv", {"text": [f'a "b"\t{i}' for i in range(20)], "label": [0, 1] * 10}, "\t")
    assert load(tmp_path / "b.tsv", seed=0).splits["train"]["text"][0].startswith('a "b"\t')


def test_json_comes_in_several_shapes(tmp_path):
    columns = rows(20)
    records = [{"text": t, "label": label} for t, label in zip(columns["text"], columns["label"], strict=True)]
    for shape in (columns, records, {"data": records}, {"data": columns}):
        (tmp_path / "a.json").write_text(json.dumps(shape))
        assert sizes(load(tmp_path / "a.json", seed=0))["train"] == 16
    (tmp_path / "a.json").write_text("\n".join(map(json.dumps, records)))
    assert sizes(load(tmp_path / "a.json", seed=0))["train"] == 16
    records[0]["note"], records[1]["note"] = 1, "one"
    (tmp_path / "a.json").write_text(json.dumps(records))
    assert "note" in load(tmp_path / "a.json", seed=0).splits["train"].column_names


# ---- tokenise


def source_of_pairs():
    pair = {"premise": list("abcdef"), "hypothesis": list("uvwxyz"), "label": [0, 1] * 3}
    splits = {s: datasets.Dataset.from_dict(pair) for s in ("train", "validation", "test")}
    return load(datasets.DatasetDict(splits), seed=0)


def test_tokenise_encodes_each_split_in_one_pass_with_its_labels():
    calls = []

    def encode(texts, pairs):
        calls.append((texts, pairs))
        ids = [[ord(a), ord(b)] for a, b in zip(texts, pairs, strict=True)]
        return ids, [[0, 1] for _ in ids]

    made = tokenise(source_of_pairs(), encode)
    assert calls == [(list("abcdef"), list("uvwxyz"))] * 3
    assert list(made) == ["train", "validation", "test"]
    assert made["test"].labels.tolist() == [0, 1] * 3
    padded = made["test"].pad(np.array([2]), pad_id=0)
    assert padded.ids.tolist() == [[ord("c"), ord("w")]]
    assert padded.segments.tolist() == [[0, 1]]
    single = load(datasets.Dataset.from_dict(rows(20)), seed=0)
    seen = []
    tokenise(single, lambda texts, pairs: (seen.append(pairs), ([[1]] * len(texts), [[0]] * len(texts)))[1])
    assert seen == [None] * 3


def test_tokens_know_that_their_texts_are_pairs():
    def encode(texts, _):
        return [[1, 2]] * len(texts), [[0, 1]] * len(texts)

    single = load(datasets.Dataset.from_dict(rows(20)), seed=1)
    assert {made.pairs for made in tokenise(source_of_pairs(), encode).values()} == {True}
    assert {made.pairs for made in tokenise(single, encode).values()} == {False}
    assert tokenise(source_of_pairs(), encode)["train"].subset([0]).pairs


def test_tokens_are_remembered_by_the_texts_and_what_encodes_them(tmp_path, monkeypatch):
    monkeypatch.setenv("FEDLOOM_CACHE", str(tmp_path))
    calls = []

    def encode(texts, pairs):
        calls.append(len(texts))
        ids = [[ord(a[-1]), ord(b[-1])] for a, b in zip(texts, pairs or texts, strict=True)]
        return ids, [[0, 1] for _ in ids]

    def flat(examples):
        parts = (examples.tokens, examples.segments, examples.offsets, examples.store_labels, examples.rows)
        return [(part.dtype, part.tolist()) for part in parts]

    pairs, single = source_of_pairs(), load(datasets.Dataset.from_dict(rows(20)), seed=0)
    plain = tokenise(pairs, encode)
    assert calls == [6] * 3 and list(tmp_path.iterdir()) == []
    first, second = tokenise(pairs, encode, "a tokenizer"), tokenise(pairs, encode, "a tokenizer")
    assert calls == [6] * 4  # the three splits hold the same texts
    for split in plain:
        assert flat(plain[split]) == flat(first[split]) == flat(second[split])
    tokenise(pairs, encode, "another tokenizer")
    assert calls == [6] * 5
    before = flat(tokenise(single, encode, "a tokenizer")["train"])
    assert calls == [6] * 5 + [16, 2, 2]
    assert flat(tokenise(single, encode, "a tokenizer")["train"]) == before
    tokenise(load(datasets.Dataset.from_dict(rows(20)), seed=1), encode, "a tokenizer")
    assert calls[8:] == [16, 2, 2]  # other texts in each split


def test_labels_are_never_those_of_another_run(tmp_path, monkeypatch):
    """Tokens are remembered by texts alone: the same texts with other labels have other labels."""
    monkeypatch.setenv("FEDLOOM_CACHE", str(tmp_path))
    texts = [f"{i}" for i in range(20)]
    for labels in ([0, 1] * 10, [1, 0] * 10):
        source = load(datasets.Dataset.from_dict({"text": texts, "label": labels}), seed=0)
        made = tokenise(source, lambda texts, _: ([[int(t) + 1] for t in texts], [[0]] * len(texts)), "x")["train"]
        assert made.labels.tolist() == [labels[int(t) - 1] for t in made.tokens]


def test_tokenise_refuses_what_is_not_one_example_a_text():
    with pytest.raises(DataError, match="5 ids and 6 segments for the 6 texts of the train split"):
        tokenise(source_of_pairs(), lambda texts, _: ([[1]] * 5, [[0]] * 6))
    with pytest.raises(DataError, match=r"row 4 of the train split has no tokens \(its text is 'e'\)"):
        tokenise(source_of_pairs(), lambda texts, _: ([[1]] * 4 + [[], [1]], [[0]] * 4 + [[], [0]]))


@pytest.mark.skipif(not SHARED.is_dir(), reason=f"needs the data sets in {SHARED}")
@pytest.mark.parametrize(
    ("name", "texts", "metric", "expected"),
    [
        ("trec", 1, "accuracy", (4907, 545, 500)),
        ("sst2", 1, "accuracy", (6920, 872, 1821)),
        ("rte", 2, "accuracy", (2241, 249, 277)),
        ("mrpc", 2, "f1", (3668, 408, 1725)),
        ("cola", 1, "mcc", (7696, 855, 1043)),
        ("qnli", 2, "accuracy", (8999, 1000, 5463)),
        ("subj", 1, "accuracy", (7000, 1000, 2000)),
        ("ag_news", 1, "accuracy", (27031, 3003, 7600)),
    ],
)
def test_public_sets_load_without_a_flag(name, texts, metric, expected, no_network):
    source = load(str(SHARED / name), seed=42)
    assert (len(source.task.texts), source.task.metric, tuple(sizes(source).values())) == (texts, metric, expected)
    assert no_network == []


@pytest.mark.skipif(not SHARED.is_dir(), reason=f"needs the data sets in {SHARED}")
@pytest.mark.parametrize(
    ("name", "task", "metric", "rows", "classes"),
    [
        ("wnut17", "Tagging", "entity_f1", (3394, 1009, 1287), 7),
        ("squad_v1", "Questions", "answer_f1", (20000, None, 10570), 443),
        ("20newsgroups", "Classification", "accuracy", (11314, None, 7532), 20),
        ("alpaca", "Instructions", "token_accuracy", (52002, None, None), 1),
        ("dolly15k", "Instructions", "token_accuracy", (14931, None, 80), 8),
        ("gsm8k", "Instructions", "token_accuracy", (7473, None, 1319), 1),
    ],
)
def test_public_sets_of_every_task_load_without_a_flag(name, task, metric, rows, classes, no_network):
    """Every row of the README's counts is in a split; what a set lacks is cut from its training rows, a tenth each."""
    source = load(str(SHARED / name), seed=42)
    assert (type(source.task).__name__, source.task.metric, len(source.task.classes)) == (task, metric, classes)
    made = tuple(sizes(source).values())
    train, *held = rows
    lacking = sum(count is None for count in held)
    assert sum(made) == train + sum(count or 0 for count in held)
    assert [count for count, due in zip(made[1:], held, strict=True) if due is not None] == [count for count in held if count is not None]
    assert made[0] == train - lacking * (train // 10)
    assert no_network == []


@pytest.mark.skipif(not SHARED.is_dir(), reason=f"needs the data sets in {SHARED}")
def test_rows_of_public_sets_are_what_their_files_hold(no_network):
    """A sentence's entities, an answer's place in its context, Dolly's shards and first prompt, a number at an answer's end."""
    tagged = load(str(SHARED / "wnut17"), seed=42)
    words, due = tagged.task.written(tagged.splits["train"])
    tags = [tagged.task.tags[int(tag)] for tag in due[0].split()]
    kinds = {word: tag for word, tag in zip(words[0].split(BETWEEN), tags, strict=True) if tag != "O"}
    assert kinds == {"ESB": "B-location", "Empire": "B-location", "State": "I-location", "Building": "I-location"}
    assert len(tagged.task.tags) == 13

    asked = load(str(SHARED / "squad_v1"), seed=42, max_train=50, max_validation=20, max_test=50)
    _, contexts = asked.task.written(asked.splits["train"])
    for context, answers in zip(contexts, asked.splits["train"]["answers"], strict=True):
        begin, end, text = context.split(" ", 2)
        assert text[int(begin) : int(end)] in {said.strip() for said, _ in json.loads(answers)}

    dolly = load(str(SHARED / "dolly15k"), seed=42)
    shards = np.asarray([int(of) for of in [*dolly.splits["train"]["client"], *dolly.splits["validation"]["client"]]])
    table = pq.read_table(SHARED / "dolly15k" / "train.parquet")
    assert np.bincount(shards).tolist() == np.bincount(np.asarray(table["client"].to_pylist(), int)).tolist()
    assert len(np.unique(shards)) == 10
    prompt, answer = (column[0] for column in dolly.task.written(dolly.splits["test"]))
    assert prompt == "What are some common mushrooms used in cooking?" and answer.startswith(
        "Common mushrooms used in cooking include white"
    )

    maths = load(str(SHARED / "gsm8k"), seed=42)
    assert all(numbers.due(answer) is not None for answer in maths.task.written(maths.splits["test"])[1])


def test_labels_written_as_numbers_in_one_file_and_as_text_in_another_are_the_same(tmp_path):
    (tmp_path / "train.jsonl").write_text("".join(json.dumps({"text": f"a {i}", "label": i % 2}) + "\n" for i in range(20)))
    (tmp_path / "test.jsonl").write_text("".join(json.dumps({"text": f"b {i}", "label": str(i % 2)}) + "\n" for i in range(4)))
    source = load(tmp_path, seed=1)
    assert source.task.classes == ("0", "1") and list(source.splits["test"]["label"]) == [0, 1, 0, 1]


@pytest.mark.parametrize(("train", "test"), [((True, False), ("True", "false")), (("true", "false"), (True, False))])
def test_truth_values_in_one_file_and_as_text_in_another_are_the_same(tmp_path, train, test):
    """Python writes True into a CSV file, and JSON has true."""
    for name, of in {"train": train, "test": test}.items():
        held = [{"text": f"{name} {i}", "label": of[i % 2]} for i in range(20)]
        (tmp_path / f"{name}.jsonl").write_text("\n".join(map(json.dumps, held)))
    source = load(tmp_path, seed=1)
    assert source.task.classes == (str(train[1]), str(train[0])) and list(source.splits["test"]["label"]) == [1, 0] * 10
    (tmp_path / "test.jsonl").write_text(json.dumps({"text": "t", "label": "maybe"}))
    bad(tmp_path, tmp_path, "the test split has label maybe, which no training row has")


def test_minus_one_is_no_label_only_where_no_training_row_has_it(tmp_path):
    """A test split all of whose rows were of class -1 was left out as if it had no labels."""
    test = datasets.Dataset.from_dict({"text": ["u", "v"], "label": [-1, -1]})
    for labels, kept in (([-1, 1], True), ([0, 1], False)):
        train = datasets.Dataset.from_dict(rows(50) | {"label": labels * 25})
        source = load(datasets.DatasetDict({"train": train, "test": test}), seed=0)
        assert (sizes(source)["test"] == 2) is kept
        assert ("the test split has no labels and is not used" in source.notes) is not kept


def test_a_gap_among_numbers_is_told_as_one_and_not_as_another_row(tmp_path):
    """pandas writes such a column as 0.0, 1.0, NaN."""
    table = pa.table({"text": [f"a {i}" for i in range(6)], "label": pa.array([0.0, 1.0, 0.0, 1.0, math.nan, 1.0])})
    pq.write_table(table, tmp_path / "train.parquet")
    with pytest.raises(DataError, match="row 4 of the train split has no label in column 'label'"):
        load(tmp_path, seed=1)


def test_empty_texts_are_told(tmp_path):
    rows = ["text,label", *[f"word {i},{'ab'[i % 2]}" for i in range(18)], ",a", " ,b"]
    (tmp_path / "train.csv").write_text("\n".join(rows) + "\n")
    (tmp_path / "test.csv").write_text("text,label\nx,a\n,b\n")
    (tmp_path / "validation.csv").write_text("text,label\nx,a\ny,b\n")
    notes = said(load(tmp_path, seed=1))
    assert "2 of the 20 train texts are empty; they are kept" in notes and "1 of the 2 test texts are empty" in notes
    assert "validation texts are empty" not in notes
