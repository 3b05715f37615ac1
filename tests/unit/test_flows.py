"""Every method's conversations played by hand: the server's tasks are inspected and answered with made-up updates, the device's work
items are inspected and answered with made-up results. No engine, no model."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

from fedloom.client.client import Client
from fedloom.compute.work import Fisher, Fit, Fitted, Moments, Predict, Score, Sensitivity
from fedloom.messages import CENTRE, CohortFailed, Flow, Task, Update, Work, ask
from fedloom.methods import all_methods, methods_in, named
from fedloom.methods.centralised import Centralised
from fedloom.methods.fedavg import FedAvg
from fedloom.methods.fibecfed import Curriculum, FibecFed, Gal, choose_gal, neuron_masks
from fedloom.methods.finetuned import FineTuned
from fedloom.methods.local import Local
from fedloom.methods.method import State
from fedloom.methods.personal_head import PersonalHead
from fedloom.methods.prior import PriorCorrected
from fedloom.seeds import derive_int
from fedloom.server.participation import Pool, uniform
from fedloom.tensors import fingerprint
from tests import tiny

POOL = Pool((0, 1, 2, 3), 3, 8, 5)
SIZES = {0: 5, 1: 9, 2: 12, 3: 7}
FACTORS = [f"m.layer.{i}.{part}.lora_{f}.weight" for i in range(4) for part in ("q", "v") for f in "AB"]
HEAD = ["m.classifier.bias", "m.classifier.weight"]


def start() -> dict[str, torch.Tensor]:
    """The common start: four layers with two pairs each (d_out 4, r 2, d_in 3), B = 0, and a head of three classes."""
    shapes = {"A": (2, 3), "B": (4, 2)}
    made = {n: torch.full(shapes[n.split("lora_")[1][0]], 0.0 if "lora_B" in n else 1.0) for n in FACTORS}
    return {**made, "m.classifier.bias": torch.zeros(3), "m.classifier.weight": torch.ones(3, 4)}


def of_layers(*layers: int) -> set[str]:
    return {n for n in FACTORS if int(n.split(".")[2]) in layers}


Answer = Callable[[Task], Update | None]


def play(flow: Flow[Any], answer: Answer) -> tuple[list[list[Task]], Any]:
    """Run a server flow: every asking, and what the flow returned. ``answer`` gives None for a client that fails."""
    askings: list[list[Task]] = []
    try:
        tasks = next(flow)
        while True:
            askings.append(tasks)
            tasks = flow.send([update for update in map(answer, tasks) if update is not None])
    except StopIteration as done:
        return askings, done.value


def work(flow: Work[Any], *results: Any) -> tuple[list[Any], Any]:
    """Run a client operation: every item it yielded, and what it returned."""
    items = []
    try:
        items.append(next(flow))
        for result in results:
            items.append(flow.send(result))
    except StopIteration as done:
        return items, done.value
    raise AssertionError(f"the operation asks for more work: {items[-1]}")


def echo(task: Task, plus: float = 1.0) -> Update:
    """An update that adds k + ``plus`` to whatever came."""
    return Update(task.client, SIZES[task.client], {n: t + task.client + plus for n, t in task.tensors.items()}, {"loss": 1.0})


def fitted(item: Fit, plus: float = 1.0) -> Fitted:
    zero = {n: torch.zeros_like(t) for n, t in item.start.items()}
    return Fitted({n: t + plus for n, t in item.start.items()}, np.array([4.0, 2.0]), Moments(zero, zero, 2))


def client(k: int = 1) -> Client:
    return tiny.clients()[k]


def same(first: Sequence[np.ndarray], second: Sequence[np.ndarray]) -> bool:
    return [b.tolist() for b in first] == [b.tolist() for b in second]


def weighted(cohort: Sequence[int], plus: float = 1.0) -> float:
    return sum(SIZES[k] * (k + plus) for k in cohort) / sum(SIZES[k] for k in cohort)


# what all methods have


def test_there_are_these_methods_and_each_says_its_paper() -> None:
    wanted = ["centralised", "fibecfed", "local", "lora", "lora-finetuned", "lora-personal-head", "lora-prior"]
    assert list(all_methods()) == wanted
    assert all(kind.paper for kind in all_methods().values())
    assert named("fibecfed") is FibecFed


def test_a_module_has_the_methods_that_it_defines_itself() -> None:
    from fedloom.methods import finetuned

    assert methods_in(finetuned) == {"lora-finetuned": FineTuned}


@pytest.mark.parametrize("name", all_methods())
def test_predicting_asks_for_each_split_in_order(name: str) -> None:
    method, c = named(name)(), client()
    c.private, c.memory = start(), {"bias": torch.tensor([1.0, 2.0, 3.0])}
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
    bias = torch.tensor([1.0, 2.0, 3.0]) if name == "lora-prior" else torch.zeros(3)
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


def counted(task: Task) -> Update:
    """Client k's answer: label prior with most weight on class k mod 3."""
    prior = torch.full((3,), 0.2)
    prior[task.client % 3] = 0.6
    return Update(task.client, SIZES[task.client], {"prior": prior} if task.op == "count" else {})


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


