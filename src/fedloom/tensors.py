"""Arithmetic on named tensors. Everything is matched by name, never by position; a name too few or too many is an error."""

from __future__ import annotations

import hashlib
from collections.abc import Collection, Iterable, Mapping, Sequence
from itertools import accumulate, groupby

import torch

from fedloom.messages import Tensors

STRETCH = 2**19
"""How many numbers are averaged at a time: 4 MB of float64, which stay in a cache."""


def only(tensors: Tensors, names: Collection[str]) -> dict[str, torch.Tensor]:
    """The tensors with these names.

    Raises:
        KeyError: a name does not exist.
    """
    missing = sorted(set(names) - set(tensors))
    if missing:
        raise KeyError(f"no tensors {missing}; there are {sorted(tensors)}")
    return {name: tensor for name, tensor in tensors.items() if name in names}


def without(tensors: Tensors, names: Collection[str]) -> dict[str, torch.Tensor]:
    """The tensors whose names are not in ``names``."""
    return {name: tensor for name, tensor in tensors.items() if name not in names}


def same_names(first: Tensors, second: Tensors) -> None:
    """Insist that both have the same names and shapes.

    Raises:
        ValueError: naming what is missing, unknown or of another shape.
    """
    if first.keys() != second.keys():
        missing, unknown = sorted(set(first) - set(second)), sorted(set(second) - set(first))
        raise ValueError(f"tensors do not match by name: missing {missing}, unknown {unknown}")
    for name, tensor in first.items():
        if tensor.shape != second[name].shape:
            raise ValueError(f"tensor '{name}' has shape {tuple(second[name].shape)}; expected {tuple(tensor.shape)}")


def nbytes(tensors: Tensors) -> int:
    """Payload bytes of all tensors."""
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())


@torch.no_grad()
def weighted_mean(pairs: Iterable[tuple[float, Tensors]]) -> dict[str, torch.Tensor]:
    """Σ w·x / Σ w of each named tensor, in the first's dtype, summed in float64: order changes nothing that float32 could see.

    Every number is read from memory once: a stretch of the sums stays in a cache while all entries are added to it, one after another.

    Raises:
        ValueError: names or shapes differ between entries, there are none, or their weights have no positive sum.
    """
    weights, entries = [], []
    for weight, tensors in pairs:
        weights.append(float(weight))
        entries.append(tensors)
        same_names(entries[0], tensors)
    if not entries or not sum(weights) > 0:
        raise ValueError(f"a mean needs at least one set of tensors and a positive sum of weights; the weights are {weights}")
    mean = {name: torch.empty(tensor.shape, dtype=tensor.dtype, device=tensor.device) for name, tensor in entries[0].items()}
    space: dict[torch.device, torch.Tensor] = {}
    for name in (name for name, tensor in mean.items() if tensor.numel() > STRETCH):
        columns = zip(*(tensors[name].reshape(-1).split(STRETCH) for tensors in entries), strict=True)
        for out, column in zip(mean[name].view(-1).split(STRETCH), columns, strict=True):
            _average([out], weights, [[part] for part in column], space)
    small = [name for name, tensor in mean.items() if tensor.numel() <= STRETCH]
    ends = accumulate(mean[name].numel() for name in small)
    for _, together in groupby(zip(small, ends, strict=True), key=lambda at: at[1] // STRETCH):
        names = [name for name, _ in together]
        _average([mean[name] for name in names], weights, [[tensors[name] for name in names] for tensors in entries], space)
    return mean


def _average(
    out: Sequence[torch.Tensor],
    weights: Sequence[float],
    entries: Sequence[Sequence[torch.Tensor]],
    space: dict[torch.device, torch.Tensor],
) -> None:
    """Fill ``out`` with the weighted mean of the entries, each of which has a tensor for each of ``out``. ``space`` is kept from call to
    call: fresh memory would cost more than the sums."""
    sizes, device = [tensor.numel() for tensor in out], out[0].device
    if device not in space or space[device].shape[1] < sum(sizes):
        space[device] = torch.empty(2, sum(sizes), dtype=torch.float64, device=device)
    total, doubles = space[device][:, : sum(sizes)]
    places = [part.view(tensor.shape) for part, tensor in zip(doubles.split(sizes), out, strict=True)]
    for entry, (weight, tensors) in enumerate(zip(weights, entries, strict=True)):
        for place, tensor in zip(places, tensors, strict=True):
            place.copy_(tensor)
        total.add_(doubles, alpha=weight) if entry else torch.mul(doubles, weight, out=total)
    total.div_(sum(weights))
    for tensor, part in zip(out, total.split(sizes), strict=True):
        tensor.copy_(part.view(tensor.shape))


def fingerprint(tensors: Tensors) -> str:
    """sha256 over names, dtypes, shapes and bits, in name order: equal exactly when the tensors are bit-identical."""
    digest = hashlib.sha256()
    for name in sorted(tensors):
        tensor = tensors[name].detach().cpu().contiguous()
        digest.update(f"{name}|{tensor.dtype}|{tuple(tensor.shape)}|".encode())
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy().tobytes() if tensor.numel() else b"")
    return digest.hexdigest()


def clone(tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Detached copies that share nothing with the originals, in order of names."""
    return {name: tensor.detach().clone() for name, tensor in sorted(tensors.items())}
