"""Masks over every method, and what may be combined at all: each method under a mask with a curriculum and a start, and with some layers
that stay on devices if it can; each of these with several methods, and every value of one of the four with every value of another. Or the
method says that it takes no mask."""

from __future__ import annotations

from dataclasses import replace
from itertools import combinations, product
from pathlib import Path
from types import SimpleNamespace
from typing import Any, get_args

import numpy as np
import pytest
import torch

from fedloom.client.curricula import all_curricula
from fedloom.client.curricula.loss import ByLoss
from fedloom.client.curriculum import shuffled
from fedloom.client.masks import carried_out
from fedloom.client.neurons import whole_private
from fedloom.compute.serial import Serial
from fedloom.compute.work import Predict
from fedloom.messages import ask
from fedloom.methods import all_methods
from fedloom.methods.fedavg import FedAvg
from fedloom.methods.method import State, one_round
from fedloom.methods.slora import SLora
from fedloom.model.adapters import Adapter, Start
from fedloom.model.blocks import layer_of
from fedloom.model.names import is_down, is_factor, is_up
from fedloom.run.checkpoint import fingerprint_of
from fedloom.run.describe import describe
from fedloom.run.errors import ExperimentError
from fedloom.run.experiment import Experiment
from fedloom.run.loop import run
from fedloom.run.recipes import with_curriculum
from fedloom.seeds import derive_int
from fedloom.server.masks import Mask, completed
from fedloom.server.participation import Pool, uniform
from fedloom.server.sharing import Sharing, Which
from fedloom.tensors import packed, unpacked
from tests import small, tiny
from tests.conformance.played import Played

pytestmark = pytest.mark.no_cover
"""The same lines again for every method, kind or size: which lines are reached at all, other tests tell (conftest.py)."""

POOL = Pool((0, 1, 2, 3), 3, 2, 3, mask=Mask(0.4))
METHODS: dict[str, Any] = {name: kind() for name, kind in all_methods().items()} | {"slora": SLora(first=0.4)}
REFUSING = {"fibecfed", "hetlora", "adalora", "fedalt", "deltalora", "fedsb", "embracingfl", "ditto", "centralised"}
NO_PAIRS = {"fedfft", "fedbf", "fedap", "fedcybgd", "fedbavg", "handover", "galore", "lisa"}
"""Another kind of adapter, of their own accord."""
FOLLOWING = [name for name in METHODS if name not in REFUSING | NO_PAIRS | {"fedprox"}]
FROM_ZERO = {"flora", "slora", "flexlora", "flasc"}
ALL, LEAST = Sharing(), Sharing(0.4)
SHARES = [ALL, LEAST, Sharing(count=2, which="random"), Sharing(count=2, which="most")]
STARTS: list[str] = [start for start in get_args(Start) if start != "auto"]
SHARING = ["lora", "ffa", "rolora", "fedsa", "federa", "fedopt", "fedeven", "lora-finetuned", "lora-personal-head", "lora-prior"]
"""Of which layers can stay on devices."""
KINDS: dict[str, list[Any]] = {"c": [*all_curricula()], "s": STARTS, "of": SHARES, "keep": [0.4, 1.0]}
"""Curriculum, start, which layers are shared, and the share of the rows that is kept: what may be combined."""


def started(name: str, start: str) -> str:
    return "zero" if name in FROM_ZERO else "svd" if name == "federa" else start


def met(values: dict[str, Any]) -> set[tuple[str, Any, str, Any]]:
    """Which two values of different kinds are together."""
    return {(one, values[one], other, values[other]) for one, other in combinations(KINDS, 2)}


def paired() -> list[tuple[str, str, str, bool, Sharing, float]]:
    """Every method under a mask, and those of which layers can stay twice more without, each with whatever has met least so far."""
    slots = [*((m, 0.4) for m in FOLLOWING), *((m, 1.0) for m in SHARING * 2)]
    known, made = set[tuple[str, Any, str, Any]](), []
    for i, (m, keep) in enumerate(slots):
        ways = product(KINDS["c"], dict.fromkeys(started(m, s) for s in STARTS), SHARES if m in SHARING else [ALL])
        every = [dict(zip(KINDS, (*way, keep), strict=True)) for way in ways]
        best = max(every, key=lambda way: len(met(way) - known))
        if keep == 1 and not met(best) - known:
            continue
        known |= met(best)
        made.append((m, best["c"], best["s"], i % 4 == 2 and keep < 1, best["of"], keep))
    return made


PAIRS = paired()


def masks(here: Played) -> dict[int, dict[str, torch.Tensor]]:
    """By device and B, which rows it trains."""
    return {k: {n: unpacked(t) for n, t in of.items()} for k, of in here.kept("rows/").items()}


