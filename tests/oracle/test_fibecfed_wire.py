"""FibecFed as it runs, against its NumPy derivation: what crosses the wire, in which phase, how many bytes; and how it is evaluated."""

from __future__ import annotations

import numpy as np
import torch

from fedloom.compute.work import Predict
from fedloom.messages import Tensors
from fedloom.model.names import is_factor
from fedloom.tensors import nbytes
from tests.oracle import real
from tests.oracle.fibecfed_cases import COHORTS, Case, every_case
from tests.oracle.numpy_encoder import pad
from tests.oracle.numpy_training import payload


def rows_of(tensors: Tensors) -> list[bytes]:
    """The bits of every row that is not 0: what would be found in a blob that held the tensor."""
    rows = [row for tensor in tensors.values() for row in tensor.reshape(len(tensor), -1) if row.any()]
    return [row.contiguous().numpy().tobytes() for row in rows]


@every_case
def test_phases(case: Case) -> None:
    """Initialisation, once, all devices: score data and layers; the server picks the GAL and broadcasts it; masks. Then the rounds."""
    warm = ["warm_head"] * len(case.due.head_rounds)
    assert [e.op for e in case.made.exchanges] == [*warm, "inspect", "adopt", *["train"] * real.POOL.rounds, "predict"]
    for exchange in case.made.exchanges:
        if exchange.op in ("inspect", "adopt", "predict"):
            assert tuple(exchange.down) == real.POOL.clients


@every_case
def test_keys_and_bytes_of_the_set_up(case: Case) -> None:
    """Every device scores its data and its layers; it uploads the layer scores only; the server broadcasts the choice."""
    names = set(real.start())
    head = {name for name in names if not is_factor(name)}
    for exchange in case.made.asked("warm_head"):
        for k in exchange.down:
            assert set(exchange.down[k].tensors) == set(exchange.up[k].tensors) == head
            assert nbytes(exchange.down[k].tensors) == nbytes(exchange.up[k].tensors) == payload(real.start(), head)
    (inspect,), (adopt,) = case.made.asked("inspect"), case.made.asked("adopt")
    for k in real.POOL.clients:
        assert set(inspect.down[k].tensors) == names and nbytes(inspect.down[k].tensors) == payload(real.start(), names)
        assert set(inspect.up[k].tensors) == {"layer_scores"} and nbytes(inspect.up[k].tensors) == 8 * real.LAYERS
        assert not adopt.down[k].tensors and not adopt.up[k].tensors and set(adopt.down[k].settings) == {"gal"}
        assert not inspect.up[k].metrics and not adopt.up[k].metrics
        assert inspect.up[k].num_examples == adopt.up[k].num_examples == real.SIZES[k]


@every_case
def test_keys_and_bytes_of_every_round(case: Case) -> None:
    """The server sends the GAL tensors to the cohort; a device uploads GAL only. The task head is shared and aggregated."""
    for t, exchange in enumerate(case.made.asked("train")):
        due = case.due.rounds[t]
        assert all(set(exchange.down[k].tensors) == due.down and set(exchange.up[k].tensors) == due.up for k in COHORTS[t])
        assert sum(nbytes(task.tensors) for task in exchange.down.values()) == due.bytes_down
        assert sum(nbytes(update.tensors) for update in exchange.up.values()) == due.bytes_up
        assert all(set(task.settings) == {"round", "rounds"} for task in exchange.down.values())
        assert all(set(update.metrics) == {"loss"} for update in exchange.up.values())
        sent = case.made.states[t].shared
        assert all(torch.equal(task.tensors[name], sent[name]) for task in exchange.down.values() for name in sent)
        # a blob is 8 bytes, a header that has no room for tensors, and the payload
        for k in COHORTS[t]:
            for blob, said in ((exchange.sent[k], exchange.down[k]), (exchange.came[k], exchange.up[k])):
                header = int.from_bytes(blob[:8], "little")
                assert len(blob) == 8 + header + nbytes(said.tensors) and header < 400 + 200 * len(said.tensors)


