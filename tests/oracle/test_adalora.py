"""AdaLoRA, as it runs on both computes, against NumPy: triplets trained by the chain rule, the importance of every number followed step by
step, and the budget spent by sorting all triplets. Each test's docstring is the sentence that it holds the method to."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

import numpy as np
import pytest
import torch

from fedloom.methods.adalora import AdaLora, best
from fedloom.methods.fedavg import FedAvg
from fedloom.model.adapters import Adapter
from fedloom.model.loading import load
from fedloom.server.participation import Pool
from tests import flows, tiny
from tests.oracle import real
from tests.oracle.numpy_encoder import pad
from tests.oracle.numpy_training import adamw_step, clip_to
from tests.oracle.test_baselines import COHORTS, EVERYBODY, epochs, kinds
from tests.oracle.test_family import beneath, heads, other
from tests.oracle.test_rivals import assert_predicts, is_b, mean_of

Arrays = dict[str, np.ndarray]
GAMMA, BETA1, BETA2 = 0.1, 0.7, 0.9
METHOD = AdaLora(real.INNER, warm_up=0.0, final=1 / 3, beta1=BETA1, beta2=BETA2)
RANK, WIDEST = 2, 3
"""The adapter's rank, and one and a half times that."""
BUDGETS = (24, 17, 16, 16)
"""b_t of T = 3 rounds, t_i = 0 and t_f = 1, for four layers' queries and values: b_0 = 8·3, b_T = 8·2, and b_1 = 16 + ⌊8·(1 − 1/2)³⌋."""


def value(p: str) -> str:
    return f"values/{p}"


def paired(at: Mapping[str, np.ndarray]) -> Arrays:
    """P Λ Q as a plain pair (P·diag(λ), Q); a module without triplets has a pair of zeros."""
    made = {n: t for n, t in real.start().items() if n not in heads()} | {n: t for n, t in at.items() if not n.startswith("values/")}
    return {**made, **{p: at[p] @ np.diag(at[value(p)]) for p in at if is_b(p) and value(p) in at}}


def trained(client: int, at: Arrays, batches: Sequence[np.ndarray]) -> tuple[Arrays, Arrays, list[float]]:
    """The triplets and the head after training, S of every triplet, and the loss before each step."""
    now, losses, zero = dict(at), [], {n: np.zeros_like(t) for n, t in at.items()}
    first, second, smooth, unsure = dict(zero), dict(zero), dict(zero), dict(zero)
    triplets = [p for p in at if is_b(p) and value(p) in at]
    for number, batch in enumerate(batches, 1):
        chosen = pad([real.questions(client)[i] for i in batch])
        losses.append(real.encoder().forward(paired(now), chosen).loss)
        found = {n: g.mean(0) for n, g in real.encoder().backward(paired(now), chosen).tensors.items()}
        gradients = {n: found[n] for n in heads()}
        for p in triplets:
            q, lam = other(p), now[value(p)]
            gradients[p] = found[p] @ np.diag(lam) + GAMMA * 4 * now[p] @ (now[p].T @ now[p] - np.eye(len(lam)))
            gradients[q] = found[q] + GAMMA * 4 * (now[q] @ now[q].T - np.eye(len(lam))) @ now[q]
            gradients[value(p)] = np.diag(now[p].T @ found[p])
        for n, g in gradients.items():  # "I(w) = |w ∇_w L|", smoothed, and its uncertainty
            sensitivity = np.abs(now[n] * g)
            smooth[n] = BETA1 * smooth[n] + (1 - BETA1) * sensitivity
            unsure[n] = BETA2 * unsure[n] + (1 - BETA2) * np.abs(sensitivity - smooth[n])
        for n, g in clip_to(gradients, real.RULE.clip).items():
            now[n], first[n], second[n] = adamw_step(now[n], g, first[n], second[n], number, real.RULE)
    s = {n: smooth[n] * unsure[n] for n in at}
    scores = {p: np.array([s[value(p)][i] + s[p][:, i].mean() + s[other(p)][i].mean() for i in range(len(at[value(p)]))]) for p in triplets}
    return now, scores, losses


def cut(shared: Arrays, scores: Mapping[str, np.ndarray], budget: int) -> Arrays:
    """Every triplet by itself into one list; those in front of it stay."""
    ranked = sorted(((score, p, i) for p, mine in scores.items() for i, score in enumerate(mine)), key=lambda entry: -entry[0])
    kept = {(p, i) for _, p, i in ranked[:budget]}
    made = {n: t for n, t in shared.items() if n in heads()}
    for p in scores:
        places = [i for i in range(len(scores[p])) if (p, i) in kept]
        if places:
            made |= {p: shared[p][:, places], other(p): shared[other(p)][places], value(p): shared[value(p)][places]}
    return made


