"""Whether a device's model is the server's: every pre-trained weight counts, those under the pairs too, whatever the start made of them.

Two models that were loaded apart are alike, and W_res,k + s·mean(B_k)·mean(A_k) is the same weight with either's W_res."""

from __future__ import annotations

import json
import re
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from fedloom.client.store import ClientStore
from fedloom.data.shards import write_shards
from fedloom.messages import Failure, Task
from fedloom.methods.fedavg import FedAvg
from fedloom.methods.fedcybgd import FedCyBGD
from fedloom.model import machine
from fedloom.model.adapters import Adapter, Kind, Start, beneath
from fedloom.model.base import Model
from fedloom.model.loading import load
from fedloom.model.names import is_down, partner, under
from fedloom.model.places import ModelError
from fedloom.run import checkpoint, parts, world
from fedloom.run.adopt import adopt
from fedloom.run.again import evaluate_again
from fedloom.run.deployment.device import hosted, order
from fedloom.run.deployment.greeting import Own, greeting_of
from fedloom.run.errors import CheckpointError, ExperimentError
from fedloom.run.experiment import Experiment
from fedloom.run.export import export
from fedloom.run.loop import run
from fedloom.run.starting import identity
from fedloom.run.terminal.console import Progress
from fedloom.run.world import build, read_data
from fedloom.telling import for_others
from fedloom.tensors import weighted_mean
from fedloom.wire import pack
from tests import small, tiny

QUERY, FIRST = "bert.encoder.layer.1.attention.self.query.weight", "bert.encoder.layer.0.output.dense.weight"
POOLER = "bert.pooler.dense.weight"


def altered(folder: Path, name: str, by: float = 1e-3) -> Path:
    """The tiny model's folder with one number of one tensor moved."""
    shutil.copytree(tiny.folder(), folder)
    tensors = load_file(folder / "model.safetensors")
    tensors[name].view(-1)[5] += by
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    return folder


def loaded(folder: Path, start: Start = "zero", kind: Kind = "lora") -> Model:
    return load(str(folder), num_labels=3, adapter=Adapter(rank=2, alpha=5.0, start=start, kind=kind), seed=1, max_length=16)


@pytest.mark.parametrize("start", ["zero", "svd"])
def test_a_device_with_another_query_weight_is_refused_and_one_with_the_same_is_not(start: Start, tmp_path: Path) -> None:
    shape: dict[str, Any] = {"clients": 2, "cohort": 2, "rounds": 1, "max_train": 24, "max_validation": 4, "max_test": 4, "max_length": 16}
    e = Experiment(FedAvg(), model=str(tiny.folder()), adapter=Adapter(rank=2, start=start), seed=5, **shape)
    write_shards(*read_data(e), tmp_path / "shards")
    greeting = json.loads(json.dumps({**greeting_of(build(e)), "digest": e.digest()}))
    data = str(tmp_path / "shards" / "0")
    _, said = hosted(order(greeting, Own(data, model=str(shutil.copytree(tiny.folder(), tmp_path / "same")))))
    assert said["examples"]["train"] > 0
    other = altered(tmp_path / "other", QUERY)
    with pytest.raises(
        ModelError, match=rf"{other}.* is not the server's.*here and to {greeting['model']} at the server.*--model"
    ) as caught:
        hosted(order(greeting, Own(data, model=str(other))))
    assert str(tmp_path) not in for_others(caught.value) and "this device's model is not the server's" in for_others(caught.value)


def test_a_device_whose_data_changed_is_refused_until_they_are_put_back(tmp_path: Path) -> None:
    """It went on with the states of the others."""
    shape: dict[str, Any] = {"clients": 2, "cohort": 2, "rounds": 1, "max_train": 24, "max_validation": 4, "max_test": 4, "max_length": 16}
    e = Experiment(FedAvg(), model=str(tiny.folder()), adapter=Adapter(rank=2), seed=5, **shape)
    write_shards(*read_data(e), tmp_path / "shards")
    greeting = json.loads(json.dumps({**greeting_of(build(e)), "digest": e.digest()}))
    own, there = Own(str(tmp_path / "shards" / "0"), folder=str(tmp_path / "device")), tmp_path / "device" / "states" / e.digest()
    _, said = hosted(order(greeting, own))
    ClientStore(there).keep(())
    assert hosted(order(greeting, own))[1] == said, "a restart, and states that were swept"
    with pytest.raises(ExperimentError) as refused:
        hosted(order(greeting, replace(own, data=str(tmp_path / "shards" / "1"))))
    told = for_others(refused.value)
    assert f"{said['examples']['train']} train" in told and "not those with which it began" in told and str(tmp_path) not in told
    assert re.search(rf"fingerprint [0-9a-f]{{16}}\), .* now \([0-9a-f]{{16}}\).*delete {there} and join again", str(refused.value))
    assert hosted(order(greeting, own))[1] == said, "put back"
    (there / "data.json").write_text("[]")
    with pytest.raises(CheckpointError, match=r"data\.json is corrupt"):
        hosted(order(greeting, own))
    shutil.rmtree(there)
    hosted(order(greeting, replace(own, data=str(tmp_path / "shards" / "1"))))


