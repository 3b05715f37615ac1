"""FeDeRA's start against decompositions by NumPy and the residual form written out: W_res = W0 − s·B0·A0 frozen, s·B·A trained."""

from __future__ import annotations

import json
from collections.abc import Callable
from copy import deepcopy
from functools import cache, partial
from pathlib import Path
from tempfile import mkdtemp
from typing import Any

import numpy as np
import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from torch.func import functional_call
from torch.nn import functional
from transformers import AutoModelForSequenceClassification

from fedloom.methods.fedavg import FedAvg
from fedloom.methods.federa import FeDeRA
from fedloom.methods.fibecfed import FibecFed
from fedloom.model import adapters
from fedloom.model.adapters import Adapter, AdapterError, Start, merged, write_adapter
from fedloom.model.base import Model
from fedloom.model.loading import load
from fedloom.model.names import is_down, is_factor, is_head, partner, under
from fedloom.model.principal import drawn, principal_factors
from fedloom.model.texts import Batch
from fedloom.run.starting import identity
from tests import families, tiny

RANK, ALPHA = 3, 4.5
SCALING = ALPHA / RANK


@cache
def model(family: str, start: Start = "svd") -> Model:
    adapter = Adapter(RANK, ALPHA, families.TARGETS.get(family, ()), start=start)
    return load(str(families.folder(family)), num_labels=3, adapter=adapter, seed=1, max_length=16)


@cache
def plain(family: str) -> Any:
    """The model as the library loads it, with the same fresh head."""
    kwargs: dict[str, Any] = {"num_labels": 3, "attn_implementation": "eager", "ignore_mismatched_sizes": True}
    made = AutoModelForSequenceClassification.from_pretrained(families.folder(family), **kwargs).eval()
    own = dict(made.named_parameters())
    with torch.no_grad():
        for name, tensor in model(family).initial.items():
            if is_head(name):
                own[name.removeprefix("base_model.model.")].copy_(tensor)
    return made


def batch() -> Batch:
    ids = torch.randint(5, 60, (4, 9), generator=torch.Generator().manual_seed(5))
    return Batch(ids, torch.ones_like(ids, dtype=torch.bool), torch.zeros_like(ids), torch.arange(4) % 3, torch.ones(4))


def plain_logits(module: Any, tensors: dict[str, torch.Tensor] | None = None) -> torch.Tensor:
    given = {"input_ids": batch().ids, "attention_mask": batch().mask.long()}
    return (module(**given) if tensors is None else functional_call(module, tensors, (), given)).logits


def pairs(family: str) -> list[tuple[str, str, str]]:
    """(name of A, name of B, the plain model's weight)."""
    downs = [name for name in model(family).initial if is_down(name)]
    return [(a, partner(a), a.removeprefix("base_model.model.").split(".lora_A.")[0] + ".weight") for a in downs]


def oriented(family: str, weight: torch.Tensor) -> np.ndarray:
    """W (d_out, d_in), in float64; GPT-2 keeps its weights the other way round."""
    return (weight.T if family == "gpt2" else weight).detach().double().numpy()


@pytest.mark.parametrize("family", families.CONFIGS)
def test_the_start_is_the_best_approximation_with_balanced_factors(family: str) -> None:
    """B0 = U_r (S_r/s)^(1/2), A0 = (S_r/s)^(1/2) V_rᵀ: s·B0·A0 is the truncated SVD, and BᵀB = AAᵀ = S_r/s."""
    own = dict(plain(family).named_parameters())
    assert pairs(family)
    for a, b, name in pairs(family):
        down, up = (model(family).initial[n].double().numpy() for n in (a, b))
        u, s, vt = np.linalg.svd(oriented(family, own[name]), full_matrices=False)
        np.testing.assert_allclose(SCALING * up @ down, (u[:, :RANK] * s[:RANK]) @ vt[:RANK], atol=1e-5)
        np.testing.assert_allclose(up.T @ up, np.diag(s[:RANK] / SCALING), atol=1e-5)
        np.testing.assert_allclose(down @ down.T, np.diag(s[:RANK] / SCALING), atol=1e-5)
        columns = up[np.abs(up).argmax(0), range(RANK)]
        assert bool((columns > 0).all()), "the sign of every direction is fixed"


