"""Tagging: every method runs on it or says why not, it resumes, and what is exported the library loads."""

from __future__ import annotations

import json
from dataclasses import replace
from functools import cache
from pathlib import Path
from tempfile import mkdtemp
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoTokenizer

from fedloom.compute.work import Predict
from fedloom.data.tagging import BETWEEN, TYPE, Tagging
from fedloom.engines.local import Local
from fedloom.messages import Replies, Update, ask
from fedloom.messages import Task as Asked
from fedloom.methods import all_methods
from fedloom.run import evaluation
from fedloom.run.deployment.device import hosted, order
from fedloom.run.deployment.greeting import Own, greeting_of
from fedloom.run.errors import ExperimentError
from fedloom.run.experiment import Experiment
from fedloom.run.export import export, predictor_of
from fedloom.run.loop import run
from fedloom.run.pages.report import write_report
from fedloom.run.recipes import resolve
from fedloom.run.world import build, read_data, store_in
from tests import small
from tests.conformance.test_instructions import COUNTS_LABELS
from tests.conformance.test_methods import rows, without_clock

pytestmark = pytest.mark.no_cover
"""The same lines again for every method, kind or size: which lines are reached at all, other tests tell (conftest.py)."""

RUNS = [name for name in all_methods() if name not in COUNTS_LABELS]


@cache
def data() -> Path:
    """Twenty words, of which six are names, of two types."""
    path, rng = Path(mkdtemp(prefix="tiny-tags-")), np.random.default_rng(9)
    for split, count in {"train": 40, "validation": 10, "test": 12}.items():
        made = []
        for _ in range(count):
            words = rng.integers(0, 20, size=rng.integers(1, 8))
            made.append({"tokens": [f"w{w}" for w in words], "ner_tags": ["B-low" if w < 3 else "B-mid" if w < 6 else "O" for w in words]})
        (path / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in made))
    return path


class Anything:
    """Some devices that are elsewhere."""


def experiment(name: str = "lora", **fields: Any) -> Experiment:
    return replace(small.experiment(name, stack=0), data=str(data()), **fields)


@pytest.mark.parametrize("name", RUNS)
def test_every_method_tags(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fedloom.run.world.load_model", small.LOADED)
    results = run(experiment(name), tmp_path / "run", plain=True)
    told = rows(tmp_path / "run")
    assert results["metric"] == "entity_f1"
    assert [row["round"] for row in told] == [0, 1, 2]
    assert all(0 <= row["validation"]["word_accuracy"] <= 1 for row in told)
    assert results["partition"]["classes"] == ["low", "mid", "none"]
    cells = [cell for device in results["per_device"] for cell in device["confusion"]["personalised"]]
    found, missed, wrong = (sum(n for t, p, n in cells if (t, p) == which) for which in ((1, 1), (1, 0), (0, 1)))
    assert results["final"]["personalised"] == pytest.approx(2 * found / max(2 * found + missed + wrong, 1))
    assert "word_accuracy" not in results["final"]


@pytest.mark.parametrize("name", sorted(COUNTS_LABELS))
def test_methods_that_count_labels_say_so(name: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=f"'{name}' counts each device's labels"):
        run(experiment(name), tmp_path / "run", plain=True)


def test_stacked_is_one_by_one(tmp_path: Path) -> None:
    one, many = (run(replace(small.experiment(stack=s), data=str(data())), tmp_path / str(s), plain=True) for s in (1, 0))
    for key in ("personalised", "global", "loss"):
        assert one["final"][key] == pytest.approx(many["final"][key], rel=1e-4), key
    assert one["final"]["further"]["word_accuracy"] == pytest.approx(many["final"]["further"]["word_accuracy"], rel=1e-4)
    world = build(experiment())
    a, b = (predictor_of(world, tmp_path / str(s), None).tensors for s in (1, 0))
    assert set(a) == set(b)
    for name in a:
        torch.testing.assert_close(a[name], b[name], atol=2e-4, rtol=0)


def test_interrupted_it_ends_at_the_same_bits(tmp_path: Path) -> None:
    whole = run(experiment("fibecfed"), tmp_path / "whole", plain=True)
    small.stopped(experiment("fibecfed"), tmp_path / "parts", 1)
    again = run(experiment("fibecfed"), tmp_path / "parts", plain=True)
    assert without_clock(again) == without_clock(whole)


def test_skew_by_entity_type_and_by_size() -> None:
    source, made = read_data(experiment(partition="label", alpha=0.05, clients=4))
    assert sorted(row for shard in made.train for row in shard) == list(range(40))
    counts = made.counts(np.asarray(source.splits["train"][TYPE], np.int64), 3)
    even = read_data(experiment(partition="iid", clients=4))[1].counts(np.asarray(source.splits["train"][TYPE], np.int64), 3)
    share = [float((of.max(1) / of.sum(1)).mean()) for of in (counts[counts.sum(1) > 0], even)]
    assert share[0] > share[1] + 0.15, "devices have sentences of one type above all"
    sizes = sorted(len(shard) for shard in read_data(experiment(alpha=1e6, beta=0.3))[1].train)
    assert sizes[-1] > 3 * sizes[0], "devices that differ in nothing but how much they have"


@pytest.mark.parametrize("name", ["lora", "fibecfed"])
def test_a_device_without_any_entity_trains_and_is_scored(name: str, tmp_path: Path) -> None:
    """All its words are O: its loss counts like any other's, and nothing is found, wrong or missed where nothing is said to be there."""
    rng = np.random.default_rng(4)
    for split, count in {"train": 36, "validation": 12, "test": 12}.items():
        told = []
        for i in range(count):
            words = rng.integers(6 if i % 3 == 0 else 0, 20, size=4)
            told.append({"tokens": [f"w{w}" for w in words], "ner_tags": ["B-low" if w < 6 else "O" for w in words], "device": str(i % 3)})
        (tmp_path / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in told))
    few = replace(experiment(name, partition="column:device", clients=3, cohort=3), data=str(tmp_path))
    results = run(few, tmp_path / "run", plain=True)
    made = rows(tmp_path / "run")
    assert all(row["answered"] == [0, 1, 2] and not row["failed"] and np.isfinite(row["loss"]) for row in made[1:])
    device = results["per_device"][0]
    assert device["labels"] == [0, 12] == [0, device["train"]], "twelve training sentences, none with an entity"
    cells = {(t, p): n for t, p, n in device["confusion"]["personalised"]}
    assert cells.get((1, 1), 0) == cells.get((1, 0), 0) == 0, "no entity is there to be found or missed"
    assert device["score"] == (0 if device["test"] else None), "nothing to find: without a score, unless something was said to be there"
    assert 0 <= results["final"]["personalised"] <= 1


