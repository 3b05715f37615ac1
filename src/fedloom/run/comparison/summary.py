"""What a comparison comes to, as plain JSON (``summary.json``): every table and the page are made of it.

One entry a case (a data set at one α), with one row a method: the search for its rate, its runs, scores over the seeds, ranks, the paired
bootstrap against the reference, what it had cost when it reached the target, its lead over every other method; who is first, and level
with it, once more on the devices alone that took part; and what an answer that reads no text has. This module runs nothing and draws
nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from statistics import mean
from typing import Any

from fedloom.data.numbers import EXACT
from fedloom.data.tasks import FURTHER
from fedloom.run.comparison import standing, statistics, targets
from fedloom.run.comparison.plan import Case, Ended, Plan, Run
from fedloom.run.comparison.standing import PROTOCOLS
from fedloom.run.reading import read, solved

TOTALS = ("bytes_up", "bytes_down", "setup_bytes_up", "setup_bytes_down", "examples", "device_seconds", "setup_device_seconds")
SETUP = ("device_seconds", "flops", "bytes_up", "bytes_down")
PAID = ("bytes_up", "device_seconds")
CHOSEN_BY = "the personalised validation score after the last round, at the first seed"
RESAMPLED = (
    "Paired bootstrap: of each seed independently, as many devices as there are are drawn with replacement, the same for both methods; "
    "the metric after the last round is recomputed from the pooled test predictions of the drawn devices; differences are averaged over "
    "seeds. Seeds and training are not resampled, and nothing is corrected for the number of comparisons."
)

Result = Mapping[str, Any]


def summarise(
    plan: Plan, ended: Mapping[str, Ended], folder: Callable[[Run], Path], reference: str, target: float | None = None
) -> dict[str, Any]:
    """The summary; ``target`` None: the reference's own final score, seed by seed."""
    cases = [_case(plan, case, ended, folder, reference, target) for case in plan.cases]
    return {
        **plan.as_json(),
        "seed_of_search": plan.seeds[0],
        "chosen_by": CHOSEN_BY,
        "reference": reference,
        "target": target,
        "resamples": statistics.RESAMPLES,
        "confidence": statistics.CONFIDENCE,
        "resampled": RESAMPLED,
        "cases": cases,
        "mean_rank": {p: {m: statistics.mean_of_all([_row(c, m)["rank"][p] for c in cases]) for m in plan.methods} for p in PROTOCOLS},
        "failed": {name: how.failure for name, how in ended.items() if how.results is None and not how.diverged},
        "diverged": {name: how.failure for name, how in ended.items() if how.diverged},
    }


def _row(case: Mapping[str, Any], method: str) -> Mapping[str, Any]:
    return next(row for row in case["rows"] if row["method"] == method)


