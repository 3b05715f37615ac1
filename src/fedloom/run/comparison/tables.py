"""The tables of a comparison, from its summary: lines for a terminal, ``comparison.csv``, ``comparison.md``, ``comparison.tex``.

This module computes nothing and knows no run folder.
"""

from __future__ import annotations

import csv
import io
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

NO_SCORE: Mapping[str, Any] = {p: {"mean": None} for p in PROTOCOLS}

SPECIAL = {
    "\\": r"\textbackslash{}", "{": r"\{", "}": r"\}", "$": r"\$", "&": r"\&", "%": r"\%", "#": r"\#", "_": r"\_",
    "~": r"\textasciitilde{}", "^": r"\textasciicircum{}", "α": r"$\alpha$", "±": r"$\pm$", "<": r"\textless{}", ">": r"\textgreater{}",
    "†": r"\dag{}", "‡": r"\ddag{}",
}  # fmt: skip
"""What LaTeX reads otherwise than it is written."""

TEX_COLUMNS: Mapping[str, Sequence[str]] = {"scores": (*PROTOCOLS, "rank (global)"), EXACT: PROTOCOLS}
"""What the tabular has of a case: of its scores, and of exact match where it is told."""


def setup_row(row: Mapping[str, Any]) -> list[str]:
    """A method's line in the table of set-ups."""
    setup = row["setup"]
    forms = {"device_seconds": human_seconds, "flops": "{:.3g}".format}
    costs = [NOTHING if setup[key] is None else forms.get(key, human_bytes)(setup[key]) for key in SETUP]
    return [row["method"], *costs, *(paid_text(setup, key) for key in ("bytes_up", "device_seconds"))]


def labelled(results: Sequence[Mapping[str, Any]], plan: Plan) -> list[dict[str, Any]]:
    """The results, each with its case and seed beside the method's name where there are several."""
    labels = {case: f"{plan.label(case)}: " if len(plan.cases) > 1 else "" for case in plan.cases}
    made = []
    for result in results:
        case = Case(result["experiment"]["data"], result["experiment"]["alpha"])
        seed = f", seed {result['seed']}" if len(plan.seeds) > 1 else ""
        made.append({**result, "method": f"{labels[case]}{result['method']}{seed}"})
    return made


