"""LoRA through PEFT: which tensors are trained, under which names, and what is written can be read by plain PEFT."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from peft import PeftModel, get_peft_model_state_dict
from peft.tuners.lora import LoraLayer
from safetensors.torch import load_file, save_file
from transformers import AutoModel, AutoModelForMaskedLM, AutoModelForSequenceClassification

from fedloom.model.adapters import Adapter, AdapterError, Kind, attach, merged, trainable_names, write_adapter
from fedloom.model.blocks import layer_of, layers
from fedloom.model.loading import load
from fedloom.model.names import is_factor, partner
from fedloom.model.places import ModelError
from fedloom.model.texts import Batch, as_batch
from tests import families, tiny


def plain(family: str = "bert") -> torch.nn.Module:
    return AutoModelForSequenceClassification.from_pretrained(families.folder(family), attn_implementation="eager")


@pytest.mark.parametrize("family", families.CONFIGS)
def test_names_are_those_that_peft_saves(family: str) -> None:
    model = families.model(family)
    assert set(model.initial) == set(get_peft_model_state_dict(model.module))
    own = dict(model.module.named_parameters())
    assert all(torch.equal(own[parameter], model.initial[saved]) for saved, parameter in model.parameters.items())
    assert {layer_of(name) for name in model.initial if is_factor(name)} == {0, 1}


@pytest.mark.parametrize("family", families.CONFIGS)
def test_factors_come_in_pairs_of_the_rank_and_b_starts_at_zero(family: str) -> None:
    initial = families.model(family).initial
    factors = [name for name in initial if is_factor(name)]
    assert factors
    for name in factors:
        other = partner(name)
        assert partner(other) == name
        assert other in initial
        assert initial[name].shape[0 if ".lora_A." in name else 1] == 2
        assert bool(initial[name].any()) == (".lora_A." in name)


def test_query_and_value_by_default_and_what_is_named_otherwise() -> None:
    assert {n.split(".lora")[0].rsplit(".", 1)[-1] for n in families.model("bert").initial if is_factor(n)} == {"query", "value"}
    made = attach(plain(), Adapter(rank=3, targets=("key", "intermediate.dense")))
    found = {n.split(".lora")[0].split("layer.0.")[-1] for n in trainable_names(made) if is_factor(n) and ".0." in n}
    assert found == {"attention.self.key", "intermediate.dense"}


def test_the_scaling_is_alpha_over_rank() -> None:
    made = attach(plain(), Adapter(rank=2, alpha=5.0))
    assert {m.scaling["default"] for m in made.modules() if isinstance(m, LoraLayer)} == {2.5}


def test_a_target_that_does_not_exist_lists_the_linear_modules() -> None:
    with pytest.raises(AdapterError, match=r"targets \['q_prjo'\] for BertFor.*--adapter.targets .*'intermediate|'key'") as said:
        attach(plain(), Adapter(targets=("q_prjo",)))
    for end in ("query", "key", "value", "dense", "classifier"):
        assert f"'{end}'" in str(said.value)
    with pytest.raises(AdapterError, match=r"'c_attn'"):
        attach(plain("gpt2"), Adapter(targets=("q_prjo",)))


def test_an_architecture_without_defaults_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    model = plain("bert")
    monkeypatch.setattr(type(model.config), "model_type", "something-new")
    with pytest.raises(AdapterError, match=r"no known default targets for BertFor"):
        attach(model, Adapter())


@pytest.mark.parametrize("adapter", [Adapter(rank=0), Adapter(rank=-3), Adapter(dropout=1.0), Adapter(dropout=-0.1)])
def test_impossible_settings(adapter: Adapter) -> None:
    with pytest.raises(AdapterError, match="rank >= 1 and 0 <= dropout < 1"):
        attach(plain(), adapter)


@pytest.mark.parametrize("alpha", [0.0, -16.0, float("nan"), float("inf")])
def test_an_alpha_by_which_nothing_is_learnt(alpha: float) -> None:
    with pytest.raises(AdapterError, match=f"needs alpha > 0, .* got alpha {alpha}"):
        attach(plain(), Adapter(alpha=alpha))


def test_other_trainable_tensors_than_peft_saves_are_noticed() -> None:
    made = attach(plain(), Adapter())
    next(p for n, p in made.named_parameters() if "LayerNorm" in n).requires_grad_(True)
    with pytest.raises(AdapterError, match=r"PEFT saves other tensors than are trained: .*LayerNorm"):
        trainable_names(made)


def test_partner_of_what_is_no_factor() -> None:
    with pytest.raises(ValueError, match="'classifier.weight' is no LoRA factor"):
        partner("classifier.weight")


def test_layers_are_whole_numbers_not_prefixes() -> None:
    names = ["m.layers.10.q", "m.layers.1.q", "m.layers.1.a", "head.weight", "m.layers.2x.q"]
    assert layers(names) == {1: ["m.layers.1.a", "m.layers.1.q"], 10: ["m.layers.10.q"]}
    assert layer_of("head.weight") is None


KINDS: dict[str, tuple[Kind, ...]] = {"deberta-v3": ("bitfit", "full"), "modernbert": ("houlsby", "full")}
BEFORE_THE_HEAD = {
    "deberta-v2": ["pooler.dense.weight", "pooler.dense.bias"],
    "deberta-v3": ["pooler.dense.weight", "pooler.dense.bias"],
    "modernbert": ["head.dense.weight", "head.norm.weight"],
}


@pytest.mark.parametrize("family", families.CONFIGS)
def test_what_a_checkpoint_does_not_bring_is_head(family: str, tmp_path: Path) -> None:
    """A body without a head, loaded to classify: all that is new is trained and counted as head, and what comes after the body is its own
    again in a folder that PEFT loads. BERT's own pooler is of its body; where the files lack it, it is head too."""
    torch.manual_seed(5)
    body = AutoModel.from_config(families.CONFIGS[family]())
    body.save_pretrained(tmp_path / "body")
    tiny.tokenizer().save_pretrained(tmp_path / "body")
    _, found = AutoModelForSequenceClassification.from_pretrained(tmp_path / "body", num_labels=3, output_loading_info=True)
    assert set(BEFORE_THE_HEAD.get(family, ())) <= found["missing_keys"]
    adapter = Adapter(rank=2, targets=families.TARGETS.get(family, ()))
    of = load(str(tmp_path / "body"), num_labels=3, adapter=adapter, max_length=16)
    assert {n.removeprefix("base_model.model.") for n in of.head} == found["missing_keys"]
    assert all(is_factor(n) for n in set(of.initial) - of.head)
    moved = families.moved(of)
    write_adapter(of.module, of.initial, moved, tmp_path / "adapter", str(tmp_path / "body"))
    torch.manual_seed(6)
    other = AutoModelForSequenceClassification.from_pretrained(tmp_path / "body", num_labels=3, attn_implementation="eager")
    other.config.pad_token_id = -1
    loaded = PeftModel.from_pretrained(other, tmp_path / "adapter").eval()
    ids = torch.tensor([[2, 9, 17, 33, 3]])
    batch = Batch(ids, ids > 0, torch.zeros_like(ids), ids[:, 0] * 0, torch.ones(1))
    with torch.no_grad():
        torch.testing.assert_close(loaded(input_ids=ids).logits, of.forward(moved, batch, torch.float32)[0], atol=1e-5, rtol=1e-5)
    if family in ("deberta-v3", "modernbert"):
        for kind in KINDS[family]:
            assert (
                load(str(tmp_path / "body"), num_labels=3, adapter=Adapter(rank=2, kind=kind), max_length=16).head == found["missing_keys"]
            )


