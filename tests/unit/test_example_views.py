"""Views of examples: they count from themselves and share the arrays."""

from __future__ import annotations

from functools import partial

import numpy as np
import pytest
from transformers import AutoTokenizer

from fedloom.data.examples import Examples, flat
from tests.tiny import folder

IDS = [[11, 12, 13], [21], [31, 32], [41, 42, 43, 44]]
SEGMENTS = [[0, 0, 1], [0], [0, 1], [0, 1, 1, 1]]
LABELS = [2, 0, 1, 2]


def store() -> Examples:
    return Examples.of(IDS, LABELS, SEGMENTS)


def test_lengths_and_labels_follow_the_texts() -> None:
    examples = store()
    assert len(examples) == 4
    assert examples.labels.tolist() == LABELS
    assert examples.lengths.tolist() == [3, 1, 2, 4]


def test_a_subset_of_a_subset_counts_from_the_view() -> None:
    view = store().subset([3, 1, 0]).subset(np.array([2, 0]))
    assert view.rows.tolist() == [0, 3]
    view = store().subset([3, 1, 2]).subset([1, 2])
    assert view.rows.tolist() == [1, 2]
    assert view.labels.tolist() == [0, 1]
    assert view.lengths.tolist() == [1, 2]
    assert view.pad(np.array([1]), pad_id=0).ids.tolist() == [[31, 32]]


def test_a_subset_copies_no_tokens() -> None:
    whole = store()
    assert np.shares_memory(whole.subset([1]).tokens, whole.tokens)


def test_an_empty_view_is_a_view() -> None:
    empty = store().subset([])
    assert len(empty) == 0
    assert empty.labels.shape == (0,)


def test_what_does_not_fit_is_refused() -> None:
    with pytest.raises(ValueError, match="2 texts came with 1 labels"):
        Examples.of([[1], [2]], [0])
    with pytest.raises(ValueError, match="text 1 has no tokens"):
        Examples.of([[1], []], [0, 0])
    with pytest.raises(ValueError, match="3 segment ids came with 2 tokens"):
        Examples.of([[1, 2]], [0], [[0, 0, 0]])


def texts(examples: Examples) -> list[list[int]]:
    return [examples.pad(np.array([i]), pad_id=0).ids[0].tolist() for i in range(len(examples))]


def test_a_text_is_cut_to_its_first_tokens_and_its_last() -> None:
    cut = store().truncated(3)
    assert texts(cut) == [[11, 12, 13], [21], [31, 32], [41, 42, 44]]
    assert cut.lengths.tolist() == [3, 1, 2, 3]
    assert cut.labels.tolist() == LABELS
    assert cut.pad(np.array([3]), pad_id=0).segments.tolist() == [[0, 1, 1]]
    assert cut.pad(np.array([0]), pad_id=0).segments.tolist() == [[0, 0, 1]]
    assert texts(store().truncated(2)) == [[11, 13], [21], [31, 32], [41, 44]]
    assert [store().truncated(2).pad(np.array([i]), pad_id=0).segments[0].tolist() for i in range(4)] == [[0, 1], [0], [0, 1], [0, 1]]


def test_a_pair_is_cut_as_the_tokenizer_cuts_it() -> None:
    """Where it tells the two texts apart; else a pair is one text. At 2 tokens there are the first and the last."""
    tokenizer = AutoTokenizer.from_pretrained(folder())
    rng = np.random.default_rng(1)
    lengths = [*rng.integers(1, 9, size=(30, 2)).tolist(), [1, 14], [14, 1], [6, 6], [1, 1]]
    ones, others = ([" ".join(f"w{i}" for i in rng.integers(0, 60, size=n)) for n in of] for of in zip(*lengths, strict=True))
    whole_or_cut = partial(tokenizer, ones, others, return_token_type_ids=True)
    whole = whole_or_cut()
    examples = Examples.over(flat(whole["input_ids"], whole["token_type_ids"]), [0] * len(ones), pairs=True)
    shuffled = rng.permutation(len(ones))
    for length in range(3, 20):
        cut, theirs = examples.subset(shuffled).truncated(length), whole_or_cut(truncation=True, max_length=length)
        assert texts(cut) == [theirs["input_ids"][i] for i in shuffled]
        assert [cut.pad(np.array([i]), pad_id=0).segments[0].tolist() for i in range(len(cut))] == [
            theirs["token_type_ids"][i] for i in shuffled
        ]
        assert texts(cut.truncated(3)) == texts(examples.subset(shuffled).truncated(3)), "what is cut is still a pair"
    assert texts(examples.truncated(2)) == [[ids[0], ids[-1]] for ids in whole["input_ids"]]
    untold = Examples.over(flat(whole["input_ids"]), [0] * len(ones), pairs=True)
    assert texts(untold.truncated(5)) == [ids if len(ids) <= 5 else [*ids[:4], ids[-1]] for ids in whole["input_ids"]]


def test_a_view_is_cut_as_the_view_it_is() -> None:
    cut = store().subset([3, 3, 0]).truncated(2)
    assert texts(cut) == [[41, 44], [41, 44], [11, 13]]
    assert cut.labels.tolist() == [2, 2, 2]
    view = store().subset([3, 1, 2]).truncated(2)
    assert (texts(view), view.labels.tolist()) == ([[41, 44], [21], [31, 32]], [2, 0, 1])
    assert texts(view.subset([2, 0])) == [[31, 32], [41, 44]], "what is cut is a view like any other"
    assert texts(store()) == IDS, "the store stays whole"


def test_what_is_short_enough_is_left_alone() -> None:
    whole = store()
    assert whole.truncated(4) is whole
    assert whole.subset([1, 2]).truncated(2).tokens is whole.tokens
    assert len(whole.subset([]).truncated(2)) == 0
    with pytest.raises(ValueError, match="cannot be cut to 1 tokens"):
        whole.truncated(1)
