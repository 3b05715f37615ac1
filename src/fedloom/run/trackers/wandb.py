"""Weights & Biases: an offline run in the run's folder, for ``wandb sync RUN/wandb/offline-run-*``.

``WANDB_MODE``, ``WANDB_PROJECT`` and the other variables of the library say otherwise.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Collection, Mapping

import wandb

from fedloom.run.tracking import Subject


class WandB:
    """A :class:`~fedloom.run.tracking.Tracker`. An offline run cannot be resumed: of several with one id the last that is synchronised
    replaces the others, and a killed process takes with it what it had not written yet. So a run that goes on is written anew, from its
    first round and under the same id, and replaces what was there. A run online is resumed by the service."""

    def __init__(self, subject: Subject) -> None:
        offline = (os.environ.get("WANDB_MODE") or "offline") in ("offline", "dryrun")
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
        """Write everything and say how it ended."""
        self.run.finish(exit_code=int(failed))
