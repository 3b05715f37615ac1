"""What the server and the devices of a real federation say to each other beside packed blobs (``boxes.py``).

A greeting (Flower's query) tells a device the experiment, and it says what it found. A task (Flower's train) names the device's state to
start from and the one that the server's checkpoint has; its answer names the state after it. Whatever comes from the other side is read
here, and refused where it is not what is due.
"""

from __future__ import annotations

import json
from typing import Any, cast

from fedloom.client.store import FILE
from fedloom.engines.boxes import TO  # first: it switches off what Flower must not do

# isort: split
from flwr.app import RecordDict

from fedloom.wire import SHORT, WireError

STATE, COMMITTED, GREETING, TOLD = "state", "committed", "greeting", "told"
UNGREETED = 101
"""Code of an error reply from a device that does not know this experiment (yet, or any more)."""

TELLS = 2**16
"""Characters that a device may tell of itself."""


def head_of(content: RecordDict) -> dict[str, Any]:
    """What a message says beside its blob; nothing if it says nothing."""
    return dict(content.config_records[TO]) if TO in content.config_records else {}


def state_of(content: RecordDict, client: int) -> str:
    """The name of the device's state after what it was asked, from its answer; "": it keeps none.

    Raises:
        WireError: it names none, or another device's.
    """
    record = head_of(content)
    name = record.get(STATE)
    found = FILE.fullmatch(name) if isinstance(name, str) else None
    if name != "" and (found is None or int(found[1]) != client):
        raise WireError(f"a reply whose state is named {SHORT.repr(name)}; a state of client {client} is due, or none")
    return cast(str, name)


def told_of(content: RecordDict) -> dict[str, Any]:
    """What a device says of itself, from its answer to a greeting.

    Raises:
        WireError: it says nothing that can be read, or more than :data:`TELLS` characters.
    """
    record = head_of(content)
    text = record.get(TOLD)
    try:
        told = json.loads(text) if isinstance(text, str) and len(text) < TELLS else None
    except (ValueError, RecursionError):
        told = None
    if not isinstance(told, dict):
        raise WireError("a device that was greeted and does not say what it is")
    return told
