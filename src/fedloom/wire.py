"""What may cross between server and client, and how: one safetensors blob a message.

Tensors are stored as their bits (bfloat16 included), everything else as a JSON header in the blob's metadata. Nothing is ever
unpickled. Every message carries the experiment's digest, so that an answer to another experiment is refused. The local engine
packs and unpacks too: what deployment refuses, simulation refuses.

Blobs are written and read here and not by the safetensors library, which takes many times as long. They are the same to the byte, and
reading is as strict: tests hold both to the library.

This module does not know methods, engines or transports.
"""

from __future__ import annotations

import json
import math
import re
import struct
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import groupby
from operator import attrgetter, itemgetter
from reprlib import Repr
from typing import Any, NamedTuple

import numpy as np
import torch

from fedloom.messages import DIVERGED, Setting, Task, Tensors, Update
from fedloom.telling import Tellable

VERSION = 2
HEADER = "fedloom"
CODES = {
    torch.int64: "I64",
    torch.float64: "F64",
    torch.float32: "F32",
    torch.int32: "I32",
    torch.bfloat16: "BF16",
    torch.float16: "F16",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}
"""The format's names of what may cross, in the order in which it lays tensors out."""
DTYPES = tuple(CODES)
DTYPE_OF = {code: dtype for dtype, code in CODES.items()}
ORDER = {dtype: place for place, dtype in enumerate(CODES)}
IN_NUMPY = {dtype: torch.empty(0, dtype=torch.int16 if dtype == torch.bfloat16 else dtype).numpy().dtype for dtype in CODES}
"""The same bits in NumPy, which has no bfloat16."""
EXPONENT = {torch.bfloat16: np.uint16(0x7F80), torch.float16: np.uint16(0x7C00)}
"""The exponent bits of the 16-bit floats; all of them are set in NaN and infinity, and in nothing else."""
NONCE = re.compile("[0-9a-f]{32}")
"""What a task's nonce looks like."""
NO_NONCE = "0" * 32
"""How its absence travels: a message is of the same size with it and without."""
LONE_SURROGATE = re.compile("[\ud800-\udfff]")
"""What Python takes for a character and no encoding does."""
DIMENSIONS = 64
"""How many a tensor may have; NumPy has no more."""
ALIGNED = 8
"""Bytes of which the address of tensors is a multiple: the largest number that may cross has so many."""
HEAD = 2**24
"""Bytes that a message may have before its tensors: their names and places, settings, metrics. It takes some ten times as many to read."""
LONGEST = 1000
"""Characters of an error that are told: what arrives may be of any length, and its faults end in logs and results."""
COUNTED, WORKED = 2**53, 2.0**200
"""What numbers of examples, and of floating-point operations, stay below: sums of them are exact, and finite."""
SHORT = Repr()
SHORT.maxstring = SHORT.maxother = SHORT.maxlong = 200
"""Shows a value of any size and depth in little space."""


Blob = bytes | bytearray
"""A packed message. What is unpacked from a ``bytearray`` lies in it, so that the message stands once; from ``bytes``, which nobody may
write to, it is copied."""


class WireError(ValueError, Tellable):
    """A message that may not cross: what was wrong with it, and what would be right."""

    def __init__(self, said: str) -> None:
        super().__init__(said if len(said) <= LONGEST else f"{said[:LONGEST]} ...")


def checked_settings(settings: Mapping[str, Any]) -> dict[str, Setting]:
    """Settings as plain values: str, int, float, bool, or a list of one of str, int, float.

    Raises:
        WireError: any other value; None, dict and tuple of mixed kinds are refused as deployment refuses them.
    """
    if not isinstance(settings, Mapping):
        raise WireError(f"settings are {SHORT.repr(settings)}; they must map names to values")
    return {_name(name): _setting(name, value) for name, value in settings.items()}


def checked_tensors(tensors: Tensors, finite: bool) -> dict[str, torch.Tensor]:
    """Tensors ready for packing: on the CPU, contiguous, of a known dtype, without a graph.

    Raises:
        WireError: an unknown dtype, a value that is no dense tensor, or (with ``finite``) NaN or infinity.
    """
    ready = {}
    for name, tensor in tensors.items():
        if not isinstance(tensor, torch.Tensor):
            raise WireError(f"'{name}' is a {type(tensor).__name__}; only tensors and settings may cross")
        if tensor.layout is not torch.strided:
            raise WireError(f"tensor '{name}' has layout {tensor.layout}; send its dense form, tensor.to_dense()")
        if tensor.dtype not in CODES:
            raise WireError(f"tensor '{name}' has dtype {tensor.dtype}; the wire knows {[str(d) for d in DTYPES]}")
        plain = tensor.is_cpu and tensor.is_contiguous() and not tensor.requires_grad  # asking is quicker than doing nothing
        ready[_name(name)] = tensor if plain else tensor.detach().to("cpu").contiguous()
        if finite and tensor.is_floating_point() and not _finite(_bits(ready[name]).data, tensor.dtype):
            raise _not_finite(name)
    return ready


