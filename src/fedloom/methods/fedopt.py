"""FedOpt: an optimiser at the server (Adaptive Federated Optimization, 2003.00295; FedAvgM, 1909.06335).

Devices do what they do in FedAvg. The server does not take their mean over; it treats the way there as the negative of a gradient:

    Δ_t     = Σ_{k in S_t} p_k (w^k − w_t),   p_k = n_k / Σ_{j in S_t} n_j
    w_t+1   = one step of the rule from w_t along Δ_t                      the rules: ``server/optimizers.py``

``rule="adam"`` is FedAdam, ``"yogi"`` FedYogi, ``"adagrad"`` FedAdagrad, ``"momentum"`` FedAvgM. The moments are the server's and are saved
with its state; nothing of them travels. Over other methods the same rules are a setting of the experiment (``--server.rule``).

Deviations: devices train with AdamW instead of SGD, fresh at each participation. The paper tunes η and τ for each task; the defaults here
are a place to start, no more.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import ClassVar

from fedloom.client.client import Client
from fedloom.messages import Flow, Task, Tensors, Update, Work, on_client
from fedloom.methods.fedavg import FedAvg
from fedloom.methods.method import Predictor, State, predict
from fedloom.model.base import Model
from fedloom.server.optimizers import Rule, ServerOptimizer
from fedloom.server.participation import Pool


@dataclass(frozen=True)
class FedOpt:
    """FedAdam and its relatives.

    Attributes:
        inner: what the devices do, and the mean of it.
        rule: the server's rule; momentum is FedAvgM.
        server_lr: η; of momentum usually 1, which with beta1 0 would be FedAvg.
        beta1: momentum β₁.
        beta2: memory β₂ of the squares (yogi, adam).
        tau: τ, which bounds how adaptive the rule is (adagrad, yogi, adam).
    """

    name: ClassVar[str] = "fedopt"
    paper: ClassVar[str] = "FedAdam, FedYogi, FedAdagrad 2003.00295; FedAvgM 1909.06335"
    joins_late: ClassVar[bool] = True

    inner: FedAvg = field(default_factory=FedAvg)
    rule: Rule = "adam"
    server_lr: float = 0.01
    beta1: float = 0.9
    beta2: float = 0.99
    tau: float = 0.001

    def __post_init__(self) -> None:
        if not isinstance(self.inner, FedAvg):
            raise ValueError(
                f"FedOpt is a server optimiser over plain federated LoRA, and inner is {type(self.inner).__name__}; over other methods "
                "it is a setting of the experiment: --server.rule adam, or ServerStep('adam') as server="
            )
        _ = self.optimizer

    def init(self, model: Model) -> State:
        """As inner, and the moments' start."""
        started = self.inner.init(model)
        return replace(started, server={**started.server, **self.optimizer.start(started.shared)})

    def setup(self, state: State, pool: Pool) -> Flow[State]:
        """As inner."""
        pool.insist_on_no_optimizer(self.name, "it has one of its own (--method.rule)")
        return self.inner.setup(state, pool)

    def round(self, state: State, pool: Pool) -> Flow[State]:
        """As inner, and a step towards its mean instead of the mean."""
        after = yield from self.inner.round(state, pool)
        shared, moments = self.optimizer.step(state.shared, after.shared, state.server)
        return replace(after, shared=shared, server={**after.server, **moments})

    @on_client
    def train(self, c: Client, task: Task) -> Work[Update]:
        """As inner."""
        return self.inner.train(c, task)

    def personalise(self, client: Client, shared: Tensors) -> Work[Predictor]:
        """The shared model as it is."""
        return self.inner.personalise(client, shared)

    def assembled(self, state: State) -> Tensors | None:
        """The shared model."""
        return self.inner.assembled(state)

    predict = predict

    @property
    def optimizer(self) -> ServerOptimizer:
        """The server's rule with this method's numbers."""
        return ServerOptimizer(self.rule, self.server_lr, (self.beta1, self.beta2), self.tau)
