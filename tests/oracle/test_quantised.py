"""A frozen base in 8 or 4 bits (QLoRA 2305.14314): its numbers by NumPy, its products beside dense ones, what is held, what trains on it.

The base of every comparison is made here: a model's folder whose frozen layers hold what int8 or nf4 makes of them, written in float32.
"""

from __future__ import annotations

import gc
import json
import logging
import shutil
import weakref
from dataclasses import replace
from functools import cache
from pathlib import Path
from tempfile import mkdtemp
from typing import Any

import numpy as np
import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file
from scipy.stats import norm
from torch import nn
from torch.func import grad, vmap
from transformers import AutoModelForSequenceClassification

from fedloom.compute.flops import Flops, start_operations
from fedloom.compute.serial import Serial
from fedloom.compute.stacked import Stacked
from fedloom.compute.work import AdamW, Fit, Predict, Spectrum
from fedloom.methods import named
from fedloom.methods.fedavg import FedAvg
from fedloom.model.adapters import Adapter, AdapterError
from fedloom.model.base import Model, Precision
from fedloom.model.loading import load
from fedloom.model.memory import needs
from fedloom.model.names import is_down, is_factor, partner, under
from fedloom.model.places import ModelError
from fedloom.model.quantised import Base, Quantised, quantise, size_of
from fedloom.run.costs.memory import Sizes, needed, needed_there, on_a_device, sizes_before, sizes_of, told
from fedloom.run.experiment import Experiment
from fedloom.run.export import export, predictor_of
from fedloom.run.loop import run
from fedloom.run.starting import identity, stand_at, start_of
from fedloom.run.world import build
from tests import families, small, tiny

FEW: tuple[Base, ...] = ("int8", "nf4")
BLOCK = {"int8": 256, "nf4": 64}


# ---- by NumPy -----------------------------------------------------------------------------------------------------------------------


def nf4() -> np.ndarray:
    """QLoRA's sixteen levels: quantiles of the normal distribution, eight on the positive side, seven on the negative and zero, over the
    largest (section 3; its authors' offset .9677083)."""
    above, below = (norm.ppf(np.linspace(0.9677083, 0.5, count)[:-1]) for count in (9, 8))
    levels = np.sort(np.concatenate([above, [0.0], -below]))
    return levels / levels.max()


def by_numpy(weight: np.ndarray, base: Base) -> np.ndarray:
    """Q(W) in float64, block by block of the rows laid one after another."""
    flat, made = weight.astype(np.float64).reshape(-1), []
    for at in range(0, len(flat), BLOCK[base]):
        block = flat[at : at + BLOCK[base]]
        c = np.abs(block).max()
        if base == "int8":
            made.append(np.rint(127 * block / c) * c / 127)
        else:
            levels = nf4()
            made.append(c * levels[np.abs(block[:, None] / c - levels).argmin(1)])
    return np.concatenate(made).reshape(weight.shape)


def layer(base: Base, d_out: int = 24, d_in: int = 40, bias: bool = True) -> tuple[Quantised, torch.Tensor]:
    """A quantised layer and the weight that it was made from."""
    torch.manual_seed(d_out)
    plain = nn.Linear(d_in, d_out, bias=bias).requires_grad_(False)
    before = plain.weight.detach().clone()
    return Quantised(plain, base), before  # type: ignore[arg-type]


@pytest.mark.parametrize("shape", [(24, 40), (5, 7), (1, 300)], ids=str)
@pytest.mark.parametrize("base", FEW)
def test_the_numbers_are_those_of_the_paper(base: Base, shape: tuple[int, int]) -> None:
    q, weight = layer(base, *shape)
    np.testing.assert_allclose(q.weight().numpy(), by_numpy(weight.numpy(), base), atol=1e-6 * float(weight.abs().max()), rtol=0)
    lost = float((q.weight() - weight).abs().max() / weight.abs().max())
    assert 1e-4 < lost < {"int8": 0.005, "nf4": 0.16}[base], "and they are others than they were"


