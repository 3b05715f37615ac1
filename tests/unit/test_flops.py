"""Counted operations: against a count by hand, and at lengths that were never counted."""

from __future__ import annotations

from dataclasses import replace
from functools import cache

import numpy as np
import pytest
from torch.utils.flop_counter import FlopCounterMode

from fedloom.compute.flops import LENGTHS, Flops
from fedloom.compute.serial import Serial, cost
from fedloom.compute.work import AdamW, Fisher, Fit, Predict, Score, Sensitivity, Spectrum
from fedloom.model.blocks import layer_of
from fedloom.model.factors import cut
from fedloom.model.names import is_factor, is_up
from tests import families, tiny

HIDDEN, INNER, LAYERS, RANK, CLASSES = 16, 32, 3, 2, 3


@cache
def counted() -> Flops:
    return Flops(tiny.model())


def by_hand(length: int) -> int:
    """A linear map of L tokens from a to b numbers is 2·L·a·b operations; BERT is these and two attention products a layer."""

    def linear(rows: int, a: int, b: int) -> int:
        return 2 * rows * a * b

    lora = linear(length, HIDDEN, RANK) + linear(length, RANK, HIDDEN)
    attention = 4 * linear(length, HIDDEN, HIDDEN) + 2 * lora + 2 * linear(length, HIDDEN, length)
    feed_forward = linear(length, HIDDEN, INNER) + linear(length, INNER, HIDDEN)
    return LAYERS * (attention + feed_forward) + linear(1, HIDDEN, HIDDEN) + linear(1, HIDDEN, CLASSES)


@pytest.mark.parametrize("length", [1, 2, 7, 16, 31])
def test_forward_equals_the_count_by_hand(length: int) -> None:
    assert float(counted().forward(length)) == pytest.approx(by_hand(length), rel=1e-9)


def test_the_gradient_of_the_head_costs_one_forward_and_one_outer_product() -> None:
    head = frozenset({"base_model.model.classifier.weight"})
    assert float(counted().step(head, 9)) == pytest.approx(by_hand(9) + 2 * HIDDEN * CLASSES, rel=1e-9)


@pytest.mark.parametrize("rank", [1, 3, 4])
def test_pairs_of_a_lower_rank_cost_what_their_directions_do(rank: int) -> None:
    """As much as a model whose pairs are of that rank."""
    of = tiny.model(rank=4)
    flops, names = Flops(of), frozenset(of.initial)
    few = Flops(tiny.model(rank=rank))
    assert float(flops.step(names, 9, rank=rank)) == pytest.approx(float(few.step(names, 9)), rel=1e-9)
    assert float(flops.step(names, 9, rank=rank)) < float(flops.step(names, 9)) or rank == 4
    texts, batches = tiny.examples(6), [np.arange(4), np.arange(4, 6)]
    given = [cost(Fit(start, texts, batches, AdamW(1e-3)), flops) for start in (cut(of.initial, rank), of.initial)]
    assert given[0] == pytest.approx(cost(Fit(tiny.model(rank=rank).initial, texts, batches, AdamW(1e-3)), few), rel=1e-9)
    assert (given[0][0] < given[1][0]) == (rank < 4)
    scored = Score(cut(of.initial, rank), texts, None)
    assert cost(scored, flops) == pytest.approx(cost(Score(tiny.model(rank=rank).initial, texts, None), few), rel=1e-9)
    rows = {n: 5 for n in names if is_up(n)}
    assert float(flops.step(names, 9, rows, rank=rank)) == pytest.approx(float(few.step(names, 9, rows)), rel=1e-9)
    assert float(few.step(names, 9, rank=4)) == pytest.approx(float(flops.step(names, 9)), rel=1e-9) or rank == 1, "a higher one too"


@pytest.mark.parametrize("length", [11, 30])
@pytest.mark.parametrize("what", ["forward", "all", "factors", "last layer"])
def test_the_polynomial_reproduces_a_length_that_was_not_counted(length: int, what: str) -> None:
    names = {
        "forward": frozenset(),
        "all": frozenset(tiny.model().initial),
        "factors": frozenset(n for n in tiny.model().initial if is_factor(n)),
        "last layer": frozenset(n for n in tiny.model().initial if ".2." in n),
    }[what]
    assert length not in LENGTHS
    assert float(counted()._at(names, length)) == pytest.approx(counted()._count(names, length), rel=1e-9)


@pytest.mark.parametrize("family", ["modernbert", "deberta-v2", "gpt2", "llama"])
def test_other_families_are_quadratic_too(family: str) -> None:
    model = families.model(family)
    flops, names = Flops(model), frozenset(model.initial)
    assert float(flops.step(names, 13)) == pytest.approx(flops._count(names, 13), rel=1e-6)


def test_less_to_train_costs_less_and_never_less_than_a_forward() -> None:
    names = frozenset(tiny.model().initial)
    late = frozenset(n for n in names if ".0." not in n and ".1." not in n)
    forward, some, everything = counted().forward(12), counted().step(late, 12), counted().step(names, 12)
    assert forward < some < everything < 4 * forward


def test_costs_of_items_by_hand() -> None:
    model, flops = tiny.model(), counted()
    examples = tiny.examples(5)
    names, lengths = frozenset(model.initial), examples.lengths
    batches = [np.array([0, 3]), np.array([4]), np.array([0, 3])]
    fit = Fit(model.initial, examples, batches, AdamW(1e-3))
    longest = [2 * int(max(lengths[0], lengths[3])), int(lengths[4]), 2 * int(max(lengths[0], lengths[3]))]
    expected = sum(n * float(flops.step(names, at // n)) for n, at in zip((2, 1, 2), longest, strict=True))
    assert cost(fit, flops) == (pytest.approx(expected), 5)
    each = sum(float(flops.step(names, int(n))) for n in lengths)
    head = frozenset(n for n in names if not is_factor(n))
    assert cost(Score(model.initial, examples), flops) == (pytest.approx(each), 0)
    assert cost(Fisher(model.initial, examples), flops) == (pytest.approx(each), 0)
    assert cost(Score(model.initial, examples, head), flops)[0] < each
    assert cost(Predict(model.initial, examples), flops) == (pytest.approx(sum(by_hand(int(n)) for n in lengths)), 0)
    assert cost(Predict(model.initial, examples.subset([])), flops) == (0.0, 0)
    assert cost(Predict(model.initial, examples, measures=True), flops) == (0.0, 0), "a measurement is in no book"


@pytest.mark.parametrize("layer", [0, 2])
def test_a_measurement_costs_what_is_counted_while_it_is_made(layer: int) -> None:
    """A spectrum's gradients and products, and a sensitivity's passes, of tensors from one layer on: all, and the last layer's alone."""
    model, examples, batch = tiny.model(), tiny.examples(6, seed=2), np.arange(3)
    names = frozenset(n for n in model.initial if (of := layer_of(n)) is None or of >= layer)
    at = {n: model.initial[n] for n in names}
    for item in (Spectrum(model.initial, examples, batch, names, probes=2, steps=5), Sensitivity(at, examples, batch)):
        longest = int(examples.lengths[batch].max())
        same = replace(item, examples=examples.subset(np.flatnonzero(examples.lengths == longest)[:1]), batch=np.array([0]))
        due = cost(same, counted())[0]  # counted now, so that the run does not count it again while it is counted itself
        with FlopCounterMode(display=False) as counter:
            Serial(model).run([same])
        assert due == pytest.approx(counter.get_total_flops(), rel=1e-6), type(item).__name__