class Packer:
    """Packs the messages of one experiment, which ``digest`` names.

    Tensors that a message shares with the one before, name by name the same objects, are checked and laid out once: of a broadcast
    only the heads differ. Nobody may write into them between the two messages.
    """

    def __init__(self, digest: str) -> None:
        self.digest = digest
        self._last: dict[str, torch.Tensor] = {}
        self._places, self._data = _laid_out({})
        self._entries = _entries(self._places)

    def pack(self, message: Task | Update) -> bytearray:
        """One message as one blob, for one to unpack.

        Raises:
            WireError: something in the message may not cross.
        """
        head = _head(message, self.digest)
        if list(message.tensors) != list(self._last) or any(message.tensors[name] is not last for name, last in self._last.items()):
            self._places, self._data = _laid_out(message.tensors)
            self._entries, self._last = _entries(self._places), dict(message.tensors)
        header = _header(head, self._entries)
        blob = bytearray().join((struct.pack("<Q", len(header)), header, *self._data))
        if isinstance(message, Update):
            _insist_finite(memoryview(blob)[8 + len(header) :], self._places)
        return blob


def pack(message: Task | Update, digest: str) -> bytearray:
    """One message as one blob, for one to unpack. ``digest`` names the experiment it belongs to.

    Raises:
        WireError: something in the message may not cross.
    """
    return Packer(digest).pack(message)


def size_of(message: Task | Update, digest: str) -> int:
    """Bytes of the blob that :func:`pack` would make of the message, without making it: of tensors only shapes and dtypes are looked at.

    Raises:
        WireError: something in the message but its tensors may not cross.
    """
    places = _places({_name(name): tensor for name, tensor in message.tensors.items()})
    return 8 + len(_header(_head(message, digest), _entries(places))) + (places[-1].end if places else 0)


def unpack(blob: Blob, digest: str) -> Task | Update:
    """The message in a blob made by :func:`pack` for the same experiment. Its tensors are nobody else's, and a blob that can be written is
    theirs: they lie in it.

    Raises:
        WireError: not a message, another version, another experiment, or a value that may not cross.
    """
    header, entries, bits = _opened(blob)
    if header["version"] != VERSION:
        raise WireError(f"message of wire version {header['version']}; this is version {VERSION}: use the same release on both sides")
    if header["digest"] != digest:
        raise WireError(f"message of experiment {header['digest']!r}; this is experiment {digest!r}")
    kind, client = header["kind"], _number("client", _field(header, "client", int))
    if kind not in ("task", "update"):
        raise WireError(f"message of kind {kind!r}; there are 'task' and 'update'")
    nonce = _nonce(_field(header, "nonce", str)).replace(NO_NONCE, "")
    places = _found(entries, len(bits))
    tensors = _tensors(bits, places)
    if kind == "task":
        settings = checked_settings(_field(header, "settings", dict))
        return Task(_text("the operation", _field(header, "op", str)), client, tensors, settings, nonce)
    count, examples, flops = (_field(header, name, of) for name, of in (("num_examples", int), ("examples", int), ("flops", float)))
    _insist_finite(bits, places)
    _insist_countable(count, examples, flops)
    return Update(client, count, tensors, checked_settings(_field(header, "metrics", dict)), flops, examples, nonce)


def digest_of(blob: Blob) -> str:
    """The experiment that a message says it belongs to; nothing else of it is looked at.

    Raises:
        WireError: not a message.
    """
    return _field(_opened(blob)[0], "digest", str)


def op_of(blob: Blob) -> str:
    """The client operation that a packed task asks for; "" of an update.

    Raises:
        WireError: not a message.
    """
    header = _opened(blob)[0]
    return _field(header, "op", str) if header["kind"] == "task" else ""


class Place(NamedTuple):
    """Where a tensor's bits lie: ``begin`` and ``end`` in bytes from where the tensors begin."""

    name: str
    dtype: torch.dtype
    shape: Sequence[int]
    begin: int
    end: int


def _head(message: Task | Update, digest: str) -> str:
    """All of a message but its tensors, as JSON.

    Raises:
        WireError: something of it may not cross.
    """
    if isinstance(message, Task):
        body: dict[str, Any] = {
            "kind": "task",
            "op": _text("the operation", message.op),
            "settings": checked_settings(message.settings),
        }
    else:
        body = {
            "kind": "update",
            "num_examples": int(message.num_examples),
            "metrics": checked_settings(message.metrics),
            "flops": float(message.flops),
            "examples": int(message.examples),
        }
        _insist_countable(body["num_examples"], body["examples"], body["flops"])
    return json.dumps(
        {
            "version": VERSION,
            "digest": digest,
            "client": _number("client", int(message.client)),
            "nonce": _nonce(message.nonce or NO_NONCE),
            **body,
        },
        sort_keys=True,
    )


