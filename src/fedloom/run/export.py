"""From a run folder to a folder that plain PEFT loads: the global adapter, or the personal one of a device."""

from __future__ import annotations

import json
import logging
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path

import torch

from fedloom.client.elsewhere import Elsewhere
from fedloom.data.labels import some
from fedloom.data.sources import Source
from fedloom.data.tasks import Classification
from fedloom.folders import whole_or_gone
from fedloom.messages import Tensors
from fedloom.methods.method import Predictor
from fedloom.model.adapters import merged, saved_as, write_adapter
from fedloom.model.base import Model
from fedloom.model.names import is_beneath
from fedloom.model.places import folder_of
from fedloom.run import checkpoint
from fedloom.run.experiment import Experiment
from fedloom.run.lock import only_one
from fedloom.run.personal import as_sent, personal
from fedloom.run.starting import stand_at, start_of
from fedloom.run.world import World, build, build_far, model_of, store_in
from fedloom.tensors import without

log = logging.getLogger("fedloom")


class ExportError(ValueError):
    """What was asked for does not exist in this run."""


def whole(model: Model, tensors: Tensors) -> dict[str, torch.Tensor]:
    """All trainable tensors: those given, and the start's where none is given."""
    return {**model.initial, **tensors}


def write_folder(model: Model, tensors: Tensors, out: Path) -> None:
    """Write ``tensors`` (the rest at the start) as an adapter folder with the tokenizer beside it."""
    if any(is_beneath(name) for name in tensors):
        raise ExportError(
            "this method changes the weights under its adapter, which no adapter folder holds; export the model, with --merge"
        )
    made = {**whole(model, tensors), **model.still}  # PEFT asks for a whole head
    write_adapter(model.module, [*model.parameters, *model.still], made, out, folder_of(model.name), model.initial)
    write_tokenizer(model, out)


def write_merged(model: Model, tensors: Tensors, classes: Sequence[str], out: Path) -> None:
    """Write the base with the adapter merged in, the classes' names and the tokenizer: a folder that transformers loads by itself."""
    if model.filler is not None:
        raise ExportError("a merged model would have a cloze's few words for its vocabulary; export the adapter, without --merge")
    model.stand_on({name: tensor for name, tensor in tensors.items() if is_beneath(name)})
    plain = merged(model.module, model.parameters, without(whole(model, tensors), model.beneath.names))
    plain.config.pad_token_id = model.pad_id
    if model.speaker is None and model.finder is None:
        classes = classes if model.tagger is None else model.tagger.tags
        plain.config.id2label = dict(enumerate(classes))
        plain.config.label2id = {name: i for i, name in enumerate(classes)}
    plain.save_pretrained(out)
    write_tokenizer(model, out)


def write_tokenizer(model: Model, out: Path) -> None:
    """Write the tokenizer; that of a model which answers prompts with the template by which it was trained."""
    if model.speaker is not None and model.speaker.form != "text":
        model.tokenizer.chat_template = model.speaker.chat_template
    model.tokenizer.save_pretrained(out)


def write_global(model: Model, tensors: Tensors, classes: Sequence[str], folder: Path) -> list[str]:
    """Write the global model as others load it, to ``adapter`` or ``model`` in the run's folder; and notes to say why not, if it cannot
    be."""
    changed = any(is_beneath(name) for name in tensors)
    match saved_as(model.module):
        case "adapter" if not changed:
            write_folder(model, tensors, folder / "adapter")
        case "adapter" | "model" if model.filler is None:
            write_merged(model, tensors, classes, folder / "model")
        case _:
            return ["no other library loads a model of this adapter kind and head: it is in the run's checkpoint only"]
    return []


def predictor_of(world: World, folder: Path, client: int | None) -> Predictor:
    """The model that the run's last completed round holds: the global one, or that of a device.

    Raises:
        ExportError: no such device, or one that keeps its own; a method without a global model; or data that call the outputs otherwise
            than the run's did.
        CheckpointError: LoRA's start was another model's.
    """
    method, store, named, served = world.experiment.method, store_in(folder), world.outputs, checkpoint.is_served(folder)
    if served and client is not None:
        raise ExportError(
            f"{folder} is a server's, and what device {client} has of its own lies with it: there, fedloom export with the folder of its "
            "'fedloom join'; leave --client out for the shared model"
        )
    saved = checkpoint.load(folder, Elsewhere() if served or client is None else store)  # the shared model needs no device's state
    if saved is None:
        raise ExportError(f"{folder} holds no completed round yet; run it first")
    if said := stand_at(world.model, saved.start, folder, saved.model):
        log.warning(said)
    before = saved.names or _names_told(world, folder)
    if before and before != named:  # its other data do not matter to who takes its model away
        raise ExportError(
            f"the outputs of a model of '{world.source.name}' are called {some(named)} now, and were called {some(before)} when "
            f"{folder} was trained: they would go by the wrong names. Restore the data"
        )
    if client is None:
        assembled = method.assembled(saved.state)
        if assembled is None:
            mend = (
                "each device has its own, and keeps it: there, export the folder of its 'fedloom join'"
                if served
                else f"give --client 0 to {world.experiment.clients - 1}"
            )
            raise ExportError(f"method '{world.experiment.method_name}' has no global model; {mend}")
        return Predictor(assembled)
    if not 0 <= client < world.experiment.clients:
        raise ExportError(f"no device {client}; the run has 0 to {world.experiment.clients - 1}")
    return personal(world, store, client, as_sent(world, saved.state.shared), saved.state.facts)


