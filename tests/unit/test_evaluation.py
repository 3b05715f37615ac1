"""What devices tell of their predictions is looked at before it is added up."""

from __future__ import annotations

import pytest
import torch

from fedloom.messages import Update
from fedloom.run.evaluation import MANY, counts_well

CELLS = torch.tensor([[0, 0, 5], [0, 1, 2]])
NONE = torch.zeros(0, 3, dtype=torch.int64)


def told(**tensors: torch.Tensor) -> Update:
    return Update(3, 5, {"validation": CELLS, "test": CELLS, **tensors}, {"validation_loss": 0.5})


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
