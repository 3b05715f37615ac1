"""Playing both kinds of conversation by hand: made-up tensors of four layers, made-up updates, made-up results of work."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch

from fedloom.client.client import Client
from fedloom.compute.work import Fit, Fitted, Moments
from fedloom.messages import Asking, Flow, Task, Update, Work, whole
from fedloom.server.participation import Pool
from tests import tiny

POOL = Pool((0, 1, 2, 3), 3, 8, 5)
SIZES = {0: 5, 1: 9, 2: 12, 3: 7}
FACTORS = [f"m.layer.{i}.{part}.lora_{f}.weight" for i in range(4) for part in ("q", "v") for f in "AB"]
HEAD = ["m.classifier.bias", "m.classifier.weight"]


def start() -> dict[str, torch.Tensor]:
    """The common start: four layers with two pairs each (d_out 4, r 2, d_in 3), B = 0, and a head of three classes."""
    shapes = {"A": (2, 3), "B": (4, 2)}
    made = {n: torch.full(shapes[n.split("lora_")[1][0]], 0.0 if "lora_B" in n else 1.0) for n in FACTORS}
    return {**made, "m.classifier.bias": torch.zeros(3), "m.classifier.weight": torch.ones(3, 4)}


def of_layers(*layers: int) -> set[str]:
    return {n for n in FACTORS if int(n.split(".")[2]) in layers}


Answer = Callable[[Task], Update | None]


def play(flow: Flow[Any], answer: Answer) -> tuple[list[list[Task]], Any]:
    """Run a server flow: every asking, and what the flow returned. ``answer`` gives None for a client that fails."""
    askings: list[list[Task]] = []
    try:
        asked = next(flow)
        while True:
            tasks, take = (asked.tasks, asked.take) if isinstance(asked, Asking) else (asked, whole)
            askings.append(tasks)
            asked = flow.send([take(update) for update in map(answer, tasks) if update is not None])
    except StopIteration as done:
        return askings, done.value


def work(flow: Work[Any], *results: Any) -> tuple[list[Any], Any]:
    """Run a client operation: every item it yielded, and what it returned."""
    items = []
    try:
        items.append(next(flow))
        for result in results:
            items.append(flow.send(result))
    except StopIteration as done:
        return items, done.value
    raise AssertionError(f"the operation asks for more work: {items[-1]}")


def echo(task: Task, plus: float = 1.0) -> Update:
    """An update that adds k + ``plus`` to whatever came."""
    return Update(task.client, SIZES[task.client], {n: t + task.client + plus for n, t in task.tensors.items()}, {"loss": 1.0})


def fitted(item: Fit, plus: float = 1.0) -> Fitted:
    zero = {n: torch.zeros_like(t) for n, t in item.start.items()}
    return Fitted({n: t + plus for n, t in item.start.items()}, np.array([4.0, 2.0]), Moments(zero, zero, 2))


def client(k: int = 1) -> Client:
    return tiny.clients()[k]


def same(first: Sequence[np.ndarray], second: Sequence[np.ndarray]) -> bool:
    return [b.tolist() for b in first] == [b.tolist() for b in second]


def weighted(cohort: Sequence[int], plus: float = 1.0) -> float:
    return sum(SIZES[k] * (k + plus) for k in cohort) / sum(SIZES[k] for k in cohort)


SCORES = {0: [0.4, 0.1, 0.3, 0.2], 1: [0.8, 0.1, 0.3, 0.2], 2: [0.4, 0.5, 0.3, 0.2], 3: [0.4, 0.1, 0.3, 1.0]}


def told(task: Task) -> Update:
    if task.op == "inspect":
        return Update(task.client, SIZES[task.client], {"layer_scores": torch.tensor(SCORES[task.client], dtype=torch.float64)})
    return echo(task) if task.op in ("warm_head", "train") else Update(task.client, SIZES[task.client])


def counted(task: Task) -> Update:
    """Client k's answer: label prior with most weight on class k mod 3."""
    prior = torch.full((3,), 0.2)
    prior[task.client % 3] = 0.6
    return Update(task.client, SIZES[task.client], {"prior": prior} if task.op == "count" else {})
