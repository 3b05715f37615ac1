"""Several processes under the engine's laws: the same results for any number of them, and nothing lost when one is killed."""

from __future__ import annotations

import gc
import json
import logging
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from multiprocessing import Pipe
from pathlib import Path
from types import ModuleType
from typing import Any

import psutil
import pytest

from fedloom.client.store import ClientStore
from fedloom.data.tasks import DataError
from fedloom.engines.engine import Engine, drive
from fedloom.engines.workers import Start, WorkerError, Workers, receive, refuse
from fedloom.engines.wrap import Recording
from fedloom.messages import Failure, Replies, Task, Update
from fedloom.methods.fedavg import FedAvg
from fedloom.run import worker as program
from fedloom.run import world as loading
from fedloom.run.errors import ExperimentError
from fedloom.run.evaluation import evaluate
from fedloom.run.experiment import EngineSettings, Experiment
from fedloom.run.recipes import resolve
from fedloom.run.world import World, build, order_of
from fedloom.tensors import fingerprint
from fedloom.wire import WireError
from tests import small
from tests.conformance.toy import CLIENTS, DIGEST, local, payload, same_replies, task
from tests.conformance.toy_worker import start

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def pool(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Workers]:
    """Two workers over the toy, two clients at a time each."""
    engine = Workers(start(), 2, ClientStore(tmp_path_factory.mktemp("pool")), DIGEST, 2)
    yield engine
    engine.close()


@pytest.fixture
def toys(pool: Workers, tmp_path: Path) -> Workers:
    """The same workers, both ready, whose clients have no state yet."""
    pool.store = ClientStore(tmp_path / "warm")
    while len(pool.workers) < 2 or not all(one.ready for one in pool.workers):
        pool.run([where(k, 0.05) for k in CLIENTS])
    pool.store = ClientStore(tmp_path / "clients")
    return pool


def where(client: int, seconds: float = 0.0) -> Task:
    return Task("where", client, {}, {"seconds": seconds})


def die(client: int, lives: Path) -> Task:
    return Task("die", client, {}, {"lives": str(lives)})


def files(store: ClientStore) -> list[str]:
    return sorted(os.listdir(store.folder)) if store.folder and store.folder.exists() else []


# the laws


def test_the_replies_and_the_states_are_those_of_one_process(toys: Workers) -> None:
    reference = local(wave=2)
    for amount in (1.0, 2.5, 0.1):
        tasks = [Task("add", k, payload(k), {"amount": amount}) for k in (4, 0, 5, 1)]
        tasks[2:2] = [task(2, "stumble"), Task("echo", 3, payload(1), {"list": [1, 2]})]
        assert same_replies(toys.run(tasks), reference.run(*tasks))
    assert toys.store.fingerprint() == reference.store.fingerprint()
    assert toys.store.load(2) == ({}, {})
    toys.store.commit()
    assert len(files(toys.store)) == 5, "of what was superseded nothing stays"
    assert toys.run([]) == Replies(())


def test_every_worker_works_and_updates_come_in_task_order(toys: Workers) -> None:
    replies = toys.run([where(k, 0.5 if k == 5 else 0.1) for k in (5, 3, 4, 0, 2, 1)])
    assert [u.client for u in replies.updates] == [t.client for t in replies.traffic] == [5, 3, 4, 0, 2, 1]
    processes = [u.metrics["process"] for u in replies.updates]
    assert {u.metrics["number"] for u in replies.updates} == {"0", "1"}, "each has an environment of its own"
    assert len(set(processes)) == 2
    assert os.getpid() not in processes
    assert processes[0] == processes[1], "a wave is one worker's"
    assert processes[2:] == [processes[2]] * 4, "the other one took what was left while the first was busy"
    assert {u.metrics["visits"] for u in replies.updates} == {1.0}


LOADS = [4.0, 1.0, 1.0, 1.0, 3.0]


