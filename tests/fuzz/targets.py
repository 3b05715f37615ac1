"""Everything that is parsed from the other side of a federation, each as a target: how a case is made, how it is put, what may come out.

A case is made from valid messages by the mutations of ``mutations.py``. A target's ``put`` returns a short name of what came of it, raises
one of the target's ``refusals``, or breaks the law; its own checks of what was accepted are assertions.
"""

from __future__ import annotations

import json
import math
import os
import socket
import warnings
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import replace
from multiprocessing.connection import Connection
from pathlib import Path
from random import Random
from types import SimpleNamespace
from typing import Any

import torch

from fedloom.client.elsewhere import Elsewhere
from fedloom.client.store import ClientStore, StoreError, read_index
from fedloom.encodings import NAMES as WIRES
from fedloom.encodings import RANKS, SIZES, WHICH, Encoding
from fedloom.engines.workers import Start, WorkerError, receive
from fedloom.messages import Failure, Task, Update
from fedloom.methods import named
from fedloom.methods.method import State
from fedloom.run import checkpoint
from fedloom.run.checkpoint import Saved
from fedloom.run.comparison.statistics import tallies
from fedloom.run.errors import CheckpointError
from fedloom.run.evaluation import counts_well
from fedloom.run.experiment import Experiment, as_json, from_json
from fedloom.tensors import fingerprint
from fedloom.wire import Blob, WireError, checked_settings, digest_of, pack, unpack
from tests.fuzz import mutations
from tests.fuzz.mutations import NAMES, changed_bytes, changed_json, changed_message, changed_text, config_value, dumped, odd

with warnings.catch_warnings():  # libraries that Flower imports use deprecated names of their own
    warnings.simplefilter("ignore", DeprecationWarning)
    from fedloom.engines import federation
    from fedloom.engines.boxes import BLOB, CLIENT, REFUSED, TO, boxed, unboxed
    from fedloom.engines.device import Ungreeted, device_app
    from fedloom.engines.federation import Federation, Patience
    from fedloom.engines.flower import carried
    from fedloom.engines.gate import authenticated, only_own
    from fedloom.engines.link import Link
    from fedloom.engines.node import Credentials, Node
    from fedloom.engines.resident import Resident
    from fedloom.engines.talk import COMMITTED, GREETING, STATE, TOLD, UNGREETED, state_of, told_of
    from fedloom.run.deployment import joining
    from fedloom.run.deployment.federation import Joined

    # isort: split
    from fastapi import HTTPException
    from flwr.app import Array, ArrayRecord, ConfigRecord, Context, Error, Message, MessageType, MetricRecord, RecordDict
    from flwr.app.message import remove_content_from_message
    from flwr.common.serde import message_to_proto
    from flwr.proto.fleet_pb2 import PullMessagesResponse, PushMessagesRequest, PushMessagesResponse
    from flwr.proto.message_pb2 import ObjectTree, PullObjectResponse, PushObjectRequest, PushObjectResponse
    from flwr.proto.node_pb2 import Node as FlowerNode
    from flwr.supercore.inflatable.inflatable_object import get_all_nested_objects, get_object_id, get_object_tree, iterate_object_tree
    from flwr.supercore.primitives.asymmetric import generate_key_pairs, public_key_to_bytes
    from flwr.superlink.servicer.fleet import fleet_handlers
    from google.protobuf.message import DecodeError
    from starlette.requests import Request

DIGEST = "0123456789abcdef"
NAME = "client-{}-0123456789abcdef.safetensors"

TASKS = [
    Task(
        "train", 3, {"w": torch.arange(3.0), "h": torch.ones(2, 2).bfloat16()}, {"round": 1, "gal": [0, 2], "lr": 0.1, "on": True, "x": "ü"}
    ),
    Task("op", -1),
    Task(
        "predict", 0, {"a/b": torch.zeros(0, 4), "i": torch.arange(5), "b": torch.tensor([True, False])}, {"splits": ["test"], "none": []}
    ),
]
UPDATES = [
    Update(3, 7, {"w": torch.arange(3.0), "h": torch.ones(2).bfloat16(), "d": torch.ones(2, dtype=torch.float64)}, {"loss": 0.5}, 12.5, 4),
    Update(0, 0, {"k": torch.ones(4).half(), "u": torch.ones(3, dtype=torch.uint8)}, {"names": ["a", "b"]}),
]
PACKED = [bytes(pack(message, DIGEST)) for message in (*TASKS, *UPDATES)]
PACKED_TASKS = PACKED[: len(TASKS)]


def same(one: Task | Update, other: Task | Update) -> bool:
    """Whether two messages are the same to the bit."""
    return replace(one, tensors={}) == replace(other, tensors={}) and fingerprint(one.tensors) == fingerprint(other.tensors)


class Target:
    """What is fuzzed. ``weight``: its share of the cases; ``folder``: where it may write."""

    name = ""
    weight = 1
    refusals: tuple[type[BaseException], ...] = (WireError,)

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def case(self, rng: Random) -> Any:
        """A case."""
        raise NotImplementedError

    def put(self, case: Any) -> str:
        """Put it, and look at what was accepted."""
        raise NotImplementedError

    def size(self, case: Any) -> int:
        """Its size in bytes, about."""
        return len(case) if isinstance(case, bytes | str) else len(repr(case))


