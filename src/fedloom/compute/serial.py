"""The plain compute: one item at a time, ordinary autograd, PyTorch's own AdamW. The reference that ``stacked.py`` must equal.

When a run misbehaves, use it (``--engine.stack 1``): errors carry the client and nothing is batched over clients.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import replace
from typing import Any

import numpy as np
import torch

from fedloom.compute.compute import Done
from fedloom.compute.flops import Flops
from fedloom.compute.lowrank import directions, down, projected, up
from fedloom.compute.spectrum import Product, spectra
from fedloom.compute.work import (
    Fisher,
    Fit,
    Fitted,
    Initial,
    Moments,
    Predict,
    Pretrained,
    Score,
    Sensitivity,
    Smoothing,
    Spectral,
    Spectrum,
    WorkItem,
    grounded,
)
from fedloom.data.examples import Examples
from fedloom.messages import Tensors
from fedloom.model.base import Model
from fedloom.model.dropout import SeededDropout
from fedloom.model.factors import rank_of_pairs
from fedloom.model.quantised import numbers
from fedloom.model.some_rows import SomeRows
from fedloom.model.texts import Batch, as_batch
from fedloom.seeds import derive_int
from fedloom.tensors import without

PREDICT_ROWS = 32
"""Examples per forward pass when predicting one by one."""


class Serial:
    """A :class:`~fedloom.compute.compute.Compute` that does items one by one on ``model``."""

    def __init__(self, model: Model) -> None:
        self.model, self.flops = model, Flops(model)

    def run(self, items: Sequence[WorkItem]) -> list[Done]:
        """See :class:`~fedloom.compute.compute.Compute`."""
        done = []
        for item, weights in map(grounded, items):
            self.model.stand_on(weights)
            done.append(Done(self._result(item), *cost(item, self.flops)))
        return done

    def results(self, items: Sequence[WorkItem]) -> list[Any]:
        """Those of items whose weights under the pairs, if any, the model stands on already."""
        return [self._result(item) for item in items]

    def _result(self, item: WorkItem) -> Any:
        match item:
            case Pretrained():
                return self.model.weights
            case Initial():
                return self.model.initial
            case Fit():
                return self._fit(item)
            case Score():
                return self._score(item)
            case Fisher():
                return self._fisher(item)
            case Sensitivity():
                return self._sensitivity(item)
            case Spectrum():
                return self._spectrum(item)
            case Predict():
                return self._predict(item)
            case unknown:
                raise TypeError(f"no compute for {type(unknown).__name__}; work items are {WorkItem}")

    def batch(self, examples: Examples, indices: np.ndarray) -> Batch:
        """The examples at ``indices`` as tensors, padded to their own longest."""
        return as_batch(vars(examples.pad(indices, pad_id=self.model.pad_id, side=self.model.side)), self.model.device)

    def _fit(self, item: Fit) -> Fitted:
        if not brings_a_model(item, self.model):
            return self._trained(item)
        stay = {n: t for n, t in item.fixed.items() if n in item.rows}
        with self.model.lent(without(item.fixed, stay), self.model.dtype):
            return self._trained(replace(item, fixed=stay))

    def _trained(self, item: Fit) -> Fitted:
        model, o = self.model, item.optimizer
        start = {n: t.detach().float().to(model.device) for n, t in sorted(item.start.items())}
        now = {n: t.clone().requires_grad_(True) for n, t in start.items()}
        dtype = model.dtype if item.through is None else torch.float32
        fixed = {n: t.detach().to(model.device, dtype) for n, t in item.fixed.items()}
        anchor = start if item.anchor is None else {n: t.detach().float().to(model.device) for n, t in item.anchor.items()}
        mask = {n: t.to(model.device).expand_as(start[n]) for n, t in item.mask.items()}
        correction = {n: t.detach().float().to(model.device) for n, t in item.correction.items()}
        bias = torch.zeros((), device=model.device) if item.bias is None else item.bias.float().to(model.device)
        inner = {} if o.low_rank is None else projected({n: t.shape for n, t in now.items()}, o.low_rank)
        factors = {
            n: torch.zeros(shape, device=model.device, requires_grad=True) for n, shape in inner.items()
        }  # where Adam has taken them
        bases: dict[str, torch.Tensor] = {}
        adam = torch.optim.AdamW(
            [{"params": [t for n, t in now.items() if n not in factors]}, {"params": list(factors.values()), "weight_decay": 0.0}],
            lr=o.lr, betas=o.betas, eps=o.eps, weight_decay=o.weight_decay,
        )  # fmt: skip
        _load_moments(adam, now, item.moments)
        seen = {n: (torch.zeros_like(t), torch.zeros_like(t)) for n, t in start.items()} if item.watch else {}
        sums = {n: torch.zeros_like(t) for n, t in start.items()} if item.means else {}
        losses = []
        for i, indices in enumerate(item.batches):
            batch = self.batch(item.examples, indices)
            key = torch.tensor(dropout_key(item.dropout_seed, i), device=model.device)
            given = {**fixed, **now} if item.through is None else item.through({**fixed, **now})
            tensors = {n: t.to(model.dtype) for n, t in given.items()}
            tensors |= {n: fixed[n].index_copy(0, at.to(model.device), tensors[n]) for n, at in item.rows.items() if n in fixed}
            dropping = SeededDropout(key, model.dropout, model.causal) if model.dropout and item.dropout else nullcontext()
            few = SomeRows(tensors, without(item.rows, fixed), model.initial) if item.rows.keys() - fixed.keys() else nullcontext()
            with model.skipping(item.skips, model.dtype), dropping, few:
                loss = model.weighted(model.forward(tensors, batch, model.dtype)[0] + bias, batch)
            total = loss if item.penalty is None else loss + item.penalty(now, anchor)
            gradients = torch.autograd.grad(total, list(now.values()))
            for (name, tensor), gradient in zip(now.items(), gradients, strict=True):
                if item.watch:
                    watch(*seen[name], tensor.detach(), gradient, item.watch)
                if item.means:
                    sums[name] += gradient
                gradient = gradient + correction[name] if name in correction else gradient
                tensor.grad = gradient * mask[name] if name in mask else gradient
            if o.clip:
                torch.nn.utils.clip_grad_norm_(list(now.values()), o.clip)
            for group in adam.param_groups:
                group["lr"] = o.rate(i, len(item.batches))
            before = {n: t.detach().clone() for n, t in factors.items()}
            if o.low_rank is not None:
                gradient_of = {n: g for n in factors if (g := now[n].grad) is not None}
                bases = {n: directions(g, o.low_rank.rank) for n, g in gradient_of.items()} if i % o.low_rank.every == 0 else bases
                for name, gradient in gradient_of.items():
                    factors[name].grad = down(bases[name], gradient)
            adam.step()
            with torch.no_grad():
                for name, at in factors.items():
                    assert o.low_rank is not None
                    now[name].mul_(1 - o.rate(i, len(item.batches)) * o.weight_decay)
                    now[name].add_(up(bases[name], at - before[name], now[name].shape), alpha=o.low_rank.scale)
            with torch.no_grad():
                for name in mask:
                    now[name].copy_(torch.where(mask[name] > 0, now[name], start[name]))
            losses.append(float(loss.detach()))
        importance = {n: (mean * apart).cpu() for n, (mean, apart) in seen.items()}
        means = {n: (total / max(1, len(item.batches))).cpu() for n, total in sums.items()}
        return Fitted(
            {n: t.detach().cpu() for n, t in now.items()}, np.array(losses), _moments(adam, {**now, **factors}), importance, means
        )

    def _each_gradient(self, item: Score | Fisher, names: Sequence[str]) -> Iterator[list[torch.Tensor]]:
        """Of one example after another the gradients by ``names``."""
        now = {n: t.detach().float().to(self.model.device).requires_grad_(n in names) for n, t in item.at.items()}
        for i in range(len(item.examples)):
            loss = self.model.loss(now, self.batch(item.examples, np.array([i])), torch.float32)
            yield list(torch.autograd.grad(loss, [now[n] for n in names]))

    def _score(self, item: Score) -> np.ndarray:
        names = scored_names(item)
        squares = [sum(g.square().sum(dtype=torch.float64) for g in gradients) for gradients in self._each_gradient(item, names)]
        return np.array([float(s) for s in squares])

    def _fisher(self, item: Fisher) -> dict[str, torch.Tensor]:
        names = scored_names(item)
        total = {n: torch.zeros_like(item.at[n], dtype=torch.float64) for n in names}
        for gradients in self._each_gradient(item, names):
            for name, gradient in zip(names, gradients, strict=True):
                total[name] += gradient.cpu().double().square()
        return {n: (t / len(item.examples)).float() for n, t in total.items()}

    def _sensitivity(self, item: Sensitivity) -> np.ndarray:
        at = {n: t.detach().float().to(self.model.device) for n, t in item.at.items()}
        return sensitivity(self.model, at, self.batch(item.examples, item.batch), item).cpu().numpy().astype(np.float64)

    def _spectrum(self, item: Spectrum) -> Spectral:
        names = sorted(scored_names(item))
        at = {n: t.detach().float().to(self.model.device) for n, t in item.at.items()}
        shapes, batch = [at[n].shape for n in names], self.batch(item.examples, item.batch)
        point = torch.cat([at[n].reshape(-1) for n in names])[None]

        def gradient(where: torch.Tensor, twice: bool = False) -> torch.Tensor:
            parts = where[0].split([shape.numel() for shape in shapes])
            named = {n: part.view(shape) for n, part, shape in zip(names, parts, shapes, strict=True)}
            return torch.autograd.grad(self.model.loss({**at, **named}, batch, torch.float32, True), where, create_graph=twice)[0]

        (found,) = spectra([item], *twice_differentiated(point, gradient))
        return found

    def _predict(self, item: Predict) -> torch.Tensor:
        at = {n: t.detach().to(self.model.device, self.model.dtype) for n, t in item.at.items()}
        rows = np.arange(len(item.examples))
        with torch.no_grad():
            batches = [self.batch(item.examples, rows[i : i + PREDICT_ROWS]) for i in range(0, len(rows), PREDICT_ROWS)]
            parts = [self.model.told(self.model.forward(at, batch, self.model.dtype)[0], batch) for batch in batches]
        return torch.cat(parts).cpu() if parts else torch.zeros(0, self.model.width)


def brings_a_model(item: Fit, model: Model) -> bool:
    """Whether a run computes in fewer bits than float32 and most of the model's numbers come with the item, to stay as they are. They then
    take the places of the model's own (:meth:`Model.lent`): beside these they would be a second model."""
    if model.dtype is torch.float32 or item.through is not None or not item.fixed.keys() <= model.initial.keys():
        return False
    return 2 * sum(t.numel() for t in item.fixed.values()) > numbers(model.module)


