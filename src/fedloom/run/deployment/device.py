"""The process that computes on a device of a real federation: ``python -m fedloom.run.deployment.device SOCKET``.

It reads its order (:func:`order`), loads the device's own data and the model, and answers tasks until nobody asks any more. It is started
and looked after by :class:`fedloom.engines.resident.Resident`. Nothing that came over the wire is executed or names a file: the method must
be one of this package, or of the Python file that this device was given (:func:`kinds_of`); the experiment is JSON whose every field is
checked, the data are those that this device was given, and so is the model unless it is left to the experiment, which then may name one
that transformers finds.

**What leaves the device** are the tensors that the method sends, and of its predictions not the logits but how many of its examples of
which class were told as which (:func:`counted`); and of what goes wrong the kind and the place, without a word of the data
(:func:`~fedloom.telling.for_others`).
"""

from __future__ import annotations

import json
import logging
import sys
import threading
import warnings
from collections.abc import Mapping
from dataclasses import dataclass, replace
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from fedloom.client.host import Host, Leaving
    from fedloom.data.sources import Source
    from fedloom.data.tasks import Task as DataTask
    from fedloom.run.judging import Judge
    from fedloom.run.world import World

STATES = "states"
"""In a device's folder: of each experiment that it takes part in, by its digest, the device's states and :data:`DATA`."""

DATA = "data.json"
"""What the device's data came to when it was greeted first for the experiment."""

PREDICTS = "predict"
"""The client operation whose answer is counted before it leaves."""


@dataclass(frozen=True)
class Own:
    """What a device brings: its data, where its columns or its model are others than the experiment's, and the Python file of a method that
    is not the package's. ``memory``: bytes that its process may hold, and whether its owner has ``said`` so; 0: what is free. ``folder``:
    where the process may write, if anywhere."""

    data: str
    model: str = ""
    text: tuple[str, ...] = ()
    label: str = ""
    threads: int = 0
    recipe: str = ""
    recompute: bool = False
    memory: int = 0
    said: bool = False
    folder: str = ""


def order(greeting: Mapping[str, Any], own: Own) -> dict[str, Any]:
    """What the process is told (JSON)."""
    return {"greeting": dict(greeting), "own": vars(own)}


def greeting_of(world: World) -> dict[str, Any]:
    """What a device is told of the experiment (JSON): all that decides a result, what labels mean, which model and release it must be."""
    from fedloom.run.experiment import as_json
    from fedloom.run.starting import identity

    return {
        "release": version("fedloom"),
        "experiment": as_json(world.experiment),
        "recipe": recipe_digest(world.experiment.method),
        "task": task_of(world.source),
        "model": identity(world.model),
    }


def task_of(source: Source) -> dict[str, Any]:
    """What a device is told of the server's data (JSON): the task, and what names it has for what."""
    task = source.task
    return {
        "kind": kind_of(task),
        "name": source.name,
        "classes": list(task.classes),
        "metric": task.metric,
        "tags": tags_of(task),
        **columns_of(task),
    }


def insist_same_release(greeting: Mapping[str, Any]) -> None:
    """Insist that the server is of this release: others compute, write and check otherwise, and nothing else might show it.

    Raises:
        ExperimentError: it is not.
    """
    from fedloom.run.experiment import ExperimentError
    from fedloom.wire import SHORT

    theirs, here = str(greeting.get("release", "of an earlier release")), version("fedloom")
    if theirs != here:
        raise ExperimentError(
            f"the server is Fedloom {SHORT.repr(theirs)}, and this device {here!r}; install the same release on both sides"
        )


def recipe_digest(method: Any) -> str:
    """What the Python file of a method comes to; empty for one of the package.

    Raises:
        ExperimentError: a method that no file defines.
    """
    from fedloom.run.experiment import ExperimentError
    from fedloom.run.recipes import digest_of_file, file_of

    file = file_of(method)
    if file == "":
        raise ExperimentError("the method is defined in no Python file, so devices cannot have it; put it into one")
    return "" if file is None else digest_of_file(Path(file))


