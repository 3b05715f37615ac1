"""The second engine: the same packed tasks as Flower messages, through a ``Grid`` to a ``ClientApp``.

:class:`FlowerGrid` is the server's side and takes any Flower grid: the one that a deployed ``ServerApp`` is given, or the one
that :func:`in_memory` makes for simulation. :func:`client_app` is the device's side; the same app runs in both.

**In memory**: Flower's own ``InMemoryGrid`` and in-memory ``LinkState`` work without a SuperLink process, so they are used.
Their usual worker threads poll every 0.1 s; here a device answers while its message is pushed, in the caller's thread, which
needs no polling, obeys Ctrl-C and computes under the caller's torch settings. Every message is taken apart into the objects
that a deployment sends and put together again from their bytes, in both directions.

This module does not know methods or operations: it carries blobs (``boxes.py``).
"""

from __future__ import annotations

import logging
import math
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from secrets import token_hex
from typing import Protocol, cast

from fedloom.engines import quiet  # noqa: F401  first: it switches off what Flower must not do

# isort: split
from flwr.app import ConfigRecord, Context, Error, Message, MessageType, RecordDict
from flwr.clientapp import ClientApp
from flwr.common.constant import HEARTBEAT_INTERVAL_INF, NOOP_ACCOUNT_NAME, NOOP_FLWR_AID, SUPERLINK_NODE_ID, ErrorCode, Status
from flwr.proto.task_pb2 import Task as FlowerTask
from flwr.proto.task_pb2 import TaskStatus
from flwr.server.superlink.linkstate import InMemoryLinkState, LinkStateFactory
from flwr.server.superlink.linkstate.in_memory_linkstate import RunRecord
from flwr.serverapp import Grid
from flwr.supercore.constant import FLWR_IN_MEMORY_DB_NAME, NOOP_FEDERATION_ID
from flwr.supercore.inflatable.inflatable_object import get_all_nested_objects, no_object_id_recompute
from flwr.supercore.inflatable.inflatable_utils import inflate_object_from_contents
from flwr.supercore.object_store import ObjectStoreFactory
from flwr.supercore.run import Run
from flwr.supercore.task_identity import TaskIdentity
from flwr.superlink.federation import NoOpFederationManager
from flwr.superlink.grid import InMemoryGrid

from fedloom.client.host import Host
from fedloom.encodings import EXACT, Encoding, Sender
from fedloom.engines.boxes import BLOB, CLIENT, REFUSED, TO, boxed, client_of, unboxed
from fedloom.engines.local import gather, taken
from fedloom.messages import Failure, Replies, Take, Task, whole
from fedloom.wire import Blob, WireError

log = logging.getLogger("fedloom")

PARTITION = "partition-id"
"""The key of a node's configuration that says which client it is; node ids are random and mean nothing."""

EXPIRED = (ErrorCode.MESSAGE_UNAVAILABLE, ErrorCode.REPLY_MESSAGE_UNAVAILABLE)
"""Codes with which Flower answers for a task or a reply whose time ran out before the grid's own deadline was seen."""


class Answers(Protocol):
    """What answers packed tasks on a device: a :class:`~fedloom.client.host.Host`, or a proxy to one in a resident process."""

    def answer(self, blobs: Sequence[Blob]) -> Sequence[Blob | Failure]:
        """One packed update or one failure for each packed task, in order."""
        ...