@pytest.mark.parametrize(("family", "start"), [*((f, "svd") for f in families.CONFIGS), *((f, "fast-svd") for f in families.APART)])
def test_the_start_is_the_pre_trained_function(family: str, start: Start) -> None:
    of = model(family, start)
    torch.testing.assert_close(of.forward(of.initial, batch(), torch.float32)[0], plain_logits(plain(family)), atol=1e-5, rtol=0)
    zero = {n: torch.zeros_like(t) if is_factor(n) else t for n, t in of.initial.items()}
    with torch.no_grad():
        far = (of.forward(zero, batch(), torch.float32)[0] - plain_logits(plain(family))).abs().max()
    assert float(far) > 1e-2, "W_res is not W0"


@pytest.mark.parametrize("family", families.CONFIGS)
def test_gradients_are_those_of_the_residual_form(family: str) -> None:
    """At a point away from the start, with W = W_res + s·B·A put into the plain model: ∂/∂B = s·G·Aᵀ and ∂/∂A = s·Bᵀ·G for G = ∂/∂W, in
    float64. Ours in float64 too, so that what is left is what float32 rounds of W_res and of the logits: 6e-7 of a gradient at most, as
    measured; and in float32, as it trains: 2e-6."""
    of, module = model(family), deepcopy(plain(family)).double()
    at = {n: t.double() for n, t in families.moved(of, by=0.05).items()}
    own = dict(module.named_parameters())
    weights = {}
    for a, b, name in pairs(family):
        w0 = torch.from_numpy(oriented(family, own[name]))
        now = w0 - SCALING * of.initial[b].double() @ of.initial[a].double() + SCALING * at[b] @ at[a]
        weights[name] = (now.T if family == "gpt2" else now).contiguous().requires_grad_()
    heads = {n.removeprefix("base_model.model."): t for n, t in at.items() if is_head(n)}
    loss = functional.cross_entropy(plain_logits(module, {**weights, **heads}), batch().labels)
    slopes = dict(zip(weights, torch.autograd.grad(loss, list(weights.values())), strict=True))
    for dtype, off in ((torch.float64, 2e-6), (torch.float32, 1e-5)):
        now = {n: t.to(dtype, copy=True).requires_grad_() for n, t in at.items()}
        made_loss = of.loss(now, batch(), dtype)
        assert float(made_loss.detach()) == pytest.approx(float(loss.detach()), abs=1e-6)
        made = dict(zip(now, torch.autograd.grad(made_loss, list(now.values())), strict=True))
        for a, b, name in pairs(family):
            g = slopes[name].T if family == "gpt2" else slopes[name]
            for wanted, got in ((SCALING * g @ at[a].T, made[b]), (SCALING * at[b].T @ g, made[a])):
                assert got.dtype is dtype and float(wanted.norm()) > 1e-4
                assert float((got - wanted).norm()) <= off * float(wanted.norm())


def test_the_start_is_the_same_whenever_it_is_computed() -> None:
    adapter = Adapter(RANK, ALPHA, start="svd")
    first, second = (load(str(families.folder("bert")), num_labels=3, adapter=adapter, seed=s, max_length=16) for s in (1, 2))
    assert all(torch.equal(first.initial[n], second.initial[n]) for n in first.initial if is_factor(n)), "no seed has a part in it"


def test_a_rank_that_the_matrix_does_not_have_is_refused() -> None:
    with pytest.raises(AdapterError, match=r"rank 17 .* 16 × 16.*at most 16"):
        load(str(families.folder("bert")), num_labels=3, adapter=Adapter(17, start="svd"), max_length=16)
    starts: tuple[Start, ...] = ("svd", "fast-svd")
    for start in starts:
        with pytest.raises(AdapterError, match=f"start {start} .*bitfit.*lora"):
            load(str(families.folder("bert")), num_labels=3, adapter=Adapter(kind="bitfit", start=start), max_length=16)


