"""How every picture looks, as SVG or PNG bytes. The same data always gives the same bytes.

Everything is readable on white and on near-black: no background is painted, text is a middle grey, and the series colours are
those of Okabe and Ito, which stay apart under the common kinds of colour blindness; dash and marker differ too. Text in an SVG
stays text. :func:`inline` makes an SVG part of an HTML page, where its ink follows the page's.

No global figure state is kept. What is drawn stands in ``figures.py`` and ``standings.py``; nothing else imports matplotlib.
"""

from __future__ import annotations

import io
import re
import warnings
from collections.abc import Callable
from typing import Any, Literal

import matplotlib
import matplotlib.axes
import matplotlib.figure
import numpy as np
from matplotlib.colors import to_hex
from matplotlib.typing import FillStyleType

Kind = Literal["svg", "png"]

INK = "#757a82"
"""Middle grey: contrast about 4.2 on white and on #14171b alike."""

OKABE_ITO = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#56b4e9", "#e69f00")
DASHES = ("-", "--", ":", "-.")
MARKERS = "osD^vP"
FILLS: tuple[FillStyleType, ...] = ("full", "none", "left", "right")

STYLE: dict[Any, Any] = {
    "svg.fonttype": "none",
    "svg.hashsalt": "fedloom",
    "text.parse_math": False,
    "font.family": "DejaVu Sans",
    "font.size": 9,
    **dict.fromkeys(("text.color", "axes.labelcolor", "axes.edgecolor", "xtick.color", "ytick.color"), INK),
    "axes.titlesize": 10,
    "axes.titlelocation": "left",
    "axes.titleweight": "bold",
    "axes.spines.top": False,
    "axes.spines.right": False,
    **dict.fromkeys(("axes.facecolor", "figure.facecolor", "savefig.facecolor"), "none"),
    "legend.frameon": False,
    "lines.linewidth": 1.8,
    "axes.grid": True,
    "grid.color": INK,
    "grid.alpha": 0.18,
}


def class_colours(count: int) -> list[str]:
    """``count`` colours for labels: Okabe and Ito's up to six, beyond that steps of one map that is even in lightness."""
    if count <= len(OKABE_ITO):
        return list(OKABE_ITO[:count])
    return [to_hex(matplotlib.colormaps["viridis"](v)) for v in np.linspace(0.04, 1, count)]


def appearance(i: int) -> tuple[str, str, str]:
    """Colour, dash and marker of line i; the first 24 differ."""
    return OKABE_ITO[i % len(OKABE_ITO)], DASHES[i // len(OKABE_ITO) % len(DASHES)], MARKERS[i % len(MARKERS)]


def point(i: int) -> tuple[str, str, FillStyleType]:
    """Colour, marker and filling of point i; the first 24 differ."""
    return OKABE_ITO[i % len(OKABE_ITO)], MARKERS[i % len(MARKERS)], FILLS[i // len(OKABE_ITO) % len(FILLS)]


def legend(ax: matplotlib.axes.Axes, lines: int) -> None:
    """One of two columns below the axes, which a single line needs not."""
    if lines > 1:
        ax.legend(loc="upper left", bbox_to_anchor=(-0.02, -0.2), ncols=2, fontsize=8, borderaxespad=0)


def height_of(lines: int) -> float:
    """Inches: room for a legend of two columns below the axes."""
    return 2.9 + (0.19 * ((lines + 1) // 2) + 0.05 if lines > 1 else 0)


def render(draw: Callable[[matplotlib.figure.Figure], None], kind: Kind = "svg", width: float = 4.8, height: float = 2.9) -> bytes:
    """Draw on a fresh figure and return its bytes; matplotlib's settings are put back as they were."""
    with matplotlib.rc_context(STYLE), warnings.catch_warnings():
        warnings.filterwarnings("ignore", r"Glyph \d+ .*missing from font")  # a box in a picture; an SVG keeps the text
        figure = matplotlib.figure.Figure(figsize=(width, height), layout="constrained")
        draw(figure)
        buffer = io.BytesIO()
        stamps = ("Date", "Creator") if kind == "svg" else ("Software",)
        figure.savefig(buffer, format=kind, dpi=150, metadata=dict.fromkeys(stamps))
    return buffer.getvalue()


def inline(svg: bytes, name: str) -> str:
    """The SVG as an HTML element: no prologue, no fixed size, ids prefixed with ``name``, ink in the page's colour."""
    text = svg.decode("utf-8")
    text = text[text.index("<svg") :]
    text = re.sub(r"<metadata>.*?</metadata>|<style[^>]*>.*?</style>", "", text, flags=re.DOTALL)
    text = re.sub(r'\bid="([^"]+)"', rf'id="{name}-\1"', text)
    text = re.sub(r'(xlink:href="#|url\(#)', rf"\g<1>{name}-", text)
    text = re.sub(r"<svg [^>]*>", lambda root: re.sub(r' (width|height)="[^"]*"', "", root.group()), text, count=1)
    return text.replace(INK, "currentColor")
