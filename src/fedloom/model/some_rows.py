"""One client's model of whose linear layers only some output rows are there. What is not there is neither multiplied nor differentiated."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch.nn import functional

from fedloom.messages import Tensors
from fedloom.model.modes import Mode


class SomeRows(Mode):
    """Inside, a linear layer called with one of ``weights`` (k, d_in) gives (…, d_out), zero but for the k rows that the weight holds.

    The tensors themselves must reach the layer: in the precision that the model is called in.
    """

    def __init__(self, weights: Tensors, rows: Tensors, whole: Tensors) -> None:
        """``rows``: by name, which rows (k,) the weight has; ``whole``: by name, a tensor with all of them."""
        self.of = {id(weights[n]): (at.to(weights[n].device), whole[n].shape[0]) for n, at in rows.items()}

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        if func is functional.linear and id(args[1]) in self.of:
            rows, tall = self.of[id(args[1])]
            few = functional.linear(args[0], args[1])
            return few.new_zeros(*few.shape[:-1], tall).index_copy(-1, rows, few)
        return func(*args, **(kwargs or {}))


def whole(few: torch.Tensor, rows: torch.Tensor, tall: int) -> torch.Tensor:
    """(tall, …) of (k, …): each row in its place, zeros between."""
    return few.new_zeros(tall, *few.shape[1:]).index_copy(0, rows.to(few.device), few)
