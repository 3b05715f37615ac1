"""EmbracingFL as it runs on both computes, against NumPy: whole rounds computed from the sentences, devices of four depths.

The tensors are those of a four-layer model's adapter; that every weight can be trained so is shown on a three-layer one, against PyTorch.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from transformers import BertForSequenceClassification

from fedloom.client.host import Host
from fedloom.client.store import ClientStore
from fedloom.compute.flops import Flops
from fedloom.compute.serial import Serial
from fedloom.compute.stacked import Stacked
from fedloom.compute.work import Fit
from fedloom.engines.engine import drive
from fedloom.engines.local import Local
from fedloom.engines.wrap import Faulty
from fedloom.fleet import DeviceProfile, Fleet
from fedloom.messages import Asking, Update
from fedloom.methods.embracingfl import EmbracingFL
from fedloom.methods.fedavg import FedAvg
from fedloom.methods.method import State
from fedloom.model.base import Model
from fedloom.model.memory import Needs, fitting, needs, output_side, parts
from fedloom.model.names import is_head
from fedloom.server.robust import Aggregation
from fedloom.tensors import nbytes
from tests import tiny
from tests.oracle import real
from tests.oracle.numpy_training import train
from tests.oracle.test_baselines import COHORTS, EVERYBODY, epochs, kinds

LAYERS = {0: 1, 1: 4, 2: 0, 3: 2}
"""How many layers each device's memory is to allow, of four."""
METHOD = EmbracingFL(real.INNER)
HEAD = {n for n in real.start() if "classifier" in n}


def of_layers(count: int) -> set[str]:
    """The head and the last layers, by the part of the name that says which."""
    return HEAD | {n for n in real.start() for layer in range(real.LAYERS - count, real.LAYERS) if f".layer.{layer}." in n}


def taken(layers: int) -> int:
    """By hand, of the four-layer model with hidden size 16, inner size 32, two heads, 16 tokens, in float32, 3 texts a step: the weights,
    a gradient and two moments of what is trained, and 16·16 + 3·32 + 3·2·16 numbers a token for each trained layer, or for one."""
    parameters = sum(p.numel() for p in real.model().module.parameters())
    trained = 16 * 3 + 3 + layers * 2 * (2 * 16 + 16 * 2)
    return 4 * parameters + 4 * trained + 8 * trained + 3 * 16 * 4 * (16 * 16 + 3 * 32 + 3 * 2 * 16) * max(1, layers)


def profile(memory: float) -> DeviceProfile:
    return DeviceProfile(f"of {memory:g} bytes", 1e9, 1e6, 1e6, memory)


FLEET = Fleet(tuple(profile(taken(LAYERS[k])) for k in EVERYBODY), EVERYBODY)
"""Each with exactly what it takes."""
POOL = replace(real.POOL, fleet=FLEET)


