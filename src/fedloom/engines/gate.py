"""Who and how much comes in at the server's end of a federation: what stands before Flower's Fleet API.

**Size**: a request of more than :data:`LARGEST` bytes is refused before it is read. Flower cuts arrays into chunks of 5 MiB, so a message
may still be of any size.

**Turns**: requests that carry parts of messages, in or out, go on :data:`AT_ONCE` at a time. Each is in memory several times over, as body,
as protobuf and as content, and fifty devices answer at the same moment; nobody gains by all of them being half read. Only who has signed
with a key of the federation gets a turn, and after :data:`TURN` seconds a request does not count any more: a device whose network has
died keeps nobody waiting.

**Names**: a node pushes in its own name only.
"""

from __future__ import annotations

import asyncio
from base64 import b64decode
from collections.abc import Callable
from datetime import datetime

from fedloom.engines.flower import SERIALISATION  # noqa: F401  first: it switches off what Flower must not do

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

PARTS = ("/v1/fleet/push-object", "/v1/fleet/pull-object")
"""Where parts of messages come in and go out."""

AT_ONCE = 4
"""Parts of messages that are on their way at a time."""

TURN = 10.0
"""Seconds after which a request does not count among those any more."""

PIECE = 2**16
"""Bytes of a part that are encrypted at once."""


class Bounded:
    """Refuses a request that says it is larger than :data:`LARGEST`, or that does not say."""

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Let the request pass, or answer 413."""
        asks = scope["type"] == "http" and scope["method"] != "GET"  # what is got has no body, or one that nobody reads
        said = dict(scope["headers"]).get(b"content-length", b"") if asks else b"0"
        if said.isdigit() and len(said) < 16 and int(said) <= LARGEST:
            await self.app(scope, receive, send)
        else:
            await refuse(send, 413)


class Turns:
    """Lets parts of messages pass a few at a time. ``known``: whether a public key is one of the federation's."""

    def __init__(self, app: ASGIApp, known: Callable[[bytes], bool]) -> None:
        self.app, self.known = app, known
        self._turns, self._under_way = asyncio.Semaphore(AT_ONCE), set[object]()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Let the request pass, at once or in its turn, or answer 401."""
        if scope["type"] != "http" or scope["path"] not in PARTS:
            await self.app(scope, receive, send)
            return
        try:
            known = self.known(authenticated(Request(scope)))
        except HTTPException:
            known = False
        if not known:
            await refuse(send, 401)
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
        key = b64decode(request.headers[FLEET_HTTP_PUBLIC_KEY_HEADER], validate=True)
        signature = b64decode(request.headers[FLEET_HTTP_SIGNATURE_HEADER], validate=True)
        stamp = request.headers[TIMESTAMP_HEADER]
        age = abs((now() - datetime.fromisoformat(stamp)).total_seconds())
        if age > TIMESTAMP_TOLERANCE or not verify_signature(bytes_to_public_key(key), stamp.encode("ascii"), signature):
            raise ValueError("an old signature, or none")
    except Exception as error:  # a library's own among them: of keys of a kind that nobody knows
        raise HTTPException(401, "sign the request with a key of this federation") from error
    return key