def kinds_of(greeting: Mapping[str, Any], own: Own) -> dict[str, type[Any]]:
    """The experiment's method by its name, out of this device's own file, where the server has it from a file too; nothing otherwise, and
    then the file is not looked at. The two files must be the same, byte for byte.

    Raises:
        ExperimentError: this device has no such file, or another.
    """
    from fedloom.run.experiment import ExperimentError
    from fedloom.run.recipes import digest_of_file, kind_in
    from fedloom.wire import SHORT

    wanted, name = greeting["recipe"], greeting["experiment"]["method"]["name"]
    if not wanted:
        return {}
    if not own.recipe:
        raise ExperimentError(
            f"the server's method {SHORT.repr(name)} is out of a Python file of its own, which comes to {SHORT.repr(wanted)}; code is "
            "never sent: have the same file here, and give it as --recipe FILE"
        )
    found = digest_of_file(Path(own.recipe))
    if found != wanted:
        said = (
            f"comes to {found}, and the server's to {SHORT.repr(wanted)}; the method's file must be the same on both sides, byte for byte"
        )
        raise ExperimentError(f"the file {own.recipe} {said}", f"this device's recipe {said}")
    return {str(name): kind_in(Path(own.recipe), str(name))}


def kind_of(task: DataTask) -> str:
    """The task's kind as ``--task`` names it."""
    from fedloom.data.instructions import Instructions
    from fedloom.data.questions import Questions
    from fedloom.data.tagging import Tagging

    if isinstance(task, Tagging):
        return "tagging"
    if isinstance(task, Questions):
        return "qa"
    if isinstance(task, Instructions):
        return task.form
    return "classification"


def tags_of(task: DataTask) -> list[str]:
    """The tags' names; none where the task has no tags."""
    from fedloom.data.tagging import Tagging

    return list(task.tags) if isinstance(task, Tagging) else []


def columns_of(task: DataTask) -> dict[str, Any]:
    """The columns that are read: of texts, and of labels where the task learns to tell those. Of tagging words and tags are one each."""
    from fedloom.data.tagging import Tagging
    from fedloom.data.tasks import Classification

    if isinstance(task, Tagging):
        return {"text": [task.words], "label": task.tagged}
    return {"text": list(task.texts), "label": task.label if isinstance(task, Classification) else ""}