class Unpacked(Target):
    """``wire.unpack``: what is accepted packs again to what unpacks to the same."""

    name, weight = "wire.unpack", 30

    def case(self, rng: Random) -> bytes:
        return changed_message(rng, rng.choice(PACKED), PACKED)

    def put(self, case: bytes) -> str:
        message = unpack(case, DIGEST)
        assert same(unpack(pack(message, DIGEST), DIGEST), message), "packed again, it is another message"
        return "task" if isinstance(message, Task) else "update"


class Encoded(Target):
    """What a wire that loses something encodes, down and up: what is accepted has the shapes that are told, and going up is finite."""

    name, weight = "encodings", 10

    def __init__(self, folder: Path) -> None:
        Target.__init__(self, folder)
        sent = {"b": torch.randn(7, 11), "a": torch.randn(130), "s": torch.tensor(0.5), "empty": torch.zeros(0, 3), "i": torch.arange(4)}
        self.task = Task("train", 3, sent, {"round": 1})
        made = {**{n: t + 0.25 for n, t in sent.items()}, "i": sent["i"], "new": torch.ones(2)}
        self.packed: list[tuple[Encoding, bytes]] = []
        for wire in [Encoding.of(name) for name in WIRES if name != "exact"]:
            told, _ = wire.up(Update(3, 5, made, {"loss": 0.5}), wire.arrived(wire.down(self.task)), {})
            few, _ = wire.up(Update(3, 5, {"empty": sent["empty"]}), self.task, {})
            down = [] if wire.exact_down else [wire.down(self.task)]
            self.packed += [(wire, bytes(pack(message, DIGEST))) for message in (told, few, *down)]

    def case(self, rng: Random) -> tuple[Encoding, bytes]:
        wire, blob = rng.choice(self.packed)
        if rng.random() < 0.4:
            return wire, changed_message(rng, blob, [packed for _, packed in self.packed])
        message = unpack(blob, DIGEST)
        told = dict(message.settings if isinstance(message, Task) else message.metrics)
        names = ["b", "a", "s", "empty", "i", "new", "zzz"]
        told[WHICH] = rng.choice([[], ["empty"], ["b", "b"], rng.sample(names, rng.randrange(5)), odd(rng), told[WHICH]])
        if isinstance(message, Task):
            counts = [0, 1, 2, 3, 64, 65, 2**31, 2**39, 2**40, -1]
            for name in (RANKS, SIZES):
                many = [rng.choice(counts) for _ in range(rng.choice([0, 1, 3, 200]))]
                told[name] = rng.choice([told[name], many, [0, 2**39, 2**39], [], odd(rng)])
        tensors = {n: rng.choice([t, t, t, t[:0], t.float(), t[:1]]) if t.dim() else t for n, t in message.tensors.items()}
        try:
            changes = {"settings" if isinstance(message, Task) else "metrics": checked_settings(told), "tensors": tensors}
            return wire, bytes(pack(replace(message, **changes), DIGEST))  # type: ignore[arg-type]
        except WireError:
            return wire, blob

    def put(self, case: tuple[Encoding, bytes]) -> str:
        wire, blob = case
        message = unpack(blob, DIGEST)
        if isinstance(message, Task):
            read = wire.arrived(message)
            assert WHICH not in read.settings
            return "task"
        read = wire.received(message, self.task)
        names = message.metrics.get(WHICH, [])
        assert all(read.tensors[n].shape == self.task.tensors[n].shape for n in names)  # type: ignore[union-attr]
        assert all(bool(torch.isfinite(read.tensors[n]).all()) for n in names) and WHICH not in read.metrics  # type: ignore[union-attr]
        return "update"

    def size(self, case: tuple[Encoding, bytes]) -> int:
        return len(case[1])


class Digest(Target):
    """``wire.digest_of``."""

    name, weight = "wire.digest_of", 6

    def case(self, rng: Random) -> bytes:
        return changed_message(rng, rng.choice(PACKED), PACKED)

    def put(self, case: bytes) -> str:
        return f"{type(digest_of(case)).__name__}"


class Settings(Target):
    """``wire.checked_settings`` on whatever JSON there is: what is accepted crosses as it is."""

    name, weight = "wire.checked_settings", 6

    def case(self, rng: Random) -> Any:
        return changed_json(rng, {"round": 1, "gal": [0, 2], "lr": 0.1, "name": "a", "on": True, "none": [], "words": ["a", "b"]})

    def put(self, case: Any) -> str:
        settings = checked_settings(case)
        assert unpack(pack(Task("op", 0, {}, settings), DIGEST), DIGEST).settings == settings  # type: ignore[union-attr]
        return "settings"


