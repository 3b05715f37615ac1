"""A compute that counts what work would cost and does none of it: for what an experiment would be, and for what another would have been."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch

from fedloom.compute.compute import Done
from fedloom.compute.flops import Flops
from fedloom.compute.serial import cost, scored_names
from fedloom.compute.work import (
    Fisher,
    Fit,
    Fitted,
    Initial,
    Moments,
    Predict,
    Pretrained,
    Score,
    Sensitivity,
    Spectral,
    Spectrum,
    WorkItem,
)
from fedloom.model.base import Model


class Pretended:
    """A compute that does nothing: results of the right shapes at the right cost."""

    def __init__(self, model: Model) -> None:
        self.model, self.flops = model, Flops(model)

    def run(self, items: Sequence[WorkItem]) -> list[Done]:
        """One :class:`Done` an item, in order."""
        return [Done(self._result(item), *cost(item, self.flops)) for item in items]

    def _result(self, item: WorkItem) -> Any:
        match item:
            case Fit():
                still = {name: torch.zeros_like(tensor) for name, tensor in item.start.items()}
                watched, means = (still if asked else {} for asked in (item.watch, item.means))
                return Fitted(dict(item.start), np.zeros(len(item.batches)), Moments(still, still, 0), watched, means)
            case Score():
                return np.zeros(len(item.examples))
            case Fisher():
                return {name: torch.zeros_like(item.at[name]) for name in scored_names(item)}
            case Sensitivity():
                return np.ones(self.model.depth)
            case Spectrum():
                return Spectral(np.zeros(1), np.ones(1), 1.0)  # without a gap
            case Pretrained():
                return self.model.weights
            case Initial():
                return self.model.initial
            case Predict():
                return torch.zeros(len(item.examples), self.model.width)


@contextmanager
def silent(log: logging.Logger) -> Iterator[None]:
    """The log says nothing inside the block: what is only counted finds nothing that is so."""
    before, log.disabled = log.disabled, True
    try:
        yield
    finally:
        log.disabled = before
