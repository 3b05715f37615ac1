"""The server's end of a real federation: Flower's Fleet API over HTTPS, and the grid behind it, in the process of the run.

A :class:`Link` is a Flower ``Grid``. Devices (``node.py``, or any client of the Fleet API) activate themselves, fetch messages and push
replies; whoever holds the link pushes messages and pulls replies without another process in between. A Flower SuperLink would do the same
and more: its Control API starts apps that nodes then execute. Nothing of that is mounted here. What crosses are messages, never code.

**Who may come in**: the public keys that the link is given, one a client, and nobody else. Every request is signed with the key that
it names (Flower's node authentication, a signed time stamp) and names the node of that key, over TLS. A node's id is drawn anew at every
start and means nothing; its key is its name.

**Memory**: of what is under way the server holds in memory what a few requests carry (``gate.py``); parts of messages wait in a file
(``aside.py``), and replies are put together one at a time. So its memory does not grow with the number of devices that answer at once.
"""

from __future__ import annotations

import logging
import socket
import threading
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

from fedloom.engines.flower import opened_run  # first: it switches off what Flower must not do
from fedloom.engines.gate import Bounded, Known, Turns, authenticated, in_own_name
from fedloom.engines.heap import share_heaps
from fedloom.engines.mailbox import Objects, State
from fedloom.engines.node import STATUS

# isort: split
import uvicorn
from fastapi import FastAPI, HTTPException
from flwr.app import Error, Message, RecordDict
from flwr.app.message import remove_content_from_message
from flwr.common.constant import NOOP_ACCOUNT_NAME, NOOP_FLWR_AID, SUPERLINK_NODE_ID, ErrorCode
from flwr.proto.node_pb2 import Node
from flwr.server.superlink.linkstate import LinkStateFactory
from flwr.server.superlink.linkstate.utils import create_message_error_unavailable_res_message
from flwr.serverapp import Grid
from flwr.supercore.constant import FLWR_IN_MEMORY_DB_NAME
from flwr.supercore.error.http import http_error_translator
from flwr.supercore.inflatable.inflatable_object import (
    get_all_nested_objects,
    get_object_tree,
    iterate_object_tree,
    no_object_id_recompute,
)
from flwr.supercore.inflatable.inflatable_utils import inflate_object_from_contents
from flwr.supercore.object_store import NoObjectInStoreError, ObjectStoreFactory
from flwr.supercore.protobuf.translation import ProtobufTranslationMiddleware
from flwr.supercore.run import Run
from flwr.superlink.federation import NoOpFederationManager
from flwr.superlink.routers.fleet.node_auth import NodeAuthMiddleware
from flwr.superlink.routers.fleet.router import router as fleet
from starlette.middleware import Middleware
from starlette.middleware.base import BaseHTTPMiddleware
from starlette.requests import Request

from fedloom.wire import LONGEST

log = logging.getLogger("fedloom")

STRANGERS, EACH = 512, 8
"""Connections that may be open: so many, and so many more for every device, which has two or three. Beyond them the answer is 503."""

PAUSE = 0.02
"""Seconds between two looks at what has come."""


class LinkError(OSError):
    """The link could not be opened, with what would be right."""


@dataclass(frozen=True)
class Tls:
    """The server's certificate and its private key, as PEM files."""

    certificate: Path
    key: Path


