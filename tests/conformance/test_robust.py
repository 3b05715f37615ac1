"""Every method under every rule of aggregation: a hostile device cannot take its model away, or the method says that it cannot follow."""

from __future__ import annotations

from functools import cache
from typing import Any

import pytest
import torch

from fedloom.client.store import ClientStore
from fedloom.engines.engine import drive
from fedloom.engines.local import Local
from fedloom.engines.wrap import Hostile, noise, scaled
from fedloom.messages import Tensors
from fedloom.methods import all_methods
from fedloom.run.world import World, build
from fedloom.server.robust import RULES
from tests import small

pytestmark = pytest.mark.no_cover
"""The same lines again for every method, kind or size: which lines are reached at all, other tests tell (conftest.py)."""

REFUSING = {"fedcybgd", "handover", "flora", "fedex", "flexlora", "hetlora", "deltalora", "fedalt", "local", "centralised", "embracingfl"}
"""Whose server does not average tensor by tensor."""
STEADY = {"fedopt"}
"""Whose server takes steps of its own length, wherever the mean lies."""
LIES = {"backwards": scaled(-1e6), "noise": noise(1e6, 3)}
ROBUST = [rule for rule in RULES if rule != "mean"]


@pytest.fixture(autouse=True)
def models_are_loaded_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fedloom.run.world.load_model", small.LOADED)


@cache
def world(name: str, rule: str) -> World:
    return build(small.experiment(name, clients=5, cohort=5, aggregation=rule))


@cache
def trained(name: str, rule: str, lies: str | None) -> Tensors:
    """What is shared after the set-up and two rounds, client 2 lying in all of it."""
    here = world(name, rule)
    engine: Any = Local(here.host(ClientStore()))
    engine = Hostile(engine, [2], LIES[lies]) if lies else engine
    method = here.experiment.method
    state = drive(method.setup(method.init(here.model), here.pool), engine, quorum=0)
    for _ in range(2):
        state = drive(method.round(state, here.pool), engine)
    return state.shared


def furthest(tensors: Tensors) -> float:
    return max(float(t.double().abs().max()) for t in tensors.values() if t.is_floating_point() and t.numel())


@pytest.mark.parametrize("name", [name for name in all_methods() if name not in REFUSING])
def test_one_device_takes_the_mean_away_and_not_the_median(name: str) -> None:
    honest = furthest(trained(name, "mean", None))
    assert furthest(trained(name, "median", "backwards")) < 2 * honest + 1
    if name not in STEADY:
        assert furthest(trained(name, "mean", "backwards")) > 100 * (honest + 1), "the lie is one that a mean believes"


@pytest.mark.parametrize("lies", LIES)
@pytest.mark.parametrize("rule", ROBUST)
@pytest.mark.parametrize("name", ["lora", "fibecfed"])
def test_no_rule_lets_one_device_take_the_model_away(name: str, rule: str, lies: str) -> None:
    assert furthest(trained(name, rule, lies)) < 2 * furthest(trained(name, rule, None)) + 1


def test_a_device_that_lies_in_the_set_up_does_not_choose_the_layers() -> None:
    def chosen(rule: str, lying: bool) -> list[int]:
        here = world("fibecfed", rule)
        engine: Any = Local(here.host(ClientStore()))
        engine = Hostile(engine, [2], lambda task, update: {n: -1e9 * t for n, t in update.tensors.items()}) if lying else engine
        method = here.experiment.method
        return list(drive(method.setup(method.init(here.model), here.pool), engine, quorum=0).facts["gal"])

    assert chosen("median", True) == chosen("median", False)
    assert chosen("mean", True) != chosen("mean", False), "the lie is one that a mean believes"


@pytest.mark.parametrize("name", sorted(REFUSING))
def test_a_method_that_does_not_average_says_so_before_it_trains(name: str) -> None:
    with pytest.raises(ValueError, match=f"'{name}' cannot follow aggregation 'median': "):
        trained(name, "median", None)


def test_without_liars_a_rule_is_deterministic_and_another_than_the_mean() -> None:
    once, mean = trained("lora", "trimmed", None), trained("lora", "mean", None)
    again = trained.__wrapped__("lora", "trimmed", None)
    assert all(torch.equal(t, again[n]) for n, t in once.items())
    assert any(not torch.equal(t, mean[n]) for n, t in once.items())
