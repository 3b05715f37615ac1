"""A run in 16 bits holds its model once, in 16 bits: by the bytes of live tensors."""

from __future__ import annotations

import gc
import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from fedloom.client.client import Client
from fedloom.client.host import Host
from fedloom.client.store import ClientStore
from fedloom.compute.serial import Serial, brings_a_model
from fedloom.compute.stacked import Stacked
from fedloom.compute.work import AdamW, Fit, Predict
from fedloom.messages import Failure, Task, Update
from fedloom.methods.fedavg import FedAvg
from fedloom.methods.fedcybgd import FedCyBGD
from fedloom.model.adapters import Adapter, merged
from fedloom.model.base import Model
from fedloom.model.loading import load
from fedloom.model.names import is_head
from fedloom.run.export import export
from fedloom.run.loop import run
from fedloom.wire import pack, unpack
from tests import families, small, tiny

LOW = torch.bfloat16


@pytest.fixture(autouse=True)
def only_what_comes() -> None:
    """What was there before a test is neither counted nor looked through."""
    gc.collect()
    gc.freeze()


def live() -> int:
    """Bytes of all tensors that came since, memory that several share counted once."""
    gc.collect()
    tensors = [of for of in gc.get_objects() if type(of) in (torch.Tensor, torch.nn.Parameter)]
    tensors = [of for of in tensors if of.device.type == "cpu" and not of.is_mkldnn]
    return sum({of.untyped_storage().data_ptr(): of.untyped_storage().nbytes() for of in tensors}.values())


def whole_of(model: Model) -> int:
    return sum(p.numel() for p in model.module.parameters())


def test_a_model_in_16_bits_takes_two_bytes_a_number() -> None:
    """Loaded and tried in float32, of which nothing is left: of LoRA the pairs' and the head's start; of a whole model its start."""
    tiny.model("bf16", kind="full")  # what a first load leaves for good
    for kind in ("lora", "full"):
        model = None
        before = live()
        model = tiny.model("bf16", kind=kind)  # type: ignore[arg-type]
        trained = sum(t.numel() for t in model.initial.values())
        unread = sum(p.numel() for n, p in model.module.named_parameters() if "pooler" in n) if kind == "full" else 0
        buffers = sum(b.nbytes for b in model.module.buffers())
        least = 2 * whole_of(model) + 4 * trained + buffers
        assert least <= live() - before <= least + 4 * unread + 2000, kind


def test_a_run_in_float32_holds_the_model_and_its_start_as_one() -> None:
    model = tiny.model(kind="full")
    assert model.base(model.dtype) is model.module and {p.dtype for p in model.module.parameters()} == {torch.float32}
    own = {p.data_ptr() for p in model.module.parameters()}
    assert all(t.data_ptr() in own for t in model.initial.values())


def test_positions_turn_by_the_same_angles_in_16_bits() -> None:
    """What a model computes for itself and no file holds is not rounded; what a file holds is."""
    low, plain = families.model("llama", precision="bf16"), families.model("llama")
    (found,), (wanted,) = ([b for n, b in of.module.named_buffers() if n.endswith("rotary_emb.inv_freq")] for of in (low, plain))
    assert found.dtype is torch.float32 and torch.equal(found, wanted)
    assert torch.equal(low.base(LOW).get_input_embeddings().weight, plain.module.get_input_embeddings().weight.to(LOW))  # type: ignore[operator]


def test_a_copy_made_while_the_model_stands_on_other_weights_has_all_of_their_bits() -> None:
    model = tiny.model("bf16")
    other = {n: t + 1e-4 for n, t in model.weights.items()}
    model.stand_on(other)
    own = dict(model.base(torch.float32).named_parameters())
    assert all(torch.equal(own[n], other[n]) for n in other) and not torch.equal(own[min(other)], own[min(other)].to(LOW).float())
    model.stand_on({})
    assert all(torch.equal(own[n], model.weights[n]) for n in other)


