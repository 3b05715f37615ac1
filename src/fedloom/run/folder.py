"""Whose a run folder is: one experiment's for good. That one process at a time is there: ``lock.py``.

A folder is taken for an experiment once its data and its model have been found, and stays its own once something of it has been kept.
What lies in it of its rounds is ``checkpoint.py``'s.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from fedloom.run.checkpoint import holds_training, write_atomically
from fedloom.run.errors import CheckpointError
from fedloom.run.experiment import Experiment, as_json, as_meant, completed, first_difference
from fedloom.run.tracking import forget

DIVERGED = "diverged.json"
"""In the folder of a comparison's run that diverged: what was told of it."""


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
