"""The federated LoRA family, as it runs on both computes, against the same NumPy training and the sentences of each paper.

Each test's docstring is the sentence that it holds a method to. Where the weights under the pairs change, the derivation's encoder is given
them; the means of products are computed densely.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

from fedloom.methods.fedex import FedExLora
from fedloom.methods.fedprox import FedProx
from fedloom.methods.flasc import CHANGE, PLACES, VALUES, Flasc, largest
from fedloom.methods.flexlora import FlexLora
from fedloom.methods.flora import FLoRA
from fedloom.methods.hetlora import HetLora
from fedloom.methods.scaffold import Scaffold
from fedloom.methods.slora import SLora
from fedloom.seeds import derive_int
from fedloom.server.participation import Pool, uniform
from tests.oracle import real
from tests.oracle.numpy_encoder import Tensors, pad
from tests.oracle.numpy_training import AdamW, adamw_step, aggregate, clip_to, train
from tests.oracle.test_baselines import COHORTS, EVERYBODY, epochs, kinds, logits
from tests.oracle.test_embracingfl import Grouped
from tests.oracle.test_rivals import assert_predicts, is_a, is_b, mean_of, part, trained

Arrays = dict[str, np.ndarray]
ONE_SEED = Pool((0, 1, 2, 3), 3, 3, real.SEED)
"""Server and devices have the experiment's seed; here a method needs it on both sides."""


def beneath(name: str) -> str:
    return name.replace("lora_A", "base_layer").replace("lora_B", "base_layer")


def other(name: str) -> str:
    return name.replace("lora_A", "lora_B") if is_a(name) else name.replace("lora_B", "lora_A")


def pretrained() -> Arrays:
    """W_0 under every pair."""
    own = real.encoder().weights
    names = {beneath(n) for n in real.start() if is_a(n)}
    return {n: own[n.replace("base_model.model.", "").replace(".base_layer", "")] for n in names}


def heads() -> Arrays:
    return {n: t for n, t in real.start().items() if not is_a(n) and not is_b(n)}


def ideal(fitted: Mapping[int, Tensors], weights: Mapping[int, float] | None = None) -> Arrays:
    """Σ_k p_k B_k A_k, densely, by the weight beneath."""
    by = {k: float(real.SIZES[k]) for k in fitted} if weights is None else weights
    whole = sum(by.values())
    names = [n for n in next(iter(fitted.values())) if is_b(n)]
    return {beneath(n): sum((by[k] / whole) * own[n] @ own[other(n)] for k, own in fitted.items()) for n in names}  # type: ignore[misc]


def assert_predicts_with(made: real.Run, whole: Mapping[int, Tensors]) -> None:
    assert_predicts(made, whole)
    far = max(float(np.abs(logits(whole[k], k) - logits({**whole[k], **pretrained()}, k)).max()) for k in EVERYBODY)
    assert far > 0.01, "W_0 in W's place would be seen"


