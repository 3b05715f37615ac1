"""Finding out, when a model is loaded, how it is called: every way is tried, and what it says held against what the model says by itself.

How an architecture wants masks and positions is not looked up by its name: the ways in ``CALLS`` are tried and the first whose logits equal
the model's own plain call is taken; a model for which none does is refused. Whether it is causal is found by behaviour too, and so is the
fastest way to call it for many owners at once (``ways.py``), and what no loss depends on.
"""

from __future__ import annotations

import inspect
from collections.abc import Collection
from contextlib import nullcontext
from typing import Any

import numpy as np
import torch

from fedloom.messages import Tensors
from fedloom.model.base import Model
from fedloom.model.calls import CALLS, from_zero
from fedloom.model.dropout import SeededDropout
from fedloom.model.machine import own_part
from fedloom.model.names import is_head
from fedloom.model.outputs import logits_of
from fedloom.model.places import of_model
from fedloom.model.texts import Batch, Texts, padded
from fedloom.model.ways import WAYS

AGREE = 1e-3
APART = 2**27
"""Bytes of tensors at most that the two owners of a trial have apart at a time: a big model's trial is no second model."""


def learn_to_call(model: Model, base: Any) -> None:
    """Find out whether the base is causal, and which of ``CALLS`` equals its own plain call on a padded batch."""
    generator = torch.Generator().manual_seed(0)
    length = model.trial_length
    ids = torch.randint(5, int(model.config.vocab_size), (2, length), generator=generator).to(model.device)
    changed = ids[:, :8].clone()
    changed[:, -1] = (changed[:, -1] + 1) % int(model.config.vocab_size)
    with torch.no_grad():
        before, after = (base(input_ids=i, output_hidden_states=True).hidden_states[-1][:, 0] for i in (ids[:1, :8], changed[:1]))
        model.causal = bool(torch.equal(before, after))
        model.pad_id = int(model.tokenizer.pad_token_id)
        if model.causal:
            base.config.pad_token_id = -1  # no token: the head then always reads the last position, which left padding makes real
        mask = torch.ones_like(ids, dtype=torch.bool)
        short = max(1, length // 3)
        mask[1, : length - short] = not model.causal
        if not model.causal:
            mask[1, short:] = False
        if model.causal and model.finder is not None:
            raise of_model(
                model.name,
                f"'{model.name}' ({model.config.model_type}) reads forwards only, and answers are looked for with an encoder; give --model "
                "the folder or Hub name of one, or --task instructions",
            )
        segments = torch.full_like(ids, model.trial_segment)
        batch = Batch(torch.where(mask, ids, model.pad_id), mask, segments, ids[:, 0] * 0, torch.ones(2))
        plain: dict[str, Any] = {"input_ids": batch.ids, "attention_mask": mask.long()}
        if model.causal and "position_ids" in inspect.signature(base.forward).parameters:
            plain["position_ids"] = from_zero(model.shape, mask)
        wanted = logits_of(base(**plain)).float()
        wanted = model.read(wanted, batch) if wanted.dim() > 2 else wanted
        tried = []
        for call in CALLS:
            model.call = call
            try:
                error = float((model.forward({}, batch, torch.float32)[0] - wanted).abs().max())
            except (RuntimeError, TypeError, ValueError, IndexError, AttributeError) as failed:
                tried.append(f"{call[0].__name__}/{call[1].__name__}: {type(failed).__name__}")
                continue
            if error <= AGREE * max(1.0, float(wanted.abs().max())):
                return
            tried.append(f"{call[0].__name__}/{call[1].__name__}: logits differ by {error:.2g}")
    raise of_model(model.name, f"'{model.name}' ({model.config.model_type}) cannot be called; tried " + "; ".join(tried))


def leave_unreached_out(model: Model) -> None:
    """What no loss depends on is not trained, whatever the kind: a pooler that the head does not read; the bias of a head whose softmax is
    over tokens, which moves all of them alike, so that its gradient is rounding and nothing else."""
    now = {name: tensor.detach().to(model.device).requires_grad_() for name, tensor in model.initial.items()}
    ids = torch.full((1, 4), 5, device=model.device)
    segments = torch.full_like(ids, model.trial_segment)
    batch = Batch(ids, torch.ones_like(ids, dtype=torch.bool), segments, ids[:, 0] * 0, torch.ones(1, device=model.device))
    with torch.enable_grad():
        leaves = _leaves(model.loss(now, batch, torch.float32))  # no gradients: of a whole model they would be a second one
    reached = {name for name, tensor in now.items() if id(tensor) in leaves}
    if model.finder is not None:
        model.still = {n: t for n, t in model.initial.items() if is_head(n) and n.endswith(".bias") and len(t) == 2}
        reached -= model.still.keys()
    model.initial = {name: tensor for name, tensor in model.initial.items() if name in reached}
    model.parameters = {name: parameter for name, parameter in model.parameters.items() if name in reached}


def _leaves(value: torch.Tensor) -> set[int]:
    """The ids of the tensors that a value is a differentiable function of."""
    found, seen, waiting = set[int](), set[Any](), [value.grad_fn]
    while waiting:
        step: Any = waiting.pop()
        if step is None or step in seen:
            continue
        seen.add(step)
        if "AccumulateGrad" in step.name():
            found.add(id(step.variable))
        waiting += [before for before, _ in step.next_functions]
    return found


def learn_to_pack(model: Model) -> None:
    """Find the fastest way to call the model for many owners that equals its own calls for each; if there is none, say why in ``alone``.

    Two owners with different tensors (a big model's: :data:`APART` bytes of them at a time), texts of the trial length, a third of it and
    one token; logits and all layers' outputs, and with dropout if there is any.
    """
    each = 4 * sum(t.numel() for t in model.initial.values())
    if 2 * each > own_part(model.device) / 4:
        model.alone = f"what two devices train, {2 * each / 1e9:.1f} GB, is more than a quarter of the free memory"
        return
    generator = torch.Generator().manual_seed(0)
    fewest = 2 if model.speaker else max(0, model.pooled) + 1
    lengths = np.array([model.trial_length, max(fewest, model.trial_length // 3), fewest])
    ids = torch.randint(5, int(model.config.vocab_size), (int(lengths.sum()),), generator=generator).to(model.device)
    zero, one = torch.zeros_like(ids[:3]), torch.ones(3, device=model.device)
    keys = torch.tensor([3, 4], device=model.device) if model.dropout else None
    segments = torch.zeros_like(ids)
    if model.reads_many:
        segments[1::2] = 1
    asked = model.asking(ids.cpu().numpy(), segments.cpu().numpy(), lengths)
    texts = Texts(ids, segments, zero, one, lengths, np.array([0, 1, 1]), np.array([0, 0, 1]), keys, asked=asked)
    ways = [name for name in WAYS if not (name == "vmap" and model.recomputes)]
    groups, tried = _groups(model.initial), []
    only = _trial(model, texts, groups[0]) if len(groups) == 1 else None  # of several one is there at a time
    for name in ways:
        model._ways, model.together_by = {}, name
        try:
            error = max(_differs(model, texts, *(only or _trial(model, texts, apart))) for apart in groups)
        except (RuntimeError, TypeError, ValueError, IndexError, AttributeError, KeyError) as failed:
            tried.append(f"{name}: {type(failed).__name__}: {str(failed).splitlines()[0][:120]}")
            continue
        if error <= AGREE:
            return
        tried.append(f"{name}: results differ by {error:.2g}")
    if model.recomputes:
        tried.append("vmap: it keeps what is inside layers, which is to be computed again")
    model.together_by, model.alone = "", "; ".join(tried)


def _groups(tensors: Tensors) -> list[set[str]]:
    """The names in order, :data:`APART` bytes of tensors at a time, but one tensor at least."""
    groups: list[set[str]] = []
    size = APART
    for name, tensor in sorted(tensors.items()):
        size += tensor.nbytes
        if size > APART:
            groups.append(set())
            size = tensor.nbytes
        groups[-1].add(name)
    return groups


@torch.no_grad()
def _trial(model: Model, texts: Texts, apart: Collection[str]) -> tuple[Tensors, torch.Tensor]:
    """The tensors of two owners, who have those called ``apart`` of their own and the model's others; what the model says to each."""
    generator = torch.Generator().manual_seed(0)
    own = {name: t.to(model.device) for name, t in model.initial.items()}
    tensors = {name: _of_two(t, generator) if name in apart else t.expand(2, *t.shape) for name, t in own.items()}
    rows, said = padded(texts, model.causal, model.pad_id), []
    for owner, mine in ((0, slice(0, 1)), (1, slice(1, 3))):
        batch = Batch(rows[0][mine], rows[1][mine], rows[2][mine], texts.labels[mine], texts.weights[mine])
        with SeededDropout(texts.keys[owner], model.dropout, model.causal) if texts.keys is not None else nullcontext():
            logits, layers = model.forward({n: t[owner] for n, t in tensors.items()}, batch, torch.float32, layers=True)
        said.append(torch.cat([logits, *(model.read(h, batch) for h in layers)], 1))
    return tensors, torch.cat(said)


@torch.no_grad()
def _differs(model: Model, texts: Texts, tensors: Tensors, target: torch.Tensor) -> float:
    """How far the model's present way for many owners is from what it says to each, as a share of the greatest number of it (or of 1)."""
    logits, layers = model.together(tensors, texts, torch.float32, layers=True)
    return float((torch.cat([logits, *layers], 1) - target).abs().max()) / max(1.0, float(target.abs().max()))


def _of_two(tensor: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """(2, …) near ``tensor``, different for both owners, in the memory of one: the second's begins a number after the first's."""
    flat = torch.cat([tensor.reshape(-1), tensor.reshape(-1)[:1]])
    size = max(0.01, float(torch.linalg.vector_norm(flat, 1)) / len(flat))
    flat.add_(torch.randn(flat.shape, generator=generator).to(flat.device), alpha=0.1 * size)
    return flat.as_strided((2, *tensor.shape), (1, *torch.empty(tensor.shape, device="meta").stride()))
