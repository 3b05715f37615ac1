"""Real methods on a tiny random encoder with everything overheard, and the same world as the NumPy derivation wants it.

``run`` keeps, for every asking of the server, the blobs on the wire, what they say, and the work items each device had done; and after
the set-up and after every round, the server's state and what every device keeps. It does not know what a method should do.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass, field, replace
from functools import cache
from typing import Any, Literal

import numpy as np
import pytest
import torch

from fedloom.client.client import Client
from fedloom.client.host import Host
from fedloom.client.masks import carried_out
from fedloom.client.neurons import KEPT, unpacked, whole_private
from fedloom.client.sharing import layer_scores
from fedloom.client.store import ClientStore
from fedloom.compute.compute import Compute, Done
from fedloom.compute.serial import Serial
from fedloom.compute.stacked import Stacked
from fedloom.compute.work import Fit, Initial, Pretrained, WorkItem
from fedloom.data.examples import Examples
from fedloom.encodings import Encoding
from fedloom.engines.engine import drive
from fedloom.engines.local import Local
from fedloom.messages import CENTRE, Failure, Flow, Task, Tensors, Update, ask
from fedloom.methods.fedavg import FedAvg
from fedloom.methods.method import Method, State, one_round, set_up
from fedloom.model.adapters import Adapter
from fedloom.model.base import Model
from fedloom.model.loading import load
from fedloom.server.participation import Pool
from fedloom.wire import Blob, unpack
from tests import tiny
from tests.oracle.numpy_encoder import Encoder, Example
from tests.oracle.numpy_training import AdamW

Kind = Literal["serial", "stacked"]
DIGEST = "oracle"
LAYERS = 4
SIZES = (13, 6, 18, 9)
SEED = 3
POOL = Pool((0, 1, 2, 3), 3, 3, 8)
S = 2.0
"""s = alpha/r of the tiny model: 4/2."""
INNER = FedAvg(lr=0.02, local_epochs=2, batch_size=3, weight_decay=0.01)
RULE = AdamW(lr=0.02, weight_decay=0.01)
"""INNER's optimiser as the derivation wants it."""


@cache
def model() -> Model:
    """Four layers, every frozen weight drawn anew: LayerNorms that scale and shift, biases that are not 0; pairs on query and value."""
    return drawn_anew(tiny.model(layers=LAYERS))


def drawn_anew(made: Model) -> Model:
    """The model, every frozen weight drawn."""
    trained = set(made.parameters.values())
    generator = torch.Generator().manual_seed(11)
    with torch.no_grad():
        for name, parameter in made.module.named_parameters():
            if name not in trained:
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.3 + float("LayerNorm.weight" in name))
    return made


@cache
def encoder() -> Encoder:
    """The same frozen weights in NumPy."""
    model().stand_on({})
    weights = {name: tensor.numpy() for name, tensor in model().module.state_dict().items()}
    return Encoder.of(weights, heads=model().config.num_attention_heads, scaling=S, eps=model().config.layer_norm_eps)


def start() -> dict[str, np.ndarray]:
    """The trainable tensors where every run begins."""
    return arrays(model().initial)


def arrays(tensors: Tensors) -> dict[str, np.ndarray]:
    return {name: tensor.detach().double().numpy() for name, tensor in tensors.items()}


@cache
def devices() -> dict[int, Client]:
    """Four devices of different sizes, and the place that holds everything."""
    everything = tiny.examples(sum(SIZES), seed=77)
    return tiny.clients(SIZES, SEED) | {CENTRE: Client(CENTRE, everything, everything, everything, SEED)}


WIDE = Adapter(rank=2, alpha=6.0, targets=("query", "intermediate.dense", "output.dense"))
"""s = alpha/r = 3; pairs on square weights, on tall ones (32, 16) and on wide ones (16, 32)."""


@cache
def wide() -> Model:
    """As :func:`model`, with other pairs."""
    made = load(str(tiny.folder(LAYERS)), num_labels=3, adapter=WIDE, seed=1, max_length=16)
    return drawn_anew(made)


