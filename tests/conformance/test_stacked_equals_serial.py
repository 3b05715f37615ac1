"""The stacked compute gives what the plain one gives, for every work item, option, stack size and family, within the tolerances of
``docs/engines.md``. A neighbour's mask, step count, dropout or padding would miss them by orders of magnitude."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cache
from typing import Any

import numpy as np
import pytest
import torch

from fedloom.compute.compute import Done
from fedloom.compute.serial import Serial
from fedloom.compute.stacked import PASS, Stacked, activation_bytes
from fedloom.compute.work import AdamW, Fisher, Fit, Fitted, Moments, Predict, Score, Sensitivity, WorkItem
from fedloom.data.examples import Examples
from fedloom.messages import Tensors
from fedloom.model.adapters import is_factor
from fedloom.model.base import Model
from fedloom.tensors import fingerprint
from tests import families, tiny

TENSORS = 2e-5
"""Absolute, on tensors near 1 after a few steps of lr 0.01."""
LOSSES = 5e-5
SCORES = 1e-4
"""Relative."""
LOGITS = 2e-5
BF16_TENSORS, BF16_LOGITS = 0.05, 0.1
"""Absolute, in bfloat16: 8 bits of mantissa, and Adam turns a flipped sign of a tiny gradient into a whole step."""

STACKS = (1, 2, 3, 0)
SIZES = (5, 12, 1, 9)
OPTIMIZER = AdamW(1e-2, weight_decay=0.01, clip=0.5)


@cache
def model(dropout: float = 0.0, precision: str = "float32") -> Model:
    return tiny.model(precision, dropout)  # type: ignore[arg-type]


def pull(now: Tensors, start: Tensors) -> torch.Tensor:
    """FedProx's term, a little steeper on the head."""
    return 0.05 * sum((now[n] - start[n]).square().sum() * (1 if is_factor(n) else 2) for n in now)  # type: ignore[return-value]


def examples(client: int) -> Examples:
    return tiny.examples(SIZES[client], seed=20 + client)


def batches(client: int) -> list[np.ndarray]:
    """Two epochs in batches of up to 4: 4, 6, 2 and 6 steps, the last one of an epoch short."""
    order = np.random.default_rng(client).permutation(SIZES[client])
    return [order[at : at + 4] for at in range(0, len(order), 4)] * 2


def rows_mask(of: Model, client: int) -> dict[str, torch.Tensor]:
    """A mask of output neurons (d_out, 1) on every B, one of single weights on the head, another for each client."""
    generator = torch.Generator().manual_seed(client)
    ups = {n: (torch.rand(t.shape[0], 1, generator=generator) < 0.5).float() for n, t in of.initial.items() if ".lora_B." in n}
    return {**ups, "base_model.model.classifier.weight": (torch.rand(3, 16, generator=generator) < 0.5).float()}


def some_moments(of: Model, client: int) -> Moments:
    first = {n: 0.1 * t for n, t in families.moved(of, 50 + client).items()}
    second = {n: t.square() for n, t in families.moved(of, 90 + client).items()}
    return Moments(first, second, 3 + client)


OPTIONS: dict[str, Callable[[Model, int], dict[str, Any]]] = {
    "plain": lambda m, k: {},
    "mask": lambda m, k: {"mask": rows_mask(m, k)},
    "penalty": lambda m, k: {"penalty": pull},
    "moments": lambda m, k: {"moments": some_moments(m, k)},
    "fixed": lambda m, k: {"fixed": {n: t for n, t in families.moved(m, k).items() if not is_factor(n)}},
    "all": lambda m, k: {"mask": rows_mask(m, k), "penalty": pull, "moments": some_moments(m, k)},
    "no clip": lambda m, k: {"optimizer": AdamW(1e-2, clip=0.0)},
}


def fit(of: Model, option: str, client: int) -> Fit:
    extra = {"optimizer": OPTIMIZER, **OPTIONS[option](of, client)}
    start = {n: t for n, t in families.moved(of, client).items() if n not in extra.get("fixed", {})}
    return Fit(start, examples(client), batches(client), dropout_seed=70 + client, **extra)


