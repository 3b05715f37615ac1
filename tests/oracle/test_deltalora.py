"""Delta-LoRA, as it runs on both computes, against NumPy that changes a dense W after every step. Each test's docstring is the sentence
that it holds the method to."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pytest

from fedloom.methods.deltalora import DeltaLora
from fedloom.server.participation import Pool
from fedloom.server.robust import Aggregation
from tests import tiny
from tests.oracle import real
from tests.oracle.numpy_encoder import pad
from tests.oracle.numpy_training import adamw_step, clip_to
from tests.oracle.test_baselines import COHORTS, EVERYBODY, epochs, kinds, logits
from tests.oracle.test_family import assert_predicts_with, beneath, ideal, other, pretrained
from tests.oracle.test_rivals import is_b, mean_of, part

Arrays = dict[str, np.ndarray]
RATIO = 2.0
METHOD = DeltaLora(real.INNER)


def trained(client: int, at: Arrays, weights: Arrays, batches: Sequence[np.ndarray], ratio: float) -> tuple[Arrays, Arrays, list[float]]:
    """The pairs and the head, the dense weights, and the loss before each step: "W ← W + λ·α/r·(A(t+1)B(t+1) − A(t)B(t))"."""
    now, dense, losses = dict(at), dict(weights), []
    first, second = ({n: np.zeros_like(t) for n, t in at.items()} for _ in range(2))
    for number, batch in enumerate(batches, 1):
        chosen, before = pad([real.questions(client)[i] for i in batch]), dict(now)
        losses.append(real.encoder().forward({**now, **dense}, chosen).loss)
        found = real.encoder().backward({**now, **dense}, chosen).tensors
        for n, g in clip_to({n: found[n].mean(0) for n in at}, real.RULE.clip).items():
            now[n], first[n], second[n] = adamw_step(now[n], g, first[n], second[n], number, real.RULE)
        for b in filter(is_b, now):
            dense[beneath(b)] = dense[beneath(b)] + ratio * real.S * (now[b] @ now[other(b)] - before[b] @ before[other(b)])
    return now, dense, losses


@kinds
def test_deltalora(kind: real.Kind, anew: bool = False) -> None:
    """After the warm-up each local step moves W by λ·(α/r)·(B(t+1)A(t+1) − B(t)A(t)); the server's W is the mean of the devices'."""
    made = real.run(METHOD, kind)
    assert [exchange.op for exchange in made.exchanges] == ["train"] * 3 + ["predict"]
    shared, weights = real.start(), pretrained()
    for t, exchange in enumerate(made.asked("train")):
        assert tuple(exchange.down) == COHORTS[t]
        if anew:
            there = real.arrays(made.states[t].shared)
            shared, weights = part(there, shared), {n: there.get(n, w) for n, w in weights.items()}
        moving, fitted, dense = t >= 1, dict[int, Arrays](), dict[int, Arrays]()
        for k in COHORTS[t]:
            sent = {**shared, **(weights if t >= 2 else {})}
            real.assert_close(exchange.down[k].tensors, sent)  # W only once it is another one than every device has
            fitted[k], dense[k], losses = trained(k, shared, weights, epochs(k, "batches", t), RATIO if moving else 0.0)
            real.assert_close(exchange.up[k].tensors, fitted[k])
            assert exchange.up[k].metrics["loss"] == pytest.approx(np.mean(losses), abs=1e-4)
            assert (exchange.up[k].num_examples, exchange.up[k].examples) == (real.SIZES[k], 2 * real.SIZES[k])
        before, shared = shared, mean_of(fitted, shared)
        if moving:
            telescoped = {n: weights[n] + RATIO * real.S * (change - before[b] @ before[other(b)])
                          for n, change in ideal(fitted).items() for b in before if is_b(b) and beneath(b) == n}  # fmt: skip
            weights = mean_of(dense, weights)
            for n, w in weights.items():
                np.testing.assert_allclose(telescoped[n], w, atol=1e-12)
        real.assert_close(made.states[t + 1].shared, {**shared, **(weights if moving else {})})
        assert bool(made.states[t + 1].server) == (not moving)
    assert all(np.abs(w - pretrained()[n]).max() > 0.05 for n, w in weights.items())
    end = {**shared, **weights}
    assert_predicts_with(made, dict.fromkeys(EVERYBODY, end))
    assert made.assembled is not None
    real.assert_close(made.assembled, end)
    assert not any(kept for now in made.private + made.memory for kept in now.values()), "devices keep nothing"


def test_deltalora_where_weights_are_not_square(monkeypatch: pytest.MonkeyPatch) -> None:
    """On weights of 16 × 16, 32 × 16 and 16 × 32, and with s = 3; every round from what the server has. (Several numbers' first gradients
    are of rounding's size here, λ·s makes more of that, and after three rounds it is a step.)"""
    real.widen(monkeypatch)
    test_deltalora("stacked", anew=True)


def test_the_weight_that_moves_is_seen_by_the_next_step_and_by_no_gradient() -> None:
    """What the derivation could not tell apart would be no test: W moving at the end only, and gradients through W, end elsewhere."""
    k, at = 2, real.run(METHOD, "stacked").asked("train")[1].down[2].tensors
    start, batches = real.arrays(at), epochs(2, "batches", 1)
    due, dense, losses = trained(k, start, pretrained(), batches, RATIO)
    late, _, late_losses = trained(k, start, pretrained(), batches, 0.0)
    assert max(np.abs(due[n] - late[n]).max() for n in due) > 0.01
    assert abs(losses[-1] - late_losses[-1]) > 0.01 and losses[0] == late_losses[0]
    moved = {
        n: pretrained()[n] + RATIO * real.S * (due[b] @ due[other(b)] - start[b] @ start[other(b)])
        for b in due
        if is_b(b)
        for n in [beneath(b)]
    }
    for n, w in dense.items():
        np.testing.assert_allclose(moved[n], w, atol=1e-12)
    assert np.abs(logits({**due, **dense}, k) - logits(due, k)).max() > 0.01


def test_a_ratio_of_nothing_is_plain_lora() -> None:
    pool = Pool((0, 1, 2, 3), 3, 2, 8)
    made, plain = real.run(DeltaLora(real.INNER, ratio=0.0, warm_up=0), "stacked", pool), real.run(real.INNER, "stacked", pool)
    real.assert_close(made.states[-1].shared, {**real.arrays(plain.states[-1].shared), **pretrained()}, 1e-6, 1e-6)


def test_what_cannot_be_is_refused() -> None:
    with pytest.raises(ValueError, match="a ratio and a warm_up of 0 or more; got ratio -1.0"):
        DeltaLora(ratio=-1.0)
    with pytest.raises(ValueError, match="'deltalora' moves W by what moves the pair.*dropout 0.1.*--adapter.dropout 0"):
        METHOD.init(tiny.model(dropout=0.1))
    with pytest.raises(ValueError, match="'deltalora' cannot follow aggregation 'median'.*mean of the products"):
        METHOD.setup(METHOD.init(tiny.model()), Pool((0, 1, 2), 3, 2, 8, Aggregation("median")))
