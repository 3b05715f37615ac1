"""What stands before the Fleet API: of strangers nothing is read, parts of messages pass a few at a time, and nobody makes others wait."""

from __future__ import annotations

import asyncio
import warnings
from base64 import b64encode
from collections.abc import Awaitable, Callable
from typing import Any

import pytest

pytest.importorskip("flwr", reason="the extra 'flower' is not installed: pip install 'fedloom[flower]'")

with warnings.catch_warnings():  # libraries that Flower imports use deprecated names of their own
    warnings.simplefilter("ignore", DeprecationWarning)
    from flwr.common.constant import TIMESTAMP_HEADER
    from flwr.supercore.constant import FLEET_HTTP_PUBLIC_KEY_HEADER, FLEET_HTTP_SIGNATURE_HEADER
    from flwr.supercore.date import now
    from flwr.supercore.primitives.asymmetric import generate_key_pairs, public_key_to_bytes, sign_message

    from fedloom.engines import gate
    from fedloom.engines.gate import AT_ONCE, BEGINNINGS, LARGEST, MOST, PARTS, PIECE, SMALL, Bounded, Known, Turns, in_pieces

pytestmark = pytest.mark.flower

PRIVATE, PUBLIC = generate_key_pairs()
SIGNATURE = FLEET_HTTP_SIGNATURE_HEADER.lower().encode()
Sent = list[dict[str, Any]]


def request(path: str, signed: bool = True) -> dict[str, Any]:
    """The scope of a request."""
    stamp = now().isoformat()
    own = {
        FLEET_HTTP_PUBLIC_KEY_HEADER: b64encode(public_key_to_bytes(PUBLIC)),
        TIMESTAMP_HEADER: stamp.encode(),
        FLEET_HTTP_SIGNATURE_HEADER: b64encode(sign_message(PRIVATE, stamp.encode())),
    }
    headers = [(name.lower().encode(), value) for name, value in own.items()] if signed else []
    return {"type": "http", "method": "POST", "path": path, "headers": headers, "query_string": b""}


async def never() -> dict[str, Any]:
    raise AssertionError("nothing of this request is to be read")


def own(key: bytes) -> bool:
    """Whether this is the federation's key."""
    return key == public_key_to_bytes(PUBLIC)


async def asked(gate: Bounded | Known | Turns, scope: dict[str, Any]) -> Sent:
    """What is sent in answer."""
    sent: Sent = []

    async def send(message: Any) -> None:
        sent.append(dict(message))

    await gate(scope, never, send)
    return sent


class Counted:
    """An app that counts how many requests are in it, and stays until it is let go."""

    def __init__(self) -> None:
        self.now, self.most, self.go = 0, 0, asyncio.Event()

    async def __call__(self, scope: Any, receive: Any, send: Callable[[Any], Awaitable[None]]) -> None:
        self.now += 1
        self.most = max(self.most, self.now)
        scope.setdefault("state", {})["protobuf_request"] = "large"
        await self.go.wait()
        self.now -= 1
        await send({"type": "http.response.start", "status": 200, "headers": []})


class Reached:
    """An app that answers without reading anything."""

    def __init__(self) -> None:
        self.reached = 0

    async def __call__(self, scope: Any, receive: Any, send: Callable[[Any], Awaitable[None]]) -> None:
        self.reached += 1
        await send({"type": "http.response.start", "status": 200, "headers": []})


class Never:
    """An app that nobody is to reach."""

    async def __call__(self, scope: Any, receive: Any, send: Callable[[Any], Awaitable[None]]) -> None:
        raise AssertionError("nothing of this request is to be read")


async def settled() -> None:
    for _ in range(20):
        await asyncio.sleep(0)


@pytest.mark.parametrize("path", PARTS)
def test_parts_pass_a_few_at_a_time_and_everything_else_at_once(path: str) -> None:
    async def play() -> None:
        app = Counted()
        turns = Turns(app)
        scopes = [request(path) for _ in range(3 * AT_ONCE)]
        calls = [asyncio.ensure_future(asked(turns, scope)) for scope in scopes]
        await settled()
        assert app.now == AT_ONCE
        quick = asyncio.ensure_future(asked(turns, request("/v1/fleet/send-node-heartbeat")))
        await settled()
        assert app.now == AT_ONCE + 1, "who carries no parts does not wait for those who do"
        app.go.set()
        answers = await asyncio.gather(quick, *calls)
        assert app.most == AT_ONCE + 1 and all(sent[0]["status"] == 200 for sent in answers)
        assert not any(scope["state"] for scope in scopes), "a connection keeps its last request's scope"

    asyncio.run(play())