@pytest.mark.parametrize("family", ["bert", "gpt2", "llama"])
def test_exported_it_stands_on_the_untouched_base_with_twice_the_rank(family: str, tmp_path: Path) -> None:
    of = model(family)
    at = families.moved(of, by=0.1)
    wanted = of.forward(at, batch(), torch.float32)[0]
    write_adapter(of.module, list(of.parameters), at, tmp_path / "a", str(families.folder(family)), of.initial)
    config = json.loads((tmp_path / "a" / "adapter_config.json").read_text())
    assert (config["r"], config["lora_alpha"]) == (2 * RANK, 2 * ALPHA)
    kwargs: dict[str, Any] = {"num_labels": 3, "attn_implementation": "eager", "ignore_mismatched_sizes": True}
    base = AutoModelForSequenceClassification.from_pretrained(families.folder(family), **kwargs)
    with torch.no_grad():
        torch.testing.assert_close(plain_logits(PeftModel.from_pretrained(base, tmp_path / "a").eval()), wanted, atol=1e-5, rtol=0)
        torch.testing.assert_close(plain_logits(merged(of.module, of.parameters, at)), wanted, atol=2e-5, rtol=0)


def test_the_method_is_the_average_from_that_start() -> None:
    method = FeDeRA()
    state = method.init(model("bert"))
    assert state == FedAvg().init(model("bert"))
    with pytest.raises(ValueError, match="federa.*--adapter.start svd"):
        method.init(families.model("bert"))
    assert FeDeRA.adapter_start == "svd"
    FibecFed().init(model("bert"))


def test_tiny_clients_train_from_it_stacked_as_alone() -> None:
    from fedloom.compute.serial import Serial
    from fedloom.compute.stacked import Stacked
    from fedloom.compute.work import AdamW, Fit

    of = model("bert")
    items = [Fit(of.initial, tiny.examples(n, seed=n), [np.arange(n)] * 3, AdamW(1e-2, eps=1e-4)) for n in (5, 8)]
    for one, other in zip(Serial(of).run(items), Stacked(of).run(items), strict=True):
        for name, tensor in one.result.tensors.items():
            torch.testing.assert_close(other.result.tensors[name], tensor, atol=2e-4, rtol=0)


# found fast


def weight_of(spectrum: np.ndarray, d_out: int, d_in: int) -> torch.Tensor:
    """A weight (d_out, d_in) of these singular values and random directions, float32."""
    rng = np.random.default_rng(3)
    u, v = (np.linalg.qr(rng.standard_normal((side, len(spectrum))))[0] for side in (d_out, d_in))
    return torch.from_numpy((u * spectrum) @ v.T).float()


SPECTRA = {"steep": 0.7 ** np.arange(96), "as of a trained weight": np.arange(1, 97) ** -0.5, "flat": np.linspace(1.0, 0.9, 96)}
LEAST = {"steep": 1 - 1e-6, "as of a trained weight": 0.999, "flat": 0.95}
"""How much of the exact start's squared norm the fast one has at least. No gap tells a flat one's directions apart, and none matters."""