def _case(
    plan: Plan, case: Case, ended: Mapping[str, Ended], folder: Callable[[Run], Path], reference: str, target: float | None
) -> dict[str, Any]:
    runs = {method: plan.chosen(case, method, ended) for method in plan.methods}
    results = {m: {r.experiment.seed: found for r in of if (found := _results(ended, r)) is not None} for m, of in runs.items()}
    goals = {p: _goals(plan, results[reference], p, target) for p in PROTOCOLS}
    path = ("personalised and global alike", plan.labels[case.data], repr(case.alpha))
    drawn = standing.drawn(results, plan.seeds, path)
    rows: list[dict[str, Any]] = []
    told: dict[str, dict[int, Sequence[Mapping[str, Any]]]] = {}
    for method, of in runs.items():
        known, choice = results[method], plan.choice(case, method, ended)
        told[method] = {run.experiment.seed: read(folder(run)).rows for run in of if run.experiment.seed in known}
        rows.append(
            {
                "method": method,
                "lr": choice.rate if choice.made else None,
                "grid": [
                    {"lr": rate, "validation": score, "diverged": bool((how := ended.get(run.name)) and how.diverged)}
                    for (rate, run), score in zip(plan.tries(case, method).items(), choice.tried.values(), strict=True)
                ],
                "runs": {str(run.experiment.seed): folder(run).name for run in of if run.experiment.seed in known},
                "scores": {at: {p: _spread(known.values(), at, p) for p in PROTOCOLS} for at in ("final", "best")}
                | {"start": {p: _start(told[method], p) for p in PROTOCOLS}},
                EXACT: _solved(known.values()),
                FURTHER: _further(known.values()),
                "rank": dict.fromkeys(PROTOCOLS),
                "against": {p: standing.against(drawn, method, reference, p) if method != reference else None for p in PROTOCOLS},
                "reached": {p: _reached(known, told[method], p, goals[p], len(plan.seeds)) for p in PROTOCOLS},
                "over": {},
                "setup": _setup(known),
                "costs": {key: mean(r[key] for r in known.values()) if known else None for key in TOTALS} | _personalising(known),
                "trained_share": _trained(known),
            }
        )
    for p in PROTOCOLS:  # a mean over fewer seeds is not ranked among the others
        whole = [row["scores"]["final"][p]["mean"] if row["scores"]["final"][p]["count"] == len(plan.seeds) else None for row in rows]
        for row, rank in zip(rows, statistics.ranks(whole), strict=True):
            row["rank"][p] = rank
    for row in rows:
        for p, found in row["reached"].items():
            if found is not None and row["method"] != reference:
                found["saved"] = _saved_to_target(found, _row({"rows": rows}, reference)["reached"][p])
        others = [m for m in runs if m != row["method"]]
        row["over"] = {o: {p: _over(plan, row["method"], o, results, told, p) for p in PROTOCOLS} for o in others}
    metrics = sorted({str(r["metric"]) for of in results.values() for r in of.values()})
    told_of = {"data": case.data, "alpha": case.alpha, "label": plan.label(case), "metric": "/".join(metrics), "target": goals}
    stands = {"first": {p: standing.first(rows, drawn, p) for p in PROTOCOLS}, "took_part": standing.took_part(results, plan.seeds, path)}
    stands["commonest"] = standing.beside_the_commonest(drawn, plan.methods, plan.seeds)
    return {**told_of, **stands, "rows": rows}


def _results(ended: Mapping[str, Ended], run: Run) -> Result | None:
    how = ended.get(run.name)
    return how.results if how else None


def _spread(results: Any, at: str, protocol: str) -> dict[str, Any]:
    """Mean, deviation and count, and the scores by seed."""
    each = {str(r["seed"]): r[at][protocol] for r in results}
    return statistics.by_seed(each)


def _start(told: Mapping[int, Sequence[Mapping[str, Any]]], protocol: str) -> dict[str, Any]:
    """The same before the first round, of the seeds that were evaluated there."""
    each = {str(seed): rows[0][protocol] if rows and rows[0]["round"] == 0 else None for seed, rows in told.items()}
    return statistics.by_seed(each)


def _solved(results: Collection[Result]) -> dict[str, Any] | None:
    """The same of exact match, and of what it was before training; None where no run tells any."""
    places = [(at, p) for at in ("final", "best") for p in PROTOCOLS]
    if not any(solved(r[at], p) is not None for r in results for at, p in places):
        return None
    told: dict[str, dict[str, Any]] = {"final": {}, "best": {}}
    for at, p in places:
        each = {str(r["seed"]): solved(r[at], p) for r in results}
        told[at][p] = statistics.by_seed(each)
    each = {str(r["seed"]): (r.get(EXACT) or {}).get("before") for r in results}
    return {**told, "before": statistics.by_seed(each)}


def _further(results: Collection[Result]) -> dict[str, Any] | None:
    """The same of each score beside the headline, by its name; None where no run tells any."""
    names = dict.fromkeys(name for r in results for name in r["final"].get(FURTHER) or ())
    told: dict[str, Any] = {}
    for name in names:
        told[name] = {}
        for at in ("final", "best"):
            values = {p: {str(r["seed"]): ((r[at].get(FURTHER) or {}).get(name) or {}).get(p) for r in results} for p in PROTOCOLS}
            told[name][at] = {p: statistics.by_seed(each) for p, each in values.items()}
    return told or None