def widen(monkeypatch: pytest.MonkeyPatch) -> None:
    """Until the test ends the world is that of :func:`wide`: no weight under a pair is taken for its transpose, nor A for B, unnoticed."""
    of = wide()
    of.stand_on({})
    weights = {name: tensor.numpy() for name, tensor in of.module.state_dict().items()}
    derived = Encoder.of(weights, heads=of.config.num_attention_heads, scaling=3.0, eps=of.config.layer_norm_eps)
    changes = {"model": lambda: of, "encoder": lambda: derived, "S": 3.0, "run": run.__wrapped__}
    for name, value in changes.items():
        monkeypatch.setattr(sys.modules[__name__], name, value)
    assert {tuple(w.shape) for w in of.weights.values()} == {(16, 16), (32, 16), (16, 32)}


def as_oracle(examples: Examples) -> list[Example]:
    """The texts one by one, read from the flat arrays."""
    texts = [examples.tokens[examples.offsets[row] : examples.offsets[row + 1]] for row in examples.rows]
    return [Example(tuple(int(i) for i in text), int(label)) for text, label in zip(texts, examples.labels, strict=True)]


def questions(client: int) -> list[Example]:
    """A device's training examples."""
    return as_oracle(devices()[client].train)


@dataclass
class Watched:
    """A compute that remembers (item, result) by the device whose examples the item is about."""

    inner: Compute
    done: dict[int, list[tuple[WorkItem, Any]]] = field(default_factory=dict)

    def run(self, items: Sequence[WorkItem]) -> list[Done]:
        answers = self.inner.run(items)
        for item, answer in zip(items, answers, strict=True):
            if isinstance(item, Pretrained | Initial):
                continue
            self.done.setdefault(owner(item.examples), []).append((item, answer.result))
        return answers


def owner(examples: Examples) -> int:
    """The device that holds these examples, or whose training texts they are, cut shorter: no two hold equally many."""
    held = {k: c for k, c in devices().items() if any(examples is shard for shard in (c.train, c.validation, c.test))}
    return next(iter(held)) if held else SIZES.index(len(examples))


@dataclass(frozen=True)
class Exchange:
    """One asking: by device, the blobs as they crossed, what they say, and the work done in between."""

    op: str
    sent: Mapping[int, Blob]
    came: Mapping[int, Blob]
    down: Mapping[int, Task]
    up: Mapping[int, Update]
    work: Mapping[int, list[tuple[WorkItem, Any]]]

    def fits(self, client: int) -> list[Fit]:
        """What one device trained, in order."""
        return [item for item, _ in self.work[client] if isinstance(item, Fit)]


@dataclass
class Overheard:
    """A host with an ear on the line."""

    host: Host
    watched: Watched
    exchanges: list[Exchange] = field(default_factory=list)

    @property
    def digest(self) -> str:
        return self.host.digest

    @property
    def encoding(self) -> Encoding:
        return self.host.encoding

    def answer(self, blobs: Sequence[Blob]) -> Sequence[Blob | Failure]:
        self.watched.done = {}
        tasks = [unpack(bytes(blob), DIGEST) for blob in blobs]
        replies = self.host.answer(blobs)
        assert not any(isinstance(reply, Failure) for reply in replies), replies
        sent = {task.client: blob for task, blob in zip(tasks, blobs, strict=True)}
        came = {task.client: reply for task, reply in zip(tasks, replies, strict=True) if not isinstance(reply, Failure)}
        up: Any = {k: unpack(bytes(blob), DIGEST) for k, blob in came.items()}
        down: Any = {task.client: task for task in tasks}
        self.exchanges.append(Exchange(next(iter(down.values())).op, sent, came, down, up, self.watched.done))
        return replies


@dataclass(frozen=True)
class Run:
    """``states[i]``, ``private[i]``, ``memory[i]``: after the set-up (i = 0) and after round i − 1. ``logits``: after the last round.

    ``private`` has all rows, as the model is called with; what a device really holds is ``stored``, and its rows as masks (d_out, 1) lie in
    ``memory`` too, as ``mask/NAME``.
    """

    exchanges: list[Exchange]
    states: list[State]
    private: list[dict[int, dict[str, torch.Tensor]]]
    memory: list[dict[int, dict[str, torch.Tensor]]]
    stored: list[dict[int, dict[str, torch.Tensor]]]
    logits: dict[int, dict[str, torch.Tensor]]
    assembled: Tensors | None

    def asked(self, op: str) -> list[Exchange]:
        """The askings for one operation, in order."""
        return [exchange for exchange in self.exchanges if exchange.op == op]