@pytest.mark.parametrize(("greeting", "theirs"), [({"release": "0.0.9"}, "'0.0.9'"), ({}, "'of an earlier release'")])
def test_a_device_of_another_release_is_refused_before_it_looks_at_anything(greeting: dict[str, Any], theirs: str) -> None:
    """It took part, whatever the other release computes."""
    with pytest.raises(ExperimentError, match=rf"the server is Fedloom {theirs}, and this device '\d.*'; install the same release"):
        hosted(order(greeting, Own("nowhere")))


def test_a_device_that_cannot_hold_the_model_says_so_before_it_is_loaded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """And one that can has the start of a whole model in 16 bits in a file without a name."""
    shape: dict[str, Any] = {"clients": 2, "cohort": 1, "rounds": 1, "max_train": 24, "max_validation": 4, "max_test": 4, "max_length": 16}
    e = Experiment(FedCyBGD(), model=str(tiny.folder()), precision="bf16", seed=5, **shape)
    write_shards(*read_data(e), tmp_path / "shards")
    greeting = json.loads(json.dumps({**greeting_of(build(e)), "digest": e.digest()}))
    own, loaded, mapped = Own(str(tmp_path / "shards" / "0"), folder=str(tmp_path / "device")), list[Model](), list[bool]()
    load_it, read = world.model_of, parts.load_file

    def seen(*given: Any) -> Model:
        loaded.append(load_it(*given))
        return loaded[-1]

    def is_read(path: Path) -> Any:
        mapped.append(path.is_relative_to(tmp_path / "device"))
        return read(path)

    monkeypatch.setattr(world, "model_of", seen)
    monkeypatch.setattr(parts, "load_file", is_read)
    monkeypatch.setattr(parts, "PART", 1024)
    with pytest.raises(ExperimentError, match=r"this device needs about .* and 0 B are there"):
        hosted(order(greeting, replace(own, memory=1, said=True)))
    assert not loaded
    with monkeypatch.context() as full, pytest.raises(ExperimentError, match=r"this device needs about .* and 10\.0 kB are there"):
        full.setattr(machine, "free_bytes", lambda device: 10**4)
        hosted(order(greeting, replace(own, memory=10**12)))
    assert not loaded
    host, said = hosted(order(greeting, replace(own, memory=10**12, said=True)))
    assert said["examples"]["train"] > 0 and len(loaded) == 1 and mapped and all(mapped)
    assert host.telling is for_others
    assert not (tmp_path / "device" / "start").exists()
    start = build(e).model.initial
    assert all(torch.equal(t, start[n]) for n, t in loaded[0].initial.items())
    (answer,) = host.answer([pack(Task("train", 0, dict(loaded[0].initial), {"block": [], "round": 0}), e.digest())])
    assert not isinstance(answer, Failure), answer


@pytest.mark.parametrize(("kind", "start"), [("lora", "zero"), ("lora", "svd"), ("ia3", "zero"), ("full", "zero")])
def test_every_pre_trained_weight_counts_whatever_is_trained(kind: Kind, start: Start, tmp_path: Path) -> None:
    first = identity(loaded(tiny.folder(), start, kind))
    for place, name in enumerate((QUERY, FIRST, POOLER)):
        assert identity(loaded(altered(tmp_path / str(place), name), start, kind)) != first, name


def test_what_an_adapter_brings_and_the_head_do_not_count() -> None:
    """They are drawn, or an SVD's on one machine or another, and the server sends what is shared."""
    for start in ("zero", "svd"):
        of = loaded(tiny.folder(), start)
        before = identity(of)
        own = dict(of.module.named_parameters())
        with torch.no_grad():
            for parameter in of.parameters.values():
                own[parameter].add_(1.0)
            if start == "svd":
                own[of.beneath.names[0]].mul_(1 + 1e-6)  # what is left of W0 after another machine's SVD
        assert identity(of) == before


