"""Curricula: what a device trains on in which round. A curriculum is a value that any method's local training can take.

The files of ``curricula/`` hold one paper each; here is the protocol that they share and the pure functions that they are made of. A
curriculum sees its own device only: its examples, its memory, the tensors that it was given, and the clock (round t of T). It knows
neither methods nor engines, and nothing of it leaves the device.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Sequence
from typing import Any, Literal, NamedTuple, Protocol, runtime_checkable

import numpy as np

from fedloom.client.client import Client
from fedloom.data.examples import Examples
from fedloom.messages import Tensors, Work
from fedloom.seeds import Part, derive
from fedloom.tensors import rounded_up

Pacing = Literal["linear", "sqrt", "quadratic", "exp", "none"]
Granularity = Literal["batch", "example", "unsorted"]


class Turn(NamedTuple):
    """One participation of a device: in round ``round`` of ``rounds``, ``epochs`` local epochs in batches of ``size`` examples.

    ``reshuffle``: a curriculum that shuffles does so anew in every round and epoch, and otherwise once and for ever.
    """

    round: int
    rounds: int
    epochs: int
    size: int
    reshuffle: bool = True


class Opened(NamedTuple):
    """What a device trains on: batches of all local epochs in order, as positions into ``examples`` (which may be cut shorter)."""

    examples: Examples
    batches: list[np.ndarray]


@runtime_checkable
class Curriculum(Protocol):
    """The protocol of a curriculum: a frozen dataclass whose fields are its settings. The package's own also have the class
    attributes ``name`` (its name on the command line) and ``paper``."""

    def prepare(self, c: Client, at: Tensors, round: int, trained: Collection[str] = ()) -> Work[None]:
        """What must be known of the examples before :meth:`open`; kept in ``c.memory``, so that it is computed when it is due and no
        oftener. ``at``: the tensors of the device's model; ``trained``: those of them that it is about to train, if not all. Whatever takes
        work is yielded as work items."""
        ...

    def open(self, c: Client, turn: Turn) -> Opened:
        """What is trained on in this turn. At the end of its pacing that is everything."""
        ...

    def facts(self, rounds: int) -> dict[str, Any]:
        """What is worth telling of it, as plain JSON values: ``pacing``, the share open in each round, and ``opens``, what it is a share
        of: "batches" (if it is not said), easy ones first, "batches as cut", "examples", or "length", which is the way from the shortest
        texts to whole ones. Nothing if everything is open all the time."""
        ...


# ---- batches ----------------------------------------------------------------------------------------------------------------


def shuffled(count: int, size: int, seed: int, *path: Part) -> list[np.ndarray]:
    """Positions 0..count−1 in a seeded order, cut into batches of ``size`` (the last may be smaller)."""
    order = derive(seed, *path).permutation(count)
    return [order[at : at + size] for at in range(0, count, size)]


def shuffled_epochs(c: Client, turn: Turn, positions: np.ndarray | None = None) -> list[np.ndarray]:
    """The batches of all local epochs over the device's examples, or over those at ``positions``, each epoch in its seeded order."""
    count = len(c.train) if positions is None else len(positions)
    paths = [(turn.round, epoch) if turn.reshuffle else () for epoch in range(turn.epochs)]
    batches = [batch for path in paths for batch in shuffled(count, turn.size, c.seed, "batches", c.id, *path)]
    return batches if positions is None else [positions[batch] for batch in batches]


def easy_first(c: Client, difficulty: np.ndarray, share: float, turn: Turn, granularity: Granularity) -> Opened:
    """The ``share`` of the device's batches that is easiest, easy ones first, in each local epoch. ``difficulty``: (n,).

    ``granularity``: batches are cut once per device, by seed, and sorted; or the examples are sorted and then cut; or the batches stay
    unsorted, the same ones in the same order for ever: what easy first is compared with.
    """
    match granularity:
        case "batch":
            batches = easiest_first(shuffled(len(c.train), turn.size, c.seed, "batches", c.id), difficulty)
        case "example":
            batches = easiest_examples_first(difficulty, turn.size)
        case "unsorted":
            batches = shuffled(len(c.train), turn.size, c.seed, "batches", c.id)
        case unknown:
            raise ValueError(f"no granularity '{unknown}'; there are batch, example, unsorted")
    return Opened(c.train, batches[: open_count(share, len(batches))] * turn.epochs)


def told(shares: list[float], granularity: Granularity) -> dict[str, Any]:
    """The facts of a curriculum that opens these shares of batches in rounds 1, 2, ..."""
    return {"pacing": shares, **({"opens": "batches as cut"} if granularity == "unsorted" else {})}


def easiest_first(batches: Sequence[np.ndarray], difficulty: np.ndarray) -> list[np.ndarray]:
    """Batches by ascending mean difficulty of their examples; equal ones keep their order."""
    means = np.array([difficulty[batch].mean() for batch in batches])
    return [batches[i] for i in np.argsort(means, kind="stable")]


def easiest_examples_first(difficulty: np.ndarray, size: int) -> list[np.ndarray]:
    """Examples by ascending difficulty, then cut into batches of ``size``."""
    order = np.argsort(difficulty, kind="stable")
    return [order[at : at + size] for at in range(0, len(order), size)]


# ---- pacing -----------------------------------------------------------------------------------------------------------------


def insist_on_shares(**shares: float) -> None:
    """See that settings are shares, for a curriculum that is being made.

    Raises:
        ValueError: one is not in (0, 1].
    """
    for name, share in shares.items():
        if not 0 < share <= 1:
            raise ValueError(f"{name} is {share}; it must be a share, 0 < {name} <= 1")


def elapsed(round: int, rounds: int, full_at: float) -> float:
    """How much of the pacing is over in round t of T: x = min(1, t / (α·T)), α = ``full_at``.

    Raises:
        ValueError: α not in (0, 1], or T not positive.
    """
    insist_on_shares(full_at=full_at)
    if not rounds > 0:
        raise ValueError(f"a curriculum takes at least one round to be whole; got {rounds}")
    return min(1.0, round / (full_at * rounds))


def fraction(pacing: Pacing, round: int, rounds: int, start: float, full_at: float) -> float:
    """The share of the data that is open in round t of T (FibecFed, 2410.00131).

    β₀ = ``start`` at t = 0, 1 from t = α·T on, α = ``full_at``.

    With x = min(1, t / (α·T)): linear β₀ + (1−β₀)·x; sqrt β₀ + (1−β₀)·√x; quadratic β₀ + (1−β₀)·x²; exp β₀^(1−x); none 1.

    Raises:
        ValueError: β₀ not in (0, 1], α not in (0, 1], or an unknown pacing.
    """
    insist_on_shares(start=start)
    x = elapsed(round, rounds, full_at)
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
    return min(batches, max(1, rounded_up(share, batches)))