def twice_differentiated(
    point: torch.Tensor, gradient: Callable[[torch.Tensor, bool], torch.Tensor]
) -> tuple[torch.Tensor, Product, Product]:
    """``point``, the gradient as a function of where it is taken, and Hessian-vector products at ``point``.

    ``gradient``: (where it is taken, whether it is to be differentiated again) -> the gradient there.
    """
    leaf = point.detach().clone().requires_grad_(True)
    slope = gradient(leaf, True)

    def product(vectors: torch.Tensor) -> torch.Tensor:
        return torch.autograd.grad(slope, leaf, vectors.to(slope.device), retain_graph=True, materialize_grads=True)[0]

    return point, lambda where: gradient(where.detach().requires_grad_(True), False), product


def sensitivity(model: Model, at: Tensors, batch: Batch, item: Sensitivity) -> torch.Tensor:
    """Layer scores (D,) of one batch, by the formulas of :class:`~fedloom.compute.work.Sensitivity`."""
    real = (batch.mask & (batch.weights[:, None] > 0))[..., None]
    clean = model.embed(batch.ids, torch.float32).detach() * real
    given = clean.clone().requires_grad_(True)
    logits, before = model.forward(at, batch, torch.float32, given, layers=True)
    gradient = torch.autograd.grad(model.weighted(logits, batch), given)[0] * real
    radius = item.rho * (clean.norm() if item.norm == "difference" else 1.0)
    moved = clean + radius * gradient / gradient.norm().clamp(min=torch.finfo(torch.float32).tiny)
    rows = batch.weights[:, None, None]
    with torch.no_grad():
        after = model.forward(at, batch, torch.float32, moved, layers=True)[1]
    pooled = [(model.read(h.detach() * rows, batch), model.read(m * rows, batch)) for h, m in zip(before, after, strict=True)]
    if item.norm == "difference":
        return torch.stack([(m - h).norm() / above_zero(h.norm()) for h, m in pooled])
    return torch.stack([(m.norm() - h.norm()).abs() / above_zero(h.norm()) for h, m in pooled])


