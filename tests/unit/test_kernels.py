"""The packed kernels against the same thing written out text by text and owner by owner, and their gradients against autograd's; each as
loops in C (skipped visibly where there is no compiler) and as PyTorch operations."""

from __future__ import annotations

import gc
import weakref

import numpy as np
import pytest
import torch
from torch import nn

from fedloom.model import kernels
from fedloom.model.kernels import Frozen, computes_bf16, gelu, owned_linear, packable, ragged_attention
from fedloom.model.layout import Attention, Owners, RowsKept
from fedloom.native.library import why_not

LENGTHS = np.array([3, 8, 1, 17, 9, 5])
CPU = torch.device("cpu")


@pytest.fixture(params=["native", "plain"])
def either(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Both ways of a kernel."""
    if request.param == "plain":
        monkeypatch.setattr(kernels, "takes", lambda *tensors: False)
    elif why_not():
        pytest.skip(why_not())
    return request.param


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
def test_attention_stays_within_a_text(either: str, only: str, heads: int, shared: int, causal: bool, window: int) -> None:
    generator = torch.Generator().manual_seed(1)
    asks = int(LENGTHS.sum()) if only == "all" else len(LENGTHS)
    q = torch.randn(asks, heads, 5, generator=generator, requires_grad=True)
    k, v = (torch.randn(int(LENGTHS.sum()), shared, 5, generator=generator, requires_grad=True) for _ in "kv")
    within = Attention(LENGTHS, CPU, only)  # type: ignore[arg-type]
    made = ragged_attention(q, k, v, within, 0.3, causal, window)
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
    made = ragged_attention(q, k, v, within, 1.0, False, 0, dropped)
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
def test_every_row_meets_its_owners_weight(either: str, rows: list[int], nobodys: int, biased: bool, outs: int) -> None:
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


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("nobodys", [0, 5])
def test_of_a_weight_some_rows_may_be_there(either: str, nobodys: int, dtype: torch.dtype) -> None:
    """As if the others were there and zero: values, gradients; each owner has other rows, one none, one all; what pads them is nothing."""
    generator, rows, tall = torch.Generator().manual_seed(6), [3, 100, 1, 12], 19
    kept = [np.array(mine, np.int64) for mine in ([0, 7, 18], range(tall), [], [2, 3, 4, 5, 9, 10, 11, 12, 13])]
    owned = sum(rows)
    x = torch.randn(owned + nobodys, 8, generator=generator).to(dtype).requires_grad_(True)
    weight = torch.randn(4, tall, 8, generator=generator).to(dtype).requires_grad_(True)  # what is beyond an owner's rows is no part of it
    upstream = torch.randn(owned + nobodys, tall, generator=generator).to(dtype)
    which, owners = RowsKept.of(kept, tall), Owners(np.array(rows), owned + nobodys, CPU)
    whole = torch.stack(
        [torch.zeros(tall, 8, dtype=dtype).index_copy(0, torch.from_numpy(k), w[: len(k)]) for w, k in zip(weight, kept, strict=True)]
    )
    assert torch.equal(which.whole(weight), whole)
    made, due = owned_linear(x, weight, None, owners, which), owned_linear(x, whole, None, owners)
    assert torch.allclose(made.float(), due.float(), atol=1e-6 if dtype is torch.float32 else 0.05) and made.shape == (
        owned + nobodys,
        tall,
    )
    assert torch.equal(made == 0, due == 0)
    for got, wanted in zip(*(torch.autograd.grad(y, [x, weight], upstream, retain_graph=True) for y in (made, due)), strict=True):
        assert torch.allclose(got.float(), wanted.float(), atol=5e-6 if dtype is torch.float32 else 0.1)
    assert not any(torch.autograd.grad(made, weight, upstream, retain_graph=True)[0][s, len(k) :].any() for s, k in enumerate(kept))


def test_layers_that_share_their_input_share_its_blocks_until_it_changes() -> None:
    owners, x = Owners(np.array([2, 3]), 5, CPU), torch.arange(10.0).view(5, 2)
    first = owners.blocks(x)
    assert owners.blocks(x.view(5, 2)) is first
    x += 1
    (changed,) = owners.blocks(x)
    assert torch.equal(changed[1, :3], x[2:])
    assert owners.blocks(torch.zeros(5, 2))[0].any().item() is False


def test_a_pass_that_is_over_holds_nothing(either: str) -> None:
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
def test_an_owners_rows_come_out_the_same_in_any_company(either: str, outs: int, ins: int) -> None:
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
    x = torch.randn(50, 48, generator=generator).to(dtype).requires_grad_(True)
    made, wanted = Frozen(layer.weight)(x, layer.bias), layer(x)
    tolerance = 1e-5 if dtype is torch.float32 else 0.05
    assert torch.allclose(made, wanted, atol=tolerance)
    upstream = torch.randn(made.shape, generator=generator).to(dtype)
    mine, theirs = (torch.autograd.grad((y * upstream).sum(), x)[0] for y in (made, wanted))
    assert torch.allclose(mine, theirs, atol=4 * tolerance)
    for rows in (1, 2, 13):
        assert torch.equal(Frozen(layer.weight)(x[:rows], layer.bias), made[:rows])


def test_a_processor_without_bfloat16_widens_rounds_once_and_gets_the_same() -> None:
    """Sums in float32 and one rounding is what a processor does that has it, to the last bit but for the order of the sum."""
    generator = torch.Generator().manual_seed(6)
    weight, x = (torch.randn(n, 64, generator=generator).bfloat16() for n in (32, 40))
    frozen = Frozen(weight)
    assert frozen.widens is not computes_bf16()
    exact = x.double() @ weight.double().t()
    assert torch.allclose(frozen(x, None).double(), exact, rtol=2**-8, atol=1e-5)


def test_what_can_be_packed() -> None:
    assert packable(torch.zeros(2, 2)) and packable(torch.zeros(2, 2, dtype=torch.bfloat16))
    assert not packable(torch.zeros(2, 2, dtype=torch.float64)) and not packable(torch.zeros(2, 2, device="meta"))


@pytest.mark.parametrize("count", [1, 7, 8, 511, 512, 513, 3000])
def test_gelu(either: str, count: int) -> None:
    x = torch.linspace(-12, 12, count).requires_grad_(True)
    wanted, exact = nn.functional.gelu(x.double()), x.detach().double().requires_grad_(True)
    made = gelu(x)
    assert torch.allclose(made.double(), wanted, atol=2e-6 if either == "plain" else 6e-7)  # PyTorch's own is 1.2e-6 off under AVX-512
    upstream = torch.linspace(1, 2, count)
    (mine,) = torch.autograd.grad(made, x, upstream)
    (due,) = torch.autograd.grad(nn.functional.gelu(exact), exact, upstream.double())
    assert torch.allclose(mine.double(), due, atol=2e-6)


@pytest.mark.skipif(bool(why_not()), reason=why_not() or "there are C kernels")
def test_the_loops_in_bfloat16_round_once() -> None:
    """Widened, computed in float32, rounded at the end: within half a last place of the exact result."""
    generator = torch.Generator().manual_seed(7)
    rows = np.array([3, 0, 130, 9])
    x, up = torch.randn(145, 16, generator=generator).bfloat16(), torch.randn(145, 11, generator=generator).bfloat16()
    weight, bias = torch.randn(4, 11, 16, generator=generator).bfloat16(), torch.randn(4, 11, generator=generator).bfloat16()
    leaves = [t.requires_grad_(True) for t in (x, weight, bias)]
    exact = [t.detach().double().requires_grad_(True) for t in leaves]
    made = owned_linear(x, weight, bias, Owners(rows, 145, CPU))
    of = torch.arange(4).repeat_interleave(torch.from_numpy(rows))
    wanted = torch.einsum("ni,noi->no", exact[0][:142], exact[1][of]) + exact[2][of]
    pairs = zip(
        [made[:142], *torch.autograd.grad(made, leaves, up)],
        [wanted, *torch.autograd.grad(wanted, exact, up[:142].double())],
        strict=True,
    )
    for mine, due in pairs:
        assert mine.dtype is torch.bfloat16
        assert torch.allclose(mine.double(), due, rtol=2**-8, atol=2e-5)
    assert not made[142:].any()
    x = torch.linspace(-4, 4, 700).bfloat16().requires_grad_(True)
    exact_x = x.detach().double().requires_grad_(True)
    up = torch.linspace(1, 2, 700).bfloat16()
    assert torch.allclose(gelu(x).double(), nn.functional.gelu(exact_x), rtol=2**-8, atol=1e-6)
    mine, due = torch.autograd.grad(gelu(x), x, up)[0], torch.autograd.grad(nn.functional.gelu(exact_x), exact_x, up.double())[0]
    assert torch.allclose(mine.double(), due, rtol=2**-8, atol=2e-6)


@pytest.mark.skipif(bool(why_not()), reason=why_not() or "there are C kernels")
def test_threads_change_no_bit_of_the_loops() -> None:
    generator, threads = torch.Generator().manual_seed(8), torch.get_num_threads()
    x, up = torch.randn(60, 24, generator=generator), torch.randn(60, 24, generator=generator)
    weight = torch.randn(6, 24, 24, generator=generator)
    seen = []
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            leaf, own = x.clone().requires_grad_(True), weight.clone().requires_grad_(True)
            made = gelu(owned_linear(leaf, own, None, Owners(np.full(6, 10), 60, CPU))).view(60, 3, 8)
            out = ragged_attention(made, made, made, Attention(np.array([25, 35]), CPU), 0.4, False, 0)
            seen.append([out.detach(), *torch.autograd.grad(out, [leaf, own], up.view(60, 3, 8))])
    finally:
        torch.set_num_threads(threads)
    for other in seen[1:]:
        assert all(torch.equal(a, b) for a, b in zip(seen[0], other, strict=True))
