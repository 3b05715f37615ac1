"""What took time once and can be had again: arrays in a folder of the user's. Deleting the folder loses nothing but time.

An entry is named by a digest of everything it depends on, so none is ever out of date. It is one file, written whole or not at all, and
what is read is checked against the digest at its end. Large entries are mapped into memory and not copied there, so that processes share
them; whoever writes into such an array changes what that process sees and nothing else. A folder that cannot be used is told in one line
of the log and stops nobody.

This module does not know what the arrays mean.
"""

from __future__ import annotations

import json
import logging
import os
import tempfile
from collections.abc import Callable
from hashlib import sha256
from pathlib import Path

import numpy as np
from safetensors.numpy import save

log = logging.getLogger("fedloom")

VARIABLE = "FEDLOOM_CACHE"
"""The environment variable that moves the folder."""

MAPPED = 2**20
"""Bytes of a file from which on it is mapped."""

DTYPES = {"I8": np.int8, "I32": np.int32, "I64": np.int64}

Arrays = dict[str, np.ndarray]


def folder() -> Path:
    """``FEDLOOM_CACHE``, or ``fedloom`` in ``XDG_CACHE_HOME``, or ``~/.cache/fedloom``.

    Raises:
        RuntimeError: none of the variables is set, and there is no home folder.
    """
    if os.environ.get(VARIABLE):
        return Path(os.environ[VARIABLE]).expanduser()
    base = os.environ.get("XDG_CACHE_HOME", "")  # its specification has it ignored when it is not absolute
    return (Path(base) if os.path.isabs(base) else Path.home() / ".cache") / "fedloom"


def nbytes() -> int:
    """What the folder holds; 0 if there is none."""
    return sum(path.stat().st_size for path in folder().rglob("*") if path.is_file())


def why_not() -> str:
    """Why nothing can be stored there; "" if something can."""
    try:
        folder().mkdir(mode=0o700, parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder()):
            return ""
    except (OSError, RuntimeError) as error:
        return f"{type(error).__name__}: {error}"


def remembered(kind: str, key: str, make: Callable[[], Arrays]) -> Arrays:
    """The arrays (int8, int32 or int64) stored as ``key`` among those of this ``kind``, or what ``make`` makes, which is then stored.

    ``key`` is a hexadecimal digest of all that ``make`` depends on.
    """
    try:
        path = folder() / kind / key
        stored = _read(path) if path.exists() else None
    except (OSError, RuntimeError) as error:
        _tell(kind, error)
        return make()
    if stored is not None:
        return stored
    made = make()
    try:
        _write(path, made)
    except OSError as error:
        _tell(kind, error)
    return made


def _tell(kind: str, error: Exception) -> None:
    log.warning(
        "the cache cannot be used, so the %s are made anew (%s: %s); %s names another folder", kind, type(error).__name__, error, VARIABLE
    )


def _write(path: Path, arrays: Arrays) -> None:
    """One safetensors file with its own sha256 at the end."""
    blob = save({name: np.ascontiguousarray(array) for name, array in arrays.items()})
    path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)  # it holds what was read from the user's data
    handle, scratch = tempfile.mkstemp(dir=path.parent, prefix=".")
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(blob)
            file.write(sha256(blob).digest())
        os.replace(scratch, path)
    except BaseException:
        os.unlink(scratch)
        raise


def _read(path: Path) -> Arrays | None:
    """The arrays of a file that :func:`_write` made; None, and a line in the log, if that is not what it is."""
    size = path.stat().st_size
    bits = np.asarray(np.memmap(path, np.uint8, mode="c")) if size >= MAPPED else np.fromfile(path, np.uint8)
    if size < 40 or sha256(bits[:-32].data).digest() != bits[-32:].tobytes():
        log.warning("%s is not what was written; it is made anew", path)
        return None
    begin = 8 + int(bits[:8].view("<u8")[0])
    entries, body = json.loads(bits[8:begin].tobytes()), bits[begin:-32]
    return {
        name: body[slice(*entry["data_offsets"])].view(DTYPES[entry["dtype"]]).reshape(entry["shape"])
        for name, entry in entries.items()
        if name != "__metadata__"
    }
