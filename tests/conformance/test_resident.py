"""The device's worker: one process for an experiment, looked after; states by name; nothing from the wire touches other files."""

from __future__ import annotations

import json
import os
import signal
import sys
import time
from pathlib import Path

import psutil
import pytest

pytest.importorskip("flwr", reason="the extra 'flower' is not installed: pip install 'fedloom[flower]'")

from fedloom.client.store import FILE
from fedloom.engines.asked import ASKED, Asked, read, state_in
from fedloom.engines.device import Ungreeted
from fedloom.engines.resident import Resident, bytes_of
from fedloom.engines.workers import Start, WorkerError
from fedloom.messages import Failure, Task, Update
from fedloom.wire import WireError, pack, unpack
from tests.conformance import toy_worker

pytestmark = pytest.mark.flower
DIGEST = "abc123"
GREETING = json.dumps({"digest": DIGEST})


def made(folder: Path) -> Resident:
    """One whose worker is the toy's, under this file's digest."""

    def start(greeting: object) -> Start:
        toy = toy_worker.start()
        return Start(toy.command, toy.order, lambda number: {**toy.environment(number), "TOY_DIGEST": DIGEST})

    return Resident(folder, start, deadline=60.0)


@pytest.fixture(scope="module")
def kept(tmp_path_factory: pytest.TempPathFactory):
    one = made(tmp_path_factory.mktemp("kept"))
    yield one
    one.close()


@pytest.fixture
def resident(kept: Resident, tmp_path: Path) -> Resident:
    """One for all tests, whose worker goes on if a test did not end it. The folder of states is the test's own: it is told with every
    task."""
    kept.folder, kept.deadline, kept.memory = tmp_path / "states", 60.0, bytes_of(0.0)
    return kept


@pytest.fixture
def fresh(tmp_path: Path):
    """One that nobody has greeted."""
    one = made(tmp_path / "states")
    yield one
    one.close()


def asked(
    resident: Resident, op: str = "where", state: str = "", committed: str | None = None, **settings: object
) -> tuple[Update | Failure, str]:
    settings = {"seconds": 0.0, **settings} if op == "where" else settings
    blob = pack(Task(op, 3, {}, settings), DIGEST)  # type: ignore[arg-type]
    answer, after = resident.answer(3, state, state if committed is None else committed, blob)
    update = answer if isinstance(answer, Failure) else unpack(answer, DIGEST)
    assert isinstance(update, Update | Failure)
    return update, after


def test_the_process_stays_and_states_go_on_by_name(resident: Resident) -> None:
    resident.greet(GREETING)
    first, one = asked(resident)
    second, two = asked(resident, state=one)
    assert first.metrics["process"] == second.metrics["process"] != os.getpid()
    assert (first.metrics["visits"], second.metrics["visits"]) == (1.0, 2.0)
    again, other = asked(resident, state=one)
    assert (again.metrics["visits"], other) == (2.0, two), "done again from the same state, it comes to the same"


def test_only_the_last_state_and_the_one_before_are_kept(resident: Resident, tmp_path: Path) -> None:
    resident.greet(GREETING)
    names = [""]
    for _ in range(4):
        names.append(asked(resident, state=names[-1])[1])
    assert sorted(path.name for path in (tmp_path / "states" / DIGEST).iterdir()) == sorted(names[-2:])


def test_what_the_server_has_committed_is_kept_however_often_a_round_changes_the_state(resident: Resident, tmp_path: Path) -> None:
    resident.greet(GREETING)
    _, first = asked(resident)
    _, second = asked(resident, state=first, committed=first)
    _, third = asked(resident, state=second, committed=first)
    assert sorted(path.name for path in (tmp_path / "states" / DIGEST).iterdir()) == sorted([first, second, third])
    again, same = asked(resident, state=first, committed=first)  # the round did not count, or the server was killed
    assert (again.metrics["visits"], same) == (2.0, second)
    asked(resident, state=third, committed=third)
    assert len([*(tmp_path / "states" / DIGEST).iterdir()]) == 2


