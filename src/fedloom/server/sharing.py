"""Which layers devices share, and which stay on each: FibecFed's global aggregation layers (2410.00131), under any method.

    s_l = Σ_k (n_k/n)·s_l^k;   the GAL are the layers of lowest s_l (or highest, or any)

Each round's tasks, and those of predictions, say which layers are shared (:meth:`Sharing.over`). The server's state has those alone, and
what is of no layer; so a method's server sees fewer tensors, and averages them as it does. The device's half: ``client/sharing.py``; the
set-up, which asks for scores if any are needed: ``methods/method.py``.

It does not know methods: their rounds pass through it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal, Protocol, TypeVar

import numpy as np

from fedloom.messages import Asking, Flow, Task, through
from fedloom.seeds import Part, derive
from fedloom.tensors import rounded_up

T = TypeVar("T")

Which = Literal["least", "most", "random"]

LAYERS = "shared_layers"
"""The setting that tells a device which layers are shared."""

GAL = "gal"
"""The fact of the set-up that says which layers are shared."""


class Choice(Protocol):
    """How many layers are chosen, and by what; as FibecFed's ``Gal`` and :class:`Sharing` have it."""

    @property
    def fraction(self) -> float: ...

    @property
    def count(self) -> int: ...

    @property
    def which(self) -> Which: ...


@dataclass(frozen=True)
class Sharing:
    """Which layers of LoRA's pairs devices share; the others stay on each device, and are its own.

    Attributes:
        fraction: share of the adapted layers that are shared at least: rounded up (1: all).
        count: number of shared layers; overrides the fraction when above 0.
        which: those with the least or the most sensitive output, by every device's first batch, or random ones, for which nobody is asked.
    """

    fraction: float = 1.0
    count: int = 0
    which: Which = "least"

    def __post_init__(self) -> None:
        if not (0 < self.fraction <= 1 and self.count >= 0):
            raise ValueError(
                f"a share of the layers above 0 and at most 1 is shared, or a count of 1 or more (0: the fraction says); got fraction "
                f"{self.fraction}, count {self.count}"
            )

    @property
    def some(self) -> bool:
        """Whether layers may stay on devices."""
        return self.fraction < 1 or self.count > 0

    def layers(self, facts: Mapping[str, Any]) -> list[int] | None:
        """Which layers are shared, as the facts of the set-up tell. None: no device is told of it, all that is there is shared."""
        return [int(layer) for layer in facts[GAL]] if self.some else None

    def over(self, flow: Flow[T], facts: Mapping[str, Any]) -> Flow[T]:
        """The same flow, whose devices are told which layers are shared."""
        shared = self.layers(facts)
        return flow if shared is None else through(flow, lambda asking: _told(asking, shared))


def _told(asking: Asking, shared: list[int]) -> Asking:
    def told(task: Task) -> Task:
        return replace(task, settings={**task.settings, LAYERS: shared})

    return replace(asking, tasks=[told(task) for task in asking.tasks])


def how_many(choice: Choice, adapted: int) -> int:
    """How many of the ``adapted`` layers are chosen.

    Raises:
        ValueError: a count or fraction that is not between 1 layer and all of them.
    """
    count = choice.count or rounded_up(choice.fraction, adapted)
    if not 1 <= count <= adapted:
        raise ValueError(f"the GAL must hold 1 to {adapted} layers; fraction {choice.fraction}, count {choice.count} give {count}")
    return count


def choose_gal(scores: np.ndarray, adapted: list[int], choice: Choice, seed: int, *path: Part) -> list[int]:
    """The GAL among the ``adapted`` layers, ascending: as many as ``choice`` says, by score (equal scores: the lower layer first).
    ``scores``: of every layer, float64 (D,); not looked at for a random choice. ``path``: that of a random choice, after the seed.

    Raises:
        ValueError: a count or fraction that is not between 1 layer and all of them.
    """
    count = how_many(choice, len(adapted))
    match choice.which:
        case "least":
            ranked = sorted(adapted, key=lambda layer: (scores[layer], layer))
        case "most":
            ranked = sorted(adapted, key=lambda layer: (-scores[layer], layer))
        case "random":
            ranked = [adapted[i] for i in derive(seed, "gal", *path).permutation(len(adapted))]
        case unknown:
            raise ValueError(f"no GAL choice '{unknown}'; there are least, most, random")
    return sorted(ranked[:count])