def compute(kind: Kind) -> Compute:
    return Serial(model()) if kind == "serial" else Stacked(model())


@cache
def run(method: Method, kind: Kind, pool: Pool = POOL, missed: tuple[int, ...] = ()) -> Run:
    """Set-up, ``pool.rounds`` rounds and the personal predictions of a real method. To rounds that are ``missed`` too few devices came."""
    return watch(method, compute(kind), pool, missed=missed)


def watch(method: Method, on: Compute, pool: Pool, of: Model | None = None, missed: tuple[int, ...] = ()) -> Run:
    """As ``run``, on any compute, which is that of ``of`` if given, and over the pool's wire."""
    store, watched = ClientStore(), Watched(on)
    fresh = lambda k: replace(devices()[k], private={}, memory={})  # noqa: E731
    host = Host(method, fresh, watched, store, DIGEST, encoding=pool.encoding, doing=carried_out, besides=[layer_scores])
    line = Overheard(host, watched)
    engine: Any = Local(line)  # type: ignore[arg-type]
    states, held = [drive(set_up(method, of or model(), pool), engine)], []
    for t in range(pool.rounds + 1):
        kept = {k: deepcopy(store.load(k)) for k in pool.clients}
        held.append({k: replace(devices()[k], private=own, memory=memory) for k, (own, memory) in kept.items()})
        if t in missed:
            states.append(replace(states[-1], round=t + 1))
        elif t < pool.rounds:
            states.append(drive(one_round(method, states[-1], pool), engine))
    said = drive(pool.sharing.over(predictions(method, states[-1], pool), states[-1].facts), engine)
    logits = {update.client: dict(update.tensors) for update in said}
    private = [{k: whole_private(c) for k, c in now.items()} for now in held]
    memory = [{k: c.memory | masks_of(c) for k, c in now.items()} for now in held]
    stored = [{k: c.private for k, c in now.items()} for now in held]
    return Run(line.exchanges, states, private, memory, stored, logits, method.assembled(states[-1]))


def predictions(method: Method, state: State, pool: Pool) -> Flow[list[Update]]:
    """All devices predict."""
    return (yield [ask(method.predict, k, state.shared, splits=["validation", "test"]) for k in pool.clients])


def masks_of(c: Client) -> dict[str, torch.Tensor]:
    """``mask/NAME`` (d_out, 1) of every tensor that the device has some rows of."""
    return {f"mask/{n.removeprefix(KEPT)}": unpacked(bits).float()[:, None] for n, bits in c.memory.items() if n.startswith(KEPT)}


def assert_close(
    made: Tensors,
    derived: Mapping[str, np.ndarray],
    furthest: float = 3e-3,
    typical: float = 1e-4,
    undecided: Mapping[str, np.ndarray] | None = None,
) -> None:
    """The same names and shapes, no number further off than ``furthest``, and ``typical`` by root mean square.

    AdamW divides by the gradient's own size: where a first gradient is near its eps (1e-8), float32 decides about a scalar's first step.
    Such a lone scalar is 3e-4 off; all others are below 1e-4. A step is 2e-2, and a wrong one moves whole tensors. ``undecided``: scalars,
    three at most, whose first step float32 cannot decide at all, as the derivation found; they may be a step and back off.
    """
    assert set(made) == set(derived), set(made) ^ set(derived)
    assert all(tuple(made[n].shape) == derived[n].shape for n in made)
    open_ones = {n: where for n, where in (undecided or {}).items() if n in derived}
    assert sum(int(where.sum()) for where in open_ones.values()) <= 3, {n: int(w.sum()) for n, w in open_ones.items() if w.any()}
    apart = {n: tensor - derived[n] for n, tensor in arrays(made).items()}
    assert all(np.abs(apart[n][where]).max(initial=0.0) < 2.2 * INNER.lr for n, where in open_ones.items())
    apart |= {n: np.where(where, 0.0, apart[n]) for n, where in open_ones.items()}
    off = np.concatenate([np.zeros(1), *[difference.ravel() for difference in apart.values()]])
    assert np.abs(off).max() < furthest and np.sqrt((off**2).mean()) < typical, (np.abs(off).max(), np.sqrt((off**2).mean()))
