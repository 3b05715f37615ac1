"""A checkpoint carries (A0, B0), and a run stands on them: another machine's last digits give way to them, and another model is refused."""

from __future__ import annotations

import logging
import shutil
from dataclasses import replace
from functools import cache
from pathlib import Path
from tempfile import mkdtemp
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from fedloom.model.adapters import Adapter
from fedloom.model.names import is_down, is_factor, is_up, partner, under
from fedloom.run import checkpoint
from fedloom.run.again import evaluate_again
from fedloom.run.errors import CheckpointError
from fedloom.run.experiment import Experiment
from fedloom.run.export import export
from fedloom.run.loop import run
from fedloom.run.starting import stand_at, start_of
from fedloom.run.world import build, store_in
from tests import small, tiny


@cache
def ended() -> tuple[Experiment, Path]:
    """A run of FeDeRA."""
    e = replace(small.experiment("federa", rounds=1, evaluate_every=1), adapter=Adapter(rank=2, alpha=6.0))
    run(e, folder := Path(mkdtemp()) / "run", plain=True)
    return e, folder


def with_start(folder: Path, change: float) -> tuple[Experiment, Path, dict[str, torch.Tensor]]:
    """A copy of the run whose A0 and B0 are other ones by this much of their size, as its checkpoint says throughout."""
    e, done = ended()
    shutil.copytree(done, folder)
    saved, generator = checkpoint.load(folder, store := store_in(folder)), torch.Generator().manual_seed(2)
    assert saved is not None
    start = {n: t * (1 + change * torch.randn(t.shape, generator=generator)) for n, t in saved.start.items()}
    checkpoint.save(folder, replace(saved, start=start), store)
    return e, folder, start


def test_a_checkpoint_carries_what_was_taken_out_of_the_weights() -> None:
    """A0 and B0 by NumPy; W_res + s·B0·A0 is the weight in the model's file. What was trained is elsewhere by then."""
    e, folder = ended()
    saved = checkpoint.load(folder, store_in(folder))
    assert saved is not None and len(saved.start) == 12
    plain, left = load_file(tiny.folder() / "model.safetensors"), build(e).model.weights
    for a in filter(is_down, saved.start):
        w0 = plain[under(a).removeprefix("base_model.model.").replace(".base_layer", "")].double()
        product = 3.0 * saved.start[partner(a)].double() @ saved.start[a].double()
        u, s, v = np.linalg.svd(w0.numpy())
        np.testing.assert_allclose(product.numpy(), u[:, :2] * s[:2] @ v[:2], atol=1e-5)
        torch.testing.assert_close(left[under(a)].double() + product, w0, atol=1e-6, rtol=0)
        assert not torch.equal(saved.start[a], saved.state.shared[a])
    assert [path.name for path in (folder / "checkpoints").glob("start-*")] == [
        f"start-{checkpoint.fingerprint(saved.start)[:16]}.safetensors"
    ]
    zero = run(small.experiment("lora", rounds=1, evaluate_every=0), folder.parent / "zero", plain=True)
    assert zero["rounds"] == 1 and not [*(folder.parent / "zero" / "checkpoints").glob("start-*")]


