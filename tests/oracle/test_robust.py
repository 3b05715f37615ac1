"""Every rule of aggregation against its paper's sentence, written with lists and loops; and what it must withstand."""

from __future__ import annotations

import math
from collections.abc import Sequence
from statistics import fmean
from statistics import median as middle

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fedloom.messages import CohortFailed, Update
from fedloom.server.participation import Pool
from fedloom.server.robust import RULES, Aggregation

SENT = {"a": torch.tensor([[1.0, -2.0], [0.5, 3.0]]), "b": torch.tensor([10.0])}
ROBUST = [name for name in RULES if name != "mean"]
Point = list[float]


def aggregated(rule: str, points: Sequence[Point], asked: int = 0, sent: bool = True) -> Point:
    """What the rule makes of points of five numbers each, sent as two tensors. Everybody claims another size."""
    average = Aggregation.of(rule).averaging(SENT if sent else {}, asked or len(points))
    for k, x in enumerate(points):
        tensors = {"a": torch.tensor(x[:4], dtype=torch.float64).view(2, 2), "b": torch.tensor(x[4:], dtype=torch.float64)}
        assert not average.take(Update(k, 10**k, tensors)).tensors
    made = average.value()
    return [*made["a"].reshape(-1).tolist(), *made["b"].tolist()]


def drawn(n: int, seed: int, spread: float = 1.0) -> list[Point]:
    return (np.random.default_rng(seed).standard_normal((n, 5)) * spread).tolist()


def apart(x: Point, y: Point) -> float:
    return math.dist(x, y)


W: Point = [1.0, -2.0, 0.5, 3.0, 10.0]


@pytest.mark.parametrize("n", [4, 5, 8, 9])
def test_the_median_is_each_numbers_own(n: int) -> None:
    points = drawn(n, n)
    assert aggregated("median", points) == pytest.approx([middle(x[i] for x in points) for i in range(5)], abs=1e-12)


@pytest.mark.parametrize(("n", "f"), [(4, 1), (8, 2), (9, 2)])
def test_the_trimmed_mean_leaves_out_f_on_either_side(n: int, f: int) -> None:
    points = drawn(n, n)
    due = [fmean(sorted(x[i] for x in points)[f : n - f]) for i in range(5)]
    assert aggregated("trimmed:0.25", points) == pytest.approx(due, abs=1e-12)


def krum_order(points: Sequence[Point], f: int) -> list[int]:
    """Blanchard et al.: the score s(i) is the sum of the squared distances to the n − f − 2 closest vectors."""
    scores = []
    for i, x in enumerate(points):
        squares = sorted(apart(x, y) ** 2 for j, y in enumerate(points) if j != i)
        scores.append(sum(squares[: len(points) - f - 2]))
    return sorted(range(len(points)), key=lambda i: scores[i])


@pytest.mark.parametrize(("n", "f"), [(5, 1), (8, 2), (11, 2)])
def test_krum_picks_the_one_that_is_closest_to_its_neighbours(n: int, f: int) -> None:
    for seed in range(5):
        points = drawn(n, seed)
        assert aggregated("krum", points) == pytest.approx(points[krum_order(points, f)[0]], abs=1e-12)


@pytest.mark.parametrize(("n", "f"), [(5, 1), (8, 2), (11, 2)])
def test_multi_krum_averages_the_n_minus_f_best(n: int, f: int) -> None:
    for seed in range(5):
        points = drawn(n, seed)
        best = krum_order(points, f)[: n - f]
        assert aggregated("multi-krum", points) == pytest.approx([fmean(points[k][i] for k in best) for i in range(5)], abs=1e-12)


@pytest.mark.parametrize("n", [4, 5, 9])
def test_no_point_has_less_distance_to_all_than_the_geometric_median(n: int) -> None:
    rng = np.random.default_rng(1)
    for seed in range(5):
        points = drawn(n, seed)
        z = aggregated("geometric-median", points)
        least = sum(apart(z, x) for x in points)
        for size in (1.0, 0.1, 0.01):
            for _ in range(100):
                moved = [v + size * float(d) for v, d in zip(z, rng.standard_normal(5), strict=True)]
                assert least <= sum(apart(moved, x) for x in points) + 1e-9