@every_case
def test_no_local_layer_ever_travels_up(case: Case) -> None:
    """Non-GAL LoRA never leaves the device: neither its name nor a row of its values is in any upload."""
    for exchange in case.made.asked("inspect") + case.made.asked("adopt") + case.made.asked("train"):
        for k, blob in exchange.came.items():
            for private in case.made.private:
                assert not [name for name in private[k] if name.encode() in blob]
                assert not [row for row in rows_of(private[k]) if row in blob]
    last = case.made.asked("train")[-1]
    assert all(row in blob for k, blob in last.came.items() for row in rows_of(last.up[k].tensors)), "such rows could be found"


@every_case
def test_no_local_layer_travels_down_after_the_set_up(case: Case) -> None:
    """Each round the server sends the GAL tensors, and it keeps no others."""
    for t, exchange in enumerate(case.made.asked("train")):
        local = set(case.made.private[0][0])
        assert set(case.made.states[t].shared) == set(real.start()) - local
        assert not [name for blob in exchange.sent.values() for name in local if name.encode() in blob]


@every_case
def test_difficulty_never_travels(case: Case) -> None:
    """It uploads the layer scores only: no difficulty of any example, in no precision, is in any message."""
    for exchange in case.made.exchanges:
        for k, blob in [*exchange.came.items(), *exchange.sent.items()]:
            difficulty = case.made.memory[0][k]["difficulty"]
            assert not [d for d in difficulty if d.numpy().tobytes() in blob or d.float().numpy().tobytes() in blob]
            assert b"mask" not in blob and b"difficulty" not in blob


@every_case
def test_a_new_cohort_every_round(case: Case) -> None:
    """A round t = 0..T-1 samples a cohort S_t: a seeded draw without replacement, another in each round."""
    asked = [tuple(exchange.down) for exchange in case.made.asked("train")]
    assert asked == list(COHORTS) and len(set(asked)) == len(asked) and all(len(set(cohort)) == 3 for cohort in asked)
    warm = [tuple(exchange.down) for exchange in case.made.asked("warm_head")]
    assert len(set(warm)) == len(warm) == len(case.due.head_rounds)


@every_case
def test_personalised_evaluation(case: Case) -> None:
    """Personalised: each device with its own local tensors + the shared ones, on its own test shard."""
    for k in real.POOL.clients:
        device = real.devices()[k]
        for split, shard in (("validation", device.validation), ("test", device.test)):
            due = real.encoder().forward(case.due.personal(k), pad(real.as_oracle(shard))).logits
            np.testing.assert_allclose(case.made.logits[k][split].numpy(), due, atol=1e-3)
        alone = real.encoder().forward(case.due.alone(), pad(real.as_oracle(device.test))).logits
        assert np.abs(case.made.logits[k]["test"].numpy() - alone).max() > 5e-3


@every_case
def test_global_evaluation(case: Case) -> None:
    """Global: the shared tensors alone on the whole test split."""
    everything = real.devices()[real.CENTRE].test
    assert case.made.assembled is not None and set(case.made.assembled) == case.due.rounds[-1].up
    (done,) = real.compute(case.kind).run([Predict(case.made.assembled, everything)])
    due = real.encoder().forward(case.due.alone(), pad(real.as_oracle(everything))).logits
    np.testing.assert_allclose(done.result.numpy(), due, atol=1e-3)


@every_case
def test_evaluation_changes_nothing(case: Case) -> None:
    """Evaluation needs no mask, trains nothing, and sends logits only."""
    (exchange,) = case.made.asked("predict")
    for k in real.POOL.clients:
        assert all(isinstance(item, Predict) for item, _ in exchange.work[k]) and set(exchange.up[k].tensors) == {"validation", "test"}
        assert set(exchange.down[k].tensors) == case.due.rounds[-1].down
