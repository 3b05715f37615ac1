"""Kill a run with signal 9 at random moments, resume it after each, and compare all of its state with a run that was left alone.

    python -m tests.integration.killing FOLDER METHOD:STACK:TIMES[:SEED] ...

The process imports everything once and forks a child for each start of a run, so that a kill can hit any moment of the work and not only
the imports. A run is killed ``TIMES`` times before it may end: first somewhere in its start, then, in random order, within a round's time
after it has written another row, or somewhere in its start again. The moments are drawn from ``SEED``, another one in every process where
none is given. Prints the seed, and one line a kill; exits with 1 at the first difference.
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


def ended(process: int) -> bool:
    """Whether a child has ended; it can still be waited for."""
    return os.waitid(os.P_PID, process, os.WEXITED | os.WNOHANG | os.WNOWAIT) is not None


def written(folder: Path) -> int:
    """How many whole rows the run has written."""
    rows = folder / "rounds.jsonl"
    return rows.read_bytes().count(b"\n") if rows.exists() else 0


def killed(wanted: Experiment, place: Path, times: int, seed: int) -> bool:
    """Let a run alone, kill another so many times in a row, and let it end; whether both came to the same, no kill cost a row that was
    written, and a third of them hit a run that was going on."""
    started = time.monotonic()
    if not finished(child(wanted, place / "alone")):
        return False
    took, folder = time.monotonic() - started, place / "killed"
    rng = np.random.default_rng(seed)
    print(f"{wanted.method_name}: seed {seed}", flush=True)
    rows, deaths = min(times - times // 3, wanted.rounds), 0
    for i, after_a_row in enumerate([False, *rng.permutation(np.arange(1, times) <= rows)]):
        before, more = written(folder), float(rng.uniform(0, took / wanted.rounds))
        process = child(wanted, folder)
        while after_a_row and written(folder) <= before and not ended(process):
            time.sleep(0.002)
        time.sleep(more)
        os.kill(process, signal.SIGKILL)
        died, after = not finished(process), f"row {before}" if after_a_row else "its start"
        print(f"kill {i}: {more:.2f} s after {after}, {'died' if died else 'had ended'} with {written(folder)} rows", flush=True)
        deaths += died
        if written(folder) < before:
            return False
    same = finished(child(wanted, folder)) and fingerprint_of(folder) == fingerprint_of(place / "alone")
    print(f"{wanted.method_name}: {deaths} of {times} kills hit it while it ran; equal: {same}", flush=True)
    return same and deaths >= times // 3


def main() -> int:
    """See the module."""
    torch.set_num_threads(1)
    place, model = Path(sys.argv[1]), str(tiny.folder())
    asked = [word.split(":") for word in sys.argv[2:]]
    drawn = int.from_bytes(os.urandom(4), "big")
    same = (
        killed(experiment(method, int(stack), model), place / method, int(times), int(*seed or [drawn]))
        for method, stack, times, *seed in asked
    )
    return 0 if all(same) else 1


if __name__ == "__main__":
    sys.exit(main())
