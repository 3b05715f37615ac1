"""The variants of recipes/fedeven_parts.py: each does what its line says, against the same NumPy training, and else what FedEven does."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest

from fedloom.methods.fedeven import FedEven
from fedloom.tensors import equal
from tests.oracle import real
from tests.oracle.numpy_training import Tensors, aggregate, train
from tests.oracle.test_baselines import COHORTS, EVERYBODY, epochs, logits
from tests.oracle.test_fedeven import SMOOTHING, log_prior

FILE = Path(__file__).resolve().parents[2] / "recipes" / "fedeven_parts.py"


@pytest.fixture(scope="module")
def parts() -> ModuleType:
    spec = importlib.util.spec_from_file_location("fedeven_parts_recipe", FILE)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


def played(method: Any) -> tuple[Any, Tensors]:
    made = real.run(method, "stacked")
    return made, {name: tensor.numpy() for name, tensor in made.states[-1].shared.items()}


def refined(shared: Tensors, k: int) -> Tensors:
    """u^k: two more epochs under the prior."""
    return train(real.encoder(), shared, list(shared), real.questions(k), epochs(k, "refine"), real.RULE, offset=log_prior(k))[0]


def predicts(made: Any, k: int, own: Tensors) -> None:
    np.testing.assert_allclose(made.logits[k]["test"].numpy(), logits(own, k) + log_prior(k), atol=3e-3)


def test_the_mean_by_number(parts: ModuleType) -> None:
    made, _ = played(parts.ByNumber(real.INNER, SMOOTHING))
    start = real.start()
    fitted = {
        k: train(real.encoder(), start, list(start), real.questions(k), epochs(k, "batches", 0), real.RULE, offset=log_prior(k))[0]
        for k in COHORTS[0]
    }
    due = aggregate(list(fitted.values()), [real.SIZES[k] for k in fitted])
    real.assert_close(made.states[1].shared, due)
    assert not equal(made.states[1].shared, real.run(FedEven(real.INNER, SMOOTHING), "stacked").states[1].shared)


def test_unrefined_and_outright_train_as_the_whole(parts: ModuleType) -> None:
    whole, shared = played(FedEven(real.INNER, SMOOTHING))
    for method, own in ((parts.Unrefined(real.INNER, SMOOTHING), lambda k: shared), (parts.Outright(real.INNER, SMOOTHING), None)):
        made, _ = played(method)
        assert equal(made.states[-1].shared, whole.states[-1].shared)
        for k in EVERYBODY:
            predicts(made, k, own(k) if own else refined(shared, k))


def test_fine_tuned_with_the_prior(parts: ModuleType) -> None:
    made, shared = played(parts.FineTunedWithPrior(real.INNER, SMOOTHING))
    assert equal(made.states[-1].shared, real.run(real.INNER, "stacked").states[-1].shared)
    for k in EVERYBODY:
        predicts(made, k, refined(shared, k))


def test_the_page_lists_each_and_the_command_compares_them(parts: ModuleType) -> None:
    kinds = (parts.Unrefined, parts.Outright, parts.ByNumber, parts.FineTunedWithPrior)
    assert [word.rpartition(":")[2] for word in parts.WITHOUT] == [kind.name for kind in kinds]
    assert all(f"    {kind.name} " in (parts.__doc__ or "") for kind in kinds)
    assert parts.Unrefined().epochs == 0 and parts.FineTunedWithPrior.trains_as_inner
