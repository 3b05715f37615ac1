"""FedEven as it runs on both computes, against the same NumPy training and averaging; and what its training does not teach."""

from __future__ import annotations

import numpy as np
import pytest

from fedloom.methods.fedeven import FedEven
from tests.oracle import real
from tests.oracle.numpy_training import aggregate, train
from tests.oracle.test_baselines import COHORTS, EVERYBODY, epochs, kinds, logits

SMOOTHING = 0.5


def log_prior(client: int) -> np.ndarray:
    """log π_k[c] = log (n_{k,c} + ε) / (n_k + C·ε)."""
    labels = [q.label for q in real.questions(client)]
    return np.log([(labels.count(c) + SMOOTHING) / (len(labels) + 3 * SMOOTHING) for c in range(3)])


@kinds
def test_fedeven(kind: real.Kind) -> None:
    """Devices minimise −log softmax(z + log π_k)[y]; the server takes the mean; globally z decides, on device k z + log π_k."""
    made = real.run(FedEven(real.INNER, SMOOTHING), kind)
    shared = real.start()
    for t, exchange in enumerate(made.asked("train")):
        assert tuple(exchange.down) == COHORTS[t]
        fitted = {}
        for k in COHORTS[t]:
            batches = epochs(k, "batches", t)
            fitted[k] = train(real.encoder(), shared, list(shared), real.questions(k), batches, real.RULE, offset=log_prior(k))
            assert exchange.up[k].metrics["loss"] == pytest.approx(np.mean(fitted[k][1]), abs=1e-4)
        shared = aggregate([fitted[k][0] for k in COHORTS[t]], [real.SIZES[k] for k in COHORTS[t]])
        real.assert_close(made.states[t + 1].shared, shared)
    for k in EVERYBODY:
        for split in ("validation", "test"):
            np.testing.assert_allclose(made.logits[k][split].numpy(), logits(shared, k, split) + log_prior(k), atol=3e-3)
        assert np.ptp(log_prior(k)) > 0.05, "a device whose prior says nothing would show nothing"
    assert made.assembled is not None
    real.assert_close(made.assembled, shared)


def test_the_label_counts_stay_on_the_device() -> None:
    made = real.run(FedEven(real.INNER, SMOOTHING), "serial")
    (counted,) = made.asked("count")
    assert tuple(counted.up) == EVERYBODY
    assert not any(update.tensors or update.metrics for update in counted.up.values())
    for exchange in made.asked("train"):
        assert all(set(update.tensors) == set(real.start()) for update in exchange.up.values())
    assert all("prior" not in str(blob) for exchange in made.exchanges for blob in exchange.came.values())