def _over(
    plan: Plan,
    method: str,
    other: str,
    results: Mapping[str, Mapping[int, Result]],
    told: Mapping[str, Mapping[int, Sequence[Mapping[str, Any]]]],
    protocol: str,
) -> dict[str, Any] | None:
    """How much higher ``method`` ends than ``other``, and the share of the other's device time to its own end that it saves on the way
    there (None where a seed does not get there, or was there before the first round), and whether what devices train before they
    predict is in both times; None where a seed of either is missing, or either has no such model."""
    mine, theirs = results[method], results[other]
    if not mine.keys() == theirs.keys() == set(plan.seeds):
        return None
    ends = {seed: r["final"][protocol] for seed, r in theirs.items()}
    if any(end is None for end in ends.values()) or any(r["final"][protocol] is None for r in mine.values()):
        return None
    each = [
        [targets.reached(told[m][seed], of[seed], protocol, end) for seed, end in ends.items()]
        for m, of in ((method, mine), (other, theirs))
    ]
    times = [targets.mean_cost(costs) for costs in each]
    return {
        "margin": mean(mine[seed]["final"][protocol] - end for seed, end in ends.items()),
        "time_saved": _saved(*(of[0] if of else None for of in times)) if not any(cost.at_start for cost in each[0] if cost) else None,
        "personalising_counted": all(cost is None or cost.personalising is not None for costs in each for cost in costs),
    }


def _saved(mine: float | None, theirs: float | None) -> float | None:
    """The share of another's device time that is saved."""
    return 1 - mine / theirs if mine is not None and theirs else None


def _setup(known: Mapping[int, Result]) -> dict[str, Any] | None:
    """What the set-up cost in the mean over seeds (None: not told by a run of an earlier version), and after which round it had paid for
    itself by seed (None: not within the run), of those of the ``seeds`` that tell it. None altogether where no run had a set-up."""
    costs = {key: [r.get(f"setup_{key}") for r in known.values()] for key in SETUP}
    if not any(any(costs[key]) for key in SETUP):
        return None
    paid = {str(seed): back for seed, r in known.items() if (back := r.get("setup_paid_back")) is not None}
    return {
        **{key: mean(each) if None not in each else None for key, each in costs.items()},  # type: ignore[type-var]
        "paid_back": {key: {seed: back[key] for seed, back in paid.items()} for key in PAID} if paid else None,
        "seeds": len(known),
    }


def _personalising(known: Mapping[int, Result]) -> dict[str, float | None]:
    """What devices trained before they predicted after the last round, in the mean over seeds; None where a run does not tell it."""
    each = [r["final"].get("personalising") or {} for r in known.values()]
    return {f"personalising_{key}": statistics.mean_of_all([one.get(key) for one in each]) for key in ("flops", "device_seconds")}


def _trained(known: Mapping[int, Result]) -> float | None:
    """The share of the model's numbers that is trained, the head included; None where a run does not tell it."""
    told = [r.get("numbers") for r in known.values()]
    return statistics.mean_of_all([of["trained"] / of["model"] if of else None for of in told])


def _goals(plan: Plan, reference: Mapping[int, Result], protocol: str, target: float | None) -> dict[str, float | None]:
    """The target by seed."""
    if target is not None:
        return {str(seed): target for seed in plan.seeds}
    return {str(seed): reference[seed]["final"][protocol] if seed in reference else None for seed in plan.seeds}


def _reached(
    results: Mapping[int, Result],
    tells: Mapping[int, Sequence[Mapping[str, Any]]],
    protocol: str,
    goals: Mapping[str, float | None],
    seeds: int,
) -> dict[str, Any] | None:
    """When the target was first reached, by seed and, if it was in all ``seeds``, in the mean, and in how many before the first round; None
    where there is nothing to reach or nothing that could."""
    able = [s for s, r in results.items() if r["final"][protocol] is not None and goals[str(s)] is not None]
    if not able:
        return None
    each = {str(s): targets.reached(tells[s], results[s], protocol, goal) for s in able if (goal := goals[str(s)]) is not None}
    together = targets.mean_cost(list(each.values())) if len(each) == seeds else None  # a mean over fewer is of other seeds than another's
    return {
        **dict(zip(targets.COSTS, together or [None] * len(targets.COSTS), strict=True)),
        "personalising": statistics.mean_of_all([cost.personalising for cost in each.values() if cost]) if together else None,
        "reached": sum(cost is not None for cost in each.values()),
        "at_start": sum(cost is not None and cost.at_start for cost in each.values()),
        "saved": None,
        "seeds": seeds,
        "each": {seed: asdict(cost) if cost else None for seed, cost in each.items()},
    }


def _saved_to_target(mine: Mapping[str, Any], reference: Mapping[str, Any] | None) -> float | None:
    """The share of the reference's device time to the same target that is saved; None where either has a seed that does not get there, or
    was there before the first round."""
    if reference is None or mine["at_start"] or reference["at_start"]:
        return None
    return _saved(mine["device_seconds"], reference["device_seconds"])
