"""The device's side: only marked operations start, failures stay with their client, and state is stored if and only if an answer left."""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from dataclasses import dataclass, field

import pytest
import torch

from fedloom.client.client import Client
from fedloom.client.host import UNSENT, Host, operations
from fedloom.client.store import ClientStore
from fedloom.compute.compute import Done
from fedloom.encodings import CODES, WHICH, Encoding
from fedloom.messages import Failure, Task, Update, on_client
from fedloom.telling import for_others
from fedloom.wire import Blob, pack, unpack
from tests import tiny

DIGEST = "host-test"


@dataclass
class Doubling:
    """A compute whose items are numbers: doubles them; cannot do negative ones. Remembers each call's items."""

    calls: list[list[float]]

    def run(self, items: Sequence[float]) -> list[Done]:
        self.calls.append(list(items))
        if any(item < 0 for item in items):
            raise ArithmeticError("negative")
        return [Done(2 * item, 10.0, 1) for item in items]


@dataclass
class TooMuch(Doubling):
    """Cannot do several clients' items at once, and what it took for that is only as long there as the error is."""

    taken: list[weakref.ref[torch.Tensor]] = field(default_factory=list)

    def run(self, items: Sequence[float]) -> list[Done]:
        assert all(held() is None for held in self.taken), "what a pass took that failed is gone when its clients are computed one by one"
        if len({item for item in items if item != 5.0}) > 1:
            large = torch.zeros(8)
            self.taken.append(weakref.ref(large))
            raise torch.OutOfMemoryError("not enough memory")
        return Doubling.run(self, items)


class Base:
    @on_client
    def inherited(self, c: Client, task: Task):
        yield 1.0
        return Update(c.id, 1)


class Method(Base):
    def __init__(self) -> None:
        self.begun: list[tuple[str, int]] = []

    @property
    def trap(self) -> str:
        raise AssertionError("properties must not be evaluated")

    @on_client
    def train(self, c: Client, task: Task):
        self.begun.append(("train", c.id))
        c.private["rounds"] = c.private.get("rounds", torch.zeros(1)) + 1
        c.memory["seen"] = torch.tensor(c.id)
        one = yield float(c.id)
        two, three = yield [one, 5.0]
        nothing = yield []
        return Update(c.id, 4, {"x": torch.tensor([one, two, three])}, {"list": len(nothing)})

    @on_client
    def answer(self, c: Client, task: Task):
        c.private["rounds"] = torch.full((1,), 99.0)
        yield 1.0
        value = {"nan": float("nan"), "fine": 1.0}[str(task.settings["value"])]
        return Update(c.id, 1, {"x": torch.tensor([value])})

    @on_client
    def ask(self, c: Client, task: Task):
        c.private["rounds"] = torch.full((1,), 99.0)
        yield float(task.settings["amount"])
        return Update(c.id, 1)

    @on_client
    def stranger(self, c: Client, task: Task):
        yield 1.0
        return Update(c.id + 1, 1)

    @on_client
    def plain(self, c: Client, task: Task) -> Update:
        return Update(c.id, 1)

    def unmarked(self, c: Client, task: Task):
        self.begun.append(("unmarked", c.id))
        yield 1.0
        return Update(c.id, 1)


def host() -> tuple[Host, Method, Doubling, ClientStore]:
    method, compute, store = Method(), Doubling([]), ClientStore()

    def device(client: int) -> Client:
        if client > 3:
            raise LookupError(f"there is no client {client}")
        return tiny.clients()[client]

    return Host(method, device, compute, store, DIGEST), method, compute, store


def task(client: int, op: str = "train", **settings) -> bytes:
    return pack(Task(op, client, {}, settings), DIGEST)


def opened(reply: Blob | Failure) -> Update:
    assert not isinstance(reply, Failure), reply
    update = unpack(reply, DIGEST)
    assert isinstance(update, Update)
    return update


def test_operations_are_what_is_marked_inherited_ones_included() -> None:
    assert sorted(operations(Method())) == ["answer", "ask", "inherited", "plain", "stranger", "train"]


