"""The arithmetic of dealing rows to clients: whole shares, Dirichlet draws that cannot underflow, packing.

Knows nothing of what the rows are; ``partition.py`` composes these into ways to partition.
"""

from __future__ import annotations

import heapq
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from fedloom.seeds import derive


def apportion(total: int, weights: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """``total`` split into whole parts in proportion to ``weights``, each within 1 of its exact share (largest remainder).

    Weights are whole numbers of at least 0 with a positive sum, so that shares and ties are exact on every machine; equal
    remainders are settled by ``rng``. Result: int64, as ``weights``.
    """
    parts, remainder = np.divmod(total * weights.astype(np.int64), int(weights.sum()))
    order = np.lexsort((rng.random(len(weights)), -remainder))
    parts[order[: total - int(parts.sum())]] += 1
    return parts


def draw_sizes(rows: int, clients: int, beta: float, minimum: int, seed: int) -> np.ndarray:
    """Device sizes ~ Dirichlet(beta) that add up to ``rows``; those under ``minimum`` are lifted to it, the others pay."""
    rng = derive(seed, "partition", "sizes")
    log_share = log_gamma(rng, np.full(clients, beta))
    share = 1 + np.floor(np.exp(log_share - log_share.max()) * 2**30).astype(np.int64)  # exact from here on, and never 0
    lifted = np.zeros(clients, bool)
    while True:  # each turn lifts at least one; the largest share is never among them, since rows >= clients * minimum
        free = rows - minimum * int(lifted.sum())
        low = ~lifted & (free * share < minimum * int(share[~lifted].sum()))
        if not low.any():
            break
        lifted |= low
    sizes = np.full(clients, minimum)
    sizes[~lifted] = apportion(free, share[~lifted], rng)
    return sizes


def log_gamma(rng: np.random.Generator, shape: np.ndarray) -> np.ndarray:
    """Logarithms of Gamma(shape) variates, which normalised are a Dirichlet draw; -inf where shape is 0.

    G(a) = G(a + 1) U^(1/a) in logarithms: for a << 1 the variates themselves underflow to 0 and their order would be lost.
    """
    safe = np.where(shape > 0, shape, 1.0)
    log = np.log(rng.standard_gamma(safe + 1.0)) + np.log1p(-rng.random(len(safe))) / safe
    return np.where(shape > 0, log, -np.inf)


def pack(ordered: Sequence[Any], sizes: Mapping[Any, int], clients: int, seed: int) -> dict[Any, int]:
    """Value -> device: the largest first, each to the device that has fewest rows; equals in a seeded order."""
    shuffled = [ordered[i] for i in derive(seed, "partition", "pack").permutation(len(ordered))]
    loads, device = [(0, k) for k in range(clients)], {}
    for value in sorted(shuffled, key=lambda value: -sizes[value]):
        load, device[value] = heapq.heappop(loads)
        heapq.heappush(loads, (load + sizes[value], device[value]))
    return device


def deal(labels: np.ndarray, counts: np.ndarray, seed: int, split: str) -> np.ndarray:
    """The owner of every row, rows of label c dealt at random so that client k gets ``counts[k, c]``."""
    owner = np.empty(len(labels), np.int64)
    for label in range(counts.shape[1]):
        rows = np.flatnonzero(labels == label)
        derive(seed, "partition", "rows", split, label).shuffle(rows)
        owner[rows] = np.repeat(np.arange(len(counts)), counts[:, label])
    return owner


def group(owner: np.ndarray, clients: int) -> tuple[np.ndarray, ...]:
    """Per client, the sorted rows it owns."""
    bounds = np.cumsum(np.bincount(owner, minlength=clients))[:-1]
    return tuple(np.split(np.argsort(owner, kind="stable").astype(np.int64), bounds))