# fibecfed: the server

SCORES = {0: [0.4, 0.1, 0.3, 0.2], 1: [0.8, 0.1, 0.3, 0.2], 2: [0.4, 0.5, 0.3, 0.2], 3: [0.4, 0.1, 0.3, 1.0]}


def told(task: Task) -> Update:
    if task.op == "inspect":
        return Update(task.client, SIZES[task.client], {"layer_scores": torch.tensor(SCORES[task.client], dtype=torch.float64)})
    return echo(task) if task.op in ("warm_head", "train") else Update(task.client, SIZES[task.client])


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


@pytest.mark.parametrize("gal", [Gal(count=5), Gal(fraction=0.0), Gal(fraction=1.5), Gal(count=-1)])
def test_impossible_gal(gal: Gal) -> None:
    with pytest.raises(ValueError, match="must hold 1 to 4 layers"):
        choose_gal(np.ones(4), [0, 1, 2, 3], gal, 0)


def test_an_unknown_choice_of_gal() -> None:
    with pytest.raises(ValueError, match="no GAL choice 'best'; there are least, most, random"):
        choose_gal(np.ones(4), [0, 1, 2, 3], Gal(which="best"), 0)  # type: ignore[arg-type]


# fibecfed: the device


def device(method: FibecFed, k: int = 1, gal: tuple[int, ...] = (1, 2, 3)) -> Client:
    """A device after the set-up: difficulties are 0, 1, 2, …, everything of B is worth the same."""
    c = client(k)
    batch = method.inner.cut(c, "batches")[0]
    items, update = work(
        method.inspect(c, ask(method.inspect, k, start())),
        [np.arange(len(c.train), dtype=np.float64), np.array([0.1, 0.2, 0.3, 0.4])],
    )
    score, sense = items[0]
    assert isinstance(score, Score)
    assert isinstance(sense, Sensitivity)
    assert score.examples is c.train
    assert sense.batch.tolist() == batch.tolist()
    assert (sense.rho, sense.norm) == (method.gal.rho, method.gal.norm)
    assert update.tensors["layer_scores"].tolist() == [0.1, 0.2, 0.3, 0.4]
    assert set(update.tensors) == {"layer_scores"}, "difficulties never leave the device"
    operation = method.adopt(c, ask(method.adopt, k, gal=list(gal)))
    drive(operation)
    return c


def drive(operation: Work[Update]) -> Update:
    """Answer every item of an operation: weights move by one, Fisher grows with the row number."""
    result: Any = None
    try:
        while True:
            item = operation.send(result)
            result = (
                fitted(item) if isinstance(item, Fit) else {n: torch.ones_like(t).cumsum(0) for n, t in item.at.items() if n in item.over}
            )
    except StopIteration as done:
        return done.value


def test_the_score_is_over_all_or_without_the_head() -> None:
    for head, over in (("warm", None), ("as-is", None), ("left-out", frozenset(FACTORS))):
        method = FibecFed(curriculum=Curriculum(head=head))  # type: ignore[arg-type]
        assert next(method.inspect(client(), ask(method.inspect, 1, start())))[0].over == over


def test_adopting_keeps_the_local_layers_from_the_common_start_and_fixes_the_mask() -> None:
    method = FibecFed(FedAvg(batch_size=4), keep=0.5, warmup_epochs=2, momentum=0.25)
    c = device(method, gal=(1, 3))
    assert set(c.private) == of_layers(0, 2)
    assert all(torch.equal(c.private[n], start()[n]) for n in c.private), "the warm-up weights are thrown away"
    masks = {n.removeprefix("mask/"): t for n, t in c.memory.items() if n.startswith("mask/")}
    assert set(masks) == {n for n in of_layers(0, 2) if "lora_B" in n}
    assert all(t.flatten().tolist() == [0, 0, 1, 1] for t in masks.values())


