"""Dropout masks are a function of key, site and position: of nothing else."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.func import vmap
from torch.nn import functional

from fedloom.model.dropout import SeededDropout, keep_mask


def mask(key: int = 5, site: int = 0, shape: tuple[int, ...] = (2, 6, 4), rate: float = 0.3, from_end: bool = False) -> torch.Tensor:
    return keep_mask(torch.tensor(key), site, torch.Size(shape), rate, from_end)


@pytest.mark.parametrize("rate", [0.05, 0.1, 0.3, 0.5, 0.9])
@pytest.mark.parametrize("from_end", [False, True])
def test_kept_with_probability_one_minus_rate(rate: float, from_end: bool) -> None:
    shares = torch.stack([mask(key, 1, (16, 20, 30), rate, from_end).float().mean() for key in range(8)])
    sigma = (rate * (1 - rate) / (16 * 20 * 30)) ** 0.5
    assert (shares - (1 - rate)).abs().max() < 4.5 * sigma


def test_neighbours_sites_and_keys_are_uncorrelated() -> None:
    def centred(made: torch.Tensor) -> torch.Tensor:
        return made.double() - 0.5

    one = centred(mask(1, 0, (64, 32, 32), 0.5))
    limit = 5 / (64 * 31 * 31) ** 0.5 / 4
    for other in (centred(mask(1, 1, (64, 32, 32), 0.5)), centred(mask(2, 0, (64, 32, 32), 0.5))):
        assert (one * other).mean().abs() < limit
    for shifted in (one[1:] * one[:-1], one[:, 1:] * one[:, :-1], one[:, :, 1:] * one[:, :, :-1], one[:, 1:, 1:] * one[:, :-1, :-1]):
        assert shifted.mean().abs() < limit


def test_another_key_site_or_dimension_is_another_mask() -> None:
    masks = [mask(), mask(key=6), mask(site=1), mask(shape=(2, 4, 6)).transpose(1, 2), mask(shape=(6, 2, 4)).transpose(0, 1)]
    assert all(not torch.equal(a, b) for i, a in enumerate(masks) for b in masks[:i])
    assert torch.equal(mask(), mask())


def test_padding_on_the_right_moves_nothing() -> None:
    assert torch.equal(mask(shape=(2, 9, 4))[:, :6], mask(shape=(2, 6, 4)))
    assert torch.equal(mask(shape=(2, 3, 9, 9))[:, :, :6, :6], mask(shape=(2, 3, 6, 6)))


def test_padding_on_the_left_moves_nothing() -> None:
    assert torch.equal(mask(shape=(2, 9, 4), from_end=True)[:, 3:], mask(shape=(2, 6, 4), from_end=True))
    assert torch.equal(mask(shape=(2, 3, 9, 9), from_end=True)[:, :, 3:, 3:], mask(shape=(2, 3, 6, 6), from_end=True))


def test_more_rows_move_nothing() -> None:
    for from_end in (False, True):
        assert torch.equal(mask(shape=(5, 6, 4), from_end=from_end)[:2], mask(shape=(2, 6, 4), from_end=from_end))


def test_a_stack_has_the_masks_of_its_members() -> None:
    keys = torch.tensor([3, 2**31 - 1, 0])
    stacked = vmap(lambda key: keep_mask(key, 2, torch.Size((2, 6, 4)), 0.3, True))(keys)
    assert torch.equal(stacked, torch.stack([mask(int(k), 2, from_end=True) for k in keys]))


def test_very_many_sites() -> None:
    shares = [mask(2**31 - 1, site, (8, 40), 0.5).float().mean() for site in (0, 329, 330, 331, 5000)]
    assert all(0.35 < share < 0.65 for share in shares)


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Dropout(0.9)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return functional.dropout(self.inner(x), 0.5, False) + torch.nn.functional.dropout(input=x, p=0.1)


def test_the_mode_replaces_every_site_by_rate_key_and_number() -> None:
    net, x = Net().eval(), torch.ones(2, 5)
    with SeededDropout(torch.tensor(9), 0.25, False):
        made = net(x)
    sites = [mask(9, i, (2, 5), 0.25).float() / 0.75 for i in range(3)]
    assert torch.allclose(made, sites[0] * sites[1] + sites[2])


def test_the_mean_is_preserved_and_gradients_follow_the_mask() -> None:
    x = torch.ones(200, 100, requires_grad=True)
    with SeededDropout(torch.tensor(1), 0.4, False):
        y = functional.dropout(x, 0.4)
    y.sum().backward()
    assert float(y.detach().mean()) == pytest.approx(1.0, abs=0.02)
    assert x.grad is not None
    assert torch.equal(x.grad > 0, mask(1, 0, (200, 100), 0.4))


def test_the_dtype_stays() -> None:
    with SeededDropout(torch.tensor(1), 0.4, False):
        assert functional.dropout(torch.ones(3, dtype=torch.bfloat16), 0.1).dtype == torch.bfloat16
