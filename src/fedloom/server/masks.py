"""Masks at the server: which share of each layer's output neurons a device trains, and rows that travel instead of whole tensors.

Each round's tasks that are told the round, which are those that train, say the share (``Mask.keep``) and the method's batch size;
predictions are told nothing, and what one trains for itself it trains whole. A device answers with the rows of each B (d_out, r) that it
trains, and which they are, one bit a row; the others are as it was sent them, and are put back here. So a method's server sees whole
tensors, and averages over those who trained a row and those who left it alone; and whoever judges answers sees them so too
(``Task.complete``). The device's half, and how rows are chosen: ``client/masks.py``.

It does not know methods: their rounds pass through it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TypeVar

import torch

from fedloom.messages import Flow, Setting, Take, Task, Tensors, through
from fedloom.tensors import unpacked

T = TypeVar("T")

ROWS = "rows/"
"""Before the name of a B: which of its rows there are, packed (``tensors.packed``). In an update, and in a device's memory."""

MASK = "mask_"
"""Before the names of what a device is told of its mask."""
KEEP = f"{MASK}keep"
"""The share that it trains."""
SIZE, BY_MEMORY = f"{MASK}batch_size", f"{MASK}by_memory"
"""Examples a step in the warm-up; and, if it is there, that a device takes no more than its memory holds."""
MASKS = frozenset({KEEP, SIZE, BY_MEMORY})
"""All of these settings."""


@dataclass(frozen=True)
class Mask:
    """Which rows of LoRA's pairs a device trains.

    Attributes:
        keep: share of the output neurons of each layer's pairs that a device trains, those of highest Fisher information (1: all).
    """

    keep: float = 1.0

    def __post_init__(self) -> None:
        if not 0 < self.keep <= 1:
            raise ValueError(f"a mask keeps a share of the neurons above 0 and at most 1; got keep {self.keep}")

    def over(self, flow: Flow[T], batch: Mapping[str, Setting]) -> Flow[T]:
        """The same round, whose devices train some rows. ``batch``: how many examples a step of the method has, as settings."""
        told = {MASK + name: value for name, value in {"keep": self.keep, **batch}.items()}
        return through(flow, lambda a: replace(a, tasks=[_told(task, told) for task in a.tasks], take=_completing(a.tasks, a.take)))


def _told(task: Task, told: Mapping[str, Setting]) -> Task:
    if "round" not in task.settings:
        return task
    return replace(task, settings={**task.settings, **told}, complete=lambda came: task.complete(completed(came, task.tensors)))


def _completing(tasks: Sequence[Task], take: Take) -> Take:
    sent = {task.client: task.tensors for task in tasks}
    return lambda update: take(replace(update, tensors=completed(update.tensors, sent[update.client])))


def completed(tensors: Tensors, sent: Tensors) -> dict[str, torch.Tensor]:
    """What came with all rows: those that did not come are as they were sent, or zero where the tensor was not.

    Raises:
        ValueError: as many rows as are said did not come.
    """
    made = {n: t for n, t in tensors.items() if not n.startswith(ROWS)}
    for named, bits in tensors.items():
        if not named.startswith(ROWS):
            continue
        at, of = torch.nonzero(flags := unpacked(bits)).flatten(), named.removeprefix(ROWS)
        for name in (n for n in made if n == of or n.endswith(f"/{of}")):
            few = made[name]
            if len(few) != len(at):
                raise ValueError(f"'{name}' came with {len(few)} rows, and {len(at)} are said to have come")
            whole = sent[name] if name in sent else few.new_zeros(len(flags), *few.shape[1:])
            made[name] = whole.index_copy(0, at, few)
    return made
