"""What a killed run leaves, and what running again does with it."""

from __future__ import annotations

import json
import weakref
from dataclasses import replace
from functools import cache
from pathlib import Path
from tempfile import mkdtemp
from typing import Any

import pytest
import torch
from safetensors import SafetensorError
from safetensors.torch import save_file

from fedloom.client.store import DiskError
from fedloom.engines.local import WAVE, Local
from fedloom.engines.workers import Workers
from fedloom.messages import Update
from fedloom.methods import named
from fedloom.methods.fibecfed import Curriculum, FibecFed, Gal
from fedloom.run import checkpoint, evaluation, loop
from fedloom.run.again import evaluate_again
from fedloom.run.checkpoint import fingerprint_of
from fedloom.run.errors import CheckpointError, ExperimentError
from fedloom.run.experiment import EngineSettings, Experiment
from fedloom.run.loop import run
from fedloom.run.terminal.failures import explain
from fedloom.run.world import World, build, store_in
from tests import small

TIMES = ("train_seconds", "host_seconds", "peak_rss_bytes")


def timeless(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [{k: v for k, v in row.items() if k not in TIMES} for row in rows]


def rows(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "rounds.jsonl").read_text().splitlines()]


@cache
def reference() -> tuple[Path, dict[str, Any]]:
    """An uninterrupted run."""
    folder = Path(mkdtemp(prefix="reference-")) / "run"
    return folder, run(small.experiment("lora-personal-head"), folder, plain=True)


def test_running_again_returns_the_results_without_computing(monkeypatch: pytest.MonkeyPatch) -> None:
    folder, results = reference()

    def never(_: Experiment) -> None:
        raise AssertionError("loaded again")

    monkeypatch.setattr(loop, "build", never)
    assert run(small.experiment("lora-personal-head"), folder, plain=True) == json.loads(json.dumps(results))


class Killed(BaseException):
    """As good as kill −9: nobody catches it."""


def killed_at(count: int, monkeypatch: pytest.MonkeyPatch, where: str, folder: Path, asked: Experiment | None = None) -> None:
    """Run until the ``count``-th saving, and be killed right before (the row is written already) or right after it."""
    save, calls = checkpoint.save, 0

    def dying(*args: Any) -> checkpoint.Saved:
        nonlocal calls
        calls += 1
        if where == "before" and calls == count:
            raise Killed
        saved = save(*args)
        if where == "after" and calls == count:
            raise Killed
        return saved

    with monkeypatch.context() as patch:
        patch.setattr(checkpoint, "save", dying)
        with pytest.raises(Killed):
            run(asked or small.experiment("lora-personal-head"), folder, plain=True)


