"""The two protocols, the same for every method.

- **personalised**: every device predicts its own shard with its own model; all predictions are pooled into one score.
- **global**: the one assembled model on the whole split. None where a method has no such model.

Both are taken on the validation split (for choosing anything) and on the test split (for telling). Where answers end in numbers, those that
the models write are told beside them (``numbers.py``); nothing is chosen by them.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch

from fedloom.client.elsewhere import Store
from fedloom.compute.work import Predict
from fedloom.data.instructions import METRIC as TOKENS_RIGHT
from fedloom.data.instructions import PERPLEXITY, perplexity
from fedloom.data.numbers import EXACT as NUMBERS
from fedloom.data.questions import EXACT
from fedloom.data.tasks import Outcomes, Split, headline
from fedloom.engines.engine import Engine, drive
from fedloom.messages import Asking, Flow, Update, ask, whole
from fedloom.methods.method import State
from fedloom.run.ledger import Personalising
from fedloom.run.numbers import NOT_WRITTEN, Solved, solved, tells
from fedloom.run.statistics import tallies
from fedloom.run.world import World

log = logging.getLogger("fedloom")

SPLITS: tuple[Split, ...] = ("validation", "test")
MANY = 2**32
"""More examples than any device holds: counts stay below it, so that their sums can be."""
AT_ONCE = 512
"""Devices in one asking: several of the engine's waves, and few beside the many that there may be."""


@dataclass(frozen=True)
class Evaluation:
    """Scores by split and protocol; of how many test examples each device was right, float64 (K,), whole numbers unless
    an answer can be right in part; and by protocol, for each device, the
    cells ``[true class, predicted class, examples]`` of its test examples' confusion matrix that are not 0 (None: no such model).
    ``held``, int64 (K,): of how many. Where answers are written, tokens are counted instead of examples, all of class 0 and told as 0 where
    they were right, as 1 where not; of questions their F1, in so many parts (``task.unit``). ``personalising``: what devices did of their
    own before they predicted (``Personalising.told``). ``solved``: the numbers that the models write, which ``scores`` tell too (None: none
    were asked for)."""

    scores: dict[Split, dict[str, Any]]
    correct: np.ndarray
    held: np.ndarray
    confusion: dict[str, list[list[list[int]]] | None]
    personalising: dict[str, float]
    solved: Solved | None = None


NOTHING: dict[Split, dict[str, Any]] = {
    "validation": {"personalised": None, "global": None, "loss": None},
    "test": {"personalised": None, "global": None},
}
"""The scores of a round that was not evaluated."""


def nothing(world: World) -> dict[Split, dict[str, Any]]:
    """The scores of a round that was not evaluated, with whatever else this run tells of one that was."""
    more = {NUMBERS: NOT_WRITTEN} if tells(world) else {}
    return {split: {**NOTHING[split], **more} for split in SPLITS}


def evaluate(world: World, state: State, engine: Engine, among: Sequence[int] | None = None, store: Store | None = None) -> Evaluation:
    """Both protocols on both splits. Devices that are elsewhere count their predictions themselves; only those ``among`` them are asked.
    ``store``: where the devices' states are; without it no numbers are written."""
    found = _evaluated_here(world, state, engine) if world.far is None else _evaluated_there(world, state, engine, among)
    written = None if store is None else solved(world, state, store)
    if written is None:
        return found
    return replace(found, scores={s: {**of, NUMBERS: written.scores(s)} for s, of in found.scores.items()}, solved=written)


def _evaluated_here(world: World, state: State, engine: Engine) -> Evaluation:
    """From the logits of every device."""
    task, metric = world.source.task, world.source.task.metric
    own = Personalising(world.fleet)
    logits = drive(_predictions(world, state), engine, seen=own.hear)
    scores: dict[Split, dict[str, Any]] = {}
    correct, held, owner, order = (np.zeros(0, np.int64) for _ in range(4))
    confusion: dict[str, list[list[list[int]]] | None] = {"personalised": None, "global": None}
    for split in SPLITS:
        shards = world.partition.shards(split)
        made = world.judge.judged(split, np.concatenate(shards), logits[split])
        labels = world.labels(split)[np.concatenate(shards)]
        others = task.scores(labels, made)
        scores[split] = {"personalised": others.pop(metric), "global": None}
        if split == "validation":
            scores[split] |= {"loss": task.loss(labels, made), **others}
        else:
            owner, order = np.repeat(np.arange(len(shards)), [len(rows) for rows in shards]), np.concatenate(shards)
            found = task.outcomes(labels, made)
            of, right = owner[found.example], found.true == found.predicted
            counts = (np.bincount(of[these], found.count[these], len(shards)).astype(np.int64) for these in (right, right | ~right))
            correct, held = next(counts) / task.unit, next(counts) // task.unit
            confusion["personalised"] = cells(owner, found, len(shards))
    assembled = world.experiment.method.assembled(state)
    if assembled is not None:
        done = world.compute.run([Predict(assembled, world.splits[split]) for split in SPLITS])
        for split, one in zip(SPLITS, done, strict=True):
            labels = world.labels(split)
            made = world.judge.judged(split, np.arange(len(labels)), one.result.numpy())
            scores[split]["global"] = task.scores(labels, made)[metric]
            if split == "test":
                confusion["global"] = cells(owner, task.outcomes(labels[order], made[order]), len(world.pool.clients))
    return Evaluation(scores, correct, held, confusion, own.told)


