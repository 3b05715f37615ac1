"""The core table of docs/results.md: FibecFed and its rivals on the tasks of its paper, at two label skews, with three seeds.

    python recipes/core.py trec                       one task; its data set under --folder, or the packaged questions
    python recipes/core.py trec sst2 cola mrpc rte qnli subj --folder PATH/TO/SETS --jobs 2
    python recipes/core.py trec --keep                put what has been measured into docs/results/core as well

It is ``fedloom compare`` with these methods and settings; whatever is added is added to them, and the later one counts. Every method gets
the same grid of learning rates, chosen on validation with the first seed. What docs/results/core holds has been measured and is not run
again: take the folder away to run everything anew. Stop it and run it again: finished runs are used as they are.
"""

from __future__ import annotations

import argparse
import os
import shutil
import sys
from pathlib import Path

from fedloom.cli import main

TASKS = ("trec", "sst2", "cola", "mrpc", "rte", "qnli", "subj")
METHODS = ["lora", "fibecfed", "fedeven", "lora-personal-head", "lora-finetuned", "lora-prior", "local", "ditto", "fedalt-partial"]
GRID = "--alphas 0.1 1.0 --seeds 1 2 3 --lrs 5e-4 2e-3 8e-3 --share-training --evaluate-every 6"
SHAPE = "--clients 100 --cohort 10 --rounds 30 --max-train 1600 --max-validation 400 --max-test 500 --max-length 64"

KEPT = Path(__file__).resolve().parent.parent / "docs" / "results" / "core"
FILES = ("experiment.json", "rounds.jsonl", "results.json")
"""What a finished run is known by, without its checkpoint."""


def copied(source: Path, target: Path) -> None:
    """Copy every finished run of ``source`` that ``target`` lacks."""
    for run in sorted(path.parent for path in source.glob("*/results.json")):
        if not (target / run.name / "results.json").exists():
            (target / run.name).mkdir(parents=True, exist_ok=True)
            for file in FILES:
                shutil.copyfile(run / file, target / run.name / file)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("tasks", nargs="+", choices=TASKS, help="the tasks to run, each with a table of its own")
    parser.add_argument("--folder", type=Path, help="where the data sets are, each in a folder of its name")
    parser.add_argument("--out", type=Path, default=Path("runs/core"), help="where runs and tables go (default: runs/core)")
    parser.add_argument("--keep", action="store_true", help="put finished runs into docs/results/core as well, and run nothing")
    given, more = parser.parse_known_args()
    code = 0
    for task in given.tasks:
        out, kept = given.out.resolve() / task, KEPT / task
        if given.keep:
            copied(out, kept)
            continue
        copied(kept, out)
        if given.folder:
            os.chdir(given.folder)  # so that an experiment names its data alike wherever the sets are
        data = task if task == "trec" else f"./{task}"
        code = max(code, main(["compare", *METHODS, "--data", data, *GRID.split(), *SHAPE.split(), "--out", str(out), *more]))
    sys.exit(code)
