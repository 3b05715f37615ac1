"""A mask under plain federated LoRA against NumPy: which rows each device keeps, what it trains, sends and holds. FibecFed's own sentences
of the mask, with every layer shared."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import torch

from fedloom.client.curricula.loss import ByLoss
from fedloom.client.curriculum import shuffled
from fedloom.compute.work import Fit
from fedloom.server.masks import Mask
from fedloom.tensors import unpacked
from tests.oracle import real
from tests.oracle.numpy_fibecfed import fisher_diagonal, is_lora, neuron_masks
from tests.oracle.numpy_training import train
from tests.oracle.test_baselines import COHORTS, EVERYBODY, epochs, lists
from tests.oracle.test_rivals import assert_predicts, is_b, mean_of

Arrays = dict[str, np.ndarray]
KEEP = 0.3


def derived(k: int, at: Arrays, size: int = real.INNER.batch_size) -> Arrays:
    """ "Warm up all LoRA … the warm-up weights are thrown away"; "keep the highest-scoring fraction", in every layer."""
    batches = shuffled(real.SIZES[k], size, real.SEED, "mask", k)
    lora = [n for n in at if is_lora(n)]
    warm, _ = train(real.encoder(), at, lora, real.questions(k), batches, real.RULE)
    fisher = fisher_diagonal(real.encoder(), warm, real.questions(k), lora)
    return {n: m for layer in range(real.LAYERS) for n, m in neuron_masks(fisher, layer, KEEP).items()}


def test_a_device_trains_sends_and_remembers_its_rows_and_the_server_averages_whole_tensors() -> None:
    method: Any = real.INNER
    made = real.watch(method, real.compute("stacked"), replace(real.POOL, rounds=2, mask=Mask(KEEP)))
    shared, masks = real.start(), dict[int, Arrays]()
    for t, exchange in enumerate(made.asked("train")):
        fitted = {}
        assert set(exchange.down) == set(COHORTS[t])
        for k in COHORTS[t]:
            first = k not in masks
            if first:
                masks[k] = derived(k, shared)
            assert len(exchange.fits(k)) == 1 + first, "the warm-up comes once"
            kept = {n: unpacked(bits).numpy() for n, bits in exchange.up[k].tensors.items() if n.startswith("rows/")}
            assert {n.removeprefix("rows/"): flags.tolist() for n, flags in kept.items()} == {
                n: (m[:, 0] > 0).tolist() for n, m in masks[k].items()
            }
            assert {n: t.tolist() for n, t in made.memory[t + 1][k].items() if n.startswith("rows/")} == {
                n: t.tolist() for n, t in exchange.up[k].tensors.items() if n.startswith("rows/")
            }
            fitted[k], _ = train(real.encoder(), shared, list(shared), real.questions(k), epochs(k, "batches", t), real.RULE, masks[k])
            some = {n: fitted[k][n][masks[k][n][:, 0] > 0] if is_b(n) else fitted[k][n] for n in shared}
            real.assert_close({n: x for n, x in exchange.up[k].tensors.items() if n in shared}, some)
            item = exchange.fits(k)[-1]
            held = sum(t.numel() for t in item.start.values())
            assert held == sum(x.size for x in some.values()) and set(item.fixed) == {n for n in masks[k] if shared[n].any()}
            assert bool(item.fixed) == (t > 0)
        shared = mean_of(fitted, shared)
        real.assert_close(made.states[t + 1].shared, shared)
    assert len({str(m) for m in masks.values()}) == len(masks) > 1, "devices differ"
    assert_predicts(made, dict.fromkeys(EVERYBODY, shared))


def test_a_mask_is_chosen_in_the_methods_batches_whatever_a_curriculum_opens() -> None:
    """Of 13, 6, 18 and 9 examples in batches of 4 the last batches have 1, 2, 2 and 1; of some devices it is the first that opens."""
    method: Any = replace(real.INNER, batch_size=4, curriculum=ByLoss(start=0.05))
    made = real.watch(method, real.compute("stacked"), replace(real.POOL, cohort=4, rounds=1, mask=Mask(KEEP)))
    (exchange,) = made.asked("train")
    short = 0
    for k in EVERYBODY:
        warm, fit = exchange.fits(k)
        assert lists(warm.batches) == lists(shuffled(real.SIZES[k], 4, real.SEED, "mask", k))
        kept = {n.removeprefix("rows/"): unpacked(t).tolist() for n, t in exchange.up[k].tensors.items() if n.startswith("rows/")}
        assert kept == {n: (m[:, 0] > 0).tolist() for n, m in derived(k, real.start(), 4).items()}
        short += max(map(len, fit.batches)) < 4
    assert short


def test_rows_over_others_are_a_mask() -> None:
    """A Fit of some rows over what the others are comes to what one under a mask does, with a correction too; state is the rows' own."""
    start = {n: t + 0.05 for n, t in real.model().initial.items()}
    rows = {n: torch.tensor([1, 4, 5, 11]) for n in start if is_b(n)}
    correction = {n: torch.full_like(t, 1e-2) for n, t in start.items()}
    batches = real.INNER.cut(real.devices()[0], "batches")
    whole = Fit(start, real.devices()[0].train, batches, real.INNER.optimizer, correction=correction, means=True)
    flags = {n: torch.zeros(len(start[n]), 1).index_fill_(0, at, 1.0) for n, at in rows.items()}
    cut = lambda of: {n: t[rows[n]] if n in rows else t for n, t in of.items()}  # noqa: E731
    few = replace(whole, start=cut(start), fixed={n: start[n] for n in rows}, rows=rows, correction=cut(correction))
    for kind in ("serial", "stacked"):
        due, made = (done.result for done in real.compute(kind).run([replace(whole, mask=flags), few]))
        for of in ("tensors", "gradient"):
            real.assert_close(getattr(made, of), real.arrays(cut(getattr(due, of))))
        assert all(made.moments.first[n].shape == (4, 2) for n in rows)
