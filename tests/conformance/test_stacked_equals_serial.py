"""The stacked compute gives what the plain one gives, for every work item, option, stack size and family, within the tolerances of
``docs/engines.md``. A neighbour's mask, step count, dropout or padding would miss them by orders of magnitude."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cache
from typing import Any

import numpy as np
import pytest
import torch

from fedloom.compute.compute import Done
from fedloom.compute.division import Part, chunks, out_of_memory, pass_bytes, states_that_fit
from fedloom.compute.serial import Serial
from fedloom.compute.stacked import Stacked
from fedloom.compute.work import AdamW, Fisher, Fit, Fitted, Moments, Predict, Score, Sensitivity, Smoothing, Spectrum, WorkItem
from fedloom.data.examples import Examples
from fedloom.messages import Tensors
from fedloom.model.adapters import Adapter
from fedloom.model.base import Model, kept_in
from fedloom.model.loading import load
from fedloom.model.names import is_factor
from fedloom.model.passes import Unpackable
from fedloom.model.some_rows import whole as whole_tensor
from fedloom.model.ways import Extent, computed
from fedloom.tensors import fingerprint
from tests import families, tiny

pytestmark = pytest.mark.no_cover
"""The same lines again for every method, kind or size: which lines are reached at all, other tests tell (conftest.py)."""

TENSORS = 1e-4
"""Absolute, on tensors near 1 after a few steps of lr 0.01."""
LOSSES = 5e-5
SCORES = 1e-4
"""Relative."""
LOGITS = 2e-5
BF16_TENSORS, BF16_LOGITS = 0.05, 0.1
"""Absolute, in bfloat16: 8 bits of mantissa, and Adam turns a flipped sign of a tiny gradient into a whole step."""

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


def turned(given: Tensors) -> dict[str, torch.Tensor]:
    """Each pair through a matrix between its factors, for one client as for many in front."""
    made = {n: t for n, t in given.items() if not n.startswith("between/")}
    return {**made, **{b: made[b] @ given[f"between/{b}"] for b in made if f"between/{b}" in given}}


def turned_over(given: Tensors) -> dict[str, torch.Tensor]:
    """The same with the matrices' transposes."""
    return turned({n: t.transpose(-1, -2) if n.startswith("between/") else t for n, t in given.items()})


def between(of: Model, client: int) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    """A matrix (2, 2) for every pair, and the head; the pairs."""
    moved = families.moved(of, client)
    pairs = {n: t for n, t in moved.items() if is_factor(n)}
    generator = torch.Generator().manual_seed(60 + client)
    cores = {f"between/{n}": torch.eye(2) + 0.2 * torch.randn(2, 2, generator=generator) for n in pairs if ".lora_B." in n}
    return {**cores, **{n: t for n, t in moved.items() if n not in pairs}}, pairs


OPTIONS: dict[str, Callable[[Model, int], dict[str, Any]]] = {
    "plain": lambda m, k: {},
    "mask": lambda m, k: {"mask": rows_mask(m, k)},
    "penalty": lambda m, k: {"penalty": pull},
    "anchor": lambda m, k: {"penalty": pull, "anchor": families.moved(m, 30 + k)},
    "moments": lambda m, k: {"moments": some_moments(m, k)},
    "fixed": lambda m, k: {"fixed": {n: t for n, t in families.moved(m, k).items() if not is_factor(n)}},
    "all": lambda m, k: {"mask": rows_mask(m, k), "penalty": pull, "moments": some_moments(m, k)},
    "through": lambda m, k: {"through": turned, "fixed": between(m, k)[1]},
    "watch": lambda m, k: {"watch": Smoothing(0.6, 0.9), "penalty": pull, "mask": rows_mask(m, k)},
    "no clip": lambda m, k: {"optimizer": AdamW(1e-2, clip=0.0)},
    "bias": lambda m, k: {"bias": torch.linspace(-1.0, 1.0 + k, 3)},
}


def fit(of: Model, option: str, client: int) -> Fit:
    extra = {"optimizer": OPTIMIZER, **OPTIONS[option](of, client)}
    start = {n: t for n, t in families.moved(of, client).items() if n not in extra.get("fixed", {})}
    start = between(of, client)[0] if option == "through" else start
    return Fit(start, examples(client), batches(client), dropout_seed=70 + client, **extra)


@cache
def fitted(option: str, dropout: float, stack: int | None, precision: str = "float32") -> list[Done]:
    """Four clients' training, one by one (None) or stacked."""
    of = model(dropout, precision)
    items = [fit(of, option, k) for k in range(4)]
    return (Serial(of) if stack is None else Stacked(of, stack)).run(items)


def gap(first: Tensors, second: Tensors) -> float:
    assert set(first) == set(second)
    assert all(first[n].shape == second[n].shape for n in first)
    return max((float((first[n] - second[n]).abs().max()) for n in first if first[n].numel()), default=0.0)


def relative(first: np.ndarray, second: np.ndarray) -> float:
    return float(np.max(np.abs(first - second) / np.maximum(np.abs(first), 1e-30))) if len(first) else 0.0


