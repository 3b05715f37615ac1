"""The fast compute: the same item of many clients in one pass.

Frozen weights are shared; each client's trainable tensors carry a leading client dimension; ``vmap(grad_and_value(loss))`` does the
rest. Per-example gradients are a second ``vmap`` inside. Clients with fewer steps leave the stack when they are done.
Items stack when they are alike (kind, tensor names and shapes, settings); the rest run in stacks of their own.

Shapes: S clients in a stack, b examples each, L tokens, P trainable scalars.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from contextlib import nullcontext
from typing import Any

import numpy as np
import psutil
import torch
from torch.func import grad, grad_and_value, vmap

from fedloom.compute.compute import Done
from fedloom.compute.dropout import SeededDropout
from fedloom.compute.flops import Flops
from fedloom.compute.serial import cost, dropout_key, scored_names, sensitivity
from fedloom.compute.work import Fisher, Fit, Fitted, Moments, Predict, Score, Sensitivity, WorkItem
from fedloom.data.examples import Examples
from fedloom.messages import Tensors
from fedloom.model.base import Batch, Model, as_batch

ROWS = 4
"""Examples of one client per pass when scoring or predicting: few, so that a pass holds texts of like lengths."""

PASS = 96
"""Examples in one pass at most: beyond it nothing gets faster, and clients of like sizes share a pass."""

MEMORY_SHARE = 0.4
"""Share of the free memory that a stack may fill."""


class Stacked:
    """A :class:`~fedloom.compute.compute.Compute` that stacks alike items, ``stack`` clients at most (0: as memory allows)."""

    def __init__(self, model: Model, stack: int = 0) -> None:
        self.model, self.stack, self.flops = model, stack, Flops(model)

    def run(self, items: Sequence[WorkItem]) -> list[Done]:
        """See :class:`~fedloom.compute.compute.Compute`."""
        results: dict[int, Any] = {}
        groups: dict[Hashable, list[int]] = {}
        for i, item in enumerate(items):
            groups.setdefault(_kind(item), []).append(i)
        for alike in groups.values():
            alike.sort(key=lambda i: (-_work(items[i]), i))
            size = self.stack or self._fitting([items[i] for i in alike])
            for begin in range(0, len(alike), size):
                part = alike[begin : begin + size]
                results |= zip(part, self._stack([items[i] for i in part]), strict=True)
        return [Done(results[i], *cost(item, self.flops)) for i, item in enumerate(items)]

    def _stack(self, items: Sequence[Any]) -> list[Any]:
        match items[0]:
            case Fit():
                return self._fit(items)
            case Score():
                return self._score(items)
            case Fisher():
                return self._fisher(items)
            case Sensitivity():
                return self._sensitivity(items)
            case Predict():
                return self._predict(items)
            case unknown:
                raise TypeError(f"no compute for {type(unknown).__name__}; work items are {WorkItem}")

    def _fitting(self, items: Sequence[WorkItem]) -> int:
        """How many clients' activations fit into memory at once."""
        longest = max(int(item.examples.lengths.max(initial=1)) for item in items)
        rows = max(max((len(b) for b in item.batches), default=1) if isinstance(item, Fit) else ROWS for item in items)
        room = int(MEMORY_SHARE * _free_bytes(self.model.device) / activation_bytes(self.model, rows, longest))
        return max(1, min(room, PASS // rows))

    def _batch(self, clients: Sequence[tuple[Examples, np.ndarray]], rows: int) -> Batch:
        """Fields (S, b, L): each client's examples at its indices, padded to the longest of all."""
        width = max(int(examples.lengths[indices].max()) for examples, indices in clients)
        padded = [
            vars(e.pad(indices, pad_id=self.model.pad_id, side=self.model.side, examples=rows, length=width)) for e, indices in clients
        ]
        return as_batch({field: np.stack([p[field] for p in padded]) for field in Batch._fields}, self.model.device)

    def _stacked(self, tensors: Sequence[Tensors]) -> dict[str, torch.Tensor]:
        return {n: torch.stack([t[n].detach().float() for t in tensors]).to(self.model.device) for n in sorted(tensors[0])}

    def _fit(self, items: Sequence[Fit]) -> list[Fitted]:
        """Items come with the most steps first, so those still active are always the first ones."""
        model, o, penalty = self.model, items[0].optimizer, items[0].penalty
        start, fixed = self._stacked([i.start for i in items]), self._stacked([i.fixed for i in items])
        flat = Flat(start)
        begin, mask = flat.join(start), self._mask(items, start, flat)
        now, first, second, steps = begin.clone(), *self._moments(items, flat)
        losses: list[list[float]] = [[] for _ in items]

        def loss(tensors: Tensors, origin: Tensors, rest: Tensors, batch: Batch, key: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
            with SeededDropout(key, model.dropout, model.causal) if model.dropout else nullcontext():
                value = model.loss({**rest, **tensors}, batch, model.dtype)
            return (value if penalty is None else value + penalty(tensors, origin)), value

        step = vmap(grad_and_value(loss, has_aux=True), randomness="error")
        for i in range(len(items[0].batches)):
            active = sum(len(item.batches) > i for item in items)
            going = [(item.examples, item.batches[i]) for item in items[:active]]
            keys = torch.tensor([dropout_key(item.dropout_seed, i) for item in items[:active]], device=model.device)
            batch = self._batch(going, max(len(indices) for _, indices in going))
            rest = {n: t[:active] for n, t in fixed.items()}
            gradients, (_, values) = step(flat.split(now[:active]), flat.split(begin[:active]), rest, batch, keys)
            g = flat.join(gradients)
            if mask is not None:
                g = g * mask[:active]
            if o.clip:
                g = g * (o.clip / (g.norm(dim=1, keepdim=True) + 1e-6)).clamp(max=1.0)
            steps[:active] += 1
            first[:active] = o.betas[0] * first[:active] + (1 - o.betas[0]) * g
            second[:active] = o.betas[1] * second[:active] + (1 - o.betas[1]) * g.square()
            unbias = [1 - beta ** steps[:active, None] for beta in o.betas]
            move = o.lr * (first[:active] / unbias[0]) / ((second[:active] / unbias[1]).sqrt() + o.eps)
            moved = now[:active] * (1 - o.lr * o.weight_decay) - move
            now[:active] = moved if mask is None else torch.where(mask[:active] > 0, moved, now[:active])
            for kept, value in zip(losses, values.tolist(), strict=False):
                kept.append(value)
        return [
            Fitted(
                flat.one(now[c]),
                np.array(losses[c]),
                Moments(flat.one(first[c]), flat.one(second[c]), int(steps[c])),
            )
            for c in range(len(items))
        ]

    def _mask(self, items: Sequence[Fit], start: dict[str, torch.Tensor], flat: Flat) -> torch.Tensor | None:
        if not items[0].mask:
            return None
        given = self._stacked([i.mask for i in items])
        whole = {n: given[n].expand_as(start[n]) if n in given else torch.ones_like(start[n]) for n in start}
        return flat.join(whole)

    def _moments(self, items: Sequence[Fit], flat: Flat) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        zero = torch.zeros(len(items), flat.size, device=self.model.device)
        if items[0].moments is None:
            return zero, zero.clone(), zero.new_zeros(len(items))
        kept = [i.moments for i in items if i.moments is not None]
        steps = torch.tensor([float(m.steps) for m in kept], device=self.model.device)
        return flat.join(self._stacked([m.first for m in kept])), flat.join(self._stacked([m.second for m in kept])), steps

    def _passes(self, items: Sequence[Score | Fisher | Predict]) -> list[tuple[int, np.ndarray, Batch]]:
        """Cut the items' examples, longest first, into passes of at most ``ROWS`` a client: (active items, indices (S, b), batch)."""
        orders = [np.argsort(-item.examples.lengths, kind="stable") for item in items]
        passes = []
        for at in range(0, max(len(o) for o in orders), ROWS):
            parts = [(item.examples, order[at : at + ROWS]) for item, order in zip(items, orders, strict=True)]
            parts = [part for part in parts if len(part[1])]
            rows = max(len(indices) for _, indices in parts)
            indices = np.stack([np.pad(i, (0, rows - len(i)), constant_values=-1) for _, i in parts])
            passes.append((len(parts), indices, self._batch(parts, rows)))
        return passes

    def _each(
        self,
        items: Sequence[Score | Fisher],
        reduce: Callable[[dict[str, torch.Tensor], torch.Tensor], None],
        names: Sequence[str],
    ) -> None:
        """Give ``reduce`` the per-example gradients {name: (S, b, …)} and indices (S, b; −1 for filler) of each pass."""
        at = self._stacked([i.at for i in items])
        wanted, fixed = {n: at[n] for n in names}, {n: t for n, t in at.items() if n not in names}

        def loss(tensors: Tensors, rest: Tensors, row: Batch) -> torch.Tensor:
            one = Batch(*(field[None] for field in row))
            return self.model.loss({**tensors, **rest}, one._replace(weights=torch.ones_like(one.weights)), torch.float32)

        each = vmap(vmap(grad(loss), in_dims=(None, None, 0)))
        for active, indices, batch in self._passes(items):
            now, rest = ({n: t[:active] for n, t in part.items()} for part in (wanted, fixed))
            reduce(each(now, rest, batch), torch.from_numpy(indices))

    def _score(self, items: Sequence[Score]) -> list[np.ndarray]:
        scores = [np.zeros(len(i.examples)) for i in items]

        def reduce(gradients: dict[str, torch.Tensor], indices: torch.Tensor) -> None:
            squares = sum(g.square().flatten(2).sum(-1, dtype=torch.float64) for g in gradients.values())
            assert isinstance(squares, torch.Tensor)
            for client, (rows, values) in enumerate(zip(indices.numpy(), squares.cpu().numpy(), strict=True)):
                scores[client][rows[rows >= 0]] = values[rows >= 0]

        self._each(items, reduce, scored_names(items[0]))
        return scores

    def _fisher(self, items: Sequence[Fisher]) -> list[dict[str, torch.Tensor]]:
        names = scored_names(items[0])
        totals = {n: torch.zeros(len(items), *items[0].at[n].shape, dtype=torch.float64) for n in names}

        def reduce(gradients: dict[str, torch.Tensor], indices: torch.Tensor) -> None:
            real = (indices >= 0).double()
            for name, g in gradients.items():
                weights = real.reshape(*real.shape, *[1] * (g.dim() - 2))
                totals[name][: g.shape[0]] += (g.cpu().square().double() * weights).sum(1)

        self._each(items, reduce, names)
        return [{n: (t[c] / len(item.examples)).float() for n, t in totals.items()} for c, item in enumerate(items)]

    def _sensitivity(self, items: Sequence[Sensitivity]) -> list[np.ndarray]:
        batch = self._batch([(i.examples, i.batch) for i in items], max(len(i.batch) for i in items))
        scores = vmap(lambda at, b: sensitivity(self.model, at, b, items[0]))(self._stacked([i.at for i in items]), batch)
        return list(scores.cpu().numpy().astype(np.float64))

    def _predict(self, items: Sequence[Predict]) -> list[torch.Tensor]:
        logits = [torch.zeros(len(i.examples), self.model.num_labels) for i in items]
        if not any(len(i.examples) for i in items):
            return logits
        at = self._stacked([i.at for i in items])
        forward = vmap(lambda tensors, b: self.model.forward(tensors, b, self.model.dtype)[0])
        with torch.no_grad():
            for active, indices, batch in self._passes(items):
                made = forward({n: t[:active] for n, t in at.items()}, batch).cpu()
                for client, rows in enumerate(indices):
                    logits[client][rows[rows >= 0]] = made[client, : int((rows >= 0).sum())]
        return logits


class Flat:
    """Named tensors (S, …) as one matrix (S, P) and back, in one fixed order of names."""

    def __init__(self, stacked: Tensors) -> None:
        self.shapes = {n: t.shape[1:] for n, t in stacked.items()}
        self.sizes = [shape.numel() for shape in self.shapes.values()]
        self.size = sum(self.sizes)

    def join(self, stacked: Tensors) -> torch.Tensor:
        """(S, P) from {name: (S, …)}."""
        return torch.cat([stacked[n].flatten(1) for n in self.shapes], 1)

    def split(self, matrix: torch.Tensor) -> dict[str, torch.Tensor]:
        """{name: (S, …)} as views of (S, P)."""
        parts = matrix.split(self.sizes, 1)
        return {n: part.view(-1, *shape) for (n, shape), part in zip(self.shapes.items(), parts, strict=True)}

    def one(self, row: torch.Tensor) -> dict[str, torch.Tensor]:
        """{name: …} of one client, as copies on the CPU."""
        return {n: t[0].cpu().clone() for n, t in self.split(row[None]).items()}


def _kind(item: WorkItem) -> Hashable:
    """Items of the same kind can share a stack."""
    tensors = item.start if isinstance(item, Fit) else item.at
    shapes = tuple((n, tuple(t.shape)) for n, t in sorted(tensors.items()))
    match item:
        case Fit():
            masks = tuple((n, tuple(t.shape)) for n, t in item.mask.items())
            fixed = tuple((n, tuple(t.shape)) for n, t in item.fixed.items())
            return ("fit", shapes, masks, fixed, item.optimizer, item.penalty, item.moments is None)
        case Score() | Fisher():
            return (type(item).__name__, shapes, item.over)
        case Sensitivity():
            return ("sensitivity", shapes, item.rho, item.norm)
        case _:
            return (type(item).__name__, shapes)


def _work(item: WorkItem) -> int:
    return len(item.batches) if isinstance(item, Fit) else len(item.examples)


def activation_bytes(model: Model, rows: int, length: int) -> int:
    """Roughly what one client's forward and backward pass keeps alive, in bytes: per layer and token 16 vectors of the hidden size, three
    of the feed-forward size, and three attention maps a head. Float32 is assumed whatever the precision: an upper estimate."""
    c = model.config.to_dict()
    hidden = int(c.get("hidden_size") or c.get("n_embd") or c.get("dim") or 1024)
    inner = int(c.get("intermediate_size") or c.get("n_inner") or 4 * hidden)
    heads = int(c.get("num_attention_heads") or c.get("n_head") or 16)
    per_token = 16 * hidden + 3 * inner + 3 * heads * length
    trained = sum(t.numel() for t in model.initial.values())
    return 4 * (rows * length * per_token * model.depth + (8 + rows) * trained)


def _free_bytes(device: torch.device) -> int:
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    return psutil.virtual_memory().available
