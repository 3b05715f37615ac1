"""What a run needs of memory, by hand; and what is refused, with the mend."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from fedloom.client.curricula.fisher import ByFisher
from fedloom.data.tasks import DataError
from fedloom.methods.fedavg import FedAvg
from fedloom.methods.fedbavg import FedBAvg
from fedloom.methods.fedcybgd import FedCyBGD
from fedloom.methods.fibecfed import FibecFed
from fedloom.methods.kinds import FedFFT
from fedloom.model import trials
from fedloom.model.base import Model
from fedloom.run.costs import memory
from fedloom.run.costs.memory import (
    SERVER,
    Portion,
    Sizes,
    insist_on_a_devices_room,
    insist_on_room,
    needed,
    needed_there,
    on_a_device,
    sizes_before,
    sizes_of,
    told,
    weights_in,
)
from fedloom.run.describe import describe
from fedloom.run.errors import ExperimentError
from fedloom.run.experiment import EngineSettings, Experiment
from fedloom.server.masks import Mask
from fedloom.server.sharing import Sharing
from tests import tiny

SEVEN = Sizes(7_000_000_000, 7_000_000_000, 200_000_000)
"""About Llama 2 7B and a layer of it."""

CHANGED = "the start, and what a round changes of the server's state"
FULL = Experiment(FedCyBGD(), clients=4, cohort=2, engine=EngineSettings(stack=1))


def test_a_device_by_the_formulas() -> None:
    """ "full Adam 18M GB; block-wise 2M + 16·|block| GB": of 6.738e9 parameters and a block of 202.4e6, 121.3 -> 16.7 GB."""
    llama = Sizes(6_738_415_616, 6_738_415_616, 202_383_360)
    assert on_a_device(llama, low=True) / 1e9 == pytest.approx(16.7, abs=0.05)
    assert on_a_device(replace(llama, at_once=llama.model), low=True) / 1e9 == pytest.approx(121.3, abs=0.05)
    assert on_a_device(llama, low=False) == 4 * llama.model + 12 * llama.at_once


def test_this_machine_by_hand() -> None:
    """One device at a time: the model, a block that is not on the disk yet, a message down, whose tensors are its bytes, a block up as
    both, eight numbers for each that is trained and the rest beside it."""
    by = dict(needed(Sizes(100, 100, 10, 3), replace(FULL, max_length=20)).lines)
    assert by["the model in float32"] == 400 and "the model in bf16" not in by
    assert by[CHANGED] == 4 * 10, "the start is the model, the server's state lies in files"
    assert by["messages of the devices that are asked together"] == 4 * (100 + 2 * 10)
    assert by["training a device"] == 4 * 8 * 10 + 4 * 90
    assert by["passing a batch through"] == 3 * 8 * 20
    for apart in (replace(FULL, wire="bf16"), replace(FULL, engine=EngineSettings(stack=1, kind="flower"))):
        named = dict(needed(Sizes(100, 100, 10), apart).lines)
        assert named["messages of the devices that are asked together"] == 4 * (2 * 100 + 2 * 10), "as bytes and as tensors"
    low = dict(needed(Sizes(100, 100, 10), replace(FULL, precision="bf16")).lines)
    assert (low["the model in bf16"], low["training a device"]) == (200, 4 * 8 * 10 + 2 * 90)
    assert "the model in float32" not in low and low[CHANGED] == 4 * 10, "the start lies in files too"
    shared = replace(FULL, precision="bf16", engine=EngineSettings(stack=1, workers=2))
    by = dict(needed(Sizes(100, 100, 10), shared).lines)
    assert by[CHANGED] == 2 * 400 + 4 * 10, "a worker's does not"
    assert by["the model in bf16"] == 3 * 200, "each worker has one, and so has the process that started them"
    several = replace(FULL, method=FedBAvg(), cohort=3, engine=EngineSettings())
    assert dict(needed(Sizes(100, 100, 10), several).lines)[CHANGED] == 3 * 4 * 10, "a block of each device"
    assert dict(needed(Sizes(100, 100, 40), several).lines)[CHANGED] == 400, "all of it at the most"
    lora = dict(needed(Sizes(100, 6, 6), Experiment(FedAvg(), clients=50, cohort=5)).lines)
    assert lora[CHANGED] == 4 * 6 * 2
    assert lora["messages of the devices that are asked together"] == 4 * 32 * 6, "evaluating asks a wave of 32"
    wide = needed(SEVEN, replace(FULL, method=FedFFT(), engine=EngineSettings(workers=2)))
    assert wide.total > 2 * 4 * SEVEN.model * 2


def test_sizes_are_those_of_the_model_that_is_loaded_and_of_its_files() -> None:
    model, method = tiny.model(kind="full"), FedCyBGD()
    found = sizes_of(model, method)
    layer = sum(t.numel() for n, t in model.initial.items() if ".layer.0." in n)
    head = sum(t.numel() for n, t in model.initial.items() if "classifier" in n)
    assert found.model == sum(p.numel() for p in model.module.parameters()) and found.at_once == layer + head
    assert sizes_of(model, FedBAvg()).at_once == layer + head and sizes_of(model, FedFFT()).at_once == found.trained
    before = sizes_before(Experiment(method, model=str(tiny.folder())))
    assert before is not None and before.at_once >= layer and abs(before.model - found.model) <= 3 * 17
    assert sizes_before(Experiment(method, model="some/hub-name")) is None
    lora = sizes_before(Experiment(FedAvg(), model=str(tiny.folder())))
    assert lora is not None and (lora.model, lora.trained) == (before.model, 0)


def test_what_cannot_fit_is_refused_with_the_mend_and_can_be_overridden() -> None:
    many = replace(FULL, method=FedFFT(), clients=20, cohort=10, engine=EngineSettings())
    with pytest.raises(ExperimentError, match=r"needs about [\d.]+ GB .* and 64\.0 GB are there: .* for messages of the devices"):
        insist_on_room(SEVEN, many, free=64 * 10**9)
    with pytest.raises(
        ExperimentError, match=r"and 1\.0 GB are there: .* It would fit with --engine\.stack 1 .*about [\d.]+ GB: one device"
    ):
        insist_on_room(Sizes(20_000_000, 20_000_000, 20_000_000), many, free=10**9)
    with pytest.raises(ExperimentError, match=r"fedcybgd a block.*--engine\.overcommit runs it all the same"):
        insist_on_room(SEVEN, many, free=64 * 10**9)
    with pytest.raises(ExperimentError, match="^this server needs about .*; --overcommit begins all the same$") as served:
        insist_on_room(SEVEN, many, free=64 * 10**9, asker=SERVER)
    assert "--engine" not in str(served.value)
    need, there = needed(SEVEN, FULL).total, 4 * SEVEN.model
    with pytest.raises(ExperimentError, match="needs about"):
        insist_on_room(SEVEN, FULL, loaded=True, free=need - there - 1)
    assert insist_on_room(SEVEN, FULL, loaded=True, free=need - there).total == need
    half = replace(FULL, precision="bf16")
    low, there = needed(SEVEN, half).total, 2 * SEVEN.model + 4 * SEVEN.trained
    with pytest.raises(ExperimentError, match="needs about"):
        insist_on_room(SEVEN, half, loaded=True, free=low - there - 1)
    assert insist_on_room(SEVEN, half, loaded=True, free=low - there).total == low
    assert insist_on_room(SEVEN, replace(FULL, engine=EngineSettings(stack=1, overcommit=True)), free=0).total == need
    assert "16·|θ|, |θ| = 200,000,000" in dict(told(needed(SEVEN, FULL), SEVEN))["memory on a device"]


def test_of_several_runs_at_a_time_each_has_its_share_of_the_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """A portion is of what was free before any of them began: what the others have taken since is theirs, and what this one has loaded is
    its own. Nor can it have what is not free any more."""
    need, plenty = needed(SEVEN, FULL).total, 10**13
    for loaded in (False, True):
        assert insist_on_room(SEVEN, FULL, loaded, free=plenty, portion=Portion(2, need)).total == need
        with pytest.raises(
            ExperimentError, match=r"are there for each of 2 runs at a time .--jobs.: .* It would fit with fewer --jobs, .*overcommit"
        ):
            insist_on_room(SEVEN, FULL, loaded, free=plenty, portion=Portion(2, need - 1))
    with pytest.raises(ExperimentError, match="for each of 2 runs at a time"):
        insist_on_room(SEVEN, FULL, free=need - 1, portion=Portion(2, need))
    low = replace(FULL, precision="bf16")
    assert insist_on_room(SEVEN, low, True, free=plenty, portion=Portion(2, needed(SEVEN, low).total)), "start and model are loaded"
    there = needed_there(SEVEN, FULL, 1).total
    for whole, beside, fits in ((2 * there, 2, True), (2 * there - 1, 2, False), (there, 1, True)):
        monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device, whole=whole: (whole, whole))
        try:
            insist_on_room(SEVEN, FULL, free=plenty, gpus=[plenty], portion=Portion(2, plenty, beside))
            assert fits
        except ExperimentError as error:
            assert not fits and "of a GPU's memory" in str(error) and "for each of 2 runs at a time" in str(error)


def test_a_run_in_16_bits_holds_one_model_after_it_was_loaded_in_float32() -> None:
    """Of an adapter: two bytes a number and little else, but loading takes four; scores are taken by a copy in float32."""
    lora = Experiment(FedAvg(), clients=4, cohort=2, precision="bf16", max_length=20)
    sizes = Sizes(1_000_000, 10, 10)
    lines = dict(needed(sizes, lora).lines)
    assert lines["the model in bf16"] == 2_000_000 and "the model in float32, to score in" not in lines
    assert needed(sizes, lora).total == 4_000_000, "nothing comes to what loading takes"
    masked, sharing = replace(lora, mask=Mask(0.3)), replace(lora, share=Sharing(0.5))
    for asked in (replace(lora, method=FibecFed()), replace(lora, method=FedAvg(curriculum=ByFisher())), masked, sharing):
        scored = needed(sizes, asked)
        assert dict(scored.lines)["the model in float32, to score in"] == 4_000_000 and scored.total > 6_000_000
        assert "the model in float32, to score in" not in dict(needed(sizes, replace(asked, precision="float32")).lines)
    at_random = replace(lora, share=Sharing(0.5, which="random"))
    assert needed(sizes, at_random) == needed(sizes, lora), "nobody is asked for scores"
    with pytest.raises(ExperimentError, match=r"--precision bf16 \(about 8\.4 MB\)"):
        insist_on_room(replace(sizes, trained=100_000, at_once=100_000), replace(lora, precision="float32"), free=10)


def test_a_device_of_a_real_federation_by_hand() -> None:
    """No server's state; a message as bytes, while it arrives, and as tensors; a start in float32 that is there while it is loaded and goes
    to the disk."""
    sizes, block = Sizes(1000, 1000, 100), replace(FULL, precision="bf16", wire="up:bf16")
    due = {
        "the model in bf16": 2000,
        "messages of the devices that are asked together": 4 * (2 * 1000 + 2 * 100),
        "training a device": 4 * 8 * 100 + 2 * 900,
    }
    need = sum(due.values())
    assert dict(insist_on_a_devices_room(sizes, block, need).lines) == due
    with pytest.raises(
        ExperimentError,
        match=r"^this device needs about 15\.8 kB of memory beside the program itself, and 15\.8 kB are there: .*for messages.* "
        r"It would fit with a shorter --max-length, a smaller model or more memory; --memory GIB, where more may be had than this,",
    ):
        insist_on_a_devices_room(sizes, block, need - 1)
    assert insist_on_a_devices_room(sizes, block, need - 2000 - 4000, loaded=True).total == need
    with pytest.raises(ExperimentError, match="this device needs"):
        insist_on_a_devices_room(sizes, block, need - 2000 - 4000 - 1, loaded=True)
    assert insist_on_a_devices_room(sizes, block, need - 2000 - 3200, gpu=True).total == need - 2000 - 3200, "those lie on it"
    with pytest.raises(ExperimentError, match=r"with --precision bf16 \(about [\d.]+ kB\), --recompute \(less"):
        insist_on_a_devices_room(replace(sizes, per_token=10), replace(block, precision="float32"), 10)


def test_what_cannot_fit_a_gpu_is_refused() -> None:
    """There lie the model and what computes with it; here the start, messages and what devices keep. Both must fit, and loading too."""
    block = replace(FULL, precision="bf16", max_length=20)
    sizes = Sizes(1000, 1000, 100, per_token=1)
    there, here = needed_there(sizes, block, 1), needed(sizes, block, gpu=True)
    assert dict(there.lines) == {
        "the model in bf16": 2000,
        "training a device": 4 * 8 * 100,
        "passing a batch through": 160,
    }, "what a device does not train lies in the model's own places"
    assert dict(here.lines) == {
        CHANGED: 4 * 100,
        "messages of the devices that are asked together": 4 * (1000 + 2 * 100),
        "what a device does not train": 2 * 900,
    }
    plain = dict(needed_there(sizes, replace(block, precision="float32"), 1).lines)
    assert (plain["the model in float32"], plain["training a device"]) == (4000, 4 * 8 * 100 + 4 * 900)
    shared = needed_there(sizes, replace(block, engine=EngineSettings(workers=3)), 2)
    assert shared.total == 2 * there.total + 2000, "two of three share one, and the process that started them has a model there"
    few = Sizes(1000, 10, 10)
    assert needed_there(few, block, 1).total == 4000, "it is loaded in float32"
    with pytest.raises(ExperimentError, match=r"needs about .* of a GPU's memory, and .* are there: .*for training a device"):
        insist_on_room(sizes, block, free=10**9, gpus=[10**9, there.total - 1])
    assert insist_on_room(sizes, block, free=here.total, gpus=[there.total]).total == here.total
    assert insist_on_room(sizes, block, loaded=True, free=here.total, gpus=[there.total - 2000]).total == here.total
    with pytest.raises(ExperimentError, match="of memory beside the program itself"):
        insist_on_room(sizes, block, free=here.total - 1, gpus=[10**9])
    told_of = dict(told(here, sizes, there))
    assert "training a device" in told_of["memory on a GPU here"] and "memory on a GPU here" not in dict(told(here, sizes))
    assert re.search("^[0-9.]+ kB at the most: ", told_of["memory here"]), "nothing is passed through here"
    assert re.search("^[0-9.]+ kB with no more than 8 texts in a pass, which takes more where they fit: ", told_of["memory on a GPU here"])


def test_a_description_of_what_cannot_fit_loads_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither the machine's memory nor a GPU's is filled to find out that it is too small."""
    block = Experiment(FedCyBGD(), data="nowhere", model=str(tiny.folder()), clients=4, cohort=2)
    room = {"cpu": 10**5, "cuda": 10**12}
    monkeypatch.setattr(memory, "free_bytes", lambda device: room[device.type])
    with pytest.raises(ExperimentError, match=r"needs about .* of memory beside the program"):
        describe(block)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    room |= {"cpu": 10**12, "cuda": 10**4}
    with pytest.raises(ExperimentError, match=r"needs about .* of a GPU's memory, and 10\.0 kB are there"):
        describe(block)
    room |= {"cuda": 10**12}
    with pytest.raises(DataError, match="nowhere"):
        describe(block)


