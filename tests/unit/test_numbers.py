"""Final numbers of answers: what is read of a text, and what a run tells of what a model wrote."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, replace
from decimal import Decimal
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest
import torch

from fedloom.client.client import Client
from fedloom.client.elsewhere import Elsewhere
from fedloom.client.store import ClientStore
from fedloom.data.numbers import due, last, marked
from fedloom.data.tasks import Split
from fedloom.methods.method import Predictor, State
from fedloom.model.writing import continued
from fedloom.run.evaluation import nothing
from fedloom.run.numbers import LONGEST, TOGETHER, Solved, as_told, drawn, solved, tells
from fedloom.run.personal import as_sent
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
    """A model that writes what a table says, by prompt and by who it is: the number in its tensor ``who``, or :data:`BEFORE` training."""

    reads, first_of = 40, None

    def __init__(self, of: World, says: Mapping[tuple[str, int], str]) -> None:
        self.model, self.says = of.model, says
        self.asked: list[tuple[int, list[Any]]] = []

    def __getattr__(self, name: str) -> Any:
        """What it is besides writing is the model's."""
        return getattr(self.model, name)

    def continued(self, tensors: Any, prompts: Any, most: int, together: int = 1) -> list[str]:
        who = int(tensors["who"]) if tensors else BEFORE
        self.asked.append((who, prompts))
        assert (most, together) == (min(LONGEST, 20), TOGETHER)
        return [self.says.get((split_of(self.tokenizer.decode(prompt)), who), f"#### {who}") for prompt in prompts]


BEFORE, WHOLE = -1, 100


@pytest.fixture(autouse=True)
def what_is_told_to_write_writes(monkeypatch: pytest.MonkeyPatch) -> None:
    """And a real model as it does."""
    monkeypatch.setattr(
        "fedloom.run.numbers.continued",
        lambda model, *given: model.continued(*given) if isinstance(model, Writes) else continued(model, *given),
    )


def split_of(text: str) -> str:
    """The word that says which row of which split a prompt is of."""
    return text.split()[1]


@dataclass(frozen=True)
class Theirs:
    """A method whose device k has the model k, unless ``same`` says another, and whose global model is ``whole`` (None: it has none)."""

    whole: int | None = WHOLE
    same: int | None = None
    name: ClassVar[str] = "theirs"

    def assembled(self, state: State) -> Any:
        return None if self.whole is None else {"who": torch.tensor(float(self.whole))}

    def personalise(self, client: Client, shared: Any) -> Any:
        yield from ()
        return Predictor({"who": torch.tensor(float(client.id if self.same is None else self.same))})


STATE = State(0, {}, {}, {})


