"""What is Flower's about the Flower engine: real messages and contexts, deadlines, who is who, whatever a grid brings back."""

from __future__ import annotations

import os
import subprocess
import sys
import time
import warnings
from collections.abc import Iterable
from dataclasses import replace

import pytest
import torch

from fedloom.encodings import EXACT
from fedloom.messages import Failure, Task, Update
from fedloom.tensors import fingerprint
from fedloom.wire import Blob, pack, unpack
from tests.conformance.engines import ENGINES
from tests.conformance.toy import CLIENTS, DIGEST, flower, host_of, local, payload, same_replies, task

pytest.importorskip("flwr", reason="the extra 'flower' is not installed: pip install 'fedloom[flower]'")

with warnings.catch_warnings():  # the command-line library that Flower imports uses a deprecated name of click's
    warnings.simplefilter("ignore", DeprecationWarning)
    from flwr.app import Array, ArrayRecord, ConfigRecord, Context, Error, Message, RecordDict
    from flwr.clientapp import ClientApp
    from flwr.supercore.task_identity import TaskIdentity
    from flwr.superlink.grid import InMemoryGrid

    from fedloom import flower_app
    from fedloom.engines import flower as door
    from fedloom.engines.boxes import unboxed
    from fedloom.engines.flower import FlowerGrid, Loopback, client_app, in_memory, roll_call

pytestmark = pytest.mark.flower
TASK = task(3, "echo", word="a")


class Answers:
    """A stand-in host: ``answer`` gives what it was made with and keeps what it was given."""

    digest, encoding = DIGEST, EXACT

    def __init__(self, *answers: Blob | Failure) -> None:
        self.answers, self.given = list(answers), []

    def answer(self, blobs):
        self.given.append(list(blobs))
        return self.answers


def context(config: dict) -> Context:
    return Context(1, 99, config, RecordDict(), {})


def message(blob: bytes | None = None, client: int = 3) -> Message:
    """A task's message as the server sends it."""
    federation()  # gives this process Flower's identity, without which there are no messages
    return FlowerGrid(Loopback(ClientApp()), {client: 99}, DIGEST)._message(client, blob or pack(TASK, DIGEST))


def federation() -> tuple[Loopback, FlowerGrid]:
    engine = flower().engine
    return engine.grid, engine


# the device's side


def test_the_app_takes_one_packed_task_and_returns_one_packed_update() -> None:
    *_, host = host_of()
    reply = client_app(lambda context: host)(message(), context({"partition-id": 3}))
    assert not reply.has_error()
    assert set(reply.content) == {"blob"}
    update = unpack(unboxed(reply.content), DIGEST)
    assert isinstance(update, Update)
    assert (update.client, update.metrics, fingerprint(update.tensors)) == (3, {"word": "a"}, fingerprint(TASK.tensors))


def test_the_app_hands_over_the_very_bytes_and_the_context() -> None:
    seen, host = [], Answers(b"the answer")

    def factory(context: Context) -> Answers:
        seen.append(context)
        return host

    here, sent = context({"partition-id": 3}), pack(TASK, DIGEST)
    reply = client_app(factory)(message(sent), here)
    assert seen == [here]
    assert host.given == [[sent]]
    assert reply.content.array_records["blob"]["blob"].data == b"the answer"
    assert len(here.state) == 0


def test_the_app_returns_a_failure_as_an_error_with_its_reason() -> None:
    reply = client_app(lambda context: Answers(Failure(3, "OSError: disk full")))(message(), context({"partition-id": 3}))
    assert reply.has_error()
    assert (reply.error.code, reply.error.reason) == (door.REFUSED, "OSError: disk full")


def test_the_app_refuses_another_clients_task() -> None:
    host = Answers(b"x")
    reply = client_app(lambda context: host)(message(client=3), context({"partition-id": 4}))
    assert reply.error.reason == "WireError: a task for client 3 came to the node of client 4"
    assert host.given == []


def test_the_app_of_a_node_that_does_not_say_who_it_is() -> None:
    with pytest.raises(ValueError, match="start it with --node-config 'partition-id=K'"):
        client_app(lambda context: Answers(b"x"))(message(), context({}))


def test_the_door_of_a_deployment_has_the_same_app() -> None:
    assert flower_app.client_app is client_app


# messages


