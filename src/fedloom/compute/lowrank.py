"""Gradients of matrices in a few directions of their own (GaLore, 2403.03507): which matrices, which directions, there and back.

With G (m, n) and r < min(m, n): P (m, r) are the first r left singular vectors of G, R = PᵀG (r, n), and what is made of R comes back
as P·R. A matrix with m > n is projected on the right: its P (n, r) are right singular vectors, R = G·P (m, r), back R·Pᵀ. A singular
vector's sign is no property of G: it is chosen so that its largest component is positive, for what Adam remembers of one P goes on under
the next.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch

from fedloom.compute.flat import Flat
from fedloom.compute.work import LowRank
from fedloom.messages import DIVERGED
from fedloom.model.blocks import layer_of
from fedloom.telling import Tellable


class Diverged(Tellable, FloatingPointError):
    """Numbers that have stopped being finite."""


def projected(shapes: Mapping[str, torch.Size], how: LowRank) -> dict[str, torch.Size]:
    """The matrices of transformer layers that are larger than ``how.rank`` both ways, and the shape of their R."""
    fit = {n: s for n, s in shapes.items() if layer_of(n) is not None and len(s) == 2 and min(s) > how.rank}
    return {n: torch.Size((how.rank, s[1]) if s[0] <= s[1] else (s[0], how.rank)) for n, s in fit.items()}


def directions(gradient: torch.Tensor, rank: int) -> torch.Tensor:
    """P of a gradient (m, n).

    Raises:
        Diverged: it holds NaN or infinity.
    """
    if not bool(torch.isfinite(gradient).all()):
        raise Diverged(f"a gradient holds NaN or infinity; {DIVERGED} (a lower lr is the usual mend)")
    tall = gradient.shape[0] > gradient.shape[1]
    left, _, right = torch.linalg.svd(gradient.float(), full_matrices=False)
    basis = (right.mT if tall else left)[:, :rank]
    largest = basis.gather(0, basis.abs().argmax(0, keepdim=True))
    return basis * torch.where(largest < 0, -1.0, 1.0)


def down(basis: torch.Tensor, gradient: torch.Tensor) -> torch.Tensor:
    """R of a gradient (m, n)."""
    return gradient @ basis if gradient.shape[0] > gradient.shape[1] else basis.mT @ gradient


def up(basis: torch.Tensor, inner: torch.Tensor, shape: torch.Size) -> torch.Tensor:
    """A matrix of this shape from what was made of R."""
    return inner @ basis.mT if shape[0] > shape[1] else basis @ inner


class Few:
    """Gradients of all clients in few directions. ``inner``: what they are there. One client at a time: what is found for
    one does not depend on who else is there."""

    def __init__(self, flat: Flat, how: LowRank) -> None:
        self.flat, self.how = flat, how
        shapes = {**flat.shapes, **projected(flat.shapes, how)}
        self.some = sorted(projected(flat.shapes, how))
        self.inner = Flat({n: torch.empty(shape) for n, shape in shapes.items()})
        self.bases: list[dict[str, torch.Tensor]] = []

    def down(self, gradients: torch.Tensor, step: int) -> torch.Tensor:
        """(S, P) to what is remembered of it, (S, p); the directions are found anew where the step is the time for it."""
        named = [{n: t[0].clone() for n, t in self.flat.split(row[None]).items()} for row in gradients]
        if step % self.how.every == 0:
            self.bases = [{n: directions(of[n], self.how.rank) for n in self.some} for of in named]
        inner = [{**of, **{n: down(basis[n], of[n]) for n in self.some}} for of, basis in zip(named, self.bases, strict=False)]
        return torch.stack([torch.cat([of[n].reshape(-1) for n in self.inner.shapes]) for of in inner])

    def up(self, steps: torch.Tensor) -> torch.Tensor:
        """Steps (S, p) as steps of the tensors themselves, (S, P)."""
        named = [{n: t[0].clone() for n, t in self.inner.split(row[None]).items()} for row in steps]
        back = [
            {**of, **{n: up(basis[n], of[n], self.flat.shapes[n]) * self.how.scale for n in self.some}}
            for of, basis in zip(named, self.bases, strict=False)
        ]
        return torch.stack([torch.cat([of[n].reshape(-1) for n in self.flat.shapes]) for of in back])
