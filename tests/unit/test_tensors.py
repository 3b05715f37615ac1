"""Arithmetic on named tensors: by name, never by position; nothing shared, nothing forgotten."""

from __future__ import annotations

from fractions import Fraction

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fedloom import tensors as module
from fedloom.tensors import (
    Mean,
    clone,
    equal,
    fingerprint,
    identical,
    nbytes,
    only,
    rounded_up,
    same_names,
    weighted_mean,
    without,
)


def three() -> dict[str, torch.Tensor]:
    return {"a": torch.tensor([1.0, 2.0]), "b": torch.tensor([[3.0]]), "c": torch.tensor([4.0])}


@given(st.integers(0, 1000), st.integers(0, 3000))
def test_a_share_is_rounded_up_as_its_decimals_are_written(thousandths: int, of: int) -> None:
    """⌈share·of⌉ in whole numbers, and not of what a float makes of the share."""
    exact = Fraction(thousandths, 1000) * of
    assert rounded_up(thousandths / 1000, of) == -(-exact.numerator // exact.denominator)


def test_float_noise_makes_no_further_one() -> None:
    assert 0.07 * 100 > 7
    assert [rounded_up(0.07, 100), rounded_up(0.28, 25), rounded_up(0.55, 100), rounded_up(0.0701, 100)] == [7, 7, 55, 8]


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


@pytest.mark.parametrize("native", [True, False])
def test_weighted_mean_by_hand_and_without_touching_the_inputs(native: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    if not native:
        monkeypatch.setattr(module, "takes", lambda *tensors: False)
    first, second = three(), {name: 10 * t for name, t in three().items()}
    mean = weighted_mean([(1.5, first), (0.5, second)])
    assert list(mean) == list(first)
    assert mean["a"].tolist() == [(1.5 * 1 + 0.5 * 10) / 2, (1.5 * 2 + 0.5 * 20) / 2]
    assert mean["b"].tolist() == [[(1.5 * 3 + 0.5 * 30) / 2]]
    assert mean["a"].dtype == torch.float32
    assert fingerprint(first) == fingerprint(three())


def test_weighted_mean_of_a_single_entry_is_not_the_entry_itself() -> None:
    for dtype in (torch.float64, torch.float32):
        one = {"a": torch.ones(2, dtype=dtype)}
        mean = weighted_mean([(1.0, one), (1.0, one)])
        alone = weighted_mean([(3.0, one)])
        alone["a"].zero_()
        assert one["a"].tolist() == mean["a"].tolist() == [1, 1]


def test_weighted_mean_refuses_nothing_strangers_and_no_weight() -> None:
    with pytest.raises(ValueError, match="at least one"):
        weighted_mean([])
    with pytest.raises(ValueError, match="match by name"):
        weighted_mean([(1.0, three()), (1.0, without(three(), ["b"]))])
    with pytest.raises(ValueError, match=r"'b' has shape \(1,\)"):
        weighted_mean([(1.0, three()), (1.0, {**three(), "b": torch.ones(1)})])
    with pytest.raises(ValueError, match=r"positive sum of weights; the weights are \[0.0, 0.0\]"):
        weighted_mean([(0.0, three()), (0.0, three())])


@given(st.lists(st.tuples(st.integers(1, 500), st.floats(-1e4, 1e4, width=32)), min_size=1, max_size=12), st.randoms())
def test_order_changes_nothing_that_float32_could_see(entries: list[tuple[int, float]], rng) -> None:
    pairs = [(float(w), {"x": torch.tensor([x], dtype=torch.float64)}) for w, x in entries]
    weight = sum(w for w, _ in entries)
    straight = weighted_mean(pairs)
    rng.shuffle(pairs)
    mixed = weighted_mean(pairs)
    exact = float(np.dot([w for w, _ in entries], np.array([x for _, x in entries], np.float64))) / weight
    size = sum(abs(w * x) for w, x in entries) / weight
    for mean in (straight, mixed):
        assert abs(float(mean["x"]) - exact) <= 1e-12 * (1 + size)
        narrow = weighted_mean([(w, {"x": t["x"].float()}) for w, t in pairs])
        assert float(narrow["x"]) == pytest.approx(exact, rel=2**-23, abs=1e-12 * (1 + size))


@given(
    st.lists(st.lists(st.integers(0, 4), max_size=3), min_size=1, max_size=8),
    st.lists(st.integers(1, 500), min_size=1, max_size=5),
    st.integers(1, 12),
    st.sampled_from([torch.float32, torch.bfloat16, torch.float64]),
    st.integers(1, 100),
)
def test_stretches_and_what_is_held_change_no_bit(
    shapes: list[list[int]], weights: list[int], stretch: int, dtype: torch.dtype, held: int
) -> None:
    """Many tensors in one stretch and one tensor in many stretches, summed at once or as they come: each number is the same sum in the same
    order."""
    generator = torch.Generator().manual_seed(len(shapes))
    sets = [{f"t{i}": torch.randn(shape, generator=generator).to(dtype) for i, shape in enumerate(shapes)} for _ in weights]
    sets = [{n: t.mT if t.ndim >= 2 else t for n, t in tensors.items()} for tensors in sets]  # not all are contiguous
    whole = module.STRETCH
    try:
        module.STRETCH = stretch
        mean = weighted_mean(zip(map(float, weights), sets, strict=True))
        as_they_come = Mean(held)
        for weight, tensors in zip(weights, sets, strict=True):
            as_they_come.add(weight, tensors)
        for _ in range(2):  # asking changes nothing
            assert fingerprint(as_they_come.value()) == fingerprint(mean)
    finally:
        module.STRETCH = whole
    due = {}
    for name in sets[0]:
        total = weights[0] * sets[0][name].double()
        for weight, tensors in zip(weights[1:], sets[1:], strict=True):
            total += tensors[name].double() * weight
        due[name] = (total / sum(weights)).to(dtype)
    assert list(mean) == list(due)
    assert dtype == torch.float64 or fingerprint(mean) == fingerprint(due)
    assert all(torch.allclose(mean[name], due[name], rtol=1e-15, atol=1e-15) for name in due if dtype == torch.float64)


def test_weighted_mean_of_other_kinds_of_numbers() -> None:
    sets = [{"i": torch.tensor([1, 9]), "b": torch.tensor([True, False])}, {"i": torch.tensor([4, -9]), "b": torch.tensor([False, False])}]
    mean = weighted_mean([(1.0, sets[0]), (2.0, sets[1])])
    assert mean["i"].tolist() == [3, -3] and mean["i"].dtype == torch.int64
    assert mean["b"].tolist() == [True, False]


def test_weighted_mean_carries_no_graph_and_copies_no_layout() -> None:
    leaf = {"a": torch.ones(2, 3, requires_grad=True), "b": torch.ones(3, 2).T}
    mean = weighted_mean([(1.0, leaf), (2.0, leaf)])
    assert not mean["a"].requires_grad and all(t.is_contiguous() for t in mean.values())
    assert mean["b"].tolist() == [[1, 1, 1], [1, 1, 1]]


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


def test_equal_is_by_number_and_identical_by_object() -> None:
    base = {"a": torch.tensor([0.0, 1.0]), "b": torch.tensor([1, 2])}
    assert equal(base, clone(base)) and not identical(base, clone(base)) and identical(base, dict(base))
    turned = dict(reversed(base.items()))
    assert equal(base, turned) and not identical(base, turned)
    for other in ({"a": base["a"]}, {**base, "c": base["a"]}, {**base, "a": torch.tensor([0.0, 2.0])}, {**base, "a": base["a"][:, None]}):
        assert not equal(base, other) and not equal(other, base) and not identical(base, other) and not identical(other, base)


def test_clone_shares_nothing_and_carries_no_graph() -> None:
    start = {"a": torch.ones(2, requires_grad=True)}
    copied = clone(start)
    copied["a"] += 1
    assert start["a"].tolist() == [1, 1]
    assert not copied["a"].requires_grad
