"""The packed kernels against the same thing written out text by text and owner by owner, and their gradients against autograd's."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn

from fedloom.model.kernels import Attention, Frozen, Run, onednn, owned_linear, ragged_attention, runs_of

LENGTHS = np.array([3, 8, 1, 17, 9, 5])
CPU = torch.device("cpu")


def written_out(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float, causal: bool, window: int, only: str) -> torch.Tensor:
    """Attention text by text; ``only`` as for :class:`Attention`."""
    outs, at, ask = [], 0, 0
    for length in LENGTHS:
        keys, values = (x[at : at + length].repeat_interleave(q.shape[1] // k.shape[1], 1).transpose(0, 1) for x in (k, v))
        places = {"all": torch.arange(length), "first": torch.tensor([0]), "last": torch.tensor([length - 1])}[only]
        asks = q[ask : ask + len(places)].transpose(0, 1)
        far = places[:, None] - torch.arange(length)[None, :]
        hidden = torch.zeros_like(far, dtype=torch.bool) | ((far < 0) if causal else False) | ((far.abs() >= window) if window else False)
        scores = (scale * asks @ keys.transpose(1, 2)).masked_fill(hidden, -torch.inf)
        outs.append((scores.softmax(-1) @ values).transpose(0, 1))
        at, ask = at + int(length), ask + len(places)
    return torch.cat(outs)


@pytest.mark.parametrize("only", ["all", "first", "last"])
@pytest.mark.parametrize(("heads", "shared"), [(4, 4), (4, 2), (4, 1)])
@pytest.mark.parametrize(("causal", "window"), [(False, 0), (True, 0), (False, 3), (True, 4)])
def test_attention_stays_within_a_text(only: str, heads: int, shared: int, causal: bool, window: int) -> None:
    generator = torch.Generator().manual_seed(1)
    asks = int(LENGTHS.sum()) if only == "all" else len(LENGTHS)
    q = torch.randn(asks, heads, 5, generator=generator, requires_grad=True)
    k, v = (torch.randn(int(LENGTHS.sum()), shared, 5, generator=generator, requires_grad=True) for _ in "kv")
    within = Attention(LENGTHS, CPU, only)  # type: ignore[arg-type]
    made = ragged_attention(q, k, v, within, within.masks(torch.float32, heads, causal, window), 0.3)
    wanted = written_out(q, k, v, 0.3, causal, window, only)
    assert torch.allclose(made, wanted, atol=1e-6)
    upstream = torch.randn(made.shape, generator=generator)
    for mine, theirs in zip(*(torch.autograd.grad((x * upstream).sum(), (q, k, v)) for x in (made, wanted)), strict=True):
        assert torch.allclose(mine, theirs, atol=2e-6)


def test_dropped_attention_weights_carry_no_gradient() -> None:
    generator = torch.Generator().manual_seed(2)
    lengths = np.array([3, 2])
    q, k, v = (torch.randn(5, 2, 4, generator=generator, requires_grad=True) for _ in "qkv")
    within = Attention(lengths, CPU)
    dropped = [(torch.rand(4, 8, 8, generator=generator) > 0.4).float() * 2]
    made = ragged_attention(q, k, v, within, within.masks(torch.float32, 2, False, 0), 1.0, dropped)
    outs = []
    for text, rows in enumerate((slice(0, 3), slice(3, 5))):
        n = int(lengths[text])
        weights = (q[rows].transpose(0, 1) @ k[rows].transpose(0, 1).transpose(1, 2)).softmax(-1) * dropped[0][
            2 * text : 2 * text + 2, :n, :n
        ]
        outs.append((weights @ v[rows].transpose(0, 1)).transpose(0, 1))
    wanted = torch.cat(outs)
    assert torch.allclose(made, wanted, atol=1e-6)
    for mine, theirs in zip(*(torch.autograd.grad(x.square().sum(), (q, k, v)) for x in (made, wanted)), strict=True):
        assert torch.allclose(mine, theirs, atol=2e-6)


def test_runs_are_neighbours_with_as_many_rows() -> None:
    assert runs_of(np.array([4, 4, 0, 12, 1, 1, 1])) == [Run(2, 4), Run(1, 0), Run(1, 12), Run(3, 1)]
    assert runs_of(np.array([5])) == [Run(1, 5)]


@pytest.mark.parametrize("rows", [[4, 4, 0, 12], [1, 1, 1], [7], [3, 3, 3, 2]])
@pytest.mark.parametrize("biased", [True, False])
def test_every_row_meets_its_owners_weight(rows: list[int], biased: bool) -> None:
    generator = torch.Generator().manual_seed(3)
    x = torch.randn(sum(rows), 5, generator=generator, requires_grad=True)
    weight = torch.randn(len(rows), 3, 5, generator=generator, requires_grad=True)
    bias = torch.randn(len(rows), 3, generator=generator, requires_grad=True) if biased else None
    owners = torch.arange(len(rows)).repeat_interleave(torch.tensor(rows))
    made = owned_linear(x, weight, bias, runs_of(np.array(rows)))
    wanted = torch.einsum("ni,noi->no", x, weight[owners]) + (bias[owners] if bias is not None else 0)
    assert torch.allclose(made, wanted, atol=1e-6)
    leaves = [x, weight] + ([bias] if bias is not None else [])
    upstream = torch.randn(made.shape, generator=generator)
    for mine, theirs in zip(*(torch.autograd.grad((y * upstream).sum(), leaves) for y in (made, wanted)), strict=True):
        assert torch.allclose(mine, theirs, atol=2e-6)


def test_an_owners_rows_come_out_the_same_in_any_company() -> None:
    """To the bit: alone, and among others with as many rows or with others."""
    generator = torch.Generator().manual_seed(4)
    for rows in (1, 2, 13):
        x, weight = torch.randn(130 * rows, 384, generator=generator), torch.randn(130, 8, 384, generator=generator)
        together = owned_linear(x, weight, None, runs_of(np.full(130, rows)))
        for first in (0, 7):
            alone = owned_linear(x[first * rows : (first + 1) * rows], weight[first : first + 1], None, runs_of(np.array([rows])))
            assert torch.equal(alone, together[first * rows : (first + 1) * rows])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_frozen_weights(dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(5)
    layer = nn.Linear(48, 24).to(dtype).requires_grad_(False)
    if not onednn(layer.weight):
        pytest.skip("this processor's oneDNN does not compute in this precision")
    x = torch.randn(50, 48, generator=generator).to(dtype).requires_grad_(True)
    made, wanted = Frozen(layer.weight)(x, layer.bias), layer(x)
    tolerance = 1e-5 if dtype is torch.float32 else 0.05
    assert torch.allclose(made, wanted, atol=tolerance)
    upstream = torch.randn(made.shape, generator=generator).to(dtype)
    mine, theirs = (torch.autograd.grad((y * upstream).sum(), x)[0] for y in (made, wanted))
    assert torch.allclose(mine, theirs, atol=4 * tolerance)
    for rows in (1, 2, 13):
        assert torch.equal(Frozen(layer.weight)(x[:rows], layer.bias), made[:rows])


def test_what_onednn_takes() -> None:
    assert not onednn(torch.zeros(2, 2, dtype=torch.float64)) and not onednn(torch.zeros(2, 2, device="meta"))
