"""FlexLoRA: devices of several ranks (Federated Fine-tuning of LLMs under Heterogeneous Tasks and Client Resources, 2402.11505).

The mean is taken of the products, and each device gets the best approximation of it that its rank allows:

    A^k, B^k <- AdamW on device k from its pair of rank r_k                  A (r_k, d_in), B (d_out, r_k)
    Δ_t+1 <- Σ_{k in S_t} p_k B^k A^k,   p_k = n_k / Σ_{j in S_t} n_j        (d_out, d_in)
    Δ_t+1 = U S Vᵀ,   B = U_r S_r^(1/2),   A = S_r^(1/2) V_rᵀ                r the adapter's rank; a device takes the first r_k of them

Singular values come in order, so the first r_k directions of the pair of rank r are the decomposition at rank r_k. What lies behind the
highest rank is lost in every round; the global model is the pair of the adapter's rank.

Deviations: the singular values are shared between the factors, as FeDeRA has it, so that both learn alike. s = alpha/r is that of the
adapter's rank on every device. The task head is averaged as FedAvg does. AdamW, fresh at each participation.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import ClassVar

from fedloom.client.client import Client
from fedloom.messages import Asking, Flow, Task, Tensors, Update, Work, ask, due, on_client
from fedloom.methods.fedavg import FedAvg
from fedloom.methods.method import Predictor, State, predict
from fedloom.model.base import Model
from fedloom.model.factors import (
    Products,
    cut,
    need_ranks,
    need_room,
    need_zero_start,
    quarters,
    rank_in,
    rank_of,
    refactored,
    widened,
)
from fedloom.model.names import is_factor, need_pairs
from fedloom.server.aggregation import Average
from fedloom.server.participation import Pool, uniform
from fedloom.tensors import without


@dataclass(frozen=True)
class FlexLora:
    """FlexLoRA.

    Attributes:
        inner: local training and its optimiser.
        ranks: the ranks that devices have, of which each is given one, by its memory where devices differ (none: a quarter, half, and all
            of the adapter's).
    """

    name: ClassVar[str] = "flexlora"
    paper: ClassVar[str] = "FlexLoRA 2402.11505"

    inner: FedAvg = field(default_factory=FedAvg)
    ranks: tuple[int, ...] = ()

    def init(self, model: Model) -> State:
        """Every trainable tensor is shared.

        Raises:
            ValueError: no LoRA is trained, one that does not start at zero, ranks that it has not, or a higher rank than a weight has.
        """
        need_pairs(model.initial, self.name)
        need_zero_start(model.initial, self.name)
        need_room(model.initial, self.name)
        need_ranks(self.ranks, model.initial, self.name)
        return self.inner.init(model)

    def setup(self, state: State, pool: Pool) -> Flow[State]:
        """As inner."""
        pool.insist_on_the_mean(self.name, "its server decomposes the mean of the products")
        pool.insist_on_nothing_owed(self.name, "every round decomposes anew, and what is owed lies along another round's directions")
        return self.inner.setup(state, pool)

    def round(self, state: State, pool: Pool) -> Flow[State]:
        """S_t trains, each at its rank; the server decomposes the mean of the products."""
        whole, clock = rank_in(state.shared), self.inner.clock(state.round, pool)
        cohort = uniform(pool, state.round)
        ranks = {k: rank_of(k, self.ranks or quarters(whole), pool.seed, pool.strength(k)) for k in cohort}
        asked = [due(ask(self.train, k, cut(state.shared, ranks[k]), **clock)) for k in cohort]
        ideal, heads = Products(), Average()

        def take(update: Update) -> Update:
            ideal.add(update.num_examples, update.tensors)
            return heads.take(replace(update, tensors=without(update.tensors, list(filter(is_factor, update.tensors)))))

        yield Asking(asked, take)
        return state.after_round({**heads.value(), **refactored(ideal.mean(), state.shared, 1.0)})

    @on_client
    def train(self, c: Client, task: Task) -> Work[Update]:
        """As inner, at the rank that came."""
        return self.inner.train(c, task)

    def personalise(self, client: Client, shared: Tensors) -> Work[Predictor]:
        """The shared model at the device's rank."""
        yield from ()
        whole = rank_in(shared)
        rank = rank_of(client.id, self.ranks or quarters(whole), client.seed, client.strength)
        return Predictor(widened(cut(shared, rank), whole))

    def assembled(self, state: State) -> Tensors | None:
        """The shared model at the adapter's rank."""
        return state.shared

    predict = predict
