"""The device's half of FibecFed, played by hand: every work item is inspected and answered with a made-up result."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from fedloom.client.client import Client
from fedloom.client.neurons import packed, rows_kept, unpacked, whole_private
from fedloom.compute.work import Fisher, Fit, Score, Sensitivity
from fedloom.messages import Update, Work, ask
from fedloom.methods.fedavg import FedAvg
from fedloom.methods.fibecfed import Curriculum, FibecFed, neuron_masks
from fedloom.tensors import fingerprint
from tests.flows import (
    FACTORS,
    HEAD,
    client,
    fitted,
    of_layers,
    same,
    start,
    work,
)


def device(method: FibecFed, k: int = 1, gal: tuple[int, ...] = (1, 2, 3)) -> Client:
    """A device after the set-up: difficulties are 0, 1, 2, …, everything of B is worth the same."""
    c = client(k)
    batch = method.inner.cut(c, "batches")[0]
    items, update = work(
        method.inspect(c, ask(method.inspect, k, start())),
        np.arange(len(c.train), dtype=np.float64),
        [np.array([0.1, 0.2, 0.3, 0.4])],
    )
    score, (sense,) = items
    assert isinstance(score, Score)
    assert isinstance(sense, Sensitivity)
    assert score.examples is c.train
    assert sense.batch.tolist() == batch.tolist()
    assert (sense.rho, sense.norm) == (method.gal.rho, method.gal.norm)
    assert update.tensors["layer_scores"].tolist() == [0.1, 0.2, 0.3, 0.4]
    assert set(update.tensors) == {"layer_scores"}, "difficulties never leave the device"
    operation = method.adopt(c, ask(method.adopt, k, gal=list(gal)))
    drive(operation)
    return c


def drive(operation: Work[Update]) -> Update:
    """Answer every item of an operation: weights move by one, Fisher grows with the row number."""
    result: Any = None
    try:
        while True:
            item = operation.send(result)
            result = (
                fitted(item) if isinstance(item, Fit) else {n: torch.ones_like(t).cumsum(0) for n, t in item.at.items() if n in item.over}
            )
    except StopIteration as done:
        return done.value


def test_the_score_is_over_all_or_without_the_head() -> None:
    for head in ("warm", "as-is", "left-out"):
        for over in ("auto", "adapter", "all"):
            if (head, over) == ("left-out", "all"):
                with pytest.raises(ValueError, match="left-out of the score, and over all would have it in"):
                    Curriculum(head=head, over=over)
                continue
            method = FibecFed(curriculum=Curriculum(head=head, over=over))
            due = frozenset(FACTORS) if head == "left-out" or over == "adapter" else None
            assert next(method.inspect(client(), ask(method.inspect, 1, start()))).over == due


def test_adopting_keeps_the_local_layers_from_the_common_start_and_fixes_the_mask() -> None:
    method = FibecFed(FedAvg(batch_size=4), keep=0.5, warmup_epochs=2, momentum=0.25)
    c = device(method, gal=(1, 3))
    assert set(c.private) == of_layers(0, 2)
    assert all(torch.equal(t, start()[n]) for n, t in whole_private(c).items()), "the warm-up weights are thrown away"
    assert set(rows_kept(c)) == {n for n in of_layers(0, 2) if "lora_B" in n}
    assert all(rows.tolist() == [2, 3] and len(c.private[n]) == 2 for n, rows in rows_kept(c).items())


def test_a_row_that_is_left_out_and_is_not_zero_is_kept_and_fixed() -> None:
    """Under another start than B = 0 the rows that are not trained are a part of the model: stored, and without state."""
    method = FibecFed(FedAvg(batch_size=4), keep=0.5)
    c = client()
    begun = {n: t + 1 for n, t in start().items()}
    work(method.inspect(c, ask(method.inspect, 1, begun)), np.zeros(9), [np.zeros(4)])
    drive(method.adopt(c, ask(method.adopt, 1, gal=[1, 2, 3])))
    assert not rows_kept(c) and all(torch.equal(c.private[n], begun[n]) for n in of_layers(0))
    ups = {n for n in of_layers(0) if "lora_B" in n}
    for t in (1, 2):
        fit, update = trained(method, c, t)
        assert not fit.mask and {n: at.tolist() for n, at in fit.rows.items()} == {n: [2, 3] for n in ups} and set(fit.fixed) == ups
        assert all(torch.equal(fit.fixed[n][:2], begun[n][:2]) and torch.equal(fit.fixed[n][2:], fit.start[n]) for n in ups)
        assert all(torch.equal(c.private[n], begun[n] + t * torch.tensor([[0], [0], [1], [1]])) for n in ups)
        assert all(torch.equal(c.private[n], begun[n] + t) for n in of_layers(0) - ups)
        numbers = sum(x.numel() for x in (*c.private.values(), *update.tensors.values()))
        assert int(c.memory["optimizer_bytes_whole"]) == 2 * 4 * numbers
        assert int(c.memory["optimizer_bytes"]) == 2 * 4 * (numbers - sum(begun[n][:2].numel() for n in ups))


def test_the_warm_up_trains_all_factors_on_all_batches_easy_first_under_the_fixed_head() -> None:
    method = FibecFed(FedAvg(batch_size=4), warmup_epochs=2)
    c = client()
    work(method.inspect(c, ask(method.inspect, 1, start())), -np.arange(9.0), [np.zeros(4)])
    operation = method.adopt(c, ask(method.adopt, 1, gal=[1, 2, 3]))
    first = next(operation)
    assert set(first.start) == set(FACTORS)
    assert set(first.fixed) == set(HEAD)
    assert sorted(np.concatenate(first.batches).tolist()) == list(range(9))
    means = [float(-batch.mean()) for batch in first.batches]
    assert means == sorted(means)
    assert first.moments is None
    fisher = operation.send(fitted(first, 1.0))
    assert isinstance(fisher, Fisher)
    assert (fisher.over, fisher.examples) == (frozenset(FACTORS), c.train)
    assert float(fisher.at["m.layer.0.q.lora_B.weight"][0, 0]) == 1.0
    assert set(fisher.at) == set(start())
    second = operation.send({n: torch.ones_like(start()[n]) for n in FACTORS})
    assert float(second.start["m.layer.0.q.lora_B.weight"][0, 0]) == 1.0, "the second epoch goes on from the first"
    assert second.moments is not None
    assert second.dropout_seed != first.dropout_seed


def test_momentum_weighs_the_epochs() -> None:
    """Row 3 is best in the first epoch, row 0 in the second: γ decides which of them survives."""
    first, second = torch.tensor([0.0, 1.0, 2.0, 9.0]), torch.tensor([5.0, 1.0, 2.0, 0.0])
    for momentum, best in ((0.9, 3), (0.1, 0)):
        method = FibecFed(FedAvg(batch_size=4), keep=0.25, warmup_epochs=2, momentum=momentum)
        c = client()
        work(method.inspect(c, ask(method.inspect, 1, start())), np.arange(9.0), [np.zeros(4)])
        operation = method.adopt(c, ask(method.adopt, 1, gal=[1, 2, 3]))
        item: Any = next(operation)
        for rows in (first, second):
            fisher = operation.send(fitted(item))
            made = {n: torch.zeros_like(fisher.at[n]) for n in FACTORS}
            made["m.layer.0.q.lora_B.weight"] = rows[:, None].expand(4, 2)
            made["m.layer.0.v.lora_B.weight"] = rows[:, None].expand(4, 2)
            try:
                item = operation.send(made)
            except StopIteration:
                break
        assert rows_kept(c)["m.layer.0.q.lora_B.weight"].tolist() == [best]


def test_asked_to_adopt_twice_a_device_does_it_once() -> None:
    """Its answer was lost on the way: the second asking must not warm up from what is left."""
    method = FibecFed(keep=0.5)
    c = device(method, gal=(1, 3))
    before = fingerprint(c.private), fingerprint(c.memory)
    items, update = work(method.adopt(c, ask(method.adopt, 1, gal=[1, 3])))
    assert (items, update.client) == ([], 1)
    assert (fingerprint(c.private), fingerprint(c.memory)) == before


def test_without_local_layers_or_with_all_neurons_there_is_no_warm_up() -> None:
    for method, gal in ((FibecFed(), (0, 1, 2, 3)), (FibecFed(keep=1.0), (0,))):
        c = client()
        work(method.inspect(c, ask(method.inspect, 1, start())), np.zeros(9), [np.zeros(4)])
        items, _ = work(method.adopt(c, ask(method.adopt, 1, gal=list(gal))))
        assert items == []
        assert set(c.private) == set(FACTORS) - of_layers(*gal)
        assert not rows_kept(c) and not [n for n in c.memory if n.startswith("mask/")]


def trained(method: FibecFed, c: Client, t: int, gal: tuple[int, ...] = (1, 2, 3), rounds: int = 10) -> tuple[Fit, Update]:
    shared = {n: x + 10 for n, x in start().items() if n in of_layers(*gal) | set(HEAD)}
    operation = method.train(c, ask(method.train, c.id, shared, round=t, rounds=rounds))
    fit = next(operation)
    assert isinstance(fit, Fit)
    with pytest.raises(StopIteration) as done:
        operation.send(fitted(fit))
    return fit, done.value.value


def test_a_device_trains_gal_and_head_dense_and_its_own_layers_masked_and_uploads_what_came() -> None:
    method = FibecFed(FedAvg(batch_size=2, local_epochs=3), keep=0.5)
    c = device(method, gal=(1, 3))
    fit, update = trained(method, c, 0, (1, 3))
    assert set(fit.start) == set(start())
    assert all(float(fit.start[n].flatten()[0]) >= 10 for n in of_layers(1, 3) | set(HEAD))
    assert all(float(fit.start[n].flatten()[0]) <= 1 for n in of_layers(0, 2))
    assert {n: rows.tolist() for n, rows in fit.rows.items()} == {n: [2, 3] for n in of_layers(0, 2) if "lora_B" in n}
    assert not fit.mask and all(fit.start[n].shape == (2, 2) for n in fit.rows)
    assert set(update.tensors) == of_layers(1, 3) | set(HEAD)
    assert set(c.private) == of_layers(0, 2)

    def begun(n: str) -> torch.Tensor:
        return start()[n][2:] if n in fit.rows else start()[n]

    assert all(torch.equal(c.private[n], begun(n) + 1) for n in c.private)
    numbers = sum(t.numel() for t in (*c.private.values(), *update.tensors.values()))
    assert int(c.memory["optimizer_bytes"]) == 2 * 4 * numbers, "two float32 numbers for each that is trained"
    again, _ = trained(method, c, 5, (1, 3))
    assert all(torch.equal(again.start[n], begun(n) + 1) for n in of_layers(0, 2)), "local layers persist"
    predictor = work(method.personalise(c, update.tensors))[1]
    assert set(predictor.tensors) == set(start())
    assert all(predictor.tensors[n].tolist() == [[0, 0], [0, 0], [2, 2], [2, 2]] for n in fit.rows)
    assert all(torch.equal(predictor.tensors[n], start()[n] + 2) for n in of_layers(0, 2) - set(fit.rows))


def test_the_curriculum_opens_the_easiest_batches_and_more_of_them_each_round() -> None:
    method = FibecFed(FedAvg(batch_size=2, local_epochs=2), Curriculum(start=0.4, full_at=0.5))
    c = device(method, k=2)  # 12 examples: 6 batches
    c.memory["difficulty"] = torch.from_numpy(np.array([5, 3, 9, 1, 7, 2, 8, 0, 6, 4, 11, 10], np.float64))
    cut = method.inner.cut(c, "batches")
    order = sorted(range(6), key=lambda i: c.memory["difficulty"].numpy()[cut[i]].mean())
    for t, opened in enumerate([3, 4, 4, 5, 6, 6, 6, 6, 6, 6]):  # ceil of 2.4, 3.12, 3.84, 4.56, 5.28, 6, …
        fit, _ = trained(method, c, t)
        assert same(fit.batches, [cut[i] for i in order[:opened]] * 2)


def test_example_granularity_sorts_before_it_cuts() -> None:
    method = FibecFed(FedAvg(batch_size=4, local_epochs=1), Curriculum(granularity="example", pacing="none"))
    c = device(method)
    c.memory["difficulty"] = torch.tensor([8.0, 1, 7, 2, 6, 3, 5, 4, 0], dtype=torch.float64)
    fit, _ = trained(method, c, 0)
    assert [b.tolist() for b in fit.batches] == [[8, 1, 3, 5], [7, 6, 4, 2], [0]]


def test_scores_are_refreshed_when_they_are_old_enough() -> None:
    method = FibecFed(FedAvg(batch_size=4), Curriculum(refresh=3))
    c = device(method)
    shared = {n: start()[n] for n in of_layers(1, 2, 3) | set(HEAD)}
    for t, refreshed in ((2, False), (4, True), (6, False), (7, True)):
        operation = method.train(c, ask(method.train, 1, shared, round=t, rounds=10))
        item = next(operation)
        assert isinstance(item, Score) == refreshed
        if refreshed:
            assert set(item.at) == set(start())
            item = operation.send(np.full(9, float(t)))
            assert (float(c.memory["difficulty"][0]), int(c.memory["scored_at"])) == (t, t)
        with pytest.raises(StopIteration):
            operation.send(fitted(item))


def test_the_head_warms_up_alone_on_one_epoch() -> None:
    method, c = FibecFed(FedAvg(batch_size=4)), client()
    operation = method.warm_head(c, ask(method.warm_head, 1, {n: start()[n] for n in HEAD}, round=-1))
    fit = next(operation)
    assert sorted(fit.start) == HEAD
    assert sorted(np.concatenate(fit.batches).tolist()) == list(range(9))
    with pytest.raises(StopIteration) as done:
        operation.send(fitted(fit))
    assert sorted(done.value.value.tensors) == HEAD
    assert (c.private, c.memory) == ({}, {})


def test_masks_rank_the_neurons_of_a_layers_pairs_together_with_as_share() -> None:
    q, v = "m.layer.2.q.lora_B.weight", "m.layer.2.v.lora_B.weight"
    fisher = {
        q: torch.tensor([[1.0, 0.0], [0.0, 2.0], [0.5, 0.0], [0.0, 0.0]]),
        v: torch.tensor([[0.0, 0.9], [0.1, 0.0], [0.2, 0.0], [0.0, 0.0]]),
        "m.layer.2.q.lora_A.weight": torch.zeros(2, 3),
        "m.layer.2.v.lora_A.weight": torch.full((2, 3), 0.4),  # 2.4 in all, 0.6 a neuron of v
    }
    masks = neuron_masks(fisher, 0.5)  # 4 of 8: q1 2.0, v0 1.5, q0 1.0, then v2 0.8 before v1 0.7 and v3 0.6
    assert masks[q].tolist() == [[1], [1], [0], [0]]
    assert masks[v].tolist() == [[1], [0], [1], [0]]
    assert neuron_masks(fisher, 1.0)[q].tolist() == [[1]] * 4
    assert sum(float(m.sum()) for m in neuron_masks(fisher, 0.01).values()) == 1
    assert sum(float(m.sum()) for m in neuron_masks(fisher, 1e-12).values()) == 1, "one at least"
    apart = {"m.pooler.lora_B.weight": torch.tensor([[9.0], [8.0], [7.0], [99.0]])}
    both = neuron_masks({**fisher, **apart}, 0.5)
    assert both.pop("m.pooler.lora_B.weight").flatten().tolist() == [1, 0, 0, 1], "what is of no layer competes with no layer"
    assert {n: m.tolist() for n, m in both.items()} == {n: m.tolist() for n, m in masks.items()}


def test_as_share_is_over_the_rows_of_its_own_pair() -> None:
    """With grouped queries a value has fewer output neurons than its query; here it is the query that has fewer. By hand, as in
    ``test_numpy_fibecfed.py``: best first v2 4, q1 3.5, q0 3, v0 3, v3 3, v1 2."""
    q, v = "m.layer.1.q.lora_B.weight", "m.layer.1.v.lora_B.weight"
    fisher = {
        q: torch.tensor([[1.0, 1.0], [1.0, 1.5]]),  # 2, 2.5
        v: torch.tensor([[0.5, 0.5], [0.0, 0.0], [2.0, 0.0], [0.0, 1.0]]),  # 1, 0, 2, 1
        "m.layer.1.q.lora_A.weight": torch.tensor([[1.0, 0.0], [0.0, 1.0]]),  # 2 over two neurons
        "m.layer.1.v.lora_A.weight": torch.tensor([[4.0, 2.0], [1.0, 1.0]]),  # 8 over four neurons
    }
    for keep, due in {
        0.3: [[0, 1], [0, 0, 1, 0]],
        0.5: [[1, 1], [0, 0, 1, 0]],
        4 / 6: [[1, 1], [1, 0, 1, 0]],
        0.67: [[1, 1], [1, 0, 1, 1]],
    }.items():
        masks = neuron_masks(fisher, keep)
        assert [masks[n].flatten().tolist() for n in (q, v)] == due, keep


@pytest.mark.parametrize("keep", [0.0, -0.5, 1.01])
def test_impossible_keep(keep: float) -> None:
    with pytest.raises(ValueError, match=r"keep must be in \(0, 1\]"):
        neuron_masks({}, keep)


@pytest.mark.parametrize("mask", [[0, 0, 1, 1], [1] * 8, [0] * 8, [0, 1] * 8 + [0], [1]])
def test_masks_survive_as_bits(mask: list[int]) -> None:
    bits = packed(torch.tensor(mask, dtype=torch.float32)[:, None])
    assert bits.dtype is torch.uint8 and len(bits) == len(mask) // 8 + 1
    assert unpacked(bits).tolist() == [bool(one) for one in mask]
