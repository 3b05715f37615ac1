"""One figure as a command: ``python -m bench.figure echo [--quick] [--bf16] [--rows FILE]``, or ``python -m bench.figures.echo``."""

from __future__ import annotations

import argparse
import importlib
import os
from collections.abc import Callable, Sequence
from pathlib import Path

from bench.row import Row, dumps

FIGURES = ("throughput", "echo", "scores", "evaluation", "memory", "aggregation", "startup", "scaling", "federation", "gpu")
"""All figures, in the order in which they are measured and told."""

BF16 = "BENCH_BF16"
"""Set in the environment: measure bf16 also on a processor without bfloat16 instructions, where a peer takes minutes."""

NO_BF16 = "this processor has no bfloat16 instructions; --bf16 measures it all the same"

Measure = Callable[[bool], list[Row]]
"""Measure a figure; with True in seconds and at toy size, to see that it runs: such numbers say nothing."""


def measure_of(name: str) -> Measure:
    """The ``measure`` of ``bench/figures/NAME.py``.

    Raises:
        ValueError: there is no such figure.
    """
    if name not in FIGURES:
        raise ValueError(f"no figure '{name}'; there are {' '.join(FIGURES)}")
    return importlib.import_module(f"bench.figures.{name}").measure


def told(value: float | None, unit: str) -> str:
    """A number with its unit, three digits: ``0.0123 s``, ``12.3``, ``-`` for None."""
    if value is None:
        return "-"
    digits = f"{value:.0f}" if abs(value) >= 100 else f"{value:#.3g}".rstrip(".")
    return f"{digits} {unit}".strip()


def bound(row: Row, value: float | None) -> str:
    """One of the row's bounds as text: ``≥ 5 x``, ``≤ 0.02 s``, ``-`` for None."""
    return "-" if value is None else f"{'≥' if row.better == 'more' else '≤'} {value:g} {row.unit}".strip()


def line(row: Row) -> str:
    """A row in one line."""
    bounds = f"  (at least: {bound(row, row.at_least)}; aim: {bound(row, row.aim)})" if row.at_least is not None else ""
    note = f"  [{row.note}]" if row.note else ""
    return f"{row.name}: {told(row.value, row.unit)}  {row.verdict()}{bounds}{note}"


def command(measure: Measure, words: Sequence[str] | None = None) -> None:
    """Measure one figure, print its rows and, if asked, write them."""
    parser = argparse.ArgumentParser(description="Measure one figure.")
    parser.add_argument("--quick", action="store_true", help="toy size: sees that it runs, measures nothing")
    parser.add_argument("--bf16", action="store_true", help="throughput in bf16 also where the processor has no instructions for it")
    parser.add_argument("--rows", type=Path, help="write the rows into this file, as JSON")
    given = parser.parse_args(words)
    if given.bf16:
        os.environ[BF16] = "1"
    rows = measure(given.quick)
    for row in rows:
        print(line(row), flush=True)
    if given.rows is not None:
        given.rows.write_text(dumps(rows), encoding="utf-8")


if __name__ == "__main__":
    import sys

    if not sys.argv[1:] or sys.argv[1] not in FIGURES:
        sys.exit(f"usage: python -m bench.figure FIGURE [--quick] [--bf16] [--rows FILE]; the figures are {' '.join(FIGURES)}")
    command(measure_of(sys.argv[1]), sys.argv[2:])
