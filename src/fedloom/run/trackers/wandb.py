"""Weights & Biases: an offline run in the run's folder, for ``wandb sync RUN/wandb/offline-run-*``.

``WANDB_MODE``, ``WANDB_PROJECT`` and the other variables of the library say otherwise.
"""

from __future__ import annotations

import os
import shutil
import struct
import time
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path

import wandb
from wandb.proto.wandb_internal_pb2 import Record  # pyright: ignore[reportAttributeAccessIssue]

from fedloom.run.tracking import Subject

PATIENCE = 30.0
"""Seconds that the library's own process may take to write what it has been told."""

HEADER, BLOCK, LAST_PARTS = 7, 32 * 1024, (1, 4)
"""Of the library's log: bytes before the first record and before each part of one; bytes of a block, which no part crosses; how a part is
marked that ends a record."""


class WandB:
    """A :class:`~fedloom.run.tracking.Tracker`. An offline run cannot be resumed: of several with one id the last that is synchronised
    replaces the others, and a killed process takes with it what it had not written yet. So a run that goes on is written anew, from its
    first round and under the same id, and replaces what was there. A run online is resumed by the service."""

    def __init__(self, subject: Subject) -> None:
        self.offline = offline = (os.environ.get("WANDB_MODE") or "offline") in ("offline", "dryrun")
        for before in subject.folder.glob(f"offline-run-*-{subject.id}"):
            shutil.rmtree(before)
        self.run = wandb.init(
            project=os.environ.get("WANDB_PROJECT") or "fedloom",
            dir=subject.folder.parent,
            id=subject.id,
            name=subject.name,
            config=dict(subject.settings),
            resume=None if offline else "allow",
            reinit="create_new",  # whoever calls this from Python may have a run of their own
            mode="offline" if offline else None,
            settings=wandb.Settings(silent=True, console="off", disable_code=True, disable_git=True, x_disable_stats=True),
        )

    def known(self) -> Collection[int]:
        """Those before the step at which the service says that the run stands; offline none."""
        return range(self.run.step)

    def round(self, round: int, numbers: Mapping[str, float]) -> None:
        """One step of the history."""
        self.run.log(dict(numbers), step=round, commit=True)

    def end(self, round: int, numbers: Mapping[str, float]) -> None:
        """The summary: what the run came to."""
        self.run.summary.update(dict(numbers))

    def close(self, failed: bool) -> None:
        """Say how it ended. A run that has ended is on the disk then: the library's own process may write it only a moment later.

        Raises:
            TimeoutError: it does not.
        """
        path = Path(self.run.dir).parent / f"run-{self.run.id}.wandb"
        self.run.finish(exit_code=int(failed))
        given_up = time.monotonic() + PATIENCE
        while self.offline and not failed and not any(record.HasField("exit") for record in records(path)):
            if time.monotonic() > given_up:
                raise TimeoutError(f"{path} was not written within {PATIENCE:.0f} seconds")
            time.sleep(0.05)


def records(path: Path) -> Iterator[Record]:
    """What the library's log of a run holds so far: records in LevelDB's format, in one part each or in several."""
    data = path.read_bytes() if path.exists() else b""
    at, whole = HEADER, b""
    while at + HEADER <= len(data):
        left = BLOCK - at % BLOCK
        if left < HEADER:  # too little for a part
            at += left
            continue
        _, length, kind = struct.unpack_from("<IHB", data, at)
        if at + HEADER + length > len(data):
            return
        whole += data[at + HEADER : at + HEADER + length]
        at += HEADER + length
        if kind in LAST_PARTS:
            yield Record.FromString(whole)
            whole = b""
