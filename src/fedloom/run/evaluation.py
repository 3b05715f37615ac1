"""The two protocols, the same for every method.

- **personalised**: every device predicts its own shard with its own model; all predictions are pooled into one score.
- **global**: the one assembled model on the whole split. None where a method has no such model.

Both are taken on the validation split (for choosing anything) and on the test split (for telling).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from fedloom.compute.work import Predict
from fedloom.data.tasks import Split
from fedloom.engines.engine import Engine, drive
from fedloom.messages import Flow, ask
from fedloom.methods.method import State
from fedloom.run.world import World

SPLITS: tuple[Split, ...] = ("validation", "test")
AT_ONCE = 100
"""Devices that predict in one asking: their shared tensors are packed for each of them."""


@dataclass(frozen=True)
class Evaluation:
    """Scores by split and protocol, and each device's test logits (n_k, C)."""

    scores: dict[str, dict[str, Any]]
    device_logits: dict[int, np.ndarray]


NOTHING = {"validation": {"personalised": None, "global": None, "loss": None}, "test": {"personalised": None, "global": None}}
"""The scores of a round that was not evaluated."""


def evaluate(world: World, state: State, engine: Engine) -> Evaluation:
    """Both protocols on both splits."""
    metric = world.source.task.metric
    logits = drive(_predictions(world, state), engine)
    scores: dict[str, dict[str, Any]] = {}
    for split in SPLITS:
        shards = world.partition.shards(split)
        made = np.concatenate([logits[k][split] for k in world.pool.clients])
        labels = np.concatenate([world.splits[split].labels[shards[k]] for k in world.pool.clients])
        scores[split] = {"personalised": world.source.task.scores(labels, made)[metric], "global": None}
        if split == "validation":
            scores[split]["loss"] = float(torch.nn.functional.cross_entropy(torch.from_numpy(made), torch.from_numpy(labels)))
    assembled = world.experiment.method.assembled(state)
    if assembled is not None:
        done = world.compute.run([Predict(assembled, world.splits[split]) for split in SPLITS])
        for split, one in zip(SPLITS, done, strict=True):
            scores[split]["global"] = world.source.task.scores(world.splits[split].labels, one.result.numpy())[metric]
    return Evaluation(scores, {k: logits[k]["test"] for k in logits})


def _predictions(world: World, state: State) -> Flow[dict[int, dict[str, np.ndarray]]]:
    found: dict[int, dict[str, np.ndarray]] = {}
    clients, method = world.pool.clients, world.experiment.method
    for at in range(0, len(clients), AT_ONCE):
        updates = yield [ask(method.predict, k, state.shared, splits=list(SPLITS)) for k in clients[at : at + AT_ONCE]]
        found |= {u.client: {split: u.tensors[split].float().numpy() for split in SPLITS} for u in updates}
    return found
