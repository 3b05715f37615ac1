"""What is a real federation's about its engine: whose answer counts, who is left out, what is waited for, and who may come in at all."""

from __future__ import annotations

import socket
import threading
import time
import warnings
import weakref
from base64 import b64encode
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import replace
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("flwr", reason="the extra 'flower' is not installed: pip install 'fedloom[flower]'")

from fedloom.client.elsewhere import Elsewhere
from fedloom.client.host import Host
from fedloom.client.store import StoreError
from fedloom.engines.agreement import agreeing
from fedloom.engines.local import Local
from fedloom.messages import CohortFailed, Failure, Replies, Task, Traffic, Update, due
from fedloom.methods.fedavg import FedAvg
from fedloom.run.experiment import Experiment
from fedloom.wire import Blob, WireError, pack, unpack
from tests.conformance.toy import CLIENTS, DIGEST, host_of, same_replies, task
from tests.federated import QUICK, Here, engine_over, nodes

with warnings.catch_warnings():  # libraries that Flower imports use deprecated names of their own
    warnings.simplefilter("ignore", DeprecationWarning)
    import httpx
    from fastapi import HTTPException
    from flwr.app import ConfigRecord, Error, Message, RecordDict
    from flwr.app.message import remove_content_from_message
    from flwr.common.constant import TIMESTAMP_HEADER, ErrorCode
    from flwr.common.serde import message_to_proto
    from flwr.proto.fleet_pb2 import PushMessagesRequest
    from flwr.proto.message_pb2 import Message as ProtoMessage
    from flwr.proto.message_pb2 import Metadata as ProtoMetadata
    from flwr.proto.message_pb2 import ObjectTree
    from flwr.proto.node_pb2 import Node as FlowerNode
    from flwr.supercore.constant import FLEET_HTTP_PUBLIC_KEY_HEADER, FLEET_HTTP_SIGNATURE_HEADER
    from flwr.supercore.date import now
    from flwr.supercore.inflatable.inflatable_object import get_all_nested_objects, get_object_id, get_object_tree
    from flwr.supercore.object_store import in_memory_object_store
    from flwr.supercore.primitives.asymmetric import generate_key_pairs, public_key_to_bytes
    from flwr.supercore.protobuf.constants import PROTOBUF_MEDIA_TYPE
    from flwr.superlink.servicer.fleet import fleet_handlers
    from flwr.supernode.fleet_http_client import FleetHttpClient
    from starlette.requests import Request

    from fedloom.engines import federation
    from fedloom.engines import link as link_module
    from fedloom.engines import node as node_module
    from fedloom.engines.boxes import boxed, unboxed
    from fedloom.engines.device import Ungreeted, device_app
    from fedloom.engines.federation import Enough, Federation, Patience
    from fedloom.engines.gate import LARGEST, authenticated, only_own
    from fedloom.engines.link import STATUS, Link, LinkError, Tls
    from fedloom.engines.mailbox import SMALL, Objects
    from fedloom.engines.node import GOODBYE, TRIES, Credentials, Node, Refused, asked, in_time
    from fedloom.engines.talk import told_of
    from fedloom.run.deployment.certificates import issue, public_keys
    from fedloom.run.deployment.federation import Joined

pytestmark = pytest.mark.flower


# whose answer counts


def replies_of(*tensors: dict[str, torch.Tensor]) -> tuple[list[Task], Replies]:
    """Everybody was sent a zero ``w`` of three and answered with these tensors."""
    tasks = [Task("train", k, {"w": torch.zeros(3)}) for k in range(len(tensors))]
    updates = tuple(Update(k, 1, made) for k, made in enumerate(tensors))
    return tasks, Replies(updates, (), tuple(Traffic(k, 1, 1, 0.0, 0) for k in range(len(tensors))))


def reasons(tasks: Sequence[Task], replies: Replies) -> dict[int, str]:
    kept = agreeing(tasks, replies)
    assert sorted([u.client for u in kept.updates] + [f.client for f in kept.failures]) == [t.client for t in tasks]
    return {failure.client: failure.reason for failure in kept.failures}


def test_those_who_agree_all_count() -> None:
    tasks, replies = replies_of(*({"w": torch.full((3,), float(k))} for k in range(4)))
    assert agreeing(tasks, replies) is replies


def test_another_shape_than_was_sent_does_not_count() -> None:
    told = reasons(*replies_of({"w": torch.ones(3)}, {"w": torch.ones(3, 1)}, {"w": torch.ones(3)}))
    assert told == {1: "WireError: 'w' came back with shape (3, 1), and was sent with (3,)"}


def test_missing_and_extra_names_do_not_count() -> None:
    ones = torch.ones(3)
    told = reasons(*replies_of({"w": ones}, {}, {"w": ones, "more": ones}, {"w": ones}))
    assert "['w'] missing, [] more" in told[1]
    assert "[] missing, ['more'] more" in told[2]
    assert set(told) == {1, 2}


def test_of_two_who_differ_the_one_with_what_was_sent_counts() -> None:
    assert set(reasons(*replies_of({"x": torch.ones(3)}, {"w": torch.ones(3)}))) == {0}


def test_whoever_is_absurdly_far_does_not_count_and_an_outlier_does() -> None:
    far = [{"w": torch.full((3,), value)} for value in (1.0, 1.1, 900.0, 0.9)]
    assert reasons(*replies_of(*far)) == {}
    far[2]["w"] = far[2]["w"] * 10
    assert "it moved 1.56e+04, and the median of the others 1.82" in reasons(*replies_of(*far))[2]


def test_two_cannot_say_who_of_them_is_absurd() -> None:
    assert reasons(*replies_of({"w": torch.ones(3)}, {"w": torch.ones(3) * 1e9})) == {}


def test_another_type_than_the_others_have_does_not_count() -> None:
    told = reasons(*replies_of({"w": torch.ones(3)}, {"w": torch.ones(3, dtype=torch.bool)}, {"w": torch.ones(3)}))
    assert told == {1: "WireError: 'w' came back in torch.bool, and was sent in torch.float32"}
    told = reasons(
        *replies_of(*({"w": torch.ones(3), "new": torch.ones(2, dtype=kind)} for kind in (torch.float32, torch.int64, torch.float32)))
    )
    assert told == {1: "WireError: 'new' is torch.int64 of shape (2,), and the others' torch.float32 of shape (2,)"}


def test_another_shape_than_the_others_have_of_what_nobody_was_sent_does_not_count() -> None:
    told = reasons(*replies_of(*({"w": torch.ones(3), "control/w": torch.ones(size)} for size in (3, 2, 2, 2))))
    assert told == {0: "WireError: 'control/w' is torch.float32 of shape (3,), and the others' torch.float32 of shape (2,)"}
    assert len(reasons(*replies_of({"new": torch.ones(3)}, {"new": torch.ones(2)}))) == 1, "one of two, but never both"


def test_each_is_compared_with_those_to_whom_alike_tensors_were_sent() -> None:
    ranks, made = (1, 1, 1, 2, 2, 2), (1, 1, 1, 2, 2, 1)
    tasks = [Task("train", k, {"a": torch.zeros(rank, 3)}) for k, rank in enumerate(ranks)]
    updates = [
        Update(k, 1, {"a": torch.ones(rank, 3), "b": torch.ones(4, of)}) for k, (rank, of) in enumerate(zip(ranks, made, strict=True))
    ]
    told = reasons(tasks, Replies(tuple(updates), (), tuple(Traffic(k, 1, 1, 0.0, 0) for k in range(6))))
    assert told == {5: "WireError: 'b' is torch.float32 of shape (4, 1), and the others' torch.float32 of shape (4, 2)"}