@kinds
def test_flora(kind: real.Kind) -> None:
    """The stacks A = [p_1 A_1; …] and B = [B_1 …] have the product Σ p_k B_k A_k; s times it is merged into W, and LoRA starts anew."""
    made = real.run(FLoRA(real.INNER), kind)
    shared, seen = {**heads(), **pretrained()}, []
    for t, exchange in enumerate(made.asked("train")):
        assert tuple(exchange.down) == COHORTS[t]
        news = real.arrays(next(iter(exchange.down.values())).tensors)
        new = {n: tensor for n, tensor in news.items() if is_a(n)}
        seen.append(new)
        assert all((np.abs(a) <= 1 / math.sqrt(a.shape[1])).all() and a.std() > 0.3 / math.sqrt(a.shape[1]) for a in new.values())
        zero = {other(n): np.zeros((16, 2)) for n in new}
        fitted = {}
        for k in COHORTS[t]:
            assert set(exchange.down[k].tensors) == {*shared, *new}
            assert all(torch.equal(exchange.down[k].tensors[n].double(), torch.from_numpy(new[n])) for n in new), "one A for all of a round"
            fitted[k], losses = trained(k, {**shared, **new, **zero}, [*new, *zero, *heads()], epochs(k, "batches", t))
            assert set(exchange.up[k].tensors) == {*new, *zero, *heads()}
            assert exchange.up[k].metrics["loss"] == pytest.approx(np.mean(losses), abs=1e-4)
        sizes = np.array([real.SIZES[k] for k in fitted]) / sum(real.SIZES[k] for k in fitted)
        for n in new:  # the stacks themselves
            stack_a = np.concatenate([p * own[n] for p, own in zip(sizes, fitted.values(), strict=True)])
            stack_b = np.concatenate([own[other(n)] for own in fitted.values()], 1)
            shared[beneath(n)] = shared[beneath(n)] + real.S * stack_b @ stack_a
        shared |= mean_of({k: part(own, heads()) for k, own in fitted.items()}, heads())
        real.assert_close(made.states[t + 1].shared, shared)
    assert not np.allclose(seen[0][min(seen[0])], seen[1][min(seen[0])]), "drawn anew in every round"
    assert_predicts_with(made, dict.fromkeys(EVERYBODY, shared))


def test_flora_of_several_ranks() -> None:
    """Exact for any ranks: a device of rank r_k trains and sends r_k directions, and counts with all of them."""
    made = real.run(FLoRA(real.INNER, ranks=(1, 2)), "stacked")
    (exchange, *_) = made.asked("train")
    fitted = {k: real.arrays(update.tensors) for k, update in exchange.up.items()}
    ranks = {k: (1, 2)[derive_int(real.POOL.seed, "rank", k) % 2] for k in fitted}
    assert set(ranks.values()) == {1, 2}
    for k, own in fitted.items():
        assert {t.shape[0] for n, t in own.items() if is_a(n)} | {t.shape[1] for n, t in own.items() if is_b(n)} == {ranks[k]}
        assert {t.shape[0] for n, t in real.arrays(exchange.down[k].tensors).items() if is_a(n)} == {ranks[k]}
    due = {n: w + real.S * ideal(fitted)[n] for n, w in pretrained().items()}
    real.assert_close({n: t for n, t in made.states[1].shared.items() if n in due}, due, 1e-5, 1e-6)


@kinds
def test_fedex(kind: real.Kind) -> None:
    """A and B are averaged, and s·(mean(B_k A_k) − B̄ Ā) is added to the base: then W + s·B̄Ā is the mean of the devices' models."""
    made = real.run(FedExLora(real.INNER), kind)
    shared = {**real.start(), **pretrained()}
    for t, exchange in enumerate(made.asked("train")):
        fitted = {k: trained(k, shared, real.start(), epochs(k, "batches", t))[0] for k in COHORTS[t]}
        for k in COHORTS[t]:
            assert set(exchange.down[k].tensors) == set(shared) and set(exchange.up[k].tensors) == set(real.start())
        means, models = mean_of(fitted, real.start()), ideal(fitted)
        residual = {n: models[n] - means[n.replace("base_layer", "lora_B")] @ means[n.replace("base_layer", "lora_A")] for n in models}
        assert max(float(np.abs(r).max()) for r in residual.values()) > 1e-4, "there is something to correct"
        shared = {**means, **{n: shared[n] + real.S * residual[n] for n in residual}}
        real.assert_close(made.states[t + 1].shared, shared)
    assert_predicts_with(made, dict.fromkeys(EVERYBODY, shared))


def drawn_ranks(made: real.Run) -> dict[int, int]:
    """Each device's rank, as what was sent to it shows."""
    told = [(k, task.tensors) for exchange in made.asked("train") for k, task in exchange.down.items()]
    return {k: next(t.shape[0] for n, t in tensors.items() if is_a(n)) for k, tensors in reversed(told)}


