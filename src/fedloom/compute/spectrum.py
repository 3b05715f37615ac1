"""The spectrum of one client's Hessian by stochastic Lanczos quadrature, and how far the loss is from its second-order model.

H = ∇²F(P), F the mean loss of one batch, P the tensors asked for (float32, dropout off), d scalars in all. Hessian-vector products are
exact, by differentiating twice.

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

Vector = torch.Tensor
"""float32 (d,): the tensors' numbers, flattened in order of names."""

Product = Callable[[Vector], Vector]
"""v ↦ Hv."""

EXHAUSTED = 1e-6
"""Share of the operator's size below which what is left of a Krylov vector is rounding (float32 products)."""


def density(product: Product, starts: Sequence[Vector], steps: int) -> tuple[np.ndarray, np.ndarray]:
    """(nodes ascending, weights that sum to 1), float64 (at most steps · #starts,), of the symmetric operator ``product`` on R^d.

    ``starts``: the probes' first vectors, none of them zero.
    """
    nodes, weights = [], []
    for start in starts:
        diagonal, beside = lanczos(product, start, min(steps, len(start)))
        values, vectors = np.linalg.eigh(np.diag(diagonal) + np.diag(beside, 1) + np.diag(beside, -1))
        nodes.append(values)
        weights.append(vectors[0] ** 2 / len(starts))
    order = np.argsort(np.concatenate(nodes), kind="stable")
    return np.concatenate(nodes)[order], np.concatenate(weights)[order]


def lanczos(product: Product, start: Vector, steps: int) -> tuple[np.ndarray, np.ndarray]:
    """The diagonal (m,) and off-diagonal (m−1,) of T; m ≤ ``steps``, fewer if the start's Krylov space is exhausted."""
    basis = [start.double() / start.double().norm()]
    diagonal: list[float] = []
    beside: list[float] = []
    while True:
        image = product(basis[-1].float()).double()
        diagonal.append(float(image @ basis[-1]))
        largest = float(image.norm())
        for _ in range(2):  # once leaves what rounding brings back
            for vector in basis:
                image = image - (image @ vector) * vector
        left = float(image.norm())
        if len(diagonal) == steps or left <= EXHAUSTED * max(largest, *map(abs, diagonal)):
            return np.array(diagonal), np.array(beside)
        beside.append(left)
        basis.append(image / left)


def lipschitz(product: Product, change: Callable[[Vector], Vector], moves: Sequence[Vector]) -> float:
    """The largest ‖HΔ − (∇F(P + Δ) − ∇F(P))‖ / ‖Δ‖ over the ``moves`` Δ; ``change``: Δ ↦ ∇F(P + Δ) − ∇F(P)."""
    return max(float((product(move) - change(move)).double().norm() / move.double().norm()) for move in moves)


def first_gap(nodes: np.ndarray, weights: np.ndarray, lipschitz: float) -> float | None:
    """The share of the spectrum below the first gap λ_{m+1} − λ_m > 4ℒ (FibecFed: what may be pruned without loss); None: there is none."""
    wide = np.flatnonzero(np.diff(nodes) > 4 * lipschitz)
    return float(weights[: wide[0] + 1].sum()) if len(wide) else None
