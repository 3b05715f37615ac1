"""The six laws of ``engines/engine.py`` on the toy world, for every engine; and the wrappers, under the same laws."""

from __future__ import annotations

import random
import weakref
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from fedloom.client.store import ClientStore
from fedloom.encodings import Encoding
from fedloom.engines import local as engines_local
from fedloom.engines.engine import drive
from fedloom.engines.local import Local
from fedloom.engines.wrap import Faulty, Lossy, Recording
from fedloom.messages import CohortFailed, Failure, Replies, Task, Traffic, Update, insist
from fedloom.tensors import clone, fingerprint
from fedloom.wire import Packer, WireError, pack
from tests.conformance.engines import ENGINES, over
from tests.conformance.toy import (
    ANSWERS,
    CLIENTS,
    DIGEST,
    World,
    host_of,
    local,
    payload,
    same_replies,
    same_update,
    task,
)


@pytest.fixture(params=ENGINES.values())
def world(request: pytest.FixtureRequest) -> World:
    return request.param()


SHUFFLED = [4, 0, 5, 2, 1, 3]


# order


def test_order_updates_and_traffic_come_in_task_order(world: World) -> None:
    replies = world.run(*(task(k) for k in SHUFFLED))
    assert [u.client for u in replies.updates] == SHUFFLED
    assert [u.num_examples for u in replies.updates] == [10 + k for k in SHUFFLED]
    assert [t.client for t in replies.traffic] == SHUFFLED
    assert replies.failures == ()


def test_order_holds_around_failures(world: World) -> None:
    replies = world.run(task(4), task(0, "stumble"), task(5), task(2, "stumble"), task(1, "trian"), task(3))
    assert [u.client for u in replies.updates] == [4, 5, 3]
    assert [f.client for f in replies.failures] == [0, 2, 1]
    assert [t.client for t in replies.traffic] == [4, 0, 5, 2, 1, 3]


def test_order_updates_are_taken_in_task_order_once_and_nothing_else_is_kept(world: World) -> None:
    came: list[Update] = []

    def take(update: Update) -> Update:
        came.append(update)
        return replace(update, tensors={})

    tasks = [task(4), task(0, "stumble"), task(5), task(2), task(1), task(3)]
    replies = world.engine.run(tasks, take)
    assert [update.client for update in came] == [4, 5, 2, 1, 3]
    assert all(update.tensors for update in came)
    assert list(replies.updates) == [replace(update, tensors={}) for update in came]
    assert [f.client for f in replies.failures] == [0]
    assert [t.client for t in replies.traffic] == [4, 0, 5, 2, 1, 3]


def test_no_tasks_no_replies(world: World) -> None:
    assert world.run() == Replies((), (), ())


# isolation


def test_isolation_everything_arrives_bit_for_bit(world: World) -> None:
    sent = payload()
    settings = {"name": "a", "count": 3, "rate": 0.1, "flag": True, "list": [1, 2], "none": []}
    (update,) = world.run(Task("echo", 2, sent, settings)).updates
    assert fingerprint(update.tensors) == fingerprint(sent)
    assert {n: t.dtype for n, t in update.tensors.items()} == {n: t.dtype for n, t in sent.items()}
    assert update.metrics == settings
    assert type(update.metrics["flag"]) is bool


def test_isolation_names_arrive_in_one_order(world: World) -> None:
    """A sum over tensors must not depend on chance: names arrive in the same order every time."""
    sent = {f"layer.{i}": torch.full((1,), float(i)) for i in range(40)}
    first, *others = [tuple(world.run(Task("echo", k, sent)).updates[0].tensors) for k in CLIENTS]
    assert set(others) == {first}


def test_isolation_a_device_cannot_reach_the_senders_tensors(world: World) -> None:
    shared, words = payload(), ["a", "b"]
    before = clone(shared)
    replies = world.run(*(Task("deface", k, shared, {"words": words}) for k in CLIENTS))
    assert len(replies.updates) == len(CLIENTS)
    assert fingerprint(shared) == fingerprint(before)
    assert words == ["a", "b"]