def world(tmp_path: Path, answers: list[str], held: list[str] | None = None, **fields: Any) -> World:
    """Test row i asks ``wi``, validation row i ``w(30 + i)``, that word again and again, the later the longer."""
    (tmp_path / "train.jsonl").write_text('{"question": "w1", "answer": "w2 #### 3"}\n' * 12)
    for split, of, at in (("test", answers, 0), ("validation", held or ["none"] * 4, 30)):
        rows = [{"question": " ".join([f"w{at + i}"] * (i * 20 + 1)), "answer": answer} for i, answer in enumerate(of)]
        (tmp_path / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    given = {"data": str(tmp_path), "model": str(language_model("llama")), "task": "instructions", "template": TEMPLATE, **fields}
    return build(replace(small.experiment("lora", stack=0), **given))


def written(of: World, method: Theirs, says: Mapping[tuple[str, int], str], **fields: Any) -> tuple[World, Writes, Solved]:
    """``of`` as it is when that method's models write so, and what is then told."""
    writes: Any = Writes(of, says)
    made = replace(of, model=writes, experiment=replace(of.experiment, method=method, **fields))
    found = solved(made, STATE, ClientStore(None))
    assert found is not None
    return made, writes, found


def holder(of: World, split: Split, row: int) -> int:
    return next(k for k, rows in enumerate(of.partition.shards(split)) if row in rows.tolist())


def test_both_protocols_on_both_splits(tmp_path: Path) -> None:
    """Device k writes k and the global model 100; so a device is right where its own number is due, and the global one where 100 is."""
    due: dict[Split, list[str]] = {
        "test": ["#### 10", "no number", "#### 100", "#### 100.0", "own"],
        "validation": ["own", "#### 100", "own", "none"],
    }
    of = world(tmp_path, due["test"], due["validation"])
    due = {split: [f"#### {holder(of, split, i)}" if one == "own" else one for i, one in enumerate(each)] for split, each in due.items()}
    of = world(tmp_path, due["test"], due["validation"])
    made, _, found = written(of, Theirs(), {})
    for split, answers in due.items():
        known = [row for row, answer in enumerate(answers) if answer.startswith("####")]
        whole = np.mean([answers[row] in ("#### 100", "#### 100.0") for row in known])
        own = np.mean([answers[row] == f"#### {holder(of, split, row)}" for row in known])
        assert (whole, own) == ((0.5, 0.25) if split == "test" else (1 / 3, 2 / 3))
        assert found.scores(split) == {"personalised": own, "global": whole}
        assert found.drawn[split].held == len(known) == len(found.drawn[split].rows)
    told = as_told(made, found)
    assert told is not None and (told["prompts"], told["held"], told["validation"]) == (4, 4, {"prompts": 3, "held": 3})
    assert told["before"] == 0 and (told["after"], told["personalised"]) == (
        found.scores("test")["global"],
        found.scores("test")["personalised"],
    )


def test_a_marked_number_and_the_last_one_are_told_apart(tmp_path: Path) -> None:
    """Of four, two are marked and right, one is right and not marked, one is wrong; before training one is right and not marked."""
    of = world(tmp_path, ["#### 10", "no number", "#### 1,000", "#### 2.50", "#### -4"])
    says = {
        ("w0", 7): "#### 10.0 and #### 11",
        ("w2", 7): "I say $1000.",
        ("w3", 7): "#### 2.5",
        ("w4", 7): "#### 4",
        ("w2", BEFORE): "1,000",
    }
    made, writes, found = written(of, Theirs(whole=7, same=7), says)
    assert found.shares["test"]["global"] == found.shares["test"]["personalised"] == (0.5, 0.5)
    assert found.scores("validation") == {"personalised": None, "global": None}, "no answer there ends in a number"
    assert as_told(made, found) == {
        "before": 0.0,
        "after": 0.5,
        "personalised": 0.5,
        "last_number": {"before": 0.25, "after": 0.5, "personalised": 0.5},
        "prompts": 4,
        "held": 4,
        "validation": None,
    }
    decode = of.model.tokenizer.decode
    assert [who for who, _ in writes.asked] == [7, BEFORE], "devices that have the global model do not write again"
    prompts = writes.asked[0][1]
    assert decode(prompts[0]) == "w1 w0 w2"
    assert decode(prompts[1]) == "w1 " + "w2 " * 18 + "w2", "a prompt leaves room for the answer, and keeps its template"


def test_devices_that_share_a_model_write_together_and_others_alone(tmp_path: Path) -> None:
    of = world(tmp_path, [f"#### {i}" for i in range(8)], [f"#### {i}" for i in range(4)])
    _, writes, found = written(of, Theirs(whole=None, same=3), {})
    assert [(who, len(prompts)) for who, prompts in writes.asked] == [(3, 12)]
    assert found.scores("test") == {"personalised": 1 / 8, "global": None} and found.scores("validation")["personalised"] == 1 / 4
    _, writes, _ = written(of, Theirs(), {})
    sizes: dict[Split, int] = {"test": 8, "validation": 4}
    counts = Counter(holder(of, split, row) for split, count in sizes.items() for row in range(count))
    assert [(who, len(prompts)) for who, prompts in writes.asked] == [(WHOLE, 12), *sorted(counts.items())] and len(counts) > 1


def test_devices_elsewhere_write_nothing(tmp_path: Path) -> None:
    of = world(tmp_path, ["#### 100"] * 3)
    made, writes, _ = written(of, Theirs(), {})
    writes.asked.clear()
    found = solved(made, STATE, Elsewhere())
    assert found is not None and found.scores("test") == {"personalised": None, "global": 1.0}
    assert [who for who, _ in writes.asked] == [WHOLE]


def test_prompts_are_drawn_by_seed_and_capped(tmp_path: Path) -> None:
    of = world(tmp_path, [f"#### {i}" for i in range(6)], exact_match=2)
    found = [drawn(replace(of, experiment=replace(of.experiment, seed=seed)))["test"] for seed in (1, 1, 2, 3)]
    assert all((len(one.rows), len(one.prompts), one.held) == (2, 2, 6) and one.rows == sorted(one.rows) for one in found)
    assert found[0] == found[1] and not (found[0] == found[2] == found[3])
    assert all(one.due == list(map(Decimal, one.rows)) for one in found)


def test_nothing_is_told_where_no_answer_ends_in_a_number_or_none_is_wanted(tmp_path: Path) -> None:
    for of in (world(tmp_path, ["a", "b", "#### c"]), world(tmp_path, ["#### 1"] * 3, exact_match=0)):
        assert not tells(of) and solved(of, STATE, ClientStore(None)) is None and as_told(of, None) is None
        assert all("exact_match" not in told for told in nothing(of).values())
    told = world(tmp_path, ["none"] * 3, ["#### 1"] * 4)
    assert tells(told) and as_told(told, solved(told, told.experiment.method.init(told.model), ClientStore(None))) is None
    assert nothing(told)["validation"]["exact_match"] == nothing(told)["test"]["exact_match"] == {"personalised": None, "global": None}


def test_what_the_wire_loses_is_lost_to_the_devices_that_write(tmp_path: Path) -> None:
    of, sent = world(tmp_path, ["#### 1"] * 3, wire="bf16"), {"a": torch.tensor([1.001, 2.0])}
    assert as_sent(of, sent)["a"].tolist() == sent["a"].to(torch.bfloat16).float().tolist() != sent["a"].tolist()