def _names_told(world: World, folder: Path) -> tuple[str, ...]:
    """What an earlier release's results tell of the outputs' names; nothing where these are no classes."""
    ended = folder / "results.json"
    if not (ended.exists() and isinstance(world.source.task, Classification)):
        return ()
    return tuple(json.loads(ended.read_text(encoding="utf-8"))["partition"]["classes"])


def export(experiment: Experiment, folder: Path, out: Path, client: int | None = None, merge: bool = False) -> str:
    """Write the run's adapter to ``out``, or with ``merge``, and where weights of the model itself were trained and no adapter is there
    (``full``, ``bitfit``), the whole model. Returns the Python that loads it.

    Raises:
        ExportError: nothing to export, ``out`` is not empty, or a model that no adapter can hold.
        CheckpointError: the checkpoint is corrupt, or of a device's model, the run is going on.
    """
    insist_new(out)
    world = build_far(experiment) if checkpoint.is_served(folder) else build(experiment)
    alone = client is not None and not checkpoint.is_served(folder)  # a device's state is read after the rest
    with only_one(folder, reading=True) if alone else nullcontext():
        found = predictor_of(world, folder, client)
    return written(experiment, world.source, world.model, found, out, merge)


def insist_new(out: Path) -> None:
    """Insist that nothing would be overwritten.

    Raises:
        ExportError: it would.
    """
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise ExportError(f"{out} exists and is not an empty folder; nothing was overwritten. Give a new folder")


def written(experiment: Experiment, source: Source, model: Model, found: Predictor, out: Path, merge: bool) -> str:
    """Write what predicts as ``found`` does to ``out``; the Python that loads it.

    Raises:
        ExportError: no library's model can hold it.
    """
    merge = merge or saved_as(model.module) == "model"
    tensors = whole(model, found.tensors)
    if found.bias is not None:
        last = [name for name in model.head if name.endswith(".bias") and tensors[name].shape == found.bias.shape]
        if not last:
            raise ExportError("this device's model adds a label prior to the logits, and the head has no bias that could hold it")
        tensors[sorted(last)[-1]] = tensors[sorted(last)[-1]] + found.bias
    if said := of_few_bits(model, merge):
        log.warning(said)
    with whole_or_gone(out):
        if merge:
            return _merged(experiment, source, model, tensors, out)
        write_folder(model, tensors, out)
        return f'PeftModel.from_pretrained({_base(experiment, source, model, out)}, "{out}")'


def _merged(experiment: Experiment, source: Source, model: Model, tensors: Tensors, out: Path) -> str:
    low = model.dtype is not torch.float32  # what was frozen is then read again, all of its bits
    exact = model_of(replace(experiment, precision="float32"), source) if low else model
    if low and model.split:
        exact.start_at(start_of(model))  # the run's, which may be another machine's
    write_merged(exact, tensors, source.task.classes, out)
    return f'AutoModelFor{_use(model)}.from_pretrained("{out}")'


def _base(experiment: Experiment, source: Source, model: Model, out: Path) -> str:
    """The Python that loads what lies under the adapter in ``out``. A cloze's template and words, which it needs beside it, are written."""
    place = f'"{folder_of(experiment.model)}"'
    if model.filler is not None:
        cloze, kind = model.filler.cloze, "AutoModelForCausalLM" if model.causal else "AutoModelForMaskedLM"
        (out / "cloze.json").write_text(json.dumps({"template": cloze.template, "words": cloze.words}, indent=1), encoding="utf-8")
        return f"{kind}.from_pretrained({place})"
    if model.speaker is not None or model.finder is not None:
        return f"AutoModelFor{_use(model)}.from_pretrained({place})"
    classes = source.task.classes if model.tagger is None else model.tagger.tags
    named = dict(enumerate(classes)) if len(classes) == model.num_labels else None
    labels = f"num_labels={model.num_labels}" if named is None else f"id2label={named!r}"
    return f"AutoModelFor{_use(model)}.from_pretrained({place}, {labels}, ignore_mismatched_sizes=True)"


def of_few_bits(model: Model, merge: bool) -> str:
    """What to say of a model whose base was held in few bits, or nothing."""
    if not model.quantised:
        return ""
    if merge:
        return (
            f"this run's base was held in {model.base_in}: the model is made of these weights, as the run had them, and not of the file's; "
            "export the adapter, without --merge, to put it on others"
        )
    library = (
        "bitsandbytes' nf4 (blocks of 64, no double quantisation) has the same numbers, but for one in millions"
        if model.base_in == "nf4"
        else "what other libraries call int8 has other scales"
    )
    return (
        f"this adapter was trained on a base held in {model.base_in}; on the file's own weights it predicts a little otherwise. To load "
        f"that base: {library}"
    )


def _use(model: Model) -> str:
    """What the library calls the use that a model is loaded for."""
    if model.finder is not None:
        return "QuestionAnswering"
    return "CausalLM" if model.speaker else "TokenClassification" if model.tagger else "SequenceClassification"