def test_a_device_elsewhere_tells_counts_of_words_and_they_are_the_simulations(tmp_path: Path) -> None:
    """The loss is the mean over all words, also where a device validates on no sentence with an entity; so is the share of right ones."""
    e = experiment(partition="iid")
    built = build(e)
    kinds = {split: np.asarray(rows[TYPE]) for split, rows in built.source.splits.items()}
    plain = np.flatnonzero(kinds["validation"] == 2)
    assert len(plain), "sentences without an entity: device 0 has those and no others to validate on"
    shards = (plain, *np.array_split(np.flatnonzero(kinds["validation"] < 2), 3))
    world = replace(built, partition=replace(built.partition, validation=shards))
    task = world.source.task
    assert isinstance(task, Tagging)
    greeting, updates = {**greeting_of(world), "digest": e.digest()}, []
    for k in range(e.clients):
        for split, held in world.source.splits.items():
            mine = [list(held)[i] for i in world.partition.shards(split)[k]]
            told = [(one["tokens"].split(BETWEEN), [task.tags[int(tag)] for tag in one["ner_tags"].split()]) for one in mine]
            (tmp_path / f"{split}.jsonl").write_text("".join(json.dumps({"tokens": w, "ner_tags": t}) + "\n" for w, t in told))
        host, _ = hosted(order(greeting, Own(str(tmp_path))))
        client = host.devices(k)
        there = {s: world.compute.run([Predict(world.model.initial, client.shard(s))])[0].result for s in ("validation", "test")}
        update = host.leaving(client, Asked("predict", k), Update(k, len(client.train), there))
        for cells in update.tensors.values():
            assert cells.dtype == torch.int64 and cells.shape[1] == 3 and len(cells) <= 3, "no word, no sentence"
        assert evaluation.counts_well(update, len(world.classes))
        updates.append(update)
    state = e.method.init(world.model)
    here = evaluation.evaluate(world, state, Local(world.host(store_in(tmp_path / "store")), 4))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(evaluation, "drive", lambda *_, seen, **__: (seen([], Replies((), (), ())), updates)[1])
        far = evaluation._evaluated_there(replace(world, far=Anything()), state, Local(world.host(store_in(tmp_path)), 4))  # type: ignore[arg-type]
    for split in ("validation", "test"):
        assert far.scores[split]["personalised"] == here.scores[split]["personalised"]
        assert far.scores[split]["further"]["word_accuracy"] == pytest.approx(here.scores[split]["further"]["word_accuracy"])
    assert far.scores["validation"]["word_accuracy"] == pytest.approx(here.scores["validation"]["word_accuracy"])
    assert far.scores["validation"]["loss"] == pytest.approx(here.scores["validation"]["loss"], rel=1e-5)
    assert far.confusion["personalised"] == here.confusion["personalised"]