def test_a_pooler_that_the_files_lack_is_head_and_a_layer_that_they_lack_is_refused(tmp_path: Path) -> None:
    torch.manual_seed(5)
    AutoModelForMaskedLM.from_config(families.CONFIGS["bert"]()).save_pretrained(tmp_path)
    tiny.tokenizer().save_pretrained(tmp_path)
    of = load(str(tmp_path), num_labels=3, adapter=Adapter(rank=2), max_length=16)
    new = {f"base_model.model.{n}.{end}" for n in ("classifier", "bert.pooler.dense") for end in ("weight", "bias")}
    assert of.head == new and all(is_factor(n) for n in set(of.initial) - new)
    assert of.fresh == new, "which of what is trained no file brought"
    held = load_file(tmp_path / "model.safetensors")
    save_file({n: t for n, t in held.items() if "layer.1.attention" not in n}, tmp_path / "model.safetensors", {"format": "pt"})
    with pytest.raises(
        ModelError, match=r"brings no bert\.encoder\.layer\.1\.attention.* …: of a model that is adapted only the head may be new"
    ):
        load(str(tmp_path), num_labels=3, adapter=Adapter(rank=2), max_length=16)


@pytest.mark.parametrize("family", ["bert", "deberta-v2", "llama", "gpt2"])
def test_plain_peft_loads_what_was_written_with_the_same_logits(family: str, tmp_path: Path) -> None:
    model = load(str(families.folder(family)), num_labels=2, adapter=Adapter(rank=2, alpha=4.0), max_length=16)
    at = families.moved(model)
    write_adapter(model.module, list(model.parameters), at, tmp_path / "out", str(families.folder(family)))
    loaded = PeftModel.from_pretrained(plain(family), tmp_path / "out").eval()
    text = tiny.examples(1, seed=8)
    batch = as_batch(vars(text.pad(np.array([0]), pad_id=0)), model.device)
    with torch.no_grad():
        wanted, _ = model.forward(at, batch, torch.float32)
        assert torch.allclose(loaded(input_ids=batch.ids).logits, wanted, atol=1e-5)
        assert not torch.allclose(model.forward({}, batch, torch.float32)[0], wanted, atol=1e-2)
    config = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    assert (config["r"], config["lora_alpha"], config["inference_mode"]) == (2, 4.0, True)
    assert config["base_model_name_or_path"] == str(families.folder(family))


