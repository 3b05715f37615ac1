"""FedCyBGD: full-parameter tuning, one client and one block at a time (Cycle Block Gradient Descent, 2406.11187).

The model is cut into blocks 0..D−1 from the input to the output (``model/blocks.py``); a fresh task head is in none of them. A round is one
client's turn. A cycle is max(K, D) turns: clients take them in order, over and over, so that with fewer clients than blocks each takes
several. In turn s of a cycle client s mod K trains block b = s mod D (``order`` has other ways):

    down:   w_b and the head, exact;  of the others those that changed since this client was last sent them
    local:  w_b, head <- AdamW from m = v = 0, everything else frozen as the client has it
    up:     w_b, head;  the server puts them in the place of its own

Nothing is averaged. With ``subset`` ρ < 1 only a random share ρ of the other changed blocks goes down, and of the rest the client keeps
what it was sent before, or the pre-trained weights: it then trains against a model that is not quite the server's. Scores are always
those of the server's model. A client that does not answer costs its turn and nothing else.

Devices keep what they are sent between their turns: a copy of the model each, in the run's folder.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import ClassVar

import torch

from fedloom.client.client import Client
from fedloom.messages import Asking, Flow, Task, Tensors, Update, Work, ask, on_client, whole
from fedloom.methods.fedavg import FedAvg
from fedloom.methods.method import Predictor, State, predict
from fedloom.model.adapters import is_head
from fedloom.model.base import Model
from fedloom.model.blocks import Block, Parts, cover
from fedloom.seeds import derive
from fedloom.server.cycle import Order, block_at, turns
from fedloom.server.participation import Pool
from fedloom.tensors import only, without


@dataclass(frozen=True)
class FedCyBGD:
    """FedCyBGD.

    Attributes:
        inner: local training and its optimiser.
        order: which block is whose turn.
        parts: what a block is: a transformer layer, or half of one.
        ends: make the embeddings, and what lies behind the last layer, a block each; otherwise they stay as they are.
        subset: share ρ of the other changed blocks that goes down in a turn, 0 to 1.
    """

    name: ClassVar[str] = "fedcybgd"
    paper: ClassVar[str] = "FedCyBGD 2406.11187"
    adapter_kind: ClassVar[str] = "full"

    inner: FedAvg = field(default_factory=lambda: FedAvg(lr=2e-4, schedule="cosine"))
    order: Order = "ascending"
    parts: Parts = "layers"
    ends: bool = False
    subset: float = 1.0

    def __post_init__(self) -> None:
        if not 0 <= self.subset <= 1:
            raise ValueError(f"subset is {self.subset}; it is the share of the changed blocks that goes down, 0 to 1")

    def init(self, model: Model) -> State:
        """w_0: all blocks and the head. What is in neither keeps its pre-trained weights.

        Raises:
            ValueError: what is trained has no layers to make blocks of.
        """
        blocks = self.blocks(model.initial)
        if not blocks:
            raise ValueError(
                f"'{self.name}' trains a transformer layer at a time, and none of the {len(model.initial)} trainable tensors belongs to "
                f"one ({sorted(model.initial)[:3]}); give --adapter.kind full"
            )
        shared = only(model.initial, [*(n for block in blocks for n in block.names), *filter(is_head, model.initial)])
        return State(0, shared, {"changed": torch.zeros(len(blocks), dtype=torch.int64)}, {"blocks": [block.label for block in blocks]})

    def setup(self, state: State, pool: Pool) -> Flow[State]:
        """Every client has the pre-trained blocks: what it has seen of them is their state before the first turn."""
        pool.insist_on_the_mean(self.name, "one client at a time hands a block on, and nothing is averaged")
        state = yield from self.inner.setup(state, pool)
        blocks = len(state.server["changed"])
        seen = torch.zeros(len(pool.clients), blocks, dtype=torch.int64)
        facts = {**state.facts, "turns_per_cycle": turns(len(pool.clients), blocks)}
        return replace(state, server={**state.server, "seen": seen}, facts=facts)

    def round(self, state: State, pool: Pool) -> Flow[State]:
        """One turn."""
        blocks, a_cycle = self.blocks(state.shared), int(state.facts["turns_per_cycle"])
        place = state.round % a_cycle % len(pool.clients)
        at = block_at(state.round, a_cycle, len(blocks), self.order, pool.seed)
        task, state = self.turn(state, pool, place, at)
        came = yield Asking([task], whole, needed=0)
        return self.replaced(state, at, came[0].tensors) if came else state.after_round(state.shared)

    def turn(self, state: State, pool: Pool, place: int, at: int) -> tuple[Task, State]:
        """What the client at ``place`` is asked in a turn on block ``at``, and the state if it answers (or had better be sent it again)."""
        blocks, (changed, seen) = self.blocks(state.shared), (state.server["changed"], state.server["seen"].clone())
        others = [j for j in range(len(blocks)) if j != at and changed[j] > seen[place, j]]
        if self.subset < 1:
            drawn = derive(pool.seed, "subset", state.round, pool.clients[place]).permutation(len(others))
            others = sorted(others[i] for i in drawn[: round(self.subset * len(others))])
        sent = [at, *others]
        down = only(state.shared, [*(n for j in sent for n in blocks[j].names), *filter(is_head, state.shared)])
        task = ask(self.train, pool.clients[place], down, block=list(blocks[at].names), **self.inner.clock(state.round, pool))
        seen[place, sent] = changed[sent]
        return task, replace(state, server={**state.server, "seen": seen})

    def replaced(self, state: State, at: int, tensors: Tensors) -> State:
        """The state after a turn that brought block ``at`` and the head."""
        changed = state.server["changed"].clone()
        changed[at] = state.round + 1
        return replace(state, server={**state.server, "changed": changed}).after_round({**state.shared, **tensors})

    @on_client
    def train(self, c: Client, task: Task) -> Work[Update]:
        """Train the block and the head on top of the model as this client has it."""
        has = {**c.private, **task.tensors}
        start = only(has, [*task.settings["block"], *filter(is_head, has)])  # type: ignore[misc]
        fitted = yield from self.inner.learn(c, start, task, fixed=without(has, start))
        c.private = {n: t for n, t in has.items() if not is_head(n)}
        return Update(c.id, len(c.train), fitted.tensors, {"loss": float(fitted.losses.mean())})

    def personalise(self, client: Client, shared: Tensors) -> Work[Predictor]:
        """The server's model."""
        yield from ()
        return Predictor(shared)

    def assembled(self, state: State) -> Tensors | None:
        """The server's model."""
        return state.shared

    def blocks(self, tensors: Mapping[str, torch.Tensor]) -> list[Block]:
        """The blocks of a model with these tensors, from the input to the output."""
        return cover(tensors, self.parts, self.ends, [n for n in tensors if is_head(n)])

    predict = predict
