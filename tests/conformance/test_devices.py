"""Devices that differ, in whole runs: time to a target by hand, ranks and layers chosen by memory, and what is told of it all."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from fedloom.client.store import ClientStore
from fedloom.compute.flops import Flops
from fedloom.fleet import Fleet
from fedloom.messages import Replies, Task, Traffic
from fedloom.methods.embracingfl import EmbracingFL
from fedloom.methods.fedavg import FedAvg
from fedloom.methods.flexlora import FlexLora
from fedloom.methods.flora import FLoRA
from fedloom.methods.hetlora import HetLora
from fedloom.model.memory import needs, output_side
from fedloom.model.names import is_down
from fedloom.run import checkpoint
from fedloom.run.checkpoint import fingerprint_of
from fedloom.run.comparison import targets
from fedloom.run.costs.ledger import Section
from fedloom.run.deployment.federation import serve
from fedloom.run.describe import describe
from fedloom.run.errors import CheckpointError, ExperimentError
from fedloom.run.experiment import Experiment
from fedloom.run.loop import run
from fedloom.run.pages.report import page_of
from fedloom.run.reading import read
from fedloom.run.world import build
from fedloom.server.participation import uniform
from tests import small

FIGURES = {"slow": (2e6, 1e3, 4e3), "quick": (5e7, 2e5, 1e6)}
"""FLOP/s, bytes/s up, bytes/s down."""
WHO = ("slow", "quick", "quick", "slow")


def devices(folder: Path, memory: Sequence[float] = (1e8, 1e9, 1e9, 1e8)) -> str:
    """A file of four devices, two of each kind, with these memories."""
    keys = ("flops_per_second", "upload_bytes_per_second", "download_bytes_per_second")
    entries = [
        {"name": f"{kind} of {bytes:g}", "device": k, "memory_bytes": bytes, **dict(zip(keys, FIGURES[kind], strict=True))}
        for k, (kind, bytes) in enumerate(zip(WHO, memory, strict=True))
    ]
    (folder / "devices.json").write_text(json.dumps(entries))
    return str(folder / "devices.json")


def rows(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "rounds.jsonl").read_text().splitlines()]


def by_hand(traffic: Sequence[Traffic], figures: Mapping[int, tuple[float, float, float]]) -> float:
    """The slowest of those who were asked: download, compute, upload."""
    each = [t.bytes_down / figures[t.client][2] + t.flops / figures[t.client][0] + t.bytes_up / figures[t.client][1] for t in traffic]
    return max(each)


def test_time_to_a_target_is_that_of_the_slowest_device_of_each_round(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The same run to the bit, on devices that differ and on devices that are alike: the same round reaches a target, at another time. (The
    scores that it is read from are made up: 1 after the first round, 2 after the second.)"""
    heard: list[Sequence[Traffic]] = []
    hear = Section.hear

    def overheard(self: Section, tasks: Sequence[Task], replies: Replies) -> None:
        heard.append(replies.traffic)
        hear(self, tasks, replies)

    monkeypatch.setattr(Section, "hear", overheard)
    found = {}
    jetson = (2e11, 2.5e6, 6.25e6)
    for name, device, figures in (
        ("alike", "jetson", dict.fromkeys(range(4), jetson)),
        ("differ", devices(tmp_path), {k: FIGURES[kind] for k, kind in enumerate(WHO)}),
    ):
        heard.clear()
        result = run(small.experiment("lora", stack=0, evaluate_every=0, device=device), tmp_path / name, plain=True)
        told, seconds = rows(tmp_path / name), [by_hand(traffic, figures) for traffic in heard]
        assert [row["device_seconds"] for row in told[1:]] == pytest.approx(seconds, rel=1e-12)
        scored = [{**row, "personalised": row["round"]} for row in told]
        for first in (1, 2):
            cost = targets.reached(scored, result, "personalised", first)
            assert cost is not None
            assert (cost.round, cost.device_seconds) == (first, pytest.approx(sum(seconds[:first]), rel=1e-12))
        found[name] = seconds, result["final"], [row["loss"] for row in told], fingerprint_of(tmp_path / name)
    (alike, *same), (differ, *same_too) = found["alike"], found["differ"]
    assert same == same_too
    assert sum(differ) > 100 * sum(alike)