class FlowerGrid:
    """An :class:`~fedloom.engines.engine.Engine` over a Flower grid.

    ``nodes`` maps client ids to Flower node ids (see :func:`roll_call`). ``timeout`` (seconds, one ``run``) is the deadline:
    who has not answered by then has failed, and a task that was not fetched by then is never carried out late.
    """

    def __init__(self, grid: Grid, nodes: Mapping[int, int], digest: str, timeout: float = 3600.0, encoding: Encoding = EXACT) -> None:
        if not (timeout > 0 and math.isfinite(timeout)):
            raise ValueError(f"timeout is {timeout}; a finite number of seconds above 0 is needed, so that nothing waits for ever")
        self.grid, self.nodes, self.digest, self.timeout, self.encoding = grid, dict(nodes), digest, timeout, encoding

    def run(self, tasks: Sequence[Task], take: Take = whole) -> Replies:
        """Send every task to its client's node and collect the replies until all are here or the deadline has passed.

        Raises:
            WireError: a task may not cross the wire; that is the method's fault and ends the run. Nothing was sent then.
        """
        tasks, sender = with_nonces(tasks), Sender(self.digest, self.encoding)
        sent, sizes = [], []
        for task in tasks:
            blob = sender.pack(task)
            sent.append(self._message(task.client, blob))
            sizes.append(0 if sent[-1] is None else len(blob))
            del blob
        messages = [message for message in sent if message is not None]
        replies = self.grid.send_and_receive(messages, timeout=self.timeout) if messages else []
        arrived = {reply.metadata.reply_to_message_id: reply for reply in replies}
        answers = [self._answer(task.client, message, arrived) for task, message in zip(tasks, sent, strict=True)]
        return taken(gather(tasks, sizes, answers, self.digest, self.encoding), take)

    def _message(self, client: int, blob: Blob) -> Message | None:
        if client not in self.nodes:
            return None
        content = RecordDict({BLOB: boxed(blob), TO: ConfigRecord({CLIENT: client})})
        return Message(content, self.nodes[client], MessageType.TRAIN, ttl=self.timeout)

    def _answer(self, client: int, sent: Message | None, arrived: Mapping[str, Message]) -> Blob | Failure:
        if sent is None:
            return Failure(client, f"LookupError: no node is known for client {client}; there are nodes for {sorted(self.nodes)}")
        reply = arrived.get(sent.metadata.message_id)
        if reply is None or (reply.has_error() and reply.error.code in EXPIRED):
            return Failure(client, f"TimeoutError: node {self.nodes[client]} did not answer within {self.timeout:g} s")
        if reply.has_error():
            reason = reply.error.reason or "no reason given"
            return Failure(client, reason if reply.error.code == REFUSED else f"Flower error {reply.error.code}: {reason}")
        try:
            return unboxed(reply.content)
        except WireError as error:
            return Failure(client, f"WireError: {error}")


def with_nonces(tasks: Sequence[Task]) -> list[Task]:
    """The tasks, each with a nonce of its own that nobody can guess: what answers it is an answer to this asking of this client."""
    return [replace(task, nonce=token_hex(16)) for task in tasks]


def roll_call(grid: Grid, timeout: float = 60.0) -> dict[int, int]:
    """Ask every node of the grid which client it is. Returns client id -> node id; who does not say is logged and left out.

    Raises:
        ValueError: two nodes are the same client.
    """
    calls = [Message(RecordDict(), node, MessageType.QUERY, ttl=timeout) for node in grid.get_node_ids()]
    nodes: dict[int, int] = {}
    for reply in grid.send_and_receive(calls, timeout=timeout) if calls else []:
        node = reply.metadata.src_node_id
        if reply.has_error():
            log.warning("node %d did not say which client it is: %s", node, reply.error.reason)
            continue
        try:
            client = client_of(reply.content)
        except WireError as error:
            log.warning("node %d did not say which client it is: %s", node, error)
            continue
        if client in nodes:
            raise ValueError(f"nodes {nodes[client]} and {node} are both client {client}; give each its own {PARTITION}")
        nodes[client] = node
    return dict(sorted(nodes.items()))


def client_app(host_factory: Callable[[Context], Answers]) -> ClientApp:
    """A Flower app that answers one packed task a message, and says which client it is when queried.

    ``host_factory`` is called for every message with the node's context; what should outlive a message (the base model) is the
    factory's to keep. Client state belongs to the host's store and never to ``context.state``: what fails must leave it alone. Where nodes
    are other people's machines, make hosts with ``telling=for_others`` (``telling.py``): what they say of an error then quotes no data.
    """
    app = ClientApp()

    @app.train()
    def carry_out(message: Message, context: Context) -> Message:
        client, asked = _partition(context), client_of(message.content)
        if asked != client:
            refusal = Failure(client, f"WireError: a task for client {asked} came to the node of client {client}")
            return Message(Error(REFUSED, refusal.reason), reply_to=message)
        (answer,) = host_factory(context).answer([unboxed(message.content)])
        if isinstance(answer, Failure):
            return Message(Error(REFUSED, answer.reason), reply_to=message)
        return Message(RecordDict({BLOB: boxed(answer)}), reply_to=message)

    @app.query()
    def say_who(message: Message, context: Context) -> Message:
        return Message(RecordDict({TO: ConfigRecord({CLIENT: _partition(context)})}), reply_to=message)

    return app