ALONE = {
    "a name": ({"w": torch.ones(3), "zzz": torch.ones(1)}, r"\[\] missing, \['zzz'\] more than are due"),
    "none": ({}, r"\['w'\] missing, \[\] more than are due"),
    "what was sent beside": ({"w": torch.ones(3), "rest": torch.ones(2)}, r"\[\] missing, \['rest'\] more"),
    "doubles": ({"w": torch.ones(3).double()}, "'w' came back in torch.float64, and was sent in torch.float32"),
    "integers": ({"w": torch.ones(3).long()}, "'w' came back in torch.int64, and was sent in torch.float32"),
    "a shape": ({"w": torch.ones(2)}, r"'w' came back with shape \(2,\)"),
}


@pytest.mark.parametrize("lie", ALONE)
def test_who_answers_alone_is_judged_by_what_is_due(lie: str) -> None:
    task = due(Task("train", 0, {"w": torch.zeros(3), "rest": torch.zeros(2)}), {"w": torch.zeros(3)})
    cost = (Traffic(0, 1, 1, 0.0, 0),)
    assert reasons([task], Replies((Update(0, 1, {"w": torch.ones(3)}),), (), cost)) == {}
    answer, reason = ALONE[lie]
    (told,) = reasons([task], Replies((Update(0, 1, answer),), (), cost)).values()
    with pytest.raises(AssertionError, match=reason):
        raise AssertionError(told)


def test_what_was_not_sent_is_as_it_is_due() -> None:
    task = due(Task("train", 0, {"w": torch.zeros(3)}), {"score": torch.zeros(2)})
    for answer in ({"score": torch.ones(3)}, {"score": torch.ones(2).double()}):
        (told,) = reasons([task], Replies((Update(0, 1, answer),), (), (Traffic(0, 1, 1, 0.0, 0),))).values()
        assert "'score' is torch.float" in told and "torch.float32 of (2,) is due" in told


def test_of_two_types_that_which_was_sent_counts() -> None:
    assert set(reasons(*replies_of({"w": torch.ones(3, dtype=torch.int64)}, {"w": torch.ones(3)}))) == {0}


def test_operations_and_what_is_asked_of_them_are_judged_apart() -> None:
    tasks, replies = replies_of({"w": torch.ones(3)}, {"x": torch.ones(3)}, {"w": torch.ones(3)})
    for other in ({"op": "score"}, {"settings": {"layers": 1}}):
        asked = [tasks[0], replace(tasks[1], **other), tasks[2]]
        assert agreeing(asked, replies) is replies
    asked = [replace(task, settings={"layers": 1}) for task in tasks]
    assert set(reasons(asked, replies)) == {1}, "all were asked the same"


# whose task an answer is to


class Replaying(Here):
    """Answers as it should, but for what ``instead`` says: (client, how often it was asked) -> the answer of whom, how often asked."""

    def __init__(self, host: Host, folder: Path, instead: dict[tuple[int, int], tuple[int, int]], relabel: bool = False) -> None:
        Here.__init__(self, host, folder)
        self.instead, self.relabel, self.made = instead, relabel, dict[tuple[int, int], tuple[Blob | Failure, str]]()

    def answer(self, client: int, state: str, committed: str, blob: Blob) -> tuple[Blob | Failure, str]:
        asked = sum(k == client for k, _ in self.made)
        self.made[client, asked] = Here.answer(self, client, state, committed, blob)
        (one, after), again = self.made[client, asked], self.instead.get((client, asked))
        if again is None:
            return one, after
        while again not in self.made:
            time.sleep(0.02)
        old, _ = self.made[again]
        assert not isinstance(old, Failure)
        if self.relabel:
            update = unpack(bytes(old), DIGEST)
            assert isinstance(update, Update)
            old = pack(replace(update, client=client), DIGEST)
        return old, after


def replayed(tmp_path: Path, instead: dict[tuple[int, int], tuple[int, int]], rounds: int, relabel: bool = False) -> list[Replies]:
    """Rounds of clients 0 and 1."""
    *_, host = host_of()
    engine = engine_over(host, CLIENTS)
    nodes(tuple(CLIENTS)).at.device = Replaying(host, engine.folder, instead, relabel)
    return [engine.run([task(0), task(1)]) for _ in range(rounds)]


def test_an_answer_of_an_earlier_round_does_not_count_and_the_right_one_after_it_does(tmp_path: Path) -> None:
    _, second, third = replayed(tmp_path, {(1, 1): (1, 0)}, 3)
    reason = "WireError: the answer is to an earlier task of this client, 'add'; it was made before, or is late"
    assert second.failures == (Failure(1, reason),) and [update.client for update in second.updates] == [0]
    assert [update.metrics["visits"] for update in third.updates] == [3.0, 2.0], "what did not count has not happened"
    *_, host = host_of()
    alone = Local(host)
    alone.run([task(0), task(1)])
    alone.run([task(0)])
    assert same_replies(third, alone.run([task(0), task(1)]))


def test_an_answer_to_another_devices_task_does_not_count_though_it_names_this_one(tmp_path: Path) -> None:
    first, second = replayed(tmp_path, {(1, 0): (0, 0)}, 2, relabel=True)
    assert first.failures == (Failure(1, "WireError: the answer is to the task 'add' of client 0"),)
    assert [update.metrics["visits"] for update in second.updates] == [2.0, 1.0]


def test_the_same_answer_to_the_same_task_asked_again_does_not_count(tmp_path: Path) -> None:
    """A task that is asked again is another try of it, with a nonce of its own."""
    first, second = replayed(tmp_path, {(0, 1): (0, 0)}, 2)
    assert first.failures == () and [failure.client for failure in second.failures] == [0]
    assert "an earlier task of this client" in second.failures[0].reason


def test_an_answer_to_no_task_that_was_given_does_not_count(tmp_path: Path) -> None:
    *_, host = host_of()
    engine = engine_over(host, CLIENTS)
    (update,) = Local(host).run([task(0)]).updates
    forged = [pack(replace(update, nonce=nonce), DIGEST) for nonce in ("", "ab" * 16)]
    for blob in forged:
        host.answer = lambda blobs, blob=blob: [blob]  # type: ignore[method-assign]
        (failure,) = engine.run([task(0)]).failures
        assert failure.reason == "WireError: the answer repeats no nonce of a task that was given"


