"""Ranks that do not fit, by their messages; and pairs made of matrices that have fewer directions than are asked for."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest
import torch

from fedloom.engines.agreement import agreeing
from fedloom.messages import Replies, Task, Update
from fedloom.methods import named
from fedloom.methods.fedavg import FedAvg
from fedloom.methods.flexlora import FlexLora
from fedloom.methods.hetlora import HetLora
from fedloom.model.adapters import Adapter
from fedloom.model.factors import cut, need_ranks, need_room, quarters, rank_in, refactored
from fedloom.model.loading import load
from fedloom.model.names import is_down, is_factor, partner
from fedloom.model.principal import noise, principal_factors
from fedloom.server.aggregation import Average
from fedloom.server.participation import Pool
from tests import flows, tiny

A, B = "m.lora_A.weight", "m.lora_B.weight"


def pair(rank: int, d_out: int = 6, d_in: int = 5, name: str = "m") -> dict[str, torch.Tensor]:
    return {f"{name}.lora_A.weight": torch.ones(rank, d_in), f"{name}.lora_B.weight": torch.ones(d_out, rank)}


def low(m: int, n: int, rank: int, seed: int = 0) -> np.ndarray:
    """A matrix of this rank with singular values 5, 4, 3 ..., in float64."""
    rng = np.random.default_rng(seed)
    u, v = (np.linalg.qr(rng.normal(size=(side, rank)))[0] for side in (m, n))
    return (u * np.arange(5, 5 - rank, -1)) @ v.T


# ranks that do not fit


def test_one_rank_is_needed_in_all_pairs() -> None:
    assert rank_in({**pair(3), **pair(3, name="k")}) == 3
    with pytest.raises(ValueError, match=r"one rank is needed in all pairs; they have \[2, 3\]"):
        rank_in({**pair(3), **pair(2, name="k")})
    with pytest.raises(ValueError, match=r"one rank is needed in all pairs; they have \[\]"):
        rank_in({"classifier.weight": torch.ones(2, 2)})


def test_devices_ranks_lie_within_the_adapters() -> None:
    need_ranks((1, 4), pair(4), "flora")
    with pytest.raises(
        ValueError, match=r"'flora' has devices of rank \[0, 5\], and the adapter's rank is 4: 1 to 4 are possible.*--adapter.rank"
    ):
        need_ranks((0, 2, 5), pair(4), "flora")
    for method in (HetLora(ranks=(2, 3)), FlexLora(ranks=(2, 3)), named("flora")(ranks=(2, 3))):
        with pytest.raises(ValueError, match=rf"'{method.name}' has devices of rank \[3\], and the adapter's rank is 2"):
            method.init(tiny.model())


def test_where_nobody_says_it_devices_have_a_quarter_half_or_all_of_the_rank() -> None:
    assert [quarters(rank) for rank in (1, 2, 3, 4, 8, 10)] == [(1, 1, 1), (1, 1, 2), (1, 1, 3), (1, 2, 4), (2, 4, 8), (2, 5, 10)]
    pool, model = Pool(tuple(range(40)), 40, 1, 3), tiny.model(rank=8)
    for method in (HetLora(), FlexLora()):
        _, state = flows.play(method.setup(method.init(model), pool), flows.echo)
        ((*tasks,),), _ = flows.play(method.round(state, pool), lambda task: Update(task.client, 1, dict(task.tensors)))
        ranks = Counter(rank_in({n: t for n, t in task.tensors.items() if is_factor(n)}) for task in tasks)
        assert set(ranks) == {2, 4, 8} and min(ranks.values()) > 5, method.name


def test_what_is_decomposed_has_room_for_the_rank() -> None:
    need_room(pair(5), "slora")
    with pytest.raises(
        ValueError, match=r"'slora' .*'m.base_layer.weight' is 6 × 5: it has 5 directions at most.*rank is 6; .*--adapter.rank 5 or less"
    ):
        need_room(pair(6), "slora")
    with pytest.raises(ValueError, match=r"is 3 × 5: it has 3 directions"):
        need_room(pair(4, d_out=3), "slora")


def test_methods_that_decompose_say_so_before_anything_is_asked() -> None:
    model = load(str(tiny.folder()), num_labels=3, adapter=Adapter(rank=17), max_length=16)
    for name in ("flexlora", "slora", "fedsb"):
        with pytest.raises(ValueError, match=rf"'{name}' makes pairs by SVD.* 16 × 16.* rank is 17; give --adapter.rank 16 or less"):
            named(name)().init(model)
    FedAvg().init(model)


def test_lora_takes_no_update_of_another_rank() -> None:
    """Neither where updates are averaged nor where answers of a federation are judged, though there it comes first or alone."""
    sent = pair(4)
    mean = Average()
    mean.take(Update(0, 3, sent))
    with pytest.raises(ValueError, match=r"'m.lora_A.weight' has shape \(2, 5\); expected \(4, 5\)"):
        mean.take(Update(1, 3, cut(sent, 2)))
    replies = agreeing([Task("train", 0, sent)], Replies((Update(0, 3, cut(sent, 2)),)))
    assert not replies.updates and "'m.lora_B.weight' came back with shape (6, 2), and was sent with (6, 4)" in replies.failures[0].reason


# directions that are not there


@pytest.mark.parametrize(("m", "n"), [(16, 12), (12, 16)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_missing_directions_are_zero_in_b_and_at_right_angles_in_a(m: int, n: int, dtype: torch.dtype) -> None:
    weight, scaling = torch.from_numpy(low(m, n, 4)).to(dtype), 1.5
    a, b = (t.double().numpy() for t in principal_factors(weight, 8, scaling))
    assert not b[:, 4:].any() and (np.abs(b[:, :4]).max(0) > 0.1).all()
    np.testing.assert_allclose(scaling * b @ a, weight.double().numpy(), atol=2e-6)
    wanted = np.diag([*np.arange(5, 1, -1) / scaling, *[1 / 3] * 4])
    np.testing.assert_allclose(a @ a.T, wanted, atol=2e-6)
    nudged = weight * (1 + torch.finfo(dtype).eps * torch.randn(m, n, generator=torch.Generator().manual_seed(1), dtype=dtype))
    for first, again in zip((a, b), principal_factors(nudged, 8, scaling), strict=True):
        np.testing.assert_allclose(again.double().numpy(), first, atol=5e-6, err_msg="rounding turns no direction, a missing one neither")


def test_what_is_small_and_no_rounding_is_kept() -> None:
    """σ₂ is a ten-thousandth of σ₁: a thousand times what float32 leaves. A hundredth of ε is not kept."""
    u, v = (np.linalg.qr(np.random.default_rng(seed).normal(size=(16, 2)))[0] for seed in (1, 2))
    for small, there in ((1e-4, True), (1e-9, False)):
        weight = torch.from_numpy((u * [1, small]) @ v.T).float()
        assert bool(principal_factors(weight, 2, 1.0)[1][:, 1].any()) is there
    assert noise(np.eye(16), 1.0, 2.0**-23) == pytest.approx(max(2.0**-23 * 4 * 0.5, (16 * 2.0**-52) ** 0.5))


def test_nothing_to_decompose_starts_as_lora_does() -> None:
    a, b = principal_factors(torch.zeros(4, 6), 3, 2.0)
    assert not b.any()
    torch.testing.assert_close(a @ a.T, torch.eye(3) / 3)


def test_a_delta_of_a_lower_rank_leaves_directions_that_can_be_learnt() -> None:
    """As FlexLoRA's mean is, of one device of a low rank: ∂/∂B = s·G·Aᵀ is not zero in any column."""
    like = {A: torch.zeros(4, 12), B: torch.zeros(16, 4)}
    delta = torch.from_numpy(low(16, 12, 2))
    made = refactored({"m.base_layer.weight": delta}, like, 1.0)
    torch.testing.assert_close(made[B].double() @ made[A].double(), delta, atol=2e-6, rtol=0)
    gradient = torch.randn(16, 12, generator=torch.Generator().manual_seed(0)) @ made[A].T
    assert not made[B][:, 2:].any() and float(gradient.norm(dim=0).min()) > 0.5
    assert all(is_factor(n) and (not is_down(n) or partner(n) == B) for n in made)
