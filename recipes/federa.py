"""FeDeRA's table of docs/results/federa.md: beside FedFFT, FedBF, FedAP, FedLR, as in its paper, and four relatives, on its kinds of task.

    python recipes/federa.py ag_news --folder PATH/TO/SETS --jobs 2                         topics of news
    python recipes/federa.py ag_news wnut17 20newsgroups squad_v1 --folder PATH/TO/SETS     and names, long posts, answers in a context
    python recipes/federa.py ag_news --folder PATH/TO/SETS --out runs/all --max-train 0 --max-validation 0 --max-test 0     the whole set
    python recipes/federa.py ag_news --keep           put its finished runs into docs/results/federa, an archive a task
    python recipes/federa.py --page                   make the tables of docs/results/federa.md anew from those archives (seconds)

It is ``fedloom compare`` with these methods and settings; whatever is added is added to them, and the later one counts. Passes compute in
bf16, which halves the time where a processor has instructions for it; what is trained stays float32. The reference is full fine-tuning:
costs are those to reach what ``fedfft`` ends with, as the paper measures time. Every method gets the same grid of learning rates, wide
enough for all weights (the lowest) and for a few (the highest), chosen on validation with the first seed. Stop it and run it again:
finished runs are used as they are.
"""

from __future__ import annotations

import sys

from kept import DOCS, Table

TABLE = Table(
    name="federa",
    page=DOCS / "results" / "federa.md",
    methods=("fedfft", "fedbf", "fedap", "lora", "ffa", "slora", "fedsa", "fedex", "federa"),
    alphas=("0.1", "1.0", "10.0"),
    seeds=("1", "2", "3"),
    rates=("2e-4", "1e-3", "5e-3"),
    shape="--clients 20 --cohort 4 --rounds 15 --evaluate-every 3 --max-train 400 --max-validation 100 --max-test 200 --precision bf16",
    shapes={
        "ag_news": "--max-length 64",
        "20newsgroups": "--max-length 96",
        "wnut17": "--max-length 64 --max-train 600",
        "squad_v1": "--max-length 192",
    },
)

if __name__ == "__main__":
    sys.exit(TABLE.command(__doc__))
