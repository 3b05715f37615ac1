"""What a person sees in the terminal: the progress of a run and tables of results.

In a terminal the progress is one live block that is redrawn in place; anywhere else it is plain lines, one a round, so that a
log file stays readable. Numbers come in as rows of ``rounds.jsonl`` and results of ``results.json``; nothing is computed here
but running totals and the time left.

This module does not know what a method, a model or an engine is, and reads no file.
"""

from __future__ import annotations

import sys
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from statistics import median
from types import TracebackType
from typing import Any, Protocol, Self, TextIO

import numpy as np
from rich import box
from rich.console import Console, Group
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from fedloom.data.numbers import EXACT

Row = Mapping[str, Any]
"""One object of ``rounds.jsonl``."""


class Show(Protocol):
    """To whom a run tells its progress."""

    def phase(self, text: str) -> None: ...

    def note(self, text: str) -> None: ...

    def round(self, row: Row) -> None: ...

    def resume(self, rows: Sequence[Row]) -> None: ...


WINDOW = 9
"""Rounds in the moving median that predicts the time left."""

TICKS = "▁▂▃▄▅▆▇█"
NOTHING = "-"


def human_bytes(count: float) -> str:
    """Bytes with a decimal unit: ``999 B``, ``1.5 kB``, ``20.4 MB``. Three significant digits or so."""
    scaled, units = float(count), ["B", "kB", "MB", "GB", "TB", "PB"]
    while abs(scaled) >= 999.5 and len(units) > 1:
        scaled, units = scaled / 1000, units[1:]
    digits = 0 if units[0] == "B" or abs(scaled) >= 99.95 else 1
    return f"{scaled:.{digits}f} {units[0]}"


def human_seconds(duration: float) -> str:
    """A duration in its two largest units: ``0.42 s``, ``8.1 s``, ``41 s``, ``3 min 20 s``, ``2 h 05 min``, ``3 d 4 h``."""
    if duration < 59.5:
        digits = 2 if duration < 0.995 else 1 if duration < 9.95 else 0
        return f"{duration:.{digits}f} s"
    whole = round(duration)
    if whole < 3600:
        return f"{whole // 60} min {whole % 60:02d} s"
    minutes = round(duration / 60)
    if minutes < 24 * 60:
        return f"{minutes // 60} h {minutes % 60:02d} min"
    hours = round(duration / 3600)
    return f"{hours // 24} d {hours % 24} h"


def score_text(score: float | None) -> str:
    """A metric with four decimals, or a dash where a protocol was not evaluated or a method cannot have it."""
    return NOTHING if score is None else f"{score:.4f}"


def sparkline(values: Sequence[float], width: int = 24) -> str:
    """The last ``width`` values as block characters between their smallest and largest; empty for fewer than two."""
    shown = [v for v in values if np.isfinite(v)][-width:]
    if len(shown) < 2:
        return ""
    low, span = min(shown), max(shown) - min(shown)
    return "".join(TICKS[int((v - low) / span * (len(TICKS) - 1) + 0.5)] if span else TICKS[3] for v in shown)


