"""Progress in both modes, written to a StringIO, and the tables."""

from __future__ import annotations

import io
import re

import numpy as np
import pytest
from rich.console import Console
from rich.table import Table

from fedloom.run.terminal.console import Progress, human_bytes, human_seconds, partition_table, results_table, solved_text, sparkline
from tests.unit.run_folder import CLASSES, experiment_of, results_of, rows_of


class Clock:
    """A clock that the test moves."""

    def __init__(self):
        self.now = 100.0

    def __call__(self):
        return self.now


def text_of(renderable, width: int = 140) -> str:
    stream = io.StringIO()
    Console(file=stream, width=width, color_system=None).print(renderable)
    return stream.getvalue()


@pytest.mark.parametrize(
    ("count", "text"),
    [
        (0, "0 B"),
        (999, "999 B"),
        (1000, "1.0 kB"),
        (1_250_000, "1.2 MB"),
        (99_960_000, "100 MB"),
        (999_700, "1.0 MB"),
        (3e9, "3.0 GB"),
    ],
)
def test_human_bytes(count, text):
    assert human_bytes(count) == text


@pytest.mark.parametrize(
    ("duration", "text"),
    [
        *(
            (0, "0.00 s"),
            (0.42, "0.42 s"),
            (8.14, "8.1 s"),
            (9.97, "10 s"),
            (59.4, "59 s"),
            (59.7, "1 min 00 s"),
            (200, "3 min 20 s"),
        ),
        *((3599.8, "1 h 00 min"), (7500, "2 h 05 min"), (86399, "1 d 0 h"), (3 * 86400 + 4 * 3600, "3 d 4 h")),
    ],
)
def test_human_seconds(duration, text):
    assert human_seconds(duration) == text


def test_sparkline_runs_from_lowest_to_highest_and_keeps_the_last():
    assert sparkline([0.0, 0.5, 1.0]) == "▁▅█"
    assert sparkline([9.0, 0.0, 1.0], width=2) == "▁█"
    assert sparkline([2.0, 2.0]) == "▄▄"
    assert sparkline([1.0]) == sparkline([float("nan"), 1.0]) == ""


def test_plain_progress_is_one_line_a_round_and_a_phase():
    stream, clock = io.StringIO(), Clock()
    with Progress(6, "lora on trec", stream=stream, clock=clock) as progress:
        progress.phase("set-up: broadcasting")
        progress.phase("set-up: broadcasting")
        for row in rows_of(6):
            clock.now += 3
            progress.phase(f"evaluating after round {row['round']}")
            progress.round(row)
        progress.note("the 10 % [cut] stays literal")
    lines = stream.getvalue().splitlines()
    assert lines[:3] == ["lora on trec", "set-up: broadcasting", "evaluating after round 0"]
    del lines[2]
    assert len(lines) == 1 + 1 + 7 + 1 + 1
    assert lines[2].startswith("round 0/6  loss -  personalised 0.3000  global 0.2600  up 0 B  down 0 B")
    assert "left" not in lines[2]
    assert "personalised 0.3000" in lines[5], "a row without evaluation shows the last known score"
    assert "up 9.0 MB  down 12 MB" not in lines[5] and "up 9.0 MB  down 12.0 MB  12 s elapsed  9.0 s left" in lines[5]
    assert "left" not in lines[8] and "up 18.0 MB" in lines[8]
    assert lines[9:] == ["note: the 10 % [cut] stays literal", "done after 21 s"]


def test_exact_match_is_shown_where_rows_tell_it():
    stream, rows = io.StringIO(), rows_of(6)
    shares = [{"personalised": 0.125, "global": 0.25}, {"personalised": None, "global": None}]
    with Progress(6, "t", plain=True, stream=stream) as progress:
        progress.round(rows[0])
        progress.round({**rows[1], "exact_match": shares[0]})
        progress.round({**rows[2], "exact_match": shares[1]})
        shown = text_of(progress.view())
    lines = stream.getvalue().splitlines()
    assert "exact match" not in lines[1]
    assert all("  exact match 0.1250/0.2500  up " in line for line in lines[2:4]), "a row without evaluation shows the last known share"
    assert re.search("exact match, personalised +0.1250", shown) and re.search("exact match, global +0.2500", shown)
    told = {"before": 0.0, "after": None, "personalised": 0.5, "prompts": 32, "held": 1319}
    line = "exact match of the numbers in 32 of 1,319 test answers: 0.0000 before training, 0.5000 personalised"
    assert solved_text(told) == line
    assert solved_text({"before": 0.0, "after": 0.25, "prompts": 2, "held": 2}).endswith("0.0000 before training, 0.2500 global")


def test_time_left_follows_the_median_of_the_last_rounds():
    progress = Progress(20, "t", plain=True, stream=io.StringIO())
    for t, took in enumerate([500.0, *[2.0] * 8, 40.0], 1):
        progress.round({**rows_of(20)[t], "host_seconds": took})
    assert progress.seconds_left() == 10 * 2.0


