"""The core table of docs/results.md: FibecFed and its rivals on the tasks of its paper, at two label skews, with three seeds.

    python recipes/core.py trec                       one task; its data set under --folder, or the packaged questions
    python recipes/core.py trec sst2 cola mrpc rte qnli subj --folder PATH/TO/SETS --jobs 2
    python recipes/core.py trec --keep                put what has been measured into docs/results/core as well

It is ``fedloom compare`` with these methods and settings; whatever is added is added to them, and the later one counts. Every method gets
the same grid of learning rates, chosen on validation with the first seed. What docs/results/core holds has been measured and is not run
again: take the archives away to run everything anew. Stop it and run it again: finished runs are used as they are.
"""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path
from zipfile import ZIP_LZMA, ZipFile, ZipInfo

from fedloom.cli import main

TASKS = ("trec", "sst2", "cola", "mrpc", "rte", "qnli", "subj")
METHODS = ["lora", "fibecfed", "fedeven", "lora-personal-head", "lora-finetuned", "lora-prior", "local", "ditto", "fedalt-partial"]
GRID = "--alphas 0.1 1.0 --seeds 1 2 3 --lrs 5e-4 2e-3 8e-3 --share-training --evaluate-every 6"
SHAPE = "--clients 100 --cohort 10 --rounds 30 --max-train 1600 --max-validation 400 --max-test 500 --max-length 64"

KEPT = Path(__file__).resolve().parent.parent / "docs" / "results" / "core"
FILES = ("experiment.json", "rounds.jsonl", "results.json")
"""What a finished run is known by, without its checkpoint."""


def keep(runs: Path, kept: Path) -> None:
    """Put every finished run's files into the archive ``kept``, those that it has already included, in order of names."""
    unpack(kept, runs)
    kept.parent.mkdir(parents=True, exist_ok=True)
    scratch = kept.with_suffix(".tmp")
    with ZipFile(scratch, "w", ZIP_LZMA) as archive:
        for run in sorted(path.parent for path in runs.glob("*/results.json")):
            for file in FILES:
                archive.writestr(ZipInfo(f"{run.name}/{file}"), (run / file).read_bytes(), ZIP_LZMA)
    os.replace(scratch, kept)


def unpack(kept: Path, runs: Path) -> None:
    """Give ``runs`` every run of the archive that it has not finished itself."""
    if not kept.exists():
        return
    with ZipFile(kept) as archive:
        for name in archive.namelist():
            run, _, file = name.partition("/")
            if file not in FILES or Path(run).name != run:
                raise ValueError(f"{kept} holds {name}, which is no file of a run")
        for run in sorted({name.partition("/")[0] for name in archive.namelist()}):
            if not (runs / run / "results.json").exists():
                (runs / run).mkdir(parents=True, exist_ok=True)
                for file in FILES:
                    (runs / run / file).write_bytes(archive.read(f"{run}/{file}"))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("tasks", nargs="+", choices=TASKS, help="the tasks to run, each with a table of its own")
    parser.add_argument("--folder", type=Path, help="where the data sets are, each in a folder of its name")
    parser.add_argument("--out", type=Path, default=Path("runs/core"), help="where runs and tables go (default: runs/core)")
    parser.add_argument("--keep", action="store_true", help="put finished runs into docs/results/core as well, and run nothing")
    given, more = parser.parse_known_args()
    code = 0
    for task in given.tasks:
        out, kept = given.out.resolve() / task, KEPT / f"{task}.zip"
        if given.keep:
            keep(out, kept)
            continue
        unpack(kept, out)
        if given.folder:
            os.chdir(given.folder)  # so that an experiment names its data alike wherever the sets are
        data = task if task == "trec" else f"./{task}"
        code = max(code, main(["compare", *METHODS, "--data", data, *GRID.split(), *SHAPE.split(), "--out", str(out), *more]))
    sys.exit(code)