def test_a_name_that_was_downloaded_is_sized_where_it_lies(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """And of a folder that holds a model twice, as some on the Hub do, what is loaded of it counts."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    commit = "0" * 40
    kept = tmp_path / "models--some--hub-name"
    (kept / "refs").mkdir(parents=True)
    (kept / "refs" / "main").write_text(commit)
    shutil.copytree(tiny.folder(), kept / "snapshots" / commit)
    method = FedCyBGD()
    wanted = sizes_before(Experiment(method, model=str(tiny.folder())))
    assert wanted is not None and sizes_before(Experiment(method, model="some/hub-name")) == wanted
    assert sizes_before(Experiment(method, model="some/other-name")) is None
    folder = kept / "snapshots" / commit
    shutil.copy(folder / "model.safetensors", folder / "consolidated.safetensors")
    assert weights_in(folder) == [folder / "model.safetensors"]
    (folder / "model.safetensors").rename(folder / "model-00001-of-00002.safetensors")
    named = {"a": "model-00001-of-00002.safetensors", "b": "model-00002-of-00002.safetensors"}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": named}))
    assert weights_in(folder) == [folder / named["a"]], "as far as they are there"
    assert sizes_before(Experiment(method, model="some/hub-name")) == wanted


PROBE = """
import sys
from pathlib import Path
from fedloom.model import loading, trials
from fedloom.model.adapters import Adapter
def anonymous():
    return next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith("RssAnon")) * 1024