@cache
def fitted(option: str, dropout: float, stack: int | None, precision: str = "float32") -> list[Done]:
    """Four clients' training, one by one (None) or stacked."""
    of = model(dropout, precision)
    items = [fit(of, option, k) for k in range(4)]
    return (Serial(of) if stack is None else Stacked(of, stack)).run(items)


def gap(first: Tensors, second: Tensors) -> float:
    assert set(first) == set(second)
    return max(float((first[n] - second[n]).abs().max()) for n in first)


def relative(first: np.ndarray, second: np.ndarray) -> float:
    return float(np.max(np.abs(first - second) / np.maximum(np.abs(first), 1e-30))) if len(first) else 0.0


@pytest.mark.parametrize("stack", STACKS)
@pytest.mark.parametrize("dropout", [0.0, 0.2])
@pytest.mark.parametrize("option", OPTIONS)
def test_fit(option: str, dropout: float, stack: int) -> None:
    for one, many in zip(fitted(option, dropout, None), fitted(option, dropout, stack), strict=True):
        alone, stacked = one.result, many.result
        assert isinstance(alone, Fitted)
        assert gap(alone.tensors, stacked.tensors) <= TENSORS
        assert alone.losses.shape == stacked.losses.shape
        assert np.abs(alone.losses - stacked.losses).max() <= LOSSES
        assert gap(alone.moments.first, stacked.moments.first) <= TENSORS
        assert gap(alone.moments.second, stacked.moments.second) <= TENSORS
        assert alone.moments.steps == stacked.moments.steps
        assert (one.flops, one.examples) == (many.flops, many.examples)


@pytest.mark.parametrize("option", OPTIONS)
def test_every_option_and_dropout_changes_what_is_learnt(option: str) -> None:
    """The comparison above means something: what could be confused differs by far more than the tolerance."""
    done = fitted(option, 0.0, None)
    assert all(gap(done[k].result.tensors, fitted(option, 0.2, None)[k].result.tensors) > 50 * TENSORS for k in range(4))
    if option not in ("plain", "fixed"):
        assert max(gap(done[k].result.tensors, fitted("plain", 0.0, None)[k].result.tensors) for k in range(4)) > 50 * TENSORS


@pytest.mark.parametrize("compute", [Serial, Stacked])
def test_where_the_mask_is_zero_nothing_moves_and_elsewhere_it_does(compute: Callable[[Model], Any]) -> None:
    of = model()
    items = [fit(of, "mask", k) for k in range(4)]
    for item, done in zip(items, compute(of).run(items), strict=True):
        for name, mask in item.mask.items():
            kept = mask.expand_as(item.start[name]) == 0
            moved = done.result.tensors[name] != item.start[name]
            assert not moved[kept].any()
            assert moved[~kept].all()


@pytest.mark.parametrize("dropout", [0.0, 0.2])
def test_a_client_with_fewer_steps_stops_exactly_where_it_would_alone(dropout: float) -> None:
    """Client 2 does 2 steps beside neighbours with 6: to the last bit what the same stack gives when all stop there."""
    of = model(dropout)
    items = [fit(of, "plain", k) for k in range(4)]
    cut = [Fit(i.start, i.examples, i.batches[:2], i.optimizer, dropout_seed=i.dropout_seed) for i in items]
    whole, short = Stacked(of, 4).run(items), Stacked(of, 4).run(cut)
    assert [len(done.result.losses) for done in whole] == [4, 6, 2, 6]
    assert gap(whole[2].result.tensors, short[2].result.tensors) <= TENSORS
    assert gap(whole[2].result.tensors, Serial(of).run([items[2]])[0].result.tensors) <= TENSORS
    assert gap(whole[1].result.tensors, short[1].result.tensors) > 50 * TENSORS


