"""The two protocols, the same for every method.

- **personalised**: every device predicts its own shard with its own model; all predictions are pooled into one score.
- **global**: the one assembled model on the whole split. None where a method has no such model.

What a task tells beside its headline (of F1 accuracy, of questions exact match) is told by both, on both splits (``FURTHER``).

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
from fedloom.data.instructions import PERPLEXITY, perplexity
from fedloom.data.numbers import EXACT as NUMBERS
from fedloom.data.questions import EXACT
from fedloom.data.tagging import COUNTED, RIGHT, WORD_ACCURACY, Tagging
from fedloom.data.tasks import FURTHER, HELD_OUT, Classification, Outcomes, Split, Task, headline
from fedloom.engines.engine import Engine, drive
from fedloom.messages import Asking, Flow, Tensors, Update, ask, whole
from fedloom.methods.method import AS_SENT, State
from fedloom.run.comparison.statistics import tallies
from fedloom.run.costs.ledger import Personalising
from fedloom.run.numbers import NOT_WRITTEN, Solved, solved, tells
from fedloom.run.world import World

log = logging.getLogger("fedloom")

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
    more = {**({NUMBERS: NOT_WRITTEN} if tells(world) else {}), **({FURTHER: None} if world.source.task.further else {})}
    return {split: {**NOTHING[split], **more} for split in HELD_OUT}


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
    logits, as_sent = drive(world.experiment.share.over(_predictions(world, state), state.facts), engine, seen=own.hear)
    scores: dict[Split, dict[str, Any]] = {}
    correct, held, owner, order = (np.zeros(0, np.int64) for _ in range(4))
    confusion: dict[str, list[list[list[int]]] | None] = {"personalised": None, "global": None}
    for split in HELD_OUT:
        shards = world.partition.shards(split)
        made = world.judge.judged(split, np.concatenate(shards), logits[split])
        labels = world.labels(split)[np.concatenate(shards)]
        others = task.scores(labels, made)
        scores[split] = {"personalised": others.pop(metric), "global": None, **further(task, others)}
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
        again = (
            as_sent
            and not world.experiment.share.some
            and assembled is state.shared
            and world.experiment.encoding.exact_down
            and _each_row_once(world)
        )
        for split, found in (_rearranged(world, logits) if again else _of_one_model(world, assembled)).items():
            labels = world.labels(split)
            made = world.judge.judged(split, np.arange(len(labels)), found)
            whole_split = task.scores(labels, made)
            scores[split] |= {"global": whole_split[metric], **further(task, others_of(scores[split]), whole_split)}
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
    asking = world.experiment.share.over(_counts(world, state, world.pool.clients if among is None else among), state.facts)
    updates = [update for update in drive(asking, engine, quorum=0, seen=own.hear) if counts_well(update, classes)]
    for split in HELD_OUT:
        told = {update.client: update.tensors[split].tolist() for update in updates}
        right, true, predicted = tallies(list(told.values()), classes).sum(0)
        scores[split] = {"personalised": float(headline(task.metric, right, true, predicted)) if true.sum() else None, "global": None}
        others = _told_besides(updates, told, split, isinstance(task, Tagging))
        if isinstance(task, Classification) and true.sum():
            others["accuracy"] = float(headline("accuracy", right, true, predicted))
        scores[split] |= further(task, others)
        if split == "validation":
            scores[split]["loss"] = others.pop("loss", None)
            scores[split] |= {name: others[name] for name in (PERPLEXITY, EXACT, WORD_ACCURACY) if name in others and name in task.further}
        else:
            confusion["personalised"] = [told.get(k, []) for k in world.pool.clients]
    held = np.array([sum(count for *_, count in of) for of in confusion["personalised"] or []], np.int64) // task.unit
    correct = np.array([sum(n for true, said, n in of if true == said) for of in confusion["personalised"] or []], np.int64) / task.unit
    assembled = world.experiment.method.assembled(state)
    if assembled is not None:
        done = world.compute.run([Predict(assembled, world.splits[split]) for split in HELD_OUT])
        for split, one in zip(HELD_OUT, done, strict=True):
            labels = world.labels(split)
            whole_split = task.scores(labels, world.judge.judged(split, np.arange(len(labels)), one.result.numpy()))
            scores[split] |= {"global": whole_split[task.metric], **further(task, others_of(scores[split]), whole_split)}
    return Evaluation(scores, correct, held, confusion, own.told)


def further(task: Task, personal: Mapping[str, float], general: Mapping[str, float] | None = None) -> dict[str, Any]:
    """What the task tells beside its headline, by name and protocol, under its key; nothing of a task that tells nothing more."""
    protocols = {"personalised": personal, "global": general or {}}
    return {FURTHER: {name: {p: of.get(name) for p, of in protocols.items()} for name in task.further}} if task.further else {}


def others_of(scores: Mapping[str, Any]) -> dict[str, float]:
    """The personalised scores beside the headline that were put there by :func:`further`."""
    return {name: of["personalised"] for name, of in (scores.get(FURTHER) or {}).items()}


def _told_besides(updates: Sequence[Update], told: Mapping[int, list[list[int]]], split: Split, tags: bool = False) -> dict[str, float]:
    """Of a split the mean loss, e to it, and the share of exact matches among all questions, of those devices that tell theirs; nothing of
    what none does. With ``tags`` the mean is that over words, which are not the entities that are counted, and the share of them that is
    right is told too."""
    made: dict[str, float] = {}
    words = {u.client: _words(u, split) for u in updates if tags}
    if every := sum(count for count, _ in words.values()):
        made[WORD_ACCURACY] = sum(right for _, right in words.values()) / every
    weights = {u.client: words[u.client][0] if tags else sum(count for *_, count in told[u.client]) for u in updates}
    for name, most in (("loss", np.inf), (EXACT, 1.0)):
        mine = [(u.metrics.get(f"{split}_{name}"), weights[u.client]) for u in updates]
        known = [(value, count) for value, count in mine if type(value) is float and 0 <= value <= most and count]
        if weight := sum(count for _, count in known):
            made[name] = sum(value * count for value, count in known) / weight
    return {**made, PERPLEXITY: perplexity(made["loss"])} if "loss" in made else made


def _words(update: Update, split: Split) -> tuple[int, int]:
    """How many words a device has in a split, and how many of them are tagged rightly; none where it does not tell two such numbers."""
    words, right = (update.metrics.get(f"{split}_{name}") for name in (COUNTED, RIGHT))
    return (words, right) if type(words) is int and type(right) is int and 0 <= right <= words < MANY else (0, 0)


def counts_well(update: Update, classes: int) -> bool:
    """Whether a device's counts are such: of each split int64 (m, 3) of classes that there are and numbers that can be added up, and the
    mean loss on the validation split where it holds any of it. Others are left out, with a warning."""
    for split in HELD_OUT:
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
    asked = [ask(method.predict, k, state.shared, splits=list(HELD_OUT)) for k in among]
    return (yield Asking([replace(task, complete=of_any_length) for task in asked], whole, 0))


def of_any_length(came: Tensors) -> Tensors:
    """Predictions as whoever judges answers is to see them: how many rows there are is each device's own affair."""
    return {name: tensor[:0] for name, tensor in came.items()}


