"""The frozen weights under LoRA's pairs, changed and trained: the same on both computes, for every family, and as the model gives it."""

from __future__ import annotations

from functools import cache

import pytest
import torch

from fedloom.compute.serial import Serial
from fedloom.compute.stacked import Stacked
from fedloom.compute.work import AdamW, Fit, Fitted, Predict, Pretrained, Score, WorkItem
from fedloom.messages import Tensors
from fedloom.model.base import Model
from fedloom.model.places import ModelError
from tests import families, tiny

FAMILIES = families.APART
SIZES = (5, 9, 4)


def shifted(tensors: Tensors, seed: int) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {n: t + 0.2 * t.abs().mean().clamp(min=0.05) * torch.randn(t.shape, generator=generator) for n, t in tensors.items()}


def held(model: Model, client: int) -> dict[str, torch.Tensor]:
    return shifted(model.initial, 20 + client)


@cache
def ground(family: str, seed: int = 1) -> dict[str, torch.Tensor]:
    return shifted(families.model(family).weights, seed)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_model_stands_on_what_an_item_names(family: str) -> None:
    """W in the item, B·A in it too: the logits are those of the module with that W in its place; then its own is back, to the bit."""
    model, texts = families.model(family), tiny.examples(6, seed=4)
    assert model.beneath.names and all(w.dim() == 2 for w in model.weights.values())
    at = held(model, 0)
    plain = Serial(model).run([Predict(at, texts)])[0].result
    for compute in (Serial(model), Stacked(model)):
        (changed,) = compute.run([Predict({**at, **ground(family)}, texts)])
        assert float((changed.result - plain).abs().max()) > 1e-2
        merged = model.module
        own = dict(merged.named_parameters())
        for name, weight in ground(family).items():
            there = own[name].T if name in model.beneath.transposed else own[name]
            assert torch.equal(there, weight), "it is standing on it now"
        (back,) = compute.run([Predict(at, texts)])
        assert all(torch.equal(own[n].T if n in model.beneath.transposed else own[n], w) for n, w in model.weights.items())
        torch.testing.assert_close(back.result, plain, atol=2e-5, rtol=0)
    assert (family == "gpt2") == bool(model.beneath.transposed)


@pytest.mark.parametrize("family", FAMILIES)
def test_weights_in_an_item_are_weights_and_pairs_are_added_to_them(family: str) -> None:
    """W + s·B·A given as W, with B = 0, is the function of W and the pair."""
    model, texts = families.model(family), tiny.examples(6, seed=4)
    at = held(model, 0)
    pairs = {n: t for n, t in at.items() if ".lora_" in n}
    ups = [n for n in pairs if ".lora_B." in n]
    under = {n: n.replace(".lora_B.", ".base_layer.") for n in ups}
    s = model.beneath.scaling
    assert s == 2.0
    merged = {under[n]: model.weights[under[n]] + s * pairs[n] @ pairs[n.replace(".lora_B.", ".lora_A.")] for n in ups}
    still = {n: torch.zeros_like(t) if n in ups else t for n, t in at.items()}
    one, other = Stacked(model).run([Predict(at, texts), Predict({**still, **merged}, texts)])
    torch.testing.assert_close(one.result, other.result, atol=1e-4, rtol=0)


@pytest.mark.parametrize("family", FAMILIES)
def test_stacked_and_one_by_one_agree_on_changed_and_on_trained_weights(family: str) -> None:
    """Clients on two different grounds and on none, and clients that train the weights themselves under a mask, in one call."""
    model = families.model(family)
    items: list[WorkItem] = []
    for k, size in enumerate(SIZES):
        texts = tiny.examples(size, seed=30 + k)
        on = [ground(family, 1), ground(family, 2), {}][k]
        rows = torch.arange(size)
        batches = [rows[:3].numpy(), rows[3:].numpy()]
        items.append(Fit(held(model, k), texts, batches, AdamW(1e-2), fixed=on))
        items.append(Score({**held(model, k), **on}, texts))
        items.append(Predict({**held(model, k), **on}, texts))
        mask = {n: (torch.rand(w.shape, generator=torch.Generator().manual_seed(k)) < 0.3).float() for n, w in model.weights.items()}
        heads = {n: t for n, t in held(model, k).items() if ".lora_" not in n}
        items.append(Fit({**heads, **ground(family, 1)}, texts, batches, AdamW(1e-2), mask=mask))
    for one, many in zip(Serial(model).run(items), Stacked(model).run(items), strict=True):
        assert (one.flops, one.examples) == (many.flops, many.examples)
        if isinstance(one.result, Fitted):
            for name, tensor in one.result.tensors.items():
                torch.testing.assert_close(many.result.tensors[name], tensor, atol=2e-4, rtol=0)
        else:
            torch.testing.assert_close(torch.as_tensor(many.result), torch.as_tensor(one.result), atol=5e-5, rtol=2e-4)


def test_pretrained_is_the_models_own_wherever_it_stands() -> None:
    model = families.model("gpt2")
    before = model.weights
    for compute in (Serial(model), Stacked(model)):
        compute.run([Predict({**held(model, 0), **ground("gpt2")}, tiny.examples(3))])
        done = compute.run([Pretrained(), Pretrained()])
        for one in done:
            assert (one.flops, one.examples) == (0.0, 0)
            assert one.result.keys() == before.keys() == set(model.beneath.names)
            assert all(torch.equal(one.result[n], before[n]) for n in before)
    wide = {n: tuple(w.shape) for n, w in before.items()}
    assert set(wide.values()) == {(48, 16)}, "(d_out, d_in), although GPT-2 keeps them the other way round"


def test_a_name_that_no_pair_stands_on_is_refused() -> None:
    model = families.model("bert")
    with pytest.raises(ModelError, match="no LoRA pair of .* stands on .*base_layer"):
        model.stand_on({"x.base_layer.weight": torch.zeros(2, 2)})
