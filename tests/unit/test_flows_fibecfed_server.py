"""The server's half of FibecFed, played by hand: what is asked in which order, which layers become global, what travels in a round.
And every set-up: whoever did not answer is asked again."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from fedloom.messages import CohortFailed, Task, Update
from fedloom.methods.fibecfed import Curriculum, FibecFed, Gal, choose_gal
from fedloom.methods.local import Local
from fedloom.methods.method import State
from fedloom.methods.personal_head import PersonalHead
from fedloom.methods.prior import PriorCorrected
from fedloom.server.participation import uniform
from fedloom.tensors import fingerprint
from tests import tiny
from tests.flows import (
    HEAD,
    POOL,
    SCORES,
    SIZES,
    counted,
    of_layers,
    play,
    start,
    told,
    weighted,
)


def test_fibecfed_sets_up_head_scores_gal_in_this_order() -> None:
    method = FibecFed(curriculum=Curriculum(head_rounds=2), gal=Gal(fraction=0.5))
    askings, state = play(method.setup(State(0, start(), facts={"depth": 4}), POOL), told)
    assert [(tasks[0].op, [t.client for t in tasks]) for tasks in askings] == [
        ("warm_head", list(uniform(POOL, -1))),
        ("warm_head", list(uniform(POOL, -2))),
        ("inspect", [0, 1, 2, 3]),
        ("adopt", [0, 1, 2, 3]),
    ]
    first, second, inspect, adopt = askings
    assert all(sorted(t.tensors) == HEAD for t in (*first, *second))
    one, two = weighted(uniform(POOL, -1)), weighted(uniform(POOL, -1)) + weighted(uniform(POOL, -2))
    assert all(float(t.tensors["m.classifier.bias"][0]) == pytest.approx(one) for t in second)
    assert all(set(t.tensors) == set(start()) for t in inspect)
    assert all(float(t.tensors["m.classifier.bias"][0]) == pytest.approx(two) for t in inspect)
    assert all(not t.tensors for t in adopt)
    mean = [sum(SIZES[k] * SCORES[k][layer] for k in SIZES) / 33 for layer in range(4)]
    assert state.facts["layer_scores"] == pytest.approx(mean)
    chosen = [1, 2]
    assert max(mean[1], mean[2]) < min(mean[0], mean[3])
    assert state.facts["gal"] == chosen
    assert all(t.settings["gal"] == chosen for t in adopt)
    assert set(state.shared) == of_layers(*chosen) | set(HEAD)
    assert float(state.shared["m.classifier.bias"][0]) == pytest.approx(two)
    assert state.facts["depth"] == 4


@pytest.mark.parametrize("head", ["left-out", "as-is"])
def test_without_a_head_warm_up_the_start_itself_is_inspected(head) -> None:
    askings, state = play(FibecFed(curriculum=Curriculum(head=head)).setup(State(0, start()), POOL), told)
    assert [tasks[0].op for tasks in askings] == ["inspect", "adopt"]
    assert all(fingerprint(t.tensors) == fingerprint(start()) for t in askings[0])
    assert state.facts["difficulty_head"] == head


def test_the_facts_tell_the_pacing_of_every_round() -> None:
    _, state = play(FibecFed().setup(State(0, start()), POOL), told)
    assert state.facts["pacing"] == pytest.approx([min(1.0, 0.6 + 0.4 * t / 6.4) for t in range(8)])


def test_a_fibecfed_round_asks_the_cohort_with_exactly_gal_and_head() -> None:
    method = FibecFed(gal=Gal(count=1))
    _, state = play(method.setup(State(0, start()), POOL), told)
    (tasks,), after = play(method.round(replace(state, round=3), POOL), told)
    assert [t.client for t in tasks] == list(uniform(POOL, 3))
    for task in tasks:
        assert set(task.tensors) == of_layers(state.facts["gal"][0]) | set(HEAD)
        assert dict(task.settings) == {"round": 3, "rounds": 8}
    assert after.round == 4
    name = sorted(of_layers(state.facts["gal"][0]))[1]
    assert float(after.shared[name][0, 0]) == pytest.approx(weighted(uniform(POOL, 3)))
    assert method.assembled(after) is after.shared


@pytest.mark.parametrize(
    ("gal", "asked"),
    [
        (Gal(count=2, refresh=2), ["rescore", "train"]),
        (Gal(count=2, which="random", refresh=2), ["hand_over", "regroup", "train"]),
        (Gal(fraction=1.0, refresh=2), ["train"]),
        (Gal(count=4, which="random", refresh=2), ["train"]),
    ],
    ids=["by score", "random", "all by score", "all at random"],
)
def test_layers_are_scored_again_where_scores_decide(gal: Gal, asked: list[str]) -> None:
    """Random layers are drawn again, without asking anybody; where all layers are shared there is nothing to choose."""

    def answer(task: Task) -> Update:
        if task.op == "hand_over":
            return Update(task.client, 1, {n: start()[n] for n in of_layers(*task.settings["layers"])})  # type: ignore[misc]
        return told(replace(task, op="inspect") if task.op == "rescore" else task)

    method = FibecFed(gal=gal)
    _, state = play(method.setup(State(0, start()), POOL), told)
    askings, after = play(method.round(replace(state, round=2), POOL), answer)
    assert [tasks[0].op for tasks in askings] == asked
    assert all(task.exact for tasks in askings for task in tasks if task.op == "regroup"), "devices keep it for good"
    due = choose_gal(np.zeros(4), [0, 1, 2, 3], gal, POOL.seed, 2) if gal.which == "random" else state.facts["gal"]
    assert after.facts["gal"] == due and set(after.shared) == of_layers(*due) | set(HEAD)
    told_again = [set(entry) for entry in after.facts["gal_history"][1:]]
    assert told_again == {4: [], 2: [{"round", "gal"} | ({"layer_scores"} if "rescore" in asked else set())]}[len(due)]


@pytest.mark.parametrize(
    ("method", "op"),
    [
        (FibecFed(), "warm_head"),
        (FibecFed(), "inspect"),
        (FibecFed(), "adopt"),
        (Local(), "receive"),
        (PersonalHead(), "receive"),
        (PriorCorrected(), "count"),
        (PriorCorrected(), "receive"),
    ],
)
def test_a_set_up_asks_again_whoever_did_not_answer_and_names_whoever_never_does(method: Any, op: str) -> None:
    asked: list[int] = []

    def lazy(task: Task, answers_at: int) -> Update | None:
        if (task.op, task.client) == (op, late):
            asked.append(task.client)
            return (counted if isinstance(method, PriorCorrected) else told)(task) if len(asked) >= answers_at else None
        return (counted if isinstance(method, PriorCorrected) else told)(task)

    late = uniform(POOL, -1)[0] if op == "warm_head" else 2
    state = State(0, start(), facts={"classes": 3})
    _, after = play(method.setup(state, POOL), lambda task: lazy(task, 1))
    asked.clear()
    askings, again = play(method.setup(state, POOL), lambda task: lazy(task, 3))
    assert [(t.op, t.client) for tasks in askings if len(tasks) == 1 for t in tasks] == [(op, late)] * 2
    assert fingerprint(again.shared) == fingerprint(after.shared)
    asked.clear()
    with pytest.raises(CohortFailed, match=rf"client {late}: no answer to '{op}' in 3 attempts"):
        play(method.setup(state, POOL), lambda task: lazy(task, 99))


# fibecfed: which layers


def test_the_gal_is_the_robust_end_by_default_the_sensitive_one_or_random_ones() -> None:
    scores = np.array([0.4, 0.1, 0.3, 0.2])
    assert choose_gal(scores, [0, 1, 2, 3], Gal(count=2), 0) == [1, 3]
    assert choose_gal(scores, [0, 1, 2, 3], Gal(count=2, which="most"), 0) == [0, 2]
    drawn = {tuple(choose_gal(scores, [0, 1, 2, 3], Gal(count=2, which="random"), seed)) for seed in range(60)}
    assert drawn == {(a, b) for a in range(4) for b in range(a + 1, 4)}
    assert choose_gal(scores, [0, 1, 2, 3], Gal(count=2, which="random"), 7) == choose_gal(
        scores, [0, 1, 2, 3], Gal(count=2, which="random"), 7
    )


def test_equal_scores_prefer_the_lower_layer_at_both_ends() -> None:
    assert choose_gal(np.ones(4), [0, 1, 2, 3], Gal(count=2), 0) == [0, 1]
    assert choose_gal(np.ones(4), [0, 1, 2, 3], Gal(count=2, which="most"), 0) == [0, 1]


@pytest.mark.parametrize(("fraction", "layers", "count"), [(0.75, 4, 3), (0.75, 6, 5), (0.5, 3, 2), (1.0, 5, 5), (0.01, 5, 1), (0.6, 5, 3)])
def test_the_fraction_of_layers_is_rounded_up(fraction: float, layers: int, count: int) -> None:
    assert len(choose_gal(np.arange(layers, dtype=float), list(range(layers)), Gal(fraction=fraction), 0)) == count


def test_only_layers_with_an_adapter_can_be_chosen() -> None:
    assert choose_gal(np.array([0.0, 5.0, 0.0, 4.0]), [1, 3], Gal(count=1), 0) == [3]


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (lambda: Gal(fraction=0.0), "above 0 and at most 1 is global, .* got fraction 0.0, count 0"),
        (lambda: Gal(fraction=1.5), "got fraction 1.5, count 0"),
        (lambda: Gal(count=-3), "a count of 1 or more .* got fraction 0.75, count -3"),
        (lambda: Gal(rho=0.0), "rho is 0.0; embeddings are moved by a positive number"),
        (lambda: Gal(rho=math.inf), "rho is inf"),
        (lambda: Gal(refresh=-2), "refresh is -2; layers are chosen anew every so many rounds"),
        (lambda: FibecFed(keep=0.0), "keep is 0.0; a share of the neurons above 0 and at most 1"),
        (lambda: FibecFed(keep=1.5), "keep is 1.5"),
        (lambda: FibecFed(warmup_epochs=-1), "warmup_epochs is -1; the mask comes of one epoch at least"),
        (lambda: FibecFed(warmup_epochs=0), "warmup_epochs is 0"),
        (lambda: FibecFed(momentum=2.0), "momentum is 2.0; it must be 0 or more and below 1"),
        (lambda: FibecFed(momentum=1.0), "momentum is 1.0"),
        (lambda: FibecFed(lossless_probes=0), "lossless_probes is 0; a spectrum takes one random start at least"),
    ],
)
def test_impossible_settings_are_refused_when_they_are_given(make: Any, says: str) -> None:
    with pytest.raises(ValueError, match=says):
        make()


def test_more_global_layers_than_there_are_are_refused_before_anything_is_asked() -> None:
    model = tiny.model(layers=2)
    for gal in (Gal(count=3), Gal(count=3, lossless=True)):
        with pytest.raises(ValueError, match="must hold 1 to 2 layers; fraction 0.75, count 3 give 3"):
            FibecFed(gal=gal).init(model)
    FibecFed(gal=Gal(count=2)).init(model)
    with pytest.raises(ValueError, match="must hold 1 to 4 layers"):
        choose_gal(np.ones(4), [0, 1, 2, 3], Gal(count=5), 0)


def test_a_head_that_is_warmed_for_no_round_is_told_as_it_is() -> None:
    askings, state = play(FibecFed(curriculum=Curriculum(head_rounds=0)).setup(State(0, start()), POOL), told)
    assert [tasks[0].op for tasks in askings] == ["inspect", "adopt"] and state.facts["difficulty_head"] == "as-is"
    assert Curriculum(head="left-out", head_rounds=0).facts(3)["difficulty_head"] == "left-out"


def test_an_unknown_choice_of_gal() -> None:
    with pytest.raises(ValueError, match="no GAL choice 'best'; there are least, most, random"):
        choose_gal(np.ones(4), [0, 1, 2, 3], Gal(which="best"), 0)  # type: ignore[arg-type]
