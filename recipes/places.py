"""Where recipes that are comparisons put their runs, and what they say when a folder or an option is not for them: what ``wires.py``,
``cycles.py`` and ``ablations.py`` have in common."""

from __future__ import annotations

from argparse import ArgumentParser, Namespace
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from fedloom.data.tasks import DataError
from fedloom.run.errors import CheckpointError, ExperimentError


def place(parser: ArgumentParser, given: Namespace, name: str, varied: Sequence[str]) -> Path:
    """The folder of ``--out``; without it ``runs/NAME``, and behind the name each of the ``varied`` options that is not as by default, so
    that other settings have another folder."""
    changed = {what: vars(given)[what] for what in varied if vars(given)[what] != parser.get_default(what)}
    return given.out or Path("runs") / "-".join([name, *(_told(what, value) for what, value in changed.items())])


def _told(what: str, value: Any) -> str:
    """A value as part of a folder's name: the last part of a path, and of a number what it is of."""
    last = Path(str(value)).name
    return f"{what}{last}" if last[:1].isdigit() else last


@contextmanager
def refusing(parser: ArgumentParser) -> Iterator[None]:
    """What a comparison refuses ends as options that make no sense do: in a line that says why, with code 2."""
    try:
        yield
    except (CheckpointError, DataError, ExperimentError) as error:
        parser.error(" ".join(str(error).split()))
