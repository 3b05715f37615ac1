"""A real federation inside a process, for tests: a link on loopback, a node in a thread for every client, one host behind all of them.

Nodes are made once a process and kept: they ask whatever device is there at the moment. Over them, :func:`engine_over` gives an engine
whose devices' states lie in files that the server knows by name; they are copied into the host's own store after every asking, where tests
look.
"""

from __future__ import annotations

import atexit
import tempfile
import threading
import time
import warnings
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from fedloom.client.elsewhere import Elsewhere
from fedloom.client.host import Host
from fedloom.client.store import ClientStore
from fedloom.messages import Failure, Replies, Take, Task, whole
from fedloom.wire import Blob

with warnings.catch_warnings():  # libraries that Flower imports use deprecated names of their own
    warnings.simplefilter("ignore", DeprecationWarning)
    from flwr.app import Message
    from flwr.supercore.primitives.asymmetric import generate_key_pairs, public_key_to_bytes

    from fedloom.engines import federation
    from fedloom.engines.device import device_app
    from fedloom.engines.federation import Federation, Patience
    from fedloom.engines.link import Link
    from fedloom.engines.node import Credentials, Node

QUICK = Patience(wait=5.0, deadline=60.0, linger=0.2)


class Bell(threading.Event):
    """What a node waits for: that something was laid out for it, or that it is to stop. Once in a while it looks by itself."""

    SELDOM = 1.0

    def __init__(self) -> None:
        super().__init__()
        self.rung = threading.Semaphore(0)

    def ring(self) -> None:
        """Something was laid out."""
        self.rung.release()

    def set(self) -> None:
        threading.Event.set(self)
        self.ring()

    def wait(self, timeout: float | None = None) -> bool:
        if self.rung.acquire(timeout=self.SELDOM):
            while self.rung.acquire(blocking=False):  # whatever was laid out before this, one look and those after it find
                pass
        return self.is_set()


def rings(link: Link, bells: Mapping[int, Bell]) -> None:
    """Whatever is laid out on the link from now on rings at the client whom it is for."""
    push = link.push_messages

    def pushed(messages: Iterable[Message]) -> list[str]:
        made = list(messages)
        names = list(push(made))
        for message in made:
            bells[link.clients[message.metadata.dst_node_id]].ring()
        return names

    link.push_messages = pushed  # type: ignore[method-assign]


class Here:
    """A :class:`~fedloom.engines.federation.Device` in this process."""

    def __init__(self, host: Host, folder: Path) -> None:
        self.host, self.folder, self.lock, self.greeted = host, folder, threading.Lock(), 0

    def greet(self, greeting: str) -> Mapping[str, Any]:
        self.greeted += 1
        return {"examples": {"train": 1}}

    def answer(self, client: int, state: str, committed: str, blob: Blob) -> tuple[Blob | Failure, str]:
        with self.lock:
            self.host.store = ClientStore(self.folder)
            self.host.store.restore({str(client): state} if state else {})
            (answer,) = self.host.answer([blob])
            return answer, self.host.store.name(client) if not isinstance(answer, Failure) else state


class Whoever:
    """The device that is there at the moment."""

    device: Any = None

    def greet(self, greeting: str) -> Mapping[str, Any]:
        return self.device.greet(greeting)

    def answer(self, client: int, state: str, committed: str, blob: Blob) -> tuple[Blob | Failure, str]:
        return self.device.answer(client, state, committed, blob)


@dataclass
class Nodes:
    """A link and its nodes."""

    link: Link
    at: Whoever


@cache
def nodes(clients: tuple[int, ...]) -> Nodes:
    """One node for each of the clients; they end with the process, before the interpreter that they run in."""
    keys = {client: generate_key_pairs() for client in clients}
    link = Link({client: public_key_to_bytes(public) for client, (_, public) in keys.items()}).__enter__()
    at, bells, threads = Whoever(), {client: Bell() for client in clients}, list[threading.Thread]()
    rings(link, bells)
    for client, (private, _) in keys.items():
        one = Node(f"127.0.0.1:{link.port}", Credentials(private, None), device_app(at), lambda text: None)
        threads.append(threading.Thread(target=one.serve, args=(bells[client],), daemon=True))
        threads[-1].start()
    atexit.register(_ended, link, bells, threads)
    while len(link.present()) < len(clients):
        time.sleep(0.02)
    return Nodes(link, at)


def _ended(link: Link, bells: Mapping[int, Bell], threads: Sequence[threading.Thread]) -> None:
    for bell in bells.values():
        bell.set()
    for thread in threads:
        thread.join(2)
    link.__exit__()


class Copied:
    """An engine that copies the devices' states, as the server names them, into a store."""

    def __init__(self, inner: Federation, folder: Path, store: ClientStore) -> None:
        self.inner, self.folder, self.store = inner, folder, store

    def run(self, tasks: Sequence[Task], take: Take = whole) -> Replies:
        federation.FIRST = 0.0  # nobody is left out
        replies = self.inner.run(tasks, take)
        for update in replies.updates:
            client, there = update.client, ClientStore(self.folder)
            there.restore({str(client): name} if (name := self.inner.states.name(client)) else {})
            self.store.save(client, *there.load(client))
        return replies


def engine_over(host: Host, clients: Sequence[int], patience: Patience = QUICK) -> Copied:
    """The engine of a federation of these clients, all of them on ``host``."""
    there, folder, store = nodes(tuple(clients)), Path(tempfile.mkdtemp()), host.store
    there.at.device = Here(host, folder)
    return Copied(Federation(there.link, Elsewhere(), host.digest, {}, patience, host.encoding), folder, store)
