"""Masks on a device: which output neurons of LoRA's pairs it trains, chosen as FibecFed chooses them (2410.00131), under any method.

Before a device first trains a B (d_out, r), at the tensors that it is about to train, it warms the pairs up for an epoch over all of its
examples, in batches of the method's size whatever a curriculum opens, takes the diagonal Fisher information there, and throws what it
trained away; of each layer's output neurons it keeps the share of highest Fisher (``neurons.neuron_masks``), for good. From then on

    B[μ, :] <- as the method trains it, μ kept;   B[μ, :] stays as it came, μ not kept

The warm-up is under the method's own bias of the logits, if it has one (FedEven's log π_k); the Fisher information is without it, for a
score is of the model alone.

A row that is not kept has no optimiser state, no gradient in what is clipped, and does not travel up. In a B that never leaves the device
such rows are zero for ever, if it began at zero; then they are not stored and not multiplied either (``Fit.rows``). So it is with a B that
came as zeros. A and the head are trained whole: A feeds every neuron.

Nothing here knows methods: an operation's Fits are made smaller on their way to the compute, and what comes back is made whole. The
server's half: ``server/masks.py``.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import torch

from fedloom.client.client import Client
from fedloom.client.controls import corrected
from fedloom.client.curriculum import shuffled
from fedloom.client.neurons import KEPT, keep, neuron_masks, whole_private
from fedloom.client.sharing import beside
from fedloom.compute.work import Fisher, Fit, Fitted
from fedloom.messages import Task, Tensors, Update, Work, done_by
from fedloom.model.names import is_factor, is_up
from fedloom.seeds import derive_int
from fedloom.server.controls import plain
from fedloom.server.masks import BY_MEMORY, KEEP, MASKS, ROWS, SIZE
from fedloom.tensors import nbytes, packed, unpacked, without

Operation = Callable[[Client, Task], Work[Update]]


def carried_out(operation: Operation, c: Client, task: Task) -> Work[Update]:
    """Carry an operation out as the task says: under a mask, with corrected gradients, with the device's own layers, or as it is."""
    return masked(partial(corrected, partial(beside, operation)), c, task)


def masked(operation: Operation, c: Client, task: Task) -> Work[Update]:
    """Carry an operation out, which knows nothing of it: its Fits train the rows that the device's mask keeps, if the task says so
    (``KEEP``), and its update has these rows. The device's own tensors are whole while an operation runs, and stored as the rows that they
    have; so no operation of a device with a mask goes past this."""
    make_whole(c)
    if KEEP not in task.settings:
        update = yield from operation(c, task)
        store_rows(c)
        return update
    share = float(task.settings[KEEP])  # type: ignore[arg-type]
    size = c.texts_a_step(int(task.settings[SIZE]), BY_MEMORY in task.settings)  # type: ignore[arg-type]
    bare = replace(task, settings={name: value for name, value in task.settings.items() if name not in MASKS})
    held = (0, 0)

    def by_rows(items: list[Any]) -> Work[list[Any]]:
        nonlocal held
        for item in items:
            if isinstance(item, Fit) and (new := [n for n in item.start if is_up(n) and ROWS + n not in c.memory]):
                chosen = yield from _choose(c, item, share, size)
                c.memory |= {ROWS + n: packed(chosen[n]) for n in new}
        done = yield [_few(c, item, bare.tensors) for item in items]
        held = max([held, *[_held(item, one) for item, one in zip(items, done, strict=True) if isinstance(item, Fit)]])
        return [_back(c, item, made) for item, made in zip(items, done, strict=True)]

    update = yield from done_by(operation(c, bare), by_rows)
    c.memory |= {"optimizer_bytes": torch.tensor(held[0]), "optimizer_bytes_whole": torch.tensor(held[1])}
    store_rows(c)
    return replace(update, tensors=_sent(c, update, bare))


def make_whole(c: Client) -> None:
    """Have the private tensors of a device with a mask of this file have all their rows."""
    if any(n.startswith(ROWS) for n in c.memory):
        c.private = whole_private(c)
        c.memory = {n: t for n, t in c.memory.items() if not n.startswith(KEPT)}