def test_no_steps_at_all() -> None:
    of = model()
    items = [Fit(families.moved(of, k), examples(k), batches(k)[:k], OPTIMIZER) for k in (2, 0)]
    for one, many in zip(Serial(of).run(items), Stacked(of).run(items), strict=True):
        assert gap(one.result.tensors, many.result.tensors) <= TENSORS
        assert gap(one.result.moments.first, many.result.moments.first) <= TENSORS
        assert len(one.result.losses) == len(many.result.losses) == one.result.moments.steps
    assert fingerprint(one.result.tensors) == fingerprint(items[1].start)


@pytest.mark.parametrize("compute", [Serial, Stacked])
def test_training_in_two_halves_with_the_moments_is_training(compute: Callable[[Model], Any]) -> None:
    of = model()
    whole = fit(of, "plain", 1)
    (all_,) = compute(of).run([whole])
    (first,) = compute(of).run([Fit(whole.start, whole.examples, whole.batches[:3], OPTIMIZER)])
    half = Fit(first.result.tensors, whole.examples, whole.batches[3:], OPTIMIZER, moments=first.result.moments)
    (second,) = compute(of).run([half])
    assert gap(all_.result.tensors, second.result.tensors) <= 1e-6
    assert second.result.moments.steps == 6


ORDERS = ([0, 1, 2, 3], [3, 1, 0, 2], [2, 3, 1, 0])


def test_the_order_of_clients_changes_nothing_one_by_one_and_only_the_last_digits_in_a_stack() -> None:
    of = model(0.2)
    items = [fit(of, "mask", k) for k in range(4)]
    for order in ORDERS:
        alone = Serial(of).run([items[k] for k in order])
        stacked = Stacked(of, 4).run([items[k] for k in order])
        for k, one, many in zip(order, alone, stacked, strict=True):
            assert fingerprint(one.result.tensors) == fingerprint(fitted("mask", 0.2, None)[k].result.tensors)
            assert gap(many.result.tensors, fitted("mask", 0.2, 0)[k].result.tensors) <= TENSORS


def test_the_same_items_twice_give_the_same_bits() -> None:
    of = model(0.2)
    items = [fit(of, "all", k) for k in range(4)]
    for one, again in zip(fitted("all", 0.2, 3), Stacked(of, 3).run(items), strict=True):
        assert fingerprint(one.result.tensors) == fingerprint(again.result.tensors)


def test_items_that_are_not_alike_do_not_share_a_stack() -> None:
    of = model()
    items: list[WorkItem] = [
        fit(of, "plain", 0),
        Score(families.moved(of, 1), examples(1)),
        fit(of, "mask", 1),
        Predict(families.moved(of, 0), examples(0)),
        fit(of, "fixed", 3),
        Score(families.moved(of, 2), examples(2), frozenset(of.head)),
        fit(of, "no clip", 2),
        Sensitivity(families.moved(of, 3), examples(3), np.arange(4)),
        Fisher(families.moved(of, 3), examples(3)),
    ]
    for one, many in zip(Serial(of).run(items), Stacked(of).run(items), strict=True):
        assert type(one.result) is type(many.result)
        assert (one.flops, one.examples) == (many.flops, many.examples)
        if isinstance(one.result, Fitted):
            assert gap(one.result.tensors, many.result.tensors) <= TENSORS


def test_what_is_no_work_item_is_an_error_in_both() -> None:
    for compute in (Serial(model()), Stacked(model())):
        with pytest.raises((AttributeError, TypeError)):
            compute.run(["train"])  # type: ignore[list-item]


# measuring items

OVER = {"all": None, "head": "head", "factors": "factors"}


def over_of(of: Model, what: str | None) -> frozenset[str] | None:
    return None if what is None else frozenset(n for n in of.initial if is_factor(n) == (what == "factors"))


def many(client: int) -> Examples:
    """40, 3, 17 and 1 examples: more than one pass for some."""
    return tiny.examples((40, 3, 17, 1)[client], seed=30 + client)