@kinds
def test_flexlora(kind: real.Kind) -> None:
    """Σ p_k B_k A_k is decomposed by SVD, and every device is given as many of its directions as its rank allows."""
    made = real.run(FlexLora(real.INNER, ranks=(1, 2)), kind, ONE_SEED)
    ranks = drawn_ranks(made)
    assert set(ranks.values()) == {1, 2}
    for t, exchange in enumerate(made.asked("train")):
        start = real.arrays(made.states[t].shared)
        fitted = {}
        for k in uniform(ONE_SEED, t):
            came = real.arrays(exchange.down[k].tensors)
            due = {n: x[: ranks[k]] if is_a(n) else x[:, : ranks[k]] if is_b(n) else x for n, x in start.items()}
            assert set(came) == set(due) and all(np.array_equal(came[n], due[n]) for n in due)
            fitted[k], _ = trained(k, due, due, epochs(k, "batches", t))
            real.assert_close(exchange.up[k].tensors, fitted[k])
        after, wanted = real.arrays(made.states[t + 1].shared), ideal(fitted)
        for n, delta in wanted.items():
            u, s, vt = np.linalg.svd(delta)
            a, b = after[n.replace("base_layer", "lora_A")], after[n.replace("base_layer", "lora_B")]
            for r in (1, 2):  # the best approximation of each rank, and it is the first directions of the pair
                np.testing.assert_allclose(b[:, :r] @ a[:r], u[:, :r] * s[:r] @ vt[:r], atol=2e-3)
            np.testing.assert_allclose(np.linalg.norm(a, axis=1), np.linalg.norm(b, axis=0), rtol=1e-4)
        real.assert_close(part(made.states[t + 1].shared, heads()), mean_of({k: part(o, heads()) for k, o in fitted.items()}, heads()))  # type: ignore[arg-type]
    last = real.arrays(made.states[-1].shared)
    for k, r in ranks.items():
        mine = {n: x[:r] if is_a(n) else x[:, :r] if is_b(n) else x for n, x in last.items()}
        np.testing.assert_allclose(made.logits[k]["test"].numpy(), logits(mine, k), atol=3e-3)


LAMBDA = 20.0


def held_down(now: Tensors, rank: int) -> float:
    return sum(float(np.linalg.norm(b[:, rank:]) * np.linalg.norm(now[other(n)][rank:])) for n, b in now.items() if is_b(n))


def pushed(k: int, at: Arrays, batches: Sequence[np.ndarray], rank: int, strength: float, mu: float) -> Arrays:
    """Training under λ·Σ‖B[:, rank:]‖·‖A[rank:, :]‖, whose gradient in B is λ·‖A'‖·B'/‖B'‖, and 0 where B' is 0; and (μ/2)·‖w − w_t‖²."""
    now, rule = dict(at), real.RULE
    first, second = ({n: np.zeros_like(t) for n, t in at.items()} for _ in range(2))
    for step, batch in enumerate(batches, 1):
        found = real.encoder().backward(now, pad([real.questions(k)[i] for i in batch])).tensors
        gradients = {n: found[n].mean(0) + mu * (now[n] - at[n]) for n in now}
        for n in filter(is_b, at):
            b, a = now[n][:, rank:], now[other(n)][rank:]
            size_b, size_a = np.linalg.norm(b), np.linalg.norm(a)
            if b.size and size_b:
                gradients[n][:, rank:] += strength * size_a * b / size_b
            if a.size and size_a:
                gradients[other(n)][rank:] += strength * size_b * a / size_a
        for n, g in clip_to(gradients, rule.clip).items():
            now[n], first[n], second[n] = adamw_step(now[n], g, first[n], second[n], step, rule)
    return now


