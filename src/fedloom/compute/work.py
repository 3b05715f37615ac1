"""Work items: what a client asks its compute to do, described and not done.

An engine may do one client's items at a time (``serial.py``) or those of a whole cohort in one pass (``stacked.py``);
both give the same results within the tolerance stated in ``docs/engines.md``.

Shapes: P trainable scalars, n examples, C classes, D transformer layers. Tensors named in an item override the
model's own values; a trainable tensor that is not named keeps the model's initial value and is not trained. The frozen weights under
LoRA's pairs can be named as well (``base_layer``): the model then stands on these (:func:`grounded`), or trains them, if a Fit starts with
them.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field, replace
from typing import Literal

import numpy as np
import torch

from fedloom.data.examples import Examples
from fedloom.messages import Tensors
from fedloom.model.blocks import layer_of
from fedloom.model.names import is_beneath
from fedloom.tensors import same_names, without

Indices = np.ndarray
"""int64 positions into an item's ``examples``."""

Schedule = Literal["constant", "cosine"]

Penalty = Callable[[Tensors, Tensors], torch.Tensor]
"""(tensors now, anchor) -> scalar added to the mean loss of each step (FedProx and the like)."""

Through = Callable[[Tensors], dict[str, torch.Tensor]]
"""(what is trained and what is fixed) -> the model's tensors that they stand for. Differentiable, and the same with an axis of clients in
front of every tensor."""


@dataclass(frozen=True)
class LowRank:
    """GaLore's way with the matrices of layers (2403.03507, algorithm 2): Adam on the gradient in ``rank`` directions, found anew after
    ``every`` steps, and ``scale`` times what comes of it. ``compute/lowrank.py``.

    Raises:
        ValueError: a rank or a number of steps below 1, or a scale that is not positive.
    """

    rank: int
    every: int
    scale: float

    def __post_init__(self) -> None:
        if self.rank < 1 or self.every < 1 or not self.scale > 0:
            raise ValueError(
                f"rank {self.rank}, every {self.every}, scale {self.scale}: rank and every are 1 or more, the scale is positive"
            )


@dataclass(frozen=True)
class AdamW:
    """Decoupled weight-decay Adam (1711.05101) with the gradient's global 2-norm clipped to ``clip`` (0: not clipped).

    ``schedule``: the rate of all steps of a Fit is ``lr``, or falls from it to 0 along half a cosine (1608.03983, eq. 5).
    ``low_rank``: how the matrices of layers are trained in few directions; its moments are those of the directions.
    """

    lr: float
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-8
    weight_decay: float = 0.0
    clip: float = 1.0
    schedule: Schedule = "constant"
    low_rank: LowRank | None = None

    def rate(self, step: int, steps: int) -> float:
        """The learning rate of step 0..steps − 1: lr, or lr·(1 + cos(π·step/steps))/2."""
        return self.lr if self.schedule == "constant" else self.lr * (1 + math.cos(math.pi * step / steps)) / 2


@dataclass(frozen=True)
class Smoothing:
    """How the importance of single weights is watched while they are trained (AdaLoRA, 2303.10512): before each step

        I = |w·∂L/∂w|,   Ī <- β₁·Ī + (1 − β₁)·I,   Ū <- β₂·Ū + (1 − β₂)·|I − Ī|          both from 0

    with the gradient of all that is minimised, penalty included, before it is corrected, masked or clipped. Importance is Ī·Ū.
    """

    beta1: float
    beta2: float


@dataclass(frozen=True)
class Moments:
    """AdamW's state: first and second moments by tensor name, and the number of steps taken."""

    first: Tensors
    second: Tensors
    steps: int


@dataclass(frozen=True)
class Held:
    """A penalty: FedProx's (μ/2)·‖w − w_t‖² (1812.06127, eq. 2) over the ``names`` that were sent; what is a device's own has no w_t."""

    mu: float
    names: frozenset[str]

    def __call__(self, now: Tensors, anchor: Tensors) -> torch.Tensor:
        """The scalar that is added to a step's loss."""
        return self.mu / 2 * torch.stack([(now[name] - anchor[name]).square().sum() for name in now if name in self.names]).sum()

    def without(self, names: Collection[str]) -> Held | None:
        """The same with fewer names, or None where none is left."""
        left = self.names.difference(names)
        return replace(self, names=left) if left else None