def test_every_value_is_with_every_value_of_another_kind_among_the_pairs() -> None:
    assert {of.which for of in SHARES if of.some} == {*get_args(Which)} and len(STARTS) == len(get_args(Start)) - 1
    there = set[tuple[str, Any, str, Any]]().union(*(met({"c": c, "s": s, "of": of, "keep": keep}) for _, c, s, _, of, keep in PAIRS))
    for one, other in combinations(KINDS, 2):
        assert {(one, a, other, b) for a, b in product(KINDS[one], KINDS[other])} <= there, (one, other)
    assert {m for m, *_ in PAIRS} == set(FOLLOWING) and {(controls, of.some) for _, _, _, controls, of, _ in PAIRS} >= {(True, True)}


@pytest.mark.parametrize(("name", "curriculum", "start", "controls", "sharing", "keep"), PAIRS)
def test_curriculum_start_mask_sharing_and_method_go_together(
    name: str, curriculum: str, start: str, controls: bool, sharing: Sharing, keep: float
) -> None:
    """Rows that no device keeps stay; the share that is kept is the mask's; a Fit has these rows and no more; predictions are whole. Of
    layers that are not shared the server has nothing, and a device that took part has its own, which it has trained."""
    follows = name not in ("flora", "flexlora", "flasc", "scaffold", "local")
    method = with_curriculum(METHODS[name], small.curriculum(curriculum))
    here = Played(method, replace(POOL, controls=controls and follows, sharing=sharing, mask=Mask(keep)), started(name, start))
    shared = here.state.facts["gal"] if sharing.some else [0, 1, 2]
    assert len(shared) == (3 if not sharing.some else 2)
    own = {n for n in here.of.initial if is_factor(n) and layer_of(n) not in shared}
    mine = own - {n for n in own if (name == "ffa" and not is_up(n)) or (name == "fedsa" and is_up(n))}
    handed = {n: t for n, t in here.of.initial.items() if n in mine}
    for _ in range(2):
        before = dict(here.state.shared)
        here.round()
        assert here.state.round > 1 or small.closed(here.fits) == (curriculum != "none")
        if sharing.some:
            assert not own & {*here.state.shared, *(n.removeprefix("control/") for n in here.state.controls)}
            assert {layer_of(n) for fit in here.fits for n in fit.start if is_factor(n)} == {0, 1, 2}
            assert name != "ffa" or not any(is_down(n) for fit in here.fits for n in fit.start)
            trained = {n for fit in here.fits for n in fit.start if n in mine}
            for k in uniform(POOL, here.state.round - 1):
                private = whole_private(replace(tiny.clients()[k], private=here.store.load(k)[0], memory=here.store.load(k)[1]))
                moved = any(not torch.equal(private[n], handed[n]) for n in trained)
                assert trained and trained <= private.keys() and (moved or (name == "rolora" and k not in uniform(POOL, 0)))
        if keep == 1:
            assert not any(fit.rows for fit in here.fits)
            continue
        chosen = masks(here)
        asked = [of for of in chosen.values() if of]
        for of in asked:
            assert 0.4 <= sum(int(m.sum()) for m in of.values()) / sum(len(m) for m in of.values()) < 0.45
        rows = [fit for fit in here.fits if fit.rows]
        assert len(rows) == (POOL.cohort if asked and any(map(is_up, here.fits[-1].start)) else 0)
        assert all(len(fit.start[n]) == len(at) < 16 for fit in rows for n, at in fit.rows.items())
        if name in ("flora", "flexlora", "flasc", "rolora"):  # a round ends with other factors than were averaged, or has another half
            continue
        for n in filter(is_up, here.state.shared):
            moved = (here.state.shared[n] != before[n]).any(1) if n in before else torch.zeros(16, dtype=torch.bool)
            ever = torch.stack([of[n] for of in chosen.values() if n in of] or [torch.zeros(16, dtype=torch.bool)]).any(0)
            assert not bool((moved & ~ever).any()), n
    assert here.predictions(0)["test"].shape == (3, 3)


@pytest.mark.parametrize("name", sorted(REFUSING))
def test_a_method_without_rows_to_keep_says_so_before_it_trains(name: str) -> None:
    with pytest.raises(ValueError, match=f"'{name}' cannot follow a mask that keeps 0.4 of the neurons: .*--mask.keep"):
        pool, method = POOL, METHODS[name]
        next(method.setup(State(0, {}), pool))


