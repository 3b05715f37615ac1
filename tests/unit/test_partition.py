"""Partitions: every row to exactly one client; the skew is the one asked for; saved files fit or are refused."""

from __future__ import annotations

import json
import time
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fedloom.data import partition as of_partition
from fedloom.data.dealing import apportion, draw_sizes, log_gamma
from fedloom.data.partition import Partition, by_column, iid, label_skew, partition, told_of_column
from fedloom.data.tasks import DataError
from fedloom.seeds import derive

FROZEN = {
    "train": [[0, 3, 9, 12, 15, 18, 21], [2, 5, 6, 8, 11, 14, 17, 20, 23], [1, 4, 7, 10, 13, 16, 19, 22]],
    "validation": [[0], [2], [1]],
    "test": [[0], [2], [1]],
}


def labels_of(train, validation=(), test=()):
    return {k: np.asarray(v, np.int64) for k, v in {"train": train, "validation": validation, "test": test}.items()}


def random_labels(rows, classes, seed=0, held=60):
    rng = np.random.default_rng(seed)
    shares = rng.dirichlet(np.full(classes, 2.0))
    return labels_of(*(rng.choice(classes, size, p=shares) for size in (rows, held, 2 * held)))


def assert_cover(made, labels):
    for split in ("train", "validation", "test"):
        shards = made.shards(split)
        assert len(shards) == len(made.train)
        assert np.array_equal(np.sort(np.concatenate(shards)), np.arange(len(labels[split])))
        for shard in shards:
            assert shard.dtype == np.int64
            assert np.array_equal(shard, np.sort(shard))


def assert_held_out_follows_train(made, labels, classes):
    counts = made.counts(labels["train"], classes)
    for split in ("validation", "test"):
        held = np.stack([np.bincount(labels[split][rows], minlength=classes) for rows in made.shards(split)])
        for c in range(classes):
            weights = counts[:, c] if counts[:, c].sum() else counts.sum(1)
            exact = held[:, c].sum() * weights / weights.sum()
            assert (np.abs(held[:, c] - exact) < 1).all()


@st.composite
def skews(draw):
    classes = draw(st.integers(1, 12))
    clients = draw(st.integers(1, 15))
    minimum = draw(st.integers(1, 5))
    rows = draw(st.integers(clients * minimum, clients * minimum + 120))
    rng = np.random.default_rng(draw(st.integers(0, 1000)))
    labels = labels_of(*(rng.integers(0, classes, n) for n in (rows, draw(st.integers(0, 40)), draw(st.integers(0, 40)))))
    alpha, beta = (10 ** draw(st.floats(-3, 3)) for _ in range(2))
    how = draw(st.sampled_from(["iid", "label"]))
    return labels, classes, how, {
        "clients": clients, "alpha": alpha, "beta": beta, "minimum": minimum, "seed": draw(st.integers(0, 99))
    }  # fmt: skip


@settings(max_examples=150, deadline=None)
@given(skews())
def test_every_partition_is_a_disjoint_cover_with_the_minimum_and_held_out_shares_in_proportion(case):
    labels, classes, how, options = case
    made = partition(how, labels, **options)
    assert len(made.train) == options["clients"]
    assert min(map(len, made.train)) >= options["minimum"]
    assert_cover(made, labels)
    assert_held_out_follows_train(made, labels, classes)


@settings(max_examples=100, deadline=None)
@given(st.integers(0, 300), st.lists(st.integers(0, 50), min_size=1, max_size=30).filter(any), st.integers(0, 9))
def test_apportion_adds_up_and_is_within_one_of_the_exact_share(total, weights, seed):
    weights = np.asarray(weights)
    parts = apportion(total, weights, np.random.default_rng(seed))
    assert parts.sum() == total
    assert (np.abs(parts - total * weights / weights.sum()) < 1).all()
    assert (parts[weights == 0] == 0).all()


def test_apportion_gives_the_largest_remainders_and_settles_ties_by_seed():
    assert apportion(10, np.array([60, 25, 15]), np.random.default_rng(0)).tolist() in ([6, 3, 1], [6, 2, 2])
    assert apportion(7, np.array([6, 3, 1]), np.random.default_rng(0)).tolist() == [4, 2, 1]
    ties = {tuple(apportion(1, np.ones(4, int), np.random.default_rng(seed))) for seed in range(40)}
    assert len(ties) == 4


