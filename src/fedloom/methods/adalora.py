"""AdaLoRA: the rank is spent where it matters (AdaLoRA: Adaptive Budget Allocation for Parameter-Efficient Fine-Tuning, 2303.10512, ICLR
2023), federated.

    W = W_0 + s·P·Λ·Q                                  P (d_out, r), Λ = diag(λ) (r, r), Q (r, d_in),  s = α/rank of the adapter
    P^k, λ^k, Q^k <- AdamW on device k from P_t, λ_t, Q_t on F_k + γ·Σ_modules R(P, Q)
    R(P, Q)       =  ‖PᵀP − I‖_F² + ‖QQᵀ − I‖_F²

so that the i-th of a module's triplets (P_*i, λ_i, Q_i*) is nearly a singular one, and can be taken out without touching the others. How
much a triplet matters is watched while it is trained, after every step's gradient and before the step (``Smoothing``, ``Fit.watch``):

    I = |w·∂L/∂w|,   Ī <- β₁·Ī + (1 − β₁)·I,   Ū <- β₂·Ū + (1 − β₂)·|I − Ī|,   s(w) = Ī·Ū          for every number w, L with R
    S_i^k = s(λ_i) + mean_j s(P_ji) + mean_j s(Q_ij)

The server averages what the devices made and what they found, and keeps the b triplets with the highest scores of all modules together:

    P, λ, Q, S  <-  Σ_{k in S_t} p_k (P^k, λ^k, Q^k, S^k),   p_k = n_k / Σ_{j in S_t} n_j
    b_t = b_0                                                        t <= t_i            t: completed rounds
        = b_T + (b_0 − b_T)·(1 − (t − t_i)/(T − t_f − t_i))³         t_i < t < T − t_f
        = b_T                                                        T − t_f <= t

b_T is the adapter's rank times the number of modules, so that in the end as much is trained as with LoRA, and b_0 is ``initial`` times
that. All devices have the same triplets at any time. One that was taken out does not travel any more, in either direction, and is not
trained; a module without any is the pre-trained one. Scores travel in rounds that end in a cut, one number a triplet. The head is trained
and averaged as FedAvg does; what predicts and is exported are the pairs (P·Λ, Q), plain LoRA.

Deviations: the schedule counts rounds, where the paper's counts steps (and cuts every ΔT of them); t_i and t_f are shares of all rounds,
about what they are of all steps in the authors' scripts. The cubic is PEFT's, which begins at b_0 and ends at b_T without a jump. The
paper sets the λ of what it cuts to zero and goes on training it, so that a
triplet whose importance grows again comes back within the budget; here what is cut is gone. Ī and Ū start at 0 at every participation, as
AdamW does, where the paper's run through the training. The mean of P·Λ·Q is not the product of the means; that error is FedIT's. The
regulariser is the paper's, squared and summed over modules; PEFT takes the norms' mean, not squared. s is that of the adapter's rank at any
time. P and Q start in N(0, 0.02²), the paper's Gaussian with PEFT's deviation, λ at 0.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar

import torch

from fedloom.client.client import Client
from fedloom.compute.work import Smoothing
from fedloom.messages import Asking, Flow, Task, Tensors, Update, Work, ask, due, on_client
from fedloom.methods.fedavg import FedAvg
from fedloom.methods.method import Predictor, State, predict
from fedloom.model.base import Model
from fedloom.model.factors import need_zero_start, rank_in
from fedloom.model.names import is_down, is_factor, is_up, need_pairs, partner
from fedloom.seeds import derive
from fedloom.server.participation import Pool, uniform
from fedloom.tensors import only, rounded_up, without

VALUES = "values/"
"""Before the name of a P, which is that of a B: its λ (r,)."""
SCORES = "importance/"
"""Before the name of a P: its triplets' S (r,)."""
DEVIATION = 0.02


