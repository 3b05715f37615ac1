"""Padded batches against a plain loop."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fedloom.data.examples import Examples


def by_hand(texts, segments, labels, indices, pad_id, side, width):
    """The rectangle, cell by cell."""
    out = {"ids": [], "mask": [], "segments": [], "labels": [], "weights": []}
    for at in indices:
        gap = width - len(texts[at])
        before, after = (gap, 0) if side == "left" else (0, gap)
        out["ids"].append([pad_id] * before + texts[at] + [pad_id] * after)
        out["segments"].append([0] * before + segments[at] + [0] * after)
        out["mask"].append([False] * before + [True] * len(texts[at]) + [False] * after)
        out["labels"].append(labels[at])
        out["weights"].append(1.0)
    return {name: np.asarray(value) for name, value in out.items()}


@settings(max_examples=100, deadline=None)
@given(st.data())
def test_pad_is_the_rectangle_by_hand(data):
    texts = data.draw(st.lists(st.lists(st.integers(1, 99), min_size=1, max_size=6), min_size=1, max_size=7))
    segments = [[token % 2 for token in text] for text in texts]
    labels = list(range(len(texts)))
    view = data.draw(st.lists(st.sampled_from(labels), min_size=1, max_size=6))
    indices = data.draw(st.lists(st.integers(0, len(view) - 1), min_size=1, max_size=6))
    side = data.draw(st.sampled_from(["left", "right"]))
    longest = max(len(texts[view[i]]) for i in indices)
    examples = Examples.of(texts, labels, segments).subset(view)
    made = examples.pad(np.asarray(indices), pad_id=7, side=side)
    wanted = by_hand(texts, segments, labels, [view[i] for i in indices], 7, side, longest)
    for name, value in wanted.items():
        assert np.array_equal(getattr(made, name), value), name
    assert (made.ids.dtype, made.mask.dtype, made.labels.dtype, made.weights.dtype) == (np.int64, bool, np.int64, np.float32)
    assert made.segments.dtype == np.int64


def test_what_is_no_batch_is_refused():
    examples = Examples.of([[1, 2, 3], [4]], [0, 1])
    with pytest.raises(ValueError, match="at least one example"):
        examples.pad(np.array([], np.int64), pad_id=0)
    with pytest.raises(ValueError, match="'left' or the 'right', not 'top'"):
        examples.pad(np.array([0]), pad_id=0, side="top")


def test_views_share_the_arrays_and_know_their_lengths_and_labels():
    examples = Examples.of([[1, 2, 3], [4], [5, 6]], [2, 0, 1])
    view = examples.subset([2, 0]).subset([1])
    assert view.tokens is examples.tokens
    assert (len(view), view.lengths.tolist(), view.labels.tolist()) == (1, [3], [2])
    assert examples.lengths.tolist() == [3, 1, 2]


def test_what_is_not_one_label_and_one_segment_a_token_is_refused():
    with pytest.raises(ValueError, match="2 texts came with 1 labels"):
        Examples.of([[1], [2]], [0])
    with pytest.raises(ValueError, match="text 1 has no tokens"):
        Examples.of([[1], []], [0, 1])
    with pytest.raises(ValueError, match="1 segment ids came with 2 tokens"):
        Examples.of([[1, 2]], [0], [[0]])
