"""What each part of FedEven does: FedEven, the same with one part changed at a time, and what it is built on.

    python recipes/fedeven_parts.py --jobs 2 --out runs/fedeven-parts                        the packaged questions, as in the core table
    python recipes/fedeven_parts.py --data PATH/TO/sst2 --jobs 2 --out runs/fedeven-parts-sst2
    fedloom run recipes/fedeven_parts.py:even-by-number                                      one of them alone, like any method in a file

    even-unrefined          devices predict with the shared model: no more epochs of their own before they do
    even-outright           what those epochs bring counts in full, however even a device's labels are (λ = 1)
    even-by-number          the mean by numbers of examples, not by what the prior leaves to learn
    lora-finetuned-prior    plain federated LoRA; the prior comes in with those epochs, and stays for the prediction

It is ``fedloom compare`` with these methods and the core table's settings; whatever is added is added to them, and the later one counts.
Every method gets the same grid of learning rates, chosen on validation with the first seed. Stop it and run it again: finished runs are
used as they are.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from typing import ClassVar

from fedloom.cli import main
from fedloom.client.client import Client
from fedloom.messages import Task, Tensors, Update, Work, on_client
from fedloom.methods.fedeven import FedEven
from fedloom.methods.method import Predictor


@dataclass(frozen=True)
class Unrefined(FedEven):
    """FedEven whose devices train nothing before they predict: v^k = w_T."""

    name: ClassVar[str] = "even-unrefined"
    paper: ClassVar[str] = "FedEven, one part changed"
    joins_late: ClassVar[bool] = True

    epochs: int = 0


@dataclass(frozen=True)
class Outright(FedEven):
    """FedEven with v^k = u^k."""

    name: ClassVar[str] = "even-outright"
    paper: ClassVar[str] = "FedEven, one part changed"
    joins_late: ClassVar[bool] = True

    def personalise(self, client: Client, shared: Tensors) -> Work[Predictor]:
        """u^k under log π_k."""
        log_prior = self.log_prior(client)
        batches = [b for epoch in range(self.epochs) for b in self.inner.cut(client, "refine", epoch)]
        refined = yield self.inner.fit(client, shared, batches, -1, bias=log_prior)
        return Predictor(refined.tensors, log_prior)


@dataclass(frozen=True)
class ByNumber(FedEven):
    """FedEven with p_k = n_k / Σ_j n_j."""

    name: ClassVar[str] = "even-by-number"
    paper: ClassVar[str] = "FedEven, one part changed"
    joins_late: ClassVar[bool] = True

    @on_client
    def train(self, c: Client, task: Task) -> Work[Update]:
        """ClientUpdate(k, w_t) under log π_k, of weight n_k."""
        fitted = yield from self.inner.learn(c, task.tensors, task, bias=self.log_prior(c))
        return Update(c.id, len(c.train), fitted.tensors, {"loss": float(fitted.losses.mean())})


@dataclass(frozen=True)
class FineTunedWithPrior(Outright):
    """Plain federated LoRA, then what ``even-outright`` does before a prediction."""

    name: ClassVar[str] = "lora-finetuned-prior"
    paper: ClassVar[str] = "FedEven, one part changed"
    joins_late: ClassVar[bool] = True
    trains_as_inner: ClassVar[bool] = True

    @on_client
    def train(self, c: Client, task: Task) -> Work[Update]:
        """As inner."""
        return self.inner.train(c, task)


WITHOUT = [f"{__file__}:{method.name}" for method in (Unrefined, Outright, ByNumber, FineTunedWithPrior)]
METHODS = ["lora", "fedeven", *WITHOUT, "lora-finetuned", "lora-prior"]
SHAPE = (
    "--alpha 0.1 --seeds 1 2 3 --lrs 5e-4 2e-3 8e-3 --share-training --clients 100 --cohort 10 --rounds 30 --max-train 1600 "
    "--max-validation 400 --max-test 500 --max-length 64 --evaluate-every 6 --adapter.kind lora"
)

if __name__ == "__main__":
    sys.exit(main(["compare", *METHODS, *SHAPE.split(), *sys.argv[1:]]))
