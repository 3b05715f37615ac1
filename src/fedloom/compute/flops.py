"""Floating-point operations of work items, counted on the model's real graph.

PyTorch's counter runs one example at three lengths; the operations of a transformer on L tokens are a quadratic polynomial in L, which
three counts determine. Element-wise operations are not counted. A backward pass counts what it needs for the tensors trained and no more,
and a product with the Hessian what the graph of the gradient makes of it.
A language model's output layer is counted for every token, as the library computes it. Layers that are computed again in the backward pass
count again, as far as they are.
Of a linear layer with some rows only, the operations are linear in the number of rows, which two counts determine: with all and with one.
So they are in the rank of pairs.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from typing import Any, Literal

import numpy as np
import torch
from torch.utils.flop_counter import FlopCounterMode

from fedloom.model.base import Model
from fedloom.model.factors import cut, rank_in, rank_of_pairs
from fedloom.model.names import is_beneath
from fedloom.model.principal import operations
from fedloom.model.some_rows import SomeRows
from fedloom.model.texts import Batch

LENGTHS = (4, 8, 16)

What = Literal["gradient", "rank 1", "differentiable", "product", "embeddings"]
"""What is counted: a pass and its gradient by tensors, the same of pairs of one direction, one that can be differentiated again, a product
with its Hessian, or the gradient by the input embeddings."""

_KEPT: dict[tuple[str, ...], dict[Any, np.ndarray]] = {}
"""By what makes a graph, the polynomials that were found: models that are alike in it are counted once in a process."""


def start_operations(model: Model) -> float:
    """Operations of the start that a process makes when it loads the model: one decomposition a pair where LoRA starts from singular
    vectors (``principal.py``), 0 for any other start, which only draws numbers."""
    if not model.split:
        return 0.0
    rank, shapes = rank_in(model.initial), (weight.shape for weight in model.weights.values())
    return sum(operations(d_out, d_in, rank, model.split_fast) for d_out, d_in in shapes)


def _packed_product(rows: Sequence[int], *_: Any, out_shape: Sequence[int], **__: Any) -> int:
    """Operations of a product with a packed weight, which PyTorch's counter does not know."""
    return 2 * int(np.prod(out_shape)) * rows[-1]


_COUNTED: dict[Any, Any] = {torch.ops.mkldnn._linear_pointwise: _packed_product} if torch.backends.mkldnn.is_available() else {}


class _NoModules:
    """Nothing is told apart by module: what follows modules through a backward pass cannot follow a layer that is computed again in it."""

    parents = ("Global",)

    def __enter__(self) -> None: ...

    def __exit__(self, *_: object) -> None: ...


