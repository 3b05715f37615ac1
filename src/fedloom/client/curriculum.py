"""In which batches a client trains: shuffled, or fixed and easy first. Pure functions of their arguments."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal

import numpy as np

from fedloom.seeds import Part, derive

Pacing = Literal["linear", "sqrt", "quadratic", "exp", "none"]


def shuffled(count: int, size: int, seed: int, *path: Part) -> list[np.ndarray]:
    """Positions 0..count−1 in a seeded order, cut into batches of ``size`` (the last may be smaller)."""
    order = derive(seed, *path).permutation(count)
    return [order[at : at + size] for at in range(0, count, size)]


def fraction(pacing: Pacing, round: int, rounds: int, start: float, full_at: float) -> float:
    """The share of the data that is open in round t of T (FibecFed, 2410.00131).

    β₀ = ``start`` at t = 0, 1 from t = α·T on, α = ``full_at``.

    With x = min(1, t / (α·T)): linear β₀ + (1−β₀)·x; sqrt β₀ + (1−β₀)·√x; quadratic β₀ + (1−β₀)·x²; exp β₀^(1−x); none 1.

    Raises:
        ValueError: β₀ not in (0, 1], α not in (0, 1], or an unknown pacing.
    """
    if not (0 < start <= 1 and 0 < full_at <= 1):
        raise ValueError(f"a curriculum starts at 0 < start <= 1 and is whole at 0 < full_at <= 1; got {start} and {full_at}")
    x = min(1.0, round / (full_at * rounds))
    match pacing:
        case "linear":
            return start + (1 - start) * x
        case "sqrt":
            return start + (1 - start) * math.sqrt(x)
        case "quadratic":
            return start + (1 - start) * x**2
        case "exp":
            return start ** (1 - x)
        case "none":
            return 1.0
    raise ValueError(f"no pacing '{pacing}'; there are linear, sqrt, quadratic, exp, none")


def open_count(share: float, batches: int) -> int:
    """How many of a client's batches are open: ``ceil(share · batches)``, at least one. Float noise below 1e-9 does not open another."""
    return min(batches, max(1, math.ceil(share * batches - 1e-9)))


def easiest_first(batches: Sequence[np.ndarray], difficulty: np.ndarray) -> list[np.ndarray]:
    """Batches by ascending mean difficulty of their examples; equal ones keep their order."""
    means = np.array([difficulty[batch].mean() for batch in batches])
    return [batches[i] for i in np.argsort(means, kind="stable")]


def easiest_examples_first(difficulty: np.ndarray, size: int) -> list[np.ndarray]:
    """Examples by ascending difficulty, then cut into batches of ``size``."""
    order = np.argsort(difficulty, kind="stable")
    return [order[at : at + size] for at in range(0, len(order), size)]