@kinds
@pytest.mark.parametrize(("keep", "mu"), [(0.5, 0.0), (0.75, 0.3)])
def test_hetlora(kind: real.Kind, keep: float, mu: float, prunes: bool = True) -> None:
    """Truncate on the way down, zero-pad on the way up; weights ∝ ‖B_k A_k‖_F; the last directions, all but ⌊γ·r_k⌋, are held down, and
    given up if they shrank. FedProx's term is added to that."""
    inner = replace(real.INNER, prox=mu)
    made = real.run(HetLora(inner, ranks=(1, 2), keep=keep, penalty=LAMBDA), kind, replace(ONE_SEED, rounds=4))
    ranks, shared, pruned = {k: int(r) for k, r in zip(EVERYBODY, made.states[0].server["ranks"], strict=True)}, real.start(), 0
    assert set(ranks.values()) == {1, 2}
    for t, exchange in enumerate(made.asked("train")):
        fitted = {}
        for k, task in exchange.down.items():
            due = {n: x[: ranks[k]] if is_a(n) else x[:, : ranks[k]] if is_b(n) else x for n, x in shared.items()}
            real.assert_close(task.tensors, due)
            fewer = {1: 1, 2: 1}[ranks[k]]  # ⌊.5 · 2⌋ and ⌊.75 · 2⌋; at least one
            own = pushed(k, real.arrays(task.tensors), epochs(k, "batches", t), fewer, LAMBDA, mu)
            if fewer < ranks[k] and held_down(own, fewer) < held_down(real.arrays(task.tensors), fewer):
                ranks[k], pruned = fewer, pruned + 1
                own = {n: x[:fewer] if is_a(n) else x[:, :fewer] if is_b(n) else x for n, x in own.items()}
            real.assert_close(exchange.up[k].tensors, own)
            fitted[k] = real.arrays(exchange.up[k].tensors)
        sizes = {k: math.sqrt(sum(float(((own[n] @ own[other(n)]) ** 2).sum()) for n in own if is_b(n))) for k, own in fitted.items()}
        padded = {
            k: {
                n: np.pad(x, ((0, 2 - len(x)), (0, 0))) if is_a(n) else np.pad(x, ((0, 0), (0, 2 - x.shape[1])))
                for n, x in own.items()
                if n not in heads()
            }
            for k, own in fitted.items()
        }
        whole = sum(sizes.values())
        before, most = shared, max(ranks[k] for k in fitted)
        shared = {n: np.sum([sizes[k] / whole * padded[k][n] for k in fitted], 0) for n in padded[min(padded)]}
        shared |= {n: np.concatenate([x[:most], before[n][most:]]) for n, x in shared.items() if is_a(n)}
        shared |= {n: np.concatenate([x[:, :most], before[n][:, most:]], 1) for n, x in shared.items() if is_b(n)}
        shared |= mean_of({k: part(own, heads()) for k, own in fitted.items()}, heads())
        real.assert_close(made.states[t + 1].shared, shared, 1e-5, 1e-6)
        assert made.states[t + 1].server["ranks"].tolist() == [ranks[k] for k in EVERYBODY]
    assert bool(pruned) == prunes, "some device gave directions up"
    for k in EVERYBODY:
        mine = {n: x[: ranks[k]] if is_a(n) else x[:, : ranks[k]] if is_b(n) else x for n, x in shared.items()}
        np.testing.assert_allclose(made.logits[k]["test"].numpy(), logits(mine, k), atol=3e-3)


def test_hetlora_where_weights_are_not_square(monkeypatch: pytest.MonkeyPatch) -> None:
    """On weights of 16 × 16, 32 × 16 and 16 × 32, and with s = 3."""
    real.widen(monkeypatch)
    test_hetlora("stacked", 0.5, 0.0, prunes=False)


@pytest.mark.parametrize("kind", [HetLora, FlexLora, FLoRA])
def test_devices_of_one_rank_share_a_pass(kind: Any) -> None:
    compute, pool = Grouped(real.model()), replace(ONE_SEED, cohort=len(EVERYBODY), rounds=1)
    made = real.watch(kind(real.INNER, ranks=(1, 2)), compute, pool)
    ranks = list(drawn_ranks(made).values())
    assert {*ranks} == {1, 2} and max(map(ranks.count, {*ranks})) > 1
    assert sorted(count for _, count in compute.seen) == sorted(map(ranks.count, {*ranks}))


