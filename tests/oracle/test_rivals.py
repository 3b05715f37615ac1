"""The published rivals of FibecFed, as they run on both computes, against the same NumPy training and averaging.

Each test's docstring is the sentence of the paper that it holds a method to. What travels is asserted by name, value and byte.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import replace
from functools import cache
from typing import Any

import numpy as np
import pytest
import torch

from fedloom.compute.serial import Serial
from fedloom.compute.work import Fitted, Predict
from fedloom.encodings import Encoding
from fedloom.methods.ditto import Ditto
from fedloom.methods.fedalt_partial import FedAltPartial
from fedloom.methods.fedavg import FedAvg
from fedloom.methods.fedsa import FedSaLora
from fedloom.methods.ffa import FfaLora
from fedloom.methods.local import Local
from fedloom.methods.method import Method
from fedloom.methods.rolora import RoLora
from fedloom.model.adapters import merged
from fedloom.model.base import Model
from fedloom.model.loading import load
from fedloom.server.participation import Pool, uniform
from fedloom.tensors import nbytes
from tests import tiny
from tests.oracle import real
from tests.oracle.numpy_encoder import Encoder, Tensors, pad
from tests.oracle.numpy_fibecfed import is_lora, layer_of
from tests.oracle.numpy_training import aggregate, payload, train
from tests.oracle.test_baselines import COHORTS, EVERYBODY, averaged, epochs, kinds, logits

pytestmark = pytest.mark.no_cover

Arrays = dict[str, np.ndarray]


def is_a(name: str) -> bool:
    return ".lora_A." in name


def is_b(name: str) -> bool:
    return ".lora_B." in name


def part(tensors: Tensors, names: Collection[str]) -> Arrays:
    return {name: tensors[name] for name in tensors if name in names}


def trained(client: int, at: Tensors, names: Iterable[str], batches: Sequence[np.ndarray], **pulled: Any) -> tuple[Arrays, list[float]]:
    """All of ``at`` after the device trained those called ``names``."""
    return train(real.encoder(), at, names, real.questions(client), batches, real.RULE, **pulled)


def mean_of(fitted: Mapping[int, Tensors], names: Collection[str]) -> Arrays:
    """Σ p_k x^k over the devices that trained."""
    return aggregate([part(own, names) for own in fitted.values()], [real.SIZES[k] for k in fitted])


def assert_travels(exchange: real.Exchange, down: Collection[str], up: Collection[str]) -> None:
    """Each message holds these tensors, in float32, and no other's name or bytes."""
    start = real.start()
    for k in exchange.down:
        assert set(exchange.down[k].tensors) == set(down)
        assert set(exchange.up[k].tensors) == set(up)
        for blob, said, names in ((exchange.sent[k], exchange.down[k].tensors, down), (exchange.came[k], exchange.up[k].tensors, up)):
            header = int.from_bytes(blob[:8], "little")
            assert nbytes(said) == payload(start, names)
            assert len(blob) == 8 + header + nbytes(said) and header < 400 + 200 * len(said)
            assert not [name for name in start if name not in names and name.encode() in blob]


def assert_handed_out(made: real.Run, names: Collection[str]) -> None:
    """Every device received these tensors of the start once and sent nothing; from then on they are what it keeps."""
    (received,) = made.asked("receive")
    assert tuple(received.down) == EVERYBODY
    assert_travels(received, names, [])
    for k in EVERYBODY:
        assert all(torch.equal(received.down[k].tensors[n], real.model().initial[n]) for n in names)
        real.assert_close(made.private[0][k], part(real.start(), names), 1e-7, 1e-7)
    assert [exchange.op for exchange in made.exchanges] == ["receive", *["train"] * len(COHORTS), "predict"]


def assert_predicts(made: real.Run, whole: Mapping[int, Tensors]) -> None:
    for k in EVERYBODY:
        for split in ("validation", "test"):
            np.testing.assert_allclose(made.logits[k][split].numpy(), logits(whole[k], k, split), atol=3e-3)