def test_real_messages_that_share_nothing_with_the_senders() -> None:
    grid, engine = federation()
    sent, arrived, inner = [], [], grid.app

    class Spy(ClientApp):
        def __call__(self, message: Message, context: Context) -> Message:
            arrived.append((message, context))
            return inner(message, context)

    def keep(messages: Iterable[Message], *, timeout: float | None = None) -> Iterable[Message]:
        sent.extend(messages)
        assert timeout == engine.timeout
        return InMemoryGrid.send_and_receive(grid, sent, timeout=timeout)

    grid.app, grid.send_and_receive = Spy(), keep
    assert len(engine.run([TASK]).updates) == 1
    ((got, where),) = arrived
    assert type(got) is Message
    assert type(where) is Context
    assert where.node_config == {"partition-id": 3}
    assert got is not sent[0]
    assert got.content is not sent[0].content
    assert got.metadata.ttl == engine.timeout
    assert got.metadata.message_id == sent[0].metadata.message_id != ""
    assert got.content == sent[0].content
    boxes = got.content.array_records["blob"]
    assert {(box.dtype, box.shape) for box in boxes.values()} == {("uint8", (len(box.data),)) for box in boxes.values()}
    opened = unpack(unboxed(got.content), DIGEST)
    assert isinstance(opened, Task) and len(opened.nonce) == 32
    assert pack(replace(opened, nonce=""), DIGEST) == pack(TASK, DIGEST)
    with pytest.raises(TypeError, match=r"fedloom\.safetensors"):
        boxes["blob"].numpy()


@pytest.mark.parametrize("size", [0, 1, 5 * 2**20, 12 * 2**20 + 3])
def test_blobs_of_any_size(size: int) -> None:
    _, engine = federation()
    sent = {"w": torch.arange(size, dtype=torch.int64).to(torch.uint8), "zeros": torch.zeros(size, dtype=torch.uint8)}
    replies = engine.run([Task("echo", 3, sent)])
    assert fingerprint(replies.updates[0].tensors) == fingerprint(sent)
    assert replies.traffic[0].bytes_down > 2 * size < replies.traffic[0].bytes_up


def test_nothing_stays_behind() -> None:
    grid, engine = federation()
    for _ in range(3):
        engine.run([task(k) for k in CLIENTS])
    assert (grid.state.num_message_ins(), grid.state.num_message_res()) == (0, 0)


def test_two_federations_in_one_process() -> None:
    (first, second), reference = (flower(), flower()), local()
    expected = reference.run(task(1)), reference.run(task(1))
    assert same_replies(first.run(task(1)), expected[0])
    assert same_replies(second.run(task(1)), expected[0])
    assert same_replies(first.run(task(1)), expected[1])