def store_rows(c: Client) -> None:
    """Have the device keep of its private tensors the rows of its mask, where the others are zero."""
    rows = {n: _rows(c, n) for n in c.private if ROWS + n in c.memory}
    keep(c, {n: flags.float()[:, None] for n, flags in rows.items()})


def _rows(c: Client, name: str) -> torch.Tensor:
    """Which rows the mask keeps of a B, bool (d_out,)."""
    return unpacked(c.memory[ROWS + name])


def _choose(c: Client, item: Fit, share: float, size: int) -> Work[dict[str, torch.Tensor]]:
    """The masks (d_out, 1) of every B that the item trains. ``size``: examples a step of the warm-up."""
    pairs = {n: t for n, t in item.start.items() if is_factor(n)}
    rest = {**item.fixed, **without(item.start, pairs)}
    batches = shuffled(len(c.train), size, c.seed, "mask", c.id)
    seed = derive_int(c.seed, "fit mask", c.id)
    (fitted,) = yield [Fit(pairs, c.train, batches, item.optimizer, fixed=rest, dropout_seed=seed, bias=item.bias)]
    (fisher,) = yield [Fisher({**rest, **fitted.tensors}, c.train, frozenset(pairs))]
    return neuron_masks(fisher, share)


def _few(c: Client, item: Any, sent: Tensors) -> Any:
    """The item with the rows that the mask keeps, of each B that it trains. What was ``sent`` is zero to everybody or to nobody, so that
    the Fits of all devices stay alike."""
    names = _masked(c, item)
    if not names:
        return item
    rows = {n: torch.nonzero(_rows(c, n)).flatten() for n in names}
    others = {n: item.start[n] if n in sent else item.start[n][~_rows(c, n)] for n in names}
    still = {n: item.start[n] for n in names if bool(others[n].any())}
    cut = lambda tensors: {n: t[rows[n]] if n in rows else t for n, t in tensors.items()}  # noqa: E731
    return replace(item, start=cut(item.start), rows=rows, fixed={**item.fixed, **still}, correction=cut(item.correction))


def _back(c: Client, item: Any, made: Any) -> Any:
    """What the item made, as if it had trained all rows and the others had not moved."""
    names = _masked(c, item)
    if not names:
        return made
    rows = {n: torch.nonzero(_rows(c, n)).flatten() for n in names}
    tensors = {n: item.start[n].index_copy(0, rows[n], t) if n in rows else t for n, t in made.tensors.items()}
    zeros = lambda n: torch.zeros_like(item.start[n])  # noqa: E731
    gradient = {n: zeros(n).index_copy(0, rows[n], t) if n in rows else t for n, t in made.gradient.items()}
    return replace(made, tensors=tensors, gradient=gradient)


def _masked(c: Client, item: Any) -> list[str]:
    return [n for n in item.start if is_up(n) and ROWS + n in c.memory] if isinstance(item, Fit) else []


def _held(item: Fit, made: Fitted) -> tuple[int, int]:
    """Bytes of the optimiser's state, and what they would be with all rows."""
    held = nbytes(made.moments.first) + nbytes(made.moments.second)
    return held, held + 2 * (nbytes(item.start) - nbytes(made.tensors))


def _sent(c: Client, update: Update, task: Task) -> dict[str, torch.Tensor]:
    """The update's tensors, of each masked B and of its control the rows that are kept, if the others are as they came."""
    made, told = dict(update.tensors), dict[str, torch.Tensor]()
    for name in [n for n in c.memory if n.startswith(ROWS)]:
        of = name.removeprefix(ROWS)
        both = [n for n in update.tensors if plain(n) == of]
        flags = _rows(c, of)
        before = {n: task.tensors[n] if n in task.tensors else torch.zeros_like(made[n]) for n in both}
        if both and all(made[n].shape == before[n].shape and torch.equal(made[n][~flags], before[n][~flags]) for n in both):
            made |= {n: made[n][flags] for n in both}
            told[name] = c.memory[name]
    return {**made, **told}
