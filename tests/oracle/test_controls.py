"""SCAFFOLD's equations (3) to (5) with option II as the paper writes them, in NumPy: two devices whose losses are quadratic, SGD, unequal
numbers of steps, one device away in one round. Here a device's work is answered by SGD in NumPy, which knows no controls but the correction
that it is asked for."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

import numpy as np
import pytest
import torch

from fedloom.client.client import Client
from fedloom.client.controls import corrected
from fedloom.compute.work import AdamW, Fit, Fitted, Moments
from fedloom.messages import Asking, Flow, Task, Update, Work, ask, on_client
from fedloom.methods.method import State, one_round
from fedloom.server.participation import Pool
from tests import tiny

RATE = 0.05
STEPS = (3, 7)
COHORTS = ((0, 1), (0,), (1,))
BOWLS = [(np.array([[2.0, 0.3], [0.3, 1.0]]), np.array([1.0, -2.0])), (np.array([[0.5, 0.0], [0.0, 3.0]]), np.array([-3.0, 0.5]))]
"""F_k(w) = ½ wᵀHw − bᵀw."""
START = np.array([0.4, -0.7])


def gradient(k: int, w: np.ndarray) -> np.ndarray:
    curve, pull = BOWLS[k]
    return curve @ w - pull


def as_written() -> list[tuple[np.ndarray, np.ndarray, list[np.ndarray]]]:
    """x, c and every c_i after each round: algorithm 1 with η_g = 1, line by line."""
    x, c, own, told = START, np.zeros(2), [np.zeros(2), np.zeros(2)], []
    for cohort in COHORTS:
        ends, changes = [], []
        for i in cohort:
            y = x
            for _ in range(STEPS[i]):
                y = y - RATE * (gradient(i, y) - own[i] + c)
            plus = own[i] - c + (x - y) / (STEPS[i] * RATE)
            ends.append(y - x)
            changes.append(plus - own[i])
            own = [plus if k == i else other for k, other in enumerate(own)]
        size = len(cohort)
        x, c = x + sum(ends) / size, c + size / len(BOWLS) * (sum(changes) / size)
        told.append((x, c, own))
    return told


def descended(k: int, item: Fit) -> Fitted:
    """SGD on F_k."""
    (name,), w, total = item.start, next(iter(item.start.values())).double().numpy(), np.zeros(2)
    for _ in item.batches:
        g = gradient(k, w)
        total = total + g
        w = w - RATE * (g + (item.correction[name].double().numpy() if item.correction else 0.0))
    made = {name: torch.from_numpy(total / len(item.batches)).double()} if item.means else {}
    return Fitted({name: torch.from_numpy(w)}, np.zeros(len(item.batches)), Moments({}, {}, 0), {}, made)


@dataclass(frozen=True)
class Averaging:
    """FedAvg, all devices alike."""

    name: ClassVar[str] = "averaging"
    paper: ClassVar[str] = "none"
    returns: bool = True
    cohorts: tuple[tuple[int, ...], ...] = COHORTS

    def round(self, state: State, pool: Pool) -> Flow[State]:
        mean = pool.average(state.shared)
        yield Asking([ask(self.train, k, state.shared, round=state.round) for k in self.cohorts[state.round]], mean.take)
        return state.after_round(mean.value())

    @on_client
    def train(self, c: Client, task: Task) -> Work[Update]:
        assert set(task.tensors) == {"w"} and set(task.settings) == {"round"}, "an operation knows nothing of controls"
        fitted = yield Fit(task.tensors, c.train, [np.arange(1)] * STEPS[c.id], AdamW(RATE))
        return Update(c.id, 1, fitted.tensors if self.returns else {"other": fitted.tensors["w"]})


@dataclass
class Federation:
    """Two devices, and what they were asked and answered."""

    method: Averaging
    controls: bool = True
    devices: dict[int, Client] = field(default_factory=lambda: {k: tiny.clients()[k] for k in range(2)})
    asked: list[Sequence[Task]] = field(default_factory=list)

    def round(self, state: State) -> State:
        flow: Any = one_round(self.method, state, Pool((0, 1), 2, 3, 0, controls=self.controls))  # type: ignore[arg-type]
        asking = next(flow)
        self.asked.append(asking.tasks)
        kept = [asking.take(self.answer(task)) for task in asking.tasks]
        with pytest.raises(StopIteration) as ended:
            flow.send(kept)
        return ended.value.value

    def answer(self, task: Task) -> Update:
        work = corrected(self.method.train, self.devices[task.client], task)
        asked: Any = next(work)
        (item,) = asked if isinstance(asked, list) else [asked]
        made = descended(task.client, item)
        with pytest.raises(StopIteration) as ended:
            work.send([made] if isinstance(asked, list) else made)
        return ended.value.value


def test_option_two_as_the_paper_has_it() -> None:
    """y <- y − η(g − c_i + c); c_i+ = c_i − c + (x − y)/(steps·η); x is the mean of the y, c moves by |S|/N of the mean change."""
    here, state = Federation(Averaging()), State(0, {"w": torch.from_numpy(START)})
    for t, (x, c, own) in enumerate(as_written()):
        before = {k: dict(d.memory) for k, d in here.devices.items()}
        state = here.round(state)
        np.testing.assert_allclose(state.shared["w"].numpy(), x, rtol=1e-12)
        np.testing.assert_allclose(state.controls["w"].numpy(), c, rtol=1e-12)
        for k, device in here.devices.items():
            if k in COHORTS[t]:
                np.testing.assert_allclose(device.memory["control/w"].numpy(), own[k], rtol=1e-12)
            else:
                assert set(device.memory) == {"control/w"} and torch.equal(device.memory["control/w"], before[k]["control/w"])
        np.testing.assert_allclose(c, np.mean(own, 0), rtol=1e-12)
    assert [sorted(task.tensors) for tasks in here.asked for task in tasks] == [["w"]] * 2 + [["control/w", "w"]] * 2


def test_it_ends_at_the_minimum_of_the_sum_where_plain_averaging_does_not() -> None:
    """Theorem III without noise: the drift of unequal devices is gone."""
    best = np.linalg.solve(BOWLS[0][0] + BOWLS[1][0], BOWLS[0][1] + BOWLS[1][1])
    off = {}
    for controls in (True, False):
        here, state = Federation(Averaging(cohorts=((0, 1),) * 120), controls), State(0, {"w": torch.from_numpy(START)})
        for _ in range(120):
            state = here.round(state)
        off[controls] = float(np.abs(state.shared["w"].numpy() - best).max())
    assert off[True] < 1e-6 and off[False] > 0.1


def test_what_is_trained_and_not_sent_back_is_not_corrected_in_silence() -> None:
    with pytest.raises(
        ValueError, match=r"'train' trained 'w' as it was sent and sends back \['other'\]: what is averaged is not what was"
    ):
        Federation(Averaging(returns=False)).round(State(0, {"w": torch.from_numpy(START)}))
