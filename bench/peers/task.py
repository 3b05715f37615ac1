"""What the peers have in common: their settings, the job and the result. How they load and train is in ``setups.py``. Nothing of Fedloom.

The job's folder is described in ``bench/job.py``.
"""

from __future__ import annotations

import argparse
import functools
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file, save_file

PAD = 0


@dataclass(frozen=True)
class Settings:
    """How a contestant computes.

    Attributes:
        job: folder of the job.
        out: file for the result.
        rounds: rounds to run, from the job's first on.
        precision: float32, or bf16: the frozen base in bfloat16, trained tensors in float32 under autocast.
        setup: as-documented or tuned, see ``setups.py``.
        attention: eager or sdpa, transformers' two ways on a CPU, for the tuned; or default, transformers' own choice.
        processes: workers, for whoever starts its own.
        threads: PyTorch threads a process.
    """

    job: Path
    out: Path
    rounds: int
    precision: str
    setup: str
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
        words = ("job", "out", "precision", "setup", "attention")
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


def start_of(how: Settings) -> dict[str, torch.Tensor]:
    """What every trained tensor starts from, by the names that PEFT saves."""
    return load_file(how.job / "start.safetensors")


def write(how: Settings, seconds: Sequence[float], after_first: Mapping[str, torch.Tensor] | None = None) -> None:
    """The result: seconds and examples of each round, and the trained tensors after the first one."""
    job = job_of(how.job)
    if after_first is not None:
        save_file({name: tensor.contiguous() for name, tensor in after_first.items()}, how.out.with_suffix(".safetensors"))
    result = {"seconds": list(seconds), "examples": [job.examples(t) for t in range(how.rounds)]}
    how.out.write_text(json.dumps(result), encoding="utf-8")