class Progress:
    """The progress of one run, as a context manager. ``plain=None`` means live if the stream is a terminal.

    Call :meth:`phase` when something starts, :meth:`round` with each row of ``rounds.jsonl``, :meth:`note` to tell something.
    Metrics that a row leaves null keep their last known value; exact match is shown where rows tell it. Leaving the block leaves the last
    state on the screen.
    """

    def __init__(
        self,
        total_rounds: int,
        title: str,
        plain: bool | None = None,
        stream: TextIO | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.total, self.title = total_rounds, title
        self.stream = sys.stderr if stream is None else stream
        self.plain = not self.stream.isatty() if plain is None else plain
        self.clock, self.started = clock, clock()
        self.done, self.working_on = 0, "starting"
        self.began = self.ended = False
        self.loss: float | None = None
        self.scores: dict[str, list[float]] = {"personalised": [], "global": []}
        self.solved: dict[str, list[float]] = {"personalised": [], "global": []}
        self.bytes_up = self.bytes_down = self.failures = 0
        self.durations: deque[float] = deque(maxlen=WINDOW)
        self.console = Console(file=self.stream, force_terminal=None if self.plain else True, highlight=False)
        self.live: Live | None = None

    def __enter__(self) -> Self:
        self.started = self.clock()
        if self.plain:
            self._line(self.title)
        else:
            self.live = Live(console=self.console, get_renderable=self.view, refresh_per_second=4, redirect_stdout=False)
            self.live.start(refresh=True)
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        took = human_seconds(self.clock() - self.started)
        ended = "done" if kind is None else "stopped" if issubclass(kind, KeyboardInterrupt) else "failed"
        self.working_on, self.ended = f"{ended} after {took}", True
        if self.live is None:
            self._line(self.working_on)
        else:
            self.live.stop()
            self.live = None

    def phase(self, text: str) -> None:
        """Say what is being done now: a set-up step, an evaluation, a round.

        In plain lines it is said before the first row only, and the same text once; from then on each round has its line.
        """
        if text != self.working_on:
            self.working_on = text
            if not (self.plain and self.began):
                self._line(text)

    def note(self, text: str) -> None:
        """Say something that stays on the screen above the live block."""
        if self.live is None:
            self._line(f"note: {text}")
        else:
            self.live.console.print(Text(f"note: {text}", style="yellow"))

    def round(self, row: Row) -> None:
        """Take in one row of ``rounds.jsonl`` and show it; row 0 is the evaluation after set-up."""
        self._take(row)
        self.working_on = f"round {self.done}/{self.total}"
        self._line(self._summary())

    def resume(self, rows: Sequence[Row]) -> None:
        """Take in the rows that an earlier process wrote, so that totals and curves go on where they stood."""
        for row in rows:
            self._take(row)
        if rows:
            self.working_on = f"resuming after round {self.done}/{self.total}"
            self._line(self.working_on)

    def _take(self, row: Row) -> None:
        self.done, self.began = int(row["round"]), True
        self.loss = self.loss if row["loss"] is None else float(row["loss"])
        for protocol, known in self.scores.items():
            if row[protocol] is not None:
                known.append(float(row[protocol]))
            if (share := (row.get(EXACT) or {}).get(protocol)) is not None:
                self.solved[protocol].append(float(share))
        self.bytes_up += int(row["bytes_up"])
        self.bytes_down += int(row["bytes_down"])
        self.failures += len(row["failed"])
        if self.done:
            self.durations.append(float(row["host_seconds"]))

    def seconds_left(self) -> float | None:
        """The rounds that remain times the median of the last ones; None before the first round and after the last."""
        unfinished = self.done < self.total and not self.ended
        return (self.total - self.done) * median(self.durations) if self.durations and unfinished else None

    def view(self) -> Group:
        """The live block: title, bar, metrics, traffic."""
        left = self.seconds_left()
        times = f"{human_seconds(self.clock() - self.started)} elapsed"
        times += "" if left is None else f", about {human_seconds(left)} left"
        head = Table.grid(padding=(0, 2))
        bar = ProgressBar(total=max(self.total, 1), completed=self.done, width=28)
        head.add_row(Text(self.working_on, style="bold"), bar, Text(times))
        numbers = Table.grid(padding=(0, 2))
        numbers.add_row("loss", _bold(_loss_text(self.loss)), "", "up", _bold(human_bytes(self.bytes_up)))
        traffic = [("down", human_bytes(self.bytes_down)), ("failed", str(self.failures) if self.failures else "none")]
        for (protocol, known), (label, text) in zip(self.scores.items(), traffic, strict=True):
            numbers.add_row(protocol, _bold(score_text(self._last(protocol))), self._spark(known), label, _bold(text))
        for protocol, known in self.solved.items():
            if known:
                numbers.add_row(f"exact match, {protocol}", _bold(score_text(known[-1])), self._spark(known), "", "")
        return Group(Text(self.title, style="bold cyan"), head, numbers)

    def _summary(self) -> str:
        left = self.seconds_left()
        parts = [
            f"round {self.done}/{self.total}",
            f"loss {_loss_text(self.loss)}",
            f"personalised {score_text(self._last('personalised'))}",
            f"global {score_text(self._last('global'))}",
            *([f"exact match {'/'.join(score_text(of[-1] if of else None) for of in self.solved.values())}"] if self._solves else []),
            f"up {human_bytes(self.bytes_up)}",
            f"down {human_bytes(self.bytes_down)}",
            f"{human_seconds(self.clock() - self.started)} elapsed",
        ]
        parts += [f"{human_seconds(left)} left"] if left is not None else []
        parts += [f"{self.failures} failed so far"] if self.failures else []
        return "  ".join(parts)

    @property
    def _solves(self) -> bool:
        """Whether any exact match is known."""
        return any(self.solved.values())

    def _last(self, protocol: str) -> float | None:
        return self.scores[protocol][-1] if self.scores[protocol] else None

    def _spark(self, known: Sequence[float]) -> Text:
        able = self.console.encoding.lower().startswith("utf")
        return Text(sparkline(known) if able else "", style="green")

    def _line(self, text: str) -> None:
        """Print a line in plain mode; redraw in live mode."""
        if self.plain:
            print(text, file=self.stream, flush=True)
        elif self.live is not None:
            self.live.refresh()


def _loss_text(loss: float | None) -> str:
    return NOTHING if loss is None else f"{loss:.4f}"


def _bold(text: str) -> Text:
    return Text(text, style="bold")


def results_table(results: Sequence[Mapping[str, Any]]) -> Table:
    """One line a run, from contents of ``results.json``. The highest score of a column is bold if all runs share a metric.
    Scores are never shortened: it is the times that wrap, from 80 columns on.

    Bytes and times are those of the rounds; ``device time`` is simulated, and ``set-up`` before round 1 is counted apart.
    """
    metrics = sorted({str(result["metric"]) for result in results})
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, padding=0, title=f"Test {' / '.join(metrics)}")
    table.title_justify = "left"
    table.add_column("method", overflow="fold", min_width=len("centralised"))
    places = [(at, protocol) for at in ("final", "best") for protocol in ("personalised", "global")]
    for at, protocol in places:
        broken = {"personalised": "person-\nalised", "global": "global"}[protocol]
        table.add_column(f"{broken}\n{at}", justify="right", no_wrap=True, vertical="top")
    for header in ("up\nMB", "down\nMB"):
        table.add_column(header, justify="right", no_wrap=True)
    for header in ("device\ntime", "set-up", "host\ntime"):
        table.add_column(header, justify="right", min_width=6)
    highest = {
        (at, protocol): max((r[at][protocol] for r in results if r[at][protocol] is not None), default=None) for at, protocol in places
    }
    for result in results:
        marked = len(results) > 1 and len(metrics) == 1
        cells = [
            Text(score_text(score), style="bold" if marked and score is not None and score == highest[at, protocol] else "")
            for at, protocol in places
            for score in [result[at][protocol]]
        ]
        costs = [f"{result[key] / 1e6:,.1f}" for key in ("bytes_up", "bytes_down")]
        costs += [human_seconds(result[key]) for key in ("device_seconds", "setup_device_seconds", "host_seconds")]
        table.add_row(Text(str(result["method"])), *cells, *costs)
    table.caption = "final: after the last round; best: at the round with the best validation score. Device time is simulated."
    table.caption_justify = "left"
    return table


