"""Valid things made a little wrong, by a seeded generator: bytes, JSON, packed messages, what Flower's records may hold."""

from __future__ import annotations

import copy
import json
import math
import struct
from collections.abc import Callable, Sequence
from random import Random
from typing import Any

Change = Callable[[Random, Any], Any]

NAMES: list[str] = [
    "",
    "x",
    "__metadata__",
    "__class__",
    "../x",
    "/etc/x",
    "..",
    "a/../../b",
    "\x00",
    "client-3-0123456789abcdef.safetensors\x00",
    "../client-3-0123456789abcdef.safetensors",
    "client-3-0123456789abcdef.safetensors/..",
    "client-03-0123456789abcdef.safetensors",
    "client-\u0663-0123456789abcdef.safetensors",
    "client--0-0123456789abcdef.safetensors",
    "client-" + "1" * 5000 + "-0123456789abcdef.safetensors",
    "client-" + "1" * 300 + "-0123456789abcdef.safetensors",
    "client-3-0123456789ABCDEF.safetensors",
    "client-3-0123456789abcdef.safetensors\n",
    "\ud800",
    "a\udfffb",
    "\u202e\u0000\uffff",
    "\U0001f600",
    "n" * 300,
    "n" * 70_000,
    "\u00e9" * 64,
    "~/x",
    "C:\\x",
    "nan",
    "0",
    "-1",
    "1e999",
]

NUMBERS: list[Any] = [
    0,
    1,
    -1,
    2,
    255,
    2**31,
    2**53,
    2**63 - 1,
    2**63,
    -(2**63),
    -(2**63) - 1,
    2**64,
    10**30,
    10**4000,
    0.0,
    -0.0,
    0.5,
    1e308,
    -1e308,
    5e-324,
    math.nan,
    math.inf,
    -math.inf,
    True,
    False,
]


def nested(depth: int, kind: str = "list") -> Any:
    """A value in this many lists, or objects."""
    value: Any = 0
    for _ in range(depth):
        value = [value] if kind == "list" else {"a": value}
    return value


def copied(value: Any) -> Any:
    """A copy; 0 of what is too deep for one."""
    try:
        return copy.deepcopy(value)
    except RecursionError:
        return 0


def dumped(value: Any, **how: Any) -> str:
    """JSON; of what is too deep to be written, brackets."""
    try:
        return json.dumps(value, **how)
    except RecursionError:
        return "[" * 5000 + "]" * 5000


def odd(rng: Random) -> Any:
    """A JSON value that nobody expects there."""
    kind = rng.randrange(9)
    if kind < 3:
        return rng.choice(NUMBERS)
    if kind < 5:
        return rng.choice(NAMES)
    if kind == 5:
        return nested(rng.choice([1, 2, 30, 300, 500, 800, 950]), rng.choice(["list", "object"]))
    if kind == 6:
        return [rng.choice(NUMBERS) for _ in range(rng.choice([0, 1, 2, 65, 300]))]
    if kind == 7:
        return rng.choice([None, [], {}, [[]], {"a": None}, [None], ["a", 1], [1, 0.5]])
    return {rng.choice(NAMES): rng.choice(NUMBERS) for _ in range(rng.randrange(4))}


def places(value: Any, limit: int = 400) -> list[tuple[Any, Any]]:
    """(container, key) of every value in a JSON value."""
    found: list[tuple[Any, Any]] = []
    waiting = [value]
    while waiting and len(found) < limit:
        here = waiting.pop()
        items = here.items() if isinstance(here, dict) else enumerate(here) if isinstance(here, list) else ()
        for key, one in items:
            found.append((here, key))
            waiting.append(one)
    return found


def changed_json(rng: Random, value: Any) -> Any:
    """A copy with one to three values replaced, taken away, renamed, doubled or exchanged."""
    value = copy.deepcopy(value)
    for _ in range(rng.choice([1, 1, 1, 2, 3])):
        found = places(value)
        if not found or rng.random() < 0.03:
            value = odd(rng)
            continue
        here, key = rng.choice(found)
        kind = rng.randrange(8)
        if kind == 0:
            del here[key]
        elif kind == 1 and isinstance(here, dict):
            here[rng.choice(NAMES)] = here.pop(key)
        elif kind == 2 and isinstance(here, dict):
            here[rng.choice(NAMES)] = odd(rng)
        elif kind == 2:
            here.insert(key, odd(rng))
        elif kind == 3:
            there, other = rng.choice(found)
            if key in (here if isinstance(here, dict) else range(len(here))):
                here[key] = copied(there[other]) if other in (there if isinstance(there, dict) else range(len(there))) else 0
        elif kind == 4 and type(here[key]) is int:
            here[key] += rng.choice([-8, -4, -1, 1, 4, 8, 2**32, 2**64])
        elif kind == 5 and isinstance(here[key], str):
            here[key] = changed_text(rng, here[key])
        else:
            here[key] = odd(rng)
    return value


def changed_text(rng: Random, text: str) -> str:
    """Text with characters changed, cut, doubled, or others put in."""
    at, kind = rng.randrange(len(text) + 1), rng.randrange(6)
    if kind == 0:
        return text[:at]
    if kind == 1:
        return text[:at] + rng.choice(NAMES) + text[at:]
    if kind == 2:
        return text[:at] + chr(rng.choice([0, 10, 47, 46, 0x663, 0xD800, 0xDFFF, 0xFEFF, 0x1F600])) + text[at + 1 :]
    if kind == 3:
        return text * rng.choice([2, 3, 100])
    if kind == 4:
        return text.upper() if rng.random() < 0.5 else text[::-1]
    return rng.choice(NAMES)


