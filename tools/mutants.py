"""Break the source in one line at a time, and see whether the tests notice.

Parity, resume and falling-loss tests can all pass on a wrong method. So ``tools/mutants.toml`` keeps a list of one-line
corruptions, each with the sentence it falsifies and the tests that must then fail. This file applies each to a temporary copy
of ``src``, runs its tests there and says who survived. The working tree is never touched.

It does not know what any mutant means, and it does not invent mutants.

    python tools/mutants.py [--only ID ...] [--jobs 2] [--list]
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
import time
import tomllib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

ROOT = Path(__file__).resolve().parent.parent
LIST = ROOT / "tools" / "mutants.toml"
LEAST, TIMES = 30.0, 5.0
"""A corruption's tests are given up after ``TIMES`` the seconds that they take on the source as it is, and not before ``LEAST``."""

Verdict = Literal["killed", "SURVIVED", "HUNG", "DOES NOT APPLY", "CANNOT RUN"]


class Misfit(ValueError):
    """A mutant that cannot be applied to the source as it is now. The message says why."""


@dataclass(frozen=True)
class Mutant:
    """One corruption. ``file`` is relative to ``src``; ``old`` occurs there exactly once; ``tests`` are pytest node ids."""

    id: str
    says: str
    file: str
    old: str
    new: str
    tests: tuple[str, ...]


@dataclass(frozen=True)
class Outcome:
    """What became of a mutant; ``said`` is the end of pytest's output, or why there is none."""

    mutant: Mutant
    verdict: Verdict
    seconds: float
    said: str


def read(path: Path) -> list[Mutant]:
    """The list, in its order.

    Raises:
        ValueError: an entry lacks a field, has one too many, or two entries share an id.
    """
    entries = tomllib.loads(path.read_text(encoding="utf-8")).get("mutant", [])
    fields = list(Mutant.__dataclass_fields__)
    for entry in entries:
        if sorted(entry) != sorted(fields):
            raise ValueError(f"{path.name}: mutant {entry.get('id', '?')!r} has fields {sorted(entry)}; it needs exactly {fields}")
    ids = [entry["id"] for entry in entries]
    twice = sorted({id for id in ids if ids.count(id) > 1})
    if twice:
        raise ValueError(f"{path.name}: these ids stand there more than once: {twice}")
    return [Mutant(**entry | {"tests": tuple(entry["tests"])}) for entry in entries]


def corrupted(mutant: Mutant, source: Path) -> str:
    """The text of the mutant's file under ``source`` with the corruption in it.

    Raises:
        Misfit: no such file, ``old`` not there exactly once, nothing changes, or a Python file is none any more.
    """
    path = source / mutant.file
    if not path.is_file():
        raise Misfit(f"there is no file {mutant.file}")
    text = path.read_text(encoding="utf-8")
    if text.count(mutant.old) != 1:
        raise Misfit(f"{mutant.old!r} occurs {text.count(mutant.old)} times in {mutant.file}; it must occur exactly once")
    if mutant.old == mutant.new:
        raise Misfit("old and new are the same text")
    mutated = text.replace(mutant.old, mutant.new)
    try:
        if path.suffix == ".py":
            compile(mutated, mutant.file, "exec")
    except SyntaxError as error:
        raise Misfit(f"the corrupted {mutant.file} is not Python: {error}") from error
    return mutated


def pytest_run(root: Path, source: Path, tests: Sequence[str], patience: float | None = None) -> tuple[int | None, str]:
    """(exit status, end of the output) of these tests with ``source`` in front of every other ``fedloom``; the status is None where they
    were not done after ``patience`` seconds."""
    command = [sys.executable, "-m", "pytest", "-x", "-q", "--no-header", "--tb=line", "-p", "no:cacheprovider", *tests]
    environment = os.environ | {"PYTHONPATH": str(source), "PYTHONDONTWRITEBYTECODE": "1", "OMP_NUM_THREADS": "1"}
    try:
        done = subprocess.run(command, cwd=root, env=environment, capture_output=True, text=True, timeout=patience, check=False)
    except subprocess.TimeoutExpired:
        return None, f"not done after {patience:.0f} s: that a test failed is not known"
    return done.returncode, "\n".join((done.stdout + done.stderr).strip().splitlines()[-15:])


def judge(mutant: Mutant, root: Path, patience: float) -> Outcome:
    """Apply, run, judge. pytest's status 1 means a test failed; any status but 0 and 1 means that it could not run. Who is not done after
    ``patience`` seconds has not been killed: the machine may be slow, and a test that waits for ever notices nothing."""
    begin = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="fedloom-mutant-") as scratch:
        source = Path(scratch) / "src"
        try:
            mutated = corrupted(mutant, root / "src")
        except Misfit as misfit:
            return Outcome(mutant, "DOES NOT APPLY", 0.0, str(misfit))
        shutil.copytree(root / "src", source, ignore=shutil.ignore_patterns("__pycache__"))
        (source / mutant.file).write_text(mutated, encoding="utf-8")
        status, said = pytest_run(root, source, mutant.tests, patience)
    verdicts: dict[int | None, Verdict] = {0: "SURVIVED", 1: "killed", None: "HUNG"}
    return Outcome(mutant, verdicts.get(status, "CANNOT RUN"), time.monotonic() - begin, said)


