"""The measured part of ``docs/performance.md``: a table between two markers, made from ``results.json`` and from nothing else."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from bench.figure import bound, told
from bench.plot import drawable, picture
from bench.results import THREADS, Entry, Results

BEGIN, END = "<!-- measured: python bench/run.py --write-docs docs/performance.md -->", "<!-- /measured -->"
HEADS = ("figure", "measured", "at least", "aim", "verdict")


class PageError(ValueError):
    """A page that cannot be filled, and why."""


def write(results: Results, page: Path) -> None:
    """Put the table and, beside the page, the picture in.

    Raises:
        PageError: the results are of toy size, or the page lacks the markers.
    """
    if results.quick:
        raise PageError("these results were measured with --quick; numbers of toy size do not go into the documentation")
    text = page.read_text(encoding="utf-8")
    if text.count(BEGIN) != 1 or text.count(END) != 1 or text.index(BEGIN) > text.index(END):
        raise PageError(f"{page} must hold the line {BEGIN} once and, after it, {END} once")
    drawn = page.with_suffix(".svg")
    if drawable(results.rows):
        drawn.write_bytes(picture(results.rows, "svg"))
    before, after = text[: text.index(BEGIN) + len(BEGIN)], text[text.index(END) :]
    page.write_text(f"{before}\n\n{measured(results, drawn.name)}\n{after}", encoding="utf-8")


def measured(results: Results, image: str) -> str:
    """The generated Markdown: a table, the picture, the machine, the versions."""
    lines = [f"| {' | '.join(HEADS)} |", "|---" * len(HEADS) + "|"]
    for row in results.rows:
        cells = (row.name, told(row.value, row.unit), bound(row, row.at_least), bound(row, row.aim), row.verdict())
        lines.append(f"| {' | '.join(cell.replace('|', '/') for cell in cells)} |")
    if drawable(results.rows):
        lines += ["", f"![Each figure as a multiple of its bound]({image})"]
    lines += ["", "What the rows were measured on, row by row:", ""]
    lines += [f"- {row.name}: {row.note}" for row in results.rows if row.note]
    versions = ", ".join(f"{name} {version}" for name, version in results.versions.items())
    lines += ["", f"Machine: {_machine(results.machine)}.", "", f"Versions: {versions}.", "", *_when(results.figures)]
    return "\n".join(lines) + "\n"


def _machine(found: dict[str, Any]) -> str:
    limits = [f"{name}={found[name]}" for name in THREADS if name in found]
    bf16 = "with" if found["bf16 instructions"] else "without"
    parts = (f"{found['cores']} cores", f"{found['memory_gb']} GB of memory", f"{bf16} bfloat16 instructions", found["system"])
    return ", ".join([found["processor"], *parts, f"accelerator: {found['accelerator']}", f"{found['torch threads']} threads", *limits])


def _when(figures: dict[str, Entry]) -> list[str]:
    """When and from what; "+" after a commit says that files differed from it."""
    total = sum(entry.seconds for entry in figures.values())
    told = ", ".join(f"{name} {entry.when[:10]} at {entry.commit} ({entry.seconds:.0f} s)" for name, entry in figures.items())
    return [f"Measured: {told}; {total / 60:.0f} minutes in all."]