def hosted(told: Mapping[str, Any]) -> tuple[Host, dict[str, Any]]:
    """The host of the order, and what the device says of itself.

    Raises:
        ExperimentError, DataError, ModelError, TextError, AdapterError: whatever is wrong, with the mend.
        DiskError: the start of the model could not be written.
    """
    import torch

    from fedloom.client.client import Client
    from fedloom.client.host import Host
    from fedloom.client.masks import carried_out
    from fedloom.client.sharing import layer_scores
    from fedloom.client.store import ClientStore
    from fedloom.compute.stacked import Stacked
    from fedloom.data.tasks import SPLITS
    from fedloom.model.base import of_model
    from fedloom.model.memory import needs, texts_that_fit
    from fedloom.run.costs.memory import insist_on_a_devices_room, sizes_before, sizes_of
    from fedloom.run.costs.profiles import by_name
    from fedloom.run.experiment import EngineSettings, ExperimentError, from_json
    from fedloom.run.judging import Judge
    from fedloom.run.starting import begin_aside, identity
    from fedloom.run.world import cut, data_fingerprint, model_of, tokens_of
    from fedloom.telling import for_others

    greeting, own = told["greeting"], Own(**{**told["own"], "text": tuple(told["own"]["text"])})
    insist_same_release(greeting)
    e = from_json(greeting["experiment"], kinds_of(greeting, own))
    if e.digest() != greeting["digest"]:
        raise ExperimentError(
            f"the experiment comes to {e.digest()} here and to {greeting['digest']} at the server: another state of Fedloom's code"
        )
    fleet = by_name(e.device, e.clients, e.seed)
    torch.set_num_threads(own.threads or torch.get_num_threads())
    source = source_of(greeting, own, e.seed)
    here = replace(e, model=own.model or e.model, engine=EngineSettings(stack=1, recompute=own.recompute))
    gpu, before = torch.cuda.is_available(), sizes_before(here)
    if before is not None:
        insist_on_a_devices_room(before, here, room(own), gpu=gpu)
    model = model_of(here, source)
    if identity(model) != greeting["model"]:
        raise of_model(
            own.model or e.model,
            f"'{own.model or e.model}' is not the server's: its pre-trained weights come to {identity(model)} here and to "
            f"{greeting['model']} at the server; give the same one, --model NAME or FOLDER",
        )
    insist_on_a_devices_room(sizes_of(model, e.method), here, room(own), loaded=True, gpu=gpu)
    if own.folder:
        begin_aside(model, Path(own.folder) / "start")
    shards, one = tokens_of(source, model), needs(model, 1)[-1]
    train, validation, test = (shards[split] for split in SPLITS)
    held = {split: len(shards[split]) for split in SPLITS}
    if own.folder:
        insist_same_data(Path(own.folder) / STATES / e.digest(), data_fingerprint(source, shards, model), held)
    host = Host(
        e.method,
        lambda k: Client(
            k,
            train,
            validation,
            test,
            e.seed,
            fleet.strength(k),
            model.dtype,
            model.num_labels,
            texts_that_fit(one, fleet.of(k).memory_bytes),
        ),
        Stacked(model, 1),
        ClientStore(None),
        e.digest(),
        counted(Judge(source, shards, model)),
        e.encoding,
        carried_out,
        [layer_scores],
        for_others,
    )
    return host, {"examples": held, "notes": [*source.notes, *cut(shards, model)]}


def insist_same_data(folder: Path, data: str, held: Mapping[str, int]) -> None:
    """Insist that the device's data are those with which it was greeted first, which is kept beside its states in ``folder``: what they say
    of examples would be of others. ``data``: what they come to; ``held``: the examples of each split.

    Raises:
        ExperimentError: they are others.
        CheckpointError: what was kept cannot be read.
    """
    from fedloom.run.checkpoint import CheckpointError, same_data, write_atomically
    from fedloom.run.experiment import ExperimentError

    path, counted = folder / DATA, ", ".join(f"{held[split]} {split}" for split in held)
    if not path.exists():
        folder.mkdir(parents=True, exist_ok=True)
        write_atomically(path, json.dumps({"data": data, "held": counted}))
        return
    try:
        was = json.loads(path.read_text(encoding="utf-8"))
        same = same_data(was["data"], data)
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise CheckpointError(f"{path} is corrupt ({type(error).__name__}); delete it if this device's data are still the same") from error
    if not same:
        changed = (
            f"this device's data are not those with which it began in this experiment: {was['held']} examples then (fingerprint "
            f"{was['data']}), {counted} now ({data})"
        )
        raise ExperimentError(
            f"{changed}. Put them back as they were; or, where the server begins anew too, in another --out, delete {folder} and join "
            "again",
            f"{changed}. Have it put them back as they were, or begin anew on both sides",
        )


def room(own: Own) -> int:
    """Bytes that this process may still take: what is left of those that it may hold, and no more than are free unless its owner said."""
    import torch

    from fedloom.model.machine import free_bytes, held_bytes

    left, free = own.memory - held_bytes(), free_bytes(torch.device("cpu"))
    return max(0, left) if own.said else max(0, min(left, free)) if own.memory else free


