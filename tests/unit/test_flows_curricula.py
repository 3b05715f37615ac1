"""Methods under a curriculum, played by hand: what travels, what is asked of the device, and who refuses one."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

from fedloom.client.curricula import all_curricula
from fedloom.client.curricula.everything import Everything
from fedloom.client.curricula.fisher import ByFisher
from fedloom.client.curricula.slw import LengthWarmup
from fedloom.client.curricula.voc import ByRarity
from fedloom.compute.work import Fit, Predict, Score
from fedloom.messages import Task, Update, ask
from fedloom.methods.centralised import Centralised
from fedloom.methods.fedavg import FedAvg
from fedloom.methods.fedcybgd import FedCyBGD
from fedloom.methods.fibecfed import Curriculum, FibecFed
from fedloom.methods.finetuned import FineTuned
from fedloom.methods.local import Local
from fedloom.methods.method import State
from fedloom.methods.personal_head import PersonalHead
from fedloom.methods.prior import PriorCorrected
from fedloom.server.participation import uniform
from tests.flows import HEAD, POOL, client, counted, fitted, of_layers, play, same, start, told, work

SLW = FedAvg(batch_size=4, curriculum=LengthWarmup(3, 0.5))
FISHER = FedAvg(batch_size=4, local_epochs=3, curriculum=ByFisher(0.4, 0.5))
HOLDERS = [FedAvg, FineTuned, Local, PersonalHead, PriorCorrected]


def holding(kind: type[Any], inner: FedAvg) -> Any:
    return inner if kind is FedAvg else kind(inner)


def answer(task: Task) -> Update:
    return counted(task) if task.op in ("count", "receive") else told(task)


@pytest.mark.parametrize("kind", HOLDERS)
def test_every_method_that_holds_fedavg_tells_the_time_and_the_pacing(kind: type[Any]) -> None:
    method = holding(kind, SLW)
    _, state = play(method.setup(State(0, start(), facts={"classes": 3}), POOL), answer)
    assert state.facts["pacing"] == [0.0, 0.25, 0.5, 0.75, 1.0, 1.0, 1.0, 1.0]
    assert (state.facts["opens"], state.facts["classes"]) == ("length", 3), "and keeps what had been told before"
    (tasks,), _ = play(method.round(replace(state, round=2), POOL), answer)
    assert [dict(task.settings) for task in tasks] == [{"round": 2, "rounds": 8}] * 3


@pytest.mark.parametrize("kind", HOLDERS)
def test_without_a_curriculum_nothing_more_travels_or_is_told_than_ever(kind: type[Any]) -> None:
    method = holding(kind, FedAvg())
    _, state = play(method.setup(State(0, start(), facts={"classes": 3}), POOL), answer)
    assert dict(state.facts) == {"classes": 3}
    (tasks,), _ = play(method.round(state, POOL), answer)
    assert [dict(task.settings) for task in tasks] == [{"round": 0}] * 3


@pytest.mark.parametrize("kind", HOLDERS)
def test_every_method_that_holds_fedavg_scores_its_whole_model_and_trains_on_what_is_open(kind: type[Any]) -> None:
    method, c = holding(kind, FISHER), client()
    c.private = {Local: start(), PersonalHead: {n: start()[n] for n in HEAD}}.get(kind, {})
    sent = {} if kind is Local else {n: t for n, t in start().items() if kind is not PersonalHead or n not in HEAD}
    for t, batches in ((0, 2), (4, 3)):
        operation = method.train(c, Task("train", 1, sent, {"round": t, "rounds": 8}))
        item = next(operation)
        if t == 0:
            assert isinstance(item, Score)
            assert set(item.at) == set(start())
            item = operation.send(np.arange(9.0))
        assert isinstance(item, Fit)
        assert set(item.start) == set(start())
        assert len(item.batches) == 3 * batches
        assert same(item.batches[:batches], item.batches[batches : 2 * batches])
        means = [float(b.mean()) for b in item.batches[:batches]]
        assert means == sorted(means)
        with pytest.raises(StopIteration) as done:
            operation.send(fitted(item))
        assert done.value.value.num_examples == 9
        assert not {"difficulty", "scored_at"} & {*done.value.value.tensors, *done.value.value.metrics}


def test_a_device_that_is_not_told_the_number_of_rounds_says_so() -> None:
    with pytest.raises(ValueError, match="'train' was asked without the number of rounds, on which LengthWarmup"):
        next(SLW.train(client(), ask(SLW.train, 1, start(), round=0)))


def test_cut_texts_are_what_is_trained_on() -> None:
    c = client()
    fit = next(SLW.train(c, ask(SLW.train, 1, start(), round=0, rounds=8)))
    assert fit.examples.lengths.max() == 3 < c.train.lengths.max()
    assert fit.examples.labels.tolist() == c.train.labels.tolist()
    assert next(SLW.train(c, ask(SLW.train, 1, start(), round=4, rounds=8))).examples is c.train


def test_a_method_may_hold_tensors_fixed_or_train_twice_on_what_is_open() -> None:
    """Scores are taken at the whole model; ``open`` gives what ``learn`` trains on."""
    c, head = client(), {n: start()[n] for n in HEAD}
    factors = {n: t for n, t in start().items() if n not in head}
    task = ask(FISHER.train, 1, factors, round=0, rounds=8)
    operation = FISHER.learn(c, factors, task, fixed=head)
    score = next(operation)
    assert (type(score), set(score.at)) == (Score, set(start()))
    fit = operation.send(np.arange(9.0))
    assert (set(fit.start), set(fit.fixed)) == (set(factors), set(head))
    items, opened = work(FISHER.open(c, start(), task))
    assert items == [] and same(opened.batches, fit.batches) and opened.examples is fit.examples


# who refuses


@pytest.mark.parametrize("name", [name for name in all_curricula() if name != "none"])
def test_whoever_follows_no_curriculum_refuses_one(name: str) -> None:
    inner = FedAvg(curriculum=all_curricula()[name]())
    with pytest.raises(ValueError, match="does not follow a curriculum"):
        inner.batches(client(), 0)
    with pytest.raises(ValueError, match="'centralised' takes no curriculum"):
        Centralised(inner)
    with pytest.raises(ValueError, match="FibecFed follows its own curriculum"):
        FibecFed(inner)


# fibecfed under another curriculum


def test_fibecfed_takes_another_curriculum_and_then_nobody_warms_a_head() -> None:
    askings, state = play(FibecFed(curriculum=ByRarity(0.6)).setup(State(0, start()), POOL), told)
    assert [tasks[0].op for tasks in askings] == ["inspect", "adopt"]
    assert state.facts["pacing"] == ByRarity(0.6).facts(8)["pacing"]
    assert (state.facts["opens"], "difficulty_head" in state.facts) == ("examples", False)
    (tasks,), _ = play(FibecFed(curriculum=Everything()).round(replace(state, round=3), POOL), told)
    assert [dict(task.settings) for task in tasks] == [{"round": 3}] * len(uniform(POOL, 3))


@pytest.mark.parametrize("name", all_curricula())
def test_fibecfed_prepares_each_in_its_set_up_warms_its_masks_on_all_batches_and_trains_on_what_is_open(name: str) -> None:
    method, c = FibecFed(FedAvg(batch_size=4), all_curricula()[name](), keep=0.5), client()
    scored: list[Any] = {"fisher": [np.arange(9.0)], "loss": [torch.eye(9, 3)]}.get(name, [])
    items, _ = work(method.inspect(c, ask(method.inspect, 1, start())), *scored, [np.zeros(4)])
    assert [type(item) for item in items[:-1]] == {"fisher": [Score], "loss": [Predict]}.get(name, [])
    warm = next(method.adopt(c, ask(method.adopt, 1, gal=[1, 2, 3])))
    assert sorted(np.concatenate(warm.batches).tolist()) == list(range(9))
    assert warm.examples is c.train
    shared = {n: t for n, t in start().items() if ".0." not in n}
    fit = next(method.train(c, ask(method.train, 1, shared, round=0, rounds=8)))
    assert isinstance(fit, Fit), "nothing is scored twice"
    opened = method.curriculum.open(c, method.local._turn(c, ask(method.train, 1, {}, round=0, rounds=8)))
    assert same(fit.batches, opened.batches)
    assert fit.examples.lengths.tolist() == opened.examples.lengths.tolist()


def test_fibecfeds_own_curriculum_is_fishers_over_what_the_head_allows() -> None:
    for head, over in (("warm", "all"), ("as-is", "all"), ("left-out", "adapter")):
        own = Curriculum(0.5, 0.7, "sqrt", "example", 4, head)  # type: ignore[arg-type]
        assert own.on_device == ByFisher(0.5, 0.7, "sqrt", "example", 4, over)  # type: ignore[arg-type]


# a turn without some layers


def test_a_turn_that_leaves_layers_out_scores_with_them_as_the_device_has_them() -> None:
    """The Fit may not name them; the score of a turn is of the whole model, by what the turn trains."""
    c, block = client(), {n: start()[n] for n in sorted(of_layers(0))}
    c.private = {n: torch.full_like(start()[n], 7.0) for n in sorted(of_layers(1, 2))}
    sent = {**block, **{n: start()[n] for n in HEAD}}
    method = FedCyBGD(inner=FISHER, drop=0.5)
    operation = method.train(c, ask(method.train, 1, sent, block=list(block), skips=[1], round=0, rounds=8))
    score = next(operation)
    assert isinstance(score, Score) and set(score.at) == {*sent, *of_layers(1, 2)}
    assert all(torch.equal(score.at[n], torch.full_like(score.at[n], 7.0)) for n in of_layers(1))
    assert set(score.over or ()) == set(block)
    fit = operation.send(np.arange(9.0))
    assert isinstance(fit, Fit) and set(fit.start) == set(sent) and set(fit.fixed) == of_layers(2), "and no score is asked for again"