def test_hetlora_directions_that_nobody_sends_stay_and_can_still_be_learnt() -> None:
    """∂A = s·BᵀG and ∂B = s·GAᵀ: a direction that is zero in both learns on no device ever again. In a cohort of rank 1 the mean of padded
    pairs would make the second one so."""
    made = real.run(HetLora(real.INNER, ranks=(1, 2), penalty=0.0), "stacked", replace(ONE_SEED, cohort=1, rounds=6))
    ranks, told = dict(zip(EVERYBODY, made.states[0].server["ranks"].tolist(), strict=True)), []
    for t, exchange in enumerate(made.asked("train")):
        (k,), (update,) = exchange.down, exchange.up.values()
        before, after = (real.arrays(state.shared) for state in made.states[t : t + 2])
        for n in filter(is_a, before):
            a, b = after[n], after[other(n)]
            np.testing.assert_allclose(a[: ranks[k]], update.tensors[n].numpy(), atol=1e-7)
            np.testing.assert_array_equal(a[ranks[k] :], before[n][ranks[k] :])
            np.testing.assert_array_equal(b[:, ranks[k] :], before[other(n)][:, ranks[k] :])
            assert a[1:].all() and b[:, 1:].all() == (2 in [*told, ranks[k]])
        told.append(ranks[k])
    assert told.index(1) < told.index(2), "who has both directions comes later"


def top(tensors: Tensors, share: float) -> tuple[np.ndarray, np.ndarray]:
    """All factors' entries in order of names, the largest in size kept, and their places."""
    flat = np.concatenate([tensors[n].ravel() for n in sorted(tensors)])
    places = np.sort(np.argsort(-np.abs(flat), kind="stable")[: math.ceil(share * len(flat))])
    made = np.zeros_like(flat)
    made[places] = flat[places]
    return made, places


@kinds
def test_flasc(kind: real.Kind) -> None:
    """Dense local LoRA; of the download and of the upload delta the top-k travel."""
    made = real.run(Flasc(real.INNER, down=0.3, up=0.2), kind)
    for t, exchange in enumerate(made.asked("train")):
        shared = real.arrays(made.states[t].shared)
        pairs = {n: x for n, x in shared.items() if n not in heads()}
        count = sum(x.size for x in pairs.values())
        arrived, places = top(pairs, 0.3)
        start = dict(part(shared, heads()))
        at = 0
        for n in sorted(pairs):
            start[n], at = arrived[at : at + pairs[n].size].reshape(pairs[n].shape), at + pairs[n].size
        changes, fitted = {}, {}
        for k, task in exchange.down.items():
            assert set(task.tensors) == {*heads(), VALUES, PLACES} and task.tensors[PLACES].tolist() == places.tolist()
            assert np.array_equal(real.arrays(task.tensors)[VALUES], arrived[places])
            fitted[k], losses = trained(k, start, start, epochs(k, "batches", t))
            assert exchange.up[k].metrics["loss"] == pytest.approx(np.mean(losses), abs=1e-4)
            up = real.arrays(exchange.up[k].tensors)
            assert len(up[CHANGE + VALUES]) == len(up[CHANGE + PLACES]) == math.ceil(0.2 * count)
            due = np.concatenate([(fitted[k][n] - start[n]).ravel() for n in sorted(pairs)])
            changes[k] = np.zeros(count)
            changes[k][up[CHANGE + PLACES].astype(int)] = up[CHANGE + VALUES]
            off = np.abs(up[CHANGE + VALUES] - due[up[CHANGE + PLACES].astype(int)])
            assert off.max() < 3e-3
            assert np.abs(due[changes[k] == 0]).max() <= np.abs(up[CHANGE + VALUES]).min() + 3e-3, "none that is larger was left out"
        mean = aggregate([{"": c} for c in changes.values()], [real.SIZES[k] for k in changes])[""]
        flat = np.concatenate([pairs[n].ravel() for n in sorted(pairs)]) + mean
        after = real.arrays(made.states[t + 1].shared)
        np.testing.assert_allclose(np.concatenate([after[n].ravel() for n in sorted(pairs)]), flat, atol=1e-6)
        real.assert_close(part(made.states[t + 1].shared, heads()), mean_of({k: part(o, heads()) for k, o in fitted.items()}, heads()))  # type: ignore[arg-type]
    assert_predicts(made, dict.fromkeys(EVERYBODY, real.arrays(made.states[-1].shared)))


