"""The world most figures are measured in: the packaged TREC questions on 100 devices, the MiniLM encoder with LoRA r8.

``quick`` puts a small random BERT in the encoder's place: for seeing that a figure runs.
"""

from __future__ import annotations

import atexit
import shutil
from dataclasses import replace
from functools import cache
from pathlib import Path
from tempfile import mkdtemp
from typing import Any

import torch

from bench.synthetic import bert_into
from fedloom.model.base import Precision
from fedloom.run.experiment import Experiment
from fedloom.run.world import World, build


@cache
def small_bert() -> str:
    """A folder with the small random BERT, gone when the process ends."""
    folder = mkdtemp(prefix="fedloom-bench-")
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    return str(bert_into(Path(folder)))


def world(method: Any, quick: bool, *, precision: Precision = "float32", rows: int = 0, model: str = "minilm", **shape: Any) -> World:
    """The world of ``method``: ``rows`` training rows (0: all), other fields of the experiment by name."""
    return build(Experiment(method, model=small_bert() if quick else model, precision=precision, max_train=rows, **shape))


def of(here: World, method: Any) -> World:
    """The same world under another method."""
    return replace(here, experiment=replace(here.experiment, method=method))


def moved(tensors: dict[str, torch.Tensor], seed: int, by: float = 0.02) -> dict[str, torch.Tensor]:
    """The tensors somewhere else, by Gaussian noise of standard deviation ``by``: each device's own, and no B that is zero. On the CPU."""
    generator = torch.Generator().manual_seed(seed)
    return {name: tensor.cpu() + by * torch.randn(tensor.shape, generator=generator) for name, tensor in tensors.items()}
