"""What a run cost, added up from what the engine told; rows that survive a kill."""

from __future__ import annotations

import json
import os
import resource
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from fedloom.data.tasks import DataError
from fedloom.fleet import DeviceProfile, Fleet
from fedloom.messages import CENTRE, Failure, Replies, Task, Traffic, Update
from fedloom.run.costs import ledger as of_runs
from fedloom.run.costs.ledger import Ledger, Personalising, Section, peak_rss_bytes
from fedloom.run.errors import CheckpointError
from fedloom.run.experiment import Experiment
from fedloom.run.loop import run
from fedloom.run.world import World
from tests import small

FLEET = Fleet((DeviceProfile("round", 100.0, 10.0, 20.0, 1.0),))
SCORES = {"test": {"personalised": 0.5, "global": 0.25}, "validation": {"personalised": 0.4, "global": 0.3, "loss": 1.5}}
KEYS = [
    "round", "loss", "personalised", "global", "examples", "train_seconds", "bytes_up", "bytes_down", "host_seconds",
    "device_seconds", "flops", "peak_rss_bytes", "answered", "failed", "validation",
]  # fmt: skip


def replies() -> Replies:
    updates = (Update(4, 30, {}, {"loss": 1.0}), Update(2, 10, {}, {"loss": 3.0}))
    traffic = (Traffic(4, 40, 10, 300.0, 6), Traffic(2, 20, 20, 100.0, 4), Traffic(9, 60, 0, 0.0, 0))
    return Replies(updates, (Failure(9, "offline"),), traffic)


NOW = 1000.0


def begun(ledger: Ledger, seconds: float) -> Section:
    """A section that began so many seconds before :data:`NOW`."""
    section = ledger.section()
    section.started = NOW - seconds
    return section


@pytest.fixture
def now(monkeypatch: pytest.MonkeyPatch) -> None:
    """The ledger's clock stands still at :data:`NOW`."""
    monkeypatch.setattr(of_runs, "time", SimpleNamespace(monotonic=lambda: NOW))


@pytest.mark.usefixtures("now")
def test_a_section_adds_up_what_it_hears(tmp_path: Path) -> None:
    section = begun(Ledger(tmp_path, FLEET), 2.5)
    section.hear([Task("train", 4)], replies())
    assert (section.bytes_down, section.bytes_up, section.examples) == (120, 30, 10)
    assert section.device_seconds == 2.0 + 3.0 + 1.0, "the slowest: 40 bytes at 20/s, 300 operations at 100/s, 10 bytes at 10/s"
    assert section.loss == (30 * 1.0 + 10 * 3.0) / 40
    assert (section.answered, section.failed) == ([4, 2], {"9": "offline"})
    section.hear([], replies())
    assert (section.bytes_down, section.device_seconds) == (240, 12.0)
    assert section.seconds == 2.5


def test_what_devices_do_before_they_predict_is_the_slowest_ones_time_and_everybodys_operations() -> None:
    """A hundred operations a second: 300 and 100 of one asking, 200 and 50 of the next, all at the same time. No byte is counted: the
    messages carry the model and the predictions."""
    own = Personalising(FLEET)
    own.hear([], replies())
    own.hear([], Replies((), (), (Traffic(1, 10**6, 10**6, 200.0, 2), Traffic(3, 0, 0, 50.0, 1))))
    assert own.told == {"flops": 650.0, "device_seconds": 3.0}
    assert Personalising(FLEET).told == {"flops": 0.0, "device_seconds": 0.0}


def test_nobody_told_a_loss(tmp_path: Path) -> None:
    section = Ledger(tmp_path, FLEET).section()
    section.hear([], Replies((Update(1, 1),), (), (Traffic(1, 1, 1, 0.0, 0),)))
    assert section.loss is None


def test_a_row_has_exactly_its_keys_and_reaches_the_file(tmp_path: Path) -> None:
    ledger = Ledger(tmp_path, FLEET)
    section = ledger.section()
    section.hear([], replies())
    row = ledger.write(3, section, 0.25, SCORES)
    assert list(row) == KEYS
    assert ledger.rows() == [row] == [json.loads((tmp_path / "rounds.jsonl").read_text())]
    assert (row["round"], row["personalised"], row["global"], row["train_seconds"]) == (3, 0.5, 0.25, 0.25)
    assert row["validation"] == SCORES["validation"]
    assert row["peak_rss_bytes"] > 10_000_000


