"""FedEven, this project's own: every device trains as if its labels were evenly spread, and predicts knowing that they are not.

    log π_k[c] = log (n_{k,c} + ε) / (n_k + C·ε)                 device k's own label prior; it stays there
    w^k    <- AdamW on  −log softmax(z(x; w) + log π_k)[y]       from w_t; every A, B and the head
    w_t+1  <- Σ_{k in S_t} p_k w^k,   p_k = m_k / Σ_{j in S_t} m_j,   m_k = n_k (1 − Σ_c π_k[c]²)
    global: argmax z(x; w_T)
    personalised on device k: argmax z(x; v^k) + log π_k,   v^k = w_T + λ_k (u^k − w_T),   λ_k = 1 − H(π_k) / log C
    u^k    <- AdamW as above from w_T, a few more epochs, thrown away afterwards

Under label skew much of what a device learns is which labels it has. Devices pull the shared model apart with that, and the mean knows it
of none of them. Here the prior explains it, so it does not enter w: z tends to log p(x|c), which all devices agree on, and Bayes' rule
with the device's own prior gives its own best prediction back.

1 − Σ_c π_k[c]² is how often a label drawn from the prior is not the one that is due, where labels are as the prior says, and so the mean
size of the gradient that the prior leaves. π_k is smoothed: for a device of one label only that tends to 0 as n_k grows against C·ε, as it
should, for one label says little about what sets labels apart; a few examples hardly tell that labels are uneven, and count nearly as even
ones do. AdamW's steps are as long however small the gradient, and with weights n_k devices of one label move the shared model's threshold
to and fro by what labels a cohort happens to have. m_k gives the gradient's size back.

What a device learns for itself beyond the others counts as far as its labels are uneven, again by the smoothed prior (λ_k: 0 where they are
even; where there is one label only towards 1 as n_k grows against C·ε): few and even examples mislead more than they tell. Traffic and
rounds are those of plain federated LoRA, and there is no set-up: a device counts its labels whenever it needs to. Of its training labels a
message tells m_k, besides what the trained tensors give away. Evaluation is another message: in a real federation a device tells its
held-out examples counted by true and predicted class (``run/deployment/device.py``), and their labels are spread as those it trains on.
Every personalised evaluation pays for u^k, as that of ``lora-finetuned`` does. Under ``--mask.keep`` u^k has all rows trained:
a mask is of the rounds (decision 0042).

The parts: softmax under the prior is logit adjustment (Menon et al., 2007.07314, eq. 10, there for one imbalanced set); a margin by label
counts on each device is FedLC's (2209.00189), which has another form, n^(−1/4), and no personalised prediction. The prior at prediction
is that of ``prior.py``, without its exchange of priors: a model trained evenly needs none.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import ClassVar

import torch

from fedloom.client.client import Client
from fedloom.messages import Flow, Task, Tensors, Update, Work, on_client
from fedloom.methods.fedavg import FedAvg
from fedloom.methods.method import Predictor, State, predict
from fedloom.methods.prior import label_prior
from fedloom.model.base import Model
from fedloom.server.participation import Pool


@dataclass(frozen=True)
class FedEven:
    """FedEven.

    Attributes:
        inner: local training and its optimiser.
        smoothing: examples of each label that every device is taken to have besides its own, ε.
        epochs: epochs of local training before a device predicts (0: none, v^k = w_T).
    """

    name: ClassVar[str] = "fedeven"
    paper: ClassVar[str] = "this project's own; logit adjustment 2007.07314"
    joins_late: ClassVar[bool] = True

    inner: FedAvg = field(default_factory=FedAvg)
    smoothing: float = 1.0
    epochs: int = 2

    def __post_init__(self) -> None:
        if not self.smoothing > 0:
            raise ValueError(
                f"smoothing is {self.smoothing}; it must be positive, or the logarithm of a missing label's prior is not finite"
            )
        if self.epochs < 0:
            raise ValueError(f"epochs is {self.epochs}; it must be 0 or more")

    def init(self, model: Model) -> State:
        """Every trainable tensor is shared; ``facts["classes"]`` is C."""
        model.need_classes(self.name)
        return State(0, model.initial, facts={"classes": model.num_labels})

    def setup(self, state: State, pool: Pool) -> Flow[State]:
        """As inner."""
        return (yield from self.inner.setup(state, pool))

    def round(self, state: State, pool: Pool) -> Flow[State]:
        """S_t trains evenly; the server takes the mean by m_k."""
        return self.inner.round(state, pool)

    @on_client
    def train(self, c: Client, task: Task) -> Work[Update]:
        """ClientUpdate(k, w_t) under log π_k."""
        log_prior = self.log_prior(c)
        fitted = yield from self.inner.learn(c, task.tensors, task, bias=log_prior)
        return Update(c.id, weight(log_prior, len(c.train)), fitted.tensors, {"loss": fitted.loss})

    def personalise(self, client: Client, shared: Tensors) -> Work[Predictor]:
        """v^k under log π_k."""
        log_prior = self.log_prior(client)
        batches = [b for epoch in range(self.epochs) for b in self.inner.cut(client, "refine", epoch)]
        if not batches:
            return Predictor(shared, log_prior)
        refined = yield self.inner.fit(client, shared, batches, -1, bias=log_prior)
        skew = unevenness(log_prior)
        return Predictor({name: torch.lerp(t, refined.tensors[name], skew) for name, t in shared.items()}, log_prior)

    def log_prior(self, c: Client) -> torch.Tensor:
        """log π_k (C,)."""
        return label_prior(c.train.labels, c.classes, self.smoothing).log()

    def assembled(self, state: State) -> Tensors | None:
        """The shared model, which favours no label."""
        return state.shared

    predict = predict


def unevenness(log_prior: torch.Tensor) -> float:
    """λ = 1 − H(π) / log C of log π (C,): 0 where all labels are as likely, towards 1 as one is certain."""
    log_p = log_prior.double()
    return float(1 + (log_p.exp() * log_p).sum() / math.log(len(log_p)))


def weight(log_prior: torch.Tensor, examples: int) -> int:
    """m = n (1 − Σ_c π[c]²) of log π (C,) and n ``examples``, in thousandths of an example and one at least: only ratios matter."""
    return max(1, round(1000 * examples * (1 - float(log_prior.double().mul(2).exp().sum()))))
