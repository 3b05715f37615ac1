"""The tables of a comparison, from its summary: lines for a terminal, and ``comparison.md``.

``as_csv.py`` and ``as_tex.py`` have what programs and papers read. These modules compute nothing and know no run folder.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from statistics import mean
from typing import Any

from fedloom.data.numbers import EXACT
from fedloom.data.tasks import FURTHER
from fedloom.run.comparison.cells import (
    EDGES,
    UNCOUNTED,
    Cells,
    against_texts,
    grid_text,
    own_text,
    paid_text,
    rank_text,
    rate_text,
    reached_text,
    remark,
    saved_text,
    spread_text,
    trained_text,
    whole_text,
)
from fedloom.run.comparison.plan import Case, Plan
from fedloom.run.comparison.standing import COMMONEST, PROTOCOLS
from fedloom.run.comparison.summary import SETUP
from fedloom.run.comparison.targets import COSTS
from fedloom.run.terminal.console import NOTHING, human_bytes, human_seconds

Summary = Mapping[str, Any]
Table = tuple[str, Sequence[str], Cells]
"""Title, headers, rows."""

NO_SCORE: Mapping[str, Any] = {p: {"mean": None} for p in PROTOCOLS}


def labelled(results: Sequence[Mapping[str, Any]], plan: Plan) -> list[dict[str, Any]]:
    """The results, each with its case and seed beside the method's name where there are several."""
    labels = {case: f"{plan.label(case)}: " if len(plan.cases) > 1 else "" for case in plan.cases}
    made = []
    for result in results:
        case = Case(result["experiment"]["data"], result["experiment"]["alpha"])
        seed = f", seed {result['seed']}" if len(plan.seeds) > 1 else ""
        made.append({**result, "method": f"{labels[case]}{result['method']}{seed}"})
    return made


def terminal(summary: Summary) -> list[Table]:
    """Those of a case's scores and differences, case by case, then those of costs, then the searches and the mean ranks. Narrow enough for
    a terminal of 80 columns."""
    cases = summary["cases"]
    shown = [table for case in cases for table in score_tables(summary, case)] + [
        table for case in cases for table in cost_tables(summary, case)
    ]
    if len(summary["rates"]) > 1:
        headers = ("", "method", *(f"lr {rate:g}" for rate in summary["rates"]))
        rows = [[case["label"], row["method"], *grid_texts(row)] for case in cases for row in case["rows"]]
        title = f"Search: validation score, personalised, after the last round, seed {summary['seed_of_search']}{remark(rows)}"
        shown.append((title, headers, rows))
    if len(cases) > 1:
        ranks = summary["mean_rank"]
        rows = [[m, *(rank_text(ranks[p][m]) for p in PROTOCOLS)] for m in summary["methods"]]
        shown.append((f"Mean rank over {len(cases)} cases", ("method", *PROTOCOLS), rows))
    return shown


def score_tables(summary: Summary, case: Mapping[str, Any]) -> list[Table]:
    """A case's scores; each method against the reference and against what reads no text; what the rounds brought; the devices alone that
    took part; scores beside the headline; exact match."""
    shown: list[Table] = []
    seeds, label, metric, interval = len(summary["seeds"]), case["label"], case["metric"], f"{summary['confidence']:.0%} interval"
    lr, some = ["lr"] if len(summary["rates"]) > 1 else [], ["seeds"] if any(len(row["runs"]) < seeds for row in case["rows"]) else []
    title = f"{label}: test {metric} after the last round" + (f", mean ± standard deviation over {seeds} seeds" if seeds > 1 else "")
    rows = []
    for row in case["rows"]:
        final, best = row["scores"]["final"], row["scores"]["best"]
        cells = [row["method"], *([rate_text(row)] if lr else []), *([str(len(row["runs"]))] if some else [])]
        ranks = [rank_text(row["rank"][p]) for p in PROTOCOLS]
        rows.append([*cells, *(spread_text(final[p]) for p in PROTOCOLS), spread_text(best["personalised"]), "{} ({})".format(*ranks)])
    if unread := case.get("commonest"):
        cells = [COMMONEST, *([NOTHING] if lr else []), *([str(seeds)] if some else [])]
        rows.append([*cells, spread_text(unread["score"]), *[NOTHING] * 3])
    shown.append((title, ["method", *lr, *some, *PROTOCOLS, "personalised\nbest", "rank\n(global)"], rows))
    against = ("method", "difference", interval, "p", "better in")
    for p in PROTOCOLS:
        if rows := [[row["method"], *against_texts(found)] for row in case["rows"] if (found := row["against"][p])]:
            shown.append((f"{label}: {p} score against {summary['reference']} (paired bootstrap over devices)", against, rows))
    if unread and (rows := [[m, *against_texts(found)] for m, found in unread["over"].items() if found]):
        shown.append((f"{label}: personalised score against each device's {COMMONEST}, which reads no text", against, rows))
    if rows := [brought_row(row) for row in case["rows"] if (row["scores"].get("start") or NO_SCORE)["personalised"]["mean"] is not None]:
        title = f"{label}: personalised test {metric} before the first round, and what the rounds brought"
        shown.append((title, ("method", "before round 1", "after the last", "brought"), rows))
    if part := case.get("took_part"):
        headers = ("method", "personalised", f"against\n{part['method']}", interval, "p")
        rows = [took_part_row(part, row["method"]) for row in case["rows"] if row["method"] in part["scores"]]
        shown.append((took_part_title(case), headers, rows))
    for name in further_names(case):
        rows = [further_row(row, name) for row in case["rows"] if name in (row.get(FURTHER) or {})]
        shown.append((f"{label}: test {name}, beside {metric}", ["method", *PROTOCOLS, "personalised\nbest"], rows))
    if rows := [solved_row(row) for row in case["rows"] if row.get(EXACT)]:
        headers = ["method", "before\ntraining", *PROTOCOLS, "personalised\nbest"]
        shown.append((f"{label}: exact match of numbers written to test prompts", headers, rows))
    return shown


