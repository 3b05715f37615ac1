"""Each curriculum by itself: what it opens of a hand-made device, when it asks for work, what it refuses."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import numpy as np
import pytest
import torch

from fedloom.client.client import Client
from fedloom.client.curricula import all_curricula, curricula_in, fisher, named
from fedloom.client.curricula.everything import Everything
from fedloom.client.curricula.fisher import ByFisher
from fedloom.client.curricula.loss import ByLoss
from fedloom.client.curricula.shortformer import Staged
from fedloom.client.curricula.slw import LengthWarmup
from fedloom.client.curricula.voc import ByRarity, rarity
from fedloom.client.curriculum import Curriculum, Turn, easy_first, elapsed, shuffled
from fedloom.compute.work import Predict, Score
from fedloom.data.examples import Examples
from fedloom.methods.fibecfed import Curriculum as Own
from tests import flows
from tests.flows import work

WORDS = [[2, 5, 3], [2, 5, 6, 3], [2, 7, 3], [2, 5, 5, 5, 6, 8, 3], [2, 9, 10, 3], [2, 5, 6, 7, 8, 3]]
"""Six texts of 3, 4, 3, 7, 4 and 6 tokens: 2 and 3 end every text, 5 is the most frequent word, 9 and 10 occur once."""


def device() -> Client:
    train = Examples.of(WORDS, [0, 1, 0, 1, 2, 2])
    return Client(4, train, train, train, seed=11)


def turn(t: int, rounds: int = 10, epochs: int = 2, size: int = 2, reshuffle: bool = True) -> Turn:
    return Turn(t, rounds, epochs, size, reshuffle)


def lists(batches: list[np.ndarray]) -> list[list[int]]:
    return [[int(i) for i in batch] for batch in batches]


def texts(examples: Examples) -> list[list[int]]:
    return [examples.pad(np.array([i]), pad_id=0).ids[0].tolist() for i in range(len(examples))]


# all of them


def test_there_are_these_curricula_and_each_says_its_paper() -> None:
    assert list(all_curricula()) == ["fisher", "loss", "none", "shortformer", "slw", "voc"]
    assert all(kind.paper for kind in all_curricula().values())
    assert curricula_in(fisher) == {"fisher": ByFisher}
    with pytest.raises(ValueError, match="no curriculum 'fischer'; there are fisher, loss, none"):
        named("fischer")


@pytest.mark.parametrize("kind", [*all_curricula().values(), Own])
def test_a_curriculum_is_a_frozen_value_that_keeps_the_protocol(kind: type[Any]) -> None:
    assert isinstance(kind(), Curriculum)
    assert kind() == kind() and hash(kind()) == hash(kind())
    for field in dataclasses.fields(kind):
        with pytest.raises(dataclasses.FrozenInstanceError):
            setattr(kind(), field.name, 1)


@pytest.mark.parametrize("kind", [*all_curricula().values(), Own])
def test_at_the_end_everything_is_open(kind: type[Any]) -> None:
    c = device()
    c.memory = {"difficulty": torch.arange(6.0, dtype=torch.float64), "scored_at": torch.tensor(0)}
    for t in (8, 9):
        opened = kind().open(c, turn(t))
        assert opened.examples is c.train
        assert sorted(i for batch in lists(opened.batches) for i in batch) == sorted([*range(6)] * 2)


# none


def test_everything_is_two_seeded_epochs_anew_in_every_round_or_once_for_ever() -> None:
    c, none = device(), Everything()
    due = [shuffled(6, 4, 11, "batches", 4, 3, epoch) for epoch in (0, 1)]
    assert lists(none.open(c, turn(3, size=4)).batches) == lists([*due[0], *due[1]])
    fixed = shuffled(6, 4, 11, "batches", 4)
    assert lists(none.open(c, turn(3, size=4, reshuffle=False)).batches) == lists(fixed * 2)
    assert work(none.prepare(c, {}, 0)) == ([], None)
    assert none.facts(10) == {}


# easy first


def test_easy_batches_or_easy_examples_first() -> None:
    c, hard = device(), np.array([5.0, 1.0, 4.0, 0.0, 3.0, 2.0])
    cut = shuffled(6, 2, 11, "batches", 4)
    order = sorted(range(3), key=lambda i: hard[cut[i]].mean())
    assert lists(easy_first(c, hard, 0.5, turn(0), "batch").batches) == lists([cut[i] for i in order[:2]]) * 2
    assert lists(easy_first(c, hard, 0.5, turn(0), "example").batches) == [[3, 1], [5, 4]] * 2
    assert lists(easy_first(c, hard, 0.5, turn(0), "unsorted").batches) == lists(cut[:2]) * 2
    with pytest.raises(ValueError, match="no granularity 'token'; there are batch, example, unsorted"):
        easy_first(c, hard, 0.5, turn(0), "token")  # type: ignore[arg-type]


@pytest.mark.parametrize(("over", "wanted"), [("adapter", frozenset(flows.FACTORS)), ("all", None)])
def test_fisher_scores_at_what_it_is_given_over_what_it_is_told(over: Any, wanted: frozenset[str] | None) -> None:
    c = flows.client()
    (item,), _ = work(ByFisher(over=over).prepare(c, flows.start(), 3), np.arange(9.0))
    assert isinstance(item, Score)
    assert (item.examples, item.over, set(item.at)) == (c.train, wanted, set(flows.start()))
    assert c.memory["difficulty"].tolist() == list(range(9))
    assert int(c.memory["scored_at"]) == 3
    assert ByFisher().over == "adapter", "a fresh head would drown the score"


@pytest.mark.parametrize("kind", [ByFisher, ByLoss, Own])
def test_what_is_not_sorted_is_not_told_as_easy_first(kind: Any) -> None:
    assert kind(granularity="unsorted").facts(4)["opens"] == "batches as cut"
    assert all("opens" not in kind(granularity=sorted_by).facts(4) for sorted_by in ("batch", "example"))


def test_fisher_scores_once_or_whenever_the_scores_are_too_old() -> None:
    for refresh, due in ((0, [True, False, False, False]), (3, [True, False, True, False])):
        c, curriculum = flows.client(), ByFisher(refresh=refresh)
        for t, wanted in zip((1, 3, 4, 6), due, strict=True):
            items, _ = work(curriculum.prepare(c, flows.start(), t), *([np.full(9, float(t))] if wanted else []))
            assert len(items) == wanted, (refresh, t)
        assert int(c.memory["scored_at"]) == (4 if refresh else 1)


def test_the_loss_is_that_of_the_true_label_and_asked_for_once() -> None:
    c = flows.client()
    logits = torch.from_numpy(np.random.default_rng(0).normal(size=(9, 3)))
    (item,), _ = work(ByLoss().prepare(c, flows.start(), 0), logits)
    assert isinstance(item, Predict)
    assert (item.examples, set(item.at)) == (c.train, set(flows.start()))
    assert not item.measures, "it is a part of what the method does, and costs what it costs"
    due = [math.log(sum(math.exp(x) for x in row)) - row[label] for row, label in zip(logits.tolist(), c.train.labels, strict=True)]
    assert c.memory["difficulty"].tolist() == pytest.approx(due)
    assert len(set(c.train.labels)) > 1
    assert work(ByLoss().prepare(c, flows.start(), 5)) == ([], None)


def test_unsorted_asks_for_no_loss_and_opens_the_batches_as_they_were_cut() -> None:
    c, curriculum = device(), ByLoss(0.5, granularity="unsorted")
    assert work(curriculum.prepare(c, flows.start(), 0)) == ([], None) and not c.memory
    opened = curriculum.open(c, turn(0))
    assert opened.examples is c.train
    assert lists(opened.batches) == lists(shuffled(6, 2, 11, "batches", 4)[:2]) * 2


# competence


def test_rarity_by_hand() -> None:
    """27 tokens: 2 and 3 six times each, 5 six times, 6 three times, 7 and 8 twice, 9 and 10 once."""
    often, six, twice, once = (math.log(27 / n) for n in (6, 3, 2, 1))
    due = [3 * often, 3 * often + six, 2 * often + twice, 5 * often + six + twice, 2 * often + 2 * once, 3 * often + six + 2 * twice]
    assert rarity(device().train).tolist() == pytest.approx(due)
    assert rarity(device().train.subset([4, 0])).tolist() == pytest.approx(
        [2 * math.log(7 / 2) + 2 * math.log(7), 2 * math.log(7 / 2) + math.log(7)]
    ), "the corpus is the device's own"


def test_the_competence_of_every_round() -> None:
    """c0 = 0.6, T = 8 of 10 rounds: c² = 0.36 + 0.08·t."""
    assert ByRarity(0.6).facts(10)["pacing"] == pytest.approx([min(1, math.sqrt(0.36 + 0.08 * t)) for t in range(10)])


def test_texts_are_open_up_to_the_competence_and_never_fewer_than_a_batch() -> None:
    """From easy to hard: 0, 2, 1, 4, 5, 3, at 1/6, 2/6, … of the distribution."""
    c = device()
    assert np.argsort(rarity(c.train)).tolist() == [0, 2, 1, 4, 5, 3]
    for start, size, due in ((0.01, 2, {0, 2}), (0.01, 3, {0, 1, 2}), (0.5, 2, {0, 1, 2}), (0.66, 2, {0, 1, 2}), (0.67, 2, {0, 1, 2, 4})):
        opened = ByRarity(start).open(c, turn(0, size=size))
        batches = lists(opened.batches)
        assert {i for batch in batches for i in batch} == due, (start, size)
        assert len(batches) == 2 * math.ceil(len(due) / size)
        assert batches == lists([np.array(sorted(due))[b] for e in (0, 1) for b in shuffled(len(due), size, 11, "batches", 4, 0, e)])


def test_equally_rare_texts_open_together() -> None:
    twins = Examples.of([[2, 5, 3], [2, 6, 3], [2, 7, 3], [2, 5, 6, 7, 3]], [0, 1, 2, 0])
    opened = ByRarity(0.5).open(Client(1, twins, twins, twins, 0), turn(0, size=1))
    assert {int(b[0]) for b in opened.batches} == {0}, "three of four are at 0.75; one batch is open all the same"
    opened = ByRarity(0.75).open(Client(1, twins, twins, twins, 0), turn(0, size=1))
    assert {int(b[0]) for b in opened.batches} == {0, 1, 2}


# lengths


def test_lengths_grow_from_the_start_to_the_devices_longest_text() -> None:
    """3 to 7 tokens in 8 rounds: half a token a round."""
    longest = [max(map(len, texts(LengthWarmup(3).open(device(), turn(t)).examples))) for t in range(10)]
    assert longest == [3, 3, 4, 4, 5, 5, 6, 6, 7, 7]
    assert texts(LengthWarmup(3).open(device(), turn(2)).examples)[3] == [2, 5, 5, 3]
    assert lists(LengthWarmup(3).open(device(), turn(2)).batches) == lists(Everything().open(device(), turn(2)).batches)
    assert LengthWarmup(9).open(device(), turn(0)).examples.lengths.max() == 7, "a start beyond the longest text cuts nothing"
    assert LengthWarmup(3, 0.5).facts(4) == {"pacing": [0.0, 0.5, 1.0, 1.0], "opens": "length"}


def test_two_stages() -> None:
    longest = [max(map(len, texts(Staged(4).open(device(), turn(t)).examples))) for t in range(10)]
    assert longest == [4] * 8 + [7] * 2
    assert lists(Staged(4).open(device(), turn(2)).batches) == lists(Everything().open(device(), turn(2)).batches)
    assert Staged(4, 0.5).facts(4) == {"pacing": [0.0, 0.0, 1.0, 1.0], "opens": "length"}


def test_float_noise_makes_no_stage_longer() -> None:
    assert 0.28 * 25 > 7, "what float arithmetic makes of 7 rounds"
    assert Staged(4, 0.28).facts(25)["pacing"].count(0.0) == 7


# refusals


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (lambda: ByRarity(0.0), "start is 0.0; .* 0 < start <= 1"),
        (lambda: ByRarity(1.5), "start is 1.5; .* 0 < start <= 1"),
        (lambda: ByRarity(full_at=0.0), "full_at is 0.0; .* 0 < full_at <= 1"),
        (lambda: LengthWarmup(1), "at least 2 tokens; start is 1"),
        (lambda: LengthWarmup(full_at=1.5), "full_at is 1.5; .* 0 < full_at <= 1"),
        (lambda: Staged(0), "at least 2 tokens; start is 0"),
        (lambda: Staged(full_at=-1.0), "full_at is -1.0; .* 0 < full_at <= 1"),
        (lambda: elapsed(0, 10, 0.0), "full_at is 0.0; .* 0 < full_at <= 1"),
        (lambda: elapsed(0, 10, 1.5), "full_at is 1.5; .* 0 < full_at <= 1"),
        (lambda: elapsed(0, 0, 0.5), "at least one round to be whole; got 0"),
        *(
            (lambda kind=kind, given=given: kind(**given), says)
            for kind in (ByFisher, ByLoss, Own)
            for given, says in (
                ({"start": 0.0}, "start is 0.0; .* 0 < start <= 1"),
                ({"start": math.nan}, "start is nan"),
                ({"full_at": 1.01}, "full_at is 1.01; .* 0 < full_at <= 1"),
            )
        ),
        *((lambda kind=kind: kind(refresh=-2), "refresh is -2; it is a number of rounds from 1 on, or 0") for kind in (ByFisher, Own)),
        *(
            (
                lambda kind=kind: kind(granularity="unsorted", refresh=2),
                "refresh is 2, and unsorted batches have no scores to refresh; .* 0",
            )
            for kind in (ByFisher, Own)
        ),
        (lambda: Own(head_rounds=-1), "head_rounds is -1; it is a number of rounds, 0 or more"),
    ],
)
def test_what_makes_no_sense_is_refused(make: Any, says: str) -> None:
    with pytest.raises(ValueError, match=says):
        make()
