"""FibecFed as it runs, on both computes, against its NumPy derivation: scores, curriculum, layers, masks, averages.

Each test's docstring is the sentence of the specification that it holds the method to. ``test_fibecfed_wire.py`` has the exchange.
"""

from __future__ import annotations

from dataclasses import replace
from functools import cache

import numpy as np
import pytest
import torch

from fedloom.client.curriculum import Pacing
from fedloom.compute.flops import Flops
from fedloom.compute.work import Fit, Score
from fedloom.methods.fibecfed import Gal, choose_gal
from fedloom.model.blocks import layer_of
from fedloom.model.names import is_factor, partner
from fedloom.server.participation import Pool
from tests.oracle import numpy_fibecfed as numpy
from tests.oracle import real
from tests.oracle.fibecfed_cases import COHORTS, LEAST, MOST, Case, derived, every_case, idle


def as_lists(batches) -> list[list[int]]:
    return [[int(i) for i in batch] for batch in batches]


# ---------------------------------------------------------------------------------------------- (a) difficulty and curriculum


@every_case
def test_difficulty(case: Case) -> None:
    """Difficulty is the squared norm of the example's own gradient at the initial model, true labels, over the trainable parameters."""
    for k in real.POOL.clients:
        np.testing.assert_allclose(case.made.memory[0][k]["difficulty"].numpy(), case.due.difficulties[k], rtol=2e-5)


@pytest.mark.parametrize("kind", ["serial", "stacked"])
def test_the_a_part_of_difficulty_is_exactly_zero_at_the_start(kind: real.Kind) -> None:
    """With B = 0, the A-part is exactly 0."""
    at, train = real.model().initial, real.devices()[0].train
    parts = [Score(at, train, frozenset(n for n in at if factor in n)) for factor in (".lora_A.", ".lora_B.")]
    of_a, of_b = (done.result for done in real.compute(kind).run(parts))
    assert (of_a == 0).all() and (of_b > 0).all()


@every_case
def test_difficulty_is_taken_after_the_head_warm_up(case: Case) -> None:
    """A fresh head dominates the score: score after a short federated head warm-up, or with the head left out."""
    (score,) = [item for item, _ in case.made.asked("inspect")[0].work[0] if isinstance(item, Score)]
    if case.method is LEAST:
        warmed = case.due.head_rounds
        for i, exchange in enumerate(case.made.asked("warm_head")):
            assert all(layer_of(name) is None and not is_factor(name) for up in exchange.up.values() for name in up.tensors)
            if i:
                for task in exchange.down.values():
                    real.assert_close(task.tensors, warmed[i - 1])
        assert len(case.made.asked("warm_head")) == len(warmed) == 2 and score.over is None
        assert max(np.abs(case.due.common[name] - real.start()[name]).max() for name in warmed[0]) > 0.01
    else:
        assert not case.made.asked("warm_head") and score.over == {n for n in score.at if is_factor(n)}
    real.assert_close(score.at, case.due.common)


@every_case
def test_batches_are_cut_once_and_taken_easy_first(case: Case) -> None:
    """Batches are cut once per device and stay fixed; d(batch) = mean_i d_i; sort ascending (easy first)."""
    for t, cohort in enumerate(COHORTS):
        for k in cohort:
            (fit,) = case.made.asked("train")[t].fits(k)
            opened = case.due.rounds[t].open[k]
            assert as_lists(fit.batches) == as_lists(case.due.order[k][:opened]) * case.method.inner.local_epochs
    assert any(as_lists(case.due.order[k]) != as_lists(case.method.inner.cut(real.devices()[k], "batches")) for k in real.POOL.clients)


@every_case
def test_open_batches_in_every_round(case: Case) -> None:
    """A device uses its first ceil(fraction · #batches) batches, each local epoch; the clock is the global round."""
    for t, exchange in enumerate(case.made.asked("train")):
        for k in COHORTS[t]:
            order = case.due.order[k]
            opened = numpy.open_batches(case.due.rounds[t].fraction, len(order))
            assert len(exchange.fits(k)[0].batches) == 2 * opened
            assert exchange.up[k].examples == 2 * sum(len(batch) for batch in order[:opened])
    assert case.made.states[0].facts["pacing"] == pytest.approx([turn.fraction for turn in case.due.rounds])


