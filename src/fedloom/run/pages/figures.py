"""Pictures of runs: their curves, their layers, their devices' data, drawn as ``drawing.py`` says.

This module does not know run folders or HTML pages; it draws the numbers it is given.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import matplotlib.axes
import matplotlib.figure
import numpy as np
from matplotlib.ticker import FuncFormatter, MaxNLocator

from fedloom.run.comparison.standing import Protocol
from fedloom.run.pages.drawing import INK, OKABE_ITO, Kind, appearance, class_colours, height_of, legend, render

Against = Literal["round", "bytes", "up", "device"]
Opens = Literal["batches", "batches as cut", "examples", "length"]
"""What a curriculum opens a share of; of length: of the way from its shortest texts to whole ones."""

MOST_DEVICES = 240
"""Devices that one partition picture shows; of more, evenly spaced ones are shown and the title says so."""

LARGEST_VECTOR = 4000
"""Bars beyond which a partition picture embeds them as pixels, so that a report stays small."""


@dataclass(frozen=True)
class Track:
    """One run's line: its rows of ``rounds.jsonl`` and what its set-up cost, at which the first point then sits.

    The rows may be means over seeds; ``deviations`` are then those of each protocol's scores, row by row, and drawn as a band, and
    ``solved`` those of exact match.
    """

    label: str
    rows: Sequence[Mapping[str, Any]]
    setup_bytes: float = 0.0
    setup_seconds: float = 0.0
    best_round: int | None = None
    setup_up: float = 0.0
    deviations: Mapping[str, Sequence[float | None]] = field(default_factory=dict)
    solved: Mapping[str, Sequence[float | None]] = field(default_factory=dict)

    def axis(self, against: Against, protocol: Protocol = "global") -> np.ndarray:
        """(rows,) where each row stands: completed rounds, bytes up and down, or up, so far, simulated seconds so far; for a personalised
        score with what devices trained before they predicted there, as far as rows tell it."""
        if against == "round":
            return np.array([row["round"] for row in self.rows], float)
        if against == "up":
            return self.setup_up + np.cumsum([row["bytes_up"] for row in self.rows], dtype=float)
        if against == "bytes":
            return self.setup_bytes + np.cumsum([row["bytes_up"] + row["bytes_down"] for row in self.rows], dtype=float)
        own = [(row.get("personalising") or {"device_seconds": 0.0})["device_seconds"] for row in self.rows]
        so_far = self.setup_seconds + np.cumsum([row["device_seconds"] for row in self.rows], dtype=float)
        return so_far + np.array(own, float) if protocol == "personalised" else so_far


def metric_curve(tracks: Sequence[Track], protocol: Protocol, against: Against, metric: str, target: float | None = None) -> bytes:
    """One protocol's test metric, evaluated points only; a ring marks the round that validation chose, a thin line the target.

    Both protocols of the same tracks get the same vertical scale, so that their pictures can be compared.
    """

    def draw(figure: matplotlib.figure.Figure) -> None:
        ax = figure.add_subplot()
        size, label = _unit(against, max((track.axis(against, protocol).max(initial=0) for track in tracks), default=0))
        for i, track in enumerate(tracks):
            places, (colour, dash, marker) = track.axis(against, protocol) / size, appearance(i)
            points = [(x, row[protocol], row["round"]) for x, row in zip(places, track.rows, strict=True) if row[protocol] is not None]
            xs, ys = [x for x, _, _ in points], [y for _, y, _ in points]
            ax.plot(xs, ys, dash, color=colour, marker=marker, markersize=3.5, label=track.label, clip_on=False)
            ringed = [(x, y) for x, y, t in points if t == track.best_round]
            ax.plot([x for x, _ in ringed], [y for _, y in ringed], "o", color=colour, markersize=10, fillstyle="none", clip_on=False)
            apart = zip(places, track.rows, track.deviations.get(protocol, []), strict=False)
            band = [(x, row[protocol] - d, row[protocol] + d) for x, row, d in apart if d is not None]
            low, high = [y for _, y, _ in band], [y for _, _, y in band]
            ax.fill_between([x for x, _, _ in band], low, high, color=colour, alpha=0.15, linewidth=0)
        if target is not None:
            ax.axhline(target, color=INK, linewidth=0.8, linestyle=(0, (1, 3)))
        _scale(ax, [*_reach(tracks), *([] if target is None else [target])])
        ax.set_title(f"{protocol.capitalize()} {metric} against {WORDS[against]}")
        ax.set_ylabel(f"test {metric}")
        ax.set_xlabel(label)
        ax.set_xlim(left=0)
        ax.xaxis.set_major_locator(MaxNLocator(integer=against == "round", nbins=7))
        legend(ax, len(tracks))

    return render(draw, height=height_of(len(tracks)))


def _reach(tracks: Sequence[Track]) -> list[float]:
    """All scores of both protocols, and the edges of their bands."""
    reach: list[float] = []
    for track in tracks:
        for protocol in ("personalised", "global"):
            scores = [row[protocol] for row in track.rows]
            reach += [score for score in scores if score is not None]
            apart = zip(scores, track.deviations.get(protocol, []), strict=False)
            reach += [edge for score, d in apart if score is not None and d is not None for edge in (score - d, score + d)]
    return reach


def loss_curve(tracks: Sequence[Track]) -> bytes:
    """Mean training loss of each round over the cohort's examples."""

    def draw(figure: matplotlib.figure.Figure) -> None:
        ax = figure.add_subplot()
        for i, track in enumerate(tracks):
            points = [(row["round"], row["loss"]) for row in track.rows if row["loss"] is not None]
            colour, dash, _ = appearance(i)
            ax.plot([x for x, _ in points], [y for _, y in points], dash, color=colour, label=track.label)
        ax.set_title("Training loss of each round's cohort")
        ax.set_ylabel("mean loss (nats)")
        _rounds(ax)
        legend(ax, len(tracks))

    return render(draw, height=height_of(len(tracks)))


