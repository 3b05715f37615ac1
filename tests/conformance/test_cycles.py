"""A block at a time in whole runs: stopped within a cycle they go on as if they had not been, and they cost what was told before."""

from __future__ import annotations

import json
from dataclasses import replace
from functools import cache
from itertools import pairwise
from pathlib import Path
from tempfile import mkdtemp
from typing import Any

import pytest
import torch

from fedloom.engines.engine import drive
from fedloom.methods.fedbavg import FedBAvg
from fedloom.methods.fedcybgd import FedCyBGD
from fedloom.model.names import is_head
from fedloom.run import checkpoint, parts
from fedloom.run.checkpoint import fingerprint_of
from fedloom.run.costs.counting import Counting
from fedloom.run.costs.pretended import Pretended
from fedloom.run.describe import describe, played
from fedloom.run.experiment import Experiment
from fedloom.run.loop import run
from fedloom.run.parts import tensors_of
from fedloom.run.terminal.console import Progress, human_bytes
from fedloom.run.world import store_in
from fedloom.tensors import nbytes, only
from tests import small
from tests.conformance.test_methods import Killed, without_clock
from tests.unit.test_checkpoint import as_before

pytestmark = pytest.mark.no_cover

TURNS = 6
"""Of two devices and three blocks: a cycle is three turns, of devices 0, 1 and 0."""


@pytest.fixture(autouse=True)
def worlds_are_built_once(monkeypatch: pytest.MonkeyPatch) -> None:
    small.build_once(monkeypatch)


def experiment(method: Any = FedCyBGD(), stack: int = 0, **fields: Any) -> Experiment:
    settings = {"clients": 2, "cohort": 1, "rounds": TURNS, "evaluate_every": 0, **fields}
    return replace(small.experiment("fedcybgd", stack, **settings), method=method)


@cache
def whole(asked: Experiment) -> tuple[Path, dict[str, Any]]:
    """One uninterrupted run."""
    folder = Path(mkdtemp(prefix="cycles-")) / "run"
    return folder, run(asked, folder, plain=True)


def rows(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "rounds.jsonl").read_text().splitlines()]


