"""Fed-SB, as it runs on both computes, against NumPy: the first step of full fine-tuning decomposed, R alone trained by the chain rule, its
mean exact. Each test's docstring is the sentence that it holds the method to."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

import numpy as np
import pytest
import torch

from fedloom.compute.serial import Serial
from fedloom.compute.stacked import Stacked
from fedloom.compute.work import Fit
from fedloom.encodings import Encoding
from fedloom.messages import Task
from fedloom.methods.fedavg import FedAvg
from fedloom.methods.fedsb import FedSb
from fedloom.server.participation import Pool
from tests import tiny
from tests.oracle import real
from tests.oracle.numpy_encoder import pad
from tests.oracle.numpy_training import adamw_step, clip_to, payload
from tests.oracle.test_baselines import COHORTS, EVERYBODY, epochs, kinds
from tests.oracle.test_family import beneath, heads, other, pretrained
from tests.oracle.test_rivals import assert_predicts, is_b, mean_of

Arrays = dict[str, np.ndarray]
EXAMPLES = 4
METHOD = FedSb(real.INNER, examples=EXAMPLES)
ETA = 0.02


def uploaded(made: real.Run) -> dict[int, list[int]]:
    """Which of its examples each device of the first cohort took for the gradient."""
    (exchange,) = made.asked("gradient")
    assert tuple(exchange.down) == COHORTS[0]
    chosen = {k: [int(i) for i in fit.batches[0]] for k in exchange.down for fit in exchange.fits(k)}
    for k, some in chosen.items():
        assert len(set(some)) == len(some) == min(EXAMPLES, real.SIZES[k])
        assert exchange.up[k].num_examples == len(some)
        assert all(fit.optimizer.clip == 0 for fit in exchange.fits(k)), "a gradient is not cut to its norm"
    return chosen


def first_step(chosen: Mapping[int, Sequence[int]]) -> tuple[Arrays, Arrays]:
    """G over all chosen examples of all devices, and −η·sign(G), by the weight beneath."""
    examples = [real.questions(k)[i] for k, some in chosen.items() for i in some]
    at = {**real.start(), **pretrained()}
    found = real.encoder().backward(at, pad(examples)).tensors
    gradient = {n: found[n].mean(0) for n in pretrained()}
    return gradient, {n: -ETA * np.sign(g) for n, g in gradient.items()}


@kinds
def test_where_it_starts(kind: real.Kind) -> None:
    """ΔW = −η sign(Σ ∇L(W_0, x_i)); U, S, Vᵀ = SVD(ΔW); B = U[:, :r], A = Vᵀ[:r], R = S[:r, :r]/s: the server distributes B and A."""
    made = real.run(METHOD, kind)
    gradient, step = first_step(uploaded(made))
    (exchange,), (received,) = made.asked("gradient"), made.asked("receive")
    for k, update in exchange.up.items():
        assert set(exchange.down[k].tensors) == set(heads())
        assert {n: tuple(t.shape) for n, t in update.tensors.items()} == {n: w.shape for n, w in pretrained().items()}
    sizes = {k: len(some) for k, some in uploaded(made).items()}
    sent = {k: real.arrays(update.tensors) for k, update in exchange.up.items()}
    mean = {n: sum(sizes[k] * sent[k][n] for k in sent) / sum(sizes.values()) for n in gradient}
    for n, g in gradient.items():
        np.testing.assert_allclose(mean[n], g, atol=1e-5)
    frozen = real.arrays(received.down[0].tensors)
    cores = real.arrays(made.states[0].shared)
    assert {n for n in real.start() if n not in heads()} == set(frozen)
    assert set(cores) == {*heads(), *(f"core/{n}" for n in frozen if is_b(n))}
    for b in filter(is_b, frozen):
        a, core = frozen[other(b)], cores[f"core/{b}"]
        # near 0 float32 decides about a sign; where it does, the server's own sign is taken
        delta = np.where(np.abs(gradient[beneath(b)]) > 1e-5, step[beneath(b)], -ETA * np.sign(mean[beneath(b)]))
        u, s, vt = np.linalg.svd(delta)
        np.testing.assert_allclose(real.S * frozen[b] @ core @ a, u[:, :2] * s[:2] @ vt[:2], atol=1e-6)
        np.testing.assert_allclose(frozen[b].T @ frozen[b], np.eye(2), atol=1e-6)
        np.testing.assert_allclose(a @ a.T, np.eye(2), atol=1e-6)
        np.testing.assert_allclose(core, np.diag(s[:2]) / real.S, atol=1e-6)
    assert tuple(received.down) == EVERYBODY
    for k in EVERYBODY:
        real.assert_close(received.down[k].tensors, frozen, 1e-7, 1e-7)
        real.assert_close(made.private[-1][k], frozen, 1e-7, 1e-7)
    real.assert_close(made.states[-1].server, frozen, 1e-7, 1e-7)


def cored(client: int, frozen: Arrays, shared: Arrays, batches: Sequence[np.ndarray]) -> tuple[Arrays, list[float]]:
    """R and the head after training: ∂L/∂R = Bᵀ·(∂L/∂(B R)) by the chain rule, one norm over all for clipping."""
    now, rule, losses = dict(shared), real.RULE, []
    first, second = ({n: np.zeros_like(t) for n, t in shared.items()} for _ in range(2))
    for number, batch in enumerate(batches, 1):
        at = paired(frozen, now)
        chosen = pad([real.questions(client)[i] for i in batch])
        losses.append(real.encoder().forward(at, chosen).loss)
        found = real.encoder().backward(at, chosen).tensors
        gradients = {n: found[n].mean(0) for n in heads()}
        gradients |= {f"core/{b}": frozen[b].T @ found[b].mean(0) for b in filter(is_b, frozen)}
        for n, g in clip_to(gradients, rule.clip).items():
            now[n], first[n], second[n] = adamw_step(now[n], g, first[n], second[n], number, rule)
    return now, losses


def paired(frozen: Arrays, shared: Arrays) -> Arrays:
    """W = W_0 + s·B R A as a plain pair (B R, A)."""
    downs = {n: t for n, t in frozen.items() if not is_b(n)}
    return {**downs, **{b: frozen[b] @ shared[f"core/{b}"] for b in filter(is_b, frozen)}, **{n: shared[n] for n in heads()}}


@kinds
def test_only_r_is_trained_and_averaged(kind: real.Kind) -> None:
    """Clients train R with B and A fixed; the server averages R, and s·B·R̄·A is the mean of the clients' updates, exactly."""
    made = real.run(METHOD, kind)
    assert [exchange.op for exchange in made.exchanges] == ["gradient", "receive", *["train"] * len(COHORTS), "predict"]
    frozen, shared = real.arrays(made.states[0].server), real.arrays(made.states[0].shared)
    for t, exchange in enumerate(made.asked("train")):
        assert tuple(exchange.down) == COHORTS[t]
        fitted = {}
        for k in COHORTS[t]:
            fitted[k], losses = cored(k, frozen, shared, epochs(k, "batches", t))
            for tensors in (exchange.down[k].tensors, exchange.up[k].tensors):
                assert set(tensors) == set(shared)
                assert sum(4 * x.numel() for n, x in tensors.items() if n.startswith("core/")) == 4 * 2 * 2 * len(pretrained())
                assert payload(shared, shared) == sum(4 * x.numel() for x in tensors.values())
            real.assert_close(exchange.up[k].tensors, fitted[k])
            assert exchange.up[k].metrics["loss"] == pytest.approx(np.mean(losses), abs=1e-4)
            assert (exchange.up[k].num_examples, exchange.up[k].examples) == (real.SIZES[k], 2 * real.SIZES[k])
        after = mean_of(fitted, shared)
        weights = {k: real.SIZES[k] / sum(real.SIZES[j] for j in fitted) for k in fitted}
        for b in filter(is_b, frozen):
            ideal = sum(weights[k] * frozen[b] @ fitted[k][f"core/{b}"] @ frozen[other(b)] for k in fitted)
            np.testing.assert_allclose(frozen[b] @ after[f"core/{b}"] @ frozen[other(b)], ideal, atol=1e-12)
        assert all(np.abs(after[n] - shared[n]).max() > 1e-3 for n in after if n.startswith("core/"))
        shared = after
        real.assert_close(made.states[t + 1].shared, shared)
        for k in EVERYBODY:
            real.assert_close(made.private[t + 1][k], frozen, 1e-7, 1e-7)
    assert_predicts(made, dict.fromkeys(EVERYBODY, paired(frozen, shared)))
    assert made.assembled is not None
    real.assert_close(made.assembled, paired(frozen, shared))


