"""Seeds: one stream per path, the same on every machine and in every order."""

from __future__ import annotations

import hashlib
from dataclasses import replace
from itertools import pairwise

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fedloom.methods.adalora import AdaLora
from fedloom.methods.slora import SLora
from fedloom.model.factors import drawn as new
from fedloom.model.names import is_down, is_factor
from fedloom.seeds import derive, derive_int
from tests import flows, tiny

PATHS = st.lists(st.text(max_size=5) | st.integers(-(2**40), 2**40), min_size=1, max_size=4)


def test_the_rule_is_frozen() -> None:
    """Saved partitions and running experiments rest on it: SHA-256 of the path's repr, the upper 63 of its first 64 bits."""
    digest = hashlib.sha256(b"(42, 'cohort', 0)").hexdigest()
    assert derive_int(42, "cohort", 0) == int(digest[:16], 16) // 2


@given(PATHS, st.integers(-5, 2**31))
def test_it_is_a_pure_function_of_seed_and_path(path: list[str | int], seed: int) -> None:
    assert derive_int(seed, *path) == derive_int(seed, *path)
    assert 0 <= derive_int(seed, *path) < 2**63
    np.testing.assert_array_equal(derive(seed, *path).random(4), derive(seed, *path).random(4))


@given(PATHS, st.integers(0, 2**31))
def test_another_seed_or_a_longer_path_is_another_stream(path: list[str | int], seed: int) -> None:
    assert derive_int(seed, *path) != derive_int(seed + 1, *path)
    assert derive_int(seed, *path) != derive_int(seed, *path, 0)
    assert derive_int(seed, *path) != derive_int(seed, "more", *path)


def test_look_alike_paths_differ() -> None:
    alike = [("a", 1), ("a", "1"), ("a1",), ("a", 1, 1), ("a", 11), (1, "a"), ("'a', 1",), (12, 3), (1, 23)]
    assert len({derive_int(0, *path) for path in alike}) == len(alike)
    assert derive_int(1, 2, "a") != derive_int(12, "a")


def test_numpy_integers_count_as_integers() -> None:
    assert derive_int(3, "batches", np.int64(7)) == derive_int(np.int64(3), "batches", 7)


def test_neighbouring_rounds_are_not_neighbouring_streams() -> None:
    draws = np.stack([derive(0, "cohort", t).random(64) for t in range(40)])
    assert max(abs(np.corrcoef(a, b)[0, 1]) for a, b in pairwise(draws)) < 0.6
    assert len(np.unique(draws)) == draws.size


def test_what_methods_draw_once_for_all_is_of_the_experiments_seed() -> None:
    """SLoRA's mask, AdaLoRA's P and Q, and new A's: alike for one seed, others for another."""
    weight, pairs = torch.zeros(6, 5), tiny.model().initial

    def drawn(seed: int) -> dict[str, torch.Tensor]:
        method = AdaLora()
        _, state = flows.play(method.setup(method.init(tiny.model()), replace(flows.POOL, seed=seed)), flows.echo)
        factors = {n: t for n, t in state.shared.items() if is_factor(n) and not n.startswith("values/")}
        return {"mask": SLora(density=0.3).places("a", weight, seed), **factors, **{f"new {n}": t for n, t in new(pairs, seed).items()}}

    one, again, other = drawn(4), drawn(4), drawn(5)
    assert len(one) == 1 + 3 * sum(map(is_down, pairs))
    assert all(torch.equal(t, again[n]) and not torch.equal(t, other[n]) for n, t in one.items())
    raw = np.random.PCG64(derive_int(4, "mask", "a")).random_raw(30)
    assert one["mask"].tolist() == sorted(np.argsort(raw)[:9].tolist())
    a = next(filter(is_down, pairs))
    due = derive(4, "factors", a).uniform(-1, 1, tuple(pairs[a].shape)) / pairs[a].shape[1] ** 0.5
    np.testing.assert_allclose(one[f"new {a}"].numpy(), due, rtol=1e-6)


def test_a_path_is_asked_for() -> None:
    with pytest.raises(ValueError, match="names the purpose"):
        derive_int(42)
    with pytest.raises(ValueError, match="names the purpose"):
        derive(42)