def test_pairs_of_several_ranks_are_written_with_the_highest_and_the_same_scale(tmp_path: Path) -> None:
    """And merged as they are: a pair has the rank that it comes with."""
    adapter, generator = Adapter(rank=2, alpha=4.0), torch.Generator().manual_seed(4)
    model = load(str(families.folder("bert")), num_labels=2, adapter=adapter, max_length=16)
    at = families.moved(model)
    for rank, down in enumerate([name for name in at if ".lora_A." in name][1:], 1):  # the adapter's own rank 2, then 1, 2, 3
        at[down] = torch.randn(rank, at[down].shape[1], generator=generator)
        at[partner(down)] = torch.randn(len(at[partner(down)]), rank, generator=generator)
    text = tiny.examples(1, seed=8)
    batch = as_batch(vars(text.pad(np.array([0]), pad_id=0)), model.device)
    write_adapter(model.module, list(model.parameters), at, tmp_path / "out", str(families.folder("bert")))
    loaded, made = PeftModel.from_pretrained(plain(), tmp_path / "out").eval(), merged(model.module, model.parameters, at)
    with torch.no_grad():
        wanted, _ = model.forward(at, batch, torch.float32)
        assert torch.allclose(loaded(input_ids=batch.ids).logits, wanted, atol=1e-4)
        assert torch.allclose(made(input_ids=batch.ids).logits, wanted, atol=1e-4)
        assert not torch.allclose(model.forward({}, batch, torch.float32)[0], wanted, atol=1e-2)
    config = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    assert (config["r"], config["lora_alpha"]) == (3, 6.0), "s is 2, as it was"


@pytest.mark.parametrize("family", families.CONFIGS)
def test_merged_is_a_plain_model_with_the_same_logits(family: str) -> None:
    model = families.model(family)
    at = families.moved(model)
    before = {name: p.detach().clone() for name, p in model.module.named_parameters()}
    text = tiny.examples(1, seed=8)
    batch = as_batch(vars(text.pad(np.array([0]), pad_id=0)), model.device)
    plain_model = merged(model.module, model.parameters, at)
    assert not [name for name, _ in plain_model.named_parameters() if "lora" in name]
    with torch.no_grad():
        wanted, _ = model.forward(at, batch, torch.float32)
        assert torch.allclose(plain_model(input_ids=batch.ids).logits, wanted, atol=2e-5)
    assert all(torch.equal(p, before[name]) for name, p in model.module.named_parameters()), "the shared base must stay as it is"
    with pytest.raises(AdapterError, match=r"exactly the trained tensors"):
        merged(model.module, model.parameters, dict(list(at.items())[1:]))


def test_a_tensor_too_few_or_too_many_is_not_written(tmp_path: Path) -> None:
    model = families.model("bert")
    lacking = dict(list(model.initial.items())[1:])
    with pytest.raises(AdapterError, match=r"exactly the trained tensors; these differ: .*lora_A"):
        write_adapter(model.module, list(model.parameters), lacking, tmp_path / "out", "x")
    with pytest.raises(AdapterError, match=r"\['stranger'\]"):
        write_adapter(model.module, list(model.parameters), {**model.initial, "stranger": torch.ones(1)}, tmp_path / "out", "x")
    assert not (tmp_path / "out").exists()