def cost_tables(summary: Summary, case: Mapping[str, Any]) -> list[Table]:
    """What it cost in a case to reach the target, what whole runs cost, and what set-ups did."""
    shown: list[Table] = []
    for p in PROTOCOLS:
        each = [(row["method"], row["reached"][p]) for row in case["rows"]]
        rows = [[m, *(reached_text(of, key) for key in COSTS), saved_text(of)] for m, of in each]
        if p == "personalised" or any(of is not None for _, of in each):
            title = f"{case['label']}: cost to reach {goal_text(summary, case, p)}{remark(rows)}"
            shown.append((title, ("method", "device time", "uploaded", "downloaded", "device time\nsaved"), rows))
    rows = [whole_row(row) for row in case["rows"]]
    title = f"{case['label']}: cost of the whole run, and the share of the model that adapter and head are"
    shown.append((title, ("method", "device time", "before a\nprediction", "uploaded", "downloaded", "trained"), rows))
    if rows := [setup_row(row) for row in case["rows"] if row.get("setup")]:
        title = f"{case['label']}: set-up, and after which round it has paid for itself against plain LoRA"
        shown.append((title, ("method", "device\ntime", "FLOPs", "up", "down", "paid in\nuploads", "paid in\ndevice time"), rows))
    return shown


def whole_row(row: Mapping[str, Any]) -> list[str]:
    """A method's line in the table of what whole runs cost."""
    seconds, up, down = (whole_text(row, key) for key in COSTS)
    return [row["method"], seconds, own_text(row), up, down, trained_text(row)]


def setup_row(row: Mapping[str, Any]) -> list[str]:
    """A method's line in the table of set-ups."""
    setup = row["setup"]
    forms = {"device_seconds": human_seconds, "flops": "{:.3g}".format}
    costs = [NOTHING if setup[key] is None else forms.get(key, human_bytes)(setup[key]) for key in SETUP]
    return [row["method"], *costs, *(paid_text(setup, key) for key in ("bytes_up", "device_seconds"))]


def brought_row(row: Mapping[str, Any]) -> list[str]:
    """A method's line in the table of what it has before the first round; what the rounds brought is of the seeds that tell both."""
    start, final = (row["scores"][at]["personalised"] for at in ("start", "final"))
    each = [final["each"][seed] - of for seed, of in start["each"].items() if of is not None and final["each"][seed] is not None]
    return [row["method"], spread_text(start), spread_text(final), f"{mean(each):+.4f}" if each else NOTHING]


def took_part_title(case: Mapping[str, Any]) -> str:
    """What is scored, and on how many devices seed by seed."""
    part = case["took_part"]
    counts, whole = (_each(list(part[key].values())) for key in ("devices", "of"))
    some = f"{counts} of {whole}" + (" by seed" if len(part["devices"]) > 1 else "")
    return f"{case['label']}: personalised test {case['metric']} on the devices alone that took part ({some})"


