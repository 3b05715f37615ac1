"""The conversations of plain federated LoRA, its cheap rivals, floor and ceiling, played by hand: the server's tasks are inspected and
answered with made-up updates, the device's work items are inspected and answered with made-up results. No engine, no model."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

from fedloom.client.client import Client
from fedloom.compute.work import Fit, Fitted, Moments, Predict
from fedloom.encodings import Encoding
from fedloom.messages import CENTRE, Task, Update, ask
from fedloom.methods import all_methods, methods_in, named
from fedloom.methods.centralised import Centralised
from fedloom.methods.fedavg import FedAvg
from fedloom.methods.fedbavg import FedBAvg
from fedloom.methods.fedcybgd import FedCyBGD
from fedloom.methods.fibecfed import FibecFed
from fedloom.methods.finetuned import FineTuned
from fedloom.methods.local import Local
from fedloom.methods.method import State
from fedloom.methods.personal_head import PersonalHead
from fedloom.methods.prior import PriorCorrected, label_prior
from fedloom.seeds import derive_int
from fedloom.server.participation import uniform
from fedloom.tensors import fingerprint
from tests import tiny
from tests.flows import (
    FACTORS,
    HEAD,
    POOL,
    client,
    counted,
    echo,
    fitted,
    play,
    same,
    start,
    weighted,
    work,
)

# what all methods have


def test_there_are_these_methods_and_each_says_its_paper() -> None:
    ours = ["centralised", "local", "lora", "lora-finetuned", "lora-personal-head", "lora-prior"]
    assert list(all_methods()) == sorted(
        [
            *ours,
            "adalora",
            "deltalora",
            "ditto",
            "embracingfl",
            "fedalt",
            "fedalt-partial",
            "fedap",
            "fedbavg",
            "fedbf",
            "fedcybgd",
            "fedeven",
            "fedex",
            "fedfft",
            "fedopt",
            "fedprox",
            "federa",
            "fedsa",
            "fedsb",
            "ffa",
            "fibecfed",
            "flasc",
            "flexlora",
            "flora",
            "galore",
            "handover",
            "hetlora",
            "lisa",
            "rolora",
            "scaffold",
            "slora",
        ]
    )
    assert all(kind.paper for kind in all_methods().values())
    assert named("fibecfed") is FibecFed


def test_a_module_has_the_methods_that_it_defines_itself() -> None:
    from fedloom.methods import finetuned

    assert methods_in(finetuned) == {"lora-finetuned": FineTuned}


@pytest.mark.parametrize("name", all_methods())
def test_predicting_asks_for_each_split_in_order(name: str) -> None:
    method, c = named(name)(), client()
    adds = torch.tensor([1.0, 2.0, 3.0])
    c.private, c.memory = start(), {"bias": adds}
    before = fingerprint(c.private), fingerprint(c.memory)
    results: list[Any] = [[torch.zeros(2, 3), torch.ones(3, 3)]]
    operation = method.predict(c, ask(method.predict, 1, start(), splits=["validation", "test"]))
    item = next(operation)
    if isinstance(item, Fit):
        item = operation.send(fitted(item))
    assert [type(i) for i in item] == [Predict, Predict]
    assert [i.examples for i in item] == [c.validation, c.test]
    with pytest.raises(StopIteration) as done:
        operation.send(results[0])
    bias = {"lora-prior": adds, "fedeven": label_prior(c.train.labels, 3, 1.0).log()}.get(name, torch.zeros(3))
    assert torch.equal(done.value.value.tensors["validation"], bias.expand(2, 3))
    assert torch.equal(done.value.value.tensors["test"], 1 + bias.expand(3, 3))
    assert (fingerprint(c.private), fingerprint(c.memory)) == before


# lora


def test_lora_has_no_set_up() -> None:
    state = State(0, start())
    assert play(FedAvg().setup(state, POOL), echo) == ([], state)


def test_a_lora_round_asks_the_cohort_with_everything_and_takes_the_weighted_mean() -> None:
    for t in range(3):
        ((tasks,), after) = play(FedAvg().round(State(t, start()), POOL), echo)
        cohort = uniform(POOL, t)
        assert [task.client for task in tasks] == list(cohort)
        assert {task.op for task in tasks} == {"train"}
        assert all(dict(task.settings) == {"round": t} for task in tasks)
        assert all(fingerprint(task.tensors) == fingerprint(start()) for task in tasks)
        assert after.round == t + 1
        assert torch.allclose(after.shared["m.layer.0.q.lora_B.weight"], torch.full((4, 2), weighted(cohort)))
    assert len({uniform(POOL, t) for t in range(8)}) > 1


def test_a_lora_round_goes_on_with_whoever_answered() -> None:
    _, after = play(FedAvg().round(State(0, start()), POOL), lambda task: None if task.client == uniform(POOL, 0)[0] else echo(task))
    assert float(after.shared["m.layer.0.q.lora_B.weight"][0, 0]) == pytest.approx(weighted(uniform(POOL, 0)[1:]))


def test_lora_trains_all_batches_of_each_local_epoch_from_what_came() -> None:
    method, c = FedAvg(lr=0.5, local_epochs=3, batch_size=4, weight_decay=0.1, clip=2.0), client()
    c.private = {"stale": torch.ones(1)}
    items, update = work(method.train(c, ask(method.train, 1, start(), round=2)), fitted(Fit(start(), c.train, [], method.optimizer)))
    (fit,) = items
    assert fingerprint(fit.start) == fingerprint(start())
    assert len(fit.batches) == 9
    epochs = [np.concatenate(fit.batches[i : i + 3]).tolist() for i in (0, 3, 6)]
    assert all(sorted(epoch) == list(range(9)) for epoch in epochs)
    assert len(set(map(tuple, epochs))) == 3, "every epoch has its own order"
    assert (fit.optimizer.lr, fit.optimizer.weight_decay, fit.optimizer.clip) == (0.5, 0.1, 2.0)
    assert (fit.mask, fit.penalty, fit.moments, fit.fixed) == ({}, None, None, {})
    assert fit.dropout_seed == derive_int(3, "fit", 2, 1)
    assert (update.client, update.num_examples, update.metrics) == (1, 9, {"loss": 3.0})
    assert set(update.tensors) == set(start())


def test_batches_differ_between_rounds_epochs_and_clients_or_never_when_told_so() -> None:
    method, fixed = FedAvg(batch_size=4), FedAvg(batch_size=4, reshuffle=False)
    assert not same(method.batches(client(), 0), method.batches(client(), 1))
    assert same(method.batches(client(), 1), method.batches(client(), 1))
    other = replace(client(), id=7)
    assert not same(method.batches(client(), 0), method.batches(other, 0))
    assert same(fixed.batches(client(), 0), fixed.batches(client(), 5))
    assert same(fixed.batches(client(), 0)[:3], fixed.batches(client(), 0)[3:])


def test_lora_has_one_model_for_all() -> None:
    state = State(3, start())
    assert FedAvg().assembled(state) is state.shared
    assert work(FedAvg().personalise(client(), start()))[1].bias is None


# local


def test_local_hands_the_start_out_once_and_then_nothing_travels() -> None:
    (receive,), state = play(Local().setup(State(0, start()), POOL), lambda task: Update(task.client, 1))
    assert [(t.op, t.client, set(t.tensors)) for t in receive] == [("receive", k, set(start())) for k in POOL.clients]
    assert (state.round, dict(state.shared)) == (0, {})
    (train,), after = play(Local().round(state, POOL), lambda task: Update(task.client, 1))
    assert [(t.op, t.client, dict(t.tensors)) for t in train] == [("train", k, {}) for k in uniform(POOL, 0)]
    assert (after.round, dict(after.shared)) == (1, {})
    assert Local().assembled(after) is None


def test_local_devices_keep_train_on_and_send_nothing() -> None:
    method, c = Local(), client()
    _, update = work(method.receive(c, ask(method.receive, 1, start())))
    assert (set(c.private), update.tensors) == (set(start()), {})
    one = fitted(Fit(start(), c.train, [], method.inner.optimizer))
    items, update = work(method.train(c, Task("train", 1, {}, {"round": 0})), one)
    assert (update.tensors, update.metrics) == ({}, {"loss": 3.0})
    assert same(items[0].batches, method.inner.batches(c, 0))
    again = method.train(c, Task("train", 1, {}, {"round": 4}))
    assert fingerprint(next(again).start) == fingerprint(one.tensors), "the next participation goes on from here"
    assert work(method.personalise(c, {}))[1].tensors is c.private


# centralised


def test_centralised_asks_the_centre_only_and_takes_what_it_says() -> None:
    ((task,),), after = play(Centralised().round(State(2, start()), POOL), lambda t: Update(t.client, 33, {"x": torch.ones(1)}))
    assert (task.client, dict(task.settings)) == (CENTRE, {"round": 2, "share": 0.75})
    assert (after.round, list(after.shared)) == (3, ["x"])


def test_centralised_walks_through_seeded_epochs_without_gap_or_repetition_and_keeps_its_moments() -> None:
    method = Centralised(FedAvg(local_epochs=2, batch_size=4))
    c = Client(CENTRE, tiny.examples(22), tiny.examples(2), tiny.examples(2), 3)
    walked: list[np.ndarray] = []
    for t in range(4):
        operation = method.train(c, ask(method.train, CENTRE, start(), round=t, share=0.75))
        fit = next(operation)
        assert (fit.moments is None) == (t == 0)
        if fit.moments is not None:
            assert fit.moments.steps == t
            assert float(fit.moments.first["m.classifier.bias"][0]) == t
            assert float(fit.moments.second["m.classifier.bias"][0]) == 10 * t
        walked += fit.batches
        by = {n: torch.full_like(x, t + 1.0) for n, x in start().items()}
        made = Fitted(start(), np.ones(1), Moments(by, {n: 10 * x for n, x in by.items()}, t + 1))
        with pytest.raises(StopIteration):
            operation.send(made)
    assert len(walked) == 4 * round(0.75 * 22 * 2 / 4)
    for epoch in range(len(walked) // 6):
        assert sorted(np.concatenate(walked[6 * epoch : 6 * epoch + 6]).tolist()) == list(range(22))
    assert not same(walked[:6], walked[6:12])
    assert method.assembled(State(0, start())) is not None


# personal head


def test_a_personal_head_never_travels_after_the_set_up() -> None:
    method = PersonalHead()
    (receive,), state = play(method.setup(State(0, start()), POOL), lambda task: Update(task.client, 1))
    assert [(t.client, sorted(t.tensors)) for t in receive] == [(k, HEAD) for k in POOL.clients]
    assert set(state.shared) == set(FACTORS)
    (tasks,), after = play(method.round(state, POOL), echo)
    assert [t.client for t in tasks] == list(uniform(POOL, 0))
    assert all(set(t.tensors) == set(FACTORS) for t in tasks)
    assert set(after.shared) == set(FACTORS)
    assert float(after.shared[FACTORS[1]][0, 0]) == pytest.approx(weighted(uniform(POOL, 0)))
    assert method.assembled(after) is None


def test_a_device_trains_its_own_head_keeps_it_and_uploads_the_factors() -> None:
    method, c = PersonalHead(), client()
    work(method.receive(c, ask(method.receive, 1, {n: start()[n] for n in HEAD})))
    c.private["m.classifier.bias"] = torch.full((3,), 7.0)
    shared = {n: start()[n] for n in FACTORS}
    operation = method.train(c, ask(method.train, 1, shared, round=0))
    fit = next(operation)
    assert set(fit.start) == set(start())
    assert fit.start["m.classifier.bias"].tolist() == [7, 7, 7]
    with pytest.raises(StopIteration) as done:
        operation.send(fitted(fit))
    assert set(done.value.value.tensors) == set(FACTORS)
    assert {n: t.flatten()[0].item() for n, t in c.private.items()} == {"m.classifier.bias": 8.0, "m.classifier.weight": 2.0}
    predictor = work(method.personalise(c, shared))[1]
    assert set(predictor.tensors) == set(start())
    assert predictor.tensors["m.classifier.bias"].tolist() == [8, 8, 8]


# fine-tuned


def test_fine_tuning_happens_at_prediction_and_leaves_no_trace() -> None:
    method, c = FineTuned(epochs=3), client()
    asked = play(method.round(State(0, start()), POOL), echo)
    assert [[(t.op, t.client) for t in tasks] for tasks in asked[0]] == [[("train", k) for k in uniform(POOL, 0)]]
    assert play(method.setup(State(0, start()), POOL), echo)[0] == []
    operation = method.personalise(c, start())
    fit = next(operation)
    assert fingerprint(fit.start) == fingerprint(start())
    assert len(fit.batches) == 3 * 2
    assert not same(fit.batches[:2], fit.batches[2:4])
    with pytest.raises(StopIteration) as done:
        operation.send(fitted(fit))
    assert float(done.value.value.tensors["m.classifier.bias"][0]) == 1.0
    assert (c.private, c.memory) == ({}, {})
    assert method.assembled(State(0, start())) is not None


# prior


def test_the_prior_is_counted_everywhere_averaged_by_examples_and_sent_to_everyone() -> None:
    (count, receive), state = play(PriorCorrected().setup(State(0, start(), facts={"classes": 3}), POOL), counted)
    assert [(t.op, t.client, dict(t.settings), len(t.tensors)) for t in count] == [("count", k, {"classes": 3}, 0) for k in range(4)]
    mean = [0.2 + 0.4 * share / 33 for share in (5 + 7, 9, 12)]
    assert [(t.op, t.client) for t in receive] == [("receive", k) for k in range(4)]
    assert all(t.tensors["prior"].tolist() == pytest.approx(mean) for t in receive)
    assert set(state.shared) == set(start())


def test_the_bias_is_log_own_prior_minus_log_common_prior() -> None:
    method, c = PriorCorrected(smoothing=2.0), client()
    _, update = work(method.count(c, ask(method.count, 1, classes=4)))
    counts = np.bincount(c.train.labels, minlength=4) + 2.0
    assert update.tensors["prior"].tolist() == pytest.approx((counts / counts.sum()).tolist())
    assert counts[3] == 2.0, "a label that this device never saw stays possible"
    common = torch.tensor([0.4, 0.3, 0.2, 0.1])
    work(method.receive(c, ask(method.receive, 1, {"prior": common})))
    by_hand = [math.log(p) - math.log(q) for p, q in zip(counts / counts.sum(), common.tolist(), strict=True)]
    predictor = work(method.personalise(c, start()))[1]
    assert predictor.bias is not None
    assert predictor.bias.tolist() == pytest.approx(by_hand, abs=1e-6)
    assert set(predictor.tensors) == set(start())


def test_prior_correction_trains_as_its_inner_method() -> None:
    method = PriorCorrected(FedAvg(lr=0.25))
    tasks, _ = play(method.round(State(1, start()), POOL), echo)
    assert [t.client for t in tasks[0]] == list(uniform(POOL, 1))
    fit = next(method.train(client(), ask(method.train, 1, start(), round=1)))
    assert fit.optimizer.lr == 0.25
    assert method.assembled(State(0, start())) is not None


def test_centralised_refuses_what_is_of_devices() -> None:
    """Nothing there goes over a wire, and every epoch is shuffled anew."""
    with pytest.raises(ValueError, match="'centralised' has all data in one place, and nothing there goes over a wire; leave --wire out"):
        next(Centralised().setup(State(0, start()), replace(POOL, encoding=Encoding("nf4"))))
    with pytest.raises(ValueError, match="'centralised' shuffles all data anew in every epoch; leave --method.inner.no-reshuffle out"):
        next(Centralised(FedAvg(reshuffle=False)).setup(State(0, start()), POOL))


def test_a_cycle_of_fedbavg_is_as_many_rounds_as_there_are_blocks() -> None:
    """However many clients there are: FedCyBGD's of seven clients and two blocks is seven turns."""
    shared, pool = {f"m.layer.{i}.w": torch.zeros(1) for i in range(2)}, replace(POOL, clients=tuple(range(7)))
    state = State(0, shared, {"changed": torch.zeros(2, dtype=torch.int64)}, {"blocks": ["0", "1"]})
    for method, rounds in ((FedBAvg(), 2), (FedCyBGD(), 7)):
        _, after = play(method.setup(state, pool), lambda t: Update(t.client, 1))
        assert after.facts["turns_per_cycle"] == rounds
