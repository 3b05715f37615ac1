"""LoRA's start is free of the method and the curriculum: every method from both starts, every curriculum from the other one, stacked as one
by one. (Every method with every curriculum: ``test_curricula.py``.)"""

from __future__ import annotations

from functools import cache
from itertools import cycle
from typing import Any

import pytest
import torch

from fedloom.client.curricula import all_curricula
from fedloom.client.host import Host
from fedloom.client.store import ClientStore
from fedloom.compute.serial import Serial
from fedloom.compute.stacked import Stacked
from fedloom.compute.work import Fit
from fedloom.engines.engine import drive
from fedloom.engines.local import Local
from fedloom.messages import ask
from fedloom.methods import all_methods, named
from fedloom.model.base import Model
from fedloom.model.blocks import layer_of
from fedloom.model.names import is_factor
from fedloom.run.recipes import with_curriculum
from fedloom.server.participation import Pool
from tests import small, tiny

pytestmark = pytest.mark.no_cover
"""The same lines again for every method, kind or size: which lines are reached at all, other tests tell (conftest.py)."""

POOL = Pool((0, 1, 2), 2, 2, 8)
FROM_ZERO = {"flora", "slora", "fedsb", "adalora", "hetlora", "flexlora", "flasc"}
BLOCKS = {"fedcybgd", "fedbavg"}
"""Who trains one layer a round."""
NO_PAIRS = {"fedalt"}
"""Whose adapter is none that a start is made for."""
METHODS = [
    name for name in all_methods() if name not in {"centralised", *FROM_ZERO, *NO_PAIRS, "galore"}
]  # that trains nowhere but in the centre; no pairs
PLAIN = {"fedfft", "fedbf", "fedap", "federa"}
"""Who would be LoRA here, where all have its pairs and this start."""
PAIRS = [("fibecfed", "fisher"), *zip([m for m in METHODS if m != "fibecfed"], cycle(all_curricula()), strict=False)]
PAIRS = [(name, curriculum) for name, curriculum in PAIRS if name not in PLAIN]


@cache
def svd() -> Model:
    return tiny.model(layers=4, start="svd")


def played(name: str, curriculum: str, stacked: bool) -> dict[str, torch.Tensor]:
    """What is shared after two rounds, in the first of which something is closed, and what device 0 says of its test rows."""
    method, devices, of = with_curriculum(named(name)(), small.curriculum(curriculum)), tiny.clients((9, 5, 12)), svd()
    compute: Any = (Stacked if stacked else Serial)(of)
    ran, fits = compute.run, list[Fit]()
    compute.run = lambda items: (fits.extend(item for item in items if isinstance(item, Fit)), ran(items))[1]
    host = Host(method, lambda k: devices[k], compute, ClientStore(None), "starts")
    engine = Local(host)
    state = drive(method.setup(method.init(of), POOL), engine)
    for t in range(POOL.rounds):
        fits.clear()
        state = drive(method.round(state, POOL), engine)
        assert t > 0 or small.closed(fits) == (curriculum != "none")
    (said,) = engine.run([ask(method.predict, 0, state.shared, splits=["test"])]).updates
    return {**state.shared, "logits": said.tensors["test"]}


def test_every_curriculum_is_among_the_pairs() -> None:
    assert {curriculum for _, curriculum in PAIRS} == set(all_curricula())
    assert {method for method, _ in PAIRS} == set(METHODS) - PLAIN


@pytest.mark.parametrize("name", sorted(FROM_ZERO))
def test_who_begins_at_zero_says_so(name: str) -> None:
    with pytest.raises(ValueError, match=f"'{name}' starts its pairs at zero .* give it --adapter.start zero"):
        named(name)().init(svd())


@pytest.mark.parametrize("name", sorted(NO_PAIRS))
def test_who_has_no_pairs_says_so(name: str) -> None:
    with pytest.raises(ValueError, match="start svd is one of LoRA's pairs, and kind mixed has none"):
        tiny.model(start="svd", kind="mixed")
    with pytest.raises(ValueError, match=f"'{name}' works on two LoRAs and their mixer.*--adapter.kind mixed"):
        named(name)().init(svd())


@pytest.mark.parametrize(("name", "curriculum"), PAIRS, ids=[name for name, _ in PAIRS])
def test_it_trains_from_singular_vectors_stacked_as_one_by_one(name: str, curriculum: str) -> None:
    alone, together = (played(name, curriculum, stacked) for stacked in (False, True))
    assert set(alone) == set(together)
    for key, tensor in alone.items():
        torch.testing.assert_close(together[key], tensor, atol=5e-4, rtol=0)
    still = {key for key, start in svd().initial.items() if key in alone and torch.equal(alone[key], start)}
    if name in BLOCKS:  # the other layers' turns were not yet
        assert all(map(is_factor, still)) and len({layer_of(key) for key in alone if is_factor(key) and key not in still}) == POOL.rounds
        assert {layer_of(key) for key in still}.isdisjoint(layer_of(key) for key in alone if is_factor(key) and key not in still)
    else:
        assert not still, "what is trained learns, all of it"