@pytest.mark.parametrize(("pacing", "start", "full_at"), [("sqrt", 0.1, 0.5), ("exp", 0.3, 1.0)])
def test_a_pacing_at_every_t(pacing: Pacing, start: float, full_at: float) -> None:
    """What is open in each of ten rounds is what the pacing says; each pacing's numbers are held in tests/unit/test_curriculum.py."""
    trained = idle(pacing, start, full_at).asked("train")
    assert len(trained) == 10
    for t, exchange in enumerate(trained):
        share = numpy.fraction(pacing, t, 10, start, full_at)
        for k, size in enumerate(real.SIZES):
            cut = real.INNER.cut(real.devices()[k], "batches")
            order = numpy.batch_order(np.random.default_rng(size).random(size), cut)
            due = order[: numpy.open_batches(share, len(cut))]
            assert as_lists(exchange.fits(k)[0].batches) == as_lists(due) * 2, (t, k)


def test_sample_granularity() -> None:
    """Option: sample granularity (sort samples, then cut)."""
    last = idle("linear", granularity="example").asked("train")[-1]
    for k, size in enumerate(real.SIZES):
        due = numpy.sample_order(np.random.default_rng(size).random(size), real.INNER.batch_size)
        assert as_lists(last.fits(k)[0].batches) == as_lists(due) * 2


@pytest.mark.parametrize("kind", ["serial", "stacked"])
def test_refresh_scores_at_the_current_model(kind: real.Kind) -> None:
    """Option: refresh the scores every R rounds at the current model."""
    method = replace(LEAST, curriculum=replace(LEAST.curriculum, refresh=2))
    made, scored_at = real.run(method, kind), dict.fromkeys(real.POOL.clients, 0)
    for t, exchange in enumerate(made.asked("train")):
        for k in exchange.up:
            fit, scored = exchange.fits(k)[0], [(item, result) for item, result in exchange.work[k] if isinstance(item, Score)]
            assert len(scored) == (t - scored_at[k] >= 2)
            for _, result in scored:
                scored_at[k] = t
                now = real.arrays({**made.private[t][k], **made.states[t].shared})
                due = numpy.difficulty(real.encoder(), now, real.questions(k), now)
                np.testing.assert_allclose(result, due, rtol=1e-4)
                order = numpy.batch_order(due, method.inner.cut(real.devices()[k], "batches"))
                assert as_lists(fit.batches) == as_lists(order) * 2
    assert 2 in scored_at.values()


# --------------------------------------------------------------------------------------- (b) layer sensitivity and the GAL


@every_case
def test_sensitivity_of_every_layer(case: Case) -> None:
    """E' = E + ρ·g/‖g‖_F; ‖H'_l − H_l‖_F / ‖H_l‖_F with ρ relative to ‖E‖_F, or | ‖H'_l‖_F − ‖H_l‖_F | / ‖H_l‖_F."""
    for k, update in case.made.asked("inspect")[0].up.items():
        np.testing.assert_allclose(update.tensors["layer_scores"].numpy(), case.due.layer_scores[k], rtol=1e-4, atol=1e-6)


@every_case
def test_layer_scores_are_combined_by_examples(case: Case) -> None:
    """Server: s_l = Σ_k (n_k/n) s_l^k."""
    combined = case.made.states[0].facts["layer_scores"]
    np.testing.assert_allclose(combined, case.due.scores, rtol=1e-4, atol=1e-6)
    assert np.abs(np.mean(list(case.due.layer_scores.values()), axis=0) - combined).max() > 1e-3


@every_case
def test_the_gal(case: Case) -> None:
    """Which end becomes GAL is a switch with the smallest scores as its default; how many: a fraction of the layers."""
    assert tuple(case.made.states[0].facts["gal"]) == case.due.gal
    assert len(case.due.gal) == {"least": 2, "most": 1}[case.method.gal.which]
    assert all(list(task.settings["gal"]) == list(case.due.gal) for task in case.made.asked("adopt")[0].down.values())
    assert Gal().which == "least" and Gal().fraction == 0.75


@pytest.mark.parametrize("which", ["least", "most"])
@pytest.mark.parametrize(("fraction", "count"), [(0.75, 0), (0.5, 0), (0.1, 0), (1.0, 0), (0.75, 2)])
def test_both_ends_and_every_size_of_the_gal(which, fraction: float, count: int) -> None:
    """How many: a count, a fraction (default 0.75 of the layers)."""
    scores = np.array([0.5, 0.1, 0.5, 0.9, 0.3, 0.2])
    due = numpy.choose_gal(scores, count or numpy.gal_count(fraction, 6), which)
    assert tuple(choose_gal(scores, list(range(6)), Gal(fraction, count, which), 0)) == due