@pytest.mark.parametrize("dropout", [0.0, 0.2])
@pytest.mark.parametrize("option", OPTIONS)
def test_fit(option: str, dropout: float) -> None:
    """All in one stack; that a smaller one gives the same is held to the bit, below."""
    for one, many in zip(fitted(option, dropout, None), fitted(option, dropout, 0), strict=True):
        alone, stacked = one.result, many.result
        assert isinstance(alone, Fitted)
        assert gap(alone.tensors, stacked.tensors) <= TENSORS
        assert alone.losses.shape == stacked.losses.shape
        assert np.abs(alone.losses - stacked.losses).max() <= LOSSES
        assert gap(alone.moments.first, stacked.moments.first) <= TENSORS
        assert gap(alone.moments.second, stacked.moments.second) <= TENSORS
        assert set(alone.importance) == (set(alone.tensors) if option == "watch" else set())
        assert gap(alone.importance, stacked.importance) <= TENSORS
        assert alone.moments.steps == stacked.moments.steps
        assert (one.flops, one.examples) == (many.flops, many.examples)


@pytest.mark.parametrize("option", OPTIONS)
def test_every_option_and_dropout_changes_what_is_learnt(option: str) -> None:
    """The comparison above means something: what could be confused differs by far more than the tolerance."""
    done = fitted(option, 0.0, None)
    assert all(gap(done[k].result.tensors, fitted(option, 0.2, None)[k].result.tensors) > 20 * TENSORS for k in range(4))
    if option not in ("plain", "fixed", "through"):
        assert max(gap(done[k].result.tensors, fitted("plain", 0.0, None)[k].result.tensors) for k in range(4)) > 20 * TENSORS
    if option == "anchor":
        assert max(gap(done[k].result.tensors, fitted("penalty", 0.0, None)[k].result.tensors) for k in range(4)) > 20 * TENSORS


def test_what_is_trained_through_one_function_is_not_mixed_with_another() -> None:
    of = model()
    items = [fit(of, "through", 0), replace(fit(of, "through", 1), through=turned_over)]
    for one, item in zip(Stacked(of).run(items), items, strict=True):
        assert gap(one.result.tensors, Serial(of).run([item])[0].result.tensors) <= TENSORS
    straight = Serial(of).run([fit(of, "through", 1)])[0]
    assert gap(straight.result.tensors, Serial(of).run(items[1:])[0].result.tensors) > 20 * TENSORS


def test_what_is_trained_through_a_function_costs_what_it_reaches() -> None:
    """The gradient of R needs that of B and no more."""
    of = model()
    item = fit(of, "through", 1)
    heads = {n for n in of.initial if not is_factor(n)}
    assert item.reached == {*heads, *(n for n in of.initial if ".lora_B." in n)}
    assert fit(of, "fixed", 1).reached == set(of.initial) - heads
    same = replace(item, start={n: of.initial[n] for n in item.reached}, through=None)
    assert Serial(of).run([item])[0].flops == Serial(of).run([same])[0].flops > 0


def test_some_rows_are_the_models_own() -> None:
    of, b = model(), next(n for n in model().initial if ".lora_B." in n)
    with pytest.raises(ValueError, match="of some rows.*takes no 'through'"):
        Fit({b: of.initial[b][:2]}, examples(0), batches(0), OPTIMIZER, rows={b: torch.arange(2)}, through=turned)


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


