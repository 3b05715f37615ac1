"""A device's own model in a real federation, for whoever the device belongs to: out of the folder of its ``fedloom join``.

What a device predicts with is made of what the server sent last and of what the device keeps (``engines/asked.py``): it is made again
here, by the same operation, from the same data and model as the device has. Nothing is asked of the server.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from fedloom.client.store import ClientStore, StoreError
from fedloom.compute.stacked import Stacked
from fedloom.engines.asked import ASKED, Asked, read
from fedloom.messages import Task
from fedloom.methods.method import Predictor
from fedloom.run.deployment.device import STATES, Ready, made_ready
from fedloom.run.export import ExportError, insist_new, written
from fedloom.run.personal import predicting
from fedloom.wire import unpack


def asked_in(folder: Path) -> Path | None:
    """Where the last prediction of the device with this folder lies, or with that of one of its experiments; None if it is no device's.

    Raises:
        ExportError: it has not predicted yet, or in several experiments.
    """
    if (folder / ASKED).is_file():
        return folder
    if not (folder / STATES).is_dir() or (folder / "experiment.json").exists():
        return None
    found = sorted(path.parent for path in (folder / STATES).glob(f"*/{ASKED}"))
    if not found:
        raise ExportError(
            f"{folder} is a device's, and the device has not been asked for a prediction yet, so there is no model of its own; the server "
            "asks after the last round, or every few rounds with --evaluate-every"
        )
    if len(found) > 1:
        raise ExportError(f"{folder} is of a device in {len(found)} experiments; give one of them: {', '.join(map(str, found))}")
    return found[0]


def export_own(place: Path, out: Path, merge: bool = False, recipe: Path | None = None) -> str:
    """Write the model behind the prediction that lies in ``place`` to ``out``, as :func:`fedloom.run.export.export` does. ``recipe``: the
    method's file, if it lies elsewhere by now. Returns the Python that loads it.

    Raises:
        ExportError: ``out`` is not empty, or a model that no adapter can hold.
        StoreError: what the device kept is not what was written.
        ExperimentError, DataError, ModelError: the device's data, model, method's file or release are not those it took part with.
    """
    insist_new(out)
    asked = read(place)
    here = {"folder": str(place.resolve().parents[1]), **({} if recipe is None else {"recipe": str(recipe.resolve())})}
    ready = made_ready({**asked.order, "own": {**asked.order["own"], **here}})
    return written(ready.experiment, ready.source, ready.model, _predictor(ready, asked, place), out, merge)


def _predictor(ready: Ready, asked: Asked, place: Path) -> Predictor:
    e, store = ready.experiment, ClientStore(place)
    task = unpack(asked.task, str(asked.order["greeting"]["digest"]))
    if not isinstance(task, Task):
        raise StoreError(f"{place / ASKED} holds no task; it was altered after it was written")
    store.restore({str(asked.client): asked.state} if asked.state else {})
    device = ready.device(asked.client)
    device.private, device.memory = store.load(asked.client)
    return predicting(e.method, device, replace(e.encoding.arrived(task), nonce=""), Stacked(ready.model, 1))
