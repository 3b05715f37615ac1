"""FibecFed, plain federated LoRA, its cheap rivals, two of its paper's baselines, floor and ceiling, under one protocol. The tables of
docs/log.md are of all but those two (``adalora``, ``deltalora``), which came later.

    python recipes/rivals.py --out runs/rivals                        the packaged questions
    python recipes/rivals.py --data PATH/TO/rte --max-train 500 --clients 20 --cohort 5 --rounds 12 --max-length 96 --out runs/rivals-rte

It is ``fedloom compare`` with these methods and settings; whatever is added is added to them, and the later one counts. Every method gets
the same grid of learning rates, chosen on validation with the first seed. Fine-tuning and prior correction train as ``lora`` does, so they
are evaluated on what it trained. Stop it and run it again: finished runs are used as they are.
"""

from __future__ import annotations

import sys

from fedloom.cli import main

METHODS = ["lora", "lora-personal-head", "fibecfed", "local", "centralised", "lora-finetuned", "lora-prior", "adalora", "deltalora"]
GRID = "--alphas 1.0 0.1 --seeds 1 2 3 --lrs 5e-4 2e-3 8e-3 --share-training"
SHAPE = "--clients 50 --cohort 10 --rounds 20 --max-train 2000 --evaluate-every 0 --precision bf16"

if __name__ == "__main__":
    sys.exit(main(["compare", *METHODS, *GRID.split(), *SHAPE.split(), *sys.argv[1:]]))