class Index(Target):
    """The index of states in a checkpoint, and the files that it names."""

    name, weight, refusals = "store.restore", 8, (StoreError,)

    def __init__(self, folder: Path) -> None:
        Target.__init__(self, folder)
        self.states = folder / "states"
        store = ClientStore(self.states)
        store.save(3, {"w": torch.ones(2)}, {})
        store.save(-1, {"w": torch.zeros(2)}, {})
        self.index = store.commit()
        self.held = sorted(os.listdir(self.states))

    def case(self, rng: Random) -> dict[str, Any]:
        made = changed_json(rng, {**self.index, "7": NAME.format(7)})
        return made if isinstance(made, dict) else {"3": made}

    def put(self, case: dict[str, Any]) -> str:
        names = read_index(case)
        assert all(Path(name).name == name and len(name) < 100 for name in names.values())
        elsewhere, store = Elsewhere(), ClientStore(self.states)
        elsewhere.restore(case)
        assert elsewhere.commit() == {str(client): name for client, name in sorted(names.items())}
        store.restore(case)
        for client in names:
            store.load(client)
        assert sorted(os.listdir(self.states)) == self.held
        return "index"


class Without(Resident):
    """A resident that never starts a process."""

    def __init__(self, folder: Path) -> None:
        Resident.__init__(self, folder, lambda greeting: Start(("none",), {}, lambda number: {}))

    def _begin(self) -> None:
        json.dumps(self.greeting)
        raise WorkerError("there is no process here")


class Answering(Without):
    """One that answers what it may, without computing anything."""

    def greet(self, greeting: str) -> dict[str, Any]:
        with suppress(WorkerError):
            Without.greet(self, greeting)
        return {"examples": {"train": 5}}

    def answer(self, client: int, state: str, committed: str, blob: Blob) -> tuple[Blob | Failure, str]:
        failure, after = Without.answer(self, client, state, committed, blob)
        return (PACKED[3], after) if client == 3 else (failure, after)


GREETED = {
    "experiment": {"method": {"name": "lora", "local": {"lr": 0.1}}, "data": "trec", "model": "minilm", "seed": 42},
    "task": {"kind": "classification", "name": "trec", "classes": ["a", "b"], "metric": "accuracy", "tags": []},
    "model": "0" * 16,
    "recipe": "",
    "digest": DIGEST,
}


text_of = dumped


class Greeting(Target):
    """``Resident.greet``: only digests that can name a folder inside the device's."""

    name, weight, refusals = "resident.greet", 8, (WireError, WorkerError)

    def case(self, rng: Random) -> str:
        if rng.random() < 0.3:
            return changed_text(rng, text_of(GREETED))
        if rng.random() < 0.3:
            return text_of({**GREETED, "digest": odd(rng) if rng.random() < 0.5 else rng.choice(NAMES)})
        return text_of(changed_json(rng, GREETED))

    def put(self, case: str) -> str:
        resident = Without(self.folder)
        try:
            resident.greet(case)
        finally:
            digest = resident.greeting.get("digest", "none")
            assert (self.folder / digest).resolve().parent == self.folder.resolve() and len(os.fsencode(digest)) <= 64
        return "greeting"


class Asked(Target):
    """``Resident.answer`` up to the process: another client's state, a path, another experiment."""

    name, weight, refusals = "resident.answer", 8, (WireError, Ungreeted)

    def __init__(self, folder: Path) -> None:
        Target.__init__(self, folder)
        self.resident = Without(folder)
        self.resident.greeting = dict(GREETED)

    def case(self, rng: Random) -> tuple[int, str, str, bytes]:
        client = rng.choice([3, 3, 0, -1, 2**63 - 1])
        state, committed = (
            rng.choice(["", NAME.format(client), changed_text(rng, NAME.format(client)), rng.choice(NAMES)]) for _ in range(2)
        )
        packed = rng.choice(PACKED_TASKS)
        return client, state, committed, changed_message(rng, packed, PACKED) if rng.random() < 0.5 else packed

    def put(self, case: tuple[int, str, str, bytes]) -> str:
        answer, after = self.resident.answer(*case)
        assert isinstance(answer, Failure) and after == case[1]
        assert Path(after).name == after and len(after) < 100
        return "handed on"


def changed_records(rng: Random, content: RecordDict, blobs: Sequence[bytes]) -> RecordDict:
    """The content of a message with records taken away, of other kinds, under other names, with other values."""
    made = RecordDict(dict(content))
    for _ in range(rng.choice([1, 1, 2, 3])):
        kind = rng.randrange(9)
        if kind == 0 and len(made):
            del made[rng.choice(list(made))]
        elif kind == 1:
            made[BLOB] = rng.choice([ConfigRecord({BLOB: b"x"}), MetricRecord({BLOB: 1}), ArrayRecord({}), boxed(b"")])
        elif kind == 2:
            made[TO] = rng.choice([ConfigRecord({}), MetricRecord({CLIENT: 1}), boxed(b"x")])
        elif kind == 3:
            made[BLOB] = ArrayRecord(
                {BLOB: Array("uint8", rng.choice([(1,), (), (-1, 2**40)]), rng.choice(["numpy.ndarray", "", "\0"]), b"x")}
            )
        elif kind <= 5:
            blob = rng.choice(blobs)
            made[BLOB] = boxed(changed_bytes(rng, blob, blobs) if rng.random() < 0.3 else changed_message(rng, blob, blobs))
        elif TO in made.config_records:
            record = ConfigRecord(dict(made.config_records[TO]))
            record[rng.choice([CLIENT, STATE, COMMITTED, GREETING, TOLD, "x", *record])] = config_value(rng)
            made[TO] = record
    return made


