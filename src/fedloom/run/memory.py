"""How much memory a run needs, told before it begins: of this machine, and of a real device.

**A device** that trains |θ| of M numbers at a time, by the books of mixed precision (BAdam 2404.02827; FedCyBGD 2406.11187):

    2·M + 16·|θ|    bytes, the model in 16 bits; of what is trained a float32 copy, its gradient and AdamW's two moments
    4·M + 12·|θ|    bytes, everything in float32

and what passing a batch through it keeps alive. θ is a block of ``fedcybgd``, else whatever is trained.

**This machine** plays all parts, so it holds more; the lines of :class:`Need` say what. They are an estimate from above of what this code
keeps at its fullest moment, library and interpreter left out. It does not know how many bytes an allocator never gives back.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open

from fedloom.compute.stacked import TOKENS, token_bytes
from fedloom.engines.local import HEAVY, WAVE
from fedloom.methods.fedcybgd import FedCyBGD
from fedloom.model.adapters import is_head
from fedloom.model.base import Model, free_bytes
from fedloom.model.blocks import Block, cover
from fedloom.model.loading import folder_of
from fedloom.model.memory import resident
from fedloom.run.console import human_bytes
from fedloom.run.experiment import Experiment, ExperimentError

STATES = 8
"""Float32 numbers that training keeps for each number trained: where it began, where it is, its gradient, two moments, and what a step
makes of them."""

OVERCOMMIT = "--engine.overcommit"


@dataclass(frozen=True)
class Sizes:
    """Numbers of the model, of what is trained in all, of what one device trains at a time; bytes that one token of a batch keeps alive."""

    model: int
    trained: int
    at_once: int
    per_token: int = 0


@dataclass(frozen=True)
class Need:
    """Bytes by what they are for."""

    lines: tuple[tuple[str, int], ...]

    @property
    def total(self) -> int:
        """All of them."""
        return sum(count for _, count in self.lines)


def needed(sizes: Sizes, experiment: Experiment) -> Need:
    """What this machine holds at its fullest moment, by the experiment's precision, cohort, stack and workers."""
    e = experiment
    processes, wave = max(1, e.engine.workers), min(e.engine.stack or WAVE, max(1, HEAVY // max(1, 4 * sizes.trained)))
    asked = 1 if vars(type(e.method)).get("one_at_a_time") else e.cohort
    training, evaluating = (min(wave, -(-devices // processes)) for devices in (asked, e.clients))
    messages = max(training * (2 * sizes.trained + 2 * sizes.at_once), evaluating * 2 * sizes.trained)
    low = 2 * sizes.model if e.precision == "bf16" else 0
    shares = sizes.model == sizes.trained  # then the start is the model's own weights
    frozen = (2 if low else 4) * (sizes.trained - sizes.at_once)
    lines = [
        ("the model in float32", 4 * sizes.model * processes),
        ("the model in bf16", low * processes),
        ("the start and the server's state", 4 * sizes.trained * (1 if shares else 2)),
        ("messages of the devices that are asked together", 4 * processes * messages),
        ("training a device", processes * (4 * STATES * sizes.at_once + frozen)),
        (
            "passing a batch through, layers computed again" if e.engine.recompute else "passing a batch through",
            processes * sizes.per_token * min(TOKENS["cpu"], 8 * e.max_length),
        ),
    ]
    return Need(tuple((what, count) for what, count in lines if count))


def on_a_device(sizes: Sizes, low: bool) -> int:
    """Bytes that a real device needs for model and training, by the formulas above; without what a batch keeps alive."""
    return sum(resident(sizes.model, sizes.at_once, 2 if low else 4))


def sizes_of(model: Model, method: Any) -> Sizes:
    """Those of a model that is loaded."""
    trained = {n: t.numel() for n, t in model.initial.items()}
    return Sizes(
        sum(p.numel() for p in model.module.parameters()),
        sum(trained.values()),
        at_once(trained, model.initial, method),
        token_bytes(model),
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
    return method if isinstance(method, FedCyBGD) else of_blocks(vars(method)["inner"]) if "inner" in vars(method) else None


def sizes_before(experiment: Experiment) -> Sizes | None:
    """Those of a model whose folder lies here, from the names and shapes in its files; nothing is loaded. None of any other.

    Of an adapter only what lies under it counts: this is less than will be needed, never more.
    """
    folder = Path(folder_of(experiment.model))
    files = sorted(folder.glob("*.safetensors")) if folder.is_dir() else []
    tensors: dict[str, torch.Tensor] = {}
    for file in files:
        with safe_open(str(file), framework="pt") as stored:
            tensors |= {name: torch.empty(stored.get_slice(name).get_shape(), device="meta") for name in stored.keys()}  # noqa: SIM118
    if not tensors:
        return None
    counts = {name: tensor.numel() for name, tensor in tensors.items()}
    if experiment.trained.kind != "full":
        return Sizes(sum(counts.values()), 0, 0)
    return Sizes(sum(counts.values()), sum(counts.values()), at_once(counts, tensors, experiment.method))


def insist_on_room(sizes: Sizes, experiment: Experiment, there: int = 0, free: int | None = None) -> Need:
    """What is needed, or an error where it cannot fit. ``there``: bytes of it that are in memory already; ``free``: bytes, as this machine
    tells them if not given. On a GPU nothing is refused: it is not this memory that the model lies in.

    Raises:
        ExperimentError: it cannot; with what is needed, what is there and what would make it fit.
    """
    need = needed(sizes, experiment)
    free = free_bytes(torch.device("cpu")) if free is None else free
    if experiment.engine.overcommit or torch.cuda.is_available() or need.total - there <= free:
        return need
    largest = ", ".join(f"{human_bytes(count)} for {what}" for what, count in sorted(need.lines, key=lambda line: -line[1])[:3])
    e, mends = experiment, []
    alone = needed(sizes, replace(e, engine=replace(e.engine, stack=1, workers=0))).total
    if alone < need.total:
        mends.append(f"--engine.stack 1 and no --engine.workers (about {human_bytes(alone)}: one device's messages at a time)")
    if e.trained.kind == "full" and of_blocks(e.method) is None:
        mends.append("a method that trains less at a time (fedcybgd a block, lora an adapter)")
    if e.precision == "bf16":
        mends.append("--precision float32 (no second copy)")
    if sizes.per_token and not e.engine.recompute:
        mends.append("--engine.recompute (less for passing a batch through, at the price of another forward pass)")
    mends += ["a shorter --max-length", "a smaller model", "more memory"]
    raise ExperimentError(
        f"this run needs about {human_bytes(need.total)} of memory beside the program itself, and {human_bytes(free + there)} are there: "
        f"{largest}. It would fit with {', '.join(mends[:-1])} or {mends[-1]}; {OVERCOMMIT} runs it all the same"
    )


def told(need: Need, sizes: Sizes) -> list[tuple[str, str]]:
    """(what, its value) for a person: this machine and a real device."""
    parts = ", ".join(f"{human_bytes(count)} {what}" for what, count in need.lines)
    low, plain = on_a_device(sizes, True), on_a_device(sizes, False)
    return [
        ("memory here", f"{human_bytes(need.total)} at the most: {parts}; {human_bytes(free_bytes(torch.device('cpu')))} are free"),
        (
            "memory on a device",
            f"{human_bytes(low)} in 16 bits (2·M + 16·|θ|, |θ| = {sizes.at_once:,}), {human_bytes(plain)} in float32 (4·M + 12·|θ|)",
        ),
    ]
