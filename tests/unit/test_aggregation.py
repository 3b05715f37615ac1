"""The mean by numbers of examples."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fedloom.messages import Update
from fedloom.server.aggregation import Average
from fedloom.tensors import fingerprint


def update(client: int, examples: int, value: float, dtype: torch.dtype = torch.float32) -> Update:
    return Update(client, examples, {"w": torch.tensor([value, 2 * value], dtype=dtype), "b": torch.tensor(value, dtype=dtype)})


def weighted_mean(updates: Sequence[Update]) -> dict[str, torch.Tensor]:
    average = Average(held=0)
    for one in updates:
        average.take(one)
    return average.value()


def test_by_hand() -> None:
    mean = weighted_mean([update(0, 1, 1.0), update(1, 2, 4.0), update(2, 5, 8.0)])
    assert mean["w"].tolist() == [(1 + 8 + 40) / 8, 2 * (1 + 8 + 40) / 8]
    assert float(mean["b"]) == 49 / 8


def test_weights_are_numbers_of_examples_not_of_clients() -> None:
    assert float(weighted_mean([update(0, 99, 0.0), update(1, 1, 1.0)])["b"]) == pytest.approx(0.01)
    assert float(weighted_mean([update(0, 0, 5.0), update(1, 3, 1.0)])["b"]) == 1.0


def test_inputs_are_left_alone_and_nothing_is_shared() -> None:
    one = update(0, 3, 1.0)
    before = fingerprint(one.tensors)
    mean = weighted_mean([one, update(1, 3, 3.0)])
    mean["w"].zero_()
    alone = weighted_mean([one])
    alone["w"].zero_()
    assert fingerprint(one.tensors) == before


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_each_tensor_keeps_its_dtype(dtype: torch.dtype) -> None:
    mean = weighted_mean([update(0, 1, 1.0, dtype), update(1, 1, 2.0, dtype)])
    assert mean["w"].dtype == dtype
    assert float(mean["b"]) == 1.5


def test_sums_in_double_precision() -> None:
    updates = [Update(k, 1, {"x": torch.tensor([x])}) for k, x in enumerate([2.0**25, 1.0, 1.0, 1.0, -(2.0**25), 1.0])]
    assert float(weighted_mean(updates)["x"]) == pytest.approx(4 / 6, rel=1e-7)


@given(st.lists(st.tuples(st.integers(1, 100), st.floats(-100, 100, width=32)), min_size=1, max_size=8))
def test_a_mean_lies_between_its_parts_and_equal_parts_stay(entries: list[tuple[int, float]]) -> None:
    values = [x for _, x in entries]
    mean = float(weighted_mean([Update(k, n, {"x": torch.tensor([x])}) for k, (n, x) in enumerate(entries)])["x"])
    assert min(values) - 1e-4 <= mean <= max(values) + 1e-4
    same = weighted_mean([Update(k, n, {"x": torch.tensor([values[0]])}) for k, (n, _) in enumerate(entries)])
    assert float(same["x"]) == pytest.approx(values[0], rel=1e-6)


def test_nothing_strangers_and_weightless_are_refused() -> None:
    with pytest.raises(ValueError, match="at least one"):
        weighted_mean([])
    with pytest.raises(ValueError, match=r"missing \['b'\]"):
        weighted_mean([update(0, 1, 1.0), Update(1, 1, {"w": torch.ones(2)})])
    with pytest.raises(ValueError, match=r"\[3, 4\] trained on no examples"):
        weighted_mean([update(3, 0, 1.0), update(4, 0, 1.0)])


def test_an_average_keeps_no_tensors_and_is_the_mean_of_what_came() -> None:
    updates = [Update(k, 3 + k, {"x": torch.tensor([float(k), 2.0])}, {"loss": 0.5}) for k in range(5)]
    average = Average(held=1)
    kept = [average.take(update) for update in updates]
    assert [one.tensors for one in kept] == [{}] * 5
    assert [(one.client, one.num_examples, one.metrics) for one in kept] == [(k, 3 + k, {"loss": 0.5}) for k in range(5)]
    assert not average._mean._waiting
    assert fingerprint(average.value()) == fingerprint(weighted_mean(updates))


def test_an_average_of_nothing_and_of_nobodys_examples_is_refused() -> None:
    with pytest.raises(ValueError, match="a mean needs at least one set"):
        Average().value()
    average = Average()
    average.take(Update(7, 0, {"x": torch.ones(1)}))
    with pytest.raises(ValueError, match=r"clients \[7\] trained on no examples"):
        average.value()