@dataclass(frozen=True)
class AdaLora:
    """AdaLoRA.

    Attributes:
        inner: local training and its optimiser.
        initial: the first budget over the last one; the rank that every module starts with is this times the adapter's, rounded up, or
            the most that there can be singular vectors.
        warm_up: t_i, the share of the rounds before the first cut.
        final: t_f, the share of the rounds after the last one.
        orthogonality: γ, how strongly P and Q are held orthonormal.
        beta1: β₁, of the importance's running mean.
        beta2: β₂, of that of its uncertainty.
    """

    name: ClassVar[str] = "adalora"
    paper: ClassVar[str] = "AdaLoRA 2303.10512"
    rounds_differ: ClassVar[bool] = True

    inner: FedAvg = field(default_factory=FedAvg)
    initial: float = 1.5
    warm_up: float = 0.12
    final: float = 0.5
    orthogonality: float = 0.1
    beta1: float = 0.85
    beta2: float = 0.85

    def __post_init__(self) -> None:
        if not (self.initial >= 1 and self.orthogonality >= 0):
            raise ValueError(
                "AdaLoRA starts with the last budget at least, and holds P and Q orthonormal or not at all: initial must be 1 or more and "
                f"orthogonality 0 or more; got initial {self.initial}, orthogonality {self.orthogonality}"
            )
        if not (self.warm_up >= 0 and self.final >= 0 and self.warm_up + self.final < 1):
            raise ValueError(
                "AdaLoRA cuts between its warm-up and its final rounds: the two shares must be 0 or more and leave something between them; "
                f"got warm_up {self.warm_up}, final {self.final}"
            )
        if not (0 <= self.beta1 < 1 and 0 <= self.beta2 < 1):
            raise ValueError(f"AdaLoRA's running means need beta1 and beta2 in [0, 1); got beta1 {self.beta1}, beta2 {self.beta2}")
        if self.inner.prox and self.orthogonality:
            raise ValueError(
                f"AdaLoRA has a term of its own in the loss and takes no other: give prox {self.inner.prox} or an orthogonality, not both"
            )

    def init(self, model: Model) -> State:
        """The head is shared; until the set-up the server keeps the pairs, whose shapes it needs.

        Raises:
            ValueError: no LoRA is trained, or one that does not start at zero.
        """
        need_pairs(model.initial, self.name)
        need_zero_start(model.initial, self.name)
        pairs = only(model.initial, list(filter(is_factor, model.initial)))
        return State(0, without(model.initial, pairs), pairs)

    def setup(self, state: State, pool: Pool) -> Flow[State]:
        """P and Q are drawn, once for all; they are shared from then on."""
        pool.insist_on_no_mask(self.name, "it trains triplets of several ranks")
        pool.insist_on_no_optimizer(self.name, "its triplets become fewer, and moments would be of triplets that are gone")
        pool.insist_on_what_was_sent(self.name, "its triplets become fewer, and a device's control would be of triplets that are gone")
        pairs, triplets = state.server, dict[str, torch.Tensor]()
        rank, first = rank_in(pairs), 0
        for p in sorted(filter(is_up, pairs)):
            q, tall, wide = partner(p), len(pairs[p]), pairs[partner(p)].shape[1]
            most = min(rounded_up(self.initial, rank), tall, wide)
            for name, shape in ((p, (tall, most)), (q, (most, wide))):
                triplets[name] = torch.from_numpy(derive(pool.seed, "triplets", name).normal(0, DEVIATION, shape)).float()
            triplets[f"{VALUES}{p}"] = torch.zeros(most)
            first += most
        facts = {"budget": [first, min(first, rank * len(pairs) // 2)], "ranks": ranks(triplets)}
        return (yield from self.inner.setup(State(0, {**state.shared, **triplets}, facts=facts), pool))

    def budget(self, t: int, rounds: int, first: int, last: int) -> int:
        """b_t, how many triplets there are after ``t`` of all ``rounds``, from ``first`` to ``last``."""
        begin, end = round(self.warm_up * rounds), rounds - round(self.final * rounds)
        if t <= begin and t < end:
            return first
        if t >= end:
            return last
        return last + int((first - last) * (1 - (t - begin) / (end - begin)) ** 3)

    def round(self, state: State, pool: Pool) -> Flow[State]:
        """S_t trains all triplets; the server averages them and their scores, and keeps the best."""
        budget = self.budget(state.round + 1, pool.rounds, *state.facts["budget"])
        cut = budget < sum(state.facts["ranks"].values())
        mean = pool.average(state.shared)
        asked = [ask(self.train, k, state.shared, score=cut, **self.inner.clock(state.round, pool)) for k in uniform(pool, state.round)]
        scored = {f"{SCORES}{n.removeprefix(VALUES)}": t for n, t in state.shared.items() if n.startswith(VALUES)} if cut else {}
        yield Asking([due(task, {**state.shared, **scored}) for task in asked], mean.take)
        shared = mean.value()
        if cut:
            scores = {n.removeprefix(SCORES): shared.pop(n) for n in list(shared) if n.startswith(SCORES)}
            shared = best(shared, scores, budget)
        return replace(state, facts={**state.facts, "ranks": ranks(shared)}).after_round(shared)

    @on_client
    def train(self, c: Client, task: Task) -> Work[Update]:
        """Train the triplets and the head; send them, and, if asked, how much each triplet matters."""
        watch = Smoothing(self.beta1, self.beta2) if task.settings["score"] else None
        penalty = self.held_orthonormal if self.orthogonality else None
        fitted = yield from self.inner.learn(c, task.tensors, task, penalty=penalty, through=whole, watch=watch)
        scores = {f"{SCORES}{b}": score for b, score in importance(fitted.importance).items()}
        return Update(c.id, len(c.train), {**fitted.tensors, **scores}, {"loss": fitted.loss})

    def held_orthonormal(self, now: Tensors, start: Tensors) -> torch.Tensor:
        """γ·Σ R(P, Q)."""
        off = [gram(t if is_down(n) else t.T) for n, t in now.items() if is_factor(n) and not n.startswith(VALUES)]
        return self.orthogonality * torch.stack([made.square().sum() for made in off]).sum()

    def personalise(self, client: Client, shared: Tensors) -> Work[Predictor]:
        """The shared model."""
        yield from ()
        return Predictor(whole(shared))

    def assembled(self, state: State) -> Tensors | None:
        """The shared model, pairs of as many directions as each module has triplets."""
        return whole(state.shared)

    predict = predict


def gram(rows: torch.Tensor) -> torch.Tensor:
    """V·Vᵀ − I of vectors (r, d), with zeros behind it up to a multiple of four: so every device's matrices begin where a cache's line
    does, whoever shares the pass, and the library that multiplies them sums in the same order."""
    r, d = rows.shape
    whole = torch.cat([rows, rows.new_zeros(-r % 4, d)])
    return whole @ whole.T - torch.diag((torch.arange(len(whole), device=rows.device) < r).to(rows.dtype))


def whole(tensors: Tensors) -> dict[str, torch.Tensor]:
    """The pair (P·Λ, Q) in the place of P, λ and Q; other tensors as they are. (S, …) as well as (…)."""
    made = {name: tensor for name, tensor in tensors.items() if not name.startswith(VALUES)}
    for name, values in tensors.items():
        if name.startswith(VALUES):
            p = name.removeprefix(VALUES)
            made[p] = tensors[p] * values[..., None, :]
    return made


def importance(numbers: Tensors) -> dict[str, torch.Tensor]:
    """S (r,) of every module's triplets by the name of its P, from s of every number."""
    triplets = [name.removeprefix(VALUES) for name in numbers if name.startswith(VALUES)]
    return {p: numbers[f"{VALUES}{p}"] + numbers[p].mean(0) + numbers[partner(p)].mean(1) for p in triplets}


def best(shared: Tensors, scores: Tensors, budget: int) -> dict[str, torch.Tensor]:
    """The ``budget`` triplets with the highest scores of all modules, the first of equals, in the order in which they were; other tensors
    as they are. A module without any is left out."""
    names = sorted(scores)
    order = torch.cat([scores[p] for p in names]).sort(descending=True, stable=True).indices
    kept = torch.zeros(len(order), dtype=torch.bool).index_fill_(0, order[:budget], True)
    triplets = {n for p in names for n in (p, partner(p), f"{VALUES}{p}")}
    made = without(shared, triplets)
    for p, mine in zip(names, kept.split([len(scores[p]) for p in names]), strict=True):
        if bool(mine.any()):
            q, values = partner(p), f"{VALUES}{p}"
            made |= {p: shared[p][:, mine].contiguous(), q: shared[q][mine], values: shared[values][mine]}
    return made


def ranks(shared: Tensors) -> Mapping[str, Any]:
    """How many triplets each module has that has any."""
    return {n.removeprefix(VALUES).partition(".lora_B.")[0]: len(t) for n, t in shared.items() if n.startswith(VALUES)}
