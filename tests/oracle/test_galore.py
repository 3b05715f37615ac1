"""GaLore (2403.03507) in NumPy from its algorithm 2, under gradients that the library's own model gives; and what a round of it does."""

from __future__ import annotations

from functools import cache

import numpy as np
import pytest
import torch

from fedloom.compute.serial import Serial
from fedloom.compute.stacked import Stacked
from fedloom.compute.work import AdamW, Fit, LowRank
from fedloom.methods.galore import GaLore
from fedloom.model.blocks import layer_of
from fedloom.server.participation import uniform
from tests import families
from tests.oracle import real
from tests.oracle.test_answers import FAMILIES, examples, its_losses, library, model

RANK, EVERY, SCALE, RATE, DECAY, EPS = 3, 2, 0.5, 1e-2, 0.1, 1e-3
STEPS = 5
ORDER = (0, 1, 2, 0, 1)


def first_directions(g: np.ndarray) -> np.ndarray:
    """ "U, S, V = SVD(G)", the first r columns of U if m <= n, else of V; each with its largest component positive."""
    u, _, vt = np.linalg.svd(g, full_matrices=False)
    p = (u if g.shape[0] <= g.shape[1] else vt.T)[:, :RANK]
    return p * np.sign(p[np.abs(p).argmax(0), np.arange(RANK)])


@cache
def wanted(family: str) -> tuple[dict[str, np.ndarray], frozenset[str]]:
    """All weights after the steps, by the library's names, and which were projected."""
    lm, texts = library(family), examples(model(family, "full"))
    own = dict(lm.named_parameters())
    p, m, v, few = {}, {}, {}, set()
    for step, row in enumerate(ORDER):
        lm.zero_grad()
        its_losses(lm, texts)[row].backward()
        gradients = {n: w.grad.numpy().astype(np.float64) for n, w in own.items() if w.grad is not None}
        norm = np.sqrt(sum((g**2).sum() for g in gradients.values()))
        for n, g in gradients.items():
            g = g * min(1.0, 1.0 / norm)
            in_few = g.ndim == 2 and layer_of(n) is not None and min(g.shape) > RANK
            left = g.shape[0] <= g.shape[-1]
            if in_few:
                few.add(n)
                if step % EVERY == 0:
                    p[n] = first_directions(g)
                g = p[n].T @ g if left else g @ p[n]
            m[n] = 0.9 * m.get(n, 0) + 0.1 * g
            v[n] = 0.999 * v.get(n, 0) + 0.001 * g**2
            move = m[n] / (1 - 0.9 ** (step + 1)) / (np.sqrt(v[n] / (1 - 0.999 ** (step + 1))) + EPS)
            if in_few:
                move = SCALE * (p[n] @ move if left else move @ p[n].T)
            with torch.no_grad():
                own[n].mul_(1 - RATE * DECAY).sub_(torch.from_numpy(RATE * move).float())
    return {n: w.detach().numpy() for n, w in own.items()}, frozenset(few)


def fit(family: str, seed: int = 0) -> Fit:
    of = model(family, "full")
    how = AdamW(RATE, eps=EPS, weight_decay=DECAY, low_rank=LowRank(RANK, EVERY, SCALE))
    start = families.moved(of, seed, by=0.02) if seed else of.initial
    return Fit(start, examples(of), [np.array([i]) for i in ORDER[: STEPS - seed]], how)


@pytest.mark.parametrize("family", FAMILIES)
def test_steps_are_the_papers(family: str) -> None:
    """Five steps over three sets of directions; what is remembered goes on from one to the next."""
    of, (weights, few) = model(family, "full"), wanted(family)
    tall = {weights[n].shape[0] > weights[n].shape[1] for n in few}
    assert len(few) >= 8 and tall == {True, False}
    for compute in (Serial(of), Stacked(of)):
        (made,) = compute.run([fit(family)])
        for name, tensor in made.result.tensors.items():
            np.testing.assert_allclose(tensor, weights[of.parameters[name]], atol=3e-4, err_msg=name)
            inner = made.result.moments.first[name].shape
            assert (inner != tensor.shape) == (of.parameters[name] in few)
            assert RANK in inner or of.parameters[name] not in few
        assert made.result.moments.steps == STEPS


def test_stacked_equals_one_by_one() -> None:
    """Clients of 5, 4 and 3 steps."""
    of = model("llama", "full")
    fits = [fit("llama", seed) for seed in (2, 0, 1)]
    for one, other in zip(Serial(of).run(fits), Stacked(of).run(fits), strict=True):
        np.testing.assert_allclose(other.result.losses, one.result.losses, rtol=1e-4)
        for name, tensor in one.result.tensors.items():
            torch.testing.assert_close(other.result.tensors[name], tensor, atol=3e-4, rtol=0)


def test_a_round_is_galores_steps_and_fedavgs_mean() -> None:
    """Of factors (2, d) and (d, 2), to rank 1."""
    method = GaLore(real.INNER, rank=1, every=2, scale=0.5)
    made = real.run(method, "stacked")
    for t, exchange in enumerate(made.asked("train")):
        cohort = uniform(real.POOL, t)
        assert tuple(exchange.down) == cohort
        items = [item for k in cohort for item in exchange.fits(k)]
        assert all(item.optimizer == AdamW(0.02, weight_decay=0.01, low_rank=LowRank(1, 2, 0.5)) for item in items)
        fitted = [done.result.tensors for done in Serial(real.model()).run(items)]
        sizes = np.array([real.SIZES[k] for k in cohort]) / sum(real.SIZES[k] for k in cohort)
        for name, tensor in made.states[t + 1].shared.items():
            due = sum(float(p) * one[name] for p, one in zip(sizes, fitted, strict=True))
            assert isinstance(due, torch.Tensor)
            torch.testing.assert_close(tensor, due, atol=2e-3, rtol=0)


def test_what_makes_no_sense_is_refused() -> None:
    with pytest.raises(ValueError, match="rank 0, every 200"):
        GaLore(rank=0)
    with pytest.raises(ValueError, match=r"rank 4, and none of the .* --adapter.kind full, or a smaller --method.rank"):
        GaLore().init(real.model())
    plain = fit("llama")
    with pytest.raises(ValueError, match="takes no mask, no rows and no moments"):
        Fit(plain.start, plain.examples, plain.batches, plain.optimizer, mask=dict(plain.start))