def test_flasc_where_weights_are_not_square(monkeypatch: pytest.MonkeyPatch) -> None:
    """On weights of 16 × 16, 32 × 16 and 16 × 32, and with s = 3."""
    real.widen(monkeypatch)
    test_flasc("stacked")


@kinds
def test_fedprox(kind: real.Kind) -> None:
    """(μ/2)·‖w − w_t‖² is added to each device's loss, w_t being what it was sent; the rest is FedAvg."""
    made = real.run(FedProx(**{**vars(real.INNER), "prox": 0.7}), kind)
    shared = real.start()
    for t, exchange in enumerate(made.asked("train")):
        fitted = {}
        for k in COHORTS[t]:
            fitted[k], losses = trained(k, shared, shared, epochs(k, "batches", t), pull=0.7, towards=shared)
            assert exchange.up[k].metrics["loss"] == pytest.approx(np.mean(losses), abs=1e-4), "the loss told is without the term"
        shared = mean_of(fitted, shared)
        real.assert_close(made.states[t + 1].shared, shared)
    plain = real.arrays(real.run(real.INNER, kind).states[-1].shared)
    far, near = (sum(float(((x[n] - real.start()[n]) ** 2).sum()) for n in x) for x in (plain, shared))
    assert near < far, "it holds devices back"


@kinds
def test_slora(kind: real.Kind) -> None:
    """R_1 rounds of sparse full tuning under one random mask for all, then the SVD of W_R1 − W_0 is LoRA's start, then FedIT."""
    method = SLora(real.INNER, first=0.5, density=0.1, sparse_lr=0.01)
    pool = ONE_SEED  # R_1 = 2 of 3
    made = real.run(method, kind, pool)
    assert [exchange.op for exchange in made.exchanges] == ["tune", "tune", "train", "predict"]
    weights = pretrained()
    masks = {n: np.zeros(w.shape) for n, w in weights.items()}
    for n, w in weights.items():
        masks[n].reshape(-1)[method.places(n, torch.from_numpy(w), pool.seed).numpy()] = 1
        assert masks[n].sum() == math.ceil(0.1 * w.size)
    assert len({m.tobytes() for m in masks.values()}) == len(masks), "each weight has a mask of its own"
    now, head = dict(weights), heads()
    for t, exchange in enumerate(made.asked("tune")):
        fitted = {}
        for k in exchange.down:
            assert {n: tuple(x.shape) for n, x in exchange.down[k].tensors.items() if n not in head} == {
                f"moved/{n}": (math.ceil(0.1 * w.size),) for n, w in weights.items()
            }
            rule = replace(real.RULE, lr=0.01)
            assert isinstance(rule, AdamW)
            whole = {**now, **head}
            fitted[k], losses = train(real.encoder(), whole, whole, real.questions(k), epochs(k, "batches", t), rule, masks)
            assert exchange.up[k].metrics["loss"] == pytest.approx(np.mean(losses), abs=1e-4)
        mean = mean_of(fitted, {*now, *head})
        now, head = part(mean, now), part(mean, head)
        assert all(np.array_equal(np.isclose(now[n], w, 0, 1e-12), masks[n] == 0) for n, w in weights.items()), "only what the mask lets"
        if t == 0:
            due = {**head, **{f"moved/{n}": (now[n] - w)[masks[n] == 1] for n, w in weights.items()}}
            real.assert_close(made.states[1].shared, due)
            assembled = method.assembled(made.states[1])
            assert assembled is not None
            real.assert_close(assembled, {**now, **head})
    begun = real.arrays(made.states[2].shared)
    assert set(begun) == set(real.start())
    for n, w in weights.items():
        u, s, vt = np.linalg.svd(now[n] - w)
        a, b = begun[n.replace("base_layer", "lora_A")], begun[n.replace("base_layer", "lora_B")]
        np.testing.assert_allclose(real.S * b @ a, u[:, :2] * s[:2] @ vt[:2], atol=2e-3)
        np.testing.assert_allclose(np.linalg.norm(a, axis=1), np.linalg.norm(b, axis=0), rtol=1e-4)
    real.assert_close(part(made.states[2].shared, head), head)  # type: ignore[arg-type]
    (exchange,) = made.asked("train")
    fitted = {k: trained(k, begun, begun, epochs(k, "batches", 2))[0] for k in uniform(pool, 2)}
    last = mean_of(fitted, begun)
    real.assert_close(made.states[3].shared, last)
    assert_predicts(made, dict.fromkeys(EVERYBODY, last))