def test_what_training_takes_is_the_stated_sum_and_no_byte_less_will_do() -> None:
    each = needs(real.model(), 3)
    assert [one.total for one in each] == [taken(layers) for layers in range(5)]
    assert [fitting([taken(n) for n in range(5)], taken(layers)) for layers in range(5)] == [0, 1, 2, 3, 4]
    assert [fitting([taken(n) for n in range(5)], taken(layers) - 1) for layers in range(5)] == [None, 0, 1, 2, 3]
    half = needs(tiny.model("bf16", kind="full"), 2)[-1]
    whole = needs(tiny.model(kind="full"), 2)[-1]
    assert half == Needs(4, whole.weights // 2 + whole.gradients, whole.gradients, 2 * whole.gradients, whole.activations)
    assert whole.gradients == whole.weights == 4 * sum(t.numel() for t in tiny.model(kind="full").initial.values()), "all of it is trained"


def test_the_parts_of_a_whole_model_are_embeddings_layers_and_the_end() -> None:
    names = tiny.model(kind="full").initial
    before, end = parts(names)
    assert [{n.split(".")[1] for n in part} for part in before] == [{"embeddings"}, {"encoder"}, {"encoder"}, {"encoder"}]
    assert [{f".layer.{i}." in n for n in part} for i, part in enumerate(before[1:])] == [{True}] * 3
    assert sorted(n for part in (*before, end) for n in part) == sorted(names)
    assert set(end) == {"bert.pooler.dense.bias", "bert.pooler.dense.weight", *filter(is_head, names)}
    assert output_side(names, 1) == sorted([*end, *before[-1]])
    with pytest.raises(ValueError, match="5 layers are to be trained, and the tensors make 4"):
        output_side(names, 5)


@kinds
def test_round_after_round(kind: real.Kind) -> None:
    """A device trains the head and as many layers before it as fit, on top of the rest as it came; each layer becomes the mean, by numbers
    of examples, over those of the cohort that trained it; what nobody trained stays to the bit. Only what was trained goes up."""
    made = real.run(METHOD, kind, POOL)
    shared, stayed = real.start(), 0
    assert made.states[0].facts["devices_by_layers"] == {"0": 1, "1": 1, "2": 1, "4": 1}
    for t, exchange in enumerate(made.asked("train")):
        assert tuple(exchange.down) == COHORTS[t]
        fitted: dict[int, dict[str, np.ndarray]] = {}
        for k in COHORTS[t]:
            trains = of_layers(LAYERS[k])
            after, losses = train(real.encoder(), shared, trains, real.questions(k), epochs(k, "batches", t), real.RULE)
            fitted[k] = {n: after[n] for n in trains}
            assert set(exchange.down[k].tensors) == set(shared)
            assert set(exchange.up[k].tensors) == trains
            assert nbytes(exchange.up[k].tensors) == 4 * sum(shared[n].size for n in trains)
            assert len(exchange.came[k]) < len(exchange.sent[k]) or LAYERS[k] == 4
            assert exchange.up[k].metrics["loss"] == pytest.approx(np.mean(losses), abs=1e-4)
        before, after = made.states[t].shared, dict(shared)
        for n in shared:
            who = [k for k in COHORTS[t] if n in fitted[k]]
            if who:
                after[n] = sum(real.SIZES[k] * fitted[k][n] for k in who) / sum(real.SIZES[k] for k in who)
            else:
                assert torch.equal(before[n], made.states[t + 1].shared[n])
                stayed += 1
        shared = after
        real.assert_close(made.states[t + 1].shared, shared)
    assert stayed == 8, "two layers, in the round without device 1"
    assert made.assembled is not None
    real.assert_close(made.assembled, shared)


def test_a_device_that_is_missing_counts_for_nothing() -> None:
    """Device 1 alone trains everything, and does not answer: the lower layers stay, the others' mean is of who is left."""
    store = ClientStore()
    host = Host(METHOD, lambda k: replace(real.devices()[k], private={}, memory={}), real.compute("stacked"), store, real.DIGEST)
    engine = Faulty(Local(host), fails=lambda task, _: "out of range" if task.client == 1 else None)
    first = drive(METHOD.setup(METHOD.init(real.model()), POOL), engine)
    state = drive(METHOD.round(first, POOL), engine, quorum=0.5)
    made = {k: up.tensors for k, up in real.run(METHOD, "stacked", POOL).asked("train")[0].up.items()}
    for n, tensor in state.shared.items():
        who = [k for k in (0, 3) if n in of_layers(LAYERS[k])]
        due = sum(real.SIZES[k] * made[k][n].double() for k in who) / sum(real.SIZES[k] for k in who) if who else first.shared[n].double()
        assert torch.equal(tensor, due.float()), n


def test_devices_that_hold_everything_are_plain_averaging() -> None:
    """Where all layers fit, or nothing is said of devices, it is FedAvg to the bit."""
    once = replace(real.POOL, rounds=1)
    plain = real.run(real.INNER, "stacked", once).states[-1].shared
    for pool in (once, replace(once, fleet=Fleet((profile(1e12),)))):
        state = real.run(METHOD, "stacked", pool).states[-1]
        assert all(torch.equal(state.shared[n], t) for n, t in plain.items())
        assert state.facts["devices_by_layers"] == {"4": 4}


class Grouped:
    """A stacked compute that tells how many Fits of which size went through each pass."""

    def __init__(self, of: Model) -> None:
        self.stacked, self.seen = Stacked(of), list[tuple[int, int]]()
        self.stacked._fit, self._fit = self._counted, self.stacked._fit  # type: ignore[method-assign]

    def _counted(self, items: Any) -> Any:
        self.seen.append((len(items[0].start), len(items)))
        return self._fit(items)

    def run(self, items: Any) -> Any:
        return self.stacked.run(items)


def test_devices_of_one_depth_are_computed_together() -> None:
    pool = replace(POOL, cohort=4, rounds=1, fleet=Fleet((profile(taken(1)), profile(taken(4))), (0, 1, 0, 0)))
    compute = Grouped(real.model())
    made = real.watch(METHOD, compute, pool)
    assert sorted(compute.seen) == [(len(of_layers(1)), 3), (len(of_layers(4)), 1)]
    alone = real.watch(METHOD, Serial(real.model()), pool)
    for k, up in made.asked("train")[0].up.items():
        real.assert_close(up.tensors, real.arrays(alone.asked("train")[0].up[k].tensors), 1e-4, 1e-5)


def test_a_device_that_not_even_the_head_fits_is_named() -> None:
    small = replace(POOL, fleet=Fleet((profile(taken(0) - 1), profile(1e9)), (1, 1, 0, 1)))
    with pytest.raises(ValueError, match=rf"device 2 \('of {taken(0) - 1:g} bytes'\) has .* the head alone, takes {taken(0):,}"):
        drive(METHOD.setup(METHOD.init(real.model()), small), Local(None))  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="'embracingfl' cannot follow aggregation 'median'"):
        drive(METHOD.setup(METHOD.init(real.model()), replace(POOL, aggregation=Aggregation("median"))), Local(None))  # type: ignore[arg-type]
    layers_only = State(0, {n: t for n, t in real.model().initial.items() if not is_head(n)}, {"needed": torch.tensor([5, 9])})
    assert METHOD.layers(layers_only, replace(POOL, fleet=Fleet((profile(9),))), 0) == 1
    with pytest.raises(ValueError, match="the least that can be trained, one layer, takes 9"):
        METHOD.layers(layers_only, replace(POOL, fleet=Fleet((profile(8),))), 0)
    headless = replace(real.model(), initial={n: t for n, t in real.model().initial.items() if is_head(n)})
    with pytest.raises(ValueError, match="none of the 2 trainable tensors belongs to one"):
        METHOD.init(headless)