def test_isolation_devices_cannot_reach_each_other(world: World) -> None:
    shared = {"w": torch.ones(3)}
    replies = world.run(Task("deface", 0, shared), Task("echo", 1, shared))
    assert replies.updates[1].tensors["w"].tolist() == [1, 1, 1]


def test_isolation_the_server_cannot_reach_a_devices_state(world: World) -> None:
    (first,) = world.run(task(1, "lend")).updates
    first.tensors["own"].zero_()
    (second,) = world.run(task(1, "lend")).updates
    assert second.tensors["own"].tolist() == [7, 7, 7, 7]


def test_isolation_counts_whole_messages(world: World) -> None:
    sent = task(3)
    replies = world.run(sent)
    (update,), (traffic,) = replies.updates, replies.traffic
    assert traffic == Traffic(3, len(pack(sent, DIGEST)), len(pack(update, DIGEST)), update.flops, update.examples)
    assert (update.flops, update.examples) == (2 * (4 + 0.5 + 1.0), 9)


# strictness

BAD_SETTINGS = {
    "None": None,
    "a dict": {"a": 1},
    "a mixed tuple": (1, "a"),
    "a mixed list": [1, 0.5],
    "a nested list": [[1], [2]],
    "bytes": b"a",
    "nan": float("nan"),
    "a tensor": torch.ones(1),
}
BAD_TENSORS = {
    "complex": torch.zeros(2, dtype=torch.complex64),
    "float8": torch.zeros(2).to(torch.float8_e4m3fn),
    "a list": [1.0, 2.0],
    "None": None,
}


@pytest.mark.parametrize("value", BAD_SETTINGS.values(), ids=BAD_SETTINGS)
def test_strictness_a_setting_that_may_not_cross_ends_the_run(world: World, value: object) -> None:
    bad = Task("echo", 2, {}, {"value": value})  # type: ignore[dict-item]
    with pytest.raises(WireError, match="setting 'value' is") as said:
        world.run(task(0), task(1), task(3), bad, task(4))
    with pytest.raises(WireError) as alone:
        pack(bad, DIGEST)
    assert str(said.value) == str(alone.value)
    assert world.toy.ran == [], "nothing may be sent when one task may not cross"


@pytest.mark.parametrize("value", BAD_TENSORS.values(), ids=BAD_TENSORS)
def test_strictness_a_tensor_that_may_not_cross_ends_the_run(world: World, value: torch.Tensor) -> None:
    with pytest.raises(WireError, match="'w'"):
        world.run(task(0), task(1), task(3), Task("echo", 2, {"w": value}))
    assert world.toy.ran == []


@pytest.mark.parametrize("name", ["", "__metadata__", 3])
def test_strictness_names(world: World, name: str) -> None:
    with pytest.raises(WireError, match="cannot name"):
        world.run(Task("echo", 2, {name: torch.ones(1)}))


# failure

REASONS = {
    "none": "TypeError: the operation returned None",
    "a dict": "TypeError: the operation returned {'client': 2}",
    "another client": "TypeError: the operation returned Update(client=3",
    "nan": "WireError: tensor 'w' holds NaN or infinity",
    "infinity": "WireError: tensor 'w' holds NaN or infinity",
    "complex": "WireError: tensor 'w' has dtype torch.complex64",
    "no tensor": "WireError: 'w' is a list",
    "a metric that is None": "WireError: setting 'loss' is None",
    "a metric that is nan": "WireError: setting 'loss' is nan",
}


def failing(world: World, bad: Task) -> str:
    """Run a bad task between two good ones; the good ones must be untouched. Returns the reason."""
    replies = world.run(task(4), bad, task(1))
    assert [u.client for u in replies.updates] == [4, 1]
    alone = local()
    assert all(map(same_update, replies.updates, alone.run(task(4), task(1)).updates))
    (failure,) = replies.failures
    assert failure.client == bad.client
    traffic = replies.traffic[1]
    assert (traffic.client, traffic.bytes_up, traffic.flops, traffic.examples) == (bad.client, 0, 0.0, 0)
    assert traffic.bytes_down == len(pack(bad, DIGEST))
    return failure.reason


