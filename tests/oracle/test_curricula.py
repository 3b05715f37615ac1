"""The curricula as they run under FedAvg, on both computes, against their NumPy derivations.

Each test's docstring is the sentence that it holds them to. FibecFed's own curriculum has ``test_fibecfed.py``.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cache
from typing import Any

import numpy as np
import pytest

from fedloom.client.curricula.fisher import ByFisher
from fedloom.client.curricula.loss import ByLoss
from fedloom.client.curricula.shortformer import Staged
from fedloom.client.curricula.slw import LengthWarmup
from fedloom.client.curricula.voc import ByRarity
from fedloom.client.curriculum import shuffled
from fedloom.compute.work import Fit, Predict, Score
from fedloom.methods import all_methods
from fedloom.model.names import is_head
from fedloom.run.recipes import with_curriculum
from fedloom.server.participation import Pool, uniform
from tests import flows
from tests.conformance.played import Played
from tests.oracle import numpy_curricula as numpy
from tests.oracle import real
from tests.oracle.numpy_encoder import Example, Tensors
from tests.oracle.numpy_fibecfed import batch_order, difficulty, fraction, is_lora, open_batches, sample_order
from tests.oracle.numpy_training import aggregate, train

pytestmark = pytest.mark.no_cover

POOL = Pool((0, 1, 2, 3), 3, 4, 8)
COHORTS = tuple(uniform(POOL, t) for t in range(POOL.rounds))
FIRST = {k: next(t for t, cohort in enumerate(COHORTS) if k in cohort) for k in POOL.clients}
"""The round in which each device takes part for the first time."""
SIZE, EPOCHS = real.INNER.batch_size, real.INNER.local_epochs

Opened = tuple[list[Example], list[np.ndarray]]
"""The texts of a device as it sees them, and the batches of all local epochs."""


def shuffles(k: int, t: int, positions: Sequence[int]) -> list[np.ndarray]:
    """Seeded epochs over these examples."""
    chosen = np.asarray(positions)
    return [chosen[b] for e in range(EPOCHS) for b in shuffled(len(chosen), SIZE, real.SEED, "batches", k, t, e)]


def fixed_cut(k: int) -> list[np.ndarray]:
    return shuffled(real.SIZES[k], SIZE, real.SEED, "batches", k)


@dataclass(frozen=True)
class Case:
    """A curriculum, and what its derivation opens: of (k, t, the tensors that k trains then, k's scores or None) -> Opened.

    ``score``: of (tensors that k was given first, k's texts) -> scores, where there are any.
    """

    curriculum: Any
    opens: Callable[[int, int, np.ndarray], Opened]
    score: Callable[[Tensors, list[Example]], np.ndarray] = lambda tensors, texts: np.zeros(0)


def rare(start: float, full_at: float) -> Case:
    def opens(k: int, t: int, scores: np.ndarray) -> Opened:
        texts = real.questions(k)
        return texts, shuffles(k, t, numpy.able(texts, numpy.competence(t, POOL.rounds, start, full_at), SIZE))

    return Case(ByRarity(start, full_at), opens)


def short(curriculum: Any, length: Callable[[int, int, int, int, float], int]) -> Case:
    def opens(k: int, t: int, scores: np.ndarray) -> Opened:
        texts = real.questions(k)
        longest = max(len(text.ids) for text in texts)
        now = length(t, POOL.rounds, curriculum.start, longest, curriculum.full_at)
        return [numpy.cut(text, now) for text in texts], shuffles(k, t, range(len(texts)))

    return Case(curriculum, opens)


def easy(curriculum: Any, score: Callable[[Tensors, list[Example]], np.ndarray]) -> Case:
    def opens(k: int, t: int, scores: np.ndarray) -> Opened:
        ways = {"batch": batch_order(scores, fixed_cut(k)), "example": sample_order(scores, SIZE), "unsorted": fixed_cut(k)}
        order = ways[curriculum.granularity]
        share = fraction(curriculum.pacing, t, POOL.rounds, curriculum.start, curriculum.full_at)
        return real.questions(k), order[: open_batches(share, len(order))] * EPOCHS

    return Case(curriculum, opens, score)


def fisher_of(over: Callable[[str], bool]) -> Callable[[Tensors, list[Example]], np.ndarray]:
    return lambda tensors, texts: difficulty(real.encoder(), tensors, texts, [n for n in tensors if over(n)])


CASES = {
    "voc": rare(0.3, 0.7),
    "slw": short(LengthWarmup(3, 0.8), numpy.warmed_length),
    "shortformer": short(Staged(4, 0.5), numpy.staged_length),
    "fisher": easy(ByFisher(0.4, 0.7), fisher_of(is_lora)),
    "fisher, all": easy(ByFisher(0.3, 1.0, "sqrt", "example", over="all"), fisher_of(lambda name: True)),
    "fisher, unsorted": easy(ByFisher(0.4, 0.7, granularity="unsorted"), lambda tensors, texts: np.zeros(len(texts))),
    "loss": easy(ByLoss(0.4, 0.7), lambda tensors, texts: numpy.losses(real.encoder(), tensors, texts)),
}
cases = pytest.mark.parametrize("name", CASES)
kinds = pytest.mark.parametrize("kind", ["serial", "stacked"])


@dataclass
class Derived:
    """By round: shared tensors (at the start first), what every device saw, its losses. By device: its scores."""

    shared: list[dict[str, np.ndarray]]
    opened: list[dict[int, Opened]]
    losses: list[dict[int, list[float]]]
    scores: dict[int, np.ndarray]


@cache
def derived(name: str) -> Derived:
    """FedAvg under the curriculum: scores at what a device is given when it first takes part, then training on what is open."""
    case, made = CASES[name], Derived([real.start()], [], [], {})
    for t, cohort in enumerate(COHORTS):
        now = made.shared[-1]
        made.scores |= {k: case.score(now, real.questions(k)) for k in cohort if k not in made.scores}
        opened = {k: case.opens(k, t, made.scores[k]) for k in cohort}
        fitted = {k: train(real.encoder(), now, list(now), texts, batches, real.RULE) for k, (texts, batches) in opened.items()}
        made.shared.append(aggregate([fitted[k][0] for k in cohort], [real.SIZES[k] for k in cohort]))
        made.opened.append(opened)
        made.losses.append({k: fitted[k][1] for k in cohort})
    return made


def run(name: str, kind: real.Kind) -> real.Run:
    return real.run(replace(real.INNER, curriculum=CASES[name].curriculum), kind, POOL)


def lists(batches: Sequence[np.ndarray]) -> list[list[int]]:
    return [[int(i) for i in batch] for batch in batches]


@cases
@kinds
def test_every_device_trains_on_what_is_open_and_nothing_else(name: str, kind: real.Kind) -> None:
    """The texts, as cut, and the batches of every device in every round; one Fit a participation."""
    for t, exchange in enumerate(run(name, kind).asked("train")):
        assert tuple(exchange.down) == COHORTS[t]
        for k in COHORTS[t]:
            (fit,) = exchange.fits(k)
            texts, batches = derived(name).opened[t][k]
            assert real.as_oracle(fit.examples) == texts
            assert lists(fit.batches) == lists(batches)
            assert exchange.up[k].examples == sum(map(len, batches))
            assert exchange.up[k].num_examples == real.SIZES[k], "the weight is the number of the device's examples, open or not"


@cases
@kinds
def test_what_is_learnt_is_fedavg_on_what_is_open(name: str, kind: real.Kind) -> None:
    """The aggregate after every round and every device's losses."""
    made = run(name, kind)
    for t, exchange in enumerate(made.asked("train")):
        real.assert_close(made.states[t + 1].shared, derived(name).shared[t + 1])
        for k, update in exchange.up.items():
            assert update.metrics["loss"] == pytest.approx(np.mean(derived(name).losses[t][k]), abs=3e-4)
            assert set(update.tensors) == set(real.start()) and set(update.metrics) == {"loss"}, "nothing of a curriculum travels"


@pytest.mark.parametrize("name", ["fisher", "fisher, all", "loss"])
@kinds
def test_scores_are_taken_once_at_what_a_device_is_given_when_it_first_takes_part(name: str, kind: real.Kind) -> None:
    """d_i = ‖∇_P ℓ(s_i; P)‖² over the adapter or over everything; or the loss. They stay on the device."""
    made = run(name, kind)
    assert len(set(FIRST.values())) > 1, "somebody comes later"
    for t, exchange in enumerate(made.asked("train")):
        for k in COHORTS[t]:
            scored = [item for item, _ in exchange.work[k] if isinstance(item, Score | Predict)]
            assert len(scored) == (t == FIRST[k]), (t, k)
            np.testing.assert_allclose(made.memory[t + 1][k]["difficulty"].numpy(), derived(name).scores[k], rtol=2e-3, atol=1e-6)
            for item in scored:
                real.assert_close(item.at, derived(name).shared[t])
                assert item.examples is real.devices()[k].train
    for t in range(POOL.rounds + 1):
        for k in POOL.clients:
            assert bool(made.memory[t][k]) == (t > FIRST[k])


@kinds
def test_old_scores_are_taken_anew_at_the_current_model(kind: real.Kind) -> None:
    """Option of FibecFed: refresh the scores every R rounds at the current model."""
    made = real.run(replace(real.INNER, curriculum=ByFisher(0.4, 0.7, refresh=2)), kind, POOL)
    at: dict[int, int] = {}
    for t, exchange in enumerate(made.asked("train")):
        for k in COHORTS[t]:
            due = k not in at or t - at[k] >= 2
            results = [result for item, result in exchange.work[k] if isinstance(item, Score)]
            assert len(results) == due
            if due:
                at[k] = t
                now = real.arrays(made.states[t].shared)
                np.testing.assert_allclose(results[0], difficulty(real.encoder(), now, real.questions(k), filter(is_lora, now)), rtol=2e-3)
                (fit,) = exchange.fits(k)
                order = batch_order(np.asarray(results[0]), fixed_cut(k))
                assert lists(fit.batches) == lists(order[: len(fit.batches) // EPOCHS] * EPOCHS)
    assert any(at[k] > FIRST[k] for k in at), "somebody scored twice"


@pytest.mark.parametrize("name", ["voc", "slw", "shortformer", "fisher, unsorted"])
def test_curricula_by_the_text_alone_ask_no_model_and_remember_nothing(name: str) -> None:
    made = run(name, "serial")
    assert all(isinstance(item, Fit) for exchange in made.asked("train") for k in exchange.up for item, _ in exchange.work[k])
    assert not any(own for kept in made.memory for own in kept.values())


@cases
def test_the_curriculum_grows_to_everything(name: str) -> None:
    """The derivations are not all the same: something is closed at first, and at the end nothing is."""
    (first, last) = ([derived(name).opened[t][k] for k in COHORTS[t]] for t in (0, POOL.rounds - 1))
    size = [sum(len(texts[i].ids) for batch in batches for i in batch) for texts, batches in first]
    assert any(tokens < EPOCHS * sum(len(text.ids) for text in real.questions(k)) for tokens, k in zip(size, COHORTS[0], strict=True))
    if name != "fisher, all":  # open to everything at T only
        for (texts, batches), k in zip(last, COHORTS[-1], strict=True):
            assert texts == real.questions(k) or name == "slw"
            assert sorted(int(i) for batch in batches for i in batch) == sorted(list(range(real.SIZES[k])) * EPOCHS)


def test_the_facts_tell_the_pacing() -> None:
    """What the report draws: the share that is open in each round."""
    told = {name: run(name, "serial").states[0].facts for name in CASES}
    rounds = range(POOL.rounds)
    assert told["voc"]["pacing"] == pytest.approx([numpy.competence(t, 4, 0.3, 0.7) for t in rounds])
    assert told["fisher"]["pacing"] == told["loss"]["pacing"] == pytest.approx([fraction("linear", t, 4, 0.4, 0.7) for t in rounds])
    assert told["slw"]["pacing"] == pytest.approx([0, 1 / 3.2, 2 / 3.2, 3 / 3.2])
    assert told["shortformer"]["pacing"] == [0, 0, 1, 1]
    assert {name: facts.get("opens", "batches") for name, facts in told.items()} == {
        "voc": "examples", "slw": "length", "shortformer": "length", "fisher": "batches", "fisher, all": "batches",
            "fisher, unsorted": "batches as cut", "loss": "batches"
    }  # fmt: skip


@pytest.mark.parametrize("over", ["adapter", "all"])
@pytest.mark.parametrize("name", ["lora", "ffa", "rolora", "fedcybgd", "slora", "deltalora"])
def test_what_a_device_is_about_to_train_is_what_it_scores_and_nothing_beside_it(name: str, over: Any) -> None:
    """P is the trainable parameters: not what the model has beside them, what was sent before, or what lies under them."""
    method = with_curriculum(all_methods()[name](), ByFisher(over=over, refresh=1))
    played, scores = Played(method, Pool((0, 1, 2, 3), 3, 4, 5)), list[Score]()
    run = played.compute.run

    def seen(items: Any) -> Any:
        scores.extend(item for item in items if isinstance(item, Score))
        return run(items)

    played.compute.run = seen
    for _ in range(3):  # in the third Delta-LoRA's weights have moved, and devices stand on what came
        scores.clear()
        played.round()
        for score in scores:
            (fit,) = (fit for fit in played.fits if fit.examples is score.examples)
            assert score.over == {n for n in fit.start if over == "all" or not is_head(n)}
        assert scores


def test_where_a_device_trains_its_head_alone_that_is_what_it_scores() -> None:
    """EmbracingFL's weakest devices."""
    c = flows.client()
    head = {n: t for n, t in flows.start().items() if is_head(n)}
    (item,), _ = flows.work(ByFisher().prepare(c, flows.start(), 0, head), np.arange(9.0))
    assert item.over == frozenset(head)