def pacing(fractions: Sequence[float], opens: Opens = "batches") -> bytes:
    """The share of each device's batches, examples or text length that the curriculum opens in rounds 1, 2, ..."""
    title, label = {
        "batches": ("Data opened by the curriculum, easy first", "share of batches"),
        "batches as cut": ("Data opened by the curriculum, in the order of the cut", "share of batches"),
        "examples": ("Data opened by the curriculum, easy first", "share of examples"),
        "length": ("Text length opened by the curriculum", "way to whole texts"),
    }[opens]

    def draw(figure: matplotlib.figure.Figure) -> None:
        ax = figure.add_subplot()
        ax.step(np.arange(1, len(fractions) + 1), fractions, where="mid", color=OKABE_ITO[0])
        ax.set_ylim(0, 1.05)
        ax.yaxis.set_major_formatter(FuncFormatter(lambda v, _: f"{v:.0%}"))
        ax.set_title(title)
        ax.set_ylabel(label)
        _rounds(ax)

    return render(draw)


def layer_scores(scores: Sequence[float], chosen: Sequence[int]) -> bytes:
    """Sensitivity of each layer; ``chosen`` are the indices of the global aggregation layers (GAL).

    Raises:
        ValueError: a chosen layer that has no score.
    """
    if unknown := sorted(set(chosen) - set(range(len(scores)))):
        raise ValueError(f"layers {unknown} are chosen but there are scores for layers 0 to {len(scores) - 1} only")

    def draw(figure: matplotlib.figure.Figure) -> None:
        ax = figure.add_subplot()
        for label, colour, hatch, at in (
            ("shared (GAL)", OKABE_ITO[0], "", sorted(set(chosen))),
            ("stays on the device", OKABE_ITO[5], "///", sorted(set(range(len(scores))) - set(chosen))),
        ):
            heights = [scores[i] for i in at]
            ax.bar(at, heights, color=colour, hatch=hatch, edgecolor=INK, linewidth=0.4, width=0.75, label=label)
        ax.set_title("Sensitivity of each layer, and which are shared")
        ax.set_xlabel("transformer layer, from the input")
        ax.set_ylabel("score (relative change)")
        ax.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=12))
        ax.grid(False, axis="x")
        legend(ax, 2)

    return render(draw, height=height_of(2))


def shared_layers(chosen: Mapping[int, Sequence[int]], depth: int, rounds: int) -> bytes:
    """Which layers are shared in which rounds; ``chosen``: by the number of completed rounds at which they were chosen, from 0 on."""

    def draw(figure: matplotlib.figure.Figure) -> None:
        ax = figure.add_subplot()
        starts = sorted(chosen)
        for begin, end in zip(starts, [*starts[1:], max(rounds, starts[-1] + 1)], strict=True):
            for layer in chosen[begin]:
                ax.barh(layer, end - begin, left=begin, height=0.75, color=OKABE_ITO[0], edgecolor=INK, linewidth=0.4)
        ax.set_title("Which layers are shared (GAL)")
        ax.set_ylabel("transformer layer")
        ax.set_ylim(-0.6, depth - 0.4)
        ax.yaxis.set_major_locator(MaxNLocator(integer=True, nbins=12))
        ax.grid(False, axis="y")
        _rounds(ax)

    return render(draw)