@kinds
def test_adalora(kind: real.Kind) -> None:
    """Devices train P, Λ and Q under the regulariser and score their triplets; the server averages and keeps the budget's best of all
    matrices together; who is cut does not travel."""
    sizes = follow(real.run(METHOD, kind), BUDGETS)
    assert sizes[0] * 16 == sizes[1] * 17 and sizes[1] == 4 * 16 * (16 + 16 + 1), "bytes are those of the triplets that are left"


def test_adalora_where_weights_are_not_square(monkeypatch: pytest.MonkeyPatch) -> None:
    """On weights of 16 × 16, 32 × 16 and 16 × 32, and with s = 3: 16 modules, b_0 = 16·3, b_T = 16·2, b_1 = 32 + ⌊16·(1 − 1/2)³⌋."""
    real.widen(monkeypatch)
    follow(real.run(METHOD, "stacked"), (48, 34, 32, 32))


def follow(made: real.Run, budgets: Sequence[int]) -> list[int]:
    """Round after round of a run against the derivation; the bytes of the triplets after each."""
    assert [exchange.op for exchange in made.exchanges] == ["train"] * 3 + ["predict"]
    shared = real.arrays(made.states[0].shared)
    triplets = [n for n in real.start() if is_b(n)]
    assert set(shared) == {*real.start(), *map(value, triplets)} and len(triplets) * WIDEST == budgets[0]
    for p in triplets:
        d_out, d_in = real.model().weights[beneath(p)].shape
        assert shared[p].shape == (d_out, WIDEST) and shared[other(p)].shape == (WIDEST, d_in) and not shared[value(p)].any()
        assert all(abs(t.mean()) < 0.01 and 0.01 < t.std() < 0.03 for t in (shared[p], shared[other(p)])), "N(0, 0.02²)"
    sizes = []
    for t, exchange in enumerate(made.asked("train")):
        assert tuple(exchange.down) == COHORTS[t]
        cutting, fitted, scores = budgets[t + 1] < budgets[t], dict[int, Arrays](), dict[int, Arrays]()
        for k in COHORTS[t]:
            real.assert_close(exchange.down[k].tensors, shared)
            fitted[k], scores[k], losses = trained(k, shared, epochs(k, "batches", t))
            up = exchange.up[k]
            told = {n.removeprefix("importance/"): x.double().numpy() for n, x in up.tensors.items() if n.startswith("importance/")}
            assert set(told) == (set(scores[k]) if cutting else set()), "scores travel only where they are needed"
            for p, mine in told.items():
                np.testing.assert_allclose(mine, scores[k][p], rtol=2e-3, atol=1e-9)
            real.assert_close({n: x for n, x in up.tensors.items() if not n.startswith("importance/")}, fitted[k])
            assert up.metrics["loss"] == pytest.approx(np.mean(losses), abs=1e-4), "of the examples alone, without the regulariser"
            assert (up.num_examples, up.examples) == (real.SIZES[k], 2 * real.SIZES[k])
        shared = mean_of(fitted, shared)
        if cutting:
            shared = cut(shared, mean_of(scores, scores[COHORTS[t][0]]), budgets[t + 1])
        real.assert_close(made.states[t + 1].shared, shared)
        alive = [len(x) for n, x in shared.items() if n.startswith("values/")]
        assert sum(alive) == budgets[t + 1] == sum(made.states[t + 1].facts["ranks"].values())
        sizes.append(sum(4 * x.size for n, x in shared.items() if n not in heads()))
    assert len(set(alive)) > 1, "not every module got the same rank"
    assert_predicts(made, dict.fromkeys(EVERYBODY, paired(shared)))
    assert made.assembled is not None
    own = {n: x for n, x in paired(shared).items() if n in made.assembled}
    real.assert_close(made.assembled, own)
    assert not any(kept for now in made.private + made.memory for kept in now.values()), "devices keep nothing"
    return sizes