@pytest.mark.parametrize("shape", [(96, 96), (160, 96), (96, 160)])
@pytest.mark.parametrize("name", SPECTRA)
def test_a_fast_start_is_near_the_best_and_as_balanced(name: str, shape: tuple[int, int]) -> None:
    """What holds of random subspace iteration with l columns (0909.4061): Q·Qᵀ projects, so no singular value is above the exact one; and
    ‖W − QQᵀW‖₂ is, on average, at most what corollary 10.10 says of σ_(r+1), to which cutting to r adds σ_(r+1) at most (section 9.4). The
    draw is always the same one, so the bound on the average either holds of it or does not."""
    rank, more, times = 8, 10, 4
    w = weight_of(SPECTRA[name], *shape)
    (a, b), (best_a, best_b) = (tuple(t.double().numpy() for t in principal_factors(w, rank, SCALING, fast)) for fast in (True, False))
    s = SPECTRA[name]
    found = np.diag(SCALING * b.T @ b)
    np.testing.assert_allclose(SCALING * b.T @ b, np.diag(found), atol=1e-6)
    np.testing.assert_allclose(a @ a.T, b.T @ b, atol=1e-6)
    assert bool((found <= s[:rank] * (1 + 1e-6)).all()) and bool((np.diff(found) <= 0).all())
    assert bool((b[np.abs(b).argmax(0), range(rank)] > 0).all()), "the sign of every direction is fixed"
    assert LEAST[name] <= (found**2).sum() / (s[:rank] ** 2).sum() <= 1 + 1e-6
    factor = 1 + (rank / (more - 1)) ** 0.5 + np.e * ((rank + more) * (96 - rank)) ** 0.5 / more
    left = np.linalg.norm(w.double().numpy() - SCALING * b @ a, 2)
    assert s[rank] * (1 - 1e-6) <= left <= (factor ** (1 / (2 * times + 1)) + 1) * s[rank]
    if name == "steep":
        np.testing.assert_allclose(b @ a, best_b @ best_a, atol=1e-6)


def test_what_a_fast_start_draws_is_the_same_everywhere_and_part_of_who_is_compared(monkeypatch: pytest.MonkeyPatch) -> None:
    """Had every device its own draw, the W_res under averages of A and B would not be of one weight."""
    first = model("bert", "fast-svd")
    again = load(str(families.folder("bert")), num_labels=3, adapter=Adapter(RANK, ALPHA, start="fast-svd"), seed=9, max_length=16)
    assert all(torch.equal(first.initial[n], again.initial[n]) for n in first.initial if is_factor(n)), "no seed has a part in it"
    assert identity(first) == identity(again) != identity(model("bert"))
    omega = drawn((24, 16), 3)
    assert omega.shape == (24, 13) and np.array_equal(omega, drawn((16, 24), 3)) and drawn((24, 16), 9).shape == (24, 16)
    assert np.array_equal(omega * 2**16, np.round(omega * 2**16)) and abs(omega.std() - 1) < 0.2
    monkeypatch.setattr(adapters, "drawn", lambda shape, rank: drawn(shape, rank) + 2**-16)
    other = load(str(families.folder("bert")), num_labels=3, adapter=Adapter(RANK, ALPHA, start="fast-svd"), seed=1, max_length=16)
    assert identity(other) != identity(first), "a device that draws otherwise is not taken in"


def test_a_weight_of_a_lower_rank_has_no_more_directions_fast_either() -> None:
    w = weight_of(np.array([3.0, 2.0]), 40, 30)
    a, b = principal_factors(w, 5, SCALING, fast=True)
    torch.testing.assert_close(SCALING * b @ a, w, atol=1e-6, rtol=0)
    assert not bool(b[:, 2:].any()) and bool(a[2:].any())


# half precision


def in_half(name: str, dtype: torch.dtype) -> Path:
    """The tiny model's folder with its weights in 16 bits."""
    made = AutoModelForSequenceClassification.from_pretrained(tiny.folder()).to(dtype)
    made.save_pretrained(path := Path(mkdtemp(prefix=f"half-{name}-")))
    tiny.tokenizer().save_pretrained(path)
    return path


@pytest.mark.parametrize(("name", "dtype"), [("bf16", torch.bfloat16), ("fp16", torch.float16)])
def test_a_file_in_half_precision_is_decomposed_in_float32(name: str, dtype: torch.dtype) -> None:
    """W0 is the file's numbers, exactly; A0, B0 and W_res are float32's, which 16 bits could not hold."""
    of = load(str(folder := in_half(name, dtype)), num_labels=3, adapter=Adapter(RANK, ALPHA, start="svd"), seed=1, max_length=16)
    stored = load_file(folder / "model.safetensors")
    for a in filter(is_down, of.initial):
        w0, b = stored[under(a).removeprefix("base_model.model.").replace(".base_layer", "")], of.initial[partner(a)]
        assert w0.dtype is dtype and of.initial[a].dtype is b.dtype is of.weights[under(a)].dtype is torch.float32
        u, s, vt = np.linalg.svd(w0.double().numpy())
        np.testing.assert_allclose(SCALING * b.numpy() @ of.initial[a].numpy(), u[:, :RANK] * s[:RANK] @ vt[:RANK], atol=1e-6)
        assert not torch.equal(b, b.to(dtype).float()), "these numbers need float32"
        made = of.weights[under(a)].double() + SCALING * b.double() @ of.initial[a].double()
        assert float((made - w0.double()).abs().max()) <= 2.0**-24 * float(of.weights[under(a)].abs().max())


