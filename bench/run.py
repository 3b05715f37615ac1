"""The bench: measure the figures one after another, each in a process of its own, and say what came out.

    python bench/run.py                                     all figures (20 to 35 minutes on two cores once the peers' environments exist)
    python bench/run.py echo scaling                        only these; others keep what they have in results.json
    python bench/run.py --gpu                               those that need an accelerator
    python bench/run.py throughput --bf16                   in bf16 also on a processor without bfloat16 instructions; slow
    python bench/run.py --quick                             toy size: does it run at all; the numbers mean nothing
    python bench/run.py --write-docs docs/performance.md    measure nothing; fill the page's table from results.json

Writes ``results.json`` (machine, versions, every sample), ``figures.svg`` and ``figures.png`` into ``--out``. A figure that misses its
bound is told plainly and is no error; a figure that breaks is one, and the exit code is 1.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from tempfile import TemporaryDirectory

if not __package__:  # run as a file: the repository, not bench/, is where `bench` is found
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from bench.figure import BF16, FIGURES, bound, told
from bench.results import ROOT, Results, entry, load, machine, save, versions
from bench.row import Row, loads

LONGEST = 1800
"""Seconds after which a figure is stopped."""

STYLES = {"aim": "green", "met": "blue", "missed": "bold red", "not measured": "dim", "informative": ""}


def main(words: Sequence[str] | None = None) -> int:
    """Do what ``words`` ask; 0, or 1 if a figure broke."""
    given = _parsed(words)
    path = given.out / "results.json"
    if given.write_docs is not None:
        return _document(path, given.write_docs)
    names = [name for name in FIGURES if name in (given.figures or FIGURES)]
    if given.gpu:
        names = ["gpu"]
    if given.bf16:
        os.environ[BF16] = "1"
    given.out.mkdir(parents=True, exist_ok=True)
    results, broken = _before(path, Results(given.quick, machine(), versions(), {})), []
    for i, name in enumerate(names):
        print(f"bench: {name} ({i + 1} of {len(names)})", flush=True)
        begun = time.perf_counter()
        rows, fault = _measured(name, given.quick)
        broken += [name] if fault else []
        taken = time.perf_counter() - begun
        results = results.merged(Results(given.quick, {}, {}, {name: entry(taken, rows)}), FIGURES)
        save(results, path)
        print(f"bench: {name} took {taken:.0f} s", flush=True)
    _show(results)
    _draw(results, given.out)
    print(f"\nbench: {path}, {given.out / 'figures.svg'}")
    _tell("broke", broken)
    return 1 if broken else 0


def _parsed(words: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="bench/run.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("figures", nargs="*", metavar="FIGURE", help=f"of {' '.join(FIGURES)}; all if none is named")
    parser.add_argument("--gpu", action="store_true", help="only the figures that need an accelerator")
    parser.add_argument("--quick", action="store_true", help="toy size: see that it runs")
    parser.add_argument("--bf16", action="store_true", help="throughput in bf16 also where the processor has no instructions for it")
    parser.add_argument("--out", type=Path, default=ROOT / "bench" / "out", help="where results go (bench/out)")
    parser.add_argument(
        "--write-docs",
        type=Path,
        metavar="PAGE",
        help="fill the page's table from results.json and from what filled it before on an equal machine, kept beside it; then stop",
    )
    given = parser.parse_args(words)
    unknown = [name for name in given.figures if name not in FIGURES]
    if unknown:
        parser.error(f"no figures {unknown}; there are {' '.join(FIGURES)}")
    return given


def _before(path: Path, now: Results) -> Results:
    """What earlier runs left, if it was measured under the same circumstances."""
    if not path.exists():
        return now
    earlier = load(path)
    difference = earlier.difference(now)
    if difference is None:
        return earlier
    print(f"bench: the figures that {path} holds are dropped, they cannot stand beside new ones: {difference}", flush=True)
    return now


def _measured(name: str, quick: bool) -> tuple[list[Row], bool]:
    """The figure's rows, and whether it broke. The accelerator is hidden from all but ``gpu``: the others are about the processor."""
    environment = dict(os.environ) if name == "gpu" else {**os.environ, "CUDA_VISIBLE_DEVICES": ""}
    environment |= {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
    with TemporaryDirectory(prefix="fedloom-bench-") as folder:
        rows = Path(folder) / "rows.json"
        words = [sys.executable, "-m", "bench.figure", name, "--rows", str(rows), *(["--quick"] if quick else [])]
        try:
            ended = subprocess.run(words, cwd=ROOT, env=environment, timeout=LONGEST)
        except subprocess.TimeoutExpired:
            return [Row(name, None, "", note=f"stopped after {LONGEST} s")], True
        if ended.returncode:
            return [Row(name, None, "", note=f"broke with exit code {ended.returncode}; see what it printed")], True
        return loads(rows.read_text(encoding="utf-8")), False


def _show(results: Results) -> None:
    """The table, and what missed."""
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, padding=(0, 1, 0, 1))
    for head in ("figure", "value", "at least", "aim", "verdict"):
        table.add_column(head, overflow="fold", justify="left" if head in ("figure", "verdict") else "right", no_wrap=head != "figure")
    for row in results.rows:
        verdict = row.verdict()
        cells = (row.name, told(row.value, row.unit), bound(row, row.at_least), bound(row, row.aim))
        table.add_row(*(Text(cell) for cell in cells), Text(verdict, STYLES[verdict]))
    Console(width=None if sys.stdout.isatty() else 140).print(table)
    if results.quick:
        print("These are numbers of toy size (--quick): they show that the bench runs and say nothing about speed.")
    _tell(
        "missed",
        [f"{row.name}: {told(row.value, row.unit)}, {bound(row, row.at_least)}" for row in results.rows if row.verdict() == "missed"],
    )
    _tell("not measured", [f"{row.name}: {row.note}" for row in results.rows if row.verdict() == "not measured"])


def _tell(what: str, which: Sequence[str]) -> None:
    for one in which:
        print(f"{what}: {one}")


def _draw(results: Results, out: Path) -> None:
    """The picture, in both kinds. matplotlib is loaded here: while figures are measured this process stays small."""
    from bench.plot import picture

    for kind in ("svg", "png"):
        (out / f"figures.{kind}").write_bytes(picture(results.rows, kind))


def _document(path: Path, page: Path) -> int:
    from bench.page import PageError, write

    try:
        kept, results = page.with_suffix(".json"), load(path)
        results = _before(kept, results).merged(results, FIGURES)
        write(results, page)
        save(results, kept)
    except (PageError, FileNotFoundError) as error:
        print(f"bench: {error}", file=sys.stderr)
        return 1
    print(f"bench: {page} now tells {path}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
