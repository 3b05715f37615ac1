"""Personalised evaluation: 100 devices, each with a model of its own, against one model predicting the same examples.

The examples are those of an evaluation of a run: every device's own validation and test questions, two ``Predict`` items a device,
each at tensors of its own. Against it, whichever is faster of two ways to predict the same examples with one set of tensors at the
same precision: two items, one a split, in the same compute; or a plain loop of forward passes over batches of 64 texts of like lengths.
"""

from __future__ import annotations

import os
from statistics import median

import numpy as np
import torch

from bench.figure import BF16, NO_BF16, command
from bench.row import Row
from bench.timing import interleaved, ratio
from bench.trec import moved, world
from fedloom.compute.work import Predict
from fedloom.data.tasks import Split
from fedloom.methods.fedavg import FedAvg
from fedloom.model.base import Model, Precision
from fedloom.model.kernels import computes_bf16
from fedloom.model.texts import as_batch

AT_LEAST, AIM, REPEATS, PLAIN = 1.3, 1.05, 5, 64
SPLITS: tuple[Split, ...] = ("validation", "test")
PRECISIONS: tuple[Precision, ...] = ("float32", "bf16")
NAME = "personalised evaluation of 100 devices against one model"


def held_against_one(precision: Precision, quick: bool) -> list[Row]:
    """The ratio at one precision."""
    rows, most = (240, 100) if quick else (0, 0)  # 0: all
    here = world(FedAvg(), quick, precision=precision, rows=rows, max_validation=most, max_test=most)
    devices = [here.device(k) for k in here.pool.clients]
    own = [moved(here.model.initial, seed=k) for k in here.pool.clients]
    personal = [Predict(at, device.shard(split)) for at, device in zip(own, devices, strict=True) for split in SPLITS]
    whole = [Predict(own[0], here.splits[split]) for split in SPLITS]
    n = sum(len(item.examples) for item in whole)
    if n != sum(len(item.examples) for item in personal):
        raise AssertionError("the devices' shards are not the whole split; the two sides would not predict the same examples")
    contestants = {
        "100 models": lambda: here.compute.run(personal),
        "one model": lambda: here.compute.run(whole),
        "one model, plain": lambda: [plain(here.model, item) for item in whole],
    }
    seconds = interleaved(contestants, repeats=2 if quick else REPEATS)
    samples = {f"{name}, ms an example": [1e3 * s / n for s in taken] for name, taken in seconds.items()}
    against = min(("one model", "one model, plain"), key=lambda name: median(seconds[name]))
    name = f"{NAME}, {precision}"
    note = f"{n} TREC questions, MiniLM, LoRA r8; against '{against}'"
    return [Row(name, ratio(seconds["100 models"], seconds[against]), "x", AT_LEAST, AIM, "less", samples, note)]


def plain(model: Model, item: Predict) -> torch.Tensor:
    """Logits (n, C) of the item's examples in order of length: what a loop over batches of like lengths does."""
    order = np.argsort(-item.examples.lengths, kind="stable")
    made = []
    with torch.no_grad():
        for at in range(0, len(order), PLAIN):
            padded = item.examples.pad(order[at : at + PLAIN], pad_id=model.pad_id, side=model.side)
            made.append(model.forward(item.at, as_batch(vars(padded), model.device), model.dtype)[0])
    return torch.cat(made)


def measure(quick: bool) -> list[Row]:
    """The ratio at both precisions; bf16 where the processor has instructions for it, or somebody asks."""
    skipped = "bf16" if not (os.environ.get(BF16) or computes_bf16()) else ""
    measured = [row for precision in PRECISIONS if precision != skipped for row in held_against_one(precision, quick)]
    return [*measured, Row(f"{NAME}, bf16", None, "x", AT_LEAST, AIM, "less", note=NO_BF16)] if skipped else measured


if __name__ == "__main__":
    command(measure)
