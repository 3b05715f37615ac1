"""What a federation's server keeps of messages that are under way: Flower's own state and store of objects, but for what harms a server
that is to run for days among devices of which some may be hostile.

Flower keeps messages and the parts that they are made of apart, and trusts what nodes push. Here nothing that nobody waits for stays, an
answer has a bound, parts lie in a file (``aside.py``), and a tree of parts is one that a message has, or is refused.
"""

from __future__ import annotations

import logging
from collections import Counter
from pathlib import Path

from fedloom.engines import quiet  # noqa: F401  first: it switches off what Flower must not do

# isort: split
from flwr.app import Message
from flwr.proto.message_pb2 import ObjectTree
from flwr.server.superlink.linkstate import InMemoryLinkState
from flwr.supercore.inflatable.inflatable_object import is_valid_sha256_hash
from flwr.supercore.object_store.in_memory_object_store import InMemoryObjectStore
from flwr.superlink.federation import NoOpFederationManager

from fedloom.engines.aside import Aside, Kept

log = logging.getLogger("fedloom")

SMALL = 2**14
"""Bytes up to which a part of a message stays in memory."""

MOST = 2**26
"""Bytes that an answer may have where nothing more is said (``State.most``)."""

DEEPEST = 5
"""Objects from a message down to its last: message, records, record, array, chunk."""


class State(InMemoryLinkState):
    """Flower's, but for this: it knows the messages that nobody will answer any more (``dropped``), a part may be pushed twice, an error
    may take the place of an answer that did not arrive as a whole, and what nobody waits for is let go of with all its parts, those too
    that are on their way."""

    def __init__(self, federations: NoOpFederationManager, objects: Objects) -> None:
        InMemoryLinkState.__init__(self, federations, objects)
        self.dropped, self._objects, self.most = set[str](), objects, MOST
        self._brought = Counter[str]()  # bytes, by the session of the message that they are of
        self._lock_object_push_sessions = self.lock  # Flower takes its two in both orders, and a thread of each kind would wait for ever

    def activate_node(self, node_id: int, heartbeat_interval: float) -> bool:
        """As Flower's. Of what the node has fetched and not answered, or not to the end, it knows nothing any more."""
        with self.lock:
            done = InMemoryLinkState.activate_node(self, node_id, heartbeat_interval)
            for name, message in self.message_ins_store.items() if done else ():
                if message.metadata.dst_node_id == node_id and message.metadata.delivered_at and not self._answered(name):
                    self.dropped.add(name)
            return done

    def store_message_res(self, message: Message) -> str | None:
        """As Flower's. An error takes the place of an answer of which parts are missing: its device could not bring them."""
        with self.lock:
            asked = message.metadata.reply_to_message_id
            was = self.message_ins_store.get(asked)
            own = was is not None and was.metadata.dst_node_id == message.metadata.src_node_id
            if own and message.has_error() and not self._answered(asked):
                before = self.message_ins_id_to_message_res_id.pop(asked, "")
                self.message_res_store.pop(before, None)
                self._let_go(before)
            return InMemoryLinkState.store_message_res(self, message)

    def store_message_and_object_tree(self, message: Message, object_tree: ObjectTree, session_id: str) -> tuple[bool, list[str]]:
        """As Flower's. Of a message that is not taken nothing is expected."""
        stored, missing = InMemoryLinkState.store_message_and_object_tree(self, message, object_tree, session_id)
        if not stored:
            self._cleanup_push_session(session_id, cleanup_messages=False)
        return stored, missing

    def store_object(self, run_id: int, session_id: str, object_id: str, object_content: bytes) -> bool:
        """As Flower's, and True of what is here: a device that was not told in time pushes it again. Of an answer no more than ``most``
        bytes are stored. Without a session, which Flower allows, nobody could say whose bytes they are, and nothing is stored."""
        with self.lock:
            pushed = self._object_push_sessions.get(session_id)
            if pushed is None or object_id not in pushed.pending_object_ids:
                return self._objects.here(object_id)
            size = self._brought[session_id] + len(object_content)
            if size > self.most and not pushed.root_object_ids.isdisjoint(self.message_res_store):
                log.warning("an answer of more than %d bytes, which is more than any answer is here, is not stored", self.most)
                return False
            self._brought[session_id] = size
            return InMemoryLinkState.store_object(self, run_id, session_id, object_id, object_content)

    def withdraw(self, asked: str, answer: str = "") -> None:
        """This message is gone, and so is what came of an answer to it (``answer``, if its head was taken already). Parts of either that
        are still pushed are not taken."""
        with self.lock:
            self.dropped.discard(asked)
            roots = {asked, answer, self.message_ins_id_to_message_res_id.get(asked, "")}
            self.delete_messages({asked})
            for root in roots:
                self._let_go(root)

    def _answered(self, asked: str) -> bool:
        """Whether there is an answer to this message with all its parts; an error's head says all of it."""
        name = self.message_ins_id_to_message_res_id.get(asked)
        return name is not None and (self.message_res_store[name].has_error() or self._objects.whole(name))

    def _cleanup_push_session(self, session_id: str, *, cleanup_messages: bool) -> None:
        with self.lock:
            self._brought.pop(session_id, None)
            InMemoryLinkState._cleanup_push_session(self, session_id, cleanup_messages=cleanup_messages)

    def _let_go(self, root: str) -> None:
        """Delete a message's parts, and expect no more of them."""
        with self._lock_object_push_sessions:
            self._cleanup_push_session(self._object_push_session_by_root.get(root, ""), cleanup_messages=False)
            self._objects.delete(root)