def test_what_is_lent_lies_in_the_models_places_and_the_start_is_there_again() -> None:
    model = tiny.model("bf16", kind="full")
    own, names = dict(model.base(LOW).named_parameters()), [n for n in model.initial if ".layer." in n]
    lent = {n: (model.initial[n] + 1).to(LOW) for n in names}
    before = {n: p.detach().clone() for n, p in own.items()}
    held = live()
    with pytest.raises(KeyError, match="stop"), model.lent(lent, LOW):
        assert all(own[model.parameters[n]].data_ptr() == lent[n].data_ptr() for n in names), "not copied"
        assert live() == held - sum(t.nbytes for t in lent.values()), "what lay there is not kept"
        raise KeyError("stop")
    assert all(torch.equal(p, before[n]) for n, p in own.items())


def block_of(model: Model, layer: int) -> list[str]:
    return [n for n in model.initial if f".layer.{layer}." in n]


def an_item(model: Model, fixed: dict[str, torch.Tensor]) -> Fit:
    start = {n: model.initial[n] for n in (*block_of(model, 0), *filter(is_head, model.initial))}
    return Fit(start, tiny.examples(8), [np.arange(4), np.arange(4, 8)] * 2, AdamW(1e-2), fixed=fixed)


def test_a_device_that_brings_its_model_trains_as_if_it_were_given_beside() -> None:
    """To the bit, by both computes; and an item that brings little is given it beside, and in float32 every one is."""
    model, plain = tiny.model("bf16", kind="full", layers=6), tiny.model(kind="full", layers=6)
    generator = torch.Generator().manual_seed(4)
    theirs = {n: t + 0.1 * torch.randn(t.shape, generator=generator) for n, t in model.initial.items()}
    item = an_item(model, {n: t for layer in range(1, 6) for n, t in theirs.items() if n in block_of(model, layer)})
    assert brings_a_model(item, model) and not brings_a_model(item, plain)
    few = replace(item, fixed={n: theirs[n] for n in block_of(model, 1)})
    assert not brings_a_model(few, model) and not brings_a_model(replace(item, through=dict), model)
    beside = Serial(model)._trained(item)
    for found in (Serial(model)._fit(item), Stacked(model).run([item])[0].result):
        assert all(torch.equal(found.tensors[n], t) for n, t in beside.tensors.items()) and np.array_equal(found.losses, beside.losses)
    own = Serial(model)._fit(replace(item, fixed={}))
    assert any(not torch.equal(own.tensors[n], t) for n, t in beside.tensors.items()), "what is brought decides nothing"


def deep() -> Model:
    """Six layers of 33,472 numbers."""
    return load(str(tiny.folder(6, 64)), num_labels=3, adapter=Adapter(kind="full"), seed=1, max_length=16, precision="bf16")


def turns(model: Model, folder: Path | None, frozen: torch.dtype, seen: Callable[[int, int], None] = lambda t, n: None) -> list[Update]:
    """One device's turns on all blocks of the model, as a host plays them: in each its block, the head and the block before come down."""
    method, updates = FedCyBGD(FedAvg(lr=1e-2, batch_size=4)), []
    texts = tiny.examples(8)
    host = Host(method, lambda k: Client(k, texts, texts, texts, 3, None, frozen), Stacked(model), ClientStore(folder), "d")
    heads = [*filter(is_head, model.initial)]
    for turn in range(model.depth + 1):
        at, before = turn % model.depth, (turn - 1) % model.depth
        names = [*block_of(model, at), *block_of(model, before), *heads]
        down = {n: model.initial[n] + 0.01 * (turn + 1) for n in names}
        blob = pack(Task("train", 0, down, {"block": block_of(model, at), "round": turn}), "d")
        seen(turn, len(blob))
        del down
        (answer,) = host.answer([blob])
        assert not isinstance(answer, Failure), answer
        updates.append(unpack(answer, "d"))
        assert set(updates[-1].tensors) == {*block_of(model, at), *heads}
        assert {t.dtype for t in updates[-1].tensors.values()} == {torch.float32}
    private, _ = host.store.load(0)
    assert {t.dtype for t in private.values()} == {frozen} and set(private) == {n for n in model.initial if ".layer." in n}
    return updates


def test_frozen_blocks_are_kept_in_the_runs_precision_and_train_the_same(tmp_path: Path) -> None:
    """A device keeps in two bytes a number what it does not train; its turns are, to the bit, those of one that keeps it in four."""
    model = tiny.model("bf16", kind="full", layers=6)
    half, wide = turns(model, tmp_path, LOW), turns(model, None, torch.float32)
    for one, other in zip(half, wide, strict=True):
        assert all(torch.equal(one.tensors[n], t) for n, t in other.tensors.items())
    size = sum(path.stat().st_size for path in tmp_path.iterdir())
    layers = sum(model.initial[n].numel() for n in model.initial if ".layer." in n)
    assert 2 * layers < size < 2 * layers + 20_000, "a file, in two bytes a number, and its names"


