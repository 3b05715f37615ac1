"""LoRA that starts from a weight's principal part: FeDeRA (2404.18848, eqs. 3 and 4) and PiSSA (2404.02948).

    W0 = U S Vᵀ,   B0 = U_r (S_r / s)^(1/2)  (d_out, r),   A0 = (S_r / s)^(1/2) V_rᵀ  (r, d_in),   W_res = W0 − s·B0·A0

so W_res + s·B0·A0 is W0 again, to rounding. The decomposition is exact, in float64, and of the two signs that each direction can have
takes the one that makes the largest number of B0's column positive: whoever computes it comes to the same, to rounding, and no seed has
a part in it. Devices that started from different directions would be averaged to nonsense.

A fast one finds the directions by random subspace iteration (Halko, Martinsson & Tropp 2011, 0909.4061, algorithms 4.4 and 5.1). For W0 or
its transpose X (p, q), p <= q, l = r + 10 columns and four iterations:

    Q <- qr(X Ω),  Ω (q, l) drawn;   four times:  Q <- qr(X qr(Xᵀ Q));   Qᵀ X = U' S Vᵀ;   U_r, S_r = the first r of Q U' and of S

Only directions are near and not exact: with those that were found, the equations above hold as they stand. No S_i is above the exact one
(Q Qᵀ projects), and in expectation ‖X − Q Qᵀ X‖₂ <= (1 + √(r/9) + e·√(l·(p − r))/10)^(1/9) · σ_(r+1), their corollary 10.10: 1.5 σ_(r+1)
for 768 × 768 and r = 8. Where l = p it is exact. Ω is the same wherever it is drawn, whatever the experiment's seed, so that each device
comes to the same directions, to rounding: had each drawn its own, W_res would be another weight on each, and averages of A and B nonsense.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from fedloom.seeds import derive

MORE = 10
"""Columns of Ω beyond the rank."""
ITERATIONS = 4


def principal_factors(weight: torch.Tensor, rank: int, scaling: float, fast: bool = False) -> tuple[torch.Tensor, torch.Tensor]:
    """A0 (r, d_in) and B0 (d_out, r), float32, of ``weight`` (d_out, d_in) in any precision; in float64 until then, if ``fast`` too.

    The r highest eigenvectors of W0·W0ᵀ or W0ᵀ·W0, whichever is smaller, are found alone; the other side's directions follow from them.

    A weight of a lower rank than r has no more directions, only what rounding left, which differs from one machine to another. What is not
    above :func:`noise` is therefore missing, and starts as LoRA's own pairs do: B0's column is zero, and A0's row, at right angles to all
    others, is as long as a row that PEFT draws (1/√3), so that training can use it. It is no part of s·B0·A0.

    Raises:
        ValueError: the rank is higher than that of any such matrix.
    """
    highest = min(weight.shape)
    if rank > highest:
        raise ValueError(f"rank {rank} is more than a weight of {weight.shape[0]} × {weight.shape[1]} has; it can be at most {highest}")
    w = weight.detach().double().cpu().numpy()
    wide = w.shape[0] <= w.shape[1]
    s, found = (_near if fast else _exact)(w if wide else w.T, rank)
    kept = int((s > noise(w, float(s[0]), torch.finfo(weight.dtype).eps)).sum())
    s, found = s[:kept], found[:, :kept]
    u, v = (found, w.T @ found / s) if wide else (w @ found / s, found)
    root = np.sqrt(s / scaling) * np.where(u[np.abs(u).argmax(0), np.arange(kept)] < 0, -1.0, 1.0)
    a, b = root * v, root * u
    if kept < rank:
        beside = np.linalg.qr(v, mode="complete")[0][:, kept:rank] / np.sqrt(3)
        a, b = np.hstack([a, beside]), np.hstack([b, np.zeros((len(b), rank - kept))])
    return torch.from_numpy(a.T.copy()).float(), torch.from_numpy(b.copy()).float()


def _exact(x: np.ndarray, rank: int) -> tuple[np.ndarray, np.ndarray]:
    """The ``rank`` highest singular values of X (p, q), p <= q, and their left vectors (p, rank)."""
    from scipy.linalg import eigh  # only this start should wait for it

    squares, found = eigh(x @ x.T, subset_by_index=(len(x) - rank, len(x) - 1))
    return np.sqrt(np.maximum(squares[::-1], 0.0)), found[:, ::-1]


def _near(x: np.ndarray, rank: int) -> tuple[np.ndarray, np.ndarray]:
    """The same, nearly: those of X within the subspace that iterations lead to."""
    q = np.linalg.qr(x @ drawn(x.shape, rank))[0]
    for _ in range(ITERATIONS):
        q = np.linalg.qr(x @ np.linalg.qr(x.T @ q)[0])[0]
    u, s, _ = np.linalg.svd(q.T @ x, full_matrices=False)
    return s[:rank], (q @ u)[:, :rank]


def drawn(shape: Sequence[int], rank: int) -> np.ndarray:
    """Ω for a weight of that shape or its transpose, float64 (the larger side, the rank and 10 but no more than the smaller side). Normal
    numbers in whole 2^-16, so that what the last digit of a logarithm is on one machine or another has no part in them."""
    less, more = sorted(shape)
    numbers = derive(0, "subspace", less, more, rank).standard_normal((more, min(less, rank + MORE)))
    return np.round(numbers * 2**16) / 2**16


def noise(weight: np.ndarray, highest: float, eps: float) -> float:
    """The singular value up to which a direction of a weight (m, n) is what rounding left, the larger of two:

    ε·‖W‖_F·(1/√m + 1/√n)   numbers of relative precision ε, rounded: the largest singular value of a matrix of independent errors of
                            size ε·‖W‖_F/√(mn) is about √m + √n times that
    √(ε₆₄·max(m, n))·σ₁     the squares that are decomposed, to float64's ε₆₄
    """
    m, n = weight.shape
    rounded = eps * float(np.linalg.norm(weight)) * (1 / np.sqrt(m) + 1 / np.sqrt(n))
    return max(rounded, float(np.sqrt(np.finfo(np.float64).eps * max(m, n))) * highest)


def operations(d_out: int, d_in: int, rank: int, fast: bool = False) -> float:
    """Floating-point operations of :func:`principal_factors` and of W_res, a multiplication and an addition being two, as it computes them;
    p the smaller side of the weight and q the larger, terms of lower order left out:

        2p²q        W0·W0ᵀ or W0ᵀ·W0
        4p³/3       its tridiagonal form, by Householder's reflections         (Golub & Van Loan, Matrix Computations, 4th ed., 8.3.1)
        2p²r        r eigenvectors of that, turned back by the reflections     (5.1.6; those of a tridiagonal matrix cost p·r)
        4pqr        the other side's directions, and B0·A0

    A whole decomposition, U, S and V with nothing left out, would be 6p²q + 20p³ (R-SVD, 8.6.3). Of a fast one, of l columns,

        20pql       ten products with l columns: the first, two an iteration, Qᵀ·X       (those with l² are left out)
        4pqr        as above

    >>> operations(768, 768, 8)
    1538260992.0
    >>> operations(768, 768, 8, fast=True)
    231211008.0
    """
    p, q = sorted((d_out, d_in))
    if fast:
        return 4.0 * (ITERATIONS + 1) * p * q * min(p, rank + MORE) + 4 * p * q * rank
    return 2 * p**2 * q + 4 * p**3 / 3 + 2 * p**2 * rank + 4 * p * q * rank