def test_a_kind_without_pairs_and_a_term_in_the_loss_are_refused() -> None:
    with pytest.raises(ValueError, match="'galore' cannot follow a mask that keeps 0.4 of the neurons: it projects whole matrices"):
        next(METHODS["galore"].setup(State(0, {}), POOL))  # with --adapter.kind lora
    for name in sorted(NO_PAIRS):
        with pytest.raises(ExperimentError, match=f"--mask.keep is 0.4 and is of LoRA's pairs, and method '{name}', which trains kind"):
            replace(small.experiment(name), mask=Mask(0.4))
    with pytest.raises(ExperimentError, match="and --adapter.kind ia3 has none"):
        replace(small.experiment("lora"), adapter=Adapter(kind="ia3"), mask=Mask(0.4))
    with pytest.raises(ExperimentError, match="FedProx's term, which is not defined for some rows of B, has prox 0.1"):
        replace(small.experiment("fedprox"), mask=Mask(0.4))
    with pytest.raises(ValueError, match="above 0 and at most 1; got keep 0"):
        Mask(0.0)


def test_corrections_of_rows_are_those_rows() -> None:
    here = Played(FedAvg(), replace(POOL, controls=True))
    here.round()
    common, own = here.state.controls, {k: here.store.load(k)[1] for k in POOL.clients}
    here.round()
    fits = [fit for fit in here.fits if fit.rows and fit.means]
    assert len(fits) == POOL.cohort
    for fit in fits:
        (k,) = [k for k, c in tiny.clients().items() if len(c.train) == len(fit.examples)]
        for n, at in fit.rows.items():
            mine = own[k][f"control/{n}"] if f"control/{n}" in own[k] else torch.zeros_like(common[n])
            torch.testing.assert_close(fit.correction[n], (common[n] - mine)[at], atol=1e-7, rtol=1e-5)
        assert any(bool(fit.correction[n].any()) for n in fit.rows)
    for k in POOL.clients:
        for n, mask in masks(here)[k].items():
            assert not bool(here.store.load(k)[1][f"control/{n}"][~mask].any()), "no control of what is not trained"


@pytest.mark.parametrize("name", ["lora", "fedsa", "rolora"])
def test_stacked_is_one_by_one(name: str) -> None:
    one, many = (Played(METHODS[name], replace(POOL, controls=True), stacked=stacked) for stacked in (False, True))
    for _ in range(2):
        one.round()
        many.round()
    assert {k: {n: m.tolist() for n, m in of.items()} for k, of in masks(one).items()} == {
        k: {n: m.tolist() for n, m in of.items()} for k, of in masks(many).items()
    }
    for kind in ("shared", "controls"):
        mine, theirs = getattr(many.state, kind), getattr(one.state, kind)
        assert set(mine) == set(theirs) and all(torch.allclose(t, theirs[n], atol=5e-4) for n, t in mine.items())


def test_a_devices_own_rows_are_stored_as_rows() -> None:
    """FedSA's B stays on its device: rows that are not kept are zero for ever, take no room, and are no product."""
    here = Played(METHODS["fedsa"], POOL)
    here.round()
    here.round()
    for k, of in masks(here).items():
        private, memory = here.store.load(k)
        for n, mask in of.items():
            assert private[n].shape == (int(mask.sum()), 2) and f"kept/{n}" in memory
    assert all(not set(fit.fixed) & set(fit.rows) for fit in here.fits)
    (k, of), *_ = [(k, of) for k, of in masks(here).items() if of]
    private = here.store.load(k)[0]
    own = {n: torch.zeros(16, 2).masked_scatter(of[n][:, None], t) if n in of else t for n, t in private.items()}
    (due,) = Serial(here.of).run([Predict({**own, **here.state.shared}, tiny.clients()[k].test)])
    (said,) = here.engine.run([ask(here.method.predict, k, here.state.shared, splits=["test"])]).updates
    torch.testing.assert_close(said.tensors["test"], due.result, atol=1e-4, rtol=0)
    assert {n: t.shape for n, t in here.store.load(k)[0].items()} == {n: t.shape for n, t in private.items()}, "they are rows again"


@pytest.mark.parametrize("name", ["fedeven", "lora-finetuned"])
def test_a_prediction_that_trains_knows_of_no_mask(name: str) -> None:
    """All rows are trained, by a device that took part and by one that did not, and neither is another afterwards."""
    here = Played(METHODS[name], POOL)
    here.round()
    assert set(POOL.clients) - set(uniform(POOL, 0))
    for k in POOL.clients:
        here.fits.clear()
        before = here.store.fingerprint()
        here.predictions(k)
        (fit,) = here.fits
        assert not fit.rows and all(fit.start[n].shape == here.state.shared[n].shape for n in filter(is_up, fit.start))
        assert here.store.fingerprint() == before


