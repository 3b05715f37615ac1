"""Whether every method of a comparison takes what is asked of it, before any of them trains.

Much of what a method refuses it can refuse only beside a model and a pool: ranks that it cannot have, weights that are in few bits, an
option that means nothing to it. It does so where its set-up begins. So each method's set-up begins here, up to its first question to
devices, and nobody is asked: a comparison of ten methods says at once what the tenth would have said after hours. With ``--share``, whose
rules look at what a set-up leaves, it is played to its end on a compute that only counts (``pretended.py``).
"""

from __future__ import annotations

import gc
import logging
from collections.abc import Iterable, Sequence
from typing import Any

import torch

from fedloom.client.store import ClientStore
from fedloom.data.partition import Partition
from fedloom.data.sources import Source
from fedloom.engines.engine import drive
from fedloom.engines.heap import give_memory_back
from fedloom.engines.local import Local
from fedloom.methods.method import set_up
from fedloom.model.base import Model
from fedloom.run.costs.memory import insist_on_room, sizes_before
from fedloom.run.costs.pretended import Pretended, silent
from fedloom.run.errors import ExperimentError
from fedloom.run.experiment import Experiment
from fedloom.run.world import World, adapter_of, insist_on_curriculum, model_of, read_data, tokens_of

Named = tuple[str, Experiment]
"""What the comparison calls a method, and an experiment with it."""


def rehearse(experiments: Iterable[Named]) -> None:
    """Begin each, computing nothing. Those of one data set that train the same of a model share one, and no two models are held at once.

    Raises:
        ExperimentError: some refuse what is asked; which, and each one's own words.
    """
    alike: dict[tuple[str, Any], list[Named]] = {}
    for name, e in experiments:
        alike.setdefault((e.data, adapter_of(e)), []).append((name, e))
    refused: dict[str, list[str]] = {}
    for group in alike.values():
        for name, why in _refusals(group):
            refused.setdefault(why, []).append(name)
        gc.collect()  # a model's parts hold each other
        give_memory_back()
        if torch.cuda.is_initialized():
            torch.cuda.empty_cache()  # for the runs, which may be other processes
    if refused:
        told = "; ".join(f"{', '.join(dict.fromkeys(names))}: {why}" for why, names in refused.items())
        raise ExperimentError(f"not every method takes what is asked, and nothing was started. {told}")


def _refusals(group: Sequence[Named]) -> list[tuple[str, str]]:
    """The names of those that refuse, and why. All have the same model. What goes wrong otherwise is told at a run's turn, and loses no
    other."""
    _, first = group[0]
    if first.engine.threads:
        torch.set_num_threads(first.engine.threads)
    source, shards = read_data(first)
    found = [(name, e, _without_room(e)) for name, e in group]
    fit = [(name, e) for name, e, why in found if not why]
    refused = [(name, why) for name, _, why in found if why]
    if not fit:
        return refused
    try:
        model = model_of(first, source)
    except ValueError as error:
        return [*refused, *((name, str(error)) for name, _ in fit)]
    except Exception:
        return refused
    return [*refused, *((name, why) for name, e in fit if (why := _refusal(e, source, shards, model)))]


def _without_room(e: Experiment) -> str:
    """Why this one's model cannot fit into memory ("": it can, as far as its files tell)."""
    try:
        if (before := sizes_before(e)) is not None:
            insist_on_room(before, e)
    except ExperimentError as error:
        return str(error)
    return ""


def _refusal(e: Experiment, source: Source, shards: Partition, model: Model) -> str:
    """Why this one refuses ("": it does not)."""
    try:
        insist_on_curriculum(e, model)
        splits = tokens_of(source, model) if e.share.some else {}
        world = World(e, source, shards, splits, model, Pretended(model))
        begun = set_up(e.method, model, world.pool)
        with silent(logging.getLogger("fedloom.methods")):
            if e.share.some:
                drive(begun, Local(world.host(ClientStore(None)), world.wave), quorum=0)
            else:
                next(begun, None)
    except ValueError as error:
        return str(error)
    except Exception:
        return ""
    return ""
