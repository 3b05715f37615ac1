"""One picture of a comparison's cases: where every method ends in each of them, in either protocol.

It draws the cases of ``summary.json`` and nothing else, on a report and beside a page alike.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import matplotlib.axes
import matplotlib.figure
import numpy as np

from fedloom.run.comparison.standing import COMMONEST, PROTOCOLS
from fedloom.run.pages.drawing import INK, Kind, point, render

ROW = 0.5
"""Inches that a case is high; its methods stand one below the other on ``SPREAD`` of them."""
SPREAD = 0.72


def standings(cases: Sequence[Mapping[str, Any]], methods: Sequence[str], kind: Kind = "svg") -> bytes:
    """Each method's mean test score after the last round, with one standard deviation over seeds to either side; a row a case, personalised
    on the left, global on the right. A tick is what an answer that reads no text has.

    ``cases`` are those of a summary, ``methods`` what of them is drawn, in the order of the legend.
    """
    places = np.linspace(-SPREAD / 2, SPREAD / 2, len(methods)) if len(methods) > 1 else np.zeros(1)

    def draw(figure: matplotlib.figure.Figure) -> None:
        panels = figure.subplots(1, len(PROTOCOLS), sharey=True)
        for ax, protocol in zip(panels, PROTOCOLS, strict=True):
            _rows(ax, cases, protocol, methods, places)
        handles, labels = panels[0].get_legend_handles_labels()
        figure.legend(handles, labels, loc="outside lower left", ncols=5, fontsize=8)

    return render(draw, kind, width=8.2, height=1.1 + ROW * len(cases) + 0.19 * ((len(methods) + 1) // 5 + 1))


def _rows(ax: matplotlib.axes.Axes, cases: Sequence[Mapping[str, Any]], protocol: str, methods: Sequence[str], places: np.ndarray) -> None:
    """One protocol's half. A method without a score in a case has no point there."""
    for i, (method, place) in enumerate(zip(methods, places, strict=True)):
        colour, marker, filling = point(i)
        found = [(y, _final(case, method, protocol)) for y, case in enumerate(cases)]
        shown = [(y + place, score["mean"], score["deviation"] or 0.0) for y, score in found if score["mean"] is not None]
        ys, means, deviations = (np.array([one[at] for one in shown], float) for at in range(3))
        ax.hlines(ys, means - deviations, means + deviations, color=colour, linewidth=0.8, alpha=0.6)
        look = {"linestyle": "none", "color": colour, "marker": marker, "markersize": 4, "fillstyle": filling}
        ax.plot(means, ys, **look, label=method, clip_on=not shown)  # one without points that is not clipped would reach to the corner
    unread = [(y, case["commonest"]["score"]["mean"]) for y, case in enumerate(cases) if case.get("commonest")]
    if unread and protocol == "personalised":
        at, scores = np.array(unread, float).T
        ax.vlines(scores, at - 0.44, at + 0.44, color=INK, linewidth=1.5, label=COMMONEST)
    ax.set_title(protocol.capitalize())
    ax.set_xlabel("test score after the last round")
    ax.set_yticks(
        range(len(cases)), [case["label"] if case["metric"] == "accuracy" else f"{case['label']} ({case['metric']})" for case in cases]
    )
    ax.set_ylim(len(cases) - 0.5, -0.5)
    for edge in range(1, len(cases)):
        ax.axhline(edge - 0.5, color=INK, linewidth=0.5, alpha=0.35)
    ax.grid(False, axis="y")


def _final(case: Mapping[str, Any], method: str, protocol: str) -> Mapping[str, Any]:
    return next(row for row in case["rows"] if row["method"] == method)["scores"]["final"][protocol]