@pytest.mark.parametrize("stack", [1, 0])
def test_stopped_after_the_third_turn_it_ends_at_the_same_bits(stack: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The fourth turn is device 0's again: it trains on top of block 1, which it was sent before the stop and is not sent again."""
    asked, show = experiment(stack=stack), Progress.round

    def dying(self: Progress, row: dict[str, Any]) -> None:
        show(self, row)
        if row["round"] == 4:
            raise Killed

    monkeypatch.setattr(Progress, "round", dying)
    with pytest.raises(Killed):
        run(asked, tmp_path / "run", plain=True)
    monkeypatch.setattr(Progress, "round", show)
    store = store_in(tmp_path / "run")
    saved = checkpoint.load(tmp_path / "run", store)
    assert saved is not None and saved.state.round == 3
    assert saved.state.server["changed"].tolist() == [1, 2, 3] and saved.state.server["seen"].tolist() == [[1, 2, 0], [1, 0, 0]]
    initial, (private, _) = small.BUILT(asked).model.initial, store.load(0)
    kept = {n: tensor for n, tensor in private.items() if ".layer.1." in n}
    assert len(kept) > 4 and all(torch.equal(tensor, saved.state.shared[n]) for n, tensor in kept.items())
    assert any(not torch.equal(tensor, initial[n]) for n, tensor in kept.items())
    results = run(asked, tmp_path / "run", plain=True)
    folder, expected = whole(asked)
    assert fingerprint_of(tmp_path / "run") == fingerprint_of(folder)
    told = rows(folder)
    assert [without_clock(row) for row in rows(tmp_path / "run")] == [without_clock(row) for row in told]
    assert without_clock(results) == without_clock(expected)
    assert told[4]["answered"] == [0] and told[4]["bytes_down"] < told[5]["bytes_down"], "block 1 was not sent again"


HEADER = 4096
"""Bytes of a file besides its tensors' numbers, at the most."""


def in_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    """A layer of the tiny model counts as a large one's does."""
    monkeypatch.setattr(parts, "PART", 1024)


@pytest.mark.parametrize("precision", ["float32", "bf16"])
def test_a_turn_writes_a_block_and_the_state_lies_on_the_disk(precision: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In bytes of the files that a turn made: its block, the head, and books of who has seen what. In 16 bits the start lies there while
    the run goes on, in the same files as the first state."""
    in_parts(monkeypatch)
    asked, world = experiment(precision=precision), small.BUILT(experiment(precision=precision))
    save, seen, folder = checkpoint.save, list[tuple[dict[str, int], checkpoint.Saved, dict[str, Any]]](), tmp_path / "run"

    def watched(*given: Any) -> checkpoint.Saved:
        made = save(*given)
        sizes = {path.name: path.stat().st_size for path in (folder / "checkpoints").glob("server-*")}
        seen.append((sizes, made, json.loads((folder / "checkpoints" / "latest.json").read_text())))
        return made

    monkeypatch.setattr(checkpoint, "save", watched)
    monkeypatch.setattr(world.model, "initial", world.model.initial)
    run(asked, folder, plain=True)
    blocks, shared = asked.method.blocks(seen[0][1].state.shared), seen[0][1].state.shared
    head = nbytes({n: t for n, t in shared.items() if is_head(n)})
    for turn, ((before, was, _), (after, made, body)) in enumerate(pairwise(seen)):
        block = nbytes(only(shared, blocks[turn % 3].names))
        new = sum(size for name, size in after.items() if name not in before)
        assert block < new <= block + head + nbytes(made.state.server) + HEADER < nbytes(shared) / 2
        assert sum(all(part is not old for old in was.parts) for part in made.parts) == 2, "nobody looks at what did not change"
        begun = set(body.get("begun", []))
        assert set(after) == {*body["server"], *begun} and bool(begun) == (precision == "bf16" and turn + 1 < TURNS)
    first = {part.name for part in seen[0][1].begun}
    assert len(first & set(seen[0][2]["server"])) == (3 if precision == "bf16" else 0), "a block's file is both until it changes"
    kept = seen[0][1].begun
    assert all(tensor is world.model.initial[name.removeprefix("shared/")] for name, tensor in tensors_of(kept).items())


@pytest.mark.parametrize("precision", ["float32", "bf16"])
@pytest.mark.parametrize("earlier", [False, True], ids=["", "earlier release"])
def test_killed_before_the_index_it_ends_at_the_same_bits(
    earlier: bool, precision: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The fourth turn's block is in its file, and nothing names it. Whoever goes on may also find what an earlier release left."""
    asked, write = experiment(precision=precision), checkpoint.write_atomically
    folder, expected = whole(asked)
    in_parts(monkeypatch)

    def dying(path: Path, text: str) -> None:
        if path.name == checkpoint.LATEST and json.loads(text)["round"] == 4:
            raise Killed
        write(path, text)

    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(checkpoint, "write_atomically", dying)
        run(asked, tmp_path / "run", plain=True)
    place = tmp_path / "run" / "checkpoints"
    body = json.loads((place / "latest.json").read_text())
    stray = {path.name for path in place.glob("server-*")} - {*body["server"], *body.get("begun", [])}
    assert body["round"] == 3 and len(stray) == 2, "a block, and what is small"
    if earlier:
        as_before(tmp_path / "run")
    results = run(asked, tmp_path / "run", plain=True)
    assert fingerprint_of(tmp_path / "run") == fingerprint_of(folder)
    assert without_clock(results) == without_clock(expected)
    assert {path.name for path in place.glob("server-*")} == set(json.loads((place / "latest.json").read_text())["server"])


FEDBAVG = experiment(FedBAvg(), clients=3, cohort=2, rounds=5)
SUBSET = experiment(FedCyBGD(subset=0.5), rounds=5)
SMALLER = experiment(FedCyBGD(drop=0.5, prune=0.3, rest="nf4"), rounds=5, wire="int8")


STAGES, OTHERS, MOVING = (small.experiment(name, rounds=3, evaluate_every=0) for name in ("slora", "fedalt", "deltalora"))
ASKED = {
    "fedcybgd": experiment(),
    "fedbavg": FEDBAVG,
    "subset": SUBSET,
    "smaller, in fewer bits": SMALLER,
    "slora": STAGES,
    "fedalt": OTHERS,
    "deltalora": MOVING,
}


@pytest.mark.parametrize("asked", ASKED.values(), ids=list(ASKED))
def test_what_a_run_costs_was_told_turn_for_turn(asked: Experiment) -> None:
    """Whole messages: down to the byte, up but for the digits of each loss, of which 0.0 has the fewest; work to the operation."""
    told, world = rows(whole(asked)[0])[1:], small.BUILT(asked)
    found = played(replace(world, compute=Pretended(world.model)))
    assert found.whole and len(found.rounds) == len(told) == asked.rounds
    assert [section.bytes_down for section in found.rounds] == [row["bytes_down"] for row in told]
    for section, row in zip(found.rounds, told, strict=True):
        assert section.answered == row["answered"]
        assert (section.flops, section.examples) == (row["flops"], row["examples"])
        assert 0 <= row["bytes_up"] - section.bytes_up <= 24 * len(row["answered"])
    assert len({row["bytes_down"] for row in told}) > 1, "as of what was sent before"
    lines = dict(describe(asked).lines)
    for line, few in (("first round", told[:1]), ("last round", told[-1:]), ("all rounds", told)):
        assert lines[line].startswith(f"{human_bytes(sum(row['bytes_down'] for row in few))} down, ")
    later = told[asked.rounds // 2 :]
    assert lines["later rounds"].startswith(f"{human_bytes(sum(row['bytes_down'] for row in later) // len(later))} down, ")
    assert lines["later rounds"].endswith(f": each of the last {len(later)}, on average")


def test_a_device_that_is_counted_takes_no_memory() -> None:
    """What stands for all that it keeps is the model's own, pruned blocks too."""
    world = small.BUILT(experiment(FedCyBGD(prune=0.3)))
    engine, method = Counting(replace(world, compute=Pretended(world.model))), world.experiment.method
    state = drive(method.setup(method.init(world.model), world.pool), engine)
    for _ in range(3):
        state = drive(method.round(state, world.pool), engine)
    kept = {k: private for k, (private, _) in engine.kept.items()}
    assert {k: sum(".layer.1." in n for n in private) for k, private in kept.items()} == {0: 16, 1: 16}
    assert all(tensor is world.model.initial[n] for private in kept.values() for n, tensor in private.items())
