"""What an experiment would be: data, partition, model, and what set-up and rounds would cost, without training anything.

The method is played for real, over real tasks and packed messages, but for its compute: that counts what the work items would cost
and answers with the start. So bytes and operations are those of a run, up to what depends on trained values (which layers are chosen,
which examples count as easy; the digits of a loss).
"""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch

from fedloom.client.curricula.fisher import ByFisher
from fedloom.client.curricula.loss import ByLoss
from fedloom.client.store import ClientStore
from fedloom.data.partition import Partition
from fedloom.data.sources import Source
from fedloom.data.tasks import metric_told
from fedloom.engines.engine import drive
from fedloom.messages import Replies, Task
from fedloom.methods.embracingfl import EmbracingFL
from fedloom.methods.method import one_round, says, set_up
from fedloom.model.base import Model
from fedloom.model.memory import Needs, fitting, needs, resident, texts_that_fit
from fedloom.model.quantised import numbers
from fedloom.run.costs.counting import Counting
from fedloom.run.costs.ledger import Section
from fedloom.run.costs.memory import insist_on_room, needed, needed_there, sizes_before, sizes_of, told
from fedloom.run.costs.payback import plain_of
from fedloom.run.costs.pretended import Pretended, silent
from fedloom.run.experiment import EngineSettings, Experiment
from fedloom.run.loop import begin
from fedloom.run.numbers import drawn, most
from fedloom.run.pages.drawing import Kind
from fedloom.run.pages.figures import partition_picture
from fedloom.run.pages.spent import profiles_told
from fedloom.run.terminal.console import human_bytes, human_seconds
from fedloom.run.world import World, adapter_of, build, curriculum_of, read_data

WAYS = {
    "packed": "packed: all texts of a stack in one row, without padding (the fastest way)",
    "packed, whole last layer": "packed: all texts of a stack in one row, without padding; the last layer computes every token",
    "padded rows": "padded rows: the texts of a stack side by side, padded to the longest (this attention cannot be packed)",
    "vmap": "vmap over padded batches, slower than packed: this model, or what is trained of it, cannot be packed",
}
"""By the way that the model found to be called for many devices, what a person is told of it."""

Lines = list[tuple[str, str]]
"""(what, its value) in order."""


@dataclass(frozen=True)
class Description:
    """Facts to show, and the label counts (K, C) with the class names for a table of the partition."""

    lines: Lines
    counts: np.ndarray
    classes: tuple[str, ...]


def describe(experiment: Experiment) -> Description:
    """Load data and model, play the set-up and two rounds, or all of them, without computing.

    Raises:
        ExperimentError: a model whose files say that it cannot fit; nothing of it is loaded then.
        DataError, ModelError, TextError, AdapterError: as for a run.
    """
    if (before := sizes_before(experiment)) is not None:
        insist_on_room(before, experiment)
    local = replace(experiment, engine=replace(experiment.engine, kind=EngineSettings().kind, workers=0))
    world = build(local)
    world = replace(world, compute=Pretended(world.model))
    counts = world.partition.counts(world.labels("train"), len(world.classes))
    head = [
        ("method", f"{experiment.method_name}: {type(experiment.method).paper}"),
        *([("server", f"{step.rule}, a step of {step.lr:g} towards the aggregate")] if (step := experiment.server).optimizer else []),
        *([("controls", "SCAFFOLD's: every step's gradient is corrected by c − c_k")] if experiment.controls else []),
        *([("mask", f"{experiment.mask.keep:g} of the output neurons of each layer's pairs")] if experiment.mask.keep < 1 else []),
        *([("sharing", _sharing(experiment))] if experiment.share.some else []),
        ("digest", experiment.digest()),
    ]
    return Description([*head, *_data(world), *_model(world), *_costs(world)], counts, world.classes)


def _sharing(e: Experiment) -> str:
    """Which layers are shared."""
    many = f"{e.share.count}" if e.share.count else f"{e.share.fraction:g}"
    which = "at random" if e.share.which == "random" else f"the {e.share.which} sensitive"
    return f"{many} of the layers, {which}; the others stay on each device"


def dealt(experiment: Experiment) -> tuple[Source, Partition, np.ndarray]:
    """Data, partition, and training label counts (K, C); no model is needed."""
    source, made = read_data(experiment)
    labels = np.asarray(list(source.splits["train"][source.task.label]), np.int64)
    return source, made, made.counts(labels, len(source.task.classes))


