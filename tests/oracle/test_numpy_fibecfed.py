"""The NumPy FibecFed itself, against cases worked out by hand and against properties its specification implies."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from tests.oracle import numpy_fibecfed as fibecfed
from tests.oracle import numpy_training as training
from tests.oracle.numpy_encoder import Example, central_differences, pad
from tests.oracle.numpy_fibecfed import Pacing
from tests.oracle.tiny import moved, questions, tiny


def test_difficulty_is_the_squared_norm_of_each_examples_numeric_gradient() -> None:
    encoder, start = tiny()
    tensors, examples = moved(start), questions(3)
    over = {n for n in tensors if "classifier" not in n}
    everything, without_head = (fibecfed.difficulty(encoder, tensors, examples, names) for names in (tensors, over))
    for i, example in enumerate(examples):
        slope = central_differences(lambda now, one=pad([example]): encoder.forward(now, one).loss, tensors)
        assert everything[i] == pytest.approx(sum(float((g**2).sum()) for g in slope.values()), rel=1e-7)
        assert without_head[i] == pytest.approx(sum(float((slope[n] ** 2).sum()) for n in over), rel=1e-6)


def test_batches_are_sorted_by_their_mean_easy_first() -> None:
    hardness = np.array([9.0, 1.0, 4.0, 4.0, 0.0, 3.0, 3.0])
    ordered = fibecfed.batch_order(hardness, [[0, 1], [2, 3], [4, 5], [6]])  # means 5, 4, 1.5, 3
    assert [list(batch) for batch in ordered] == [[4, 5], [6], [2, 3], [0, 1]]
    assert [list(b) for b in fibecfed.batch_order(np.ones(4), [[2, 3], [0, 1]])] == [[2, 3], [0, 1]]
    assert [list(b) for b in fibecfed.sample_order(hardness, 3)] == [[4, 1, 5], [6, 2, 3], [0]]


@pytest.mark.parametrize(
    ("kind", "expected"),
    [  # T = 10, β₀ = 0.6, α = 0.8, so αT = 8; rounds 0, 2, 8
        ("linear", (0.6, 0.7, 1.0)),
        ("sqrt", (0.6, 0.8, 1.0)),
        ("quadratic", (0.6, 0.625, 1.0)),
        ("exp", (0.6, 0.6**0.75, 1.0)),
        ("none", (1.0, 1.0, 1.0)),
    ],
)
def test_pacing_by_hand(kind: Pacing, expected: tuple[float, ...]) -> None:
    assert [fibecfed.fraction(kind, t, 10, 0.6, 0.8) for t in (0, 2, 8)] == pytest.approx(expected)
    shares = [fibecfed.fraction(kind, t, 10, 0.6, 0.8) for t in range(10)]
    assert shares == sorted(shares) and shares[8:] == [1.0, 1.0], "everything is open from αT on, never less than before"
    assert fibecfed.fraction(kind, 0, 10, 0.6, 0.0) == 1.0


def test_open_batches_round_up_but_not_on_float_noise() -> None:
    assert [fibecfed.open_batches(share, 5) for share in (0.6, 0.61, 0.8, 0.801, 1.0, 0.01)] == [3, 4, 4, 5, 5, 1]
    assert 0.1 * 3 * 10 > 3 and fibecfed.open_batches(0.1 * 3, 10) == 3


def test_sensitivity_by_central_differences() -> None:
    encoder, start = tiny()
    tensors, examples = moved(start), [Example((1, 5, 9, 3), 0), Example((1, 7), 2)]
    batch = pad(examples)
    slope = central_differences(lambda at: encoder.forward(tensors, batch, at["E"]).loss, {"E": encoder.embed(batch)}, step=1e-5)["E"]
    real = [(0, 0), (0, 1), (0, 2), (0, 3), (1, 0), (1, 1)]  # not the padding, whose word embedding is not 0
    size = np.sqrt(sum((encoder.embed(batch)[at] ** 2).sum() for at in real))
    assert size < 0.95 * np.linalg.norm(encoder.embed(batch))
    base = [h[:, 0] for h in encoder.forward(tensors, batch).layers]
    for norm, radius in (("difference", 0.5 * size), ("norms", 0.5)):
        pushed = encoder.embed(batch) + radius * slope / np.linalg.norm(slope)
        there = [h[:, 0] for h in encoder.forward(tensors, batch, pushed).layers]
        apart = [np.linalg.norm(b - a) for a, b in zip(base, there, strict=True)]
        grown = [abs(np.linalg.norm(b) - np.linalg.norm(a)) for a, b in zip(base, there, strict=True)]
        expected = np.array(apart if norm == "difference" else grown) / [np.linalg.norm(a) for a in base]
        np.testing.assert_allclose(fibecfed.sensitivity(encoder, tensors, examples, 0.5, norm), expected, rtol=1e-5)
    assert not fibecfed.sensitivity(encoder, tensors, examples, 0.0).any()


def test_scores_are_weighted_with_examples_and_layers_chosen_from_the_asked_end() -> None:
    combined = fibecfed.combine([np.array([1.0, 0.0, 2.0]), np.array([0.0, 4.0, 2.0])], [3, 1])
    np.testing.assert_allclose(combined, [0.75, 1.0, 2.0])
    scores = np.array([0.5, 0.1, 0.5, 0.9])
    assert fibecfed.choose_gal(scores, 2) == (0, 1) and fibecfed.choose_gal(scores, 3) == (0, 1, 2)
    assert fibecfed.choose_gal(scores, 1, "most") == (3,) and fibecfed.choose_gal(scores, 2, "most") == (0, 3)
    assert [fibecfed.gal_count(share, 6) for share in (0.75, 0.5, 0.0, 1.0)] == [5, 3, 1, 6]
    with pytest.raises(KeyError):
        fibecfed.choose_gal(scores, 1, "lest")


def test_first_gap_by_hand() -> None:
    assert fibecfed.first_gap(np.array([9.0, 0.0, 1.0, 4.0]), 0.5) == 2  # gaps 1, 3, 5 against 2: after λ_2
    assert fibecfed.first_gap(np.array([0.0, 1.0, 2.0]), 0.25) is None, "a gap equal to 4ℒ is not wide enough"


def test_fisher_is_the_mean_of_each_examples_squared_gradient() -> None:
    encoder, start = tiny()
    tensors, examples = moved(start), questions(3)
    alone = [encoder.backward(tensors, pad([example])).tensors for example in examples]
    found = fibecfed.fisher_diagonal(encoder, tensors, examples, tensors)
    for name in tensors:
        np.testing.assert_allclose(found[name], sum(g[name][0] ** 2 for g in alone) / 3, rtol=1e-10)


def test_momentum_fisher_by_hand() -> None:
    estimates = [{"a": np.array([8.0])}, {"a": np.array([4.0])}, {"a": np.array([2.0])}]
    assert fibecfed.momentum_fisher(estimates[:1], 0.5)["a"] == 4.0
    assert fibecfed.momentum_fisher(estimates, 0.5)["a"] == 3.0  # 8/8 + 4/4 + 2/2
    assert fibecfed.momentum_fisher(estimates[:2], 0.75)["a"] == 2.5  # 0.75·(0.25·8) + 0.25·4


def test_neurons_of_one_layer_compete_across_query_and_value() -> None:
    at = "bert.encoder.layer.{}.attention.self.{}.lora_{}.weight"
    fisher = {
        at.format(1, "value", "A"): np.array([[4.0, 2.0], [1.0, 1.0]]),  # 8 over four neurons: 2 each
        at.format(1, "value", "B"): np.array([[0.5, 0.5], [0.0, 0.0], [2.0, 0.0], [0.0, 1.0]]),  # 3, 2, 4, 3
        at.format(1, "query", "A"): np.array([[1.0, 0.0], [0.0, 1.0]]),  # 2 over two neurons: 1 each
        at.format(1, "query", "B"): np.array([[1.0, 1.0], [1.0, 1.5]]),  # 3, 3.5
        at.format(11, "query", "A"): np.ones((2, 2)),
        at.format(11, "query", "B"): np.ones((2, 2)),
    }
    value = [fisher[at.format(1, "value", factor)] for factor in "AB"]
    np.testing.assert_allclose(fibecfed.neuron_scores(value[0], value[1]), [3.0, 2.0, 4.0, 3.0])
    rows = {
        keep: [mask.ravel().tolist() for _, mask in sorted(fibecfed.neuron_masks(fisher, 1, keep).items())]
        for keep in (0.3, 0.5, 4 / 6, 0.67, 1.0)
    }
    assert rows == {  # [query's rows, value's rows]; best first: v2 4, q1 3.5, q0 3, v0 3, v3 3, v1 2
        0.3: [[0, 1], [0, 0, 1, 0]],
        0.5: [[1, 1], [0, 0, 1, 0]],
        4 / 6: [[1, 1], [1, 0, 1, 0]],
        0.67: [[1, 1], [1, 0, 1, 1]],
        1.0: [[1, 1], [1, 1, 1, 1]],
    }
    masks = fibecfed.neuron_masks(fisher, 1, 0.5)
    assert {n: m.shape for n, m in masks.items()} == {at.format(1, "query", "B"): (2, 1), at.format(1, "value", "B"): (4, 1)}


def test_what_travels_is_the_gal_and_the_head() -> None:
    names = [f"bert.encoder.layer.{i}.attention.self.query.lora_A.weight" for i in (0, 1, 10, 11)] + ["classifier.bias"]
    assert fibecfed.shared_names(names, (1,)) == {names[1], "classifier.bias"}
    assert fibecfed.shared_names(names, (0, 1, 10, 11)) == set(names)
    assert training.payload({"a": np.zeros((2, 3)), "b": np.zeros(5)}, ["a"]) == 24


def test_aggregate_by_hand() -> None:
    updates = [{"a": np.array([[1.0, 2.0]])}, {"a": np.array([[5.0, 10.0]])}]
    np.testing.assert_allclose(training.aggregate(updates, [3, 1])["a"], [[2.0, 4.0]])


def test_adamw_equals_torchs() -> None:
    rng, rule = np.random.default_rng(0), training.AdamW(0.1, 0.8, 0.95, 1e-3, 0.2, 0.0)
    w = rng.normal(size=(3, 2))
    theirs = torch.nn.Parameter(torch.tensor(w))
    optimiser = torch.optim.AdamW([theirs], lr=0.1, betas=(0.8, 0.95), eps=1e-3, weight_decay=0.2)
    first, second = np.zeros_like(w), np.zeros_like(w)
    for step in range(1, 6):
        g = rng.normal(size=w.shape)
        theirs.grad = torch.tensor(g)
        optimiser.step()
        w, first, second = training.adamw_step(w, g, first, second, step, rule)
        np.testing.assert_allclose(w, theirs.detach().numpy(), rtol=1e-12)


def test_clipping_by_hand() -> None:
    gradients = {"a": np.array([3.0]), "b": np.array([[0.0, 4.0]])}
    clipped = training.clip_to(gradients, 1.0)
    assert clipped["a"] == pytest.approx(0.6) and clipped["b"][0, 1] == pytest.approx(0.8)
    for limit in (0.0, 5.0, 6.0):
        assert training.clip_to(gradients, limit)["a"] == 3.0


def test_a_masked_row_neither_moves_nor_counts_for_clipping() -> None:
    encoder, start = tiny()
    tensors, examples = moved(start), questions(4)
    name = next(n for n in sorted(tensors) if ".lora_B." in n)
    mask = np.zeros((16, 1))
    mask[3] = 1.0
    rule = training.AdamW(lr=0.1, weight_decay=0.5, clip=1e-6, eps=1e-6)  # so small a clip that eps lets its scale be seen
    fitted, losses = training.train(encoder, tensors, [name], examples, [[0, 1, 2, 3]], rule, {name: mask})
    gradient = encoder.backward(tensors, pad(examples)).tensors[name].mean(0)[3]
    clipped = gradient / np.linalg.norm(gradient) * 1e-6
    expected = tensors[name][3] * 0.95 - 0.1 * clipped / (np.abs(clipped) + 1e-6)
    np.testing.assert_allclose(fitted[name][3], expected, rtol=1e-9)
    others = np.arange(16) != 3
    assert (fitted[name][others] == tensors[name][others]).all()
    assert all((fitted[n] == tensors[n]).all() for n in tensors if n != name)
    assert losses == [encoder.forward(tensors, pad(examples)).loss]


def test_training_lowers_the_loss_and_takes_batches_in_order() -> None:
    encoder, start = tiny()
    examples, rule = questions(6), training.AdamW(lr=0.05)
    _, losses = training.train(encoder, start, start, examples, [[0, 1, 2, 3, 4, 5]] * 12, rule)
    assert losses[-1] < 0.5 * losses[0]
    there, first = training.train(encoder, start, start, examples, [[0, 1], [2, 3]], rule)
    back, second = training.train(encoder, start, start, examples, [[2, 3], [0, 1]], rule)
    assert first[0] != second[0] and any((there[n] != back[n]).any() for n in start)
