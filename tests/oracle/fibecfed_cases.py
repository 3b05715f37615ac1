"""Two runs of the real FibecFed that between them use every setting the derivation knows, and the derivation's own run of each."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from itertools import product
from typing import Any

import numpy as np
import pytest
import torch

from fedloom.client.curriculum import Pacing
from fedloom.compute.compute import Done
from fedloom.compute.work import Fisher, Fit, Fitted, Moments, Predict, Score, Sensitivity, WorkItem
from fedloom.methods.fibecfed import Curriculum, FibecFed, Gal
from fedloom.server.participation import uniform
from tests.oracle import real
from tests.oracle.numpy_fibecfed_play import Played, Settings, Shard, play

LEAST = FibecFed(real.INNER, Curriculum(head_rounds=2), Gal(0.5), keep=0.4)
MOST = FibecFed(
    real.INNER,
    Curriculum(start=0.3, full_at=0.7, pacing="sqrt", head="left-out"),
    Gal(0.2, which="most", rho=0.8, norm="norms"),
    keep=0.25,
    warmup_epochs=2,
    momentum=0.7,
)
COHORTS = tuple(uniform(real.POOL, t) for t in range(real.POOL.rounds))


@dataclass(frozen=True)
class Case:
    """One method on one compute: what really happened (``made``) and what the derivation says should (``due``)."""

    method: FibecFed
    kind: real.Kind

    @property
    def made(self) -> real.Run:
        return real.run(self.method, self.kind)

    @property
    def due(self) -> Played:
        return derived(self.method)


CASES = [Case(method, kind) for method, kind in product((LEAST, MOST), ("serial", "stacked"))]
every_case = pytest.mark.parametrize("case", CASES, ids=lambda case: f"{case.method.gal.which}-{case.kind}")


@cache
def derived(m: FibecFed) -> Played:
    """The derivation on the same start, batches and cohorts."""
    warm = range(m.curriculum.head_rounds if m.curriculum.head == "warm" else 0)
    settings = Settings(
        real.RULE,
        real.POOL.rounds,
        m.inner.local_epochs,
        m.curriculum.pacing,
        m.curriculum.start,
        m.curriculum.full_at,
        m.curriculum.head != "left-out",
        m.gal.fraction,
        m.gal.which,
        m.gal.rho,
        m.gal.norm,
        m.warmup_epochs,
        m.momentum,
        m.keep,
        head_cohorts=[uniform(real.POOL, -1 - i) for i in warm],
    )
    shards = {}
    for k in real.POOL.clients:
        c = real.devices()[k]
        cut = m.inner.cut(c, "batches")
        shards[k] = Shard(real.questions(k), cut, cut[0], [m.inner.cut(c, "warm-head", -1 - i) for i in warm])
    return play(real.encoder(), real.start(), shards, COHORTS, settings)


class Idle:
    """A compute that trains nothing: for what depends on numbers of batches alone. Scores are random and stay the same."""

    def run(self, items: Sequence[WorkItem]) -> list[Done]:
        return [Done(self._result(item), 0.0, 0) for item in items]

    def _result(self, item: WorkItem) -> Any:
        rng = np.random.default_rng(len(item.examples))
        match item:
            case Fit():
                return Fitted(dict(item.start), np.ones(len(item.batches)), Moments({}, {}, 0))
            case Score():
                return rng.random(len(item.examples))
            case Fisher():
                return {n: torch.from_numpy(rng.random(t.shape)).float() for n, t in item.at.items() if n in (item.over or item.at)}
            case Sensitivity():
                return rng.random(real.LAYERS)
            case Predict():
                return torch.zeros(len(item.examples), 3)


@cache
def idle(pacing: Pacing, start: float = 0.6, full_at: float = 0.8, granularity: Any = "batch", rounds: int = 10) -> real.Run:
    """Everybody takes part in every round, and nobody trains."""
    method = FibecFed(real.INNER, Curriculum(start, full_at, pacing, granularity, head="as-is"))
    return real.watch(method, Idle(), real.Pool(real.POOL.clients, 4, rounds, 8))
