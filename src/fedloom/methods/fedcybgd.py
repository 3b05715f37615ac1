"""FedCyBGD: full-parameter tuning, one client and one block at a time (Cycle Block Gradient Descent, 2406.11187).

The model is cut into blocks 0..D−1 from the input to the output (``model/blocks.py``); a fresh task head is in none of them. A round is one
client's turn. A cycle is max(K, D) turns: clients take them in order, over and over, so that with fewer clients than blocks each takes
several. In turn s of a cycle client s mod K trains block b = s mod D (``order`` has other ways):

    down:   w_b and the head, exact;  of the others those that changed since this client was last sent them
    local:  w_b, head <- AdamW from m = v = 0, everything else frozen as the client has it
    up:     w_b, head;  the server puts them in the place of its own

Nothing is averaged. With ``subset`` ρ < 1 only a random share ρ of the other changed blocks goes down, and of the rest the client keeps
what it was sent before, or the pre-trained weights: it then trains against a model that is not quite the server's. Scores are always
those of the server's model. A client that does not answer costs its turn and nothing else: it has what it had, and is sent the rest again.

What goes down besides w_b and the head can be made smaller still, and then C(w_j) takes the place of w_j on the device:

    drop    of the other layers a share drawn anew for every turn is left out, and does not travel:  h ← h  instead of  h ← layer(h)
    prune   of every other matrix that share of its numbers, the smallest in size, becomes 0
    rest    the numbers that travel have 16, 8 or 4 bits

A block that was left out is still due, as far as it changed; one that was sent so lies on the device as it came until it changes again,
or is the device's own to train, and then it comes exact.

Devices keep what they are sent between their turns: a copy of the model each, in the run's folder. What a device does not train it has, and
keeps, in the run's precision; what it trains always comes to it again, in float32.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import ClassVar, Literal

import torch

from fedloom.client.client import Client
from fedloom.encodings import Encoding
from fedloom.messages import Asking, Flow, Setting, Task, Tensors, Update, Work, ask, due, on_client, whole
from fedloom.methods.fedavg import FedAvg
from fedloom.methods.method import Predictor, State, predict
from fedloom.model.base import Model
from fedloom.model.blocks import Block, End, Parts, cover, ends_of, layer_of
from fedloom.model.names import is_head
from fedloom.model.proxies import restored, smaller
from fedloom.seeds import derive
from fedloom.server.cycle import Order, block_at, turns
from fedloom.server.participation import Pool
from fedloom.tensors import only, without

Rest = Literal["exact", "bf16", "fp16", "int8", "nf4"]


@dataclass(frozen=True)
class FedCyBGD:
    """FedCyBGD.

    Attributes:
        inner: local training and its optimiser.
        order: which block is whose turn.
        parts: what a block is: a transformer layer, or half of one.
        ends: of what is no layer, what makes a block too: embeddings, norm (the last one), output (what else lies behind the layers);
            none unless named, and only what the model has.
        subset: share ρ of the other changed blocks that goes down in a turn, 0 to 1.
        drop: share of the other layers that a turn is trained without, 0 to 1.
        prune: share of the numbers of every other matrix that is 0 when it goes down, 0 up to 1.
        rest: how the numbers of the other blocks go down: exact, bf16, fp16, int8, nf4.
    """

    name: ClassVar[str] = "fedcybgd"
    paper: ClassVar[str] = "FedCyBGD 2406.11187"
    adapter_kind: ClassVar[str] = "full"
    rounds_differ: ClassVar[bool] = True
    one_at_a_time: ClassVar[bool] = True

    inner: FedAvg = field(default_factory=lambda: FedAvg(lr=2e-4, schedule="cosine"))
    order: Order = "ascending"
    parts: Parts = "layers"
    ends: tuple[End, ...] = ()
    subset: float = 1.0
    drop: float = 0.0
    prune: float = 0.0
    rest: Rest = "exact"

    def __post_init__(self) -> None:
        if not 0 <= self.drop <= 1:
            raise ValueError(f"drop is {self.drop}; it is the share of the other layers that is left out, 0 to 1")
        if not 0 <= self.prune < 1:
            raise ValueError(f"prune is {self.prune}; it is the share of a matrix's numbers that becomes 0, from 0 on and below 1")
        if not 0 <= self.subset <= 1:
            raise ValueError(f"subset is {self.subset}; it is the share of the changed blocks that goes down, 0 to 1")
        if len(set(self.ends)) < len(self.ends):
            raise ValueError(f"ends names one twice: {' '.join(self.ends)}; each makes one block")

    def init(self, model: Model) -> State:
        """w_0: all blocks and the head. What is in neither keeps its pre-trained weights.

        Raises:
            ValueError: what is trained has no layers to make blocks of, or not one of the ``ends``; or what is in neither has no
                pre-trained weights.
        """
        there = ends_of(n for n in model.initial if not is_head(n))
        if missing := [end for end in self.ends if end not in there]:
            raise ValueError(
                f"ends names {' '.join(missing)}, which what is trained of '{model.name}' does not have; it has "
                f"{' '.join(there) or 'none of them'}"
            )
        blocks = self.blocks(model.initial)
        if not blocks:
            raise ValueError(
                f"'{self.name}' trains a transformer layer at a time, and none of the {len(model.initial)} trainable tensors belongs to "
                f"one ({sorted(model.initial)[:3]}); give --adapter.kind full"
            )
        shared = only(model.initial, [*(n for block in blocks for n in block.names), *filter(is_head, model.initial)])
        if idle := sorted(model.fresh - shared.keys()):
            ends = " ".join([*self.ends, *ends_of(idle)])
            raise ValueError(
                f"no file of '{model.name}' holds '{idle[0]}', which is drawn at random, is in no block and no head, and would stay so: "
                f"give --method.ends {ends} (fedbavg: --method.inner.ends {ends}), or a model whose files hold it"
            )
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
        task, seen = self.turn(state, pool, place, at)
        came = yield Asking([task], whole, needed=0)
        return self.replaced(state, at, came[0].tensors, {place: seen}) if came else state.after_round(state.shared)

    def turn(self, state: State, pool: Pool, place: int, at: int) -> tuple[Task, torch.Tensor]:
        """What the client at ``place`` is asked in a turn on block ``at``, and the versions (D,) that it has of the blocks if it answers.
        One that does not has those that it had."""
        blocks, changed, seen = self.blocks(state.shared), state.server["changed"], state.server["seen"][place].clone()
        skips = self.skips(blocks, at, state.round, pool, pool.clients[place])
        others = [j for j in range(len(blocks)) if j != at and changed[j] > seen[j] and blocks[j].layer not in skips]
        if self.subset < 1:
            drawn = derive(pool.seed, "subset", state.round, pool.clients[place]).permutation(len(others))
            others = sorted(others[i] for i in drawn[: round(self.subset * len(others))])
        sent, rest = [at, *others], only(state.shared, [n for j in others for n in blocks[j].names])
        trained = only(state.shared, [*blocks[at].names, *filter(is_head, state.shared)])
        down: Tensors = {**trained, **rest}
        told: dict[str, Setting] = {"block": list(blocks[at].names), **({"skips": sorted(skips)} if skips else {})}
        if self.prune or self.rest != "exact":
            pieces, how = smaller(rest, self.prune, self.encoding)
            down, told = {**without(down, rest), **pieces}, {**told, **how}
        task = due(ask(self.train, pool.clients[place], down, **told, **self.inner.clock(state.round, pool)), trained)
        seen[sent] = changed[sent]
        return task, seen

    def skips(self, blocks: Sequence[Block], at: int, turn: int, pool: Pool, client: int) -> frozenset[int]:
        """The layers that a client's turn on block ``at`` is trained without: ⌊drop·n⌉ of the n that the block is no part of."""
        layers = sorted({block.layer for block in blocks if block.layer is not None} - {blocks[at].layer})
        drawn = derive(pool.seed, "drop", turn, client).permutation(len(layers))
        return frozenset(layers[i] for i in drawn[: round(self.drop * len(layers))])

    def replaced(self, state: State, at: int, tensors: Tensors, answered: Mapping[int, torch.Tensor]) -> State:
        """The state after a turn that brought block ``at`` and the head. ``answered``: by place, the versions that those have who did."""
        changed, seen = state.server["changed"].clone(), state.server["seen"].clone()
        changed[at] = state.round + 1
        for place, versions in answered.items():
            seen[place] = versions
        return replace(state, server={**state.server, "changed": changed, "seen": seen}).after_round({**state.shared, **tensors})

    @on_client
    def train(self, c: Client, task: Task) -> Work[Update]:
        """Train the block and the head on top of the model as this client has it."""
        came = restored(task, self.encoding)
        skips = frozenset(int(layer) for layer in task.settings.get("skips", ()))  # type: ignore[union-attr]
        start = only(came, [*task.settings["block"], *filter(is_head, came)])  # type: ignore[misc]
        for name in list(filter(lambda name: not is_head(name), came)):  # of what came in few bits nothing stays in 32
            c.private[name] = came.pop(name).to(c.frozen)
        own = without(c.private, start)
        if skips:  # a curriculum scores with all layers, those left out now among them
            yield from self.inner.open(c, {**own, **start}, task, start)
        fixed = {n: t for n, t in own.items() if layer_of(n) not in skips}
        fitted = yield from self.inner.learn(c, start, task, fixed=fixed, skips=skips)
        return Update(c.id, len(c.train), fitted.tensors, {"loss": fitted.loss})

    def personalise(self, client: Client, shared: Tensors) -> Work[Predictor]:
        """The server's model."""
        yield from ()
        return Predictor(shared)

    def assembled(self, state: State) -> Tensors | None:
        """The server's model."""
        return state.shared

    @property
    def encoding(self) -> Encoding:
        """How the numbers of the other blocks go down."""
        return Encoding(self.rest)

    def blocks(self, tensors: Mapping[str, torch.Tensor]) -> list[Block]:
        """The blocks of a model with these tensors, from the input to the output."""
        return cover(tensors, self.parts, self.ends, [n for n in tensors if is_head(n)])

    predict = predict
