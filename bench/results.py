"""What ``results.json`` holds: the machine, the versions, and every figure with all of its samples."""

from __future__ import annotations

import importlib.metadata
import json
import os
import platform
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from bench.row import Row

ROOT = Path(__file__).resolve().parents[1]
LIBRARIES = ("fedloom", "torch", "transformers", "peft", "datasets", "safetensors", "numpy", "flwr")
THREADS = ("OMP_NUM_THREADS", "MKL_NUM_THREADS")
PROBE = """
import torch
bf16 = torch.backends.mkldnn.is_available() and torch.ops.mkldnn._is_mkldnn_bf16_supported()
print(torch.get_num_threads(), bf16, torch.cuda.get_device_name() if torch.cuda.is_available() else "none", sep="\\n")
"""


@dataclass(frozen=True)
class Entry:
    """One measured figure: when, from which commit ("+" after it: with changes not committed), how long it took, its rows."""

    when: str
    commit: str
    seconds: float
    rows: tuple[Row, ...]


@dataclass(frozen=True)
class Results:
    """All figures measured under the same circumstances. ``quick``: at toy size, so that no number means anything."""

    quick: bool
    machine: dict[str, Any]
    versions: dict[str, str]
    figures: dict[str, Entry]

    @property
    def rows(self) -> list[Row]:
        """The rows of all figures, in order."""
        return [row for entry in self.figures.values() for row in entry.rows]

    def difference(self, other: Results) -> str | None:
        """Why figures of both may not stand in one table: what differs first, or None."""
        mine, its = ({"quick": r.quick, **r.machine, **r.versions} for r in (self, other))
        differing = [name for name in {**mine, **its} if mine.get(name, "absent") != its.get(name, "absent")]
        return f"{differing[0]} was {mine.get(differing[0], 'absent')} and is {its.get(differing[0], 'absent')}" if differing else None

    def merged(self, newer: Results, order: Sequence[str]) -> Results:
        """These figures, those of ``newer`` in their place."""
        found = {**self.figures, **newer.figures}
        return Results(self.quick, self.machine, self.versions, {name: found[name] for name in order if name in found})


def save(results: Results, path: Path) -> None:
    """Write ``results.json`` in one go."""
    scratch = path.with_suffix(".tmp")
    scratch.write_text(json.dumps(asdict(results), indent=1), encoding="utf-8")
    os.replace(scratch, path)


def load(path: Path) -> Results:
    """What :func:`save` wrote."""
    saved = json.loads(path.read_text(encoding="utf-8"))
    entries = {name: Entry(**{**e, "rows": tuple(Row(**row) for row in e["rows"])}) for name, e in saved["figures"].items()}
    return Results(saved["quick"], saved["machine"], saved["versions"], entries)


def entry(seconds: float, rows: Sequence[Row]) -> Entry:
    """A figure measured just now."""
    return Entry(datetime.now(UTC).isoformat(timespec="seconds"), commit(), seconds, tuple(rows))


def machine() -> dict[str, Any]:
    """The machine as far as it bears on speed; no name of it."""
    threads, bf16, accelerator = subprocess.run(
        [sys.executable, "-c", PROBE], capture_output=True, text=True, check=True, env={**os.environ, "TORCH_CPP_LOG_LEVEL": "ERROR"}
    ).stdout.splitlines()
    return {
        "processor": _processor(),
        "cores": len(os.sched_getaffinity(0)),
        "memory_gb": round(os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / 1e9),
        "system": f"{platform.system()} {platform.machine()}",
        "accelerator": accelerator,
        "bf16 instructions": bf16 == "True",
        "torch threads": int(threads),
        **{name: os.environ[name] for name in THREADS if name in os.environ},
    }


def versions() -> dict[str, str]:
    """Python and the libraries; a library that is not installed is left out."""
    found = {"python": platform.python_version()}
    for name in LIBRARIES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def commit() -> str:
    """The commit of the working tree, "+" after it if files differ from it; "unknown" without git."""
    try:
        head = _git("rev-parse", "--short", "HEAD")
        return head + ("+" if _git("status", "--porcelain", "--untracked-files=no") else "")
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


def _git(*words: str) -> str:
    return subprocess.run(["git", *words], cwd=ROOT, capture_output=True, text=True, check=True).stdout.strip()


def _processor() -> str:
    path = Path("/proc/cpuinfo")
    lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
    named = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return named[0] if named else platform.processor() or platform.machine()
