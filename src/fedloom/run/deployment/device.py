"""The process that computes on a device of a real federation: ``python -m fedloom.run.deployment.device SOCKET``.

It reads its order (:func:`order`), loads the device's own data and the model, and answers tasks until nobody asks any more. It is started
and looked after by :class:`fedloom.engines.resident.Resident`. Nothing that came over the wire is executed or names a file: the method must
be one of this package, or of the Python file that this device was given (``greeting.py``); the experiment is JSON whose every field is
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
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fedloom.run.deployment.greeting import Own, insist_same_release, kinds_of, source_of

if TYPE_CHECKING:
    from fedloom.client.client import Client
    from fedloom.client.host import Host, Leaving
    from fedloom.data.examples import Examples
    from fedloom.data.sources import Source
    from fedloom.data.tasks import Split
    from fedloom.fleet import Fleet
    from fedloom.model.base import Model
    from fedloom.run.experiment import Experiment
    from fedloom.run.judging import Judge

STATES = "states"
"""In a device's folder: of each experiment that it takes part in, by its digest, the device's states and :data:`DATA`."""

DATA = "data.json"
"""What the device's data came to when it was greeted first for the experiment."""


def order(greeting: Mapping[str, Any], own: Own) -> dict[str, Any]:
    """What the process is told (JSON)."""
    return {"greeting": dict(greeting), "own": vars(own)}


@dataclass(frozen=True)
class Ready:
    """What an order comes to on this device: the ``experiment`` as it is here (its model's place, its engine), and what it is made of."""

    experiment: Experiment
    source: Source
    model: Model
    shards: dict[Split, Examples]
    fleet: Fleet

    def device(self, k: int) -> Client:
        """Device k of the federation, which is this one, with nothing of its own yet."""
        from fedloom.client.client import Client
        from fedloom.data.tasks import SPLITS
        from fedloom.model.memory import needs, texts_that_fit

        train, validation, test = (self.shards[split] for split in SPLITS)
        texts = texts_that_fit(needs(self.model, 1)[-1], self.fleet.of(k).memory_bytes)
        seed, strength, model = self.experiment.seed, self.fleet.strength(k), self.model
        return Client(k, train, validation, test, seed, strength, model.dtype, model.num_labels, texts)


def made_ready(told: Mapping[str, Any], trains: bool = True) -> Ready:
    """The order's experiment, this device's data and the model. ``trains``: there must be room to train it, and not only to have it.

    Raises:
        ExperimentError, DataError, ModelError, TextError, AdapterError: whatever is wrong, with the mend.
        DiskError: the start of the model could not be written.
    """
    import torch

    from fedloom.model.places import of_model
    from fedloom.run.costs.memory import insist_on_a_devices_room, sizes_before, sizes_of
    from fedloom.run.costs.profiles import by_name
    from fedloom.run.errors import ExperimentError
    from fedloom.run.experiment import EngineSettings, from_json
    from fedloom.run.starting import begin_aside, identity
    from fedloom.run.world import model_of, tokens_of

    greeting = told["greeting"]
    insist_same_release(greeting)
    own = Own(**{**told["own"], "text": tuple(told["own"]["text"])})
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
    if before is not None and trains:
        insist_on_a_devices_room(before, here, room(own), gpu=gpu)
    model = model_of(here, source)
    if identity(model) != greeting["model"]:
        raise of_model(
            here.model,
            f"'{here.model}' is not the server's: its pre-trained weights come to {identity(model)} here and to "
            f"{greeting['model']} at the server; give the same one, --model NAME or FOLDER",
        )
    if trains:
        insist_on_a_devices_room(sizes_of(model, e.method), here, room(own), loaded=True, gpu=gpu)
    if own.folder:
        begin_aside(model, Path(own.folder) / "start")
    return Ready(here, source, model, tokens_of(source, model), fleet)


def counts(shards: Mapping[Split, Examples]) -> dict[str, int]:
    """How many examples this device holds, by split."""
    from fedloom.data.tasks import SPLITS

    return {split: len(shards[split]) for split in SPLITS}