@pytest.mark.parametrize(("world", "answer"), over(ANSWERS, ("nan", "another client")), indirect=["world"])
def test_failure_an_operation_that_returns_what_may_not_cross(world: World, answer: str) -> None:
    before = world.state(2)
    assert failing(world, task(2, "reply", answer=answer)).startswith(REASONS[answer])
    assert world.state(2) == before


def test_failure_an_operation_that_raises(world: World) -> None:
    assert failing(world, task(2, "stumble")) == "ZeroDivisionError: the device ran out of luck"


def test_failure_work_that_cannot_be_done(world: World) -> None:
    assert failing(world, task(2, "strain")) == "ArithmeticError: the amount is negative"


@pytest.mark.parametrize(("world", "op"), over(("trian", "unmarked", "_begun", "__init__", "ran"), ("trian",)), indirect=["world"])
def test_failure_only_marked_operations_can_be_called(world: World, op: str) -> None:
    reason = failing(world, task(2, op))
    known = "['add', 'deface', 'echo', 'lend', 'reply', 'strain', 'stumble']"
    assert reason == f"ValueError: Toy has no client operation '{op}'; it has {known}"
    assert (op, 2) not in world.toy.ran


def test_failure_all_of_them(world: World) -> None:
    replies = world.run(*(task(k, "stumble") for k in CLIENTS))
    assert replies.updates == ()
    assert [f.client for f in replies.failures] == list(CLIENTS)


def test_failure_is_not_an_old_answer(world: World) -> None:
    world.run(*(task(k) for k in CLIENTS))
    replies = world.run(task(0), task(1, "stumble"))
    assert [u.client for u in replies.updates] == [0]
    assert replies.updates[0].metrics["visits"] == 2


@pytest.mark.parametrize("kind", ENGINES.values())
def test_failure_an_experiment_that_is_another(kind, monkeypatch: pytest.MonkeyPatch) -> None:
    world = kind()
    strange = host_of("another experiment")
    monkeypatch.setattr(world.host, "answer", strange[3].answer)
    (failure,) = world.run(task(1)).failures
    assert failure == Failure(1, "WireError: message of experiment 'toy-experiment'; this is experiment 'another experiment'")
    assert strange[0].ran == []


@pytest.mark.parametrize("kind", ENGINES.values())
def test_failure_an_answer_for_another_experiment_or_client(kind, monkeypatch: pytest.MonkeyPatch) -> None:
    world = kind()
    (update,) = local().run(task(1)).updates
    for forged, reason in (
        (pack(update, "another experiment"), "WireError: message of experiment 'another experiment'"),
        (pack(replace(update, client=2), DIGEST), "WireError: the reply is not this client's update"),
        (pack(task(1), DIGEST), "WireError: the reply is not this client's update"),
        (b"not a message", "WireError: not a Fedloom message"),
        (pack(update, DIGEST)[:-1], "WireError: "),
    ):
        monkeypatch.setattr(world.host, "answer", lambda blobs, forged=forged: [forged for _ in blobs])
        replies = world.run(task(1))
        assert replies.updates == ()
        assert replies.failures[0].reason.startswith(reason)
        assert replies.traffic[0].bytes_up == 0


# durability


def test_durability_state_is_stored_when_the_operation_returned(world: World) -> None:
    for visits in (1, 2, 3):
        (update,) = world.run(task(2)).updates
        assert update.metrics["visits"] == visits
    private, _ = world.store.load(2)
    assert private["visits"].tolist() == [3]
    assert world.store.load(3) == ({}, {})


@pytest.mark.parametrize(
    ("world", "what"), over(["stumble", "strain", *ANSWERS], ("stumble", "strain", "nan", "another client")), indirect=["world"]
)
def test_durability_what_failed_left_the_old_state(world: World, what: str) -> None:
    bad = task(2, "reply", answer=what) if what in ANSWERS else task(2, what)
    world.run(task(2), task(3))
    before = world.state(2)
    assert len(world.run(bad, task(3)).failures) == 1
    assert (bad.op, 2) in world.toy.ran[-2:], "the operation must have begun, and changed its state, for this to mean anything"
    assert world.state(2) == before
    assert world.store.load(3)[0]["visits"].tolist() == [2]


