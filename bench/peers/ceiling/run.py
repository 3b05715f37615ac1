"""What the machine gives when nothing is small: the plain PEFT step at large batches, each of rows of like lengths.

It trains on rows of the job's timed rounds, short and long as they come there, so its examples a second can be compared with anybody
else's. For information also the machine's matmul rate in the same precision, and the arithmetic's own limit (:func:`arithmetic`).
"""

from __future__ import annotations

import json
import math
import time

import torch
from setups import setup_of
from task import job_of, settings, start_of

SIZES, ENOUGH = (64, 128, 256), 1024
SQUARE, REPEATS = 2048, 8
STEP = 80
"""Examples of one step of a whole cohort."""

how = settings()
job, setup = job_of(how.job), setup_of(how)
model = setup.model(how)
setup.load(model, start_of(how))
rows = [row for t in range(1, how.rounds) for place in job.cohort(t) for row in job.rows(t, place)]
rows = sorted(rows, key=lambda row: len(job.text(row)))[:: math.ceil(len(rows) / ENOUGH)]


def rate(size: int) -> float:
    """Examples a second over all rows, in batches of ``size``."""
    batches = [job.pad(rows[at : at + size]) for at in range(0, len(rows), size)]
    optimizer = setup.optimizer(model, how)
    setup.step(model, optimizer, batches[len(batches) // 2], how)
    began = time.perf_counter()
    for batch in batches:
        setup.step(model, optimizer, batch, how)
    return len(rows) / (time.perf_counter() - began)


def matmul() -> float:
    """GFLOP/s of one large square product, the best of some."""
    a, b = (torch.randn(SQUARE, SQUARE).to(how.dtype) for _ in range(2))
    torch.mm(a, b)
    seconds = []
    for _ in range(REPEATS):
        began = time.perf_counter()
        torch.mm(a, b)
        seconds.append(time.perf_counter() - began)
    return 2 * SQUARE**3 / min(seconds) / 1e9


def arithmetic() -> float:
    """Examples a second if the frozen layers' products were all that takes time, at the rate of the fastest kernel here, oneDNN's on
    packed weights: nobody who trains LoRA in every layer can be faster. Only real tokens, and only what a gradient needs: the first layer
    sends nothing back through its query, key and value, of the last layer all tokens need key and value alone.
    """
    tokens = sum(len(job.text(row)) for row in rows) / len(rows) * STEP
    config = model.config
    dtype = how.dtype if torch.ops.mkldnn._is_mkldnn_bf16_supported() else torch.float32  # which is then the fastest way to bf16, too
    d, inner, layers = config.hidden_size, config.intermediate_size, config.num_hidden_layers
    square, up, down = ((d, d), (inner, d), (d, inner))
    times = {square: 4 * (layers - 1) + 2 + 4 * (layers - 2) + 1 + 2, up: 2 * (layers - 1), down: 2 * (layers - 1)}
    spent = 0.0
    for (out, into), count in times.items():
        x, weight = torch.randn(int(tokens), into).to(dtype), torch.randn(out, into).to(dtype)
        packed = torch.ops.mkldnn._reorder_linear_weight(weight, len(x))
        seconds = []
        for _ in range(REPEATS):
            began = time.perf_counter()
            torch.ops.mkldnn._linear_pointwise(x, packed, None, "none", [], "")
            seconds.append(time.perf_counter() - began)
        spent += count * min(seconds)
    return STEP / spent


found = {"rates": {size: rate(size) for size in SIZES}, "gflops": matmul(), "arithmetic": arithmetic()}
how.out.write_text(json.dumps(found), encoding="utf-8")