@pytest.mark.parametrize("stack", STACKS)
@pytest.mark.parametrize("over", OVER)
def test_score(over: str, stack: int) -> None:
    of = model()
    items = [Score(families.moved(of, k), many(k), over_of(of, OVER[over])) for k in range(4)]
    for one, other in zip(Serial(of).run(items), Stacked(of, stack).run(items), strict=True):
        assert one.result.dtype == other.result.dtype == np.float64
        assert relative(one.result, other.result) <= SCORES
        assert (one.result > 0).all()


@pytest.mark.parametrize("stack", STACKS)
@pytest.mark.parametrize("over", OVER)
def test_fisher(over: str, stack: int) -> None:
    of = model()
    items = [Fisher(families.moved(of, k), many(k), over_of(of, OVER[over])) for k in range(4)]
    for one, other in zip(Serial(of).run(items), Stacked(of, stack).run(items), strict=True):
        assert set(one.result) == set(other.result) == (over_of(of, OVER[over]) or set(of.initial))
        for name, fisher in one.result.items():
            assert torch.allclose(fisher, other.result[name], rtol=SCORES, atol=1e-9)


def test_fisher_sums_to_the_mean_score() -> None:
    of = model()
    for compute in (Serial(of), Stacked(of)):
        score, fisher = compute.run([Score(families.moved(of), many(2)), Fisher(families.moved(of), many(2))])
        assert float(sum(f.double().sum() for f in fisher.result.values())) == pytest.approx(score.result.mean(), rel=1e-5)


@pytest.mark.parametrize("stack", STACKS)
@pytest.mark.parametrize("norm", ["difference", "norms"])
def test_sensitivity(norm: Any, stack: int) -> None:
    of = model()
    items = [Sensitivity(families.moved(of, k), examples(k), batches(k)[0], 0.5, norm) for k in range(4)]
    for one, other in zip(Serial(of).run(items), Stacked(of, stack).run(items), strict=True):
        assert one.result.shape == (3,)
        tolerance = SCORES if norm == "difference" else 1e-2
        assert np.allclose(one.result, other.result, rtol=tolerance, atol=1e-6)


@pytest.mark.parametrize("stack", STACKS)
def test_predict(stack: int) -> None:
    of = model()
    shards = [many(0), many(1), many(2).subset([]), many(3)]
    items = [Predict(families.moved(of, k), shard) for k, shard in enumerate(shards)]
    for one, other, shard in zip(Serial(of).run(items), Stacked(of, stack).run(items), shards, strict=True):
        assert one.result.shape == other.result.shape == (len(shard), 3)
        assert torch.allclose(one.result, other.result, atol=LOGITS, rtol=0)


def test_predicting_nothing() -> None:
    items = [Predict(families.moved(model()), many(2).subset([]))] * 2
    assert [tuple(done.result.shape) for done in Stacked(model()).run(items)] == [(0, 3), (0, 3)]


@pytest.mark.parametrize("compute", [Serial, Stacked])
def test_scoring_over_what_is_not_there(compute: Callable[[Model], Any]) -> None:
    item = Score(families.moved(model()), many(1), frozenset({"stranger"}))
    with pytest.raises(ValueError, match=r"Score is over \['stranger'\], none of which is among the tensors"):
        compute(model()).run([item])


# bfloat16


@pytest.mark.parametrize("stack", [1, 3])
@pytest.mark.parametrize("option", ["plain", "mask", "all"])
def test_fit_in_bfloat16(option: str, stack: int) -> None:
    for one, many_ in zip(fitted(option, 0.0, None, "bf16"), fitted(option, 0.0, stack, "bf16"), strict=True):
        assert {t.dtype for t in many_.result.tensors.values()} == {torch.float32}
        assert gap(one.result.tensors, many_.result.tensors) <= BF16_TENSORS
        assert np.abs(one.result.losses - many_.result.losses).max() <= BF16_TENSORS