def written(rng: Random, value: Any) -> bytes:
    """JSON as bytes, in one of several ways, which may be none that UTF-8 allows."""
    text = dumped(value, ensure_ascii=rng.random() < 0.5, separators=rng.choice([(",", ":"), (", ", ": ")]))
    return text.encode("utf-8", "surrogatepass")


def changed_bytes(rng: Random, blob: bytes, others: Sequence[bytes]) -> bytes:
    """Bits flipped, a part cut out, doubled, moved or taken from another, the length of the header tampered with."""
    data = bytearray(blob)
    for _ in range(rng.choice([1, 1, 2, 4])):
        size, kind = len(data), rng.randrange(9)
        at, to = sorted((rng.randrange(size + 1), rng.randrange(size + 1)))
        if kind <= 1 and size:
            for _ in range(rng.choice([1, 2, 8])):
                data[rng.randrange(size)] ^= 1 << rng.randrange(8)
        elif kind == 2:
            del data[at:]
        elif kind == 3:
            del data[at:to]
        elif kind == 4:
            data[at:at] = data[at:to]
        elif kind == 5:
            other = rng.choice(others)
            data[at:] = other[rng.randrange(len(other) + 1) :]
        elif kind == 6:
            data[:8] = struct.pack(
                "<Q", rng.choice([0, 1, 2, 8, size, size - 8, size - 9, 2**31, 2**63, 2**64 - 1, rng.randrange(2**16)]) % 2**64
            )
        elif kind == 7:
            data[at:at] = rng.choice([b"\x00", b"\xff", b"[", b"{", b'"', b"\xed\xa0\x80", b"NaN", b"1e999", b"[" * 2000, b"9" * 5000])
        else:
            data += bytes(rng.choice([1, 4, 8, 4096]))
    return bytes(data)


def opened(blob: bytes) -> tuple[Any, Any, bytes]:
    """(entries without the message's header, the message's header, the tensors' bytes) of a packed message."""
    (length,) = struct.unpack("<Q", blob[:8])
    entries = json.loads(blob[8 : 8 + length])
    head = json.loads(entries.pop("__metadata__")["fedloom"])
    return entries, head, blob[8 + length :]


def closed(rng: Random, entries: Any, head: Any, bits: bytes) -> bytes:
    """The packed message of these parts, whatever they are."""
    metadata: Any = {"fedloom": dumped(head)}
    if rng.random() < 0.03:
        metadata = changed_json(rng, metadata)
    whole = {"__metadata__": metadata, **entries} if isinstance(entries, dict) else entries
    header = written(rng, whole)
    header += b" " * (-len(header) % 8)
    return struct.pack("<Q", len(header)) + header + bits


PATTERNS = [struct.pack("<f", math.nan), struct.pack("<f", math.inf), struct.pack("<d", -math.inf), b"\x80\x7f", b"\x00\x7c", b"\xff" * 16]


def changed_message(rng: Random, blob: bytes, others: Sequence[bytes], digests: Sequence[str] = ()) -> bytes:
    """A packed message with another header, other entries, other bits, or just other bytes."""
    kind = rng.randrange(9)
    if kind == 8:
        return blob
    if kind <= 1:
        return changed_bytes(rng, blob, others)
    entries, head, bits = opened(blob)
    if kind <= 3:
        head = changed_json(rng, head)
    elif kind <= 5:
        entries = changed_json(rng, entries)
    elif kind == 6:
        data, pattern = bytearray(bits), rng.choice(PATTERNS)
        at = rng.randrange(max(1, len(data) // 4)) * 4
        data[at : at + len(pattern)] = pattern
        bits = bytes(data[: len(bits)])
    else:  # as it was, or of another experiment, or with tensors that are laid out otherwise
        head["digest"] = rng.choice([head["digest"], "f" * 16, "", "../x", *digests])
        names = list(entries)
        rng.shuffle(names)
        entries = {name: entries[name] for name in names}
        if names and rng.random() < 0.5:
            begin, end = entries[names[0]]["data_offsets"]
            entries[names[0]]["data_offsets"] = rng.choice([[begin + 4, end + 4], [end, begin], [begin, end + 4], [0, end], [begin, begin]])
    return closed(rng, entries, head, bits)


def config_value(rng: Random) -> Any:
    """What a record of Flower's may hold."""
    kind = rng.randrange(8)
    if kind == 0:
        return rng.choice([0, 1, -1, 3, 2**63 - 1, -(2**63)])
    if kind == 1:
        return rng.choice([0.0, math.nan, math.inf, 3.0, 1e308])
    if kind == 2:
        return rng.random() < 0.5
    if kind == 3:
        return rng.choice([b"", b"\x00\xff", b"client-3-0123456789abcdef.safetensors"])
    if kind == 4:
        return rng.choice([[1, 2], ["a", "b"], [0.5], [b"x"], [True]])
    return rng.choice([name for name in NAMES if not any("\ud800" <= c <= "\udfff" for c in name)])