@kinds
def test_ffa(kind: real.Kind) -> None:
    """A is frozen at its random start, the same on all devices; B alone is trained and averaged (with the head). A never travels again."""
    made = real.run(FfaLora(real.INNER), kind)
    frozen = {name: tensor for name, tensor in real.start().items() if is_a(name)}
    shared = {name: tensor for name, tensor in real.start().items() if not is_a(name)}
    assert_handed_out(made, frozen)
    for t, exchange in enumerate(made.asked("train")):
        assert tuple(exchange.down) == COHORTS[t]
        assert_travels(exchange, shared, shared)
        fitted = {k: trained(k, {**frozen, **shared}, shared, epochs(k, "batches", t)) for k in COHORTS[t]}
        for k, update in exchange.up.items():
            assert update.metrics["loss"] == pytest.approx(np.mean(fitted[k][1]), abs=1e-4)
            assert (update.num_examples, update.examples) == (real.SIZES[k], 2 * real.SIZES[k])
        shared = mean_of({k: own for k, (own, _) in fitted.items()}, shared)
        real.assert_close(made.states[t + 1].shared, shared)
        for k in EVERYBODY:
            assert all(torch.equal(made.private[t + 1][k][name], real.model().initial[name]) for name in frozen)
            assert set(made.private[t + 1][k]) == set(frozen)
    assert_predicts(made, {k: {**frozen, **shared} for k in EVERYBODY})
    assert made.assembled is not None
    real.assert_close(made.assembled, {**frozen, **shared})


@pytest.mark.parametrize("wire", ["bf16", "int8", "nf4"])
def test_devices_and_server_have_the_same_a_over_every_wire(wire: str) -> None:
    """A is frozen at its random start, the same on every device: and at the server, whose global model stands on it."""
    made = real.watch(FfaLora(real.INNER), real.compute("stacked"), replace(Pool(tuple(EVERYBODY), 3, 1, 8), encoding=Encoding.of(wire)))
    for k in EVERYBODY:
        assert {n: t.tolist() for n, t in made.private[-1][k].items()} == {n: t.tolist() for n, t in made.states[-1].server.items()}


@kinds
def test_fedsa(kind: real.Kind) -> None:
    """A and B are both trained; A alone is shared and averaged, B stays on the device, and so does the classifier."""
    made = real.run(FedSaLora(real.INNER), kind)
    shared = {name: tensor for name, tensor in real.start().items() if is_a(name)}
    own = {k: {name: tensor for name, tensor in real.start().items() if not is_a(name)} for k in EVERYBODY}
    assert_handed_out(made, own[0])
    for t, exchange in enumerate(made.asked("train")):
        assert tuple(exchange.down) == COHORTS[t]
        assert_travels(exchange, shared, shared)
        fitted = {k: trained(k, {**shared, **own[k]}, real.start(), epochs(k, "batches", t))[0] for k in COHORTS[t]}
        own |= {k: part(fitted[k], own[k]) for k in COHORTS[t]}
        shared = mean_of(fitted, shared)
        real.assert_close(made.states[t + 1].shared, shared)
        for k in EVERYBODY:
            real.assert_close(made.private[t + 1][k], own[k])
            same = all(torch.equal(made.private[t][k][name], made.private[t + 1][k][name]) for name in own[k])
            assert same == (k not in COHORTS[t])
    assert_predicts(made, {k: {**shared, **own[k]} for k in EVERYBODY})
    assert made.assembled is None, "there is no global B, so there is no global model"


PULL = 0.7


