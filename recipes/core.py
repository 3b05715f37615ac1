"""The core table of docs/results.md: nine methods on the data sets of FibecFed's paper, under one protocol.

    python recipes/core.py trec                       one task; its data set under --folder, or the packaged questions
    python recipes/core.py trec sst2 cola mrpc rte qnli subj --folder PATH/TO/SETS --jobs 2
    python recipes/core.py trec --keep                put its finished runs into docs/results/core, an archive a task
    python recipes/core.py --page                     make the tables of docs/results.md anew from those archives (seconds)

It is ``fedloom compare`` with these methods and settings; whatever is added is added to them, and the later one counts. Every method gets
the same grid of learning rates, chosen on validation with the first seed. What docs/results/core holds has been measured and is not run
again: take the archives away to run everything anew. Stop it and run it again: finished runs are used as they are.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import sys
import tempfile
from pathlib import Path
from zipfile import ZIP_LZMA, ZipFile, ZipInfo

from fedloom.cli import main
from fedloom.run.checkpoint import write_atomically

TASKS = ("trec", "sst2", "cola", "mrpc", "rte", "qnli", "subj")
METHODS = ["lora", "fibecfed", "fedeven", "lora-personal-head", "lora-finetuned", "lora-prior", "local", "ditto", "fedalt-partial"]
ALPHAS = ("0.1", "1.0")
GRID = "--seeds 1 2 3 --lrs 5e-4 2e-3 8e-3 --share-training"
SIZE = "--max-train 1600 --max-validation 400 --max-test 500 --max-length 64"
SHAPE = f"--clients 100 --cohort 10 --rounds 30 {SIZE} --evaluate-every 6 --adapter.kind lora"
PAIRS = dict.fromkeys(("mrpc", "rte", "qnli"), "--max-train 1200 --max-validation 300 --max-test 400 --rounds 20 --evaluate-every 5")
"""Pairs of sentences have five times the tokens of the other tasks' texts: fewer of them, and fewer rounds, take about as long."""
DOCS = Path(__file__).resolve().parents[1] / "docs"
KEPT = DOCS / "results" / "core"
PAGE = DOCS / "results.md"
STOPPED = (130, 143)
"""Exit codes of a comparison that was stopped: the tasks after it are not begun then."""
FILES = ("experiment.json", "rounds.jsonl", "results.json")
"""What a finished run is known by, without its checkpoint."""


def keep(runs: Path, kept: Path) -> None:
    """Put every finished run's files into the archive ``kept``, those that it has already included, in order of names. A name tells α."""
    unpack(kept, runs)
    found = {}
    for results in sorted(runs.glob("*/results.json")):
        alpha = f"alpha{json.loads(results.read_text(encoding='utf-8'))['experiment']['alpha']!r}-"
        found[f"{alpha}{results.parent.name.removeprefix(alpha)}"] = results.parent
    kept.parent.mkdir(parents=True, exist_ok=True)
    scratch = kept.with_suffix(".tmp")
    with ZipFile(scratch, "w", ZIP_LZMA) as archive:
        for name, run in sorted(found.items()):
            for file in FILES:
                archive.writestr(ZipInfo(f"{name}/{file}"), (run / file).read_bytes(), ZIP_LZMA)
    os.replace(scratch, kept)


def unpack(kept: Path, runs: Path) -> None:
    """Give ``runs`` every run of the archive that it has not finished itself.

    Raises:
        ValueError: the archive holds anything but runs.
    """
    if not kept.exists():
        return
    with ZipFile(kept) as archive:
        names = archive.namelist()
        for name in names:
            run, _, file = name.partition("/")
            if file not in FILES or Path(run).name != run:
                raise ValueError(f"{kept} holds {name}, which is no file of a run")
        for run in sorted({name.partition("/")[0] for name in names}):
            if not (runs / run / "results.json").exists():
                (runs / run).mkdir(parents=True, exist_ok=True)
                for file in FILES:
                    (runs / run / file).write_bytes(archive.read(f"{run}/{file}"))


