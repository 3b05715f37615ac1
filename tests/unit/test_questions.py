"""Questions: which columns, what is read of them, and what is wrong with them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from fedloom.data.questions import ARTICLE, OTHER, Questions, as_texts, choose_columns, golds, looks_like_questions
from fedloom.data.sources import load
from fedloom.data.tasks import Column, DataError, headline


def row(context: str, *answers: tuple[str, int], title: str = "t", question: str = "q") -> dict[str, Any]:
    held = {"text": [text for text, _ in answers], "answer_start": [begin for _, begin in answers]}
    return {"id": "1", "title": title, "context": context, "question": question, "answers": held}


SOME = [row("ab cd ef", ("cd", 3), title="b"), row("x y x", ("x", 4), title="a")] * 6


def write(folder: Path, train: list[dict[str, Any]], **splits: list[dict[str, Any]]) -> Path:
    for split, rows in {"train": train, **splits}.items():
        (folder / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def test_squads_columns_are_found(tmp_path: Path) -> None:
    source = load(write(tmp_path, SOME, validation=SOME[:3], test=[*SOME[:2], row("m n", ("n", 2), ("m", -1), title="new")]), seed=1)
    assert isinstance(source.task, Questions)
    assert source.task.texts == ("question", "context", "answers") and source.task.metric == "answer_f1"
    assert source.task.classes == ("a", "b", OTHER)
    rows = source.splits["test"]
    assert rows[ARTICLE] == [1, 0, 2], "articles that no training question is about are one class"
    assert source.task.written(rows) == [["q", "q", "q"], ["3 5 ab cd ef", "4 5 x y x", "2 3 m n"]]
    assert golds(rows["answers"][2]) == ["n", "m"]
    assert any("metric answer_f1" in note for note in source.notes)


def test_parquet_as_the_hub_has_it_and_a_lone_validation_split(tmp_path: Path) -> None:
    kind = pa.struct({"text": pa.list_(pa.string()), "answer_start": pa.list_(pa.int32())})
    columns: dict[str, Any] = {name: [row[name] for row in SOME * 3] for name in SOME[0]}
    table = pa.table({**columns, "answers": pa.array(columns["answers"], kind)})
    for split in ("train", "validation"):
        pq.write_table(table, tmp_path / f"{split}.parquet")
    source = load(tmp_path, seed=1)
    assert isinstance(source.task, Questions)
    assert [len(source.splits[s]) for s in ("train", "validation", "test")] == [32, 4, 36]


def test_questions_of_one_context_are_cut_together(tmp_path: Path) -> None:
    """A model was validated on paragraphs that it had been trained on, by other questions."""
    rows = [row(f"c {i // 4} x", ("x", 4 + i // 40), title="uv"[i // 4 % 2], question=f"q {i}") for i in range(200)]
    rows += [row(f"alone {i}", ("alone", 0), title=f"w {i}") for i in range(10)]
    made = [load(write(tmp_path, rows), seed=seed) for seed in (1, 1, 2)]
    contexts = [{split: set(source.splits[split]["context"]) for split in source.splits} for source in made]
    assert contexts[0] == contexts[1] and contexts[0]["test"] != contexts[2]["test"]
    for source, of in zip(made, contexts, strict=True):
        assert not of["train"] & of["test"] and not of["train"] & of["validation"] and not of["validation"] & of["test"]
        assert [len(source.splits[split]) for split in ("train", "validation", "test")] == [170, 20, 20]
        assert {f"alone {i}" for i in range(10)} <= of["train"], "each the only question of its article"
        assert not any("contexts" in note for note in source.notes)


def test_contexts_that_are_trained_on_too_are_told(tmp_path: Path) -> None:
    source = load(write(tmp_path, SOME, test=[*SOME[:2], row("m n", ("n", 2))], validation=[row("m n", ("n", 2))]), seed=1)
    assert "2 of the 3 contexts of the test split also occur in train" in source.notes
    assert not any("contexts of the validation" in note for note in source.notes)
    (tmp_path / "few").mkdir()
    few = load(write(tmp_path / "few", SOME), seed=1)
    assert len(few.splits["test"]) == 1, "of each article one context: it is parted"
    assert "1 of the 1 contexts of the test split also occur in train" in few.notes


def test_articles_that_are_not_told_are_one(tmp_path: Path) -> None:
    plain = [{"question": "q", "context": "a b", "answer": "b"}] * 8
    source = load(write(tmp_path, plain), seed=1, task="qa")
    assert source.task.classes == ("all",) and source.splits["train"][ARTICLE] == [0] * 6
    by_owner = [{**one, "owner": "uv"[i % 2]} for i, one in enumerate(plain)]
    assert load(write(tmp_path, by_owner), seed=1, task="qa", label="owner").task.classes == ("u", "v")


@pytest.mark.parametrize(
    ("given", "made"),
    [
        ({"text": ["cd"], "answer_start": [3]}, [["cd", 3]]),
        ({"text": ["cd"], "answer_start": [-1]}, [["cd", 3]]),
        ({"text": ["cd"], "answer_start": [0]}, [["cd", 3]]),
        ({"text": ["x", "ab"], "answer_start": [1, 6]}, [["x", -1], ["ab", 6]]),
        ({"text": [" cd "], "answer_start": [2]}, [["cd", 3]]),
        ({"text": ["cd"], "answer_start": None}, [["cd", 3]]),
        ([{"text": "cd", "answer_start": 3}, {"text": "ab", "answer_start": 0}], [["cd", 3], ["ab", 0]]),
        ("cd", [["cd", 3]]),
        (["", "ab"], [["ab", 0]]),
    ],
)
def test_answers_in_every_shape(given: Any, made: list[list[Any]]) -> None:
    """A place that is not told, or is wrong, is the first that holds the text."""
    assert json.loads(as_texts(["ab cd ab"], [given], "train")[0]) == made


@pytest.mark.parametrize(
    ("bad", "says"),
    [
        (row("a b"), "row 12 of the train split has no answer; every question needs one that stands in its context"),
        (row("a b", ("", 0)), "row 12 of the train split has no answer"),
        (row("a b", ("c", 0)), "row 12 of the train split has an answer that is not in its context: 'c'"),
        ({**row("a b", ("a", 0)), "question": None}, "row 12 of the train split has no text in column 'question'"),
        ({**row("a b", ("a", 0)), "title": None}, "row 12 of the train split has no text in column 'title'"),
    ],
)
def test_a_bad_row_is_named(tmp_path: Path, bad: dict[str, Any], says: str) -> None:
    with pytest.raises(DataError, match=says):
        load(write(tmp_path, [*SOME, bad], test=SOME[:2]), seed=1)


def test_a_held_out_split_without_rows_is_a_devices_own(tmp_path: Path) -> None:
    """In a simulation such a split is cut anew; a device of a federation keeps it as it is."""
    write(tmp_path, SOME, test=SOME[:2])
    pq.write_table(pa.Table.from_pylist(SOME).slice(0, 0), tmp_path / "validation.parquet")
    assert len(load(tmp_path, seed=1).splits["validation"]) == 1
    assert len(load(tmp_path, seed=1, classes=("a", "b", "c")).splits["validation"]) == 0


def test_columns_can_be_named() -> None:
    given = {"q": Column("string", 9, 9), "p": Column("string", 9, 9), "r": Column("answers", 0, 9), "n": Column("integer", 3, 9)}
    assert choose_columns(given, ("q", "p", "r"), "n") == ("q", "p", "r", "n")
    assert choose_columns({**given, "title": Column("string", 2, 9)}, ("q", "p", "r"), "")[3] == "title"
    for text, label, says in (
        ((), "", "a column with its question, and no column looks like it"),
        (("q", "p"), "", "read from three columns, question, context and answers"),
        (("q", "n", "r"), "", "a column with its context, and 'n' is none"),
        (("q", "p", "n"), "", "a column with its answers, and 'n' is none"),
        (("q", "p", "zzz"), "", "no column 'zzz'"),
        (("q", "p", "r"), "zzz", "no column 'zzz'"),
    ):
        with pytest.raises(DataError, match=says):
            choose_columns(given, text, label)


def test_a_label_beside_question_and_context_is_no_question_answering() -> None:
    pair = {"question": Column("string", 9, 9), "context": Column("string", 9, 9), "label": Column("integer", 2, 9)}
    assert not looks_like_questions(pair)
    assert not looks_like_questions({**pair, "answer": Column("string", 9, 9)}), "these are instructions, unless somebody says otherwise"
    assert looks_like_questions({**pair, "answers": Column("answers", 0, 9)})


def test_the_headline_of_parts_added_over_devices_is_the_mean_over_questions() -> None:
    task = Questions("q", "c", "a", ("all",))
    made = np.array([[0.5, 2 / 3, 0], [0.1, 1, 1], [3, 0, 0]])
    found = task.outcomes(np.zeros(3), made)
    right = found.count[(found.true == 0) & (found.predicted == 0)].sum()
    counts = np.array([[right, 0], [3 * task.unit, 0], [right, 3 * task.unit - right]])
    assert headline("answer_f1", *counts) == pytest.approx(task.scores(np.zeros(3), made)["answer_f1"], abs=1e-5)


def test_scores_need_questions_and_finite_numbers() -> None:
    task = Questions("q", "c", "a", ("all",))
    with pytest.raises(DataError, match="n > 0 questions"):
        task.scores(np.zeros(0), np.zeros((0, 3)))
    with pytest.raises(DataError, match="training diverged"):
        task.scores(np.zeros(1), np.array([[np.nan, 1, 1]]))
