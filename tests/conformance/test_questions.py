"""Question answering: every method runs on it or says why not, it resumes, devices tell counts, and what is exported the library loads."""

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
from transformers import AutoModelForQuestionAnswering, AutoTokenizer

from fedloom.compute.serial import Serial
from fedloom.compute.work import Predict
from fedloom.data.shards import write_shards
from fedloom.data.tasks import DataError
from fedloom.engines.local import Local
from fedloom.messages import Replies, Task, Traffic, Update, ask
from fedloom.methods import all_methods
from fedloom.model.spans import SECOND
from fedloom.run import evaluation
from fedloom.run.deployment.device import hosted, order
from fedloom.run.deployment.greeting import Own, greeting_of
from fedloom.run.errors import ExperimentError
from fedloom.run.evaluation import evaluate
from fedloom.run.experiment import Experiment
from fedloom.run.export import export, predictor_of
from fedloom.run.loop import run
from fedloom.run.pages.report import write_report
from fedloom.run.recipes import resolve
from fedloom.run.tracking import flat
from fedloom.run.world import build, read_data, store_in
from tests import small
from tests.conformance.test_instructions import COUNTS_LABELS
from tests.conformance.test_methods import rows, without_clock

pytestmark = pytest.mark.no_cover
"""The same lines again for every method, kind or size: which lines are reached at all, other tests tell (conftest.py)."""

RUNS = [name for name in all_methods() if name not in COUNTS_LABELS]


@cache
def data() -> Path:
    """Contexts of up to 24 words, in which the question's word stands once before the answer: one word or two of w40 to w59."""
    path, rng = Path(mkdtemp(prefix="tiny-questions-")), np.random.default_rng(9)
    for split, count in {"train": 40, "validation": 10, "test": 12}.items():
        made = []
        for n in range(count):
            asked, words = int(rng.integers(0, 6)), [f"w{w}" for w in rng.integers(6, 40, size=rng.integers(3, 25))]
            due = [f"w{w}" for w in rng.integers(40, 60, size=rng.integers(1, 3))]
            at = int(rng.integers(0, len(words)))
            words[at:at] = [f"w{asked}", *due]
            begin = len(" ".join(words[: at + 1])) + 1
            title = "xyz"[n % 3] if split == "train" else "xyq"[n % 3]
            answers = {"text": [" ".join(due)], "answer_start": [begin if n % 4 else -1]}
            made.append({"title": title, "question": f"w{asked}", "context": " ".join(words), "answers": answers})
        (path / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in made))
    return path


class Anything:
    """Some devices that are elsewhere."""


def experiment(name: str = "lora", **fields: Any) -> Experiment:
    return replace(small.experiment(name, stack=0), data=str(data()), **fields)


