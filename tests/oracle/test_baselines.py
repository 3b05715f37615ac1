"""The methods that FibecFed is compared with, as they run on both computes, against the same NumPy training and averaging.

Each test's docstring is the sentence that it holds a method to.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache

import numpy as np
import pytest
import torch

from fedloom.client.curriculum import shuffled
from fedloom.methods.centralised import Centralised
from fedloom.methods.finetuned import FineTuned
from fedloom.methods.local import Local
from fedloom.methods.personal_head import PersonalHead
from fedloom.methods.prior import PriorCorrected
from fedloom.server.participation import uniform
from fedloom.tensors import nbytes
from tests.oracle import real
from tests.oracle.numpy_encoder import Tensors, pad
from tests.oracle.numpy_fibecfed import is_lora
from tests.oracle.numpy_training import aggregate, payload, train

pytestmark = pytest.mark.no_cover

COHORTS = tuple(uniform(real.POOL, t) for t in range(real.POOL.rounds))
EVERYBODY = real.POOL.clients

kinds = pytest.mark.parametrize("kind", ["serial", "stacked"])


def epochs(client: int, purpose: str, *path: int) -> list[np.ndarray]:
    """Both epochs of seeded batches."""
    return [batch for epoch in range(2) for batch in real.INNER.cut(real.devices()[client], purpose, *path, epoch)]


def trained(client: int, at: Tensors, batches: Sequence[np.ndarray]) -> tuple[dict[str, np.ndarray], list[float]]:
    return train(real.encoder(), at, list(at), real.questions(client), batches, real.RULE)


@cache
def averaged() -> tuple[list[dict[str, np.ndarray]], list[dict[int, list[float]]]]:
    """FedAvg derived: the shared tensors at the start and after every round, and the losses of every device's steps."""
    shared, losses = [real.start()], []
    for t, cohort in enumerate(COHORTS):
        fitted = {k: trained(k, shared[-1], epochs(k, "batches", t)) for k in cohort}
        shared.append(aggregate([fitted[k][0] for k in cohort], [real.SIZES[k] for k in cohort]))
        losses.append({k: fitted[k][1] for k in cohort})
    return shared, losses


def lists(batches: Sequence[np.ndarray]) -> list[list[int]]:
    return [batch.tolist() for batch in batches]


def logits(tensors: Tensors, client: int, split: str = "test") -> np.ndarray:
    device = real.devices()[client]
    return real.encoder().forward(tensors, pad(real.as_oracle(device.test if split == "test" else device.validation))).logits


def assert_as_fedavg(made: real.Run) -> None:
    """Every round's averages, losses, messages: FedAvg's."""
    shared, losses = averaged()
    for t, exchange in enumerate(made.asked("train")):
        assert tuple(exchange.down) == COHORTS[t]
        for k, update in exchange.up.items():
            assert set(update.tensors) == set(exchange.down[k].tensors) == set(shared[0])
            assert nbytes(update.tensors) == nbytes(exchange.down[k].tensors) == payload(shared[0], shared[0])
            assert update.metrics["loss"] == pytest.approx(np.mean(losses[t][k]), abs=1e-4) and set(update.metrics) == {"loss"}
            assert (update.num_examples, update.examples) == (real.SIZES[k], 2 * real.SIZES[k])
        real.assert_close(made.states[t + 1].shared, shared[t + 1])
    assert made.assembled is not None and len(made.asked("train")) == real.POOL.rounds
    real.assert_close(made.assembled, shared[-1])


def test_the_cut_holds_every_example_once() -> None:
    """Batches are cut by a seeded shuffle, another for each device and purpose."""
    for k, size in enumerate(real.SIZES):
        device = real.devices()[k]
        cut, again = (real.INNER.cut(device, "batches") for _ in range(2))
        assert lists(cut) == lists(again) != lists(real.INNER.cut(device, "warm-head"))
        together = np.concatenate(cut).tolist()
        assert sorted(together) == list(range(size)) != together
        assert [len(batch) for batch in cut[:-1]] == [3] * (len(cut) - 1) and 1 <= len(cut[-1]) <= 3


@kinds
def test_federated_lora(kind: real.Kind) -> None:
    """A = Σp_kA_k, B = Σp_kB_k, the head too; AdamW from w_t, fresh at each participation, on E epochs of newly shuffled batches."""
    made = real.run(real.INNER, kind)
    assert_as_fedavg(made)
    assert [exchange.op for exchange in made.exchanges] == ["train"] * 3 + ["predict"]
    assert not any(own for kept in made.private + made.memory for own in kept.values()), "a device keeps nothing"
    for k in EVERYBODY:
        np.testing.assert_allclose(made.logits[k]["test"].numpy(), logits(averaged()[0][-1], k), atol=1e-3)


@kinds
def test_fine_tuning(kind: real.Kind) -> None:
    """Training is FedAvg's; a device trains more epochs from the shared tensors before it predicts, and throws them away."""
    made = real.run(FineTuned(real.INNER), kind)
    assert_as_fedavg(made)
    for k in EVERYBODY:
        tuned, _ = trained(k, averaged()[0][-1], epochs(k, "finetune"))
        for split in ("validation", "test"):
            np.testing.assert_allclose(made.logits[k][split].numpy(), logits(tuned, k, split), atol=3e-3)
        assert np.abs(logits(tuned, k) - logits(averaged()[0][-1], k)).max() > 0.05
    assert not any(own for kept in made.private + made.memory for own in kept.values())


