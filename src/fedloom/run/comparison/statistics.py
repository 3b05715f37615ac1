"""What a comparison says beyond single scores: mean and deviation over seeds, ranks, and a paired bootstrap against a reference.

The bootstrap, exactly. For one data set and one α, with methods m and r, seeds 1..S, and of each seed the same K devices for both methods:

    of each seed s, independently, K devices are drawn with replacement from its K devices; both methods get the *same* draw
    d_b = mean over s of  metric(m's predictions on the draw) − metric(r's predictions on the draw),      b = 1..RESAMPLES
    interval: the quantiles (1 − CONFIDENCE)/2 and (1 + CONFIDENCE)/2 of d_b
    p = min(1, 2 · (1 + min(#{d_b ≤ 0}, #{d_b ≥ 0})) / (RESAMPLES + 1))

The metric is pooled, as in the tables: a drawn device brings all its test predictions after the last round, so accuracy, Matthews'
correlation and F1 alike are recomputed from counts. Seeds are *not* resampled, nor is training: the interval says what other devices of
the same kind would have changed, not what other seeds would have. Draws derive from the data, α and seed alone, so they are the same for
every method and whoever else is compared. p is of one comparison; nothing is corrected for how many there are.

This module does not know run folders.
"""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from dataclasses import asdict, dataclass
from statistics import mean, stdev
from typing import Any

import numpy as np

from fedloom.data.tasks import headline
from fedloom.seeds import Part, derive

RESAMPLES = 20_000
"""So many that an end of an interval moves by some .0001 from stream to stream (at 2,000 by .0004, which has decided who is level)."""
CONFIDENCE = 0.95

AT_ONCE = 4_000_000
"""Numbers drawn or counted at a time: memory does not grow with the number of devices, methods or classes."""


@dataclass(frozen=True)
class Spread:
    """Mean and sample standard deviation (None of fewer than two) of ``count`` known values; mean None when none is known."""

    mean: float | None
    deviation: float | None
    count: int


@dataclass(frozen=True)
class Paired:
    """Method minus reference: the observed difference (mean over seeds), its interval, p, and in how many of the seeds it was better."""

    difference: float
    low: float
    high: float
    p: float
    better: int
    seeds: int


def spread(values: Sequence[float | None]) -> Spread:
    """Of the values that are known."""
    known = [v for v in values if v is not None]
    return Spread(mean(known) if known else None, stdev(known) if len(known) > 1 else None, len(known))


def by_seed(each: Mapping[str, float | None]) -> dict[str, Any]:
    """Mean, deviation and count of what is known, and ``each`` by seed, as summaries tell them."""
    return {**asdict(spread(list(each.values()))), "each": dict(each)}


def ranks(scores: Sequence[float | None]) -> list[float | None]:
    """1 for the highest score; equals share the mean of their places; None for None.

    >>> ranks([0.5, 0.9, None, 0.5])
    [2.5, 1.0, None, 2.5]
    """
    known = [s for s in scores if s is not None]
    return [None if s is None else 1 + sum(o > s for o in known) + (known.count(s) - 1) / 2 for s in scores]


def mean_of_all(each: Sequence[float | None]) -> float | None:
    """The mean; None where one is missing, or all: means over different cases or seeds cannot be compared."""
    known = [one for one in each if one is not None]
    return mean(known) if known and len(known) == len(each) else None


def tallies(confusion: Sequence[Sequence[Sequence[int]]], classes: int) -> np.ndarray:
    """(K, 3, C) from each device's cells ``[true, predicted, examples]``: predicted and right, of this class, predicted as it."""
    made = np.zeros((len(confusion), 3, classes), np.int64)
    for device, cells in enumerate(confusion):
        for true, predicted, count in cells:
            made[device, 1, true] += count
            made[device, 2, predicted] += count
            if true == predicted:
                made[device, 0, true] += count
    return made


def tallies_of(result: Mapping[str, Any], protocol: str) -> np.ndarray | None:
    """Those of a run's result; None where it has no such model, or was made before results held confusions."""
    told = [device.get("confusion", {}).get(protocol) for device in result["per_device"]]
    return None if any(cells is None for cells in told) else tallies(told, max(2, len(result["partition"]["classes"])))


def resampled(counts: Sequence[np.ndarray], metric: str, path: Sequence[Part], resamples: int = RESAMPLES) -> list[np.ndarray]:
    """For each (K, 3, C) of ``counts`` the metric on the same draws of K devices with replacement, (resamples,)."""
    devices = len(counts[0])
    flat = np.stack([one.reshape(devices, -1) for one in counts])
    rng, scores, step = derive(0, "bootstrap", *path), [], max(1, AT_ONCE // max(devices, flat.shape[0] * flat.shape[2]))
    for at in range(0, resamples, step):
        times = rng.multinomial(devices, np.full(devices, 1 / devices), size=min(step, resamples - at))
        drawn = (times @ flat).reshape(len(counts), len(times), 3, -1)
        scores.append(headline(metric, drawn[:, :, 0], drawn[:, :, 1], drawn[:, :, 2]))
    return list(np.concatenate(scores, 1))


class Bootstrap:
    """Scores of several runs' predictions on the same draws of devices, made once; any two of them are then compared.

    Attributes:
        names: whom it knows, as they were given.
    """

    def __init__(
        self, counts: Mapping[Any, Mapping[int, np.ndarray]], metric: str, path: Sequence[Part], resamples: int = RESAMPLES
    ) -> None:
        """``counts``: (K, 3, C) of each by seed; K may differ between seeds.

        Raises:
            ValueError: no seed, not the same seeds, or another number of devices.
        """
        shapes = [{seed: of.shape for seed, of in each.items()} for each in counts.values()]
        if not shapes or not shapes[0] or any(other != shapes[0] for other in shapes):
            raise ValueError(f"a paired bootstrap needs all methods on the same devices; (devices, 3, classes) by seed: {shapes}")
        self.names, self.resamples, self._observed = tuple(counts), resamples, dict[Hashable, list[float]]()
        drawn: dict[Hashable, list[np.ndarray]] = {name: [] for name in counts}
        for seed in sorted(shapes[0]):
            for name, scores in zip(counts, resampled([of[seed] for of in counts.values()], metric, [*path, seed], resamples), strict=True):
                drawn[name].append(scores)
                self._observed.setdefault(name, []).append(float(headline(metric, *counts[name][seed].sum(0))))
        self._drawn = {name: np.stack(each) for name, each in drawn.items()}

    def scores(self, name: Hashable) -> list[float]:
        """Its score on all the devices, seed by seed in order."""
        return self._observed[name]

    def against(self, mine: Hashable, other: Hashable) -> Paired:
        """The one minus the other, as the module's docstring says."""
        observed = [one - two for one, two in zip(self._observed[mine], self._observed[other], strict=True)]
        drawn = (self._drawn[mine] - self._drawn[other]).mean(0)
        low, high = np.quantile(drawn, [(1 - CONFIDENCE) / 2, (1 + CONFIDENCE) / 2]).tolist()
        beyond = 1 + min(int((drawn <= 0).sum()), int((drawn >= 0).sum()))
        p = min(1.0, 2 * beyond / (self.resamples + 1))
        return Paired(mean(observed), low, high, p, sum(d > 0 for d in observed), len(observed))