def test_an_update_of_other_layers_is_refused() -> None:
    state = drive(METHOD.setup(METHOD.init(real.model()), POOL), Local(None))  # type: ignore[arg-type]
    asking = next(METHOD.round(state, POOL))
    assert isinstance(asking, Asking)
    with pytest.raises(ValueError, match="tensors do not match by name: missing"):
        asking.take(Update(0, 13, {n: state.shared[n] for n in HEAD}))


def test_of_a_whole_model_the_output_side_is_trained_and_the_input_side_frozen() -> None:
    """Against PyTorch on the library's own model: AdamW on the last layer, the pooler and the head."""
    own, (examples, inner) = tiny.model(kind="full"), (tiny.examples(7, seed=4), FedAvg(lr=0.01, weight_decay=0.01))
    trains = output_side(own.initial, 1)
    fixed = {n: t for n, t in own.initial.items() if n not in trains}
    batches = [np.arange(0, 4), np.arange(4, 7)]
    item = Fit({n: own.initial[n] for n in trains}, examples, batches, inner.optimizer, fixed=fixed)
    theirs = BertForSequenceClassification(own.config).eval()
    named = dict(theirs.named_parameters())
    assert set(named) == set(own.initial)
    with torch.no_grad():
        for n, tensor in own.initial.items():
            named[n].copy_(tensor)
    optimizer = torch.optim.AdamW([named[n] for n in trains], lr=0.01, weight_decay=0.01)
    for batch in batches:
        texts = examples.pad(batch, pad_id=0)
        out = theirs(torch.from_numpy(texts.ids).long(), attention_mask=torch.from_numpy(texts.mask).long())
        loss = torch.nn.functional.cross_entropy(out.logits, torch.from_numpy(examples.labels[batch]).long())
        gradients = torch.autograd.grad(loss, [named[n] for n in trains])
        for n, gradient in zip(trains, gradients, strict=True):
            named[n].grad = gradient
        torch.nn.utils.clip_grad_norm_([named[n] for n in trains], 1.0)
        optimizer.step()
    for compute in (Serial(own), Stacked(own)):
        fitted = compute.run([item])[0].result.tensors
        assert set(fitted) == set(trains)
        for n, tensor in fitted.items():
            assert (tensor - own.initial[n]).abs().max() > 1e-4 or n.endswith("key.bias"), n
            if not n.endswith("key.bias"):  # softmax cancels them: rounding is their gradient
                torch.testing.assert_close(tensor, named[n].detach(), atol=2e-4, rtol=0)


def test_no_operation_is_counted_below_the_first_trained_layer() -> None:
    """Of one linear layer with weight (o, i) on n numbers: 2·n·o·i forth, as much for the weight's gradient, and for what came in. A layer
    more trained costs its weights' gradients, its inputs' but those of query, key and value, and these of the layer behind it."""
    own = tiny.model(kind="full")
    flops, tokens, h, i = Flops(own), 8, 16, 32
    steps = [float(flops.step(frozenset(output_side(own.initial, n)), tokens)) for n in range(5)]
    linear = 2 * tokens * (4 * h * h + 2 * h * i)
    attention, came = steps[2] - steps[1] - 2 * linear, 2 * tokens * 3 * h * h
    assert attention >= 0 and steps[3] - steps[2] == pytest.approx(2 * linear + attention)
    assert steps[1] - steps[0] == pytest.approx(2 * linear - came + attention + 2 * h * h, rel=1e-9), (
        "the last term: what came into the pooler"
    )
    assert steps[4] - steps[3] == pytest.approx(came, rel=1e-9), "the embeddings: what came into the first layer's query, key and value"
