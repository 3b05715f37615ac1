"""The server's mean of 100 updates of 32 MiB, as a share of the speed at which this memory can be read.

An update is 32 MiB of float32 in ten named tensors of three sizes. Every byte of every update has to be read once, so

    share = 100 × 32 MiB / seconds of ``weighted_mean`` / bandwidth.

**Bandwidth** is the faster of two plain kernels on the same threads and the same memory: a read-only sum of all 100 updates in one go
(bytes read), and the triad a = b + s·c over thirds of them (bytes read plus bytes written, as STREAM counts). Whatever the mean reads
twice, converts or writes counts against it.
"""

from __future__ import annotations

from statistics import median

import torch

from bench.figure import command
from bench.row import Row
from bench.timing import interleaved
from fedloom.messages import Update
from fedloom.tensors import weighted_mean

UPDATES, FLOATS, REPEATS = 100, 2**23, 5
SPLIT = (5, 2, 2, 1, 1, 1, 1, 1, 1, 1)
"""Sixteenths of an update: the sizes of its tensors, (rows, 1024) each."""


def named(update: torch.Tensor) -> dict[str, torch.Tensor]:
    """Tensors that are views of one update's floats."""
    parts = update.split([update.numel() // 16 * sixteenths for sixteenths in SPLIT])
    return {f"layer.{i:02d}.weight": part.view(-1, 1024) for i, part in enumerate(parts)}


def measure(quick: bool) -> list[Row]:
    """The share, and the two rates behind it."""
    floats = FLOATS // 64 if quick else FLOATS
    memory = torch.empty(UPDATES, floats)
    memory.uniform_(-1, 1, generator=torch.Generator().manual_seed(1))
    updates = [Update(k, 10 + k, named(memory[k])) for k in range(UPDATES)]
    read, third = memory.numel() * 4, UPDATES // 3
    result, b, c = (torch.empty(third, floats), memory[:third], memory[third : 2 * third])
    seconds = interleaved(
        {
            "weighted_mean": lambda: weighted_mean((update.num_examples, update.tensors) for update in updates),
            "sum": lambda: memory.sum(),
            "triad": lambda: torch.add(b, c, alpha=0.5, out=result),
        },
        repeats=2 if quick else REPEATS,
    )
    moved = {"weighted_mean": read, "sum": read, "triad": 3 * result.numel() * 4}
    rates = {f"{name}, GB/s": [moved[name] / s / 1e9 for s in taken] for name, taken in seconds.items()}
    mean, bandwidth = median(rates["weighted_mean, GB/s"]), max(median(rates["sum, GB/s"]), median(rates["triad, GB/s"]))
    size = f"{UPDATES} updates of {floats * 4 / 2**20:g} MiB"
    note = f"{torch.get_num_threads()} threads; bandwidth {bandwidth:.1f} GB/s"
    return [
        Row(f"mean of {size}, share of memory bandwidth", 100 * mean / bandwidth, "%", 50.0, 80.0, "more", rates, note),
        Row(f"mean of {size}", median(seconds["weighted_mean"]), "s", None, None, "less", {"s": seconds["weighted_mean"]}, note),
    ]


if __name__ == "__main__":
    command(measure)
