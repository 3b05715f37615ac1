"""What a method is: one frozen dataclass with both halves of a paper's algorithm, and the state it passes along.

A method's fields are its hyper-parameters. It does no I/O and knows no engine: the server half is written as flows, the client half as
client operations (``@on_client``). Anything that satisfies :class:`Method` is one; there is nothing to inherit.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from typing import Any, ClassVar, NamedTuple, Protocol

import numpy as np
import torch

from fedloom.client.client import Client
from fedloom.compute.work import Predict
from fedloom.messages import Flow, Task, Tensors, Update, Work, ask, insist, on_client
from fedloom.model.base import Model
from fedloom.model.blocks import layers
from fedloom.model.names import is_factor, stays
from fedloom.server.controls import Controls
from fedloom.server.optimizers import Steps
from fedloom.server.participation import Pool
from fedloom.server.sharing import GAL, choose_gal, how_many
from fedloom.tensors import without


@dataclass(frozen=True)
class State:
    """The server's state between rounds, saved after each.

    ``round`` counts completed rounds. ``shared`` is what clients receive and the server aggregates. ``server`` holds tensors that only the
    server needs. ``facts`` are plain JSON values worth telling (chosen layers, scores); they land in ``results.json``. ``moments`` are the
    server optimiser's and ``controls`` SCAFFOLD's c, where the experiment has them; of these methods need to know nothing.
    """

    round: int
    shared: Tensors
    server: Tensors = field(default_factory=dict)
    facts: Mapping[str, Any] = field(default_factory=dict)
    moments: Tensors = field(default_factory=dict)
    controls: Tensors = field(default_factory=dict)

    def after_round(self, shared: Tensors) -> State:
        """The state one completed round later."""
        return replace(self, round=self.round + 1, shared=shared)


class Predictor(NamedTuple):
    """A model as it predicts: trainable tensors, and a bias (C,) on the logits or None."""

    tensors: Tensors
    bias: torch.Tensor | None = None


SAYS: dict[str, str | bool] = {
    "adapter_kind": "lora",
    "adapter_start": "zero",
    "one_at_a_time": False,
    "rounds_differ": False,
    "trains_as_inner": False,
    "joins_late": False,
}
"""What a method may say of itself, in class attributes or properties, and what is so where it says nothing. See :class:`Method`."""

BY_ITSELF = frozenset({"trains_as_inner", "joins_late"})
"""Claims that a class does not inherit: what it adds to the class that it is made from may make them untrue, unnoticed."""


class Method(Protocol):
    """The protocol of a method. ``name`` is its name on the command line, ``paper`` its source.

    What else it may say of itself is in :data:`SAYS`. :func:`says` reads it, of the class that it is made from too, but for the two of
    :data:`BY_ITSELF`.

    A method that trains exactly as its field ``inner`` and only predicts otherwise may say ``trains_as_inner = True``; then what ``inner``
    trained can be evaluated as this method (``fedloom evaluate RUN --method``).
    One to which devices may come after its set-up says ``joins_late = True``: its server keeps nothing for each device, and what the set-up
    asked of all is what a device needs that comes later (``run/late.py``).
    One whose rounds cost what depends on the rounds before says ``rounds_differ = True``: it sends what has changed since a device was last
    sent it, or has stages, or drops ranks, or chooses something anew. ``fedloom describe`` then plays all of them.
    One whose rounds ask one device, whatever the cohort, says ``one_at_a_time = True``; costs and memory are then told of one.
    One that trains something else than LoRA, or needs LoRA to start elsewhere than at zero, says so: ``adapter_kind = "full"``,
    ``adapter_start = "svd"``; an experiment may still say otherwise.
    """

    name: ClassVar[str]
    paper: ClassVar[str]

    def init(self, model: Model) -> State:
        """The state before set-up."""
        ...

    def setup(self, state: State, pool: Pool) -> Flow[State]:
        """What happens once before the first round. Whoever must answer is insisted on (:func:`fedloom.messages.insist`)."""
        ...

    def round(self, state: State, pool: Pool) -> Flow[State]:
        """One round."""
        ...

    def personalise(self, client: Client, shared: Tensors) -> Work[Predictor]:
        """The model that this device itself would use, given the shared tensors. Must not change the client."""
        ...

    def assembled(self, state: State) -> Tensors | None:
        """The tensors of the one global model, or None if the method has none."""
        ...

    def predict(self, client: Client, task: Task) -> Work[Update]:
        """The client operation behind personalised evaluation; every method says ``predict = predict``."""
        ...


def says(method: Any, what: str) -> Any:
    """What a method says of itself, or what :data:`SAYS` has where it says nothing."""
    silent, kinds = SAYS[what], type(method).__mro__
    said = any(what in vars(kind) for kind in (kinds[:1] if what in BY_ITSELF else kinds))
    return getattr(method, what) if said else silent


def insist_on_what_is_said(kind: type[Any]) -> None:
    """Insist that a method says nothing of itself that nobody listens to: what is misspelt would be as if it were not said.

    Raises:
        ValueError: a word or a yes or no that is no setting, in small letters, and not in :data:`SAYS`.
    """
    known = {"name", "paper", *SAYS, *(one.name for one in fields(kind))}
    said = [n for base in kind.__mro__ for n, v in vars(base).items() if isinstance(v, str | bool) and n.islower() and n[0] != "_"]
    if unknown := [name for name in said if name not in known]:
        raise ValueError(
            f"{kind.__name__} says {unknown[0]} of itself, which nobody asks a method; it may say {', '.join(SAYS)} (a constant is written "
            "in capitals, or stands outside the class)"
        )


def parts(method: Any) -> Iterator[Any]:
    """The method, the one that it holds as ``inner``, the one that this holds, and so on."""
    yield method
    while "inner" in vars(method):
        method = method.inner
        yield method


def set_up(method: Method, model: Model, pool: Pool) -> Flow[State]:
    """The method's set-up, and then, if layers are to stay on devices, which: they are in no state from then on, and in no message.

    Raises:
        ValueError: more layers are to be shared than there are, or some are to be chosen where none stays; the method shares none, or its
            set-up leaves them elsewhere than at the start that every device makes for itself; or devices are to have masks, and the method
            says no batch size.
    """
    if pool.mask.keep < 1:
        masked_batch(method)
    if not pool.sharing.some and pool.sharing.which != "least":
        raise ValueError(
            f"all layers are shared, and there is nothing to choose by '{pool.sharing.which}'; give --share.fraction below 1, or "
            "--share.count, or leave --share.which out"
        )
    state = yield from method.setup(method.init(model), pool)
    if not pool.sharing.some:
        return state
    adapted = list(layers([n for n in state.shared if is_factor(n)]))
    if not adapted:
        raise ValueError(f"'{method.name}' shares no layer's LoRA, of which some could stay on devices; leave --share out")
    moved = {n: t for n, t in state.shared.items() if n not in model.initial or not torch.equal(t, model.initial[n])}
    if elsewhere := sorted(filter(is_factor, moved)):
        raise ValueError(
            f"'{method.name}' leaves '{elsewhere[0]}' elsewhere in its set-up than at the model's start, where the layers that stay on "
            "devices begin; leave --share out"
        )
    facts: dict[str, Any] = {"depth": model.depth}
    if pool.sharing.which == "random" or how_many(pool.sharing, len(adapted)) == len(adapted):
        scores = np.zeros(model.depth)
    else:
        batch = batch_of(method, "layers are scored; give --share.which random, or leave --share out")
        answers = yield from insist([Task("layer_scores", k, moved, batch) for k in pool.clients])
        scores = pool.mean(answers)["layer_scores"].numpy()
        facts["layer_scores"] = scores.tolist()
    chosen = choose_gal(scores, adapted, pool.sharing, pool.seed)
    own = [n for n in state.shared if stays(n, chosen)]
    return replace(state, shared=without(state.shared, own), facts={**state.facts, **facts, GAL: chosen})


def batch_of(method: Any, what: str) -> dict[str, Any]:
    """Examples a step in the method's local training, which is its own or that of the method that it holds, as settings of a task; and
    whether a device takes fewer if its memory says so. ``what`` goes by them, and how to do without.

    Raises:
        ValueError: neither says.
    """
    inner = next((part for part in parts(method) if "batch_size" in vars(part)), None)
    if inner is None:
        raise ValueError(f"'{method.name}' has no batch_size, by which {what}")
    by_memory = {"by_memory": True} if vars(inner).get("batch_by_memory") else {}
    return {"batch_size": int(inner.batch_size), **by_memory}


def masked_batch(method: Any) -> dict[str, Any]:
    """Examples a step in a mask's warm-up, as settings of a task.

    Raises:
        ValueError: the method does not say.
    """
    return batch_of(method, "a mask's warm-up goes; leave --mask.keep out")


def one_round(method: Method, state: State, pool: Pool) -> Flow[State]:
    """A round of the method, in which the pool's server optimiser, if it has one, goes over what is averaged, gradients are corrected by
    the controls, if there are any, devices train the rows of their masks, if they have some, and are told which layers they share, if not
    all."""
    flow = _corrected(method, state, pool) if pool.controls else _stepping(method, state, pool)
    flow = pool.sharing.over(flow, state.facts)
    if pool.mask.keep < 1:
        flow = pool.mask.over(flow, masked_batch(method))
    return (yield from flow)


def _corrected(method: Method, state: State, pool: Pool) -> Flow[State]:
    controls = Controls(state.controls, pool)
    after = yield from controls.over(_stepping(method, state, pool))
    return replace(after, controls=controls.value())


def _stepping(method: Method, state: State, pool: Pool) -> Flow[State]:
    if pool.optimizer is None:
        return (yield from method.round(state, pool))
    steps = Steps(pool.optimizer, state.moments)
    after = yield from method.round(state, replace(pool, steps=steps))
    return replace(after, moments=steps.moments())


def round_of(task: Task) -> int:
    """The round that a task says it is of."""
    return int(task.settings["round"])  # type: ignore[arg-type]


AS_SENT = "as_sent"
"""Of a prediction, among its metrics: it was made with the tensors that came and nothing else."""


@on_client
def predict(method: Method, c: Client, task: Task) -> Work[Update]:
    """Logits of the device's own shards of the splits in ``task.settings["splits"]``, as tensors (n, C) named by split. They are a
    measurement: what this operation cost is what ``personalise`` did."""
    model = yield from method.personalise(c, task.tensors)
    splits = list(task.settings["splits"])  # type: ignore[arg-type]
    logits = yield [Predict(model.tensors, c.shard(split), measures=True) for split in splits]
    bias = torch.zeros(()) if model.bias is None else model.bias
    tensors = {split: made + bias for split, made in zip(splits, logits, strict=True)}
    return Update(c.id, len(c.train), tensors, {AS_SENT: model.bias is None and model.tensors is task.tensors})


@on_client
def receive(method: object, c: Client, task: Task) -> Work[Update]:
    """Keep what came as the device's own tensors; what a set-up hands out once. A method that does so says ``receive = receive``."""
    yield from ()
    c.private = dict(task.tensors)
    return Update(c.id, len(c.train))


def hand_out(receive: Callable[..., Any], clients: Sequence[int], tensors: Tensors) -> Flow[list[Update]]:
    """Insist that each of these clients receives ``tensors`` once and for all. They travel exactly, whatever the wire: a device is not sent
    them again, so it would keep what the wire made of them, and the server, which predicts and exports with its own, another model."""
    return insist([replace(ask(receive, k, tensors), exact=True) for k in clients])


def nothing_to_set_up(state: State) -> Flow[State]:
    """The set-up of a method that needs none."""
    yield from ()
    return state