def _header(head: str, entries: bytes) -> bytes:
    """A blob's header as it lies there, filled up to a multiple of 8 bytes."""
    header = b'{"__metadata__":{"%b":%b}%b}' % (HEADER.encode(), json.dumps(head).encode(), entries)
    return header + b" " * (-len(header) % 8)


def _laid_out(tensors: Tensors) -> tuple[list[Place], list[memoryview]]:
    """Places, and the bits that belong there."""
    ready = checked_tensors(tensors, finite=False)
    places = _places(ready)
    return places, [_bits(ready[place.name]).data for place in places]


def _places(tensors: Tensors) -> list[Place]:
    """Places in the order of the safetensors library: by dtype, then by name."""
    places, begin = [], 0
    for name in sorted(tensors, key=lambda name: (ORDER[tensors[name].dtype], name)):
        tensor = tensors[name]
        end = begin + tensor.numel() * tensor.dtype.itemsize
        places.append(Place(name, tensor.dtype, tuple(tensor.shape), begin, end))
        begin = end
    return places


def _entries(places: Iterable[Place]) -> bytes:
    """The part of a blob's header that lists its tensors, each with a comma before it."""
    entries = {place.name: {"dtype": CODES[place.dtype], "shape": place.shape, "data_offsets": place[3:]} for place in places}
    encoded = json.dumps(entries, separators=(",", ":"), ensure_ascii=False).encode()
    return b"," + encoded[1:-1] if entries else b""


