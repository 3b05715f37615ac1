"""SCAFFOLD's controls over every method: what is corrected, and by what, is the same on both computes, in a run that was stopped, and for a
method that has them of its own; or the method says that it cannot be corrected."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from fedloom.client.curricula.voc import ByRarity
from fedloom.methods import all_methods
from fedloom.methods.fedavg import FedAvg
from fedloom.methods.fibecfed import Curriculum, FibecFed, Gal
from fedloom.methods.slora import SLora
from fedloom.model.names import is_down, is_factor, is_head, is_up
from fedloom.run import checkpoint
from fedloom.run.checkpoint import fingerprint_of
from fedloom.run.deployment.federation import insist_may_start
from fedloom.run.describe import describe
from fedloom.run.errors import ExperimentError
from fedloom.run.experiment import Experiment
from fedloom.run.loop import run
from fedloom.run.recipes import with_curriculum
from fedloom.run.world import store_in
from fedloom.server.optimizers import ServerStep
from fedloom.server.participation import Pool, uniform
from tests import small, tiny
from tests.conformance.played import Played

POOL = Pool((0, 1, 2, 3), 3, 4, 3, controls=True)
METHODS: dict[str, Any] = {name: kind() for name, kind in all_methods().items()}
METHODS |= {
    "fibecfed": FibecFed(curriculum=Curriculum(head_rounds=1), gal=Gal(count=1), keep=0.5),
    "slora": SLora(first=0.25),
    "lora+voc": with_curriculum(FedAvg(), ByRarity()),
    "lora+prox": FedAvg(prox=0.1),
}
REFUSING = {"fedcybgd", "handover", "fedbavg", "flora", "flexlora", "hetlora", "deltalora", "adalora", "fedalt", "embracingfl", "flasc"}
REFUSING |= {"local", "centralised", "lisa", "scaffold"}
PLAIN = {"fedfft", "fedbf", "fedap", "lora-finetuned", "lora-prior"}
"""Whose training is ``lora``'s, line by line."""
FOLLOWING = [name for name in METHODS if name not in REFUSING | PLAIN]
PARTLY = {"rolora": lambda n, t: is_head(n) or (is_up if t % 2 == 0 else is_down)(n), "slora": lambda n, t: t > 0 or is_head(n)}
"""By method, whether a tensor that a device is sent has been corrected in a round, where that is not all of them."""


def own(here: Played) -> dict[int, dict[str, torch.Tensor]]:
    """Every device's c_k by the tensors' names."""
    return here.kept("control/")


@pytest.mark.parametrize("name", FOLLOWING)
def test_what_is_shared_and_trained_is_corrected_and_c_is_the_devices_mean(name: str) -> None:
    """In every round g − c_k + c for the tensors that a device trains as it was sent them, and no others; c = (1/K)·Σ_k c_k after it."""
    here, ever = Played(METHODS[name], POOL), set[str]()
    for t in range(3 if name in PARTLY else 2):
        sent, common, before = dict(here.state.shared), here.state.controls, own(here)
        here.round()
        names = {n for n in sent if PARTLY.get(name, lambda n, t: True)(n, t) and not n.startswith("moved/") and "base_layer" not in n}
        fits = [fit for fit in here.fits if fit.means]
        assert len(fits) == POOL.cohort
        after = own(here)
        for fit in fits:
            (k,) = [k for k, c in tiny.clients().items() if len(c.train) == len(fit.examples)]
            assert {n for n, start in fit.start.items() if n in sent and torch.equal(start, sent[n])} >= names
            assert set(fit.correction) == {n for n in names if n in common or n in before[k]}, "the others' difference is zero"
            for n, added in fit.correction.items():
                torch.testing.assert_close(added, common[n] - before[k].get(n, torch.zeros_like(added)), atol=1e-6, rtol=1e-5)
            assert set(after[k]) == set(before[k]) | names and all(bool((after[k][n] != 0).any()) for n in names if not is_factor(n))
        for k in set(POOL.clients) - set(uniform(POOL, t)):
            assert {n: t.tolist() for n, t in after[k].items()} == {n: t.tolist() for n, t in before[k].items()}, "it was away"
        ever |= names
        assert set(here.state.controls) == ever
        for n, c in here.state.controls.items():
            mean = sum(after[k].get(n, torch.zeros_like(c)) for k in POOL.clients) / len(POOL.clients)
            torch.testing.assert_close(c, mean, atol=1e-6, rtol=1e-4)
    assert any(map(is_factor, ever)) or name not in ("ffa", "fedsa", "fibecfed", "slora", "lora")


