"""What a run needs of memory, by hand; and what is refused, with the mend."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from fedloom.methods.fedavg import FedAvg
from fedloom.methods.fedbavg import FedBAvg
from fedloom.methods.fedcybgd import FedCyBGD
from fedloom.methods.kinds import FedFFT
from fedloom.run.experiment import EngineSettings, Experiment, ExperimentError
from fedloom.run.memory import Sizes, insist_on_room, needed, on_a_device, sizes_before, sizes_of, told
from tests import tiny

SEVEN = Sizes(7_000_000_000, 7_000_000_000, 200_000_000)
"""About Llama 2 7B and a layer of it."""

FULL = Experiment(FedCyBGD(), clients=4, cohort=2, engine=EngineSettings(stack=1))


def test_a_device_by_the_formulas() -> None:
    """ "full Adam 18M GB; block-wise 2M + 16·|block| GB": of 6.738e9 parameters and a block of 202.4e6, 121.3 -> 16.7 GB."""
    llama = Sizes(6_738_415_616, 6_738_415_616, 202_383_360)
    assert on_a_device(llama, low=True) / 1e9 == pytest.approx(16.7, abs=0.05)
    assert on_a_device(replace(llama, at_once=llama.model), low=True) / 1e9 == pytest.approx(121.3, abs=0.05)
    assert on_a_device(llama, low=False) == 4 * llama.model + 12 * llama.at_once


def test_this_machine_by_hand() -> None:
    """One device at a time: the model, a state of the server's, a message down as bytes and as tensors, a block up, eight numbers for each
    that is trained and the rest beside it."""
    by = dict(needed(Sizes(100, 100, 10, 3), replace(FULL, max_length=20)).lines)
    assert by["the model in float32"] == 400 and "the model in bf16" not in by
    assert by["the start and the server's state"] == 400, "the start is the model"
    assert by["messages of the devices that are asked together"] == 4 * (2 * 100 + 2 * 10)
    assert by["training a device"] == 4 * 8 * 10 + 4 * 90
    assert by["passing a batch through"] == 3 * 8 * 20
    low = dict(needed(Sizes(100, 100, 10), replace(FULL, precision="bf16")).lines)
    assert (low["the model in bf16"], low["training a device"]) == (200, 4 * 8 * 10 + 2 * 90)
    lora = dict(needed(Sizes(100, 6, 6), Experiment(FedAvg(), clients=50, cohort=5)).lines)
    assert lora["the start and the server's state"] == 4 * 6 * 2
    assert lora["messages of the devices that are asked together"] == 4 * 32 * 2 * 6, "evaluating asks a wave of 32"
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
    need = needed(SEVEN, FULL).total
    with pytest.raises(ExperimentError, match="needs about"):
        insist_on_room(SEVEN, FULL, there=10, free=need - 11)
    assert insist_on_room(SEVEN, FULL, there=10, free=need - 10).total == need
    assert insist_on_room(SEVEN, replace(FULL, engine=EngineSettings(stack=1, overcommit=True)), free=0).total == need
    assert "16·|θ|, |θ| = 200,000,000" in dict(told(needed(SEVEN, FULL), SEVEN))["memory on a device"]


PROBE = """
import sys
from pathlib import Path
from fedloom.model import loading
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
print(4 * sum(p.numel() for p in model.module.parameters()), peak[0] - before, model.alone)
own = {p.data_ptr() for p in model.module.parameters()}
assert all(t.data_ptr() in own for t in model.initial.values()), "the start is a second model"
"""


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_a_model_in_shards_is_loaded_without_a_second_one(tmp_path: Path) -> None:
    """A random Llama in bfloat16 shards. At no time are there two float32 models: its own bytes, a shard or so, and what libraries take."""
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
    probe = PROBE.replace("import threading", "from fedloom.model import loading as l; l.free_bytes = lambda _: 2**26\nimport threading")
    done = subprocess.run([sys.executable, "-c", probe, str(tmp_path)], capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr[-800:]
    own, peak, why = done.stdout.split(maxsplit=2)
    assert before is not None and 4 * before.model == pytest.approx(int(own), rel=0.01) and int(own) > 5 * 10**7
    assert int(peak) < 1.9 * int(own), (own, peak)
    assert "more than a quarter of the free memory" in why


def test_the_start_of_a_whole_model_is_the_model() -> None:
    """Not a copy of it; of an adapter it is one, which a model's own forward pass cannot change."""
    for kind, same in (("full", True), ("lora", False)):
        model = tiny.model(kind=kind)  # type: ignore[arg-type]
        own = dict(model.module.named_parameters())
        assert {own[model.parameters[n]].data_ptr() == t.data_ptr() for n, t in model.initial.items()} == {same}
