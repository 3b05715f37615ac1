"""Large models on an accelerator: the shapes of RoBERTa-large and of a Llama of one billion parameters, weights random, bfloat16.

Ten devices, each with LoRA r8 of its own, four steps of 8 examples of 128 tokens. Measured a shape:

- seconds one by one (``Serial``) over seconds stacked (``Stacked``), same items;
- floating-point operations a second of the stacked pass, counted on the model's real graph, as a share of what the accelerator does in
  a bfloat16 product of two square matrices of 8192;
- peak memory of the stacked pass, weights included;
- for the smaller shape, in float32: two devices' losses on the accelerator against those on the processor.

Without CUDA all rows say "not measured". ``python -m bench.figures.gpu --toy`` runs the same code at toy size on the processor.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch

from bench.figure import command
from bench.row import Row
from bench.synthetic import tokenizer_into
from bench.timing import interleaved, ratio
from bench.trec import moved
from fedloom.compute.serial import Serial
from fedloom.compute.stacked import Stacked
from fedloom.compute.work import AdamW, Fit
from fedloom.data.examples import Examples
from fedloom.model.base import Model, Precision
from fedloom.model.loading import load

DEVICES, STEPS, REPEATS = 10, 4, 5
LABELS = 6
PARITY = 1e-3
"""How far a loss near ln 6 may be from the processor's, both in float32."""


@dataclass(frozen=True)
class Shape:
    """A model's shape and the size of the job: ``batch`` examples a step of ``length`` tokens, a ``square`` of the matrix product."""

    name: str
    kind: str
    config: Mapping[str, Any]
    batch: int = 8
    length: int = 128
    square: int = 8192


ROBERTA_LARGE = Shape(
    "RoBERTa-large shape",
    "roberta",
    {
        "hidden_size": 1024,
        "num_hidden_layers": 24,
        "num_attention_heads": 16,
        "intermediate_size": 4096,
        "vocab_size": 50265,
        "max_position_embeddings": 514,
        "type_vocab_size": 1,
        "pad_token_id": 0,
    },
)
LLAMA_1B = Shape(
    "1B Llama shape",
    "llama",
    {
        "hidden_size": 2048,
        "num_hidden_layers": 16,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "head_dim": 64,
        "intermediate_size": 8192,
        "vocab_size": 128256,
        "max_position_embeddings": 4096,
        "pad_token_id": 0,
    },
)
SHAPES = (ROBERTA_LARGE, LLAMA_1B)

SMALL = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64, "vocab_size": 500}
TOY = (
    Shape("RoBERTa toy", "roberta", {**ROBERTA_LARGE.config, **SMALL}, batch=2, length=16, square=64),
    Shape("Llama toy", "llama", {**LLAMA_1B.config, **SMALL, "num_key_value_heads": 2, "head_dim": 8}, batch=2, length=16, square=64),
)
"""The same code in seconds on a processor; its numbers say nothing."""


@dataclass(frozen=True)
class Figures:
    """What was measured of one shape; ``loss_deviation`` is None where it is not asked for."""

    seconds: Mapping[str, list[float]]
    flops: float
    matmul: list[float]
    peak_bytes: int
    loss_deviation: float | None


def saved(shape: Shape, folder: Path, device: str) -> str:
    """A Hugging Face folder of that shape with random weights in bfloat16."""
    from transformers import AutoConfig, AutoModelForSequenceClassification
    from transformers.utils import logging

    logging.disable_progress_bar()
    config = AutoConfig.for_model(shape.kind, **shape.config)
    with torch.random.fork_rng(), torch.device(device):
        torch.manual_seed(7)
        module = AutoModelForSequenceClassification.from_config(config, dtype=torch.bfloat16)
    module.save_pretrained(folder)
    tokenizer_into(folder)
    return str(folder)


def loaded(folder: str, shape: Shape, precision: Precision, device: str) -> Model:
    """The model with LoRA r8."""
    return load(folder, num_labels=LABELS, max_length=shape.length, precision=precision, device=device)


def items(model: Model, shape: Shape, devices: int = DEVICES, steps: int = STEPS) -> list[Fit]:
    """One ``Fit`` a device: tensors and random examples of its own, each as long as can be."""
    made = []
    for k in range(devices):
        draw, count = np.random.default_rng(k), steps * shape.batch
        ids = draw.integers(5, int(shape.config["vocab_size"]), size=(count, shape.length))
        examples = Examples.of(ids.tolist(), draw.integers(0, LABELS, size=count).tolist())
        batches = list(np.arange(count).reshape(steps, shape.batch))
        made.append(Fit(moved(model.initial, seed=k), examples, batches, AdamW(1e-4)))
    return made


def synchronised(device: str, act: Callable[[], object]) -> Callable[[], None]:
    """``act``, over when the accelerator is done."""

    def run() -> None:
        act()
        if device == "cuda":
            torch.cuda.synchronize()

    return run


