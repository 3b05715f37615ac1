"""A toy world for the laws: a method whose operations add numbers or misbehave, its compute, and both engines over it."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace

import torch

from fedloom.client.client import Client
from fedloom.client.host import Host
from fedloom.client.store import ClientStore
from fedloom.compute.compute import Done
from fedloom.data.examples import Examples
from fedloom.engines.engine import Engine
from fedloom.engines.local import WAVE, Local
from fedloom.messages import Replies, Task, Tensors, Update, on_client
from fedloom.tensors import fingerprint

DIGEST = "toy-experiment"
CLIENTS = range(6)
OF_EVERY_TRAFFIC = ("lora", "fibecfed", "federa", "fedcybgd", "ditto", "scaffold", "hetlora", "flora", "embracingfl", "lisa")
"""Methods of every kind of traffic: private parts, set-up, blocks, two asks a round, ranks that differ, bases that move,
other layers of each."""


@dataclass(frozen=True)
class Add:
    """A work item: every tensor plus ``amount``, in its own type. A negative amount makes the compute raise."""

    tensors: Tensors
    amount: float


@dataclass
class Adder:
    """The compute. ``calls`` keeps how many items came in each pass."""

    calls: list[int] = field(default_factory=list)

    def run(self, items: Sequence[Add]) -> list[Done]:
        self.calls.append(len(items))
        if any(item.amount < 0 for item in items):
            raise ArithmeticError("the amount is negative")
        return [Done({n: (t + item.amount).to(t.dtype) for n, t in item.tensors.items()}, 2.0 * item.amount, 3) for item in items]


@dataclass(frozen=True)
class Toy:
    """``ran`` keeps (op, client) of every operation that started."""

    ran: list[tuple[str, int]] = field(default_factory=list)

    def _begun(self, op: str, c: Client) -> None:
        self.ran.append((op, c.id))
        c.private["visits"] = c.private.get("visits", torch.zeros(1)) + 1

    @on_client
    def add(self, c: Client, task: Task):
        self._begun("add", c)
        first, second = yield [Add(task.tensors, c.id + 1), Add(task.tensors, 0.5)]
        third = yield Add(first, float(task.settings.get("amount", 1.0)))
        c.private["last"] = next(iter(third.values()), torch.zeros(0))
        noise = torch.rand(3, generator=torch.Generator().manual_seed(c.seed + c.id))
        return Update(c.id, 10 + c.id, {**third, "nearer": second["w"], "noise": noise}, {"visits": float(c.private["visits"])})

    @on_client
    def echo(self, c: Client, task: Task):
        self._begun("echo", c)
        return Update(c.id, 1, task.tensors, task.settings)
        yield

    @on_client
    def deface(self, c: Client, task: Task):
        self._begun("deface", c)
        for tensor in task.tensors.values():
            tensor.zero_()
        for value in task.settings.values():
            if isinstance(value, list):
                value.clear()
        return Update(c.id, 1)
        yield

    @on_client
    def lend(self, c: Client, task: Task):
        """Hands out the very tensor that it keeps."""
        self._begun("lend", c)
        c.private.setdefault("own", torch.full((4,), 7.0))
        return Update(c.id, 1, {"own": c.private["own"]})
        yield

    @on_client
    def reply(self, c: Client, task: Task):
        """Answers with whatever ``ANSWERS`` has under the task's setting, after one more item of work."""
        self._begun("reply", c)
        yield Add({}, 1.0)
        return ANSWERS[str(task.settings["answer"])](c)

    @on_client
    def stumble(self, c: Client, task: Task):
        """Changes its state, works, then raises."""
        self._begun("stumble", c)
        yield Add({"w": torch.ones(2)}, 1.0)
        raise ZeroDivisionError("the device ran out of luck")

    @on_client
    def strain(self, c: Client, task: Task):
        """Asks the compute for what it cannot do."""
        self._begun("strain", c)
        yield Add({"w": torch.ones(2)}, -1.0)
        return Update(c.id, 1)

    def unmarked(self, c: Client, task: Task):
        self._begun("unmarked", c)
        return Update(c.id, 1)
        yield


