"""FedEven as it runs on both computes, against the same NumPy training and averaging; and what its training does not teach."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pytest
import torch

from fedloom.methods.fedeven import FedEven, unevenness, weight
from fedloom.methods.prior import label_prior
from tests.oracle import real
from tests.oracle.numpy_training import aggregate, train
from tests.oracle.test_baselines import COHORTS, EVERYBODY, epochs, kinds, logits

pytestmark = pytest.mark.no_cover

SMOOTHING = 0.5


def log_prior(client: int) -> np.ndarray:
    """log π_k[c] = log (n_{k,c} + ε) / (n_k + C·ε)."""
    labels = [q.label for q in real.questions(client)]
    return np.log([(labels.count(c) + SMOOTHING) / (len(labels) + 3 * SMOOTHING) for c in range(3)])


def mass(client: int) -> float:
    """m_k = n_k (1 − Σ_c π_k[c]²)."""
    return real.SIZES[client] * (1 - float((np.exp(log_prior(client)) ** 2).sum()))


@kinds
def test_fedeven(kind: real.Kind) -> None:
    """Devices minimise −log softmax(z + log π_k)[y]; the server takes the mean by m_k; globally z decides. On device k decides
    z + log π_k at v = w + λ(u − w): u is w after more epochs of the same, λ = 1 − H(π_k)/log C."""
    made = real.run(FedEven(real.INNER, SMOOTHING), kind)
    shared = real.start()
    for t, exchange in enumerate(made.asked("train")):
        assert tuple(exchange.down) == COHORTS[t]
        fitted = {}
        for k in COHORTS[t]:
            batches = epochs(k, "batches", t)
            fitted[k] = train(real.encoder(), shared, list(shared), real.questions(k), batches, real.RULE, offset=log_prior(k))
            assert exchange.up[k].metrics["loss"] == pytest.approx(np.mean(fitted[k][1]), abs=1e-4)
        shared = aggregate([fitted[k][0] for k in COHORTS[t]], [mass(k) for k in COHORTS[t]])
        real.assert_close(made.states[t + 1].shared, shared)
    assert len({round(mass(k) / real.SIZES[k], 2) for k in EVERYBODY}) > 1, "devices that are alike would show nothing"
    for k in EVERYBODY:
        prior = np.exp(log_prior(k))
        skew = 1 + (prior * np.log(prior)).sum() / np.log(3)
        more = train(real.encoder(), shared, list(shared), real.questions(k), epochs(k, "refine"), real.RULE, offset=log_prior(k))[0]
        own = {name: shared[name] + skew * (more[name] - shared[name]) for name in shared}
        for split in ("validation", "test"):
            np.testing.assert_allclose(made.logits[k][split].numpy(), logits(own, k, split) + log_prior(k), atol=3e-3)
        assert np.ptp(log_prior(k)) > 0.05 and skew > 0.01, "a device whose prior says nothing would show nothing"
        assert np.abs(logits(own, k) - logits(shared, k)).max() > 0.01, "too small a step to see"
    assert made.assembled is not None
    real.assert_close(made.assembled, shared)


def test_the_label_counts_stay_on_the_device() -> None:
    made = real.run(FedEven(real.INNER, SMOOTHING), "serial")
    assert {exchange.op for exchange in made.exchanges} <= {"train", "predict"}, "nobody is asked to count them"
    for exchange in made.asked("train"):
        assert all(set(update.tensors) == set(real.start()) for update in exchange.up.values())
    assert all("prior" not in str(blob) for exchange in made.exchanges for blob in exchange.came.values())


def test_without_more_epochs_a_device_predicts_with_the_shared_model() -> None:
    made = real.run(FedEven(real.INNER, SMOOTHING, epochs=0), "stacked")
    shared = {name: tensor.numpy() for name, tensor in made.states[-1].shared.items()}
    for k in EVERYBODY:
        np.testing.assert_allclose(made.logits[k]["test"].numpy(), logits(shared, k) + log_prior(k), atol=3e-3)


@pytest.mark.parametrize(("counts", "due"), [([5, 5, 5, 5], 0.0), ([1, 1], 0.0), ([97, 1, 1, 1], 0.879)])
def test_unevenness(counts: list[int], due: float) -> None:
    prior = torch.tensor(counts, dtype=torch.float64) / sum(counts)
    assert unevenness(prior.log()) == pytest.approx(due, abs=1e-3)
    assert unevenness(prior.log().flip(0)) == pytest.approx(unevenness(prior.log()))


@pytest.mark.parametrize(("counts", "due"), [([8, 8], 8_000), ([4, 4, 4, 4], 12_000), ([16, 0], 0), ([12, 4], 6_000)])
def test_a_device_counts_as_far_as_its_prior_errs(counts: list[int], due: int) -> None:
    """n (1 − Σ π²) in thousandths, with a prior that is hardly smoothed; of one label never nothing: a whole cohort may be such devices."""
    prior = torch.tensor(counts, dtype=torch.float64) + 1e-9
    found = weight((prior / prior.sum()).log(), sum(counts))
    assert found == max(due, 1)


def test_what_the_page_says_of_a_device_of_one_label() -> None:
    """By the formulas, at the default ε: λ, and m/n of one label only and of even ones, to the digits that docs/methods.md has."""
    page = (Path(__file__).parents[2] / "docs" / "methods.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| (\d+), (\d+) \| (\.\d\d) \| (\.\d\d) \| (\.\d\d) \|$", page, re.MULTILINE)
    assert len(rows) == 4
    for classes, n, *told in ((int(c), int(n), *map(float, told)) for c, n, *told in rows):
        one = np.array([n + 1.0] + [1.0] * (classes - 1)) / (n + classes)
        assert told == pytest.approx([1 + (one * np.log(one)).sum() / np.log(classes), 1 - (one**2).sum(), 1 - 1 / classes], abs=0.005)
        found = label_prior(np.zeros(n, np.int64), classes, FedEven().smoothing).log()
        assert told[:2] == pytest.approx([unevenness(found), weight(found, n) / 1000 / n], abs=0.005)


@pytest.mark.parametrize("settings", [{"smoothing": 0.0}, {"smoothing": float("nan")}, {"epochs": -1}])
def test_settings_without_a_meaning_are_refused(settings: dict[str, float]) -> None:
    with pytest.raises(ValueError, match=next(iter(settings))):
        FedEven(**settings)  # type: ignore[arg-type]
