"""Fuzzing of everything that is parsed from the other side of a federation: ``python -m tests.fuzz.fuzzing --cases 100000 --seed 0``.

**The law**, for each target of ``targets.py``: a call returns something valid or raises one of the errors that the target documents. It
raises no other error, takes less than a second of the processor, writes no file outside its folder, and takes no memory out of proportion
to what came. Every case derives from the seed, the target and its number alone; ``--only TARGET --first NUMBER --cases 1`` puts one again.
"""

from __future__ import annotations

import argparse
import logging
import os
import signal
import sys
import tempfile
import time
import traceback
import tracemalloc
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from random import Random

import torch

from tests.fuzz.targets import TARGETS, Target

SECONDS = 1.0
"""Of the processor, for one case."""

WALL = 20.0
"""Seconds after which a case is ended: it hangs, or waits."""

SAMPLED = 40
"""Of so many cases one is put with an eye on memory."""

TIMES, BESIDE = 100, 8 * 2**20
"""Memory that a case may take at its peak: so many times its own size, and as many bytes beside."""


class Hangs(BaseException):
    """A case that did not end."""


@dataclass
class Told:
    """What came of one target's cases."""

    name: str
    cases: int = 0
    outcomes: Counter[str] = field(default_factory=Counter)
    broken: list[str] = field(default_factory=list)
    slowest: float = 0.0
    largest: int = 0


def listing(folder: Path, but: Path) -> list[str]:
    """Every file under ``folder`` that is not under ``but``."""
    return sorted(str(path) for path in folder.rglob("*") if path != but and but not in path.parents)


def fuzz(
    kind: type[Target], cases: int, seed: int, root: Path, first: int = 0, progress: Callable[[int], None] | None = None, wall: float = WALL
) -> Told:
    """Put this many cases of one target, in folders under ``root``."""
    own = root / kind.__name__ / "inside"
    own.mkdir(parents=True, exist_ok=True)
    target, told = kind(own), Told(kind.name)
    before = (listing(root, own), sorted(os.listdir()))
    for number in range(first, first + cases):
        _put(target, Random(f"{seed} {kind.name} {number}"), number, told, wall)
        if number % 100 == 99 or number == first + cases - 1:
            if (listing(root, own), sorted(os.listdir())) != before:
                told.broken.append(f"a file was written outside the target's folder, in the hundred cases up to {number}")
                before = (listing(root, own), sorted(os.listdir()))
            if progress is not None:
                progress(told.cases)
    return told


def _put(target: Target, rng: Random, number: int, told: Told, wall: float) -> None:
    case = target.case(rng)
    sampled = number % SAMPLED == 0
    if sampled:
        tracemalloc.start()
    began = time.thread_time()
    signal.setitimer(signal.ITIMER_REAL, wall)
    why = ""
    try:
        outcome = target.put(case)
    except target.refusals as error:
        outcome = f"refused: {type(error).__name__}"
    except Hangs:
        outcome, why = "BROKEN: hangs", f"it did not end within {wall:g} s"
    except Exception as error:
        outcome = f"BROKEN: {type(error).__name__}"
        why = "".join(traceback.format_exception(error)[-4:])[-3000:]
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
    took = time.thread_time() - began
    if sampled:
        peak, allowed = tracemalloc.get_traced_memory()[1], TIMES * target.size(case) + BESIDE
        tracemalloc.stop()
        told.largest = max(told.largest, peak)
        if peak > allowed:
            outcome, why = "BROKEN: memory", f"{peak} bytes for a case of {target.size(case)}"
    elif took > SECONDS and not why:
        outcome, why = "BROKEN: slow", f"it took {took:.2f} s"
    told.slowest = max(told.slowest, 0.0 if sampled else took)
    told.cases += 1
    told.outcomes[outcome] += 1
    if why:
        told.broken.append(f"{target.name}, case {number}: {why}")


def shares(kinds: Sequence[type[Target]], cases: int) -> list[int]:
    """How many of the cases each target gets, by its weight; rounded up."""
    total = sum(kind.weight for kind in kinds)
    return [-(-cases * kind.weight // total) for kind in kinds]


def _ended(*_: object) -> None:
    raise Hangs


def prepared() -> None:
    """What fuzzing needs of its process: an alarm that ends a case, and no log."""
    signal.signal(signal.SIGALRM, _ended)
    logging.disable(logging.CRITICAL)
    torch.set_num_threads(1)


def main(words: Sequence[str] | None = None) -> int:
    """Put the cases and tell what came of them; 1 if the law was broken."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", type=int, default=100_000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", default="", help="one target, by name")
    parser.add_argument("--first", type=int, default=0, help="the number of the first case of each target")
    asked = parser.parse_args(words)
    kinds = [kind for kind in TARGETS if asked.only in ("", kind.name)]
    if not kinds:
        parser.error(f"no target '{asked.only}'; there are {', '.join(kind.name for kind in TARGETS)}")
    prepared()
    began, told = time.monotonic(), list[Told]()
    with tempfile.TemporaryDirectory(prefix="fuzz-") as root:
        for kind, cases in zip(kinds, shares(kinds, asked.cases), strict=True):

            def progress(done: int, kind: type[Target] = kind, cases: int = cases) -> None:
                if done % 1000 < 100 or done == cases:
                    print(f"\r{kind.name}: {done} of {cases}, {time.monotonic() - began:.0f} s    ", end="", file=sys.stderr, flush=True)

            told.append(fuzz(kind, cases, asked.seed, Path(root), asked.first, progress))
            print(file=sys.stderr)
    show(told, time.monotonic() - began, asked.seed)
    return 1 if any(one.broken for one in told) else 0


def show(told: Sequence[Told], seconds: float, seed: int) -> None:
    """Print the counts, and what was broken."""
    for one in told:
        outcomes = ", ".join(f"{outcome} {count}" for outcome, count in one.outcomes.most_common())
        print(f"{one.name:24} {one.cases:7} cases   slowest {one.slowest:.3f} s, peak {one.largest / 2**20:.1f} MiB   {outcomes}")
    broken = [line for one in told for line in one.broken]
    print(f"{sum(one.cases for one in told)} cases, seed {seed}, {seconds:.0f} s: {len(broken)} broke the law")
    for line in broken[:20]:
        print(f"\n{line}")


if __name__ == "__main__":
    sys.exit(main())
