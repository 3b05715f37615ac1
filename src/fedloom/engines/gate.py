"""Who and how much comes in at the server's end of a federation: what stands before Flower's Fleet API.

**Size**: a request of more bytes than :data:`LARGEST`, or of what carries no part :data:`MOST` or :data:`SMALL`, is refused before it is
read. Flower cuts arrays into chunks of 5 MiB, so a message may still be of any size.

**Keys**: of a request that names no key of the federation nothing is read, nor of a large one that is not signed with it. But who begins
(:data:`BEGINNINGS`) is heard by Flower, small as it is, and told that its key is unknown.

**Turns**: requests that carry parts of messages, in or out, go on :data:`AT_ONCE` at a time. Each is in memory several times over, as body,
as protobuf and as content, and fifty devices answer at the same moment; nobody gains by all of them being half read. After :data:`TURN`
seconds a request does not count any more: a device whose network has died keeps nobody waiting.

**Names**: a node pushes in its own name only.
"""

from __future__ import annotations

import asyncio
from base64 import b64decode
from collections.abc import Callable
from datetime import datetime

from fedloom.engines import quiet  # noqa: F401  first: it switches off what Flower must not do

# isort: split
from fastapi import HTTPException
from flwr.common.constant import TIMESTAMP_HEADER, TIMESTAMP_TOLERANCE
from flwr.proto.fleet_pb2 import PushMessagesRequest
from flwr.supercore.constant import FLEET_HTTP_PUBLIC_KEY_HEADER, FLEET_HTTP_SIGNATURE_HEADER
from flwr.supercore.date import now
from flwr.supercore.primitives.asymmetric import bytes_to_public_key, verify_signature
from starlette.middleware.base import RequestResponseEndpoint
from starlette.requests import Request
from starlette.responses import Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

LARGEST = 16 * 2**20
"""Bytes of one request: three of the chunks into which Flower cuts arrays."""

MOST = 2**20
"""Bytes of one that carries a message's head and the names of its parts: of those, 64 each for 5 MiB."""

SMALL = 2**16
"""Bytes of any other."""

FLEET = "/v1/fleet/"
"""Before the paths of everything that devices post."""

HEADS = FLEET + "push-messages"
"""Where messages' heads come in."""

PARTS = (FLEET + "push-object", FLEET + "pull-object")
"""Where parts of messages come in and go out."""

BEGINNINGS = (FLEET + "activate-node", FLEET + "register-node")
"""What may be asked with a key that the federation does not know; Flower has an answer to it."""

AT_ONCE = 4
"""Parts of messages that are on their way at a time."""

TURN = 10.0
"""Seconds after which a request does not count among those any more."""

PIECE = 2**16
"""Bytes of a part that are encrypted at once."""

SIGN = "sign the request with a key of this federation"
"""What is said to whoever did not."""


class Bounded:
    """Refuses a request that says it is larger than what it asks may be, or that does not say."""

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Let the request pass, or answer 413."""
        asks = scope["type"] == "http" and scope["method"] != "GET"  # what is got has no body, or one that nobody reads
        said = dict(scope["headers"]).get(b"content-length", b"") if asks else b"0"
        most = {PARTS[0]: LARGEST, HEADS: MOST}.get(scope["path"], SMALL) if asks else 0
        if said.isdigit() and len(said) < 16 and int(said) <= most:
            await self.app(scope, receive, send)
        else:
            await refuse(send, 413)


class Known:
    """Lets those pass who have a key of the federation. ``known``: whether a public key is one."""

    def __init__(self, app: ASGIApp, known: Callable[[bytes], bool]) -> None:
        self.app, self.known = app, known

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Let the request pass, or answer 401; where nothing is, 404."""
        if scope["type"] != "http" or scope["method"] == "GET" or scope["path"] in BEGINNINGS:
            await self.app(scope, receive, send)
        elif not scope["path"].startswith(FLEET):
            await refuse(send, 404)
        elif self._belongs(Request(scope)):
            await self.app(scope, receive, send)
        else:
            await refuse(send, 401)

    def _belongs(self, request: Request) -> bool:
        """Whether the request names a key of the federation, and whatever is large is signed with it. The rest Flower looks at, which takes
        as long as everything else that is done for a device that asks whether there is something to do."""
        large = request.url.path in (*PARTS, HEADS)
        try:
            return self.known(named(request)) and (not large or bool(authenticated(request)))
        except HTTPException:
            return False


