"""What stands in the cells of a comparison's tables: scores, intervals, costs to a target, marks and what they mean."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from fedloom.run.terminal.console import NOTHING, human_bytes, human_seconds, score_text

Cells = Sequence[Sequence[str]]


def spread_text(score: Mapping[str, Any]) -> str:
    """``0.9012 ± 0.005``; without a deviation where there is one seed."""
    deviation = "" if score["deviation"] is None else f" ± {score['deviation']:.3f}"
    return f"{score_text(score['mean'])}{deviation}"


def rank_text(rank: float | None) -> str:
    """A rank or a mean of ranks."""
    return NOTHING if rank is None else f"{rank:.1f}".removesuffix(".0")


def against_texts(found: Mapping[str, Any]) -> list[str]:
    """``+0.0123``, ``[+0.0010, +0.0240]``, ``.031``, ``2 of 3``: difference, interval, p, in how many seeds it is better."""
    interval = f"[{found['low']:+.4f}, {found['high']:+.4f}]"
    return [f"{found['difference']:+.4f}", interval, p_text(found["p"]), f"{found['better']} of {found['seeds']}"]


def p_text(p: float) -> str:
    """Three decimals without the 0 before them; what is smaller is said to be."""
    return "< .001" if p < 0.001 else f"{p:.3f}".removeprefix("0")


def reached_text(found: Mapping[str, Any] | None, key: str) -> str:
    """A cost, or in how many seeds the target was reached, or that it was before the first round; a dash where it is not told."""
    if found is None or key not in found:  # summaries of earlier versions do not tell downloads
        return NOTHING
    if found[key] is not None:
        at_start, mark = found.get("at_start", 0), UNCOUNTED if key == "device_seconds" and found.get("personalising") is None else ""
        if at_start == found["seeds"]:
            return f"before round 1{mark}"
        return (human_seconds if key == "device_seconds" else human_bytes)(found[key]) + mark + (AT_START if at_start else "")
    return "not reached" if not found["reached"] else f"{found['reached']} of {found['seeds']} seeds"


UNCOUNTED = "†"
"""Behind a device time in which what devices train before they predict is missing: runs of earlier versions do not tell it."""
AT_START = "‡"
"""Behind a mean cost to a target that some seeds had reached before the first round: they are in it with next to nothing."""
EDGES = ("↓", "↑")
"""Behind the best of a method's learning rates where it is the lowest or the highest."""
MARKS = {
    UNCOUNTED: "without what devices train before they predict, which these runs do not tell",
    AT_START: "in some seeds before the first round",
    EDGES[0]: "best at the lowest rate, a lower one may be better",
    EDGES[1]: "best at the highest rate, a higher one may be better",
}


def remark(cells: Cells) -> str:
    """What a table's title says of its marks, if there are any."""
    told = [f"{mark}: {text}" for mark, text in MARKS.items() if any(mark in cell for line in cells for cell in line)]
    return f" ({'; '.join(told)})" if told else ""


def saved_text(found: Mapping[str, Any] | None) -> str:
    """The share of the reference's device time that is saved to the target; a dash where there is none to tell."""
    saved = None if found is None else found.get("saved")
    mark = UNCOUNTED if found is not None and found.get("personalising") is None else ""
    return NOTHING if saved is None else f"{saved:.0%}{mark}"


def trained_text(row: Mapping[str, Any]) -> str:
    """The share of the model's numbers that is trained, the head included; a dash where runs do not tell it."""
    share = row.get("trained_share")
    return NOTHING if share is None else f"{share:.2%}"


def own_text(row: Mapping[str, Any]) -> str:
    """How long the slowest device trains before it predicts, after the last round; a dash where runs do not tell it."""
    known = row["costs"].get("personalising_device_seconds")
    return NOTHING if known is None else human_seconds(known) if known else "none"


def whole_text(row: Mapping[str, Any], key: str) -> str:
    """The cost of a whole run, set-up included."""
    costs = row["costs"]
    if costs[key] is None:
        return NOTHING
    return (human_seconds if key == "device_seconds" else human_bytes)(costs[key] + costs[f"setup_{key}"])


def paid_text(setup: Mapping[str, Any], key: str) -> str:
    """After which round the set-up had paid for itself, or in how many of the seeds it had; and how many tell it, if not all do."""
    if setup["paid_back"] is None:
        return NOTHING
    each = list(setup["paid_back"][key].values())
    known = sorted(t for t in each if t is not None)
    told = f" (told by {len(each)} of {setup['seeds']} seeds)" if len(each) < setup.get("seeds", 0) else ""
    if len(known) < len(each):
        return ("never in this run" if not known else f"in {len(known)} of {len(each)} seeds") + told
    return (f"round {known[0]}" if known[0] == known[-1] else f"rounds {known[0]} to {known[-1]}") + told


def rate_text(row: Mapping[str, Any]) -> str:
    """The chosen learning rate; a dash for the method's own, and for none chosen."""
    return NOTHING if row["lr"] is None else f"{row['lr']:g}"


def grid_text(tried: Mapping[str, Any]) -> str:
    """A rate's validation score, or that it diverged."""
    return "diverged" if tried["diverged"] else score_text(tried["validation"])
