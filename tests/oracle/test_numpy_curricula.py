"""The NumPy curricula themselves, against cases worked out by hand."""

from __future__ import annotations

import math

import numpy as np
import pytest

from tests.oracle import numpy_curricula as numpy
from tests.oracle.numpy_encoder import Example, pad
from tests.oracle.tiny import moved, questions, tiny

TEXTS = [Example((1, 7), 0), Example((1, 7, 7), 0), Example((1, 8), 0), Example((1, 9, 9, 9), 1)]
"""1 four times of 11, 7 three times, 8 once, 9 three times."""


def test_rarity_by_hand() -> None:
    one, seven, eight = math.log(11 / 4), math.log(11 / 3), math.log(11)
    assert numpy.rarity(TEXTS) == pytest.approx([one + seven, one + 2 * seven, one + eight, one + 3 * seven])


def test_places_by_hand() -> None:
    assert numpy.places([3.0, 1.0, 2.0, 2.0]) == [1.0, 0.25, 0.75, 0.75]
    assert numpy.places(numpy.rarity(TEXTS)) == [0.25, 0.75, 0.5, 1.0]


def test_competence_by_hand() -> None:
    # c0 = 0.6: c0² = 0.36; T = 8 of 10 rounds
    assert [numpy.competence(t, 10, 0.6, 0.8) for t in (0, 2, 8, 9)] == pytest.approx([0.6, math.sqrt(0.52), 1.0, 1.0])


def test_who_is_open_by_hand() -> None:
    assert numpy.able(TEXTS, 0.5, 1) == [0, 2]
    assert numpy.able(TEXTS, 0.01, 1) == [0]
    assert numpy.able(TEXTS, 0.01, 3) == [0, 1, 2]
    assert numpy.able(TEXTS, 1.0, 2) == [0, 1, 2, 3]


def test_cutting_by_hand() -> None:
    text = Example((2, 5, 6, 7, 3), 1, (0, 0, 0, 1, 1))
    assert numpy.cut(text, 3) == Example((2, 5, 3), 1, (0, 0, 1))
    assert numpy.cut(text, 2).ids == (2, 3)
    assert numpy.cut(text, 5) == text


def test_lengths_by_hand() -> None:
    assert [numpy.warmed_length(t, 10, 4, 11, 0.5) for t in range(7)] == [4, 5, 6, 8, 9, 11, 11]
    assert [numpy.staged_length(t, 10, 4, 11, 0.3) for t in range(5)] == [4, 4, 4, 11, 11]
    assert numpy.warmed_length(0, 10, 9, 5, 0.5) == numpy.staged_length(9, 10, 9, 5, 0.5) == 9, (
        "shorter texts are whole from the first round"
    )


def test_losses_are_cross_entropies() -> None:
    encoder, start = tiny()
    tensors, texts = moved(start), questions(4)
    logits = encoder.forward(tensors, pad(texts)).logits
    due = [math.log(np.exp(row).sum()) - row[text.label] for row, text in zip(logits, texts, strict=True)]
    assert numpy.losses(encoder, tensors, texts) == pytest.approx(due)