@pytest.mark.parametrize("taken", [False, True], ids=["", "with a pair taken out"])
@pytest.mark.parametrize("base", FEW)
def test_a_product_and_its_gradients_are_the_dense_ones(base: Base, taken: bool) -> None:
    """To 1e-6, by itself and under vmap, and gradients of gradients too."""
    q, _ = layer(base)
    generator = torch.Generator().manual_seed(1)
    draw = lambda *size: 0.3 * torch.randn(size, generator=generator)  # noqa: E731
    a, b, dense = draw(2, 40), draw(24, 2), q.weight().double()
    if taken:
        q.take_out(a, b, 1.5)
        dense = dense - 1.5 * b.double() @ a.double()
    torch.testing.assert_close(q.rest().double(), dense, atol=1e-7, rtol=0)
    x, bias = draw(3, 5, 40), q.bias.double()

    def curved(of: Any, rows: torch.Tensor) -> torch.Tensor:
        return torch.tanh(of(rows)).square().sum()

    exactly = lambda rows: nn.functional.linear(rows.double(), dense, bias)  # noqa: E731
    close: dict[str, Any] = {"atol": 1e-6, "rtol": 1e-6, "check_dtype": False}
    torch.testing.assert_close(q(x), exactly(x), **close)
    torch.testing.assert_close(q(x[0, :1]), exactly(x[0, :1]), **close)
    torch.testing.assert_close(grad(lambda r: curved(q, r))(x), grad(lambda r: curved(exactly, r))(x), **close)
    torch.testing.assert_close(vmap(q, in_dims=1, out_dims=1)(x), exactly(x), **close)
    torch.testing.assert_close(vmap(grad(lambda r: curved(q, r)))(x), grad(lambda r: curved(exactly, r))(x), **close)
    twice = [grad(lambda r, f=f: grad(lambda s: curved(f, s))(r).square().sum())(x) for f in (q, exactly)]
    assert float((twice[0] - twice[1]).abs().max()) <= 1e-5 * float(twice[1].abs().max())
    leaf = x.clone().requires_grad_(True)
    (alone,) = torch.autograd.grad(curved(q, leaf), leaf)
    torch.testing.assert_close(alone, grad(lambda r: curved(exactly, r))(x), **close)
    q.bias = None
    half = q(x.bfloat16())
    assert half.dtype is torch.bfloat16
    torch.testing.assert_close(half.double(), exactly(x) - bias, atol=0.03, rtol=0.02)