def test_the_last_prediction_and_its_state_are_kept(resident: Resident, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """However far the device goes on from there; and a prediction that the disk does not take has been made all the same."""
    resident.greet(GREETING)
    place = tmp_path / "states" / DIGEST
    _, first = asked(resident)
    assert state_in(place) == "" and not (place / ASKED).exists()
    with monkeypatch.context() as patch:
        patch.setattr("fedloom.engines.resident.PREDICTS", "where")
        _, after = asked(resident, state=first)
    kept = read(place)
    assert (kept.client, kept.state, unpack(kept.task, DIGEST)) == (3, first, Task("where", 3, {}, {"seconds": 0.0}))
    assert kept.order == toy_worker.start().order
    state = after
    for _ in range(3):
        _, state = asked(resident, state=state)
    assert (place / first).exists() and (place / state).exists() and not (place / after).exists()
    assert read(place) == kept
    monkeypatch.setattr("fedloom.engines.resident.PREDICTS", "where")
    monkeypatch.setattr(Asked, "write", full_disk)
    update, after = asked(resident, state=state)
    assert isinstance(update, Update) and after != state and read(place) == kept


def full_disk(self: Asked, folder: Path) -> None:
    raise OSError(28, "No space left on device")


def test_a_task_before_any_greeting_asks_for_one(fresh: Resident) -> None:
    with pytest.raises(Ungreeted, match=DIGEST):
        asked(fresh)


def test_a_worker_that_dies_is_replaced_and_its_task_begun_again(resident: Resident, tmp_path: Path) -> None:
    resident.greet(GREETING)
    before = asked(resident)[0].metrics["process"]
    (tmp_path / "lives").write_text("x")
    update, _ = asked(resident, "die", lives=str(tmp_path / "lives"))
    assert update.metrics["visits"] == 1.0
    assert asked(resident)[0].metrics["process"] != before


def test_a_worker_that_always_dies_is_a_failure_with_its_reason(resident: Resident, tmp_path: Path) -> None:
    resident.greet(GREETING)
    (tmp_path / "lives").write_text("xxxx")
    failure, after = asked(resident, "die", lives=str(tmp_path / "lives"))
    assert isinstance(failure, Failure) and "died 2 times" in failure.reason and after == ""


def test_a_worker_killed_while_idle_is_replaced(resident: Resident) -> None:
    resident.greet(GREETING)
    os.kill(int(asked(resident)[0].metrics["process"]), signal.SIGKILL)
    time.sleep(0.2)
    assert asked(resident)[0].metrics["visits"] == 1.0


def test_a_worker_that_hangs_is_ended_in_time(resident: Resident) -> None:
    resident.greet(GREETING)
    process = int(asked(resident)[0].metrics["process"])
    os.kill(process, signal.SIGSTOP)
    resident.deadline = 1.0
    failure, _ = asked(resident)
    assert isinstance(failure, Failure) and "no answer within 1 s" in failure.reason
    resident.deadline = 60.0
    assert asked(resident)[0].metrics["process"] != process


@pytest.mark.parametrize(
    "state",
    [
        "../../etc/passwd",
        "client-4-0123456789abcdef.safetensors",
        "x",
        "client-3-0123456789abcdef.safetensors/..",
        f"client-{'3' * 5000}-0123456789abcdef.safetensors",
    ],
    ids=lambda state: state[:40],
)
def test_a_state_that_is_no_name_of_this_clients_is_refused(resident: Resident, state: str) -> None:
    resident.greet(GREETING)
    for names in ({"state": state}, {"committed": state}):
        with pytest.raises(WireError, match="is none of client 3"):
            asked(resident, **names)


def test_a_state_that_is_not_there_is_a_failure(resident: Resident) -> None:
    name = "client-3-0123456789abcdef.safetensors"
    assert FILE.fullmatch(name)
    resident.greet(GREETING)
    failure, after = asked(resident, state=name)
    assert isinstance(failure, Failure) and "cannot be read" in failure.reason and after == name


@pytest.mark.parametrize(
    "greeting",
    ["", "[]", "{}", '{"digest": 3}', '{"digest": "../x"}', '{"digest": ""}', "[" * 100_000, json.dumps({"digest": "\u00e9" * 64})],
)
def test_a_greeting_that_is_none_is_refused(fresh: Resident, greeting: str, tmp_path: Path) -> None:
    with pytest.raises(WireError, match="a greeting"):
        fresh.greet(greeting)
    assert not (tmp_path / "states").exists()


def test_a_worker_that_cannot_begin_says_why(tmp_path: Path) -> None:
    resident = Resident(tmp_path, lambda greeting: Start(("false",), {}, lambda number: {}), deadline=60.0)
    with pytest.raises(WorkerError, match="before it could begin"):
        resident.greet(GREETING)
    assert resident._worker is None


REFUSES = """
import sys, time
from multiprocessing.connection import Connection
Connection(int(sys.argv[1])).send_bytes(b'{"kind": "failed", "text": "no room", "blobs": 0}')
time.sleep(60)
"""


def test_a_greeting_that_was_refused_is_refused_again_while_the_worker_still_ends(tmp_path: Path) -> None:
    """A server that is started anew greets at once. The worker said no and is not gone yet; that it is there is no consent."""
    resident = Resident(tmp_path, lambda greeting: Start((sys.executable, "-c", REFUSES), {}, lambda number: {}), deadline=60.0)
    for _ in range(2):
        with pytest.raises(WorkerError, match="could not start: no room"):
            resident.greet(GREETING)
        assert resident._worker is None


# what the worker may hold


def test_a_worker_that_grows_too_large_is_ended_and_told_and_the_next_task_finds_another(resident: Resident, tmp_path: Path) -> None:
    resident.greet(GREETING)
    first, state = asked(resident)
    held = psutil.Process(int(first.metrics["process"])).memory_info().rss  # type: ignore[arg-type]
    resident.memory = held + 2**26
    failure, after = asked(resident, "grow", state=state, bytes=2**28)
    assert isinstance(failure, Failure) and after == state
    assert failure.reason.startswith("MemoryError: the worker held ") and "GiB, and may hold" in failure.reason
    second, _ = asked(resident, state=state)
    assert second.metrics["visits"] == 2.0 and second.metrics["process"] != first.metrics["process"]


def test_a_worker_that_is_too_large_after_its_answer_is_replaced_and_the_answer_counts(resident: Resident) -> None:
    resident.greet(GREETING)
    first, state = asked(resident)
    resident.memory = 1
    again, after = asked(resident, state=state)
    assert again.metrics["visits"] == 2.0, "it was quicker than the first look"
    resident.memory = 2**40
    last, _ = asked(resident, state=after)
    assert last.metrics["visits"] == 3.0 and last.metrics["process"] != again.metrics["process"] == first.metrics["process"]


def test_a_worker_that_cannot_even_begin_within_its_bound_says_so(fresh: Resident) -> None:
    fresh.memory = 2**20
    with pytest.raises(WorkerError, match="may hold 0.00, before it could begin; give it more: --memory GIB"):
        fresh.greet(GREETING)


def test_the_bound_is_what_was_said_or_nine_tenths_of_what_there_is(monkeypatch: pytest.MonkeyPatch) -> None:
    assert bytes_of(1.5) == 3 * 2**29
    assert 0 < bytes_of(0.0) <= 0.9 * psutil.virtual_memory().total
    monkeypatch.setattr("fedloom.engines.resident.all_bytes", lambda: 1000)
    assert bytes_of(0.0) == 900
    for wrong in (-1.0, float("nan"), float("inf")):
        with pytest.raises(ValueError, match="number of GiB"):
            bytes_of(wrong)


def test_what_is_noted_of_its_data_stays_with_the_device(
    fresh: Resident, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("TOY_NOTES", "9 of 12 texts are cut;2 texts are empty")
    assert "notes" not in fresh.greet(GREETING)
    assert [record.getMessage() for record in caplog.records] == ["note: 9 of 12 texts are cut", "note: 2 texts are empty"]
