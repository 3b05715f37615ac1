"""A folder, or a file, that is written whole or not at all."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO


@contextmanager
def whole_or_gone(folder: Path) -> Iterator[None]:
    """Whatever ends the block badly, Ctrl-C and a full disk too, leaves ``folder`` as it was before: not there, or empty."""
    there = folder.exists()
    try:
        yield
    except BaseException:
        for path in [*folder.iterdir()] if there else [folder]:
            if path.is_dir() and not path.is_symlink():
                shutil.rmtree(path, ignore_errors=True)
            else:
                path.unlink(missing_ok=True)
        raise


@contextmanager
def replacing(path: Path, ending: str = "tmp", mode: int = 0o666) -> Iterator[IO[bytes]]:
    """A file to write that then takes the place of ``path`` in one step: a reader sees the old file or the whole new one, also after a
    power cut. Nothing is left beside it where the disk does not take it, or Ctrl-C comes. ``ending``: of the file that is written first;
    ``mode``: who may read it, at any moment, less what the umask takes."""
    path.parent.mkdir(parents=True, exist_ok=True)
    scratch = path.with_name(f"{path.name}.{ending}")
    scratch.unlink(missing_ok=True)  # of a program that was killed
    try:
        with os.fdopen(os.open(scratch, os.O_WRONLY | os.O_CREAT | os.O_EXCL, mode), "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(scratch, path)
    except BaseException:
        with suppress(OSError):
            scratch.unlink()
        raise