def cells(owner: np.ndarray, found: Outcomes, devices: int) -> list[list[list[int]]]:
    """For each device the cells of its confusion matrix that are not 0. ``owner`` (n,) is the device of each example."""
    told: list[list[list[int]]] = [[] for _ in range(devices)]
    rows, which = np.unique(np.stack([owner[found.example], found.true, found.predicted], 1), axis=0, return_inverse=True)
    counts = np.bincount(which.reshape(-1), found.count, len(rows)).astype(np.int64)
    for (device, true, predicted), count in zip(rows.tolist(), counts.tolist(), strict=True):
        if count:
            told[device].append([true, predicted, count])
    return told


def _of_one_model(world: World, tensors: Tensors) -> dict[Split, np.ndarray]:
    """The logits of a model of all rows, float32 (n, C) a split."""
    done = world.compute.run([Predict(tensors, world.splits[split]) for split in HELD_OUT])
    return {split: one.result.numpy() for split, one in zip(HELD_OUT, done, strict=True)}


def _rearranged(world: World, logits: Mapping[Split, np.ndarray]) -> dict[Split, np.ndarray]:
    """The same where all devices have predicted with that very model: theirs, in the examples' own order."""
    rows = {split: np.concatenate(world.partition.shards(split)) for split in HELD_OUT}
    return {split: logits[split][np.argsort(world.judge.examples(split, rows[split]))] for split in HELD_OUT}


def _each_row_once(world: World) -> bool:
    """Whether every row that is evaluated is on exactly one device."""
    held = ((np.concatenate(world.partition.shards(split)), len(world.source.splits[split])) for split in HELD_OUT)
    return all(np.array_equal(np.sort(rows), np.arange(count)) for rows, count in held)


def _predictions(world: World, state: State) -> Flow[tuple[dict[Split, np.ndarray], bool]]:
    """Each device's logits of its own rows, float32 (n, C) a split: device 0's rows first, then those of device 1, and so on; and whether
    all of them predicted with what they were sent and nothing else."""
    clients, method = world.pool.clients, world.experiment.method
    made: dict[Split, list[np.ndarray]] = {split: [] for split in HELD_OUT}
    as_sent = True
    for at in range(0, len(clients), AT_ONCE):
        updates = yield [ask(method.predict, k, state.shared, splits=list(HELD_OUT)) for k in clients[at : at + AT_ONCE]]
        for split in HELD_OUT:
            made[split].append(np.concatenate([update.tensors[split].float().numpy() for update in updates]))
        as_sent = as_sent and all(update.metrics.get(AS_SENT) is True for update in updates)
    return {split: np.concatenate(parts) for split, parts in made.items()}, as_sent