@kinds
def test_ditto(kind: real.Kind) -> None:
    """v_k is trained from v_k on F_k(v) + (λ/2)·‖v − w_t‖² with w_t as received; w is FedAvg's and knows nothing of v_k."""
    made = real.run(Ditto(real.INNER, pull=PULL), kind)
    common, losses = averaged()
    own: dict[int, Arrays] = dict.fromkeys(EVERYBODY, real.start())
    assert_handed_out(made, real.start())
    for t, exchange in enumerate(made.asked("train")):
        assert tuple(exchange.down) == COHORTS[t]
        assert_travels(exchange, real.start(), real.start())
        for k in COHORTS[t]:
            own[k], _ = trained(k, own[k], real.start(), epochs(k, "batches", t), pull=PULL, towards=common[t])
            update = exchange.up[k]
            assert update.metrics["loss"] == pytest.approx(np.mean(losses[t][k]), abs=1e-4)
            assert (update.num_examples, update.examples) == (real.SIZES[k], 4 * real.SIZES[k]), "both models are trained"
        real.assert_close(made.states[t + 1].shared, common[t + 1])
        for k in EVERYBODY:
            real.assert_close(made.private[t + 1][k], own[k])
    assert_predicts(made, own)
    assert made.assembled is not None
    real.assert_close(made.assembled, common[-1])


def test_ditto_without_a_pull_is_training_alone() -> None:
    """min F_k(v) + (λ/2)·‖v − w‖² with λ = 0 is min F_k(v): the personal models are those of no federation, to the bit."""
    free, alone, held = (
        real.run(method, "serial") for method in (Ditto(real.INNER, pull=0.0), Local(real.INNER), Ditto(real.INNER, pull=PULL))
    )
    for k in EVERYBODY:
        assert all(torch.equal(free.private[-1][k][name], alone.private[-1][k][name]) for name in real.start())
        far, near = (
            np.sqrt(sum(float((m.private[-1][k][n] - m.states[-1].shared[n]).square().sum()) for n in real.start())) for m in (free, held)
        )
        assert near < far, "a pull brings the personal model nearer to the global one"


@kinds
def test_rolora(kind: real.Kind) -> None:
    """The factors take turns: B first, under the shared A; then A, under the shared B; what was trained is averaged, the other stays."""
    made = real.run(RoLora(real.INNER), kind)
    shared = real.start()
    assert [exchange.op for exchange in made.exchanges] == ["train"] * 3 + ["predict"]
    for t, exchange in enumerate(made.asked("train")):
        moving = [name for name in shared if not (is_b(name) if t % 2 else is_a(name))]
        assert tuple(exchange.down) == COHORTS[t]
        assert_travels(exchange, shared, moving)
        fitted = {k: trained(k, shared, moving, epochs(k, "batches", t)) for k in COHORTS[t]}
        for k, update in exchange.up.items():
            assert update.metrics["loss"] == pytest.approx(np.mean(fitted[k][1]), abs=1e-4)
        shared = {**shared, **mean_of({k: own for k, (own, _) in fitted.items()}, moving)}
        real.assert_close(made.states[t + 1].shared, shared)
        stays = set(shared) - set(moving)
        assert len(stays) == 2 * real.LAYERS and all(torch.equal(made.states[t + 1].shared[n], made.states[t].shared[n]) for n in stays)
        assert not any(own for kept in made.private + made.memory for own in kept.values()), "a device keeps nothing"
    assert_predicts(made, dict.fromkeys(EVERYBODY, shared))
    assert made.assembled is not None
    real.assert_close(made.assembled, shared)


