"""AdamW (1711.05101) of many clients at once: matrices (S, P) with a row a client, some columns at a time.

    m <- β₁·m + (1 − β₁)·g        v <- β₂·v + (1 − β₂)·g²
    w <- (1 − η·λ)·w − η·(m/(1 − β₁ᵗ)) / (√(v/(1 − β₂ᵗ)) + ε)            t, and η where it falls along a schedule, are each client's own

Every number's step is its own, so that parts change nothing of it; what is made on the way then stays in the processor's cache, and is no
memory that the system has to find and clear anew. On 3 × 22.7 million numbers a step takes a third of the time, a norm a sixth.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch

from fedloom.compute.work import AdamW

NUMBERS = 2**17
"""Numbers of a part, of all rows together."""

LONG = 2**16
"""Columns of a part by which norms are taken, however many rows there are: so a row's norm does not depend on its neighbours."""


def norms(matrix: torch.Tensor) -> torch.Tensor:
    """The 2-norm of every row, summed in float64; float32 (S, 1)."""
    total = torch.zeros(len(matrix), 1, dtype=torch.float64, device=matrix.device)
    for part in _parts(matrix, LONG):
        total += torch.linalg.vector_norm(matrix[:, part], dim=1, keepdim=True, dtype=torch.float64).square()
    return total.sqrt().float()


def advance(
    now: torch.Tensor,
    gradient: torch.Tensor,
    first: torch.Tensor,
    second: torch.Tensor,
    steps: torch.Tensor,
    o: AdamW,
    rate: torch.Tensor | None = None,
    mask: torch.Tensor | None = None,
) -> None:
    """Take a step in place, of w (``now``), m (``first``) and v (``second``), all (S, P). ``steps`` (S,): t, this one counted. ``rate``
    (S, 1): η, where it is not ``o.lr``. ``mask`` (S, P): what is 0 in it stays where it is."""
    for at in _parts(now, max(1, NUMBERS // max(1, len(now)))):
        step = direction(gradient[:, at], first[:, at], second[:, at], steps, o)
        move(now[:, at], step, o, rate, None if mask is None else mask[:, at])


def direction(gradient: torch.Tensor, first: torch.Tensor, second: torch.Tensor, steps: torch.Tensor, o: AdamW) -> torch.Tensor:
    """m and v in place, and what they say: the step before its rate, (S, P)."""
    first.mul_(o.betas[0]).add_(gradient, alpha=1 - o.betas[0])
    second.mul_(o.betas[1]).addcmul_(gradient, gradient, value=1 - o.betas[1])
    unbias = [1 - beta ** steps[:, None] for beta in o.betas]
    scale = (second / unbias[1]).sqrt_().add_(o.eps)
    return (first / unbias[0]).div_(scale)


def move(now: torch.Tensor, step: torch.Tensor, o: AdamW, rate: torch.Tensor | None, mask: torch.Tensor | None) -> None:
    """w in place, by a step that :func:`direction` told."""
    if rate is None:
        moved = (now * (1 - o.lr * o.weight_decay)).sub_(step, alpha=o.lr)
    else:
        moved = (now * (1 - rate * o.weight_decay)).sub_(step * rate)
    now.copy_(moved if mask is None else torch.where(mask > 0, moved, now))


def _parts(matrix: torch.Tensor, columns: int) -> Iterator[slice]:
    """So many columns at a time; on a GPU all at once."""
    width = matrix.shape[1] if matrix.is_cuda else columns
    return (slice(at, at + width) for at in range(0, matrix.shape[1], max(1, width)))