def _opened(blob: Blob) -> tuple[dict[str, Any], dict[str, Any], memoryview]:
    """(the message's header, the entries of its tensors, their bits)."""
    try:
        (length,) = struct.unpack("<Q", blob[:8])
        if not 2 <= length <= min(len(blob) - 8, HEAD):
            raise ValueError(f"a header of {length} bytes in a blob of {len(blob)}; it may have {HEAD}")
        entries = json.loads(blob[8 : 8 + length].decode())
        ((name, said),) = entries.pop("__metadata__").items()
        if name != HEADER:
            raise ValueError(f"metadata of '{name}'")
        header = json.loads(said)
        {header[key] for key in ("version", "digest", "client", "kind")}
        return header, entries, memoryview(blob)[8 + length :]
    except (struct.error, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise WireError(f"not a Fedloom message ({type(error).__name__}: {error})") from error


def _found(entries: Mapping[str, Any], size: int) -> list[Place]:
    """The places that a header lists, in their order. They must fill ``size`` bytes: no gap, no overlap, nothing left over.

    Raises:
        WireError: they do not, or an entry is not what the format wants.
    """
    try:
        listed = (Place(_name(n), DTYPE_OF[e["dtype"]], e["shape"], *e["data_offsets"]) for n, e in entries.items())
        places = sorted(listed, key=attrgetter("begin", "end"))
        numbers = [number for place in places for number in (place.begin, place.end, *place.shape)]
        if not set(map(type, numbers)) <= {int} or min(numbers, default=0) < 0 or not set(map(len, entries.values())) <= {3}:
            raise ValueError("an entry must be a dtype, a shape and two offsets, all of them whole numbers from 0 on")
        if not {type(place.shape) for place in places} <= {list} or max((len(place.shape) for place in places), default=0) > DIMENSIONS:
            raise ValueError(f"a shape must be a list of at most {DIMENSIONS} numbers")
        if max(numbers, default=0) >= 2**63:  # the product of many such numbers would take minutes
            raise ValueError("a number of an entry has more than 64 bits")
        at = 0
        for name, dtype, shape, begin, end in places:
            if begin != at or begin % dtype.itemsize or end - begin != math.prod(shape) * dtype.itemsize:
                raise ValueError(f"'{name}', {dtype} of shape {shape}, cannot lie from {begin} to {end} where {at} is next")
            at = end
        if at != size:
            raise ValueError(f"tensors end at {at}, the message at {size}")
        return places
    except (KeyError, TypeError, ValueError) as error:
        raise WireError(f"the message's tensors cannot be read: {type(error).__name__}: {error}") from error


def _tensors(bits: memoryview, places: Iterable[Place]) -> dict[str, torch.Tensor]:
    """The tensors in order of names: the file format keeps no order, and sums depend on it. They lie in ``bits`` where these can be written
    and begin where any dtype may, else in a copy.

    Raises:
        WireError: a shape that no tensor can have.
    """
    there = np.frombuffer(bits, np.uint8)
    own = there if there.flags.writeable and there.ctypes.data % ALIGNED == 0 else there.copy()
    try:
        arrays = {p.name: np.ndarray(p.shape, IN_NUMPY[p.dtype], own, p.begin) for p in places}
    except ValueError as error:
        raise WireError(f"the message's tensors cannot be read: {error}") from error
    tensors = {name: torch.from_numpy(array) for name, array in sorted(arrays.items(), key=itemgetter(0))}
    return tensors | {p.name: tensors[p.name].view(p.dtype) for p in places if p.dtype == torch.bfloat16}


def _bits(tensor: torch.Tensor) -> np.ndarray:
    """A tensor on the CPU as NumPy sees it; bfloat16, which NumPy has not, as integers of the same bits."""
    return (tensor.view(torch.int16) if tensor.dtype == torch.bfloat16 else tensor).numpy()


def _insist_finite(bits: memoryview, places: Iterable[Place]) -> None:
    """Look at all tensors of one dtype at once, and one by one only when something is wrong.

    Raises:
        WireError: a floating-point tensor holds NaN or infinity.
    """
    for dtype, together in groupby(places, attrgetter("dtype")):
        run = list(together)
        if dtype.is_floating_point and not _finite(bits[run[0].begin : run[-1].end], dtype):
            raise _not_finite(next(p.name for p in run if not _finite(bits[p.begin : p.end], dtype)))


def _not_finite(name: str) -> WireError:
    return WireError(f"tensor '{name}' holds NaN or infinity; {DIVERGED} (a lower lr is the usual mend)")


def _finite(bits: memoryview, dtype: torch.dtype) -> bool:
    """Whether no number of this dtype is NaN or infinite. Many times as fast as ``torch.isfinite``."""
    if dtype in EXPONENT:  # NumPy is slow at half precision, and has no bfloat16: compare the bits
        mask = EXPONENT[dtype]
        return all((part & mask).max() < mask for part in _blocks(np.frombuffer(bits, np.uint16)))
    return all(np.isfinite(part).all() for part in _blocks(np.frombuffer(bits, np.float32 if dtype == torch.float32 else np.float64)))


def _blocks(numbers: np.ndarray, size: int = 2**18) -> Iterator[np.ndarray]:
    """Parts that fit a cache: what is made of each is small."""
    return (numbers[at : at + size] for at in range(0, len(numbers), size))


def _field(header: Mapping[str, Any], name: str, kind: type[Any]) -> Any:
    """The header's field, which must be of exactly this kind."""
    if name not in header or type(header[name]) is not kind:
        found = SHORT.repr(header[name]) if name in header else "not there"
        raise WireError(f"the message's field '{name}' is {found}; it must be a {kind.__name__}")
    return header[name]


def _insist_countable(count: int, examples: int, flops: float) -> None:
    """Insist on numbers that sums over many updates, and means weighted by them, can be made of.

    Raises:
        WireError: they are negative, not finite, or beyond what any device has.
    """
    if not (0 <= count < COUNTED and 0 <= examples < COUNTED and 0 <= flops < WORKED):
        raise WireError(
            f"an update with num_examples {SHORT.repr(count)}, examples {SHORT.repr(examples)}, flops {flops}; "
            "none may be negative or not finite, nor beyond what can be added up"
        )


def _number(what: str, value: int) -> int:
    if not -(2**63) <= value < 2**63:
        raise WireError(f"{what} is an integer of {value.bit_length()} bits; 64 may cross")
    return value


def _nonce(value: str) -> str:
    if NONCE.fullmatch(value) is None:
        raise WireError(f"a message's nonce is {SHORT.repr(value)}; 32 hex digits are due")
    return value


def _text(what: str, value: str) -> str:
    if LONE_SURROGATE.search(value):
        raise WireError(f"{what} is {SHORT.repr(value)}, which no encoding can write; leave its lone surrogates out")
    return value


def _name(name: object) -> str:
    if not isinstance(name, str) or not name or name.startswith("__") or LONE_SURROGATE.search(name):
        raise WireError(f"{name!r} cannot name a tensor or setting; use a non-empty string without leading '__'")
    return name


def _setting(name: str, value: Any) -> Setting:
    if isinstance(value, list | tuple):
        items = [item if isinstance(item, list | tuple) else _setting(name, item) for item in value]  # nothing nests
        if len({type(item) for item in items}) <= 1 and all(isinstance(item, str | int | float) for item in items):
            return items  # type: ignore[return-value]
    if isinstance(value, int):
        return _number(f"setting '{name}'", value)
    if isinstance(value, str):
        return _text(f"setting '{name}'", value)
    if isinstance(value, float):
        if not math.isfinite(value):
            raise WireError(f"setting '{name}' is {value}; a setting must be finite; if it is a loss, {DIVERGED}")
        return value
    raise WireError(f"setting '{name}' is {SHORT.repr(value)}; a setting is a str, int, float or bool, or a list of one of these kinds")