import threading, time
peak, going = [0], [True]
def watch():
    while going[0]:
        peak[0] = max(peak[0], anonymous())
        time.sleep(0.004)
before = anonymous()
watcher = threading.Thread(target=watch, daemon=True)
watcher.start()
model = loading.load(sys.argv[1], num_labels=3, adapter=Adapter(kind="full"), max_length=16)
going[0] = False
watcher.join()
print(4 * sum(p.numel() for p in model.module.parameters()), peak[0] - before, model.together_by or model.alone)
own = {p.data_ptr() for p in model.module.parameters()}
assert all(t.data_ptr() in own for t in model.initial.values()), "the start is a second model"
"""


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_a_model_in_shards_is_loaded_without_a_second_one(tmp_path: Path) -> None:
    """A random Llama in bfloat16 shards. At no time are there two float32 models: its own bytes, a shard or so, some layers of the trial's,
    and what libraries take."""
    config = AutoConfig.for_model(
        *("llama",),
        vocab_size=70,
        hidden_size=384,
        num_hidden_layers=8,
        num_attention_heads=8,
        intermediate_size=1152,
        max_position_embeddings=32,
        pad_token_id=0,
        bos_token_id=2,
        eos_token_id=3,
    )
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(config).to(torch.bfloat16).save_pretrained(tmp_path, max_shard_size="4MB")
    tiny.tokenizer().save_pretrained(tmp_path)
    assert (tmp_path / "model.safetensors.index.json").exists() and len(list(tmp_path.glob("*.safetensors"))) > 5
    before = sizes_before(Experiment(FedCyBGD(), model=str(tmp_path)))
    probe = PROBE.replace("import threading", "trials.APART = 2**23\nimport threading")
    done = subprocess.run([sys.executable, "-c", probe, str(tmp_path)], capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr[-800:]
    own, peak, way = done.stdout.split(maxsplit=2)
    assert before is not None and 4 * before.model == pytest.approx(int(own), rel=0.01) and int(own) > 5 * 10**7
    assert int(peak) < 1.6 * int(own), (own, peak)
    assert way.strip() == "vmap", "the trial is in it, for eight megabytes of tensors at a time"


@pytest.mark.parametrize("shape", [(), (5,), (3, 4), (2, 3, 4)])
def test_a_trial_has_two_different_owners_in_the_memory_of_one(shape: tuple[int, ...]) -> None:
    """Never two copies of a whole model beside it: each owner's tensor is near the model's, and another than the other's."""
    tensor = torch.full(shape, 3.0)
    made = trials._of_two(tensor, torch.Generator().manual_seed(0))
    assert made.shape == (2, *shape) and made.untyped_storage().nbytes() == 4 * (tensor.numel() + 1)
    assert not torch.equal(made[0], made[1]) and float((made - 3).abs().max()) < 3 * 0.1 * 5
    assert made[0].is_contiguous() and made[1].is_contiguous()