def matmul_rate(device: str, square: int, repeats: int) -> list[float]:
    """Floating-point operations a second of a product of two bfloat16 matrices, each sample over ten products."""
    a, b = (torch.randn(square, square, device=device, dtype=torch.bfloat16) for _ in range(2))
    act = synchronised(device, lambda: [a @ b for _ in range(10)])
    act()
    rates = []
    for _ in range(repeats):
        begun = time.perf_counter()
        act()
        rates.append(10 * 2 * square**3 / (time.perf_counter() - begun))
    return rates


def loss_deviation(folder: str, shape: Shape, device: str) -> float:
    """The largest difference of a loss between two devices' steps there and on the processor, float32, two short steps."""
    short = Shape(shape.name, shape.kind, shape.config, shape.batch // 2, shape.length // 2)
    losses = []
    for where in (device, "cpu"):
        model = loaded(folder, shape, "float32", where)
        losses.append([done.result.losses for done in Stacked(model).run(items(model, short, devices=2, steps=2))])
    return float(np.abs(np.array(losses[0]) - np.array(losses[1])).max())


def measured(shape: Shape, device: str, parity: bool, repeats: int) -> Figures:
    """Everything about one shape."""
    with TemporaryDirectory(prefix="fedloom-bench-") as folder:
        where = saved(shape, Path(folder), device)
        seconds, flops, peak = raced(where, shape, device, repeats)
        rate = matmul_rate(device, shape.square, repeats)
        return Figures(seconds, flops, rate, peak, loss_deviation(where, shape, device) if parity else None)


def raced(folder: str, shape: Shape, device: str, repeats: int) -> tuple[dict[str, list[float]], float, int]:
    """Seconds of each contestant; floating-point operations and peak bytes of the stacked pass. Its model is gone when it returns."""
    model = loaded(folder, shape, "bf16", device)
    work, stacked, serial = items(model, shape), Stacked(model), Serial(model)
    flops = sum(done.flops for done in stacked.run(work))  # counts once, and warms up
    peak = 0
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
        synchronised(device, lambda: stacked.run(work))()
        peak = torch.cuda.max_memory_allocated()
    contestants = {"stacked": lambda: stacked.run(work), "one by one": lambda: serial.run(work)}
    return interleaved({name: synchronised(device, act) for name, act in contestants.items()}, repeats), flops, peak


def rows(shape: Shape, found: Figures | None, why: str, parity: bool) -> list[Row]:
    """The rows of one shape; with no figures, "not measured" and ``why``."""
    n, samples, numbers = DEVICES * STEPS * shape.batch, {}, (None, None, None, None)
    if found is not None:
        stacked = found.seconds["stacked"]
        samples = {f"{name}, s": taken for name, taken in found.seconds.items()} | {"matmul, TFLOP/s": [r / 1e12 for r in found.matmul]}
        share = 100 * found.flops / median(stacked) / median(found.matmul)
        numbers = (ratio(found.seconds["one by one"], stacked), share, found.peak_bytes / 1e9, n / median(stacked))
        why = f"{DEVICES} devices × batch {shape.batch} × {shape.length} tokens, LoRA r8, bf16"
    speed, share, peak, rate = numbers
    made = [
        Row(f"{shape.name}: stacked against one by one", speed, "x", 3.0, None, "more", samples, why),
        Row(f"{shape.name}: share of the matrix product's rate", share, "%", 35.0, 50.0, "more", samples, why),
        Row(f"{shape.name}: examples a second", rate, "1/s", None, None, "more", {}, why),
        Row(f"{shape.name}: peak memory", peak, "GB", None, None, "less", {}, why),
    ]
    if parity:
        deviation = None if found is None else found.loss_deviation
        told = why if found is None else "float32, two devices, two steps"
        made.append(Row(f"{shape.name}: loss against the processor's", deviation, "nats", PARITY, None, "less", {}, told))
    return made


def figures(device: str, shapes: tuple[Shape, ...], repeats: int) -> list[Row]:
    """All rows, on ``device``; the first shape is compared with the processor too."""
    return [row for i, shape in enumerate(shapes) for row in rows(shape, measured(shape, device, i == 0, repeats), "", i == 0)]


def measure(quick: bool) -> list[Row]:
    """The figures on CUDA; without it, rows that say so."""
    if torch.cuda.is_available():
        return figures("cuda", TOY if quick else SHAPES, 2 if quick else REPEATS)
    return [
        row for i, shape in enumerate(SHAPES) for row in rows(shape, None, "no accelerator: torch.cuda.is_available() is False", i == 0)
    ]


if __name__ == "__main__":
    toy = "--toy" in sys.argv
    command((lambda quick: figures("cpu", TOY, 2)) if toy else measure, [word for word in sys.argv[1:] if word != "--toy"])
