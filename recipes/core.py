"""The core table of docs/results/fibecfed.md: nine methods on the data sets of FibecFed's paper, under one protocol.

    python recipes/core.py trec                       one task; its data set under --folder, or the packaged questions
    python recipes/core.py trec sst2 cola mrpc rte qnli subj --folder PATH/TO/SETS --jobs 2
    python recipes/core.py trec --keep                put its finished runs into docs/results/core, an archive a task
    python recipes/core.py --page                     make the tables of docs/results/fibecfed.md anew from those archives (seconds)

It is ``fedloom compare`` with these methods and settings; whatever is added is added to them, and the later one counts. Every method gets
the same grid of learning rates, chosen on validation with the first seed. What docs/results/core holds has been measured and is not run
again: take the archives away to run everything anew. Stop it and run it again: finished runs are used as they are.
"""

from __future__ import annotations

import sys

from kept import DOCS, Table

PAIRS = "--max-train 800 --max-validation 200 --max-test 300 --rounds 20 --evaluate-every 5 --precision bf16"
"""Pairs of sentences have five times the tokens of the other tasks' texts: half of them, fewer rounds, and passes in bf16 instead."""
TABLE = Table(
    name="core",
    page=DOCS / "results" / "fibecfed.md",
    methods=("lora", "fibecfed", "fedeven", "lora-personal-head", "lora-finetuned", "lora-prior", "local", "ditto", "fedalt-partial"),
    alphas=("0.1", "1.0"),
    seeds=("1", "2", "3"),
    rates=("5e-4", "2e-3", "8e-3"),
    shape="--share-training --clients 100 --cohort 10 --rounds 30 --max-train 1600 --max-validation 400 --max-test 500 --max-length 64 "
    "--evaluate-every 6 --adapter.kind lora",
    shapes={"trec": "", "sst2": "", "cola": "", "mrpc": PAIRS, "rte": PAIRS, "qnli": PAIRS, "subj": ""},
    packaged=("trec",),
)

if __name__ == "__main__":
    sys.exit(TABLE.command(__doc__))
