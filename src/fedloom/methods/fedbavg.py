"""FedBAvg: block after block as FedCyBGD, but many clients train the same one at once and are averaged (2406.11187's comparison).

    S_t drawn uniformly;  block b of round t as in FedCyBGD, a cycle being D rounds
    w_b^k, head^k <- AdamW on device k in S_t from m = v = 0, everything else frozen
    w_b, head <- Σ_{k in S_t} p_k w^k,   p_k = n_k / Σ_{j in S_t} n_j

Whoever of S_t does not answer is left out of the mean, and is sent again what it was sent. A round costs |S_t| times what a turn of
FedCyBGD does: compare at equal examples or bytes, not at equal rounds.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import ClassVar

from fedloom.client.client import Client
from fedloom.messages import Asking, Flow, Task, Tensors, Update, Work, on_client
from fedloom.methods.fedcybgd import FedCyBGD
from fedloom.methods.method import Predictor, State, predict
from fedloom.model.base import Model
from fedloom.server.cycle import block_at
from fedloom.server.participation import Pool, uniform


@dataclass(frozen=True)
class FedBAvg:
    """``inner``: what a block is, which comes when, what goes down, and how a client trains it."""

    name: ClassVar[str] = "fedbavg"
    paper: ClassVar[str] = "FedCyBGD 2406.11187, its comparison"
    adapter_kind: ClassVar[str] = "full"
    rounds_differ: ClassVar[bool] = True

    inner: FedCyBGD = field(default_factory=FedCyBGD)

    def init(self, model: Model) -> State:
        """w_0."""
        return self.inner.init(model)

    def setup(self, state: State, pool: Pool) -> Flow[State]:
        """As inner, which need not know by what rule the blocks will be averaged; a cycle is D rounds."""
        pool.insist_on_what_was_sent(self.name, "a device trains one block in a turn, and is sent what has changed of the others")
        state = yield from self.inner.setup(state, pool.plain())
        return replace(state, facts={**state.facts, "turns_per_cycle": len(state.server["changed"])})

    def round(self, state: State, pool: Pool) -> Flow[State]:
        """S_t trains the round's block; the server takes the mean by numbers of examples."""
        blocks = len(state.server["changed"])
        at = block_at(state.round, blocks, blocks, self.inner.order, pool.seed)
        places = [pool.clients.index(client) for client in uniform(pool, state.round)]
        asked = {pool.clients[place]: (place, *self.inner.turn(state, pool, place, at)) for place in places}
        mean = pool.average(state.shared)
        came = yield Asking([task for _, task, _ in asked.values()], mean.take)
        seen = {place: versions for place, _, versions in (asked[update.client] for update in came)}
        return self.inner.replaced(state, at, mean.value(), seen)

    @on_client
    def train(self, c: Client, task: Task) -> Work[Update]:
        """As inner."""
        return self.inner.train(c, task)

    def personalise(self, client: Client, shared: Tensors) -> Work[Predictor]:
        """The server's model."""
        return self.inner.personalise(client, shared)

    def assembled(self, state: State) -> Tensors | None:
        """The server's model."""
        return self.inner.assembled(state)

    predict = predict