def test_fedsb_where_weights_are_not_square(monkeypatch: pytest.MonkeyPatch) -> None:
    """On weights of 16 × 16, 32 × 16 and 16 × 32, and with s = 3."""
    real.widen(monkeypatch)
    test_where_it_starts("stacked")
    test_only_r_is_trained_and_averaged("stacked")


def test_the_start_moves_as_the_rate_does() -> None:
    """η is AdamW's rate: twice the rate starts twice as far, in the same directions."""
    twice = FedSb(FedAvg(lr=2 * ETA, local_epochs=2, batch_size=3, weight_decay=0.01), examples=EXAMPLES)
    one, other_rate = (real.run(method, "stacked", Pool((0, 1, 2, 3), 3, 1, 8)) for method in (METHOD, twice))
    for n, core in real.arrays(one.states[0].shared).items():
        if n.startswith("core/"):
            np.testing.assert_allclose(real.arrays(other_rate.states[0].shared)[n], 2 * core, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("wire", ["bf16", "int8", "nf4"])
def test_devices_and_server_have_the_same_frozen_factors_over_every_wire(wire: str) -> None:
    """The server distributes B and A: its average is exact because all have the same, and it exports with them."""
    made = real.watch(METHOD, real.compute("stacked"), replace(Pool((0, 1, 2, 3), 3, 1, 8), encoding=Encoding.of(wire)))
    for k in EVERYBODY:
        assert {n: t.tolist() for n, t in made.private[-1][k].items()} == {n: t.tolist() for n, t in made.states[0].server.items()}


def test_the_gradient_is_the_models_and_not_that_of_some_dropouts_draw() -> None:
    """G = Σ_i ∇_W ℓ(x_i; W_0), of the model that predicts: a device thins nothing out for it, alone or in whatever company."""
    dropping, plain = (tiny.model(dropout=rate) for rate in (0.4, 0.0))
    work = METHOD.gradient(real.devices()[0], Task("gradient", 0, {n: t for n, t in plain.initial.items() if ".lora_" not in n}))
    next(work)
    fit = work.send(plain.weights)
    assert isinstance(fit, Fit)
    training = replace(fit, dropout=True)
    (due,) = Serial(plain).run([fit])
    for compute in (Serial(dropping), Stacked(dropping)):
        without, drawn = (done.result for done in compute.run([fit, training]))
        for n, t in due.result.moments.first.items():
            torch.testing.assert_close(without.moments.first[n], t, atol=1e-6, rtol=1e-4)
        assert any((drawn.moments.first[n] - t).abs().max() > 1e-3 for n, t in due.result.moments.first.items())