@pytest.mark.parametrize("size", [1e-6, 1e-3, 1.0, 1e3])
def test_how_close_the_geometric_median_comes_goes_by_the_size_of_the_updates(size: float) -> None:
    """The unit vectors from the first point to the others, (1, 0), (0, 1) and −(1, 1)/√2, add up to less than one: it is the median itself.
    Weiszfeld's steps stop ν away from it, and ν is 1e-6 of the updates' own size."""
    others = [[1.0, 0.0], [0.0, 2.0], [-1.0, -1.0]]
    points = [list(W), *[[W[0] + size * x, W[1] + size * y, *W[2:]] for x, y in others]]
    assert apart(aggregated("geometric-median", points), W) < 1e-5 * size


def clipped(points: Sequence[Point]) -> Point:
    """w + (1/n) Σ Δ_k·min(1, c/‖Δ_k‖), c the median of all ‖Δ_k‖."""
    lengths = [apart(x, W) for x in points]
    c = middle(lengths)
    return [W[i] + fmean((x[i] - W[i]) * min(1.0, c / d) for x, d in zip(points, lengths, strict=True)) for i in range(5)]


@pytest.mark.parametrize("n", [4, 5, 8])
def test_clipping_shortens_every_way_to_the_median_length(n: int) -> None:
    points = drawn(n, n)
    due = clipped(points)
    assert aggregated("clip", points) == pytest.approx(due, abs=1e-12)
    assert aggregated("clip", points, sent=False) != pytest.approx(due, abs=1e-3), "without what was sent it is the way from zero"


# ---- what they are for ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("rule", ROBUST)
@settings(max_examples=60, deadline=None)
@given(
    n=st.integers(5, 12),
    seed=st.integers(0, 10**6),
    size=st.sampled_from([0.0, 1e-3, 1.0, 1e2, 1e6, 1e12]),
    together=st.booleans(),
)
def test_f_hostile_devices_cannot_take_the_aggregate_away(rule: str, n: int, seed: int, size: float, together: bool) -> None:
    f, rng = Aggregation.of(rule).hostile(n), np.random.default_rng(seed)
    honest = [[w + d for w, d in zip(W, x, strict=True)] for x in drawn(n - f, seed)]
    one = rng.standard_normal(5)
    lies = [(size * (one if together else rng.standard_normal(5))).tolist() for _ in range(f)]
    made = aggregated(rule, [*lies, *honest])
    centre = [fmean(x[i] for x in honest) for i in range(5)]
    radius = max(apart(x, centre) for x in honest)
    far = {"clip": max(apart(x, W) for x in honest)}.get(rule, 6 * radius)
    assert apart(made, centre) <= far + radius, "and the mean, of the same, is that far away"


def test_the_mean_is_taken_away_by_one() -> None:
    points = [[1e9] * 5, *drawn(7, 0)]
    assert min(map(abs, aggregated("mean", points))) > 10


@pytest.mark.parametrize("rule", ROBUST)
def test_what_a_device_says_of_its_size_counts_for_nothing(rule: str) -> None:
    points, orders = drawn(8, 3), []
    for order in (list(range(8)), list(reversed(range(8)))):
        orders.append(aggregated(rule, [points[k] for k in order]))
    assert orders[0] == pytest.approx(orders[1], abs=1e-9)


# ---- names, dtypes, numbers ----------------------------------------------------------------------------------------------------


def test_devices_that_sent_other_tensors_are_compared_by_name() -> None:
    average = Aggregation.of("median").averaging({}, 4)
    for k in range(8):
        average.take(Update(k, 1, {"all": torch.tensor([float(k)]), f"{'even' if k % 2 == 0 else 'odd'}": torch.tensor([10.0 * k])}))
    made = average.value()
    assert {n: float(t) for n, t in made.items()} == {"all": 3.5, "even": 30.0, "odd": 40.0}
    assert list(made) == sorted(made)


