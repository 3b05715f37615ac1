"""A block at a time in whole runs: stopped in the middle of a cycle, they go on as if they had not been."""

from __future__ import annotations

import json
from dataclasses import replace
from functools import cache
from pathlib import Path
from tempfile import mkdtemp
from typing import Any

import pytest
import torch

from fedloom.methods.fedcybgd import FedCyBGD
from fedloom.run import checkpoint
from fedloom.run.checkpoint import fingerprint_of
from fedloom.run.console import Progress
from fedloom.run.experiment import Experiment
from fedloom.run.loop import run
from fedloom.run.world import store_in
from tests import small
from tests.conformance.test_methods import Killed, without_clock

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
