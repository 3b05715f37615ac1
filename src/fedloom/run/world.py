"""What an experiment is about, loaded: data, partition, model, compute, engine. All of it derived, nothing of it saved."""

from __future__ import annotations

import hashlib
import json
import sys
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cached_property, partial
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch

from fedloom.client.client import Client
from fedloom.client.curricula.loss import ByLoss
from fedloom.client.curricula.shortformer import Staged
from fedloom.client.curricula.slw import LengthWarmup
from fedloom.client.elsewhere import Elsewhere, Store
from fedloom.client.host import Host
from fedloom.client.masks import carried_out
from fedloom.client.sharing import layer_scores
from fedloom.client.store import ClientStore
from fedloom.compute.compute import Compute
from fedloom.compute.stacked import Stacked
from fedloom.data.examples import Examples
from fedloom.data.instructions import Instructions
from fedloom.data.partition import Partition, partition, told_of_column
from fedloom.data.questions import Questions
from fedloom.data.sources import Encode, Source, load, tokenise
from fedloom.data.tagging import BETWEEN, Tagging
from fedloom.data.tasks import SPLITS, Classification, DataError, Split
from fedloom.data.templates import template_for
from fedloom.engines.engine import Engine
from fedloom.engines.environment import environment
from fedloom.engines.local import WAVE, Local
from fedloom.engines.workers import Start, Workers
from fedloom.fleet import Fleet
from fedloom.messages import CENTRE
from fedloom.methods.method import parts, says
from fedloom.model.adapters import Adapter
from fedloom.model.base import DTYPES, Model
from fedloom.model.cloze import Cloze
from fedloom.model.loading import load as load_model
from fedloom.model.memory import Needs, needs, texts_that_fit
from fedloom.model.spans import torn
from fedloom.run.costs.profiles import fleet_of, is_file
from fedloom.run.errors import ExperimentError
from fedloom.run.experiment import Experiment, as_json
from fedloom.run.judging import Judge
from fedloom.run.recipes import file_of
from fedloom.server.participation import Pool


class Far(Protocol):
    """Devices that are elsewhere, and keep their data and their state there."""

    def engine(self, store: Elsewhere) -> Engine:
        """The engine that reaches them."""
        ...

    def gather(self) -> tuple[int, ...]:
        """Wait until as many devices have joined as are to begin; who they are, in order."""
        ...

    def here(self) -> set[int]:
        """Who is there now."""
        ...

    def hurried(self, engine: Engine) -> Engine:
        """The engine as rounds use it, which do not need everyone."""
        ...

    def examples(self, client: int, split: Split) -> int:
        """How many examples the device says it has; 0 while it has said nothing."""
        ...


