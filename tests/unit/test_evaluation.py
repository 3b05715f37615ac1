"""What devices tell of their predictions is looked at before it is added up."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from fedloom.messages import Task, Update
from fedloom.methods.fedavg import FedAvg
from fedloom.methods.method import AS_SENT, State
from fedloom.run import evaluation
from fedloom.run.evaluation import MANY, _told_besides, counts_well
from fedloom.server.participation import Pool
from tests import flows

CELLS = torch.tensor([[0, 0, 5], [0, 1, 2]])
NONE = torch.zeros(0, 3, dtype=torch.int64)


def told(**tensors: torch.Tensor) -> Update:
    return Update(3, 5, {"validation": CELLS, "test": CELLS, **tensors}, {"validation_loss": 0.5})


@pytest.mark.parametrize(("otherwise", "due"), [((), True), ((0,), False), ((1,), False), ((4,), False)])
def test_all_predict_with_what_they_were_sent_or_it_is_not_so(
    otherwise: tuple[int, ...], due: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Five devices are asked two at a time; their rows come in the order of the devices, whoever is asked with whom."""
    monkeypatch.setattr(evaluation, "AT_ONCE", 2)
    world: Any = SimpleNamespace(pool=Pool((0, 1, 2, 3, 4), 3, 1, 5), experiment=SimpleNamespace(method=FedAvg()))

    def answer(task: Task) -> Update:
        rows = {"validation": torch.full((1, 2), float(task.client)), "test": torch.full((task.client, 2), float(task.client))}
        return Update(task.client, 1, rows, {AS_SENT: task.client not in otherwise})

    askings, (logits, as_sent) = flows.play(evaluation._predictions(world, State(1, flows.start())), answer)
    assert [[task.client for task in tasks] for tasks in askings] == [[0, 1], [2, 3], [4]]
    assert as_sent is due
    assert logits["validation"][:, 0].tolist() == [0, 1, 2, 3, 4]
    assert logits["test"][:, 0].tolist() == [1, 2, 2, 3, 3, 3, 4, 4, 4, 4]


def test_counts_are_taken() -> None:
    assert counts_well(told(), 2)
    assert counts_well(told(test=NONE), 2)


def test_without_examples_no_loss_is_due() -> None:
    assert counts_well(Update(3, 0, {"validation": NONE, "test": CELLS}), 2)


BAD = {
    "of two columns": CELLS[:, :2],
    "flat": CELLS.reshape(-1),
    "of floats": CELLS.float(),
    "of a class that there is not": torch.tensor([[0, 2, 1]]),
    "negative": torch.tensor([[0, 1, -1]]),
    "beyond counting": torch.tensor([[0, 1, MANY]]),
    "more than there can be": torch.ones(5, 3, dtype=torch.int64),
}


@pytest.mark.parametrize("cells", BAD.values(), ids=BAD)
@pytest.mark.parametrize("split", ["validation", "test"])
def test_whoever_tells_something_else_is_left_out(cells: torch.Tensor, split: str) -> None:
    assert not counts_well(told(**{split: cells}), 2)


@pytest.mark.parametrize("metrics", [{}, {"validation_loss": "low"}, {"validation_loss": [0.5]}, {"validation_loss": True}])
def test_whoever_tells_no_loss_is_left_out(metrics: dict) -> None:
    assert not counts_well(Update(3, 5, {"validation": CELLS, "test": CELLS}, metrics), 2)


def test_whoever_tells_of_one_split_only_is_left_out() -> None:
    assert not counts_well(Update(3, 5, {"validation": CELLS}, {"validation_loss": 0.5}), 2)


def of_words(client: int, loss: Any, words: Any, right: Any) -> Update:
    return Update(client, 5, {}, {"validation_loss": loss, "validation_words": words, "validation_words_right": right})


def test_losses_of_tags_are_weighed_by_words_and_not_by_entities() -> None:
    """(10·1 + 30·2) / 40 and (5 + 21) / 40; device 1 has no entity, and has words all the same."""
    updates = [of_words(0, 1.0, 10, 5), of_words(1, 2.0, 30, 21)]
    told: dict[int, list[list[int]]] = {0: [[1, 1, 4]], 1: []}
    made = _told_besides(updates, told, "validation", tags=True)
    assert made["loss"] == pytest.approx(1.75) and made["word_accuracy"] == pytest.approx(26 / 40)
    assert _told_besides(updates, told, "test", tags=True) == {}
    assert _told_besides(updates, told, "validation")["loss"] == 1.0, "of everything else by what is counted"


@pytest.mark.parametrize(
    ("words", "right"), [(None, 1), (True, True), (8.0, 2.0), (-1, -1), (3, 4), (5, -1), (MANY, 0), ([5], [5]), ("5", "5"), (5, None)]
)
def test_words_that_are_no_numbers_of_words_count_for_nothing(words: Any, right: Any) -> None:
    made = _told_besides([of_words(0, 1.0, 10, 5), of_words(1, 9.0, words, right)], {0: [], 1: []}, "validation", tags=True)
    assert (made["loss"], made["word_accuracy"]) == (1.0, 0.5)
