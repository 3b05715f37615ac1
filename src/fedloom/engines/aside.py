"""Bytes that wait in a file instead of in memory."""

from __future__ import annotations

import os
import threading
import weakref
from collections import defaultdict
from contextlib import ExitStack
from pathlib import Path
from tempfile import TemporaryFile, gettempdir
from typing import NamedTuple

SLOT = 2**16
"""Bytes of the smallest slot of the file. Slots are this times a power of two, and what was never written of them takes no disk."""


class Kept(NamedTuple):
    """Where a blob lies among those that were laid aside."""

    begin: int
    size: int


class Aside:
    """Blobs in a file in ``folder`` (None: the system's for temporary ones, which may lie in memory). It has no name, so it is gone when
    this process is, however that ends, and it is made when the first blob comes.

    Safe for threads. What is dropped leaves room for the next of about its size.
    """

    def __init__(self, folder: Path | None = None) -> None:
        self.folder, self._file = Path(gettempdir()) if folder is None else folder, ExitStack()
        self._number, self._lock, self._end, self._free = -1, threading.Lock(), 0, defaultdict[int, list[int]](list)
        self.close = weakref.finalize(self, self._file.close)
        """Give the file up; at the latest it goes with this object."""

    def __enter__(self) -> Aside:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def keep(self, blob: bytes) -> Kept:
        """Lay a blob aside.

        Raises:
            OSError: the disk is full, or there is no such folder. Nothing was kept then.
        """
        kept = Kept(self._place(len(blob)), len(blob))
        rest = memoryview(blob)
        try:
            while rest:
                rest = rest[os.pwrite(self._number, rest, kept.begin + kept.size - len(rest)) :]
        except OSError as error:
            self.drop(kept)
            raise OSError(error.errno, error.strerror, str(self.folder)) from error
        return kept

    def read(self, kept: Kept) -> bytearray:
        """A blob that was laid aside, for one to unpack.

        Raises:
            OSError: the file is shorter than it was.
        """
        blob = bytearray(kept.size)
        rest = memoryview(blob)
        while rest:  # the system reads 2 GiB at a time
            came = os.preadv(self._number, [rest], kept.begin + kept.size - len(rest))
            if not came:
                raise OSError(f"{len(rest)} bytes of a blob that was laid aside are gone")
            rest = rest[came:]
        return blob

    def drop(self, kept: Kept) -> None:
        """Leave a blob's place to others."""
        with self._lock:
            self._free[slot(kept.size)].append(kept.begin)

    def _place(self, size: int) -> int:
        with self._lock:
            if self._number < 0:
                self._number = self._file.enter_context(TemporaryFile(prefix="fedloom-", buffering=0, dir=self.folder)).fileno()  # noqa: SIM115
            free = self._free[slot(size)]
            if free:
                return free.pop()
            begin, self._end = self._end, self._end + slot(size)
            return begin


def slot(size: int) -> int:
    """Bytes of the slot in which ``size`` bytes lie."""
    return max(SLOT, 1 << (size - 1).bit_length()) if size else SLOT