def by_file(tests: Iterable[str]) -> dict[str, list[str]]:
    """These node ids by the file that they are of."""
    files: dict[str, list[str]] = {}
    for test in sorted(set(tests)):
        files.setdefault(test.split("::")[0], []).append(test)
    return files


def baseline(tests: Iterable[str], root: Path, jobs: int) -> tuple[dict[str, float], dict[str, str]]:
    """What these tests do on the source as it is, each file in a run of its own, ``jobs`` at a time, however long it takes: the
    seconds of every file, and what those said that did not pass."""

    def one(named: list[str]) -> tuple[float, int | None, str]:
        begin = time.monotonic()
        status, said = pytest_run(root, root / "src", named)
        return time.monotonic() - begin, status, said

    files = by_file(tests)
    with ThreadPoolExecutor(jobs) as executor:
        ran = dict(zip(files, executor.map(one, files.values()), strict=True))
    return {file: seconds for file, (seconds, _, _) in ran.items()}, {file: said for file, (_, status, said) in ran.items() if status != 0}


def patience(mutant: Mutant, seconds: Mapping[str, float]) -> float:
    """How long the mutant's tests may take, by the ``seconds`` of their files."""
    return max(LEAST, TIMES * sum(seconds[file] for file in by_file(mutant.tests)))


def outcomes(mutants: Sequence[Mutant], root: Path, jobs: int, seconds: Mapping[str, float]) -> Iterator[Outcome]:
    """One outcome per mutant, as they come, ``jobs`` at a time."""
    with ThreadPoolExecutor(jobs) as executor:
        for future in as_completed([executor.submit(judge, mutant, root, patience(mutant, seconds)) for mutant in mutants]):
            yield future.result()


def campaign(mutants: Sequence[Mutant], root: Path, jobs: int) -> int:
    """Run them all and print what happened. Returns 0 if the tests were green before and every mutant was killed."""
    begin = time.monotonic()
    tests = sorted({test for mutant in mutants for test in mutant.tests})
    print(
        f"mutants: {len(mutants)} corruptions, {jobs} at a time; first their {len(tests)} tests on the source as it is",
        flush=True,
    )
    seconds, red = baseline(tests, root, jobs)
    print(f"  {len(seconds) - len(red)} of {len(seconds)} files passed in {time.monotonic() - begin:.0f} s", flush=True)
    if red:
        said = "\n".join(f"{file}:\n{text}" for file, text in red.items())
        print(f"{said}\nmutants: these tests must pass before a corruption means anything", file=sys.stderr)
        return 1
    bad: list[Outcome] = []
    for count, outcome in enumerate(outcomes(mutants, root, jobs, seconds), 1):
        head = f"[{count:>{len(str(len(mutants)))}}/{len(mutants)}] {outcome.verdict:<14} {outcome.seconds:5.1f} s"
        print(f"{head}  {outcome.mutant.id}: {outcome.mutant.says}", flush=True)
        if outcome.verdict != "killed":
            bad.append(outcome)
            print("\n".join(f"      {line}" for line in outcome.said.splitlines()), flush=True)
    print(f"mutants: {len(mutants) - len(bad)} of {len(mutants)} killed in {time.monotonic() - begin:.0f} s")
    return 1 if bad else 0


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line; see the module's docstring."""
    parser = argparse.ArgumentParser(description="Corrupt the source one line at a time; the tests must notice.")
    parser.add_argument("--only", nargs="+", metavar="ID", default=[], help="these mutants instead of all")
    parser.add_argument("--jobs", type=int, default=2, help="how many at a time (default 2)")
    parser.add_argument("--list", action="store_true", help="print the list and run nothing")
    options = parser.parse_args(arguments)
    mutants = read(LIST)
    unknown = sorted(set(options.only) - {mutant.id for mutant in mutants})
    if unknown:
        parser.error(f"no mutant {unknown}; there are {sorted(mutant.id for mutant in mutants)}")
    mutants = [mutant for mutant in mutants if not options.only or mutant.id in options.only]
    if options.list:
        print("\n".join(f"{mutant.id:<28} {mutant.file:<36} {mutant.says}" for mutant in mutants))
        return 0
    return campaign(mutants, ROOT, options.jobs)


if __name__ == "__main__":
    sys.exit(main())
