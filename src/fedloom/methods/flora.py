"""FLoRA: stacked low-rank adapters (Federated Fine-Tuning LLMs with Heterogeneous Low-Rank Adaptations, 2409.05976).

Devices' pairs are stacked, not averaged, and what they come to is added to the weights they stand on; then everybody starts anew:

    A^k, B^k <- AdamW on device k from a new A and B = 0, on W_t             A (r_k, d_in), B (d_out, r_k), W (d_out, d_in)
    A = [p_1 A^1 ; … ; p_m A^m],   B = [B^1 … B^m],   p_k = n_k / Σ_{j in S_t} n_j
    W_t+1 <- W_t + s·B·A = W_t + Σ_k p_k s·B^k A^k

The product of the stacks is the mean of the products, so it is exact, for any ranks; that sum is what the server computes here. ``ranks``
gives every device one of several ranks, once and for all: by its memory where devices differ, else drawn.

Deviations: a device is sent W_t itself. The paper sends the stacks of each round to everybody; a device of a hundred of which ten are drawn
misses ten rounds between its participations, and their stacks have several times W's numbers. The server draws the new A, one for all of a
round, and sends it. s = alpha/r is that of the adapter's rank on every device. The task head is averaged as FedAvg does. AdamW, fresh at
each participation.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import ClassVar

from fedloom.client.client import Client
from fedloom.messages import Asking, Flow, Task, Tensors, Update, Work, ask, due, on_client
from fedloom.methods.fedavg import FedAvg
from fedloom.methods.method import Predictor, State, predict
from fedloom.model.base import Model
from fedloom.model.factors import Products, cut, drawn, moved, need_ranks, need_zero_start, rank_in, rank_of
from fedloom.model.names import is_beneath, is_down, is_factor, need_pairs, partner, under
from fedloom.server.aggregation import Average
from fedloom.server.participation import Pool, uniform
from fedloom.tensors import only, without


@dataclass(frozen=True)
class FLoRA:
    """FLoRA.

    Attributes:
        inner: local training and its optimiser.
        ranks: the ranks that devices have, of which each is given one, by its memory where devices differ (none: all have the adapter's).
    """

    name: ClassVar[str] = "flora"
    paper: ClassVar[str] = "FLoRA 2409.05976"

    inner: FedAvg = field(default_factory=FedAvg)
    ranks: tuple[int, ...] = ()

    def init(self, model: Model) -> State:
        """W_0 and the head are shared; the server keeps the shapes of the pairs.

        Raises:
            ValueError: no LoRA is trained, one that does not start at zero, or ranks that it has not; or a base in few bits.
        """
        need_pairs(model.initial, self.name)
        model.need_own_weights(self.name)
        need_zero_start(model.initial, self.name)
        need_ranks(self.ranks, model.initial, self.name)
        pairs = only(model.initial, list(filter(is_factor, model.initial)))
        shared = {**without(model.initial, pairs), **model.weights}
        return State(0, shared, only(pairs, list(filter(is_down, pairs))), {"scaling": model.beneath.scaling})

    def setup(self, state: State, pool: Pool) -> Flow[State]:
        """As inner."""
        pool.insist_on_the_mean(self.name, "its server adds the devices' products up", steps=True)
        pool.insist_on_nothing_owed(self.name, "every round trains new pairs, and what is owed is of another round's")
        return self.inner.setup(state, pool)

    def round(self, state: State, pool: Pool) -> Flow[State]:
        """S_t trains new pairs on W_t; the server adds the mean of their products to it."""
        new, whole = drawn(state.server, pool.seed, state.round), rank_in(state.server)
        clock, asked = self.inner.clock(state.round, pool), list[Task]()
        for k in uniform(pool, state.round):
            sent = {**state.shared, **cut(new, rank_of(k, self.ranks or (whole,), pool.seed, pool.strength(k)))}
            asked.append(due(ask(self.train, k, sent, **clock), trained(sent)))
        added, heads = Products(), Average()

        def take(update: Update) -> Update:
            added.add(update.num_examples, update.tensors)
            return heads.take(replace(update, tensors=without(update.tensors, list(filter(is_factor, update.tensors)))))

        yield Asking(asked, take)
        made = {**heads.value(), **moved(state.shared, added.mean(), float(state.facts["scaling"]))}
        return state.after_round(pool.stepped(state.shared, made))

    @on_client
    def train(self, c: Client, task: Task) -> Work[Update]:
        """Train the pairs, B from zero, and the head, on the weights that came; send them."""
        weights = only(task.tensors, list(filter(is_beneath, task.tensors)))
        start = without(task.tensors, weights)
        ups = {partner(a): start[a].new_zeros(weights[under(a)].shape[0], start[a].shape[0]) for a in filter(is_down, start)}
        fitted = yield from self.inner.learn(c, {**start, **ups}, task, fixed=weights)
        return Update(c.id, len(c.train), fitted.tensors, {"loss": fitted.loss})

    def personalise(self, client: Client, shared: Tensors) -> Work[Predictor]:
        """The shared model: W_t and the head. The next pairs start at B = 0 and change nothing."""
        yield from ()
        return Predictor(shared)

    def assembled(self, state: State) -> Tensors | None:
        """The shared model."""
        return state.shared

    predict = predict


def trained(sent: Tensors) -> Tensors:
    """What a device trains: what it was sent but for the weights, and the B's, which nobody sends; of these the shapes alone."""
    start = without(sent, list(filter(is_beneath, sent)))
    ups = {partner(a): start[a].new_empty(sent[under(a)].shape[0], start[a].shape[0], device="meta") for a in filter(is_down, start)}
    return {**start, **ups}
