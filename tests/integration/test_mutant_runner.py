"""The mutant runner can tell killed from survived. It starts pytest by itself, so it is not a unit test."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest

from tools.mutants import Mutant, campaign, judge


@pytest.fixture
def house(tmp_path: Path) -> Path:
    """A package of one function with one good test of it and one that cannot fail."""
    for folder in ("src", "tests"):
        (tmp_path / folder).mkdir()
    (tmp_path / "src" / "arithmetic.py").write_text("def add(a, b):\n    return a + b\n")
    (tmp_path / "tests" / "test_good.py").write_text("from arithmetic import add\n\ndef test_add():\n    assert add(2, 3) == 5\n")
    (tmp_path / "tests" / "test_blind.py").write_text("from arithmetic import add\n\ndef test_add():\n    add(2, 3)\n")
    return tmp_path


MINUS = Mutant("minus", "adds by subtracting", "arithmetic.py", "a + b", "a - b", ("tests/test_good.py",))


def test_tests_that_do_not_exist_kill_nothing(house: Path) -> None:
    assert judge(dataclasses.replace(MINUS, tests=("tests/test_gone.py",)), house, 60.0).verdict == "CANNOT RUN"


def test_who_is_not_done_in_time_was_not_killed(house: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    slow = dataclasses.replace(MINUS, new="__import__('time').sleep(60)")
    told = judge(slow, house, patience=3.0)
    assert told.verdict == "HUNG"
    assert "not done after 3 s" in told.said
    monkeypatch.setattr("tools.mutants.LEAST", 1.0)
    assert campaign([slow], house, jobs=1) == 1
    assert "0 of 1 killed" in capsys.readouterr().out


def test_the_tests_take_as_long_as_they_take_where_nothing_is_corrupted(house: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tools.mutants.LEAST", 0.0)
    good = house / "tests" / "test_good.py"
    good.write_text(f"import time\n{good.read_text()}    time.sleep(1)\n")
    assert campaign([MINUS], house, jobs=1) == 0


def test_a_campaign_fails_on_a_survivor_and_says_who(house: Path, capsys: pytest.CaptureFixture[str]) -> None:
    survivor = dataclasses.replace(MINUS, id="unseen", tests=("tests/test_blind.py",))
    assert campaign([MINUS, survivor], house, jobs=2) == 1
    printed = capsys.readouterr().out
    assert "SURVIVED" in printed
    assert "unseen: adds by subtracting" in printed
    assert "1 of 2 killed" in printed
    assert campaign([MINUS], house, jobs=1) == 0
    assert "a + b" in (house / "src" / "arithmetic.py").read_text(), "the tree itself must stay as it was"


def test_a_campaign_fails_where_the_tests_were_red_before(house: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (house / "src" / "arithmetic.py").write_text("def add(a, b):\n    return 0 * (a + b)\n")
    assert campaign([MINUS], house, jobs=1) == 1
    assert "must pass before" in capsys.readouterr().err
