"""How long one waits: from the command to the first training step, files in the operating system's cache.

A process is spawned that runs ``fedloom run lora`` as the command line does and ends when the first ``Fit`` reaches its compute
(``bench/first_step.py``). The clock starts before the spawning. The first run warms the file cache and is thrown away.

Held to the bound is the run with ``--evaluate-every 0``: interpreter, libraries, options, data, tokens, model, run folder, first
cohort and its tasks. By default a run evaluates the untrained model first; that time is told beside it.
"""

from __future__ import annotations

import subprocess
import sys
import time
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory

from bench.figure import command
from bench.first_step import MARK
from bench.row import Row

REPEATS = 5
AT_ONCE = ("--evaluate-every", "0")


def seconds(options: tuple[str, ...]) -> float:
    """From just before the spawning to the first training step.

    Raises:
        RuntimeError: the process ended without one.
    """
    with TemporaryDirectory(prefix="fedloom-bench-") as folder:
        words = [sys.executable, "-m", "bench.first_step", "run", "lora", *options, "--out", str(Path(folder) / "run")]
        begun = time.perf_counter()
        ended = subprocess.run(words, capture_output=True, text=True)
    marked = [line for line in ended.stdout.splitlines() if line.startswith(MARK)]
    if not marked:
        raise RuntimeError(f"{' '.join(words[2:])} ended with {ended.returncode} before a training step: {ended.stderr[-500:]}")
    return float(marked[0].removeprefix(MARK)) - begun


def measure(quick: bool) -> list[Row]:
    """Seconds without and with the evaluation of the untrained model."""
    seconds(AT_ONCE)
    repeats = 1 if quick else REPEATS
    plain, evaluated = [seconds(AT_ONCE) for _ in range(repeats)], [] if quick else [seconds(()) for _ in range(3)]
    name, note = "from command to first training step", "warm file cache"
    rows = [Row(name, median(plain), "s", 5.0, 3.0, "less", {"s": plain}, f"{note}; fedloom run lora {' '.join(AT_ONCE)}")]
    if evaluated:
        told = f"{note}; fedloom run lora"
        rows.append(Row(f"{name}, untrained model evaluated first", median(evaluated), "s", None, None, "less", {"s": evaluated}, told))
    return rows


if __name__ == "__main__":
    command(measure)
