"""``comparison.tex``: a comparison for papers, two ``tabular`` that no package is needed for."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from fedloom.data.numbers import EXACT
from fedloom.run.comparison.cells import rank_text, reached_text, remark
from fedloom.run.comparison.standing import COMMONEST, PROTOCOLS
from fedloom.run.comparison.tables import Summary, goal_text
from fedloom.run.comparison.targets import COSTS

SPECIAL = {
    "\\": r"\textbackslash{}", "{": r"\{", "}": r"\}", "$": r"\$", "&": r"\&", "%": r"\%", "#": r"\#", "_": r"\_",
    "~": r"\textasciitilde{}", "^": r"\textasciicircum{}", "α": r"$\alpha$", "±": r"$\pm$", "<": r"\textless{}", ">": r"\textgreater{}",
    "†": r"\dag{}", "‡": r"\ddag{}",
}  # fmt: skip
"""What LaTeX reads otherwise than it is written."""

COLUMNS: Mapping[str, Sequence[str]] = {"scores": (*PROTOCOLS, "rank (global)"), EXACT: PROTOCOLS}
"""What the tabular has of a case: of its scores, and of exact match where it is told."""


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
        parts += [rf"\multicolumn{{{1 + 3 * len(shown)}}}{{l}}{{{escaped(case['label'])}}} \\", *map(_line, rows), r"\hline"]
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


def _line(cells: Sequence[str]) -> str:
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
    names = [(len(COLUMNS[key]), case["label"] + ("" if key == "scores" else ", exact match")) for case, key in parts]
    lines = [
        f"% fedloom compare: test scores after the last round, mean and standard deviation over {len(summary['seeds'])} seeds",
        f"% + and -: 0 lies outside the {sure} against {summary['reference']} ({summary['resamples']} resamples)",
        f"% {summary['resampled']}",
        rf"\begin{{tabular}}{{l{'r' * sum(width for width, _ in names)}{'rr' if several else ''}}}",
        r"\hline",
        " & ".join(["", *(rf"\multicolumn{{{width}}}{{c}}{{{escaped(name)}}}" for width, name in names)])
        + (r" & \multicolumn{2}{c}{mean rank}" if several else "")
        + r" \\",
        " & ".join(["method", *(column for _, key in parts for column in COLUMNS[key]), *PROTOCOLS * several]) + r" \\",
        r"\hline",
    ]
    for i, method in enumerate(methods):
        cells = [cell for case, key in parts for cell in _cells(case["rows"], i, key, len(summary["seeds"]))]
        ranks = [rank_text(summary["mean_rank"][p][method]) for p in PROTOCOLS] if several else []
        lines.append(" & ".join([escaped(method), *cells, *ranks]) + r" \\")
    if any(case.get("commonest") for case in cases):
        unread = [score_text(of["score"]) if key == "scores" and (of := case.get("commonest")) else "--" for case, key in parts]
        cells = [cell for score, (width, _) in zip(unread, names, strict=True) for cell in (score, *["--"] * (width - 1))]
        cells += ["--"] * (2 * several)
        lines += [r"\hline", " & ".join([COMMONEST, *cells]) + r" \\"]
    return "\n".join([*lines, r"\hline", r"\end{tabular}", ""])


def score_text(score: Mapping[str, Any]) -> str:
    """Mean and deviation as LaTeX sets them."""
    return f"{score['mean']:.3f}" + ("" if score["deviation"] is None else rf" $\pm$ {score['deviation']:.3f}")


def _cells(rows: Sequence[Mapping[str, Any]], i: int, key: str, seeds: int) -> list[str]:
    """A method's cells of a case's part; ``key``: of scores, which have ranks, or of exact match."""
    cells, ranks = [_cell(rows, i, p, key, seeds) for p in PROTOCOLS], rows[i]["rank"]
    return cells if key == EXACT else [*cells, "{} ({})".format(*(rank_text(ranks[p]) for p in PROTOCOLS))]


def _cell(rows: Sequence[Mapping[str, Any]], i: int, protocol: str, key: str, seeds: int) -> str:
    each = [row[key]["final"][protocol] if row.get(key) else {"mean": None} for row in rows]
    score, found = each[i], rows[i]["against"][protocol] if key == "scores" else None
    if score["mean"] is None:
        return "--"
    whole = [middle for of in each if (middle := of["mean"]) is not None and of["count"] == seeds]
    text = score_text(score)
    sign = "" if found is None else "+" if found["low"] > 0 else "-" if found["high"] < 0 else ""
    return (rf"\textbf{{{text}}}" if score["count"] == seeds and score["mean"] == max(whole) else text) + (f"$^{{{sign}}}$" if sign else "")


def escaped(text: str) -> str:
    r"""Text as LaTeX sets it, outside its mathematics.

    >>> print(escaped("50% of my_data & α"))
    50\% of my\_data \& $\alpha$
    """
    return "".join(SPECIAL.get(letter, letter) for letter in text)