@pytest.mark.parametrize("blind", [False, True])
def test_a_trial_of_some_tensors_at_a_time_looks_at_each(blind: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """One tensor at a time the same way is found; and none, where one tensor of the last groups is the first owner's for both."""
    together, last = Model.together, "base_model.model.classifier.weight"

    def mistaken(self: Model, tensors: dict[str, torch.Tensor], *rest: Any, **named: Any) -> Any:
        return together(self, {**tensors, last: tensors[last][:1].expand_as(tensors[last])}, *rest, **named)

    monkeypatch.setattr(trials, "APART", 1)
    if blind:
        monkeypatch.setattr(Model, "together", mistaken)
    model = tiny.model()
    groups = trials._groups(model.initial)
    assert [len(names) for names in groups] == [1] * len(model.initial) and set().union(*groups) == set(model.initial)
    assert groups[0] != {last}
    assert (model.together_by, "packed: results differ" in model.alone) == (("", True) if blind else ("packed", False))


def test_a_trial_cuts_where_a_group_is_full(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(trials, "APART", 40)
    sizes = {"a": 5, "b": 5, "c": 1, "d": 30, "e": 9}  # numbers of four bytes
    assert trials._groups({name: torch.zeros(n) for name, n in sizes.items()}) == [{"a", "b"}, {"c"}, {"d"}, {"e"}]


def test_the_start_of_a_whole_model_is_the_model() -> None:
    """Not a copy of it; of an adapter it is one, which a model's own forward pass cannot change."""
    for kind, same in (("full", True), ("lora", False)):
        model = tiny.model(kind=kind)  # type: ignore[arg-type]
        own = dict(model.module.named_parameters())
        assert {own[model.parameters[n]].data_ptr() == t.data_ptr() for n, t in model.initial.items()} == {same}