def source_of(greeting: Mapping[str, Any], own: Own, seed: int) -> Source:
    """The device's own data, with labels as the server's task numbers them, out of the columns that the server reads where the device has
    them and its owner names no others.

    Raises:
        DataError: it cannot be read so.
    """
    from fedloom.data.sources import Names, load

    task = greeting["task"]
    classes, tags = tuple(map(str, task["classes"])), tuple(map(str, task["tags"]))
    learns = task["kind"] in ("classification", "tagging", "qa")
    found = load(
        own.data,
        seed=seed,
        text=own.text,
        label=own.label,
        elsewhere=Names(tuple(map(str, task.get("text", ()))), str(task.get("label", ""))),
        task=task["kind"],
        metric=task["metric"] if task["kind"] == "classification" else "auto",
        classes=classes if learns else (),
        tags=tags,
    )
    return replace(found, name=str(task["name"]))


def counted(judge: Judge) -> Leaving:
    """Predictions as counts: for each split, int64 (m, 3) of true class, predicted class, examples; and the mean loss as a metric, unless
    nothing is read (of sentences no word, of texts no token); of questions also the share of exact matches, of tags how many words there
    are and how many are right. Of a question F1 is all that is counted, no word of it."""
    import numpy as np
    import torch

    from fedloom.client.client import Client
    from fedloom.data.instructions import Instructions
    from fedloom.data.questions import EXACT, Questions
    from fedloom.data.tagging import COUNTED, RIGHT, Tagging
    from fedloom.messages import Task, Update
    from fedloom.run.evaluation import cells

    task = judge.source.task

    def leaving(client: Client, asked: Task, update: Update) -> Update:
        if asked.op != PREDICTS:
            return update
        tensors: dict[str, torch.Tensor] = {}
        besides: dict[str, float | int] = {}
        for split, made in update.tensors.items():
            labels = np.asarray(judge.source.splits[split][task.label], np.int64)  # type: ignore[index]
            logits = judge.judged(split, np.arange(len(labels)), made.float().numpy())  # type: ignore[arg-type]
            found = task.outcomes(labels, logits)
            (told,) = cells(np.zeros(len(labels), np.int64), found, 1)
            tensors[split] = torch.tensor(told, dtype=torch.int64).reshape(-1, 3)
            if len(labels) and (not isinstance(task, Tagging | Instructions) or logits[:, 2].any()):
                besides[f"{split}_loss"] = float(task.loss(labels, logits))
            if len(labels) and isinstance(task, Questions):
                besides[f"{split}_{EXACT}"] = float(task.scores(labels, logits)[EXACT])
            if len(labels) and isinstance(task, Tagging):
                right, words = logits[:, 1:3].sum(0, dtype=np.float64)
                besides |= {f"{split}_{COUNTED}": int(words), f"{split}_{RIGHT}": int(right)}
        return replace(update, tensors=tensors, metrics={**update.metrics, **besides})

    return leaving


def main() -> int:
    """Start, or tell why not; then serve until nobody asks any more."""
    from fedloom.run.worker import end_with_parent

    threading.Thread(target=end_with_parent, daemon=True).start()
    warnings.simplefilter("ignore", FutureWarning)  # the libraries' own, about calls between them
    from fedloom.engines.workers import SAID, ordered, refuse, send, serve
    from fedloom.telling import for_others, in_full

    line, told = ordered(sys.argv[-1])
    try:
        host, said = hosted(told)
    except Exception as error:
        send(line, {"kind": SAID, "level": logging.WARNING, "text": in_full(error)})  # for the device's own log
        refuse(line, for_others(error))
        return 1
    serve(line, host, said)
    return 0


def command() -> tuple[str, ...]:
    """How this process is started; the number of its socket comes last."""
    return (sys.executable, "-m", "fedloom.run.deployment.device")


def folder_of(out: Path | None, data: str) -> Path:
    """Where a device keeps its states: ``out``, or a folder beside the others' that is named after its data."""
    return out or Path("runs") / f"device-{Path(data).resolve().name}"


if __name__ == "__main__":
    sys.exit(main())
