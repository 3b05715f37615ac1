"""A device's end of a real federation: it fetches messages from the link, has them answered here, and pushes the replies.

A Flower SuperNode does the same with a process of its own for every message, which would load the model every time, and looks for
messages every three seconds. A :class:`Node` speaks the same Fleet API with the same authentication and stays one process: an app
(:func:`fedloom.engines.flower.client_app` or any Flower ``ClientApp``) answers in its thread.

It never ends because the server is away: it comes back again and again, at most :data:`LONGEST_WAIT` seconds apart, announcing itself anew.
It does end when it is told that it does not belong: a certificate that is not the federation's, a key that the server does not know.
"""

from __future__ import annotations

import logging
import ssl
import threading
import time
from base64 import b64encode
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from fedloom.engines.boxes import REFUSED  # first: it switches off what Flower must not do

# isort: split
import httpx
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import load_pem_private_key
from flwr.app import Context, Error, Message, RecordDict
from flwr.app.message import remove_content_from_message
from flwr.common.constant import HEARTBEAT_MIN_INTERVAL, TIMESTAMP_HEADER, ErrorCode
from flwr.common.serde import message_from_proto, message_to_proto
from flwr.proto.fleet_pb2 import ActivateNodeRequest, DeactivateNodeRequest, PullMessagesRequest, PushMessagesRequest
from flwr.proto.heartbeat_pb2 import SendNodeHeartbeatRequest
from flwr.proto.message_pb2 import ConfirmMessageReceivedRequest, ObjectTree, PullObjectRequest, PushObjectRequest
from flwr.proto.node_pb2 import Node as FlowerNode
from flwr.supercore.constant import FLEET_HTTP_PUBLIC_KEY_HEADER, FLEET_HTTP_SIGNATURE_HEADER
from flwr.supercore.date import now
from flwr.supercore.error import ApiErrorCode, FlowerError
from flwr.supercore.inflatable.inflatable_object import (
    get_all_nested_objects,
    get_object_tree,
    iterate_object_tree,
    no_object_id_recompute,
)
from flwr.supercore.inflatable.inflatable_utils import inflate_object_from_contents
from flwr.supercore.interceptors.http.runtime_version import RuntimeVersionHttpInterceptor
from flwr.supercore.primitives.asymmetric import public_key_to_bytes, sign_message
from flwr.supernode.fleet_http_client import FleetHttpClient
from flwr.supernode.node_auth_http_interceptor import NodeAuthHttpInterceptor

from fedloom.telling import for_others

log = logging.getLogger("fedloom")

App = Callable[[Message, Context], Message]
Asked = TypeVar("Asked")
Said = TypeVar("Said")

QUICKEST, SLOWEST = 0.02, 0.5
"""Seconds between two looks for a message: at once after one came, more and more slowly while none comes."""

LONGEST_WAIT = 10.0
"""Seconds between two attempts to reach the server, at most."""

AGAIN = (0.2, 1.0)
"""Seconds before an answer that was refused is pushed again."""

TRIES = 4
"""How often a part of a message is asked for or pushed before the server that says nothing in time (Flower: 30 s) counts as away. It lets
parts pass a few at a time, so that others' may be in front of it."""

GOODBYE = 2.0
"""Seconds for telling the server that this device leaves."""

PATIENCE = 60.0
"""Seconds within which the parts of a message must arrive."""

STATUS = "/v1/fedloom/status"
"""Where the server says how things stand, to whoever has a key of its federation."""


class NotTaken(OSError):
    """The server did not store a part of an answer."""


class Refused(ConnectionError):
    """The server does not let this device in, or is not the one that the device was told of."""