def draw(counts: np.ndarray, classes: Sequence[str], path: Path) -> None:
    """Write a picture of the partition.

    Raises:
        ValueError: a file name that ends neither in .png nor in .svg.
    """
    kinds: dict[str, Kind] = {".png": "png", ".svg": "svg"}
    if path.suffix not in kinds:
        raise ValueError(f"--plot {path} names no picture; give a file that ends in {' or '.join(kinds)}")
    path.write_bytes(partition_picture(counts, classes, kinds[path.suffix]))


def _data(world: World) -> Lines:
    splits, lengths = world.splits, world.splits["train"].lengths
    rows = ", ".join(f"{len(examples):,} {split}" for split, examples in splits.items())
    tokens = f"{np.mean(lengths):.0f} on average, {np.max(lengths)} at most"
    notes = [("note", note) for note in world.notes]
    task = world.source.task
    return [
        ("data", f"{world.source.name}: {rows}"),
        ("labels", f"{', '.join(task.classes)}; metric {metric_told(task)}"),
        *([("answers", task.told)] if world.model.speaker else []),
        *([("exact match", written)] if (written := _written(world)) else []),
        ("tokens", tokens),
        *notes,
    ]


def _written(world: World) -> str:
    """What is written for exact match, which costs a pass a token; nothing where nothing is."""
    e, of = world.experiment, drawn(world)
    times = 1 + (-(-e.rounds // e.evaluate_every) if e.evaluate_every else 0)
    counts = " and ".join(f"{len(one.rows):,} of {one.held:,} {split}" for split, one in of.items())
    much = f"up to {most(world)} tokens each, {'once' if times == 1 else f'{times} times'}, by each protocol's models"
    return f"answers written to {counts} prompts: {much}; --exact-match 0 saves the time" if of else ""


def _model(world: World) -> Lines:
    model = world.model
    total = numbers(model.module)
    trained = sum(t.numel() for t in model.initial.values())
    pairs = sorted({name.split(".lora_A.")[0].rsplit(".", 1)[-1] for name in model.initial if ".lora_A." in name})
    e, sizes, gpus = world.experiment, sizes_of(model, world.experiment.method), torch.cuda.device_count()
    trains = adapter_of(e).kind
    kind = {"lora": "LoRA", "ia3": "(IA)³"}.get(trains, trains)
    head = sum(model.initial[name].numel() for name in model.head)
    return [
        ("model", f"{model.name} ({model.config.model_type}, {model.depth} layers, {'causal' if model.causal else 'bidirectional'})"),
        ("parameters", f"{total:,}, of which {trained:,} are trained ({trained / total:.2%}): {trained - head:,} {kind}, {head:,} head"),
        *([("base", _base(model))] if model.quantised else []),
        *told(needed(sizes, e, bool(gpus)), sizes, needed_there(sizes, e, gpus) if gpus else None),
        *([("LoRA targets", ", ".join(pairs))] if pairs else []),
        *([("template", model.speaker.written("{text}"))] if model.speaker and model.speaker.form != "text" else []),
        *([("cloze", f"{model.filler.cloze.template!r}: {', '.join(model.filler.cloze.words)}")] if model.filler else []),
        ("devices together", f"one by one: {model.alone}" if model.alone else WAYS[model.together_by]),
    ]


def _base(model: Model) -> str:
    """What of the model is held in few bits."""
    size = sum(tensor.nbytes for q in model.quantised.values() for tensor in q.held)
    return (
        f"{len(model.quantised)} frozen linear layers of {model.few:,} numbers in {model.base_in}: {human_bytes(size)}, "
        f"{size / model.few:.3g} bytes a number; the rest in {model.precision}"
    )


@dataclass(frozen=True)
class Played:
    """What a set-up and rounds cost that were played and not computed. ``whole``: the rounds are all of the run's, one after another;
    otherwise the first and the last, each as if it came right after the set-up. ``steps``: how often the set-up asked what."""

    setup: Section
    rounds: list[Section]
    whole: bool
    steps: Counter[str]


def played(world: World) -> Played:
    """Play an experiment whose ``world`` has a compute that counts (``pretended.py``). What a method asks of its devices follows from what
    is chosen in its set-up, and the first and the last round tell it; one that ``rounds_differ`` is played through."""
    e, method, fleet = world.experiment, world.experiment.method, world.fleet
    scoring = isinstance(curriculum_of(method), ByFisher | ByLoss)
    through = says(method, "rounds_differ") or e.controls or e.mask.keep < 1 or scoring  # who takes part for the first time does more
    engine = Counting(world) if through else world.engine(ClientStore(None))
    setup, rounds, steps = Section(fleet), list[Section](), Counter[str]()

    def hear(tasks: Sequence[Task], replies: Replies) -> None:
        setup.hear(tasks, replies)
        steps.update([f"{tasks[0].op.replace('_', ' ')} on {len(tasks)} devices"] if tasks else [])

    with silent(logging.getLogger("fedloom.methods")):
        state = drive(set_up(method, world.model, world.pool), engine, quorum=0, seen=hear)
    begin(setup, world, world.pool.clients)
    for t in range(e.rounds) if through else (0, e.rounds - 1):
        rounds.append(Section(fleet))
        after = drive(one_round(method, replace(state, round=t), world.pool), engine, seen=rounds[-1].hear)
        state = after if through else state
    return Played(setup, rounds, through, steps)


def _costs(world: World) -> Lines:
    found, fleet = played(world), world.fleet
    way = "decomposed nearly" if world.model.split_fast else "decomposed"
    own = f"{len(world.model.beneath.names)} weights {way} on every device, each for itself" if world.model.split else ""
    asked = [f"{step}, {count} times" if count > 1 else step for step, count in found.steps.items()]
    steps = "; ".join([*filter(None, [own]), *asked]) or "none"
    rounds = found.rounds
    later = rounds[len(rounds) // 2 :]
    return [
        ("set-up", steps),
        ("set-up costs", _cost([found.setup])),
        ("first round", _cost(rounds[:1])),
        *([("later rounds", f"{_cost(later, len(later))}: each of the last {len(later)}, on average")] if found.whole else []),
        ("last round", _cost(rounds[-1:])),
        *([("all rounds", _cost(rounds))] if found.whole else []),
        ("devices", profiles_told(fleet.as_json(world.pool.clients))),
        ("device times", "simulated: compute and transfer; the slowest of a cohort counts"),
        *_memory(world),
    ]


def _memory(world: World) -> Lines:
    """What training takes on a device, and how much of it fits (``model/memory.py``); nothing of a method whose batches are not known."""
    plain = plain_of(world.experiment.method)
    if plain is None:
        return []
    chooses = isinstance(world.experiment.method, EmbracingFL)  # by what it takes to keep everything, however it is computed
    again = world.model.recomputes and not chooses
    each, sizes = needs(world.model, plain.batch_size, again), sizes_of(world.model, world.experiment.method)
    most, texts = len(each) - 1, f"{plain.batch_size} texts of {world.model.max_length} tokens"
    if sizes.at_once < sizes.trained:  # one block after another, wherever it lies
        each = [Needs(most, *resident(sizes.model, sizes.at_once, world.model.dtype.itemsize, sizes.few, sizes.base), each[-1].activations)]
    whole, totals = each[-1], [one.total for one in each]
    of = {"weights": whole.weights, "gradients": whole.gradients, "the optimiser": whole.optimizer, "activations": whole.activations}
    made = ", ".join(f"{human_bytes(count)} {what}" for what, count in of.items())
    least = f"; the head alone {human_bytes(totals[0])}" if len(each) > 1 else ""
    fits = []
    for profile, _ in world.fleet.kinds(len(world.pool.clients)):
        layers = fitting(totals, profile.memory_bytes)
        part = (
            "nothing" if layers is None else f"the head and {layers} of {most} parts before it" if layers < len(each) - 1 else "all of it"
        )
        fits.append(f"{profile.name}: {part}")
    one = needs(world.model, 1)[-1]
    kinds = [profile for profile, _ in world.fleet.kinds(len(world.pool.clients))]
    steps = [f"{profile.name}: {min(plain.batch_size, texts_that_fit(one, profile.memory_bytes))}" for profile in kinds]
    noted = "; layers are computed again in backward passes" if again else ""
    return [
        ("training takes", f"{human_bytes(whole.total)} by estimate: {made}, for {texts}{least}{noted}"),
        ("of which fits", "; ".join(fits)),
        *([("texts a step", "; ".join(steps))] if plain.batch_by_memory else []),
    ]


def _cost(sections: Sequence[Section], over: int = 1) -> str:
    """What these cost together, divided by ``over``."""
    down, up, examples = (sum(getattr(s, what) for s in sections) // over for what in ("bytes_down", "bytes_up", "examples"))
    flops, seconds = (sum(getattr(s, what) for s in sections) / over for what in ("flops", "device_seconds"))
    return (
        f"{human_bytes(down)} down, {human_bytes(up)} up, {examples:,} examples trained on, {flops:.3g} FLOPs, "
        f"{human_seconds(seconds)} of device time"
    )