def terminal(summary: Summary) -> list[tuple[str, Sequence[str], Cells]]:
    """(title, headers, rows) of each table: those of a case's scores, differences and costs, then the searches and the mean ranks. Narrow
    enough for a terminal of 80 columns."""
    shown: list[tuple[str, Sequence[str], Cells]] = []
    seeds, searched = len(summary["seeds"]), len(summary["rates"]) > 1
    for case in summary["cases"]:
        lr, some = ["lr"] if searched else [], ["seeds"] if any(len(row["runs"]) < seeds for row in case["rows"]) else []
        title = f"{case['label']}: test {case['metric']} after the last round"
        title += f", mean ± standard deviation over {seeds} seeds" if seeds > 1 else ""
        rows = []
        for row in case["rows"]:
            final, best = row["scores"]["final"], row["scores"]["best"]
            cells = [row["method"], *([rate_text(row)] if lr else []), *([str(len(row["runs"]))] if some else [])]
            ranks = [rank_text(row["rank"][p]) for p in PROTOCOLS]
            rows.append([*cells, *(spread_text(final[p]) for p in PROTOCOLS), spread_text(best["personalised"]), "{} ({})".format(*ranks)])
        if unread := case.get("commonest"):
            rows.append(
                [COMMONEST, *([NOTHING] if lr else []), *([str(seeds)] if some else []), spread_text(unread["score"]), *[NOTHING] * 3]
            )
        shown.append((title, ["method", *lr, *some, *PROTOCOLS, "personalised\nbest", "rank\n(global)"], rows))
        for p in PROTOCOLS:
            if rows := [[row["method"], *against_texts(found)] for row in case["rows"] if (found := row["against"][p])]:
                title = f"{case['label']}: {p} score against {summary['reference']} (paired bootstrap over devices)"
                shown.append((title, ["method", "difference", f"{summary['confidence']:.0%} interval", "p", "better in"], rows))
        if unread and (rows := [[m, *against_texts(found)] for m, found in unread["over"].items() if found]):
            title = f"{case['label']}: personalised score against each device's {COMMONEST}, which reads no text"
            shown.append((title, ["method", "difference", f"{summary['confidence']:.0%} interval", "p", "better in"], rows))
        if rows := [
            brought_row(row) for row in case["rows"] if (row["scores"].get("start") or NO_SCORE)["personalised"]["mean"] is not None
        ]:
            title = f"{case['label']}: personalised test {case['metric']} before the first round, and what the rounds brought"
            shown.append((title, ("method", "before round 1", "after the last", "brought"), rows))
        if part := case.get("took_part"):
            headers = ("method", "personalised", f"against\n{part['method']}", f"{summary['confidence']:.0%} interval", "p")
            shown.append(
                (
                    took_part_title(case),
                    headers,
                    [took_part_row(part, row["method"]) for row in case["rows"] if row["method"] in part["scores"]],
                )
            )
        for name in further_names(case):
            title = f"{case['label']}: test {name}, beside {case['metric']}"
            rows = [further_row(row, name) for row in case["rows"] if name in (row.get(FURTHER) or {})]
            shown.append((title, ["method", *PROTOCOLS, "personalised\nbest"], rows))
        if rows := [solved_row(row) for row in case["rows"] if row.get(EXACT)]:
            title = f"{case['label']}: exact match of numbers written to test prompts"
            shown.append((title, ["method", "before\ntraining", *PROTOCOLS, "personalised\nbest"], rows))
    for case in summary["cases"]:
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
            headers = ("method", "device\ntime", "FLOPs", "up", "down", "paid in\nuploads", "paid in\ndevice time")
            shown.append((title, headers, rows))
    if searched:
        headers = ("", "method", *(f"lr {rate:g}" for rate in summary["rates"]))
        rows = [[case["label"], row["method"], *grid_texts(row)] for case in summary["cases"] for row in case["rows"]]
        title = f"Search: validation score, personalised, after the last round, seed {summary['seed_of_search']}{remark(rows)}"
        shown.append((title, headers, rows))
    if len(summary["cases"]) > 1:
        ranks = summary["mean_rank"]
        rows = [[m, *(rank_text(ranks[p][m]) for p in PROTOCOLS)] for m in summary["methods"]]
        shown.append((f"Mean rank over {len(summary['cases'])} cases", ("method", *PROTOCOLS), rows))
    return shown


def whole_row(row: Mapping[str, Any]) -> list[str]:
    """A method's line in the table of what whole runs cost."""
    seconds, up, down = (whole_text(row, key) for key in COSTS)
    return [row["method"], seconds, own_text(row), up, down, trained_text(row)]


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