@dataclass(frozen=True)
class Fit:
    """Train ``start`` on ``batches`` of ``examples``, one optimiser step a batch, in order.

    ``fixed`` tensors override the model's too and are not trained. ``mask`` holds 0/1 tensors broadcastable to the tensors they name: where
    it is 0 nothing moves. ``rows`` says of B's (d_out, r) of which only some output neurons are trained which these are, int64 (k,)
    ascending: ``start`` then holds these rows (k, r) and nothing else, and there is no state of the others. These are as in ``fixed``, if
    that names the tensor too (d_out, r); otherwise they are zero, and there is no product of theirs either.
    ``penalty`` is held against ``anchor``, or against ``start`` where none is given.
    ``correction`` is added to every step's gradient, before it is clipped (SCAFFOLD); tensors that it does not name have none.
    ``bias`` (C,) is added to the logits of every example before the loss, and is not trained.
    ``through`` makes the model's tensors of the trained and the fixed ones, where what is trained is no tensor of the model itself.
    ``watch``: with what smoothing each trained number's importance is watched.
    ``means``: the mean of all steps' gradients is told (:class:`Fitted`).
    ``skips`` are transformer layers, by number, that are left out: what comes into one goes out of it, around it.
    ``dropout_seed`` makes the dropout masks of the run; step i uses ``derive(dropout_seed, "dropout", i)``; none without
    ``dropout``, whatever the model's rate.

    Raises:
        ValueError: a tensor of a layer that is left out; an anchor that is not named and shaped as ``start``, or one without a penalty,
            which would do nothing; ``rows`` that are not as many as the start has, or together with a penalty, a mask of the same tensor
            or ``through``.
    """

    start: Tensors
    examples: Examples
    batches: Sequence[Indices]
    optimizer: AdamW
    mask: Tensors = field(default_factory=dict)
    penalty: Penalty | None = None
    moments: Moments | None = None
    fixed: Tensors = field(default_factory=dict)
    dropout_seed: int = 0
    anchor: Tensors | None = None
    bias: torch.Tensor | None = None
    rows: Tensors = field(default_factory=dict)
    correction: Tensors = field(default_factory=dict)
    through: Through | None = None
    watch: Smoothing | None = None
    means: bool = False
    skips: frozenset[int] = frozenset()
    dropout: bool = True

    def __post_init__(self) -> None:
        if self.skips and (of_none := [n for n in (*self.start, *self.fixed) if layer_of(n) in self.skips]):
            raise ValueError(f"a Fit leaves the layers {sorted(self.skips)} out and names '{of_none[0]}'; it can have no tensor of them")
        if self.optimizer.low_rank is not None and (self.mask or self.rows or self.moments is not None):
            raise ValueError("a Fit in few directions trains whole tensors from no moments; it takes no mask, no rows and no moments")
        for name, added in self.correction.items():
            if name not in self.start or added.shape != self.start[name].shape:
                had = f"{tuple(self.start[name].shape)}" if name in self.start else "no tensor of that name"
                raise ValueError(f"a Fit's correction of '{name}' is {tuple(added.shape)} and its start has {had}; they must be alike")
        if self.through is not None and self.rows:
            raise ValueError(f"a Fit of some rows of '{min(self.rows)}' trains the model's own tensors; it takes no 'through'")
        for name, rows in self.rows.items():
            if name not in self.start or len(rows) != len(self.start[name]) or name in self.mask or self.penalty is not None:
                had = f"{len(self.start[name])} rows" if name in self.start else "none"
                raise ValueError(
                    f"a Fit of some rows of '{name}' starts with exactly these, has no mask of it and no penalty; "
                    f"it names {len(rows)} rows, its start has {had}"
                )
        if self.anchor is None:
            return
        if self.penalty is None:
            raise ValueError("a Fit has an anchor and no penalty to hold against it; give a penalty, or leave the anchor out")
        same_names(self.start, self.anchor)

    @property
    def reached(self) -> frozenset[str]:
        """The model's tensors that the loss is differentiated by."""
        if self.through is None:
            return frozenset(self.start)
        with torch.enable_grad():
            made = self.through({**self.fixed, **{n: t.detach().clone().requires_grad_(True) for n, t in self.start.items()}})
        return frozenset(n for n, t in made.items() if t.requires_grad)


@dataclass(frozen=True)
class Fitted:
    """What :class:`Fit` made: the trained tensors, the mean loss of each step (before it), AdamW's state; of each number its importance, if
    that was watched (:class:`Smoothing`); and the mean over the steps of the gradient of all that is minimised, penalty included, before it
    is corrected, masked or clipped, if that was asked for (``means``). All named and shaped as the tensors."""

    tensors: dict[str, torch.Tensor]
    losses: np.ndarray
    moments: Moments
    importance: dict[str, torch.Tensor] = field(default_factory=dict)
    gradient: dict[str, torch.Tensor] = field(default_factory=dict)

    @property
    def loss(self) -> float:
        """The mean of all steps' losses."""
        return float(self.losses.mean())