@pytest.mark.parametrize(("warm", "final", "due"), [(0.2, 0.4, [60, 60, 60, 48, 42, 40, 40, 40, 40, 40, 40]), (0.0, 0.0, None)])
def test_the_budget(warm: float, final: float, due: list[int] | None) -> None:
    """b(t) = b(0) for t ≤ t_i; then b(T) + (b(0) − b(T))·(1 − (t − t_i)/(T − t_f − t_i))³; b(T) from T − t_f on."""
    method = AdaLora(warm_up=warm, final=final)
    told = [method.budget(t, 10, 60, 40) for t in range(11)]
    if due is None:
        due = [40 + int(20 * ((10 - t) ** 3) / 1000) for t in range(11)]
    assert told == due
    assert [method.budget(t, 1, 60, 40) for t in range(2)] == [60, 40], "one round is enough to cut"
    whole = AdaLora(warm_up=0.29, final=0.57)  # floats have .29·100 and .57·100 a little below 29 and 57
    assert [whole.budget(t, 100, 60, 40) for t in (28, 29, 30)] == [60, 60, 40 + int(20 * (1 - 1 / 14) ** 3)]
    assert [whole.budget(t, 100, 60, 40) for t in (42, 43)] == [40, 40] and whole.budget(34, 100, 60, 40) > 40


def test_the_best_of_all_modules_stay() -> None:
    """One module keeps all its triplets, another one loses all of them, and of equals the first stays."""
    p, q = [f"m.{i}.lora_B.weight" for i in range(3)], [f"m.{i}.lora_A.weight" for i in range(3)]
    shared = {n: torch.arange(6.0).view(3, 2) for n in p} | {n: torch.arange(8.0).view(2, 4) for n in q} | {"head": torch.ones(2)}
    shared |= {f"values/{n}": torch.tensor([1.0, -2.0]) for n in p}
    left = best(shared, {p[0]: torch.tensor([0.5, 0.9]), p[1]: torch.tensor([0.1, 0.2]), p[2]: torch.tensor([0.3, 0.5])}, 2)
    assert {n: t.tolist() for n, t in left.items()} == {
        "head": [1.0, 1.0],
        p[0]: [[0.0, 1.0], [2.0, 3.0], [4.0, 5.0]],
        q[0]: [[0.0, 1.0, 2.0, 3.0], [4.0, 5.0, 6.0, 7.0]],
        f"values/{p[0]}": [1.0, -2.0],
    }


def test_what_a_step_is_held_to() -> None:
    """γ·(‖PᵀP − I‖² + ‖QQᵀ − I‖²) over all modules, nothing of orthonormal ones, and nothing of Λ or the head."""
    rng = np.random.default_rng(2)
    p, q = rng.normal(size=(5, 2)), rng.normal(size=(2, 4))
    now = {"m.lora_B.weight": torch.tensor(p), "m.lora_A.weight": torch.tensor(q)}
    now |= {"values/m.lora_B.weight": torch.ones(2), "head": torch.ones(3, 3)}
    due = np.linalg.norm(p.T @ p - np.eye(2)) ** 2 + np.linalg.norm(q @ q.T - np.eye(2)) ** 2
    assert float(METHOD.held_orthonormal(now, now)) == pytest.approx(0.1 * due, rel=1e-5)
    orthonormal = now | {"m.lora_B.weight": torch.tensor(np.linalg.qr(p)[0]), "m.lora_A.weight": torch.zeros(2, 4).double()}
    assert float(METHOD.held_orthonormal(orthonormal, now)) == pytest.approx(0.1 * 2, rel=1e-5), "what is left is Q's, ‖−I‖²"


def test_what_cannot_be_is_refused() -> None:
    for wrong, said in (
        ({"initial": 0.9}, "initial must be 1 or more"),
        ({"warm_up": 0.5, "final": 0.5}, "leave something between"),
        ({"beta1": 1.0}, r"beta1 and beta2 in \[0, 1\)"),
        ({"inner": FedAvg(prox=0.1)}, "give prox 0.1 or an orthogonality, not both"),
    ):
        with pytest.raises(ValueError, match=said):
            replace(METHOD, **wrong)


def test_a_narrow_module_starts_with_as_many_as_it_can_have() -> None:
    """No more than d vectors of d numbers are orthonormal: rank 11 of 16 wide modules would start with 17."""
    wide = load(str(tiny.folder()), num_labels=3, adapter=Adapter(rank=11), seed=1, max_length=16)
    _, state = flows.play(METHOD.setup(METHOD.init(wide), real.POOL), flows.echo)
    assert state.facts["budget"] == [6 * 16, 6 * 11] and set(state.facts["ranks"].values()) == {16}


def test_without_a_cut_nobody_scores() -> None:
    """An initial budget that is the last one: plain triplets, of which none is ever taken out."""
    made = real.run(replace(METHOD, initial=1.0, orthogonality=0.0), "stacked", Pool((0, 1, 2, 3), 3, 1, 8))
    (exchange,) = made.asked("train")
    assert all(set(up.tensors) == set(made.states[0].shared) == set(made.states[1].shared) for up in exchange.up.values())
    assert all(fit.watch is None and fit.penalty is None for k in exchange.down for fit in exchange.fits(k))
