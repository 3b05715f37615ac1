"""Final numbers of answers: what is read of a text, and what a run tells of what a model wrote."""

from __future__ import annotations

import json
from dataclasses import replace
from decimal import Decimal
from pathlib import Path
from typing import Any

import pytest

from fedloom.data.numbers import due, last, marked
from fedloom.run.numbers import LONGEST, TOGETHER, exact_match
from fedloom.run.world import World, build
from tests import small
from tests.oracle.test_answers import TEMPLATE
from tests.oracle.test_cloze import folder as language_model


@pytest.mark.parametrize(
    ("text", "number"),
    [
        ("so 48+24 = <<48+24=72>>72.\n#### 72", "72"),
        ("#### 1,080", "1080"),
        ("####1,234,567.50 euros", "1234567.5"),
        ("#### $1,080.", "1080"),
        ("#### $-5", "-5"),
        ("#### -$5.00", "-5"),
        ("#### −3", "-3"),
        ("#### 12%", "12"),
        ("#### +.5", "0.5"),
        ("#### 3\n#### 4", "3"),
        ("#### the answer is 5", None),
        ("####", None),
        ("it is 5", None),
    ],
)
def test_a_marked_number_is_read_by_its_value(text: str, number: str | None) -> None:
    assert marked(text) == (None if number is None else Decimal(number))


@pytest.mark.parametrize(
    ("text", "number"),
    [
        ("5 apples and 7 pears", "7"),
        ("7-3", "3"),
        ("it falls to -3", "-3"),
        ("it costs $1,200.", "1200"),
        ("1,2", "2"),
        ("(4)-2=x", "2"),
        ("a share of 0.25, roughly", "0.25"),
        ("none", None),
    ],
)
def test_the_last_number_of_a_text(text: str, number: str | None) -> None:
    assert last(text) == (None if number is None else Decimal(number))


def test_what_is_due_is_what_the_answer_ends_in() -> None:
    assert due("#### 1\n#### 2,000") == 2000
    assert due("it is 5") is None
    assert due("#### 5 and then nothing ####") is None


class Writes:
    """A model that writes known texts, ``before`` training and with ``trained`` tensors."""

    reads = 40

    def __init__(self, before: list[str], after: list[str], speaker: Any) -> None:
        self.before, self.after, self.speaker = before, after, speaker
        self.was_asked: list[Any] = []

    def continued(self, tensors: Any, prompts: Any, most: int, together: int = 1) -> list[str]:
        self.was_asked.append((prompts, most, together))
        return self.after if tensors else self.before


def world(tmp_path: Path, answers: list[str], **fields: Any) -> World:
    for split, count in {"train": 12, "validation": 4}.items():
        (tmp_path / f"{split}.jsonl").write_text('{"question": "w1", "answer": "w2 #### 3"}\n' * count)
    rows = [{"question": " ".join([f"w{i}"] * (i * 20 + 1)), "answer": answer} for i, answer in enumerate(answers)]
    (tmp_path / "test.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    given = {"data": str(tmp_path), "model": str(language_model("llama")), "task": "instructions", "template": TEMPLATE, **fields}
    return build(replace(small.experiment("lora", stack=0), **given))


def test_shares_of_numbers_before_and_after_training(tmp_path: Path) -> None:
    """Four of the five answers end in a number; after training two are marked and right, one is right and not marked, one is wrong."""
    of = world(tmp_path, ["#### 10", "no number", "#### 1,000", "#### 2.50", "#### -4"])
    writes: Any = Writes(["", "1,000", "#### 3", "####"], ["#### 10.0 and #### 11", "I say $1000.", "#### 2.5", "#### 4"], of.model.speaker)
    assert exact_match(replace(of, model=writes), {"a": of.model.initial[min(of.model.initial)]}) == {
        "before": 0.0,
        "after": 0.5,
        "last_number": {"before": 0.25, "after": 0.5},
        "prompts": 4,
        "held": 4,
    }
    (prompts, most, together), other = writes.was_asked
    assert (most, together) == (min(LONGEST, 20), TOGETHER) and other == writes.was_asked[0]
    assert of.model.tokenizer.decode(prompts[0]) == "w1 w0 w2"
    assert of.model.tokenizer.decode(prompts[1]) == "w1 " + "w2 " * 18 + "w2", "a prompt leaves room for the answer, and keeps its template"


def test_prompts_are_drawn_by_seed_and_capped(tmp_path: Path) -> None:
    of = world(tmp_path, [f"#### {i}" for i in range(6)], exact_match=2)
    drawn = []
    for seed in (1, 1, 2, 3):
        writes: Any = Writes(["", ""], ["", ""], of.model.speaker)
        told = exact_match(replace(of, model=writes, experiment=replace(of.experiment, seed=seed)), {})
        assert told is not None and (told["prompts"], told["held"]) == (2, 6)
        drawn.append(writes.was_asked[0][0])
    assert drawn[0] == drawn[1] and not (drawn[0] == drawn[2] == drawn[3])


def test_nothing_is_told_where_no_answer_ends_in_a_number_or_none_is_wanted(tmp_path: Path) -> None:
    of = world(tmp_path, ["a", "b", "#### c"])
    assert exact_match(of, {}) is None
    assert exact_match(world(tmp_path, ["#### 1"] * 3, exact_match=0), {}) is None