def test_the_warm_up_behind_a_mask_is_training_as_the_method_trains() -> None:
    """FedEven's: under the device's own log prior; with dropout masks of its own."""
    here = Played(METHODS["fedeven"], POOL)
    here.round()
    assert len(here.fits) == 2 * POOL.cohort
    for fit in here.fits:
        (k,) = [k for k, c in tiny.clients().items() if len(c.train) == len(fit.examples)]
        counted = np.bincount(fit.examples.labels, minlength=3) + 1.0
        assert fit.bias is not None
        np.testing.assert_allclose(fit.bias.numpy(), np.log(counted / counted.sum()), rtol=1e-6)
        seed = derive_int(3, "fit", 0, k) if fit.rows else derive_int(3, "fit mask", k)
        assert fit.dropout_seed == seed
    assert sum(bool(fit.rows) for fit in here.fits) == POOL.cohort


def test_the_warm_up_has_the_methods_batches_whatever_a_curriculum_opens() -> None:
    """Nine examples in batches of eight, of which the lone ninth is easiest and alone is open; by memory too."""
    c, start = tiny.clients()[1], dict(tiny.model().initial)
    lone = shuffled(9, 8, c.seed, "batches", c.id)[1][0]
    logits = torch.zeros(9, 3)
    logits[lone, c.train.labels[lone]] = 10.0
    for by_memory, texts, sizes in ((False, 4, [8, 1]), (True, 4, [4, 4, 1]), (True, None, [8, 1])):
        method: Any = FedAvg(batch_size=8, batch_by_memory=by_memory, curriculum=ByLoss(start=0.4))
        asking: Any = next(one_round(method, State(0, start), replace(POOL, cohort=4)))
        told = {n: v for n, v in asking.tasks[1].settings.items() if n.startswith("mask_")}
        assert told == {"mask_keep": 0.4, "mask_batch_size": 8} | ({"mask_by_memory": True} if by_memory else {})
        work = carried_out(method.train, replace(c, texts=texts, private={}, memory={}), asking.tasks[1])
        assert isinstance(next(work)[0], Predict)
        (warm,) = work.send([logits])
        assert [len(batch) for batch in warm.batches] == sizes
        assert np.concatenate(warm.batches).tolist() == shuffled(9, 9, c.seed, "mask", c.id)[0].tolist()


def test_a_method_without_a_batch_size_is_refused() -> None:
    with pytest.raises(ValueError, match="'none' has no batch_size, by which a mask's warm-up goes; leave --mask.keep out"):
        next(one_round(SimpleNamespace(name="none", round=lambda *_: iter(())), State(0, {}), POOL))  # type: ignore[arg-type]


def test_what_came_as_rows_is_completed_with_what_was_sent() -> None:
    mask = torch.tensor([0, 1, 0, 1.0])
    came = {"b": torch.ones(2, 3), "control/b": torch.full((2, 3), 2.0), "a": torch.ones(1), "rows/b": packed(mask)}
    made = completed(came, {"b": torch.full((4, 3), 5.0)})
    assert set(made) == {"a", "b", "control/b"}
    assert made["b"][:, 0].tolist() == [5, 1, 5, 1] and made["control/b"][:, 0].tolist() == [0, 2, 0, 2]
    with pytest.raises(ValueError, match="'b' came with 3 rows, and 2 are said to have come"):
        completed({"b": torch.ones(3, 3), "rows/b": packed(mask)}, {})


# whole runs


def experiment(name: str, keep: float = 0.3) -> Experiment:
    return replace(small.experiment(name, evaluate_every=0), mask=Mask(keep))


@pytest.mark.parametrize("name", ["lora", "fedsa"])
def test_a_run_resumes_to_the_same_bits_and_saves_what_it_says(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    small.build_once(monkeypatch)
    results = run(experiment(name), tmp_path / "whole", plain=True)
    small.stopped(experiment(name), tmp_path / "stopped", 2)
    assert run(experiment(name), tmp_path / "stopped", plain=True)["final"] == results["final"]
    assert fingerprint_of(tmp_path / "stopped") == fingerprint_of(tmp_path / "whole")
    held, plain = results["device_state"], run(experiment(name, 1.0), tmp_path / "plain", plain=True)
    assert held["optimizer_bytes"] < 0.8 * held["optimizer_bytes_whole"]
    assert (
        (held["private_bytes"] < 0.8 * held["private_bytes_whole"]) == (name == "fedsa") == (held["step_flops"] < held["step_flops_whole"])
    )
    assert (results["bytes_up"] < plain["bytes_up"]) == (name == "lora")
    assert results["examples"] > plain["examples"], "the warm-up is trained on and counted"
    assert dict(describe(experiment(name)).lines)["mask"] == "0.3 of the output neurons of each layer's pairs"


def test_all_kept_is_the_method_as_it_comes() -> None:
    one, other = Played(FedAvg(), replace(POOL, mask=Mask())), Played(FedAvg(), replace(POOL, mask=Mask(1.0)))
    assert one.pool == other.pool and not any(masks(one).values())
    one.round()
    assert not any(fit.rows for fit in one.fits) and len(one.fits) == POOL.cohort