@pytest.mark.parametrize("rule", RULES)
def test_each_tensor_keeps_its_dtype_and_shape(rule: str) -> None:
    for dtype in (torch.float32, torch.bfloat16, torch.float64):
        average = Aggregation.of(rule).averaging({"x": torch.zeros(2, 3, dtype=dtype)}, 5)
        for k in range(5):
            average.take(Update(k, 1, {"x": torch.full((2, 3), 1.5, dtype=dtype)}))
        made = average.value()["x"]
        assert made.dtype == dtype and made.shape == (2, 3) and torch.allclose(made, torch.full_like(made, 1.5))


@pytest.mark.parametrize(("rule", "answered"), [("krum", 4), ("multi-krum", 4), ("median", 2), ("trimmed", 2), ("clip", 2)])
def test_a_round_to_which_too_few_came_does_not_count(rule: str, answered: int) -> None:
    with pytest.raises(CohortFailed, match=f"{answered} of {answered} clients answered, {answered + 1} are needed"):
        aggregated(rule, drawn(answered, 0), asked=5)
    points = drawn(answered + 1, 0)  # one of the five asked is taken to be hostile, also where three came
    due = {
        "krum": lambda: points[krum_order(points, 1)[0]],
        "multi-krum": lambda: [fmean(points[k][i] for k in krum_order(points, 1)[:4]) for i in range(5)],
        "median": lambda: [middle(x[i] for x in points) for i in range(5)],
        "trimmed": lambda: [sorted(x[i] for x in points)[1] for i in range(5)],
        "clip": lambda: clipped(points),
    }
    assert aggregated(rule, points, asked=5) == pytest.approx(due[rule](), abs=1e-12)


def test_those_who_are_away_may_be_the_honest_ones() -> None:
    """f = ⌊.25·8⌋ = 2 of the eight that were asked. Seven came, of whom two lie together: on either side two are left out, by number, and
    the mean of 2, 3, 4 is 3; ⌊.25·7⌋ = 1 would let one of the two in."""
    points = [[float(k)] * 5 for k in range(5)] + [[1e6] * 5, [1e6 + 1] * 5]
    assert aggregated("trimmed", points, asked=8) == [3.0] * 5
    assert aggregated("trimmed", points) == pytest.approx([(1 + 2 + 3 + 4 + 1e6) / 5] * 5)
    spread = drawn(7, 5)
    assert aggregated("krum", spread, asked=8) == pytest.approx(spread[krum_order(spread, 2)[0]], abs=1e-12)
    best = krum_order(spread, 2)[:5]
    assert aggregated("multi-krum", spread, asked=8) == pytest.approx([fmean(spread[k][i] for k in best) for i in range(5)], abs=1e-12)


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("krumm", "no aggregation 'krumm'; there are mean, median, trimmed, krum"),
        ("median:0.5", "above 0 and below 0.5, such as median:0.25"),
        ("median:much", "above 0 and below 0.5"),
        ("median:nan", "above 0 and below 0.5"),
        ("median:", "above 0 and below 0.5"),
        ("mean:0.1", "withstands nobody"),
    ],
)
def test_a_rule_that_makes_no_sense_is_refused(text: str, told: str) -> None:
    with pytest.raises(ValueError, match=told):
        Aggregation.of(text)


def test_a_cohort_in_which_nobody_could_be_hostile_is_refused() -> None:
    with pytest.raises(ValueError, match=r"takes 0 of 3 devices to be hostile .* wants a cohort of 4 or more"):
        Aggregation.of("median").insist_on(3)
    with pytest.raises(ValueError, match=r"takes 1 of 4 devices to be hostile and needs 5 .* wants a cohort of 5 or more"):
        Aggregation.of("krum").insist_on(4)
    Aggregation.of("krum").insist_on(5)
    Aggregation.of("median:0.1").insist_on(10)
    Aggregation.of("mean").insist_on(1)


def test_the_pool_hands_out_the_experiments_rule() -> None:
    pool = Pool((0, 1, 2, 3), 4, 1, 5, Aggregation.of("median"))
    assert float(pool.mean([Update(k, 1, {"x": torch.tensor(float(x))}) for k, x in enumerate([0, 0, 1, 1e9])])["x"]) == 0.5
    with pytest.raises(ValueError, match="'flora' cannot follow aggregation 'median': it adds products"):
        pool.insist_on_the_mean("flora", "it adds products")
    Pool((0, 1), 1, 1, 5).insist_on_the_mean("flora", "it adds products")
