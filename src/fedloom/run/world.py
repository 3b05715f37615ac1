"""What an experiment is about, loaded: data, partition, model, compute, engine. All of it derived, nothing of it saved."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from fedloom.client.client import Client
from fedloom.client.host import Host
from fedloom.client.store import ClientStore
from fedloom.compute.compute import Compute
from fedloom.compute.serial import Serial
from fedloom.compute.stacked import Stacked
from fedloom.data.examples import Examples
from fedloom.data.partition import Partition, partition
from fedloom.data.sources import Source, load, tokenise
from fedloom.data.tasks import DataError, Split
from fedloom.engines.engine import Engine
from fedloom.engines.local import Local
from fedloom.messages import CENTRE
from fedloom.model.base import Model
from fedloom.model.base import load as load_model
from fedloom.run.experiment import Experiment
from fedloom.server.participation import Pool


@dataclass(frozen=True)
class World:
    """Data as tokens, who holds what, the model and its compute."""

    experiment: Experiment
    source: Source
    partition: Partition
    splits: dict[Split, Examples]
    model: Model
    compute: Compute

    @property
    def pool(self) -> Pool:
        """The clients, cohort size, rounds and seed."""
        e = self.experiment
        return Pool(tuple(range(e.clients)), e.cohort, e.rounds, e.seed)

    @property
    def classes(self) -> tuple[str, ...]:
        """Class names by label id."""
        return self.source.task.classes

    def device(self, client: int) -> Client:
        """Device k with its shards and no private state; ``CENTRE`` holds everything."""
        rows = {split: self.partition.shards(split) for split in self.splits}
        shards = {split: examples if client == CENTRE else examples.subset(rows[split][client]) for split, examples in self.splits.items()}
        return Client(client, shards["train"], shards["validation"], shards["test"], self.experiment.seed)

    def fingerprint(self) -> str:
        """16 hex digits over the tokens, labels and partition: a resumed run must find the same data."""
        digest = hashlib.sha256()
        for split, examples in self.splits.items():
            for array in (
                examples.tokens,
                examples.offsets,
                examples.store_labels,
                np.concatenate(self.partition.shards(split)),
            ):
                digest.update(np.ascontiguousarray(array).tobytes())
        return digest.hexdigest()[:16]

    def engine(self, store: ClientStore) -> Engine:
        """The engine that the experiment asks for, over devices that keep their state in ``store``."""
        host = Host(self.experiment.method, self.device, self.compute, store, self.experiment.digest())
        if self.experiment.engine.kind == "local":
            return Local(host)
        try:
            from fedloom.engines.flower import in_memory
        except ImportError as error:
            raise DataError(f"--engine.kind flower needs the extra 'flower' ({error}): pip install 'fedloom[flower]'") from error
        return in_memory(host, [*self.pool.clients, CENTRE])


def read_data(experiment: Experiment) -> tuple[Source, Partition]:
    """The data set and who holds which rows of it; no model is needed for that."""
    e = experiment
    caps = {"max_train": e.max_train, "max_validation": e.max_validation, "max_test": e.max_test}
    source = load(e.data, seed=e.seed, text=e.text, label=e.label, metric=e.metric, **caps)
    labels: dict[Split, np.ndarray] = {s: np.asarray(list(rows[source.task.label]), np.int64) for s, rows in source.splits.items()}
    column = e.partition.removeprefix("column:") if e.partition.startswith("column:") else ""
    if column and column not in source.splits["train"].column_names:
        raise DataError(f"no column '{column}' in {source.name}; it has {source.splits['train'].column_names}")
    values: list[Any] | None = list(source.splits["train"][column]) if column else None
    shape = {"clients": e.clients, "alpha": e.alpha, "beta": e.beta, "seed": e.seed, "minimum": e.min_examples}
    return source, partition(e.partition, labels, source_column=values, **shape)


def build(experiment: Experiment) -> World:
    """Load everything.

    Raises:
        DataError, ModelError, AdapterError: whatever is wrong, with the mend.
    """
    e = experiment
    if e.engine.threads:
        torch.set_num_threads(e.engine.threads)
    source, shards = read_data(e)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model = load_model(
        e.model,
        num_labels=len(source.task.classes),
        lora=e.adapter,
        seed=e.seed,
        max_length=e.max_length,
        precision=e.precision,
        device=device,
    )
    splits = tokenise(source, model.encode)
    one_by_one = e.engine.stack == 1 or e.engine.kind == "flower"
    compute = Serial(model) if one_by_one else Stacked(model, e.engine.stack)
    return World(e, source, shards, splits, model, compute)


def store_in(folder: Path) -> ClientStore:
    """The clients' store of a run folder."""
    return ClientStore(folder / "checkpoints" / "clients")
