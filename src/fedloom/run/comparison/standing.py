"""How the methods of one case stand to each other: the paired bootstrap between any two, who is first, whom it does not separate from the
first; and all of it once more on those devices alone that took part.

Beside them stands an answer that reads no text: each device gives its own commonest training label to everything. Where labels are skewed
it scores high, and a method that is not above it has shown that it knows the devices' labels, and nothing about the texts.

A device that no round drew predicts with private parts that were never trained, where a method has such parts, while a method that trains
before it predicts trains there too. The second reading leaves such devices out, for everybody. This module runs nothing and draws nothing.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict
from typing import Any, Literal

import numpy as np

from fedloom.data.tasks import METRICS
from fedloom.run.comparison.statistics import Bootstrap, by_seed, spread, tallies_of
from fedloom.seeds import Part

Protocol = Literal["personalised", "global"]
PROTOCOLS: tuple[Protocol, ...] = ("personalised", "global")

COMMONEST = "own commonest label"
"""What tables call the answer that reads no text."""

Results = Mapping[str, Mapping[int, Mapping[str, Any]]]
"""Of each method its results by seed."""


def drawn(results: Results, seeds: Sequence[int], path: Sequence[Part]) -> Bootstrap | None:
    """Every (method, protocol) that has all the ``seeds`` and, of each, its predictions, on the same draws of devices; None if none has.
    With them (:data:`COMMONEST`, personalised), where labels are what is predicted."""
    known = {(m, p): found for m, of in results.items() for p in PROTOCOLS if (found := _tallies(of, seeds, p))}
    whole = [of for m, of in results.items() if (m, "personalised") in known]
    unread = {seed: found for seed in seeds if whole and (found := unread_of(whole[0][seed])) is not None}
    return _of({**known, **({(COMMONEST, "personalised"): unread} if len(unread) == len(seeds) else {})}, results, path)


def unread_of(result: Mapping[str, Any]) -> np.ndarray | None:
    """(K, 3, C) as :func:`~fedloom.run.comparison.statistics.tallies`, of the answer that reads no text: each device's commonest training
    label, the first of equals, to all of its test examples. None where no label is predicted, or predictions or labels are not told."""
    counted = tallies_of(result, "personalised") if result["metric"] in METRICS else None
    labels = [device.get("labels") for device in result["per_device"]]
    if counted is None or any(of is None for of in labels):
        return None
    devices, given = np.arange(len(labels)), np.array([np.argmax(of) for of in labels])
    made = np.zeros_like(counted)
    made[:, 1] = counted[:, 1]
    made[devices, 0, given] = counted[devices, 1, given]
    made[devices, 2, given] = counted[:, 1].sum(1)
    return made


def beside_the_commonest(known: Bootstrap | None, methods: Iterable[str], seeds: Sequence[int]) -> dict[str, Any] | None:
    """The ``score`` of the answer that reads no text, by seed in ``each``, and each method against it (``over``: the method minus it, None
    where it cannot be computed). None where there is no such answer."""
    unread = (COMMONEST, "personalised")
    if known is None or unread not in known.names:
        return None
    each = dict(zip(map(str, sorted(seeds)), known.scores(unread), strict=True))
    return {
        "score": by_seed(each),
        "over": {m: against(known, m, COMMONEST, "personalised") for m in methods},
    }


def against(known: Bootstrap | None, mine: str, other: str, protocol: str) -> dict[str, Any] | None:
    """The one minus the other; None where a seed or the predictions of either are missing, or either has no such model."""
    pair = (mine, protocol), (other, protocol)
    return asdict(known.against(*pair)) if known and all(one in known.names for one in pair) else None


def first(rows: Sequence[Mapping[str, Any]], known: Bootstrap | None, protocol: str) -> dict[str, Any] | None:
    """The method of rank 1 (of equals the first named), the paired bootstrap of each other one against it, and ``level``: those that this
    does not separate from it, and itself. Whom it cannot be computed of is not level. None where nothing is ranked."""
    ranked = {row["method"]: row["rank"][protocol] for row in rows if row["rank"][protocol] is not None}
    if not ranked:
        return None
    best = min(ranked, key=lambda method: ranked[method])
    found = {m: against(known, m, best, protocol) for m in ranked if m != best}
    return {"method": best, "against": found, "level": [m for m in ranked if m == best or ((of := found[m]) and of["high"] >= 0)]}


def took_part(results: Results, seeds: Sequence[int], path: Sequence[Part]) -> dict[str, Any] | None:
    """Personalised scores on the devices that took part in a round of every method that has rounds with devices: their ``devices`` and how
    many there are (``of``) by seed, each method's ``scores``, who is first and who level with it.

    None where everybody took part or nobody did, or the predictions are not told. A method of which no device took part (``centralised``)
    decides nothing about who did.
    """
    counts = {m: found for m, of in results.items() if (found := _tallies(of, seeds, "personalised"))}
    part = {seed: [_participants(of[seed]) for m, of in results.items() if m in counts] for seed in seeds}
    who = {seed: np.flatnonzero(np.all([one for one in each if one.any()] or [each[0]], axis=0)) for seed, each in part.items() if each}
    whole = {seed: len(each[0]) for seed, each in part.items() if each}
    if not counts or any(not len(of) for of in who.values()) or all(len(who[seed]) == whole[seed] for seed in seeds):
        return None
    known = _of({m: {seed: of[seed][who[seed]] for seed in seeds} for m, of in counts.items()}, results, (*path, "took part"))
    assert known is not None
    means = {m: spread(known.scores(m)) for m in counts}
    best = max(counts, key=lambda m: means[m].mean or 0.0)
    found = {m: asdict(known.against(m, best)) for m in counts if m != best}
    return {
        "devices": {str(seed): len(of) for seed, of in who.items()},
        "of": {str(seed): count for seed, count in whole.items()},
        "scores": {m: asdict(of) for m, of in means.items()},
        "method": best,
        "against": found,
        "level": [m for m in counts if m == best or found[m]["high"] >= 0],
    }


def _of(counts: Mapping[Any, Mapping[int, np.ndarray]], results: Results, path: Sequence[Part]) -> Bootstrap | None:
    metric = next((str(r["metric"]) for of in results.values() for r in of.values()), "")
    return Bootstrap(counts, metric, path) if counts else None


def _tallies(of: Mapping[int, Mapping[str, Any]], seeds: Sequence[int], protocol: str) -> dict[int, np.ndarray] | None:
    """By seed; None unless every seed is there and tells them."""
    found = {seed: counted for seed in seeds if seed in of and (counted := tallies_of(of[seed], protocol)) is not None}
    return found if len(found) == len(seeds) else None


def _participants(result: Mapping[str, Any]) -> np.ndarray:
    """(K,): whether each device took part in any round."""
    return np.array([device["participations"] > 0 for device in result["per_device"]])