@pytest.mark.parametrize("missed", [(1,), (1, 2), (0, 1)])
def test_slora_trains_pairs_from_round_r_1_on_also_if_the_round_before_was_missed(missed: tuple[int, ...]) -> None:
    """t ≥ R_1: LoRA, from the SVD of what W has become until then; from LoRA's own start if it has not moved."""
    method = SLora(real.INNER, first=0.5, density=0.1, sparse_lr=0.01)
    pool = replace(ONE_SEED, rounds=4)  # R_1 = 2
    made = real.run(method, "stacked", pool, missed)
    stages = [op for t, op in enumerate(("tune", "tune", "train", "train")) if t not in missed]
    assert [exchange.op for exchange in made.exchanges] == [*stages, "predict"]
    moved, own = real.arrays(made.states[2].shared), real.start()
    sent = real.arrays(next(iter(made.asked("train")[0].down.values())).tensors)
    assert set(sent) == set(own) and not made.states[4].server
    for n, w in pretrained().items():
        change, a, b = np.zeros(w.size), n.replace("base_layer", "lora_A"), n.replace("base_layer", "lora_B")
        change[method.places(n, torch.from_numpy(w), pool.seed).numpy()] = moved[f"moved/{n}"]
        u, s, vt = np.linalg.svd(change.reshape(w.shape))
        np.testing.assert_allclose(real.S * sent[b] @ sent[a], u[:, :2] * s[:2] @ vt[:2], atol=2e-3)
        assert change.any() == (missed != (0, 1)) == (not np.array_equal(sent[a], own[a]))


def test_slora_where_weights_are_not_square(monkeypatch: pytest.MonkeyPatch) -> None:
    """On weights of 16 × 16, 32 × 16 and 16 × 32, and with s = 3."""
    real.widen(monkeypatch)
    test_slora("stacked")


def test_sloras_mask_is_random_entries_each_as_likely_and_of_the_seed_and_the_weight() -> None:
    """⌈δ·d_out·d_in⌉ entries, no two the same, and over many seeds every entry as often as every other."""
    method, weight, seeds = SLora(density=0.2), torch.zeros(7, 9), 400
    often = np.zeros(63)
    for seed in range(seeds):
        places = method.places("a", weight, seed).numpy()
        assert len(places) == math.ceil(0.2 * 63) == 13 and (np.diff(places) > 0).all() and 0 <= places[0] <= places[-1] < 63
        assert (np.diff(places) > 1).any(), "no run of neighbours"
        often[places] += 1
    share = 13 / 63
    assert np.abs(often - seeds * share).max() < 4.5 * math.sqrt(seeds * share * (1 - share))
    neighbours = np.mean([(np.diff(method.places("a", weight, seed).numpy()) == 1).sum() for seed in range(seeds)])
    assert neighbours == pytest.approx(62 * share * 12 / 62, abs=0.3), "where one entry is tells nothing of the next"
    drawn = [tuple(method.places(name, weight, seed).tolist()) for name, seed in (("a", 1), ("a", 1), ("b", 1), ("a", 2))]
    assert drawn[0] == drawn[1] and len(set(drawn)) == 3


