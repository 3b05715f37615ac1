"""A whole derived run of FibecFed, held to what its sentences say about every phase."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from tests.oracle import numpy_fibecfed as fibecfed
from tests.oracle import numpy_training as training
from tests.oracle.numpy_encoder import Encoder, pad
from tests.oracle.numpy_fibecfed_play import Played, Settings, Shard, play
from tests.oracle.tiny import questions, tiny

SIZES = {0: 10, 1: 5, 2: 8, 3: 9}
COHORTS = ((0, 1, 2), (1, 2, 3), (0, 1, 3))
SETTINGS = Settings(rule=training.AdamW(lr=0.05), rounds=3, gal_share=0.5, keep=0.4, warm_epochs=2)
LORA = "base_model.model.bert.encoder.layer.{}.attention.self.{}.lora_{}.weight"
HEAD = {"base_model.model.classifier.weight", "base_model.model.classifier.bias"}


def shards() -> dict[int, Shard]:
    """Five batches of two for device 0, and fewer or uneven ones for the others."""
    cut = {k: np.random.default_rng(k).permutation(n) for k, n in SIZES.items()}
    batches = {k: [rows[i : i + 2] for i in range(0, len(rows), 2)] for k, rows in cut.items()}
    return {k: Shard(questions(n, seed=10 + k), batches[k], batches[k][0]) for k, n in SIZES.items()}


@pytest.fixture(scope="module")
def world() -> tuple[Encoder, dict[str, np.ndarray], Played]:
    encoder, start = tiny()
    return encoder, start, play(encoder, start, shards(), COHORTS, SETTINGS)


World = tuple[Encoder, dict[str, np.ndarray], Played]


def names_of(layer: int) -> set[str]:
    return {LORA.format(layer, part, factor) for part in ("query", "value") for factor in "AB"}


def test_easy_batches_come_first_and_none_is_lost(world: World) -> None:
    _, _, played = world
    for k, shard in shards().items():
        means = [played.difficulties[k][batch].mean() for batch in played.order[k]]
        assert means == sorted(means)
        assert {tuple(batch) for batch in played.order[k]} == {tuple(batch) for batch in shard.batches}
    assert any([tuple(b) for b in played.order[k]] != [tuple(b) for b in s.batches] for k, s in shards().items())


def test_the_least_sensitive_layer_is_shared(world: World) -> None:
    _, _, played = world
    by_hand = sum(SIZES[k] * played.layer_scores[k] for k in SIZES) / 32
    np.testing.assert_allclose(played.scores, by_hand)
    assert played.gal == (int(np.argmin(by_hand)),)
    encoder, start = tiny()
    other = play(encoder, start, shards(), (), replace(SETTINGS, which="most", warm_epochs=1))
    assert other.gal == (1 - played.gal[0],)


def test_the_curriculum_opens_by_the_global_round(world: World) -> None:
    _, _, played = world
    # αT = 2.4: fractions 0.6, 0.6 + 0.4/2.4, 0.6 + 0.8/2.4, of 5, 3, 4, 5 batches
    assert [turn.fraction for turn in played.rounds] == pytest.approx([0.6, 0.76667, 0.93333], abs=1e-4)
    assert [turn.open for turn in played.rounds] == [{0: 3, 1: 2, 2: 3}, {1: 3, 2: 4, 3: 4}, {0: 5, 1: 3, 3: 5}]
    assert all(len(turn.losses[k]) == 2 * count for turn in played.rounds for k, count in turn.open.items())


def test_the_gal_and_the_head_travel_and_nothing_else(world: World) -> None:
    _, start, played = world
    shared = names_of(played.gal[0]) | HEAD
    size = 4 * (2 * (2 * 16 + 16 * 2) + 3 * 16 + 3)
    for turn in played.rounds:
        assert turn.up == turn.down == set(turn.shared) == shared
        assert turn.bytes_up == turn.bytes_down == 3 * size
        assert all(set(update) == shared for update in turn.updates.values())
        assert all(set(own) == names_of(1 - played.gal[0]) for own in turn.private.values())
        assert all(set(own) | shared == set(start) for own in turn.private.values())


def test_masked_rows_of_private_layers_never_move(world: World) -> None:
    _, start, played = world
    layer = 1 - played.gal[0]
    last = played.rounds[-1].private
    for k in SIZES:
        names = [LORA.format(layer, part, "B") for part in ("query", "value")]
        assert set(played.masks[k]) == set(names), "layers of the GAL are trained dense"
        assert sum(mask.sum() for mask in played.masks[k].values()) == 13  # ceil(0.4 · 32)
        for name in names:
            moved = (last[k][name] != start[name]).any(1)
            assert (moved == (played.masks[k][name][:, 0] == 1)).all()
    assert any((played.masks[0][name] != played.masks[1][name]).any() for name in played.masks[0])


def test_the_mask_comes_from_the_warmed_up_fisher_and_the_warm_up_is_thrown_away(world: World) -> None:
    encoder, start, played = world
    shard, lora = shards()[1], [n for n in start if "lora" in n]
    at, estimates = dict(start), []
    for count in (1, 2):
        at, _ = training.train(encoder, start, lora, shard.examples, played.order[1] * count, SETTINGS.rule)
        estimates.append(fibecfed.fisher_diagonal(encoder, at, shard.examples, lora))
    assert all((at[name] == start[name]).all() for name in HEAD)
    for name in lora:
        expected = 0.25 * estimates[0][name] + 0.5 * estimates[1][name]
        np.testing.assert_allclose(played.fishers[1][name], expected, rtol=1e-12)
    assert all((played.common[name] == start[name]).all() for name in start)


def test_private_layers_persist_and_wait(world: World) -> None:
    encoder, start, played = world
    private = [{k: {n: start[n] for n in played.rounds[0].private[k]} for k in SIZES}] + [t.private for t in played.rounds]
    shared = [start] + [turn.shared for turn in played.rounds]
    for t, cohort in enumerate(COHORTS):
        for k, shard in shards().items():
            same = all((private[t + 1][k][n] == private[t][k][n]).all() for n in private[t][k])
            assert same == (k not in cohort)
            if k in cohort:
                first = pad([shard.examples[i] for i in played.order[k][0]])
                begun = encoder.forward({**shared[t], **private[t][k]}, first).loss
                assert played.rounds[t].losses[k][0] == pytest.approx(begun, rel=1e-12)


def test_the_server_averages_with_the_devices_examples(world: World) -> None:
    _, _, played = world
    for turn, cohort in zip(played.rounds, COHORTS, strict=True):
        for name in turn.shared:
            weighted = sum(SIZES[k] * turn.updates[k][name] for k in cohort) / sum(SIZES[k] for k in cohort)
            np.testing.assert_allclose(turn.shared[name], weighted, rtol=1e-12)
            assert not np.allclose(turn.shared[name], sum(turn.updates[k][name] for k in cohort) / 3, rtol=1e-6)


def test_personal_and_global_models(world: World) -> None:
    _, start, played = world
    personal, alone = played.personal(2), played.alone()
    for name in start:
        own = name in names_of(1 - played.gal[0])
        assert (personal[name] == (played.rounds[-1].private[2][name] if own else played.rounds[-1].shared[name])).all()
        assert (alone[name] == (start[name] if own else played.rounds[-1].shared[name])).all()


def test_the_head_warm_up_moves_the_head_alone_and_what_is_scored() -> None:
    encoder, start = tiny()
    settings = replace(SETTINGS, head_cohorts=((0, 1, 3), (1, 2, 3)), warm_epochs=1)
    cold, warm = (play(encoder, start, shards(), (), s) for s in (replace(settings, head_cohorts=()), settings))
    assert len(warm.head_rounds) == 2 and all(set(made) == HEAD for made in warm.head_rounds)
    assert {n for n in start if (warm.common[n] != start[n]).any()} == HEAD
    assert all((warm.common[n] == warm.head_rounds[1][n]).all() for n in HEAD)
    at = {**start, **warm.head_rounds[0]}
    fitted = [training.train(encoder, at, HEAD, shards()[k].examples, shards()[k].batches, SETTINGS.rule)[0] for k in (1, 2, 3)]
    for name in HEAD:
        by_hand = sum(SIZES[k] / 22 * update[name] for k, update in zip((1, 2, 3), fitted, strict=True))
        np.testing.assert_allclose(warm.common[name], by_hand, rtol=1e-9)
    assert not np.allclose(cold.difficulties[0], warm.difficulties[0], rtol=1e-3)
    assert not np.allclose(cold.layer_scores[0], warm.layer_scores[0], rtol=1e-6)
    without = play(encoder, start, shards(), (), replace(settings, score_head=False))
    assert all((without.difficulties[k] < warm.difficulties[k]).all() for k in SIZES)


def test_a_round_of_one_lone_layer_of_everything_shared_is_averaging_of_all() -> None:
    encoder, start = tiny()
    played = play(encoder, start, shards(), COHORTS[:1], replace(SETTINGS, gal_share=1.0, pacing="none"))
    turn = played.rounds[0]
    assert turn.up == set(start) and not played.masks[0] and not any(turn.private.values())
    for k in COHORTS[0]:
        alone, _ = training.train(encoder, start, start, shards()[k].examples, played.order[k] * 2, SETTINGS.rule)
        assert all((turn.updates[k][name] == alone[name]).all() for name in start)
