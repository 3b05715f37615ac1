"""The server optimisers against the paper's lines in NumPy, over rounds that are played by hand: no model is needed for them."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch

from fedloom.messages import Task, Update, ask
from fedloom.methods.fedavg import FedAvg
from fedloom.methods.fedopt import FedOpt
from fedloom.methods.method import State
from fedloom.server.optimizers import Rule
from fedloom.server.participation import uniform
from tests.flows import POOL, SIZES, client, play, start
from tests.oracle import real

RULES: list[Rule] = ["momentum", "adagrad", "yogi", "adam"]
NUMBERS: dict[str, Any] = {"server_lr": 0.3, "beta1": 0.8, "beta2": 0.95, "tau": 0.05}
ROUNDS = 6


def noise(client: int, round: int, name: str) -> np.ndarray:
    """How far a made-up device's training moves a tensor: large in some entries, next to nothing in others, with both signs."""
    rng = np.random.default_rng([client, round, sum(map(ord, name))])
    return rng.standard_normal(tuple(start()[name].shape)) * 10.0 ** rng.integers(-3, 1, size=tuple(start()[name].shape))


def answered(task: Task) -> Update:
    t = int(task.settings["round"])  # type: ignore[call-overload]
    sent = {name: tensor + torch.from_numpy(noise(task.client, t, name)).float() for name, tensor in task.tensors.items()}
    return Update(task.client, SIZES[task.client], sent)


def derived(rule: str) -> list[dict[str, np.ndarray]]:
    """w_1 … w_T, scalar by scalar, in the paper's order: Δ_t, m_t, v_t, w_{t+1}."""
    w = {name: tensor.double().numpy() for name, tensor in start().items()}
    m = {name: np.zeros(tensor.shape) for name, tensor in w.items()}
    v = {name: np.full(tensor.shape, NUMBERS["tau"] ** 2) for name, tensor in w.items()}
    made = []
    for t in range(ROUNDS):
        cohort = uniform(POOL, t)
        n = sum(SIZES[k] for k in cohort)
        w, old = {name: tensor.copy() for name, tensor in w.items()}, w
        for name in w:
            for at in np.ndindex(w[name].shape):
                delta = sum(SIZES[k] / n * noise(k, t, name)[at] for k in cohort)
                if rule == "momentum":
                    m[name][at] = NUMBERS["beta1"] * m[name][at] + delta
                    w[name][at] = old[name][at] + NUMBERS["server_lr"] * m[name][at]
                    continue
                m[name][at] = NUMBERS["beta1"] * m[name][at] + (1 - NUMBERS["beta1"]) * delta
                before, memory = v[name][at], NUMBERS["beta2"]
                v[name][at] = {
                    "adagrad": before + delta**2,
                    "yogi": before - (1 - memory) * delta**2 * np.sign(before - delta**2),
                    "adam": memory * before + (1 - memory) * delta**2,
                }[rule]
                w[name][at] = old[name][at] + NUMBERS["server_lr"] * m[name][at] / (math.sqrt(v[name][at]) + NUMBERS["tau"])
        made.append(w)
    return made


def rounds(method: FedOpt) -> list[State]:
    state, states = State(0, start(), server=method.optimizer.start(start())), []
    for _ in range(ROUNDS):
        (tasks,), state = play(method.round(state, POOL), answered)
        assert [(task.op, set(task.tensors)) for task in tasks] == [("train", set(start()))] * POOL.cohort, "moments do not travel"
        states.append(state)
    return states


@pytest.mark.parametrize("rule", RULES)
def test_every_round_is_one_step_of_the_rule(rule: Rule) -> None:
    """Δ_t = Σ p_k (w^k − w_t); m_t; v_t, v_{−1} = τ²; w_{t+1} = w_t + η m_t/(√v_t + τ). FedAvgM: m_t = β m_{t−1} + Δ_t, w_t + η m_t."""
    made, due = rounds(FedOpt(rule=rule, **NUMBERS)), derived(rule)
    for t, (state, w) in enumerate(zip(made, due, strict=True)):
        assert state.round == t + 1 and set(state.shared) == set(w)
        for name, tensor in w.items():
            np.testing.assert_allclose(state.shared[name].double().numpy(), tensor, rtol=2e-6, atol=2e-6)
    names = {f"m/{name}" for name in start()} | ({f"v/{name}" for name in start()} if rule != "momentum" else set())
    assert set(made[-1].server) == names


def test_the_rules_are_four() -> None:
    ends = [derived(rule)[-1]["m.classifier.weight"] for rule in RULES]
    assert all(np.abs(one - other).max() > 1e-3 for i, one in enumerate(ends) for other in ends[:i])


def test_momentum_with_one_and_none_is_fedavg() -> None:
    method, state, plain = FedOpt(rule="momentum", server_lr=1.0, beta1=0.0), None, State(0, start())
    state = State(0, start(), server=method.optimizer.start(start()))
    for _ in range(3):
        _, state = play(method.round(state, POOL), answered)
        _, plain = play(FedAvg().round(plain, POOL), answered)
        assert all(torch.allclose(state.shared[name], plain.shared[name], atol=1e-6) for name in start())


def test_the_devices_half_is_fedavgs_and_the_moments_start_with_the_model() -> None:
    method = FedOpt(real.INNER, rule="adam", tau=0.5)
    state = method.init(real.model())
    assert set(state.shared) == set(real.start())
    assert all(bool((state.server[f"m/{name}"] == 0).all()) and bool((state.server[f"v/{name}"] == 0.25).all()) for name in state.shared)
    assert play(method.setup(state, POOL), answered) == ([], state)
    fit, wanted = (next(m.train(client(), ask(m.train, 1, start(), round=2))) for m in (method, real.INNER))
    assert (fit.optimizer, fit.dropout_seed) == (wanted.optimizer, wanted.dropout_seed)
    assert [batch.tolist() for batch in fit.batches] == [batch.tolist() for batch in wanted.batches]
    assert method.assembled(state) is state.shared


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        ({"rule": "adamw"}, "no server optimiser 'adamw'; there are momentum, adagrad, yogi, adam"),
        ({"tau": 0.0}, "tau 0"),
        ({"server_lr": float("nan")}, "lr nan"),
        ({"beta2": 1.0}, r"\(0.9, 1.0\)"),
    ],
)
def test_what_makes_no_sense_is_refused(wrong: dict[str, Any], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        FedOpt(**wrong)
