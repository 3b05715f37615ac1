"""One process at a time in a folder: a run's, or a device's."""

from __future__ import annotations

import errno
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from fcntl import LOCK_EX, LOCK_NB, LOCK_SH, flock
from pathlib import Path
from typing import IO

from fedloom.run.errors import CheckpointError


@contextmanager
def only_one(folder: Path, reading: bool = False) -> Iterator[None]:
    """Keep a second process out of the run folder. ``reading``: nothing will be written there, so that others may read it too, and a folder
    that is read-only will do.

    Raises:
        CheckpointError: another process is running there.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with _lock_of(folder, reading) as file:
        try:
            if file is not None:
                flock(file, (LOCK_SH if reading else LOCK_EX) | LOCK_NB)
        except BlockingIOError as error:
            mend = "wait for it, or stop it" if reading else "wait for it, stop it, or give another --out"
            raise CheckpointError(f"another process is running in {folder}; {mend}") from error
        except OSError:
            if not reading:  # some file systems lock nothing that was opened for reading only
                raise
        yield


@contextmanager
def _lock_of(folder: Path, reading: bool) -> Iterator[IO[str] | None]:
    """The file that is locked; whose folder may not be written to, opened as it lies there, or None if there is none to be had."""
    path = folder / ".lock"
    try:
        opened = path.open("w")
    except OSError as error:
        if not reading or error.errno not in (errno.EACCES, errno.EPERM, errno.EROFS):
            raise
        try:
            opened = path.open()
        except OSError:
            opened = None
    with opened or nullcontext() as file:
        yield file