def test_bfloat16_predicts_in_bfloat16_and_scores_in_float32() -> None:
    of, plain = model(precision="bf16"), model()
    items = [Predict(families.moved(of, k), many(k)) for k in range(4)]
    for one, other, full in zip(Serial(of).run(items), Stacked(of).run(items), Serial(plain).run(items), strict=True):
        assert torch.allclose(one.result, other.result, atol=BF16_LOGITS, rtol=0)
        assert not torch.equal(one.result, full.result)
    scores = [Score(families.moved(of, k), many(k)) for k in range(4)]
    for one, other, full in zip(Serial(of).run(scores), Stacked(of).run(scores), Serial(plain).run(scores), strict=True):
        assert np.array_equal(one.result, full.result)
        assert relative(one.result, other.result) <= SCORES


# families


@cache
def of_family(family: str, stacked: bool) -> dict[str, list[Done]]:
    """Every kind of item at three clients, by kind."""
    dropped, of = families.model(family, 0.2), families.model(family)

    def compute(which: Model) -> Any:
        return Stacked(which, 3) if stacked else Serial(which)

    fits = [Fit(families.moved(of, k), examples(k), batches(k), OPTIMIZER, dropout_seed=k) for k in (0, 1, 3)]
    return {
        "fit": compute(of).run(fits),
        "fit, dropout": compute(dropped).run(fits),
        "score": compute(of).run([Score(families.moved(of, k), many(k)) for k in (0, 1, 2)]),
        "fisher": compute(of).run([Fisher(families.moved(of, k), many(k)) for k in (0, 1, 2)]),
        "sensitivity": compute(of).run([Sensitivity(families.moved(of, k), examples(k), batches(k)[0]) for k in (0, 1, 3)]),
        "predict": compute(of).run([Predict(families.moved(of, k), many(k)) for k in (0, 1, 2)]),
    }


def pairs(family: str, kind: str) -> Sequence[tuple[Any, Any]]:
    done = zip(of_family(family, False)[kind], of_family(family, True)[kind], strict=True)
    return [(one.result, many.result) for one, many in done]


@pytest.mark.parametrize("kind", ["fit", "fit, dropout"])
@pytest.mark.parametrize("family", families.CONFIGS)
def test_families_fit(family: str, kind: str) -> None:
    for one, many_ in pairs(family, kind):
        assert gap(one.tensors, many_.tensors) <= TENSORS
        assert np.abs(one.losses - many_.losses).max() <= LOSSES


@pytest.mark.parametrize("family", families.CONFIGS)
def test_families_dropout_drops(family: str) -> None:
    for (one, _), (other, _) in zip(pairs(family, "fit"), pairs(family, "fit, dropout"), strict=True):
        assert gap(one.tensors, other.tensors) > 50 * TENSORS


@pytest.mark.parametrize("family", families.CONFIGS)
def test_families_score_and_sensitivity(family: str) -> None:
    for kind in ("score", "sensitivity"):
        for one, many_ in pairs(family, kind):
            assert relative(one, many_) <= SCORES


@pytest.mark.parametrize("family", families.CONFIGS)
def test_families_fisher(family: str) -> None:
    for one, many_ in pairs(family, "fisher"):
        for name, fisher in one.items():
            assert torch.allclose(fisher, many_[name], rtol=SCORES, atol=1e-8)


@pytest.mark.parametrize("family", families.CONFIGS)
def test_families_predict(family: str) -> None:
    for one, many_ in pairs(family, "predict"):
        assert torch.allclose(one, many_, atol=LOGITS, rtol=0)


# memory


def test_as_many_clients_as_fit_into_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    of = model()
    items = [fit(of, "plain", k) for k in range(4)]
    one = activation_bytes(of, 4, max(int(examples(k).lengths.max()) for k in range(4)))
    for clients, size in ((0, 1), (2.5, 2), (3.1, 3), (10**6, PASS // 4)):
        monkeypatch.setattr("fedloom.compute.stacked._free_bytes", lambda device, n=clients: int(n * one / 0.4))
        assert Stacked(of)._fitting(items) == size
    assert activation_bytes(of, 8, 10) > activation_bytes(of, 4, 10) > activation_bytes(of, 4, 5)