def personalising_text(told: Mapping[str, Any]) -> str:
    """What devices train before they predict, which is in no total: a row's or a result's ``personalising``, as a line."""
    more = f"{human_seconds(told['device_seconds'])} of device time beside the rounds, before the devices predict"
    return f"personalising: {more}; {told['flops']:.3g} operations"


def further_text(told: Mapping[str, Mapping[str, float | None]]) -> str:
    """The test scores beside the headline, as a line: a result's ``further``."""
    each = (f"{name} {', '.join(f'{score_text(of[p])} {p}' for p in ('personalised', 'global'))}" for name, of in told.items())
    return f"beside it, after the last round: {'; '.join(each)}"


def solved_text(told: Mapping[str, Any]) -> str:
    """The exact match that a run's ``results.json`` tells, as a line."""
    shares = {"before training": told["before"], "global": told["after"], "personalised": told.get("personalised")}
    known = ", ".join(f"{score_text(share)} {name}" for name, share in shares.items() if share is not None)
    return f"exact match of the numbers in {told['prompts']:,} of {told['held']:,} test answers: {known}"


def partition_table(counts: np.ndarray, classes: Sequence[str]) -> Table:
    """How labels lie on the devices. ``counts`` (K, C): training examples of each label on each device; C class names.

    Raises:
        ValueError: the shape and the names disagree, or there is no device.
    """
    if counts.ndim != 2 or counts.shape[1] != len(classes) or not len(counts):
        raise ValueError(f"label counts have shape {counts.shape}; they must be (devices, {len(classes)}): one column a class")
    title = f"Training labels on {len(counts):,} devices"
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, title=title, title_justify="left")
    table.add_column("label")
    for header in ("examples", "share", "devices\nthat hold it", "fewest\non one", "median", "most\non one"):
        table.add_column(header, justify="right")
    total = max(int(counts.sum()), 1)
    rows = [(str(name), counts[:, c]) for c, name in enumerate(classes)] + [("all", counts.sum(axis=1))]
    for i, (name, held) in enumerate(rows):
        if i == len(classes):
            table.add_section()
        spread = [f"{v:,.0f}" for v in (held.min(), np.median(held), held.max())]
        table.add_row(Text(name), f"{held.sum():,}", f"{held.sum() / total:.1%}", f"{(held > 0).sum():,}", *spread)
    return table