class Flops:
    """Operations per example of a forward pass, or a forward and backward pass, by number of tokens."""

    def __init__(self, model: Model) -> None:
        ways = (*model.call, type(model.reader))
        graph = (repr(model.module), model.config.to_json_string(use_diff=False), *model.initial, *(way.__qualname__ for way in ways))
        graph = (*graph, f"recomputes: {model.recomputes}")
        self.model, self._fits = model, _KEPT.setdefault(graph, {})

    def forward(self, length: int | np.ndarray) -> float | np.ndarray:
        """Operations of one example's forward pass on ``length`` tokens."""
        return self._at(frozenset(), length)

    def step(
        self,
        names: frozenset[str],
        length: int | np.ndarray,
        rows: Mapping[str, int] | None = None,
        skips: frozenset[int] = frozenset(),
        rank: int = 0,
    ) -> float | np.ndarray:
        """Operations of one example's forward and backward pass for the gradient of the tensors ``names``. ``rows``: of B's of which only
        some rows are there, how many; they are all of one rank. ``skips``: layers that are left out. ``rank``: of the pairs among
        ``names``, where that is not the model's (which is 0)."""
        whole, full = self._of_rows(names, length, rows, skips, "gradient"), rank_of_pairs(self.model.initial)
        if rank in (0, full) or full < 2:
            return whole
        return whole + (rank - full) / (full - 1) * (whole - self._of_rows(names, length, rows, skips, "rank 1"))

    def _of_rows(
        self, names: frozenset[str], length: int | np.ndarray, rows: Mapping[str, int] | None, skips: frozenset[int], what: What
    ) -> float | np.ndarray:
        whole = self._at(names, length, skips=skips, what=what)
        if not rows:
            return whole
        tall = sum(self.model.initial[n].shape[0] for n in rows)
        left_out = (tall - sum(rows.values())) / (tall - len(rows))
        return whole - left_out * (whole - self._at(names, length, frozenset(rows), skips, what))

    def differentiable(self, names: frozenset[str], length: int | np.ndarray) -> float | np.ndarray:
        """As :meth:`step`, of a gradient that is to be differentiated again: nothing is computed again for it."""
        return self._at(names, length, what="differentiable")

    def product(self, names: frozenset[str], length: int | np.ndarray) -> float | np.ndarray:
        """Operations of the product of one example's Hessian by the tensors ``names`` with a vector, given a differentiable gradient."""
        return self._at(names, length, what="product")

    def by_embeddings(self, names: frozenset[str], length: int | np.ndarray) -> float | np.ndarray:
        """Operations of one example's forward pass with the tensors ``names`` and backward pass to its input embeddings."""
        return self._at(names, length, what="embeddings")

    def _at(
        self,
        names: frozenset[str],
        length: int | np.ndarray,
        single: frozenset[str] = frozenset(),
        skips: frozenset[int] = frozenset(),
        what: What = "gradient",
    ) -> float | np.ndarray:
        key = (names, single, skips, what)
        if key not in self._fits:
            with self.model.skipping(skips, self.model.dtype):
                counts = [self._count(names, n, dict.fromkeys(single, 1), what) for n in LENGTHS]
            self._fits[key] = np.polyfit(np.array(LENGTHS, float), np.array(counts, float), 2)
        return np.polyval(self._fits[key], length)

    def _count(self, names: frozenset[str], length: int, rows: Mapping[str, int] | None = None, what: What = "gradient") -> int:
        """Counted, with the first so many ``rows``."""
        ids = torch.ones((1, length), dtype=torch.int64, device=self.model.device)
        one = torch.ones(1, device=self.model.device)
        segments = torch.full_like(ids, self.model.trial_segment)
        batch = Batch(ids, ids > 0, segments, torch.zeros_like(ids[:, 0]), one)
        some = {n: torch.arange(k) for n, k in (rows or {}).items()}
        own = {**self.model.initial, **(self.model.weights if any(map(is_beneath, names)) else {})}
        given = {n: own[n].to(self.model.device) for n in names}
        given = cut(given, 1) if what == "rank 1" else given
        by = {n: (t[: len(some[n])].clone() if n in some else t).requires_grad_(what != "embeddings") for n, t in given.items()}
        counter = FlopCounterMode(display=False, custom_mapping=_COUNTED)
        counter.mod_tracker = _NoModules()  # type: ignore[assignment]
        leaves = list(by.values())
        match what:
            case "embeddings":
                start = self.model.embed(ids, self.model.dtype).detach().requires_grad_(True)
                with counter:
                    logits = self.model.forward(by, batch, self.model.dtype, start, layers=True)[0]
                    torch.autograd.grad(self.model.weighted(logits, batch), start)
            case "product":
                loss = self.model.loss(by, batch, self.model.dtype, twice=True)
                slopes = torch.autograd.grad(loss, leaves, create_graph=True, materialize_grads=True)
                with counter:
                    torch.autograd.grad(slopes, leaves, [torch.ones_like(t) for t in slopes], allow_unused=True)
            case _ if by:
                with counter:
                    with SomeRows(by, some, self.model.initial) if some else nullcontext():
                        loss = self.model.loss(by, batch, self.model.dtype, twice=what == "differentiable")
                    torch.autograd.grad(loss, leaves, allow_unused=True)
            case _:
                with counter, torch.no_grad():
                    self.model.forward({}, batch, self.model.dtype)
        for tensor in leaves:
            tensor.requires_grad_(False)
        return int(counter.get_total_flops())
