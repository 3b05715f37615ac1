"""Cohorts: distinct clients of the pool, another draw each round, everybody's turn comes equally often."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedloom.server.participation import Pool, uniform


def pool(clients: int = 100, cohort: int = 10, seed: int = 42) -> Pool:
    return Pool(clients=tuple(range(clients)), cohort=cohort, rounds=30, seed=seed)


@given(st.integers(1, 60), st.data(), st.integers(0, 10**6), st.integers(0, 10**4))
def test_a_cohort_is_distinct_clients_of_the_pool_in_ascending_order(clients: int, data: st.DataObject, seed: int, t: int) -> None:
    ids = tuple(range(100, 100 + 3 * clients, 3))
    size = data.draw(st.integers(1, clients))
    drawn = uniform(Pool(ids, size, 30, seed), t)
    assert len(drawn) == len(set(drawn)) == size
    assert set(drawn) <= set(ids)
    assert list(drawn) == sorted(drawn)


def test_the_same_round_draws_the_same_cohort_whatever_was_drawn_before() -> None:
    alone = uniform(pool(), 7)
    after_others = [uniform(pool(), t) for t in range(8)][7]
    assert alone == after_others


def test_rounds_and_seeds_draw_different_cohorts() -> None:
    assert len({uniform(pool(), t) for t in range(30)}) == 30
    assert len({uniform(pool(seed=seed), 0) for seed in range(30)}) == 30


def test_every_client_is_drawn_equally_often() -> None:
    """2,000 rounds of 10 out of 50: 400 turns each, standard deviation sqrt(2000 · 0.2 · 0.8) = 17.9; six of them are 107."""
    turns = np.bincount(np.concatenate([uniform(pool(50, 10), t) for t in range(2000)]), minlength=50)
    assert np.abs(turns - 400).max() < 107


def test_everybody_when_the_cohort_is_the_pool() -> None:
    assert uniform(pool(5, 5), 3) == (0, 1, 2, 3, 4)


@pytest.mark.parametrize("cohort", [0, -1, 11])
def test_an_impossible_cohort_is_refused_with_what_would_do(cohort: int) -> None:
    with pytest.raises(ValueError, match=f"a cohort of {cohort} cannot be drawn from 10 clients; use 1 to 10"):
        pool(10, cohort)


def test_the_smallest_and_the_largest_cohort_are_allowed() -> None:
    assert len(uniform(pool(10, 1), 0)) == 1
    assert len(uniform(pool(10, 10), 0)) == 10