def test_a_cohort_advances_together_and_each_gets_its_own_results() -> None:
    h, _, compute, _ = host()
    replies = [opened(r) for r in h.answer([task(2), task(0), task(3)])]
    assert compute.calls == [[2.0, 0.0, 3.0], [4.0, 5.0, 0.0, 5.0, 6.0, 5.0], []]
    assert [u.client for u in replies] == [2, 0, 3]
    assert [u.tensors["x"].tolist() for u in replies] == [[4, 8, 10], [0, 0, 10], [6, 12, 10]]


def test_what_a_failed_pass_took_is_gone_before_its_clients_are_computed_one_by_one() -> None:
    h, *_ = host()
    h.compute = TooMuch([])
    replies = [opened(r) for r in h.answer([task(2), task(1)])]
    assert [u.tensors["x"].tolist() for u in replies] == [[4, 8, 10], [2, 4, 10]] and len(h.compute.taken) == 2


def test_the_cost_of_each_operation_is_its_own_items() -> None:
    h, *_ = host()
    long, short = (opened(r) for r in h.answer([task(1), task(2, "inherited")]))
    assert (long.flops, long.examples) == (30.0, 3)
    assert (short.flops, short.examples) == (10.0, 1)


def test_state_is_there_the_next_time() -> None:
    h, _, _, store = host()
    h.answer([task(1)])
    h.answer([task(1), task(2)])
    assert store.load(1)[0]["rounds"].tolist() == [2]
    assert store.load(2)[0]["rounds"].tolist() == [1]
    assert int(store.load(2)[1]["seen"]) == 2


@pytest.mark.parametrize("op", ["unmarked", "begun", "__init__", "trap", "nothing"])
def test_nothing_else_can_be_called(op: str) -> None:
    h, method, _, _ = host()
    (reply,) = h.answer([task(1, op)])
    assert isinstance(reply, Failure)
    assert reply.client == 1
    assert reply.reason == (
        f"ValueError: Method has no client operation '{op}'; it has ['answer', 'ask', 'inherited', 'plain', 'stranger', 'train']"
    )
    assert method.begun == []


FAILING = {
    "an update that may not cross": (task(1, "answer", value="nan"), "WireError: tensor 'x' holds NaN"),
    "an operation that raises": (task(1, "answer", value="else"), "KeyError: 'else'"),
    "a compute that raises": (task(1, "ask", amount=-1.0), "ArithmeticError: negative"),
    "another client's update": (task(1, "stranger"), "TypeError: the operation returned Update(client=2"),
    "an operation that is no generator": (task(1, "plain"), "AttributeError: 'Update' object has no attribute 'send'"),
    "a client that does not exist": (task(9), "LookupError: there is no client 9"),
    "another experiment": (pack(Task("train", 1), "else"), "WireError: message of experiment 'else'"),
    "an update": (pack(Update(1, 1), DIGEST), "WireError: an update came where a task was expected"),
    "garbage": (b"garbage", "WireError: not a Fedloom message"),
}


@pytest.mark.parametrize(("bad", "reason"), FAILING.values(), ids=FAILING)
def test_a_failure_names_its_reason_stores_nothing_and_leaves_the_others_alone(bad: bytes, reason: str) -> None:
    h, _, _, store = host()
    h.answer([task(1), task(0), task(2)])
    first, failed, last = h.answer([task(0), bad, task(2)])
    assert isinstance(failed, Failure)
    assert failed.reason.startswith(reason)
    assert [opened(r).tensors["x"].tolist() for r in (first, last)] == [[0, 0, 10], [4, 8, 10]]
    assert [store.load(k)[0]["rounds"].tolist() for k in (0, 1, 2)] == [[2], [1], [2]]


def test_a_good_answer_stores_what_a_bad_one_would_not() -> None:
    h, _, _, store = host()
    opened(h.answer([task(1, "answer", value="fine")])[0])
    assert store.load(1)[0]["rounds"].tolist() == [99]


