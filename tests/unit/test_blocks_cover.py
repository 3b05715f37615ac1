"""The model cut into blocks: an ordered, disjoint cover for every family."""

from __future__ import annotations

from itertools import chain
from pathlib import Path
from typing import get_args

import pytest
import torch
from transformers import AutoModelForMaskedLM

from fedloom.methods.fedbavg import FedBAvg
from fedloom.methods.fedcybgd import FedCyBGD
from fedloom.model.adapters import Adapter
from fedloom.model.blocks import End, cover, in_attention
from fedloom.model.loading import load
from fedloom.model.names import is_head
from tests import families, tiny

FAMILIES = ("bert", "roberta", "deberta-v2", "modernbert", "gpt2", "llama", "qwen2", "mistral", "bloom")
BEHIND = {"bert": ["output"], "roberta": [], "deberta-v2": []}
"""What lies behind the layers and is no head, where it is not a norm alone. BERT's pooler is of the encoder."""


@pytest.mark.parametrize("family", FAMILIES)
def test_blocks_cover_the_model_once(family: str) -> None:
    of = families.of_kind(family, "full")
    head = [n for n in of.initial if is_head(n)]
    whole = cover(of.initial, ends=get_args(End), head=head)
    names = list(chain.from_iterable(block.names for block in whole))
    assert len(names) == len(set(names)) and {*names, *head} == set(of.initial)
    layers = cover(of.initial, head=head)
    assert [block.label for block in layers] == [f"layer {i}" for i in range(of.depth)]
    assert [block.label for block in whole if block.label.startswith("layer")] == [block.label for block in layers]
    assert whole[0].label == "embeddings" and all("embed" in n or "wte" in n or "wpe" in n for n in whole[0].names)
    behind = {block.label: block.names for block in whole[1 + of.depth :]}
    assert list(behind) == BEHIND.get(family, ["norm"])
    assert len(behind.get("norm", ())) in (0, 1, 2) and all("norm" in n or "ln_f" in n for n in behind.get("norm", ()))
    for end in get_args(End):
        assert cover(of.initial, ends=(end,), head=head) == [b for b in whole if b.label == end or b in layers], "one without the others"
    halves = cover(of.initial, "halves", head=head)
    assert [block.label for block in halves] == [f"layer {i}, {half}" for i in range(of.depth) for half in ("attention", "rest")]
    for layer, attention, rest in zip(layers, halves[::2], halves[1::2], strict=True):
        assert sorted(attention.names + rest.names) == list(layer.names)
        assert all(in_attention(n) for n in attention.names) and not any(in_attention(n) for n in rest.names)


def test_a_layers_number_is_no_prefix_of_anothers() -> None:
    names = ["m.layers.1.w", "m.layers.10.w", "m.layers.2.w", "score.weight"]
    assert [block.names for block in cover(names, head=["score.weight"])] == [("m.layers.1.w",), ("m.layers.2.w",), ("m.layers.10.w",)]


def test_a_norm_beside_the_attention_is_not_in_it() -> None:
    assert not in_attention("model.layers.0.post_attention_layernorm.weight")
    assert in_attention("model.layers.0.self_attn.q_proj.weight")
    assert in_attention("bert.encoder.layer.0.attention.output.dense.weight")


@pytest.mark.parametrize(("family", "there"), [("bert", ["embeddings", "output"]), ("llama", ["embeddings", "norm"])])
def test_an_end_that_the_model_has_not_is_refused_with_those_it_has(family: str, there: list[End]) -> None:
    of = families.of_kind(family, "full")
    assert FedCyBGD().init(of).server["changed"].shape == (of.depth,)
    assert FedCyBGD(ends=tuple(there)).init(of).server["changed"].shape == (of.depth + 2,)
    (missing,) = {*get_args(End)} - {*there}
    with pytest.raises(ValueError, match=rf"ends names {missing}, .* it has {' '.join(there)}$"):
        FedBAvg(inner=FedCyBGD(ends=(there[0], missing))).init(of)


def test_a_pooler_that_no_file_brought_is_trained_or_refused(tmp_path: Path) -> None:
    """It is drawn at random and stands before the head: frozen, nobody would ever make anything of it."""
    torch.manual_seed(5)
    AutoModelForMaskedLM.from_config(families.CONFIGS["bert"]()).save_pretrained(tmp_path)
    tiny.tokenizer().save_pretrained(tmp_path)
    of = load(str(tmp_path), num_labels=3, adapter=Adapter(kind="full"), max_length=16)
    pooler = {f"bert.pooler.dense.{end}" for end in ("weight", "bias")}
    assert of.fresh == pooler | of.head and not pooler & of.head
    for method in (FedCyBGD(), FedBAvg(inner=FedCyBGD(ends=("embeddings",)))):
        named = "embeddings output" if isinstance(method, FedBAvg) else "output"
        with pytest.raises(
            ValueError, match=rf"no file .*'bert\.pooler\.dense\.bias', .*--method\.ends {named} .*or a model whose files hold"
        ):
            method.init(of)
    state = FedCyBGD(ends=("output",)).init(of)
    assert pooler < state.shared.keys() and state.facts["blocks"] == ["layer 0", "layer 1", "output"]
    assert not families.of_kind("bert", "full").fresh - families.of_kind("bert", "full").head, "whose files have one"


def test_an_end_named_twice_is_refused() -> None:
    with pytest.raises(ValueError, match="twice: norm norm"):
        FedCyBGD(ends=("norm", "norm"))
