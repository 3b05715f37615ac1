"""LISA (2403.17919) against the NumPy derivation of training: which layers, in which period, and what the server makes of it."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace

import numpy as np
import pytest
import torch

from fedloom.methods.lisa import Lisa
from fedloom.model.blocks import layer_of
from fedloom.model.names import is_head
from fedloom.seeds import derive
from fedloom.server.participation import Pool, uniform
from tests.oracle import real
from tests.oracle.numpy_training import aggregate, train
from tests.oracle.test_baselines import epochs

EVERY, PROX = 3, 0.5


@pytest.mark.parametrize("kind", ["serial", "stacked"])
def test_round_after_round(kind: real.Kind) -> None:
    """2 of 4 layers and the head, others after 3 steps; a device counts with what it was sent where it trained nothing."""
    made = real.run(Lisa(real.INNER, layers=2, every=EVERY), kind)
    shared, drawn = real.start(), set()
    for t, exchange in enumerate(made.asked("train")):
        cohort, fitted = uniform(real.POOL, t), []
        for k in cohort:
            now, batches, changed = dict(shared), epochs(k, "batches", t), set()
            for i in range(0, len(batches), EVERY):
                layers = derive(real.SEED, "lisa", t, k, i // EVERY).choice(4, 2, replace=False).tolist()
                names = {n for n in now if is_head(n) or layer_of(n) in layers}
                now, _ = train(real.encoder(), now, names, real.questions(k), batches[i : i + EVERY], real.RULE)
                changed |= names
                drawn.add(tuple(sorted(layers)))
            assert set(exchange.up[k].tensors) == changed
            fitted.append(now)
        shared = aggregate(fitted, [real.SIZES[k] for k in cohort])
        real.assert_close(made.states[t + 1].shared, shared)
    assert len(drawn) > 3
    assert any(len(e.up[k].tensors) < len(shared) for e in made.asked("train") for k in e.up)


@pytest.mark.parametrize("kind", ["serial", "stacked"])
def test_fedproxs_term_holds_every_period_to_what_was_sent(kind: real.Kind) -> None:
    """(μ/2)·‖w − w_t‖², also where an earlier period has moved w; each period has dropout masks of its own."""
    pool = Pool(real.POOL.clients, 3, 1, real.POOL.seed)
    made = real.run(Lisa(replace(real.INNER, prox=PROX), layers=2, every=EVERY), kind, pool)
    (exchange,) = made.asked("train")
    fitted, away = [], 0
    for k in exchange.down:
        sent, now, batches, fits = exchange.down[k].tensors, real.start(), epochs(k, "batches", 0), exchange.fits(k)
        assert len(fits) == len({fit.dropout_seed for fit in fits}) == -(-len(batches) // EVERY)
        for i, fit in enumerate(fits):
            assert all(torch.equal((fit.anchor or fit.start)[n], sent[n]) for n in fit.start)
            away += sum(not torch.equal(t, sent[n]) for n, t in fit.start.items())
            cut = batches[i * EVERY : (i + 1) * EVERY]
            now, _ = train(real.encoder(), now, set(fit.start), real.questions(k), cut, real.RULE, pull=PROX, towards=real.start())
        fitted.append(now)
    assert away, "a period begins elsewhere"
    real.assert_close(made.states[1].shared, aggregate(fitted, [real.SIZES[k] for k in exchange.down]))


def test_every_layer_is_as_likely_and_what_is_in_none_is_always_there() -> None:
    method, tensors, client = Lisa(layers=1), real.model().initial, replace(real.devices()[1], seed=9)
    found = np.zeros(4)
    for t in range(200):
        names = method.drawn(tensors, client, t, 0)
        (layer,) = {layer_of(n) for n in names} - {None}
        assert {n for n in tensors if is_head(n)} < set(names)
        found[layer or 0] += 1
    assert (abs(found - 50) < 25).all()


def test_the_layers_of_a_period_are_drawn_for_it_alone_and_follow_from_the_seed() -> None:
    """Any two of four as often as any other two; others on another device, in another round, in another period, from another seed."""
    method, tensors = Lisa(layers=2), real.model().initial

    def drawn(seed: int = 9, client: int = 1, round: int = 0, period: int = 0) -> tuple[int, ...]:
        names = method.drawn(tensors, replace(real.devices()[client], seed=seed), round, period)
        layers = tuple(sorted({layer for n in names if (layer := layer_of(n)) is not None}))
        assert names == [n for n in sorted(tensors) if layer_of(n) in {*layers, None}] and len(layers) == 2
        return layers

    ways: list[list[tuple[int, ...]]] = [
        [drawn(seed=i) for i in range(300)],
        [drawn(client=i % 4, round=i // 4) for i in range(300)],
        [drawn(period=i) for i in range(300)],
    ]
    for found in ways:
        often = Counter(found)
        assert len(often) == 6 and all(abs(count - 50) < 26 for count in often.values()), often
    assert len({drawn(client=k) for k in range(4)}) > 1 and drawn() == drawn()


def test_what_makes_no_sense_is_refused() -> None:
    with pytest.raises(ValueError, match="layers is 0"):
        Lisa(layers=0)
    with pytest.raises(ValueError, match=r"draws 5 of the layers that are trained, and there are 4: \[0, 1, 2, 3\]"):
        Lisa(layers=5).init(real.model())
