"""Arithmetic on named tensors: by name, never by position; nothing shared, nothing forgotten."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fedloom.tensors import clone, fingerprint, nbytes, only, same_names, weighted_sum, without


def three() -> dict[str, torch.Tensor]:
    return {"a": torch.tensor([1.0, 2.0]), "b": torch.tensor([[3.0]]), "c": torch.tensor([4.0])}


def test_only_keeps_the_named_in_the_order_of_the_tensors() -> None:
    assert list(only(three(), ["c", "a"])) == ["a", "c"]
    assert only(three(), []) == {}


def test_only_refuses_a_name_that_does_not_exist_and_lists_what_does() -> None:
    with pytest.raises(KeyError, match=r"no tensors \['d', 'e'\]; there are \['a', 'b', 'c'\]"):
        only(three(), ["a", "e", "d"])


def test_without_drops_the_named_and_does_not_mind_unknown_ones() -> None:
    assert list(without(three(), ["b", "zz"])) == ["a", "c"]


def test_same_names_names_what_is_missing_unknown_or_of_another_shape() -> None:
    same_names(three(), three())
    with pytest.raises(ValueError, match=r"missing \['c'\], unknown \['d'\]"):
        same_names(three(), {"a": torch.ones(2), "b": torch.ones(1, 1), "d": torch.ones(1)})
    with pytest.raises(ValueError, match=r"'b' has shape \(1,\); expected \(1, 1\)"):
        same_names(three(), {**three(), "b": torch.ones(1)})


def test_nbytes_counts_payload_whatever_the_dtype() -> None:
    assert nbytes({"a": torch.zeros(3), "b": torch.zeros(3, dtype=torch.bfloat16), "c": torch.zeros(2, 2, dtype=torch.bool)}) == 12 + 6 + 4


def test_weighted_sum_by_hand_and_without_touching_the_inputs() -> None:
    first, second = three(), {name: 10 * t for name, t in three().items()}
    total, weight = weighted_sum([(2.0, first), (0.5, second)])
    assert weight == 2.5
    assert total["a"].tolist() == [2 * 1 + 5 * 1, 2 * 2 + 5 * 2]
    assert total["a"].dtype == torch.float64
    assert fingerprint(first) == fingerprint(three())


def test_weighted_sum_of_a_single_float64_entry_is_not_the_entry_itself() -> None:
    one = {"a": torch.ones(2, dtype=torch.float64)}
    total, _ = weighted_sum([(1.0, one), (1.0, one)])
    assert one["a"].tolist() == [1, 1]
    assert total["a"].tolist() == [2, 2]


def test_weighted_sum_refuses_nothing_and_strangers() -> None:
    with pytest.raises(ValueError, match="at least one"):
        weighted_sum([])
    with pytest.raises(ValueError, match="match by name"):
        weighted_sum([(1.0, three()), (1.0, without(three(), ["b"]))])


@given(st.lists(st.tuples(st.integers(1, 500), st.floats(-1e4, 1e4, width=32)), min_size=1, max_size=12), st.randoms())
def test_order_changes_nothing_that_float32_could_see(entries: list[tuple[int, float]], rng) -> None:
    pairs = [(float(w), {"x": torch.tensor([x])}) for w, x in entries]
    straight, weight = weighted_sum(pairs)
    rng.shuffle(pairs)
    mixed, _ = weighted_sum(pairs)
    exact = float(np.dot([w for w, _ in entries], np.array([x for _, x in entries], np.float64))) / weight
    size = sum(abs(w * x) for w, x in entries) / weight
    for total in (straight, mixed):
        assert abs(float(total["x"]) / weight - exact) <= 1e-12 * (1 + size)


def test_fingerprint_sees_each_bit_dtype_shape_and_name_but_not_the_order() -> None:
    base = {"a": torch.tensor([0.0, 1.0]), "b": torch.tensor([1, 2])}
    same = {"b": torch.tensor([1, 2]), "a": torch.tensor([0.0, 1.0])}
    assert fingerprint(base) == fingerprint(same)
    others = [
        {**base, "a": torch.tensor([-0.0, 1.0])},
        {**base, "a": torch.tensor([0.0, float(np.nextafter(np.float32(1), np.float32(2)))])},
        {**base, "a": base["a"][:, None]},
        {**base, "b": base["b"].int()},
        {"a": base["a"], "c": base["b"]},
        {**base, "e": torch.zeros(0)},
        {"a": base["a"]},
    ]
    assert len({fingerprint(base), *map(fingerprint, others)}) == 1 + len(others)


def test_fingerprint_is_of_values_not_of_memory_layout() -> None:
    square = torch.arange(6.0).reshape(2, 3)
    assert fingerprint({"x": square.T}) == fingerprint({"x": square.T.contiguous()})
    assert fingerprint({"x": torch.ones(2, dtype=torch.bfloat16, requires_grad=True)}) == fingerprint({"x": torch.ones(2).bfloat16()})


def test_clone_shares_nothing_and_carries_no_graph() -> None:
    start = {"a": torch.ones(2, requires_grad=True)}
    copied = clone(start)
    copied["a"] += 1
    assert start["a"].tolist() == [1, 1]
    assert not copied["a"].requires_grad