@dataclass(frozen=True)
class World:
    """Data as tokens, who holds what (rows of the data; of questions each is one example or, cut into windows, several), the model and its
    compute. With ``far``, the data is the server's own, and nobody holds any of it."""

    experiment: Experiment
    source: Source
    partition: Partition
    splits: dict[Split, Examples]
    model: Model
    compute: Compute
    far: Far | None = None

    @property
    def pool(self) -> Pool:
        """The clients, cohort size, rounds and seed, and how the server aggregates."""
        e = self.experiment
        around = Pool(tuple(range(e.clients)), e.cohort, e.rounds, e.seed, e.rule, self.fleet, e.server.optimizer)
        return replace(around, controls=e.controls, mask=e.mask, sharing=e.share, encoding=e.encoding)

    @cached_property
    def fleet(self) -> Fleet:
        """What the devices are like."""
        e = self.experiment
        return fleet_of(e.device, e.clients, e.seed)

    @property
    def classes(self) -> tuple[str, ...]:
        """Class names by label id."""
        return self.source.task.classes

    @property
    def outputs(self) -> tuple[str, ...]:
        """What the model's outputs are called, by number; nothing where they are words or places of a text."""
        if self.model.tagger is not None:
            return self.model.tagger.tags
        return self.classes if isinstance(self.source.task, Classification) else ()

    @cached_property
    def notes(self) -> list[str]:
        """What a person should know of the data as they are used."""
        return [*self.source.notes, *cut(self.splits, self.model)]

    @cached_property
    def judge(self) -> Judge:
        """What knows which examples a row became, and what their predictions come to."""
        return Judge(self.source, self.splits, self.model)

    def labels(self, split: Split) -> np.ndarray:
        """The label id of every row."""
        return np.asarray(list(self.source.splits[split][self.source.task.label]), np.int64)

    def device(self, client: int) -> Client:
        """Device k with its shards and no private state; ``CENTRE`` holds everything."""
        shards = {s: of if client == CENTRE else of.subset(self._held(s, client)) for s, of in self.splits.items()}
        train, validation, test = (shards[s] for s in SPLITS)
        e = self.experiment
        strength, texts = self.fleet.strength(client), self.texts_on(client)
        return Client(client, train, validation, test, e.seed, strength, DTYPES[e.precision], self.model.num_labels, texts)

    def texts_on(self, client: int) -> int:
        """How many texts a step can have in a device's memory."""
        return texts_that_fit(self._one_text, self.fleet.of(client).memory_bytes)

    @cached_property
    def _one_text(self) -> Needs:
        return needs(self.model, 1)[-1]

    def _held(self, split: Split, client: int) -> np.ndarray:
        return self.judge.examples(split, self.partition.shards(split)[client])

    def examples_of(self, client: int) -> int:
        """How many examples a device trains on."""
        if self.far is not None:
            return self.far.examples(client, "train")
        return len(self.splits["train"]) if client == CENTRE else len(self._held("train", client))

    def fingerprint(self) -> str:
        """That of the data (:func:`data_fingerprint`), as they are dealt out, and of devices read from a file."""
        dealt: dict[Split, np.ndarray] = {split: np.concatenate(self.partition.shards(split)) for split in self.splits}
        devices = json.dumps(self.fleet.as_json(self.pool.clients)) if is_file(self.experiment.device) else ""
        return data_fingerprint(self.source, self.splits, self.model, dealt, devices)

    @property
    def wave(self) -> int:
        """Devices that are computed together, or by one worker, at most: the stack if one is set."""
        return self.experiment.engine.stack or WAVE

    def host(self, store: ClientStore) -> Host:
        """What answers for the devices in this process."""
        e = self.experiment
        return Host(e.method, self.device, self.compute, store, e.digest(), encoding=e.encoding, doing=carried_out, besides=[layer_scores])

    @property
    def alone_or_together(self) -> bool:
        """Whether a device's result is the same to the bit whoever shares a pass with it (``model/kernels.py``)."""
        return self.model.together_by.startswith("packed")

    def store(self, folder: Path) -> Store:
        """Where the devices' states, or their names, are while the run in ``folder`` goes on."""
        return Elsewhere() if self.far is not None else store_in(folder)

    def engine(self, store: Store) -> Engine:
        """The engine that the experiment asks for, over devices that keep their state in ``store``."""
        if isinstance(store, Elsewhere):
            assert self.far is not None
            return self.far.engine(store)
        how = self.experiment.engine
        if how.kind == "local" and how.workers > 1:
            load = self.examples_of if self.alone_or_together else None
            return Workers(start(self), how.workers, store, self.experiment.digest(), self.wave, load, self.experiment.encoding)
        host = self.host(store)
        if how.kind == "local":
            return Local(host, self.wave)
        try:
            from fedloom.engines.flower import in_memory
        except ImportError as error:
            raise DataError(
                f"--engine.kind flower needs the extra 'flower' ({error}): pip install -e '.[flower]' in Fedloom's folder"
            ) from error
        return in_memory(host, [*self.pool.clients, CENTRE])


def data_fingerprint(
    source: Source, splits: Mapping[Split, Examples], model: Model, dealt: Mapping[Split, np.ndarray] | None = None, devices: str = ""
) -> str:
    """16 hex digits over the tokens and labels, over who holds which (``dealt``) and over what is said of ``devices``, and behind a dash as
    many over what is due, where tokens do not say it: a run that goes on must find the same (``checkpoint.same_data``)."""
    digest = hashlib.sha256()
    for split, examples in splits.items():
        for array in (examples.tokens, examples.offsets, examples.store_labels, *([] if dealt is None else [dealt[split]])):
            digest.update(np.ascontiguousarray(array).tobytes())
    digest.update(devices.encode())
    return "-".join(filter(None, (digest.hexdigest()[:16], _due(source, splits, model))))


def _due(source: Source, splits: Mapping[Split, Examples], model: Model) -> str:
    """16 hex digits over what is due beside the tokens: of an answer, tags, a place in a context segments say it. Nothing of texts of
    one class each, and of plain texts, of which every token is due but the first."""
    task, speaker = source.task, model.speaker
    if not model.reads_many or (speaker is not None and speaker.form == "text"):
        return ""
    digest = hashlib.sha256()
    for examples in splits.values():
        digest.update(np.ascontiguousarray(examples.segments).tobytes())
    if isinstance(task, Tagging):
        digest.update(json.dumps(task.tags).encode())
    if isinstance(task, Questions):  # scored against all answers, in words of the context
        digest.update(json.dumps([[rows[task.context], rows[task.answers]] for rows in source.splits.values()]).encode())
    return digest.hexdigest()[:16]