def test_the_warm_up_trains_all_factors_on_all_batches_easy_first_under_the_fixed_head() -> None:
    method = FibecFed(FedAvg(batch_size=4), warmup_epochs=2)
    c = client()
    work(method.inspect(c, ask(method.inspect, 1, start())), [-np.arange(9.0), np.zeros(4)])
    operation = method.adopt(c, ask(method.adopt, 1, gal=[1, 2, 3]))
    first = next(operation)
    assert set(first.start) == set(FACTORS)
    assert set(first.fixed) == set(HEAD)
    assert sorted(np.concatenate(first.batches).tolist()) == list(range(9))
    means = [float(-batch.mean()) for batch in first.batches]
    assert means == sorted(means)
    assert first.moments is None
    fisher = operation.send(fitted(first, 1.0))
    assert isinstance(fisher, Fisher)
    assert (fisher.over, fisher.examples) == (frozenset(FACTORS), c.train)
    assert float(fisher.at["m.layer.0.q.lora_B.weight"][0, 0]) == 1.0
    assert set(fisher.at) == set(start())
    second = operation.send({n: torch.ones_like(start()[n]) for n in FACTORS})
    assert float(second.start["m.layer.0.q.lora_B.weight"][0, 0]) == 1.0, "the second epoch goes on from the first"
    assert second.moments is not None
    assert second.dropout_seed != first.dropout_seed


def test_momentum_weighs_the_epochs() -> None:
    """Row 3 is best in the first epoch, row 0 in the second: γ decides which of them survives."""
    first, second = torch.tensor([0.0, 1.0, 2.0, 9.0]), torch.tensor([5.0, 1.0, 2.0, 0.0])
    for momentum, best in ((0.9, 3), (0.1, 0)):
        method = FibecFed(FedAvg(batch_size=4), keep=0.25, warmup_epochs=2, momentum=momentum)
        c = client()
        work(method.inspect(c, ask(method.inspect, 1, start())), [np.arange(9.0), np.zeros(4)])
        operation = method.adopt(c, ask(method.adopt, 1, gal=[1, 2, 3]))
        item: Any = next(operation)
        for rows in (first, second):
            fisher = operation.send(fitted(item))
            made = {n: torch.zeros_like(fisher.at[n]) for n in FACTORS}
            made["m.layer.0.q.lora_B.weight"] = rows[:, None].expand(4, 2)
            made["m.layer.0.v.lora_B.weight"] = rows[:, None].expand(4, 2)
            try:
                item = operation.send(made)
            except StopIteration:
                break
        assert c.memory["mask/m.layer.0.q.lora_B.weight"].flatten().tolist() == [float(i == best) for i in range(4)]


def test_asked_to_adopt_twice_a_device_does_it_once() -> None:
    """Its answer was lost on the way: the second asking must not warm up from what is left."""
    method = FibecFed(keep=0.5)
    c = device(method, gal=(1, 3))
    before = fingerprint(c.private), fingerprint(c.memory)
    items, update = work(method.adopt(c, ask(method.adopt, 1, gal=[1, 3])))
    assert (items, update.client) == ([], 1)
    assert (fingerprint(c.private), fingerprint(c.memory)) == before


def test_without_local_layers_or_with_all_neurons_there_is_no_warm_up() -> None:
    for method, gal in ((FibecFed(), (0, 1, 2, 3)), (FibecFed(keep=1.0), (0,))):
        c = client()
        work(method.inspect(c, ask(method.inspect, 1, start())), [np.zeros(9), np.zeros(4)])
        items, _ = work(method.adopt(c, ask(method.adopt, 1, gal=list(gal))))
        assert items == []
        assert set(c.private) == set(FACTORS) - of_layers(*gal)
        assert not [n for n in c.memory if n.startswith("mask/")]


def trained(method: FibecFed, c: Client, t: int, gal: tuple[int, ...] = (1, 2, 3), rounds: int = 10) -> tuple[Fit, Update]:
    shared = {n: x + 10 for n, x in start().items() if n in of_layers(*gal) | set(HEAD)}
    operation = method.train(c, ask(method.train, c.id, shared, round=t, rounds=rounds))
    fit = next(operation)
    assert isinstance(fit, Fit)
    with pytest.raises(StopIteration) as done:
        operation.send(fitted(fit))
    return fit, done.value.value


def test_a_device_trains_gal_and_head_dense_and_its_own_layers_masked_and_uploads_what_came() -> None:
    method = FibecFed(FedAvg(batch_size=2, local_epochs=3), keep=0.5)
    c = device(method, gal=(1, 3))
    fit, update = trained(method, c, 0, (1, 3))
    assert set(fit.start) == set(start())
    assert all(float(fit.start[n].flatten()[0]) >= 10 for n in of_layers(1, 3) | set(HEAD))
    assert all(float(fit.start[n].flatten()[0]) <= 1 for n in of_layers(0, 2))
    assert set(fit.mask) == {n for n in of_layers(0, 2) if "lora_B" in n}
    assert set(update.tensors) == of_layers(1, 3) | set(HEAD)
    assert set(c.private) == of_layers(0, 2)
    assert all(torch.equal(c.private[n], start()[n] + 1) for n in c.private)
    again, _ = trained(method, c, 5, (1, 3))
    assert all(torch.equal(again.start[n], start()[n] + 1) for n in of_layers(0, 2)), "local layers persist"
    predictor = work(method.personalise(c, update.tensors))[1]
    assert set(predictor.tensors) == set(start())
    assert all(torch.equal(predictor.tensors[n], start()[n] + 2) for n in of_layers(0, 2))


