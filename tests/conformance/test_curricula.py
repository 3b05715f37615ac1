"""Every curriculum with every method that takes one, in whole tiny experiments: it runs, it is the same to the bit in any stack, it resumes
to the same bits, it saves what it should; and a curriculum of nothing is FedAvg to the bit."""

from __future__ import annotations

import itertools
import json
from dataclasses import replace
from functools import cache
from pathlib import Path
from tempfile import mkdtemp
from typing import Any

import numpy as np
import pytest

from fedloom.client.curricula import all_curricula
from fedloom.client.store import ClientStore
from fedloom.compute.flops import Flops
from fedloom.compute.serial import Serial
from fedloom.compute.stacked import Stacked
from fedloom.compute.work import AdamW, Fit, Predict, Score
from fedloom.engines.engine import drive
from fedloom.engines.local import Local
from fedloom.methods import all_methods
from fedloom.methods.method import one_round, set_up
from fedloom.run.checkpoint import fingerprint_of
from fedloom.run.costs.pretended import Pretended
from fedloom.run.describe import describe, played
from fedloom.run.experiment import Experiment
from fedloom.run.loop import run
from fedloom.run.recipes import with_curriculum
from fedloom.run.terminal.console import Progress
from fedloom.run.world import World, build
from tests import small, tiny

pytestmark = pytest.mark.no_cover
"""The same lines again for every method, kind or size: which lines are reached at all, other tests tell (conftest.py)."""

CURRICULA = list(all_curricula())
TAKE_ONE = [name for name in all_methods() if name != "centralised"]
PLAIN = ("fedfft", "fedbf", "fedap", "federa", "fedopt", "fedprox", "flexlora", "lora-finetuned", "lora-prior")
"""What they train follows a curriculum by the same lines as ``lora``, which is run with every one: one each is enough to see it arrive."""
ALONE = {"fedcybgd", "handover"}
"""Whose rounds are one device, of which the first has no more examples than a batch."""
PAIRS = [(m, c) for m in TAKE_ONE for c in CURRICULA if m not in PLAIN and (c != "none" or m in ("lora", "fibecfed"))]
PAIRS += list(zip(PLAIN, itertools.cycle(c for c in CURRICULA if c != "none"), strict=False))
"""Without a curriculum a method is what it is anyhow, which ``test_no_curriculum_is_the_method_as_it_comes`` holds."""


@pytest.fixture(autouse=True)
def worlds_are_built_once(monkeypatch: pytest.MonkeyPatch) -> None:
    small.build_once(monkeypatch)


def takes_one(name: str) -> bool:
    try:
        with_curriculum(all_methods()[name](), all_curricula()["voc"]())
    except ValueError:
        return False
    return True


def experiment(method: str, curriculum: str, stack: int = 0, rounds: int = 2) -> Experiment:
    base = small.experiment(method, stack, rounds=rounds, evaluate_every=0)
    of = base.method
    if method in ALONE and curriculum != "none":
        of = replace(of, inner=replace(of.inner, batch_size=2))
    return replace(base, method=with_curriculum(of, small.curriculum(curriculum)))


def rows(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "rounds.jsonl").read_text().splitlines()]


@cache
def whole(method: str, curriculum: str, stack: int = 0, rounds: int = 2) -> tuple[Path, dict[str, Any]]:
    folder = Path(mkdtemp(prefix="curricula-")) / "run"
    return folder, run(experiment(method, curriculum, stack, rounds), folder, plain=True)


def test_every_method_but_the_centre_takes_a_curriculum() -> None:
    """A method that cannot follow one must refuse it; see that it does before it is listed here."""
    assert [name for name in all_methods() if takes_one(name)] == TAKE_ONE


@pytest.mark.parametrize(("method", "curriculum"), PAIRS)
def test_every_curriculum_runs_with_every_method_that_takes_one(method: str, curriculum: str) -> None:
    folder, results = whole(method, curriculum)
    assert results["final"]["round"] == 2
    assert all(row["loss"] > 0 and row["examples"] > 0 and not row["failed"] for row in rows(folder)[1:])
    told = results["facts"].get("pacing")
    assert (told is None) == (curriculum == "none")
    assert told is None or (len(told) == 2 and all(0 <= share <= 1 for share in told))
    plain = method if (curriculum, method) != ("none", "fibecfed") else "fibecfed+none"
    assert results["method"] == (plain if curriculum == "none" else f"{method}+{curriculum}")


