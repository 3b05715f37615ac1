"""A device's own model in a real federation, for whoever the device belongs to: out of the folder of its ``fedloom join``.

What a device predicts with is made of what the server sent last and of what the device keeps (``engines/asked.py``): it is made again
here, by the same operation, from the same data and model as the device has. Nothing is asked of the server, and nothing of the device's
folder is written, so the device may take part meanwhile.
"""

from __future__ import annotations

import time
from importlib.metadata import version
from pathlib import Path
from tempfile import TemporaryDirectory

from fedloom.client.store import ClientStore, State, StoreError
from fedloom.compute.stacked import Stacked
from fedloom.engines.asked import ASKED, Asked, read
from fedloom.messages import Task
from fedloom.methods.method import Predictor
from fedloom.run.deployment.device import STATES, Ready, insist_same_data, made_ready
from fedloom.run.export import ExportError, insist_new, written
from fedloom.run.personal import predicting
from fedloom.wire import unpack


def asked_in(folder: Path) -> Path | None:
    """Where the last prediction of the device with this folder lies, or with that of one of its experiments; None if it is no device's.

    Raises:
        ExportError: the device took part in several experiments, or none of its predictions is kept.
    """
    if (folder / ASKED).is_file():
        return folder
    if not (folder / STATES).is_dir() or (folder / "experiment.json").exists():
        return None
    experiments = sorted(path for path in (folder / STATES).iterdir() if path.is_dir())
    kept = [path for path in experiments if (path / ASKED).is_file()]
    if not kept:
        raise ExportError(
            f"{folder} is a device's, and keeps no prediction yet of which the model could be written: the server asks for one after the "
            "last round, and every few rounds with --evaluate-every"
        )
    if len(experiments) > 1:
        told = ", ".join(f"{path} ({_when(path) if path in kept else 'no prediction yet'})" for path in experiments)
        raise ExportError(f"{folder} is of a device in {len(experiments)} experiments; give one of them: {told}")
    return kept[0]


def _when(place: Path) -> str:
    return time.strftime("predicted %Y-%m-%d %H:%M", time.localtime((place / ASKED).stat().st_mtime))


def export_own(place: Path, out: Path, merge: bool = False, recipe: Path | None = None) -> tuple[str, str]:
    """Write the model behind the prediction that lies in ``place`` to ``out``, as :func:`fedloom.run.export.export` does. ``recipe``: the
    method's file, if it lies elsewhere by now. Returns what it is, and the Python that loads it.

    Raises:
        ExportError: ``out`` is not empty, what the device kept is not what was written, another release wrote it, or no adapter can hold
            the model.
        ExperimentError, DataError, ModelError: the device's data, model or method's file are not those it took part with.
    """
    insist_new(out)
    when = _when(place)
    try:
        asked, state = kept_in(place)
    except StoreError as error:
        raise ExportError(f"{error}. The device keeps it anew when it is asked for a prediction next") from error
    greeting = asked.order["greeting"]
    if greeting["release"] != version("fedloom"):
        raise ExportError(
            f"the device took part with Fedloom {greeting['release']}, and this is {version('fedloom')}, which may compute otherwise; "
            "export with the same release"
        )
    with TemporaryDirectory(prefix="fedloom-") as aside:
        here = {"folder": aside, **({} if recipe is None else {"recipe": str(recipe.resolve())})}
        ready = made_ready({**asked.order, "own": {**asked.order["own"], **here}}, trains=False)
        insist_same_data(place, ready, begins=False)
        loading = written(ready.experiment, ready.source, ready.model, _predictor(ready, asked, state), out, merge)
    e = ready.experiment
    return f"device {asked.client} under {e.method_name} on {greeting['task']['name']}, experiment {greeting['digest']}, {when}", loading


def kept_in(place: Path) -> tuple[Asked, State]:
    """The prediction, and the device's state that it was made with. A device that predicts again meanwhile has another by then.

    Raises:
        StoreError: one of them is not there, or not as it was written.
    """
    while True:
        asked, store = read(place), ClientStore(place)
        store.restore({str(asked.client): asked.state} if asked.state else {})
        try:
            return asked, store.load(asked.client)
        except StoreError:
            if read(place).state == asked.state:
                raise


def _predictor(ready: Ready, asked: Asked, state: State) -> Predictor:
    e = ready.experiment
    task = unpack(asked.task, str(asked.order["greeting"]["digest"]))
    assert isinstance(task, Task)
    device = ready.device(asked.client)
    device.private, device.memory = state
    return predicting(e.method, device, e.encoding.arrived(task), Stacked(ready.model, 1))