@pytest.mark.parametrize(
    ("count", "wave", "loads", "parts"),
    [
        (2, 32, LOADS, [[0, 2], [1, 3, 4]]),
        (2, 32, [1.0] * 5, [[0, 2, 4], [1, 3]]),
        (3, 32, LOADS, [[0], [4], [1, 2, 3]]),
        (9, 2, LOADS, [[0], [4], [1], [2], [3]]),
        (2, 2, LOADS, [[0, 3], [1, 2], [4]]),
        (2, 32, None, [[0, 1, 2, 3, 4]]),
        (2, 2, None, [[0, 1], [2, 3], [4]]),
    ],
)
def test_workers_share_an_asking_by_load_where_that_changes_nothing(
    count: int, wave: int, loads: list[float] | None, parts: list[list[int]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    given: list[list[int]] = []

    def answered(self: Workers, parts: list[list[Task]]) -> Iterator[Replies]:
        given.extend([task.client for task in part] for part in parts)
        return (Replies(tuple(Update(task.client, 1) for task in part)) for part in parts)

    monkeypatch.setattr(Workers, "_answered", answered)
    load = None if loads is None else lambda client: loads[client]
    replies = Workers(start(), count, ClientStore(tmp_path), DIGEST, wave, load).run([task(k) for k in range(5)])
    assert given == parts
    assert [update.client for update in replies.updates] == [0, 1, 2, 3, 4]


def test_updates_are_taken_in_task_order_as_soon_as_their_turn_has_come(toys: Workers, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whichever worker is the faster one: of what could be taken nothing waits for more than the wave that was heard at the same time."""
    happened: list[int | set[int]] = []
    answers = Workers._taken

    def heard(self: Workers, tasks: list[Task], *rest: Any) -> Replies:
        happened.append({task.client for task in tasks})
        return answers(self, tasks, *rest)

    def take(update: Update) -> Update:
        happened.append(update.client)
        return replace(update, tensors={})

    monkeypatch.setattr(Workers, "_taken", heard)
    replies = toys.run([task(k) for k in range(6)], take)
    here, due, waited = set[int](), 0, 0
    for event in happened:
        if isinstance(event, set):
            waited += due in here
            assert waited < toys.count, f"{due} could have been taken before {event} was heard"
            here |= event
        else:
            assert event == due and event in here
            due, waited = due + 1, 0
    assert due == 6 and not any(update.tensors for update in replies.updates)


def test_what_may_not_cross_ends_the_run_before_anything_ran(toys: Workers) -> None:
    with pytest.raises(WireError, match="setting 'value' is None"):
        toys.run([*(task(k) for k in range(5)), Task("echo", 5, {}, {"value": None})])  # type: ignore[dict-item]
    assert files(toys.store) == []


def test_a_failure_tells_its_reason_leaves_the_state_and_reaches_the_log(toys: Workers, caplog: pytest.LogCaptureFixture) -> None:
    toys.run([task(k) for k in CLIENTS])
    before = toys.store.name(2)
    with caplog.at_level(logging.WARNING, "fedloom"):
        replies = toys.run([task(k, "stumble" if k == 2 else "add") for k in CLIENTS])
    assert replies.failures == (Failure(2, "ZeroDivisionError: the device ran out of luck"),)
    assert toys.store.name(2) == before
    assert any("client 2 failed" in line and "ran out of luck" in line for line in caplog.messages)


# workers that die


def test_the_wave_of_a_killed_worker_is_done_again_as_if_nothing_had_happened(
    toys: Workers, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    lives = tmp_path / "lives"
    lives.write_text("x")
    before = {w.process.pid for w in toys.workers}
    with caplog.at_level(logging.WARNING, "fedloom"):
        replies = toys.run([task(0), task(1), task(2), die(3, lives), task(4), task(5)])
    assert (len(replies.updates), replies.failures) == (6, ())
    assert [u.metrics["visits"] for u in replies.updates] == [1.0] * 6, "the state that the dead worker wrote was taken"
    (line,) = [text for text in caplog.messages if "signal 9" in text]
    assert "while it computed clients [2, 3]; another does them again" in line
    assert len(before - {w.process.pid for w in toys.workers}) == 1
    toys.store.commit()
    toys.store.sweep()
    assert len(files(toys.store)) == 6


def test_a_wave_that_kills_every_worker_fails_and_the_others_do_not(toys: Workers, tmp_path: Path) -> None:
    toys.run([task(k) for k in CLIENTS])
    before, lives = toys.store.name(2), tmp_path / "lives"
    lives.write_text("xx")
    replies = toys.run([task(0), task(1), task(2), die(3, lives), task(4), task(5)])
    assert [u.client for u in replies.updates] == [0, 1, 4, 5]
    assert [f.client for f in replies.failures] == [2, 3]
    assert all("WorkerError: worker" in f.reason and "ended with signal 9" in f.reason for f in replies.failures)
    assert [t.bytes_up for t in replies.traffic[2:4]] == [0, 0]
    assert toys.store.name(2) == before
    again = toys.run([task(k) for k in CLIENTS])
    assert [u.metrics["visits"] for u in again.updates] == [3.0, 3.0, 2.0, 2.0, 3.0, 3.0]


def test_workers_killed_while_idle_are_replaced(toys: Workers, caplog: pytest.LogCaptureFixture) -> None:
    for one in toys.workers:
        os.kill(one.process.pid, signal.SIGKILL)
        one.process.wait()
    with caplog.at_level(logging.WARNING, "fedloom"):
        assert len(toys.run([task(k) for k in CLIENTS]).updates) == 6
    assert sum("ended with signal 9 while it had nothing to do" in text for text in caplog.messages) == 2


def test_a_run_that_is_broken_off_leaves_no_answer_for_the_next(toys: Workers, monkeypatch: pytest.MonkeyPatch) -> None:
    def stopped(*_: object) -> None:
        raise KeyboardInterrupt

    toys.run([task(k) for k in CLIENTS])
    processes = [one.process for one in toys.workers]
    with monkeypatch.context() as patch:
        patch.setattr(Workers, "_heard", stopped)
        with pytest.raises(KeyboardInterrupt):
            toys.run([where(k) for k in CLIENTS])
    assert toys.workers == []
    assert all(process.returncode is not None for process in processes)


# starting and ending


def test_a_worker_that_refuses_to_start_says_why(tmp_path: Path) -> None:
    words = "import sys, time; from multiprocessing.connection import Connection as C; line = C(int(sys.argv[-1])); line.recv_bytes(); "
    words += """line.send_bytes(b'{"kind": "failed", "text": "LookupError: no model x", "blobs": 0}'); time.sleep(60)"""
    engine = Workers(Start((sys.executable, "-c", words), {}, lambda number: {}), 1, ClientStore(tmp_path), DIGEST, 2)
    with pytest.raises(WorkerError, match="worker 0 could not start: LookupError: no model x"):
        engine.run([task(0)])
    assert engine.workers == []


def test_a_worker_that_dies_while_it_starts_ends_the_run(tmp_path: Path) -> None:
    engine = Workers(Start((sys.executable, "-c", "raise SystemExit(3)"), {}, lambda number: {}), 1, ClientStore(tmp_path), DIGEST, 2)
    with pytest.raises(WorkerError, match=r"worker 0 \(process \d+\) ended with exit code 3 before it could begin"):
        engine.run([task(0)])


def test_why_a_worker_cannot_begin_is_told() -> None:
    here, there = Pipe()
    refuse(there, "LookupError: no model 'x'")
    assert receive(here) == ({"kind": "failed", "text": "LookupError: no model 'x'", "blobs": 0}, [])


def test_workers_need_a_folder_for_the_states() -> None:
    with pytest.raises(ValueError, match="a client store with a folder"):
        Workers(start(), 2, ClientStore(), DIGEST, 2)


def ended(processes: list[int], within: float = 20.0) -> bool:
    """Whether all of them are gone, or are soon."""
    until = time.monotonic() + within
    while time.monotonic() < until:
        if not any(psutil.pid_exists(p) and psutil.Process(p).status() != psutil.STATUS_ZOMBIE for p in processes):
            return True
        time.sleep(0.05)
    return False


def test_workers_end_with_the_process_that_started_them_however_busy(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "tests.conformance.toy_worker", "parent", str(tmp_path)]
    process = subprocess.Popen(command, cwd=ROOT, stderr=subprocess.DEVNULL)
    try:
        told = tmp_path / "workers"
        while not told.exists() or not told.read_text():
            assert process.poll() is None
            time.sleep(0.05)
        workers = [int(word) for word in told.read_text().split()]
        assert all(map(psutil.pid_exists, workers))
        time.sleep(0.2)
        process.kill()
        process.wait(timeout=20)
        assert ended(workers)
    finally:
        process.kill()
        process.wait()


# real methods


def whole(world: World, engine: Engine, store: ClientStore) -> tuple[list, str, str]:
    """Set-up, rounds and an evaluation: all that was said, and fingerprints of the server's and the clients' state."""
    method, said = world.experiment.method, Recording(engine)
    state = drive(method.setup(method.init(world.model), world.pool), said, quorum=0)
    for _ in range(world.experiment.rounds):
        state = drive(method.round(state, world.pool), said)
    found = evaluate(world, state, said)
    return said.calls, fingerprint(state.shared), f"{store.fingerprint()} {found.scores} {found.correct.tolist()}"


def same(first: tuple[list, str, str], second: tuple[list, str, str]) -> bool:
    heard = zip(first[0], second[0], strict=True)
    return first[1:] == second[1:] and all(same_replies(one, other) for (_, one), (_, other) in heard)


def test_one_two_and_three_workers_are_bit_identical(tmp_path: Path) -> None:
    """Of a method with a set-up, masks, and state of its own on the devices; workers know no method."""
    wanted = replace(small.experiment("fibecfed"), engine=EngineSettings(threads=1, workers=2), clients=6, cohort=5)
    world = build(wanted)
    alone = replace(world, experiment=replace(wanted, engine=EngineSettings(threads=1)))
    store = ClientStore(tmp_path / "alone")
    expected = whole(alone, alone.engine(store), store)
    engine = world.engine(ClientStore(tmp_path / "workers"))
    assert isinstance(engine, Workers)
    for count in (2, 3):
        engine.count, engine.store = count, ClientStore(tmp_path / str(count))
        assert same(whole(world, engine, engine.store), expected)
        assert len(engine.workers) == count
    processes = [one.process for one in engine.workers]
    del engine
    gc.collect()
    assert all(process.returncode is not None for process in processes)


# what a worker is told


def order(experiment: Experiment, threads: int = 1) -> dict:
    return json.loads(json.dumps(order_of(build(experiment), threads)))


def test_a_worker_builds_the_same_world_from_its_order() -> None:
    wanted = replace(small.experiment("fibecfed"), engine=EngineSettings(stack=3, threads=2, workers=4))
    world = program.built(order(wanted))
    assert world.experiment == replace(wanted, engine=EngineSettings(stack=3, threads=1))
    assert world.fingerprint() == build(wanted).fingerprint()


def test_a_worker_loads_a_method_from_the_file_that_defines_it(tmp_path: Path) -> None:
    path = tmp_path / "mine.py"
    path.write_text(
        "from dataclasses import dataclass\nfrom typing import ClassVar\nfrom fedloom.methods.fedavg import FedAvg\n\n\n"
        '@dataclass(frozen=True)\nclass Mine(FedAvg):\n    name: ClassVar[str] = "mine"\n    paper: ClassVar[str] = "none"\n'
        "    extra: int = 3\n"
    )
    wanted = replace(small.experiment(), method=resolve(f"{path}:mine").method)
    told = order(wanted)
    assert told["recipe"] == str(path)
    world = program.built(told)
    assert (type(world.experiment.method).__name__, world.experiment.method.extra) == ("Mine", 3)
    with pytest.raises(ExperimentError, match="method 'mine' is another in a process of its own"):
        program.built({**told, "digest": "0" * 16})


def test_a_method_without_a_file_cannot_have_workers(monkeypatch: pytest.MonkeyPatch) -> None:
    class Typed(FedAvg):
        name = "typed"

    Typed.__module__ = "typed_in"
    monkeypatch.setitem(sys.modules, "typed_in", ModuleType("typed_in"))
    with pytest.raises(ExperimentError, match="--engine.workers needs method 'typed' in a Python file"):
        order_of(build(replace(small.experiment(), method=Typed())), 1)


def test_a_worker_refuses_data_that_changed() -> None:
    with pytest.raises(DataError, match="changed while the run went on"):
        program.built({**order(small.experiment()), "data": "0" * 16})


@pytest.mark.parametrize(
    ("visible", "count", "threads", "expected"),
    [
        (None, 0, 0, [("2", None), ("2", None)]),
        (None, 1, 3, [("3", None), ("3", None)]),
        (None, 2, 0, [("2", "0"), ("2", "1"), ("2", "0")]),
        ("5,7", 2, 0, [("2", "5"), ("2", "7")]),
    ],
)
def test_workers_share_threads_and_gpus(
    visible: str | None, count: int, threads: int, expected: list, monkeypatch: pytest.MonkeyPatch
) -> None:
    wanted = replace(small.experiment(), engine=EngineSettings(workers=3, threads=threads))
    world = build(small.experiment())
    monkeypatch.setattr(loading.torch.cuda, "device_count", lambda: count)
    monkeypatch.setattr(loading.torch, "get_num_threads", lambda: 8)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    if visible is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    given = loading.start(replace(world, experiment=wanted)).environment
    found = [given(i) for i in range(len(expected))]
    assert [(e["OMP_NUM_THREADS"], e.get("CUDA_VISIBLE_DEVICES")) for e in found] == expected


@pytest.mark.parametrize("said", [b"", b"[]", b"\xff", b"3", b"{}", b'{"blobs": "1"}', b'{"blobs": null}', b"[" * 100_000])
def test_what_no_worker_says_is_as_if_it_were_gone(said: bytes) -> None:
    ours, theirs = Pipe()
    theirs.send_bytes(said)
    with pytest.raises(OSError, match="not what a worker says"):
        receive(ours)
