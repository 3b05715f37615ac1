"""What a person is told when something ends badly: one paragraph with the mend, and an exit code. Never a traceback.

Exit codes: 2 for what was asked wrongly, 1 for a run that failed. Whatever is not expected here is a fault of the program and is not
hidden.
"""

from __future__ import annotations

import errno

import torch
from safetensors import SafetensorError

from fedloom.client.store import DiskError, StoreError
from fedloom.data.tasks import DataError
from fedloom.messages import DIVERGED, CohortFailed
from fedloom.run.errors import CheckpointError
from fedloom.wire import WireError

RESUMES = "The rounds before it are saved: the same command goes on from there."
FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


def explain(error: BaseException, resumes: bool = True, served: bool = False) -> tuple[str, int] | None:
    """(paragraph, exit code) for an error that is expected to happen; None for any other. ``resumes``: the command that failed keeps rounds
    in a folder of its own choice, and goes on from them. ``served``: its devices are elsewhere."""
    kept = f" {RESUMES}" if resumes else ""
    said = " ".join(str(error).split()) or type(error).__name__
    if isinstance(error, CohortFailed):
        mend = "--engine.stack 1 computes devices one by one; a smaller --quorum, in another --out, does without some"
        if served:
            mend = "A longer --wait and --deadline are more patient; a smaller --quorum, in another --out, does with fewer"
        if diverged(error):
            mend = "A number that is not finite asks for a smaller learning rate, in another --out"
        return f"{_shortened(said.rstrip('.'))}." + (f"{kept} {mend}" if resumes else ""), 1
    if isinstance(error, MemoryError | torch.OutOfMemoryError):
        less = "a smaller model" if served else "--engine.stack 1, a smaller model or a smaller batch size"
        mend = f"{kept} Give {less}" if resumes else ""
        return f"out of memory ({_shortened(said)}).{mend}", 1
    if isinstance(error, SafetensorError):
        return f"tensors could not be written or read: {said}. Free some space or check the permissions.{kept}", 1
    if isinstance(error, DiskError):
        return f"{said}. Free some space or check the permissions.{kept}", 1
    if isinstance(error, CheckpointError):
        return said, 2
    if isinstance(error, StoreError):
        return f"{said}. Delete the run folder to start anew, or restore it from a copy", 2
    if isinstance(error, WireError):
        return f"{said}. The method sends what may not cross the wire", 1
    if isinstance(error, FileNotFoundError | NotADirectoryError | IsADirectoryError):
        return _of_system(error, "check the path"), 2
    if isinstance(error, OSError):
        elsewhere = ", or give another --out" if resumes else ""
        mend = f"free some space.{kept}" if error.errno in FULL else f"check the permissions{elsewhere}"
        return _of_system(error, mend), 1
    return (said, 2) if isinstance(error, ValueError) else None


def diverged(error: BaseException) -> bool:
    """Whether it tells that numbers stopped being finite, which a smaller learning rate may mend and running again does not."""
    return isinstance(error, CohortFailed | DataError | WireError) and DIVERGED in str(error)


def _of_system(error: OSError, mend: str) -> str:
    if error.strerror is None:
        return " ".join(str(error).split())
    place = f"{error.filename}: " if error.filename else ""
    return f"{place}{error.strerror}; {mend}"


def _shortened(text: str, most: int = 600) -> str:
    return text if len(text) <= most else f"{text[:most]} ..."
