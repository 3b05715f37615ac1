"""The progress of a comparison as plain lines, with a clock that is set by hand."""

from __future__ import annotations

import io
from collections.abc import Mapping

import pytest

from fedloom.run.comparison.plan import Ended
from fedloom.run.comparison.watching import SELDOM, Watching

WELL = Ended({"final": {"personalised": 0.9, "global": None}})


class Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


def watching(clock: Clock, runs: int = 4, plain: bool = True) -> tuple[Watching, io.StringIO]:
    stream = io.StringIO()

    def expected(ended: Mapping[str, Ended]) -> int:
        return runs - sum(how.results is None for how in ended.values())

    return Watching("title", 10, expected, plain, stream, clock), stream


def round_of(t: int, personalised: float | None = None) -> dict[str, object]:
    return {"kind": "round", "round": t, "loss": 0.1, "personalised": personalised, "global": None}


def test_runs_done_and_the_time_left_at_the_pace_so_far() -> None:
    clock = Clock()
    watch, stream = watching(clock)
    with watch:
        watch.ended("old", WELL, before=True)
        assert watch.seconds_left() is None, "nothing is known of the pace yet"
        watch.started("a")
        clock.now = 5.0
        watch.heard("a", round_of(5))
        assert watch.seconds_left() == pytest.approx(5 / 0.5 * 2.5)
        clock.now = 10.0
        watch.ended("a", WELL, before=False)
        assert watch.seconds_left() == pytest.approx(20)
    assert stream.getvalue().splitlines() == [
        *("title", "a: started  [1/4 runs (1 from before)]"),
        "a: personalised 0.9000  global -  [2/4 runs (1 from before), about 20 s left]",
        "[2/4 runs (1 from before)]  done after 10 s",
    ]


def test_rounds_from_before_do_not_count_for_the_pace() -> None:
    clock = Clock()
    watch, _ = watching(clock, runs=1)
    with watch:
        watch.started("a")
        watch.heard("a", {**round_of(8), "kind": "resume"})
        assert watch.seconds_left() is None
        clock.now = 10.0
        watch.heard("a", round_of(9))
        assert watch.seconds_left() == pytest.approx(10)


def test_a_note_is_told_once_and_failures_at_once() -> None:
    watch, stream = watching(Clock())
    with watch:
        for name in ("a", "b"):
            watch.started(name)
            watch.heard(name, {"kind": "note", "text": "columns: text"})
        watch.heard("a", {"kind": "failed", "text": "x", "diverged": False, "trace": "Traceback\nTypeError"})
        watch.ended("a", Ended(None, "a fault"), before=False)
        watch.ended("b", Ended(None, "is nan", diverged=True), before=False)
        watch.heard("a process", {"kind": "note", "text": "warning: late"})
    said = stream.getvalue()
    assert said.count("columns: text") == 1
    assert "a:\nTraceback\nTypeError\n" in said
    assert "a: failed: a fault\n" in said
    assert "b: diverged: is nan\na process: warning: late\n" in said
    assert said.splitlines()[-1] == "[2/2 runs, 2 failed]  done after 0.00 s"


def test_now_and_then_where_the_runs_stand() -> None:
    clock = Clock()
    watch, stream = watching(clock)
    with watch:
        watch.started("a")
        watch.heard("a", {"kind": "phase", "text": "set-up"})
        assert "set-up" not in stream.getvalue()
        clock.now = SELDOM
        watch.heard("a", round_of(1))
        watch.heard("a", round_of(2))
    assert [line.split("]  ")[1] for line in stream.getvalue().splitlines()[2:-1]] == ["a round 1/10"]


def test_the_live_view_shows_each_run_and_stays_when_it_is_over() -> None:
    watch, stream = watching(Clock(), plain=False)
    with pytest.raises(KeyboardInterrupt), watch:
        watch.started("a")
        watch.heard("a", round_of(3, 0.25))
        watch.heard("a", round_of(4))
        watch.console.print(watch.view())
        raise KeyboardInterrupt
    said = stream.getvalue()
    assert "round 4/10" in said
    assert "personalised 0.2500" in said
    assert "stopped after" in said
