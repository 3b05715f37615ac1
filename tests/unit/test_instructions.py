"""Instruction data: which columns, what is read of them, and how token counts become scores."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import torch

from fedloom.data.instructions import Instructions, choose_columns, looks_like_instructions
from fedloom.data.rows import Rows
from fedloom.data.sources import load
from fedloom.data.tasks import Column, DataError
from fedloom.messages import Task, Update
from fedloom.run.deployment.device import counted


def columns(*names: str, repeats: tuple[str, ...] = ()) -> dict[str, Column]:
    return {name: Column("string", 3 if name in repeats else 90, 90) for name in names}


@pytest.mark.parametrize(
    ("names", "found"),
    [
        (("instruction", "context", "response", "category"), (("instruction", "context"), "response", "category")),
        (("instruction", "input", "output"), (("instruction", "input"), "output", "")),
        (("question", "answer"), (("question",), "answer", "")),
        (("id", "Prompt", "completion"), (("Prompt",), "completion", "")),
    ],
)
def test_columns_are_found_by_name(names: tuple[str, ...], found: tuple[tuple[str, ...], str, str]) -> None:
    given = columns(*names, repeats=("category",))
    assert looks_like_instructions(given)
    assert choose_columns(given, (), "", False) == found


def test_columns_can_be_named_and_text_is_one() -> None:
    given = columns("a", "b", "c", "kind", repeats=("kind",))
    assert not looks_like_instructions(given)
    assert choose_columns(given, ("a", "b"), "kind", False) == (("a",), "b", "kind")
    assert choose_columns(given, ("a", "b", "c"), "", False) == (("a", "b"), "c", "")
    assert choose_columns(given, ("c",), "", True) == ((), "c", "")
    assert choose_columns(columns("text", "b"), (), "", True) == ((), "text", "")


@pytest.mark.parametrize(
    ("text", "label", "plain", "says"),
    [
        ((), "", False, "no columns look like a prompt and its answer"),
        (("a",), "", False, r"2 or 3 columns, not \['a'\]"),
        (("a", "a"), "", False, "2 or 3 columns"),
        (("a", "zzz"), "", False, "no column 'zzz'; its columns are: a, b, n"),
        (("a", "n"), "", False, "column 'n' does not hold text"),
        ((), "zzz", False, "no column 'zzz'"),
        ((), "", True, "plain text is one column"),
        (("a", "b"), "", True, "plain text is one column"),
    ],
)
def test_what_does_not_fit_is_said(text: tuple[str, ...], label: str, plain: bool, says: str) -> None:
    given = {**columns("a", "b"), "n": Column("integer", 3, 90)}
    with pytest.raises(DataError, match=says):
        choose_columns(given, text, label, plain)


def test_a_context_stands_after_an_empty_line_where_there_is_one() -> None:
    rows = Rows(pa.table({"q": ["one", "two"], "c": ["", "more"], "a": ["A", "B"]}))
    assert Instructions(("q", "c"), "a", "all", ("all",)).written(rows) == [["one", "two\n\nmore"], ["A", "B"]]
    assert Instructions((), "a", "all", ("all",)).written(rows) == [["", ""], ["A", "B"]]


def test_scores_are_by_tokens() -> None:
    """Two answers of 2 and 8 tokens: every token counts alike."""
    task, made = Instructions(("q",), "a", "all", ("all",)), np.array([[2.0, 1, 2], [4.0, 7, 8]])
    assert task.scores(np.zeros(2), made) == {"token_accuracy": 0.8, "perplexity": pytest.approx(np.exp(0.6))}
    thirds = np.array([[2.0, 1, 2], [4.0, 0, 1]], np.float32)
    assert task.scores(np.zeros(2), thirds)["token_accuracy"] == 1 / 3, "as a federation counts it, and not the nearest float32"
    assert task.loss(np.zeros(2), made) == pytest.approx(0.6)
    found = task.outcomes(np.zeros(2), made)
    cells = {(int(e), int(t), int(p)): int(c) for e, t, p, c in zip(*found, strict=True)}
    assert cells == {(0, 0, 0): 1, (0, 0, 1): 1, (1, 0, 0): 7, (1, 0, 1): 1}
    with pytest.raises(DataError, match="example 1 is not finite; training diverged"):
        task.scores(np.zeros(2), np.array([[2.0, 1, 2], [np.nan, 7, 8]]))
    with pytest.raises(DataError, match="n > 0"):
        task.scores(np.zeros(0), np.zeros((0, 3)))


def test_missing_contexts_are_empty_and_data_without_labels_has_one(tmp_path: Path) -> None:
    (tmp_path / "train.jsonl").write_text(
        '{"question": "q", "context": null, "answer": "a"}\n{"question": "p", "context": "c", "answer": "b"}\n' * 9
    )
    source = load(tmp_path, seed=1)
    assert source.task.classes == ("all",)
    assert set(source.task.written(source.splits["train"])[0]) <= {"q", "p\n\nc"}
    assert any("prompt question + context, answer answer, no labels; metric token_accuracy" in note for note in source.notes)
    with pytest.raises(DataError, match="scored by token_accuracy, not by f1"):
        load(tmp_path, seed=1, metric="f1")
    with pytest.raises(DataError, match="no text in column 'answer'"):
        (tmp_path / "train.jsonl").write_text('{"question": "q", "answer": null}\n{"question": "p", "answer": "b"}\n' * 9)
        load(tmp_path, seed=1)


def test_a_device_elsewhere_tells_no_loss_of_texts_of_which_no_token_is_due() -> None:
    """As of an empty text, whose only token has nothing before it; of the other split it tells its own."""
    rows = Rows(pa.table({"text": ["", ""], "all": [0, 0]}))
    source = SimpleNamespace(task=Instructions((), "text", "all", ("all",)), splits={"validation": rows, "test": rows})
    judge: Any = SimpleNamespace(source=source, judged=lambda split, which, made: made)
    made = Update(0, 2, {"validation": torch.zeros(2, 3), "test": torch.tensor([[0.0, 0, 0], [3.0, 1, 2]])})
    told = counted(judge)(SimpleNamespace(), Task("predict", 0), made)  # type: ignore[arg-type]
    assert told.metrics == {"test_loss": 1.5}
    assert told.tensors["validation"].shape == (0, 3) and told.tensors["test"].tolist() == [[0, 0, 1], [0, 1, 1]]