def _evaluated_there(world: World, state: State, engine: Engine, among: Sequence[int] | None = None) -> Evaluation:
    """The same where devices tell counts and mean losses, and the server has held-out data of its own. Those who do not answer do not
    count."""
    task, devices = world.source.task, len(world.pool.clients)
    confusion: dict[str, list[list[list[int]]] | None] = {"personalised": [[] for _ in range(devices)], "global": None}
    scores: dict[Split, dict[str, Any]] = {}
    classes, own = max(2, len(world.classes)), Personalising(world.fleet)
    updates = [
        update
        for update in drive(_counts(world, state, world.pool.clients if among is None else among), engine, quorum=0, seen=own.hear)
        if counts_well(update, classes)
    ]
    for split in SPLITS:
        told = {update.client: update.tensors[split].tolist() for update in updates}
        right, true, predicted = tallies(list(told.values()), classes).sum(0)
        scores[split] = {"personalised": float(headline(task.metric, right, true, predicted)) if true.sum() else None, "global": None}
        if split == "validation":
            losses = [(float(u.metrics["validation_loss"]), sum(c for *_, c in told[u.client])) for u in updates if told[u.client]]  # type: ignore[arg-type]
            weight = sum(count for _, count in losses)
            mean = scores[split]["loss"] = sum(loss * count for loss, count in losses) / weight if weight else None
            if task.metric == TOKENS_RIGHT and mean is not None:
                scores[split][PERPLEXITY] = perplexity(mean)
            scores[split] |= _besides(updates, told)
        else:
            confusion["personalised"] = [told.get(k, []) for k in world.pool.clients]
    held = np.array([sum(count for *_, count in of) for of in confusion["personalised"] or []], np.int64) // task.unit
    correct = np.array([sum(n for true, said, n in of if true == said) for of in confusion["personalised"] or []], np.int64) / task.unit
    assembled = world.experiment.method.assembled(state)
    if assembled is not None:
        done = world.compute.run([Predict(assembled, world.splits[split]) for split in SPLITS])
        for split, one in zip(SPLITS, done, strict=True):
            labels = world.labels(split)
            scores[split]["global"] = task.scores(labels, world.judge.judged(split, np.arange(len(labels)), one.result.numpy()))[
                task.metric
            ]
    return Evaluation(scores, correct, held, confusion, own.told)


def _besides(updates: Sequence[Update], told: Mapping[int, list[list[int]]]) -> dict[str, float]:
    """The share of exact matches among all questions of those devices that tell theirs; nothing where none does."""
    mine = [(u.metrics.get(f"validation_{EXACT}"), sum(count for *_, count in told[u.client])) for u in updates]
    known = [(share, count) for share, count in mine if type(share) is float and 0 <= share <= 1 and count]
    weight = sum(count for _, count in known)
    return {EXACT: sum(share * count for share, count in known) / weight} if weight else {}


def counts_well(update: Update, classes: int) -> bool:
    """Whether a device's counts are such: of each split int64 (m, 3) of classes that there are and numbers that can be added up, and the
    mean loss on the validation split where it holds any of it. Others are left out, with a warning."""
    for split in SPLITS:
        told = update.tensors.get(split, torch.zeros(0))
        fits = told.dtype == torch.int64 and told.ndim == 2 and told.shape[1] == 3 and len(told) <= classes**2
        fits = fits and bool((told >= 0).all() and (told[:, :2] < classes).all() and (told[:, 2] < MANY).all())
        if not fits:
            log.warning("client %d is left out of the evaluation: its '%s' are no counts of predictions", update.client, split)
            return False
    loss = update.metrics.get("validation_loss", 0.0 if not len(update.tensors["validation"]) else None)
    if type(loss) is not float:
        log.warning("client %d is left out of the evaluation: it tells no validation loss", update.client)
    return type(loss) is float


def _counts(world: World, state: State, among: Sequence[int]) -> Flow[list[Update]]:
    """What each device that answers tells of its predictions."""
    method = world.experiment.method
    return (yield Asking([ask(method.predict, k, state.shared, splits=list(SPLITS)) for k in among], whole, 0))


def cells(owner: np.ndarray, found: Outcomes, devices: int) -> list[list[list[int]]]:
    """For each device the cells of its confusion matrix that are not 0. ``owner`` (n,) is the device of each example."""
    told: list[list[list[int]]] = [[] for _ in range(devices)]
    rows, which = np.unique(np.stack([owner[found.example], found.true, found.predicted], 1), axis=0, return_inverse=True)
    counts = np.bincount(which.reshape(-1), found.count, len(rows)).astype(np.int64)
    for (device, true, predicted), count in zip(rows.tolist(), counts.tolist(), strict=True):
        if count:
            told[device].append([true, predicted, count])
    return told


def _predictions(world: World, state: State) -> Flow[dict[Split, np.ndarray]]:
    """Each device's logits of its own rows, float32 (n, C) a split: device 0's rows first, then those of device 1, and so on."""
    clients, method = world.pool.clients, world.experiment.method
    made: dict[Split, list[np.ndarray]] = {split: [] for split in SPLITS}
    for at in range(0, len(clients), AT_ONCE):
        updates = yield [ask(method.predict, k, state.shared, splits=list(SPLITS)) for k in clients[at : at + AT_ONCE]]
        for split in SPLITS:
            made[split].append(np.concatenate([update.tensors[split].float().numpy() for update in updates]))
    return {split: np.concatenate(parts) for split, parts in made.items()}