def test_durability_state_that_could_not_be_written_is_a_failure(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(self: ClientStore, *_: object) -> None:
        raise OSError("disk full")

    monkeypatch.setattr(ClientStore, "save", full)
    assert world.run(task(2)).failures == (Failure(2, "OSError: disk full"),)


# determinism


def story(world: World, seed: int | None) -> list[Replies]:
    """Three askings, some failing; with a seed the tasks of each are shuffled. Replies sorted by client."""
    told = []
    for amount in (1.0, 2.5, 0.1):
        tasks = [Task("add", k, payload(k), {"amount": amount}) for k in CLIENTS if k != 2] + [task(2, "stumble")]
        if seed is not None:
            random.Random(seed).shuffle(tasks)
        replies = world.run(*tasks)
        parts = (replies.updates, replies.failures, replies.traffic)
        told.append(Replies(*(tuple(sorted(part, key=lambda entry: entry.client)) for part in parts)))
    return told


@pytest.mark.parametrize(("world", "seed"), over((None, 1, 2, 3), (None, 1)), indirect=["world"])
def test_determinism_whatever_the_engine_and_the_order(world: World, seed: int | None) -> None:
    reference = local()
    expected = story(reference, None)
    found = story(world, seed)
    assert len(found) == len(expected)
    assert all(map(same_replies, found, expected))
    assert world.store.fingerprint() == reference.store.fingerprint()


def test_determinism_the_comparison_can_fail() -> None:
    replies = local().run(task(0))
    (update,) = replies.updates
    nudged = {**update.tensors, "w": torch.nextafter(update.tensors["w"], torch.tensor(9e9))}
    assert same_replies(replies, replies)
    assert not same_replies(replies, replace(replies, updates=(replace(update, tensors=nudged),)))
    assert not same_replies(replies, replace(replies, traffic=()))
    assert not same_replies(replies, replace(replies, failures=(Failure(1, "x"),)))


def test_the_local_engine_gives_a_whole_wave_to_its_compute_at_once() -> None:
    world = local()
    world.run(*(task(k) for k in CLIENTS))
    assert world.adder.calls == [2 * len(CLIENTS), len(CLIENTS)]
    world = local(wave=4)
    world.run(*(task(k) for k in CLIENTS))
    assert world.adder.calls == [8, 4, 4, 2]


def test_a_wave_has_ended_before_the_next_is_packed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Peak memory must not grow with the number of clients, so no more than a wave's messages may exist at once."""
    world, happened = local(wave=2), []
    answer, pack_one = world.host.answer, Packer.pack

    def packed(self: Packer, message: Task) -> bytes:
        happened.append("pack")
        return pack_one(self, message)

    def answered(blobs: list[bytes]) -> list:
        happened.append("answer")
        return answer(blobs)

    monkeypatch.setattr(world.host, "answer", answered)
    monkeypatch.setattr("fedloom.encodings.Packer.pack", packed)
    monkeypatch.setattr("fedloom.client.host.pack", lambda message, digest: pack_one(Packer(digest), message))
    world.run(*(task(k) for k in (0, 1, 2, 3, 4)))
    assert happened == ["pack", "pack", "answer"] * 2 + ["pack", "answer"]


class Blob(bytearray):
    """One whose end can be seen."""


def test_a_packed_task_is_gone_before_its_work_begins_unless_its_tensors_lie_in_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """A message of a whole model stands once while a device trains on it, as bytes or as what they were decoded to."""
    pack_one = Packer.pack
    for name, kept in (("exact", 3), ("bf16", 0)):
        world, made, alive = local(), list[weakref.ref[Blob]](), list[int]()
        world.host.encoding, add = Encoding(name), world.adder.run

        def packed(self: Packer, message: Task, made: list[weakref.ref[Blob]] = made) -> Blob:
            blob = Blob(pack_one(self, message))
            made.append(weakref.ref(blob))
            return blob

        def added(items: list, made: list = made, alive: list[int] = alive, add: Callable[[list], list] = add) -> list:
            alive.append(sum(of() is not None for of in made))
            return add(items)

        monkeypatch.setattr(world.adder, "run", added)
        monkeypatch.setattr("fedloom.client.host.pack", lambda message, digest: pack_one(Packer(digest), message))
        monkeypatch.setattr("fedloom.encodings.Packer.pack", packed)
        replies = world.run(*(task(k) for k in (0, 1, 2)))
        assert len(made) == len(replies.updates) == 3 and alive[0] == kept and alive[-1] <= kept


def test_a_waves_updates_are_taken_before_the_next_wave_begins() -> None:
    one = local(wave=2)
    events: list[str] = []
    answer = one.host.answer
    one.host.answer = lambda blobs: events.append(f"{len(blobs)} answered") or answer(blobs)  # type: ignore[method-assign]

    def take(update: Update) -> Update:
        events.append(f"{update.client} taken")
        return update

    one.engine.run([task(k) for k in range(3)], take)
    assert events == ["2 answered", "0 taken", "1 taken", "1 answered", "2 taken"]


def held() -> int:
    """Bytes of this process in memory now."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * 4096


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="the kernel does not tell what a process holds")
def test_memory_that_was_freed_is_given_back() -> None:
    """Blocks of 100 kB come from the heap, and every second one of them keeps its neighbours' place from being the end of it."""
    blocks = [bytearray(100_000) for _ in range(2000)]
    full = held()
    del blocks[::2]
    engines_local.give_memory_back()
    assert full - held() > 80_000_000
    assert len(blocks) == 1000


def test_many_waves_give_back_what_they_freed(monkeypatch: pytest.MonkeyPatch) -> None:
    given: list[int] = []
    monkeypatch.setattr(engines_local, "BREATH", 2)
    monkeypatch.setattr(engines_local, "give_memory_back", lambda: given.append(1))
    local(wave=6).run(*(task(k) for k in CLIENTS))
    assert given == [], "a single wave, as of most rounds, does not pay for it"
    local(wave=1).run(*(task(k) for k in CLIENTS))
    assert len(given) == 3


def test_many_tasks_of_one_broadcast_are_looked_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    looked: list[list[str]] = []
    look = engines_local.checked_tensors
    monkeypatch.setattr(engines_local, "checked_tensors", lambda tensors, finite: looked.append(list(tensors)) or look(tensors, finite))
    shared, other = {"w": torch.ones(2)}, {"w": torch.ones(2)}
    replies = local(wave=2).run(
        *(Task("echo", k, dict(shared)) for k in (0, 1, 2, 3)), Task("echo", 4, other), Task("echo", 5, {"v": shared["w"]})
    )
    assert [list(u.tensors) for u in replies.updates] == [["w"]] * 5 + [["v"]]
    assert looked == [["w"], ["w"], ["v"]]


# wrappers


def once(client: int, reason: str, attempts: int = 1):
    return lambda task, attempt: reason if task.client == client and attempt < attempts else None


def test_recording_keeps_everything_and_changes_nothing(world: World) -> None:
    recording = Recording(world.engine)
    tasks = [task(0), task(1, "stumble")]
    replies = recording.run(tasks)
    recording.run([])
    (asked, said), (none, nothing) = recording.calls
    assert list(asked) == tasks
    assert said == replies
    assert (none, nothing) == ((), Replies(()))
    assert same_replies(replies, local().run(*tasks))


def test_recording_keeps_updates_as_they_came_and_a_lost_one_is_never_taken(world: World) -> None:
    came: list[int] = []

    def take(update: Update) -> Update:
        came.append(update.client)
        return replace(update, tensors={})

    recording = Recording(Lossy(world.engine, once(1, "lost")))
    replies = recording.run([task(0), task(1), task(2)], take)
    assert came == [0, 2]
    assert [len(update.tensors) for update in replies.updates] == [0, 0]
    assert [len(update.tensors) > 0 for update in recording.calls[0][1].updates] == [True, True]


def test_faulty_never_lets_the_device_run(world: World) -> None:
    replies = Faulty(world.engine, once(5, "out of range")).run([task(k) for k in SHUFFLED])
    assert [u.client for u in replies.updates] == [4, 0, 2, 1, 3]
    assert replies.failures == (Failure(5, "out of range"),)
    assert replies.traffic[2] == Traffic(5, 0, 0, 0.0, 0)
    assert ("add", 5) not in world.toy.ran
    assert world.store.load(5) == ({}, {})


def test_lossy_lets_the_device_run_and_loses_the_answer(world: World) -> None:
    replies = Lossy(world.engine, once(5, "connection reset")).run([task(k) for k in SHUFFLED])
    assert [u.client for u in replies.updates] == [4, 0, 2, 1, 3]
    assert replies.failures == (Failure(5, "connection reset"),)
    assert replies.traffic[2] == Traffic(5, len(pack(task(5), DIGEST)), 0, 0.0, 0)
    assert world.toy.ran.count(("add", 5)) == 1
    assert world.store.load(5)[0]["visits"].tolist() == [1]


@pytest.mark.parametrize("wrapper", [Faulty, Lossy])
def test_wrapped_failures_and_real_ones_stand_in_task_order(world: World, wrapper) -> None:
    engine = wrapper(world.engine, once(0, "dropped"))
    replies = engine.run([task(3, "stumble"), task(0), task(1, "stumble"), task(2)])
    assert [f.client for f in replies.failures] == [3, 0, 1]
    assert [t.client for t in replies.traffic] == [3, 0, 1, 2]


def flow(attempts: int = 3):
    return (yield from insist([task(k) for k in SHUFFLED], attempts))


def test_insist_asks_again_only_whoever_did_not_answer(world: World) -> None:
    recording = Recording(Faulty(world.engine, once(2, "offline", attempts=2)))
    updates = drive(flow(), recording, quorum=0)
    assert [u.client for u in updates] == SHUFFLED
    assert [[t.client for t in tasks] for tasks, _ in recording.calls] == [SHUFFLED, [2], [2]]
    assert sorted(world.toy.ran) == [("add", k) for k in CLIENTS]


def test_insist_after_a_lost_answer_runs_the_device_twice(world: World) -> None:
    updates = drive(flow(), Lossy(world.engine, once(2, "offline")), quorum=0)
    assert [u.metrics["visits"] for u in updates] == [2 if k == 2 else 1 for k in SHUFFLED]


def test_insist_names_whoever_never_answers(world: World) -> None:
    with pytest.raises(CohortFailed, match=r"5 of 6 clients answered, 6 are needed. client 2: no answer to 'add' in 2 attempts"):
        drive(flow(attempts=2), Faulty(world.engine, once(2, "offline", attempts=9)), quorum=0)


def test_a_quorum_that_is_missed_names_each_reason(world: World) -> None:
    def asking():
        yield [task(0, "stumble"), task(1), task(2)]

    with pytest.raises(CohortFailed) as said:
        drive(asking(), Faulty(world.engine, once(2, "offline")), quorum=0.5)
    assert str(said.value) == (
        "1 of 3 clients answered, 2 are needed. client 0: ZeroDivisionError: the device ran out of luck; client 2: offline"
    )


def test_attempts_count_askings_of_one_operation_at_one_client() -> None:
    seen: list[tuple[str, int, int]] = []
    engine = Faulty(Local(host_of()[3]), lambda t, attempt: seen.append((t.op, t.client, attempt)))
    for tasks in ([task(0), task(1)], [task(0)], [task(0, "echo"), task(1)]):
        engine.run(tasks)
    assert seen == [("add", 0, 0), ("add", 1, 0), ("add", 0, 1), ("echo", 0, 0), ("add", 1, 1)]