def hosted(told: Mapping[str, Any]) -> tuple[Host, dict[str, Any]]:
    """The host of the order, and what the device says of itself.

    Raises:
        ExperimentError, DataError, ModelError, TextError, AdapterError: whatever is wrong, with the mend.
        DiskError: the start of the model could not be written.
    """
    from fedloom.client.host import Host
    from fedloom.client.masks import carried_out
    from fedloom.client.sharing import layer_scores
    from fedloom.client.store import ClientStore
    from fedloom.compute.stacked import Stacked
    from fedloom.run.judging import Judge
    from fedloom.run.world import cut
    from fedloom.telling import for_others

    ready = made_ready(told)
    if own := told["own"]["folder"]:
        insist_same_data(Path(own) / STATES / told["greeting"]["digest"], ready)
    e, source, model, shards = ready.experiment, ready.source, ready.model, ready.shards
    host = Host(
        e.method,
        ready.device,
        Stacked(model, 1),
        ClientStore(None),
        told["greeting"]["digest"],
        counted(Judge(source, shards, model)),
        e.encoding,
        carried_out,
        [layer_scores],
        for_others,
    )
    return host, {"examples": counts(shards), "notes": [*source.notes, *cut(shards, model)]}


def insist_same_data(folder: Path, ready: Ready, begins: bool = True) -> None:
    """Insist that the device's data are those with which it was greeted first, which is kept beside its states in ``folder``: what they say
    of examples would be of others. ``begins``: where nothing is kept yet it is now, and the device may begin anew.

    Raises:
        ExperimentError: they are others.
        CheckpointError: what was kept cannot be read.
    """
    from fedloom.run.checkpoint import same_data, write_atomically
    from fedloom.run.errors import CheckpointError, ExperimentError
    from fedloom.run.world import data_fingerprint

    path, data = folder / DATA, data_fingerprint(ready.source, ready.shards, ready.model)
    counted = ", ".join(f"{count} {split}" for split, count in counts(ready.shards).items())
    if begins and not path.exists():
        folder.mkdir(parents=True, exist_ok=True)
        write_atomically(path, json.dumps({"data": data, "held": counted}))
        return
    try:
        was = json.loads(path.read_text(encoding="utf-8"))
        same = same_data(was["data"], data)
    except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
        mend = "delete it if this device's data are still the same" + ("" if begins else ", and join once more")
        raise CheckpointError(f"{path} is corrupt ({type(error).__name__}); {mend}") from error
    if not same:
        changed = (
            f"this device's data are not those with which it began in this experiment: {was['held']} examples then (fingerprint "
            f"{was['data']}), {counted} now ({data})"
        )
        anew = f"; or, where the server begins anew too, in another --out, delete {folder} and join again" if begins else ""
        raise ExperimentError(
            f"{changed}. Put them back as they were{anew}",
            f"{changed}. Have it put them back as they were, or begin anew on both sides",
        )


def room(own: Own) -> int:
    """Bytes that this process may still take: what is left of those that it may hold, and no more than are free unless its owner said."""
    import torch

    from fedloom.model.machine import free_bytes, held_bytes

    left, free = own.memory - held_bytes(), free_bytes(torch.device("cpu"))
    return max(0, left) if own.said else max(0, min(left, free)) if own.memory else free


def counted(judge: Judge) -> Leaving:
    """Predictions as counts: for each split, int64 (m, 3) of true class, predicted class, examples; and the mean loss as a metric, unless
    nothing is read (of sentences no word, of texts no token); of questions also the share of exact matches, of tags how many words there
    are and how many are right. Of a question F1 is all that is counted, no word of it."""
    import numpy as np
    import torch

    from fedloom.data.instructions import Instructions
    from fedloom.data.questions import EXACT, Questions
    from fedloom.data.tagging import COUNTED, RIGHT, Tagging
    from fedloom.engines.asked import PREDICTS
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