@pytest.mark.parametrize("name", RUNS)
def test_every_method_finds_answers(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fedloom.run.world.load_model", small.LOADED)
    results = run(experiment(name), tmp_path / "run", plain=True)
    told = rows(tmp_path / "run")
    assert results["metric"] == "answer_f1"
    assert [row["round"] for row in told] == [0, 1, 2]
    assert all(0 <= row["validation"]["exact_match"] <= row["validation"]["personalised"] <= 1 for row in told)
    for row in told:
        assert row["validation"]["further"]["exact_match"]["personalised"] == row["validation"]["exact_match"]
        assert 0 <= row["further"]["exact_match"]["personalised"] <= row["personalised"] + 1e-9
        assert (row["further"]["exact_match"]["global"] is None) == (row["global"] is None)
    assert results["partition"]["classes"] == ["x", "y", "z", "(others)"]
    devices = results["per_device"]
    assert sum(device["test"] for device in devices) == 12, "questions are told of, not windows"
    assert sum(sum(device["labels"]) for device in devices) == 40
    assert sum(device["train"] for device in devices) > 60, "windows are trained on"
    assert results["final"]["personalised"] == pytest.approx(sum(device["correct"] for device in devices) / 12, abs=1e-5)


@pytest.mark.parametrize("name", sorted(COUNTS_LABELS))
def test_methods_that_count_labels_say_so(name: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=f"'{name}' counts each device's labels"):
        run(experiment(name), tmp_path / "run", plain=True)


@pytest.mark.parametrize("how", ["slw", "shortformer"])
def test_curricula_that_cut_windows_are_refused(how: str) -> None:
    """Of a window that is cut before its answer's end [CLS] would be due, although the answer was there."""
    with pytest.raises(ExperimentError, match="cuts what a model reads at its end.*\\[CLS\\] would be due.*another curriculum"):
        build(replace(experiment(), method=resolve(f"lora+{how}").method))


@pytest.mark.parametrize("how", ["fisher", "voc"])
def test_curricula_order_windows(how: str, tmp_path: Path) -> None:
    assert run(replace(experiment(), method=resolve(f"lora+{how}").method), tmp_path / "run", plain=True)["rounds"] == 2


def test_what_makes_no_sense_says_so(tmp_path: Path) -> None:
    with pytest.raises(ExperimentError, match="sorts by the loss of one label an example"):
        run(replace(experiment(), method=resolve("lora+loss").method), tmp_path / "loss", plain=True)
    with pytest.raises(ExperimentError, match="--head cloze is for classification"):
        run(experiment(head="cloze"), tmp_path / "cloze", plain=True)
    with pytest.raises(DataError, match="scored by answer_f1, not by mcc"):
        run(experiment(metric="mcc"), tmp_path / "metric", plain=True)


def test_stacked_is_one_by_one(tmp_path: Path) -> None:
    one, many = (run(replace(small.experiment(stack=s), data=str(data())), tmp_path / str(s), plain=True) for s in (1, 0))
    assert one["final"]["loss"] == pytest.approx(many["final"]["loss"], rel=1e-4)
    assert flat(one["final"]) == pytest.approx(flat(many["final"]), rel=1e-4)
    world = build(experiment())
    a, b = (predictor_of(world, tmp_path / str(s), None).tensors for s in (1, 0))
    for name in a:
        torch.testing.assert_close(a[name], b[name], atol=2e-4, rtol=0)


def test_interrupted_it_ends_at_the_same_bits(tmp_path: Path) -> None:
    whole = run(experiment("fibecfed"), tmp_path / "whole", plain=True)
    small.stopped(experiment("fibecfed"), tmp_path / "parts", 1)
    again = run(experiment("fibecfed"), tmp_path / "parts", plain=True)
    assert without_clock(again) == without_clock(whole)


def test_it_learns(tmp_path: Path) -> None:
    method = replace(small.method("fedfft"), lr=5e-3, local_epochs=4)
    long = replace(experiment(), method=method, rounds=16, evaluate_every=16)
    whole = run(long, tmp_path / "whole", plain=True)
    told = rows(tmp_path / "whole")
    assert told[0]["personalised"] < 0.4 < 0.7 < whole["final"]["personalised"]
    write_report([tmp_path / "whole"], tmp_path / "report.html")
    assert "answer_f1" in (tmp_path / "report.html").read_text()


@pytest.mark.parametrize("merge", [False, True])
def test_what_is_exported_finds_the_same_in_the_library(merge: bool, tmp_path: Path) -> None:
    run(experiment(), tmp_path / "run", plain=True)
    said = export(experiment(), tmp_path / "run", tmp_path / "out", merge=merge)
    assert "AutoModelForQuestionAnswering" in said
    world = build(experiment())
    examples = world.splits["test"]
    tensors = predictor_of(world, tmp_path / "run", None).tensors
    made = Serial(world.model).run([Predict(tensors, examples)])[0].result
    namespace: dict[str, Any] = {}
    exec(f"from transformers import AutoModelForQuestionAnswering\nfrom peft import PeftModel\nloaded = {said}", namespace)
    library = namespace["loaded"].eval()
    if merge:
        assert isinstance(AutoModelForQuestionAnswering.from_pretrained(tmp_path / "out"), type(library))
        assert AutoTokenizer.from_pretrained(tmp_path / "out").is_fast
    for i in range(6):
        begin, end = examples.offsets[i], examples.offsets[i + 1]
        ids, segments = (torch.from_numpy(of[begin:end].astype(np.int64))[None] for of in (examples.tokens, examples.segments))
        with torch.no_grad():
            out = library(input_ids=ids, token_type_ids=segments & SECOND)
        first, last = int(made[i, 2]), int(made[i, 3])
        assert float(out.start_logits[0, first] + out.end_logits[0, last]) == pytest.approx(float(made[i, 1]), abs=1e-4)


def test_a_device_counts_by_its_windows_and_is_dealt_and_scored_by_questions(tmp_path: Path) -> None:
    asked = experiment(max_length=16)
    results, world = run(asked, tmp_path / "run", plain=True), build(asked)
    devices, shards = results["per_device"], world.partition.shards("train")
    client = world.device(0)
    said = Local(world.host(store_in(tmp_path / "store")), 4).run([ask(asked.method.train, 0, world.model.initial, round=0)])
    assert said.updates[0].num_examples == len(client.train) == devices[0]["train"]
    assert sum(d["train"] for d in devices) == len(world.splits["train"]) > 40 == sum(sum(d["labels"]) for d in devices)
    assert [sum(d["labels"]) for d in devices] == [len(rows) for rows in shards] != [d["train"] for d in devices]
    assert sum(d["test"] for d in devices) == 12 < len(world.splits["test"])


def test_skew_by_article_by_column_and_by_size() -> None:
    for how, alpha, clients in (("label", 0.05, 4), ("column:title", 1.0, 3), ("iid", 1.0, 4)):
        e = experiment(partition=how, alpha=alpha, clients=clients)
        source, made = read_data(e)
        assert sorted(row for shard in made.train for row in shard) == list(range(40))
        counts = made.counts(np.asarray(source.splits["train"][source.task.label], np.int64), 4)
        assert not counts[:, 3].any(), "no training question is of an article that has none"
        if how.startswith("column"):
            assert ((counts > 0).sum(1) == 1).all(), "one article a device"
        assert sum(map(len, made.test)) == 12, "questions of articles that no device has are dealt all the same"
    sizes = sorted(len(shard) for shard in read_data(experiment(alpha=1e6, beta=0.3))[1].train)
    assert sizes[-1] > 3 * sizes[0], "devices that differ in nothing but how much they have"


def test_a_device_elsewhere_tells_sums_and_they_are_the_simulations(tmp_path: Path) -> None:
    """F1 in parts, exact matches as a share, questions; the server's figures are those of the same devices in one process."""
    e = experiment(partition="iid")
    write_shards(*read_data(e), tmp_path / "shards")
    world = build(e)
    greeting = {**greeting_of(world), "digest": e.digest()}
    assert greeting["task"]["kind"] == "qa"
    state = e.method.init(world.model)
    updates = []
    for k in range(e.clients):
        host, said = hosted(order(greeting, Own(str(tmp_path / "shards" / str(k)))))
        client = host.devices(k)
        assert said["examples"]["train"] == world.examples_of(k) == len(client.train)
        made = {s: world.compute.run([Predict(world.model.initial, world.device(k).shard(s))])[0].result for s in ("validation", "test")}
        there = {s: world.compute.run([Predict(world.model.initial, client.shard(s))])[0].result for s in ("validation", "test")}
        for split, of in made.items():
            torch.testing.assert_close(there[split], of)
        update = host.leaving(client, Task("predict", k), Update(k, len(client.train), there))
        for told in update.tensors.values():
            assert told.dtype == torch.int64 and told.shape[1] == 3 and len(told) <= 2, "no window, no place, no word"
        assert evaluation.counts_well(update, len(world.classes))
        updates.append(update)
    engine = Local(world.host(store_in(tmp_path / "store")), 4)
    here = evaluate(world, state, engine)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(evaluation, "drive", lambda *_, seen, **__: (seen([], Replies((), (), (Traffic(0, 99, 99, 2e11, 1),))), updates)[1])
        far = evaluation._evaluated_there(replace(world, far=Anything()), state, engine)  # type: ignore[arg-type]
    seconds = 2e11 / world.fleet.of(0).flops_per_second
    assert far.personalising == {"flops": 2e11, "device_seconds": seconds} and not here.personalising["flops"]
    for split in ("validation", "test"):
        assert far.scores[split]["personalised"] == pytest.approx(here.scores[split]["personalised"], abs=1e-5)
        assert far.scores[split]["global"] == here.scores[split]["global"]
        assert far.scores[split]["further"]["exact_match"] == pytest.approx(here.scores[split]["further"]["exact_match"])
    assert far.scores["validation"]["exact_match"] == pytest.approx(here.scores["validation"]["exact_match"])
    assert far.scores["validation"]["loss"] == pytest.approx(here.scores["validation"]["loss"], rel=1e-5)
    np.testing.assert_allclose(far.correct, here.correct, atol=1e-4)
    assert far.held.tolist() == here.held.tolist() and far.held.sum() == 12
    assert far.confusion["personalised"] == here.confusion["personalised"]
