"""Arithmetic on named tensors. Everything is matched by name, never by position; a name too few or too many is an error."""

from __future__ import annotations

import hashlib
from collections.abc import Collection, Iterable, Mapping

import torch

from fedloom.messages import Tensors


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
    missing, unknown = sorted(set(first) - set(second)), sorted(set(second) - set(first))
    if missing or unknown:
        raise ValueError(f"tensors do not match by name: missing {missing}, unknown {unknown}")
    for name, tensor in first.items():
        if tensor.shape != second[name].shape:
            raise ValueError(f"tensor '{name}' has shape {tuple(second[name].shape)}; expected {tuple(tensor.shape)}")


def nbytes(tensors: Tensors) -> int:
    """Payload bytes of all tensors."""
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())


def weighted_sum(pairs: Iterable[tuple[float, Tensors]]) -> tuple[dict[str, torch.Tensor], float]:
    """(Σ w·x, Σ w) over named tensors, one at a time, summed in float64: order changes nothing that float32 could see.

    Raises:
        ValueError: names or shapes differ between entries, or there are none.
    """
    total: dict[str, torch.Tensor] = {}
    weights, first = 0.0, True
    for weight, tensors in pairs:
        if first:
            total = {name: weight * tensor.double() for name, tensor in tensors.items()}
            first = False
        else:
            same_names(total, tensors)
            for name, tensor in tensors.items():
                total[name].add_(tensor.double(), alpha=weight)
        weights += weight
    if first:
        raise ValueError("a weighted sum needs at least one set of tensors")
    return total, weights


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
