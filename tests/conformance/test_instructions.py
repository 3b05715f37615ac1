"""Tasks that are answered in words: every method runs on them or says why not, they resume, and what is exported generates."""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from functools import cache
from io import StringIO
from pathlib import Path
from tempfile import mkdtemp
from typing import Any, ClassVar

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from fedloom.messages import Flow
from fedloom.methods import all_methods
from fedloom.methods.fedavg import FedAvg
from fedloom.methods.finetuned import FineTuned
from fedloom.methods.method import State
from fedloom.model.writing import continued
from fedloom.run import checkpoint
from fedloom.run.adopt import adopt
from fedloom.run.again import evaluate_again
from fedloom.run.checkpoint import fingerprint_of
from fedloom.run.comparison.rehearsal import rehearse
from fedloom.run.describe import describe
from fedloom.run.errors import ExperimentError
from fedloom.run.experiment import Experiment
from fedloom.run.export import export
from fedloom.run.loop import run
from fedloom.run.pages.report import write_report
from fedloom.run.recipes import resolve
from fedloom.run.terminal.console import Progress
from fedloom.run.tracking import numbers as tracked
from fedloom.run.world import build, store_in
from fedloom.server.participation import Pool
from tests import small
from tests.conformance.test_methods import TURNS, rows, without_clock
from tests.oracle.test_answers import TEMPLATE
from tests.oracle.test_cloze import folder as language_model

pytestmark = pytest.mark.no_cover
"""The same lines again for every method, kind or size: which lines are reached at all, other tests tell (conftest.py)."""

COUNTS_LABELS = {"lora-prior", "fedeven"}
OWN_HEAD = {"lora-personal-head", "fedalt-partial"}
NO_BIASES = {"fedbf"}
"""Llama has none."""
RUNS = [name for name in all_methods() if name not in COUNTS_LABELS | OWN_HEAD | NO_BIASES]


@cache
def data() -> Path:
    """Prompts of tiny's words whose answer says the prompt's last word twice; a topic, and whose device it was."""
    path, rng = Path(mkdtemp(prefix="tiny-instructions-")), np.random.default_rng(9)
    for split, count in {"train": 40, "validation": 8, "test": 8}.items():
        made = []
        for i in range(count):
            words = [f"w{w}" for w in rng.integers(0, 60, size=rng.integers(1, 6))]
            context = "" if i % 2 else f"w{i % 60}"
            answer = f"{words[-1]} {words[-1]}"
            made.append({"instruction": " ".join(words), "context": context, "response": answer, "category": "xyz"[i % 3], "owner": i % 4})
        (path / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in made))
    return path


def experiment(name: str = "lora", **fields: Any) -> Experiment:
    given = {"data": str(data()), "model": str(language_model("llama")), "task": "instructions", "template": TEMPLATE, **fields}
    return replace(small.experiment(name, stack=0), **given)