def above_zero(norm: torch.Tensor) -> torch.Tensor:
    """A norm to divide by: that of what is read of texts in which nothing is, is 0, and so is its change."""
    return norm.clamp(min=torch.finfo(norm.dtype).tiny)


def scored_names(item: Score | Fisher | Spectrum) -> list[str]:
    """The tensors whose gradients a Score, Fisher or Spectrum is about, in order.

    Raises:
        ValueError: there are none, or some of ``over`` are not among ``at``.
    """
    names = [n for n in item.at if item.over is None or n in item.over]
    if not names or len(names) < len(item.over or ()):
        missing = sorted((item.over or frozenset()) - item.at.keys())
        raise ValueError(f"{type(item).__name__} is over {missing[:4]}, not among the tensors that it is at: {sorted(item.at)[:4]}")
    return names


def watch(mean: torch.Tensor, apart: torch.Tensor, now: torch.Tensor, gradient: torch.Tensor, by: Smoothing) -> None:
    """One step of Ī and Ū, in place."""
    sensitivity = (now * gradient).abs()
    mean.mul_(by.beta1).add_(sensitivity, alpha=1 - by.beta1)
    apart.mul_(by.beta2).add_((sensitivity - mean).abs(), alpha=1 - by.beta2)


def dropout_key(seed: int, step: int) -> int:
    """The 31-bit key of one local step's dropout masks."""
    return derive_int(seed, "dropout", step) & 0x7FFFFFFF


