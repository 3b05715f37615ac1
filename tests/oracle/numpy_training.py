"""Local training and averaging in NumPy float64: what every federated method's derivation needs and none owns."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

import numpy as np

from tests.oracle.numpy_encoder import Encoder, Example, Tensors, pad

Indices = Sequence[int] | np.ndarray
"""Positions into a device's examples."""


@dataclass(frozen=True)
class AdamW:
    """ "AdamW, constant lr, weight decay 0, clip 1.0": decoupled decay (1711.05101); clip 0 means none."""

    lr: float
    beta1: float = 0.9
    beta2: float = 0.999
    eps: float = 1e-8
    weight_decay: float = 0.0
    clip: float = 1.0
    cosine: bool = False


NOISE = 5e-8
"""What rounding leaves of a gradient in float32, whose forward pass has numbers near 1: of one that is smaller not even the sign is known,
and by its sign alone Adam's first step goes."""


def clip_to(gradients: Tensors, limit: float) -> dict[str, np.ndarray]:
    """The gradients, scaled so that their 2-norm all together is at most ``limit``. Exactly limit/norm, nothing added."""
    norm = math.sqrt(sum(float((g**2).sum()) for g in gradients.values()))
    factor = limit / norm if limit and norm > limit else 1.0
    return {name: factor * g for name, g in gradients.items()}


def adamw_step(
    w: np.ndarray, g: np.ndarray, first: np.ndarray, second: np.ndarray, step: int, rule: AdamW
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """w, m, v after step number ``step`` (from 1): m̂ = m/(1−β₁^t), v̂ = v/(1−β₂^t), w ← w(1 − lr·λ) − lr·m̂/(√v̂ + eps)."""
    first = rule.beta1 * first + (1 - rule.beta1) * g
    second = rule.beta2 * second + (1 - rule.beta2) * g**2
    move = first / (1 - rule.beta1**step) / (np.sqrt(second / (1 - rule.beta2**step)) + rule.eps)
    return w * (1 - rule.lr * rule.weight_decay) - rule.lr * move, first, second


def train(
    encoder: Encoder,
    tensors: Tensors,
    names: Iterable[str],
    examples: Sequence[Example],
    batches: Sequence[Indices],
    rule: AdamW,
    masks: Tensors | None = None,
    pull: float = 0.0,
    towards: Tensors | None = None,
    offset: float | np.ndarray = 0.0,
    undecided: dict[str, np.ndarray] | None = None,
) -> tuple[dict[str, np.ndarray], list[float]]:
    """All ``tensors`` after one step a batch on those called ``names``, and the loss before each step.

    With ``towards`` each step's loss has (pull/2)·‖now − towards‖² added; the losses told are without.
    ``offset`` (C,) is added to the logits. ``undecided`` is told which scalars' first gradient is not 0 and yet below :data:`NOISE`.
    """
    # "fresh optimiser each participation"
    now, masks, losses = dict(tensors), masks or {}, []
    trained = sorted(names)
    first, second = ({n: np.zeros_like(now[n]) for n in trained} for _ in range(2))
    for step, batch in enumerate(batches, start=1):
        # "cosine within a turn": SGDR's eq. 5 with η_min = 0, T_cur counted from 0
        now_rule = replace(rule, lr=rule.lr * (1 + math.cos(math.pi * (step - 1) / len(batches))) / 2) if rule.cosine else rule
        chosen = pad([examples[i] for i in batch])
        back = encoder.backward(now, chosen, offset=offset)
        losses.append(back.loss)
        # "Masked-out rows of B get no update". Read as: their gradient is gone before the norm is taken for clipping.
        pulled = {n: back.tensors[n].mean(0) + (pull * (now[n] - towards[n]) if towards else 0.0) for n in trained}
        masked = {n: pulled[n] * masks.get(n, 1.0) for n in trained}
        for n, g in clip_to(masked, rule.clip).items():
            if undecided is not None and step == 1:
                undecided[n] = undecided.get(n, np.zeros(g.shape, bool)) | ((g != 0) & (np.abs(g) < NOISE))
            moved, first[n], second[n] = adamw_step(now[n], g, first[n], second[n], step, now_rule)
            now[n] = np.where(masks.get(n, 1.0) == 1.0, moved, now[n])
    return now, losses


def payload(tensors: Tensors, names: Iterable[str]) -> int:
    """Bytes of the tensors alone, in float32."""
    return sum(4 * tensors[name].size for name in names)


def aggregate(updates: Sequence[Tensors], sizes: Sequence[int]) -> dict[str, np.ndarray]:
    # "the server averages with p_k": p_k = n_k / Σ_{j∈S_t} n_j
    total = sum(sizes)
    return {n: sum((s / total * u[n] for u, s in zip(updates, sizes, strict=True)), np.zeros(1)) for n in updates[0]}
