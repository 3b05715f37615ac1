"""What stands before the Fleet API: parts of messages pass a few at a time, signed ones only, and nobody keeps others waiting."""

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
    from fedloom.engines.gate import AT_ONCE, PARTS, PIECE, Turns, in_pieces

pytestmark = pytest.mark.flower

PRIVATE, PUBLIC = generate_key_pairs()
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


async def asked(turns: Turns, scope: dict[str, Any]) -> Sent:
    """What is sent in answer."""
    sent: Sent = []

    async def send(message: Any) -> None:
        sent.append(dict(message))

    await turns(scope, never, send)
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


async def settled() -> None:
    for _ in range(20):
        await asyncio.sleep(0)


@pytest.mark.parametrize("path", PARTS)
def test_parts_pass_a_few_at_a_time_and_everything_else_at_once(path: str) -> None:
    async def play() -> None:
        app = Counted()
        turns = Turns(app, lambda key: True)
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
        turns = Turns(app, lambda key: True)
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
        turns = Turns(fail, lambda key: True)
        for _ in range(2 * AT_ONCE):
            with pytest.raises(OSError, match="gone"):
                await asyncio.wait_for(asked(turns, request(PARTS[1])), 5)

    asyncio.run(play())


@pytest.mark.parametrize(("signed", "known"), [(False, True), (True, False)])
def test_strangers_get_no_turn_and_nothing_of_theirs_is_read(signed: bool, known: bool) -> None:
    async def play() -> None:
        turns = Turns(Counted(), lambda key: known and key == public_key_to_bytes(PUBLIC))
        assert [sent.get("status") for sent in await asyncio.wait_for(asked(turns, request(PARTS[0], signed)), 5)] == [401, None]

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
