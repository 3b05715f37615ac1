"""FibecFed with its paper's settings (2410.00131): a federation of its size, with its devices, batches and numbers.

    fedloom run recipes/fibecfed_paper.py --data FOLDER
    fedloom run recipes/fibecfed_paper.py --data FOLDER --model minilm --rounds 20       any option overrides what stands here

100 devices, 10 a round, 100 rounds; 2 local epochs in batches of 8; texts of up to 128 tokens; LoRA of rank 8 and alpha 16 on query and
value; AdamW with a constant rate, no decay, gradients clipped to 1, fresh at each participation; sizes of devices by Dirichlet(5), their
labels by Dirichlet(1). The curriculum opens with 0.6 of the batches and is whole at 0.8 of the rounds; ρ = 0.5; three quarters of the
layers are global; masks come after an epoch of warm-up, with γ = 0.5, and keep 0.95.

The rate is searched, 1e-4 to 8e-4 for RoBERTa and 3e-6 to 5e-5 for LLaMA-7B; what stands here is within the first range, to be searched
again (``--method.inner.lr``). The head is a new one, warmed up before examples are scored; the authors' code scores with a cloze, which is
``--head cloze``. The warm-up of a fresh head, and which layers are global, are this project's (docs/papers.md).
"""

from __future__ import annotations

from fedloom.methods.fedavg import FedAvg
from fedloom.methods.fibecfed import Curriculum, FibecFed, Gal
from fedloom.model.adapters import Adapter
from fedloom.run.experiment import Experiment

experiment = Experiment(
    FibecFed(
        FedAvg(lr=4e-4, local_epochs=2, batch_size=8, weight_decay=0.0, clip=1.0),
        Curriculum(start=0.6, full_at=0.8, pacing="linear"),
        Gal(fraction=0.75, which="least", rho=0.5),
        keep=0.95,
        warmup_epochs=1,
        momentum=0.5,
    ),
    model="FacebookAI/roberta-large",
    adapter=Adapter(rank=8, alpha=16.0, targets=("query", "value")),
    clients=100,
    cohort=10,
    rounds=100,
    alpha=1.0,
    beta=5.0,
    max_length=128,
    seed=42,
)