def arrived(content: RecordDict, kind: str, client: int = 3) -> Message:
    """A message from the server as it arrives at a device."""
    message = Message(content, 7, kind)
    message.metadata.__dict__["_message_id"] = "m"
    return message


class Device(Target):
    """A deployed device's Flower app: it answers every message, and its answer can be sent."""

    name, weight, refusals = "device_app", 6, ()

    def __init__(self, folder: Path) -> None:
        Target.__init__(self, folder)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            self.link = Link({3: b"key"})
        self.resident = Answering(folder)
        self.app = device_app(self.resident)

    def case(self, rng: Random) -> tuple[str, RecordDict]:
        if rng.random() < 0.4:
            text = text_of(changed_json(rng, GREETED)) if rng.random() < 0.7 else changed_text(rng, text_of(GREETED))
            text = text.encode("utf-8", "replace").decode()
            return MessageType.QUERY, changed_records(rng, RecordDict({TO: ConfigRecord({CLIENT: 3, GREETING: text})}), PACKED_TASKS)
        state = rng.choice(["", NAME.format(3), rng.choice(NAMES).encode("utf-8", "replace").decode()])
        content = RecordDict({BLOB: boxed(rng.choice(PACKED_TASKS)), TO: ConfigRecord({CLIENT: 3, STATE: state, COMMITTED: state})})
        return MessageType.TRAIN, changed_records(rng, content, PACKED_TASKS)

    def put(self, case: tuple[str, RecordDict]) -> str:
        kind, content = case
        self.resident.greeting = dict(GREETED) if kind == MessageType.TRAIN else {}
        reply = self.app(arrived(content, kind), Context(1, 7, {}, RecordDict(), {}))
        assert len(carried(reply).deflate()) < 20_000, "an answer that quotes what came without measure"
        message_to_proto(reply).SerializeToString()
        return f"error {reply.error.code}" if reply.has_error() else "content"

    def size(self, case: tuple[str, RecordDict]) -> int:
        return len(repr(case[1]))


class Records(Target):
    """``unboxed``, ``_state_of``, ``_told`` on whatever records come."""

    name, weight = "records of a reply", 8

    def case(self, rng: Random) -> RecordDict:
        told = text_of(changed_json(rng, {"examples": {"train": 5, "validation": 0}, "kind": "ready", "notes": ["x"]}))
        told = rng.choice([told, changed_text(rng, told), "[" * rng.choice([10, 1000, 60_000])]).encode("utf-8", "replace").decode()
        content = RecordDict({BLOB: boxed(rng.choice(PACKED)), TO: ConfigRecord({CLIENT: 3, STATE: NAME.format(3), TOLD: told})})
        return changed_records(rng, content, PACKED) if rng.random() < 0.7 else content

    def put(self, case: RecordDict) -> str:
        outcomes = []
        for read in (unboxed, lambda c: state_of(c, 3), told_of):
            try:
                found = read(case)
            except WireError:
                outcomes.append("-")
                continue
            outcomes.append(read.__name__.strip("_<>"))
            if isinstance(found, dict):
                joined = SimpleNamespace(federation=SimpleNamespace(told={3: found}))
                number = Joined.examples(joined, 3, "train")  # type: ignore[arg-type]
                assert type(number) is int and 0 <= number < 2**53
            assert not isinstance(found, str) or found == "" or Path(found).name == found
        if outcomes == ["-"] * 3:
            raise WireError("nothing of it")
        return "some" if "-" in outcomes else "all"

    def size(self, case: RecordDict) -> int:
        return len(repr(case))


class OneLiar:
    """A link to four devices of which one may say anything."""

    def __init__(self) -> None:
        self.nodes = {k: k + 10 for k in range(4)}
        self.folder = None
        self.waiting: list[Message] = []
        self.reply: Any = None
        self.count = 0

    def present(self) -> set[int]:
        return set(self.nodes)

    def push_messages(self, messages: Sequence[Message]) -> list[str]:
        for message in messages:
            self.count += 1
            message.metadata.__dict__["_message_id"] = f"m{self.count}"
            self.waiting.append(message)
        return [message.metadata.message_id for message in messages]

    def pull_messages(self, names: Sequence[str]) -> list[Message]:
        asked, self.waiting = self.waiting, []
        return [self._answer(message) for message in asked]

    def forget(self, names: Sequence[str]) -> None:
        pass

    def _answer(self, message: Message) -> Message:
        client = message.metadata.dst_node_id - 10
        if client == 1:
            made = self.reply[message.metadata.message_type == MessageType.TRAIN]
            return Message(made, reply_to=message)
        if message.metadata.message_type == MessageType.QUERY:
            return Message(RecordDict({TO: ConfigRecord({TOLD: "{}"})}), reply_to=message)
        return Message(RecordDict({BLOB: boxed(honest(client)), TO: ConfigRecord({STATE: NAME.format(client)})}), reply_to=message)


