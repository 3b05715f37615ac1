"""A few thousand of the fuzzer's cases, and that the fuzzer itself can fail."""

from __future__ import annotations

import json
import logging
import os
import time
from pathlib import Path
from random import Random
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

pytest.importorskip("flwr", reason="the extra 'flower' is not installed: pip install 'fedloom[flower]'")

from fedloom.engines import federation
from fedloom.run.errors import ExperimentError
from fedloom.run.experiment import from_json
from fedloom.wire import WireError, checked_settings
from tests.fuzz import fuzzing
from tests.fuzz.fuzzing import Told, fuzz, shares
from tests.fuzz.mutations import changed_json
from tests.fuzz.targets import TARGETS, Target

pytestmark = pytest.mark.flower
CASES = 2000
SHARES = list(zip(TARGETS, shares(TARGETS, CASES), strict=True))


@pytest.fixture(autouse=True)
def prepared(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    for name in ("PAUSE", "with_nonces"):  # targets set them, and whatever follows in this process wants them as they were
        monkeypatch.setattr(federation, name, getattr(federation, name))
    fuzzing.prepared()
    yield
    logging.disable(logging.NOTSET)


@pytest.mark.parametrize(("kind", "cases"), SHARES, ids=lambda one: getattr(one, "name", one))
def test_the_law_holds(kind: type[Target], cases: int, tmp_path: Path) -> None:
    told = fuzz(kind, cases, 1, tmp_path)
    assert told.broken == []
    assert told.cases == cases == sum(told.outcomes.values())
    assert len(told.outcomes) > 1, "the cases are all alike"


class Broken(Target):
    """A parser with one fault for each of its first letters."""

    name = "broken"
    refusals = (WireError,)

    def case(self, rng: Random) -> bytes:
        return b"xyz"

    def put(self, case: bytes) -> str:
        return "fine"


def told_of(put: Any, tmp_path: Path, wall: float = 5.0) -> Told:
    kind = type("Faulty", (Broken,), {"put": put})
    return fuzz(kind, 41, 0, tmp_path, wall=wall)


def test_a_parser_that_keeps_the_law_passes(tmp_path: Path) -> None:
    def refuse(self: Target, case: bytes) -> str:
        raise WireError("no")

    assert told_of(lambda self, case: "fine", tmp_path).broken == []
    assert told_of(refuse, tmp_path).outcomes == {"refused: WireError": 41}


def test_another_error_is_caught(tmp_path: Path) -> None:
    told = told_of(lambda self, case: str({}["x"]), tmp_path)  # type: ignore[index]
    assert told.outcomes == {"BROKEN: KeyError": 41} and "KeyError: 'x'" in told.broken[0]


def test_a_wrong_value_is_caught(tmp_path: Path) -> None:
    def put(self: Target, case: bytes) -> str:
        assert case == b"abc", "another message"
        return "fine"

    assert "another message" in told_of(put, tmp_path).broken[0]


def test_a_slow_parser_is_caught(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fuzzing, "SECONDS", 0.01)

    def put(self: Target, case: bytes) -> str:
        until = time.thread_time() + 0.02
        while time.thread_time() < until:
            pass
        return "fine"

    assert "BROKEN: slow" in told_of(put, tmp_path).outcomes


def test_a_parser_that_hangs_is_caught(tmp_path: Path) -> None:
    told = told_of(lambda self, case: time.sleep(60), tmp_path, wall=0.02)
    assert told.outcomes == {"BROKEN: hangs": 41}


def test_memory_out_of_proportion_is_caught(tmp_path: Path) -> None:
    told = told_of(lambda self, case: str(len(bytearray(2**25))), tmp_path)
    assert told.outcomes["BROKEN: memory"] == 2, "of 41 cases two are looked at"


@pytest.mark.parametrize("where", ["../outside", "here"])
def test_a_file_outside_the_folder_is_caught(tmp_path: Path, where: str) -> None:
    def put(self: Target, case: bytes) -> str:
        (self.folder / where if where != "here" else Path("here")).write_bytes(case)
        return "fine"

    assert "was written outside" in told_of(put, tmp_path).broken[0]


def test_a_file_inside_the_folder_is_none_of_the_laws_business(tmp_path: Path) -> None:
    assert told_of(lambda self, case: str((self.folder / "own").write_bytes(case)), tmp_path).broken == []


def test_a_case_derives_from_seed_target_and_number_alone(tmp_path: Path) -> None:
    kind = TARGETS[0]
    cases = [kind(tmp_path).case(Random(f"0 {kind.name} {number}")) for number in range(20)]
    assert cases == [kind(tmp_path).case(Random(f"0 {kind.name} {number}")) for number in range(20)]
    assert len(set(cases)) > 10


def test_the_program_tells_what_was_broken(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fuzzing, "TARGETS", [Broken])
    assert fuzzing.main(["--cases", "10"]) == 0
    monkeypatch.setattr(Broken, "put", lambda self, case: 1 / 0)
    assert fuzzing.main(["--cases", "10"]) == 1
    assert "10 broke the law" in capsys.readouterr().out


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(st.characters()),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4),
    max_leaves=12,
)


@given(JSON)
def test_any_json_is_settings_or_refused(value: Any) -> None:
    try:
        settings = checked_settings(value)
    except WireError:
        return
    assert checked_settings(settings) == settings


@given(JSON, st.integers(0, 2**32))
def test_any_json_is_an_experiment_or_refused(value: Any, seed: int) -> None:
    for saved in (value, changed_json(Random(seed), {"method": {"name": "lora"}, "data": value})):
        try:
            from_json(saved)
        except ExperimentError:
            continue
        except ValueError as error:
            assert "no method" in str(error) or "no curriculum" in str(error) or "profile" in str(error)
        json.dumps(saved)


def test_nothing_is_left_in_the_working_folder() -> None:
    assert os.listdir() == []
