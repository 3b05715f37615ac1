"""Conversations: which columns hold them, in which shapes, and what is said of malformed ones."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from fedloom.data.chats import as_texts, choose_columns, looks_like_chats
from fedloom.data.instructions import Instructions
from fedloom.data.sources import load
from fedloom.data.tasks import Column, DataError

OPENAI = [{"role": r, "content": c} for r, c in (("system", "s"), ("user", "a"), ("assistant", "b"), ("user", "c"), ("assistant", "d"))]
SHAREGPT = [{"from": r, "value": c} for r, c in (("system", "s"), ("human", "a"), ("gpt", "b"), ("human", "c"), ("gpt", "d"))]
TURNS = [["system", "s"], ["user", "a"], ["assistant", "b"], ["user", "c"], ["assistant", "d"]]


@pytest.mark.parametrize("given", [OPENAI, SHAREGPT, json.dumps(OPENAI)])
def test_both_forms_are_the_same_turns(given: Any) -> None:
    (text,), cut = as_texts([given], "x")
    assert json.loads(text) == TURNS and cut == 0


def test_what_no_answer_follows_is_left_out_and_counted() -> None:
    texts, cut = as_texts([OPENAI[:4], OPENAI[:3], OPENAI], "x")
    assert [len(json.loads(text)) for text in texts] == [3, 3, 5]
    assert cut == 1


def one(**turn: Any) -> list[dict[str, Any]]:
    return [{"role": "user", "content": "a"}, turn]


@pytest.mark.parametrize(
    ("given", "says"),
    [
        (None, "row 1 of the train split is nothing; a conversation is a list of"),
        ([], r"row 1 of the train split is \[\]"),
        ("hello", "row 1 of the train split is the text 'hello'"),
        ({"role": "user"}, "a conversation is a list of"),
        (one(text="b"), 'turn 1 of row 1 of the train split is {"text": "b"}, which does not say whose it is'),
        (
            one(role="tool", content="b"),
            "turn 1 of row 1 of the train split is that of 'tool'; there are system, user, assistant, human",
        ),
        (one(role="assistant", content=None), "turn 1 of row 1 of the train split has nothing as its content; it must be text"),
        (one(role="assistant", content=[{"type": "text"}]), "as its content; it must be text"),
        (one(role="user", content="b"), "turn 1 of row 1 of the train split is the user's, and the assistant's would be right there"),
        (one(role="system", content="b"), "is the system's, and the assistant's would be right"),
        ([{"from": "gpt", "value": "b"}], "turn 0 of row 1 of the train split is the assistant's, and the user's or system would be right"),
        ([{"role": "user", "content": "a"}], "row 1 of the train split has no turn of the assistant's"),
    ],
)
def test_a_malformed_row_says_where_what_came_and_what_would_be_right(given: Any, says: str) -> None:
    with pytest.raises(DataError, match=says):
        as_texts([OPENAI, given], "the train split")


def test_the_column_is_found_or_named() -> None:
    chat, text = Column("chats", 0, 9), Column("string", 9, 9)
    assert (
        looks_like_chats({"prompt": text, "messages": chat})
        and not looks_like_chats({"messages": text})
        and not looks_like_chats({"x": chat})
    )
    assert choose_columns({"x": text, "y": chat}, ()) == "y"
    assert choose_columns({"x": chat, "y": chat, "Conversations": chat}, ()) == "Conversations"
    assert choose_columns({"x": text, "y": chat}, ("x",)) == "x"
    for columns, named, says in (
        ({"x": chat, "y": chat}, (), "conversations are one column, and 2 fit"),
        ({"x": text}, (), "and 0 fit"),
        ({"x": chat}, ("z",), "no column 'z'; its columns are: x"),
        ({"x": Column("integer", 2, 9)}, ("x",), "'x' holds no conversations"),
    ):
        with pytest.raises(DataError, match=says):
            choose_columns(columns, named)


def test_files_of_conversations(tmp_path: Path) -> None:
    rows = [{"prompt": "a", "response": "b", "conversations": SHAREGPT, "topic": "xy"[i % 2]} for i in range(20)]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "train.parquet")
    source = load(tmp_path, seed=1)
    assert source.task == Instructions((), "conversations", "topic", ("x", "y"), chats=True)
    asked, answers = source.task.written(source.splits["train"])
    assert set(asked) == {""} and [json.loads(text) for text in answers] == [TURNS] * 16
    assert any("conversations conversations, skewed by topic (2 values); metric token_accuracy" in note for note in source.notes)
    (tmp_path / "train.parquet").unlink()
    lines = [json.dumps({"messages": OPENAI[:4] if i else "oh"}) + "\n" for i in range(20)]
    (tmp_path / "train.jsonl").write_text("".join(lines))
    with pytest.raises(DataError, match="row 0 of the train split is the text 'oh'"):
        load(tmp_path, seed=1)
    (tmp_path / "train.jsonl").write_text("".join(lines[1:]))
    assert any("19 conversations of the train split end without an answer" in note for note in load(tmp_path, seed=1).notes)
    with pytest.raises(DataError, match="scored by token_accuracy, not by f1"):
        load(tmp_path, seed=1, metric="f1")
