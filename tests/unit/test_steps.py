"""A step of AdamW and a norm, some columns at a time: against PyTorch's own optimiser, and to the bit whoever else is there."""

from __future__ import annotations

import pytest
import torch

from fedloom.compute import steps
from fedloom.compute.work import AdamW


def drawn(rows: int, columns: int, seed: int = 0) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(rows, columns, generator=generator) for _ in range(4)]


@pytest.mark.parametrize("columns", [1, 63, 64, 65, 200])
@pytest.mark.parametrize("schedule", ["constant", "cosine"])
def test_steps_in_parts_are_those_of_pytorchs_adamw(columns: int, schedule: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Three clients that are at their 1st, 2nd and 5th step; parts of 64 columns and what is left."""
    monkeypatch.setattr(steps, "NUMBERS", 3 * 64)
    o, (now, *gradients) = AdamW(0.01, weight_decay=0.1, schedule=schedule), drawn(3, columns)  # type: ignore[arg-type]
    rates = torch.tensor([[0.01], [0.004], [0.02]]) if schedule == "cosine" else torch.full((3, 1), 0.01)
    first, second, taken = torch.zeros_like(now), torch.zeros_like(now), torch.zeros(3)
    due = [row.clone().requires_grad_() for row in now]
    theirs = [torch.optim.AdamW([row], lr=float(rate), weight_decay=0.1) for row, rate in zip(due, rates, strict=True)]
    for gradient in gradients:
        taken += 1
        steps.advance(now, gradient.clone(), first, second, taken, o, rates if schedule == "cosine" else None)
        for row, mine, optimizer in zip(due, gradient, theirs, strict=True):
            row.grad = mine.clone()
            optimizer.step()
    torch.testing.assert_close(now, torch.stack([row.detach() for row in due]), atol=1e-6, rtol=1e-5)


def test_what_the_mask_holds_stays() -> None:
    now, gradient, *_ = drawn(2, 100)
    mask, before = torch.arange(200).view(2, 100) % 3, now.clone()
    steps.advance(now, gradient, torch.zeros(2, 100), torch.zeros(2, 100), torch.ones(2), AdamW(0.1, weight_decay=0.5), None, mask)
    assert torch.equal(now == before, mask == 0)


@pytest.mark.parametrize("columns", [10, 100_000, 300_001])
def test_a_row_is_the_same_to_the_bit_whoever_is_there(columns: int) -> None:
    """Alone, where parts are longer than beside 40 others; and its norm is the plain one."""
    rows = [torch.cat([one, more]) for one, more in zip(drawn(1, columns, 1), drawn(40, columns, 2), strict=True)]
    second = rows[3].abs()
    o, beside, alone = AdamW(0.01), [t.clone() for t in (*rows[:3], second)], [t[:1].clone() for t in (*rows[:3], second)]
    for now, gradient, m, v in (beside, alone):
        steps.advance(now, gradient, m, v, torch.full((len(now),), 3.0), o)
    assert all(torch.equal(a[:1], b) for a, b in zip(beside, alone, strict=True))
    assert not torch.equal(beside[0][:1], rows[0][:1])
    assert torch.equal(steps.norms(rows[1])[:1], steps.norms(rows[1][:1]))
    torch.testing.assert_close(steps.norms(rows[1]), rows[1].double().norm(dim=1, keepdim=True).float(), atol=0, rtol=1e-6)