@kinds
def test_prior_correction(kind: real.Kind) -> None:
    """logits_k(x) = logits(x) + log π_k − log π̄, π_k[c] = (n_{k,c} + ε) / (n_k + C·ε), π̄ = (Σ_k n_k π_k) / n."""
    made = real.run(PriorCorrected(real.INNER, smoothing=0.5), kind)
    assert_as_fedavg(made)
    labels = {k: np.array([q.label for q in real.questions(k)]) for k in EVERYBODY}
    priors = {k: (np.array([(labels[k] == c).sum() for c in range(3)]) + 0.5) / (len(labels[k]) + 1.5) for k in EVERYBODY}
    mean = sum(len(labels[k]) * priors[k] for k in EVERYBODY) / sum(real.SIZES)
    for k in EVERYBODY:
        due = logits(averaged()[0][-1], k) + np.log(priors[k]) - np.log(mean)
        np.testing.assert_allclose(made.logits[k]["test"].numpy(), due, atol=1e-3)
        assert np.abs(np.log(priors[k]) - np.log(mean)).max() > 0.05
    (counted,), (received,) = made.asked("count"), made.asked("receive")
    assert all(set(up.tensors) == {"prior"} and up.tensors["prior"].shape == (3,) for up in counted.up.values())
    assert all(set(down.tensors) == {"prior"} for down in received.down.values()) and not any(u.tensors for u in received.up.values())


@kinds
def test_personal_head(kind: real.Kind) -> None:
    """A and B are averaged, the head stays on the device: it starts from the common start and persists between participations."""
    made = real.run(PersonalHead(real.INNER), kind)
    start = real.start()
    shared = {name: tensor for name, tensor in start.items() if is_lora(name)}
    heads = {k: {name: tensor for name, tensor in start.items() if not is_lora(name)} for k in EVERYBODY}
    for t, exchange in enumerate(made.asked("train")):
        fitted = {k: trained(k, {**shared, **heads[k]}, epochs(k, "batches", t))[0] for k in COHORTS[t]}
        heads |= {k: {name: fitted[k][name] for name in heads[k]} for k in COHORTS[t]}
        shared = aggregate([{n: fitted[k][n] for n in shared} for k in COHORTS[t]], [real.SIZES[k] for k in COHORTS[t]])
        real.assert_close(made.states[t + 1].shared, shared)
        for k in EVERYBODY:
            real.assert_close(made.private[t + 1][k], heads[k])
            same = all(torch.equal(made.private[t][k][name], made.private[t + 1][k][name]) for name in heads[k])
            assert same == (k not in COHORTS[t])
        for k, update in exchange.up.items():
            assert set(update.tensors) == set(exchange.down[k].tensors) == set(shared)
            assert nbytes(update.tensors) == payload(start, shared) and b"classifier" not in exchange.came[k] + exchange.sent[k]
    for k in EVERYBODY:
        np.testing.assert_allclose(made.logits[k]["test"].numpy(), logits({**shared, **heads[k]}, k), atol=1e-3)
    assert made.assembled is None, "there is no global head, so there is no global model"


@kinds
def test_no_federation(kind: real.Kind) -> None:
    """Each device trains alone on its own data when a cohort would have drawn it; nothing is uploaded."""
    made = real.run(Local(real.INNER), kind)
    own = dict.fromkeys(EVERYBODY, real.start())
    for t, exchange in enumerate(made.asked("train")):
        assert tuple(exchange.down) == COHORTS[t]
        own |= {k: trained(k, own[k], epochs(k, "batches", t))[0] for k in COHORTS[t]}
        for k in EVERYBODY:
            real.assert_close(made.private[t + 1][k], own[k])
        assert not any(task.tensors for task in exchange.down.values()) and not any(up.tensors for up in exchange.up.values())
        assert not made.states[t + 1].shared
    for k in EVERYBODY:
        np.testing.assert_allclose(made.logits[k]["test"].numpy(), logits(own[k], k), atol=1e-3)
    assert made.assembled is None


@kinds
def test_all_data_in_one_place(kind: real.Kind) -> None:
    """A round is cohort/K of the data, E times, in turn from seeded shuffles of all of it; AdamW's state is kept over the rounds."""
    made = real.run(Centralised(real.INNER), kind)
    n, batch = sum(real.SIZES), real.INNER.batch_size
    a_round = round(0.75 * n * 2 / batch)
    endless = [b for epoch in range(6) for b in shuffled(n, batch, real.SEED, "centralised", epoch)]
    assert a_round > -(-n // batch), "a round goes on into the next epoch"
    for t, exchange in enumerate(made.asked("train")):
        (fit,) = exchange.fits(real.CENTRE)
        due = endless[t * a_round : (t + 1) * a_round]
        assert lists(fit.batches) == lists(due)
        # one optimiser from the first step on: the whole sequence trained at once
        fitted, losses = trained(real.CENTRE, real.start(), endless[: (t + 1) * a_round])
        real.assert_close(made.states[t + 1].shared, fitted)
        assert exchange.up[real.CENTRE].metrics["loss"] == pytest.approx(np.mean(losses[-a_round:]), abs=1e-3)
    assert made.assembled is not None
    real.assert_close(made.assembled, fitted)
    for k in EVERYBODY:
        np.testing.assert_allclose(made.logits[k]["test"].numpy(), logits(fitted, k), atol=3e-3)