def honest(client: int) -> bytes:
    """The packed answer of a device that does as it is told."""
    return bytes(pack(Update(client, 5, {"w": torch.arange(3.0) + client, "n": torch.arange(4)}, {"loss": 0.5}, 2.0, 5), DIGEST))


class Server(Target):
    """``Federation.run`` with one hostile device of four: the others always count, and its answer does or it has failed, with a reason."""

    name, weight, refusals = "federation.run", 8, ()

    def __init__(self, folder: Path) -> None:
        Target.__init__(self, folder)
        federation.PAUSE = 0.0
        federation.with_nonces = list  # or no answer would be looked at any further

    def case(self, rng: Random) -> dict[bool, Any]:
        def error() -> Error:
            reason = rng.choice(NAMES).encode("utf-8", "replace").decode()
            return Error(rng.choice([UNGREETED, REFUSED, 0, 3, -5, 2**40]), rng.choice([reason, None, "", "x" * 10**5]))

        told = text_of(changed_json(rng, {"examples": {"train": 5}})).encode("utf-8", "replace").decode()
        greets = RecordDict({TO: ConfigRecord({TOLD: told})})
        blobs = [honest(1), honest(1), honest(2), *PACKED]
        trains = RecordDict({BLOB: boxed(changed_message(rng, honest(1), blobs)), TO: ConfigRecord({STATE: NAME.format(1)})})
        greets = changed_records(rng, greets, blobs) if rng.random() < 0.2 else greets
        trains = changed_records(rng, trains, blobs) if rng.random() < 0.4 else trains
        return {False: error() if rng.random() < 0.05 else greets, True: error() if rng.random() < 0.1 else trains}

    def put(self, case: dict[bool, Any]) -> str:
        link = OneLiar()
        link.reply = case
        engine = Federation(link, Elsewhere(), DIGEST, {}, Patience(1.0, 2.0, 0.1))  # type: ignore[arg-type]
        tasks = [Task("train", k, {"w": torch.zeros(3)}) for k in range(4)]
        replies = engine.run(tasks)
        assert {0, 2, 3} <= {update.client for update in replies.updates}
        assert [t.client for t in replies.traffic] == [0, 1, 2, 3]
        for update in replies.updates:
            assert {n: (t.shape, t.dtype) for n, t in update.tensors.items()}["w"] == ((3,), torch.float32)
            name = engine.states.name(update.client)
            assert name == "" or name.startswith(f"client-{update.client}-")
        assert all(failure.client == 1 and 0 < len(failure.reason) < 1200 for failure in replies.failures)
        assert len(replies.updates) + len(replies.failures) == 4
        return "failed" if replies.failures else "counted"

    def size(self, case: dict[bool, Any]) -> int:
        return len(repr(case))