@pytest.mark.parametrize("method", [name for name in TAKE_ONE if name not in PLAIN])
def test_every_method_trains_on_what_its_curriculum_opens_and_on_nothing_else(method: str) -> None:
    """One of a method's curricula against another, of the same cohort in the same round. What cuts texts takes all examples, what
    sorts them fewer; in the first round both cuts are at four tokens, and in the second one is gone."""
    done = {name: [(row["examples"], row["flops"]) for row in rows(whole(method, name)[0])[1:]] for name in CURRICULA if name != "none"}
    (examples, begun), (_, grown) = done["slw"]
    (second, cut), (_, uncut) = done["shortformer"]
    assert (second, cut) == (examples, pytest.approx(begun, rel=1e-6)) and grown < uncut
    assert all(done[name][0][0] < examples for name in ("fisher", "loss", "voc"))


@pytest.mark.parametrize(("method", "curriculum"), [("lora", "fisher"), ("lora", "slw"), ("lora", "voc"), ("fibecfed", "loss")])
def test_any_stack_ends_at_the_same_bits(method: str, curriculum: str) -> None:
    (one, first), (many, second) = whole(method, curriculum, 0), whole(method, curriculum, 1)
    assert fingerprint_of(one) == fingerprint_of(many)
    assert [first[key] for key in ("final", "facts", "device_seconds")] == [second[key] for key in ("final", "facts", "device_seconds")]


class Killed(BaseException):
    """As good as kill −9: nobody catches it."""


