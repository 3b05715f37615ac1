"""The published rivals' conversations, played by hand: who is asked for what, what a device keeps, and where it starts the next time."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

from fedloom.client.client import Client
from fedloom.compute.work import Fit
from fedloom.messages import CohortFailed, Task, Update, ask
from fedloom.methods.ditto import Ditto
from fedloom.methods.fedalt_partial import FedAltPartial, local_part
from fedloom.methods.fedavg import FedAvg
from fedloom.methods.fedsa import FedSaLora
from fedloom.methods.ffa import FfaLora
from fedloom.methods.method import State
from fedloom.methods.rolora import RoLora, frozen_in
from fedloom.seeds import derive_int
from fedloom.server.participation import uniform
from fedloom.tensors import fingerprint
from tests.flows import FACTORS, HEAD, POOL, SIZES, client, echo, fitted, of_layers, play, same, start, weighted, work

INNER = FedAvg(lr=0.5, local_epochs=3, batch_size=4, weight_decay=0.1, clip=2.0)
A = {name for name in FACTORS if "lora_A" in name}
B = {name for name in FACTORS if "lora_B" in name}
ALL = {*FACTORS, *HEAD}

HANDED_OUT: dict[str, tuple[Any, set[str]]] = {
    "ffa": (FfaLora(INNER), A),
    "fedsa": (FedSaLora(INNER), B | {*HEAD}),
    "ditto": (Ditto(INNER), ALL),
    "fedalt-partial": (FedAltPartial(INNER), {*HEAD}),
    "fedalt-partial, two layers": (FedAltPartial(INNER, top_layers=2), of_layers(2, 3)),
    "fedalt-partial, all layers": (FedAltPartial(INNER, top_layers=4), {*FACTORS}),
}
"""What the set-up gives every device, once. Ditto's devices get a copy of what is shared; the others' is not shared any more."""


def nodded(task: Task) -> Update:
    return Update(task.client, SIZES[task.client])


def moved(by: float) -> dict[str, torch.Tensor]:
    """The start plus a number, so that it can be told from the start and from other moves of it."""
    return {name: tensor + by for name, tensor in start().items()}


def pick(tensors: dict[str, torch.Tensor], names: set[str]) -> dict[str, torch.Tensor]:
    return {name: tensor for name, tensor in tensors.items() if name in names}


def one(tensors: Any) -> dict[str, float]:
    """The single number that each tensor holds."""
    assert all(bool((tensor == tensor.flatten()[0]).all()) for tensor in tensors.values())
    return {name: float(tensor.flatten()[0]) for name, tensor in tensors.items()}


@pytest.mark.parametrize("which", HANDED_OUT)
def test_the_set_up_hands_out_what_stays_on_the_device_and_the_rest_is_shared(which: str) -> None:
    method, own = HANDED_OUT[which]
    (receive,), state = play(method.setup(State(0, start()), POOL), nodded)
    assert [(t.op, t.client, set(t.tensors)) for t in receive] == [("receive", k, own) for k in POOL.clients]
    assert all(fingerprint(t.tensors) == fingerprint(pick(start(), own)) for t in receive)
    shared = ALL if which == "ditto" else ALL - own
    assert (state.round, set(state.shared)) == (0, shared)
    assert set(state.server) == (A if which == "ffa" else set())
    for t in range(2):
        (tasks,), state = play(method.round(state, POOL), echo)
        assert [(task.op, task.client) for task in tasks] == [("train", k) for k in uniform(POOL, t)]
        assert all(set(task.tensors) == shared and dict(task.settings) == {"round": t} for task in tasks)
        assert (state.round, set(state.shared)) == (t + 1, shared)
    mean = sum(weighted(uniform(POOL, t)) for t in range(2))
    assert one(state.shared) == pytest.approx({name: float(start()[name].flatten()[0]) + mean for name in shared})


@pytest.mark.parametrize("which", HANDED_OUT)
def test_a_device_that_misses_the_set_up_is_asked_again_and_named_if_it_never_answers(which: str) -> None:
    method, _ = HANDED_OUT[which]
    asked: list[int] = []

    def lazy(task: Task) -> Update | None:
        asked.append(task.client)
        return nodded(task) if task.client != 2 or asked.count(2) == 3 else None

    askings, _ = play(method.setup(State(0, start()), POOL), lazy)
    assert [[task.client for task in tasks] for tasks in askings] == [[0, 1, 2, 3], [2], [2]]
    with pytest.raises(CohortFailed, match="client 2: no answer to 'receive' in 3 attempts"):
        play(method.setup(State(0, start()), POOL), lambda task: None if task.client == 2 else nodded(task))


def set_up(method: Any, own: dict[str, torch.Tensor]) -> Client:
    """Device 1 after it received ``own``."""
    c = client()
    c.private = {"stale": torch.ones(1)}
    _, update = work(method.receive(c, ask(method.receive, 1, own)))
    assert (update.client, update.num_examples, update.tensors) == (1, 9, {})
    assert one(c.private) == one(own)
    return c


def assert_inner(fit: Fit, c: Client, t: int, epochs: int = 3) -> None:
    """Trained as the inner method says."""
    assert fit.examples is c.train and fit.optimizer == INNER.optimizer
    assert (fit.mask, fit.moments) == ({}, None)
    assert same(fit.batches, INNER.batches(c, t)[: 3 * epochs])


# ffa


def test_ffa_trains_b_and_the_head_under_the_a_that_the_device_was_given() -> None:
    method = FfaLora(INNER)
    c = set_up(method, pick(moved(7), A))
    task = ask(method.train, 1, pick(moved(3), ALL - A), round=2)
    items, update = work(method.train(c, task), fitted(Fit(pick(moved(3), ALL - A), c.train, [], INNER.optimizer)))
    (fit,) = items
    assert_inner(fit, c, 2)
    assert one(fit.start) == one(pick(moved(3), ALL - A)) and one(fit.fixed) == one(pick(moved(7), A))
    assert (fit.penalty, fit.anchor, fit.dropout_seed) == (None, None, derive_int(3, "fit", 2, 1))
    assert one(update.tensors) == one(pick(moved(4), ALL - A))
    assert (update.num_examples, update.metrics) == (9, {"loss": 3.0})
    assert one(c.private) == one(pick(moved(7), A)) and not c.memory
    predictor = work(method.personalise(c, pick(moved(3), ALL - A)))[1]
    assert one(predictor.tensors) == {**one(pick(moved(3), ALL - A)), **one(pick(moved(7), A))}


def test_ffas_global_model_is_what_is_shared_over_the_a_of_the_start() -> None:
    method = FfaLora(INNER)
    _, state = play(method.setup(State(0, moved(7)), POOL), nodded)
    assembled = method.assembled(state.after_round(pick(moved(3), ALL - A)))
    assert assembled is not None
    assert one(assembled) == {**one(pick(moved(3), ALL - A)), **one(pick(moved(7), A))}


# fedsa


def test_fedsa_trains_everything_sends_a_and_goes_on_from_its_own_b_and_head() -> None:
    method = FedSaLora(INNER)
    c = set_up(method, pick(moved(7), ALL - A))
    operation = method.train(c, ask(method.train, 1, pick(moved(3), A), round=1))
    fit = next(operation)
    assert_inner(fit, c, 1)
    assert one(fit.start) == {**one(pick(moved(3), A)), **one(pick(moved(7), ALL - A))} and not fit.fixed
    with pytest.raises(StopIteration) as done:
        operation.send(fitted(fit))
    update = done.value.value
    assert one(update.tensors) == one(pick(moved(4), A))
    assert (update.num_examples, update.metrics) == (9, {"loss": 3.0})
    again = next(method.train(c, ask(method.train, 1, pick(moved(20), A), round=4)))
    assert one(again.start) == {**one(pick(moved(20), A)), **one(pick(moved(8), ALL - A))}
    predictor = work(method.personalise(c, pick(moved(20), A)))[1]
    assert one(predictor.tensors) == one(again.start)
    assert method.assembled(State(1, pick(start(), A))) is None


# ditto


def test_dittos_device_trains_the_global_model_and_its_own_from_where_each_was() -> None:
    method = Ditto(INNER, pull=0.3)
    c = set_up(method, moved(0))
    c.private = moved(7)
    operation = method.train(c, ask(method.train, 1, moved(3), round=2))
    common, personal = next(operation)
    for fit in (common, personal):
        assert_inner(fit, c, 2)
        assert not fit.fixed
    assert one(common.start) == one(moved(3)) and one(personal.start) == one(moved(7))
    assert (common.penalty, common.anchor, common.dropout_seed) == (None, None, derive_int(3, "fit", 2, 1))
    assert personal.dropout_seed != common.dropout_seed
    assert personal.anchor is not None and one(personal.anchor) == one(moved(3)), "held to what came, not to where it starts"
    assert personal.penalty is not None
    count = sum(tensor.numel() for tensor in start().values())
    assert float(personal.penalty(moved(5), moved(3))) == pytest.approx(0.3 / 2 * 2**2 * count, rel=1e-5)
    assert float(personal.penalty(moved(3), moved(3))) == 0
    with pytest.raises(StopIteration) as done:
        operation.send([fitted(common, 1), fitted(personal, 10)])
    assert one(done.value.value.tensors) == one(moved(4))
    assert one(c.private) == one(moved(17))
    assert (done.value.value.num_examples, done.value.value.metrics) == (9, {"loss": 3.0})


def test_dittos_device_predicts_with_its_own_model_whatever_is_shared() -> None:
    method = Ditto(INNER)
    c = set_up(method, moved(7))
    assert one(work(method.personalise(c, moved(100)))[1].tensors) == one(moved(7))
    state = State(3, moved(5))
    assert method.assembled(state) is state.shared


def test_ditto_cannot_push_away() -> None:
    with pytest.raises(ValueError, match=r"pull must be 0 or more.*got -0\.5"):
        Ditto(pull=-0.5)
    with pytest.raises(ValueError, match="got nan"):
        Ditto(pull=float("nan"))


# rolora


def test_rolora_has_no_set_up_and_one_model_for_all() -> None:
    state = State(0, start())
    assert play(RoLora(INNER).setup(state, POOL), echo) == ([], state)
    assert RoLora(INNER).assembled(state) is state.shared
    assert one(work(RoLora(INNER).personalise(client(), moved(3)))[1].tensors) == one(moved(3))


@pytest.mark.parametrize(("t", "trains"), [(0, B), (1, A), (2, B), (7, A)])
def test_rolora_trains_b_in_even_rounds_and_a_in_odd_ones_with_the_head_in_all(t: int, trains: set[str]) -> None:
    method, moving = RoLora(INNER), trains | {*HEAD}
    assert frozen_in(t, ALL) == ALL - moving

    def answer(task: Task) -> Update:
        assert set(task.tensors) == ALL, "who was not in the last cohort lacks the frozen factor"
        sent = {name: tensor + task.client + 1 for name, tensor in task.tensors.items() if name in moving}
        return Update(task.client, SIZES[task.client], sent)

    (tasks,), after = play(method.round(State(t, moved(3)), POOL), answer)
    assert [(task.op, task.client, dict(task.settings)) for task in tasks] == [("train", k, {"round": t}) for k in uniform(POOL, t)]
    mean = weighted(uniform(POOL, t))
    assert one(after.shared) == pytest.approx({name: number + (mean if name in moving else 0) for name, number in one(moved(3)).items()})
    assert after.round == t + 1

    c = client()
    operation = method.train(c, ask(method.train, 1, moved(3), round=t))
    fit = next(operation)
    assert_inner(fit, c, t)
    assert one(fit.start) == one(pick(moved(3), moving)) and one(fit.fixed) == one(pick(moved(3), ALL - moving))
    with pytest.raises(StopIteration) as done:
        operation.send(fitted(fit))
    assert one(done.value.value.tensors) == one(pick(moved(4), moving))
    assert (done.value.value.num_examples, done.value.value.metrics) == (9, {"loss": 3.0})
    assert (c.private, c.memory) == ({}, {})


# fedalt-partial


@pytest.mark.parametrize(("top", "local"), [(0, {*HEAD}), (1, of_layers(3)), (3, of_layers(1, 2, 3)), (4, {*FACTORS})])
def test_fedalts_device_trains_its_own_part_first_and_then_the_shared_one_under_it(top: int, local: set[str]) -> None:
    method, shared = FedAltPartial(INNER, epochs=2, top_layers=top), ALL - local
    assert set(local_part(start(), top)) == local
    c = set_up(method, pick(moved(7), local))
    operation = method.train(c, ask(method.train, 1, pick(moved(3), shared), round=1))
    first = next(operation)
    assert_inner(first, c, 1, epochs=2)
    assert one(first.start) == one(pick(moved(7), local)) and one(first.fixed) == one(pick(moved(3), shared))
    second = operation.send(fitted(first, 10))
    assert_inner(second, c, 1)
    assert one(second.start) == one(pick(moved(3), shared))
    assert one(second.fixed) == one(pick(moved(17), local)), "the new local part"
    assert second.dropout_seed == derive_int(3, "fit", 1, 1) != first.dropout_seed
    answer = fitted(second)
    with pytest.raises(StopIteration) as done:
        operation.send(type(answer)(answer.tensors, np.array([8.0, 6.0]), answer.moments))
    assert one(done.value.value.tensors) == one(pick(moved(4), shared))
    assert (done.value.value.num_examples, done.value.value.metrics) == (9, {"loss": 5.0}), "the mean of 3 and 7"
    assert one(c.private) == one(pick(moved(17), local))
    predictor = work(method.personalise(c, pick(moved(3), shared)))[1]
    assert one(predictor.tensors) == {**one(pick(moved(17), local)), **one(pick(moved(3), shared))}
    state = State(1, pick(moved(3), shared))
    assert method.assembled(state) is (state.shared if top else None)


@pytest.mark.parametrize("top", [-1, 5])
def test_fedalt_says_how_many_layers_there_are(top: int) -> None:
    with pytest.raises(ValueError, match=rf"top_layers must be 0 .* to 4, the layers with LoRA \[0, 1, 2, 3\]; got {top}"):
        play(FedAltPartial(top_layers=top).setup(State(0, start()), POOL), nodded)


def test_methods_share_the_operation_that_keeps_what_is_handed_out() -> None:
    """Each by its own method's name on the wire, and none besides: ``receive``, ``train``, ``predict``."""
    from fedloom.client.host import operations

    found: dict[str, Callable[..., Any]] = {}
    for method, _ in HANDED_OUT.values():
        found = operations(method)
        assert sorted(found) == ["predict", "receive", "train"]
    assert sorted(operations(RoLora())) == ["predict", "train"]