def test_shares_that_are_whole_numbers_are_these() -> None:
    """R_1 = .28·25 = 7 rounds, δ·100 = 7 entries, d·100 = 7 entries: floats have them a little above, and ⌈·⌉ is not of that."""
    method, pool = SLora(first=0.28, density=0.07), replace(ONE_SEED, rounds=25)
    assert method.count(torch.zeros(10, 10)) == 7
    begin = method.init(real.model())
    stages = [method.staged(replace(begin, round=t, facts={**begin.facts, "seed": 1}), pool).server == {} for t in range(9)]
    assert stages == [False] * 7 + [True] * 2
    assert len(largest(torch.arange(100.0), 0.07)[PLACES]) == 7


@kinds
def test_scaffold(kind: real.Kind) -> None:
    """Every local step's gradient is g − c_k + c; c_k becomes the mean of its steps' g; c moves by 1/K of what the cohort's moved."""
    made = real.run(Scaffold(real.INNER), kind)
    shared = real.start()
    zero = {n: np.zeros_like(t) for n, t in shared.items()}
    common, own = zero, dict.fromkeys(EVERYBODY, zero)
    control = lambda tensors: {f"control/{n}": t for n, t in tensors.items()}  # noqa: E731
    for t, exchange in enumerate(made.asked("train")):
        fitted, moved, steps = {}, [], set()
        for k in COHORTS[t]:
            assert set(exchange.up[k].tensors) == {*shared, *control(shared)}
            assert set(exchange.down[k].tensors) == ({*shared, *control(shared)} if t else set(shared)), "zeros need not travel"
            assert exchange.up[k].examples == 2 * real.SIZES[k], "and no pass is made for it"
            towards = {n: common[n] - own[k][n] for n in shared}
            batches = epochs(k, "batches", t)
            fitted[k], new = corrected(k, shared, batches, towards)
            steps.add(len(batches))
            moved.append({n: new[n] - own[k][n] for n in shared})
            own[k] = new
            would_be = {n: common[n] + moved[-1][n] for n in shared}
            real.assert_close({n: x for n, x in exchange.up[k].tensors.items() if n not in shared}, control(would_be))
        assert len(steps) > 1
        for k in EVERYBODY:  # whoever was not asked has what it had, or nothing yet
            real.assert_close(made.memory[t + 1][k], control(own[k]) if made.memory[t + 1][k] or own[k] is not zero else {})
        shared = mean_of(fitted, shared)
        common = {n: common[n] + sum(m[n] for m in moved) / len(EVERYBODY) for n in shared}
        real.assert_close(made.states[t + 1].shared, shared)
        real.assert_close(made.states[t + 1].controls, common)
    assert max(float(np.abs(c).max()) for c in common.values()) > 0.01
    assert_predicts(made, dict.fromkeys(EVERYBODY, shared))


def corrected(k: int, at: Arrays, batches: Sequence[np.ndarray], added: Tensors) -> tuple[Arrays, Arrays]:
    """Training with ``added`` on every step's mean gradient, and the mean over the steps of these gradients as they were."""
    now, total = dict(at), {n: np.zeros_like(t) for n, t in at.items()}
    first, second = ({n: np.zeros_like(t) for n, t in at.items()} for _ in range(2))
    for step, batch in enumerate(batches, 1):
        found = real.encoder().backward(now, pad([real.questions(k)[i] for i in batch])).tensors
        total = {n: total[n] + found[n].mean(0) for n in now}
        gradients = {n: found[n].mean(0) + added[n] for n in now}
        for n, g in clip_to(gradients, real.RULE.clip).items():
            now[n], first[n], second[n] = adamw_step(now[n], g, first[n], second[n], step, real.RULE)
    return now, {n: t / len(batches) for n, t in total.items()}