def test_plain_progress_counts_failures_and_says_how_it_ended():
    stream = io.StringIO()
    with pytest.raises(KeyboardInterrupt), Progress(3, "t", plain=True, stream=stream) as progress:
        progress.round({**rows_of(3)[1], "failed": {"4": "out of memory", "9": "gone"}})
        assert "2 failed so far" in stream.getvalue()
        raise KeyboardInterrupt
    assert stream.getvalue().splitlines()[-1].startswith("stopped after")


def test_resume_takes_in_former_rows_without_a_line_each():
    stream, rows = io.StringIO(), rows_of(6)
    with Progress(6, "t", plain=True, stream=stream) as progress:
        progress.resume(rows[:4])
        progress.phase("round 4/6")
        progress.round(rows[4])
    lines = stream.getvalue().splitlines()
    assert lines[1] == "resuming after round 3/6" and len(lines) == 4
    assert "round 4/6" in lines[2] and "up 12.0 MB" in lines[2] and "personalised 0.3000" in lines[2]


def test_live_progress_redraws_one_block_and_leaves_the_last_state():
    stream, clock = io.StringIO(), Clock()
    with Progress(6, "lora [red] on trec", plain=False, stream=stream, clock=clock) as progress:
        for row in rows_of(6)[:5]:
            clock.now += 3
            progress.round(row)
        progress.note("a [note]")
        during = text_of(progress.view())
    after = text_of(progress.view())
    assert "round 4/6" in during and "15 s elapsed, about 6.0 s left" in during
    assert "personalised" in during and "0.3000" in during and "12.0 MB" in during and "16.0 MB" in during
    assert "done after 15 s" in after and "left" not in after
    written = stream.getvalue()
    assert "lora [red] on trec" in written and "note: a [note]" in written
    assert "\x1b[?25h" in written, "the cursor is shown again"
    assert written.rindex("done after") > written.rindex("note: a [note]")


def test_progress_is_live_only_in_a_terminal():
    class Terminal(io.StringIO):
        def isatty(self):
            return True

    assert Progress(1, "t", stream=io.StringIO()).plain
    assert not Progress(1, "t", stream=Terminal()).plain
    assert Progress(1, "t", plain=True, stream=Terminal()).plain


def result(method: str, height: float, **changes) -> dict:
    experiment = experiment_of(method, 30)
    return {**results_of(experiment, rows_of(30, height), {}, [], CLASSES), **changes}


def cells(table: Table) -> list[list]:
    return [list(column.cells) for column in table.columns]


def test_results_table_has_every_score_and_cost_in_its_column():
    table = results_table([result("lora", 0.9), result("local", 0.7, final={"round": 30, "personalised": 0.7, "global": None})])
    assert [str(column.header).replace("\n", " ") for column in table.columns] == [
        *("method", "person- alised final", "global final", "person- alised best", "global best"),
        *("up MB", "down MB", "device time", "set-up", "host time"),
    ]
    columns = cells(table)
    assert [str(row) for row in columns[0]] == ["lora", "local"]
    costs = ["90.0", "120.0", "10 min 00 s", "1 min 35 s", "1 min 30 s"]
    assert [str(c[0]) for c in columns[1:]] == ["0.8960", "0.8520", "0.8910", "0.8430", *costs]
    assert [str(c) for c in columns[2]] == ["0.8520", "-"]
    assert [cell.style for cell in columns[1]] == ["bold", ""]


def test_results_table_marks_no_winner_between_different_metrics():
    columns = cells(results_table([result("lora", 0.9), result("local", 0.7, metric="mcc")]))
    assert {cell.style for cell in columns[1]} == {""}


@pytest.mark.parametrize("width", [80, 120])
def test_results_table_never_shortens_a_score_or_a_method(width):
    text = text_of(results_table([result("fibecfed", 0.9), result("lora", 0.8)]), width)
    assert "…" not in text
    assert all(shown in text for shown in ("fibecfed", "0.8960", "0.8520", "0.8910", "0.8430", "120.0"))
    assert ("10 min 00 s" in text) == (width == 120)


def test_a_demo_has_one_line_a_run_in_a_narrow_terminal():
    """Its longest name whole, and the minutes that it takes."""
    took = {"device_seconds": 21.9, "setup_device_seconds": 0.67, "host_seconds": 103.0, "bytes_up": 46_200_000}
    lines = text_of(results_table([result("centralised", 0.9, **took), result("lora", 0.8, **took)]), 80).splitlines()
    for method in ("centralised", "lora"):
        (line,) = (line for line in lines if line.split()[:1] == [method])
        assert line.rstrip().endswith(" 1 min 43 s")


def test_partition_table_counts_by_label_and_in_all():
    table = partition_table(np.array([[3, 0], [1, 4], [0, 0]]), ["A", "B"])
    rows = list(zip(*cells(table), strict=True))
    assert [[str(cell) for cell in row] for row in rows] == [
        ["A", "4", "50.0%", "2", "0", "1", "3"],
        ["B", "4", "50.0%", "1", "0", "0", "4"],
        ["all", "8", "100.0%", "2", "0", "3", "5"],
    ]


@pytest.mark.parametrize("counts", [np.zeros((0, 2), int), np.zeros((3, 3), int), np.zeros(2, int)])
def test_partition_table_refuses_what_does_not_fit_its_names(counts):
    with pytest.raises(ValueError, match=r"must be \(devices, 2\)"):
        partition_table(counts, ["A", "B"])