def test_the_same_seed_makes_the_same_partition_and_another_seed_another():
    labels = random_labels(600, 5)
    for how in ("iid", "label"):
        made = [partition(how, labels, clients=12, alpha=0.5, beta=5.0, seed=s, minimum=2) for s in (3, 3, 4)]
        for split in ("train", "validation", "test"):
            same, again, other = (m.shards(split) for m in made)
            assert all(np.array_equal(a, b) for a, b in zip(same, again, strict=True))
            assert any(not np.array_equal(a, b) for a, b in zip(same, other, strict=True))


def test_a_label_skew_is_this_one_forever():
    """Frozen: a change of the construction changes every result that was ever published with a seed."""
    made = label_skew(labels_of([0, 1, 2] * 8, [0, 1, 2], [0, 1, 2]), clients=3, alpha=0.5, beta=5.0, seed=42, minimum=2)
    assert {split: [rows.tolist() for rows in made.shards(split)] for split in ("train", "validation", "test")} == FROZEN


def test_iid_sizes_differ_by_at_most_one_and_labels_by_chance_only():
    labels = random_labels(6000, 4)
    made = iid(labels, clients=7, seed=1, minimum=1)
    assert {len(rows) for rows in made.train} == {857, 858}
    shares = made.counts(labels["train"], 4) / 857
    assert np.abs(shares - np.bincount(labels["train"]) / 6000).max() < 0.06


def skew_of(alpha, seed, rows=12_000, clients=60, classes=5):
    labels = random_labels(rows, classes, seed)
    made = label_skew(labels, clients=clients, alpha=alpha, beta=5.0, seed=seed, minimum=4)
    counts = made.counts(labels["train"], classes)
    return counts, np.bincount(labels["train"], minlength=classes) / rows


@pytest.mark.parametrize("seed", range(4))
def test_a_large_alpha_gives_every_device_the_global_label_shares(seed):
    """Each count is near binomial (n_k, p_c): the squared deviations in units of its variance average 1, none is absurd."""
    counts, p = skew_of(1000.0, seed)
    sizes = counts.sum(1, keepdims=True)
    deviation = (counts - sizes * p) / np.sqrt(sizes * p * (1 - p))
    assert 0.7 < (deviation**2).mean() < 1.3
    assert np.abs(deviation).max() < 5


@pytest.mark.parametrize("seed", range(4))
def test_a_small_alpha_gives_most_devices_one_label(seed):
    counts, p = skew_of(1e-3, seed)
    assert (counts.max(1) == counts.sum(1)).mean() >= 0.8
    devices = np.bincount(counts.argmax(1), minlength=len(p)) / len(counts)
    assert np.abs(devices - p).max() < 0.12  # each label is the label of its share of the devices


def test_the_skew_of_the_priors_is_alphas():
    """Var[pi_c] = p_c (1 - p_c) / (alpha C + 1), and drawing n_k labels adds p_c (1 - p_c) / n_k."""
    for alpha in (0.1, 1.0, 5.0):
        measured, expected = 0.0, 0.0
        for seed in range(12):
            counts, p = skew_of(alpha, seed)
            sizes = counts.sum(1, keepdims=True)
            measured += ((counts / sizes - p) ** 2).sum()
            expected += ((1 / (alpha * 5 + 1) + 1 / sizes) * p * (1 - p)).sum()
        assert 0.85 < measured / expected < 1.2


def test_whoever_is_served_last_is_not_dealt_odd_remains():
    """Under a mild skew the least typical device of sixty stays far from one label."""
    worst = [np.abs(counts / counts.sum(1, keepdims=True) - p).sum(1).max() for counts, p in (skew_of(100.0, s) for s in range(8))]
    assert np.mean(worst) < 0.42


def test_device_sizes_follow_beta_and_the_minimum():
    """With shares ~ Dirichlet(beta), the coefficient of variation of the sizes is sqrt((K - 1) / (K beta + 1))."""
    for beta in (0.5, 5.0, 50.0):
        spread = np.mean([(s := draw_sizes(100_000, 100, beta, 1, seed)).std() / s.mean() for seed in range(20)])
        assert spread == pytest.approx(np.sqrt(99 / (100 * beta + 1)), rel=0.15)
    assert draw_sizes(400, 100, 0.01, 4, 0).tolist() == [4] * 100
    lifted = draw_sizes(1000, 100, 0.05, 4, 0)
    assert lifted.min() == 4
    assert lifted.sum() == 1000
    assert (lifted == 4).sum() > 50
    assert draw_sizes(10_000, 50, 1e-3, 1, 0).sum() == 10_000