class Pushed(Target):
    """The link, given a hostile device's pushes: what it hands on is whole, of that asking, and is handed on once; it never raises."""

    name, weight, refusals = "link.pull_messages", 8, ()

    def __init__(self, folder: Path) -> None:
        Target.__init__(self, folder)
        self.times = 0
        self.anew()

    def anew(self) -> None:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            self.link = Link({3: b"key 3", 4: b"key 4"})
        for node in self.link.nodes.values():
            self.link.state.activate_node(node, 60.0)

    def case(self, rng: Random) -> int:
        return rng.getrandbits(64)  # a push answers a message that is laid out only when the case is put

    def put(self, case: int) -> str:
        rng = Random(case)
        self.times += 1
        if self.times % 100 == 0:
            self.anew()  # what hostile trees leave behind is not this target's
        state, run = self.link.state, self.link.run.run_id
        task = Message(
            RecordDict({BLOB: boxed(PACKED[0]), TO: ConfigRecord({CLIENT: 3, STATE: ""})}), self.link.nodes[3], MessageType.TRAIN, ttl=60
        )
        names = list(self.link.push_messages([task]))
        assert names, "a message was not laid out"
        (asked,) = state.get_message_ins(self.link.nodes[3], limit=1)
        content = RecordDict({BLOB: boxed(PACKED[3]), TO: ConfigRecord({STATE: NAME.format(3)})})
        content = changed_records(rng, content, PACKED) if rng.random() < 0.4 else content
        reply = Message(Error(REFUSED, "no"), reply_to=asked) if rng.random() < 0.1 else Message(content, reply_to=asked)
        try:
            self._push(rng, reply, state, run)
            pushed = True
        except AssertionError:
            raise
        except Exception:  # Flower answers 500, and goes on
            pushed = False
        got = list(self.link.pull_messages(names)) + list(self.link.pull_messages(names))
        self.link.forget(names)
        assert len(got) <= 1
        for one in got:
            assert one.metadata.reply_to_message_id in names
            assert one.has_error() != one.has_content()
            if one.has_content():
                assert isinstance(one.content, RecordDict)
        assert list(self.link.pull_messages(names)) == []
        return "-".join(["pushed" if pushed else "refused", *("error" if one.has_error() else "content" for one in got)])

    def _push(self, rng: Random, reply: Message, state: Any, run: int) -> None:
        parts = {name: part.deflate() for name, part in get_all_nested_objects(reply).items()}
        reply.metadata.__dict__["_message_id"] = reply.object_id
        tree, head = get_object_tree(reply), message_to_proto(remove_content_from_message(reply))
        node, kind = FlowerNode(node_id=self.link.nodes[3]), rng.randrange(8)
        if kind == 0:  # other parts, under their own names
            old = rng.choice(list(parts))
            parts = {name: part for name, part in parts.items() if name != old}
            other = changed_bytes(rng, rng.choice([b"Message  0\0", reply.deflate()]), [reply.deflate()])
            parts[get_object_id(other)] = other
        elif kind == 1:  # a root of any kind, with its own name
            made = _object(
                rng.choice(["Message", "RecordDict", "ArrayRecord", "Array", "ArrayChunk", "x"]), [], rng.choice([b"", b"\x0a\x00", b"{}"])
            )
            parts = {get_object_id(made): made}
            head.metadata.message_id, tree = get_object_id(made), ObjectTree(object_id=get_object_id(made))
        elif kind == 2:  # a chain, as deep as the tree or much deeper than it
            depth = rng.choice([3, 6, 50, 1500])
            parts, last = {}, []
            for level in range(depth):
                made = _object("RecordDict" if level < depth - 1 else "Message", last, b"")
                last = [get_object_id(made)]
                parts[last[0]] = made
            head.metadata.message_id = last[0]
            tree = ObjectTree(object_id=last[0], children=[ObjectTree(object_id=name) for name in list(parts)[:-1]])
        elif kind == 3:  # paths without number through shared parts
            names, tree = [f"{level:064x}" for level in range(1, 40)], ObjectTree(object_id=f"{0:064x}")
            for name in names:
                tree = ObjectTree(object_id=name, children=[tree, ObjectTree(object_id=tree.object_id)])
            head.metadata.message_id = tree.object_id
        elif kind == 4:
            for name in rng.sample(["message_id", "reply_to_message_id", "group_id", "message_type"], 2):
                setattr(head.metadata, name, rng.choice([rng.choice(["", "x", "\0", "f" * 64, "n" * 10**5]), getattr(head.metadata, name)]))
            head.metadata.created_at = rng.choice([head.metadata.created_at, 0.0, math.nan, math.inf, -1.0, 1e300])
            head.metadata.ttl = rng.choice([head.metadata.ttl, 0.0, math.nan, math.inf, -1.0, 1e300])
        elif kind == 5:
            field = rng.choice(["run_id", "src_node_id", "dst_node_id"])
            setattr(head.metadata, field, rng.choice([0, 1, 2**63, 2**64 - 1, self.link.nodes[4]]))
        request = PushMessagesRequest(node=node, messages_list=[head], message_object_trees=[tree])
        if kind == 6:
            blob = changed_bytes(rng, request.SerializeToString(), [request.SerializeToString()])
            request = PushMessagesRequest.FromString(blob)
            request.node.node_id = self.link.nodes[3]  # the request's node is the key's
        if not only_own(request):
            raise ValueError("in another's name")
        wanted = fleet_handlers.push_messages(request, state)
        for name, part in parts.items():
            if rng.random() < 0.97:
                part = changed_bytes(rng, part, [part]) if rng.random() < 0.03 else part
                asked = PushObjectRequest(node=node, run_id=run, object_id=name, object_content=part, session_id=wanted.session_id)
                fleet_handlers.push_object(asked, state)


def _object(kind: str, children: list[str], body: bytes) -> bytes:
    return f"{kind} {','.join(children)} {len(body)}".encode() + b"\0" + body


class Signed(Target):
    """``authenticated``: a key, or 401."""

    name, weight, refusals = "link.authenticated", 4, (HTTPException,)

    def __init__(self, folder: Path) -> None:
        Target.__init__(self, folder)
        from base64 import b64encode

        from flwr.common.constant import TIMESTAMP_HEADER
        from flwr.supercore.constant import FLEET_HTTP_PUBLIC_KEY_HEADER, FLEET_HTTP_SIGNATURE_HEADER
        from flwr.supercore.date import now
        from flwr.supercore.primitives.asymmetric import sign_message

        private, public = generate_key_pairs()
        self.names = (FLEET_HTTP_PUBLIC_KEY_HEADER, FLEET_HTTP_SIGNATURE_HEADER, TIMESTAMP_HEADER)
        self.key, self.encode = public_key_to_bytes(public), b64encode
        self.now, self.sign = now, lambda stamp: sign_message(private, stamp.encode())
        self.others = [self.key, ED25519, b"-----BEGIN PUBLIC KEY-----\n-----END PUBLIC KEY-----\n"]

    def case(self, rng: Random) -> list[tuple[bytes, bytes]]:
        stamp = self.now().isoformat()
        parts = [self.encode(self.key), self.encode(self.sign(stamp)), stamp.encode()]
        kind = rng.randrange(7)
        if kind < 3:
            parts[kind] = changed_bytes(rng, parts[kind], parts)
        elif kind == 3:
            parts[0] = self.encode(changed_bytes(rng, rng.choice(self.others), self.others))
        elif kind == 4:
            parts[1] = self.encode(changed_bytes(rng, self.sign(stamp), parts))
        elif kind == 5:
            parts[2] = rng.choice(
                [
                    b"",
                    b"2025-01-01",
                    b"9999-12-31T23:59:59",
                    b"0001-01-01T00:00:00+00:00",
                    stamp[:-6].encode(),
                    b"\xff",
                    b"20261128T000000Z",
                ]
            )
        else:
            parts[0] = self.encode(rng.choice(self.others))
        headers = list(zip((name.lower().encode() for name in self.names), parts, strict=True))
        if rng.random() < 0.05:
            del headers[rng.randrange(3)]
        return headers

    def put(self, case: list[tuple[bytes, bytes]]) -> str:
        key = authenticated(Request({"type": "http", "method": "GET", "path": "/", "headers": case, "query_string": b""}))
        assert self.encode(key) == dict(case)[self.names[0].lower().encode()]
        return "key"


