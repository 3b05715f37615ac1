"""Seconds, taken fairly: contestants take turns, so that whatever else the machine does hits all of them."""

from __future__ import annotations

import gc
import statistics
import time
from collections.abc import Callable, Mapping, Sequence

Contestants = Mapping[str, Callable[[], object]]


def timed(act: Callable[[], object]) -> float:
    """Seconds that one call takes."""
    begun = time.perf_counter()
    act()
    return time.perf_counter() - begun


def interleaved(contestants: Contestants, repeats: int, warm: int = 1) -> dict[str, list[float]]:
    """Seconds of each contestant, ``repeats`` times; ``warm`` calls before are thrown away.

    They take turns, in the order given and then in reverse, so that nobody always comes first. Sample i of one and sample i of
    another are neighbours in time: compare them by :func:`ratio`. Each starts without its predecessor's garbage.
    """
    for _ in range(warm):
        for act in contestants.values():
            act()
    seconds: dict[str, list[float]] = {name: [] for name in contestants}
    gc.collect()
    gc.freeze()  # what is alive now, libraries above all, is looked through no more: a collection then takes no time
    try:
        for i in range(repeats):
            for name in list(contestants) if i % 2 == 0 else reversed(list(contestants)):
                gc.collect()
                seconds[name].append(timed(contestants[name]))
    finally:
        gc.unfreeze()
    return seconds


def ratio(above: Sequence[float], below: Sequence[float]) -> float:
    """The median of the ratios of neighbours in time.

    Raises:
        ValueError: the two do not have the same number of samples.
    """
    return statistics.median(a / b for a, b in zip(above, below, strict=True))
