"""SCAFFOLD's controls on a device (1910.06378): every step's gradient is corrected by how the device's own pull differs from everybody's.

    y <- y − η·(g(y) − c_k + c)                                          eq. (3); η and how a step goes are the optimiser's
    c_k+ = c_k − c + (x − y)/(steps·η)                                   eq. (4), option II

Along steps of SGD, x − y = η·Σ (g − c_k + c), so c_k+ is the mean of the steps' gradients g before they were corrected. That mean is
what is taken here, whatever the optimiser: AdamW divides a gradient by its size, and what it moved by is no gradient. It costs no pass
over the examples, only the sum.

x is what came: a tensor is corrected where training starts from it as it was sent, and from nowhere else. So a device's own layers, heads
and models, and tensors that stay fixed, have no controls. c_k lies in the device's memory and never leaves it; c + c_k+ − c_k does.
The server's half: ``server/controls.py``.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch

from fedloom.client.client import Client
from fedloom.compute.work import Fit
from fedloom.messages import Task, Tensors, Update, Work, done_by
from fedloom.server.controls import CONTROL, CORRECTED, parted, plain


def corrected(operation: Callable[[Client, Task], Work[Update]], c: Client, task: Task) -> Work[Update]:
    """Carry an operation out, which knows nothing of it: its Fits are corrected by the controls, if the task says so (``CORRECTED``),
    and its update has besides c as the device's own would move it, c + c_k+ − c_k, for each tensor that was.

    Raises:
        ValueError: the operation trained a tensor from where it was sent and does not send it back, so that the server averages something
            else than what was corrected.
    """
    if CORRECTED not in task.settings:
        return (yield from operation(c, task))
    common, sent = parted(task.tensors)
    settings = {name: value for name, value in task.settings.items() if name != CORRECTED}
    towards = {n: _at(common, n, t) - _at(c.memory, n, t) for n, t in sent.items() if f"{CONTROL}{n}" in {**common, **c.memory}}
    sums, steps = dict[str, torch.Tensor](), dict[str, int]()

    def by_controls(items: list[Any]) -> Work[list[Any]]:
        done = yield [_corrected(item, sent, towards) for item in items]
        for item, made in zip(items, done, strict=True):
            for name in _from(item, sent):
                sums[name] = sums.get(name, 0) + made.gradient[name] * len(item.batches)
                steps[name] = steps.get(name, 0) + len(item.batches)
        return done

    update = yield from done_by(operation(c, replace(task, tensors=sent, settings=settings)), by_controls)
    if lost := sorted(sums.keys() - update.tensors.keys()):
        raise ValueError(
            f"'{task.op}' trained '{lost[0]}' as it was sent and sends back {sorted(update.tensors)[:3]}: what is averaged is not what was "
            "trained, and gradients cannot be corrected by controls"
        )
    own = {f"{CONTROL}{n}": total / max(1, steps[n]) for n, total in sums.items()}
    moved = {n: _at(common, plain(n), now) + now - _at(c.memory, plain(n), now) for n, now in own.items()}
    c.memory |= own
    return replace(update, tensors={**update.tensors, **moved})


def _at(controls: Tensors, name: str, like: torch.Tensor) -> torch.Tensor:
    """The control of a tensor; zero where there is none yet."""
    return controls[f"{CONTROL}{name}"] if f"{CONTROL}{name}" in controls else torch.zeros_like(like)


def _from(item: Any, sent: Tensors) -> list[str]:
    """What an item trains from where it was sent."""
    return [n for n, t in item.start.items() if n in sent and t is sent[n]] if isinstance(item, Fit) else []


def _corrected(item: Any, sent: Tensors, towards: Tensors) -> Any:
    """The item, corrected."""
    names = _from(item, sent)
    return replace(item, correction={n: towards[n] for n in names if n in towards}, means=True) if names else item
