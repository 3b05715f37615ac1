"""The spectra of clients' Hessians by stochastic Lanczos quadrature, and how far the loss is from its second-order model.

H = ∇²F(P), F the mean loss of one batch, P the tensors asked for (float32, dropout off), d scalars in all. Hessian-vector products are
exact, by differentiating twice. Clients are rows: one, or as many as a pass holds.

**Density.** From a seeded unit vector v, m Lanczos steps with full re-orthogonalisation give Q (d, m) and a tridiagonal T = QᵀHQ. The
eigenvalues θ_i of T and the squares τ_i of their eigenvectors' first entries are the Gauss quadrature of v's spectral measure; averaged
over probes, Σ_i τ_i δ(θ_i) ≈ (1/d) Σ_j δ(λ_j) (Golub and Welsch 1969; 1901.10159). With m = d and one probe the nodes are the eigenvalues.

**Lipschitz estimate** of g(Δ) = HΔ − ∇F(P + Δ) (FibecFed, 2410.00131): the largest of ‖g(Δ) − g(0)‖ / ‖Δ‖ over seeded Δ with
‖Δ‖ = radius · ‖P‖. A largest value over a few draws is an estimate from below.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import torch

from fedloom.compute.work import Spectral, Spectrum
from fedloom.seeds import derive

Vectors = torch.Tensor
"""float32 (S, d): for each of S clients its tensors' numbers, flattened in order of names."""

Product = Callable[[Vectors], Vectors]
"""v ↦ Hv, row by row: every client has a Hessian of its own."""

EXHAUSTED = 1e-6
"""Share of the operator's size below which what is left of a Krylov vector is rounding (float32 products)."""


def spectra(items: Sequence[Spectrum], point: Vectors, gradient: Product, product: Product) -> list[Spectral]:
    """What each item asks for, of items that differ in their tensors, examples and seeds only. ``point``: P. ``gradient``: P ↦ ∇F(P)."""
    like = items[0]

    def draw(purpose: str, i: int) -> Vectors:
        rows = [derive(item.seed, "spectrum", purpose, i).standard_normal(point.shape[1], dtype=np.float32) for item in items]
        return torch.from_numpy(np.stack(rows)).to(point.device)

    found = density(product, [draw("probe", i) for i in range(like.probes)], like.steps)
    reach = like.radius * point.norm(dim=1, keepdim=True)
    moves = [reach * move / move.norm(dim=1, keepdim=True) for move in (draw("move", i) for i in range(like.probes))]
    base = gradient(point)
    bounds = lipschitz(product, lambda move: gradient(point + move) - base, moves)
    return [Spectral(*one, bound) for one, bound in zip(found, bounds, strict=True)]


def density(product: Product, starts: Sequence[Vectors], steps: int) -> list[tuple[np.ndarray, np.ndarray]]:
    """For each client (nodes ascending, weights that sum to 1), float64 (at most steps · #starts,), of its symmetric operator on R^d.

    ``starts``: the probes' first vectors, none of them zero.
    """
    nodes, weights = [[[] for _ in starts[0]] for _ in "nw"]
    for start in starts:
        for s, (diagonal, beside) in enumerate(lanczos(product, start, min(steps, start.shape[1]))):
            values, vectors = np.linalg.eigh(np.diag(diagonal) + np.diag(beside, 1) + np.diag(beside, -1))
            nodes[s].append(values)
            weights[s].append(vectors[0] ** 2 / len(starts))
    orders = [np.argsort(np.concatenate(of), kind="stable") for of in nodes]
    return [(np.concatenate(n)[order], np.concatenate(w)[order]) for n, w, order in zip(nodes, weights, orders, strict=True)]


def lanczos(product: Product, start: Vectors, steps: int) -> list[tuple[np.ndarray, np.ndarray]]:
    """For each client the diagonal (m,) and off-diagonal (m−1,) of T; m ≤ ``steps``, fewer where its start's Krylov space is exhausted."""
    basis = [start.double() / start.double().norm(dim=1, keepdim=True)]
    diagonal: list[list[float]] = [[] for _ in start]
    beside: list[list[float]] = [[] for _ in start]
    going = list(range(len(start)))
    while True:
        image = product(basis[-1].float()).double()
        along, largest = torch.linalg.vecdot(image, basis[-1]).tolist(), image.norm(dim=1).tolist()
        for _ in range(2):  # once leaves what rounding brings back
            for vector in basis:
                image = image - torch.linalg.vecdot(image, vector)[:, None] * vector
        left = image.norm(dim=1)
        for s in going:
            diagonal[s].append(along[s])
        rest = left.tolist()
        going = [s for s in going if len(diagonal[s]) < steps and rest[s] > EXHAUSTED * max(largest[s], *map(abs, diagonal[s]))]
        if not going:
            return [(np.array(d), np.array(b)) for d, b in zip(diagonal, beside, strict=True)]
        for s in going:
            beside[s].append(rest[s])
        on = torch.zeros(len(start), 1, dtype=torch.bool, device=image.device)
        on[going] = True
        basis.append(torch.where(on, image / left[:, None], 0.0))  # whoever is done goes on with zeros


def lipschitz(product: Product, change: Product, moves: Sequence[Vectors]) -> list[float]:
    """Each client's largest ‖HΔ − (∇F(P + Δ) − ∇F(P))‖ / ‖Δ‖ over the ``moves`` Δ; ``change``: Δ ↦ ∇F(P + Δ) − ∇F(P)."""
    each = [(product(move) - change(move)).double().norm(dim=1) / move.double().norm(dim=1) for move in moves]
    return torch.stack(each).amax(0).tolist()


def first_gap(nodes: np.ndarray, weights: np.ndarray, lipschitz: float) -> float | None:
    """The share of the spectrum below the first gap λ_{m+1} − λ_m > 4ℒ (FibecFed: what may be pruned without loss); None: there is none."""
    wide = np.flatnonzero(np.diff(nodes) > 4 * lipschitz)
    return float(weights[: wide[0] + 1].sum()) if len(wide) else None
