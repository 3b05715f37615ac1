"""Every kind of adapter: stacked equals one by one, methods take it or say why not, resumed and exported it is what it was."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForSequenceClassification

from fedloom.client.host import Host
from fedloom.client.store import ClientStore
from fedloom.compute.compute import Compute
from fedloom.compute.serial import Serial
from fedloom.compute.stacked import Stacked
from fedloom.compute.work import AdamW, Fit, Predict
from fedloom.engines.engine import drive
from fedloom.engines.local import Local
from fedloom.methods import all_methods, named
from fedloom.model.adapters import AdapterError, Kind, merged, saved_as, write_adapter
from fedloom.model.base import Model
from fedloom.model.texts import as_batch
from fedloom.server.participation import Pool
from tests import families, tiny

pytestmark = pytest.mark.no_cover
"""The same lines again for every method, kind or size: which lines are reached at all, other tests tell (conftest.py)."""

COVER: list[tuple[str, Kind]] = [
    ("bert", "full"), ("llama", "full"), ("roberta", "bitfit"), ("gpt2", "bitfit"), ("deberta-v2", "houlsby"), ("qwen2", "houlsby"),
    ("bert", "pfeiffer"), ("llama", "pfeiffer"), ("roberta", "ia3"), ("qwen2", "ia3"), ("gpt2", "full"), ("deberta-v2", "bitfit"),
    ("bert", "mixed"), ("gpt2", "mixed"),
]  # fmt: skip
"""Every kind with two families, every family with two kinds; LoRA has them all (conformance)."""


CANCELLED = ("self.key.bias", "self.pos_key_proj.bias")
"""A bias of attention's keys adds the same to a query's product with every key, which softmax cancels: of all that is trained, this alone
has no gradient (but rounding, which AdamW steps by)."""


def cancelled(name: str) -> bool:
    return name.endswith(CANCELLED)


@pytest.mark.parametrize(("family", "kind"), COVER)
def test_stacked_equals_one_by_one(family: str, kind: Kind) -> None:
    of = families.of_kind(family, kind)
    items = []
    for client, size in enumerate((5, 9, 1)):
        order = np.random.default_rng(client).permutation(size)
        batches = [order[at : at + 4] for at in range(0, size, 4)]
        start = families.moved(of, client, by=0.05)
        items.append(Fit(start, tiny.examples(size, seed=20 + client), batches, AdamW(1e-2, eps=1e-3, weight_decay=0.01, clip=0.5)))
    alone, together = Serial(of).run(items), Stacked(of).run(items)
    for one, other, item in zip(alone, together, items, strict=True):
        np.testing.assert_allclose(one.result.losses, other.result.losses, atol=1e-4)
        for name, tensor in one.result.tensors.items():
            torch.testing.assert_close(other.result.tensors[name], tensor, atol=3e-4, rtol=0)
        sizes = {n: float(t.abs().max()) for n, t in one.result.moments.first.items()}
        assert set(sizes) == set(item.start) and {n for n, size in sizes.items() if size < 1e-8} == set(filter(cancelled, sizes))
        assert all(not torch.equal(one.result.tensors[n], t) for n, t in item.start.items())
    assert not of.alone, f"{kind} on {family} runs one by one: {of.alone}"


@pytest.mark.parametrize("same", [True, False])
def test_predictions_of_whole_models_are_each_devices_own(same: bool) -> None:
    """Devices with equal tensors are predicted for as one; it shows in nothing but what is held at once."""
    of = families.of_kind("bert", "full")
    shards = [tiny.examples(size, seed=30 + size) for size in (5, 9, 1)]
    items = [Predict(families.moved(of, 0 if same else k, by=0.05), shard) for k, shard in enumerate(shards)]
    stacked, owners = Stacked(of), []
    together = of.together

    def seen(tensors: Mapping[str, torch.Tensor], *rest: Any, **more: Any) -> Any:
        owners.append(len(next(iter(tensors.values()))))
        return together(tensors, *rest, **more)

    of.together = seen  # type: ignore[method-assign]
    try:
        done = stacked.run(items)
    finally:
        del of.together
    for one, other in zip(Serial(of).run(items), done, strict=True):
        torch.testing.assert_close(other.result, one.result, atol=1e-5, rtol=0)
    assert owners == [1 if same else 3]


LORA_ONLY = {"fibecfed", "federa", "ffa", "fedsa", "fedsb", "rolora", "flora", "fedex", "flexlora", "hetlora", "flasc", "slora"}
LORA_ONLY |= {"adalora", "deltalora"}
MIXED_ONLY = {"fedalt"}
POOL = Pool((0, 1, 2), 2, 2, 8)


def ends(name: str, of: Model, compute: Compute) -> Mapping[str, torch.Tensor]:
    """What is shared after two rounds."""
    method, devices = named(name)(), tiny.clients((5, 9, 12))
    host = Host(method, lambda k: devices[k], compute, ClientStore(None), "kinds")
    engine = Local(host)
    state = drive(method.setup(method.init(of), POOL), engine)
    for _ in range(2):
        state = drive(method.round(state, POOL), engine)
    return state.shared


TAKING = [name for name in all_methods() if name not in {"centralised", "local"}]
BY_LAYERS = {"fedcybgd", "fedbavg", "handover", "embracingfl", "lisa"}
"""Who has to know in which layer a tensor of an adapter stands. To others one name is as another, which the largest kind shows."""


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        *((name, "full") for name in TAKING),
        *((name, "pfeiffer") for name in TAKING if name in {"lora", "galore", *BY_LAYERS, *LORA_ONLY, *MIXED_ONLY}),
    ],
)
def test_a_method_takes_a_kind_or_says_which_it_needs(name: str, kind: Kind) -> None:
    of = families.of_kind("bert", kind)
    if name in LORA_ONLY:
        with pytest.raises(ValueError, match=f"'{name}' works on LoRA's factors.*--adapter.kind lora"):
            named(name)().init(of)
        return
    if name in MIXED_ONLY:
        with pytest.raises(ValueError, match=f"'{name}' works on two LoRAs and their mixer.*--adapter.kind mixed"):
            named(name)().init(of)
        return
    if name == "galore" and kind != "full":
        with pytest.raises(ValueError, match="projects matrices of transformer layers to rank 4.*--adapter.kind full"):
            named(name)().init(of)
        return
    alone, together = (ends(name, of, compute) for compute in (Serial(of), Stacked(of)))
    assert set(alone) <= set(of.initial)
    still = {n for n, tensor in alone.items() if torch.equal(tensor, of.initial[n]) and not cancelled(n)}
    assert not still, "what is trained learns, all of it"
    off = torch.cat([(together[n] - tensor).flatten() for n, tensor in alone.items()])
    assert float(off.square().mean().sqrt()) < 1e-3, "lone scalars whose gradient is nothing may go either way; tensors may not"


def logits(of: Model, tensors: Mapping[str, torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
    text = tiny.examples(1, seed=8)
    batch = as_batch(vars(text.pad(np.array([0]), pad_id=0)), of.device)
    with torch.no_grad():
        return of.forward(tensors, batch, torch.float32)[0], batch.ids


@pytest.mark.parametrize(("family", "kind"), [("bert", "bitfit"), ("llama", "full"), ("bert", "ia3"), ("qwen2", "ia3")])
def test_a_whole_model_is_plain_and_says_the_same(family: str, kind: Kind, tmp_path: Path) -> None:
    of = families.of_kind(family, kind)
    at = families.moved(of, by=0.1)
    wanted, ids = logits(of, at)
    before = {name: p.detach().clone() for name, p in of.module.named_parameters()}
    merged(of.module, of.parameters, at).save_pretrained(tmp_path)
    again = AutoModelForSequenceClassification.from_pretrained(tmp_path).eval()
    with torch.no_grad():
        assert torch.allclose(again(input_ids=ids).logits, wanted, atol=2e-5)
    assert not torch.allclose(logits(of, {})[0], wanted, atol=1e-2)
    assert all(torch.equal(p, before[name]) for name, p in of.module.named_parameters()), "the shared base must stay as it is"


def test_plain_peft_loads_ia3(tmp_path: Path) -> None:
    of = families.of_kind("roberta", "ia3")
    at = families.moved(of, by=0.1)
    wanted, ids = logits(of, at)
    write_adapter(of.module, list(of.parameters), at, tmp_path, str(families.folder("roberta")))
    base = AutoModelForSequenceClassification.from_pretrained(families.folder("roberta"), num_labels=3, ignore_mismatched_sizes=True)
    with torch.no_grad():
        assert torch.allclose(PeftModel.from_pretrained(base, tmp_path).eval()(input_ids=ids).logits, wanted, atol=2e-5)


def test_what_cannot_be_exported_says_what_can(tmp_path: Path) -> None:
    full, narrow = families.of_kind("bert", "full"), families.of_kind("bert", "houlsby")
    with pytest.raises(AdapterError, match="bitfit and full are written as whole models"):
        write_adapter(full.module, list(full.parameters), full.initial, tmp_path / "a", "base")
    for inner, said in ((narrow, "bottleneck adapters"), (families.of_kind("bert", "mixed"), "mixed pairs")):
        with pytest.raises(AdapterError, match=f"{said} cannot be exported: no library loads them.*lora, ia3, bitfit, full"):
            merged(inner.module, inner.parameters, inner.initial)
        assert saved_as(inner.module) == ""
    scaled = families.of_kind("roberta", "ia3")
    with pytest.raises(AdapterError, match="without --merge"):
        merged(scaled.module, scaled.parameters, scaled.initial)
    assert not list(tmp_path.iterdir())
