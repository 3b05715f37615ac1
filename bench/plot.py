"""One picture of all figures that have a bound: how many times better than the bound each is."""

from __future__ import annotations

from collections.abc import Sequence

import matplotlib.figure
from matplotlib.patches import Patch
from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator

from bench.figure import told
from bench.row import Row
from fedloom.run.pages.drawing import INK, Kind, render

COLOURS = {"aim": "#009e73", "met": "#0072b2", "missed": "#d55e00"}
WORDS = {"aim": "reaches the aim", "met": "keeps the bound", "missed": "misses the bound"}
WIDTH, HEIGHT = 8.0, 0.27
"""Inches: of the picture, and of one bar."""


def times_better(row: Row, value: float) -> float:
    """``value`` against the row's bound: 2 is twice as good as it has to be, 0.5 half as good."""
    assert row.at_least is not None
    return value / row.at_least if row.better == "more" else row.at_least / value


def drawable(rows: Sequence[Row]) -> list[Row]:
    """The rows that have a positive value and a bound."""
    return [row for row in rows if row.value is not None and row.value > 0 and row.at_least]


def picture(rows: Sequence[Row], kind: Kind) -> bytes:
    """Bars from the bound (1) to the value, logarithmic; a tick where the aim is."""
    shown = drawable(rows)

    def draw(figure: matplotlib.figure.Figure) -> None:
        ax = figure.add_subplot()
        ends = [1.0]
        for place, row in enumerate(shown):
            assert row.value is not None
            reached, aim = times_better(row, row.value), None if row.aim is None else times_better(row, row.aim)
            ax.barh(place, reached - 1, left=1, height=0.62, color=COLOURS[row.verdict()])
            if aim is not None:
                ax.plot([aim, aim], [place - 0.42, place + 0.42], color=INK, linewidth=1.5)
            beside, shift, side = (min(reached, 1), -4, "right") if reached < 1 else (max(reached, aim or 1), 4, "left")
            label = {"textcoords": "offset points", "va": "center", "ha": side, "fontsize": 7}
            ax.annotate(told(row.value, row.unit), (beside, place), (shift, 0), **label)
            ends += [reached, aim or 1]
        ax.set_xscale("log")
        ax.set_xlim(min(ends) / 1.8, max(ends) * 1.8)
        ax.axvline(1, color=INK, linewidth=1)
        ax.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        ax.xaxis.set_major_formatter(FuncFormatter(lambda times, _: f"{times:g}×"))
        ax.xaxis.set_minor_locator(NullLocator())
        ax.set_yticks(range(len(shown)), [row.name for row in shown], fontsize=7)
        ax.invert_yaxis()
        ax.grid(axis="y", visible=False)
        ax.set_xlabel("times as good as the bound (line: the bound; tick: the aim)")
        seen = [verdict for verdict in COLOURS if any(row.verdict() == verdict for row in shown)]
        patches = [Patch(color=COLOURS[verdict], label=WORDS[verdict]) for verdict in seen]
        figure.legend(handles=patches, loc="outside upper center", ncols=3, fontsize=7)

    return render(draw, kind, width=WIDTH, height=1.2 + HEIGHT * len(shown))
