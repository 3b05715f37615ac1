"""A model made smaller for its way to a device, at a loss: pruned by magnitude, and its numbers in fewer bits.

    prune ρ   of every matrix (d_1, d_2, …) of N numbers the ⌊ρN⌉ smallest in size become 0; of equals those that come first
    encoding  the numbers that travel, as ``encodings.py`` has it, all of them as one vector in order of names

A pruned matrix travels as the numbers that are left, in order, and one bit for each of the N: 4·(N − ⌊ρN⌉) + ⌈N/8⌉ bytes before the
encoding. That is less than places would take, 4 bytes each, unless fewer than one number in 32 is left. Vectors (norms, biases) are never
pruned.

Pure functions; both sides of the wire agree on them. Which tensors are treated so is a method's to say.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import numpy as np
import torch

from fedloom.encodings import Encoding
from fedloom.messages import Setting, Task, Tensors
from fedloom.wire import WireError

REST = "rest/"
"""Before the names of what stands for the tensors, and of the settings that say how."""

LEFT, WHERE = "/left", "/where"
"""After a pruned matrix's name: its numbers that are left; a bit for every number, most significant first."""

NAMES, RANKS, SIZES = "rest/pruned", "rest/pruned/ranks", "rest/pruned/sizes"


def smaller(tensors: Tensors, prune: float, encoding: Encoding) -> tuple[dict[str, torch.Tensor], dict[str, Setting]]:
    """What travels in the place of ``tensors`` (float32), and the settings that say how to read it."""
    pieces, pruned = dict[str, torch.Tensor](), []
    for name, tensor in sorted(tensors.items()):
        if not prune or tensor.dim() < 2:
            pieces[name] = tensor
            continue
        mask = kept(tensor, prune)
        pieces |= {name + LEFT: tensor[mask], name + WHERE: torch.from_numpy(np.packbits(mask.numpy().reshape(-1)))}
        pruned.append(name)
    task = encoding.down(Task("", 0, pieces))
    told: dict[str, Setting] = {REST + n: value for n, value in task.settings.items()}
    if pruned:
        shapes = [tensors[n].shape for n in pruned]
        told |= {NAMES: pruned, RANKS: [len(shape) for shape in shapes], SIZES: [size for shape in shapes for size in shape]}
    return {REST + n: t for n, t in task.tensors.items()}, told


def kept(tensor: torch.Tensor, prune: float) -> torch.Tensor:
    """Which numbers of a tensor are not pruned: bool, of its shape."""
    order = tensor.detach().abs().reshape(-1).argsort(stable=True)
    mask = torch.ones(tensor.numel(), dtype=torch.bool)
    mask[order[: round(prune * tensor.numel())]] = False
    return mask.view(tensor.shape)


def restored(task: Task, encoding: Encoding) -> dict[str, torch.Tensor]:
    """The task's tensors, with those that :func:`smaller` made of others turned back into these: zeros where they were pruned.

    Raises:
        WireError: they are no pieces of it.
    """
    plain = {n: t for n, t in task.tensors.items() if not n.startswith(REST)}
    settings = {n.removeprefix(REST): value for n, value in task.settings.items() if n.startswith(REST)}
    came = encoding.arrived(Task("", 0, {n.removeprefix(REST): t for n, t in task.tensors.items() if n.startswith(REST)}, settings))
    pieces = dict(came.tensors)
    for name, shape in _shapes(task.settings).items():
        pieces[name] = _whole(name, shape, pieces.pop(name + LEFT, None), pieces.pop(name + WHERE, None))
    return {**plain, **pieces}


def _shapes(settings: Mapping[str, Setting]) -> dict[str, list[int]]:
    names, ranks, sizes = (list(settings.get(key, ())) for key in (NAMES, RANKS, SIZES))  # type: ignore[arg-type]
    if len(names) != len(ranks) or sum(map(int, ranks)) != len(sizes):
        raise WireError(f"{len(names)} pruned tensors of {len(ranks)} ranks with {len(sizes)} sizes; one rank a name, and so many sizes")
    ends = np.cumsum([0, *map(int, ranks)])
    return {str(n): [int(s) for s in sizes[begin:end]] for n, begin, end in zip(names, ends, ends[1:], strict=False)}


def _whole(name: str, shape: list[int], left: torch.Tensor | None, where: torch.Tensor | None) -> torch.Tensor:
    count = math.prod(shape)
    if left is None or where is None or where.dtype != torch.uint8 or where.numel() != -(-count // 8):
        raise WireError(f"'{name}' came pruned and without its numbers, or without a bit for each of {count}")
    mask = torch.from_numpy(np.unpackbits(where.numpy(), count=count).astype(bool))
    if int(mask.sum()) != left.numel():
        raise WireError(f"'{name}' came pruned, with {left.numel()} numbers for {int(mask.sum())} places")
    return torch.zeros(count).masked_scatter_(mask, left.float()).view(shape)


def bytes_of(tensors: Tensors, prune: float, encoding: Encoding) -> int:
    """Bytes of tensors that :func:`smaller` makes of float32 ``tensors``, without making them."""
    matrices = [t.numel() for t in tensors.values() if prune and t.dim() >= 2]
    numbers = sum(t.numel() for t in tensors.values()) - sum(round(prune * n) for n in matrices)
    return encoding.size(numbers) + sum(-(-n // 8) for n in matrices)