def test_the_curriculum_opens_the_easiest_batches_and_more_of_them_each_round() -> None:
    method = FibecFed(FedAvg(batch_size=2, local_epochs=2), Curriculum(start=0.4, full_at=0.5))
    c = device(method, k=2)  # 12 examples: 6 batches
    c.memory["difficulty"] = torch.from_numpy(np.array([5, 3, 9, 1, 7, 2, 8, 0, 6, 4, 11, 10], np.float64))
    cut = method.inner.cut(c, "batches")
    order = sorted(range(6), key=lambda i: c.memory["difficulty"].numpy()[cut[i]].mean())
    for t, opened in enumerate([3, 4, 4, 5, 6, 6, 6, 6, 6, 6]):  # ceil of 2.4, 3.12, 3.84, 4.56, 5.28, 6, …
        fit, _ = trained(method, c, t)
        assert same(fit.batches, [cut[i] for i in order[:opened]] * 2)


def test_example_granularity_sorts_before_it_cuts() -> None:
    method = FibecFed(FedAvg(batch_size=4, local_epochs=1), Curriculum(granularity="example", pacing="none"))
    c = device(method)
    c.memory["difficulty"] = torch.tensor([8.0, 1, 7, 2, 6, 3, 5, 4, 0], dtype=torch.float64)
    fit, _ = trained(method, c, 0)
    assert [b.tolist() for b in fit.batches] == [[8, 1, 3, 5], [7, 6, 4, 2], [0]]


def test_scores_are_refreshed_when_they_are_old_enough() -> None:
    method = FibecFed(FedAvg(batch_size=4), Curriculum(refresh=3))
    c = device(method)
    shared = {n: start()[n] for n in of_layers(1, 2, 3) | set(HEAD)}
    for t, refreshed in ((2, False), (4, True), (6, False), (7, True)):
        operation = method.train(c, ask(method.train, 1, shared, round=t, rounds=10))
        item = next(operation)
        assert isinstance(item, Score) == refreshed
        if refreshed:
            assert set(item.at) == set(start())
            item = operation.send(np.full(9, float(t)))
            assert (float(c.memory["difficulty"][0]), int(c.memory["scored_at"])) == (t, t)
        with pytest.raises(StopIteration):
            operation.send(fitted(item))


def test_the_head_warms_up_alone_on_one_epoch() -> None:
    method, c = FibecFed(FedAvg(batch_size=4)), client()
    operation = method.warm_head(c, ask(method.warm_head, 1, {n: start()[n] for n in HEAD}, round=-1))
    fit = next(operation)
    assert sorted(fit.start) == HEAD
    assert sorted(np.concatenate(fit.batches).tolist()) == list(range(9))
    with pytest.raises(StopIteration) as done:
        operation.send(fitted(fit))
    assert sorted(done.value.value.tensors) == HEAD
    assert (c.private, c.memory) == ({}, {})


def test_masks_rank_the_neurons_of_a_layers_pairs_together_with_as_share() -> None:
    q, v = "m.layer.2.q.lora_B.weight", "m.layer.2.v.lora_B.weight"
    fisher = {
        q: torch.tensor([[1.0, 0.0], [0.0, 2.0], [0.5, 0.0], [0.0, 0.0]]),
        v: torch.tensor([[0.0, 0.9], [0.1, 0.0], [0.2, 0.0], [0.0, 0.0]]),
        "m.layer.2.q.lora_A.weight": torch.zeros(2, 3),
        "m.layer.2.v.lora_A.weight": torch.full((2, 3), 0.4),  # 2.4 in all, 0.6 a neuron of v
    }
    masks = neuron_masks(fisher, 0.5)  # 4 of 8: q1 2.0, v0 1.5, q0 1.0, then v2 0.8 before v1 0.7 and v3 0.6
    assert masks[q].tolist() == [[1], [1], [0], [0]]
    assert masks[v].tolist() == [[1], [0], [1], [0]]
    assert neuron_masks(fisher, 1.0)[q].tolist() == [[1]] * 4
    assert sum(float(m.sum()) for m in neuron_masks(fisher, 0.01).values()) == 1


@pytest.mark.parametrize("keep", [0.0, -0.5, 1.01])
def test_impossible_keep(keep: float) -> None:
    with pytest.raises(ValueError, match=r"keep must be in \(0, 1\]"):
        neuron_masks({}, keep)
