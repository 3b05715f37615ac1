"""What each kind of adapter trains, and its gradient, against the plain Hugging Face model and formulas written out."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any, get_args

import numpy as np
import pytest
import torch
from torch.nn import functional
from transformers import AutoConfig, AutoModelForSequenceClassification

from fedloom.compute.serial import Serial
from fedloom.compute.work import AdamW, Fit
from fedloom.data.examples import Examples
from fedloom.model import loading
from fedloom.model.adapters import Adapter, AdapterError, Kind, attach
from fedloom.model.base import Model
from fedloom.model.blocks import layer_of
from fedloom.model.names import is_head
from fedloom.model.texts import Batch
from tests import families, tiny

FAMILIES = ("bert", "roberta", "deberta-v2", "modernbert", "gpt2", "llama", "qwen2", "bloom")


@cache
def plain(family: str) -> Any:
    """The model as the library loads it, with the same fresh head."""
    folder = families.folder(family)
    kwargs: dict[str, Any] = {"num_labels": 3, "attn_implementation": "eager", "ignore_mismatched_sizes": True}
    return AutoModelForSequenceClassification.from_pretrained(folder, **kwargs).eval()


def batch(of: Model, rows: int = 4, length: int = 9) -> Batch:
    generator = torch.Generator().manual_seed(5)
    ids = torch.randint(5, 60, (rows, length), generator=generator)
    return Batch(ids, torch.ones_like(ids, dtype=torch.bool), torch.zeros_like(ids), torch.arange(rows) % 3, torch.ones(rows))


def gradients(of: Model, at: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    now = {name: tensor.clone().requires_grad_() for name, tensor in at.items()}
    return dict(zip(now, torch.autograd.grad(of.loss(now, batch(of), torch.float32), list(now.values())), strict=True))


def own_call(of: Model, module: Any) -> torch.Tensor:
    """The module's own plain call."""
    b = batch(of)
    return module(input_ids=b.ids, attention_mask=b.mask.long()).logits