def test_no_two_tasks_have_the_same_nonce_and_few_are_remembered(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(federation, "REMEMBERED", 3)
    engine = far()
    made = [*engine._numbered([task(0), task(1)]), *engine._numbered([task(0), task(1)])]
    assert len({one.nonce for one in made}) == 4 and all(len(one.nonce) == 32 for one in made)
    assert list(engine._given) == [one.nonce for one in made[1:]]


# who is left out, what is waited for


def far(device: Here | None = None, patience: Patience = QUICK) -> Federation:
    """A federation of the toy's clients; ``device`` answers for them."""
    *_, host = host_of()
    engine = engine_over(host, CLIENTS, patience)
    if device is not None:
        nodes(tuple(CLIENTS)).at.device = device
    return engine.inner


def test_answers_wait_in_a_file_and_are_taken_in_one_at_a_time() -> None:
    due = far().run([task(k) for k in CLIENTS]).updates
    gone: list[weakref.ref] = []

    def take(update: Update) -> Update:
        assert [ref() for ref in gone if ref() is not None] == [], "of those before nothing is in memory any more"
        gone.extend(weakref.ref(tensor) for tensor in update.tensors.values())
        return replace(update, tensors={}, num_examples=len(update.tensors))

    taken = far().run([task(k) for k in CLIENTS], take).updates
    assert [(u.client, u.num_examples) for u in taken] == [(u.client, len(u.tensors)) for u in due] and len(taken) == len(CLIENTS)


class Hasty(Here):
    """Device 0 answers at once, with what cannot be read; device 2 takes its time."""

    def answer(self, client: int, state: str, committed: str, blob: Blob) -> tuple[Blob | Failure, str]:
        if client == 0:
            return b"rubbish", ""
        time.sleep(1.0 if client == 2 else 0.0)
        return Here(self.host, self.folder).answer(client, state, committed, blob)


def test_whoever_answers_wrongly_at_once_makes_nobody_late(tmp_path: Path) -> None:
    engine = far(Hasty(host_of()[-1], tmp_path))
    replies = Enough(engine, lambda asked: 2).run([task(k) for k in (0, 1, 2)])
    assert [update.client for update in replies.updates] == [1, 2]
    assert [failure.client for failure in replies.failures] == [0] and "not a Fedloom message" in replies.failures[0].reason


class Slow(Here):
    """Client 1 takes its time: until it is told to ``go``."""

    def __init__(self, host: Host, folder: Path) -> None:
        Here.__init__(self, host, folder)
        self.go, self.done = threading.Event(), threading.Event()

    def answer(self, client: int, state: str, committed: str, blob: bytes):
        if client != 1:
            return Here.answer(self, client, state, committed, blob)
        self.go.wait(10)
        try:
            return Here.answer(self, client, state, committed, blob)
        finally:
            self.done.set()


def test_an_answer_that_comes_late_has_not_happened(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(federation, "FIRST", 0.0)
    *_, host = host_of()
    device = Slow(host, tmp_path)
    engine = far(device, replace(QUICK, deadline=1.5))
    replies = engine.run([task(k) for k in (0, 1, 2)])
    assert [f.reason for f in replies.failures] == ["TimeoutError: no answer within 1.5 s"]
    device.go.set()
    assert device.done.wait(10), "it has answered now, and stored its state"
    assert engine.states.name(1) == ""
    nodes(tuple(CLIENTS)).at.device = Here(host, tmp_path)
    again = engine.run([task(1)])
    assert again.updates[0].metrics["visits"] == 1.0, "it starts from the state that the server knows"


def test_once_enough_have_answered_the_rest_has_a_moment(tmp_path: Path) -> None:
    *_, host = host_of()
    device = Slow(host, tmp_path)
    engine = far(device, replace(QUICK, linger=0.1))
    replies = Enough(engine, lambda asked: 2).run([task(k) for k in (0, 1, 2)])
    assert 1 in {f.client for f in replies.failures} and len(replies.updates) >= 2
    assert {f.reason for f in replies.failures} == {"TimeoutError: it was late, and the others were enough"}
    assert engine._faults == {}, "it is not left out for that"
    device.go.set()
    assert device.done.wait(10)


@pytest.mark.parametrize(
    ("aggregation", "quorum", "due"),
    [("mean", 0.5, {8: 4, 1: 1}), ("median", 0.5, {8: 5, 1: 1}), ("median", 0.75, {8: 6}), ("krum", 0.5, {8: 7, 2: 2})],
)
def test_rounds_wait_for_as_many_as_the_rule_of_aggregation_needs(aggregation: str, quorum: float, due: dict[int, int]) -> None:
    e = Experiment(FedAvg(), clients=8, cohort=8, aggregation=aggregation, quorum=quorum)
    hurried = Joined(nodes(tuple(CLIENTS)).link, e, QUICK, None).hurried(far())  # type: ignore[arg-type]
    assert isinstance(hurried, Enough) and {asked: hurried.enough(asked) for asked in due} == due


def test_whoever_failed_is_left_out_and_let_in_again(monkeypatch: pytest.MonkeyPatch) -> None:
    engine = far(patience=replace(QUICK, wait=0.0))
    monkeypatch.setattr(federation, "FIRST", 1.0)
    assert len(engine.run([task(0, "stumble"), task(1)]).failures) == 1
    (left,) = engine.run([task(0), task(1)]).failures
    assert left.client == 0 and "left out for" in left.reason and "ran out of luck" in left.reason
    time.sleep(1.1)
    assert engine.run([task(0), task(1)]).failures == ()


def test_an_update_that_the_method_can_make_nothing_of_voids_the_asking(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(federation, "FIRST", 100.0)
    engine = far()

    def choosy(update: Update) -> Update:
        if update.client == 1:
            raise ValueError("places must ascend")
        return update

    monkeypatch.setattr(federation, "FIRST", 100.0)  # the helper has it at 0
    with pytest.raises(CohortFailed, match="client 1: the method can make nothing of its update .ValueError: places must ascend"):
        engine.run([task(0), task(1), task(2)], choosy)
    assert set(engine._faults) == {1}


def test_an_asking_waits_for_whoever_is_left_out_for_a_moment(monkeypatch: pytest.MonkeyPatch) -> None:
    engine = far()
    monkeypatch.setattr(federation, "FIRST", 0.5)
    assert len(engine.run([task(0, "stumble")]).failures) == 1
    assert engine.run([task(0)]).failures == ()


def test_leaving_out_doubles_and_an_answer_ends_it(monkeypatch: pytest.MonkeyPatch) -> None:
    engine = far()
    monkeypatch.setattr(federation, "FIRST", 0.2)
    for times in (1, 2, 3):
        began = time.monotonic()
        engine._leave_out(Failure(0, "why"))
        assert engine._faults[0][0] == times
        assert began <= engine._faults[0][1] - 0.2 * 2 ** (times - 1) <= time.monotonic()
    time.sleep(0.9)
    engine.run([task(0)])
    assert engine._faults == {}


def test_a_client_without_a_key_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    (failure,) = far().run([task(77)]).failures
    assert failure.reason == "LookupError: the server was given no key of this client"


def test_an_answer_that_was_refused_is_pushed_again(monkeypatch: pytest.MonkeyPatch) -> None:
    push, refused = Node._push, []

    def once(self: Node, *rest: object) -> None:
        if not refused:
            refused.append(self)
            raise httpx.HTTPStatusError("stale", request=httpx.Request("POST", "http://x"), response=httpx.Response(401))
        push(self, *rest)  # type: ignore[arg-type]

    monkeypatch.setattr(Node, "_push", once)
    assert far().run([task(0)]).failures == () and refused


def full_for_devices(monkeypatch: pytest.MonkeyPatch, times: float) -> list[str]:
    """The link's disk has no room for parts of answers, so many times. Returns those that it did not take."""
    put, refused = Objects.put, list[str]()

    def full(self: Objects, name: str, content: bytes) -> None:
        if threading.current_thread() is not threading.main_thread() and len(refused) < times:
            refused.append(name)
            raise OSError(28, "No space left on device")
        put(self, name, content)

    monkeypatch.setattr(Objects, "put", full)
    return refused


def test_an_answer_that_the_server_cannot_store_has_failed_and_is_not_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(node_module, "AGAIN", (0.01, 0.01))
    refused, engine = full_for_devices(monkeypatch, float("inf")), far()
    engine._greeted = {0}
    (failure,) = engine.run([task(0)]).failures
    assert failure.reason.startswith("NotTaken: the server did not store part 1 of ")
    assert len(set(refused[:3])) == 1 and len(refused) in (3, 4), "the same part three times, and perhaps that of the error"
    assert "what it says of it, such as a full disk, is in its log" in failure.reason
    assert len(engine.link.state.object_store) == 0


def test_an_answer_that_the_server_could_not_store_at_once_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(node_module, "AGAIN", (0.01, 0.01))
    refused = full_for_devices(monkeypatch, 2)
    assert far().run([task(0)]).failures == () and len(refused) == 2


@pytest.mark.parametrize("kind", ["PushObject", "PullObject"])
def test_a_part_that_waits_longer_for_its_turn_than_a_device_does_is_asked_for_again(monkeypatch: pytest.MonkeyPatch, kind: str) -> None:
    """What was asked for may have been done all the same: of the last part that is pushed again the server expects none any more."""
    engine, real, seen = far(), vars(FleetHttpClient)[kind], Counter[str]()

    def slow(client: FleetHttpClient, request: Any) -> Any:
        seen[request.object_id] += 1
        said = real(client, request)
        if seen[request.object_id] == 1:
            raise httpx.ReadTimeout("nothing was said")
        return said

    monkeypatch.setattr(FleetHttpClient, kind, slow)
    monkeypatch.setattr(Node, "_activate", None)  # nobody begins anew
    assert engine.run([task(0)]).failures == () and max(seen.values()) == 2


def test_whoever_says_nothing_in_time_is_asked_again_a_few_times_and_who_is_not_there_is_not() -> None:
    def silent(error: type[httpx.TimeoutException], answers_at: int) -> int:
        asked: list[str] = []

        def call(request: str) -> str:
            asked.append(request)
            if len(asked) < answers_at:
                raise error("nothing")
            return "here"

        with suppress(error):
            assert in_time(call, "part") == "here"
        return len(asked)

    assert [silent(httpx.ReadTimeout, 3), silent(httpx.WriteTimeout, 3), silent(httpx.ReadTimeout, 99)] == [3, 3, TRIES]
    assert silent(httpx.ConnectTimeout, 99) == 1


def test_tensors_of_a_broadcast_are_kept_once() -> None:
    link = Link({k: bytes([k]) for k in range(8)})
    for node in link.nodes.values():
        link.state.activate_node(node, 60.0)
    tensors = {"x": torch.randn(500_000)}
    blobs = [pack(Task("train", k, tensors), "d") for k in link.nodes]
    for k, blob in zip(link.nodes, blobs, strict=True):
        content = RecordDict({"blob": boxed(blob)})
        assert unboxed(content) == blob
        assert list(link.push_messages([Message(content, link.nodes[k], "train", ttl=60)]))
    kept = sum(len(entry.content) for entry in link.state.object_store.store.values())
    assert kept < 1.1 * len(blobs[0]), "and not eight times that"


@pytest.mark.parametrize("blob", [b"", b"x", b"1234567", bytes(8), bytes(9), b"\xff" * 8, b"\xff" * 30, b"\x03" + bytes(7) + b"abcdef"])
def test_whatever_is_boxed_comes_out_as_it_was(blob: bytes) -> None:
    assert unboxed(RecordDict({"blob": boxed(blob)})) == blob


class Forgetful(Here):
    """Knows no experiment until it has been greeted twice."""

    def answer(self, client: int, state: str, committed: str, blob: bytes):
        if self.greeted < 2:
            raise Ungreeted("who are you?")
        return Here.answer(self, client, state, committed, blob)


def test_a_device_that_was_started_anew_is_greeted_again(tmp_path: Path) -> None:
    *_, host = host_of()
    device = Forgetful(host, tmp_path)
    assert far(device).run([task(0)]).failures == ()
    assert device.greeted == 2


class Loose(Here):
    """Raises what quotes its data, when it is greeted or when it has a task."""

    greets = False

    def greet(self, greeting: str):
        if not self.greets:
            raise KeyError("Mrs Miller, born 3 May 1961")
        return Here.greet(self, greeting)

    def answer(self, client: int, state: str, committed: str, blob: bytes):
        raise ValueError("Mrs Miller, born 3 May 1961")


def test_what_an_error_quotes_stays_on_the_device(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    device = Loose(host_of()[-1], tmp_path)
    for device.greets, kind in ((False, "KeyError"), (True, "ValueError")):
        (failure,) = far(device).run([task(0)]).failures
        assert f"{kind}, raised at test_federation.py:" in failure.reason and "Miller" not in failure.reason
        assert "Miller" in caplog.text, "its own log has it"


class Liar(Here):
    """Names a state of another client."""

    def answer(self, client: int, state: str, committed: str, blob: bytes):
        return Here.answer(self, client, state, committed, blob)[0], f"client-{client + 1}-0123456789abcdef.safetensors"


def test_a_state_of_another_client_is_not_taken(tmp_path: Path) -> None:
    *_, host = host_of()
    (failure,) = far(Liar(host, tmp_path)).run([task(0)]).failures
    assert "a state of client 0 is due" in failure.reason


@pytest.mark.parametrize("bad", [{"deadline": 0.0}, {"wait": -1.0}, {"linger": float("inf")}])
def test_nothing_may_wait_for_ever(bad: dict[str, float]) -> None:
    with pytest.raises(ValueError, match="wait for ever"):
        Patience(**bad)


def test_memory_of_messages_is_given_back() -> None:
    engine = far()
    engine.run([task(k, "stumble" if k == 1 else "add") for k in CLIENTS])
    assert len(engine.link.state.object_store) == 0
    assert (engine.link.state.message_ins_store, engine.link.state.message_res_store) == ({}, {})


def laid_out(link: Link, number: int, size: int) -> Message:
    """A message of ``size`` bytes that lies on the link."""
    message = Message(RecordDict({"blob": boxed(bytes([number]) * size)}), link.nodes[number], "train", ttl=60)
    assert list(link.push_messages([message])) == [message.object_id]
    return message


@pytest.fixture
def two() -> Iterator[Link]:
    """A link of two clients whose nodes are there."""
    link = Link({k: public_key_to_bytes(generate_key_pairs()[1]) for k in (0, 1)})
    for node in link.nodes.values():
        link.state.activate_node(node, 60)
    yield link
    link.state.object_store.close()


def test_large_parts_of_messages_wait_in_a_file_until_the_message_is_gone(two: Link) -> None:
    objects = two.state.object_store
    message = laid_out(two, 0, 10 * SMALL)
    parts = {name: part.deflate() for name, part in get_all_nested_objects(message).items()}
    large = [name for name, content in parts.items() if len(content) > SMALL]
    assert large and all(objects.get(name) == content for name, content in parts.items())
    assert all(len(entry.content) <= SMALL for entry in objects.store.values()), "of what is large, nothing is in memory"
    end = objects._aside._end
    two.forget([message.object_id])
    assert len(objects) == 0 and not objects._kept and objects.get(large[0]) is None
    two.forget([laid_out(two, 1, 10 * SMALL).object_id])
    assert objects._aside._end == end, "the next one lies where it lay"


def test_a_part_that_the_disk_did_not_take_is_not_there_and_may_come_again(two: Link, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(number: int, blob: memoryview, begin: int) -> int:
        raise OSError(28, "No space left on device")

    objects, message = two.state.object_store, Message(RecordDict({"blob": boxed(bytes(10 * SMALL))}), two.nodes[0], "train", ttl=60)
    objects.preregister(two.run.run_id, get_object_tree(message))
    name, content = next((n, p.deflate()) for n, p in get_all_nested_objects(message).items() if len(p.deflate()) > SMALL)
    with monkeypatch.context() as disk, pytest.raises(OSError, match="No space left"):
        disk.setattr("os.pwrite", full)
        objects.put(name, content)
    assert objects.get(name) == b"" and name in objects.preregister(two.run.run_id, get_object_tree(message)), "still missing"
    objects.put(name, content)
    assert objects.get(name) == content


def quiet(link: Link, client: int) -> None:
    """Nothing is heard of the client's node any more."""
    link.state.nodes[link.nodes[client]].online_until = time.time() - 1


def test_what_a_silent_node_has_to_do_is_not_given_up(two: Link) -> None:
    """It had failed after 20 s of silence, whatever was to be waited for, and its answer came too late."""
    name = laid_out(two, 0, 10).object_id
    (asked,) = two.state.get_message_ins(two.nodes[0], limit=1)
    quiet(two, 0)
    there = len(two.state.object_store)
    assert [list(two.pull_messages([name])) for _ in range(3)] == [[], [], []] and two.present() == {1}
    assert len(two.state.object_store) == there, "asking leaves nothing behind"
    assert two.state.acknowledge_node_heartbeat(two.nodes[0], 10.0)
    reply = Message(RecordDict({"blob": boxed(b"here")}), reply_to=asked)
    parts = {name: part.deflate() for name, part in get_all_nested_objects(reply).items()}
    pushed(two, reply, parts, get_object_tree(reply), reply.object_id, client=0)
    (found,) = two.pull_messages([name])
    assert unboxed(found.content) == b"here"


def test_what_a_node_had_fetched_before_it_began_anew_is_answered_by_an_error_and_the_rest_is_not(two: Link) -> None:
    first = laid_out(two, 0, 10).object_id
    assert len(two.state.get_message_ins(two.nodes[0], limit=1)) == 1
    later = laid_out(two, 0, 20).object_id
    quiet(two, 0)
    assert two.state.activate_node(two.nodes[0], 10.0)
    (error,) = two.pull_messages([first, later])
    assert error.metadata.reply_to_message_id == first and error.error.code == ErrorCode.NODE_UNAVAILABLE
    (asked,) = two.state.get_message_ins(two.nodes[0], limit=1)
    assert asked.metadata.message_id == later and not two.state.dropped
    two.forget([later])
    assert len(two.state.object_store) == 0 and not two.state.message_ins_store


@pytest.mark.parametrize("looked_at", range(8))
def test_what_is_shared_with_a_message_that_arrives_meanwhile_is_still_laid_out(
    two: Link, monkeypatch: pytest.MonkeyPatch, looked_at: int
) -> None:
    """The other device confirms that it has its message while this many objects of the next one's tree have been looked at."""

    def interrupted(tree: ObjectTree) -> Iterator[ObjectTree]:
        for number, node in enumerate(walk(tree)):
            yield node
            if number == looked_at:
                confirmed.start()
                confirmed.join(0.2)

    blob = b"\x64" + bytes(7 + 100) + bytes(10 * SMALL)  # a head of 100 bytes
    first, second = (
        Message(RecordDict({"blob": boxed(blob), "to": ConfigRecord({"client": k})}), two.nodes[k], "train", ttl=60) for k in (0, 1)
    )
    walk = in_memory_object_store.iterate_object_tree
    assert list(two.push_messages([first])) == [first.object_id]
    confirmed = threading.Thread(target=two.state.object_store.delete, args=(first.object_id,))
    with monkeypatch.context() as meanwhile:
        meanwhile.setattr(in_memory_object_store, "iterate_object_tree", interrupted)
        assert list(two.push_messages([second])) == [second.object_id]
    confirmed.join(10)
    assert first.object_id not in two.state.object_store
    assert all(two.state.get_object(two.run.run_id, name) for name in get_all_nested_objects(second))


def begun(link: Link, name: str, client: int = 0) -> tuple[str, dict[str, bytes], str]:
    """An answer to this message of which one part has come. Returns its name, the other parts, and the session in which they are pushed."""
    (asked,) = [message for message in link.state.get_message_ins(link.nodes[client], limit=1) if message.metadata.message_id == name]
    reply = Message(RecordDict({"blob": boxed(bytes([7]) * 10 * SMALL)}), reply_to=asked)
    reply.metadata.__dict__["_src_node_id"] = link.nodes[client]
    reply.metadata.__dict__["_message_id"] = reply.object_id
    parts = {part: one.deflate() for part, one in get_all_nested_objects(reply).items()}
    session = link.state.start_session(link.run.run_id)
    stored, missing = link.state.store_message_and_object_tree(remove_content_from_message(reply), get_object_tree(reply), session)
    assert stored and set(missing) == set(parts)
    large = next(part for part in missing if len(parts[part]) > SMALL)
    assert link.state.store_object(link.run.run_id, session, large, parts.pop(large))
    return reply.object_id, parts, session


@pytest.mark.parametrize("looked", [True, False], ids=["its head was taken", "nobody had looked"])
def test_of_an_answer_that_is_late_nothing_stays_and_the_rest_is_not_taken(two: Link, looked: bool) -> None:
    name = laid_out(two, 0, 10).object_id
    _, parts, session = begun(two, name)
    assert not looked or list(two.pull_messages([name])) == []
    two.forget([name])
    assert len(two.state.object_store) == 0 and not two.state.object_store._kept and not two.state.message_res_store
    assert not any(two.state.store_object(two.run.run_id, session, part, content) for part, content in parts.items())
    assert len(two.state.object_store) == 0 and not two.state._object_push_sessions


def test_an_answer_to_what_is_forgotten_is_not_expected(two: Link) -> None:
    name = laid_out(two, 0, 10).object_id
    (asked,) = two.state.get_message_ins(two.nodes[0], limit=1)
    two.forget([name])
    reply = Message(RecordDict({"blob": boxed(b"late")}), reply_to=asked)
    pushed(two, reply, {}, get_object_tree(reply), reply.object_id, client=0)
    assert not two.state._object_push_sessions and len(two.state.object_store) == 0


@pytest.mark.parametrize("looked", [True, False], ids=["its head was taken", "nobody had looked"])
def test_an_answer_that_a_node_has_begun_to_push_before_it_began_anew_is_not_waited_for(two: Link, looked: bool) -> None:
    name = laid_out(two, 0, 10).object_id
    _, parts, session = begun(two, name)
    assert not looked or list(two.pull_messages([name])) == []
    assert two.state.deactivate_node(two.nodes[0]) and two.state.activate_node(two.nodes[0], 10.0)
    (error,) = two.pull_messages([name])
    assert error.metadata.reply_to_message_id == name and error.error.code == ErrorCode.NODE_UNAVAILABLE
    assert not any(two.state.store_object(two.run.run_id, session, part, content) for part, content in parts.items())
    assert len(two.state.object_store) == 0 and list(two.pull_messages([name])) == []


@pytest.mark.parametrize("fails", [True, False])
def test_an_answer_that_is_here_as_a_whole_counts_though_its_node_begins_anew(two: Link, fails: bool) -> None:
    name = laid_out(two, 0, 10).object_id
    if fails:
        (asked,) = two.state.get_message_ins(two.nodes[0], limit=1)
        reply = Message(Error(7, "no luck"), reply_to=asked)
        pushed(two, reply, {}, get_object_tree(reply), reply.object_id, client=0)
    else:
        _, parts, session = begun(two, name)
        assert all(two.state.store_object(two.run.run_id, session, part, content) for part, content in parts.items())
    assert two.state.deactivate_node(two.nodes[0]) and two.state.activate_node(two.nodes[0], 10.0)
    (found,) = two.pull_messages([name])
    assert found.error.reason == "no luck" if fails else unboxed(found.content) == bytes([7]) * 10 * SMALL
    assert len(two.state.object_store) == 0


@pytest.mark.parametrize("looked", [True, False], ids=["its head was taken", "nobody had looked"])
def test_an_error_takes_the_place_of_an_answer_that_could_not_be_brought_and_of_no_other(two: Link, looked: bool) -> None:
    for whole in (False, True):
        name = laid_out(two, 0, 10).object_id
        (asked,) = [message for message in two.state.message_ins_store.values() if message.metadata.message_id == name]
        _, parts, session = begun(two, name)
        assert not looked or list(two.pull_messages([name])) == []
        if whole:
            assert all(two.state.store_object(two.run.run_id, session, part, content) for part, content in parts.items())
        error = Message(Error(100, "no room"), reply_to=asked)
        error.metadata.__dict__["_src_node_id"] = two.nodes[1]
        head = remove_content_from_message(error)
        head.metadata.__dict__["_message_id"] = error.object_id
        assert two.state.store_message_res(head) is None and name in two.state.message_ins_id_to_message_res_id, "of another node"
        error = Message(Error(100, "no room"), reply_to=asked)
        pushed(two, error, {}, get_object_tree(error), error.object_id, client=0)
        (found,) = two.pull_messages([name])
        assert found.has_error() is not whole and (whole or found.error.reason == "no room")
        assert len(two.state.object_store) == 0 and not two.state.message_res_store


def test_an_answer_that_is_larger_than_any_is_not_stored_and_a_message_may_be(two: Link) -> None:
    name = laid_out(two, 0, 30 * SMALL).object_id
    _, parts, session = begun(two, name)
    two.state.most = two.state._brought[session] + sum(map(len, parts.values()))
    assert all(two.state.store_object(two.run.run_id, session, part, content) for part, content in parts.items())
    assert len(list(two.pull_messages([name]))) == 1
    name = laid_out(two, 1, 30 * SMALL).object_id
    assert not two.state._object_push_sessions, "all of the message is stored, though it is larger"
    _, parts, session = begun(two, name, client=1)
    two.state.most = two.state._brought[session] + sum(map(len, parts.values())) - 1
    assert [two.state.store_object(two.run.run_id, session, part, content) for part, content in parts.items()].count(False) == 1
    assert list(two.pull_messages([name])) == []


def test_bytes_that_are_pushed_again_are_counted_once_and_those_of_no_session_are_not_stored(two: Link) -> None:
    two.state.most = 10 * SMALL + 10_000
    name = laid_out(two, 0, 10).object_id
    _, parts, session = begun(two, name)
    assert not any(two.state.store_object(two.run.run_id, "", part, content) for part, content in parts.items())
    part, content = parts.popitem()
    assert all(two.state.store_object(two.run.run_id, session, part, content) for _ in range(10 * SMALL // len(content) + 10_000))
    assert all(two.state.store_object(two.run.run_id, session, part, content) for part, content in parts.items())
    assert len(list(two.pull_messages([name]))) == 1
    assert not two.state._brought


@pytest.mark.parametrize("comes", [True, False], ids=["it comes", "it is looked for"])
def test_a_late_part_and_a_message_that_is_withdrawn_do_not_wait_for_each_other(two: Link, comes: bool) -> None:
    name = laid_out(two, 0, 10).object_id
    _, parts, session = begun(two, name)
    two.state._object_push_sessions[session].expires_at = now() - timedelta(seconds=1)
    part, content = parts.popitem()
    run = two.run.run_id
    what = (two.state.store_object, (run, session, part, content)) if comes else (two.state.get_object, (run, part))
    late = threading.Thread(target=what[0], args=what[1], daemon=True)

    def withdrawn() -> None:
        with two.state.lock:
            late.start()
            late.join(0.2)
            two.forget([name])

    other = threading.Thread(target=withdrawn, daemon=True)
    other.start()
    other.join(10)
    late.join(10)
    assert not other.is_alive() and not late.is_alive() and len(two.state.object_store) == 0


def test_a_message_for_which_the_disk_has_no_room_is_said_and_not_laid_out(two: Link, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(number: int, blob: memoryview, begin: int) -> int:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.pwrite", full)
    with pytest.raises(OSError, match="No space left"):
        laid_out(two, 0, 10 * SMALL)


class Silent(Slow):
    """Knows when it has begun."""

    began = 0.0

    def answer(self, client: int, state: str, committed: str, blob: bytes):
        self.began = self.began or (time.monotonic() if client == 1 else 0.0)
        return Slow.answer(self, client, state, committed, blob)


def silenced(engine: Federation, device: Silent, seconds: float) -> Replies:
    """An asking of clients 0 and 1, of whom 1 is silent for so long once it has begun with its task, and goes on then."""

    def present() -> set[int]:
        away = device.began > 0.0 and time.monotonic() < device.began + seconds
        if device.began and not away:
            device.go.set()
        return set(CLIENTS) - ({1} if away else set())

    link, there = engine.link, engine.link.present
    link.present = present  # type: ignore[method-assign]
    try:
        return engine.run([task(0), task(1)])
    finally:
        link.present = there  # type: ignore[method-assign]
        device.go.set()
        assert device.done.wait(10)


def test_a_device_that_is_silent_within_its_task_has_so_long_as_one_that_is_away_before_it(tmp_path: Path) -> None:
    for wait, seconds, reasons in ((20.0, 0.5, []), (0.3, 9.0, ["TimeoutError: not heard of for 0.3 s"])):
        device = Silent(host_of()[-1], tmp_path)
        engine = far(device, replace(QUICK, wait=wait, deadline=30.0))
        assert [failure.reason for failure in silenced(engine, device, seconds).failures] == reasons


def test_replies_are_put_together_one_at_a_time(two: Link) -> None:
    names = [laid_out(two, k, 10).object_id for k in (0, 1)]
    for k in (0, 1):
        (asked,) = two.state.get_message_ins(two.nodes[k], limit=1)
        reply = Message(RecordDict({"blob": boxed(bytes([k]) * 10 * SMALL)}), reply_to=asked)
        parts = {name: part.deflate() for name, part in get_all_nested_objects(reply).items()}
        pushed(two, reply, parts, get_object_tree(reply), reply.object_id, client=k)
    before, replies = len(two.state.object_store), iter(two.pull_messages(names))
    first = unboxed(next(replies).content)
    assert 0 < len(two.state.object_store) < before, "the second one is still in parts"
    assert {first[0], unboxed(next(replies).content)[0]} == {0, 1}
    assert next(replies, None) is None and list(two.pull_messages(names)) == []


# what a hostile device may push


class Telling(Here):
    """Names the state that it is given."""

    state = ""

    def answer(self, client: int, state: str, committed: str, blob: bytes):
        return Here.answer(self, client, state, committed, blob)[0], self.state


@pytest.mark.parametrize("state", [f"client-{'0' * 5000}-0123456789abcdef.safetensors", "client-00-0123456789abcdef.safetensors", "../x"])
def test_a_state_of_no_proper_name_is_a_failure(tmp_path: Path, state: str) -> None:
    *_, host = host_of()
    device = Telling(host, tmp_path)
    device.state = state
    (failure,) = far(device).run([task(0)]).failures
    assert "a state of client 0 is due" in failure.reason and len(failure.reason) < 1100


@pytest.mark.parametrize("told", ["[" * 60_000, "[" * 70_000, "9" * 5000, "[]", ""])
def test_what_a_device_tells_of_itself_must_be_an_object(told: str) -> None:
    with pytest.raises(WireError, match="does not say what it is"):
        told_of(RecordDict({"to": ConfigRecord({"told": told})}))


@pytest.mark.parametrize(
    "held", [{"train": "many"}, {"train": 1e400}, {"train": -1}, {"train": [1]}, {"train": 2**60}, {"train": True}, []]
)
def test_examples_that_are_no_number_are_none(held: object) -> None:
    joined = Joined(nodes(tuple(CLIENTS)).link, None, QUICK, None, {}, far())  # type: ignore[arg-type]
    joined.federation.told[0] = {"examples": held}  # type: ignore[union-attr]
    assert joined.examples(0, "train") == 0
    joined.federation.told[0] = {"examples": {"train": 7}}  # type: ignore[union-attr]
    assert joined.examples(0, "train") == 7


@pytest.fixture
def hostile():
    """A link that is not opened, with one node that is there, and a task laid out for it."""
    link = Link({3: b"key", 4: b"another key"})
    for node in link.nodes.values():
        link.state.activate_node(node, 60.0)
    (name,) = link.push_messages([Message(RecordDict({"x": ConfigRecord({"y": 1})}), link.nodes[3], "train", ttl=60)])
    (asked,) = link.state.get_message_ins(link.nodes[3], limit=1)
    return link, name, asked


def pushed(link: Link, reply: Message, parts: dict[str, bytes], tree: ObjectTree, root: str, client: int = 3) -> None:
    """Push a reply with these objects, as Flower's Fleet API takes it."""
    reply.metadata.__dict__["_message_id"] = root
    head = message_to_proto(remove_content_from_message(reply))
    request = PushMessagesRequest(node=FlowerNode(node_id=link.nodes[client]), messages_list=[head], message_object_trees=[tree])
    wanted = fleet_handlers.push_messages(request, link.state)
    for part, content in parts.items():
        link.state.store_object(link.run.run_id, wanted.session_id, part, content)


def test_a_reply_that_is_no_message_comes_as_an_error(hostile) -> None:
    link, name, asked = hostile
    content = b"ArrayChunk  0\0"
    root = get_object_id(content)
    pushed(link, Message(RecordDict(), reply_to=asked), {root: content}, ObjectTree(object_id=root), root)
    (reply,) = link.pull_messages([name])
    assert "a ArrayChunk is no message with content" in reply.error.reason
    assert list(link.pull_messages([name])) == []


def test_a_reply_whose_objects_name_each_other_without_end_comes_as_an_error(hostile) -> None:
    link, name, asked = hostile
    parts: dict[str, bytes] = {}
    last = ""
    for _ in range(1500):
        content = f"RecordDict {last} 0".encode() + b"\0"
        last = get_object_id(content)
        parts[last] = content
    tree = ObjectTree(object_id=last, children=[ObjectTree(object_id=part) for part in list(parts)[:-1]])
    pushed(link, Message(RecordDict(), reply_to=asked), parts, tree, last)
    (reply,) = link.pull_messages([name])
    assert "cannot be put together (RecursionError" in reply.error.reason


def test_what_a_reply_is_an_answer_to_says_its_head_and_not_its_objects(hostile) -> None:
    link, name, asked = hostile
    asked.metadata.__dict__["_message_id"] = "f" * 64  # the objects name another asking
    made = Message(RecordDict({"x": ConfigRecord({"y": 2})}), reply_to=asked)
    parts, root, tree = get_all_nested_objects(made), made.object_id, get_object_tree(made)
    asked.metadata.__dict__["_message_id"] = name
    pushed(link, Message(RecordDict(), reply_to=asked), {n: part.deflate() for n, part in parts.items()}, tree, root)
    (reply,) = link.pull_messages([name])
    assert reply.metadata.reply_to_message_id == name and reply.content["x"] == {"y": 2}


def test_a_tree_with_paths_without_number_is_refused(hostile) -> None:
    link, _, _ = hostile
    tree = ObjectTree(object_id=f"{0:064x}")
    for level in range(1, 40):
        tree = ObjectTree(object_id=f"{level:064x}", children=[tree, ObjectTree(object_id=tree.object_id)])
    with pytest.raises(ValueError, match="not one that a message has"):
        link.state.object_store.preregister(link.run.run_id, tree)


def test_a_part_that_a_node_said_something_else_of_is_no_end_of_the_run(hostile) -> None:
    link, _, _ = hostile
    message = Message(RecordDict({"x": ConfigRecord({"y": 3})}), link.nodes[3], "train", ttl=60)
    part = message.content["x"].object_id
    link.state.object_store.preregister(link.run.run_id, ObjectTree(object_id=part, children=[ObjectTree(object_id="0" * 64)]))
    assert list(link.push_messages([message])) == []


def test_a_node_pushes_in_its_own_name_only() -> None:
    for source, own in ((7, True), (8, False)):
        head = ProtoMessage(metadata=ProtoMetadata(src_node_id=source))
        assert only_own(PushMessagesRequest(node=FlowerNode(node_id=7), messages_list=[head])) is own


def test_who_pushes_in_anothers_name_is_refused_and_told_so() -> None:
    private, public = generate_key_pairs()
    with Link({0: public_key_to_bytes(public)}) as link:
        node = Node(f"127.0.0.1:{link.port}", Credentials(private, None), lambda message, context: message, lambda text: None)
        with node._client() as client:
            node._activate(client)
            head = ProtoMessage(metadata=ProtoMetadata(src_node_id=node._id + 1))
            with pytest.raises(httpx.HTTPStatusError, match="401"):
                client.PushMessages(PushMessagesRequest(node=FlowerNode(node_id=node._id), messages_list=[head]))


def test_a_key_of_a_kind_that_nobody_knows_is_no_key() -> None:
    unknown = b"-----BEGIN PUBLIC KEY-----\nMA0wBwYFK2WBOAEDAgAB\n-----END PUBLIC KEY-----\n"
    stamp = now().isoformat().encode()
    parts = ((FLEET_HTTP_PUBLIC_KEY_HEADER, b64encode(unknown)), (FLEET_HTTP_SIGNATURE_HEADER, b64encode(b"x")), (TIMESTAMP_HEADER, stamp))
    headers = [(name.lower().encode(), value) for name, value in parts]
    with pytest.raises(HTTPException, match="401"):
        authenticated(Request({"type": "http", "method": "GET", "path": "/", "headers": headers, "query_string": b""}))


# the index of states that lie elsewhere


class Told(Here):
    """Remembers from which state it was to start, and which the server has committed."""

    def __init__(self, host: Host, folder: Path) -> None:
        Here.__init__(self, host, folder)
        self.told = list[tuple[str, str]]()

    def answer(self, client: int, state: str, committed: str, blob: Blob) -> tuple[Blob | Failure, str]:
        self.told.append((state, committed))
        return Here.answer(self, client, state, committed, blob)


def test_a_task_names_the_state_of_the_last_commit_beside_the_one_to_start_from(tmp_path: Path) -> None:
    device = Told(host_of()[-1], tmp_path)
    engine, names = far(device), [""]
    for _ in range(2):
        engine.run([task(0)])
        names.append(engine.states.name(0))
    engine.states.commit()
    for _ in range(2):
        engine.run([task(0)])
        names.append(engine.states.name(0))
    assert device.told == [("", ""), (names[1], ""), (names[2], names[2]), (names[3], names[2])] and len(set(names)) == 5


def test_the_index_goes_back_to_the_last_commit() -> None:
    states, name = Elsewhere(), "client-3-0123456789abcdef.safetensors"
    states.take(3, name)
    assert states.commit() == {"3": name}
    states.take(3, "")
    assert states.name(3) == ""
    states.forget()
    assert states.name(3) == name
    with pytest.raises(StoreError, match="corrupt"):
        states.restore({"3": "../../etc/passwd"})


# who may come in


@pytest.fixture(scope="module")
def certs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("certs")
    issue(folder, 2, ("localhost", "127.0.0.1"))
    return folder


@pytest.fixture
def link(certs: Path):
    server = certs / "server"
    with Link(public_keys(server), tls=Tls(server / "server.pem", server / "server.key")) as link:
        link.about = lambda: {"here": sorted(link.present())}
        yield link


def credentials(certs: Path, k: int = 0) -> Credentials:
    return Credentials.read(certs / f"device-{k}" / "device.key", certs / f"device-{k}" / "ca.pem")


def joined(link: Link, given: Credentials, name: str = "127.0.0.1") -> str:
    """What a node that tries to join comes to: "here", or why not."""
    *_, host = host_of()
    stop, told = threading.Event(), []
    node = Node(f"{name}:{link.port}", given, device_app(Here(host, Path("/nowhere"))), told.append)
    thread = threading.Thread(target=lambda: told.append(_ended(node, stop)), daemon=True)
    thread.start()
    until = time.monotonic() + 10
    while not told and time.monotonic() < until:
        time.sleep(0.02)
    stop.set()
    thread.join(10)
    return told[0]


def _ended(node: Node, stop: threading.Event) -> str:
    try:
        node.serve(stop)
    except Refused as refused:
        return f"refused: {refused}"
    return "left"


def test_a_device_with_its_key_is_let_in_over_tls(link: Link, certs: Path) -> None:
    assert joined(link, credentials(certs)).startswith("joined the federation")


@pytest.mark.parametrize("error", [KeyboardInterrupt(), httpx.ReadError("broken")])
def test_a_device_that_leaves_says_so_whatever_it_was_doing(link: Link, certs: Path, error: BaseException) -> None:
    def interrupted(client: FleetHttpClient, own: FlowerNode) -> bool:
        assert link.present() == {0}
        stop.set()
        raise error

    stop = threading.Event()
    node = Node(f"127.0.0.1:{link.port}", credentials(certs), lambda message, context: message, lambda text: None)
    node._answer_next = interrupted  # type: ignore[method-assign]
    with suppress(KeyboardInterrupt):
        node.serve(stop)
    assert link.present() == set()


def test_a_device_leaves_though_the_server_does_not_hear_it(link: Link, certs: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def gone(client: FleetHttpClient, request: object) -> None:
        left.append(client._client.timeout.read)
        raise httpx.ConnectError("nobody")

    left: list[float | None] = []
    monkeypatch.setattr(FleetHttpClient, "DeactivateNode", gone)
    assert joined(link, credentials(certs)).startswith("joined the federation") and left == [GOODBYE]


def test_a_device_without_a_known_key_is_refused(link: Link, certs: Path) -> None:
    stranger = Credentials(generate_key_pairs()[0], credentials(certs).root)
    assert "does not know this device's key" in joined(link, stranger)
    assert link.present() == set()


def test_who_is_still_taken_to_be_there_waits_and_does_not_leave(link: Link, certs: Path) -> None:
    """As after signal 9 and a quick restart: Flower answers both as it answers a stranger."""
    assert link.state.activate_node(link.nodes[0], 10.0)
    assert "somebody with this device's key is there" in joined(link, credentials(certs))
    assert link.present() == {0}


def test_a_server_of_another_authority_is_refused_by_the_device(link: Link, certs: Path, tmp_path: Path) -> None:
    issue(tmp_path, 1, ("127.0.0.1",))
    other = Credentials(credentials(certs).key, (tmp_path / "device-0" / "ca.pem").read_bytes())
    assert "is not certified by the authority" in joined(link, other)


def test_a_server_under_another_name_than_certified_is_refused(certs: Path, tmp_path: Path) -> None:
    issue(tmp_path, 1, ("example.org",))
    server = tmp_path / "server"
    with Link(public_keys(server), tls=Tls(server / "server.pem", server / "server.key")) as link:
        assert "the name or address that its certificate is for" in joined(link, credentials(tmp_path))


def test_status_is_told_to_devices_and_to_nobody_else(link: Link, certs: Path) -> None:
    address = f"127.0.0.1:{link.port}"
    assert asked(address, credentials(certs), STATUS) == {"here": []}
    with pytest.raises(Refused, match="does not know this device.s key"):
        asked(address, Credentials(generate_key_pairs()[0], credentials(certs).root), STATUS)
    with pytest.raises(OSError, match="nobody answers"):
        asked("127.0.0.1:9", credentials(certs), STATUS)


def client_of(certs: Path) -> httpx.Client:
    import ssl

    return httpx.Client(verify=ssl.create_default_context(cafile=str(certs / "device-0" / "ca.pem")))


def test_only_the_fleet_api_is_there_and_nothing_unsigned_is_heard(link: Link, certs: Path) -> None:
    with client_of(certs) as client:
        base = f"https://127.0.0.1:{link.port}"
        kind = {"content-type": PROTOBUF_MEDIA_TYPE, "accept": PROTOBUF_MEDIA_TYPE}
        for path in ("/v1/control/start-run", "/v1/runtime/push-messages", "/docs", "/openapi.json", "/"):
            assert client.post(f"{base}{path}", content=b"", headers=kind).status_code == 404, path
        for path in ("pull-messages", "push-messages", "activate-node", "register-node", "push-object"):
            reply = client.post(f"{base}/v1/fleet/{path}", content=b"", headers=kind)
            assert reply.status_code == 401, (path, reply.status_code)
        assert client.get(f"{base}{STATUS}").status_code == 401


def test_a_request_that_is_too_large_is_not_read(link: Link, certs: Path) -> None:
    with client_of(certs) as client:
        content = bytes(LARGEST + 1)
        reply = client.post(f"https://127.0.0.1:{link.port}/v1/fleet/push-object", content=content)
        assert reply.status_code == 413


def test_no_more_connections_are_open_than_are_given(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(link_module, "STRANGERS", 2)
    monkeypatch.setattr(link_module, "EACH", 1)
    with Link({0: b"key"}) as link, suppress(httpx.HTTPError):
        at = ("127.0.0.1", link.port)
        assert httpx.get(f"http://127.0.0.1:{link.port}{STATUS}").status_code == 401
        with socket.create_connection(at), socket.create_connection(at), socket.create_connection(at):
            time.sleep(0.2)
            assert httpx.get(f"http://127.0.0.1:{link.port}{STATUS}").status_code == 503


def test_an_address_that_is_taken_is_named(link: Link) -> None:
    with pytest.raises(LinkError, match=r"cannot listen on .*: Address already in use; give another --listen"):
        Link({0: public_key_to_bytes(generate_key_pairs()[1])}, port=link.port).__enter__()


@pytest.mark.parametrize("content", ["", "no certificate", "-----BEGIN CERTIFICATE-----\nAAAA\n-----END CERTIFICATE-----\n", "ä"])
def test_a_damaged_certificate_is_named_and_not_a_server_that_is_away(certs: Path, tmp_path: Path, content: str) -> None:
    (tmp_path / "ca.pem").write_text(content, encoding="utf-8")
    with pytest.raises(ValueError, match=r"ca\.pem is no certificate in PEM \(.*; copy the federation's ca\.pem there again"):
        Credentials.read(certs / "device-0" / "device.key", tmp_path / "ca.pem")


def test_a_key_of_another_kind_is_named(tmp_path: Path) -> None:
    (tmp_path / "key").write_text("no key")
    with pytest.raises(ValueError, match="not a private key in PEM"):
        Credentials.read(tmp_path / "key", None)
