"""FedALT: a device's own LoRA, everybody else's, and a mixer (FedALT: Federated Fine-Tuning through Adaptive Local Training with
Rest-of-World LoRA, 2503.11880, AAAI 2026).

No average is ever a start of local training. Every device k has an individual LoRA, which it goes on training from where it left it, a
LoRA of the rest of the world, which it is given and which is frozen while it trains, and a mixer, which weighs the two for every token:

    y = W x + s·(α_1(x)·B_k A_k x + α_2(x)·B_-k A_-k x),   α(x) = softmax(G_k x)     A (r, d_in), B (d_out, r), G_k (2, d_in),  s = α/r
    A_k, B_k, G_k <- AdamW on device k from A_k, B_k, G_k, with A_-k and B_-k frozen
    A_-k <- 1/(K−1) Σ_{j≠k} A_j,   B_-k <- 1/(K−1) Σ_{j≠k} B_j

Only A_k and B_k go up. G_k and the task head stay on their device, as what makes its model its own. There is no global model.

``model/mixing.py`` is the layer: the kind of adapter is ``mixed``, which this method brings along.

What goes up is where a device's pair stands, and no step from M; so a wire that adds what it has not sent to what it sends later is
refused.

Deviations: the paper's devices take part in every round. Here a cohort is drawn, so the server keeps the LoRA that each device sent last,
and the mean is over those others who sent one (none: B_-k = 0). Going down it is the mean M of all N of them and the list of who they are;
a device takes itself out, A_-k = (N·M − A_k)/(N − 1), and one message serves the whole cohort. What it takes out is what the mean holds,
also after a lost answer, which has not happened on either side. As in the authors' code the factors are averaged, not their products, all
devices alike, and softmax has no temperature. The head, which a classification needs, is the device's own. AdamW, fresh at each
participation. Every device receives the start of its part once, in the set-up.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import ClassVar

import torch

from fedloom.client.client import Client
from fedloom.messages import Asking, Flow, Task, Tensors, Update, Work, ask, due, on_client
from fedloom.methods.fedavg import FedAvg
from fedloom.methods.method import Predictor, State, hand_out, predict, receive
from fedloom.model.base import Model
from fedloom.model.mixing import as_rest, is_own, is_rest, need_mixers
from fedloom.server.participation import Pool, uniform
from fedloom.tensors import only, without

SENT = "sent"
"""Whose LoRAs the mean is of: ids, ascending, int64 (N,)."""


@dataclass(frozen=True)
class FedAlt:
    """``inner``: local training and its optimiser."""

    name: ClassVar[str] = "fedalt"
    paper: ClassVar[str] = "FedALT 2503.11880"
    rounds_differ: ClassVar[bool] = True
    adapter_kind: ClassVar[str] = "mixed"

    inner: FedAvg = field(default_factory=FedAvg)

    def __post_init__(self) -> None:
        self.inner.insist_on_no_prox(self.name)

    def init(self, model: Model) -> State:
        """The mean of what was sent, of nobody yet, is shared; until the set-up the server keeps the start of the devices' parts.

        Raises:
            ValueError: the model has no mixers.
        """
        need_mixers(model.initial, self.name)
        start = without(model.initial, list(filter(is_rest, model.initial)))
        means = {n: torch.zeros_like(start[n]) for n in filter(is_own, start)}
        return State(0, {**means, SENT: torch.zeros(0, dtype=torch.int64)}, start)

    def setup(self, state: State, pool: Pool) -> Flow[State]:
        """Every device receives the start of its part once; the server makes room for what each will send."""
        pool.insist_on_no_mask(self.name, "it trains two pairs and their mixer")
        pool.insist_on_the_mean(self.name, "each device's mean is another one, of what all the others sent last")
        pool.insist_on_nothing_owed(self.name, "a device sends where its own pair stands, which is no step from the mean that it was sent")
        yield from hand_out(self.receive, pool.clients, state.server)
        room = {n: torch.zeros(len(pool.clients), *t.shape) for n, t in state.server.items() if is_own(n)}
        return (yield from self.inner.setup(replace(state, server=room), pool))

    def round(self, state: State, pool: Pool) -> Flow[State]:
        """S_t trains; the server keeps what came in the place of what the same devices sent before, and takes the mean over all."""
        kept, sent = {n: t.clone() for n, t in state.server.items()}, set(state.shared[SENT].tolist())

        def take(update: Update) -> Update:
            for n, tensor in update.tensors.items():
                kept[n][pool.clients.index(update.client)] = tensor
            sent.add(update.client)
            return replace(update, tensors={})

        own = only(state.shared, list(filter(is_own, state.shared)))
        asked = [ask(self.train, k, state.shared, **self.inner.clock(state.round, pool)) for k in uniform(pool, state.round)]
        yield Asking([due(task, own) for task in asked], take)
        places = [place for place, k in enumerate(pool.clients) if k in sent]
        means = {n: t[places].double().mean(0).float() for n, t in kept.items()}
        return replace(state, server=kept).after_round({**means, SENT: torch.tensor(sorted(sent), dtype=torch.int64)})

    @on_client
    def train(self, c: Client, task: Task) -> Work[Update]:
        """Train the device's own LoRA, mixer and head beside the rest of the world's LoRA; keep them; send the LoRA."""
        fitted = yield from self.inner.learn(c, c.private, task, fixed=rest_of_world(c, task.tensors))
        c.private = fitted.tensors
        own = only(fitted.tensors, list(filter(is_own, fitted.tensors)))
        return Update(c.id, len(c.train), own, {"loss": fitted.loss})

    def personalise(self, client: Client, shared: Tensors) -> Work[Predictor]:
        """The device's part beside the rest of the world's LoRA."""
        yield from ()
        return Predictor({**client.private, **rest_of_world(client, shared)})

    def assembled(self, state: State) -> Tensors | None:
        """None: every device's rest of the world is another one, and heads and mixers are their own."""
        return None

    receive = receive
    predict = predict


def rest_of_world(c: Client, shared: Tensors) -> dict[str, torch.Tensor]:
    """A_-k and B_-k: of the mean over all who sent one, the mean over the others; zero where there are none."""
    made = {}
    for name in filter(is_own, shared):
        sent = shared[SENT].tolist()
        others = len(sent) - (c.id in sent)
        total = len(sent) * shared[name].double() - (c.private[name].double() if c.id in sent else 0.0)
        made[as_rest(name)] = (total / others).float() if others else torch.zeros_like(shared[name])
    return made