ANSWERS: dict[str, Callable[[Client], object]] = {
    "none": lambda c: None,
    "a dict": lambda c: {"client": c.id},
    "another client": lambda c: Update(c.id + 1, 1),
    "nan": lambda c: Update(c.id, 1, {"w": torch.tensor([1.0, float("nan")])}),
    "infinity": lambda c: Update(c.id, 1, {"w": torch.tensor([float("inf")])}),
    "complex": lambda c: Update(c.id, 1, {"w": torch.zeros(2, dtype=torch.complex64)}),
    "no tensor": lambda c: Update(c.id, 1, {"w": [1.0]}),  # type: ignore[dict-item]
    "a metric that is None": lambda c: Update(c.id, 1, {}, {"loss": None}),  # type: ignore[dict-item]
    "a metric that is nan": lambda c: Update(c.id, 1, {}, {"loss": float("nan")}),
}


@dataclass
class World:
    """Everything one engine needs, and the engine."""

    toy: Toy
    adder: Adder
    store: ClientStore
    host: Host
    engine: Engine

    def run(self, *tasks: Task) -> Replies:
        return self.engine.run(tasks)

    def state(self, client: int) -> tuple[str, str]:
        """Fingerprints of what the store holds for a client."""
        private, memory = self.store.load(client)
        return fingerprint(private), fingerprint(memory)


def device(client: int) -> Client:
    """A device; only ids in ``CLIENTS`` exist."""
    if client not in CLIENTS:
        raise LookupError(f"no client {client}")
    empty = Examples.of([[1]], [0])
    return Client(client, empty, empty, empty, seed=11)


def host_of(digest: str = DIGEST) -> tuple[Toy, Adder, ClientStore, Host]:
    """A host over a fresh toy."""
    toy, adder, store = Toy(), Adder(), ClientStore()
    return toy, adder, store, Host(toy, device, adder, store, digest)


def local(wave: int = WAVE) -> World:
    """The toy under the local engine."""
    toy, adder, store, host = host_of()
    return World(toy, adder, store, host, Local(host, wave))


def in_waves() -> World:
    """The toy under the local engine, two clients at a time."""
    return local(2)


def flower() -> World:
    """The toy under the Flower engine, in memory."""
    with warnings.catch_warnings():  # the command-line library that Flower imports uses a deprecated name of click's
        warnings.simplefilter("ignore", DeprecationWarning)
        from fedloom.engines.flower import in_memory
    toy, adder, store, host = host_of()
    return World(toy, adder, store, host, in_memory(host, CLIENTS, timeout=30.0))


def federation() -> World:
    """The toy in a real federation: a link and a node for every client, over loopback."""
    from tests.federated import engine_over

    toy, adder, store, host = host_of()
    return World(toy, adder, store, host, engine_over(host, CLIENTS))


def payload(seed: int = 0) -> dict[str, torch.Tensor]:
    """Tensors of several dtypes, one empty, one scalar, one a transposed view."""
    rand = torch.rand(4, 3, generator=torch.Generator().manual_seed(seed))
    return {
        "w": rand,
        "view": rand.T,
        "bf16": rand.to(torch.bfloat16),
        "half": rand.half(),
        "f64": rand.double(),
        "count": torch.arange(5),
        "flag": torch.tensor([True, False]),
        "empty": torch.zeros(0, 2),
        "scalar": torch.tensor(1.5),
    }


def task(client: int, op: str = "add", **settings: object) -> Task:
    """A task with its own tensors."""
    return Task(op, client, {"w": torch.arange(4.0)}, settings)  # type: ignore[arg-type]


def same_update(first: Update, second: Update) -> bool:
    """Equal to the last bit, tensors' names, dtypes and shapes included."""
    plain = replace(first, tensors={}) == replace(second, tensors={})
    return plain and list(first.tensors) == list(second.tensors) and fingerprint(first.tensors) == fingerprint(second.tensors)


def same_replies(first: Replies, second: Replies) -> bool:
    """Equal to the last bit, reasons and traffic included."""
    updates = len(first.updates) == len(second.updates) and all(map(same_update, first.updates, second.updates))
    return updates and first.failures == second.failures and first.traffic == second.traffic
