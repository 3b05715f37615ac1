"""The fast compute: the work of many clients in one pass.

Frozen weights are shared; the clients' texts lie one after another without padding, each reading its own client's trainable tensors
(``model/ways.py``). A pass takes as many texts as pay (``division.py``), whoever they belong to; a client whose steps are done is simply
not in the next one. Per-example gradients are the same pass with every text an owner by itself.
Items go together when they are alike (kind, tensor names and shapes, settings); the rest run in passes of their own. A model that no way is
known for runs one client at a time, and says so.

What a client gets does not depend on its neighbours: see ``model/kernels.py``.

Shapes: S clients in a pass, n texts, P trainable scalars.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Hashable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch.func import vmap

from fedloom.compute.compute import Done
from fedloom.compute.division import Part, Passes, chunks, out_of_memory, pass_bytes, states_that_fit
from fedloom.compute.flat import Flat
from fedloom.compute.flops import Flops
from fedloom.compute.lowrank import Few
from fedloom.compute.serial import Serial, above_zero, brings_a_model, cost, dropout_key, scored_names, twice_differentiated, watch
from fedloom.compute.spectrum import spectra
from fedloom.compute.steps import advance, direction, move, norms
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
    Spectral,
    Spectrum,
    WorkItem,
    grounded,
)
from fedloom.data.examples import Examples
from fedloom.messages import Tensors
from fedloom.model.base import Model
from fedloom.model.layout import RowsKept
from fedloom.model.texts import Texts
from fedloom.tensors import equal, fingerprint

log = logging.getLogger("fedloom")


class Stacked:
    """A :class:`~fedloom.compute.compute.Compute` that computes alike items together, at most ``stack`` of them (0: as many as pay)."""

    def __init__(self, model: Model, stack: int = 0) -> None:
        self.model, self.stack, self.flops = model, stack, Flops(model)
        self.passes = Passes(model)
        if model.alone:
            log.warning("'%s' runs one client at a time, several times slower: %s", model.name, model.alone)

    def run(self, items: Sequence[WorkItem]) -> list[Done]:
        """See :class:`~fedloom.compute.compute.Compute`."""
        if self.model.alone:
            return Serial(self.model).run(items)
        results: dict[int, Any] = {}
        groups: dict[tuple[str, Hashable], list[int]] = {}
        grounds: dict[str, Tensors] = {}
        alone, items = items, []
        for i, (item, weights) in enumerate(map(grounded, alone)):
            items.append(item)
            ground = fingerprint(weights) if weights else ""
            grounds.setdefault(ground, weights)
            groups.setdefault((ground, _kind(item)), []).append(i)
        for (ground, _), alike in groups.items():
            self.model.stand_on(grounds[ground])
            alike.sort(key=lambda i: (-_work(items[i]), i))
            size = min(self.stack or len(alike), states_that_fit(items[alike[0]], self.model.device))
            for begin in range(0, len(alike), size):
                part = alike[begin : begin + size]
                results |= zip(part, self._together([items[i] for i in part]), strict=True)
        return [Done(results[i], *cost(item, self.flops)) for i, item in enumerate(items)]

    @property
    def _same_to_the_bit(self) -> bool:
        """Whether company changes no bit of what packed passes make. Under ``vmap`` it does, so spectra are then taken one by one."""
        return self.model.device.type == "cpu" and self.model.together_by.startswith("packed")

    def _together(self, items: Sequence[Any]) -> list[Any]:
        match items[0]:
            case Fit() if brings_a_model(items[0], self.model):
                return Serial(self.model).results(items)
            case Fit():
                return self._fit(items)
            case Score():
                return self._score(items)
            case Fisher():
                return self._fisher(items)
            case Sensitivity():
                return self._sensitivity(items)
            case Spectrum():
                try:
                    together = [[item] for item in items] if self._same_to_the_bit else [items]
                    return [found for some in together for found in self._spectrum(some)]
                except (RuntimeError, NotImplementedError, TypeError) as error:
                    if out_of_memory(error):
                        raise
                    log.warning("'%s' does not run under vmap (%s); its spectra are taken one by one", self.model.name, str(error)[:120])
                    return Serial(self.model).results(items)
            case Predict():
                return self._predict(items)
            case Pretrained():
                return [self.model.weights for _ in items]
            case Initial():
                return [self.model.initial for _ in items]
            case unknown:
                raise TypeError(f"no compute for {type(unknown).__name__}; work items are {WorkItem}")

    def _texts(
        self,
        items: Sequence[Any],
        parts: Sequence[Part],
        owners: Sequence[int],
        weights: Sequence[float],
        keys: Sequence[int] = (),
        kept: Mapping[str, RowsKept] | None = None,
    ) -> Texts:
        """The parts' texts, each part's owner and its texts' weight given. ``keys``: the owners' dropout keys; ``kept``: by saved name,
        which rows they have."""
        pieces: list[tuple[Examples, int]] = [(items[p.item].examples, row) for p in parts for row in items[p.item].examples.rows[p.rows]]
        spans = [(e, int(e.offsets[row]), int(e.offsets[row + 1])) for e, row in pieces]
        counts = [len(p.rows) for p in parts]
        device, lengths = self.model.device, np.array([end - begin for _, begin, end in spans], np.int64)
        ids = np.concatenate([e.tokens[begin:end] for e, begin, end in spans]).astype(np.int64)
        segments = np.concatenate([e.segments[begin:end] for e, begin, end in spans]).astype(np.int64)
        return Texts(
            torch.from_numpy(ids).to(device),
            torch.from_numpy(segments).to(device),
            torch.tensor([int(e.store_labels[row]) for e, row in pieces], device=device),
            torch.from_numpy(np.repeat(np.asarray(weights, np.float32), counts)).to(device),
            lengths,
            np.repeat(np.asarray(owners, np.int64), counts),
            np.concatenate([p.first + np.arange(len(p.rows)) for p in parts]),
            torch.tensor(keys, dtype=torch.int64, device=device) if len(keys) else None,
            {self.model.parameters[name]: rows for name, rows in (kept or {}).items()},
            self.model.asking(ids, segments, lengths),
        )

    def _flat(
        self, tensors: Sequence[Tensors], rows: Sequence[Tensors] = (), dtype: torch.dtype = torch.float32
    ) -> tuple[Flat, torch.Tensor]:
        """The clients' tensors as one matrix (S, P). ``rows``: of some tensors, which rows each client has."""
        flat = Flat(tensors[0], rows, self.model.initial)
        return flat, flat.join(tensors, self.model.device, dtype)

    # ---- training -----------------------------------------------------------------------------------------------------------

    def _fit(self, items: Sequence[Fit]) -> list[Fitted]:
        """Items come with the most steps first, so those still active are always the first ones."""
        model, o, penalty, through = self.model, items[0].optimizer, items[0].penalty, items[0].through
        flat, begin = self._flat([i.start for i in items], [i.rows for i in items])
        rest, fixed = self._flat([i.fixed for i in items], dtype=model.dtype if through is None else torch.float32)
        anchor = begin if items[0].anchor is None else flat.join([i.anchor or {} for i in items], model.device)
        mask, correction = self._mask(items, flat), self._correction(items, flat)
        bias = None if items[0].bias is None else torch.stack([i.bias.float() for i in items if i.bias is not None]).to(model.device)
        now = begin.clone()
        few = Few(flat, o.low_rank) if o.low_rank is not None else None
        remembered = flat if few is None else few.inner
        first, second, steps = self._moments(items, remembered)
        losses = [np.zeros(len(item.batches)) for item in items]
        mean, apart = (torch.zeros_like(now) if items[0].watch else now[:, :0] for _ in range(2))
        sums = torch.zeros_like(now) if items[0].means else now[:, :0]

        for i in range(len(items[0].batches)):
            active = sum(len(item.batches) > i for item in items)
            gradient = torch.zeros_like(now[:active])
            loss = torch.zeros(active, device=model.device)

            def backward(parts: list[Part], i: int = i, gradient: torch.Tensor = gradient, loss: torch.Tensor = loss) -> None:
                """Add the gradients of some clients' texts. A penalty counts with a client's first text of the step."""
                low, high = parts[0].item, parts[-1].item + 1
                keys = [dropout_key(items[k].dropout_seed, i) for k in range(low, high)] if model.dropout and items[0].dropout else []
                weights = [1 / len(items[p.item].batches[i]) for p in parts]
                kept = flat.kept(low, high)
                beside = {n: t for n, t in rest.split(fixed[low:high]).items() if n in kept}  # what the other rows are
                texts = self._texts(
                    items, parts, [p.item - low for p in parts], weights, keys, {n: k for n, k in kept.items() if n not in beside}
                )
                leaf = now[low:high].detach().requires_grad_(True)
                if through is None:
                    tensors = {**rest.split(fixed[low:high]), **flat.split(leaf.to(model.dtype), low)}
                    tensors |= {n: kept[n].whole(tensors[n], still) for n, still in beside.items()}
                else:
                    tensors = through({**rest.split(fixed[low:high]), **flat.split(leaf)})
                with model.skipping(items[0].skips, model.dtype):
                    logits = model.together(tensors, texts, model.dtype)[0]
                values = texts.losses(logits if bias is None else logits + bias[low:high][texts.text_owners])
                total = values.sum()
                if penalty is not None:
                    pulls = vmap(penalty)(flat.split(leaf), flat.split(anchor[low:high]))
                    total = total + pulls[[p.item - low for p in parts if p.first == 0]].sum()
                gradient[low:high] += torch.autograd.grad(total, leaf)[0]
                loss[low:high] += values.detach()

            self.passes.do(items, [Part(k, items[k].batches[i]) for k in range(active)], backward)
            if items[0].watch:
                watch(mean[:active], apart[:active], now[:active], gradient, items[0].watch)
            if items[0].means:
                sums[:active] += gradient
            if correction is not None:
                gradient += correction[:active]
            if mask is not None:
                gradient *= mask[:active]
            if o.clip:
                gradient *= (o.clip / (norms(gradient) + 1e-6)).clamp(max=1.0)
            steps[:active] += 1
            m, v, t, still = first[:active], second[:active], steps[:active], None if mask is None else mask[:active]
            rate = None  # the same for all, or each client's own
            if o.schedule != "constant":
                rate = now.new_tensor([[o.rate(i, len(item.batches))] for item in items[:active]])
            if few is None:
                advance(now[:active], gradient, m, v, t, o, rate, still)
            else:
                move(now[:active], few.up(direction(few.down(gradient, i), m, v, t, o)), o, rate, still)
            for kept, value in zip(losses, loss.tolist(), strict=False):
                kept[i] = value
        ends, firsts, seconds = (matrix.cpu() for matrix in (now, first, second))
        importance, sums = (mean * apart).cpu(), sums.cpu()
        moments = [Moments(remembered.one(firsts[c], c), remembered.one(seconds[c], c), int(steps[c])) for c in range(len(items))]
        told = [flat.one(row, c) if items[0].watch else {} for c, row in enumerate(importance)]
        means = [
            flat.one(row / max(1, len(item.batches)), c) if item.means else {}
            for c, (row, item) in enumerate(zip(sums, items, strict=True))
        ]
        return [Fitted(flat.one(ends[c], c), losses[c], moments[c], told[c], means[c]) for c in range(len(items))]

    def _mask(self, items: Sequence[Fit], flat: Flat) -> torch.Tensor | None:
        if not items[0].mask:
            return None
        whole = [{n: item.mask[n].expand_as(t) if n in item.mask else torch.ones_like(t) for n, t in item.start.items()} for item in items]
        return flat.join(whole, self.model.device)

    def _correction(self, items: Sequence[Fit], flat: Flat) -> torch.Tensor | None:
        if not items[0].correction:
            return None
        whole = [{n: i.correction[n] if n in i.correction else torch.zeros_like(t) for n, t in i.start.items()} for i in items]
        return flat.join(whole, self.model.device)

    def _moments(self, items: Sequence[Fit], flat: Flat) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        zero = torch.zeros(len(items), flat.size, device=self.model.device)
        if items[0].moments is None:
            return zero, zero.clone(), zero.new_zeros(len(items))
        kept = [i.moments for i in items if i.moments is not None]
        steps = torch.tensor([float(m.steps) for m in kept], device=self.model.device)
        return flat.join([m.first for m in kept], zero.device), flat.join([m.second for m in kept], zero.device), steps

    # ---- gradients of single examples -----------------------------------------------------------------------------------------

    def _each(self, items: Sequence[Score | Fisher], reduce: Callable[[list[Part], Flat, torch.Tensor], None]) -> None:
        """Give ``reduce`` the per-example gradients (n, P) of the scored tensors, texts of like length together."""
        names = scored_names(items[0])
        flat, wanted = self._flat([{n: i.at[n] for n in names} for i in items])
        rest, fixed = self._flat([{n: t for n, t in i.at.items() if n not in names} for i in items])
        parts = [Part(k, np.array([row])) for k, item in enumerate(items) for row in range(len(item.examples))]
        lengths = np.concatenate([item.examples.lengths for item in items])
        parts = [parts[i] for i in np.argsort(-lengths, kind="stable")]

        def backward(some: list[Part]) -> None:
            of = torch.tensor([p.item for p in some], device=self.model.device)
            texts = self._texts(items, some, range(len(some)), [1.0] * len(some))
            leaf = wanted[of].requires_grad_(True)
            tensors = {**rest.split(fixed[of]), **flat.split(leaf)}
            loss = texts.losses(self.model.together(tensors, texts, torch.float32)[0]).sum()
            reduce(some, flat, torch.autograd.grad(loss, leaf)[0])

        self.passes.do(items, parts, backward, each=4 * (3 * flat.size + rest.size))

    def _score(self, items: Sequence[Score]) -> list[np.ndarray]:
        scores = [np.zeros(len(i.examples)) for i in items]

        def reduce(parts: list[Part], flat: Flat, gradients: torch.Tensor) -> None:
            squares = torch.linalg.vector_norm(gradients, dim=1, dtype=torch.float64).square()
            for part, value in zip(parts, squares.tolist(), strict=True):
                scores[part.item][part.rows[0]] = value

        self._each(items, reduce)
        return scores

    def _fisher(self, items: Sequence[Fisher]) -> list[dict[str, torch.Tensor]]:
        names = scored_names(items[0])
        flat = Flat({n: items[0].at[n] for n in names})
        totals = torch.zeros(len(items), flat.size, dtype=torch.float64, device=self.model.device)

        def reduce(parts: list[Part], flat: Flat, gradients: torch.Tensor) -> None:
            of = torch.tensor([p.item for p in parts], device=totals.device)
            totals.index_add_(0, of, gradients.double().square_())

        self._each(items, reduce)
        means = totals.cpu() / torch.tensor([len(i.examples) for i in items])[:, None]
        return [flat.one(mean.float()) for mean in means]

    # ---- the rest -------------------------------------------------------------------------------------------------------------

    def _sensitivity(self, items: Sequence[Sensitivity]) -> list[np.ndarray]:
        """By the formulas of :class:`~fedloom.compute.work.Sensitivity`, every norm over one client's texts."""
        model, rho, norm = self.model, items[0].rho, items[0].norm
        flat, at = self._flat([i.at for i in items])
        scores = [np.zeros(0)] * len(items)

        def measure(parts: list[Part]) -> None:
            batches = [items[p.item].batch for p in parts]
            tensors = flat.split(at[[p.item for p in parts]])
            texts = self._texts(items, parts, range(len(parts)), [1 / len(batch) for batch in batches])
            clean, owners = model.way(torch.float32).embed(texts)

            def norms(of: torch.Tensor, whose: torch.Tensor) -> torch.Tensor:
                squares = of.double().square().sum(-1)
                return squares.new_zeros(len(parts)).index_add(0, whose.reshape(-1), squares.reshape(-1)).sqrt().float()

            given = clean.clone().requires_grad_(True)
            logits, before = model.together(tensors, texts, torch.float32, given, layers=True)
            gradient = torch.autograd.grad(texts.losses(logits).sum(), given)[0]
            gradient = gradient * (clean != 0).any(-1, keepdim=True)
            radius = rho * (norms(clean, owners) if norm == "difference" else torch.ones(len(parts), device=model.device))
            step = radius / norms(gradient, owners).clamp(min=torch.finfo(torch.float32).tiny)
            with torch.no_grad():
                after = model.together(tensors, texts, torch.float32, clean + step[owners][..., None] * gradient, layers=True)[1]
            made = []
            for h, m in zip(before, after, strict=True):
                was = norms(h.detach(), texts.read_owners)
                change = norms(m - h.detach(), texts.read_owners) if norm == "difference" else (norms(m, texts.read_owners) - was).abs()
                made.append(change / above_zero(was))
            for part, mine in zip(parts, torch.stack(made, 1).cpu().numpy().astype(np.float64), strict=True):
                scores[part.item] = mine

        self.passes.do(items, [Part(k, item.batch) for k, item in enumerate(items)], measure, unsplit="sensitivity")
        return scores

    def _spectrum(self, items: Sequence[Spectrum]) -> list[Spectral]:
        """Under ``vmap``: the packed passes' gradients cannot be differentiated again. Losses share no tensors, so the gradient of their
        sum is each client's own, and so is its product with the Hessian."""
        names = scored_names(items[0])
        flat, wanted = self._flat([{n: i.at[n] for n in names} for i in items])
        rest, fixed = self._flat([{n: t for n, t in i.at.items() if n not in names} for i in items])
        found: dict[int, Spectral] = {}

        def measure(parts: list[Part]) -> None:
            batches, of = [items[p.item].batch for p in parts], [p.item for p in parts]
            texts = self._texts(items, parts, range(len(parts)), [1 / len(batch) for batch in batches])

            def gradient(where: torch.Tensor, twice: bool) -> torch.Tensor:
                logits = self.model.mapped({**rest.split(fixed[of]), **flat.split(where)}, texts)
                return torch.autograd.grad(texts.losses(logits).sum(), where, create_graph=twice)[0]

            found.update(zip(of, spectra([items[k] for k in of], *twice_differentiated(wanted[of], gradient)), strict=True))

        longest = max(int(i.examples.lengths[i.batch].max()) * len(i.batch) for i in items)
        each = 8 * (items[0].steps + 8) * flat.size + 4 * longest * pass_bytes(
            self.model, twice=True
        )  # the basis; the graph of the gradient
        self.passes.do(items, [Part(k, item.batch) for k, item in enumerate(items)], measure, each, unsplit="spectrum")
        return [found[k] for k in range(len(items))]

    def _predict(self, items: Sequence[Predict]) -> list[torch.Tensor]:
        """Clients who predict with equal tensors are one owner, where that changes their last bits no more than their company does anyway:
        of a whole model there would be a copy for each."""
        logits = [torch.zeros(len(i.examples), self.model.width) for i in items]
        alike = not self.model.together_by.startswith("packed") and all(equal(i.at, items[0].at) for i in items[1:])
        flat, at = self._flat([i.at for i in (items[:1] if alike else items)], dtype=self.model.dtype)

        def forward(parts: list[Part]) -> None:
            low, high = (0, 1) if alike else (parts[0].item, parts[-1].item + 1)
            texts = self._texts(items, parts, [0 if alike else p.item - low for p in parts], [1.0] * len(parts))
            made = texts.told(self.model.together(flat.split(at[low:high]), texts, self.model.dtype)[0]).cpu()
            for part, rows in zip(parts, made.split([len(p.rows) for p in parts]), strict=True):
                logits[part.item][part.rows] = rows

        with torch.no_grad():
            self.passes.do(items, [part for k, item in enumerate(items) for part in chunks(k, item.examples)], forward)
        return logits