class Turns:
    """Lets parts of messages pass a few at a time."""

    def __init__(self, app: ASGIApp) -> None:
        self.app = app
        self._turns, self._under_way = asyncio.Semaphore(AT_ONCE), set[object]()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Let the request pass, at once or in its turn."""
        if scope["type"] != "http" or scope["path"] not in PARTS:
            await self.app(scope, receive, send)
            return
        await self._turns.acquire()
        turn = object()
        self._under_way.add(turn)
        late = asyncio.get_running_loop().call_later(TURN, self._end, turn)
        try:
            await self.app(scope, receive, lambda message: in_pieces(message, send))
        finally:
            scope.get("state", {}).pop("protobuf_request", None)  # the server keeps a request's scope until the next of its connection
            late.cancel()
            self._end(turn)

    def _end(self, turn: object) -> None:
        if turn in self._under_way:
            self._under_way.remove(turn)
            self._turns.release()


async def in_pieces(message: Message, send: Send) -> None:
    """Send a body by the :data:`PIECE`: what is encrypted at once is in memory once more, and the room for it stays with the connection."""
    body = memoryview(message.get("body", b""))
    while len(body) > PIECE:
        await send({**message, "body": bytes(body[:PIECE]), "more_body": True})
        body = body[PIECE:]
    await send({**message, "body": bytes(body)} if message["type"] == "http.response.body" else message)


async def refuse(send: Send, status: int) -> None:
    """Answer with this status, and nothing else."""
    await send({"type": "http.response.start", "status": status, "headers": []})
    await send({"type": "http.response.body", "body": b""})


async def in_own_name(request: Request, answer: RequestResponseEndpoint) -> Response:
    """Let a node push in its own name only: Flower compares the request's node with the key, and not the messages' with the request's."""
    asked = request.scope.get("state", {}).get("protobuf_request")
    if isinstance(asked, PushMessagesRequest) and not only_own(asked):
        raise HTTPException(401, "a node pushes in its own name only")
    return await answer(request)


def only_own(pushed: PushMessagesRequest) -> bool:
    """Whether the messages are of the node that pushes them."""
    return all(message.metadata.src_node_id == pushed.node.node_id for message in pushed.messages_list)


def authenticated(request: Request) -> bytes:
    """The public key with whose private half the request was signed a moment ago, in the form of Flower's node authentication.

    Raises:
        HTTPException: it was not.
    """
    try:
        key = named(request)
        signature = b64decode(request.headers[FLEET_HTTP_SIGNATURE_HEADER], validate=True)
        stamp = request.headers[TIMESTAMP_HEADER]
        age = abs((now() - datetime.fromisoformat(stamp)).total_seconds())
        if age > TIMESTAMP_TOLERANCE or not verify_signature(bytes_to_public_key(key), stamp.encode("ascii"), signature):
            raise ValueError("an old signature, or none")
    except Exception as error:  # a library's own among them: of keys of a kind that nobody knows
        raise HTTPException(401, SIGN) from error
    return key


def named(request: Request) -> bytes:
    """The public key that the request names, signed or not.

    Raises:
        HTTPException: none.
    """
    try:
        return b64decode(request.headers[FLEET_HTTP_PUBLIC_KEY_HEADER], validate=True)
    except (KeyError, ValueError) as error:
        raise HTTPException(401, SIGN) from error