def shape(task: str) -> str:
    """The options of a task's runs."""
    return f"{SHAPE} {PAIRS.get(task, '')}".strip()


def compare(task: str, alphas: tuple[str, ...], out: Path, more: list[str]) -> int:
    """Run what is missing of one task's table; the exit code."""
    data = task if task == "trec" else f"./{task}"
    return main(["compare", *METHODS, "--data", data, "--alphas", *alphas, *GRID.split(), *shape(task).split(), "--out", str(out), *more])


def measured(runs: Path) -> tuple[str, ...]:
    """The α at which every method has as many finished runs as the grid asks for: those of the search, and one for each further seed."""
    found = [json.loads(path.read_text(encoding="utf-8"))["experiment"] for path in runs.glob("*/results.json")]
    due = len(METHODS) * (len(GRID.split("--lrs ")[1].split(" --")[0].split()) + 2)
    return tuple(a for a in ALPHAS if sum(e["alpha"] == float(a) for e in found) >= due)


def write_page(tables: dict[str, str]) -> None:
    """Put each task's tables between its two marks in docs/results.md."""
    text = PAGE.read_text(encoding="utf-8")
    for task, told in tables.items():
        begin, end = f"<!-- {task} -->", f"<!-- /{task} -->"
        if text.count(begin) != 1 or text.count(end) != 1:
            raise ValueError(f"{PAGE} has no place for {task}: it needs one line {begin} and one line {end}")
        text = re.sub(f"{begin}.*{end}", lambda _, b=begin, e=end, t=told: f"{b}\n\n{t}\n{e}", text, flags=re.DOTALL)
    write_atomically(PAGE, text)


def page() -> int:
    """The tables of every archived task; nothing is trained. The exit code."""
    tables, code = {}, 0
    with tempfile.TemporaryDirectory() as scratch:
        for kept in sorted(KEPT.glob("*.zip")):
            out = Path(scratch) / kept.stem
            unpack(kept, out)
            alphas = measured(out)
            if not alphas:
                print(f"{kept}: no α has all of its runs yet; left out")
                continue
            code = max(code, compare(kept.stem, alphas, out, ["--plain"]))
            tables[kept.stem] = (out / "comparison.md").read_text(encoding="utf-8")
    write_page(tables)
    print(f"written: {PAGE} ({', '.join(tables) or 'nothing'})")
    return code


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("tasks", nargs="*", metavar="TASK", help=f"the tasks to run, each with a table of its own: {', '.join(TASKS)}")
    parser.add_argument("--folder", type=Path, help="where the data sets are, each in a folder of its name")
    parser.add_argument("--alphas", nargs="+", choices=ALPHAS, default=ALPHAS, help="label skews (default: all)")
    parser.add_argument("--out", type=Path, default=Path("runs/core"), help="where runs and tables go (default: runs/core)")
    parser.add_argument("--keep", action="store_true", help="put finished runs into docs/results/core as well, and run nothing")
    parser.add_argument("--page", action="store_true", help="make the tables of docs/results.md from what is kept there, and run nothing")
    given, more = parser.parse_known_args()
    unknown = [task for task in given.tasks if task not in TASKS]
    if unknown or not (given.tasks or given.page):
        parser.error(f"{f'there is no task {unknown[0]}' if unknown else 'no task is named'}; there are {', '.join(TASKS)}")
    code = 0
    for task in given.tasks:
        out = given.out.resolve() / (task if tuple(given.alphas) == ALPHAS else f"{task}-{'-'.join(given.alphas)}")
        if given.keep:
            keep(out, KEPT / f"{task}.zip")
            continue
        unpack(KEPT / f"{task}.zip", out)
        if given.folder:
            os.chdir(given.folder)  # so that an experiment names its data alike wherever the sets are
        code = max(code, compare(task, tuple(given.alphas), out, more))
        if code in STOPPED:
            sys.exit(code)
    sys.exit(max(code, page()) if given.page else code)