def test_what_leaves_of_an_error_is_what_may_be_told_and_the_log_has_it_all(caplog: pytest.LogCaptureFixture) -> None:
    h, *_ = host()
    h.telling = for_others
    unknown, stranger, negative = h.answer([task(1, "answer", value="else"), task(2, "stranger"), task(3, "ask", amount=-1.0)])
    for failure, kind in ((unknown, "KeyError"), (stranger, "TypeError"), (negative, "ArithmeticError")):
        assert isinstance(failure, Failure)
        assert failure.reason.startswith(f"{kind}, raised at ") and "its text may quote data" in failure.reason
        assert not any(word in failure.reason for word in ("else", "Update", "negative"))
    assert "KeyError: 'else'" in caplog.text and "TypeError: the operation returned Update(client=3" in caplog.text


def test_an_answer_that_cannot_be_stored_is_no_answer(monkeypatch: pytest.MonkeyPatch) -> None:
    h, _, _, store = host()

    def full(*_: object) -> None:
        raise OSError("disk full")

    monkeypatch.setattr(store, "save", full)
    assert h.answer([task(1)]) == [Failure(1, "OSError: disk full")]


def test_every_member_of_a_failed_pass_runs_alone_and_goes_on_in_the_stack() -> None:
    h, _, compute, _ = host()
    good, bad, other = h.answer([task(3), task(1, "ask", amount=-1.0), task(2)])
    assert isinstance(bad, Failure)
    assert compute.calls[:5] == [[3.0, -1.0, 2.0], [3.0], [-1.0], [2.0], [6.0, 5.0, 4.0, 5.0]]
    assert (opened(good).flops, opened(other).flops) == (30.0, 30.0)


def test_no_tasks_no_replies() -> None:
    assert host()[0].answer([]) == []


def test_a_client_has_three_splits_and_names_them_when_asked_for_another() -> None:
    client = tiny.clients()[1]
    assert [len(client.shard(split)) for split in ("train", "validation", "test")] == [9, 2, 3]
    with pytest.raises(ValueError, match=r"no split 'dev'; a client has \['test', 'train', 'validation'\]"):
        client.shard("dev")  # type: ignore[arg-type]


class Forgetful:
    """Sees no memory and leaves none; moves what came by one."""

    @on_client
    def train(self, c: Client, task: Task):
        yield from ()
        assert not c.memory
        c.memory = {}
        return Update(c.id, 1, {n: t + torch.linspace(0.1, 1, len(t)) for n, t in task.tensors.items()})


def test_what_an_encoding_owes_is_kept_beside_the_methods_memory() -> None:
    store, encoding = ClientStore(), Encoding.of("top-k:0.2")
    host = Host(Forgetful(), lambda k: tiny.clients()[k], Doubling([]), store, DIGEST, encoding=encoding)
    task, got = Task("train", 1, {"x": torch.zeros(10)}), torch.zeros(10)
    for _ in range(100):
        (blob,) = host.answer([pack(task, DIGEST)])
        assert not isinstance(blob, Failure), blob
        update = unpack(blob, DIGEST)
        assert isinstance(update, Update) and len(update.tensors[CODES]) == 2
        got += encoding.received(update, task).tensors["x"]
    owed = store.load(1)[1][f"{UNSENT}x"]
    assert torch.allclose(got + owed, 100 * torch.linspace(0.1, 1, 10), atol=1e-3), "what was sent and what is owed is all there was"
    assert float(owed.abs().max()) < 10


def test_an_encoded_task_that_cannot_be_read_is_a_failure() -> None:
    host = Host(Forgetful(), lambda k: tiny.clients()[k], Doubling([]), ClientStore(), DIGEST, encoding=Encoding.of("int8"))
    (failure,) = host.answer([pack(Task("train", 1, {}, {WHICH: ["x"]}), DIGEST)])
    assert failure == Failure(1, "WireError: the sizes of encoded tensors are None; they must be a list of whole numbers from 0 on")