@pytest.mark.parametrize("words", [[], [""]])
def test_a_device_elsewhere_without_a_word_to_validate_on_tells_its_test_split(words: list[str], tmp_path: Path) -> None:
    """A mean over no words is no number: no loss is told of them, and none is asked for."""
    e = experiment(partition="iid")
    world = build(e)
    for split, told in {"train": ["w1", "w9"], "validation": words, "test": ["w2", "w8"]}.items():
        tags = ["B-low" if word in ("w1", "w2") else "O" for word in told]
        (tmp_path / f"{split}.jsonl").write_text(json.dumps({"tokens": told, "ner_tags": tags}) + "\n")
    host, said = hosted(order({**greeting_of(world), "digest": e.digest()}, Own(str(tmp_path))))
    assert said["examples"] == {"train": 1, "validation": 1, "test": 1}
    replies = Local(host, 4).run([ask(e.method.predict, 0, world.model.initial, splits=["validation", "test"])])
    assert not replies.failures
    (update,) = replies.updates
    assert "validation_loss" not in update.metrics and update.metrics["validation_words"] == 0 == len(update.tensors["validation"])
    assert update.metrics["test_words"] == 2 and np.isfinite(update.metrics["test_loss"])
    assert evaluation.counts_well(update, len(world.classes))


def test_it_learns(tmp_path: Path) -> None:
    method = replace(small.method("fedfft"), lr=5e-3, local_epochs=4)
    long = replace(experiment(), method=method, rounds=14, evaluate_every=14)
    whole = run(long, tmp_path / "whole", plain=True)
    assert whole["final"]["personalised"] > 0.5, "nothing is found at the start, and three of four or more in the end"
    write_report([tmp_path / "whole"], tmp_path / "report.html")
    assert "entity_f1" in (tmp_path / "report.html").read_text()


@pytest.mark.parametrize("merge", [False, True])
def test_what_is_exported_tags_in_the_library(merge: bool, tmp_path: Path) -> None:
    run(experiment(), tmp_path / "run", plain=True)
    said = export(experiment(), tmp_path / "run", tmp_path / "out", merge=merge)
    assert "AutoModelForTokenClassification" in said
    world = build(experiment())
    examples = world.splits["test"]
    from fedloom.compute.work import Predict
    from fedloom.run.export import predictor_of

    made = world.compute.run([Predict(predictor_of(world, tmp_path / "run", None).tensors, examples)])[0].result
    namespace: dict[str, Any] = {}
    exec(f"from transformers import AutoModelForTokenClassification\nfrom peft import PeftModel\nloaded = {said}", namespace)
    library = namespace["loaded"].eval()
    assert list(library.config.id2label.values()) == list(world.source.task.tags)  # type: ignore[attr-defined]
    if merge:
        assert AutoTokenizer.from_pretrained(tmp_path / "out").is_fast
    for i in range(4):
        begin, end = examples.offsets[examples.rows[i]], examples.offsets[examples.rows[i] + 1]
        ids, segments = (torch.from_numpy(of[begin:end].astype(np.int64)) for of in (examples.tokens, examples.segments))
        with torch.no_grad():
            logits = library(input_ids=ids[None]).logits[0]
        read = segments > 0
        right = (logits[read].argmax(1) == segments[read] - 1).sum()
        assert int(right) == int(made[i, 1])


def test_a_cloze_has_no_words_to_tag_with(tmp_path: Path) -> None:
    with pytest.raises(ExperimentError, match="--head cloze is for classification"):
        run(experiment(head="cloze"), tmp_path / "run", plain=True)


def test_sorting_by_the_loss_of_one_label_is_refused() -> None:
    with pytest.raises(ExperimentError, match="a sentence of tags has none; give another"):
        build(replace(experiment(), method=resolve("lora+loss").method))
