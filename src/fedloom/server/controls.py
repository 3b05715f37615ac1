"""SCAFFOLD's controls at the server (1910.06378): c, by which devices correct their gradients, and how a round moves it.

    c <- c + (1/K) Σ_{k in S_t} (c_k+ − c_k)                             eq. (5); K devices in all

Each round's tasks that are told the round, which are those that train, bring c for the tensors that they bring (a tensor of which nothing
is known yet has c = 0, which does not travel). Each update brings c + c_k+ − c_k, so that on a wire with a loss, and for a rule, what moved
is a change like any other. These are aggregated by the experiment's rule, all devices alike; with the mean, c is the mean of all devices'
c_k, 0 of a device that never took part. A server optimiser steps the model and never c. A tensor that was not trained in a round, or is no
longer sent, keeps its c, as every device keeps its c_k. The device's half: ``client/controls.py``.

It does not know methods: their rounds pass through it.
"""

from __future__ import annotations

import logging
from dataclasses import replace
from typing import TypeVar

import torch

from fedloom.messages import Flow, Take, Task, Tensors, Update, through
from fedloom.server.participation import Pool

T = TypeVar("T")

CONTROL = "control/"
"""Before a tensor's name: c, c_k, or c + c_k+ − c_k, of it."""

CORRECTED = "corrected"
"""The setting that tells a device that its gradients are corrected, though c may be 0."""

log = logging.getLogger("fedloom.methods")


class Controls:
    """c before a round, by the names of tensors, and after it."""

    def __init__(self, common: Tensors, pool: Pool) -> None:
        self.common, self.devices, self._answered = common, len(pool.clients), 0
        self._mean = replace(pool, steps=None).average({f"{CONTROL}{n}": t for n, t in common.items()})

    def over(self, flow: Flow[T]) -> Flow[T]:
        """The same round, whose devices correct their gradients."""
        return through(flow, lambda asking: replace(asking, tasks=[self._told(t) for t in asking.tasks], take=self._taking(asking.take)))

    def value(self) -> dict[str, torch.Tensor]:
        """c after the round."""
        if not self._answered:
            log.warning("controls correct nothing in this round: no device trains a tensor as it was sent")
            return dict(self.common)
        share, now = self._answered / self.devices, dict(self.common)
        for name, mean in self._mean.value().items():
            before = now[plain(name)] if plain(name) in now else torch.zeros_like(mean)
            now[plain(name)] = before + share * (mean - before)
        return dict(sorted(now.items()))

    def _told(self, task: Task) -> Task:
        if "round" not in task.settings:
            return task
        known = {f"{CONTROL}{n}": self.common[n] for n in task.tensors if n in self.common}

        def complete(came: Tensors) -> Tensors:
            controls, rest = parted(came)
            for name, control in controls.items():
                of = task.tensors.get(plain(name))
                if of is None or (of.dtype, of.shape) != (control.dtype, control.shape):
                    raise ValueError(f"'{name}' is a control of nothing that was sent, or not as that is")
            return {**task.complete(rest), **controls}

        return replace(task, tensors={**task.tensors, **known}, settings={**task.settings, CORRECTED: True}, complete=complete)

    def _taking(self, others: Take) -> Take:
        def take(update: Update) -> Update:
            controls, rest = parted(update.tensors)
            if controls:
                self._answered += 1
                self._mean.take(replace(update, tensors=controls, num_examples=1))
            return others(replace(update, tensors=rest))

        return take


def plain(name: str) -> str:
    """The name of the tensor that a control is of."""
    return name.removeprefix(CONTROL)


def parted(tensors: Tensors) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    """Controls, still named as such, and the rest."""
    controls = {n: t for n, t in tensors.items() if n.startswith(CONTROL)}
    return controls, {n: t for n, t in tensors.items() if n not in controls}