ED25519 = b"-----BEGIN PUBLIC KEY-----\nMCowBQYDK2VwAyEAGb9ECWmEzf6FQbrBZ9w7lshQhqowtrbLDFw4rXAxZuE=\n-----END PUBLIC KEY-----\n"


class Frames(Target):
    """``workers.receive``: a message, or what says that the other side is gone."""

    name, weight, refusals = "workers.receive", 6, (EOFError, OSError)

    def case(self, rng: Random) -> list[bytes]:
        head = {"kind": "answers", "clients": [{"state": NAME.format(3)}], "blobs": 1}
        frames = [mutations.written(rng, changed_json(rng, head)), PACKED[3]]
        if rng.random() < 0.3:
            frames[0] = changed_bytes(rng, mutations.written(rng, head), PACKED)
        return frames[: rng.choice([1, 2, 2])]

    def put(self, case: list[bytes]) -> str:
        ours, theirs = (Connection(one.detach()) for one in socket.socketpair())
        with ours, theirs:
            for frame in case:
                theirs.send_bytes(frame)
            theirs.close()
            head, blobs = receive(ours)
        assert isinstance(head, dict) and len(blobs) == max(0, head["blobs"])
        return "frames"

    def size(self, case: list[bytes]) -> int:
        return sum(map(len, case))


class Checkpoint(Target):
    """``checkpoint.load``, with the digest made right again in half of the cases: a checkpoint, or why not."""

    name, weight, refusals = "checkpoint.load", 8, (CheckpointError,)

    def __init__(self, folder: Path) -> None:
        Target.__init__(self, folder)
        self.run = folder / "run"
        store = ClientStore(self.run / "checkpoints" / "clients")
        store.save(1, {"own": torch.ones(2)}, {"seen": torch.tensor(1)})
        state = State(1, {"w": torch.ones(2, 2), "h": torch.ones(3).bfloat16()}, {"m": torch.tensor(1.0)}, {"gal": [0, 2]})
        checkpoint.save(self.run, Saved(state, {"bytes_up": 7, "participations": {"1": 2}}, "data-1"), store)
        self.latest = self.run / "checkpoints" / "latest.json"
        self.body = json.loads(self.latest.read_text())

    def case(self, rng: Random) -> bytes:
        if rng.random() < 0.2:
            return changed_bytes(rng, json.dumps(self.body).encode(), PACKED)
        made = changed_json(rng, self.body if rng.random() < 0.5 else {k: v for k, v in self.body.items() if k != "sha256"})
        if rng.random() < 0.7 and isinstance(made, dict):
            made.pop("sha256", None)
            with suppress(RecursionError):
                made = {"sha256": checkpoint._digest(made), **made}
        return mutations.written(rng, made)

    def put(self, case: bytes) -> str:
        self.latest.write_bytes(case)
        found = checkpoint.load(self.run, ClientStore(self.run / "checkpoints" / "clients"))
        assert found is not None and type(found.state.round) is int and isinstance(found.totals, dict)
        return "checkpoint"


class Counts(Target):
    """What devices tell of their predictions: what is taken can be added up."""

    name, weight, refusals = "evaluation.counts_well", 4, (WireError,)

    def case(self, rng: Random) -> bytes:
        def cells() -> torch.Tensor:
            kind = rng.choice([0, 0, 0, 0, 0, 3, 4, 5])
            numbers = [rng.choice([0, 1, 2, 2, 1, 5, -1, 2**40, 2**63 - 1, -(2**63)]) for _ in range(12)]
            numbers = [rng.randrange(3) for _ in range(12)] if kind < 3 else numbers
            shape = rng.choice([(4, 3), (4, 3), (4, 3), (4, 3), (3, 4), (12,), (2, 2, 3), (0, 3)])
            made = torch.tensor(numbers[: math.prod(shape)], dtype=torch.int64).reshape(shape)
            return made if kind < 5 else made.to(rng.choice([torch.float32, torch.int32, torch.bool]))

        tensors = {split: cells() for split in ("validation", "test") if rng.random() < 0.97}
        metrics = {"validation_loss": rng.choice([0.5, 0.5, 1, "x", True, [0.5], -1e300])} if rng.random() < 0.9 else {}
        return bytes(pack(Update(3, 5, tensors, metrics), DIGEST))

    def put(self, case: bytes) -> str:
        update = unpack(case, DIGEST)
        assert isinstance(update, Update)
        if not counts_well(update, 3):
            raise WireError("left out")
        for split in ("validation", "test"):
            assert (tallies([update.tensors[split].tolist()], 3) >= 0).all()
        told = update.tensors["validation"].tolist()
        assert not told or math.isfinite(float(update.metrics["validation_loss"]))  # type: ignore[arg-type]
        return "counts"


