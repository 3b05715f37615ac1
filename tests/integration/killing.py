"""Kill a run with signal 9 at a random moment, resume it, and compare all of its state with a run that was left alone.

    python tests/integration/killing.py FOLDER METHOD STACK TIMES [MODEL]

The process imports everything once and forks a child for each run, so that a kill can hit any moment of the work and not only the imports.
Prints one line a kill; exits with 1 at the first difference.
"""

from __future__ import annotations

import os
import signal
import sys
import time
from pathlib import Path

import numpy as np
import torch

from fedloom.methods import named
from fedloom.model.adapters import Adapter
from fedloom.run.checkpoint import fingerprint_of
from fedloom.run.experiment import EngineSettings, Experiment
from fedloom.run.loop import run
from tests import tiny


def experiment(method: str, stack: int, model: str) -> Experiment:
    """Six rounds of a small federation on packaged questions; of a block at a time a cycle of four turns, and half of another."""
    shape = {
        "clients": 4 if method == "fedcybgd" else 8,
        "cohort": 4,
        "rounds": 6,
        "max_train": 120,
        "max_validation": 30,
        "max_test": 40,
        "max_length": 32,
    }
    engine = EngineSettings(stack=stack, threads=1)
    return Experiment(named(method)(), model=model, adapter=Adapter(rank=2), evaluate_every=2, engine=engine, **shape)


def child(wanted: Experiment, folder: Path) -> int:
    """Start a run in a child process; its id."""
    process = os.fork()
    if process == 0:
        with open(os.devnull, "w") as sink:
            os.dup2(sink.fileno(), 2)
            try:
                run(wanted, folder, plain=True)
            except BaseException as error:
                print(f"child failed: {type(error).__name__}: {error}", flush=True)
                os._exit(1)
        os._exit(0)
    return process


def finished(process: int) -> bool:
    """Wait for a child; whether it ended by itself and well."""
    _, status = os.waitpid(process, 0)
    return os.WIFEXITED(status) and os.WEXITSTATUS(status) == 0


def written(folder: Path) -> int:
    """How many whole rows the run has written."""
    rows = folder / "rounds.jsonl"
    return rows.read_bytes().count(b"\n") if rows.exists() else 0


def main() -> int:
    """See the module."""
    torch.set_num_threads(1)
    place, method, stack, times = Path(sys.argv[1]), sys.argv[2], int(sys.argv[3]), int(sys.argv[4])
    wanted = experiment(method, stack, sys.argv[5] if len(sys.argv) > 5 else str(tiny.folder()))
    started = time.monotonic()
    if not finished(child(wanted, place / "alone")):
        return 1
    took, whole = time.monotonic() - started, fingerprint_of(place / "alone")
    rng = np.random.default_rng(int.from_bytes(os.urandom(4), "big"))
    for i in range(times):
        folder, rows, more = place / f"killed-{i}", int(rng.integers(0, wanted.rounds)), float(rng.uniform(0, took / wanted.rounds))
        process = child(wanted, folder)
        while written(folder) < rows and os.waitid(os.P_PID, process, os.WEXITED | os.WNOHANG | os.WNOWAIT) is None:
            time.sleep(0.002)
        time.sleep(more)
        os.kill(process, signal.SIGKILL)
        died, done = not finished(process), written(folder)
        if not finished(child(wanted, folder)):
            return 1
        same = fingerprint_of(folder) == whole
        print(f"kill {i}: {more:.2f} s after row {rows}, {'died' if died else 'had ended'} with {done} rows; equal: {same}", flush=True)
        if not same:
            return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