@pytest.mark.parametrize("where", ["before", "after"])
@pytest.mark.parametrize("count", [1, 2, 3])
def test_a_run_killed_between_row_and_checkpoint_ends_as_if_it_had_not_been(
    count: int, where: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    killed_at(count, monkeypatch, where, tmp_path / "run")
    assert len(rows(tmp_path / "run")) == count
    with (tmp_path / "run" / "rounds.jsonl").open("a") as file:
        file.write('{"round": 7, "lo')
    results = run(small.experiment("lora-personal-head"), tmp_path / "run", plain=True)
    folder, expected = reference()
    assert fingerprint_of(tmp_path / "run") == fingerprint_of(folder)
    assert timeless(rows(tmp_path / "run")) == timeless(rows(folder))
    same = (
        "final",
        "best",
        "bytes_up",
        "bytes_down",
        "setup_bytes_up",
        "setup_bytes_down",
        "examples",
        "per_device",
        "facts",
        "device_seconds",
    )
    assert {k: results[k] for k in same} == {k: expected[k] for k in same}


A_DEVICE = ("client.store", r"the state of device \d+ could not be written to .*clients .*No space left")
THE_SERVER = ("run.parts", r"the server's state could not be written to .*server-[0-9a-f]{16}.safetensors .*No space left")


@cache
def undisturbed() -> tuple[Path, dict[str, Any]]:
    """A run while there is room."""
    folder = Path(mkdtemp(prefix="undisturbed-")) / "run"
    return folder, run(small.experiment("ditto"), folder, plain=True)


@pytest.mark.parametrize(
    ("of", "let"), [(A_DEVICE, 1), (A_DEVICE, 5), (THE_SERVER, 0), (THE_SERVER, 1)], ids=["set-up", "training", "start", "round"]
)
def test_a_full_disk_ends_the_run_and_costs_no_device_its_round(
    of: tuple[str, str], let: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The disk is the run's own: devices whose state it does not take have not failed, and the round is done again. Four devices have
    written in the set-up, and the server before the first round."""
    experiment, (expected, whole), written, (module, says) = small.experiment("ditto"), undisturbed(), 0, of

    def filling(tensors: Any, path: Path) -> None:
        nonlocal written
        written += 1
        if written > let:
            path.write_bytes(b"what there was room for")
            raise SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")
        save_file(tensors, path)

    with monkeypatch.context() as disk:
        disk.setattr(f"fedloom.{module}.save_file", filling)
        with pytest.raises(DiskError, match=says) as found:
            run(experiment, tmp_path / "run", plain=True)
    assert written > let
    told = explain(found.value)
    assert told is not None and told[1] == 1 and "Free some space" in told[0]
    assert not list((tmp_path / "run").rglob("*.tmp"))
    again = run(experiment, tmp_path / "run", plain=True)
    assert timeless(rows(tmp_path / "run")) == timeless(rows(expected))
    assert again["final"] == whole["final"] and again["bytes_up"] == whole["bytes_up"]


def test_a_resumed_run_does_not_do_the_set_up_or_finished_rounds_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    killed_at(2, monkeypatch, "after", tmp_path / "run")
    asked: list[tuple[str, int]] = []
    carry = Local.run

    def told(self: Local, tasks: Any, take: Any) -> Any:
        asked.extend((task.op, int(task.settings.get("round", -1))) for task in tasks)
        return carry(self, tasks, take)

    monkeypatch.setattr(Local, "run", told)
    monkeypatch.setattr(loop, "paid_back", lambda *_: None)  # it plays another method's rounds, counting only
    run(small.experiment("lora-personal-head"), tmp_path / "run", plain=True)
    assert set(asked) == {("train", 1), ("predict", -1)}


def test_a_run_that_is_resumed_chooses_the_same_layers_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Killed after the round before which the GAL is chosen anew, and after the next: rows, facts and devices' state end alike."""
    method = FibecFed(curriculum=Curriculum(head_rounds=1), gal=Gal(count=1, which="random", refresh=1), keep=0.5)
    asked = replace(small.experiment("lora"), method=method, rounds=4)
    whole = run(asked, tmp_path / "whole", plain=True)
    assert len({tuple(entry["gal"]) for entry in whole["facts"]["gal_history"]}) > 1
    for count in (3, 4):
        folder = tmp_path / str(count)
        killed_at(count, monkeypatch, "after", folder, asked)
        resumed = run(asked, folder, plain=True)
        assert resumed["facts"] == whole["facts"]
        assert timeless(rows(folder)) == timeless(rows(tmp_path / "whole"))
        assert fingerprint_of(folder) == fingerprint_of(tmp_path / "whole")


def test_data_that_changed_under_a_run_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    killed_at(2, monkeypatch, "after", tmp_path / "run")
    monkeypatch.setattr(loop.World, "fingerprint", lambda self: "0" * 16)
    with pytest.raises(CheckpointError, match=r"changed since it began \(fingerprint [0-9a-f]{16}, now 0{16}\)"):
        run(small.experiment("lora-personal-head"), tmp_path / "run", plain=True)


def test_beside_f1_accuracy_is_told_by_both_protocols_on_both_splits(tmp_path: Path) -> None:
    """Of three classes F1 is the macro mean; accuracy is counted in the confusions that results hold. Again it comes out the same, also for
    a run of a version that did not tell it."""
    asked = small.experiment("ditto", rounds=3, evaluate_every=2, metric="f1")
    results, told = run(asked, tmp_path / "run", plain=True), rows(tmp_path / "run")
    assert [row["further"] is None for row in told] == [row["validation"]["further"] is None for row in told] == [False, True, False, False]
    for protocol in ("personalised", "global"):
        cells = [cell for device in results["per_device"] for cell in device["confusion"][protocol]]
        accuracy = sum(n for true, said, n in cells if true == said) / sum(n for *_, n in cells)
        assert results["final"]["further"] == told[-1]["further"]
        assert told[-1]["further"]["accuracy"][protocol] == pytest.approx(accuracy)
        assert told[-1]["further"]["accuracy"][protocol] != told[-1][protocol]
    assert len(set(told[-1]["further"]["accuracy"].values())) == 2, "devices have models of their own here"
    assert told[-1]["validation"]["further"]["accuracy"]["personalised"] == told[-1]["validation"]["accuracy"]
    assert 0 <= told[-1]["validation"]["further"]["accuracy"]["global"] <= 1
    again = evaluate_again(asked, tmp_path / "run")
    assert again.equal and again.scores["test"]["further"] == told[-1]["further"]
    path = tmp_path / "run" / "rounds.jsonl"
    for row in told:
        del row["further"], row["validation"]["further"]
    path.write_text("".join(json.dumps(row) + "\n" for row in told))
    again = evaluate_again(asked, tmp_path / "run")
    assert again.equal and "further" not in again.scores["test"]


def test_devices_elsewhere_tell_accuracy_beside_f1_by_their_counts(tmp_path: Path) -> None:
    asked = small.experiment(rounds=1, metric="f1")
    results = run(asked, tmp_path / "run", plain=True)
    world = build(asked)
    counts = {d["client"]: torch.tensor(d["confusion"]["personalised"]).reshape(-1, 3) for d in results["per_device"]}
    updates = [Update(k, 1, {"validation": of, "test": of}, {"validation_loss": 0.5}) for k, of in counts.items()]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(evaluation, "drive", lambda *_, **__: updates)
        far = evaluation._evaluated_there(world, asked.method.init(world.model), None)  # type: ignore[arg-type]
    assert far.scores["test"]["personalised"] == pytest.approx(results["final"]["personalised"])
    own = results["final"]["further"]["accuracy"]["personalised"]
    assert [far.scores[split]["further"]["accuracy"]["personalised"] for split in ("validation", "test")] == pytest.approx([own, own])


def test_rounds_that_are_not_evaluated_say_null_and_the_last_is(tmp_path: Path) -> None:
    results = run(small.experiment(rounds=3, evaluate_every=2), tmp_path / "a", plain=True)
    assert [row["personalised"] is None for row in rows(tmp_path / "a")] == [False, True, False, False]
    results = run(small.experiment(rounds=2, evaluate_every=0), tmp_path / "b", plain=True)
    assert [row["personalised"] is None for row in rows(tmp_path / "b")] == [True, True, False]
    assert (
        results["final"]
        == results["best"]
        == {k: rows(tmp_path / "b")[2][k] for k in ("round", "personalised", "global", "loss", "personalising")}
    )


def test_engine_settings_name_no_other_experiment(tmp_path: Path) -> None:
    """The tiny model is too small to be split over threads, so the bits are equal; docs/engines.md says what holds on a real one."""
    folder, _ = reference()
    experiment = small.experiment("lora-personal-head")
    how = Experiment(**{**vars(experiment), "engine": EngineSettings(stack=1, threads=1)})
    run(how, tmp_path / "run", plain=True)
    assert fingerprint_of(tmp_path / "run") == fingerprint_of(folder)


def test_best_is_chosen_on_validation_and_told_on_test(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    scores = iter([(0.1, 0.9), (0.7, 0.2), (0.7, 0.8), (0.3, 1.0)])
    true = loop.evaluate

    def told(*args: Any) -> Any:
        found, (validation, test) = true(*args), next(scores)
        found.scores["validation"]["personalised"], found.scores["test"]["personalised"] = validation, test
        return found

    monkeypatch.setattr(loop, "evaluate", told)
    results = run(small.experiment(rounds=3), tmp_path / "run", plain=True)
    assert (results["best"]["round"], results["best"]["personalised"]) == (1, 0.2), "the first of equals"
    assert results["validation"]["best"]["personalised"] == 0.7
    assert (results["final"]["round"], results["final"]["personalised"]) == (3, 1.0)


def test_looking_at_a_run_again_writes_nothing_even_where_a_method_keeps_state(tmp_path: Path) -> None:
    """``lora-prior`` stores something on every device when it is set up."""
    run(small.experiment("lora"), tmp_path / "run", plain=True)
    before = {p: p.read_bytes() for p in (tmp_path / "run").rglob("*") if p.is_file()}
    again = evaluate_again(small.experiment("lora"), tmp_path / "run", named("lora-prior"))
    assert again.method == "lora-prior"
    assert {p: p.read_bytes() for p in (tmp_path / "run").rglob("*") if p.is_file()} == before


@pytest.mark.parametrize("name", ["ditto", "rolora", "centralised"])
def test_a_run_is_not_evaluated_as_a_method_that_shares_the_same_tensors_and_trains_otherwise(name: str, tmp_path: Path) -> None:
    """Ditto's personal models, say, do not exist in a run of ``lora``; a fresh set-up would make some up."""
    with pytest.raises(ExperimentError, match=f"'{name}' does not train as 'lora' does, .* must be trained"):
        evaluate_again(small.experiment("lora"), tmp_path / "run", named(name))


def test_devices_without_state_have_no_file(tmp_path: Path) -> None:
    run(small.experiment("lora"), tmp_path / "run", plain=True)
    assert not (tmp_path / "run" / "checkpoints" / "clients").exists()


def test_a_finished_run_leaves_nothing_in_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Processes that make many runs, such as a comparison's, must not grow by a model each."""
    models, given, true, back = [], [], loop.build, loop.give_memory_back

    def seen(experiment: Experiment) -> World:
        world = true(experiment)
        world.model.__dict__["itself"] = world.model
        models.append(weakref.ref(world.model))
        return world

    def gave() -> None:
        back()
        given.append([model() for model in models])

    monkeypatch.setattr(loop, "build", seen)
    monkeypatch.setattr(loop, "give_memory_back", gave)
    run(small.experiment("fibecfed", rounds=1), tmp_path / "run", plain=True)
    assert given == [[None]], "freed, even what holds itself, before memory is given back"


@pytest.mark.parametrize(("workers", "stack", "told"), [(1, 0, False), (2, 0, True), (2, 3, True), (2, 2, False)])
def test_workers_that_a_round_does_not_need_are_told(
    workers: int, stack: int, told: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of four devices three are drawn: they are one wave, unless a stack is smaller. A model that runs packed has them shared."""
    world = build(replace(small.experiment("lora"), engine=EngineSettings(stack=stack, workers=workers)))
    assert loop._idle(world) == []
    monkeypatch.setattr(World, "alone_or_together", False)
    text = "a round of 3 devices goes to one of the 2 workers as a whole; --engine.stack 2 shares it out"
    assert loop._idle(world) == ([text] if told else [])
    if workers > 1:
        engine = world.engine(store_in(tmp_path))
        assert isinstance(engine, Workers)
        assert (engine.wave, engine.load) == (stack or WAVE, None)