def some_rows(of: Model, client: int) -> dict[str, torch.Tensor]:
    """30 of the 64 rows of four B's: other ones for each client, and another number of each B's. One client has none of the first."""
    ups = sorted(n for n in of.initial if ".lora_B." in n)[:4]
    free = np.arange(16 if client == 1 else 0, 64)
    picked = np.sort(np.random.default_rng(client).permutation(free)[:30])
    return {n: torch.from_numpy(picked[picked // 16 == i] % 16) for i, n in enumerate(ups)}


def fit_rows(of: Model, client: int, masked: bool = False, **extra: Any) -> Fit:
    """Training some rows, or (``masked``) all of them, the others being zero and under a mask."""
    rows, start = some_rows(of, client), families.moved(of, client)
    few = {n: start[n][at] for n, at in rows.items()}
    if masked:
        extra["mask"] = {n: torch.zeros(len(start[n]), 1).index_fill(0, at, 1.0) for n, at in rows.items()}
        few = {n: whole_tensor(t, rows[n], len(start[n])) for n, t in few.items()}
    else:
        extra["rows"] = rows
    return Fit({**start, **few}, examples(client), batches(client), OPTIMIZER, dropout_seed=70 + client, **extra)


@pytest.mark.parametrize("dropout", [0.0, 0.2])
@pytest.mark.parametrize("way", ["serial", "packed", "padded rows", "vmap"])
def test_some_rows_train_as_all_would_under_a_mask(way: str, dropout: float) -> None:
    """Tensors, moments and losses; and what it costs is less by the rows' products alone."""
    of = replace(model(dropout))
    if way != "serial":
        of._ways, of.together_by = {}, way
    sparse = (Serial(of) if way == "serial" else Stacked(of)).run([fit_rows(of, k) for k in range(4)])
    for k, (one, many) in enumerate(zip(sparse, Serial(of).run([fit_rows(of, k, masked=True) for k in range(4)]), strict=True)):
        rows, few, whole = some_rows(of, k), one.result, many.result
        for made, due in (
            (few.tensors, whole.tensors),
            (few.moments.first, whole.moments.first),
            (few.moments.second, whole.moments.second),
        ):
            assert all(made[n].shape == (len(at), 2) for n, at in rows.items())
            assert gap({n: t[rows[n]] if n in rows else t for n, t in due.items()}, made) <= TENSORS
        assert np.abs(few.losses - whole.losses).max() <= LOSSES
        assert few.moments.steps == whole.moments.steps and one.examples == many.examples
        tokens = sum(len(b) * int(examples(k).lengths[b].max()) for b in batches(k))
        assert many.flops - one.flops == pytest.approx(3 * 2 * 2 * tokens * (64 - 30), rel=1e-6)


@pytest.mark.parametrize("order", [[0, 1, 2, 3], [3, 1, 0, 2]])
def test_some_rows_are_the_same_to_the_bit_in_any_company(order: list[int]) -> None:
    of = model()
    items = [fit_rows(of, k) for k in range(4)]
    together = dict(zip(order, Stacked(of).run([items[k] for k in order]), strict=True))
    for k, item in enumerate(items):
        (alone,) = Stacked(of).run([item])
        for made, due in ((together[k].result, alone.result),):
            assert fingerprint(made.tensors) == fingerprint(due.tensors)
            assert fingerprint(made.moments.second) == fingerprint(due.moments.second)


def test_some_rows_go_on_from_their_moments() -> None:
    of = model()
    whole = fit_rows(of, 1)
    for compute in (Serial(of), Stacked(of)):
        (all_,) = compute.run([whole])
        (first,) = compute.run([replace(whole, batches=whole.batches[:3])])
        (second,) = compute.run([replace(whole, start=first.result.tensors, batches=whole.batches[3:], moments=first.result.moments)])
        assert gap(all_.result.tensors, second.result.tensors) <= 1e-6


def test_other_numbers_of_rows_go_in_passes_of_their_own() -> None:
    """A device that keeps another share has a matrix of another width; beside each other they come out as alone, to the bit."""
    of = model()
    items = [fit_rows(of, k) for k in range(3)]
    name, rows = max(items[1].rows.items(), key=lambda one: len(one[1]))
    items[1] = replace(items[1], start={**items[1].start, name: items[1].start[name][:-1]}, rows={**items[1].rows, name: rows[:-1]})
    for item, among in zip(items, Stacked(of).run(items), strict=True):
        (alone,) = Stacked(of).run([item])
        assert fingerprint(among.result.tensors) == fingerprint(alone.result.tensors)
        assert {n: t.shape for n, t in among.result.tensors.items()} == {n: t.shape for n, t in item.start.items()}


def test_rows_must_fit_what_is_trained() -> None:
    of = model()
    name, rows = next(iter(some_rows(of, 0).items()))
    for wrong in (
        {"rows": {name: rows[1:]}},
        {"rows": {"nothing": rows}},
        {"rows": {name: rows}, "mask": {name: torch.ones(1, 1)}},
        {"rows": {name: rows}, "penalty": pull},
    ):
        start = {**families.moved(of, 0), name: families.moved(of, 0)[name][rows]}
        with pytest.raises(ValueError, match="a Fit of some rows of"):
            Fit(start, examples(0), batches(0), OPTIMIZER, **wrong)  # type: ignore[arg-type]


def test_an_anchor_must_be_of_use_and_match_what_is_trained() -> None:
    of = model()
    start, elsewhere = families.moved(of, 0), families.moved(of, 1)
    with pytest.raises(ValueError, match="an anchor and no penalty"):
        Fit(start, examples(0), batches(0), OPTIMIZER, anchor=elsewhere)
    few = dict(list(elsewhere.items())[1:])
    with pytest.raises(ValueError, match=f"missing .*{min(set(elsewhere) - set(few))}"):
        Fit(start, examples(0), batches(0), OPTIMIZER, penalty=pull, anchor=few)


def test_an_anchor_is_not_mixed_with_none() -> None:
    """Devices that differ in nothing but whether they have an anchor go in passes of their own."""
    of = model()
    items = [fit(of, option, k) for k in range(3) for option in ("anchor", "penalty")]
    for one, many in zip(Serial(of).run(items), Stacked(of).run(items), strict=True):
        assert gap(one.result.tensors, many.result.tensors) <= TENSORS


def test_what_only_some_have_is_theirs() -> None:
    """A bias, and moments to go on from."""
    of = model()
    items = [fit(of, option, k) for k in range(3) for option in ("plain", "bias", "moments")]
    for one, many in zip(Serial(of).run(items), Stacked(of).run(items), strict=True):
        assert gap(one.result.tensors, many.result.tensors) <= TENSORS
        assert one.result.moments.steps == many.result.moments.steps


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
    assert gap(whole[1].result.tensors, short[1].result.tensors) > 20 * TENSORS


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
    for one, again in zip(fitted("all", 0.2, 0), Stacked(of).run(items), strict=True):
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


@dataclass(frozen=True)
class Stranger:
    """What is read of every item, and no item."""

    at: dict[str, torch.Tensor]
    examples: Examples


@pytest.mark.parametrize("compute", [Serial, Stacked])
def test_what_is_no_work_item_is_an_error_in_both(compute: Callable[[Model], Any]) -> None:
    with pytest.raises(TypeError, match="no compute for Stranger; work items are .*Fit"):
        compute(model()).run([Stranger(dict(model().initial), examples(0))])


# measuring items

OVER = {"all": None, "head": "head", "factors": "factors"}


def over_of(of: Model, what: str | None) -> frozenset[str] | None:
    return None if what is None else frozenset(n for n in of.initial if is_factor(n) == (what == "factors"))


def many(client: int) -> Examples:
    """40, 3, 17 and 1 examples: more than one pass for some."""
    return tiny.examples((40, 3, 17, 1)[client], seed=30 + client)


@pytest.mark.parametrize("over", OVER)
def test_score(over: str) -> None:
    of = model()
    items = [Score(families.moved(of, k), many(k), over_of(of, OVER[over])) for k in range(4)]
    for one, other in zip(Serial(of).run(items), Stacked(of).run(items), strict=True):
        assert one.result.dtype == other.result.dtype == np.float64
        assert relative(one.result, other.result) <= SCORES
        assert (one.result > 0).all()


@pytest.mark.parametrize("over", OVER)
def test_fisher(over: str) -> None:
    of = model()
    items = [Fisher(families.moved(of, k), many(k), over_of(of, OVER[over])) for k in range(4)]
    for one, other in zip(Serial(of).run(items), Stacked(of).run(items), strict=True):
        assert set(one.result) == set(other.result) == (over_of(of, OVER[over]) or set(of.initial))
        for name, fisher in one.result.items():
            assert torch.allclose(fisher, other.result[name], rtol=SCORES, atol=1e-9)


def test_fisher_sums_to_the_mean_score() -> None:
    of = model()
    for compute in (Serial(of), Stacked(of)):
        score, fisher = compute.run([Score(families.moved(of), many(2)), Fisher(families.moved(of), many(2))])
        assert float(sum(f.double().sum() for f in fisher.result.values())) == pytest.approx(score.result.mean(), rel=1e-5)


@pytest.mark.parametrize("norm", ["difference", "norms"])
def test_sensitivity(norm: Any) -> None:
    of = model()
    items = [Sensitivity(families.moved(of, k), examples(k), batches(k)[0], 0.5, norm) for k in range(4)]
    for one, other in zip(Serial(of).run(items), Stacked(of).run(items), strict=True):
        assert one.result.shape == (3,)
        tolerance = SCORES if norm == "difference" else 1e-2
        assert np.allclose(one.result, other.result, rtol=tolerance, atol=1e-6)


def test_predict() -> None:
    of = model()
    shards = [many(0), many(1), many(2).subset([]), many(3)]
    items = [Predict(families.moved(of, k), shard) for k, shard in enumerate(shards)]
    for one, other, shard in zip(Serial(of).run(items), Stacked(of).run(items), shards, strict=True):
        assert one.result.shape == other.result.shape == (len(shard), 3)
        assert torch.allclose(one.result, other.result, atol=LOGITS, rtol=0)


def test_predicting_nothing() -> None:
    items = [Predict(families.moved(model()), many(2).subset([]))] * 2
    assert [tuple(done.result.shape) for done in Stacked(model()).run(items)] == [(0, 3), (0, 3)]


@pytest.mark.parametrize("compute", [Serial, Stacked])
def test_scoring_over_what_is_not_there(compute: Callable[[Model], Any]) -> None:
    at = families.moved(model())
    for over in ({"stranger"}, {"stranger", next(iter(at))}):
        with pytest.raises(ValueError, match=r"Score is over \['stranger'\], not among the tensors that it is at"):
            compute(model()).run([Score(at, many(1), frozenset(over))])


# bfloat16


@pytest.mark.parametrize("stack", [1, 3])
@pytest.mark.parametrize("option", ["plain", "mask", "all"])
def test_fit_in_bfloat16(option: str, stack: int) -> None:
    for one, many_ in zip(fitted(option, 0.0, None, "bf16"), fitted(option, 0.0, stack, "bf16"), strict=True):
        assert {t.dtype for t in many_.result.tensors.values()} == {torch.float32}
        assert gap(one.result.tensors, many_.result.tensors) <= BF16_TENSORS
        assert np.abs(one.result.losses - many_.result.losses).max() <= BF16_TENSORS


def test_bfloat16_predicts_in_bfloat16_and_scores_in_float32() -> None:
    of, plain = model(precision="bf16"), tiny.model()  # one of its own, for what is frozen in it is rounded below
    items = [Predict(families.moved(of, k), many(k)) for k in range(4)]
    for one, other, full in zip(Serial(of).run(items), Stacked(of).run(items), Serial(plain).run(items), strict=True):
        assert torch.allclose(one.result, other.result, atol=BF16_LOGITS, rtol=0)
        assert not torch.equal(one.result, full.result)
    scores = [Score(families.moved(of, k), many(k)) for k in range(4)]
    kept_in(kept_in(plain.module, torch.bfloat16), torch.float32)  # what is frozen has 16 bits in such a run, whatever it is computed in
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
@pytest.mark.parametrize("family", families.APART)
def test_families_fit(family: str, kind: str) -> None:
    for one, many_ in pairs(family, kind):
        assert gap(one.tensors, many_.tensors) <= TENSORS
        assert np.abs(one.losses - many_.losses).max() <= LOSSES


@pytest.mark.parametrize("family", families.APART)
def test_families_dropout_drops(family: str) -> None:
    for (one, _), (other, _) in zip(pairs(family, "fit"), pairs(family, "fit, dropout"), strict=True):
        assert gap(one.tensors, other.tensors) > 20 * TENSORS


@pytest.mark.parametrize("family", families.APART)
def test_families_score_and_sensitivity(family: str) -> None:
    for kind in ("score", "sensitivity"):
        for one, many_ in pairs(family, kind):
            assert relative(one, many_) <= SCORES


@pytest.mark.parametrize("family", families.APART)
def test_families_fisher(family: str) -> None:
    for one, many_ in pairs(family, "fisher"):
        for name, fisher in one.items():
            assert torch.allclose(fisher, many_[name], rtol=SCORES, atol=1e-8)


@pytest.mark.parametrize("family", families.APART)
def test_families_predict(family: str) -> None:
    for one, many_ in pairs(family, "predict"):
        assert torch.allclose(one, many_, atol=LOGITS, rtol=0)


# bits: what a client gets does not depend on its neighbours


def everything(of: Model, k: int, options: Sequence[str] = ("plain", "mask", "penalty", "moments", "fixed")) -> list[WorkItem]:
    at, mine = families.moved(of, k), examples(k)
    fits = [fit(of, option, k) for option in options]
    return [*fits, Score(at, mine), Fisher(at, mine), Sensitivity(at, mine, np.arange(len(mine))[:4]), Predict(at, mine)]


def bits(done: Done) -> str:
    result = done.result
    match result:
        case Fitted():
            of = {"1": result.moments.first, "2": result.moments.second, "importance": result.importance}
            more = {f"{what} {n}": t for what, tensors in of.items() for n, t in tensors.items()}
            return fingerprint({**result.tensors, **more, "loss": torch.tensor(result.losses)})
        case dict():
            return fingerprint(result)
        case other:
            return fingerprint({"": torch.as_tensor(other)})


@pytest.mark.parametrize("option", OPTIONS)
def test_training_is_the_same_to_the_bit_in_a_smaller_stack(option: str) -> None:
    for whole, fewer in zip(fitted(option, 0.2, 0), fitted(option, 0.2, 3), strict=True):
        assert bits(whole) == bits(fewer)


@pytest.mark.parametrize(
    ("family", "dropout"), [("bert", 0.0), *((f, 0.2) for f in families.APART if f not in {*families.UNPACKED, "modernbert"})]
)
def test_the_same_bits_in_any_company(family: str, dropout: float) -> None:
    """Packed passes in float32 on a CPU: alone, in threes and one left over, all together, and all together in small passes.

    ModernBERT cuts a tensor in two inside its feed-forward part, and element-wise kernels round another way when a pass holds a single
    text; DeBERTa-v2 and BLOOM do not run packed. All three are held to the tolerances above. Masks, penalties
    and moments come after the passes and know no family: BERT has each by itself. What is fixed goes into every pass.
    """
    of = families.model(family, dropout)
    assert of.together_by == "packed"
    clients = [everything(of, k) if family == "bert" else everything(of, k, ["all", "fixed"]) for k in range(4)]
    wanted = [[bits(done) for done in Stacked(of, 1).run(items)] for items in clients]
    for stack in (3, 0):
        done = Stacked(of, stack).run([item for items in clients for item in items])
        assert [bits(d) for d in done] == [bit for mine in wanted for bit in mine], stack
    small = Stacked(of, 0)
    small.passes.tokens = 40
    assert [bits(d) for d in small.run([item for items in clients for item in items])] == [bit for mine in wanted for bit in mine]


@pytest.mark.parametrize("family", families.CONFIGS)
def test_how_a_family_runs_together(family: str) -> None:
    """A release of the libraries that no longer lets a family run packed would only be slow; here it is loud."""
    plain, dropped = families.model(family), families.model(family, 0.2)
    slower = {"deberta-v2": ("padded rows", "vmap"), "deberta-v3": ("vmap", "vmap"), "bloom": ("padded rows", "padded rows")}
    assert set(slower) == families.UNPACKED
    assert (plain.together_by, dropped.together_by) == slower.get(family, ("packed", "packed"))
    assert not plain.alone and not dropped.alone


@pytest.mark.parametrize("way", ["packed, whole last layer", "padded rows", "vmap"])
def test_every_way_gives_the_same(way: str) -> None:
    """The slower ways on a model that could run packed."""
    packed, of = model(), tiny.model()
    of._ways, of.together_by = {}, way
    items = [item for k in range(3) for item in everything(of, k)]
    for one, other in zip(Stacked(packed).run(items), Stacked(of).run(items), strict=True):
        match one.result:
            case Fitted():
                assert gap(one.result.tensors, other.result.tensors) <= TENSORS
            case dict():
                assert all(torch.allclose(t, other.result[n], rtol=SCORES, atol=1e-8) for n, t in one.result.items())
            case result:
                assert np.allclose(np.asarray(result), np.asarray(other.result), rtol=SCORES, atol=LOGITS)


def test_chunks_of_one_client_come_back_in_place(monkeypatch: pytest.MonkeyPatch) -> None:
    """A client with more tokens than are predicted at once."""
    monkeypatch.setattr("fedloom.compute.division.CHUNK", 20)
    of, mine = model(), examples(1)
    assert len(chunks(0, mine)) > 2
    (one,), (many,) = (compute.run([Predict(families.moved(of), mine)]) for compute in (Serial(of), Stacked(of)))
    assert torch.allclose(one.result, many.result, atol=LOGITS, rtol=0)


def test_a_changed_base_is_packed_anew() -> None:
    of = tiny.model()
    before = Stacked(of).run([Predict(of.initial, examples(1))])[0].result
    with torch.no_grad():
        for parameter in of.module.parameters():
            parameter.mul_(1.5)
    one, many = (compute.run([Predict(of.initial, examples(1))])[0].result for compute in (Serial(of), Stacked(of)))
    assert torch.allclose(one, many, atol=LOGITS, rtol=0) and not torch.allclose(before, many, atol=100 * LOGITS)


ADAPTERS: dict[str, tuple[str, Adapter]] = {
    "bert, every linear layer": ("bert", Adapter(rank=2, alpha=4.0, targets=("query", "key", "value", "dense"))),
    "bert, feed-forward, rank 3": ("bert", Adapter(rank=3, alpha=4.0, targets=("intermediate.dense",))),
    "bert, rank 1": ("bert", Adapter(rank=1, alpha=4.0)),
    "bert, rank above the width": ("bert", Adapter(rank=20, alpha=4.0)),
    "roberta, every linear layer": ("roberta", Adapter(rank=2, alpha=4.0, targets=("query", "key", "value", "dense"))),
    "llama, every linear layer": (
        "llama",
        Adapter(rank=2, alpha=4.0, targets=("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")),
    ),
    "qwen2, feed-forward": ("qwen2", Adapter(rank=2, alpha=4.0, targets=("up_proj", "down_proj"))),
    "gpt2, every linear layer": ("gpt2", Adapter(rank=2, alpha=4.0, targets=("c_attn", "c_proj", "c_fc"))),
    "deberta-v2, feed-forward": ("deberta-v2", Adapter(rank=2, alpha=4.0, targets=("intermediate.dense",))),
}


@pytest.mark.parametrize("adapter", ADAPTERS)
def test_adapters_of_other_places_and_ranks(adapter: str) -> None:
    """Wherever the pairs sit and whatever their rank; the head trains with them, and alone."""
    family, adapter = ADAPTERS[adapter]
    of = load(str(families.folder(family)), num_labels=3, adapter=adapter, seed=1, max_length=16)
    assert not of.alone
    items: list[WorkItem] = [
        item for k in range(3) for item in (fit(of, "plain", k), fit(of, "fixed", k), Predict(families.moved(of, k), examples(k)))
    ]
    items += [Score(families.moved(of, k), examples(k)) for k in range(3)]
    for one, many in zip(Serial(of).run(items), Stacked(of).run(items), strict=True):
        if isinstance(one.result, Fitted):
            assert gap(one.result.moments.first, many.result.moments.first) <= TENSORS
            assert gap(one.result.tensors, many.result.tensors) <= 10 * TENSORS  # Adam makes much of gradients near its eps
        else:
            assert np.allclose(np.asarray(one.result), np.asarray(many.result), rtol=SCORES, atol=LOGITS)


# memory


def cuts(of: Model, items: list[WorkItem]) -> list[int]:
    """How many texts each pass of a prediction holds."""
    compute, held = Stacked(of), []
    whole = compute._texts
    compute._texts = lambda items, parts, *rest: held.append(sum(len(p.rows) for p in parts)) or whole(items, parts, *rest)  # type: ignore[method-assign,func-returns-value]
    compute.run(items)
    return held


def test_a_pass_holds_what_memory_and_tokens_allow(monkeypatch: pytest.MonkeyPatch) -> None:
    of = model()
    items: list[WorkItem] = [Predict(of.initial, examples(k)) for k in range(4)]
    texts = sum(SIZES)
    assert cuts(of, items) == [texts]
    tokens = sum(int(examples(k).lengths.sum()) for k in range(4))
    monkeypatch.setattr("fedloom.compute.division.own_part", lambda device: int(pass_bytes(of) * tokens / 2 / 0.4) + 1)
    held = cuts(of, items)
    assert sum(held) == texts and len(held) in (2, 3)
    monkeypatch.setattr("fedloom.compute.division.own_part", lambda device: 0)
    assert cuts(of, items) == [12, 9, 5, 1]


def test_trainable_state_that_does_not_fit_together_is_cut(monkeypatch: pytest.MonkeyPatch) -> None:
    of = model()
    item = fit(of, "plain", 0)
    each = 4 * 8 * sum(t.numel() for t in item.start.values())
    for clients, size in ((0.0, 1), (2.5, 2), (3.1, 3)):
        monkeypatch.setattr("fedloom.compute.division.own_part", lambda device, n=clients: int(n * each / 0.4))
        assert states_that_fit(item, torch.device("cpu")) == size


class Small:
    """A way that runs out of memory when a pass holds more than ``tokens``."""

    def __init__(self, way: Any, tokens: int, error: type[Exception] = MemoryError) -> None:
        self.way, self.tokens, self.error, self.failed = way, tokens, error, 0

    def __call__(self, tensors: Tensors, texts: Any, *rest: Any, **named: Any) -> Any:
        if len(texts.ids) > self.tokens:
            self.failed += 1
            raise self.error("[enforce fail at alloc_cpu.cpp] DefaultCPUAllocator: can't allocate memory: you tried to allocate 8 bytes.")
        return self.way(tensors, texts, *rest, **named)

    def mapped(self, tensors: Tensors, texts: Any) -> Any:
        return self(tensors, texts)

    def embed(self, texts: Any) -> Any:
        return self.way.embed(texts)


@pytest.mark.parametrize("error", [MemoryError, RuntimeError, torch.OutOfMemoryError])
def test_out_of_memory_makes_passes_smaller_and_changes_nothing(error: type[Exception], caplog: pytest.LogCaptureFixture) -> None:
    """A client's batch that does not fit is halved; its gradient is the same sum in two parts. Smaller passes stay for the next call. By
    whichever error memory is told to be out, it is found out in one place."""
    of = tiny.model()
    fits = [(k, option) for k in (0, 1) for option in (("plain", "penalty") if error is MemoryError else ("plain",))]
    items: list[WorkItem] = [*(fit(of, option, k) for k, option in fits), Score(of.initial, examples(1))]
    wanted = Stacked(of).run(items)
    small = Small(of.way(torch.float32), 20, error)
    of._ways[torch.float32] = small
    compute = Stacked(of)
    done = compute.run(items)
    assert small.failed and compute.passes.tokens <= 20 and "ran out of memory" in caplog.text
    for one, other in zip(wanted[:-1], done[:-1], strict=True):
        assert gap(one.result.tensors, other.result.tensors) <= TENSORS
        assert np.abs(one.result.losses - other.result.losses).max() <= LOSSES
    assert np.allclose(wanted[-1].result, done[-1].result, rtol=SCORES)
    before = small.failed
    compute.run(items)
    assert small.failed < 2 * before


@pytest.mark.parametrize("option", ["plain", "penalty"])
def test_two_rests_of_one_batch_may_meet_in_a_pass(option: str) -> None:
    """A text of 16 tokens and three of 2, where 17 fit: the first half does not and is halved, and its rest goes with the second half."""
    of = tiny.model()
    texts = Examples.of([[5 + i % 60 for i in range(n)] for n in (16, 2, 2, 2)], [0, 1, 2, 0])
    item = replace(fit(of, option, 0), examples=texts, batches=[np.arange(4)])
    (wanted,) = Stacked(of).run([item])
    small = Small(of.way(torch.float32), 17)
    of._ways[torch.float32] = small
    (done,) = Stacked(of).run([item])
    assert small.failed == 2
    assert gap(wanted.result.tensors, done.result.tensors) <= TENSORS
    assert np.abs(wanted.result.losses - done.result.losses).max() <= LOSSES


@pytest.mark.parametrize("way", ["packed", "vmap"])
def test_a_batch_in_parts_has_the_dropout_of_the_whole(way: str) -> None:
    """By any way: masks are of a text's row in its batch."""
    of = replace(model(0.2), _ways={}, together_by=way)
    items = [fit(of, "plain", k) for k in range(2)]
    wanted = Stacked(of).run(items)
    small = Small(of.way(torch.float32), 20)
    of._ways[torch.float32] = small
    for one, other in zip(wanted, Stacked(of).run(items), strict=True):
        assert gap(one.result.tensors, other.result.tensors) <= TENSORS
    assert small.failed


@pytest.mark.parametrize(("way", "tokens"), [("packed", 6 + 6 + 20), ("padded rows", 4 * 10), ("vmap", 3 * 2 * 10)])
def test_a_pass_is_as_large_as_its_way_makes_it(way: str, tokens: int) -> None:
    """Of three devices one has two long texts and each other one short: padding is computed like tokens."""
    extent = Extent().and_of(np.array([6])).and_of(np.array([6])).and_of(np.array([10, 10]))
    assert computed(way, extent) == tokens


def test_passes_by_padded_ways_hold_no_more_with_their_padding(monkeypatch: pytest.MonkeyPatch) -> None:
    of = replace(model(), _ways={}, together_by="padded rows")
    short, long = (Examples.of([[5] * n] * count, [0] * count) for n, count in ((2, 30), (16, 1)))
    monkeypatch.setattr("fedloom.compute.division.CHUNK", 32)
    items: list[WorkItem] = [Predict(of.initial, short), Predict(of.initial, long)]
    compute, widths = Stacked(of), []
    compute.passes.tokens = 100
    way = of.way(torch.float32)
    of._ways[torch.float32] = lambda tensors, texts, *rest, **named: (  # type: ignore[assignment]
        widths.append(len(texts.lengths) * int(texts.lengths.max())) or way(tensors, texts, *rest, **named)  # type: ignore[func-returns-value]
    )
    compute.run(items)
    assert sorted(widths) == [16, 60], "together they have 76 tokens, and with padding 496"


def test_what_stays_of_a_model_counts_with_every_client(monkeypatch: pytest.MonkeyPatch) -> None:
    """Clients who bring a rest of their own, for training and for scores of single examples, are no more at a time than fit with it."""
    of = model()
    item = fit(of, "plain", 0)
    rest = {n: t for n, t in of.initial.items() if n not in item.start} or {"rest": torch.zeros(40_000)}
    trained, stays = sum(t.numel() for t in item.start.values()), sum(t.numel() for t in rest.values())
    monkeypatch.setattr("fedloom.compute.division.own_part", lambda device: int(3.1 * 4 * (8 * trained + stays) / 0.4))
    assert states_that_fit(replace(item, fixed=rest), torch.device("cpu")) == 3
    monkeypatch.setattr("fedloom.compute.division.own_part", lambda device: 2**40)
    each, compute = [], Stacked(of)
    whole = compute.passes.do
    compute.passes.do = lambda *given, **named: each.append(named["each"]) or whole(*given, **named)  # type: ignore[method-assign,func-returns-value]
    over = frozenset(list(of.initial)[:2])
    compute.run([Score(of.initial, examples(1), over)])
    scored, others = (sum(t.numel() for n, t in of.initial.items() if (n in over) == of_these) for of_these in (True, False))
    assert each == [4 * (3 * scored + others)]


def test_lengths_are_looked_at_once_however_many_parts() -> None:
    of, looks = model(), []

    class Watched(Examples):
        @property
        def lengths(self) -> np.ndarray:
            looks.append(len(self))
            return Examples.of([[5] * 3] * len(self), [0] * len(self)).lengths

    texts = Watched.of([[5] * 3] * 300, [0] * 300)
    watched = Watched(texts.tokens, texts.segments, texts.offsets, texts.store_labels, texts.rows)
    Stacked(of).passes.do([Score(of.initial, watched)], [Part(0, np.array([i])) for i in range(300)], lambda parts: None)
    assert len(looks) == 1


def test_a_spectrum_that_is_taken_alone_stands_where_it_would_together(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Weights under the pairs that an item names hold for it by the slow way too, and for those after it."""
    of = tiny.model()
    drawn = torch.Generator().manual_seed(3)  # what is added alike to all of a row does nothing to inputs that sum to zero
    moved = {**of.initial, **{n: w + 0.1 * torch.randn(w.shape, generator=drawn) for n, w in of.weights.items()}}
    items: list[WorkItem] = [Spectrum(moved, examples(1), np.arange(4), over=frozenset(of.initial), probes=1, steps=3)]
    items.append(Predict(moved, examples(1)))
    wanted = Serial(of).run(items)

    def refused(*_: Any) -> Any:
        raise NotImplementedError("no batching rule")

    compute = Stacked(of)
    monkeypatch.setattr(compute, "_spectrum", refused)
    found, predicted = (done.result for done in compute.run(items))
    assert "are taken one by one" in caplog.text
    assert np.allclose(found.nodes, wanted[0].result.nodes, rtol=1e-4)
    assert torch.allclose(predicted, wanted[1].result, atol=LOGITS)


@pytest.mark.parametrize(
    "words", ["CUDA error: out of memory", "CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`", "can't allocate"]
)
def test_memory_is_out_in_the_words_of_any_library(words: str) -> None:
    assert out_of_memory(RuntimeError(words)) and not out_of_memory(RuntimeError("CUDA error: invalid argument"))


def test_a_text_that_does_not_fit_alone_is_an_error_that_says_so() -> None:
    of = tiny.model()
    of._ways[torch.float32] = Small(of.way(torch.float32), 3)  # type: ignore[assignment]
    with pytest.raises(MemoryError, match=r"one text of \d+ tokens does not fit"):
        Stacked(of).run([Predict(of.initial, examples(1))])


@pytest.mark.parametrize("kind", [Sensitivity, Spectrum])
def test_a_batch_that_must_be_whole_and_does_not_fit_is_an_error_that_says_so(kind: Any, caplog: pytest.LogCaptureFixture) -> None:
    """It is not halved, and what does not fit at all makes no later pass smaller."""
    of = tiny.model()
    small = Small(of.way(torch.float32), 20)
    of._ways[torch.float32] = small  # type: ignore[assignment]
    of.mapped = small.mapped  # type: ignore[method-assign]
    compute = Stacked(of)
    before = compute.passes.tokens
    items = [kind(of.initial, examples(k), np.arange(8)) for k in (1, 3)]
    for some in (items[:1], items):
        with pytest.raises(MemoryError, match=rf"^a batch of 8 texts does not .* {kind.__name__.lower()} .*; take a smaller batch size$"):
            compute.run(some)
        assert compute.passes.tokens == before
        assert len(some) > 1 or "ran out of memory" not in caplog.text


def test_other_errors_are_not_taken_for_memory() -> None:
    of = tiny.model()

    class Broken(Small):
        def __call__(self, *_: Any, **__: Any) -> Any:
            raise RuntimeError("shapes differ")

    of._ways[torch.float32] = Broken(of.way(torch.float32), 3)  # type: ignore[assignment]
    with pytest.raises(RuntimeError, match="shapes differ"):
        Stacked(of).run([Predict(of.initial, examples(1))])


def test_a_model_without_a_way_runs_one_by_one_and_says_so(caplog: pytest.LogCaptureFixture) -> None:
    of = tiny.model()
    of.alone = "packed: it caps its scores"
    done = Stacked(of).run([Predict(of.initial, examples(1))])
    assert torch.equal(done[0].result, Serial(of).run([Predict(of.initial, examples(1))])[0].result)
    assert "one client at a time" in caplog.text and "caps its scores" in caplog.text
    with pytest.raises(Unpackable, match="caps its scores"):
        of.together({}, None, torch.float32)  # type: ignore[arg-type]