def test_only_the_devices_under_the_minimum_are_lifted():
    free, lifted = draw_sizes(5000, 50, 1.0, 1, 7), draw_sizes(5000, 50, 1.0, 20, 7)
    rich = lifted > 20
    assert (free[~rich] <= 21).all()
    ratio = lifted[rich] / free[rich]
    assert (ratio <= 1.01).all()
    assert ratio.max() - ratio.min() < 0.08


def test_log_gamma_has_the_moments_of_a_gamma_and_keeps_its_order_where_it_underflows():
    rng = np.random.default_rng(0)
    drawn = np.exp(log_gamma(rng, np.full(200_000, 0.7)))
    assert drawn.mean() == pytest.approx(0.7, rel=0.02)
    assert drawn.var() == pytest.approx(0.7, rel=0.04)
    tiny = log_gamma(rng, np.full(1000, 1e-6))
    assert np.isfinite(tiny).all()
    assert len(set(tiny)) == 1000
    assert np.isneginf(log_gamma(rng, np.array([0.0, 1.0]))).tolist() == [True, False]


@pytest.mark.parametrize(("classes", "alpha"), [(2, 1e-3), (2, 1e3), (200, 1e-3)])
def test_ten_thousand_clients_take_seconds(classes, alpha):
    labels = labels_of(np.arange(60_000) % classes, [0], [0])
    begin = time.process_time()
    made = label_skew(labels, clients=10_000, alpha=alpha, beta=5.0, seed=0, minimum=3)
    assert time.process_time() - begin < 30
    assert min(map(len, made.train)) >= 3
    assert sum(map(len, made.train)) == 60_000


def test_a_held_out_label_that_no_client_trains_on_goes_by_size():
    labels = labels_of([0] * 30 + [1] * 10, [2] * 8, [])
    made = by_column(labels, {"train": ["a"] * 30 + ["b"] * 10}, name="source", clients=2, seed=0, minimum=1)
    assert [len(rows) for rows in made.validation] == [6, 2]


def test_held_out_rows_of_a_label_are_dealt_at_random_not_in_order():
    labels = labels_of([0] * 40, [0] * 40, [0] * 40)
    made = iid(labels, clients=2, seed=0, minimum=1)
    assert made.test[0].tolist() != list(range(20))
    assert made.test[0].tolist() != made.validation[0].tolist()


def test_by_column_gives_each_value_a_client_in_the_order_of_the_values():
    values = [10, 9, 10, 2, 2, 2]
    made = by_column(labels_of([0, 1, 0, 1, 0, 1], [0, 1], [1]), {"train": values}, name="writer", clients=3, seed=0, minimum=1)
    assert [rows.tolist() for rows in made.train] == [[3, 4, 5], [1], [0, 2]]
    assert made.scheme["how"] == "column:writer"
    assert made.scheme["values"] == 3


def test_values_of_several_types_are_ordered_by_type_and_then_among_themselves():
    values: list[Any] = ["b", 10, "a", 2, "a", 10]
    made = by_column(labels_of([0, 1, 0, 1, 0, 1], [0, 1], [1]), {"train": values}, name="writer", clients=4, seed=0, minimum=1)
    assert [[values[row] for row in rows] for rows in made.train] == [[2], [10, 10], ["a", "a"], ["b"]]
    assert_cover(by_column(labels_of([0] * 6), {"train": values}, name="writer", clients=2, seed=0, minimum=1), labels_of([0] * 6))


def test_by_column_gives_held_out_rows_to_the_client_of_their_value():
    """They were dealt by label, so a device was tested on the others' sources."""
    columns = {"train": list("aabbcc") * 5, "validation": list("cbacba"), "test": ["b"] * 7 + ["z", None]}
    labels = labels_of([0, 1, 0, 1, 0, 1] * 5, [0, 0, 1, 1, 0, 1], [0, 1, 0, 1, 0, 1, 0, 1, 1])
    made = by_column(labels, columns, name="v", clients=3, seed=0, minimum=1)
    assert_cover(made, labels)
    assert [rows.tolist() for rows in made.validation] == [[2, 5], [1, 4], [0, 3]]
    assert set(range(7)) <= set(made.test[1].tolist()), "of values that nobody trains on, by label"
    assert told_of_column("v", columns) == ["2 of the 9 test rows have a 'v' that no training row has, and are dealt by label"]
    packed = by_column(labels, {"train": list("abcdef") * 5, "test": list("fedcbafed")}, name="v", clients=3, seed=0, minimum=1)
    held = [{"abcdef"[row % 6] for row in rows} for rows in packed.train]
    assert [{"fedcbafed"[row] for row in rows} for rows in packed.test] == held


