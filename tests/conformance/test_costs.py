"""What a run says of its costs is what was done: plain LoRA as it is played against a real run of it, and what devices hold."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from fedloom.client.curriculum import Pacing
from fedloom.client.store import ClientStore
from fedloom.compute.flops import Flops
from fedloom.compute.work import Spectral, Spectrum
from fedloom.methods import named
from fedloom.methods.fibecfed import Curriculum, FibecFed, Gal
from fedloom.model.blocks import layer_of
from fedloom.model.names import is_up
from fedloom.run.costs import holdings
from fedloom.run.costs.payback import KEYS, first_paid, plain_of, played
from fedloom.run.costs.pretended import Pretended
from fedloom.run.costs.profiles import named as device_named
from fedloom.run.describe import describe
from fedloom.run.describe import played as foretold_by
from fedloom.run.experiment import Experiment
from fedloom.run.loop import run
from fedloom.run.world import build, store_in
from fedloom.tensors import nbytes
from tests import small


@pytest.fixture(autouse=True)
def models_are_loaded_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fedloom.run.world.load_model", small.LOADED)


def fibecfed(pacing: Pacing = "linear", **fields: object) -> Experiment:
    method = FibecFed(curriculum=Curriculum(head_rounds=1, pacing=pacing), gal=Gal(count=1), keep=0.5)
    return replace(small.experiment("lora", rounds=6, evaluate_every=0), method=replace(method, **fields))


def test_plain_lora_is_played_at_the_cost_of_a_real_run(tmp_path: Path) -> None:
    """To the operation, and to the bytes but for the digits of a loss, round by round; a run's set-up is set against that."""
    asked = fibecfed()
    real = replace(asked, method=plain_of(asked.method))
    run(real, tmp_path / "lora", plain=True)
    rows = [json.loads(line) for line in (tmp_path / "lora" / "rounds.jsonl").read_text().splitlines()][1:]
    world = build(asked)
    theirs = played(world, plain_of(asked.method), world.fleet)  # type: ignore[arg-type]
    assert len(theirs) == len(rows) == 6
    assert all(0 <= real["bytes_up"] - one["bytes_up"] <= 16 * asked.cohort for real, one in zip(rows, theirs, strict=True))
    digits = 20 / device_named(asked.device).upload_bytes_per_second
    assert [row["device_seconds"] for row in theirs] == pytest.approx([row["device_seconds"] for row in rows], abs=digits, rel=1e-9)
    assert len({round(row["device_seconds"], 9) for row in theirs}) > 1, "every round has its own cohort"
    results = run(asked, tmp_path / "fibecfed", plain=True)
    mine = [json.loads(line) for line in (tmp_path / "fibecfed" / "rounds.jsonl").read_text().splitlines()][1:]
    due = {key: first_paid(results[f"setup_{key}"], [r[key] for r in mine], [r[key] for r in rows]) for key in KEYS}
    assert results["setup_paid_back"] == {"against": "lora", **due}
    assert due["bytes_up"] is not None
    never = run(fibecfed(pacing="none", gal=Gal(count=3)), tmp_path / "never", plain=True)["setup_paid_back"]
    assert never == {"against": "lora", "bytes_up": None, "device_seconds": None}, "nothing is saved: all is shared, all data is open"
    assert json.loads((tmp_path / "lora" / "results.json").read_text())["setup_paid_back"] is None, "there is no set-up"


