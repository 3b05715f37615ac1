"""The options of each command as dataclass types, from which the command line is generated.

The type for a method has that method's own type as its field ``method``: so ``--method.FIELD`` and its help are always what the method has.
This module does not know how words are parsed.
"""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, get_type_hints

from fedloom.run.experiment import Experiment
from fedloom.run.recipes import Recipe
from fedloom.run.tracking import Name

OUT = ("out", Path | None, None, "the folder to write (default: one named after the experiment, so that the same command resumes).")
PLAIN = ("plain", bool, False, "plain lines instead of the live view.")
TRACK = (
    *("track", tuple[Name, ...], ()),
    "write every round to these too, in the run's folder: tensorboard, mlflow, wandb (the extra 'track'; docs/tutorial.md).",
)
GRID = (
    ("alphas", tuple[float, ...], (), "several alphas: each method with each, on each data set (default: the one of --alpha)."),
    ("seeds", tuple[int, ...], (), "several seeds: each method once with each (default: the one of --seed)."),
    ("lr", float | None, None, "the learning rate of every method (default: each method's own)."),
    (
        *("lrs", tuple[float, ...], ()),
        "learning rates to search, the same for every method: for each data set and alpha, each is run with the first seed, and the one "
        "with the best personalised validation score after the last round is used with all seeds. The test split has no part in it.",
    ),
    (
        *("share_training", bool, False),
        "evaluate lora-finetuned and lora-prior on what lora trained, instead of training the same again: after the last round only.",
    ),
    (
        *("jobs", int, 1),
        "runs at a time; of more than 1 each has a process of its own with one PyTorch thread. The results do not depend on how many "
        "(1 and 2: in float32 on a CPU where the model runs packed; docs/comparing.md says when else).",
    ),
    ("reference", str, "", "the method that the others are set against (default: the first named)."),
    ("target", float | None, None, "the score whose cost is told (default: what the reference ends with, seed by seed)."),
)
SHARDS = ("shards", Path | None, None, "write each device's rows as files of its own, in this new folder: DIR/K/train.parquet and so on.")
PLOT = ("plot", Path | None, None, "draw it: a .png or .svg file (without a name: partition.png).")
SAVE = ("save", Path | None, None, "write it to this file, for --partition FILE.")

Extra = tuple[str, Any, Any, str]
"""Name, type, default and help of an option that is no field of the experiment."""

OF_DATA = ("data", "clients", "partition", "alpha", "beta", "min_examples", "seed", "max_train", "max_validation", "max_test")
OF_DATA += ("task", "text", "label", "metric")


def for_run(recipe: Recipe) -> type[Any]:
    """Options of ``fedloom run``."""
    return _type(_fields(), (OUT, PLAIN, TRACK), recipe)


SERVE = (
    (
        *("certs", Path, Path("certs/server")),
        "the server's folder from fedloom certs: ca.pem, server.pem, server.key, and a public key for each device.",
    ),
    ("cohort", int, 0, "devices drawn a round (0: all of them, or as many as --start-with says)."),
    ("quorum", float, 0.5, "share of a cohort that must answer for a round to count; a round without it changes nothing."),
    ("listen", str, "127.0.0.1:9092", "HOST:PORT to listen on; 0.0.0.0:9092 for all of this machine's addresses."),
    ("wait", float, 60.0, "seconds to wait for a device that has not been heard of."),
    ("deadline", float, 600.0, "seconds that a device has for an answer."),
    ("start_with", int, 0, "devices with which to begin; the others may come later, between rounds (0: all are waited for)."),
    ("linger", float, 10.0, "seconds that the rest has once a quorum has answered."),
    ("overcommit", bool, False, "begin even if by prediction the server's part does not fit into this machine's memory."),
)
THERE = ("cohort", "quorum", "clients", "partition", "alpha", "beta", "min_examples", "engine")
"""What the devices bring, or a simulation alone has."""


def for_serve(recipe: Recipe) -> type[Any]:
    """Options of ``fedloom serve``."""
    return _type([name for name in _fields() if name not in THERE], (*SERVE, OUT, PLAIN, TRACK), recipe)


def for_describe(recipe: Recipe) -> type[Any]:
    """Options of ``fedloom describe``."""
    return _type(_fields(), (), recipe)


def for_compare() -> type[Any]:
    """Options of ``fedloom compare``: those of an experiment, with several data sets, and the grid."""
    several = {"data": (tuple[str, ...], ("trec",))}
    return _type([name for name in _fields() if name != "method"], (*GRID, OUT, PLAIN, TRACK), instead=several)


def for_partition() -> type[Any]:
    """Options of ``fedloom partition``."""
    return _type(OF_DATA, (PLOT, SAVE, SHARDS))


def experiment_of(given: Any, **fields: Any) -> Experiment:
    """The experiment that parsed options ask for; ``fields`` are those that no option gave."""
    named = {name: value for name, value in vars(given).items() if name in _fields()}
    return Experiment(**{**named, **fields})


def _fields() -> list[str]:
    return [f.name for f in dataclasses.fields(Experiment)]


def _type(
    names: Iterable[str], extras: Iterable[Extra], recipe: Recipe | None = None, instead: Mapping[str, tuple[Any, Any]] | None = None
) -> type[Any]:
    """A dataclass of these fields of ``Experiment`` and the extras; defaults are the recipe's experiment's where it has one.
    ``instead``: type and default of fields that have others than an experiment's."""
    hints, start = get_type_hints(Experiment), recipe.experiment if recipe else None
    made: list[tuple[str, Any] | tuple[str, Any, Any]] = []
    for name in names:
        if name == "method":
            assert recipe is not None
            given = recipe.start if start is None else start.method
            made.append((name, recipe.kind, _constant(given)) if given is not None else (name, recipe.kind))  # without: required or its own
        elif instead and name in instead:
            made.append((name, instead[name][0], _constant(instead[name][1])))
        else:
            own: Mapping[str, Any] = Experiment.__dataclass_fields__
            made.append((name, hints[name], _constant(getattr(start, name)) if start else _default(own[name])))
    made += [(name, hint, _constant(default)) for name, hint, default, _ in extras]
    kind = dataclasses.make_dataclass("Options", made, frozen=True)
    kind.__doc__ = inspect.cleandoc(Experiment.__doc__ or "") + "".join(f"\n    {name}: {text}" for name, _, _, text in extras)
    return kind


def _constant(value: Any) -> Any:
    return dataclasses.field(default_factory=lambda: value)


def _default(own: dataclasses.Field[Any]) -> Any:
    return dataclasses.field(default_factory=own.default_factory) if callable(own.default_factory) else _constant(own.default)