# ---- what is held ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("base", FEW)
def test_a_weight_takes_what_is_stated_and_none_is_there_between_products(base: Base) -> None:
    """65/64 and 9/16 bytes a number; a whole pass keeps no weight for its gradient, where a dense base does, and leaves none behind."""
    q, _ = layer(base, 64, 64, bias=False)
    assert sum(t.nbytes for t in q.held) == size_of(4096, base) == {"int8": 4096 * 65 // 64, "nf4": 4096 * 9 // 16}[base]
    assert not [*q.parameters()] and not q.state_dict()
    made: list[weakref.ref[torch.Tensor]] = []
    decode = Quantised.weight

    def watched(self: Quantised) -> torch.Tensor:
        made.append(weakref.ref(weight := decode(self)))
        return weight

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Quantised, "weight", watched)
        of = on(families.folder("bert"), base)
        Stacked(of).run([fit(of, 1)])
    gc.collect()
    assert len(made) >= 2 * len(of.quantised) and not any(weight() is not None for weight in made)
    shapes = {tuple(weight.shape) for weight in of.weights.values()} | {(16, 32), (32, 16)}
    assert len(kept_by(model("exact"), shapes)) > 8 and kept_by(of, shapes) == ["bert.pooler.dense.weight"]
    most = sum(-(-q.shape.numel() // 256) * size_of(256, base) for q in of.quantised.values())
    assert sum(t.nbytes for q in of.quantised.values() for t in q.held) <= most


def kept_by(of: Model, shapes: set[tuple[int, ...]]) -> list[str]:
    """What autograd keeps of a pass that is shaped like a weight: the name of one, or nothing's."""
    kept: list[torch.Tensor] = []
    now = {n: t.clone().requires_grad_(True) for n, t in of.initial.items()}
    batch = Serial(of).batch(tiny.examples(3, seed=1), np.arange(3))
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):  # type: ignore[func-returns-value]
        of.loss(now, batch, torch.float32)
    own = {p.untyped_storage().data_ptr(): n.removeprefix("base_model.model.") for n, p in of.module.named_parameters()}
    return [own.get(t.untyped_storage().data_ptr(), "") for t in kept if tuple(t.shape) in shapes]


# ---- a model on it --------------------------------------------------------------------------------------------------------------


@cache
def model(base: Base, family: str = "bert", kind: Any = "lora", start: Any = "zero", precision: Precision = "float32") -> Model:
    return on(families.folder(family), base, kind, start, precision)


def on(folder: Path, base: Base, kind: Any = "lora", start: Any = "zero", precision: Precision = "float32") -> Model:
    adapter = Adapter(rank=2, alpha=3.0, kind=kind, start=start, base=base)
    return load(str(folder), num_labels=3, adapter=adapter, seed=1, max_length=16, precision=precision)


@cache
def dense(base: Base, family: str = "bert") -> Path:
    """The family's folder with Q(W) for W, by NumPy, in its layers."""
    return rounded(families.folder(family), base)


def rounded(folder: Path, base: Base) -> Path:
    to = Path(mkdtemp()) / "dense"
    shutil.copytree(folder, to)
    tensors = load_file(folder / "model.safetensors")
    for name, tensor in tensors.items():
        if tensor.dim() == 2 and name.endswith("weight") and any(part in name for part in (".layer.", ".h.", ".layers.")):
            turned = ".h." in name and "c_" in name
            upright = tensor.T if turned else tensor
            low = torch.from_numpy(by_numpy(upright.contiguous().numpy(), base)).float()
            tensors[name] = (low.T if turned else low).contiguous()
    save_file(tensors, to / "model.safetensors", {"format": "pt"})
    return to


def fit(of: Model, client: int) -> Fit:
    """Three steps of a few texts; from the start."""
    count = (5, 12, 1, 9)[client]
    rows = np.arange(count)
    return Fit(of.initial, tiny.examples(count, seed=30 + client), [rows, rows[: count // 2 + 1], rows], AdamW(1e-2, eps=1e-4))


def apart(first: Any, second: Any) -> float:
    assert set(first) == set(second)
    return max(float((first[n] - second[n]).abs().max()) for n in first)


KINDS = {
    "lora": ("bert", "lora", "zero", "packed"),
    "singular vectors": ("bert", "lora", "svd", "packed"),
    "singular vectors, fast": ("bert", "lora", "fast-svd", "packed"),
    "gpt2": ("gpt2", "lora", "svd", "packed"),
    "rows": ("bloom", "lora", "zero", "padded rows"),
    "ia3": ("bert", "ia3", "zero", "vmap"),
}


@pytest.mark.parametrize("what", KINDS)
def test_training_on_it_is_training_on_its_numbers(what: str) -> None:
    """On the folder of dense Q(W), one by one; and the same stacked. With singular vectors: of Q(W) in both."""
    family, kind, start, way = KINDS[what]
    of, beside = model("nf4", family, kind, start), on(dense("nf4", family), "exact", kind, start)
    assert of.together_by == way and of.quantised and not beside.quantised
    items, others = ([fit(one, k) for k in range(4)] for one in (of, beside))
    alone, exact, many = Serial(of).run(items), Serial(beside).run(others), Stacked(of).run(items)
    for k in range(4):
        assert apart(alone[k].result.tensors, of.initial) > 1e-2
        assert apart(alone[k].result.tensors, exact[k].result.tensors) <= 3e-5
        assert apart(alone[k].result.tensors, many[k].result.tensors) <= 3e-5
    if way == "packed":
        for one, other in zip(Stacked(of, 1).run(items), many, strict=True):
            assert apart(one.result.tensors, other.result.tensors) == 0, "to the bit, whoever shares the pass"
    look = Predict(alone[1].result.tensors, tiny.examples(7, seed=3))
    (mine,), (theirs,) = Serial(of).run([look]), Serial(beside).run([look])
    torch.testing.assert_close(mine.result, theirs.result, atol=1e-5, rtol=0)
    if what == "lora":
        assert float((mine.result - Serial(model("exact")).run([look])[0].result).abs().max()) > 1e-3, "it is no other base"


def test_layers_on_it_can_be_computed_again() -> None:
    adapter = Adapter(rank=2, alpha=3.0, start="svd", base="nf4")
    again = load(str(families.folder("bert")), num_labels=3, adapter=adapter, seed=1, max_length=16, recompute=True)
    of = model("nf4", "bert", "lora", "svd")
    for compute in (Serial, Stacked):
        (wanted,), (made,) = compute(of).run([fit(of, 1)]), compute(again).run([fit(again, 1)])
        assert apart(made.result.tensors, wanted.result.tensors) <= 1e-6


def test_it_is_differentiated_twice() -> None:
    """Hessian-vector products, alone and under vmap, as on the dense folder."""
    item = Spectrum(model("nf4").initial, tiny.examples(6, seed=2), np.arange(6), probes=1, steps=3)
    one, many, exact = (
        compute.run([item])[0].result for compute in (Serial(model("nf4")), Stacked(model("nf4")), Serial(on(dense("nf4"), "exact")))
    )
    np.testing.assert_allclose(one.nodes, exact.nodes, rtol=1e-3, atol=1e-4)
    np.testing.assert_allclose(many.nodes, exact.nodes, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("base", FEW)
@pytest.mark.parametrize("family", ["bert", "gpt2"])
def test_federas_start_is_the_function_of_the_quantised_model(family: str, base: Base) -> None:
    """To 1e-5; A0 and B0 are the principal part of Q(W); and no code of the base is another than without them."""
    plain, of = model(base, family), model(base, family, "lora", "svd")
    look = tiny.examples(9, seed=4)
    for compute in (Serial, Stacked):
        before, now = (compute(one).run([Predict(one.initial, look)])[0].result for one in (plain, of))
        torch.testing.assert_close(now, before, atol=1e-5, rtol=0)
    moved = {n: t * 1.5 if is_factor(n) else t for n, t in of.initial.items()}
    assert float((Serial(of).run([Predict(moved, look)])[0].result - before).abs().max()) > 1e-3
    for a in filter(is_down, of.initial):
        q, untouched = of.quantised[under(a)], plain.quantised[under(a)]
        assert all(torch.equal(q.held[i], untouched.held[i]) for i in range(2)) and len(q.held) == 4
        weight = q.weight().numpy().astype(np.float64)
        u, s, v = np.linalg.svd(weight)
        principal = u[:, :2] * s[:2] @ v[:2]
        np.testing.assert_allclose(1.5 * of.initial[partner(a)].numpy() @ of.initial[a].numpy(), principal, atol=1e-5)
        np.testing.assert_allclose(of.weights[under(a)].numpy(), weight - principal, atol=1e-5)


def test_in_bf16_scales_keep_their_bits_and_the_start_is_the_same() -> None:
    plain, of, full = model("nf4", precision="bf16"), model("nf4", start="svd", precision="bf16"), model("nf4")
    assert all(torch.equal(a, b) for n, q in of.quantised.items() for a, b in zip(q.held[:2], full.quantised[n].held, strict=True))
    assert {p.dtype for p in of.module.parameters()} == {torch.bfloat16}
    look = tiny.examples(9, seed=4)
    before, now, exact = (Serial(one).run([Predict(one.initial, look)])[0].result for one in (plain, of, full))
    assert float((now - before).abs().max()) <= 0.05 and float((before - exact).abs().max()) <= 0.1
    codes = next(iter(of.quantised.values())).held[0]
    scored = [part for part in of.base(torch.float32).modules() if isinstance(part, Quantised)]
    assert any(part.held[0] is codes for part in scored), "a copy to score in shares what is in few bits"
    assert len(Stacked(of).run([fit(of, 0), fit(of, 1)])) == 2


@pytest.mark.parametrize("start", ["zero", "svd"])
def test_operations_are_those_of_a_dense_base_and_of_the_pair_taken_out(start: Any) -> None:
    of, exact = model("nf4", "bert", "lora", start), model("exact", "bert", "lora", start)
    added = 7 * sum(2 * 2 * sum(w.shape) for w in of.weights.values()) if start == "svd" else 0
    assert Flops(of).forward(7) == pytest.approx(float(Flops(exact).forward(7)) + added)
    assert start_operations(of) == start_operations(exact)
    if start == "zero":
        names = frozenset(of.initial)
        assert Flops(of).step(names, 7) == pytest.approx(float(Flops(exact).step(names, 7)))


# ---- what cannot be -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["full", "bitfit"])
def test_kinds_that_train_the_base_are_refused(kind: Any) -> None:
    with pytest.raises(AdapterError, match=rf"kind {kind} trains numbers of the base itself, .*adapter\.base nf4.*kind lora, ia3"):
        model("nf4", "bert", kind)
    with pytest.raises(LookupError, match="no frozen linear layer within the transformer layers of Sequential; of 0"):
        quantise(nn.Sequential(nn.ReLU()), "nf4")


@pytest.mark.parametrize("name", ["fedex", "flora", "deltalora", "slora", "fedsb"])
def test_methods_on_the_weights_under_the_pairs_say_that_they_cannot(name: str) -> None:
    with pytest.raises(ValueError, match=rf"'{name}' works on the weights under the pairs, and these are held in few bits.*adapter\.base"):
        named(name)().init(model("nf4"))
    named(name)().init(model("exact"))


def test_a_base_in_few_bits_stays_as_it_is() -> None:
    of = model("nf4")
    of.stand_on({})
    with pytest.raises(ModelError, match=r"held in few bits and stays as it is; leave --adapter\.base out"):
        of.stand_on(of.weights)


# ---- a run ----------------------------------------------------------------------------------------------------------------------


def experiment(name: str = "federa", base: Base = "nf4", **fields: Any) -> Experiment:
    return replace(small.experiment(name, **fields), adapter=Adapter(rank=2, alpha=6.0, base=base))


@cache
def ended() -> tuple[Experiment, Path, dict[str, Any]]:
    e, folder = experiment(evaluate_every=0), Path(mkdtemp()) / "run"
    return e, folder, run(e, folder, plain=True)


def test_a_run_that_is_stopped_and_resumed_ends_the_same(tmp_path: Path) -> None:
    e, _, done = ended()
    small.stopped(e, tmp_path / "run", 1)
    assert run(e, tmp_path / "run", plain=True)["final"] == done["final"]


def test_another_machines_start_is_taken_over() -> None:
    of = on(tiny.folder(), "nf4", start="svd")
    look, generator = tiny.examples(6, seed=8), torch.Generator().manual_seed(3)
    (before,) = Serial(of).run([Predict(of.initial, look)])
    near = {n: t * (1 + 3e-5 * torch.randn(t.shape, generator=generator)) for n, t in start_of(of).items()}
    assert "checkpoint's (A0, B0) are used" in stand_at(of, near, Path("there"))
    assert all(torch.equal(of.initial[n], t) for n, t in near.items())
    (now,) = Serial(of).run([Predict(of.initial, look)])
    torch.testing.assert_close(now.result, before.result, atol=4e-6, rtol=0)


def test_what_is_exported_says_what_the_run_says(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """The adapter on the dense folder of Q(W), in PEFT; and merged into these weights, in transformers. Both say what base it was."""
    e, folder, _ = ended()
    world = build(e)
    with caplog.at_level(logging.WARNING, "fedloom"):
        export(e, folder, tmp_path / "adapter")
        assert "trained on a base held in nf4; on the file's own weights it predicts a little otherwise" in caplog.text
        export(e, folder, tmp_path / "merged", merge=True)
        assert "the model is made of these weights, as the run had them" in caplog.text
    assert json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())["r"] == 4
    of, look = world.model, tiny.examples(1, seed=6)
    ids = torch.tensor(look.tokens.astype(np.int64))[None]
    base = AutoModelForSequenceClassification.from_pretrained(
        str(rounded(tiny.folder(), "nf4")), num_labels=3, ignore_mismatched_sizes=True
    )
    there = PeftModel.from_pretrained(base, str(tmp_path / "adapter"))
    merged = AutoModelForSequenceClassification.from_pretrained(str(tmp_path / "merged"))
    (wanted,) = Serial(of).run([Predict({**of.initial, **predictor_of(world, folder, None).tensors}, look)])
    for other in (there, merged):
        with torch.no_grad():
            torch.testing.assert_close(other.eval()(input_ids=ids).logits, wanted.result, atol=1e-5, rtol=0)


@pytest.mark.parametrize("start", ["zero", "svd"])
def test_a_device_must_hold_the_same_codes(start: Any, tmp_path: Path) -> None:
    """A weight of another code is another model, under a pair or not; so are the same weights held otherwise."""
    mine = identity(on(tiny.folder(), "nf4", start=start))
    assert identity(on(tiny.folder(), "nf4", start=start)) == mine != identity(on(tiny.folder(), "int8", start=start))
    for place, name in enumerate(("bert.encoder.layer.1.attention.self.query.weight", "bert.encoder.layer.0.output.dense.weight")):
        shutil.copytree(tiny.folder(), folder := tmp_path / str(place))
        tensors = load_file(folder / "model.safetensors")
        tensors[name].view(-1)[5] *= -1
        save_file(tensors, folder / "model.safetensors", {"format": "pt"})
        assert identity(on(folder, "nf4", start=start)) != mine


# ---- told -----------------------------------------------------------------------------------------------------------------------


def test_memory_is_told_by_hand() -> None:
    """Of 100 numbers 64 in nf4: 36 bytes beside 36 numbers as they are. Loading takes four bytes each, here but not on a GPU."""
    e = replace(Experiment(FedAvg(), clients=50, cohort=5, max_length=20), adapter=Adapter(base="nf4"))
    sizes = Sizes(100, 6, 6, few=64, base="nf4")
    assert sizes.held(4) == 4 * 36 + 36 and sizes.held(2) == 2 * 36 + 36
    assert dict(needed(sizes, e).lines)["the model in float32, its frozen layers in nf4"] == 4 * 36 + 36
    large = replace(sizes, model=10_000, few=9_984)
    assert needed(large, e).total == 40_000 and needed_there(large, e, 1).total < 10_000
    assert on_a_device(sizes, low=True) == 2 * 36 + 36 + 16 * 6 and on_a_device(sizes, low=False) == 4 * 36 + 36 + 12 * 6
    assert "64 of M in nf4 instead, 36 B" in dict(told(needed(sizes, e), sizes))["memory on a device"]
    of, exact = model("nf4"), model("exact")
    found, plain = sizes_of(of, FedAvg()), sizes_of(exact, FedAvg())
    assert found == replace(plain, few=sum(q.shape.numel() for q in of.quantised.values()), base="nf4") and found.few > 0
    assert not of.is_whole and needs(exact, 2)[0].weights - needs(of, 2)[0].weights == 4 * found.few - size_of(found.few, "nf4")
    before = sizes_before(replace(e, model=str(families.folder("bert"))))
    assert before is not None and (before.few, before.base) == (found.few, "nf4")