def test_whoever_takes_too_long_keeps_nobody_waiting(monkeypatch: pytest.MonkeyPatch) -> None:
    async def play() -> None:
        app = Counted()
        turns = Turns(app)
        calls = [asyncio.ensure_future(asked(turns, request(PARTS[0]))) for _ in range(2 * AT_ONCE)]
        await settled()
        assert app.now == AT_ONCE
        async with asyncio.timeout(60):  # their turns end, and they themselves do not
            while app.now < 2 * AT_ONCE:
                await asyncio.sleep(0.01)
        monkeypatch.setattr(gate, "TURN", 600.0)  # so that no turn of those that follow ends by itself
        app.go.set()
        await asyncio.gather(*calls)
        app.go.clear()
        calls = [asyncio.ensure_future(asked(turns, request(PARTS[0]))) for _ in range(2 * AT_ONCE)]
        await settled()
        assert app.now == AT_ONCE, "a turn that has ended does not end again"
        app.go.set()
        await asyncio.gather(*calls)

    monkeypatch.setattr(gate, "TURN", 0.5)
    asyncio.run(play())


def test_a_request_that_fails_ends_its_turn() -> None:
    async def fail(scope: Any, receive: Any, send: Any) -> None:
        raise OSError("gone")

    async def play() -> None:
        turns = Turns(fail)
        for _ in range(2 * AT_ONCE):
            with pytest.raises(OSError, match="gone"):
                await asyncio.wait_for(asked(turns, request(PARTS[1])), 5)

    asyncio.run(play())


PULL, BEAT, HEADS = "/v1/fleet/pull-messages", "/v1/fleet/send-node-heartbeat", "/v1/fleet/push-messages"


@pytest.mark.parametrize("path", [*PARTS, HEADS, PULL, BEAT, "/v1/fleet/get-fab", "/v1/fleet/whatever"])
def test_of_strangers_nothing_is_read(path: str) -> None:
    async def play() -> None:
        strangers = Known(Never(), lambda key: False)
        assert [sent.get("status") for sent in await asked(strangers, request(path))] == [401, None]
        assert [sent.get("status") for sent in await asked(Known(Never(), own), request(path, signed=False))] == [401, None]

    asyncio.run(play())


@pytest.mark.parametrize(("path", "reads"), [(PARTS[0], False), (PARTS[1], False), (HEADS, False), (PULL, True), (BEAT, True)])
def test_what_may_be_large_must_be_signed_before_it_is_read_and_the_rest_when_it_is(path: str, reads: bool) -> None:
    """Flower looks at the signature of everything."""

    async def play() -> None:
        scope = request(path)
        scope["headers"] = [(name, b64encode(b"forged") if name == SIGNATURE else value) for name, value in scope["headers"]]
        app = Reached()
        assert (await asked(Known(app, own), scope))[0]["status"] == (200 if reads else 401)
        assert [sent.get("status") for sent in await asked(Known(app, own), request(path))] == [200]
        assert app.reached == 1 + reads

    asyncio.run(play())


@pytest.mark.parametrize("path", BEGINNINGS)
def test_flower_answers_whoever_begins(path: str) -> None:
    async def play() -> None:
        for signed in (True, False):
            assert [sent.get("status") for sent in await asked(Known(Reached(), lambda key: False), request(path, signed))] == [200]

    asyncio.run(play())


@pytest.mark.parametrize("path", ["/v1/control/start-run", "/v1/runtime/push-object", "/", "/v1/fedloom/status"])
def test_nothing_is_posted_anywhere_else(path: str) -> None:
    async def play() -> None:
        assert [sent.get("status") for sent in await asked(Known(Never(), own), request(path))] == [404, None]

    asyncio.run(play())


@pytest.mark.parametrize(
    ("path", "most"), [(PARTS[0], LARGEST), (PARTS[1], SMALL), (HEADS, MOST), (PULL, SMALL), (BEAT, SMALL), (BEGINNINGS[0], SMALL)]
)
def test_a_request_is_as_large_as_what_it_asks_may_be(path: str, most: int) -> None:
    async def play() -> None:
        for size, due in ((str(most), [200]), (str(most + 1), [413, None]), ("-1", [413, None]), ("9" * 20, [413, None])):
            scope = request(path)
            scope["headers"].append((b"content-length", size.encode()))
            assert [sent.get("status") for sent in await asked(Bounded(Reached()), scope)] == due
        assert [sent.get("status") for sent in await asked(Bounded(Never()), request(path))] == [413, None], "it does not say"
        assert [sent.get("status") for sent in await asked(Bounded(Reached()), {**request(path), "method": "GET"})] == [200]

    asyncio.run(play())


@pytest.mark.parametrize("size", [0, 1, PIECE, PIECE + 1, 3 * PIECE, 3 * PIECE + 5])
@pytest.mark.parametrize("more", [True, False])
def test_a_body_goes_in_pieces(size: int, more: bool) -> None:
    async def play() -> None:
        sent: Sent = []

        async def send(message: Any) -> None:
            sent.append(dict(message))

        body = bytes(k % 251 for k in range(size))
        await in_pieces({"type": "http.response.start", "status": 200}, send)
        await in_pieces({"type": "http.response.body", "body": body, "more_body": more}, send)
        start, *pieces = sent
        assert start == {"type": "http.response.start", "status": 200}
        assert b"".join(piece["body"] for piece in pieces) == body and max(len(piece["body"]) for piece in pieces) <= PIECE
        assert [piece["more_body"] for piece in pieces] == [True] * (len(pieces) - 1) + [more]

    asyncio.run(play())