def test_a_held_out_split_without_the_column_is_dealt_by_label_as_before():
    labels = labels_of([0] * 10 + [1] * 10, [0] * 4 + [1] * 2, [0, 1])
    columns = {"train": ["a"] * 10 + ["b"] * 10, "test": ["b", "a"]}
    made = by_column(labels, columns, name="v", clients=2, seed=0, minimum=1)
    assert [rows.tolist() for rows in made.validation] == [[0, 1, 2, 3], [4, 5]]
    assert [rows.tolist() for rows in made.test] == [[1], [0]]
    assert told_of_column("v", columns) == ["the validation split has no column 'v': its rows are dealt by label"]


def test_by_column_packs_whole_values_evenly_where_there_are_more_values_than_clients():
    values = np.repeat([f"v{i}" for i in range(23)], np.arange(1, 24)).tolist()
    labels = labels_of(np.arange(len(values)) % 3, [0, 1, 2], [0, 1, 2])
    made = by_column(labels, {"train": values}, name="v", clients=4, seed=0, minimum=1)
    assert_cover(made, labels)
    held = [{values[row] for row in rows} for rows in made.train]
    assert sum(map(len, held)) == 23
    sizes = [len(rows) for rows in made.train]
    assert max(sizes) - min(sizes) <= 3
    even = [by_column(labels_of([0] * 6), {"train": list("abcdef")}, name="v", clients=3, seed=s, minimum=2) for s in (1, 1, 2, 3)]
    dealt = [tuple(tuple(rows) for rows in made.train) for made in even]
    assert {len(rows) for made in even for rows in made.train} == {2}
    assert dealt[0] == dealt[1]
    assert len(set(dealt)) > 1


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"how": "dirichlet"}, r"no partition 'dirichlet'; there are 'iid', 'label', 'column:NAME', or the path"),
        ({"clients": 0}, "at least 1 client"),
        ({"minimum": 0}, "at least 1 client and 1 row"),
        (
            {"clients": 30, "minimum": 5},
            r"100 training rows cannot give 30 clients 5 rows.*at most 20 clients, or .* at most 3",
        ),
        ({"how": "iid", "clients": 101}, "at most 100 clients"),
        ({"clients": 101, "minimum": 1}, "100 training rows cannot give 101 clients 1 rows each; use at most 100 clients$"),
        ({"alpha": 0.0}, "alpha of the label skew must be a positive number, not 0.0"),
        ({"alpha": float("nan")}, "alpha"),
        ({"beta": -1.0}, "beta of the label skew must be a positive number, not -1.0"),
        ({"beta": float("inf")}, "beta"),
        ({"how": "column:doc"}, "'column:doc' needs the values of column 'doc'"),
        ({"how": "column:doc", "source_column": {"train": [1, 2]}}, "2 values for 100 training rows"),
        ({"how": "column:doc", "source_column": {"train": [1, 2] * 50, "test": []}}, "0 values for 1 test rows"),
        ({"how": "column:doc", "source_column": {}}, "'column:doc' needs the values of column 'doc'"),
        ({"how": "column:doc", "source_column": {"train": [1] * 99 + [None]}}, "no value in training row 99"),
        ({"how": "column:doc", "source_column": {"train": [1, 2] * 50}}, "2 distinct values, too few for 10 clients; use 2 clients"),
        (
            {"how": "column:doc", "source_column": {"train": ["a"] + ["b"] * 99}, "clients": 2, "minimum": 2},
            "the client of doc = 'a' would have 1 training rows, and the minimum is 2",
        ),
        ({"how": "nowhere.json"}, "cannot read the partition file 'nowhere.json'"),
    ],
)
def test_what_cannot_be_is_said(options, said):
    options = {"how": "label", "clients": 10, "alpha": 1.0, "beta": 5.0, "seed": 0, "minimum": 1} | options
    with pytest.raises(DataError, match=said):
        partition(options.pop("how"), labels_of([0, 1] * 50, [0], [1]), **options)


@pytest.fixture
def saved(tmp_path):
    labels = random_labels(200, 3, held=20)
    made = label_skew(labels, clients=6, alpha=0.3, beta=2.0, seed=5, minimum=2)
    path = tmp_path / "parts.json"
    made.save(path)
    return labels, made, path


def again(path, labels, clients=6, minimum=2):
    return partition(str(path), labels, clients=clients, alpha=1.0, beta=1.0, seed=0, minimum=minimum)


