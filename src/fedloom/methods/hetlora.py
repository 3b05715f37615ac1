"""HetLoRA: devices of several ranks, padded with zeros (Heterogeneous LoRA for Federated Fine-tuning of On-Device Foundation Models,
2401.06432).

    down:    the first r_k directions of the global pair                     A (r, d_in), B (d_out, r), r the highest rank
    local:   AdamW on F_k + λ·Σ_pairs ‖B[:, γr_k:]‖·‖A[γr_k:, :]‖            the last directions are held down, γ < 1
    prune:   r_k <- ⌊γ·r_k⌋ if that sum is smaller than it came              the device's rank from then on
    up:      the pair; the server pads it with zeros to rank r
    A, B  <- Σ_{k in S_t} S_k A^k / Σ S_j (B alike),   S_k = ‖B^k A^k‖_F over all pairs
             in the directions that any of S_t sent; the others stay as they are

Devices whose update is large weigh more, whatever they hold. ``penalty = 0`` leaves the ranks as they were given. γr_k is rounded down, and
a device of rank 1 stays one.

Deviations: directions that no device of a cohort sent stay as they were, where padded pairs would make them zero: ∂A = s·BᵀG and
∂B = s·GAᵀ, so what is zero in A and in B learns on no device ever again. The task head is averaged by numbers of examples, as FedAvg does;
s = alpha/r is that of the adapter's rank on every device; AdamW, fresh at each participation, and the gradient that is clipped is the whole
sum's.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field, replace
from functools import partial
from typing import ClassVar

import torch

from fedloom.client.client import Client
from fedloom.compute.work import Held
from fedloom.messages import Asking, Flow, Task, Tensors, Update, Work, ask, due, on_client
from fedloom.methods.fedavg import FedAvg
from fedloom.methods.method import Predictor, State, predict
from fedloom.model.base import Model
from fedloom.model.factors import cut, need_ranks, need_zero_start, products, quarters, rank_in, rank_of, widened
from fedloom.model.names import is_down, is_factor, is_up, need_pairs, partner
from fedloom.server.aggregation import Average
from fedloom.server.participation import Pool, uniform
from fedloom.tensors import Mean, only, without


@dataclass(frozen=True)
class HetLora:
    """HetLoRA.

    Attributes:
        inner: local training and its optimiser.
        ranks: the ranks that devices begin with, of which each is given one, by its memory where devices differ (none: a quarter, half, and
            all of the adapter's).
        keep: γ, the share of a device's rank that pruning leaves.
        penalty: λ, how strongly the other directions are held down (0: nothing is pruned).
    """

    name: ClassVar[str] = "hetlora"
    paper: ClassVar[str] = "HetLoRA 2401.06432"

    inner: FedAvg = field(default_factory=FedAvg)
    ranks: tuple[int, ...] = ()
    keep: float = 0.75
    penalty: float = 1e-3

    def __post_init__(self) -> None:
        if not (0 < self.keep <= 1 and self.penalty >= 0):
            raise ValueError(f"HetLoRA needs keep in (0, 1] and a penalty of 0 or more; got keep {self.keep}, penalty {self.penalty}")

    def init(self, model: Model) -> State:
        """Every trainable tensor is shared.

        Raises:
            ValueError: no LoRA is trained, one that does not start at zero, or ranks that it has not.
        """
        need_pairs(model.initial, self.name)
        need_zero_start(model.initial, self.name)
        need_ranks(self.ranks, model.initial, self.name)
        return self.inner.init(model)

    def setup(self, state: State, pool: Pool) -> Flow[State]:
        """As inner; and every device's rank."""
        pool.insist_on_no_mask(self.name, "devices are of several ranks, and prune them")
        pool.insist_on_the_mean(self.name, "its server weighs devices by the size of their products", steps=True)
        state = yield from self.inner.setup(state, pool)
        given = self.ranks or quarters(rank_in(state.shared))
        ranks = torch.tensor([rank_of(k, given, pool.seed, pool.strength(k)) for k in pool.clients])
        return replace(state, server={**state.server, "ranks": ranks})

    def round(self, state: State, pool: Pool) -> Flow[State]:
        """S_t trains, each at its rank; pairs are padded and averaged by the size of their products, as far as any of them reaches."""
        whole, ranks, clock = rank_in(state.shared), state.server["ranks"].clone(), self.inner.clock(state.round, pool)
        place = {k: i for i, k in enumerate(pool.clients)}
        pairs, heads, sent = Mean(), Average(), set[int]()

        def take(update: Update) -> Update:
            mine = only(update.tensors, list(filter(is_factor, update.tensors)))
            ranks[place[update.client]] = rank_in(mine)
            sent.add(rank_in(mine))
            pairs.add(size(mine), widened(mine, whole))
            return heads.take(replace(update, tensors=without(update.tensors, mine)))

        tasks = []
        for k in uniform(pool, state.round):
            rank = int(ranks[place[k]])
            tasks.append(due(replace(ask(self.train, k, cut(state.shared, rank), **clock), complete=partial(padded, rank=rank))))
        yield Asking(tasks, take)
        made = pool.stepped(state.shared, {**heads.value(), **with_rest(pairs.value(), state.shared, max(sent))})
        return replace(state, server={**state.server, "ranks": ranks}).after_round(made)

    @on_client
    def train(self, c: Client, task: Task) -> Work[Update]:
        """Train at the rank that came; give up its last directions if they shrank."""
        fitted = yield from self.inner.learn(c, task.tensors, task, penalty=self.held_down if self.penalty else None)
        rank, made = rank_in(task.tensors), fitted.tensors
        fewer = max(1, math.floor(self.keep * rank + 1e-9))
        if self.penalty and fewer < rank and float(tail(made, fewer)) < float(tail(task.tensors, fewer)):
            rank, made = fewer, cut(made, fewer)
        c.memory["rank"] = torch.tensor(rank)
        return Update(c.id, len(c.train), made, {"loss": fitted.loss})

    def held_down(self, now: Tensors, start: Tensors) -> torch.Tensor:
        """λ times the size of the directions that pruning would take, and FedProx's term over the pair as it was sent, if there is one."""
        held = self.penalty * tail(now, max(1, math.floor(self.keep * rank_in(now) + 1e-9)))
        return held + Held(self.inner.prox, frozenset(start))(now, start) if self.inner.prox else held

    def personalise(self, client: Client, shared: Tensors) -> Work[Predictor]:
        """The shared model at the device's rank."""
        yield from ()
        whole = rank_in(shared)
        given = rank_of(client.id, self.ranks or quarters(whole), client.seed, client.strength)
        rank = int(client.memory["rank"]) if "rank" in client.memory else given
        return Predictor(widened(cut(shared, rank), whole))

    def assembled(self, state: State) -> Tensors | None:
        """The shared model at the adapter's rank."""
        return state.shared

    predict = predict


def with_rest(pairs: Tensors, before: Tensors, rank: int) -> dict[str, torch.Tensor]:
    """The first ``rank`` directions of these pairs, with those behind them that they had before."""
    made = {}
    for name, tensor in cut(pairs, rank).items():
        down = is_down(name)
        made[name] = torch.cat([tensor, before[name][rank:] if down else before[name][:, rank:]], 0 if down else 1)
    return made


def padded(tensors: Tensors, rank: int) -> dict[str, torch.Tensor]:
    """Pairs with zeros up to the rank at which they were sent.

    Raises:
        ValueError: they have more directions, none, or not all as many.
    """
    left = rank_in(tensors)
    if not 1 <= left <= rank or any(len(t.mT if is_up(n) else t) != left for n, t in tensors.items() if is_factor(n)):
        raise ValueError(f"of pairs of rank {rank} the first directions may be left; those that came are of rank {left}")
    return widened(tensors, rank)


def tail(tensors: Tensors, rank: int) -> torch.Tensor:
    """Σ_pairs ‖B[:, rank:]‖·‖A[rank:, :]‖."""
    sizes = [
        torch.linalg.vector_norm(tensors[partner(a)][:, rank:]) * torch.linalg.vector_norm(tensors[a][rank:])
        for a in filter(is_down, tensors)
    ]
    return torch.stack(sizes).sum()


def size(tensors: Tensors) -> float:
    """S_k = ‖B·A‖_F over all pairs; above 0, so that pairs that all did nothing can be averaged."""
    squares = sum(float(product.square().sum()) for product in products(tensors).values())
    return max(math.sqrt(squares), 1e-30)