@dataclass(frozen=True)
class Credentials:
    """``key``: the device's private key. ``root``: the certificate of the federation's authority, PEM (None: no TLS, for tests)."""

    key: ec.EllipticCurvePrivateKey
    root: bytes | None

    @staticmethod
    def read(key: Path, root: Path | None) -> Credentials:
        """Both from PEM files.

        Raises:
            ValueError: a file that holds no such thing.
            OSError: a file that cannot be read.
        """
        try:
            private = load_pem_private_key(key.read_bytes(), None)
        except (ValueError, TypeError) as error:
            raise ValueError(f"{key} is not a private key in PEM ({error}); fedloom certs makes one for every device") from error
        if not isinstance(private, ec.EllipticCurvePrivateKey):
            raise ValueError(f"{key} is a key of another kind; Flower's node authentication wants one of an elliptic curve (fedloom certs)")
        return Credentials(private, None if root is None else _certificates(root))


def _certificates(path: Path) -> bytes:
    """What the file holds, if TLS can trust it.

    Raises:
        ValueError: it holds no certificate.
    """
    content = path.read_bytes()
    try:
        ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT).load_verify_locations(cadata=content.decode("ascii"))
    except (ValueError, ssl.SSLError) as error:
        raise ValueError(
            f"{path} is no certificate in PEM ({error}); copy the federation's ca.pem there again: fedloom certs wrote one beside the key "
            "of every device, and into the server's folder"
        ) from error
    return content


def asked(address: str, credentials: Credentials, path: str) -> dict[str, Any]:
    """What the server of the federation answers to a signed request.

    Raises:
        Refused: it does not know the key, or is another.
        OSError: it is not there.
    """
    stamp = now().isoformat()
    headers = {
        FLEET_HTTP_PUBLIC_KEY_HEADER: b64encode(public_key_to_bytes(credentials.key.public_key())).decode("ascii"),
        TIMESTAMP_HEADER: stamp,
        FLEET_HTTP_SIGNATURE_HEADER: b64encode(sign_message(credentials.key, stamp.encode("ascii"))).decode("ascii"),
    }
    trusted = ssl.create_default_context(cadata=credentials.root.decode("ascii")) if credentials.root else True
    try:
        reply = httpx.get(f"{'https' if credentials.root else 'http'}://{address}{path}", headers=headers, verify=trusted, timeout=10)
        reply.raise_for_status()
    except httpx.HTTPStatusError as error:
        if error.response.status_code == httpx.codes.FORBIDDEN:
            raise Refused(
                f"the server at {address} does not know this device's key; its public half must lie in the server's folder of devices"
            ) from error
        raise OSError(f"the server at {address} does not answer this ({_why(error)})") from error
    except httpx.HTTPError as error:
        _insist_certified(address, error)
        raise OSError(f"nobody answers at {address} ({error}); is fedloom serve running there?") from error
    try:
        return dict(reply.json())
    except (ValueError, TypeError, RecursionError) as error:
        raise OSError(f"what answers at {address} is no fedloom serve ({type(error).__name__})") from error


def _insist_certified(address: str, error: Exception) -> None:
    if "CERTIFICATE_VERIFY_FAILED" in str(error) or "certificate verify failed" in str(error):
        raise Refused(
            f"the server at {address} is not certified by the authority that this device was given ({error}); give the ca.pem of its "
            "federation, and the name or address that its certificate is for"
        ) from error


def in_time(call: Callable[[Asked], Said], request: Asked) -> Said:
    """What the server says to a request that may be made twice: again where it says nothing in time, :data:`TRIES` times in all."""
    for _ in range(TRIES - 1):
        try:
            return call(request)
        except (httpx.ReadTimeout, httpx.WriteTimeout) as error:
            log.debug("nothing was said in time (%s); once more", type(error).__name__)
    return call(request)


def _not_activated(error: Exception) -> bool:
    """Flower says this of a key that it does not know, and of one whose node it still takes to be there."""
    told = None
    with suppress(ValueError, TypeError, RecursionError):  # whoever answers there may say anything
        told = FlowerError.from_json(error.response.text) if isinstance(error, httpx.HTTPStatusError) else None
    return told is not None and told.code == ApiErrorCode.FLEET_NODE_ACTIVATION_FAILED


def _why(error: Exception) -> str:
    if _not_activated(error):
        return "somebody with this device's key is there, or was a moment ago"
    if isinstance(error, httpx.HTTPStatusError) and error.response.status_code == httpx.codes.UNAUTHORIZED:
        return "it does not take this device's signature, whose time stamp may be 5 s ahead of its clock and 5 min behind: are both right?"
    return f"{type(error).__name__}: {error}"


