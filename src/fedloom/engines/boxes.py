"""How a message of Flower's carries a packed blob, and says for whom it is.

**One message** holds one packed blob (``wire.py``) as the bytes of an ``Array`` in an ``ArrayRecord``, and the client's id in a
``ConfigRecord``. An array rather than bytes in a ``ConfigRecord``, because Flower cuts arrays into chunks of 5 MiB, so a blob
may be of any size, while a config value travels as one protobuf message; it also costs fewer copies. The array names its own
serialisation, so nobody takes the blob for an array of numbers. Nothing is pickled.
"""

from __future__ import annotations

from fedloom.engines import quiet  # noqa: F401  first: it switches off what Flower must not do

# isort: split
from flwr.app import Array, ArrayRecord, RecordDict

from fedloom.wire import Blob, WireError

BLOB, REST, TO, CLIENT = "blob", "rest", "to", "client"
SERIALISATION = "fedloom.safetensors"
REFUSED = 100
"""Code of an error reply whose reason is a client's own :class:`~fedloom.messages.Failure`; Flower's codes are below 10."""


def boxed(blob: Blob) -> ArrayRecord:
    """A packed blob as a message carries it: its head, and its tensors, which are the same for all devices of a broadcast. Flower keeps
    equal parts of messages once."""
    cut = min(len(blob), 8 + int.from_bytes(blob[:8], "little"))
    ends = {BLOB: (0, cut), REST: (cut, len(blob))} if cut < len(blob) else {BLOB: (0, cut)}
    parts = {name: bytes(memoryview(blob)[begin:end]) for name, (begin, end) in ends.items()}
    return ArrayRecord({name: Array("uint8", (len(part),), SERIALISATION, part) for name, part in parts.items()})


def unboxed(content: RecordDict) -> bytes:
    """The packed blob of a message.

    Raises:
        WireError: there is none.
    """
    if BLOB not in content.array_records or BLOB not in content.array_records[BLOB]:
        raise WireError(f"a Flower message without a packed blob; its records are {sorted(content)}")
    record = content.array_records[BLOB]
    arrays = [record[name] for name in (BLOB, REST) if name in record]
    for array in arrays:
        if array.stype != SERIALISATION:
            raise WireError(f"a Flower message whose blob is {array.stype!r}; {SERIALISATION!r} is needed")
    return arrays[0].data if len(arrays) == 1 else b"".join(array.data for array in arrays)


def client_of(content: RecordDict) -> int:
    """The client that a message is for.

    Raises:
        WireError: it names none.
    """
    if TO not in content.config_records or CLIENT not in content.config_records[TO]:
        raise WireError(f"a Flower message that names no client; its records are {sorted(content)}")
    client = content.config_records[TO][CLIENT]
    if type(client) is not int:
        raise WireError(f"a Flower message whose client is a {type(client).__name__}; it must be an int")
    return client
