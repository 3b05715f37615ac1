"""The last prediction that a device was asked for, kept in the folder of its states, so that whoever it belongs to can have the model that
made it: what the server sent lies in no other file of the device.

One file, replaced in one step: the sha256 of all that follows, a line of JSON, and the task as it came. It names the state that the device
predicted with, which the device keeps beside it.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import Any

from fedloom.client.store import StoreError
from fedloom.folders import replacing
from fedloom.wire import Blob

PREDICTS = "predict"
"""The client operation that is a prediction."""

ASKED = "asked.task"
"""The file's name."""


@dataclass(frozen=True)
class Asked:
    """A prediction that was asked of device ``client``, with the ``state`` that it started from (""; none), as a packed task; and the order
    by which its process had been started (JSON)."""

    client: int
    state: str
    order: Mapping[str, Any]
    task: Blob

    def write(self, folder: Path) -> None:
        """Put it in the place of the one before.

        Raises:
            OSError: the disk did not take it; the one before is still there.
        """
        head = json.dumps({"client": self.client, "state": self.state, "order": dict(self.order)}).encode() + b"\n"
        with replacing(folder / ASKED) as file:
            for part in (_digest(head, self.task), head, self.task):
                file.write(part)


def read(folder: Path) -> Asked:
    """The one that lies in ``folder``.

    Raises:
        StoreError: there is none, or it is not as it was written.
    """
    path = folder / ASKED
    try:
        with path.open("rb") as file:
            digest, head, task = file.readline(), file.readline(), file.read()
    except OSError as error:
        raise StoreError(f"{path} cannot be read ({error})") from error
    if digest != _digest(head, task):
        raise StoreError(f"{path} was altered after it was written")
    told = json.loads(head)
    return Asked(told["client"], told["state"], told["order"], task)


def state_in(folder: Path) -> str:
    """The state that the prediction in ``folder`` was made with; "" where there is no prediction, or it needed none."""
    try:
        with (folder / ASKED).open("rb") as file:
            file.readline()
            return str(json.loads(file.readline())["state"])
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return ""  # whoever reads it is told what is wrong with it


def _digest(head: bytes, task: Blob) -> bytes:
    """The first line."""
    digest = sha256(head)
    digest.update(task)
    return digest.hexdigest().encode() + b"\n"
