"""Some layers shared under plain federated LoRA, against NumPy, from FibecFed's own sentences of it with every neuron trained; and that
``fibecfed`` with all neurons and without a curriculum is the same, to the bit."""

from __future__ import annotations

from dataclasses import replace
from functools import cache
from typing import Any

import numpy as np
import pytest
import torch

from fedloom.client.curricula.everything import Everything
from fedloom.methods.fibecfed import FibecFed, Gal
from fedloom.methods.rolora import RoLora
from fedloom.server.participation import Pool
from fedloom.server.sharing import Sharing, Which
from fedloom.tensors import nbytes
from tests.oracle import real
from tests.oracle.numpy_fibecfed import choose_gal, combine, sensitivity, shared_names
from tests.oracle.test_baselines import epochs, kinds
from tests.oracle.test_rivals import assert_predicts, assert_travels, is_a, mean_of, part, trained

pytestmark = pytest.mark.no_cover

Arrays = dict[str, np.ndarray]
METHOD: Any = real.INNER
POOL = Pool((0, 1, 2, 3), 2, 2, 3, sharing=Sharing(0.5))


@cache
def derived(which: str) -> tuple[tuple[int, ...], np.ndarray, dict[int, np.ndarray]]:
    """The GAL, the combined scores, and each device's: "On one device batch"; "Σ n_k/n s_l^k"; the half with the smallest."""
    said = {}
    for k in POOL.clients:
        batch = [real.questions(k)[i] for i in real.INNER.cut(real.devices()[k], "batches")[0]]
        said[k] = sensitivity(real.encoder(), real.start(), batch)
    scores = combine(list(said.values()), [real.SIZES[k] for k in said])
    return choose_gal(scores, real.LAYERS // 2, which), scores, said


@cache
def made(which: Which = "least") -> real.Run:
    return real.watch(METHOD, real.compute("stacked"), replace(POOL, sharing=Sharing(0.5, which=which)))


@pytest.mark.parametrize("which", ["least", "most"])
def test_the_layers_are_those_of_the_devices_scores(which: Which) -> None:
    """ "It uploads the layer scores only"; nothing goes down, for every device has the start."""
    gal, scores, said = derived(which)
    asking, *_ = made(which).exchanges
    assert asking.op == "layer_scores" and tuple(asking.down) == POOL.clients
    for k, update in asking.up.items():
        assert not asking.down[k].tensors and dict(asking.down[k].settings) == {"batch_size": real.INNER.batch_size}
        assert set(update.tensors) == {"layer_scores"} and nbytes(update.tensors) == 8 * real.LAYERS
        np.testing.assert_allclose(update.tensors["layer_scores"].numpy(), said[k], rtol=1e-4, atol=1e-6)
    facts = made(which).states[0].facts
    np.testing.assert_allclose(facts["layer_scores"], scores, rtol=1e-4, atol=1e-6)
    assert tuple(facts["gal"]) == gal and facts["depth"] == real.LAYERS and made(which).private[0] == {k: {} for k in POOL.clients}


@kinds
def test_two_rounds_of_half_of_the_layers(kind: real.Kind) -> None:
    """ "Non-GAL LoRA never leaves the device and persists between its participations"; personalised: "each device with its own local
    tensors + the shared ones"; the global model has them at their start."""
    run = real.watch(METHOD, real.compute(kind), POOL)
    start, travels = real.start(), shared_names(real.start(), derived("least")[0])
    shared = part(start, travels)
    own: dict[int, Arrays] = {k: {n: x for n, x in start.items() if n not in travels} for k in POOL.clients}
    took_part = set[int]()
    for t, exchange in enumerate(run.asked("train")):
        fitted = {}
        assert len(exchange.down) == 2
        for k in exchange.down:
            fitted[k], losses = trained(k, {**own[k], **shared}, start, epochs(k, "batches", t))
            own[k] = {n: fitted[k][n] for n in own[k]}
            assert exchange.up[k].metrics["loss"] == pytest.approx(np.mean(losses), abs=1e-4)
        assert_travels(exchange, travels, travels)
        took_part |= set(exchange.down)
        shared = mean_of(fitted, travels)
        real.assert_close(run.states[t + 1].shared, shared)
        for k in POOL.clients:
            real.assert_close(run.private[t + 1][k], own[k] if k in took_part else {})
    assert len(took_part) == 3, "one takes part twice, so that it goes on from where it was, and one never"
    assert_predicts(run, {k: {**shared, **own[k]} for k in POOL.clients})
    assert run.assembled is not None
    real.assert_close(run.assembled, shared)


def test_fibecfed_with_all_neurons_and_no_curriculum_is_the_same_to_the_bit() -> None:
    """Its GAL, its batches, its rounds; it asks for more, because it hands the start out and tells the layers."""
    method: Any = FibecFed(real.INNER, Everything(), Gal(0.5), keep=1.0)
    theirs, mine = real.watch(method, real.compute("stacked"), replace(POOL, sharing=Sharing())), made()
    assert theirs.states[0].facts["layer_scores"] == mine.states[0].facts["layer_scores"]
    for state, other in zip(theirs.states, mine.states, strict=True):
        assert state.facts["gal"] == other.facts["gal"] and state.shared.keys() == other.shared.keys()
        assert all(torch.equal(t, other.shared[n]) for n, t in state.shared.items())
    for k, tensors in mine.private[-1].items():
        assert all(torch.equal(t, theirs.private[-1][k][n]) for n, t in tensors.items())
    for k, said in theirs.logits.items():
        assert all(torch.equal(t, mine.logits[k][split]) for split, t in said.items())
    assert [x.op for x in theirs.exchanges] == ["inspect", "adopt", "train", "train", "predict"]
    assert [x.op for x in mine.exchanges] == ["layer_scores", "train", "train", "predict"]


def test_what_a_round_does_not_train_of_its_own_layers_a_device_keeps() -> None:
    """RoLoRA's A stays put in round 0 and its B in round 1, of a device's own layers too; nobody is asked for random layers."""
    other: Any = RoLora(real.INNER)
    run = real.watch(other, real.compute("stacked"), replace(POOL, cohort=4, sharing=Sharing(count=1, which="random")))
    assert [exchange.op for exchange in run.exchanges] == ["train", "train", "predict"] and "layer_scores" not in run.states[0].facts
    travels = shared_names(real.start(), run.states[0].facts["gal"])
    own = {n: x for n, x in real.start().items() if n not in travels}
    for k in POOL.clients:
        first, second = run.private[1][k], run.private[2][k]
        assert set(first) == {n for n in own if not is_a(n)} and set(second) == set(own)
        for n, t in second.items():
            assert n not in first if is_a(n) else torch.equal(t, first[n])
            assert bool((t - torch.from_numpy(own[n])).abs().max() > 1e-3)
