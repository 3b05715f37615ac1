"""A whole tiny experiment: a folder of JSON lines whose labels are learnable, and the tiny random BERT."""

from __future__ import annotations

import json
from collections.abc import Iterable
from functools import cache
from pathlib import Path
from tempfile import mkdtemp
from typing import Any

import numpy as np
import pytest

from fedloom.client.curricula import all_curricula
from fedloom.compute.work import Fit
from fedloom.methods import named
from fedloom.methods.fibecfed import Curriculum, FibecFed, Gal
from fedloom.model.loading import load
from fedloom.run.experiment import EngineSettings, Experiment
from fedloom.run.loop import run
from fedloom.run.terminal.console import Progress
from fedloom.run.world import build
from tests import tiny

ROWS = {"train": 44, "validation": 12, "test": 18}


@cache
def data() -> Path:
    """A data folder: sentences of tiny's words, the label decided by the first one."""
    path, rng = Path(mkdtemp(prefix="tiny-data-")), np.random.default_rng(5)
    for split, count in ROWS.items():
        rows = []
        for _ in range(count):
            words = rng.integers(0, 60, size=rng.integers(1, 9))
            rows.append({"text": " ".join(f"w{w}" for w in words), "label": "abc"[words[0] % 3]})
        (path / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


EASY: dict[str, dict[str, Any]] = {
    "voc": {"start": 0.3},
    "slw": {"start": 4},
    "shortformer": {"start": 4, "full_at": 0.5},
    "fisher": {"start": 0.4},
    "loss": {"start": 0.4},
}
"""Settings that close something on the tiny devices, whose texts have 3 to 10 tokens and of which some have more than a batch."""


def curriculum(name: str) -> Any:
    """The curriculum with settings that close something."""
    return all_curricula()[name](**EASY.get(name, {}))


def closed(fits: Iterable[Fit]) -> bool:
    """Whether any of these has a device leave some of its examples out, or all of their tokens but the first."""
    return any(len(np.unique(np.concatenate(fit.batches))) < len(fit.examples) or fit.examples.lengths.max() <= 4 for fit in fits)


def method(name: str) -> Any:
    """The method as it comes; FibecFed with one global layer of the three, so that there are local layers and masks to get wrong."""
    if name == "fibecfed":
        return FibecFed(curriculum=Curriculum(head_rounds=1), gal=Gal(count=1), keep=0.5)
    return named(name)()


def experiment(name: str = "lora", stack: int = 0, kind: str = "local", **fields: Any) -> Experiment:
    """Four devices, three a round, two rounds, evaluated after each; trained together, as a user's are unless asked otherwise."""
    settings: dict[str, Any] = {"clients": 4, "cohort": 3, "rounds": 2, "evaluate_every": 1, "max_length": 16, "seed": 5}
    settings |= {"data": str(data()), **fields}
    engine = EngineSettings(kind=kind, stack=stack)  # type: ignore[arg-type]
    return Experiment(method(name), model=str(tiny.folder()), engine=engine, **settings)


BUILT = cache(build)
"""Worlds by experiment. A world is derived and never changed; that rebuilding one gives the same is ``test_loop.py``'s to show."""

LOADED = cache(load)
"""Models by what was asked. What stands under its pairs is what the last run put there, and every run begins on the model's own."""


def build_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Until the test ends, runs and descriptions of equal experiments share a world, and worlds of equal models a model."""
    for where in ("loop", "describe"):
        monkeypatch.setattr(f"fedloom.run.{where}.build", BUILT)
    monkeypatch.setattr("fedloom.run.world.load_model", LOADED)


def stopped(of: Experiment, folder: Path, last: int) -> None:
    """Run ``of`` in ``folder`` until Ctrl-C, which comes when round ``last`` has its row and before it is in the checkpoint."""
    show = Progress.round

    def dying(self: Progress, row: dict[str, Any]) -> None:
        show(self, row)
        if row["round"] == last:
            raise KeyboardInterrupt

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Progress, "round", dying)
        with pytest.raises(KeyboardInterrupt):
            run(of, folder, plain=True)
    assert not (folder / "results.json").exists()
