"""Whose a run folder is: one experiment's for good, and one process's at a time.

A folder is taken for an experiment once its data and its model have been found, and stays its own once something of it has been kept.
What lies in it of its rounds is ``checkpoint.py``'s.
"""

from __future__ import annotations

import errno
import json
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from fcntl import LOCK_EX, LOCK_NB, LOCK_SH, flock
from pathlib import Path
from typing import IO, Any

from fedloom.run.checkpoint import CheckpointError, holds_training, write_atomically
from fedloom.run.experiment import Experiment, as_json, as_meant, completed, first_difference
from fedloom.run.tracking import forget

DIVERGED = "diverged.json"
"""In the folder of a comparison's run that diverged: what was told of it."""


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


def claim(folder: Path, experiment: Experiment) -> None:
    """Write ``experiment.json``, or check that the one there says the same. Called once the data and the model have been found,
    so that a misspelt one leaves the folder free."""
    if not check(folder, experiment):
        (folder / DIVERGED).unlink(missing_ok=True)  # it was of another experiment, which has kept nothing else
        forget(folder)
        write_atomically(folder / "experiment.json", json.dumps(as_json(experiment), indent=1))


def check(folder: Path, experiment: Experiment) -> bool:
    """Whether the folder holds this experiment already (False: it is free). Writes nothing. What was asked for and has kept nothing, as
    where a method refused an option, leaves the folder free.

    Raises:
        CheckpointError: the folder holds another experiment (naming the first differing field) or something else.
    """
    path, wanted = folder / "experiment.json", as_meant(experiment)
    if not path.exists():
        if folder.exists() and not folder.is_dir():
            raise CheckpointError(f"{folder} is a file; --out must name a folder")
        strangers = [p.name for p in folder.iterdir() if p.name not in (".lock", "experiment.json.tmp")] if folder.is_dir() else []
        if strangers:
            raise CheckpointError(f"{folder} is not a run folder (it holds {sorted(strangers)[:4]}); give --out an empty or new one")
        return False
    try:
        there = dict(json.loads(path.read_text(encoding="utf-8")))
    except (ValueError, TypeError) as error:
        raise CheckpointError(f"{path} is no JSON object ({error}); give another --out") from error
    there = completed(there, {experiment.method.name: type(experiment.method)})
    hows = Experiment.HOW
    difference = first_difference({k: v for k, v in there.items() if k not in hows}, {k: v for k, v in wanted.items() if k not in hows})
    if difference and not holds_training(folder) and not (folder / "results.json").exists():
        return False
    if difference:
        raise CheckpointError(f"{folder} holds another experiment: {difference}. Give another --out, or the same options to resume")
    return True


def told_at_the_end(path: Path) -> dict[str, Any]:
    """The JSON object that the end of a run has left in its folder (``results.json``, ``diverged.json``).

    Raises:
        CheckpointError: the file is torn, or holds something else.
    """
    try:
        return dict(json.loads(path.read_text(encoding="utf-8")).items())
    except (ValueError, AttributeError) as error:
        mend = f"Delete {path.parent} and give the command again to have its run done anew, or restore the folder from a copy"
        raise CheckpointError(f"{path} is corrupt: it is no JSON object ({error}). {mend}") from error