def test_in_bf16_the_start_is_the_pre_trained_weight_to_what_is_rounded_of_its_parts() -> None:
    """Factors are those of float32. The base computes with bf16(W_res), bf16(A0) and bf16(B0), each to 2^-8 of its size, u, so that

        |bf16(W_res) + s·bf16(B0)·bf16(A0) − W0| <= u·|W_res| + s·(2u + u²)·|B0|·|A0|          number by number

    and the logits, which such weights give in float32, move by the gradients' sizes times that, to first order."""
    adapter = Adapter(RANK, ALPHA, start="svd")
    full, half = (load(str(tiny.folder()), num_labels=3, adapter=adapter, seed=1, max_length=16, precision=p) for p in ("float32", "bf16"))
    assert all(torch.equal(full.initial[n], t) for n, t in half.initial.items()), "decomposed in float32 all the same"
    u, own = 2.0**-8, dict(half.base(torch.bfloat16).named_parameters())
    rounded, bounds = {}, {}
    for a in filter(is_down, full.initial):
        name, b = under(a), partner(a)
        a0, b0, rest = (t.double() for t in (full.initial[a], full.initial[b], full.weights[name]))
        w0 = rest + SCALING * b0 @ a0
        now = own[name].double() + SCALING * b0.bfloat16().double() @ a0.bfloat16().double()
        bounds[name] = u * rest.abs() + SCALING * (2 * u + u**2) * b0.abs() @ a0.abs()
        assert own[name].dtype is torch.bfloat16 and bool(((now - w0).abs() <= bounds[name] + 1e-6).all())
        assert float((now - w0).abs().max()) > u / 8 * float(w0.abs().max()), "bf16 does round"
        rounded[name] = (now - SCALING * b0 @ a0).float()  # under float32's A0 and B0 the same weight
    before = {n: full.weights[n].requires_grad_() for n in rounded}
    logits = full.forward({**full.initial, **before}, batch(), torch.float32)[0]
    moved = full.forward({**full.initial, **rounded}, batch(), torch.float32)[0]
    for value, then in zip(logits.flatten(), moved.flatten(), strict=True):
        slopes = torch.autograd.grad(value, list(before.values()), retain_graph=True)
        bound = sum(float((g.abs() * bounds[n]).sum()) for g, n in zip(slopes, before, strict=True))
        assert abs(float((then - value).detach())) <= bound


@pytest.mark.parametrize("folder", [tiny.folder, partial(in_half, "bf16", torch.bfloat16)], ids=["float32", "bf16"])
def test_in_bf16_tiny_clients_train_from_it_stacked_as_alone(folder: Callable[[], Path]) -> None:
    """From files of either kind; apart by what bf16 leaves of three small steps, of which 5 % was measured."""
    from fedloom.compute.serial import Serial
    from fedloom.compute.stacked import Stacked
    from fedloom.compute.work import AdamW, Fit

    of = load(str(folder()), num_labels=3, adapter=Adapter(RANK, ALPHA, start="svd"), seed=1, max_length=16, precision="bf16")
    items = [Fit(of.initial, tiny.examples(n, seed=n), [np.arange(n)] * 3, AdamW(1e-3, eps=1e-2)) for n in (5, 8)]
    for one, other in zip(Serial(of).run(items), Stacked(of).run(items), strict=True):
        for name, tensor in one.result.tensors.items():
            way = float((tensor - of.initial[name]).norm())
            assert way > 0 and float((other.result.tensors[name] - tensor).norm()) <= 0.1 * way
