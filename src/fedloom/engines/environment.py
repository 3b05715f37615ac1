"""What the environment of a process that is to be started says, where several share this machine.

This module does not know what the processes are for.
"""

from __future__ import annotations

import os

import torch

from fedloom.engines.heap import in_large_pages
from fedloom.model.machine import SHARERS, sharers


def environment(number: int, threads: int, processes: int) -> dict[str, str]:
    """What process ``number`` of so many ``processes`` has there besides: its threads (0: one), none for its tokenizer, large pages, its
    part of the memory and, where there are several GPUs (of those that this process may see), one of them."""
    gpus = (os.environ.get("CUDA_VISIBLE_DEVICES") or ",".join(map(str, range(torch.cuda.device_count())))).split(",")
    mine = {"CUDA_VISIBLE_DEVICES": gpus[number % len(gpus)]} if torch.cuda.device_count() > 1 else {}
    own = dict.fromkeys(("OMP_NUM_THREADS", "MKL_NUM_THREADS"), str(threads or 1))
    return {**own, "TOKENIZERS_PARALLELISM": "false", SHARERS: str(processes * sharers()), **in_large_pages(), **mine}