@pytest.mark.parametrize("curriculum", ["fisher", "slw"])
def test_interrupted_after_every_round_it_ends_at_the_same_bits(curriculum: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    show = Progress.round
    for seen in range(3):

        def dying(self: Progress, row: dict[str, Any], last: int = seen) -> None:
            show(self, row)
            if row["round"] > last:
                raise Killed

        monkeypatch.setattr(Progress, "round", dying)
        with pytest.raises(Killed):
            run(experiment("lora", curriculum, 0, rounds=3), tmp_path / "run", plain=True)
    monkeypatch.setattr(Progress, "round", show)
    results = run(experiment("lora", curriculum, 0, rounds=3), tmp_path / "run", plain=True)
    folder, expected = whole("lora", curriculum, 0, rounds=3)
    assert fingerprint_of(tmp_path / "run") == fingerprint_of(folder)
    assert (results["final"], results["facts"]) == (expected["final"], expected["facts"])
    assert results["device_seconds"] == pytest.approx(expected["device_seconds"])


@pytest.mark.parametrize("method", [name for name in TAKE_ONE if name != "fibecfed"])
def test_no_curriculum_is_the_method_as_it_comes(method: str) -> None:
    assert experiment(method, "none") == small.experiment(method, 0, rounds=2, evaluate_every=0)


def test_curricula_train_differently() -> None:
    assert len({fingerprint_of(whole("lora", curriculum)[0]) for curriculum in CURRICULA}) == len(CURRICULA)


# what it costs


def costs(curriculum: str) -> list[tuple[float, int]]:
    """(device seconds, examples trained on) of each round."""
    return [(row["device_seconds"], row["examples"]) for row in rows(whole("lora", curriculum)[0])[1:]]


def test_what_is_closed_or_cut_is_not_paid_for() -> None:
    everything = costs("none")
    for curriculum in ("slw", "shortformer"):
        assert costs(curriculum)[0][1] == everything[0][1], "every example takes part"
        assert costs(curriculum)[0][0] < everything[0][0], "in fewer tokens"
    for curriculum in ("voc", "fisher", "loss"):
        assert costs(curriculum)[0][1] < everything[0][1]


def test_looking_at_every_loss_is_booked_once_a_device_beside_what_is_trained(tmp_path: Path) -> None:
    """A round costs the steps on the opened batches, each at its longest text, and for who takes part for the first time one forward pass
    of each of its texts."""
    e = experiment("lora", "loss")
    world, store = build(e), ClientStore(None)
    steps, flops = all_steps(world, store)
    assert len(set().union(*steps)) == 4, "somebody takes part for the first time in the second round"
    seen, initial = set[bytes](), frozenset(world.model.initial)
    run(e, tmp_path / "run", plain=True)
    for row, cohort in zip(rows(tmp_path / "run")[1:], steps, strict=True):
        due = 0.0
        for who, (lengths, batches) in cohort.items():
            due += sum(len(b) * float(flops.step(initial, int(lengths[b].max()))) for b in batches)
            due += 0.0 if who in seen else float(np.sum(flops.forward(lengths)))
            seen.add(who)
        assert row["flops"] == pytest.approx(due, rel=1e-12)
        assert row["examples"] == sum(len(b) for _, batches in cohort.values() for b in batches)


def all_steps(world: World, store: ClientStore) -> tuple[list[dict[bytes, tuple[np.ndarray, list[np.ndarray]]]], Flops]:
    """By round and by the rows that a device holds the lengths of its texts and the batches that the compute was given; and what counts
    operations."""
    told: list[dict[bytes, tuple[np.ndarray, list[np.ndarray]]]] = []

    class Listening:
        def run(self, items: Any) -> Any:
            for item in items:
                if isinstance(item, Fit):
                    told[-1][item.examples.rows.tobytes()] = (item.examples.lengths, list(item.batches))
            return world.compute.run(items)

    engine = Local(replace(world, compute=Listening()).host(store))  # type: ignore[arg-type]
    method = world.experiment.method
    state = drive(set_up(method, world.model, world.pool), engine)
    for _ in range(world.experiment.rounds):
        told.append({})
        state = drive(one_round(method, state, world.pool), engine)
    return told, Flops(world.model)


def test_both_computes_count_cut_texts_and_scores() -> None:
    model, c = tiny.model(), tiny.clients()[1]
    fit = Fit(model.initial, c.train, [np.arange(9)], AdamW(1e-3))
    for kind in (Serial, Stacked):
        full, short = kind(model).run([fit, replace(fit, examples=c.train.truncated(4))])
        assert short.flops < full.flops and short.examples == full.examples == 9
        scored, looked = kind(model).run([Score(model.initial, c.train), Predict(model.initial, c.train)])
        assert scored.flops > looked.flops > 0 == scored.examples == looked.examples


def test_both_computes_read_the_same_cut_texts() -> None:
    """Cut texts are what a tokenizer would have made: logits equal those of texts written out short."""
    model, c = tiny.model(), tiny.clients()[2]
    cut = c.train.truncated(5)
    assert cut.lengths.max() == 5 < c.train.lengths.max()
    written = [
        row[mask].tolist() for row, mask in ((p.ids[0], p.mask[0]) for p in (c.train.pad(np.array([i]), pad_id=0) for i in range(12)))
    ]
    short = type(cut).of([text if len(text) <= 5 else [*text[:4], text[-1]] for text in written], c.train.labels.tolist())
    due = Serial(model).run([Predict(model.initial, short)])[0].result
    for kind in (Serial, Stacked):
        made = kind(model).run([Predict(model.initial, cut)])[0].result
        assert float((made - due).abs().max()) < 2e-5
        assert float((kind(model).run([Predict(model.initial, c.train)])[0].result - due).abs().max()) > 1e-2


def test_describing_counts_what_a_curriculum_saves_and_asks_for() -> None:
    """Nothing is trained and every score is 0, so all batches are equally easy and only the numbers of texts and tokens differ."""
    said = {name: dict(describe(experiment("lora", name)).lines) for name in CURRICULA}
    assert said["slw"]["method"].startswith("lora+slw: ")
    assert all(lines["set-up"] == "none" for lines in said.values())
    flops = {name: float(lines["first round"].split(" FLOPs")[0].rsplit(" ", 1)[-1]) for name, lines in said.items()}
    assert max(flops["slw"], flops["shortformer"], flops["voc"]) < flops["none"]
    assert flops["slw"] == flops["shortformer"], "both begin with texts of four tokens"
    assert flops["loss"] < flops["fisher"], "the same batches; a gradient of every example costs more than its logits"


def test_the_last_round_is_told_with_those_who_have_scored_before(tmp_path: Path) -> None:
    """Who takes part for the first time scores its examples; of the last cohort most have."""
    e = replace(experiment("lora", "loss"), rounds=5)
    run(e, tmp_path / "run", plain=True)
    rows = [json.loads(line) for line in (tmp_path / "run" / "rounds.jsonl").read_text().splitlines()]
    world = build(e)
    foretold = [section.flops for section in played(replace(world, compute=Pretended(world.model))).rounds]
    assert len(foretold) == 5, "all rounds are played"
    assert foretold[1:] == pytest.approx([row["flops"] for row in rows[2:]], rel=0.01), "in the first the shortest texts are the easiest"