def test_a_saved_partition_is_the_same_again(saved, tmp_path):
    labels, made, path = saved
    loaded = again(path, labels)
    assert loaded.scheme == made.scheme
    assert made.scheme["alpha"] == 0.3
    for split in ("train", "validation", "test"):
        assert all(np.array_equal(a, b) for a, b in zip(loaded.shards(split), made.shards(split), strict=True))
        assert all(rows.dtype == np.int64 for rows in loaded.shards(split))
    assert [p.name for p in tmp_path.iterdir()] == ["parts.json"]


def test_a_file_that_could_not_be_replaced_is_whole(saved, tmp_path, monkeypatch):
    labels, made, path = saved
    before = path.read_bytes()

    def dying(*_):
        raise OSError("no")

    with monkeypatch.context() as patch, pytest.raises(OSError, match="no"):
        patch.setattr(of_partition.os, "replace", dying)
        iid(labels, clients=3, seed=1, minimum=2).save(path)
    assert path.read_bytes() == before
    assert again(path, labels).scheme == made.scheme


def test_a_saved_partition_of_other_data_is_refused(saved):
    labels, made, path = saved
    with pytest.raises(DataError, match="for 20 validation rows, and the data has 19; it is of other data"):
        again(path, labels | {"validation": labels["validation"][1:]})
    with pytest.raises(DataError, match="the sizes fit but the labels differ"):
        again(path, labels | {"train": labels["train"][::-1].copy()})
    for held in ("validation", "test"):  # as many rows of every label, in another order
        other = labels[held][::-1].copy()
        assert not np.array_equal(other, labels[held])
        with pytest.raises(DataError, match="the sizes fit but the labels differ"):
            again(path, labels | {held: other})
    with pytest.raises(DataError, match="has 6 clients, not 7; use 6 clients"):
        again(path, labels, clients=7)
    most = min(map(len, made.train)) + 1
    with pytest.raises(DataError, match=f"has {most - 1} training rows, and the minimum is {most}"):
        again(path, labels, minimum=most)


@pytest.mark.parametrize(
    ("corrupt", "said"),
    [
        (lambda s: s["clients"][0]["train"].append(200), r"train split: row 200 is out of range; the split has rows 0 to 199"),
        (lambda s: s["clients"][0]["test"].append(-1), "test split: row -1 is out of range"),
        (lambda s: s["clients"][1]["train"].append(s["clients"][0]["train"][0]), r"listed 2 times \(clients \[0, 1\]\)"),
        (lambda s: s["clients"][2]["train"].pop(), r"belongs to no client \(1 such rows\)"),
        (lambda s: s["clients"].clear(), "belongs to no client"),
        (lambda s: s["clients"][0].pop("test"), "is damaged"),
        (lambda s: s["clients"][0].update(train="01"), "rows must be a list of whole numbers"),
        (lambda s: s["clients"][0]["train"].append(1.5), "rows must be a list of whole numbers"),
        (lambda s: s.pop("sizes"), "is damaged"),
        (lambda s: s.pop("format"), "not a partition file"),
    ],
)
def test_a_damaged_partition_file_is_refused(saved, corrupt, said):
    labels, _, path = saved
    content = json.loads(path.read_text())
    corrupt(content)
    path.write_text(json.dumps(content))
    with pytest.raises(DataError, match=said):
        again(path, labels)


def test_a_file_that_is_no_partition_is_refused(tmp_path):
    path = tmp_path / "x.json"
    for content in ("{", "[1]"):
        path.write_text(content)
        with pytest.raises(DataError, match="not a partition file"):
            Partition.load(path)
    path.write_bytes(b"\xff\xfe")
    with pytest.raises(DataError, match="not a partition file"):
        Partition.load(path)


def test_counts_are_label_counts_of_the_training_rows():
    made = Partition((np.array([0, 2]), np.array([1])), (), (), {})
    assert made.counts(np.array([2, 0, 2]), 4).tolist() == [[0, 0, 2, 0], [1, 0, 0, 0]]


def test_the_order_in_which_seeds_are_drawn_elsewhere_does_not_matter():
    labels = random_labels(100, 3)
    first = iid(labels, clients=4, seed=9, minimum=1)
    derive(9, "something else").random(10)
    np.random.default_rng(0).random(3)
    assert all(np.array_equal(a, b) for a, b in zip(first.train, iid(labels, clients=4, seed=9, minimum=1).train, strict=True))
