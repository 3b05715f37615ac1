"""Transformer layers left out of a model for a while: what comes in goes out, as the residual path around the layer has it.

The layer's place in the model's list is taken by a module that hands on its input, so nothing of the layer is computed, differentiated or
needed. This module does not know methods; which layers are left out is a work item's to say (``Fit.skips``).
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn


class Passed(nn.Module):
    """Stands where ``layer`` was, and has its plain attributes, which some models read. ``answers``: with how many things
    layers answer, in a tuple; 0: with what they hand on, and no tuple."""

    def __init__(self, layer: nn.Module, answers: int) -> None:
        nn.Module.__init__(self)
        self.__dict__.update({name: value for name, value in vars(layer).items() if not name.startswith("_")})
        self.answers = answers

    def forward(self, hidden: torch.Tensor, *_: Any, **__: Any) -> Any:
        """Its input (B, L, d); of all else nothing."""
        return (hidden, *[None] * (self.answers - 1)) if self.answers else hidden


def stack_of(module: nn.Module, depth: int) -> nn.ModuleList:
    """The list of a model's ``depth`` transformer layers.

    Raises:
        LookupError: it has none.
    """
    for part in module.modules():
        if isinstance(part, nn.ModuleList) and len(part) == depth:
            return part
    raise LookupError(f"no list of {depth} transformer layers in {type(module).__name__}")


def answers_of(stack: nn.ModuleList, call: Callable[[], object]) -> int:
    """With how many things a layer answers in a tuple, 0 without one: as a ``call`` of the model shows."""
    seen: list[int] = []
    hook = stack[0].register_forward_hook(lambda _, __, made: seen.append(len(made) if isinstance(made, tuple) else 0))
    try:
        with torch.no_grad():
            call()
    finally:
        hook.remove()
    return seen[0]


@contextmanager
def left_out(stacks: Sequence[nn.ModuleList], layers: Collection[int], answers: int) -> Iterator[None]:
    """Inside, the layers of these numbers are left out of every stack. What hangs on a layer's end (its forward hooks) stays there."""
    before = [(stack, i, stack[i]) for stack in stacks for i in sorted(layers)]
    try:
        for stack, i, layer in before:
            stand_in = Passed(layer, answers)
            stand_in._forward_hooks = layer._forward_hooks
            stack[i] = stand_in
        yield
    finally:
        for stack, i, layer in before:
            stack[i] = layer