def test_a_random_gal_is_seeded_and_of_the_right_size() -> None:
    """Make it a switch, plus `random`."""
    scores = np.arange(6.0)
    drawn = [choose_gal(scores, list(range(6)), Gal(0.5, which="random"), seed) for seed in range(20)]
    assert all(len(set(gal)) == 3 and gal == sorted(gal) and set(gal) < set(range(6)) for gal in drawn)
    assert drawn == [choose_gal(-scores, list(range(6)), Gal(0.5, which="random"), seed) for seed in range(20)]
    assert len({tuple(gal) for gal in drawn}) > 5
    made = real.run(replace(LEAST, gal=Gal(0.5, which="random")), "stacked", Pool(real.POOL.clients, 3, 1, 8))
    assert made.states[0].facts["gal"] == choose_gal(scores[:4], [0, 1, 2, 3], Gal(0.5, which="random"), 8)


# ---------------------------------------------------------------------------------------------------- (c) local update mask


@every_case
def test_momentum_fisher_of_the_warm_up(case: Case) -> None:
    """Warm up all LoRA for E_w epochs from the common start; F ← γF + (1−γ)F̃ over the epochs, F̃ = mean squared gradient."""
    for k in real.POOL.clients:
        device = replace(real.devices()[k], private=dict(case.made.asked("inspect")[0].down[k].tensors), memory=case.made.memory[0][k])
        work, on, answer = case.method._warm_up(device), real.compute(case.kind), None
        while True:
            try:
                answer = on.run([work.send(answer)])[0].result
            except StopIteration as done:
                fisher = done.value
                break
        assert set(fisher) == set(case.due.fishers[k])
        for name, due in case.due.fishers[k].items():
            np.testing.assert_allclose(fisher[name].numpy(), due, rtol=2e-3, atol=1e-5 * due.max())


@every_case
def test_the_warm_up_trains_lora_alone_with_one_optimiser(case: Case) -> None:
    """Warm up all LoRA on the device for E_w epochs, each over all batches, easy first; the head stays where it is."""
    (adopt,) = case.made.asked("adopt")
    for k in real.POOL.clients:
        fits = adopt.fits(k)
        assert len(fits) == case.method.warmup_epochs
        assert all(as_lists(fit.batches) == as_lists(case.due.order[k]) for fit in fits)
        assert all(set(map(is_factor, fit.start)) == {True} and set(map(is_factor, fit.fixed)) == {False} for fit in fits)
        assert [fit.moments.steps if fit.moments else 0 for fit in fits] == [len(case.due.order[k]) * epoch for epoch in range(len(fits))]


@every_case
def test_mask_rows(case: Case) -> None:
    """Neuron score: row μ of B, plus its share through A; keep the highest-scoring fraction; the mask is per device and fixed."""
    for memory in case.made.memory:
        for k in real.POOL.clients:
            masks = {name.removeprefix("mask/"): mask for name, mask in memory[k].items() if name.startswith("mask/")}
            assert set(masks) == set(case.due.masks[k])
            for name, mask in masks.items():
                assert mask.shape == (16, 1) and (mask.numpy() == case.due.masks[k][name]).all()
    assert any((case.due.masks[0][name] != case.due.masks[1][name]).any() for name in case.due.masks[0])


@every_case
def test_the_warm_up_is_thrown_away(case: Case) -> None:
    """The warm-up weights are thrown away: local layers begin at the common start."""
    common = case.made.asked("inspect")[0].down[0].tensors
    for k in real.POOL.clients:
        local = case.made.private[0][k]
        assert local and {layer_of(name) for name in local} == set(range(real.LAYERS)) - set(case.due.gal)
        assert all(torch.equal(tensor, common[name]) for name, tensor in local.items())


@every_case
def test_masked_rows_of_b_stay_exactly_zero(case: Case) -> None:
    """Masked-out rows of B get no update (and B = 0 there), so evaluation needs no mask; GAL layers are trained dense."""
    for t, exchange in enumerate(case.made.asked("train")):
        for k, update in exchange.up.items():
            for name, mask in case.due.masks[k].items():
                moved = case.made.private[t + 1][k][name] != 0
                assert (moved.all(1).numpy() == (mask[:, 0] == 1)).all() and (moved.any(1).numpy() == (mask[:, 0] == 1)).all()
                assert not torch.equal(case.made.private[t + 1][k][partner(name)], case.made.private[t][k][partner(name)])
            assert all((tensor != 0).all() for name, tensor in update.tensors.items() if ".lora_B." in name)


@cache
def counted(trained: frozenset[str], length: int, few: tuple[tuple[str, int], ...]) -> int:
    """Operations of one step on one text of that length, of ``few`` tensors these rows alone."""
    return Flops(real.model())._count(trained, length, dict(few))


