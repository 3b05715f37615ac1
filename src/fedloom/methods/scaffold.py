"""SCAFFOLD: stochastic controlled averaging (1910.06378) on what the adapter trains and the task head.

Each device knows which way its own loss pulls (c_k), the server which way all do (c); training goes by the difference:

    w^k  <- AdamW on device k from w_t, every step's gradient g replaced by g − c_k + c                                   eq. (3)
    c_k+ <- the mean of the g of all its steps                                                                            eq. (4), option II
    w_t+1 <- Σ_{k in S_t} p_k w^k,   p_k = n_k / Σ_{j in S_t} n_j                                                         eq. (5)
    c     <- c + (1/K) Σ_{k in S_t} (c_k+ − c_k)                             K devices in all                             eq. (5)

c and every c_k begin at zero; c_k stays on its device. A participation sends and receives twice what `lora`'s does. The controls are made
in ``server/controls.py`` and ``client/controls.py``; over other methods they are a setting of the experiment (``--controls``).

Deviations: AdamW, fresh at each participation, instead of SGD. Option II is written c_k+ = c_k − c + (w_t − w^k)/(steps·η): along steps of
SGD that is the mean of their gradients before they were corrected, and that mean is taken here, for what AdamW moved by is no gradient. The
paper averages devices alike; here p_k is FedAvg's.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import ClassVar

from fedloom.client.client import Client
from fedloom.client.controls import corrected
from fedloom.messages import Flow, Task, Tensors, Update, Work, on_client
from fedloom.methods.fedavg import FedAvg
from fedloom.methods.method import Predictor, State, predict
from fedloom.model.base import Model
from fedloom.server.controls import CONTROL, Controls
from fedloom.server.participation import Pool


@dataclass(frozen=True)
class Scaffold:
    """``inner``: local training and its optimiser."""

    name: ClassVar[str] = "scaffold"
    paper: ClassVar[str] = "SCAFFOLD 1910.06378"
    rounds_differ: ClassVar[bool] = True

    inner: FedAvg = field(default_factory=FedAvg)

    def __post_init__(self) -> None:
        if not isinstance(self.inner, FedAvg):
            raise ValueError(
                f"SCAFFOLD corrects the gradients of plain federated LoRA, and inner is {type(self.inner).__name__}; over other methods it "
                "is a setting of the experiment: --controls, or controls=True"
            )

    def init(self, model: Model) -> State:
        """As inner; c = 0."""
        return self.inner.init(model)

    def setup(self, state: State, pool: Pool) -> Flow[State]:
        """As inner."""
        pool.insist_on_every_layer(self.name, "its controls are of all that a device trains; lora with --controls can")
        pool.insist_on_what_was_sent(self.name, "it has them anyway")
        return self.inner.setup(state, pool)

    def round(self, state: State, pool: Pool) -> Flow[State]:
        """As inner, with corrected gradients; the server adds what the devices' controls moved to its own.

        Raises:
            ValueError: the run was begun by an earlier version, whose controls were others.
        """
        if state.server:
            raise ValueError("this run of 'scaffold' was begun when controls were gradients at the start of a round; give another --out")
        if any(n.split("/", 1)[1].startswith(CONTROL) for n in state.moments):
            raise ValueError("this run of 'scaffold' was begun when the server's optimiser stepped the controls too; give another --out")
        controls = Controls(state.controls, pool)
        after = yield from controls.over(self.inner.round(state, pool))
        return replace(after, controls=controls.value())

    @on_client
    def train(self, c: Client, task: Task) -> Work[Update]:
        """As inner, against the difference of the controls; send the model and how the device's own control moved."""
        return corrected(self.inner.train, c, task)

    def personalise(self, client: Client, shared: Tensors) -> Work[Predictor]:
        """The shared model as it is."""
        return self.inner.personalise(client, shared)

    def assembled(self, state: State) -> Tensors | None:
        """The shared model."""
        return self.inner.assembled(state)

    predict = predict