def start(world: World) -> Start:
    """How a worker for this world starts: with its share of the threads, large pages and, where there are several GPUs, one of them."""
    how = world.experiment.engine
    threads = how.threads or max(1, torch.get_num_threads() // how.workers)
    return Start(
        (sys.executable, "-m", "fedloom.run.worker"), order_of(world, threads), partial(environment, threads=threads, processes=how.workers)
    )


def order_of(world: World, threads: int) -> dict[str, Any]:
    """What a worker is told (JSON): the experiment, the file of its method if it is not the package's, and what it must come to.

    Raises:
        ExperimentError: a method that no file defines.
    """
    e = world.experiment
    recipe = file_of(e.method)
    if recipe == "":
        raise ExperimentError(f"--engine.workers needs method '{e.method_name}' in a Python file, from which every worker can load it")
    alone = replace(e, engine=replace(e.engine, threads=threads, workers=0))
    return {"experiment": as_json(alone), "recipe": recipe, "digest": e.digest(), "data": world.fingerprint()}


def read_source(experiment: Experiment) -> Source:
    """The data set."""
    e = experiment
    caps: dict[str, Any] = {"max_train": e.max_train, "max_validation": e.max_validation, "max_test": e.max_test}
    return load(e.data, seed=e.seed, text=e.text, label=e.label, metric=e.metric, task=e.task, **caps)


def read_data(experiment: Experiment) -> tuple[Source, Partition]:
    """The data set and who holds which rows of it; no model is needed for that."""
    e = experiment
    source = read_source(e)
    labels: dict[Split, np.ndarray] = {s: np.asarray(list(rows[source.task.label]), np.int64) for s, rows in source.splits.items()}
    column = e.partition.removeprefix("column:") if e.partition.startswith("column:") else ""
    if column and column not in source.splits["train"].column_names:
        raise DataError(f"no column '{column}' in {source.name}; it has {source.splits['train'].column_names}")
    values: dict[Split, list[Any]] = {s: rows[column] for s, rows in source.splits.items() if column in rows.column_names}
    shape = {"clients": e.clients, "alpha": e.alpha, "beta": e.beta, "seed": e.seed, "minimum": e.min_examples}
    made = partition(e.partition, labels, source_column=values, **shape)
    return (replace(source, notes=(*source.notes, *told_of_column(column, values))) if column else source), made


def build(experiment: Experiment) -> World:
    """Load everything.

    Raises:
        DataError, ModelError, TextError, AdapterError: whatever is wrong, with the mend.
    """
    e = experiment
    if e.engine.threads:
        torch.set_num_threads(e.engine.threads)
    fleet_of(e.device, e.clients, e.seed)  # what is wrong with a file is told before anything is loaded
    source, shards = read_data(e)
    model = model_of(e, source)
    insist_on_curriculum(e, model)
    splits = tokens_of(source, model)
    return World(e, source, shards, splits, model, Stacked(model, e.engine.stack))


def tokens_of(source: Source, model: Model) -> dict[Split, Examples]:
    """The data as the model's tokens."""
    return tokenise(source, in_parts(model.encode), model.encoding, model.first_of)


def cut(splits: Mapping[Split, Examples], model: Model) -> list[str]:
    """What to say of texts that were cut, of which there may be a few less: one that fills the length to the token was not; and of answers
    that no window holds whole."""
    if model.finder is not None:
        broken = {split: torn(texts.segments, texts.offsets) for split, texts in splits.items()}
        told = ", ".join(f"{of.sum():,} of {len(of):,} {split}" for split, of in broken.items())
        what = (
            f"no window of {model.max_length} tokens (--max-length) holds these answers whole, and windows with a part have no loss: {told}"
        )
        return [what] if any(of.any() for of in broken.values()) else []
    full = model.cut_from
    counts: dict[Split, int] = {} if full is None else {split: int((texts.lengths >= full).sum()) for split, texts in splits.items()}
    if not any(counts.values()):
        return []
    told = ", ".join(f"{count:,} of {len(splits[split]):,} {split}" for split, count in counts.items())
    return [f"texts are cut after {model.max_length} tokens (--max-length, or what the model reads if that is less): at most {told}"]


def model_of(experiment: Experiment, source: Source) -> Model:
    """The model with its adapter and head for this data.

    Raises:
        ModelError, AdapterError, ExperimentError: whatever is wrong, with the mend.
    """
    e = experiment
    return load_model(
        e.model,
        num_labels=max(2, len(source.task.classes)),
        adapter=adapter_of(e),
        seed=e.seed,
        max_length=e.max_length,
        precision=e.precision,
        device="cuda" if torch.cuda.is_available() else "cpu",
        cloze=cloze_of(e, source),
        answers=e.template if isinstance(source.task, Instructions) else None,
        form=source.task.form if isinstance(source.task, Instructions) else "instructions",
        tags=source.task.tags if isinstance(source.task, Tagging) else (),
        between=BETWEEN,
        finds=isinstance(source.task, Questions),
        recompute=e.engine.recompute,
    )


def insist_on_curriculum(experiment: Experiment, model: Model) -> None:
    """The method's curriculum means something for what this model reads.

    Raises:
        ExperimentError: it does not.
    """
    e = experiment
    if model.reads_many and isinstance(curriculum_of(e.method), ByLoss):
        what = "a sentence of tags" if model.tagger else "a question" if model.finder else "a text to be written"
        raise ExperimentError(f"this curriculum sorts by the loss of one label an example, and {what} has none; give another")
    if isinstance(curriculum_of(e.method), CUTTING) and (reason := not_to_be_cut(model)):
        raise ExperimentError(f"this curriculum cuts what a model reads at its end, and {reason}")


def not_to_be_cut(model: Model) -> str | None:
    """Why what this model reads cannot be cut at its end, but for its last token, without another target; None if it can."""
    if model.filler is not None:
        return (
            "with --head cloze that is a template with the text in it: a masked model's text would go first, a causal model's question; "
            "give another curriculum, or --head linear"
        )
    if model.speaker is not None and model.speaker.form == "text":
        return "a text's last token would be due behind another than it stands behind; give another curriculum"
    if model.speaker is not None:
        return "an answer stands at the end: of what is to be written its last token alone would stay; give another curriculum"
    if model.finder is not None:
        return "of a window whose answer is cut away [CLS] would be due, as if it held none; give another curriculum"
    return None


def build_far(experiment: Experiment, far: Far | None = None) -> World:
    """Load what the server of a real federation has: the model, and data of its own for classes, choosing and telling. Without ``far`` no
    device is asked anything: only what the server has is of interest.

    Raises:
        DataError, ModelError, TextError, AdapterError: whatever is wrong, with the mend.
    """
    e = experiment
    source = read_source(e)
    model, nobody = model_of(e, source), (np.zeros(0, np.int64),) * e.clients
    insist_on_curriculum(e, model)
    splits = tokens_of(source, model)
    return World(e, source, Partition(nobody, nobody, nobody, {}), splits, model, Stacked(model, e.engine.stack), far)


def adapter_of(experiment: Experiment) -> Adapter:
    """The adapter with its kind and start as the method has them, where that is left to it."""
    made = experiment.trained
    return replace(made, start=says(experiment.method, "adapter_start") if made.start == "auto" else made.start)


CUTTING = (LengthWarmup, Staged)


def curriculum_of(method: Any) -> Any:
    """The curriculum that a method follows, its own or that of what it holds."""
    return next((part.curriculum for part in parts(method) if "curriculum" in vars(part)), None)


def cloze_of(experiment: Experiment, source: Source) -> Cloze | None:
    """The experiment's cloze, with what is known of the data set where it says nothing; None with a linear head."""
    if experiment.head == "linear":
        return None
    if not isinstance(source.task, Classification):
        raise ExperimentError(
            f"--head cloze is for classification, and '{source.name}' has something else ({source.task.told}); leave --head out"
        )
    known = template_for(source.name, source.task, experiment.template, experiment.label_words)
    return Cloze(known.masked, known.words, len(source.task.texts) == 2, known.causal)


def in_parts(encode: Encode, size: int = 1024) -> Encode:
    """``encode``, given ``size`` texts at a time: what a tokenizer makes of a text besides its ids is many times as large as they are."""

    def encoded(texts: list[str], pairs: list[str] | None) -> tuple[list[list[int]], list[list[int]]]:
        ids: list[list[int]] = []
        segments: list[list[int]] = []
        for at in range(0, len(texts), size):
            made = encode(texts[at : at + size], None if pairs is None else pairs[at : at + size])
            ids += made[0]
            segments += made[1]
        return ids, segments

    return encoded


def store_in(folder: Path, aside: Path | None = None) -> ClientStore:
    """The clients' store of a run folder; with ``aside`` what is saved goes there, and the run's own state stays as it is."""
    return ClientStore(folder / "checkpoints" / "clients", aside)
