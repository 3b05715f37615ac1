"""The packed kernels against the same thing written out text by text and owner by owner, and their gradients against autograd's."""

from __future__ import annotations

import gc
import weakref

import numpy as np
import pytest
import torch
from torch import nn

from fedloom.model.kernels import Attention, Frozen, Owners, onednn, owned_linear, ragged_attention

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


def test_owners_are_grouped_by_widths_that_depend_on_their_own_rows_alone() -> None:
    owners = Owners(np.array([4, 100, 0, 12, 97, 8, 130]), 360, CPU)
    assert [group.tolist() for group in owners.groups] == [[0, 5], [3], [1, 4], [6]]
    assert [tuple(rows.shape) for rows in owners.side.rows] == [(2, 8), (1, 16), (2, 128), (1, 192)]
    for rows in range(1, 400):
        (only,) = Owners(np.array([rows]), rows, CPU).side.rows
        assert only.shape[1] % 8 == 0
        assert rows <= only.shape[1] <= max(8, 1.5 * rows if rows >= 16 else 16)


@pytest.mark.parametrize("rows", [[4, 4, 0, 12], [1, 1, 1], [7], [3, 3, 3, 2], [0, 0, 40, 9]])
@pytest.mark.parametrize("nobodys", [0, 3])
@pytest.mark.parametrize("biased", [True, False])
@pytest.mark.parametrize("outs", [1, 3, 70])
def test_every_row_meets_its_owners_weight(rows: list[int], nobodys: int, biased: bool, outs: int) -> None:
    generator = torch.Generator().manual_seed(3)
    owned = sum(rows)
    x = torch.randn(owned + nobodys, 5, generator=generator, requires_grad=True)
    weight = torch.randn(len(rows), outs, 5, generator=generator, requires_grad=True)
    bias = torch.randn(len(rows), outs, generator=generator, requires_grad=True) if biased else None
    of = torch.arange(len(rows)).repeat_interleave(torch.tensor(rows))
    made = owned_linear(x, weight, bias, Owners(np.array(rows), owned + nobodys, CPU))
    assert not made[owned:].any()
    wanted = torch.einsum("ni,noi->no", x[:owned], weight[of]) + (bias[of] if bias is not None else 0)
    assert torch.allclose(made[:owned], wanted, atol=1e-6)
    leaves = [x, weight] + ([bias] if bias is not None else [])
    upstream = torch.randn(made.shape, generator=generator)
    mine = torch.autograd.grad((made * upstream).sum(), leaves)
    for got, due in zip(mine, torch.autograd.grad((wanted * upstream[:owned]).sum(), leaves), strict=True):
        assert torch.allclose(got, due, atol=5e-6)


def test_layers_that_share_their_input_share_its_blocks_until_it_changes() -> None:
    owners, x = Owners(np.array([2, 3]), 5, CPU), torch.arange(10.0).view(5, 2)
    first = owners.blocks(x)
    assert owners.blocks(x.view(5, 2)) is first
    x += 1
    (changed,) = owners.blocks(x)
    assert torch.equal(changed[1, :3], x[2:])
    assert owners.blocks(torch.zeros(5, 2))[0].any().item() is False


def test_a_pass_that_is_over_holds_nothing() -> None:
    """The blocks that are kept for the next layer are of an input whose graph holds this very layout."""
    gc.disable()
    try:
        owners = Owners(np.array([2, 3]), 5, CPU)
        over = weakref.ref(owners)
        x, weight = torch.randn(5, 4, requires_grad=True), torch.randn(2, 4, 4, requires_grad=True)
        made = owned_linear(owned_linear(x, weight, None, owners), weight, None, owners)
        made.sum().backward()
        del made, owners
        assert over() is None
    finally:
        gc.enable()


@pytest.mark.parametrize(("outs", "ins"), [(o, i) for o in (1, 2, 3, 6, 8, 384) for i in (2, 3, 8, 12, 384) if max(o, i) >= 8])
def test_an_owners_rows_come_out_the_same_in_any_company(outs: int, ins: int) -> None:
    """To the bit, values and gradients: alone and among others, wherever in memory the weights begin. (Not where both numbers are below 8:
    there it counts where each factor begins. No layer is that small.)"""
    generator, count = torch.Generator().manual_seed(4), 5
    for rows in (1, 2, 13, 96):
        x, upstream = torch.randn(count * rows, ins, generator=generator), torch.randn(count * rows, outs, generator=generator)
        kept = torch.randn(count, outs * ins + 7, generator=generator)  # a row of the clients' matrix: other tensors lie before and after

        def of(
            low: int, high: int, rows: int = rows, x: torch.Tensor = x, up: torch.Tensor = upstream, kept: torch.Tensor = kept
        ) -> list[torch.Tensor]:
            """Values and both gradients of the owners from ``low`` to ``high``."""
            at = slice(low * rows, high * rows)
            leaf, weight = x[at].clone().requires_grad_(True), kept[low:high].clone().requires_grad_(True)
            parts = weight[:, 3 : 3 + outs * ins].view(-1, outs, ins)
            made = owned_linear(leaf, parts, None, Owners(np.full(high - low, rows), (high - low) * rows, CPU))
            return [
                made.detach().view(-1, rows, outs),
                *(g.view(high - low, -1) for g in torch.autograd.grad(made, [leaf, weight], up[at])),
            ]

        together = of(0, count)
        for low, high in ((0, 1), (1, 2), (1, 3), (0, 4)):
            for alone, among in zip(of(low, high), together, strict=True):
                assert torch.equal(alone, among[low:high].view_as(alone))


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