@pytest.mark.parametrize("top", [0, 2])
@kinds
def test_fedalt_partial(kind: real.Kind, top: int) -> None:
    """A participation trains the local part with the shared part fixed, then the shared part with the new local part fixed."""
    made = real.run(FedAltPartial(real.INNER, epochs=1, top_layers=top), kind)
    start = real.start()
    head = {name for name in start if not is_lora(name)}
    upper = {name for name in start if is_lora(name) and (layer_of(name) or 0) >= real.LAYERS - top}
    local, shared = (upper, part(start, set(start) - upper)) if top else (head, part(start, set(start) - head))
    own = {k: part(start, local) for k in EVERYBODY}
    undecided: dict[int, dict[str, np.ndarray]] = {k: {} for k in EVERYBODY}
    assert_handed_out(made, local)
    for t, exchange in enumerate(made.asked("train")):
        assert tuple(exchange.down) == COHORTS[t]
        assert_travels(exchange, shared, shared)
        fitted: dict[int, Arrays] = {}
        for k in COHORTS[t]:
            both = epochs(k, "batches", t)
            first, losses = trained(k, {**shared, **own[k]}, local, both[: len(both) // 2], undecided=undecided[k])
            own[k] = part(first, local)
            fitted[k], more = trained(k, first, shared, both)
            update = exchange.up[k]
            assert update.metrics["loss"] == pytest.approx((np.mean(losses) + np.mean(more)) / 2, abs=1e-4)
            assert (update.num_examples, update.examples) == (real.SIZES[k], 3 * real.SIZES[k]), (
                "one epoch on the local part, two on the other"
            )
        shared = mean_of(fitted, shared)
        real.assert_close(made.states[t + 1].shared, shared)
        for k in EVERYBODY:
            real.assert_close(made.private[t + 1][k], own[k], undecided=undecided[k])
            same = all(torch.equal(made.private[t][k][name], made.private[t + 1][k][name]) for name in local)
            assert same == (k not in COHORTS[t])
    assert_predicts(made, {k: {**shared, **own[k]} for k in EVERYBODY})
    if not top:
        assert made.assembled is None, "there is no global head, so there is no global model"
        return
    assert made.assembled is not None
    real.assert_close(made.assembled, shared)
    everything = real.devices()[real.CENTRE].test
    (done,) = real.compute(kind).run([Predict(made.assembled, everything)])
    due = real.encoder().forward({**start, **shared}, pad(real.as_oracle(everything))).logits
    np.testing.assert_allclose(done.result.numpy(), due, atol=3e-3)


# ---- a device that never took part ---------------------------------------------------------------------------------------------

ONCE = replace(real.POOL, rounds=1)
(ABSENT,) = set(EVERYBODY) - set(uniform(ONCE, 0))

WITHOUT_ITS_TURN = {
    "ffa": (FfaLora(real.INNER), lambda name: False),
    "rolora": (RoLora(real.INNER), lambda name: False),
    "fedsa": (FedSaLora(real.INNER), lambda name: not is_a(name)),
    "fedalt-partial": (FedAltPartial(real.INNER), lambda name: not is_lora(name)),
    "fedalt-partial, top layers": (FedAltPartial(real.INNER, top_layers=2), lambda name: (layer_of(name) or 0) >= 2),
    "ditto": (Ditto(real.INNER), lambda name: True),
}


@pytest.mark.parametrize("which", WITHOUT_ITS_TURN)
def test_a_device_that_never_took_part_predicts_with_the_start_where_it_is_its_own(which: str) -> None:
    """Personal tensors begin at the common start and move only when the device takes part; shared ones are the server's."""
    method, of_its_own = WITHOUT_ITS_TURN[which]
    made = real.run(method, "serial", ONCE)
    started = {name for name in real.start() if of_its_own(name)}
    common = real.arrays({**made.states[-1].server, **made.states[-1].shared})
    whole = {**part(real.start(), started), **{name: tensor for name, tensor in common.items() if name not in started}}
    assert set(whole) == set(real.start())
    np.testing.assert_allclose(made.logits[ABSENT]["test"].numpy(), logits(whole, ABSENT), atol=1e-3)
    everybody_else = [k for k in EVERYBODY if k != ABSENT]
    assert all(bool(made.private[-1][k]) == (which != "rolora") for k in EVERYBODY)
    if started:
        assert all(np.abs(made.logits[k]["test"].numpy() - logits({**whole}, k)).max() > 0.01 for k in everybody_else)


# ---- the distance to the ideal update ------------------------------------------------------------------------------------------


@cache
def wide() -> Model:
    return load(str(tiny.folder(real.LAYERS)), num_labels=3, adapter=real.WIDE, seed=1, max_length=16)


@cache
def played(method: Method) -> real.Run:
    return real.watch(method, Serial(wide()), Pool(EVERYBODY, 3, 2, 8), wide())


def ideal(exchange: real.Exchange) -> Arrays:
    """Σ_k p_k s·B_k A_k of what the devices had at the end of their training, by the name of B; float64."""
    n = sum(real.SIZES[k] for k in exchange.up)
    total: Arrays = {}
    for k in exchange.up:
        ((item, result),) = exchange.work[k]
        assert isinstance(result, Fitted)
        own = real.arrays({**item.fixed, **result.tensors})
        for name in filter(is_b, own):
            total[name] = (
                total.get(name, 0)
                + real.SIZES[k] / n * real.WIDE.alpha / real.WIDE.rank * own[name] @ own[name.replace("lora_B", "lora_A")]
            )
    return total


def distance(method: Method) -> list[float]:
    """‖made − ideal‖ / ‖ideal‖ over all weights together, after each round."""
    run, off = played(method), []
    for t, exchange in enumerate(run.asked("train")):
        due = ideal(exchange)
        now = real.arrays({**run.states[t + 1].server, **run.states[t + 1].shared})
        made = {name: real.WIDE.alpha / real.WIDE.rank * now[name] @ now[name.replace("lora_B", "lora_A")] for name in due}
        assert {tensor.shape for tensor in due.values()} == {(16, 16), (32, 16), (16, 32)}
        off.append(np.sqrt(sum(((made[n] - due[n]) ** 2).sum() for n in due) / sum((due[n] ** 2).sum() for n in due)))
    return off


@pytest.mark.parametrize("method", [FfaLora(real.INNER), RoLora(real.INNER)], ids=["ffa", "rolora"])
def test_the_average_is_exact(method: Method) -> None:
    """With one factor the same everywhere, s·B̄Ā = Σ p_k s·B_k A_k: no aggregation error, whatever n_k, rank and shape. FedIT has one."""
    off = distance(method)
    assert len(off) == 2 and max(off) <= 1e-6, off
    assert min(distance(FedAvg(**vars(real.INNER)))) > 1e-3


@pytest.mark.parametrize("method", [FfaLora(real.INNER), RoLora(real.INNER)], ids=["ffa", "rolora"])
def test_the_global_model_is_the_base_with_the_ideal_update_added(method: Method) -> None:
    """W = W_0 + Σ p_k s·B_k A_k in the layers, the head's mean on top: the same logits, from NumPy and from the merged model's weights."""
    run = played(method)
    assert run.assembled is not None
    due, of = ideal(run.asked("train")[-1]), wide()
    weights = {name: tensor.numpy() for name, tensor in of.module.state_dict().items()}
    encoder = Encoder.of(weights, heads=of.config.num_attention_heads, scaling=float("nan"), eps=of.config.layer_norm_eps)
    plain = merged(of.module, of.parameters, dict(run.assembled)).state_dict()
    moved: Arrays = {name: tensor for name, tensor in real.arrays(run.assembled).items() if not is_lora(name)}
    without_pairs = {name: tensor for name, tensor in encoder.weights.items() if ".lora_" not in name}
    for name, update in due.items():
        at = name.removeprefix("base_model.model.").replace(".lora_B", "")
        moved[at] = without_pairs[at] + update
        np.testing.assert_allclose(plain[at].double().numpy(), moved[at], atol=1e-6)
        assert np.abs(update).max() > 1e-3
    everything = real.devices()[real.CENTRE].test
    (done,) = Serial(of).run([Predict(run.assembled, everything)])
    made = replace(encoder, weights=without_pairs).forward(moved, pad(real.as_oracle(everything))).logits
    np.testing.assert_allclose(done.result.numpy(), made, atol=2e-5)
