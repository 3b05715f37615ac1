"""Ranks, spreads and the paired bootstrap, against explicit lists of predictions scored by scikit-learn."""

from __future__ import annotations

import numpy as np
import pytest
from sklearn.metrics import accuracy_score, f1_score, matthews_corrcoef

from fedloom.run.comparison import statistics
from fedloom.run.comparison.statistics import Bootstrap, mean_of_all, ranks, resampled, spread, tallies, tallies_of
from fedloom.seeds import derive

pytestmark = pytest.mark.no_cover

CLASSES = 3
DEVICES = 9
SCORES = {
    "accuracy": accuracy_score,
    "mcc": matthews_corrcoef,
    "f1": lambda true, told: f1_score(true, told, average="macro", zero_division=0),
}

SKILLS = (("good", 0.9), ("middling", 0.6), ("bad", 0.3))

Predictions = list[list[tuple[int, int]]]
"""Of each device its (true, predicted) pairs."""


def played(seed: int, skill: float) -> Predictions:
    """Devices of 0 to 8 examples; a prediction is right with probability ``skill`` and by luck."""
    rng = np.random.default_rng(seed)
    labels = [np.random.default_rng((seed // 100, k)).integers(0, CLASSES, size=k).tolist() for k in range(DEVICES)]
    return [[(t, t if rng.random() < skill else int(rng.integers(CLASSES))) for t in device] for device in labels]


def cells(devices: Predictions) -> list[list[list[int]]]:
    return [[[t, p, device.count((t, p))] for t, p in sorted(set(device))] for device in devices]


def score(metric: str, devices: Predictions) -> float:
    pairs = [pair for device in devices for pair in device]
    return float(SCORES[metric]([t for t, _ in pairs], [p for _, p in pairs]))


@pytest.mark.parametrize("metric", SCORES)
def test_resampled_scores_are_those_of_the_pooled_predictions_of_the_drawn_devices(metric: str) -> None:
    first, second = played(100, 0.8), played(101, 0.3)
    counts = [tallies(cells(each), CLASSES) for each in (first, second)]
    found = resampled(counts, metric, ("data", "0.1", 7), resamples=20)
    drawn = derive(0, "bootstrap", "data", "0.1", 7).multinomial(DEVICES, np.full(DEVICES, 1 / DEVICES), size=20)
    assert (drawn.sum(1) == DEVICES).all()
    for b, times in enumerate(drawn):
        who = np.repeat(np.arange(DEVICES), times)
        for scores, devices in zip(found, (first, second), strict=True):
            assert scores[b] == pytest.approx(score(metric, [devices[k] for k in who]))


def test_large_federations_are_drawn_in_parts_with_the_same_result(monkeypatch: pytest.MonkeyPatch) -> None:
    counts = [tallies(cells(played(100, 0.8)), CLASSES)]
    at_once = resampled(counts, "accuracy", ("x",), 50)[0]
    monkeypatch.setattr(statistics, "AT_ONCE", 7 * DEVICES)
    assert resampled(counts, "accuracy", ("x",), 50)[0].tolist() == at_once.tolist()


@pytest.mark.parametrize("metric", SCORES)
def test_a_paired_difference_is_the_mean_over_seeds_with_its_interval(metric: str) -> None:
    seeds = (1, 2, 3)
    mine = {s: played(100 * s, 0.9) for s in seeds}
    other = {s: played(100 * s + 1, 0.4) for s in seeds}
    counts = [{s: tallies(cells(of[s]), CLASSES) for s in seeds} for of in (mine, other)]
    known = Bootstrap(dict(zip(("mine", "other"), counts, strict=True)), metric, ("case",), 100)
    found = known.against("mine", "other")
    assert known.scores("mine") == pytest.approx([score(metric, mine[s]) for s in seeds])
    differences = [score(metric, mine[s]) - score(metric, other[s]) for s in seeds]
    assert found.difference == pytest.approx(np.mean(differences))
    assert (found.better, found.seeds) == (sum(d > 0 for d in differences), 3)
    each = []
    for s in seeds:
        drawn = derive(0, "bootstrap", "case", s).multinomial(DEVICES, np.full(DEVICES, 1 / DEVICES), size=100)
        who = [np.repeat(np.arange(DEVICES), times) for times in drawn]
        each.append([score(metric, [mine[s][k] for k in w]) - score(metric, [other[s][k] for k in w]) for w in who])
    together = np.mean(each, axis=0)
    assert (found.low, found.high) == pytest.approx(np.quantile(together, [0.025, 0.975]))
    assert found.p == pytest.approx(min(1, 2 * (1 + min((together <= 0).sum(), (together >= 0).sum())) / 101))
    assert found.low < found.difference < found.high


def test_p_is_one_for_the_same_and_small_for_what_is_better_on_every_device() -> None:
    right = {1: tallies([[[0, 0, 3]], [[1, 1, 2]], [[0, 0, 1]], [[1, 1, 4]]], 2)}
    wrong = {1: tallies([[[0, 1, 3]], [[1, 0, 2]], [[0, 1, 1]], [[1, 0, 4]]], 2)}
    known = Bootstrap({"right": right, "wrong": wrong}, "accuracy", ("x",), 99)
    same, better, worse = (known.against(a, b) for a, b in (("right", "right"), ("right", "wrong"), ("wrong", "right")))
    assert (same.difference, same.low, same.high, same.p, same.better) == (0, 0, 0, 1, 0)
    assert (better.difference, better.low, better.high, better.p, better.better) == (1, 1, 1, 2 / 100, 1)
    assert (worse.difference, worse.p, worse.better) == (-1, 2 / 100, 0)


def test_the_draws_do_not_depend_on_the_method_and_differ_between_seeds() -> None:
    one, two = (tallies(cells(played(s, 0.5)), CLASSES) for s in (100, 200))
    alone, beside = resampled([one], "mcc", ("c", 1), 30)[0], resampled([two, one], "mcc", ("c", 1), 30)[1]
    assert alone.tolist() == beside.tolist()
    assert resampled([one], "mcc", ("c", 2), 30)[0].tolist() != alone.tolist()


def test_a_bootstrap_needs_the_same_devices() -> None:
    one, two = tallies([[[0, 0, 1]]] * 3, 2), tallies([[[0, 0, 1]]] * 4, 2)
    for mine, other in (({1: one}, {1: two}), ({1: one}, {2: one}), ({}, {})):
        with pytest.raises(ValueError, match="on the same devices"):
            Bootstrap({"mine": mine, "other": other}, "accuracy", ("x",))
    with pytest.raises(ValueError, match="on the same devices"):
        Bootstrap({}, "accuracy", ("x",))


def test_who_else_is_compared_changes_no_comparison_and_seeds_may_have_other_devices() -> None:
    """Two seeds of nine and of four devices; the interval of two methods is the same beside a third."""
    counts = {
        m: {1: tallies(cells(played(100, skill)), CLASSES), 2: tallies(cells(played(200, skill)[:4]), CLASSES)} for m, skill in SKILLS
    }
    alone = Bootstrap({m: counts[m] for m in ("good", "bad")}, "accuracy", ("x",), 200).against("good", "bad")
    assert Bootstrap(counts, "accuracy", ("x",), 200).against("good", "bad") == alone
    assert alone.low < alone.difference < alone.high


def test_the_ends_of_an_interval_hardly_depend_on_the_draws() -> None:
    """A hundred devices of five texts, two methods that differ on few, three seeds: from stream to stream the upper end moves by less than
    a sixth of a text of 500, so that this does not decide who is level."""
    rng = np.random.default_rng(3)
    counts = {
        m: {s: tallies([[[0, 0, int(r)], [0, 1, 5 - int(r)]] for r in rng.binomial(5, p, 100)], 2) for s in (1, 2, 3)}
        for m, p in (("one", 0.95), ("two", 0.96))
    }
    ends = [Bootstrap(counts, "accuracy", (stream,)).against("one", "two").high for stream in range(12)]
    assert np.std(ends) < 1 / 500 / 6


def test_tallies_count_right_true_and_predicted() -> None:
    made = tallies([[[0, 0, 2], [0, 1, 3], [2, 1, 1]], []], 3)
    assert made.tolist() == [[[2, 0, 0], [5, 0, 1], [2, 4, 0]], [[0] * 3] * 3]


def test_results_without_confusions_have_no_tallies() -> None:
    devices = [{"confusion": {"personalised": [[0, 0, 1]], "global": None}}, {"confusion": {"personalised": [], "global": None}}]
    result = {"per_device": devices, "partition": {"classes": ["a", "b"]}}
    found = tallies_of(result, "personalised")
    assert found is not None
    assert found.shape == (2, 3, 2)
    assert tallies_of(result, "global") is None
    assert tallies_of({**result, "per_device": [{"correct": 1}]}, "personalised") is None, "made before they were kept"


@pytest.mark.parametrize(
    ("scores", "wanted"),
    [
        ([0.1, 0.3, 0.2], [3, 1, 2]),
        ([0.3, 0.3, 0.2], [1.5, 1.5, 3]),
        ([0.2, 0.2, 0.2, 0.9], [3, 3, 3, 1]),
        ([None, 0.1, None, 0.2], [None, 2, None, 1]),
        ([-0.5, None, 0.0], [2, None, 1]),
        ([], []),
    ],
)
def test_ranks(scores: list[float | None], wanted: list[float | None]) -> None:
    assert ranks(scores) == wanted


def test_a_mean_rank_needs_every_case() -> None:
    assert mean_of_all([1, 2.5]) == 1.75
    assert mean_of_all([1, None]) is None
    assert mean_of_all([]) is None


def test_spread_is_mean_and_sample_deviation() -> None:
    found = spread([0.2, None, 0.4, 0.9])
    assert (found.mean, found.deviation, found.count) == pytest.approx((0.5, np.std([0.2, 0.4, 0.9], ddof=1), 3))
    assert (spread([0.2]).mean, spread([0.2]).deviation) == (0.2, None)
    assert spread([None]).mean is None
