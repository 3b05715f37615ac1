"""Sharing on a device: layers that are not shared are its own, and stand beside those that came, under any method (FibecFed 2410.00131).

A task says which layers are shared (``LAYERS``) and brings their tensors. Of every other layer the device puts its own beside them: the
factors that the method shares, A, B or both, as it last trained them, or, before it has, at the model's start, which every device makes for
itself. The operation sees what it would see if all were shared; what it sends back of the device's own layers stays here, in ``private``,
and does not travel. So personal predictions are made with them too.

Nothing here knows methods: an operation's task has more tensors than came, and its update fewer than it made. The server's half:
``server/sharing.py``.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any, TypeVar

import torch

from fedloom.client.client import Client
from fedloom.client.curriculum import shuffled
from fedloom.compute.work import Fit, Held, Initial, Sensitivity
from fedloom.messages import Task, Tensors, Update, Work, done_by, on_client
from fedloom.model.names import is_factor, is_up, stays
from fedloom.server.sharing import LAYERS
from fedloom.tensors import without

T = TypeVar("T")


@on_client
def layer_scores(c: Client, task: Task) -> Work[Update]:
    """s_l^k of every layer, float64 (D,), on the first of the device's batches of ``task.settings["batch_size"]``, or of as many texts as
    it takes where the method follows its memory (``by_memory``), at the start with what came in its place. Nothing is kept."""
    size = c.texts_a_step(int(task.settings["batch_size"]), "by_memory" in task.settings)  # type: ignore[arg-type]
    start = yield Initial()
    batch = shuffled(len(c.train), size, c.seed, "batches", c.id)[0]
    scores = yield Sensitivity({**start, **task.tensors}, c.train, batch)
    return Update(c.id, len(c.train), {"layer_scores": torch.from_numpy(scores)})


def beside(operation: Callable[[Client, Task], Work[Update]], c: Client, task: Task) -> Work[Update]:
    """Carry an operation out, which knows nothing of it: with the device's own layers beside those that came, if the task says that some
    are not shared (``LAYERS``); what it made of its own layers stays."""
    if LAYERS not in task.settings:
        return (yield from operation(c, task))
    settings = {name: value for name, value in task.settings.items() if name != LAYERS}
    own = yield from own_layers(c, task.tensors, task.settings[LAYERS])  # type: ignore[arg-type]
    held = c.private.keys() & own.keys()
    c.private = without(c.private, own)
    update = yield from own_unheld(operation(c, replace(task, tensors={**own, **task.tensors}, settings=settings)), own)
    stay = {n: update.tensors.get(n, t) for n, t in own.items() if n in update.tensors or n in held}
    c.private = dict(sorted({**c.private, **stay}.items()))
    return replace(update, tensors=without(update.tensors, own))


def own_unheld(work: Work[T], own: Tensors) -> Work[T]:
    """The same work, with FedProx's term over what was sent alone."""

    def unheld(items: list[Any]) -> Work[list[Any]]:
        return (yield [_unheld(item, own) for item in items])

    return (yield from done_by(work, unheld))


def _unheld(item: Any, own: Tensors) -> Any:
    if isinstance(item, Fit) and isinstance(item.penalty, Held):
        return replace(item, penalty=item.penalty.without(own))
    return item


def own_layers(c: Client, came: Tensors, shared: Sequence[int]) -> Work[dict[str, torch.Tensor]]:
    """The device's own of the layers that are not ``shared``: of each pair the factors that ``came`` of the others. The device's private
    tensors must be whole (``masks.make_whole``)."""
    factors = {is_up(n) for n in came if is_factor(n)}
    start = yield Initial()
    names = [n for n in start if stays(n, shared) and is_up(n) in factors]
    return {n: c.private[n] if n in c.private else start[n] for n in names}