def test_a_turn_by_the_books(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """2·M + 16·|block| of a device that holds private blocks, at the last loss of a turn: the model with its blocks once, in 16 bits; of
    the block float32 itself, the gradient of the step before and two moments. Beside them what came down, in float32, and the block in
    16 bits as it came and as it is computed with."""
    model, held, came = deep(), [0], [0]
    inside: list[int] = []
    real = model.weighted

    def watched(*given: Any) -> torch.Tensor:
        inside.append(live() - held[0])
        return real(*given)

    def seen(turn: int, message: int) -> None:
        if turn == model.depth:  # by then the device holds every block
            held[0], came[0] = live(), message
            monkeypatch.setattr(model, "weighted", watched)

    turns(model, tmp_path, LOW, seen)
    block = sum(model.initial[n].numel() for n in (*block_of(model, 0), *filter(is_head, model.initial)))
    books, beside, most = 16 * block, came[0] + 2 * 2 * block, max(inside)
    assert books < most <= books + beside + 20_000, (most, books, beside)
    assert len(inside) > 1 and 20_000 < 2 * block < whole_of(model) / 2, "a second model, or a block, would be seen"


def test_in_16_bits_answers_are_those_of_the_same_tensors_in_16_bits() -> None:
    """A bf16 run predicts in bf16, with float32 tensors rounded once, by both computes alike."""
    model = tiny.model("bf16", kind="full")
    rounded = {n: t.to(LOW).float() for n, t in model.initial.items()}
    texts = tiny.examples(7)
    for compute in (Serial(model), Stacked(model)):
        one, other = (compute.run([Predict(at, texts)])[0].result for at in (model.initial, rounded))
        assert one.dtype is torch.float32 and torch.equal(one, other)


def test_a_merged_model_is_no_second_one() -> None:
    """The tensors themselves where a whole model was trained; of LoRA a copy of what pairs are merged into. In float32 all of it."""
    model = tiny.model(kind="full")
    at = {n: t + 1 for n, t in model.initial.items()}
    held = live()
    made: Any = merged(model.module, model.parameters, at)
    assert live() - held < 2000
    assert all(torch.equal(dict(made.named_parameters())[model.parameters[n]], t) for n, t in at.items())
    lora = tiny.model()
    held = live()
    made = merged(lora.module, lora.parameters, lora.initial)
    assert live() - held <= 4 * sum(t.numel() for t in lora.weights.values()) + 2000
    low = tiny.model("bf16")
    made = merged(low.module, low.parameters, low.initial)
    assert {p.dtype for p in made.parameters()} == {torch.float32} and {p.dtype for p in low.module.parameters()} == {LOW}


@pytest.mark.parametrize("name", ["lora", "fedcybgd"])
def test_an_exported_model_has_all_of_its_bits(name: str, tmp_path: Path) -> None:
    """What a bf16 run did not train is, in what is exported, the pre-trained model in float32; what it trained is the run's float32."""
    of = replace(small.experiment(name, rounds=2, evaluate_every=0), precision="bf16", clients=2, cohort=2)
    run(of, tmp_path / "run", plain=True)
    export(of, tmp_path / "run", tmp_path / "out", merge=True)
    trained = load_file(tiny.folder() / "model.safetensors")
    folders = [tmp_path / "out", *([tmp_path / "run" / "model"] if name == "fedcybgd" else [])]
    for folder in folders:
        found = load_file(folder / "model.safetensors")
        assert {t.dtype for t in found.values()} == {torch.float32}
        words = "bert.embeddings.word_embeddings.weight"
        assert torch.equal(found[words], trained[words]) and not torch.equal(found[words], trained[words].to(LOW).float())
        query = "bert.encoder.layer.0.attention.self.query.weight"
        assert not torch.equal(found[query], trained[query]) and not torch.equal(found[query], found[query].to(LOW).float())
        assert json.loads((folder / "config.json").read_text())["dtype"] == "float32"