def as_csv(summary: Summary) -> str:
    """One line a case and method; numbers in full, nothing where nothing is known."""
    lines = []
    for case in summary["cases"]:
        for row in case["rows"]:
            line: dict[str, Any] = {"data": case["data"], "alpha": case["alpha"], "metric": case["metric"], "method": row["method"]}
            line |= {"lr": row["lr"], "seeds": len(row["runs"])}
            for at in ("final", "best"):
                for p in PROTOCOLS:
                    line |= {f"{at}_{p}_{what}": row["scores"][at][p][what] for what in ("mean", "deviation")}
            start = (row["scores"].get("start") or NO_SCORE)["personalised"]
            line |= {f"start_personalised_{what}": start.get(what) for what in ("mean", "deviation")}
            if tells(summary):
                told = row.get(EXACT)
                places = {f"{at}_{p}": told[at][p] if told else {} for at in ("final", "best") for p in PROTOCOLS}
                places["before"] = told["before"] if told else {}
                line |= {f"{EXACT}_{at}_{what}": of.get(what) for at, of in places.items() for what in ("mean", "deviation")}
            for name in dict.fromkeys(name for of in summary["cases"] for name in further_names(of)):
                told = (row.get(FURTHER) or {}).get(name)
                each = {f"{at}_{p}": told[at][p] if told else {} for at in ("final", "best") for p in PROTOCOLS}
                line |= {f"{FURTHER}_{name}_{at}_{what}": of.get(what) for at, of in each.items() for what in ("mean", "deviation")}
            line |= {f"rank_{p}": row["rank"][p] for p in PROTOCOLS}
            part = ((case.get("took_part") or {}).get("scores") or {}).get(row["method"]) or {}
            line |= {f"took_part_personalised_{what}": part.get(what) for what in ("mean", "deviation")}
            for p in PROTOCOLS:
                found = row["against"][p] or dict.fromkeys(("difference", "low", "high", "p", "better"))
                line |= {f"{p}_against_reference_{key}": found[key] for key in ("difference", "low", "high", "p", "better")}
            unread = case.get("commonest") or {"score": {}, "over": {}}
            line |= {f"commonest_personalised_{what}": unread["score"].get(what) for what in ("mean", "deviation")}
            found = unread["over"].get(row["method"]) or {}
            line |= {f"personalised_against_commonest_{key}": found.get(key) for key in ("difference", "low", "high", "p", "better")}
            for p in PROTOCOLS:
                cost: Mapping[str, Any] = row["reached"][p] or dict.fromkeys((*COSTS, "reached"))
                line |= {f"{p}_to_target_{key}": cost[key] for key in (*COSTS, "reached")}
                line |= {f"{p}_to_target_{key}": cost.get(key) for key in ("at_start", "saved")}
                line |= {f"{p}_to_target_personalising_device_seconds": cost.get("personalising")} if p == "personalised" else {}
            line |= row["costs"] | {"trained_share": row.get("trained_share")}
            setup = row.get("setup") or {}
            line["setup_flops"] = setup.get("flops")
            for key in ("bytes_up", "device_seconds"):
                paid = list(((setup.get("paid_back") or {}).get(key) or {}).values())
                line[f"setup_paid_back_{key}"] = sum(paid) / len(paid) if len(paid) == setup.get("seeds") and None not in paid else None
            line["grid"] = " ".join(f"{t['lr']!r}:{grid_text(t) if t['diverged'] else t['validation']}" for t in row["grid"] if t["lr"])
            lines.append({key: "" if value is None else value for key, value in line.items()})
    out = io.StringIO()
    writer = csv.DictWriter(out, list(lines[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows(lines)
    return out.getvalue()


def leads(summary: Summary) -> tuple[str, Sequence[str], Cells]:
    """(title, headers, rows): whom each method leads by most, in score and in device time to where the other ends; of the global model too
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


def escaped(text: str) -> str:
    r"""Text as LaTeX sets it, outside its mathematics.

    >>> print(escaped("50% of my_data & α"))
    50\% of my\_data \& $\alpha$
    """
    return "".join(SPECIAL.get(letter, letter) for letter in text)


def as_tex(summary: Summary) -> str:
    """Two ``tabular``: scores, and what it cost to reach the target. No package is needed."""
    return f"{scores_tex(summary)}\n{costs_tex(summary)}"


def costs_tex(summary: Summary) -> str:
    """A ``tabular`` with a part a case and in it one row a method: device time, uploads and downloads to the target, of the personalised
    model and, where any reaches anything, of the global one."""
    every = [row["reached"] for case in summary["cases"] for row in case["rows"]]
    shown = [p for p in PROTOCOLS if p == "personalised" or any(reached[p] for reached in every)]
    parts, marked = [], []
    for case in summary["cases"]:
        rows = [[row["method"], *(reached_text(row["reached"][p], key) for p in shown for key in COSTS)] for row in case["rows"]]
        parts += [rf"\multicolumn{{{1 + 3 * len(shown)}}}{{l}}{{{escaped(case['label'])}}} \\", *map(_tex_line, rows), r"\hline"]
        marked += rows
    goals = [f"% {case['label']}: {goal_text(summary, case, p)}" for case in summary["cases"] for p in shown]
    return "\n".join(
        [
            f"% fedloom compare: means over seeds of what it cost to reach{remark(marked)}",
            *goals,
            rf"\begin{{tabular}}{{l{'rrr' * len(shown)}}}",
            r"\hline",
            " & ".join(["", *(rf"\multicolumn{{3}}{{c}}{{{p}}}" for p in shown)]) + r" \\",
            " & ".join(["method", *["device time", "uploaded", "downloaded"] * len(shown)]) + r" \\",
            r"\hline",
            *parts,
            r"\end{tabular}",
            "",
        ]
    )


def _tex_line(cells: Sequence[str]) -> str:
    return " & ".join(escaped(cell) for cell in cells) + r" \\"


def scores_tex(summary: Summary) -> str:
    """A ``tabular`` with one row a method: both protocols of each case, of the score with its rank (that of the global model in brackets)
    and, where it is told, of exact match, then the mean ranks.

    The highest mean of a column is bold, of those over all seeds. A plus or minus above a score: its interval against the reference does
    not hold 0. Below them what reads no text.
    """
    cases, methods, sure = summary["cases"], list(summary["methods"]), f"{summary['confidence']:.0%} interval"
    several = len(cases) > 1
    parts = [(case, key) for case in cases for key in ("scores", EXACT) if key == "scores" or any(row.get(EXACT) for row in case["rows"])]
    names = [(len(TEX_COLUMNS[key]), case["label"] + ("" if key == "scores" else ", exact match")) for case, key in parts]
    lines = [
        f"% fedloom compare: test scores after the last round, mean and standard deviation over {len(summary['seeds'])} seeds",
        f"% + and -: 0 lies outside the {sure} against {summary['reference']} ({summary['resamples']} resamples)",
        f"% {summary['resampled']}",
        rf"\begin{{tabular}}{{l{'r' * sum(width for width, _ in names)}{'rr' if several else ''}}}",
        r"\hline",
        " & ".join(["", *(rf"\multicolumn{{{width}}}{{c}}{{{escaped(name)}}}" for width, name in names)])
        + (r" & \multicolumn{2}{c}{mean rank}" if several else "")
        + r" \\",
        " & ".join(["method", *(column for _, key in parts for column in TEX_COLUMNS[key]), *PROTOCOLS * several]) + r" \\",
        r"\hline",
    ]
    for i, method in enumerate(methods):
        cells = [cell for case, key in parts for cell in _tex_cells(case["rows"], i, key, len(summary["seeds"]))]
        ranks = [rank_text(summary["mean_rank"][p][method]) for p in PROTOCOLS] if several else []
        lines.append(" & ".join([escaped(method), *cells, *ranks]) + r" \\")
    if any(case.get("commonest") for case in cases):
        unread = [tex_score(of["score"]) if key == "scores" and (of := case.get("commonest")) else "--" for case, key in parts]
        cells = [cell for score, (width, _) in zip(unread, names, strict=True) for cell in (score, *["--"] * (width - 1))]
        cells += ["--"] * (2 * several)
        lines += [r"\hline", " & ".join([COMMONEST, *cells]) + r" \\"]
    return "\n".join([*lines, r"\hline", r"\end{tabular}", ""])


def tex_score(score: Mapping[str, Any]) -> str:
    """Mean and deviation as LaTeX sets them."""
    return f"{score['mean']:.3f}" + ("" if score["deviation"] is None else rf" $\pm$ {score['deviation']:.3f}")


def _tex_cells(rows: Sequence[Mapping[str, Any]], i: int, key: str, seeds: int) -> list[str]:
    """A method's cells of a case's part; ``key``: of scores, which have ranks, or of exact match."""
    cells, ranks = [_tex_cell(rows, i, p, key, seeds) for p in PROTOCOLS], rows[i]["rank"]
    return cells if key == EXACT else [*cells, "{} ({})".format(*(rank_text(ranks[p]) for p in PROTOCOLS))]


def _tex_cell(rows: Sequence[Mapping[str, Any]], i: int, protocol: str, key: str, seeds: int) -> str:
    each = [row[key]["final"][protocol] if row.get(key) else {"mean": None} for row in rows]
    score, found = each[i], rows[i]["against"][protocol] if key == "scores" else None
    if score["mean"] is None:
        return "--"
    whole = [middle for of in each if (middle := of["mean"]) is not None and of["count"] == seeds]
    text = tex_score(score)
    sign = "" if found is None else "+" if found["low"] > 0 else "-" if found["high"] < 0 else ""
    return (rf"\textbf{{{text}}}" if score["count"] == seeds and score["mean"] == max(whole) else text) + (f"$^{{{sign}}}$" if sign else "")