def partition_picture(counts: np.ndarray, classes: Sequence[str], kind: Kind = "svg") -> bytes:
    """Training labels on the devices. ``counts`` (K, C). Above: sizes, largest first; below: label shares by dominant label.

    Raises:
        ValueError: the shape and the names disagree, or there is no device.
    """
    if counts.ndim != 2 or counts.shape[1] != len(classes) or not len(counts):
        raise ValueError(f"label counts have shape {counts.shape}; they must be (devices, {len(classes)}): one column a class")
    sizes = counts.sum(axis=1)
    shares = counts / np.maximum(sizes, 1)[:, None]
    shown = np.unique(np.linspace(0, len(counts) - 1, min(len(counts), MOST_DEVICES)).round().astype(int))
    by_size = np.argsort(-sizes, kind="stable")[shown]
    most_common = np.where(sizes > 0, shares.argmax(axis=1), len(classes))
    by_label = np.lexsort((-shares.max(axis=1), most_common))[shown]
    part = "" if len(shown) == len(counts) else f" ({len(shown)} of {len(counts):,} shown, evenly spaced)"

    def draw(figure: matplotlib.figure.Figure) -> None:
        upper, lower = figure.subplots(2, 1)
        colours = class_colours(len(classes))
        _stack(upper, counts[by_size].astype(float), colours, classes)
        upper.set_title(f"Training examples on each of {len(counts):,} devices, largest first{part}")
        upper.set_ylabel("examples")
        upper.yaxis.set_major_formatter(FuncFormatter(lambda v, _: f"{v:,.0f}"))
        _stack(lower, shares[by_label], colours, classes)
        lower.set_title("Share of each label on a device, ordered by its most common label")
        lower.set_ylabel("share")
        lower.set_ylim(0, 1)
        lower.yaxis.set_major_formatter(FuncFormatter(lambda v, _: f"{v:.0%}"))
        lower.set_xlabel("devices")
        if len(classes) <= 20:
            handles, labels = lower.get_legend_handles_labels()
            figure.legend(handles, labels, loc="outside lower left", ncols=min(6, len(classes)), fontsize=8)
        else:
            legend = f"{len(classes)} labels, dark to bright: {classes[0]} (first) to {classes[-1]} (last)"
            lower.text(0, -0.28, legend, transform=lower.transAxes)

    return render(draw, kind, width=9.6, height=5.2)


def _stack(ax: matplotlib.axes.Axes, heights: np.ndarray, colours: Sequence[str], classes: Sequence[str]) -> None:
    """Stacked bars without gaps, one shape a label. ``heights`` (devices, C)."""
    tops = np.cumsum(heights, axis=1)
    edges = np.arange(len(heights) + 1)
    many = heights.size > LARGEST_VECTOR
    for c, name in enumerate(classes):
        base = tops[:, c] - heights[:, c]
        ax.stairs(tops[:, c], edges, baseline=base, fill=True, color=colours[c], label=name, linewidth=0, rasterized=many)
    ax.set_xlim(0, len(heights))
    ax.set_xticks([])
    ax.grid(False, axis="x")


WORDS: dict[Against, str] = {"round": "rounds", "bytes": "traffic", "up": "uploads", "device": "device time"}

BYTES = [(1e3, "(kB)"), (1e6, "(MB)"), (1e9, "(GB)"), (1e12, "(TB)")]
UNITS: dict[Against, tuple[str, Sequence[tuple[float, str]]]] = {
    "round": ("completed rounds", [(1.0, "")]),
    "bytes": ("bytes up and down, all devices", BYTES),
    "up": ("bytes uploaded, all devices", BYTES),
    "device": ("simulated device time", [(1.0, "(s)"), (60.0, "(min)"), (3600.0, "(h)"), (86400.0, "(d)")]),
}


def _unit(against: Against, reach: float) -> tuple[float, str]:
    """The size of one displayed unit, chosen for an axis that ends at ``reach``, and the axis label that names it."""
    name, units = UNITS[against]
    size, unit = next((u for u in reversed(units) if reach >= 2 * u[0]), units[0])
    return size, f"{name} {unit}".rstrip()


def _rounds(ax: matplotlib.axes.Axes) -> None:
    ax.set_xlabel(UNITS["round"][0])
    ax.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=8))


def _scale(ax: matplotlib.axes.Axes, scores: Sequence[float]) -> None:
    """Cover all scores with a margin, and never zoom in to less than 0.05."""
    if finite := [s for s in scores if np.isfinite(s)]:
        low, high = min(finite), max(finite)
        margin = max(0.06 * (high - low), (0.05 - (high - low)) / 2, 0.005)
        ax.set_ylim(low - margin, high + margin)
