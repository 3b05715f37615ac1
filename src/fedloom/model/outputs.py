"""What the transformer layers hand on.

The states that a model returns end with what stands behind its layers: a model with a norm there (GPT-2, Llama, Qwen2, ModernBERT) returns
the norm's output in place of the last layer's, whose length the norm has taken away. So the last layer's is caught where it leaves it.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from fedloom.model.skipped import stack_of


@contextmanager
def last_caught(module: nn.Module, depth: int) -> Iterator[list[torch.Tensor]]:
    """Inside, a call of the module leaves in the list what its last layer hands on; nothing, where no list of ``depth`` layers is found
    (layers that share their weights: no such model has a norm behind them)."""
    caught: list[torch.Tensor] = []

    def keep(_: nn.Module, __: Any, made: Any) -> None:
        caught.append(made if isinstance(made, torch.Tensor) else made[0])

    try:
        hook = stack_of(module, depth)[-1].register_forward_hook(keep)
    except LookupError:
        yield caught
        return
    try:
        yield caught
    finally:
        hook.remove()


def of_layers(states: Sequence[torch.Tensor], caught: Sequence[torch.Tensor]) -> tuple[torch.Tensor, ...]:
    """H_1 .. H_D from the states of a call, which begin with the embeddings, and what :func:`last_caught` caught in it."""
    return (*states[1:-1], caught[-1] if caught else states[-1])


def logits_of(out: Any) -> torch.Tensor:
    """The logits of a call of the module; those of begin and end side by side (…, 2), which the library tells apart."""
    return torch.stack([out.start_logits, out.end_logits], -1) if "start_logits" in out else out.logits