@pytest.mark.parametrize("family", FAMILIES)
def test_full_trains_every_weight_that_the_loss_reaches_with_the_librarys_own_gradient(family: str) -> None:
    of = families.of_kind(family, "full")
    module = plain(family)
    own = dict(module.named_parameters())
    assert {n: tuple(t.shape) for n, t in of.initial.items()}.items() <= {n: tuple(p.shape) for n, p in own.items()}.items()
    with torch.no_grad():
        for name, tensor in of.initial.items():
            own[name].copy_(tensor)
    module.zero_grad()
    functional.cross_entropy(own_call(of, module), batch(of).labels).backward()
    reached = {name for name, p in own.items() if p.grad is not None}
    assert set(of.initial) == reached
    for name, made in gradients(of, of.initial).items():
        torch.testing.assert_close(made, own[name].grad, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("family", ["bert", "roberta", "deberta-v2", "gpt2", "qwen2"])
def test_bitfit_trains_the_biases_and_the_head_and_nothing_else(family: str) -> None:
    of = families.of_kind(family, "bitfit")
    reached = set(families.of_kind(family, "full").initial)
    assert any(is_head(n) for n in reached)
    assert set(of.initial) == {n for n in reached if n.endswith(".bias") or n.startswith(("classifier.", "score."))}
    whole = gradients(families.of_kind(family, "full"), families.of_kind(family, "full").initial)
    for name, made in gradients(of, of.initial).items():
        torch.testing.assert_close(made, whole[name], atol=1e-6, rtol=1e-5)


def test_bitfit_of_a_model_without_biases_is_refused() -> None:
    with pytest.raises(AdapterError, match="bitfit trains biases.*Llama.*has none.*lora, ia3, houlsby, pfeiffer, full"):
        families.of_kind("llama", "bitfit")


BOTTLENECKS = {
    "bert": ("attention.output.dense", "output.dense"),
    "roberta": ("attention.output.dense", "output.dense"),
    "deberta-v2": ("attention.output.dense", "output.dense"),
    "modernbert": ("attn.Wo", "mlp.Wo"),
    "gpt2": ("attn.c_proj", "mlp.c_proj"),
    "llama": ("self_attn.o_proj", "mlp.down_proj"),
    "qwen2": ("self_attn.o_proj", "mlp.down_proj"),
    "bloom": ("self_attention.dense", "mlp.dense_4h_to_h"),
}


@pytest.mark.parametrize("kind", ["houlsby", "pfeiffer"])
@pytest.mark.parametrize("family", FAMILIES)
def test_a_bottleneck_starts_as_the_model_and_adds_up_gelu_down(family: str, kind: Kind) -> None:
    """y + W_up gelu(W_down y + b_down) + b_up, after the feed-forward's output projection, and after attention's too for houlsby."""
    of, module = families.of_kind(family, kind), plain(family)
    places = BOTTLENECKS[family] if kind == "houlsby" else BOTTLENECKS[family][1:]
    names = sorted(n for n in of.initial if not is_head(n))
    parts = ("down.weight", "down.bias", "up.weight", "up.bias")
    ends = {n.split(f".{layer_of(n)}.")[1] for n in names}
    assert ends == {f"{place}.{part}" for place in places for part in parts}
    assert {layer_of(n) for n in names} == {0, 1}
    with torch.no_grad():
        for name, tensor in of.initial.items():
            if is_head(name):
                dict(module.named_parameters())[name].copy_(tensor)
    torch.testing.assert_close(of.forward(of.initial, batch(of), torch.float32)[0], own_call(of, module), atol=1e-5, rtol=1e-5)
    at = families.moved(of)
    hooks = []
    modules = dict(module.named_modules())
    for name in [n for n in names if n.endswith("down.weight")]:
        stem = name.removesuffix(".down.weight")
        w = [at[f"{stem}.{part}"] for part in parts]

        def add(_: Any, __: Any, y: torch.Tensor, w: list[torch.Tensor] = w) -> torch.Tensor:
            return y + functional.gelu(y @ w[0].T + w[1]) @ w[2].T + w[3]

        hooks.append(modules[stem].register_forward_hook(add))
    own = dict(module.named_parameters())
    with torch.no_grad():
        for name, tensor in at.items():
            if is_head(name):
                own[name].copy_(tensor)
    made = of.forward(at, batch(of), torch.float32)[0]
    wanted = own_call(of, module)
    for hook in hooks:
        hook.remove()
    torch.testing.assert_close(made, wanted, atol=1e-4, rtol=1e-4)
    assert (
        float((made - of.forward({**of.initial, **{n: t for n, t in at.items() if is_head(n)}}, batch(of), torch.float32)[0]).abs().max())
        > 1e-2
    )


@pytest.mark.parametrize("family", ["bert", "gpt2", "llama", "qwen2"])
def test_ia3_scales_keys_values_and_the_feed_forward(family: str) -> None:
    of = families.of_kind(family, "ia3")
    scales = {n: t for n, t in of.initial.items() if not is_head(n)}
    assert scales
    assert all(bool((t == 1).all()) for t in scales.values())
    assert {layer_of(n) for n in scales} == {0, 1}


def test_what_no_loss_reaches_is_not_trained(monkeypatch: pytest.MonkeyPatch) -> None:
    due = set(families.of_kind("bert", "full").initial)

    def with_an_idle_weight(module: Any, adapter: Adapter, *how: bool) -> Any:
        module.register_parameter("idle", torch.nn.Parameter(torch.ones(2)))
        return attach(module, adapter, *how)

    monkeypatch.setattr(loading, "attach", with_an_idle_weight)
    of = loading.load(str(families.folder("bert")), num_labels=3, adapter=Adapter(kind="full"), max_length=16)
    assert "idle" in dict(of.module.named_parameters())
    assert set(of.initial) == set(of.parameters) == due


@pytest.mark.parametrize("kind", [kind for kind in get_args(Kind) if kind != "auto"])
def test_what_is_trained_moves_in_one_step(kind: Kind) -> None:
    """An optimiser that was made before what it is to train would leave it where it is."""
    of = families.of_kind("bert", kind)
    at = families.moved(of)
    ids = torch.randint(5, 60, (4, 9), generator=torch.Generator().manual_seed(5)).tolist()
    (made,) = Serial(of).run([Fit(at, Examples.of(ids, [0, 1, 2, 0]), [np.arange(4)], AdamW(1e-2))])
    assert made.result.tensors.keys() == of.initial.keys()
    still = {n for n, t in made.result.tensors.items() if torch.equal(t, at[n])}
    assert not still


@pytest.mark.parametrize("kind", ["houlsby", "pfeiffer"])
def test_a_bottleneck_has_no_place_where_projections_are_called_otherwise(kind: Kind, tmp_path: Path) -> None:
    config = AutoConfig.for_model("distilbert", vocab_size=70, dim=16, hidden_dim=32, n_layers=2, n_heads=2, max_position_embeddings=40)
    AutoModelForSequenceClassification.from_config(config).save_pretrained(tmp_path)
    tiny.tokenizer().save_pretrained(tmp_path)
    match = rf"{kind} has no place: DistilBert.* calls the output projections .* Other kinds: lora, .*bitfit"
    with pytest.raises(AdapterError, match=match):
        loading.load(str(tmp_path), num_labels=3, adapter=Adapter(rank=2, kind=kind), seed=1, max_length=16)
