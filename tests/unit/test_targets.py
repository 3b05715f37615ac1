"""Cost to target, on rows played by hand."""

from __future__ import annotations

from typing import Any

import pytest

from fedloom.run.comparison.targets import Cost, costs, mean_cost, personalising, reached

RESULT = {"setup_device_seconds": 10.0, "setup_bytes_up": 100, "setup_bytes_down": 500}


def rows(*scores: float | None) -> list[dict[str, Any]]:
    """Round 0 costs nothing; round t takes t seconds, uploads 10 · t bytes and downloads 70 · t. Nothing is trained before a
    prediction."""
    nothing = {"flops": 0.0, "device_seconds": 0.0}
    return [
        {"round": t, "device_seconds": float(t), "bytes_up": 10 * t, "bytes_down": 70 * t, "personalised": s, "global": None}
        | {"personalising": None if s is None else nothing}
        for t, s in enumerate(scores)
    ]


@pytest.mark.parametrize(
    ("scores", "target", "wanted"),
    [
        ((0.2, 0.5, 0.4, 0.9), 0.5, Cost(1, 11.0, 110, 570)),
        ((0.2, 0.4, 0.4, 0.9), 0.5, Cost(3, 16.0, 160, 920)),
        ((0.6, 0.4), 0.5, Cost(0, 10.0, 100, 500)),
        ((None, None, 0.5, 0.9), 0.5, Cost(2, 13.0, 130, 710)),
        ((None, 0.49999), 0.5, None),
    ],
    ids=["as high is reached", "first of all", "set-up alone", "not evaluated is not reached", "never"],
)
def test_a_target_is_reached_at_the_first_evaluated_round_with_the_cost_of_set_up(
    scores: tuple[float | None, ...], target: float, wanted: Cost | None
) -> None:
    assert reached(rows(*scores), RESULT, "personalised", target) == wanted


def test_what_was_trained_before_the_prediction_that_reached_a_target_counts_once() -> None:
    """Evaluated at 0, 1 and 3, for 2, 4 and 8 s: after 1 + 2 + 3 s of rounds and 10 of set-up the score is there, with the 8 s of that
    evaluation and of none before it. The global model is nobody's own."""
    made = rows(0.2, 0.3, None, 0.9)
    for t, seconds in ((0, 2.0), (1, 4.0), (3, 8.0)):
        made[t] |= {"personalising": {"flops": 1e9, "device_seconds": seconds}, "global": made[t]["personalised"]}
    assert reached(made, RESULT, "personalised", 0.5) == Cost(3, 24.0, 160, 920, 8.0)
    assert reached(made, RESULT, "personalised", 0.1) == Cost(0, 12.0, 100, 500, 2.0), "not for nothing, though no round was needed"
    assert reached(made, RESULT, "global", 0.5) == Cost(3, 16.0, 160, 920, 0.0)


def test_rows_of_an_earlier_version_say_that_they_do_not_tell_it() -> None:
    made = [{key: value for key, value in row.items() if key != "personalising"} for row in rows(0.2, 0.9)]
    found = reached(made, RESULT, "personalised", 0.5)
    assert found == Cost(1, 11.0, 110, 570, None)
    assert personalising({"personalising": None}) is personalising({}) is None


def test_a_protocol_that_a_method_lacks_is_never_reached() -> None:
    assert reached(rows(0.9, 0.9), RESULT, "global", 0.1) is None


def test_costs_are_totals_so_far() -> None:
    assert [(c.device_seconds, c.bytes_up, c.bytes_down) for c in costs(rows(None, None, None, None), RESULT)] == [
        (10, 100, 500),
        (11, 110, 570),
        (13, 130, 710),
        (16, 160, 920),
    ]


def test_a_mean_needs_every_seed() -> None:
    one, two = Cost(1, 10.0, 100, 7), Cost(3, 20.0, 400, 9)
    assert mean_cost([one, two]) == (15.0, 250, 8)
    assert mean_cost([one, None]) is None
    assert mean_cost([]) is None