@pytest.mark.usefixtures("now")
def test_totals_are_sums_of_rows_and_the_set_up_stands_apart(tmp_path: Path) -> None:
    ledger = Ledger(tmp_path, FLEET)
    setup = begun(ledger, 7.0)
    setup.hear([], replies())
    ledger.set_up(setup)
    ledger.write(0, begun(ledger, 1.0), 0.0, SCORES)
    for t in (1, 2):
        section = begun(ledger, 2.0 * t)
        section.hear([], replies())
        section.hear([], replies())
        ledger.write(t, section, 0.1, SCORES)
    totals = ledger.totals
    for name in ("bytes_up", "bytes_down", "examples", "flops", "device_seconds", "host_seconds"):
        assert totals[name] == sum(row[name] for row in ledger.rows()), name
    assert (totals["bytes_up"], totals["bytes_down"], totals["examples"]) == (120, 480, 40)
    assert (totals["setup_bytes_up"], totals["setup_bytes_down"], totals["setup_examples"]) == (30, 120, 10)
    assert (totals["setup_device_seconds"], totals["device_seconds"]) == (6.0, 24.0)
    assert (totals["setup_host_seconds"], totals["host_seconds"]) == (7.0, 7.0)
    assert [row["host_seconds"] for row in ledger.rows()] == [1.0, 2.0, 4.0]
    assert (totals["setup_flops"], totals["flops"]) == (setup.flops, 4 * setup.flops) and setup.flops > 0
    assert totals["peak_rss_bytes"] == max(row["peak_rss_bytes"] for row in ledger.rows())
    assert totals["participations"] == {"4": 2, "2": 2}, "once a round, however often it was asked; a failure is no participation"


def test_who_was_only_asked_for_scores_took_no_part(tmp_path: Path) -> None:
    """Before the round all four tell scores and train on nothing; then 2 and 3 train, and 3's answer is lost."""
    ledger = Ledger(tmp_path, FLEET)
    section = ledger.section()
    everybody, cohort = (1, 2, 3, 4), (2, 3)
    section.hear([], Replies(tuple(Update(k, 5) for k in everybody), (), tuple(Traffic(k, 1, 1, 9.0, 0) for k in everybody)))
    trained = tuple(Traffic(k, 1, 1, 9.0, 5) for k in cohort)
    section.hear([], Replies((Update(2, 5, {}, {"loss": 1.0}),), (Failure(3, "lost"),), trained))
    assert ledger.write(1, section, 0.1, SCORES)["answered"] == [1, 2, 3, 4]
    assert ledger.totals["participations"] == {"2": 1, "3": 1}


def test_a_resumed_ledger_adds_to_the_saved_totals(tmp_path: Path) -> None:
    first = Ledger(tmp_path, FLEET)
    section = first.section()
    section.hear([], replies())
    first.write(1, section, 0.1, SCORES)
    most = 10**15
    second = Ledger(tmp_path, FLEET, json.loads(json.dumps(first.totals | {"peak_rss_bytes": most})))
    section = second.section()
    section.hear([], replies())
    second.write(2, section, 0.1, SCORES)
    assert second.totals["bytes_up"] == 60
    assert second.totals["peak_rss_bytes"] == most > second.rows()[-1]["peak_rss_bytes"], "more than this process holds, before it began"
    assert second.totals["participations"] == {"4": 2, "2": 2}
    assert [row["round"] for row in second.rows()] == [1, 2]


@pytest.mark.parametrize("torn", ["", '{"round": 4, "lo', '{"round": 4}'])
def test_rewind_drops_rows_without_a_checkpoint_and_a_torn_line(tmp_path: Path, torn: str) -> None:
    ledger = Ledger(tmp_path, FLEET)
    rows = [ledger.write(t, ledger.section(), 0.0, SCORES) for t in range(4)]
    with (tmp_path / "rounds.jsonl").open("a") as file:
        file.write(torn)
    assert ledger.rewind(2) == rows[:3]
    assert ledger.rows() == rows[:3]
    assert ledger.rewind(-1) == []
    assert (tmp_path / "rounds.jsonl").read_text() == ""


