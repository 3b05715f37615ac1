"""Time to target and bytes to target: what a run had cost when it first reached a score.

A run has reached a target at the first *evaluated* round whose test score is at least as high; its cost there is that of set-up and of all
rounds up to that one; of the personalised score also what devices trained before they predicted there, once: earlier evaluations need not
have been. ``--evaluate-every`` sets how finely this is known: with few evaluations a target is noticed late. Scores between
evaluations are not guessed.

This module does not know run folders.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from statistics import mean
from typing import Any

Row = Mapping[str, Any]

COSTS = ("device_seconds", "bytes_up", "bytes_down")


@dataclass(frozen=True)
class Cost:
    """What a run had cost after a round: simulated device seconds, bytes uploaded and bytes downloaded by all devices, set-up included.

    ``personalising``: the part of the seconds that devices trained before they predicted; None: the run is of an earlier version and does
    not tell it, so it is missing in them.
    """

    round: int
    device_seconds: float
    bytes_up: float
    bytes_down: float
    personalising: float | None = 0.0

    @property
    def at_start(self) -> bool:
        """Whether it was before the first round: what the start, the set-up or a device alone can do is no saving of a method's rounds."""
        return self.round == 0


def costs(rows: Sequence[Row], result: Mapping[str, Any]) -> Iterator[Cost]:
    """The cost so far at each row of ``rounds.jsonl``; ``result`` tells that of set-up."""
    seconds, up, down = (float(result[f"setup_{key}"]) for key in COSTS)
    for row in rows:
        seconds, up, down = seconds + row["device_seconds"], up + row["bytes_up"], down + row["bytes_down"]
        yield Cost(int(row["round"]), seconds, up, down)


def reached(rows: Sequence[Row], result: Mapping[str, Any], protocol: str, target: float) -> Cost | None:
    """The cost at which the protocol's test score first was ``target`` or more; None if it never was."""
    found = next(
        ((r, c) for r, c in zip(rows, costs(rows, result), strict=True) if r[protocol] is not None and r[protocol] >= target), None
    )
    if found is None or protocol != "personalised":
        return found[1] if found else None
    row, cost = found
    own = personalising(row)
    return replace(cost, device_seconds=cost.device_seconds + (own or 0.0), personalising=own)


def personalising(row: Row) -> float | None:
    """Simulated seconds that the slowest device trained before it predicted, at a row or at a result's ``final``; None: not told."""
    told = row.get("personalising")
    return None if told is None else float(told["device_seconds"])


def mean_cost(each: Sequence[Cost | None]) -> tuple[float, float, float] | None:
    """Mean (device seconds, bytes up, bytes down); None unless every run reached the target: a mean over the lucky ones says less than it
    seems to."""
    known = [c for c in each if c is not None]
    if not known or len(known) < len(each):
        return None
    return mean(c.device_seconds for c in known), mean(c.bytes_up for c in known), mean(c.bytes_down for c in known)