def test_what_a_method_has_put_under_the_pairs_does_not_count() -> None:
    """FLoRA, FedEx and Delta-LoRA write there, whenever a device computes."""
    of = loaded(tiny.folder())
    before = identity(of)
    of.stand_on({of.beneath.names[0]: of.weights[of.beneath.names[0]] + 1.0})
    assert identity(of) == before


@pytest.mark.parametrize("start", ["svd", "fast-svd"])
def test_devices_that_split_for_themselves_are_averaged_to_one_weight(start: Start) -> None:
    """W_res,k + s·mean(B)·mean(A) with each device's own W_res, to float32's rounding; for lack of another machine, the second device's
    numbers are moved by as much as float32 rounds."""
    one, other = loaded(tiny.folder(), start), loaded(tiny.folder(), start)
    plain = load_file(tiny.folder() / "model.safetensors")
    scaling, u = beneath(one.module).scaling, torch.finfo(torch.float32).eps
    assert scaling == 2.5
    noise = torch.Generator().manual_seed(1)
    trained = []
    for k, of in enumerate((one, other)):
        at = {n: t + 0.1 * torch.randn(t.shape, generator=torch.Generator().manual_seed(k)) for n, t in of.initial.items()}
        trained.append((3.0 + 2 * k, at))
    mean = weighted_mean(trained)
    for a in filter(is_down, mean):
        moved = {n: t * (1 + u * torch.randn(t.shape, generator=noise)) for n, t in other.initial.items() if n in (a, partner(a))}
        w0 = plain[under(a).removeprefix("base_model.model.").replace(".base_layer", "")].double()
        rest = (w0 - scaling * moved[partner(a)].double() @ moved[a].double()).float()
        product = scaling * mean[partner(a)].double() @ mean[a].double()
        first = one.weights[under(a)].double() + product
        for second in (other.weights[under(a)].double() + product, rest.double() + product):
            assert float((first - second).abs().max()) <= 8 * u * float(w0.abs().max())
        assert float((first - w0).norm()) > 0.01 * float(w0.norm()), "the mean has moved"


def test_a_run_goes_on_with_the_weights_that_it_began_with_and_no_others(tmp_path: Path) -> None:
    """Nor is it evaluated or exported on others. A checkpoint of an earlier release, which tells no weights, is gone on with."""
    model = shutil.copytree(tiny.folder(), tmp_path / "model")
    e, out = replace(small.experiment("lora", rounds=3, evaluate_every=0), model=str(model)), tmp_path / "run"
    small.stopped(e, out, last=2)
    shutil.rmtree(model)
    altered(model, QUERY)
    match = r"the pre-trained weights of '.*model' changed since .*run began: they come to \w{16} now, and came to \w{16}\. Nothing"
    for go_on in (lambda: run(e, out, plain=True), lambda: evaluate_again(e, out), lambda: export(e, out, tmp_path / "taken")):
        with pytest.raises(CheckpointError, match=match):
            go_on()
    for go_on, mends in ((lambda: run(e, out, plain=True), True), (lambda: evaluate_again(e, out), False)):
        with pytest.raises(CheckpointError) as told:
            go_on()
        assert ("--out" in str(told.value)) == mends, "evaluate has no such option"
    assert not (tmp_path / "taken").exists()
    same = shutil.copytree(out, tmp_path / "same")
    known, latest = json.loads((out / "checkpoints" / "latest.json").read_text()), out / "checkpoints" / "latest.json"
    body = {key: value for key, value in known.items() if key not in ("sha256", "model")}
    latest.write_text(json.dumps({"sha256": checkpoint._digest(body), **body}))
    assert run(e, out, plain=True)["rounds"] == 3
    shutil.rmtree(model)
    shutil.copytree(tiny.folder(), model)
    assert run(e, same, plain=True)["rounds"] == 3


def test_what_another_model_trained_is_not_taken_over(tmp_path: Path) -> None:
    model = shutil.copytree(tiny.folder(), tmp_path / "model")
    alike = {name: replace(small.experiment(name, rounds=1, evaluate_every=0), model=str(model)) for name in ("lora", "lora-finetuned")}
    run(alike["lora"], tmp_path / "trained", plain=True)
    adopt(alike["lora-finetuned"], tmp_path / "one", tmp_path / "trained", Progress(1, "", True))
    shutil.rmtree(model)
    altered(model, QUERY)
    with pytest.raises(CheckpointError, match="pre-trained weights of .* changed since .*trained began.*, or give another --out"):
        adopt(alike["lora-finetuned"], tmp_path / "two", tmp_path / "trained", Progress(1, "", True))
    with pytest.raises(CheckpointError, match="pre-trained weights of .* changed since .*one began"):
        evaluate_again(alike["lora-finetuned"], tmp_path / "one")