@every_case
def test_masked_rows_take_no_storage_no_optimiser_state_and_no_products(case: Case) -> None:
    """The saving must be real: masked rows take no optimiser state, no upload, no storage; device time counts what was done."""
    for t, exchange in enumerate(case.made.asked("train")):
        for k in exchange.up:
            ((fit, fitted),) = [(item, result) for item, result in exchange.work[k] if isinstance(item, Fit)]
            held, masks = case.made.stored[t + 1][k], case.due.masks[k]
            assert set(fit.rows) == set(masks) and not fit.mask
            numbers = sum(t.numel() for n, t in real.model().initial.items() if n not in masks)
            for name, mask in masks.items():
                kept = np.flatnonzero(mask[:, 0])
                assert torch.equal(held[name], case.made.private[t + 1][k][name][kept]) and fit.rows[name].tolist() == kept.tolist()
                numbers += held[name].numel()
            for moments in (fitted.moments.first, fitted.moments.second):
                assert {n: m.shape for n, m in moments.items()} == {n: s.shape for n, s in fit.start.items()}
                assert sum(m.numel() for m in moments.values()) == numbers
            few = tuple((n, int(mask.sum())) for n, mask in masks.items())
            longest = [(len(batch), int(fit.examples.lengths[batch].max())) for batch in fit.batches]
            spent = sum(n * counted(frozenset(fit.start), length, few) for n, length in longest)
            whole = sum(n * counted(frozenset(fit.start), length, ()) for n, length in longest)
            assert exchange.up[k].flops == pytest.approx(spent, rel=1e-9) and spent < whole


# --------------------------------------------------------------------------------------------------------------- the rounds


@every_case
def test_what_every_device_trains(case: Case) -> None:
    """A device trains GAL (dense) and its own non-GAL LoRA (masked) on the open part: AdamW, clip 1, fresh at each participation."""
    for t, exchange in enumerate(case.made.asked("train")):
        for k, update in exchange.up.items():
            real.assert_close(update.tensors, case.due.rounds[t].updates[k])
            (result,) = [result for item, result in exchange.work[k] if isinstance(item, Fit)]
            np.testing.assert_allclose(result.losses, case.due.rounds[t].losses[k], rtol=1e-3, atol=1e-4)
            assert update.metrics["loss"] == pytest.approx(result.losses.mean()) and exchange.fits(k)[0].moments is None


@every_case
def test_the_aggregate_after_every_round(case: Case) -> None:
    """The server averages with p_k = n_k / Σ_{j∈S_t} n_j, GAL and head alike."""
    for t, exchange in enumerate(case.made.asked("train")):
        shared = case.made.states[t + 1].shared
        real.assert_close(shared, case.due.rounds[t].shared)
        examples = sum(real.SIZES[k] for k in exchange.up)
        for name in shared:
            weighted = sum(real.SIZES[k] / examples * update.tensors[name].double() for k, update in exchange.up.items())
            torch.testing.assert_close(shared[name].double(), weighted, rtol=1e-6, atol=1e-8)
        assert any((shared[name] != case.made.states[t].shared[name]).any() for name in shared if not is_factor(name))


@every_case
def test_private_tensors_after_every_round(case: Case) -> None:
    """Non-GAL LoRA never leaves the device and persists between its participations."""
    for t, cohort in enumerate(COHORTS):
        for k in real.POOL.clients:
            before, after = case.made.private[t][k], case.made.private[t + 1][k]
            real.assert_close(after, case.due.rounds[t].private[k])
            assert all(torch.equal(before[name], after[name]) for name in after) == (k not in cohort)


def test_the_cases_are_far_from_ties() -> None:
    """(Of the test itself: nothing that is compared exactly hangs on the last digits.)"""
    for method in (LEAST, MOST):
        due = derived(method)
        assert np.diff(np.sort(due.scores)).min() > 1e-3 * due.scores.max()
        for k in real.POOL.clients:
            means = np.sort([due.difficulties[k][batch].mean() for batch in due.order[k]])
            assert (np.diff(means) > 1e-3 * means[1:]).all()
            for layer in set(range(real.LAYERS)) - set(due.gal):
                ups = [n for n in due.fishers[k] if layer_of(n) == layer and ".lora_B." in n]
                scores = np.sort(np.concatenate([numpy.neuron_scores(due.fishers[k][partner(b)], due.fishers[k][b]) for b in ups]))
                kept = numpy.ceil(method.keep * len(scores))
                assert scores[-kept] > (1 + 1e-3) * scores[-kept - 1]
