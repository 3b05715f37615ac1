"""How far each rule's new model is from the ideal one, W + s·Σ_k p_k B_k A_k, which is computed densely.

Weights are not square, s is not 1, the devices' numbers of examples differ, and one of the cohort does not answer. The updates are made up,
so that nothing but the server's arithmetic is looked at. Where a rule is not exact its error is told (``-s`` shows it) and bounded from
below: an inexact rule that comes out exact was not the one tested.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pytest
import torch

from fedloom.messages import Task, Update
from fedloom.methods.fedavg import FedAvg
from fedloom.methods.fedex import FedExLora
from fedloom.methods.ffa import FfaLora
from fedloom.methods.flexlora import FlexLora
from fedloom.methods.flora import FLoRA
from fedloom.methods.hetlora import HetLora
from fedloom.methods.method import State
from fedloom.methods.rolora import RoLora
from fedloom.model.adapters import Beneath, is_beneath, is_down, is_up, partner, under
from fedloom.server.participation import Pool, uniform
from fedloom.tensors import without
from tests.flows import play

S, RANK = 4.0, 4
SIZES = {0: 3, 1: 11, 2: 7, 3: 20, 4: 1}
POOL = Pool(tuple(SIZES), 4, 6, 9)
AWAY = uniform(POOL, 0)[1]
SHAPES = {"m.layer.0.wide": (5, 8), "m.layer.1.tall": (9, 6)}
HEAD = "m.classifier.weight"

Arrays = dict[str, np.ndarray]


@dataclass
class Made:
    """What a method reads of a model."""

    initial: dict[str, torch.Tensor]
    weights: dict[str, torch.Tensor]
    beneath: Beneath = field(default_factory=lambda: Beneath(scaling=S))


def model(zero: bool = True) -> Made:
    generator = torch.Generator().manual_seed(3)
    draw = lambda *shape: torch.randn(*shape, generator=generator)  # noqa: E731
    initial = {HEAD: draw(2, 3)}
    for name, (tall, wide) in SHAPES.items():
        initial |= {
            f"{name}.lora_A.weight": draw(RANK, wide),
            f"{name}.lora_B.weight": torch.zeros(tall, RANK) if zero else draw(tall, RANK),
        }
    return Made(dict(sorted(initial.items())), {f"{n}.base_layer.weight": draw(*shape) for n, shape in SHAPES.items()})


def trained(task: Task, frozen: Any = lambda name: False) -> Update | None:
    """Every tensor that a device trains, moved by noise of its own; B from zero where the task has none; nothing from who is away."""
    if task.client == AWAY:
        return None
    generator = torch.Generator().manual_seed(100 + task.client)
    start = {n: t for n, t in task.tensors.items() if not is_beneath(n) and not frozen(n)}
    for a in [n for n in start if is_down(n) and partner(n) not in task.tensors]:
        start.setdefault(partner(a), torch.zeros(SHAPES[a.removesuffix(".lora_A.weight")][0], start[a].shape[0]))
    return Update(task.client, SIZES[task.client], {n: t + 0.3 * torch.randn(t.shape, generator=generator) for n, t in start.items()})


def product(tensors: Mapping[str, torch.Tensor]) -> Arrays:
    """B·A by the weight beneath, with NumPy."""
    return {under(n): t.double().numpy() @ tensors[partner(n)].double().numpy() for n, t in tensors.items() if is_up(n)}


def error(method: Any, of: Made, frozen: Any = lambda name: False, ranks: bool = False) -> float:
    """‖reached − ideal‖ / ‖ideal − W_t‖ over both weights after one round of the method."""
    state: State = method.init(of)
    _, state = play(method.setup(state, POOL), lambda task: Update(task.client, SIZES[task.client]))
    before = {**state.server, **state.shared}
    came: list[Update] = []

    def answer(task: Task) -> Update | None:
        made = trained(task, frozen)
        came.extend([made] if made is not None else [])
        return made

    _, after = play(method.round(state, POOL), answer)
    now = {**{n: t for n, t in after.server.items() if is_down(n)}, **after.shared}
    whole = sum(update.num_examples for update in came)
    shares = {update.client: update.num_examples / whole for update in came}
    assert AWAY not in shares and len(shares) == 3 and len(set(shares.values())) == 3
    if ranks:
        assert len({t.shape[0] for u in came for n, t in u.tensors.items() if is_down(n)}) > 1
    devices = {u.client: product({**{n: t for n, t in before.items() if frozen(n)}, **u.tensors}) for u in came}
    own = {n: before.get(n, of.weights[n]).double().numpy() for n in of.weights}
    ideal = {n: w + S * sum(p * devices[k][n] for k, p in shares.items()) for n, w in own.items()}
    held = product(now) if any(map(is_up, now)) else {}
    reached = {n: now.get(n, of.weights[n]).double().numpy() + S * held.get(n, np.zeros(1)) for n in own}
    norm = lambda x: float(np.sqrt(sum((part**2).sum() for part in x.values())))  # noqa: E731
    return norm({n: reached[n] - ideal[n] for n in own}) / norm({n: ideal[n] - own[n] for n in own})


EXACT = {
    "ffa: B alone, under one A": (FfaLora(), {"frozen": is_down}),
    "rolora: B alone in even rounds": (RoLora(), {"frozen": is_down}),
    "flora: stacked": (FLoRA(), {}),
    "flora, ranks 1 to 4: stacked": (FLoRA(ranks=(1, 2, 4)), {"ranks": True}),
    "fedex: the residual goes into W": (FedExLora(), {}),
}


@pytest.mark.parametrize("rule", EXACT)
def test_an_exact_rule_reaches_the_mean_of_the_devices_models(rule: str) -> None:
    method, how = EXACT[rule]
    assert error(method, model(), **how) <= 1e-6


def test_fedex_is_exact_from_pairs_that_are_not_zero() -> None:
    """In later rounds B is not zero, and W moves by the residual alone."""
    assert error(FedExLora(), model(zero=False)) <= 1e-6


INEXACT = {
    "lora: means of the factors": (FedAvg(), {}),
    "flexlora at rank 4": (FlexLora(ranks=(4,)), {}),
    "flexlora, ranks 2 to 4": (FlexLora(ranks=(2, 3, 4, 3)), {"ranks": True}),
    "hetlora, ranks 1 to 4": (HetLora(ranks=(1, 2, 4)), {"ranks": True}),
}


@pytest.mark.parametrize("rule", INEXACT)
def test_the_error_of_the_others_is_told(rule: str) -> None:
    method, how = INEXACT[rule]
    off = error(method, model(), **how)
    print(f"{rule}: {100 * off:.1f} % of the update")
    assert 1e-3 < off < 2


def test_flexlora_is_off_by_what_no_matrix_of_its_rank_could_hold() -> None:
    """Eckart and Young: the distance to the best approximation of rank r is the norm of the singular values behind the r-th."""
    made, method = model(), FlexLora(ranks=(4,))
    came: list[Update] = []

    def answer(task: Task) -> Update | None:
        update = trained(task)
        came.extend([update] if update else [])
        return update

    _, after = play(method.round(method.init(made), POOL), answer)  # type: ignore[arg-type]
    whole = sum(u.num_examples for u in came)
    held = product(after.shared)
    for n in made.weights:
        ideal = sum(u.num_examples / whole * product(u.tensors)[n] for u in came)
        behind = np.linalg.svd(ideal)[1][RANK:]
        assert np.linalg.norm(held[n] - ideal) == pytest.approx(np.linalg.norm(behind), rel=1e-5)


def test_a_pair_that_nobody_moved_is_left_to_learn() -> None:
    """Σ p_k B_k A_k = 0 has no directions: a pair of zeros would never learn again."""
    made, method = model(), FlexLora(ranks=(4,))
    still = lambda task: Update(task.client, SIZES[task.client], task.tensors)  # noqa: E731
    _, after = play(method.round(method.init(made), POOL), still)  # type: ignore[arg-type]
    assert all(torch.equal(after.shared[n], t) for n, t in without(made.initial, [HEAD]).items())
