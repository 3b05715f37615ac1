"""Arithmetic on named tensors. Everything is matched by name, never by position; a name too few or too many is an error."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from itertools import accumulate, groupby

import numpy as np
import torch

from fedloom.messages import Tensors
from fedloom.native.library import takes, weighted_sum

STRETCH = 2**19
"""How many numbers are averaged at a time: 4 MB of float64, which stay in a cache."""


Piece = tuple[str, int, int]
"""A tensor's name, and which of its numbers."""


class Weightless(ValueError):
    """What is to be averaged has no weight together: whoever sent it says that it has no examples."""


def rounded_up(share: float, of: int) -> int:
    """⌈share·of⌉. Float noise below 1e-9 makes no further one: 0.07·100 is 7.000000000000001, and 7."""
    return math.ceil(share * of - 1e-9)


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


def identical(first: Tensors, second: Tensors) -> bool:
    """Whether both hold the same objects under the same names, in the same order."""
    return list(first) == list(second) and all(second[name] is tensor for name, tensor in first.items())


def equal(first: Tensors, second: Tensors) -> bool:
    """Whether both have the same names, and the same numbers under each."""
    return first.keys() == second.keys() and all(t is second[name] or torch.equal(t, second[name]) for name, t in first.items())


def nbytes(tensors: Tensors) -> int:
    """Payload bytes of all tensors."""
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())


@torch.no_grad()
def weighted_mean(pairs: Iterable[tuple[float, Tensors]]) -> dict[str, torch.Tensor]:
    """The :class:`Mean` of all pairs of a weight and tensors.

    Raises:
        ValueError: names or shapes differ between entries, there are none, or their weights have no positive sum.
    """
    mean = Mean()
    for weight, tensors in pairs:
        mean.add(weight, tensors)
    return mean.value()


class Mean:
    """Σ w·x / Σ w of named tensors that come one after another, in the first's dtype, summed in float64: order changes nothing that float32
    could see.

    What comes is held until it is ``held`` bytes (0: for ever) and then goes into the sums, so that every number is read from memory once:
    a stretch of the sums stays in a cache while all entries are added to it, one after another. What ``held`` is changes no bit.
    """

    def __init__(self, held: int = 0) -> None:
        self.held, self.weights = held, list[float]()
        self._like: Tensors = {}
        self._waiting: list[tuple[float, Tensors]] = []
        self._bytes = 0
        self._sums: list[torch.Tensor] | None = None

    def add(self, weight: float, tensors: Tensors) -> None:
        """One entry, whose tensors must not change any more.

        Raises:
            ValueError: names or shapes are not those of the first.
        """
        self._like = self._like if self.weights else tensors
        same_names(self._like, tensors)
        self.weights.append(float(weight))
        self._waiting.append((float(weight), tensors))
        self._bytes += nbytes(tensors)
        if self.held and self._bytes >= self.held:
            if self._sums is None:
                self._sums = [total.clone() for _, total in self._totals()]
            else:
                for kept, (_, total) in zip(self._sums, self._totals(), strict=True):
                    kept.copy_(total)
            self._waiting, self._bytes = [], 0

    @torch.no_grad()
    def value(self) -> dict[str, torch.Tensor]:
        """The mean of all that came.

        Raises:
            Weightless: nothing came, or the weights have no positive sum.
        """
        whole = sum(self.weights)
        if not whole > 0:
            raise Weightless(f"a mean needs at least one set of tensors and a positive sum of weights; the weights are {self.weights}")
        mean = {name: torch.empty(tensor.shape, dtype=tensor.dtype, device=tensor.device) for name, tensor in self._like.items()}
        for pieces, total in self._totals():
            total.div_(whole)
            for (name, begin, end), part in zip(pieces, total.split([end - begin for _, begin, end in pieces]), strict=True):
                mean[name].view(-1)[begin:end].copy_(part)
        return mean

    @torch.no_grad()
    def _totals(self) -> Iterator[tuple[list[Piece], torch.Tensor]]:
        """Σ w·x of all that came, stretch by stretch, in space that the next stretch takes."""
        stretches = _stretches(self._like)
        longest = max((sum(end - begin for _, begin, end in pieces) for pieces in stretches), default=0)
        device = next((tensor.device for tensor in self._like.values()), None)
        space = torch.empty(longest, dtype=torch.float64, device=device)  # fresh memory for every stretch would cost more than the sums
        weights = [weight for weight, _ in self._waiting]
        flat = {name: [tensors[name].reshape(-1) for _, tensors in self._waiting] for name in self._like}
        for i, pieces in enumerate(stretches):
            total = space[: sum(end - begin for _, begin, end in pieces)]
            if self._sums is None:
                total.zero_()
            else:
                total.copy_(self._sums[i])
            for place, (name, begin, end) in zip(total.split([end - begin for _, begin, end in pieces]), pieces, strict=True):
                _add(place, [tensor[begin:end] for tensor in flat[name]], weights)
            yield pieces, total


def _add(sums: torch.Tensor, tensors: Sequence[torch.Tensor], weights: Sequence[float]) -> None:
    """sums (float64) += Σ w·x, one after another."""
    if all(tensor.dtype is torch.float32 for tensor in tensors) and takes(*tensors):
        return weighted_sum(tensors, weights, sums)
    for tensor, weight in zip(tensors, weights, strict=True):
        sums.add_(tensor.double(), alpha=weight)
    return None


def _stretches(tensors: Tensors) -> list[list[Piece]]:
    """All numbers, about :data:`STRETCH` at a time: large tensors in pieces, small ones together."""
    made = [
        [(name, begin, min(begin + STRETCH, tensor.numel()))]
        for name, tensor in tensors.items()
        if tensor.numel() > STRETCH
        for begin in range(0, tensor.numel(), STRETCH)
    ]
    small = [(name, tensor.numel()) for name, tensor in tensors.items() if tensor.numel() <= STRETCH]
    ends = accumulate(size for _, size in small)
    grouped = groupby(zip(small, ends, strict=True), key=lambda at: (at[1] - 1) // STRETCH)
    return made + [[(name, 0, size) for (name, size), _ in together] for _, together in grouped]


def fingerprint(tensors: Tensors) -> str:
    """sha256 over names, dtypes, shapes and bits, in name order: equal exactly when the tensors are bit-identical."""
    digest = hashlib.sha256()
    for name in sorted(tensors):
        tensor = tensors[name].detach().cpu().contiguous()
        digest.update(f"{name}|{tensor.dtype}|{tuple(tensor.shape)}|".encode())
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy().data if tensor.numel() else b"")
    return digest.hexdigest()


def clone(tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Detached copies that share nothing with the originals, in order of names."""
    return {name: tensor.detach().clone() for name, tensor in sorted(tensors.items())}


def packed(mask: torch.Tensor) -> torch.Tensor:
    """A mask's bits, eight a byte, uint8. One more bit that is set says where they end."""
    bits = np.append(mask.numpy().reshape(-1) > 0, True)
    return torch.from_numpy(np.packbits(bits))


def unpacked(bits: torch.Tensor) -> torch.Tensor:
    """The mask (d_out,) bool that was packed."""
    flags = np.unpackbits(bits.numpy())
    return torch.from_numpy(flags[: np.flatnonzero(flags)[-1]].astype(bool))


def apart(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """As they are, or copies where some share memory, which a file refuses."""
    whole = [tensor.untyped_storage().data_ptr() for tensor in tensors.values() if tensor.numel()]
    return tensors if len(set(whole)) == len(whole) else {name: tensor.clone() for name, tensor in tensors.items()}