def _kind(item: WorkItem) -> Hashable:
    """Items of the same kind can share a pass."""
    if isinstance(item, Pretrained | Initial):
        return type(item).__name__
    tensors = item.start if isinstance(item, Fit) else item.at
    some = item.rows if isinstance(item, Fit) else {}
    shapes = tuple((n, tuple(t.shape)) for n, t in sorted(tensors.items()) if n not in some)
    match item:
        case Fit():
            # how many rows each has may differ; how many numbers that is may not, or a client's norm would be summed by who else is there
            shapes += (*sorted(some), sum(tensors[n].numel() for n in some))
            masks = tuple((n, tuple(t.shape)) for n, t in item.mask.items())
            fixed = tuple((n, tuple(t.shape)) for n, t in sorted(item.fixed.items()))
            masks = (*masks, *sorted(item.correction), item.through, item.watch, item.means, item.skips, item.dropout)
            return ("fit", shapes, masks, fixed, item.optimizer, item.penalty, item.anchor is None, item.moments is None, item.bias is None)
        case Score() | Fisher():
            return (type(item).__name__, shapes, item.over)
        case Sensitivity():
            return ("sensitivity", shapes, item.rho, item.norm)
        case Spectrum():
            return ("spectrum", shapes, item.over, item.probes, item.steps, item.radius)
        case _:
            return (type(item).__name__, shapes)


def _work(item: WorkItem) -> int:
    """What items are ordered by: steps, so that those still training are the first ones; else tokens, so that clients with as many are
    neighbours and share their products."""
    match item:
        case Fit():
            return len(item.batches)
        case Pretrained() | Initial():
            return 0
        case _:
            return int(item.examples.lengths.sum())