def embracing(folder: Path, **fields: Any) -> Experiment:
    """Devices that one layer, everything, nothing but the end, and two layers fit."""
    plain = small.experiment("embracingfl", **fields)
    each = [one.total for one in needs(build(plain).model, plain.method.inner.batch_size)]
    return replace(plain, device=devices(folder, (each[1], each[-1], each[0], each[2])))


def test_stacked_equals_one_by_one_and_costs_what_was_done(tmp_path: Path) -> None:
    """Of a whole model passes are not packed, and a device's last bits depend on its company (docs/engines.md)."""
    states, results = [], []
    for stack in (1, 0):
        e = embracing(tmp_path, stack=stack, rounds=1, evaluate_every=0)
        results.append(run(e, folder := tmp_path / str(stack), plain=True))
        saved = checkpoint.load(folder, ClientStore(folder / "checkpoints" / "clients"))
        assert saved is not None
        states.append(saved.state.shared)
    assert all(result["facts"]["devices_by_layers"] == {"0": 1, "1": 1, "2": 1, "4": 1} for result in results)
    assert set(states[0]) == set(states[1])
    assert all((t - states[1][n]).abs().max() < (2e-3 if n.endswith("key.bias") else 1e-6) for n, t in states[0].items())
    world, spent, up = build(e), 0.0, 0
    flops, inner = Flops(world.model), e.method.inner
    for k in uniform(world.pool, 0):
        c, names = world.device(k), output_side(world.model.initial, (1, 4, 0, 2)[k])
        up += 4 * sum(world.model.initial[n].numel() for n in names)
        for batch in inner.batches(c, 0):
            spent += len(batch) * float(flops.step(frozenset(names), int(c.train.lengths[batch].max())))
    assert results[0]["flops"] == results[1]["flops"] == pytest.approx(spent)
    assert up < results[1]["bytes_up"] < up + 3 * 6000, "and a header, which names what is there"


def test_a_batch_is_what_memory_holds_and_stacked_is_one_by_one(tmp_path: Path) -> None:
    """Weights, gradients, moments and so many texts' activations: 2 and a half, 99, 3 exactly, and not even the weights. n_k stays, every
    text is trained on as before, and whoever has the memory trains as without the option."""
    plain = replace(small.experiment("lora", rounds=1, evaluate_every=0), method=FedAvg(batch_size=4, local_epochs=1))
    one = needs(build(plain).model, 1)[-1]
    held = one.total - one.activations
    file = devices(tmp_path, [held + texts * one.activations for texts in (2.5, 99, 3)] + [held / 2])
    e = replace(plain, device=file, method=replace(plain.method, batch_by_memory=True))
    sizes, states = [2, 4, 3, 1], []
    for stack in (1, 0):
        asked = replace(e, engine=replace(e.engine, stack=stack))
        run(asked, folder := tmp_path / str(stack), plain=True)
        saved = checkpoint.load(folder, ClientStore(folder / "checkpoints" / "clients"))
        assert saved is not None
        states.append(saved.state.shared)
    assert all(torch.equal(t, states[1][n]) for n, t in states[0].items())
    world, before = build(e), build(replace(plain, device=file))
    for k, size in enumerate(sizes):
        c = world.device(k)
        batches = world.experiment.method.batches(c, 0)
        assert max(map(len, batches)) == min(size, len(c.train)) and sorted(np.concatenate(batches)) == [*range(len(c.train))]
        assert max(map(len, before.experiment.method.batches(before.device(k), 0))) == min(4, len(c.train))
    assert dict(describe(e).lines)["texts a step"].startswith("slow of ") and ": 2;" in dict(describe(e).lines)["texts a step"]
    with pytest.raises(ValueError, match="'embracingfl' has devices train as many layers as their memory allows, and not fewer texts"):
        EmbracingFL(FedAvg(batch_by_memory=True))


