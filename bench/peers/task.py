"""What the peers have in common: the model, the data and the local training that a user of PEFT would write. Nothing of Fedloom.

The job's folder is described in ``bench/job.py``. Dropout is off, so that everybody does the same arithmetic.
"""

from __future__ import annotations

import argparse
import functools
import json
import logging
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from peft import LoraConfig, TaskType, get_peft_model
from safetensors.torch import load_file, save_file
from torch.nn.functional import cross_entropy
from transformers import AutoModelForSequenceClassification
from transformers.utils import logging as transformers_logging

PAD = 0

os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
transformers_logging.set_verbosity_error()
transformers_logging.disable_progress_bar()
logging.getLogger("transformers").setLevel(logging.ERROR)


@dataclass(frozen=True)
class Settings:
    """How a contestant computes.

    Attributes:
        job: folder of the job.
        out: file for the result.
        rounds: rounds to run, from the job's first on.
        precision: float32, or bf16: the frozen base in bfloat16, trained tensors in float32 under autocast.
        attention: eager or sdpa, transformers' two ways on a CPU.
        processes: workers, for whoever starts its own.
        threads: PyTorch threads a process.
    """

    job: Path
    out: Path
    rounds: int
    precision: str
    attention: str
    processes: int
    threads: int

    @property
    def dtype(self) -> torch.dtype:
        """Of the frozen base."""
        return torch.bfloat16 if self.precision == "bf16" else torch.float32


def settings() -> Settings:
    """From the command line, or in a process that another one started from ``BENCH_SETTINGS``, which this sets."""
    if "BENCH_SETTINGS" not in os.environ:
        parser = argparse.ArgumentParser()
        words = ("job", "out", "precision", "attention")
        for name, kind in (*((word, str) for word in words), *((word, int) for word in ("rounds", "processes", "threads"))):
            parser.add_argument(f"--{name}", type=kind, required=True)
        os.environ["BENCH_SETTINGS"] = json.dumps(vars(parser.parse_args()))
    given = json.loads(os.environ["BENCH_SETTINGS"])
    torch.set_num_threads(given["threads"])
    return Settings(**{**given, "job": Path(given["job"]), "out": Path(given["out"])})


class Job:
    """The job's folder, read."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.settings: dict[str, Any] = json.loads((folder / "job.json").read_text(encoding="utf-8"))
        data = np.load(folder / "data.npz")
        self.tokens, self.offsets, self.labels = data["tokens"], data["offsets"], data["labels"]

    def rows(self, round: int, place: int) -> list[int]:
        """What the device at ``place`` in the cohort of ``round`` trains on, in order."""
        return self.settings["rounds"][round][place]["rows"]

    def cohort(self, round: int) -> range:
        """The places in the cohort of ``round``."""
        return range(len(self.settings["rounds"][round]))

    def examples(self, round: int) -> int:
        """Examples that the cohort of ``round`` trains on."""
        return sum(len(self.rows(round, place)) for place in self.cohort(round))

    def text(self, row: int) -> np.ndarray:
        """Token ids of one row."""
        return self.tokens[self.offsets[row] : self.offsets[row + 1]]

    def pad(self, rows: Sequence[int]) -> dict[str, torch.Tensor]:
        """A batch, padded to its longest: input_ids, attention_mask (B, L) and labels (B,)."""
        texts = [self.text(row) for row in rows]
        ids = np.full((len(texts), max(len(text) for text in texts)), PAD, np.int64)
        for i, text in enumerate(texts):
            ids[i, : len(text)] = text
        lengths = np.array([len(text) for text in texts])
        mask = (np.arange(ids.shape[1]) < lengths[:, None]).astype(np.int64)
        return {name: torch.from_numpy(a) for name, a in (("input_ids", ids), ("attention_mask", mask), ("labels", self.labels[rows]))}

    def batches(self, rows: Sequence[int]) -> Iterator[dict[str, torch.Tensor]]:
        """One epoch over ``rows``."""
        size = self.settings["batch"]
        for at in range(0, len(rows), size):
            yield self.pad(rows[at : at + size])


@functools.cache
def job_of(folder: Path) -> Job:
    """The job, read once a process."""
    return Job(folder)


@functools.cache
def model_of(how: Settings) -> Any:
    """The base with LoRA on it, loaded once a process; trained tensors in float32, at the job's start."""
    job = job_of(how.job)
    base = AutoModelForSequenceClassification.from_pretrained(
        job.settings["model"],
        num_labels=job.settings["classes"],
        dtype=how.dtype,
        attn_implementation=how.attention,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
        local_files_only=True,
    )
    model = get_peft_model(base, LoraConfig(task_type=TaskType.SEQ_CLS, r=job.settings["rank"], lora_alpha=job.settings["alpha"]))
    for parameter in trained(model):
        parameter.data = parameter.data.float()
    load(model, load_file(how.job / "start.safetensors"))
    return model


def trained(model: Any) -> list[torch.nn.Parameter]:
    """The parameters that are trained."""
    return list(named(model).values())


@functools.cache
def named(model: Any) -> dict[str, torch.nn.Parameter]:
    """The parameters that are trained, by the names that PEFT saves."""
    parts = (".modules_to_save.default", ".default")
    return {functools.reduce(lambda n, part: n.replace(part, ""), parts, n): p for n, p in model.named_parameters() if p.requires_grad}


def state(model: Any) -> dict[str, torch.Tensor]:
    """A copy of the trained tensors. PEFT's own functions go through the state dict of the whole model, which takes 30 ms each."""
    return {name: parameter.detach().clone() for name, parameter in named(model).items()}


@torch.no_grad()
def load(model: Any, tensors: Mapping[str, torch.Tensor]) -> None:
    """Put trained tensors into the model, in place."""
    for name, parameter in named(model).items():
        parameter.copy_(tensors[name])


def mixed(how: Settings) -> AbstractContextManager[Any]:
    """Autocast in bf16, nothing in float32."""
    return torch.autocast("cpu", torch.bfloat16) if how.precision == "bf16" else nullcontext()


def optimizer_of(model: Any, how: Settings) -> torch.optim.Optimizer:
    """A fresh AdamW."""
    s = job_of(how.job).settings
    return torch.optim.AdamW(trained(model), lr=s["lr"], weight_decay=s["weight_decay"], fused=True)


def step(model: Any, optimizer: torch.optim.Optimizer, batch: Mapping[str, torch.Tensor], how: Settings) -> float:
    """One step; returns its loss."""
    with mixed(how):
        logits = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
    loss = cross_entropy(logits.float(), batch["labels"])
    loss.backward()
    torch.nn.utils.clip_grad_norm_(trained(model), job_of(how.job).settings["clip"])
    optimizer.step()
    optimizer.zero_grad()
    return loss.item()


def train(model: Any, rows: Sequence[int], how: Settings) -> float:
    """Local training: one epoch over a device's rows with a fresh AdamW. Returns the mean loss."""
    optimizer = optimizer_of(model, how)
    losses = [step(model, optimizer, batch, how) for batch in job_of(how.job).batches(rows)]
    return sum(losses) / len(losses)


def write(how: Settings, seconds: Sequence[float], after_first: Mapping[str, torch.Tensor] | None = None) -> None:
    """The result: seconds and examples of each round, and the trained tensors after the first one."""
    job = job_of(how.job)
    if after_first is not None:
        save_file({name: tensor.contiguous() for name, tensor in after_first.items()}, how.out.with_suffix(".safetensors"))
    result = {"seconds": list(seconds), "examples": [job.examples(t) for t in range(how.rounds)]}
    how.out.write_text(json.dumps(result), encoding="utf-8")
