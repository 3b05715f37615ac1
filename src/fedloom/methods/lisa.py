"""LISA as local training: full-parameter tuning of a few layers drawn at random, others after K steps (2403.17919), averaged as FedAvg.

    device k, from w_t: its local steps in periods of K; in period i
        Λ  <- γ of the layers 0..D−1, without replacement, every one as likely                  from (seed, "lisa", t, k, i)
        w_l, l in Λ, embeddings, what lies behind the layers, head  <- AdamW, K steps from m = v = 0;   all else is frozen
    up: what any period trained;  what none did is w_t's, and does not travel
    w_t+1 <- Σ_{k in S_t} p_k w^k,   p_k = n_k / Σ_{j in S_t} n_j              every tensor over all of S_t

So the mean is FedAvg's of whole models, to the number: a device that did not draw a layer counts with w_t's. FedProx's term
(``inner.prox``) is to w_t in every period, over what the period trains.

Deviations: AdamW's moments start at nothing in every period, of what is always trained too; with a ``cosine`` schedule the rate falls
anew in each.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import ClassVar

import numpy as np

from fedloom.client.client import Client
from fedloom.messages import Asking, Flow, Task, Tensors, Update, Work, ask, due, on_client
from fedloom.methods.fedavg import FedAvg
from fedloom.methods.method import Predictor, State, predict, round_of
from fedloom.model.base import Model
from fedloom.model.blocks import layers
from fedloom.seeds import derive, derive_int
from fedloom.server.participation import Pool, uniform
from fedloom.tensors import only, without


@dataclass(frozen=True)
class Lisa:
    """LISA.

    Attributes:
        inner: local training and its optimiser.
        layers: layers γ that are trained at a time.
        every: local steps K after which others are drawn.
    """

    name: ClassVar[str] = "lisa"
    paper: ClassVar[str] = "LISA 2403.17919 in FedAvg 1602.05629"
    adapter_kind: ClassVar[str] = "full"

    inner: FedAvg = field(default_factory=lambda: FedAvg(lr=2e-4))
    layers: int = 2
    every: int = 20

    def __post_init__(self) -> None:
        if self.layers < 1 or self.every < 1:
            raise ValueError(f"layers is {self.layers} and every is {self.every}; a period of 1 step or more trains 1 layer or more")

    def init(self, model: Model) -> State:
        """w_0.

        Raises:
            ValueError: fewer layers are trainable than are to be drawn.
        """
        if len(found := layers(model.initial)) < self.layers:
            raise ValueError(
                f"'{self.name}' draws {self.layers} of the layers that are trained, and there are {len(found)}: {list(found)}; give "
                "--adapter.kind full, or a smaller --method.layers"
            )
        return self.inner.init(model)

    def setup(self, state: State, pool: Pool) -> Flow[State]:
        """As inner."""
        pool.insist_on_what_was_sent(self.name, "each device trains other layers, and others again a few steps later")
        return self.inner.setup(state, pool)

    def round(self, state: State, pool: Pool) -> Flow[State]:
        """S_t trains; the server takes the mean by numbers of examples, with its own of what a device did not train."""
        mean, clock = pool.average(state.shared), self.inner.clock(state.round, pool)

        def complete(came: Tensors) -> Tensors:
            return {**state.shared, **came}

        def take(update: Update) -> Update:
            return mean.take(replace(update, tensors=complete(update.tensors)))

        asked = [ask(self.train, k, state.shared, **clock) for k in uniform(pool, state.round)]
        yield Asking([due(replace(task, complete=complete)) for task in asked], take)
        return state.after_round(mean.value())

    @on_client
    def train(self, c: Client, task: Task) -> Work[Update]:
        """ClientUpdate(k, w_t), period after period."""
        now, t = dict(task.tensors), round_of(task)
        opened = yield from self.inner.open(c, now, task)
        losses, changed = [], set[str]()
        for i, at in enumerate(range(0, len(opened.batches), self.every)):
            start = only(now, self.drawn(now, c, t, i))
            fit = self.inner.fit(c, start, opened.batches[at : at + self.every], t, fixed=without(now, start), examples=opened.examples)
            anchor = None if fit.penalty is None else only(task.tensors, start)  # w_t, where an earlier period has moved w
            fitted = yield replace(fit, dropout_seed=derive_int(c.seed, "fit", t, c.id, i), anchor=anchor)
            now |= fitted.tensors
            changed |= set(start)
            losses.append(fitted.losses)
        return Update(c.id, len(c.train), only(now, sorted(changed)), {"loss": float(np.concatenate(losses).mean())})

    def drawn(self, tensors: Tensors, c: Client, round: int, period: int) -> list[str]:
        """What is trained in a period: the tensors of Λ, and those of no layer."""
        known = layers(tensors)
        among = derive(c.seed, "lisa", round, c.id, period).choice(list(known), self.layers, replace=False).tolist()
        return [n for n in sorted(tensors) if not any(n in known[layer] for layer in known if layer not in among)]

    def personalise(self, client: Client, shared: Tensors) -> Work[Predictor]:
        """The shared model as it is."""
        return self.inner.personalise(client, shared)

    def assembled(self, state: State) -> Tensors | None:
        """The shared model."""
        return state.shared

    predict = predict
