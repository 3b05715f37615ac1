"""pfl-research's simulation: FederatedAveraging on a SimulatedBackend with a PyTorchModel, the model resident in the process.

As documented, apple/pfl-research: benchmarks/llm/train.py and benchmarks/model/hugging_face/__init__.py, its example of transformers and
PEFT: the whole PEFT model is the PyTorchModel's, its loss the model's own, the local optimiser a class of ``torch.optim`` as it is; one
process, as benchmarks/llm/README.md starts it. That example pads a device's texts to the longest of the device; here each batch is padded
to its own. Its configuration compiles the model, for a GPU; PyTorchModel by default does not, nor does this. Tuned: several processes
(``torchrun``, see docs/source/guides/simulation_distributed.rst) where they are better; pfl deals the cohort to them, the devices with the
most data first, and sums their updates.
"""

from __future__ import annotations

import functools
import itertools
import os
import time
from typing import Any

import torch
from pfl.aggregate.simulate import SimulatedBackend
from pfl.aggregate.weighting import WeightByDatapoints
from pfl.algorithm.base import NNAlgorithmParams
from pfl.algorithm.federated_averaging import FederatedAveraging
from pfl.callback.base import TrainingProcessCallback
from pfl.data.federated_dataset import FederatedDataset
from pfl.data.pytorch import PyTorchDataDataset
from pfl.hyperparam.base import NNEvalHyperParams, NNTrainHyperParams
from pfl.metrics import Metrics, Weighted
from pfl.model.pytorch import PyTorchModel
from setups import collator, examples, setup_of
from task import job_of, settings, start_of, write

how = settings()
job, setup = job_of(how.job), setup_of(how)


class Classifier(torch.nn.Module):
    """The PEFT model with the two functions that pfl asks for."""

    def __init__(self, peft: Any) -> None:
        super().__init__()
        self.peft = peft

    def loss(self, **batch: torch.Tensor) -> torch.Tensor:
        """Mean cross-entropy of a batch."""
        return setup.loss(self.peft, batch)

    @torch.no_grad()
    def metrics(self, **batch: torch.Tensor) -> dict[str, Any]:
        """The loss, for pfl's evaluation; it happens in the first round only, which is not timed."""
        count = len(batch["labels"])
        return {"loss": Weighted(self.loss(**batch).item() * count, count)}


class Timed(TrainingProcessCallback):
    """Notes when each round ends and keeps what the first one made."""

    def on_train_begin(self, *, model: PyTorchModel) -> Metrics:
        """Before the first round."""
        self.marks, self.after_first = [time.perf_counter()], None
        return Metrics()

    def after_central_iteration(self, aggregate_metrics: Metrics, model: PyTorchModel, *, central_iteration: int) -> tuple[bool, Metrics]:
        """After each round."""
        self.marks.append(time.perf_counter())
        self.after_first = self.after_first or setup.copied(model.pytorch_model.peft)
        return False, Metrics()


def device(user: tuple[int, int]) -> PyTorchDataDataset:
    """The data of one participation: the round and the place in its cohort."""
    rows = job.rows(*user)
    if how.setup == "as-documented":
        return PyTorchDataDataset(examples(rows, how), collate_fn=lambda found: dict(collator(how)(found)))  # pfl asks for a dict
    return PyTorchDataDataset(rows, collate_fn=job.pad)


classifier = Classifier(setup.model(how)).train()
setup.load(classifier.peft, start_of(how))
model = PyTorchModel(
    classifier,
    local_optimizer_create=lambda parameters, **_: setup.optimizer(classifier.peft, how),
    central_optimizer=torch.optim.SGD([p for p in classifier.parameters() if p.requires_grad], lr=1.0),
    amp_dtype=torch.bfloat16 if how.precision == "bf16" else None,
)
users = [(t, place) for t in range(how.rounds) for place in job.cohort(t)]
data = FederatedDataset(device, functools.partial(next, itertools.cycle(users)), {user: len(job.rows(*user)) for user in users})
timed = Timed()
FederatedAveraging().run(
    NNAlgorithmParams(
        central_num_iterations=how.rounds, evaluation_frequency=10**6, train_cohort_size=len(job.cohort(0)), val_cohort_size=None
    ),
    SimulatedBackend(data, data, [WeightByDatapoints()]),
    model,
    NNTrainHyperParams(
        local_num_epochs=1,
        local_learning_rate=job.settings["lr"],
        local_batch_size=job.settings["batch"],
        local_max_grad_norm=job.settings["clip"],
    ),
    NNEvalHyperParams(local_batch_size=64),
    [timed],
)
if os.environ.get("RANK", "0") == "0":  # the only process, or torchrun's first
    write(how, [after - before for before, after in itertools.pairwise(timed.marks)], timed.after_first)
