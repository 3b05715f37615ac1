"""Pacing at every round against numbers worked out by hand; what is open; easy before hard."""

from __future__ import annotations

import math
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedloom.client.curriculum import easiest_examples_first, easiest_first, fraction, open_count, shuffled

# T = 5 rounds, α = 0.8: α·T = 4, so x = 0, 1/4, 2/4, 3/4, 1 (and 1 ever after). β₀ = 0.36, whose root is 0.6.
BY_HAND = {
    "linear": [0.36, 0.52, 0.68, 0.84, 1.0, 1.0],
    "sqrt": [0.36, 0.68, 0.36 + 0.64 * math.sqrt(0.5), 0.36 + 0.32 * math.sqrt(3), 1.0, 1.0],
    "quadratic": [0.36, 0.40, 0.52, 0.72, 1.0, 1.0],
    "exp": [0.36, 0.36**0.75, 0.6, math.sqrt(0.6), 1.0, 1.0],
    "none": [1.0] * 6,
}


@pytest.mark.parametrize("pacing", BY_HAND)
def test_pacing_at_every_round(pacing) -> None:
    assert [fraction(pacing, t, 5, 0.36, 0.8) for t in range(6)] == pytest.approx(BY_HAND[pacing], abs=1e-12)


def test_the_default_schedule_of_fibecfed_over_twenty_rounds() -> None:
    """β₀ = 0.6, α = 0.8: 0.025 more a round, everything from round 16 on."""
    expected = [0.6 + 0.025 * t for t in range(17)] + [1.0] * 3
    assert [fraction("linear", t, 20, 0.6, 0.8) for t in range(20)] == pytest.approx(expected, abs=1e-12)


@pytest.mark.parametrize("pacing", BY_HAND)
@given(st.floats(0.01, 1), st.floats(0.01, 1), st.integers(1, 200))
def test_pacing_never_falls_starts_at_start_and_ends_whole(pacing, start: float, full_at: float, rounds: int) -> None:
    shares = [fraction(pacing, t, rounds, start, full_at) for t in range(rounds + 1)]
    assert all(a <= b + 1e-12 for a, b in pairwise(shares))
    assert shares[0] == pytest.approx(1.0 if pacing == "none" else start)
    assert all(share <= 1 + 1e-12 for share in shares)
    assert shares[-1] == pytest.approx(1.0)


@pytest.mark.parametrize(("start", "full_at"), [(0, 0.8), (1.1, 0.8), (-0.1, 0.5), (0.5, 0), (0.5, 1.01)])
def test_pacing_refuses_impossible_shares(start: float, full_at: float) -> None:
    with pytest.raises(ValueError, match="must be a share, 0 < (start|full_at) <= 1"):
        fraction("linear", 0, 10, start, full_at)


def test_pacing_refuses_an_unknown_name() -> None:
    with pytest.raises(ValueError, match="no pacing 'cubic'; there are linear, sqrt"):
        fraction("cubic", 0, 10, 0.6, 0.8)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("share", "batches", "open_"),
    [(0.6, 5, 3), (0.61, 5, 4), (0.6, 1, 1), (1e-9, 7, 1), (0.0, 3, 1), (1.0, 7, 7), (1.2, 7, 7), (0.5, 3, 2), (0.34, 3, 2), (1 / 3, 3, 1)],
)
def test_open_batches_are_rounded_up_between_one_and_all(share: float, batches: int, open_: int) -> None:
    assert open_count(share, batches) == open_


def test_float_noise_opens_no_further_batch() -> None:
    noisy = 0.6 + 0.4 * (0.25 / 0.8) + 0.075  # 0.8 and 2⁻⁵³
    assert math.ceil(0.1 * 3 * 10) == 4, "what float arithmetic makes of 3 batches"
    assert open_count(0.1 * 3, 10) == 3
    assert open_count((0.1 + 0.2) / 0.3, 3) == 3
    assert open_count(noisy, 5) == 4


@given(st.integers(1, 400), st.integers(1, 20))
def test_every_exact_share_opens_exactly_that_many(batches: int, of: int) -> None:
    for wanted in range(1, batches + 1, max(1, batches // of)):
        assert open_count(wanted / batches, batches) == wanted


def test_easy_batches_first_by_their_mean() -> None:
    difficulty = np.array([5.0, 1.0, 2.0, 9.0, 3.0])
    batches = [np.array([0, 3]), np.array([1, 2]), np.array([4])]
    assert [b.tolist() for b in easiest_first(batches, difficulty)] == [[1, 2], [4], [0, 3]]


def test_the_mean_decides_not_the_sum_nor_the_worst() -> None:
    difficulty = np.array([2.0, 2.0, 2.0, 3.0, 0.0, 5.0])
    batches = [np.array([3]), np.array([0, 1, 2]), np.array([4, 5])]
    assert [b.tolist() for b in easiest_first(batches, difficulty)] == [[0, 1, 2], [4, 5], [3]]


def test_equal_batches_keep_their_order() -> None:
    batches = [np.array([i]) for i in (4, 2, 0, 3, 1)]
    assert [int(b[0]) for b in easiest_first(batches, np.ones(5))] == [4, 2, 0, 3, 1]


def test_easy_examples_first_then_cut() -> None:
    difficulty = np.array([5.0, 1.0, 2.0, 1.0, 3.0])
    assert [b.tolist() for b in easiest_examples_first(difficulty, 2)] == [[1, 3], [2, 4], [0]]


@given(st.integers(1, 60), st.integers(1, 17), st.integers(0, 5))
def test_shuffled_covers_every_position_once(count: int, size: int, seed: int) -> None:
    batches = shuffled(count, size, seed, "batches", 3)
    assert sorted(np.concatenate(batches).tolist()) == list(range(count))
    assert [len(b) for b in batches[:-1]] == [size] * (len(batches) - 1)
    assert 1 <= len(batches[-1]) <= size


def test_shuffled_is_decided_by_seed_and_path() -> None:
    def one(*path: str | int) -> list[int]:
        return np.concatenate(shuffled(20, 6, *path)).tolist()

    assert one(1, "a", 0) == one(1, "a", 0)
    assert len({tuple(one(*p)) for p in [(1, "a", 0), (2, "a", 0), (1, "b", 0), (1, "a", 1)]}) == 4