@dataclass(frozen=True)
class Score:
    """Per-example squared gradient norm ‖∇_P ℓ(s_i)‖² over the tensors ``at`` whose names are in ``over`` (all if None).

    float32, dropout off. Result: float64 (n,).
    """

    at: Tensors
    examples: Examples
    over: frozenset[str] | None = None


@dataclass(frozen=True)
class Fisher:
    """Diagonal empirical Fisher at ``at``: the mean over all examples of the squared per-example gradient, true labels.

    float32, dropout off. Result: tensors named and shaped as those of ``at`` whose names are in ``over`` (all if None).
    """

    at: Tensors
    examples: Examples
    over: frozenset[str] | None = None


Norm = Literal["difference", "norms"]


@dataclass(frozen=True)
class Sensitivity:
    """How far each transformer layer's output moves when the input embeddings move to the worst case in a ball.

    With E the input embeddings of one batch and g = ∂L/∂E, E' = E + ρ_E·g/‖g‖_F; H_l is layer l's output at the pooled position.
    ``norm="difference"``: s_l = ‖H'_l − H_l‖_F / ‖H_l‖_F, and ρ_E = rho·‖E‖_F.
    ``norm="norms"``: s_l = |‖H'_l‖_F − ‖H_l‖_F| / ‖H_l‖_F, and ρ_E = rho.
    E and g cover real tokens only; padding is left alone. float32, dropout off. Result: float64 (D,).
    """

    at: Tensors
    examples: Examples
    batch: Indices
    rho: float = 0.5
    norm: Norm = "difference"


@dataclass(frozen=True)
class Spectrum:
    """The spectral density of the Hessian H of one batch's mean loss over the tensors ``at`` whose names are in ``over`` (all if None), and
    the Lipschitz estimate of Δ ↦ HΔ − ∇F(P + Δ); ``compute/spectrum.py`` says how. float32, dropout off. Result: :class:`Spectral`.

    ``steps`` Lanczos steps for each of ``probes`` starts, which are derived from ``seed``. ``radius``: ‖Δ‖ over ‖P‖.
    """

    at: Tensors
    examples: Examples
    batch: Indices
    over: frozenset[str] | None = None
    probes: int = 1
    steps: int = 32
    radius: float = 0.05
    seed: int = 0


@dataclass(frozen=True)
class Spectral:
    """What :class:`Spectrum` found: nodes (ascending) and weights (sum 1) of the density, float64 (m,), and the Lipschitz estimate ℒ."""

    nodes: np.ndarray
    weights: np.ndarray
    lipschitz: float


@dataclass(frozen=True)
class Predict:
    """Logits of all ``examples`` at the tensors ``at``. Result: float32 tensor (n, C) of a classifier; of any other model (n, W), what it
    keeps of each example (``Model.width``): of one that writes answers (n, 3), the sum of −log softmax over an answer's tokens, how many of
    them were the likeliest, and how many there are.

    ``measures``: this only finds out how good a model is and is no part of what a method does, so it is in no book of costs."""

    at: Tensors
    examples: Examples
    measures: bool = False


@dataclass(frozen=True)
class Pretrained:
    """The frozen weights under LoRA's pairs as the model came, which every device has. Result: float32 (d_out, d_in), by saved name."""


@dataclass(frozen=True)
class Initial:
    """The trainable tensors at the model's start, which every device makes for itself. Result: by saved name."""


WorkItem = Fit | Score | Fisher | Sensitivity | Spectrum | Predict | Pretrained | Initial


def grounded(item: WorkItem) -> tuple[WorkItem, dict[str, torch.Tensor]]:
    """The item without the weights under LoRA's pairs that it names and does not train, and those: what its model stands on. Where a Score,
    Fisher or Spectrum is over any of them, they are what is trained, and stay."""
    if isinstance(item, Pretrained | Initial):
        return item, {}
    held = item.fixed if isinstance(item, Fit) else item.at
    weights = {name: tensor for name, tensor in held.items() if is_beneath(name)}
    over = item.over if isinstance(item, Score | Fisher | Spectrum) else None
    if not weights or (over and not over.isdisjoint(weights)):
        return item, {}
    rest = without(held, weights)
    return (replace(item, fixed=rest) if isinstance(item, Fit) else replace(item, at=rest)), weights
