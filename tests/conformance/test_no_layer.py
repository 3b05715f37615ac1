"""Pairs that lie in no transformer layer (here that of BERT's pooler): everybody's, whatever is chosen among the layers."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from fedloom.client.host import Host
from fedloom.client.masks import carried_out
from fedloom.client.neurons import whole_private
from fedloom.client.sharing import layer_scores
from fedloom.client.store import ClientStore
from fedloom.compute.serial import Serial
from fedloom.engines.engine import drive
from fedloom.engines.local import Local
from fedloom.methods.fedavg import FedAvg
from fedloom.methods.fibecfed import FibecFed, Gal
from fedloom.methods.method import State, one_round, set_up
from fedloom.model.adapters import Adapter
from fedloom.model.base import Model
from fedloom.model.blocks import layer_of
from fedloom.model.loading import load
from fedloom.model.names import is_factor
from fedloom.server.masks import Mask
from fedloom.server.participation import Pool
from fedloom.server.sharing import Sharing
from tests import tiny

POOL = Pool((0, 1, 2), 3, 2, 3)
POOLER = {f"base_model.model.bert.pooler.dense.lora_{f}.weight" for f in "AB"}


@pytest.fixture(scope="module")
def model() -> Model:
    adapter = Adapter(rank=2, alpha=4.0, targets=("query", "pooler.dense"))
    return load(str(tiny.folder()), num_labels=3, adapter=adapter, seed=1, max_length=16)


def trained(model: Model, method: Any, pool: Pool) -> tuple[State, ClientStore]:
    """Two rounds."""
    devices, store = tiny.clients(), ClientStore()
    fresh = lambda k: replace(devices[k], private={}, memory={})  # noqa: E731
    engine = Local(Host(method, fresh, Serial(model), store, "played", doing=carried_out, besides=[layer_scores]))
    state = drive(set_up(method, model, pool), engine, quorum=0)
    for _ in range(2):
        state = drive(one_round(method, state, pool), engine)
    return state, store


@pytest.mark.parametrize("gal", [Gal(count=1), Gal(fraction=1.0)], ids=["one layer", "all"])
def test_fibecfed_shares_what_is_of_no_layer(model: Model, gal: Gal) -> None:
    state, store = trained(model, FibecFed(gal=gal), POOL)
    assert {n for n in state.shared if is_factor(n) and layer_of(n) is None} == POOLER
    assert {layer_of(n) for n in state.shared} == {None, *state.facts["gal"]}
    assert all(not bool((state.shared[n] == model.initial[n]).all()) for n in POOLER), "and trains it"
    for k in POOL.clients:
        assert not POOLER & whole_private(replace(tiny.clients()[k], private=store.load(k)[0], memory=store.load(k)[1])).keys()


def test_a_share_of_the_layers_leaves_it_with_everybody(model: Model) -> None:
    state, store = trained(model, FedAvg(), replace(POOL, sharing=Sharing(count=1)))
    assert {n for n in state.shared if is_factor(n) and layer_of(n) is None} == POOLER
    assert all(not POOLER & store.load(k)[0].keys() for k in POOL.clients)


def test_a_mask_takes_its_neurons_as_those_of_one_more_layer(model: Model) -> None:
    """Half of the pooler's 16, whatever those of the layers are."""
    state, _ = trained(model, FedAvg(), replace(POOL, cohort=1, mask=Mask(keep=0.5)))
    (b,) = [n for n in POOLER if ".lora_B." in n]
    moved = (state.shared[b] != model.initial[b]).any(1)
    assert 8 <= int(moved.sum()) <= 16, "of two rounds' cohorts of one, each trains eight rows"
