"""Layers left out of a model: as if they had never been in its list, for every family, on both computes; and then they are back."""

from __future__ import annotations

import copy
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from torch.func import functional_call

from fedloom.compute.serial import Serial
from fedloom.compute.stacked import Stacked
from fedloom.compute.work import AdamW, Fit
from fedloom.messages import Tensors
from fedloom.model.base import Model
from fedloom.model.blocks import layer_of
from fedloom.model.names import is_head
from fedloom.model.outputs import logits_of
from fedloom.model.places import ModelError
from tests import families, tiny

FAMILIES = families.APART


def shorter(model: Model, skips: set[int]) -> nn.Module:
    """The module with the layers deleted from its list: what no code of the package has touched."""
    made: Any = copy.deepcopy(model.module)
    stack = next(part for part in made.modules() if isinstance(part, nn.ModuleList) and len(part) == model.depth)
    for i in sorted(skips, reverse=True):
        del stack[i]
    part: Any
    for part in made.modules():
        if "config" in vars(part):
            part.config.num_hidden_layers = model.depth - len(skips)
    return made


def there(model: Model, skips: set[int]) -> dict[str, torch.Tensor]:
    return {n: t for n, t in families.moved(model, 1).items() if layer_of(n) not in skips}


@pytest.mark.parametrize("family", FAMILIES)
def test_a_layer_that_is_left_out_is_not_there(family: str) -> None:
    """The last layer, and the first: logits of one text, one by one and packed, are those of the module without it."""
    model = families.model(family)
    ids = torch.tensor([[2, 9, 17, 30, 3]])
    batch: Any = Serial(model).batch(tiny.examples(1, seed=8), np.array([0]))
    batch = batch._replace(ids=ids, mask=ids > 0, segments=ids * 0)
    for skips in ({model.depth - 1}, {0}):
        rename = {old: new for new, old in enumerate(i for i in range(model.depth) if i not in skips)}
        module = shorter(model, skips)
        kept = there(model, skips)
        named = {
            ".".join(str(rename[int(p)]) if p.isdigit() and int(p) == layer_of(n) else p for p in model.parameters[n].split(".")): t
            for n, t in kept.items()
        }
        with torch.no_grad():
            wanted = logits_of(functional_call(module, named, (), {"input_ids": ids, **({"use_cache": False} if model.causal else {})}))
            whole = model.forward(families.moved(model, 1), batch, torch.float32)[0]
            with model.skipping(skips, torch.float32):
                made = model.forward(kept, batch, torch.float32)[0]
            again = model.forward(families.moved(model, 1), batch, torch.float32)[0]
        torch.testing.assert_close(made, wanted.float(), atol=2e-5, rtol=0)
        assert float((made - whole).abs().max()) > 1e-3 and torch.equal(again, whole)


@pytest.mark.parametrize("family", FAMILIES)
def test_training_without_layers_stacked_and_one_by_one(family: str) -> None:
    """Clients that leave different layers out, or none, in one call; it costs fewer operations."""
    model = families.model(family)
    items = []
    for k, skips in enumerate(({model.depth - 1}, {0}, set[int](), {0})):
        texts, rest = tiny.examples(4 + k, seed=30 + k), there(model, skips)
        start: Tensors = {n: rest.pop(n) for n in sorted(rest)[1::2]}
        rows = np.arange(4 + k)
        items.append(Fit(start, texts, [rows[:3], rows[3:]], AdamW(1e-2, eps=1e-3), fixed=rest, skips=frozenset(skips)))
    heads = {n: t for n, t in families.moved(model, 1).items() if is_head(n)}
    for gone in ({0}, {1}):  # alike in all but what they leave out
        items.append(Fit(heads, tiny.examples(5, seed=40), [np.arange(5)], AdamW(1e-2, eps=1e-3), skips=frozenset(gone)))
    for item, one, many in zip(items, Serial(model).run(items), Stacked(model).run(items), strict=True):
        assert one.flops == many.flops
        for name, tensor in one.result.tensors.items():
            torch.testing.assert_close(many.result.tensors[name], tensor, atol=2e-4, rtol=0)
            assert not torch.equal(tensor, item.start[name])
        whole = Serial(model).flops.step(frozenset(item.start), 8)
        assert (Serial(model).flops.step(frozenset(item.start), 8, None, item.skips) < whole) == bool(item.skips)


def test_what_cannot_be_left_out_is_refused() -> None:
    model, texts = families.model("bert"), tiny.examples(3)
    with pytest.raises(ValueError, match=r"leaves the layers \[0\] out and names .*\.0\."):
        Fit(model.initial, texts, [np.arange(3)], AdamW(1e-2), skips=frozenset({0}))
    with pytest.raises(ModelError, match=r"has no layers \[7\] to leave out; it has 0 to"), model.skipping({7}, torch.float32):
        pass


def test_a_turn_costs_what_is_computed() -> None:
    model, texts = families.model("bert"), tiny.examples(3)
    rest = there(model, {0})
    items = [Fit(rest, texts, [np.arange(3)], AdamW(1e-2), skips=skips) for skips in (frozenset({0}), frozenset[int]())]
    without, whole = Serial(model).run(items)
    assert without.flops < 0.8 * whole.flops