@pytest.mark.parametrize(
    ("spoilt", "said"),
    [
        (lambda lines: [lines[0], *lines[2:]], "2 of the 3 rounds"),
        (lambda lines: lines[:2], "2 of the 3 rounds"),
        (lambda lines: [lines[0], *lines[:2], *lines[3:]], "2 of the 3 rounds"),
        (lambda lines: [lines[0], "nonsense\n", *lines[2:]], "no JSON"),
        (lambda lines: ["7\n", *lines[1:]], "no row of a round"),
        (lambda lines: [], "0 of the 3 rounds"),
    ],
    ids=["one in between", "the last", "one twice and one not", "torn in between", "a number", "all"],
)
def test_rows_that_the_checkpoint_counts_on_and_that_are_not_there_are_told(tmp_path: Path, spoilt: Any, said: str) -> None:
    """Costs up to a round are sums over rows; one that lacks would make every one of them too low. The file stays as it is."""
    ledger, path = Ledger(tmp_path, FLEET), tmp_path / "rounds.jsonl"
    for t in range(4):
        ledger.write(t, ledger.section(), 0.0, SCORES)
    path.write_text(left := "".join(spoilt(path.read_text().splitlines(keepends=True))))
    with pytest.raises(CheckpointError, match=rf"rounds.jsonl (.|\n)*{said}(.|\n)*Delete {tmp_path} "):
        ledger.rewind(2)
    assert path.read_text() == left
    assert ledger.rewind(-1) == [], "what begins anew needs none"


def test_no_rows_yet(tmp_path: Path) -> None:
    assert Ledger(tmp_path, FLEET).rows() == []
    assert Ledger(tmp_path, FLEET).rewind(-1) == []


def test_the_peak_is_what_was_held_and_never_falls() -> None:
    of_runs.forget_peak()
    before, large = peak_rss_bytes(), 2**26
    held = len(b"x" * (before + large))  # more than there ever was, also where the peak cannot begin anew
    assert peak_rss_bytes() >= before + large // 2 and held
    assert peak_rss_bytes() >= before + large // 2, "what was given back still counts"


@pytest.mark.skipif(not os.access("/proc/self/clear_refs", os.W_OK), reason="this system does not let the peak begin anew")
def test_a_runs_peak_is_its_own_and_not_that_of_the_runs_before_it(tmp_path: Path) -> None:
    """A comparison carries out one run after another in one process. Here a large one has ended, and the next begins."""

    def none(experiment: Experiment) -> World:
        held.append(peak_rss_bytes())
        raise DataError("none")

    held, large = list[int](), 2**28
    assert len(b"x" * large) == large
    assert (most := peak_rss_bytes()) > large and peak_rss_bytes() == most, "what was given back still counts"
    with pytest.raises(DataError, match="none"):
        run(small.experiment(), tmp_path, plain=True, built=none)
    assert held[0] < most - large // 2
    assert len(b"x" * large) == large and peak_rss_bytes() > held[0] + large // 2, "and it counts from there"


def test_where_linux_does_not_tell_the_peak_is_the_processs(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(of_runs, "PROCESS", tmp_path / "nowhere")
    of_runs.forget_peak()
    most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    assert peak_rss_bytes() == most * (1 if sys.platform == "darwin" else 1024)
    (tmp_path / "status").write_text("Name:\tpython\nVmPeak:\t  9000 kB\nVmHWM:\t  1234 kB\nVmRSS:\t  100 kB\n")
    monkeypatch.setattr(of_runs, "PROCESS", tmp_path)
    assert peak_rss_bytes() == 1234 * 1024


@pytest.mark.parametrize("update", [Update(1, 5, {}, {"loss": "low"}), Update(1, 5, {}, {"loss": [0.5]}), Update(1, 0, {}, {"loss": 9.0})])
def test_a_loss_that_is_no_number_or_of_no_examples_is_not_counted(tmp_path: Path, update: Update) -> None:
    section = Ledger(tmp_path, FLEET).section()
    section.hear([], Replies((update,), (), (Traffic(1, 1, 1, 0.0, 0),)))
    assert section.loss is None
    section.hear([], replies())
    assert section.loss == (30 * 1.0 + 10 * 3.0) / 40


def test_where_all_data_are_in_one_place_nothing_travels() -> None:
    section = Section(FLEET)
    section.hear([Task("train", CENTRE)], Replies((), (), (Traffic(CENTRE, 10**6, 10**6, 300.0, 6),)))
    assert (section.bytes_down, section.bytes_up, section.device_seconds, section.examples) == (0, 0, 3.0, 6)
