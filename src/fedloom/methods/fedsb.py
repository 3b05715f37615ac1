"""Fed-SB: one small square matrix a module (Fed-SB: A Silver Bullet for Extreme Communication Efficiency and Performance in (Private)
Federated LoRA Fine-Tuning, 2502.15436), which federates LoRA-SB (2411.19557).

    W = W_0 + s·B·R·A                       B (d_out, r) and A (r, d_in) are frozen, R (r, r) is trained,  s = α/r
    R^k   <- AdamW on device k from R_t, under B and A
    R_t+1 <- Σ_{k in S_t} p_k R^k,          p_k = n_k / Σ_{j in S_t} n_j

The average is exact, because every device has the same B and A: s·B·(Σ p_k R^k)·A = Σ p_k s·B R^k A. r² numbers of a module travel,
whatever its size and the number of devices. The task head is trained and averaged as R is.

Where it starts is what the first step of full fine-tuning would do, cut down to rank r. AdamW's first step is η by the gradient's sign:

    G  = Σ_i ∇_W ℓ(x_i; W_0)                over some examples                                                 (d_out, d_in)
    ΔW = −η·sign(G) = U S Vᵀ
    B  = U_r,   A = V_rᵀ,   R_0 = S_r / s

so that s·B·R_0·A is the best approximation of ΔW of its rank, and B and A are orthonormal: a step of R is the best that a step of W could
be within their directions. G is gathered once, in the set-up: the devices of the first cohort send the gradient of their first
``examples`` examples, taken without dropout, each d_out·d_in numbers a module, and no such message is ever sent again. The server
decomposes, and sends B and A to every device, once and exactly.

R is no tensor of the model: devices train it through the pair (B·R, A) (``Fit.through``), and that pair, plain LoRA of rank r, is what
predicts and what is exported.

Deviations: the paper's authors take G of some tens of examples of all devices' data in one place; here it is the mean of the cohort's, so
the devices' examples stay where they are. η is AdamW's rate, there being no warm-up whose first rate it could be. The paper weighs devices
alike; here p_k is FedAvg's. s is the adapter's, where theirs is 1; it cancels at the start, and scales steps of R by itself. The paper's
noise for differential privacy is not here. AdamW, fresh at each participation.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import ClassVar

import torch

from fedloom.client.client import Client
from fedloom.client.curriculum import shuffled
from fedloom.compute.work import AdamW, Fit, Pretrained
from fedloom.messages import Flow, Task, Tensors, Update, Work, ask, insist, on_client
from fedloom.methods.fedavg import FedAvg
from fedloom.methods.method import Predictor, State, hand_out, predict, receive
from fedloom.model.base import Model
from fedloom.model.factors import need_room, need_zero_start
from fedloom.model.names import is_factor, is_up, need_pairs, partner, under
from fedloom.server.participation import Pool, uniform
from fedloom.tensors import only, without

CORE = "core/"
"""Before the name of a B: its R (r, r)."""


@dataclass(frozen=True)
class FedSb:
    """Fed-SB.

    Attributes:
        inner: local training and its optimiser.
        examples: of how many examples a device of the first cohort sends the gradient, at most as many as it has.
    """

    name: ClassVar[str] = "fedsb"
    paper: ClassVar[str] = "Fed-SB 2502.15436, LoRA-SB 2411.19557"

    inner: FedAvg = field(default_factory=FedAvg)
    examples: int = 16

    def __post_init__(self) -> None:
        if self.examples < 1:
            raise ValueError(f"Fed-SB starts from a gradient of at least one example a device; examples is {self.examples}")

    def init(self, model: Model) -> State:
        """The head is shared; the server keeps the pairs, whose shapes it needs.

        Raises:
            ValueError: no LoRA is trained, one that does not start at zero, or one of a higher rank than a weight has; a base in few
                bits.
        """
        need_pairs(model.initial, self.name)
        model.need_own_weights(self.name)
        need_room(model.initial, self.name)
        need_zero_start(model.initial, self.name)
        pairs = only(model.initial, list(filter(is_factor, model.initial)))
        return State(0, without(model.initial, pairs), pairs, {"scaling": model.beneath.scaling})

    def setup(self, state: State, pool: Pool) -> Flow[State]:
        """The first cohort's gradients become B, A and R_0; every device receives B and A once, and R is shared from then on."""
        pool.insist_on_every_layer(self.name, "what is shared is no pair's, and A and B are the same on all devices")
        pool.insist_on_no_mask(self.name, "B and A are frozen, and what is trained has no rows of neurons")
        mean = pool.average()
        yield from insist([ask(self.gradient, k, state.shared) for k in uniform(pool, 0)], take=mean.take)
        frozen, cores = self.begun(state.server, mean.value(), float(state.facts["scaling"]))
        yield from hand_out(self.receive, pool.clients, frozen)
        return (yield from self.inner.setup(replace(state, shared={**state.shared, **cores}, server=frozen), pool))

    def begun(self, pairs: Tensors, gradients: Tensors, scaling: float) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
        """B and A under the names of ``pairs``, and R_0: the first step of full fine-tuning, decomposed exactly."""
        frozen, cores = dict[str, torch.Tensor](), dict[str, torch.Tensor]()
        for b in filter(is_up, pairs):
            rank, step = pairs[b].shape[1], -self.inner.lr * gradients[under(b)].double().sign()
            u, s, v = torch.linalg.svd(step, full_matrices=False)
            frozen[b], frozen[partner(b)] = u[:, :rank].float().contiguous(), v[:rank].float().contiguous()
            cores[f"{CORE}{b}"] = torch.diag(s[:rank] / scaling).float()
        return frozen, cores

    def round(self, state: State, pool: Pool) -> Flow[State]:
        """FedAvg on R and the head."""
        return self.inner.round(state, pool)

    @on_client
    def gradient(self, c: Client, task: Task) -> Work[Update]:
        """Send the mean gradient of the device's first ``examples`` examples by the weights under the pairs, without dropout."""
        own = yield Pretrained()
        some = shuffled(len(c.train), self.examples, c.seed, "first gradient", c.id)[0]
        still = AdamW(0.0, betas=(0.0, 0.999), clip=0.0)
        fitted = yield Fit(own, c.train, [some], still, fixed=task.tensors, dropout=False)
        return Update(c.id, len(some), dict(fitted.moments.first))  # (1 − β₁)·∇, and β₁ is 0

    @on_client
    def train(self, c: Client, task: Task) -> Work[Update]:
        """Train R and the head under B and A; send them."""
        fitted = yield from self.inner.learn(c, task.tensors, task, fixed=c.private, through=whole)
        return Update(c.id, len(c.train), fitted.tensors, {"loss": fitted.loss})

    def personalise(self, client: Client, shared: Tensors) -> Work[Predictor]:
        """The shared model: R and the head under the device's B and A."""
        yield from ()
        return Predictor(whole({**client.private, **shared}))

    def assembled(self, state: State) -> Tensors | None:
        """The shared model, plain LoRA."""
        return whole({**state.server, **state.shared})

    receive = receive
    predict = predict


def whole(tensors: Tensors) -> dict[str, torch.Tensor]:
    """The pair (B·R, A) in the place of B, R and A; other tensors as they are. (S, …) as well as (…)."""
    made = {name: tensor for name, tensor in tensors.items() if not name.startswith(CORE)}
    for name, core in tensors.items():
        if name.startswith(CORE):
            b = name.removeprefix(CORE)
            made[b] = tensors[b] @ core
    return made
