"""Difficulty scores, ‖∇ℓ(s_i)‖² of every example of 100 devices, against what they have to be nearly free beside.

- **cost**: seconds of one ``Score`` item a device over seconds of one ``Fit`` item a device on exactly the same examples, each example
  once, in batches of eight of like lengths; same compute, float32. Both are one stacked forward and backward pass over all examples;
  what a score costs more is the price of a norm per example instead of one gradient a batch.
- **speed**: seconds an example of a plain autograd loop (one backward pass an example: ``Serial``) over seconds an example of ``Score``.
  The loop runs on examples evenly spaced in order of length, so their lengths are those of the whole.
"""

from __future__ import annotations

from statistics import median

import numpy as np

from bench.figure import command
from bench.row import Row
from bench.timing import interleaved, ratio
from bench.trec import moved, world
from fedloom.compute.serial import Serial
from fedloom.compute.work import AdamW, Fit, Score
from fedloom.data.examples import Examples
from fedloom.methods.fedavg import FedAvg

ROWS, LOOPED, REPEATS, BATCH = 2000, 100, 5, 8


def by_length(examples: Examples) -> list[np.ndarray]:
    """All examples once, in batches of texts of like lengths, the longest first."""
    order = np.argsort(-examples.lengths, kind="stable")
    return [order[at : at + BATCH] for at in range(0, len(order), BATCH)]


def measure(quick: bool) -> list[Row]:
    """The two ratios."""
    here = world(FedAvg(), quick, rows=240 if quick else ROWS)
    at = moved(here.model.initial, seed=1)
    shards = [here.device(k).train for k in here.pool.clients]
    scores = [Score(at, shard) for shard in shards]
    fits = [Fit(at, shard, by_length(shard), AdamW(1e-3)) for shard in shards]
    everything = here.splits["train"]
    step = len(everything) // (8 if quick else LOOPED)
    spaced = np.argsort(everything.lengths, kind="stable")[step // 2 :: step]
    looped, loop = [Score(at, everything.subset(spaced))], Serial(here.model)
    seconds = interleaved(
        {
            "stacked Score": lambda: here.compute.run(scores),
            "stacked Fit": lambda: here.compute.run(fits),
            "one-by-one loop": lambda: loop.run(looped),
        },
        repeats=2 if quick else REPEATS,
    )
    score, fit = seconds["stacked Score"], seconds["stacked Fit"]
    n = sum(len(shard) for shard in shards)
    each = {name: [1e3 * s / (len(spaced) if name == "one-by-one loop" else n) for s in taken] for name, taken in seconds.items()}
    samples = {f"{name}, ms an example": taken for name, taken in each.items()}
    note = f"{n} TREC questions on 100 devices, MiniLM, LoRA r8, float32"
    return [
        Row("difficulty scores: cost against one forward and backward pass", ratio(score, fit), "x", 1.3, 1.1, "less", samples, note),
        Row(
            "difficulty scores: speed against a loop over examples",
            ratio(*(each[k] for k in ("one-by-one loop", "stacked Score"))),
            "x",
            4.0,
            8.0,
            "more",
            samples,
            note,
        ),
        Row("difficulty scores: time an example", median(each["stacked Score"]), "ms", None, None, "less", {}, note),
    ]


if __name__ == "__main__":
    command(measure)
