"""How a command ends when it is stopped, and what libraries may say meanwhile. Imports nothing heavy.

SIGTERM ends a command as Ctrl-C does: whatever holds something lets go of it, and the last completed round is saved already.
"""

from __future__ import annotations

import contextlib
import logging
import os
import signal
import sys
import threading
import warnings
from collections.abc import Iterator
from types import FrameType

TRACEBACK = "FEDLOOM_TRACEBACK"
"""The environment variable that shows where errors come from."""


class Terminated(KeyboardInterrupt):
    """The process was asked to end (SIGTERM)."""


class _Told(logging.Handler):
    """To whatever stderr is at that moment: a live view puts itself in its place."""

    def emit(self, record: logging.LogRecord) -> None:
        print(self.format(record), file=sys.stderr)


@contextlib.contextmanager
def terminable() -> Iterator[None]:
    """SIGTERM raises :class:`Terminated` inside the block."""

    def end(number: int, frame: FrameType | None) -> None:
        raise Terminated

    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGTERM, end)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Log lines without tracebacks, and no warnings that only a library's developers can heed; with ``TRACEBACK`` set, everything."""
    if os.environ.get(TRACEBACK):
        yield
        return
    handler, formatter = _Told(), logging.Formatter("warning: %(message)s")
    formatter.formatException = lambda ei: f"  {ei[0].__name__ if ei[0] else ''}: {ei[1]}"  # type: ignore[method-assign]
    handler.setFormatter(formatter)
    log = logging.getLogger("fedloom")
    log.addHandler(handler)
    logging.getLogger("huggingface_hub").setLevel(logging.ERROR)  # its retries: what they end in is told
    try:
        with warnings.catch_warnings():
            for library in ("transformers", "peft", "torch", "datasets"):
                warnings.filterwarnings("ignore", category=FutureWarning, module=library)
            yield
    finally:
        log.removeHandler(handler)