def _each(counts: Sequence[int]) -> str:
    """One number where all are the same, else all of them."""
    return ", ".join(map(str, counts if len(set(counts)) > 1 else counts[:1]))


def took_part_row(part: Mapping[str, Any], method: str) -> list[str]:
    """A method's line in the table of devices that took part."""
    found = part["against"].get(method)
    return [method, spread_text(part["scores"][method]), *(against_texts(found)[:3] if found else [NOTHING] * 3)]


def solved_row(row: Mapping[str, Any]) -> list[str]:
    """A method's line in the table of exact match."""
    told = row[EXACT]
    return [
        row["method"],
        *(spread_text(of) for of in (told["before"], *(told["final"][p] for p in PROTOCOLS), told["best"]["personalised"])),
    ]


def further_names(case: Mapping[str, Any]) -> list[str]:
    """The scores beside the headline that any method of the case tells."""
    return list(dict.fromkeys(name for row in case["rows"] for name in row.get(FURTHER) or ()))


def further_row(row: Mapping[str, Any], name: str) -> list[str]:
    """A method's line in the table of a score beside the headline."""
    told = row[FURTHER][name]
    return [row["method"], *(spread_text(told["final"][p]) for p in PROTOCOLS), spread_text(told["best"]["personalised"])]


def tells(summary: Summary) -> bool:
    """Whether any method of any case tells exact match."""
    return any(row.get(EXACT) for case in summary["cases"] for row in case["rows"])


def goal_text(summary: Summary, case: Mapping[str, Any], protocol: str) -> str:
    """What is to be reached."""
    if summary["target"] is not None:
        return f"a {protocol} score of {summary['target']:g}"
    each = [goal for goal in case["target"][protocol].values() if goal is not None]
    if not each:
        return f"what {summary['reference']} ends with, which is not known"
    how = "seed by seed; " if len(each) > 1 else ""
    return f"what {summary['reference']} ends with ({protocol}; {how}{mean(each):.4f}{' in the mean' if how else ''})"


def grid_texts(row: Mapping[str, Any]) -> list[str]:
    """A method's line in the table of searches, the best rate marked where it is an end of the grid and no other is as good."""
    rates, scores = sorted(t["lr"] for t in row["grid"] if t["lr"] is not None), [t["validation"] for t in row["grid"]]
    alone = scores.count(max((s for s in scores if s is not None), default=None)) == 1
    marks = dict(zip((rates[0], rates[-1]), EDGES, strict=True)) if alone and len(rates) > 1 else {}
    return [grid_text(t) + (f" {marks[t['lr']]}" if t["lr"] == row["lr"] and t["lr"] in marks else "") for t in row["grid"]]


def leads(summary: Summary) -> Table:
    """Whom each method leads by most, in score and in device time to where the other ends; of the global model too
    where any method has one that another's can be set against."""
    every = [row for case in summary["cases"] for row in case["rows"]]
    shown = [p for p in PROTOCOLS if p == "personalised" or any(found[p] for row in every for found in row["over"].values())]
    rows = [
        [case["label"], row["method"], *(text for p in shown for text in lead_texts(row, p))]
        for case in summary["cases"]
        for row in case["rows"]
    ]
    title = f"Largest leads: score, and device time to where the other method ends{remark(rows)}"
    return title, ("", "method", *(text for p in shown for text in (f"{p} above (whom)", f"{p}: device time saved (whom)"))), rows


def lead_texts(row: Mapping[str, Any], protocol: str) -> list[str]:
    """A method's largest margin and its largest saving, each with over whom."""
    over = {other: found[protocol] for other, found in row["over"].items() if found[protocol]}
    cells = []
    for key, form in (("margin", "+.4f"), ("time_saved", ".0%")):
        known = {other: found[key] for other, found in over.items() if found[key] is not None and found[key] > 0}
        best = max(known, key=lambda other: known[other], default=None)
        mark = "" if best is None or key == "margin" or over[best].get("personalising_counted") else UNCOUNTED
        cells.append(NOTHING if best is None else f"{known[best]:{form}}{mark} ({best})")
    return cells


def as_markdown(summary: Summary) -> str:
    """Every table of the terminal and the largest leads, as Markdown."""
    parts = []
    for title, headers, rows in [*terminal(summary), leads(summary)]:
        lines = [[str(cell).replace("|", r"\|").replace("\n", " ") for cell in line] for line in (headers, ["---"] * len(headers), *rows)]
        parts.append("\n".join([f"**{title}**", "", *(f"| {' | '.join(line)} |" for line in lines)]))
    return "\n\n".join(parts) + "\n"