@pytest.mark.parametrize("kind", [FlexLora, HetLora, FLoRA])
def test_ranks_are_chosen_by_memory_on_both_sides(kind: Any, tmp_path: Path) -> None:
    """Of ranks 2, 4 and 8 a device has the highest that is no more than its share of the most memory, or the lowest."""
    e = small.experiment("lora", device=devices(tmp_path, (1e9, 3e8, 5.1e8, 1e7)))
    world = build(replace(e, method=kind(ranks=(8, 2, 4))))
    method, made = world.experiment.method, set[tuple[int, int]]()
    flow = method.setup(method.init(world.model), world.pool)
    state = _end(flow)
    for t in range(4):
        asking = next(method.round(replace(state, round=t), world.pool))
        made |= {(task.client, next(a.shape[0] for n, a in task.tensors.items() if is_down(n))) for task in asking.tasks}
    assert made == {(0, 8), (1, 2), (2, 4), (3, 2)}
    if kind is not FLoRA:  # its pairs are merged
        tensors = {n: t + 1 for n, t in world.model.initial.items()}
        for k, rank in made:
            told = _end(method.personalise(world.device(k), tensors)).tensors
            assert {int(a.any(1).sum()) for n, a in told.items() if is_down(n)} == {rank}


def _end(generator: Any) -> Any:
    """What a generator returns that asks for nothing."""
    with pytest.raises(StopIteration) as ended:
        next(generator)
    return ended.value.value


def test_a_run_tells_what_its_devices_are_like_and_a_file_is_part_of_its_data(tmp_path: Path) -> None:
    e = small.experiment("lora", rounds=1, evaluate_every=0, device=devices(tmp_path, (1e8, 1e9, 1e9, 1e8)))
    result = run(e, tmp_path / "run", plain=True)
    assert result["devices"] == build(e).fleet.as_json(range(4))
    assert result["devices"]["of"] == ["slow of 1e+08", "quick of 1e+09", "quick of 1e+09", "slow of 1e+08"]
    assert [one["devices"] for one in result["devices"]["profiles"]] == [2, 2]
    page = page_of([read(tmp_path / "run")])
    assert "2 slow of 1e+08 (2e+06 FLOP/s, 0.008 Mbit/s up, 0.032 down, 100 MB of memory)" in page
    (tmp_path / "run" / "results.json").unlink()
    devices(tmp_path, (1e8, 1e9, 1e9, 2e8))
    with pytest.raises(CheckpointError, match="the data behind .* changed"):
        run(e, tmp_path / "run", plain=True)
    alike = build(small.experiment("lora"))
    assert alike.fingerprint() == build(small.experiment("lora", device="phone")).fingerprint()
    assert alike.fleet == Fleet((alike.fleet.profiles[0],)) and alike.device(2).strength is None
    with pytest.raises(ExperimentError, match="is a file of this machine, and every device must know what it is like"):
        serve(e, tmp_path / "far", tmp_path, "", None)  # type: ignore[arg-type]


def test_describe_says_what_training_takes_and_where_it_fits(tmp_path: Path) -> None:
    told = dict(describe(embracing(tmp_path)).lines)
    world = build(embracing(tmp_path))
    each = needs(world.model, 8)
    assert told["devices"].count("1 slow") == told["devices"].count("1 quick") == 2
    assert "by estimate: 34.4 kB weights, 34.4 kB gradients, 68.8 kB the optimiser, 688 kB activations" in told["training takes"]
    assert "for 8 texts of 16 tokens; the head alone 268 kB" in told["training takes"]
    assert told["of which fits"].split("; ")[1].endswith(": all of it")
    assert [text.split(": ")[1] for text in told["of which fits"].split("; ")] == [
        "the head and 1 of 4 parts before it", "all of it", "the head and 0 of 4 parts before it", "the head and 2 of 4 parts before it",
    ]  # fmt: skip
    assert each[-1].total == 34380 + 27980 + 6400 + 68760 + 688128
    assert isinstance(world.experiment.method, EmbracingFL)