def test_another_machines_last_digits_give_way_to_the_checkpoints(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    e, folder, start = with_start(tmp_path / "run", 1e-6)
    model = build(e).model
    w0 = {n: w.double() + 3.0 * product(start_of(model), n) for n, w in model.weights.items()}
    assert "checkpoint's (A0, B0) are used" in stand_at(model, start, folder)
    assert all(torch.equal(model.initial[n], t) for n, t in start.items())
    for name, weight in model.weights.items():
        torch.testing.assert_close(weight.double(), w0[name] - 3.0 * product(start, name), atol=3e-7, rtol=0)
    assert stand_at(model, start, folder) == "", "it stands there now"
    with caplog.at_level(logging.WARNING, "fedloom"):
        export(e, folder, tmp_path / "out")
    assert "checkpoint's (A0, B0) are used" in caplog.text
    written = load_file(tmp_path / "out" / "adapter_model.safetensors")
    for name, tensor in start.items():
        half = written[name][2:] if is_down(name) else -written[name][:, 2:]
        assert torch.equal(half, tensor) and is_factor(name) and (is_down(name) or is_up(name))


def product(pairs: dict[str, torch.Tensor], name: str) -> torch.Tensor:
    a = next(n for n in pairs if is_down(n) and under(n) == name)
    return pairs[partner(a)].double() @ pairs[a].double()


def test_a_resumed_run_says_so_and_ends_as_it_did(tmp_path: Path) -> None:
    e, done = ended()
    shutil.copytree(done, tmp_path / "same")
    (tmp_path / "same" / "results.json").unlink()
    told = Noting()
    assert run(e, tmp_path / "same", show=told)["final"] == run(e, done, plain=True)["final"]  # type: ignore[arg-type]
    assert not [text for text in told.notes if "(A0, B0)" in text]
    _, folder, _ = with_start(tmp_path / "near", 1e-6)
    (folder / "results.json").unlink()
    again = run(e, folder, show=(told := Noting()))  # type: ignore[arg-type]
    assert len([text for text in told.notes if "checkpoint's (A0, B0) are used" in text]) == 1
    assert again["final"]["global"] == pytest.approx(run(e, done, plain=True)["final"]["global"], abs=1e-6)


def test_another_models_start_is_refused_by_whatever_reads_it(tmp_path: Path) -> None:
    e, folder, _ = with_start(tmp_path / "far", 1e-2)
    (folder / "results.json").unlink()
    match = r"far are not those of .*base_layer.*differs by 0\.\d+ of its size.*0\.0001 is allowed.*Restore the model's files"
    with pytest.raises(CheckpointError, match=match):
        run(e, folder, plain=True)
    with pytest.raises(CheckpointError, match=match):
        export(e, folder, tmp_path / "out")
    with pytest.raises(CheckpointError, match=match):
        evaluate_again(e, folder)
    model = build(e).model
    with pytest.raises(CheckpointError, match=r"far are not those of .*missing.*Restore"):
        stand_at(model, dict([*start_of(model).items()][1:]), folder)
    assert "earlier release" in stand_at(model, {}, folder)


def test_a_file_of_the_start_that_was_altered_is_noticed(tmp_path: Path) -> None:
    shutil.copytree(ended()[1], tmp_path / "run")
    (file,) = (tmp_path / "run" / "checkpoints").glob("start-*")
    body = bytearray(file.read_bytes())
    body[-3] ^= 1
    file.write_bytes(body)
    with pytest.raises(CheckpointError, match=rf"corrupt: {file.name} was altered"):
        checkpoint.load(tmp_path / "run", store_in(tmp_path / "run"))


class Noting:
    """Keeps what a run has to say."""

    def __init__(self) -> None:
        self.notes: list[str] = []

    def note(self, text: str) -> None:
        self.notes.append(text)

    def phase(self, text: str) -> None: ...

    def round(self, row: dict[str, Any]) -> None: ...

    def resume(self, rows: Any) -> None: ...


def test_what_is_merged_of_a_run_in_16_bits_stands_on_the_runs_start_too(tmp_path: Path) -> None:
    """W0 - s·B0·A0 + s·B·A with the checkpoint's A0 and B0, to float32's rounding: they are 3e-5 of their size from this machine's."""
    e = replace(ended()[0], precision="bf16")
    run(e, folder := tmp_path / "run", plain=True)
    saved, generator = checkpoint.load(folder, store := store_in(folder)), torch.Generator().manual_seed(2)
    assert saved is not None
    start = {n: t * (1 + 3e-5 * torch.randn(t.shape, generator=generator)) for n, t in saved.start.items()}
    checkpoint.save(folder, replace(saved, start=start), store)
    export(e, folder, tmp_path / "out", merge=True)
    plain, merged = load_file(tiny.folder() / "model.safetensors"), load_file(tmp_path / "out" / "model.safetensors")
    for a in filter(is_down, start):
        name = under(a).removeprefix("base_model.model.").replace(".base_layer", "")
        b, now = partner(a), saved.state.shared
        due = plain[name].double() + 3.0 * (now[b].double() @ now[a].double() - start[b].double() @ start[a].double())
        torch.testing.assert_close(merged[name].double(), due, atol=1e-6, rtol=0)