@pytest.mark.parametrize("name", RUNS)
def test_every_method_answers(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fedloom.run.world.load_model", small.LOADED)
    results = run(experiment(name), tmp_path / "run", plain=True)
    told = rows(tmp_path / "run")
    assert results["metric"] == "token_accuracy"
    assert [row["round"] for row in told] == [0, 1, 2]
    tokens = 8 * 3  # two words and the end
    assert sum(device["test"] for device in results["per_device"]) == tokens
    right = sum(device["correct"] for device in results["per_device"])
    assert results["final"]["personalised"] == pytest.approx(right / tokens)
    for row in told:
        assert row["validation"]["perplexity"] == pytest.approx(np.exp(row["validation"]["loss"]))
    assert told[1]["answered"] == [0] if name in TURNS else len(told[1]["answered"]) >= 1
    assert [set(sample) for sample in results["samples"]] == [{"prompt", "due", "before", "after"}] * 3
    assert results["partition"]["classes"] == ["x", "y", "z"]
    assert results["final"]["further"] == told[-1]["further"] and set(told[-1]["further"]) == {"perplexity"}
    assert told[-1]["validation"]["further"]["perplexity"]["personalised"] == told[-1]["validation"]["perplexity"]
    assert told[-1]["further"]["perplexity"]["personalised"] > 1


@pytest.mark.parametrize("name", sorted(COUNTS_LABELS | OWN_HEAD | NO_BIASES))
def test_what_makes_no_sense_says_so(name: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="counts each device's labels|language model's own|has none"):
        run(experiment(name), tmp_path / "run", plain=True)


def test_sorting_by_the_loss_of_one_label_is_refused() -> None:
    with pytest.raises(ExperimentError, match="a text to be written has none; give another"):
        build(replace(experiment(), method=resolve("lora+loss").method))


@pytest.mark.parametrize("how", ["lora+slw", "fibecfed+shortformer"])
def test_curricula_that_cut_what_is_to_be_written_are_refused(how: str) -> None:
    """Of an instruction its end of text alone would be left to learn; of a text its last word, behind a word that it did not follow."""
    texts = {"task": "text", "text": ("instruction",), "template": ""}
    for fields, what in [({}, "an answer stands at the end"), (texts, "a text's last token would be due behind another")]:
        with pytest.raises(ExperimentError, match=f"cuts what a model reads at its end.*{what}.*another curriculum"):
            build(replace(experiment(**fields), method=resolve(how).method))


def test_a_comparison_says_which_curricula_do_not_fit_before_it_trains() -> None:
    """All of them, whichever comes first."""
    asked = [(how, replace(experiment(), method=resolve(how).method)) for how in ("lora+slw", "lora", "lora+loss", "lora+fisher")]
    with pytest.raises(ExperimentError, match=r"nothing was started. lora\+slw: this curriculum cuts.*; lora\+loss: this curriculum sorts"):
        rehearse(asked)
    rehearse([asked[1], asked[3]])


@dataclass(frozen=True)
class Broken(FedAvg):
    """Forgets something."""

    name: ClassVar[str] = "broken"

    def setup(self, state: State, pool: Pool) -> Flow[State]:
        raise KeyError("forgotten")


def test_a_method_that_is_broken_is_left_to_its_turn() -> None:
    """It refuses nothing: that its run fails loses no other."""
    rehearse([("lora", experiment()), ("broken", replace(experiment(), method=Broken()))])


@pytest.mark.parametrize("name", ["lora", "fibecfed", "fedcybgd"])
def test_interrupted_it_ends_at_the_same_bits(name: str, tmp_path: Path) -> None:
    whole = run(experiment(name), tmp_path / "whole", plain=True)
    small.stopped(experiment(name), tmp_path / "run", 2)
    saved = checkpoint.load(tmp_path / "run", store_in(tmp_path / "run"))
    assert saved is not None and saved.state.round == 1
    again = run(experiment(name), tmp_path / "run", plain=True)
    assert fingerprint_of(tmp_path / "run") == fingerprint_of(tmp_path / "whole")
    assert without_clock(again) == without_clock(whole)


@pytest.mark.parametrize("name", ["lora", "fedcybgd"])
def test_what_is_exported_generates_what_the_report_shows(name: str, tmp_path: Path) -> None:
    results = run(experiment(name), tmp_path / "run", plain=True)
    out = tmp_path / "out"
    merge = name == "lora"  # a whole model that was trained is always written as one
    assert export(experiment(name), tmp_path / "run", out, merge=merge).startswith("AutoModelForCausalLM")
    lm, tokenizer = AutoModelForCausalLM.from_pretrained(out), AutoTokenizer.from_pretrained(out)
    world = build(experiment(name))
    test = world.splits["test"]
    first = next(row["instruction"] + ("\n\n" + row["context"] if row["context"] else "") for row in world.source.splits["test"])
    asked = tokenizer.apply_chat_template([{"role": "user", "content": first}], add_generation_prompt=True, tokenize=False)
    ids = tokenizer(asked, add_special_tokens=False)["input_ids"]
    assert ids == [int(t) for t, s in zip(test.tokens[: test.offsets[1]], test.segments[: test.offsets[1]], strict=True) if not s]
    most = min(64, lm.config.max_position_embeddings - len(ids))
    written = lm.generate(torch.tensor([ids]), max_new_tokens=most, do_sample=False, pad_token_id=0, eos_token_id=tokenizer.eos_token_id)
    assert tokenizer.decode(written[0, len(ids) :], skip_special_tokens=True) == results["samples"][0]["after"]
    page = write_report([tmp_path / "run"], tmp_path / "page.html").read_text(encoding="utf-8")
    assert 'id="answers"' in page and results["samples"][0]["due"] in page
    assert results["exact_match"] is None and "exact match" not in page


def numbers(tmp_path: Path) -> str:
    """A folder of prompts whose answers end in a number."""
    folder = tmp_path / "numbers"
    folder.mkdir(exist_ok=True)
    for split in ("train", "validation", "test"):
        made = (json.dumps({"question": f"w{i}", "answer": f"w2 #### {i % 3}"}) + "\n" for i in range(16))
        (folder / f"{split}.jsonl").write_text("".join(made))
    return str(folder)


def test_exact_match_is_told_at_every_evaluation_and_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of every evaluated round, and of no other; a run that was stopped tells the same rows; another evaluation finds the same."""
    asked = experiment(data=numbers(tmp_path), exact_match=3, max_length=30, rounds=3, evaluate_every=2)
    results = run(asked, tmp_path / "run", plain=True)
    lines = rows(tmp_path / "run")
    for row in lines:
        known = row["round"] != 1
        for of in (row, row["validation"]):
            assert of["exact_match"].keys() == {"personalised", "global"}
            assert all((share in (0, 1 / 3, 2 / 3, 1)) if known else share is None for share in of["exact_match"].values())
            assert of["exact_match"]["personalised"] == of["exact_match"]["global"], "every device has the global model"
    names = {f"{split}exact_match/{protocol}" for split in ("", "validation/") for protocol in ("personalised", "global")}
    assert names <= tracked(lines[2]).keys() and not names & tracked(lines[1]).keys(), "what trackers are told"
    told = results["exact_match"]
    assert (told["prompts"], told["held"], told["validation"]) == (3, 16, {"prompts": 3, "held": 16})
    assert told["after"] == told["personalised"] == lines[-1]["exact_match"]["global"] == results["final"]["exact_match"]["global"]
    monkeypatch.undo()  # with pictures
    page = write_report([tmp_path / "run"], tmp_path / "page.html").read_text(encoding="utf-8")
    assert "3 of 16" in page and "exact match, before" in page and "exact match against rounds" in page

    small.stopped(asked, tmp_path / "stopped", 2)
    assert without_clock(run(asked, tmp_path / "stopped", plain=True)) == without_clock(results)
    assert [without_clock(row) for row in rows(tmp_path / "stopped")] == [without_clock(row) for row in lines]

    assert evaluate_again(asked, tmp_path / "run").equal
    for row in lines:  # as a version wrote them that told exact match at the end only
        del row["exact_match"], row["validation"]["exact_match"]
    (tmp_path / "run" / "rounds.jsonl").write_text("".join(json.dumps(row) + "\n" for row in lines))
    again = evaluate_again(asked, tmp_path / "run")
    assert again.equal and "exact_match" not in again.scores["test"]


def test_a_training_that_is_taken_over_tells_exact_match_after_its_last_round(tmp_path: Path) -> None:
    asked = experiment(data=numbers(tmp_path), exact_match=2, max_length=30)
    run(asked, tmp_path / "trained", plain=True)
    tuned = replace(asked, method=FineTuned(inner=asked.method))
    results = adopt(tuned, tmp_path / "run", tmp_path / "trained", Progress(2, "", plain=True, stream=StringIO()))
    told = [row["exact_match"] for row in rows(tmp_path / "run")]
    assert told[:-1] == [{"personalised": None, "global": None}] * 2 and told[-1] == results["final"]["exact_match"]
    assert told[-1]["global"] == rows(tmp_path / "trained")[-1]["exact_match"]["global"]
    assert evaluate_again(tuned, tmp_path / "run").equal


def test_without_a_global_model_the_device_that_holds_the_prompt_writes(tmp_path: Path) -> None:
    asked = experiment("local", data=numbers(tmp_path), exact_match=4, max_length=30, evaluate_every=0)
    results = run(asked, tmp_path / "run", plain=True)
    assert results["exact_match"]["after"] is None and 0 <= results["exact_match"]["personalised"] <= 1
    world, store = build(asked), store_in(tmp_path / "run")
    saved = checkpoint.load(tmp_path / "run", store)
    assert saved is not None and len(results["samples"]) == 3
    for row, sample in enumerate(results["samples"]):
        (holder,) = (k for k, held in enumerate(world.partition.shards("test")) if row in held)
        private, _ = store.load(holder)
        prompt = world.model.speaker.asked(f"w{row}", 30)  # type: ignore[union-attr]
        assert sample["prompt"] == world.model.tokenizer.decode(prompt, skip_special_tokens=True)
        assert [sample["after"]] == continued(world.model, private, [prompt], 64)
    assert len({k for row in range(3) for k, held in enumerate(world.partition.shards("test")) if row in held}) > 1
    page = write_report([tmp_path / "run"], tmp_path / "page.html").read_text(encoding="utf-8")
    assert "4 of 16" in page and results["samples"][0]["after"] in page


@pytest.mark.parametrize("task", ["chat", "text"])
def test_conversations_and_plain_texts_run(task: str, tmp_path: Path) -> None:
    """Conversations of two answers, three tokens each with the end; texts of one to five words."""
    chats = tmp_path / "chats"
    chats.mkdir()
    for split in ("train", "validation", "test"):
        made = []
        for i in range(20 if split == "train" else 8):
            turns = [("human", f"w{i}"), ("gpt", f"w{i} w3"), ("human", "w4"), ("gpt", "w5 w6"), ("human", "w7")]
            made.append(json.dumps({"conversations": [{"from": who, "value": said} for who, said in turns]}))
        (chats / f"{split}.jsonl").write_text("\n".join(made))
    fields: dict[str, Any] = {"task": "auto", "data": str(chats), "template": "", "max_length": 32}
    fields = {"task": "text", "text": ("instruction",), "template": "", "max_length": 4} if task == "text" else fields
    results = run(experiment(**fields), tmp_path / "run", plain=True)
    assert np.isfinite(results["final"]["loss"]) and len(results["samples"]) == 3
    first = results["samples"][0]
    if task == "chat":
        assert sum(device["test"] for device in results["per_device"]) == 8 * 6
        assert first["due"] == "w0 w3" and "w0" in first["prompt"] and "w4" not in first["prompt"]
    else:
        world = build(experiment(**fields))
        held, texts = world.splits["test"], world.source.splits["test"]["instruction"]
        assert len(held) > len(texts) == 8, "long texts are several windows"
        due = sum(len(text.split()) for text in texts) + 8 * int(held.lengths.max() > 0 and held.tokens[0] == 2)
        assert sum(device["test"] for device in results["per_device"]) == sum(held.lengths - 1) == due
        rows = world.judge.examples("train", np.array([3, 1]))
        assert len(rows) == sum(len(world.judge.examples("train", np.array([row]))) for row in (3, 1))
        assert first["prompt"] and first["due"]


def test_plain_text_and_columns_by_name(tmp_path: Path) -> None:
    for fields in (
        {"task": "text", "text": ("instruction",), "template": ""},
        {"task": "instructions", "text": ("context", "response"), "label": "category"},
        {"task": "auto", "template": "", "max_length": 30, "partition": "column:owner"},
    ):
        world = build(experiment(**fields))
        assert world.model.speaker is not None
        assert world.source.task.metric == "token_accuracy"
    asked = experiment(data=numbers(tmp_path), exact_match=3, max_length=30, rounds=5, evaluate_every=2)
    assert "answers written to 3 of 16 validation and 3 of 16 test prompts: up to" in (told := dict(describe(asked).lines)["exact match"])
    assert "tokens each, 4 times, by" in told, "after rounds 0, 2, 4 and 5"
    lines = dict(describe(experiment()).lines)
    assert "exact match" not in lines
    assert lines["template"] == TEMPLATE
    assert lines["answers"] == "prompt instruction + context, answer response, skewed by category (3 values)"
    assert "8 (3)" not in lines["parameters"] and " lora" not in lines["parameters"] and "LoRA" in lines["parameters"]


@pytest.mark.parametrize(
    ("fields", "says"),
    [
        ({"head": "cloze"}, "--head cloze is for classification"),
        ({"template": "", "label_words": ("a",)}, "--label-words"),
        ({"task": "auto", "template": "w1 {text}"}, "a template also to --task instructions and chat"),
        ({"head": "cloze", "task": "chat"}, "--head cloze is for classification"),
    ],
)
def test_settings_that_do_not_go_together_are_refused(fields: dict[str, Any], says: str) -> None:
    with pytest.raises(ExperimentError, match=says):
        experiment(**fields)
