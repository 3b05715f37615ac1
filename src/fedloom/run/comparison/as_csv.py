"""``comparison.csv``: a comparison for programs, one line a case and method, numbers in full."""

from __future__ import annotations

import csv
import io
from collections.abc import Mapping
from typing import Any

from fedloom.data.numbers import EXACT
from fedloom.data.tasks import FURTHER
from fedloom.run.comparison.cells import grid_text
from fedloom.run.comparison.standing import PROTOCOLS
from fedloom.run.comparison.tables import NO_SCORE, Summary, further_names
from fedloom.run.comparison.targets import COSTS

AGAINST = ("difference", "low", "high", "p", "better")


def as_csv(summary: Summary) -> str:
    """Nothing stands where nothing is known. Every line has the same columns: what any method of any case tells."""
    solved = any(row.get(EXACT) for case in summary["cases"] for row in case["rows"])
    further = list(dict.fromkeys(name for case in summary["cases"] for name in further_names(case)))
    lines = [
        {"data": case["data"], "alpha": case["alpha"], "metric": case["metric"], "method": row["method"]}
        | {"lr": row["lr"], "seeds": len(row["runs"])}
        | _scores(row, solved, further)
        | {f"rank_{p}": row["rank"][p] for p in PROTOCOLS}
        | _standing(case, row)
        | _costs(row)
        | {"grid": " ".join(f"{t['lr']!r}:{grid_text(t) if t['diverged'] else t['validation']}" for t in row["grid"] if t["lr"])}
        for case in summary["cases"]
        for row in case["rows"]
    ]
    out = io.StringIO()
    writer = csv.DictWriter(out, list(lines[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows({key: "" if value is None else value for key, value in line.items()} for line in lines)
    return out.getvalue()


def _scores(row: Mapping[str, Any], solved: bool, further: list[str]) -> dict[str, Any]:
    """Means and deviations: of the headline, of what it was before the first round, of exact match if any tells it, of further scores."""
    places = [(at, p) for at in ("final", "best") for p in PROTOCOLS]
    told = {f"{at}_{p}": row["scores"][at][p] for at, p in places}
    told["start_personalised"] = (row["scores"].get("start") or NO_SCORE)["personalised"]
    if solved:
        mine = row.get(EXACT)
        told |= {f"{EXACT}_{at}_{p}": mine[at][p] if mine else {} for at, p in places}
        told[f"{EXACT}_before"] = mine["before"] if mine else {}
    for name in further:
        mine = (row.get(FURTHER) or {}).get(name)
        told |= {f"{FURTHER}_{name}_{at}_{p}": mine[at][p] if mine else {} for at, p in places}
    return {f"{name}_{what}": of.get(what) for name, of in told.items() for what in ("mean", "deviation")}


def _standing(case: Mapping[str, Any], row: Mapping[str, Any]) -> dict[str, Any]:
    """On the devices alone that took part; against the reference; what reads no text, and against that."""
    part = ((case.get("took_part") or {}).get("scores") or {}).get(row["method"]) or {}
    told = {f"took_part_personalised_{what}": part.get(what) for what in ("mean", "deviation")}
    for p in PROTOCOLS:
        found = row["against"][p] or {}
        told |= {f"{p}_against_reference_{key}": found.get(key) for key in AGAINST}
    unread = case.get("commonest") or {"score": {}, "over": {}}
    told |= {f"commonest_personalised_{what}": unread["score"].get(what) for what in ("mean", "deviation")}
    found = unread["over"].get(row["method"]) or {}
    return told | {f"personalised_against_commonest_{key}": found.get(key) for key in AGAINST}


def _costs(row: Mapping[str, Any]) -> dict[str, Any]:
    """To the target, of the whole run, of the set-up and after how many rounds in the mean it had paid."""
    told: dict[str, Any] = {}
    for p in PROTOCOLS:
        cost = row["reached"][p] or {}
        told |= {f"{p}_to_target_{key}": cost.get(key) for key in (*COSTS, "reached", "at_start", "saved")}
        told |= {f"{p}_to_target_personalising_device_seconds": cost.get("personalising")} if p == "personalised" else {}
    setup = row.get("setup") or {}
    told |= row["costs"] | {"trained_share": row.get("trained_share"), "setup_flops": setup.get("flops")}
    for key in ("bytes_up", "device_seconds"):
        paid = list(((setup.get("paid_back") or {}).get(key) or {}).values())
        told[f"setup_paid_back_{key}"] = sum(paid) / len(paid) if len(paid) == setup.get("seeds") and None not in paid else None
    return told
