"""On an accelerator: the same results as on the CPU within tolerance, a stack that takes no more memory than it says, and whole runs."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from fedloom.client.curriculum import shuffled
from fedloom.compute.division import pass_bytes
from fedloom.compute.stacked import Stacked
from fedloom.compute.work import AdamW, Fit, Predict, Score
from fedloom.model.adapters import Adapter
from fedloom.model.loading import load
from fedloom.run.again import evaluate_again
from fedloom.run.export import export
from fedloom.run.loop import run
from fedloom.server.masks import Mask
from fedloom.server.optimizers import ServerStep
from fedloom.server.sharing import Sharing
from tests import small, tiny

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


def test_a_start_lies_on_the_processor_and_the_model_on_the_accelerator() -> None:
    model = load(str(tiny.folder()), num_labels=3, adapter=Adapter(rank=2, start="svd"), seed=1, max_length=16, device="cuda")
    assert {t.device.type for t in model.initial.values()} == {"cpu"}
    assert {p.device.type for p in model.module.parameters()} == {"cuda"}


RUNS = {
    "federa": small.experiment("federa"),
    "a server's Adam": replace(small.experiment("lora"), server=ServerStep(rule="adam")),
    "flasc": small.experiment("flasc"),
    "fibecfed": small.experiment("fibecfed"),
    "fedcybgd": small.experiment("fedcybgd"),
    "a mask": replace(small.experiment("lora"), mask=Mask(0.4)),
    "a mask on some layers": replace(small.experiment("lora"), mask=Mask(0.4), share=Sharing(count=1)),
    "biases": replace(small.experiment("lora"), adapter=Adapter(kind="bitfit")),
}


@pytest.mark.parametrize("name", RUNS)
def test_a_run_is_stopped_taken_up_again_evaluated_and_exported(name: str, tmp_path: Path) -> None:
    """What the server and the devices keep meets what the accelerator gives: in a round, in a checkpoint and after the last one."""
    small.stopped(RUNS[name], tmp_path / "run", 1)
    run(RUNS[name], tmp_path / "run", plain=True)
    again = evaluate_again(RUNS[name], tmp_path / "run")
    assert again.recorded is not None and again.scores.keys() == again.recorded.keys()
    if (tmp_path / "run" / "adapter").exists():
        export(RUNS[name], tmp_path / "run", tmp_path / "out", client=0)
        assert any((tmp_path / "out").glob("*.safetensors"))
