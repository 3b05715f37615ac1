"""A folder that is written whole or not at all."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


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
