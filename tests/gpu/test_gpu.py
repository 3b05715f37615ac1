"""On an accelerator: the same results as on the CPU within tolerance, and a stack that is not slower in memory than it says."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from fedloom.client.curriculum import shuffled
from fedloom.compute.division import pass_bytes
from fedloom.compute.stacked import Stacked
from fedloom.compute.work import AdamW, Fit, Predict, Score
from fedloom.model.adapters import Adapter
from fedloom.model.loading import load
from tests import tiny

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="no accelerator on this machine")


def results(device: str, recompute: bool = False) -> list[object]:
    """Fit, Score and Predict of four devices on the tiny model."""
    how = {"adapter": Adapter(rank=2, dropout=0.1 if recompute else 0.0), "seed": 1, "max_length": 16, "device": device}
    model = load(str(tiny.folder()), num_labels=3, recompute=recompute, **how)
    items = []
    for c in tiny.clients().values():
        items += [Fit(model.initial, c.train, shuffled(len(c.train), 4, 1, "x", c.id), AdamW(1e-3))]
        items += [Score(model.initial, c.train), Predict(model.initial, c.test)]
    return [done.result for done in Stacked(model).run(items)]


@pytest.mark.parametrize("recompute", [False, True])
def test_the_accelerator_agrees_with_the_cpu(recompute: bool) -> None:
    for here, there in zip(results("cpu", recompute), results("cuda", recompute), strict=True):
        if isinstance(here, np.ndarray | torch.Tensor):
            np.testing.assert_allclose(np.asarray(there), np.asarray(here), rtol=1e-3, atol=1e-4)
        else:
            for name, tensor in here.tensors.items():  # type: ignore[attr-defined]
                torch.testing.assert_close(there.tensors[name], tensor, rtol=1e-3, atol=1e-4)  # type: ignore[attr-defined]


def test_a_stack_stays_within_its_estimate() -> None:
    model = load(str(tiny.folder(layers=6, hidden=256)), num_labels=3, adapter=Adapter(rank=8), seed=1, max_length=32, device="cuda")
    examples = tiny.examples(64)
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    Stacked(model, 8).run([Fit(model.initial, examples, shuffled(64, 8, k, "x"), AdamW(1e-3)) for k in range(8)])
    tokens = 8 * 8 * int(examples.lengths.max())
    assert torch.cuda.max_memory_allocated() - before <= 2 * tokens * pass_bytes(model)
