"""What one machine says to another of an error: what kind it is and where, and nothing that might be quoted from anybody's data.

A device's errors go to its server, into the server's log and results, and from there to every device that asks how things stand. Errors
quote what they are about: a row, a label, a name. So what leaves a device is composed here alone (:func:`for_others`), and an error's own
text is among it only if its class says that it may be (:class:`Tellable`). The device's own log has the whole text.
"""

from __future__ import annotations

from pathlib import Path
from traceback import extract_tb


class Tellable(Exception):
    """An error that another machine may be told of in words: ``others``, or, where there are none, its own."""

    others: str | None = None

    def __init__(self, said: str, others: str | None = None) -> None:
        Exception.__init__(self, said)
        self.others = others if others is not None else self.others

    @property
    def told(self) -> str:
        """In which words. Empty: in none."""
        return str(self) if self.others is None else self.others


def in_full(error: BaseException) -> str:
    """The error for whoever's data it may quote: its kind and its text."""
    return f"{type(error).__name__}: {error}"


def for_others(error: BaseException) -> str:
    """The error for another machine: its kind, and either words that may be told or the place in the code where it was raised."""
    kind = type(error).__name__
    words = error.told if isinstance(error, Tellable) else str(error) if isinstance(error, MemoryError) else ""
    if words:
        return f"{kind}: {words}"
    frames = extract_tb(error.__traceback__)
    at = f", raised at {Path(frames[-1].filename).name}:{frames[-1].lineno}" if frames else ""
    return f"{kind}{at}: its text may quote data, and is in the device's own log alone"