@pytest.mark.parametrize("name", sorted(REFUSING))
def test_a_method_that_cannot_be_corrected_says_so_before_it_trains(name: str) -> None:
    with pytest.raises(ValueError, match=f"'{name}' cannot follow SCAFFOLD's controls: .*--controls"):
        Played(METHODS[name], POOL)


@pytest.mark.parametrize("rule", ["none", "adam", "momentum"])
def test_scaffold_is_lora_with_controls(rule: Any) -> None:
    """Whatever the server does with the model, c is the mean of the devices' own: eq. (5) takes no step of an optimiser."""
    pool = replace(POOL, optimizer=ServerStep(rule).optimizer)
    mine, theirs = Played(METHODS["scaffold"], replace(pool, controls=False)), Played(FedAvg(), pool)
    for _ in range(3):
        mine.round()
        theirs.round()
        for n, c in mine.state.controls.items():
            mean = sum(own(mine)[k].get(n, torch.zeros_like(c)) for k in POOL.clients) / len(POOL.clients)
            torch.testing.assert_close(c, mean, atol=1e-6, rtol=1e-4)
    for kind in ("shared", "controls", "moments"):
        a, b = (getattr(here.state, kind) for here in (mine, theirs))
        assert set(a) == set(b) and (a or kind == "moments") and all(torch.equal(t, b[n]) for n, t in a.items())


@pytest.mark.parametrize(("name", "rule"), [("fibecfed", "none"), ("fedsa", "adam")])
def test_stacked_is_one_by_one_and_corrected_is_not_uncorrected(name: str, rule: Any) -> None:
    pool = replace(POOL, optimizer=ServerStep().optimizer if rule == "none" else ServerStep(rule, lr=0.01).optimizer)
    one, many = Played(METHODS[name], pool, stacked=False), Played(METHODS[name], pool)
    plain = Played(METHODS[name], replace(pool, controls=False))
    for _ in range(3):
        for here in (one, many, plain):
            here.round()
    assert all(torch.allclose(t, one.state.shared[n], atol=5e-4) for n, t in many.state.shared.items())
    assert all(torch.allclose(t, one.state.controls[n], atol=5e-4) for n, t in many.state.controls.items())
    assert bool(many.state.moments) == (rule == "adam") and not plain.state.controls
    assert max(float((t - many.state.shared[n]).abs().max()) for n, t in plain.state.shared.items()) > 2e-3


def test_a_run_of_before_does_not_go_on_with_other_controls() -> None:
    here = Played(METHODS["scaffold"], replace(POOL, controls=False))
    here.state = replace(here.state, server={"control/x": torch.zeros(1)})
    with pytest.raises(ValueError, match="was begun when controls were gradients at the start of a round; give another --out"):
        here.round()
    here.state = replace(here.state, server={}, moments={"m/control/x": torch.zeros(1)})
    with pytest.raises(ValueError, match="was begun when the server's optimiser stepped the controls too; give another --out"):
        here.round()


def experiment(name: str, kind: str = "local", **fields: Any) -> Experiment:
    return small.experiment(name, kind=kind, evaluate_every=0, controls=True, **fields)


@pytest.mark.parametrize("name", ["ffa"])
def test_a_run_resumes_to_the_same_bits(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    small.build_once(monkeypatch)
    results = run(experiment(name), tmp_path / "whole", plain=True)
    small.stopped(experiment(name), tmp_path / "stopped", 2)
    saved = checkpoint.load(tmp_path / "stopped", store_in(tmp_path / "stopped"))
    assert saved is not None and saved.state.round == 1 and any(bool(t.any()) for t in saved.state.controls.values())
    assert run(experiment(name), tmp_path / "stopped", plain=True)["final"] == results["final"]
    assert fingerprint_of(tmp_path / "stopped") == fingerprint_of(tmp_path / "whole")
    told = dict(describe(experiment(name)).lines)
    assert told["controls"] == "SCAFFOLD's: every step's gradient is corrected by c − c_k"
    plain = run(replace(experiment(name), controls=False), tmp_path / "plain", plain=True)
    assert 1.6 * plain["bytes_up"] < results["bytes_up"] < 2.2 * plain["bytes_up"] and results["flops"] == plain["flops"]
    assert fingerprint_of(tmp_path / "plain") != fingerprint_of(tmp_path / "whole")


def test_nobody_comes_late_to_controls() -> None:
    with pytest.raises(ExperimentError, match="with --controls no device can come after the set-up"):
        insist_may_start(replace(experiment("lora"), cohort=2), 3)
    insist_may_start(replace(experiment("lora"), cohort=2, controls=False), 3)