class Node:
    """One device at the link of ``address`` (HOST:PORT). ``seen`` is told every change: here, away, why."""

    def __init__(self, address: str, credentials: Credentials, app: App, seen: Callable[[str], None] = log.info) -> None:
        self.address, self.credentials, self.app, self.seen = address, credentials, app, seen
        self._id, self._away = 0, ""

    def serve(self, stop: threading.Event) -> None:
        """Answer messages until ``stop`` is set.

        Raises:
            Refused: this device does not belong there.
        """
        failed = 0
        while not stop.is_set():
            try:
                with self._client() as client:
                    self._activate(client)
                    failed = 0
                    self._answer_all(client, stop)
            except (httpx.HTTPError, OSError, ValueError) as error:  # ValueError: what answers is no protobuf, so it is no such server
                self._insist_belonging(error)
                self._tell_away(_why(error))
                failed += 1
                stop.wait(min(0.2 * 2**failed, LONGEST_WAIT))

    @contextmanager
    def _client(self) -> Iterator[FleetHttpClient]:
        public = self.credentials.key.public_key()
        interceptors = [RuntimeVersionHttpInterceptor(component_name="SuperNode"), NodeAuthHttpInterceptor(self.credentials.key, public)]
        root = self.credentials.root
        with FleetHttpClient.from_server_address(self.address, root is None, root, interceptors) as client:
            yield client

    def _activate(self, client: FleetHttpClient) -> None:
        public = public_key_to_bytes(self.credentials.key.public_key())
        self._id = client.ActivateNode(ActivateNodeRequest(public_key=public, heartbeat_interval=HEARTBEAT_MIN_INTERVAL)).node_id
        self._away = ""
        self.seen(f"joined the federation at {self.address}")

    def _answer_all(self, client: FleetHttpClient, stop: threading.Event) -> None:
        gone, node = threading.Event(), FlowerNode(node_id=self._id)
        beating = threading.Thread(target=self._beat, args=(client, node, gone), daemon=True)
        beating.start()
        pause = QUICKEST
        try:
            while not stop.is_set():
                if self._answer_next(client, node):
                    pause = QUICKEST
                else:
                    stop.wait(pause)
                    pause = min(1.3 * pause, SLOWEST)
        finally:
            gone.set()
            beating.join(1)
            self._leave(client)

    def _leave(self, client: FleetHttpClient) -> None:
        """Tell the server, if it is there, that nobody is here any more: it would wait for whoever is merely silent."""
        client._client.timeout = httpx.Timeout(GOODBYE)
        try:
            client.DeactivateNode(DeactivateNodeRequest(node_id=self._id))
        except (httpx.HTTPError, OSError, ValueError) as error:
            log.debug("no goodbye: %s", error)

    def _beat(self, client: FleetHttpClient, node: FlowerNode, gone: threading.Event) -> None:
        """Say that this device is alive, also while it computes. Whether the server is, the other thread sees."""
        while not gone.wait(HEARTBEAT_MIN_INTERVAL / 3):
            try:
                client.SendNodeHeartbeat(SendNodeHeartbeatRequest(node=node, heartbeat_interval=HEARTBEAT_MIN_INTERVAL))
            except (httpx.HTTPError, ValueError) as error:
                log.debug("no heartbeat: %s", error)

    def _answer_next(self, client: FleetHttpClient, node: FlowerNode) -> bool:
        """Answer one message; False if there was none."""
        found = client.PullMessages(PullMessagesRequest(node=node))
        if not found.messages_list:
            return False
        try:
            message = self._fetched(client, node, message_from_proto(found.messages_list[0]), found.message_object_trees[0])
        except (httpx.HTTPError, OSError):
            raise
        except Exception as error:  # Flower trusts what the server lays out
            log.warning("a message that cannot be read was passed over", exc_info=error)
            return False
        if message is None:
            return True
        started, context = time.monotonic(), Context(message.metadata.run_id, self._id, {}, RecordDict(), {})
        try:
            reply = self.app(message, context)
        except Exception as error:
            log.warning("a message could not be answered", exc_info=error)
            reply = Message(Error(ErrorCode.CLIENT_APP_RAISED_EXCEPTION, for_others(error)), reply_to=message)
        try:
            self._push_at_last(client, node, reply, time.monotonic() - started)
        except NotTaken as error:
            log.warning("%s", error)
            self._push(client, node, Message(Error(REFUSED, f"{NotTaken.__name__}: {error}"), reply_to=message), time.monotonic() - started)
        return True

    def _push_at_last(self, client: FleetHttpClient, node: FlowerNode, reply: Message, seconds: float) -> None:
        """Push an answer; once more, and once more, if a request is refused, whatever for: its task is not laid out a second time.

        Raises:
            NotTaken: the server did not store all of it.
        """
        for pause in AGAIN:
            try:
                return self._push(client, node, reply, seconds)
            except (httpx.HTTPStatusError, NotTaken) as error:
                log.debug("an answer was refused (%s); once more in %g s", _why(error), pause)
                time.sleep(pause)
        return self._push(client, node, reply, seconds)

    def _fetched(self, client: FleetHttpClient, node: FlowerNode, message: Message, tree: ObjectTree) -> Message | None:
        """The message with its content; None if that did not come in time or is no more."""
        run, name, until = message.metadata.run_id, message.metadata.message_id, time.monotonic() + PATIENCE
        contents: dict[str, bytes] = {}
        for part in iterate_object_tree(tree):
            while part.object_id not in contents:
                got = in_time(client.PullObject, PullObjectRequest(node=node, run_id=run, object_id=part.object_id))
                if got.object_available:
                    contents[part.object_id] = got.object_content
                elif not got.object_found or time.monotonic() > until:
                    log.warning("a message was withdrawn before it had arrived")
                    return None
                else:
                    time.sleep(QUICKEST)
        client.ConfirmMessageReceived(ConfirmMessageReceivedRequest(node=node, run_id=run, message_object_id=name))
        with no_object_id_recompute():
            whole = inflate_object_from_contents(name, contents)
        if not isinstance(whole, Message) or not isinstance(whole.content, RecordDict):
            raise TypeError(f"a {type(whole).__name__} is no message with content")
        whole.metadata.__dict__["_message_id"] = name
        return whole

    def _push(self, client: FleetHttpClient, node: FlowerNode, reply: Message, seconds: float) -> None:
        """Push an answer, or of one that was begun the parts that are missing.

        Raises:
            NotTaken: the server did not store a part of it. Of an error it needs none: the head says all.
        """
        with no_object_id_recompute():
            reply.metadata.__dict__["_message_id"] = reply.object_id
            tree, parts = get_object_tree(reply), get_all_nested_objects(reply)
            head = message_to_proto(remove_content_from_message(reply))
        request = PushMessagesRequest(node=node, messages_list=[head], message_object_trees=[tree], clientapp_runtime_list=[seconds])
        wanted = client.PushMessages(request)
        for number, name in enumerate(wanted.objects_to_push, 1):
            content, run = parts[name].deflate(), reply.metadata.run_id
            pushed = PushObjectRequest(node=node, run_id=run, object_id=name, object_content=content, session_id=wanted.session_id)
            if not in_time(client.PushObject, pushed).stored and not reply.has_error():
                missing = f"part {number} of {len(wanted.objects_to_push)}, of {len(content)} bytes"
                raise NotTaken(f"the server did not store {missing}, of the answer; what it says of it, such as a full disk, is in its log")

    def _insist_belonging(self, error: Exception) -> None:
        """Raise what no waiting will mend."""
        _insist_certified(self.address, error)
        if _not_activated(error):
            try:
                asked(self.address, self.credentials, STATUS)
            except Refused:
                raise
            except OSError:
                return

    def _tell_away(self, why: str) -> None:
        if why != self._away:
            self._away = why
            self.seen(f"the server at {self.address} is away ({why}); trying again")
