"""Federated LoRA: average the factors. FedIT (2305.05644), FedLR elsewhere; FedAvg (1602.05629) on the adapter and the task head.

    w^k   <- AdamW on device k from w_t, E epochs of seeded shuffled batches     w: every A (r, d_in), B (d_out, r) and the head
    w_t+1 <- Σ_{k in S_t} p_k w^k,   p_k = n_k / Σ_{j in S_t} n_j

The mean of products is not the product of means: mean(B)·mean(A) differs from mean(B·A). That error belongs to the method.
Optimiser state is fresh at each participation. With a curriculum a device trains on what that opens in the round, and on nothing else;
n_k stays the number of its examples.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field, replace
from typing import ClassVar

import numpy as np
import torch

from fedloom.client.client import Client
from fedloom.client.curricula.everything import Everything
from fedloom.client.curriculum import Curriculum, Opened, Turn, shuffled, shuffled_epochs
from fedloom.compute.work import AdamW, Fit, Fitted, Held, Moments, Penalty, Schedule, Smoothing, Through
from fedloom.data.examples import Examples
from fedloom.messages import Asking, Flow, Task, Tensors, Update, Work, ask, due, on_client
from fedloom.methods.method import Predictor, State, predict, round_of
from fedloom.model.base import Model
from fedloom.seeds import derive_int
from fedloom.server.participation import Pool, uniform


@dataclass(frozen=True)
class FedAvg:
    """FedAvg of an adapter and its head; also the local training that other methods hold as ``inner``.

    Attributes:
        lr: AdamW's learning rate.
        local_epochs: epochs E over the device's data in one participation.
        batch_size: examples a step.
        weight_decay: AdamW's decoupled weight decay.
        clip: limit of the gradient's 2-norm (0: none).
        reshuffle: cut new batches in every epoch. Without (no-reshuffle) there is one seeded cut per device for ever, as FibecFed has it.
        schedule: how the rate goes within one participation: constant, or falling to 0 along half a cosine.
        curriculum: what is trained on in which round; ``fedloom run METHOD+CURRICULUM`` chooses one.
        prox: FedProx's μ (1812.06127): (μ/2)·‖w − w_t‖² is added to the loss, w_t being what was sent; a device's own parts are not held
            (0: nothing).
        batch_by_memory: a device whose memory does not hold the training on batch_size texts of the greatest length takes as many a step
            as it holds, 1 at least.
    """

    name: ClassVar[str] = "lora"
    paper: ClassVar[str] = "FedIT 2305.05644, FedAvg 1602.05629"
    joins_late: ClassVar[bool] = True

    lr: float = 2e-3
    local_epochs: int = 2
    batch_size: int = 8
    weight_decay: float = 0.0
    clip: float = 1.0
    reshuffle: bool = True
    schedule: Schedule = "constant"
    curriculum: Curriculum = field(default_factory=Everything)
    prox: float = 0.0
    batch_by_memory: bool = False

    def __post_init__(self) -> None:
        for name, least in {"lr": 0, "local_epochs": 1, "batch_size": 1, "weight_decay": 0, "clip": 0}.items():
            if not least <= getattr(self, name) < math.inf:
                raise ValueError(f"{name} is {getattr(self, name)}; it must be a number from {least} on")
        if not self.prox >= 0:
            raise ValueError(f"prox is {self.prox}; it holds a device to the model that it was sent, and must be 0 or more")

    def init(self, model: Model) -> State:
        """Every trainable tensor is shared."""
        return State(0, model.initial)

    def setup(self, state: State, pool: Pool) -> Flow[State]:
        """Nothing but what the curriculum tells."""
        yield from ()
        return replace(state, facts={**state.facts, **self.curriculum.facts(pool.rounds)})

    def round(self, state: State, pool: Pool) -> Flow[State]:
        """S_t trains; the server takes the mean by numbers of examples."""
        cohort = uniform(pool, state.round)
        mean = pool.average(state.shared)
        yield Asking([due(ask(self.train, k, state.shared, **self.clock(state.round, pool))) for k in cohort], mean.take)
        return state.after_round(mean.value())

    @on_client
    def train(self, c: Client, task: Task) -> Work[Update]:
        """ClientUpdate(k, w_t)."""
        fitted = yield from self.learn(c, task.tensors, task)
        return Update(c.id, len(c.train), fitted.tensors, {"loss": fitted.loss})

    def personalise(self, client: Client, shared: Tensors) -> Work[Predictor]:
        """The shared model as it is."""
        yield from ()
        return Predictor(shared)

    def assembled(self, state: State) -> Tensors | None:
        """The shared model."""
        return state.shared

    predict = predict

    # ---- local training, for whoever holds this method as ``inner`` ----------------------------------------------------------

    def clock(self, round: int, pool: Pool) -> dict[str, int]:
        """The settings that tell a device the time: t, and T where a curriculum depends on it."""
        return {"round": round, "rounds": pool.rounds} if self.has_curriculum else {"round": round}

    def open(self, c: Client, at: Tensors, task: Task, trained: Collection[str] = ()) -> Work[Opened]:
        """What the curriculum opens at the time that the task tells (:meth:`clock`). ``at``: all tensors of the device's model now;
        ``trained``: those of them that it trains, if not all."""
        turn = self._turn(c, task)
        yield from self.curriculum.prepare(c, at, turn.round, trained)
        return self.curriculum.open(c, turn)

    def learn(
        self,
        c: Client,
        start: Tensors,
        task: Task,
        mask: dict[str, torch.Tensor] | None = None,
        penalty: Penalty | None = None,
        fixed: Tensors | None = None,
        bias: torch.Tensor | None = None,
        through: Through | None = None,
        watch: Smoothing | None = None,
        skips: frozenset[int] = frozenset(),
        optimizer: AdamW | None = None,
    ) -> Work[Fitted]:
        """Train ``start`` on what the curriculum opens, under tensors that stay ``fixed``, with ``bias`` (C,) on the logits.
        ``through``: what the model is called with, where that is not these themselves.
        ``watch``: how each number's importance is watched. ``skips``: layers that are left out, of which no tensor is given.
        ``optimizer``: another than this method's."""
        given = {**(fixed or {}), **start}
        at, trained = (given, start) if through is None else (through(given), ())
        opened = yield from self.open(c, at, task, trained)
        t, own = round_of(task), c.private.keys() - task.tensors.keys()
        fit = self.fit(c, start, opened.batches, t, mask, penalty, fixed=fixed, examples=opened.examples, bias=bias, own=own)
        more = {"through": through, "watch": watch, "skips": skips, "optimizer": optimizer or fit.optimizer}
        return (yield replace(fit, **more))

    def whole(self, c: Client) -> Opened:
        """One epoch over everything, in the order that the curriculum ends with. It must have been prepared."""
        return self.curriculum.open(c, Turn(1, 1, 1, self.size_of(c), reshuffle=False))

    def batches(self, c: Client, round: int) -> list[np.ndarray]:
        """The batches of all local epochs of one participation without a curriculum, in order.

        Raises:
            ValueError: there is a curriculum; :meth:`learn` and :meth:`open` follow it.
        """
        if self.has_curriculum:
            raise ValueError(f"this method's local training does not follow a curriculum, and {self.curriculum} was given; it takes none")
        return shuffled_epochs(c, Turn(round, 0, self.local_epochs, self.size_of(c), self.reshuffle))

    def size_of(self, c: Client) -> int:
        """Examples a step on this device."""
        return c.texts_a_step(self.batch_size, self.batch_by_memory)

    def cut(self, c: Client, purpose: str, *path: int) -> list[np.ndarray]:
        """One epoch of seeded batches of the device's training data."""
        return shuffled(len(c.train), self.size_of(c), c.seed, purpose, c.id, *path)

    def fit(
        self,
        c: Client,
        start: Tensors,
        batches: Sequence[np.ndarray],
        round: int,
        mask: dict[str, torch.Tensor] | None = None,
        penalty: Penalty | None = None,
        moments: Moments | None = None,
        fixed: Tensors | None = None,
        examples: Examples | None = None,
        bias: torch.Tensor | None = None,
        rows: Tensors | None = None,
        own: Collection[str] = (),
    ) -> Fit:
        """The work item of local training with this method's optimiser, on the device's own examples unless others are given. ``own``: what
        of ``start`` was not sent, which FedProx's term leaves alone."""
        seed = derive_int(c.seed, "fit", round, c.id)
        texts = c.train if examples is None else examples
        if self.prox and penalty is None:
            penalty = Held(self.prox, frozenset(start)).without(own)
        return Fit(start, texts, batches, self.optimizer, mask or {}, penalty, moments, fixed or {}, seed, bias=bias, rows=rows or {})

    def insist_on_no_prox(self, who: str) -> None:
        """For methods whose devices train nothing that they are sent.

        Raises:
            ValueError: there is a term that would hold them to it.
        """
        if self.prox:
            raise ValueError(
                f"'{who}' trains a device's own parts and nothing that was sent, so FedProx's term has nothing to hold, and prox is "
                f"{self.prox}; leave it out"
            )

    @property
    def optimizer(self) -> AdamW:
        """AdamW with this method's settings."""
        return AdamW(self.lr, weight_decay=self.weight_decay, clip=self.clip, schedule=self.schedule)

    @property
    def has_curriculum(self) -> bool:
        """Whether there is anything to follow."""
        return self.curriculum != Everything()

    def _turn(self, c: Client, task: Task) -> Turn:
        t = round_of(task)
        if self.has_curriculum and "rounds" not in task.settings:
            raise ValueError(
                f"'{task.op}' was asked without the number of rounds, on which {self.curriculum} depends; ask with clock(t, pool)"
            )
        rounds = int(task.settings["rounds"]) if self.has_curriculum else 0  # type: ignore[arg-type]
        return Turn(t, rounds, self.local_epochs, self.size_of(c), self.reshuffle)