def cost(item: WorkItem, flops: Flops) -> tuple[float, int]:
    """(floating-point operations, examples trained on) of one item, each batch at its own longest text; of a measurement nothing."""
    if isinstance(item, Pretrained | Initial) or (isinstance(item, Predict) and item.measures):
        return 0.0, 0
    lengths = item.examples.lengths
    match item:
        case Fit():
            names, rows = item.reached, {n: len(at) for n, at in item.rows.items() if n not in item.fixed}
            rank = rank_of_pairs(item.start)
            spent = sum(len(b) * float(flops.step(names, int(lengths[b].max()), rows, item.skips, rank)) for b in item.batches)
            return spent, sum(len(b) for b in item.batches)
        case Score() | Fisher():
            return float(np.sum(flops.step(frozenset(scored_names(item)), lengths, rank=rank_of_pairs(item.at)))), 0
        case Sensitivity():
            longest, n = int(lengths[item.batch].max()), len(item.batch)
            return n * float(flops.by_embeddings(frozenset(item.at), longest) + flops.forward(longest)), 0
        case Spectrum():
            # a gradient that can be differentiated, one at the point, and of every probe its products, and one and a gradient for its move
            longest, n, names = int(lengths[item.batch].max()), len(item.batch), frozenset(scored_names(item))
            gradients = (2 + item.probes) * float(flops.differentiable(names, longest))
            return n * (gradients + item.probes * (item.steps + 1) * float(flops.product(names, longest))), 0
        case Predict():
            return float(np.sum(flops.forward(lengths))) if len(lengths) else 0.0, 0


def _load_moments(adam: torch.optim.AdamW, now: dict[str, torch.Tensor], moments: Moments | None) -> None:
    if moments is None:
        return
    for name, tensor in now.items():
        adam.state[tensor] = {
            "step": torch.tensor(float(moments.steps)),
            "exp_avg": moments.first[name].to(tensor.device).clone(),
            "exp_avg_sq": moments.second[name].to(tensor.device).clone(),
        }


def _moments(adam: torch.optim.AdamW, now: dict[str, torch.Tensor]) -> Moments:
    states = {n: adam.state[t] or {"step": 0, "exp_avg": torch.zeros_like(t), "exp_avg_sq": torch.zeros_like(t)} for n, t in now.items()}
    steps = max(int(s["step"]) for s in states.values())
    return Moments({n: s["exp_avg"].cpu() for n, s in states.items()}, {n: s["exp_avg_sq"].cpu() for n, s in states.items()}, steps)