class Status(Target):
    """What a server says of itself to ``fedloom``: lines to show, or that it is no such server."""

    name, weight, refusals = "joining.shown", 4, (OSError,)

    def case(self, rng: Random) -> Any:
        row = changed_json(rng, {"round": 3, "answered": [1, 2], "failed": {"0": "why"}})
        told = {"experiment": DIGEST, "devices": 4, "here": [1], "away": [0, 2], "last_round": text_of(row), "written_seconds_ago": 3.5}
        return changed_json(rng, told) if rng.random() < 0.7 else told

    def put(self, case: Any) -> str:
        lines = joining.shown(case)
        assert all(isinstance(part, str) for line in lines for part in line)
        return "lines"


class Fetched(Target):
    """A device's node, given what a server lays out: it answers, or passes it over; only a broken connection ends its round."""

    name, weight, refusals = "node.answer_next", 5, (OSError,)

    def __init__(self, folder: Path) -> None:
        Target.__init__(self, folder)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            Link({3: b"key"})
        self.app = device_app(Answering(folder))
        private, _ = generate_key_pairs()
        self.node = Node("127.0.0.1:1", Credentials(private, None), self.app, lambda text: None)

    def case(self, rng: Random) -> tuple[bytes, dict[str, bytes]]:
        content = RecordDict({BLOB: boxed(rng.choice(PACKED_TASKS)), TO: ConfigRecord({CLIENT: 3, STATE: ""})})
        message = arrived(
            changed_records(rng, content, PACKED_TASKS) if rng.random() < 0.3 else content,
            rng.choice([MessageType.TRAIN, MessageType.TRAIN, MessageType.QUERY, "query.a"]),
        )
        parts = {name: part.deflate() for name, part in get_all_nested_objects(message).items()}
        message.metadata.__dict__["_message_id"] = message.object_id
        found = PullMessagesResponse(
            messages_list=[message_to_proto(remove_content_from_message(message))], message_object_trees=[get_object_tree(message)]
        )
        if rng.random() < 0.6:
            name = rng.choice(list(parts))
            parts[name] = changed_bytes(rng, parts[name], list(parts.values()))
        blob = found.SerializeToString()
        return changed_bytes(rng, blob, [blob]) if rng.random() < 0.3 else blob, parts

    def put(self, case: tuple[bytes, dict[str, bytes]]) -> str:
        try:
            found = PullMessagesResponse.FromString(case[0])
        except DecodeError:
            return "no protobuf"
        server = Laid(found, case[1])
        answered = self.node._answer_next(server, FlowerNode(node_id=7))  # type: ignore[arg-type]
        return f"{'answered' if server.pushed else 'withdrawn'}" if answered else "passed over"


class Laid:
    """What the server laid out, as a client of the Fleet API sees it."""

    def __init__(self, found: PullMessagesResponse, parts: dict[str, bytes]) -> None:
        self.found, self.parts, self.pushed = found, parts, 0

    def PullMessages(self, request: Any) -> PullMessagesResponse:
        return self.found

    def PullObject(self, request: Any) -> PullObjectResponse:
        held = request.object_id in self.parts
        return PullObjectResponse(object_found=held, object_available=held, object_content=self.parts.get(request.object_id, b""))

    def ConfirmMessageReceived(self, request: Any) -> None:
        request.SerializeToString()

    def PushMessages(self, request: Any) -> PushMessagesResponse:
        request.SerializeToString()
        self.pushed += 1
        return PushMessagesResponse(objects_to_push=[one.object_id for one in iterate_object_tree(request.message_object_trees[0])])

    def PushObject(self, request: Any) -> PushObjectResponse:
        request.SerializeToString()
        return PushObjectResponse(stored=True)


class Told(Target):
    """``experiment.from_json``, which a device reads a greeting's experiment with."""

    name, weight, refusals = "experiment.from_json", 4, (ValueError,)

    def __init__(self, folder: Path) -> None:
        Target.__init__(self, folder)
        self.experiments = [json.loads(json.dumps(as_json(Experiment(named(name)())))) for name in ("lora", "fibecfed", "ditto", "flora")]

    def case(self, rng: Random) -> Any:
        return changed_json(rng, rng.choice(self.experiments))

    def put(self, case: Any) -> str:
        return f"experiment {len(from_json(case).digest())}"


TARGETS: list[type[Target]] = [
    Unpacked,
    Encoded,
    Digest,
    Settings,
    Index,
    Greeting,
    Asked,
    Device,
    Records,
    Server,
    Pushed,
    Signed,
    Frames,
    Checkpoint,
    Counts,
    Status,
    Fetched,
    Told,
]