class Objects(InMemoryObjectStore):
    """Flower's store, but for three things: parts of more than :data:`SMALL` bytes wait in a file, a tree is registered at one go, and
    trees that no message has are refused, which it would follow to any depth, and on every path through shared parts."""

    def __init__(self, folder: Path | None = None) -> None:
        """``folder``: on whose disk."""
        InMemoryObjectStore.__init__(self)
        self._aside, self._kept = Aside(folder), dict[str, Kept]()
        self.close = self._aside.close

    def put(self, object_id: str, object_content: bytes) -> None:
        """As Flower's.

        Raises:
            OSError: the disk is full. The part is not here then, and may be sent again.
        """
        with self.lock_store:
            InMemoryObjectStore.put(self, object_id, object_content)
            entry = self.store[object_id]
            if len(entry.content) > SMALL:
                entry.content, entry.is_available = b"", False
                self._kept[object_id] = self._aside.keep(object_content)
                entry.is_available = True

    def get(self, object_id: str) -> bytes | None:
        """As Flower's."""
        with self.lock_store:
            kept = self._kept.get(object_id)
            return bytes(self._aside.read(kept)) if kept else InMemoryObjectStore.get(self, object_id)

    def delete(self, object_id: str) -> None:
        """As Flower's, which deletes what only this one had by this method, too."""
        with self.lock_store:
            InMemoryObjectStore.delete(self, object_id)
            if object_id in self._kept and object_id not in self.store:
                self._aside.drop(self._kept.pop(object_id))

    def here(self, object_id: str) -> bool:
        """Whether an object is here."""
        with self.lock_store:
            return object_id in self.store and self.store[object_id].is_available

    def whole(self, object_id: str) -> bool:
        """Whether an object is here, and all its parts are."""
        with self.lock_store:
            return self.here(object_id) and all(map(self.whole, self.store[object_id].child_object_ids))

    def preregister(self, run_id: int, object_tree: ObjectTree) -> list[str]:
        """As Flower's, which between two of a tree's objects lets others delete those that this one would share with them.

        Raises:
            ValueError: the tree is deeper than :data:`DEEPEST`, or lists other parts of an object than were listed before.
        """
        parts: dict[str, list[str]] = {}
        waiting = [(object_tree, 1)]
        with self.lock_store:
            while waiting:
                node, depth = waiting.pop()
                own = [child.object_id for child in node.children]
                known = self.store[node.object_id].child_object_ids if node.object_id in self.store else own
                if depth > DEEPEST or not is_valid_sha256_hash(node.object_id) or not own == known == parts.setdefault(node.object_id, own):
                    raise ValueError("the tree of a message's objects is not one that a message has")
                waiting += ((child, depth + 1) for child in node.children)
            return InMemoryObjectStore.preregister(self, run_id, object_tree)
