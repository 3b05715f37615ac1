"""What a person sees while a comparison runs: how many runs are done, how long the rest will take, where each running one stands.

In a terminal one live block; anywhere else plain lines: one when a run starts, one when it ends, and now and then one in between. Only this
process prints, whoever computes, so no two lines mix. This module does not know what a run does, and reads no file.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import TracebackType
from typing import Any, Self, TextIO

from rich.console import Console, Group
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from fedloom.run.comparison.plan import Ended
from fedloom.run.terminal.console import human_seconds, score_text

SELDOM = 30.0
"""Seconds between plain lines about runs that go on."""


@dataclass
class Going:
    """A run that goes on: rounds done, those done before this command, what it does, its last scores."""

    round: int = 0
    from_round: int = 0
    doing: str = "starting"
    personalised: float | None = None
    whole: float | None = None


class Watching:
    """A context manager (and a :class:`~fedloom.run.comparison.jobs.Watch`). ``plain=None`` means live if the stream is a terminal.

    ``expected`` tells how many runs there will be, from how those that are over ended; ``rounds`` is how many each has.
    """

    def __init__(
        self,
        title: str,
        rounds: int,
        expected: Callable[[Mapping[str, Ended]], int],
        plain: bool | None = None,
        stream: TextIO | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.title, self.rounds, self.expected, self.clock = title, rounds, expected, clock
        self.over: dict[str, Ended] = {}
        self.total = expected(self.over)
        self.stream = sys.stderr if stream is None else stream
        self.plain = not self.stream.isatty() if plain is None else plain
        self.began, self.spoke = clock(), clock()
        self.done, self.used, self.failures = 0, 0, 0
        self.worked = 0.0
        self.going: dict[str, Going] = {}
        self.said: set[str] = set()
        self.state = ""
        self.console = Console(file=self.stream, force_terminal=None if self.plain else True, highlight=False)
        self.live: Live | None = None

    def __enter__(self) -> Self:
        self.began = self.spoke = self.clock()
        if self.plain:
            self._line(self.title)
        else:
            self.live = Live(console=self.console, get_renderable=self.view, refresh_per_second=4, redirect_stdout=False)
            self.live.start(refresh=True)
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        ended = "done" if kind is None else "stopped" if issubclass(kind, KeyboardInterrupt) else "failed"
        self.state = f"{ended} after {human_seconds(self.clock() - self.began)}"
        if self.live is None:
            self._line(f"{self.summary()}  {self.state}")
        else:
            self.live.stop()
            self.live = None

    def before(self, text: str) -> None:
        """What is done before any run begins."""
        self.state = text
        self._line(f"{self.summary()}  {text}")

    def started(self, run: str) -> None:
        """A run begins, or goes on."""
        self.state = ""
        self.going[run] = Going()
        self._line(f"{run}: started  {self.summary()}")

    def heard(self, run: str, event: Mapping[str, Any]) -> None:
        """Something happened in a run. A note that several runs have is told once."""
        if event["kind"] == "note":
            if event["text"] not in self.said:
                self.said.add(event["text"])
                self._line(f"{run}: {event['text']}", always=True)
            return
        one = self.going[run]
        if event["kind"] == "phase":
            one.doing = event["text"]
        elif event["kind"] in ("round", "resume"):
            one.round, one.doing = event["round"], f"round {event['round']}/{self.rounds}"
            one.from_round = event["round"] if event["kind"] == "resume" else one.from_round
            one.personalised = one.personalised if event["personalised"] is None else event["personalised"]
            one.whole = one.whole if event["global"] is None else event["global"]
        elif event["kind"] == "failed" and "trace" in event:
            self._line(f"{run}:\n{event['trace']}", always=True)
        self.idle()

    def ended(self, run: str, how: Ended, before: bool) -> None:
        """A run has ended, or (``before``) had when the command was given."""
        one = self.going.pop(run, Going())
        self.over[run] = how
        self.done, self.total = len(self.over), self.expected(self.over)
        self.used += before
        self.failures += how.results is None
        self.worked += 0 if before or how.results is None else self._share(self.rounds - one.from_round)
        if how.results is None:
            self._line(f"{run}: {'diverged' if how.diverged else 'failed'}: {how.failure}", always=True)
        elif not before:
            final = how.results["final"]
            scores = f"personalised {score_text(final['personalised'])}  global {score_text(final['global'])}"
            self._line(f"{run}: {scores}  {self.summary()}")

    def idle(self) -> None:
        """Nothing happened for a while: in plain lines, say now and then where the runs stand."""
        if self.plain and self.going and self.clock() - self.spoke >= SELDOM:
            self._line(f"{self.summary()}  " + ", ".join(f"{name} {one.doing}" for name, one in list(self.going.items())))

    def seconds_left(self) -> float | None:
        """What remains, at the pace of this command so far; None before anything is known and after the end."""
        worked = self.worked + sum(self._share(one.round - one.from_round) for one in list(self.going.values()))
        left = self.total - self.done - sum(self._share(one.round) for one in list(self.going.values()))
        return None if worked <= 0 or left <= 0 or self.state else (self.clock() - self.began) / worked * left

    def summary(self) -> str:
        """Runs done of how many, and the time left."""
        left = self.seconds_left()
        used = f" ({self.used} from before)" if self.used else ""
        failed = f", {self.failures} failed" if self.failures else ""
        return f"[{self.done}/{self.total} runs{used}{failed}{f', about {human_seconds(left)} left' if left else ''}]"

    def view(self) -> Group:
        """The live block."""
        head = Table.grid(padding=(0, 2))
        elapsed = self.state or f"{human_seconds(self.clock() - self.began)} elapsed"
        head.add_row(Text(self.summary(), style="bold"), ProgressBar(max(self.total, 1), self.done, width=28), Text(elapsed))
        runs = Table.grid(padding=(0, 2))
        for name, one in list(self.going.items()):
            scores = f"personalised {score_text(one.personalised)}  global {score_text(one.whole)}" if one.round else ""
            runs.add_row(Text(name), ProgressBar(max(self.rounds, 1), one.round, width=14), Text(one.doing), Text(scores, style="bold"))
        return Group(Text(self.title, style="bold cyan"), head, runs)

    def _share(self, rounds: int) -> float:
        return rounds / max(self.rounds, 1)

    def _line(self, text: str, always: bool = False) -> None:
        """A plain line; in the live view only what must stay on the screen."""
        self.spoke = self.clock()
        if self.live is None:
            print(text, file=self.stream, flush=True)
        elif always:
            self.live.console.print(Text(text))