class Link(Grid):
    """The federation's meeting point, open between ``with`` and its end.

    ``keys``: the public key of each client, PEM. ``port`` 0 takes a free one; ``link.port`` says which. Without ``tls`` everything goes in
    the clear, which is for tests on one machine. ``folder``: on whose disk what is under way waits (None: that of the system's temporary
    files); it may be made later, but before anything is under way.

    Raises:
        LinkError: the address cannot be had.
    """

    def __init__(
        self, keys: Mapping[int, bytes], host: str = "127.0.0.1", port: int = 0, tls: Tls | None = None, folder: Path | None = None
    ) -> None:
        share_heaps()
        self.folder, objects = folder, ObjectStoreFactory()
        objects.store_instance = self._objects = Objects(folder)
        factory = LinkStateFactory(FLWR_IN_MEMORY_DB_NAME, NoOpFederationManager(), objects)
        factory.state_instance = self.state = State(NoOpFederationManager(), self._objects)
        self._run, self.node = opened_run(self.state), Node(node_id=SUPERLINK_NODE_ID)
        self.nodes = {k: self.state.create_node(NOOP_FLWR_AID, NOOP_ACCOUNT_NAME, key, 0) for k, key in sorted(keys.items())}
        self.clients = {node: client for client, node in self.nodes.items()}
        self.host, self.port = host, port
        self.about: Callable[[], Mapping[str, Any]] = dict
        """What is told to whoever asks how things stand and has a key."""
        self._arriving: dict[str, Message] = {}
        files: dict[str, Any] = {"ssl_certfile": str(tls.certificate), "ssl_keyfile": str(tls.key)} if tls else {}
        self._server = uvicorn.Server(
            uvicorn.Config(
                _fleet(factory, lambda: self.about()),
                log_config=None,
                access_log=False,
                lifespan="off",
                ws="none",
                timeout_graceful_shutdown=1,
                limit_concurrency=STRANGERS + EACH * len(keys),
                **files,
            )
        )
        self._thread = threading.Thread(target=lambda: self._server.run([self._socket]), name="link", daemon=True)

    def __enter__(self) -> Link:
        kind = socket.AF_INET6 if ":" in self.host else socket.AF_INET
        self._socket = socket.socket(kind)
        self._socket.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            self._socket.bind((self.host, self.port))
        except OSError as error:
            self._socket.close()
            raise LinkError(f"cannot listen on {self.host}:{self.port}: {error.strerror}; give another --listen") from error
        self.port = self._socket.getsockname()[1]
        self._thread.start()
        while not self._server.started:
            if not self._thread.is_alive():
                self._socket.close()
                raise LinkError(f"the link on {self.host}:{self.port} did not start; what it said, if anything, is above")
            time.sleep(PAUSE)
        return self

    def __exit__(self, *_: object) -> None:
        self._server.should_exit = True
        self._thread.join(5)
        self._socket.close()
        self._objects.close()

    def present(self) -> set[int]:
        """The clients whose nodes have been heard of lately."""
        return {self.clients[node] for node in self.get_node_ids()}

    # ---- Flower's grid ------------------------------------------------------------------------------------------------------

    def set_run(self, run: Run) -> None:
        """There is one run, the link's own."""
        raise LinkError("a link has one run, its own")

    @property
    def run(self) -> Run:
        """The link's run."""
        return self._run

    def create_message(self, *_: object, **__: object) -> Message:
        """Flower's deprecated way; make a ``Message``."""
        raise LinkError("make a flwr.app.Message")

    def get_node_ids(self) -> Iterable[int]:
        """The nodes that have been heard of lately."""
        return self.state.get_nodes(self._run.run_id)

    def get_nodes(self) -> Sequence[object]:  # type: ignore[override]
        """What Flower knows of them."""
        return self.state.get_node_info(node_ids=list(self.get_node_ids()))

    def push_messages(self, messages: Iterable[Message]) -> Iterable[str]:
        """Lay the messages out for their nodes to fetch. Returns the ids of those for nodes that exist.

        Raises:
            OSError: the disk is full.
        """
        pushed, run = [], self._run.run_id
        for message in messages:
            with no_object_id_recompute():
                message.metadata.__dict__["_message_id"] = message.object_id
                session = self.state.start_session(run)
                tree, parts = get_object_tree(message), get_all_nested_objects(message)
                try:
                    stored, missing = self.state.store_message_and_object_tree(remove_content_from_message(message), tree, session)
                except ValueError as error:  # a node has said something else of one of the parts
                    log.warning("a message was not laid out: %s", error)
                    self.forget([message.object_id])
                    continue
                for name in missing:
                    content = parts[name].deflate()
                    if not self.state.store_object(run, session, name, content):
                        self._objects.put(name, content)  # Flower says that it was not stored, and this says why
            if stored:
                pushed.append(message.metadata.message_id)
        return pushed

    def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Message]:
        """The replies to these messages that are here with all their parts, each once; what cannot be put together as an error. They are
        put together as they are taken, so that one is in memory at a time. Of a node that is silent there is no reply, as long as it is;
        Flower would give up what it has to do after 20 s. What it had to do before it began anew is answered by an error."""
        wanted = set(message_ids)
        for asked in wanted & self.state.dropped:
            yield create_message_error_unavailable_res_message(self.state.message_ins_store[asked].metadata, "node_unavail")
            self.forget([asked])
        for reply in self.state.get_message_res(wanted & set(self.state.message_ins_store), self._run.run_id):
            if reply.metadata.src_node_id == SUPERLINK_NODE_ID and reply.error.code == ErrorCode.NODE_UNAVAILABLE:
                self.state.object_store.delete(reply.metadata.message_id)  # Flower's own, made for this look
            else:
                self._arriving[reply.metadata.reply_to_message_id] = reply
        for asked in [asked for asked in self._arriving if asked in wanted]:
            reply = self._arriving.get(asked)
            if reply is None:  # forgotten since
                continue
            found = reply if reply.has_error() else self._assembled(reply)
            if found is not None:
                self.forget([asked])
                yield found

    def send_and_receive(self, messages: Iterable[Message], *, timeout: float | None = None) -> Iterable[Message]:
        """Push, and pull until all replies are here or the time is up."""
        waiting, replies = set(self.push_messages(messages)), list[Message]()
        until = time.monotonic() + (timeout if timeout is not None else float("inf"))
        while waiting:
            came = list(self.pull_messages(waiting))
            replies += came
            waiting -= {reply.metadata.reply_to_message_id for reply in came}
            if waiting and time.monotonic() >= until:
                break
            if waiting:
                time.sleep(PAUSE)
        self.forget(waiting)
        return replies

    def forget(self, message_ids: Iterable[str]) -> None:
        """Nobody waits for replies to these any more: what came of them is gone, and what may still come is not taken."""
        for asked in message_ids:
            reply = self._arriving.pop(asked, None)
            self.state.withdraw(asked, "" if reply is None else reply.metadata.message_id)

    def _assembled(self, reply: Message) -> Message | None:
        """The reply with its content, an error in its place if that cannot be read, or None while parts of it are on their way."""
        try:
            return self._inflated(reply)
        except NoObjectInStoreError:
            return None
        except Exception as error:  # Flower trusts what nodes push
            reason = f"a reply whose objects cannot be put together ({type(error).__name__}: {error})"[:LONGEST]
            return Message(error=Error(ErrorCode.UNKNOWN, reason), metadata=reply.metadata)  # type: ignore[call-overload]

    def _inflated(self, reply: Message) -> Message | None:
        name, run = reply.metadata.message_id, self._run.run_id
        parts = [one.object_id for one in iterate_object_tree(self.state.object_store.get_object_tree(name))]
        contents = {part: self.state.get_object(run, part) for part in parts}
        if not all(contents.values()):
            return None
        with no_object_id_recompute():
            whole = inflate_object_from_contents(name, cast(dict[str, bytes], contents))
        if not isinstance(whole, Message) or not isinstance(whole.content, RecordDict):
            raise TypeError(f"a {type(whole).__name__} is no message with content")
        # What it is an answer to says the head, which was checked.
        return Message(content=whole.content, metadata=reply.metadata)  # type: ignore[call-overload]


def _fleet(factory: LinkStateFactory, about: Callable[[], Mapping[str, Any]]) -> FastAPI:
    """The Fleet API, and how things stand, for the nodes that ``factory``'s state knows. Nothing else."""
    app = FastAPI(
        docs_url=None,
        redoc_url=None,
        openapi_url=None,
        middleware=[
            Middleware(Bounded),
            Middleware(Known, known=lambda key: factory.state().get_node_id_by_public_key(key) is not None),
            Middleware(Turns),
            Middleware(BaseHTTPMiddleware, dispatch=http_error_translator),
            Middleware(ProtobufTranslationMiddleware),
            Middleware(NodeAuthMiddleware),
            Middleware(BaseHTTPMiddleware, dispatch=in_own_name),
        ],
    )
    app.state.linkstate_factory = factory
    app.state.enable_supernode_auth = True  # nodes do not register themselves
    app.include_router(fleet)

    def status(request: Request) -> dict[str, Any]:
        key = authenticated(request)
        if factory.state().get_node_id_by_public_key(key) is None:
            raise HTTPException(403, "no device of this federation has this key")
        return dict(about())

    app.add_api_route(STATUS, status, methods=["GET"])
    return app
