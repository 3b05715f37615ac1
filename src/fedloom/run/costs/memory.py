"""How much memory a run needs, told before it begins: of this machine, and of a real device.

**A device** that trains |θ| of M numbers at a time, by the books of mixed precision (BAdam 2404.02827; FedCyBGD 2406.11187):

    2·M + 16·|θ|    bytes, the model in 16 bits; of what is trained a float32 copy, its gradient and AdamW's two moments
    4·M + 12·|θ|    bytes, everything in float32

with less for what of M is frozen in few bits (``--adapter.base``: 65/64 or 9/16 bytes a number in place of 2 or 4), and what passing a
batch through it keeps alive. θ is a block of ``fedcybgd``, else whatever is trained.

**This machine** plays all parts, so it holds more; the lines of :class:`Need` say what. They are an estimate from above of what this code
keeps at its fullest moment, library and interpreter left out. It does not know how many bytes an allocator never gives back, and of texts
that are passed through the model it counts eight: a pass takes more where they fit into what is free (``stacked.py``). Of a run
in 16 bits the model is held once, in these, and so is what a device does not train; the start and the server's state are float32. These two
lie in files that are mapped (``parts.py``): of them counts what a round has changed until it is written, and an adapter's start. Where
there is a GPU, the model and what computes with it lie there.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, get_args

import torch
from safetensors import safe_open

from fedloom.client.curricula.fisher import ByFisher
from fedloom.compute.division import TOKENS, pass_bytes
from fedloom.engines.local import HEAVY, WAVE
from fedloom.methods.fedcybgd import FedCyBGD
from fedloom.methods.fibecfed import FibecFed
from fedloom.methods.method import parts
from fedloom.model.base import Model, Precision
from fedloom.model.blocks import Block, cover, layer_of
from fedloom.model.loading import folder_here
from fedloom.model.machine import free_bytes
from fedloom.model.memory import held, resident
from fedloom.model.names import is_head
from fedloom.model.quantised import Base, numbers, size_of
from fedloom.run.errors import ExperimentError
from fedloom.run.experiment import Experiment
from fedloom.run.terminal.console import human_bytes
from fedloom.run.world import curriculum_of

STATES = 8
"""Float32 numbers that training keeps for each number trained: where it began, where it is, its gradient, two moments, and what a step
makes of them."""

TEXTS = 8
"""Texts of the greatest length that count of a pass; and no more tokens than a pass on a processor holds."""

PASSING = "passing a batch through"
"""The name of what these need."""


@dataclass(frozen=True)
class Asker:
    """Who needs memory, and by which of its options it would need less, "" where it has none: ``alone``, one device at a time;
    ``recompute``, layers computed again. ``anyway``: what to do if one does not believe it."""

    who: str
    alone: str
    recompute: str
    anyway: str


RUN = Asker("this run", "--engine.stack 1 and no --engine.workers", "--engine.recompute", "--engine.overcommit runs it all the same")
SERVER = Asker("this server", "", "", "--overcommit begins all the same")
DEVICE = Asker("this device", "", "--recompute", "--memory GIB, where more may be had than this, has it try all the same")


@dataclass(frozen=True)
class Sizes:
    """Numbers of the model, of what is trained in all, of what one device trains at a time; bytes that one token of a batch keeps alive;
    numbers of the frozen base that are held as ``base`` says."""

    model: int
    trained: int
    at_once: int
    per_token: int = 0
    few: int = 0
    base: Base = "exact"

    def held(self, number: int) -> int:
        """Bytes of the model where a number that is not in few bits takes so many."""
        return held(self.model, number, self.few, self.base)


@dataclass(frozen=True)
class Portion:
    """A run's part of the machine where others run at the same time.

    Attributes:
        jobs: runs at a time.
        room: bytes of memory for each, of what was free before any of them began.
        on_gpu: runs that share its GPU.
    """

    jobs: int
    room: int
    on_gpu: int = 1


@dataclass(frozen=True)
class Need:
    """Bytes by what they are for."""

    lines: tuple[tuple[str, int], ...]

    @property
    def total(self) -> int:
        """All of them."""
        return sum(count for _, count in self.lines)


def needed(sizes: Sizes, experiment: Experiment, gpu: bool = False, serves: bool = True) -> Need:
    """What this machine holds at its fullest moment, by the experiment's precision, cohort, stack and workers. ``gpu``: it has one, and
    what lies there (:func:`needed_there`) does not lie here. ``serves``: the server's state is here too."""
    e, low = experiment, experiment.precision != "float32"
    processes, wave = max(1, e.engine.workers), min(e.engine.stack or WAVE, max(1, HEAVY // max(1, 4 * sizes.trained)))
    asked = e.asked
    training, evaluating = (min(wave, -(-devices // processes)) for devices in (asked, e.clients))
    down = 1 if serves and e.engine.kind == "local" and processes == 1 and e.encoding.exact_down else 2  # then its tensors are its bytes
    messages = max(training * (down * sizes.trained + 2 * sizes.at_once), evaluating * down * sizes.trained)
    whole = 2 * sizes.trained > sizes.model  # then the start is the model's own weights; in 16 bits it lies in files, but workers have none
    starts = 0 if whole and (not low or e.engine.workers < 2) else processes
    around = [
        (
            "the start, and what a round changes of the server's state",
            4 * (starts * sizes.trained + (min(sizes.trained, asked * sizes.at_once) if serves else 0)),
        ),
        ("messages of the devices that are asked together", 4 * processes * messages),
    ]
    if gpu:
        lines = [*around, ("what a device does not train", processes * _rest(sizes, low))]
    else:
        model, *work = _computing(sizes, e, processes, _models(e, processes), _rest(sizes, low))
        lines = [model, *around, *work]
    return _with_loading(4 * sizes.model * (processes if low or gpu or sizes.few else 0), lines)


def needed_there(sizes: Sizes, experiment: Experiment, gpus: int) -> Need:
    """What each of so many GPUs holds at its fullest moment: the model, and what computes with it. The rest of a block's model takes the
    places of the model's own in 16 bits (:meth:`Model.lent`), and lies beside it in 32."""
    low = experiment.precision != "float32"
    processes = -(-max(1, experiment.engine.workers) // gpus)
    lines = _computing(sizes, experiment, processes, _models(experiment, processes), 0 if low else _rest(sizes, low))
    return _with_loading(sizes.held(4) * processes, list(lines))


def _models(e: Experiment, processes: int) -> int:
    """How many models lie together where so many processes compute: where workers do, the one that started them has its own."""
    return processes + (e.engine.workers > 1)


def _rest(sizes: Sizes, low: bool) -> int:
    """Bytes of what a device has of a model and does not train."""
    return (2 if low else 4) * (sizes.trained - sizes.at_once)


def _computing(sizes: Sizes, e: Experiment, processes: int, models: int, rest: int) -> Iterator[tuple[str, int]]:
    """What lies where the model computes. ``rest``: bytes of what is there of a device's model beside."""
    low = e.precision != "float32"
    frozen = f", its frozen layers in {sizes.base}" if sizes.few else ""
    yield f"the model in {e.precision}{frozen}", sizes.held(2 if low else 4) * models
    yield "the model in float32, to score in", 4 * (sizes.model - sizes.few) * processes if low and scores(e) else 0
    yield "training a device", processes * (4 * STATES * sizes.at_once + rest)
    through = f"{PASSING}, layers computed again" if e.engine.recompute else PASSING
    yield through, processes * sizes.per_token * min(TOKENS["cpu"], TEXTS * e.max_length)


def _with_loading(loading: int, lines: list[tuple[str, int]]) -> Need:
    """With what it takes besides to load the model in float32, in all processes, if that is the fullest moment."""
    lines.append(("loading the model, in float32", max(0, loading - sum(count for _, count in lines))))
    return Need(tuple((what, count) for what, count in lines if count))


def scores(e: Experiment) -> bool:
    """Whether gradients or outputs are taken to choose by, which is done in float32 whatever a run computes in: by the method, for a mask,
    or for which layers are shared."""
    by_method = isinstance(e.method, FibecFed) or isinstance(curriculum_of(e.method), ByFisher)
    return by_method or e.mask.keep < 1 or (e.share.some and e.share.which != "random")


def on_a_device(sizes: Sizes, low: bool) -> int:
    """Bytes that a real device needs for model and training, by the formulas above; without what a batch keeps alive."""
    return sum(resident(sizes.model, sizes.at_once, 2 if low else 4, sizes.few, sizes.base))


def sizes_of(model: Model, method: Any) -> Sizes:
    """Those of a model that is loaded."""
    trained = {n: t.numel() for n, t in model.initial.items()}
    return Sizes(
        numbers(model.module),
        sum(trained.values()),
        at_once(trained, model.initial, method),
        pass_bytes(model),
        model.few,
        model.base_in,
    )


def at_once(counts: Mapping[str, int], tensors: Mapping[str, torch.Tensor], method: Any) -> int:
    """How many numbers one device trains at a time: the largest block and the head of a method that has blocks, else everything."""
    blocks = blocks_of(method, tensors)
    heads = sum(count for name, count in counts.items() if is_head(name))
    return max(sum(counts[n] for n in block.names) for block in blocks) + heads if blocks else sum(counts.values())


def blocks_of(method: Any, tensors: Mapping[str, torch.Tensor]) -> list[Block]:
    """The blocks of a method that trains one at a time; of any other none."""
    own = of_blocks(method)
    return [] if own is None else cover(tensors, own.parts, own.ends, [n for n in tensors if is_head(n)])


def of_blocks(method: Any) -> FedCyBGD | None:
    """The method, or what it holds, that says what a block is; None if nothing does."""
    return next((part for part in parts(method) if isinstance(part, FedCyBGD)), None)


def sizes_before(experiment: Experiment) -> Sizes | None:
    """Those of a model whose files lie here, in a folder or where a Hub name was downloaded to, from the names and shapes in them; nothing
    is loaded. None of any other.

    Of an adapter only what lies under it counts: this is less than will be needed, never more.
    """
    folder = folder_here(experiment.model)
    tensors: dict[str, torch.Tensor] = {}
    for file in [] if folder is None else weights_in(folder):
        with safe_open(str(file), framework="pt") as stored:
            tensors |= {name: torch.empty(stored.get_slice(name).get_shape(), device="meta") for name in stored.keys()}  # noqa: SIM118
    if not tensors:
        return None
    counts = {name: tensor.numel() for name, tensor in tensors.items()}
    if experiment.trained.kind != "full":
        base = experiment.adapter.base
        matrices = sum(t.numel() for n, t in tensors.items() if t.dim() == 2 and layer_of(n) is not None)
        return Sizes(sum(counts.values()), 0, 0, few=0 if base == "exact" else matrices, base=base)
    return Sizes(sum(counts.values()), sum(counts.values()), at_once(counts, tensors, experiment.method))


def weights_in(folder: Path) -> list[Path]:
    """The files of a folder that a model is loaded from, as far as they are there: others may hold it once more."""
    index, whole = folder / "model.safetensors.index.json", folder / "model.safetensors"
    if whole.exists():
        return [whole]
    if index.exists():
        named = set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values())
        return sorted(folder / name for name in named if (folder / name).exists())
    return sorted(folder.glob("*.safetensors"))


def insist_on_room(
    sizes: Sizes,
    experiment: Experiment,
    loaded: bool = False,
    free: int | None = None,
    gpus: Sequence[int] | None = None,
    portion: Portion | None = None,
    asker: Asker = RUN,
) -> Need:
    """What this machine is needed for, or an error where it cannot fit into its memory, or into that of its GPUs. ``loaded``: whether the
    model is in memory already. ``free``: bytes, and those of each GPU, as the machine tells them if not given. ``portion``: the part that
    this run may have; what it holds already is in it, what the others do is not. ``asker``: in whose words it is refused.

    Raises:
        ExperimentError: it cannot; with what is needed, what is there and what would make it fit.
    """
    e, low = experiment, experiment.precision != "float32"
    free = free_bytes(torch.device("cpu")) if free is None else free
    gpus = [free_bytes(torch.device("cuda", i)) for i in range(torch.cuda.device_count())] if gpus is None else gpus
    there_already = sizes.held(2 if low else 4) if loaded else 0
    start = 4 * sizes.trained if loaded and low else 0
    need = needed(sizes, e, bool(gpus))
    if e.engine.overcommit:
        return need
    if gpus:
        there, room = needed_there(sizes, e, len(gpus)), min(gpus) + there_already
        if portion is not None and portion.on_gpu > 1:
            room = min(room, *(torch.cuda.mem_get_info(i)[1] // portion.on_gpu for i in range(len(gpus))))
        if there.total > room:
            raise _no_room("of a GPU's memory", there, room, lambda other: needed_there(sizes, other, len(gpus)), sizes, e, asker, portion)
    here = free + start + (0 if gpus else there_already)
    here = here if portion is None else min(here, portion.room)
    if need.total > here:
        beside = "of memory beside the program itself"
        raise _no_room(beside, need, here, lambda other: needed(sizes, other, bool(gpus)), sizes, e, asker, portion)
    return need


def insist_on_a_devices_room(sizes: Sizes, experiment: Experiment, room: int, loaded: bool = False, gpu: bool = False) -> Need:
    """What a device of a real federation is needed for, or an error where that cannot fit into ``room``, bytes that it may still take.
    ``experiment``: with the device's own engine. ``gpu``: it has one, whose memory is not looked at.

    Raises:
        ExperimentError: it cannot; with what is needed, what is there and what would make it fit.
    """
    low = experiment.precision != "float32"
    there = room + ((0 if gpu else sizes.held(2 if low else 4)) + (4 * sizes.trained if low else 0) if loaded else 0)
    need = needed(sizes, experiment, gpu, serves=False)
    if need.total > there:
        raise _no_room(
            "of memory beside the program itself",
            need,
            there,
            lambda other: needed(sizes, other, gpu, serves=False),
            sizes,
            experiment,
            DEVICE,
        )
    return need


def _no_room(
    of: str,
    need: Need,
    there: int,
    told_of: Callable[[Experiment], Need],
    sizes: Sizes,
    experiment: Experiment,
    asker: Asker,
    portion: Portion | None = None,
) -> ExperimentError:
    """The error that says what is needed, what is there and what would need less. ``portion``: of what it has a part."""
    largest = ", ".join(f"{human_bytes(count)} for {what}" for what, count in sorted(need.lines, key=lambda line: -line[1])[:3])
    several = portion is not None and portion.jobs > 1
    e, mends = experiment, ["fewer --jobs"] if several else []
    each = f" for each of {portion.jobs} runs at a time (--jobs)" if portion is not None and several else ""
    alone = told_of(replace(e, engine=replace(e.engine, stack=1, workers=0))).total
    if asker.alone and alone < need.total:
        mends.append(f"{asker.alone} (about {human_bytes(alone)}: one device's messages at a time)")
    if e.trained.kind == "full" and of_blocks(e.method) is None:
        mends.append("a method that trains less at a time (fedcybgd a block, lora an adapter)")
    for precision in get_args(Precision):
        if (other := told_of(replace(e, precision=precision)).total) < need.total:
            mends.append(f"--precision {precision} (about {human_bytes(other)})")
    if asker.recompute and sizes.per_token and not e.engine.recompute:
        mends.append(f"{asker.recompute} (less for passing a batch through, at the price of another forward pass)")
    mends += ["a shorter --max-length", "a smaller model", "more memory"]
    return ExperimentError(
        f"{asker.who} needs about {human_bytes(need.total)} {of}, and {human_bytes(there)} are there{each}: "
        f"{largest}. It would fit with {', '.join(mends[:-1])} or {mends[-1]}; {asker.anyway}"
    )


def told(need: Need, sizes: Sizes, there: Need | None = None) -> list[tuple[str, str]]:
    """(what, its value) for a person: this machine, each GPU of it (``there``) and a real device."""
    low, plain = on_a_device(sizes, True), on_a_device(sizes, False)
    return [
        ("memory here", f"{_parts(need)}; {human_bytes(free_bytes(torch.device('cpu')))} are free"),
        *([("memory on a GPU here", _parts(there))] if there else []),
        (
            "memory on a device",
            f"{human_bytes(low)} in 16 bits (2·M + 16·|θ|, |θ| = {sizes.at_once:,}), {human_bytes(plain)} in float32 (4·M + 12·|θ|)"
            + (f"; {sizes.few:,} of M in {sizes.base} instead, {human_bytes(size_of(sizes.few, sizes.base))}" if sizes.few else ""),
        ),
    ]


def _parts(need: Need) -> str:
    """A need and what it is for. What is passed through at a time is as much as fits, so with it there is no most."""
    parts = ", ".join(f"{human_bytes(count)} {what}" for what, count in need.lines)
    if any(what.startswith(PASSING) for what, _ in need.lines):
        return f"{human_bytes(need.total)} with no more than {TEXTS} texts in a pass, which takes more where they fit: {parts}"
    return f"{human_bytes(need.total)} at the most: {parts}"
