"""Peak memory of a whole run with 10,000 devices over that of a run with 100.

Each run is a process of its own, ``fedloom run METHOD`` as the command line does it, with the same cohort of 10 and two or three training
rows a device: devices alike, 100 times as many of them. (On the same rows a hundred devices would hold a hundred times as many each, and
what their training takes would hide what the number of devices costs.) Both runs read the same folder and are evaluated on the same rows.

A run is one process unless told otherwise. Taken is the peak resident set that the operating system tells of the ended process,
everything included: interpreter, libraries, set-up of all devices, rounds, evaluation of all devices, report. Nothing is subtracted.

- ``lora``: devices keep nothing.
- ``fibecfed``: every device keeps private tensors, masks and scores. LoRA r32 on a small BERT, one of two layers local: about 32 kB of
  private tensors a device, so 320 MB if all devices' were held in memory at once.

This process imports neither PyTorch nor the package: a child begins as a copy of its parent, whose size would be the least it can tell.
"""

from __future__ import annotations

import os
import resource
import subprocess
import sys
import time
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory

from bench.figure import command
from bench.row import Row

AT_LEAST, AIM = 1.1, 1.02
FEW, MANY, COHORT, ROWS_A_DEVICE = 100, 10_000, 10, 2.4
REPEATS = {FEW: 3, MANY: 1}
"""Runs of each: the many take minutes, and differ by less than the few."""

METHODS = {"fibecfed": ("--method.gal.count", "1"), "lora": ()}


def peak(method: str, clients: int, made: Path, out: Path) -> tuple[float, float]:
    """(peak resident MiB, seconds) of one run.

    Raises:
        RuntimeError: the run failed, or this process is too large for the number to be the child's.
    """
    rows = ("--max-train", str(round(ROWS_A_DEVICE * clients)), "--partition", "iid")
    shape = ("--clients", str(clients), "--cohort", str(COHORT), "--rounds", "2", "--evaluate-every", "0", *rows)
    inputs = ("--data", str(made / "data"), "--model", str(made / "model"), "--adapter.rank", "32")
    words = [sys.executable, "-m", "fedloom", "run", method, *inputs, *shape, *METHODS[method], "--plain", "--out", str(out)]
    log, begun = out.with_suffix(".log"), time.perf_counter()
    with log.open("w") as said:
        started = subprocess.Popen(words, stdout=said, stderr=subprocess.STDOUT)
        _, status, usage = os.wait4(started.pid, 0)
        started.returncode = os.waitstatus_to_exitcode(status)
    if started.returncode:
        raise RuntimeError(f"{' '.join(words[2:])} ended with {started.returncode}: {log.read_text()[-500:]}")
    own = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    if own * 2 > usage.ru_maxrss:
        raise RuntimeError(f"this process peaked at {own} KiB, its child at {usage.ru_maxrss}: the child's number may be the parent's")
    return usage.ru_maxrss / 1024, time.perf_counter() - begun


def row(method: str, made: Path, folder: Path, quick: bool) -> Row:
    """One method's ratio."""
    few, many = (COHORT, 4 * COHORT) if quick else (FEW, MANY)
    peaks: dict[int, list[float]] = {few: [], many: []}
    seconds: dict[int, list[float]] = {few: [], many: []}
    for clients in (few, many):
        for i in range(1 if quick else REPEATS[clients]):
            mebibytes, took = peak(method, clients, made, folder / f"{method}-{clients}-{i}")
            peaks[clients].append(mebibytes)
            seconds[clients].append(took)
            print(f"{method}, {clients} devices: {mebibytes:.0f} MiB, {took:.0f} s", flush=True)
    samples = {f"{clients} devices, MiB": taken for clients, taken in peaks.items()}
    samples |= {f"{clients} devices, s": taken for clients, taken in seconds.items()}
    note = f"cohort {COHORT}; {median(peaks[few]):.0f} MiB with {few}, {median(peaks[many]):.0f} MiB with {many}"
    name = f"peak memory, {many:,} devices against {few}, {method}"
    return Row(name, median(peaks[many]) / median(peaks[few]), "x", AT_LEAST, AIM, "less", samples, note)


def measure(quick: bool) -> list[Row]:
    """One ratio a method."""
    with TemporaryDirectory(prefix="fedloom-bench-") as name:
        folder = Path(name)
        rows = ("--rows", "400", "--held-out", "50") if quick else ("--rows", str(round(ROWS_A_DEVICE * MANY)))
        subprocess.run([sys.executable, "-m", "bench.synthetic", str(folder / "made"), *rows], check=True)
        return [row(method, folder / "made", folder, quick) for method in METHODS]


if __name__ == "__main__":
    command(measure)