def test_a_process_that_is_part_of_another_flower_run_keeps_its_identity(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in (("_run_id", 77), ("_task_id", 88), ("_node_id", 1)):
        monkeypatch.setattr(TaskIdentity, name, value)
    assert len(flower().run(task(1)).updates) == 1
    assert (TaskIdentity.run_id, TaskIdentity.task_id) == (77, 88)


def test_importing_the_engine_switches_telemetry_updates_and_installs_off() -> None:
    names = ("FLWR_TELEMETRY_ENABLED", "FLWR_DISABLE_UPDATE_CHECK", "FLWR_DISABLE_RUNTIME_DEPENDENCY_INSTALLATION")
    code = "import fedloom.flower_app, os, sys; from flwr.supercore import telemetry\n"
    code += "print(*map(os.getenv, sys.argv[1:]), telemetry.FLWR_TELEMETRY_ENABLED)"
    elsewhere = {**os.environ, **dict(zip(names, "100", strict=True))}
    done = subprocess.run([sys.executable, "-c", code, *names], env=elsewhere, capture_output=True, text=True, check=True, timeout=60)
    assert done.stdout.split() == ["0", "1", "1", "0"]


# deadlines and nodes


def test_a_device_that_never_answers_fails_at_the_deadline_and_is_never_run_late() -> None:
    world = flower()
    grid, engine = world.engine.grid, world.engine
    engine.timeout = 0.2
    silent = grid.contexts.pop(engine.nodes[2])
    replies = engine.run([task(1), task(2), task(3)])
    assert [u.client for u in replies.updates] == [1, 3]
    assert replies.failures == (Failure(2, f"TimeoutError: node {engine.nodes[2]} did not answer within 0.2 s"),)
    assert replies.traffic[1].bytes_down == len(pack(task(2), DIGEST))
    grid.contexts[engine.nodes[2]] = silent
    (update,) = engine.run([task(2)]).updates
    assert update.metrics["visits"] == 1
    assert world.toy.ran.count(("add", 2)) == 1


def test_an_answer_after_the_deadline_is_lost() -> None:
    world = flower()
    world.engine.timeout = 0.05
    answer = world.host.answer

    def slow(blobs):
        time.sleep(0.1)
        return answer(blobs)

    world.host.answer = slow
    replies = world.run(task(1))
    assert replies.updates == ()
    assert replies.failures[0].reason.startswith("TimeoutError: node ")


@pytest.mark.parametrize("timeout", [0.0, -1.0, float("inf"), float("nan")])
def test_there_is_always_a_deadline(timeout: float) -> None:
    with pytest.raises(ValueError, match="so that nothing waits for ever"):
        FlowerGrid(Loopback(ClientApp()), {}, DIGEST, timeout)


def test_a_client_without_a_node_was_sent_nothing() -> None:
    engine = in_memory(Answers(Failure(0, "busy")), [0, 7])
    replies = engine.run([task(0), task(5)])
    assert replies.failures == (
        Failure(0, "busy"),
        Failure(5, "LookupError: no node is known for client 5; there are nodes for [0, 7]"),
    )
    assert [t.bytes_down > 0 for t in replies.traffic] == [True, False]


def test_a_device_that_is_gone() -> None:
    grid, engine = federation()
    grid.state.deactivate_node(engine.nodes[2])
    del grid.contexts[engine.nodes[2]]
    assert engine.run([task(2)]).failures[0].reason.startswith("Flower error 5: ")


def test_an_app_that_crashes() -> None:
    def factory(context: Context) -> Answers:
        raise MemoryError("no room for the model")

    grid = Loopback(client_app(factory))
    (failure,) = FlowerGrid(grid, {0: grid.register(0)}, DIGEST).run([task(0)]).failures
    assert failure == Failure(0, "Flower error 2: MemoryError: no room for the model")


def test_the_roll_call_finds_every_client_under_its_random_node() -> None:
    grid, engine = federation()
    assert roll_call(grid) == engine.nodes
    assert sorted(engine.nodes) == list(CLIENTS)
    assert engine.nodes != flower().engine.nodes
    assert {grid.contexts[node].node_config["partition-id"]: node for node in grid.contexts} == engine.nodes


def test_the_roll_call_leaves_out_who_does_not_say_and_names_doubles() -> None:
    grid = Loopback(client_app(lambda context: Answers(b"")))
    first, nameless = grid.register(4), grid.register(5)
    grid.contexts[nameless].node_config.clear()
    assert roll_call(grid) == {4: first}
    second = grid.register(4)
    with pytest.raises(ValueError, match=r"are both client 4; give each its own partition-id") as said:
        roll_call(grid)
    assert str(first) in str(said.value)
    assert str(second) in str(said.value)
    assert roll_call(Loopback(ClientApp())) == {}


# whatever a grid brings back


class Odd(Loopback):
    """Gives ``twist`` the true replies and returns what it makes of them."""

    def send_and_receive(self, messages, *, timeout=None):
        return self.twist(list(InMemoryGrid.send_and_receive(self, messages, timeout=timeout)))


def odd(twist) -> FlowerGrid:
    *_, host = host_of()
    grid = Odd(client_app(lambda context: host))
    nodes = {k: grid.register(k) for k in CLIENTS}
    grid.twist = twist
    return FlowerGrid(grid, nodes, DIGEST)


def test_replies_in_any_order() -> None:
    tasks, expected = [task(k) for k in CLIENTS], local().run(*(task(k) for k in CLIENTS))
    key = lambda reply: reply.metadata.src_node_id  # noqa: E731
    assert same_replies(odd(lambda replies: sorted(replies, key=key)).run(tasks), expected)
    assert same_replies(odd(lambda replies: sorted(replies, key=key, reverse=True)).run(tasks), expected)


def test_a_reply_to_something_else_is_no_reply() -> None:
    def strange(replies: list[Message]) -> list[Message]:
        for reply in replies:
            reply.metadata.__dict__["_reply_to_message_id"] = "another message"
        return replies

    assert odd(strange).run([task(0)]).failures[0].reason.startswith("TimeoutError: ")


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (RecordDict(), "WireError: a Flower message without a packed blob; its records are []"),
        (RecordDict({"blob": ConfigRecord({"blob": b"x"})}), "WireError: a Flower message without a packed blob"),
        (RecordDict({"blob": ArrayRecord({})}), "WireError: a Flower message without a packed blob"),
        (
            RecordDict({"blob": ArrayRecord({"blob": Array("uint8", (1,), "numpy.ndarray", b"x")})}),
            "WireError: a Flower message whose",
        ),
    ],
)
def test_a_reply_that_holds_no_blob(content: RecordDict, reason: str) -> None:
    def empty(replies: list[Message]) -> list[Message]:
        for reply in replies:
            reply.content = content
        return replies

    assert odd(empty).run([task(0)]).failures[0].reason.startswith(reason)


def test_an_error_without_a_reason() -> None:
    def mute(replies: list[Message]) -> list[Message]:
        for reply in replies:
            reply.__dict__.update(_content=None, _error=Error(8))
        return replies

    assert odd(mute).run([task(0)]).failures == (Failure(0, "Flower error 8: no reason given"),)


# the same as the local engine, on larger tensors


@pytest.mark.parametrize("kind", ENGINES.values())
def test_a_longer_run_is_bit_identical(kind) -> None:
    world, reference = kind(), local()
    for seed in range(3):
        tasks = [replace(task(k), tensors=payload(seed)) for k in CLIENTS]
        assert same_replies(world.run(*tasks), reference.run(*tasks))
    assert world.store.fingerprint() == reference.store.fingerprint()