def in_memory(host: Host, clients: Iterable[int], timeout: float = 86400.0) -> FlowerGrid:
    """A whole federation in this process: one Flower node a client, each with its own context, all answering through ``host``.

    Devices answer one after another, and each one's time counts towards the deadline of all.
    """
    grid = Loopback(client_app(lambda context: host))
    for client in clients:
        grid.register(client)
    return FlowerGrid(grid, roll_call(grid), host.digest, timeout, host.encoding)


class Loopback(InMemoryGrid):
    """Flower's in-memory grid whose devices answer as soon as a message is pushed. ``contexts``: who listens, by node id."""

    def __init__(self, app: ClientApp) -> None:
        self.app, self.contexts = app, dict[int, Context]()
        factory = LinkStateFactory(FLWR_IN_MEMORY_DB_NAME, NoOpFederationManager(), ObjectStoreFactory())
        InMemoryGrid.__init__(self, factory, pull_interval=0.01)
        self.set_run(opened_run(cast(InMemoryLinkState, self.state)))

    def register(self, client: int) -> int:
        """Add a device for ``client``. Returns its node id."""
        node = self.state.create_node(NOOP_FLWR_AID, NOOP_ACCOUNT_NAME, os.urandom(32), HEARTBEAT_INTERVAL_INF)
        self.state.acknowledge_node_heartbeat(node, HEARTBEAT_INTERVAL_INF)
        self.contexts[node] = Context(self.run.run_id, node, {PARTITION: client}, RecordDict(), {})
        return node

    def push_messages(self, messages: Iterable[Message]) -> Iterable[str]:
        """Store the messages in the link state, then let every device they are for answer what it finds there."""
        pushed = list(messages)
        ids = list(InMemoryGrid.push_messages(self, pushed))
        for node in (message.metadata.dst_node_id for message in pushed):
            if node in self.contexts:
                for message in self.state.get_message_ins(node, limit=None):
                    self._reply(carried(message), self.contexts[node])
        return ids

    def _reply(self, message: Message, context: Context) -> None:
        try:
            reply = self.app(message, context)
        except Exception as error:
            log.warning("the ClientApp of node %d raised", context.node_id, exc_info=error)
            reason = f"{type(error).__name__}: {error}"
            reply = Message(Error(ErrorCode.CLIENT_APP_RAISED_EXCEPTION, reason), reply_to=message)
        if self.state.store_message_res(carried(reply)) is None:
            log.warning("the reply of node %d was not taken: it came after its deadline", context.node_id)


def carried(message: Message) -> Message:
    """The message as it arrives elsewhere: rebuilt from the bytes of the objects that Flower sends for it."""
    with no_object_id_recompute():
        objects = get_all_nested_objects(message)
        arrived = inflate_object_from_contents(message.object_id, {name: part.deflate() for name, part in objects.items()})
        arrived = cast(Message, arrived)
        # A message's id is not among its bytes; Flower too sets it on arrival. A reply that has none is named by its content.
        arrived.metadata.__dict__["_message_id"] = message.metadata.message_id or message.object_id
    return arrived


def opened_run(state: InMemoryLinkState) -> Run:
    """A run known to the link state, under the identity that Flower's messages of this process carry."""
    try:
        run_id, task_id = TaskIdentity.run_id, TaskIdentity.task_id
    except RuntimeError:  # this process is no part of another Flower run
        run_id = task_id = TaskIdentity.run_id = TaskIdentity.task_id = 1
        TaskIdentity.node_id = SUPERLINK_NODE_ID
    run = Run.create_empty(run_id)
    run.primary_task_id, run.federation_id = task_id, NOOP_FEDERATION_ID
    state.run_ids[run_id] = RunRecord(run=run)
    state.task_store[task_id] = FlowerTask(task_id=task_id, run_id=run_id, status=TaskStatus(status=Status.RUNNING))
    return run


def _partition(context: Context) -> int:
    if PARTITION not in context.node_config:
        raise ValueError(f"this node does not say which client it is; start it with --node-config '{PARTITION}=K'")
    return int(context.node_config[PARTITION])
