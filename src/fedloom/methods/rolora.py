"""RoLoRA: rounds that alternate between the factors (Robust Federated Finetuning … via Alternating Minimization of LoRA, 2409.02346).

Counting rounds from 0, as everywhere here, even rounds train B under the shared A and odd rounds train A under the shared B (the paper
counts from 1 and starts with B in its odd rounds):

    t even:  B^k <- AdamW on device k from B_t, with A_t frozen;   B_t+1 <- Σ_{k in S_t} p_k B^k,   A_t+1 = A_t
    t odd:   A^k <- AdamW on device k from A_t, with B_t frozen;   A_t+1 <- Σ_{k in S_t} p_k A^k,   B_t+1 = B_t

with p_k = n_k / Σ_{j in S_t} n_j, A (r, d_in), B (d_out, r). In each round one factor is the same on all devices, so the average is exact:
s·B_t+1 A_t+1 = Σ p_k s·B^k A^k. B goes first because at B = 0 the gradient of A is 0.

What travels: up, the factor that was trained and the head. Down, both factors and the head: a device that was not in the last cohort does
not have the factor that is frozen now. To save on the way down as well takes devices that are there in every round.

Deviations: the head, which a classification needs, is trained and averaged in every round; the optimiser is AdamW, fresh at each
participation.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass, field
from typing import ClassVar

from fedloom.client.client import Client
from fedloom.messages import Asking, Flow, Task, Tensors, Update, Work, ask, due, on_client
from fedloom.methods.fedavg import FedAvg
from fedloom.methods.method import Predictor, State, predict, round_of
from fedloom.model.base import Model
from fedloom.model.names import is_down, is_up, need_pairs
from fedloom.server.participation import Pool, uniform
from fedloom.tensors import only, without


@dataclass(frozen=True)
class RoLora:
    """``inner``: local training and its optimiser."""

    name: ClassVar[str] = "rolora"
    paper: ClassVar[str] = "RoLoRA 2409.02346"
    joins_late: ClassVar[bool] = True

    inner: FedAvg = field(default_factory=FedAvg)

    def init(self, model: Model) -> State:
        """Every trainable tensor is shared.

        Raises:
            ValueError: no LoRA is trained.
        """
        need_pairs(model.initial, self.name)
        return self.inner.init(model)

    def setup(self, state: State, pool: Pool) -> Flow[State]:
        """As inner."""
        return self.inner.setup(state, pool)

    def round(self, state: State, pool: Pool) -> Flow[State]:
        """S_t trains one factor and the head; the other factor stays as it is."""
        cohort = uniform(pool, state.round)
        mean = pool.average(state.shared)
        trained = without(state.shared, frozen_in(state.round, state.shared.keys()))
        asked = [ask(self.train, k, state.shared, **self.inner.clock(state.round, pool)) for k in cohort]
        yield Asking([due(task, trained) for task in asked], mean.take)
        return state.after_round({**state.shared, **mean.value()})

    @on_client
    def train(self, c: Client, task: Task) -> Work[Update]:
        """Train this round's factor and the head under the other factor; send what was trained."""
        frozen = frozen_in(round_of(task), task.tensors.keys())
        start = only(task.tensors, task.tensors.keys() - frozen)
        fitted = yield from self.inner.learn(c, start, task, fixed=only(task.tensors, frozen))
        return Update(c.id, len(c.train), fitted.tensors, {"loss": fitted.loss})

    def personalise(self, client: Client, shared: Tensors) -> Work[Predictor]:
        """The shared model as it is."""
        return self.inner.personalise(client, shared)

    def assembled(self, state: State) -> Tensors | None:
        """The shared model."""
        return self.inner.assembled(state)

    predict = predict


def frozen_in(round: int, names: Collection[str]) -> set[str]:
    """The names of the factors that stay put in a round: every A in even rounds, every B in odd ones."""
    frozen = is_down if round % 2 == 0 else is_up
    return {name for name in names if frozen(name)}