def test_what_devices_hold_is_measured(tmp_path: Path) -> None:
    """One of three layers is shared; of the two others half of the neurons are kept."""
    asked = fibecfed()
    results = run(asked, tmp_path / "run", plain=True)
    world, store = build(asked), store_in(tmp_path / "run")
    files = list((tmp_path / "run" / "checkpoints" / "clients").iterdir())
    state, initial = results["device_state"], world.model.initial
    local = {n: t for n, t in initial.items() if layer_of(n) is not None and layer_of(n) not in results["facts"]["gal"]}
    halved = sum(nbytes({n: t}) for n, t in local.items() if is_up(n)) // 2
    assert state["devices"] == len(files) == 4 and store is not None
    assert state["private_bytes_whole"] == nbytes(local) and state["private_bytes"] == nbytes(local) - halved
    assert state["file_bytes"] == sum(f.stat().st_size for f in files) / 4
    assert (state["optimizer_bytes"], state["optimizer_bytes_whole"]) == (2 * (nbytes(initial) - halved), 2 * nbytes(initial))
    bits = sum(len(t) // 8 + 1 for n, t in local.items() if is_up(n))
    assert state["memory_bytes"] < bits + 8 * (44 + 2), "bits, difficulties, two numbers"
    rows = {n: len(t) / 2 for n, t in local.items() if is_up(n)}  # in the mean over a layer's two B's
    length = [float(world.device(k).train.lengths.mean()) for k in range(4)]
    flops = Flops(world.model)
    assert state["step_flops_whole"] == pytest.approx(sum(float(flops.step(frozenset(initial), n)) for n in length) / 4)
    assert state["step_flops"] == pytest.approx(sum(float(flops.step(frozenset(initial), n, rows)) for n in length) / 4)  # type: ignore[arg-type]
    assert state["step_flops"] < state["step_flops_whole"]
    dense = run(fibecfed(keep=1.0), tmp_path / "dense", plain=True)["device_state"]
    assert dense["private_bytes"] == dense["private_bytes_whole"] == nbytes(local)
    assert dense["optimizer_bytes"] == 2 * nbytes(initial) and dense["file_bytes"] > state["file_bytes"]


def test_of_many_devices_evenly_spaced_ones_are_looked_at(monkeypatch: pytest.MonkeyPatch) -> None:
    """Device k of five remembers 10^k numbers: the first and the last of two, and the middle one of three besides. Device 1 remembers
    nothing, and who holds nothing is not counted."""
    world, store = build(small.experiment("lora", clients=5)), ClientStore(None)
    for k in (0, 2, 3, 4):
        store.save(k, {}, {"kept": torch.zeros(10**k)})
    for most, due in ((2, (0, 4)), (3, (0, 2, 4)), (5, (0, 2, 3, 4))):
        monkeypatch.setattr(holdings, "MOST", most)
        found = holdings.held(world, store)
        assert found is not None and found["devices"] == len(due)
        assert found["memory_bytes"] == pytest.approx(sum(4 * 10**k for k in due) / len(due))


@pytest.mark.parametrize("name", ["lora-finetuned", "fedeven"])
def test_what_devices_train_before_they_predict_is_in_every_evaluated_row(name: str, tmp_path: Path) -> None:
    """Two epochs of a device's batches, each at its own longest text, by the polynomial of ``flops.py``; on devices that are not alike the
    slowest counts. It is in no total, and the same at every evaluation."""
    asked = replace(small.experiment(name, rounds=2, evaluate_every=2), device="mixed")
    results = run(asked, tmp_path / "run", plain=True)
    world, told = build(asked), [json.loads(line) for line in (tmp_path / "run" / "rounds.jsonl").read_text().splitlines()]
    flops, purpose = Flops(world.model), {"lora-finetuned": "finetune", "fedeven": "refine"}[name]
    each = {}
    for k in range(4):
        device = world.device(k)
        cut = [rows for epoch in (0, 1) for rows in asked.method.inner.cut(device, purpose, epoch)]
        each[k] = sum(len(rows) * float(flops.step(frozenset(world.model.initial), int(device.train.lengths[rows].max()))) for rows in cut)
        assert sum(len(rows) for rows in cut) == 2 * len(device.train)
    seconds = {k: done / world.fleet.of(k).flops_per_second for k, done in each.items()}
    assert len({world.fleet.of(k).name for k in each}) > 1
    due = {"flops": pytest.approx(sum(each.values())), "device_seconds": pytest.approx(max(seconds.values()))}
    assert [row["personalising"] for row in told] == [due, None, due]
    assert results["final"]["personalising"] == told[-1]["personalising"] and results["best"]["personalising"] == due
    assert results["flops"] == sum(row["flops"] for row in told)
    assert results["device_seconds"] == sum(row["device_seconds"] for row in told)


@pytest.mark.parametrize("method", [named("lora")(), named("fedeven")(epochs=0), named("lora-prior")(), small.method("fibecfed")])
def test_a_method_whose_devices_predict_with_what_they_have_has_nothing_to_pay(method: object, tmp_path: Path) -> None:
    asked = replace(small.experiment("lora", rounds=1), method=method)
    assert run(asked, tmp_path / "run", plain=True)["final"]["personalising"] == {"flops": 0.0, "device_seconds": 0.0}


def test_plain_lora_keeps_nothing_on_its_devices(tmp_path: Path) -> None:
    assert run(small.experiment("lora"), tmp_path / "run", plain=True)["device_state"] is None


@pytest.mark.parametrize("name", ["slora", "scaffold", "fedsb", "fedalt", "adalora"])
def test_a_method_that_looks_at_what_training_left_can_be_described(name: str) -> None:
    """What is only counted has weights to start from and moments of the right names."""
    told = dict(describe(small.experiment(name)).lines)
    assert "trained on" in told["first round"] and "trained on" in told["last round"]


def test_choosing_the_gal_anew_is_described_where_it_happens(tmp_path: Path) -> None:
    """Every second round: there all devices are sent the model for their scores, which no other round does; as in the run itself."""
    asked = replace(fibecfed(gal=Gal(count=1, refresh=2)), rounds=5, evaluate_every=0)
    foretold = [section.bytes_down for section in foretold_by(build(asked)).rounds]
    run(asked, tmp_path / "run", plain=True)
    rows = [json.loads(line) for line in (tmp_path / "run" / "rounds.jsonl").read_text().splitlines()]
    done = [row["bytes_down"] for row in rows if row["round"]]
    assert len(foretold) == len(done) == 5
    for each in (foretold, done):
        assert min(each[2], each[4]) > 1.5 * max(each[0], each[1], each[3])


def test_a_lossless_choice_can_be_described() -> None:
    """What is only counted finds a spectrum without a gap."""
    asked = fibecfed(gal=Gal(lossless=True))
    assert any(name == "set-up costs" for name, _ in describe(asked).lines)
    world = build(asked)
    device = world.device(0)
    (done,) = Pretended(world.model).run([Spectrum(world.model.initial, device.train, device.train.rows[:1] * 0)])
    assert isinstance(done.result, Spectral) and done.flops > 0
