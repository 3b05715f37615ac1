"""Delta-LoRA: the weights under the pairs move with them (Delta-LoRA: Fine-Tuning High-Rank Parameters with the Delta of Low-Rank Matrices,
2309.02411), federated.

After K rounds of plain LoRA every local step moves the frozen weight too, by λ times what it moved the pair's product by:

    A, B <- AdamW's step                                                     A (r, d_in), B (d_out, r), W (d_out, d_in),  s = α/r
    W    <- W + λ·s·(B_new A_new − B_old A_old)                              no gradient of W, and none through it

Over a participation that telescopes: from the pair (A_t, B_t) and the weight W_t that device k was sent, it stands after any step on

    W = W_t + λ·s·(B A − B_t A_t) = W_t + λ·s·((B − B_t)·A + B_t·(A − A_t))

of which no copy is needed: the last term is of rank 2r, and is put beside the pair that is trained, as constants in which no gradient
flows (:meth:`DeltaLora.moving`, ``Fit.through``). A device sends its pair and head, and the server takes the mean of what the devices'
weights have become, exactly, from the pairs:

    A_t+1 <- Σ p_k A^k,   B_t+1 <- Σ p_k B^k,   p_k = n_k / Σ_{j in S_t} n_j
    W_t+1 <- W_t + λ·s·(Σ p_k B^k A^k − B_t A_t)

Up goes what LoRA sends. Down goes W_t besides, from the round on in which it first differs from the pre-trained weight, which every device
has: whole, for the reason given in ``flora.py``.

Deviations: the clock of the warm-up is the round, where the paper counts K = 500 steps of one training: a device's few steps between two
averages are not a warm-up of the model. The paper's λ = 2 for language generation is the default for all tasks. LoRA's dropout, which the
paper takes out so that both terms see the same input, is refused. The task head is averaged as the factors are. AdamW, fresh at each
participation; its weight decay shrinks A and B, and W follows as the paper has it.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import ClassVar

import torch

from fedloom.client.client import Client
from fedloom.messages import Asking, Flow, Task, Tensors, Update, Work, ask, due, on_client
from fedloom.methods.fedavg import FedAvg
from fedloom.methods.method import Predictor, State, predict, round_of
from fedloom.model.base import Model
from fedloom.model.factors import Products, moved, products
from fedloom.model.names import is_beneath, is_down, is_factor, need_pairs, partner
from fedloom.server.aggregation import Average
from fedloom.server.participation import Pool, uniform
from fedloom.tensors import without

BEGUN = "begun/"
"""Before the name of a factor: as it was when the participation began."""


@dataclass(frozen=True)
class DeltaLora:
    """Delta-LoRA.

    Attributes:
        inner: local training and its optimiser.
        ratio: λ, how far W moves by every move of the pair's product.
        warm_up: K, rounds of plain LoRA before W moves.
    """

    name: ClassVar[str] = "deltalora"
    paper: ClassVar[str] = "Delta-LoRA 2309.02411"
    rounds_differ: ClassVar[bool] = True

    inner: FedAvg = field(default_factory=FedAvg)
    ratio: float = 2.0
    warm_up: int = 1

    def __post_init__(self) -> None:
        if not (self.ratio >= 0 and self.warm_up >= 0):
            raise ValueError(f"Delta-LoRA needs a ratio and a warm_up of 0 or more; got ratio {self.ratio}, warm_up {self.warm_up}")

    def init(self, model: Model) -> State:
        """Every trainable tensor is shared; the server keeps the pre-trained weights until they move.

        Raises:
            ValueError: no LoRA is trained, or one with dropout; or a base in few bits.
        """
        need_pairs(model.initial, self.name)
        model.need_own_weights(self.name)
        if model.dropout:
            raise ValueError(
                f"'{self.name}' moves W by what moves the pair, so that both must see the same input; dropout {model.dropout} thins out "
                "the pair's alone. Give it --adapter.dropout 0"
            )
        return State(0, model.initial, model.weights, {"scaling": model.beneath.scaling})

    def setup(self, state: State, pool: Pool) -> Flow[State]:
        """As inner."""
        pool.insist_on_no_mask(self.name, "the weights move by what moves the whole pair")
        pool.insist_on_the_mean(self.name, "its server needs the mean of the products")
        return self.inner.setup(state, pool)

    def round(self, state: State, pool: Pool) -> Flow[State]:
        """S_t trains; the server takes the means of the factors and, after the warm-up, of what the devices' weights have become."""
        reached, mean, moving = Products(), Average(), state.round >= self.warm_up

        def take(update: Update) -> Update:
            reached.add(update.num_examples, update.tensors)
            return mean.take(update)

        clock = self.inner.clock(state.round, pool)
        trained = without(state.shared, list(filter(is_beneath, state.shared)))
        asked = [ask(self.train, k, state.shared, moving=moving, **clock) for k in uniform(pool, state.round)]
        yield Asking([due(task, trained) for task in asked], take)
        if not moving:
            return state.after_round(mean.value())
        begun = products(state.shared)
        change = {name: now - begun[name] for name, now in reached.mean().items()}
        weights = moved({**state.server, **state.shared}, change, self.ratio * float(state.facts["scaling"]))
        return replace(state, server={}).after_round({**mean.value(), **weights})

    @on_client
    def train(self, c: Client, task: Task) -> Work[Update]:
        """Train the pairs and the head on the weights that came, or the device's own; after the warm-up the weights move along."""
        weights = {name: tensor for name, tensor in task.tensors.items() if is_beneath(name)}
        start = without(task.tensors, weights)
        begun = {f"{BEGUN}{name}": tensor for name, tensor in start.items() if is_factor(name)} if task.settings["moving"] else {}
        opened = yield from self.inner.open(c, task.tensors, task, start)
        t = round_of(task)
        fit = self.inner.fit(c, start, opened.batches, t, fixed={**weights, **begun}, examples=opened.examples)
        fitted = yield replace(fit, through=self.moving if begun else None)
        return Update(c.id, len(c.train), fitted.tensors, {"loss": fitted.loss})

    def moving(self, tensors: Tensors) -> dict[str, torch.Tensor]:
        """Pairs of rank 3r whose product is B·A, with gradients, and λ·(B·A − B_t·A_t), without. (S, …) as well as (…)."""
        made = {name: tensor for name, tensor in tensors.items() if not name.startswith(BEGUN)}
        for a in [name for name in made if is_down(name)]:
            b = partner(a)
            still_a, still_b, begun_a, begun_b = made[a].detach(), made[b].detach(), tensors[f"{BEGUN}{a}"], tensors[f"{BEGUN}{b}"]
            made[a] = torch.cat([made[a], still_a, still_a - begun_a], -2)
            made[b] = torch.cat([made[b], self.ratio * (still_b - begun_b), self.ratio * begun_b], -1)
        return made

    def personalise(self, client: Client, shared: Tensors) -> Work[Predictor]:
        """The shared model as it is."""
        yield from ()
        return Predictor(shared)

    def assembled(self, state: State) -> Tensors | None:
        """The shared model."""
        return state.shared

    predict = predict
