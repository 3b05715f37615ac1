"""A run that goes on, or is evaluated again, finds the data it had: tokens, and what is due of them."""

from __future__ import annotations

import hashlib
import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fedloom.run import checkpoint
from fedloom.run.again import evaluate_again
from fedloom.run.errors import CheckpointError
from fedloom.run.experiment import Experiment
from fedloom.run.loop import run
from fedloom.run.world import build, store_in
from tests import small
from tests.oracle.test_cloze import folder as language_model

Lines = list[dict[str, Any]]


def write(folder: Path, rows: Lines, test: Lines) -> Path:
    for split, of in {"train": rows, "validation": rows[:2], "test": test}.items():
        (folder / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in of))
    return folder


def tagging(folder: Path) -> Experiment:
    return replace(small.experiment("lora", clients=2, cohort=2, rounds=1, evaluate_every=0), data=str(folder))


def sentence(tags: str) -> dict[str, Any]:
    return {"tokens": [f"w{i}" for i in range(len(tags.split()))], "ner_tags": tags.split()}


def question(texts: list[str], begins: list[int]) -> dict[str, Any]:
    return {"question": "w9", "context": "w1 w2 w3 w4", "answers": {"text": texts, "answer_start": begins}}


SENTENCES = [sentence("B-x B-y O"), sentence("B-y O"), sentence("O I-x I-y")] * 3
QUESTIONS = [question(["w2"], [3]), question(["w3"], [6])] * 4


def test_changed_tags_are_other_data(tmp_path: Path) -> None:
    """The same words, and sentences of the same types."""
    e = tagging(write(tmp_path, SENTENCES, [sentence("B-x B-y O")]))
    run(e, tmp_path / "run", plain=True)
    assert evaluate_again(e, tmp_path / "run").equal
    saved, store = checkpoint.load(tmp_path / "run", store_in(tmp_path / "run")), store_in(tmp_path / "run")
    assert saved is not None
    older = Path(shutil.copytree(tmp_path / "run", tmp_path / "older"))
    checkpoint.save(older, replace(saved, data=saved.data.partition("-")[0]), store)
    assert evaluate_again(e, older).equal, "an earlier release told tokens alone"
    write(tmp_path, SENTENCES, [sentence("B-x O O")])
    with pytest.raises(CheckpointError, match="changed since it was trained"):
        evaluate_again(e, tmp_path / "run")


def test_tags_by_other_names_are_other_data(tmp_path: Path) -> None:
    before = build(tagging(write(tmp_path, SENTENCES, SENTENCES[:1]))).fingerprint()
    other = json.loads(json.dumps(SENTENCES).replace("I-y", "I-z").replace("B-y", "B-z"))
    assert build(tagging(write(tmp_path, other, other[:1]))).fingerprint() != before


def test_changed_answers_are_other_data(tmp_path: Path) -> None:
    """Where they stand, and what is due beside the one that is trained on."""
    made = [QUESTIONS[:1], [question(["w3"], [6])], [question(["w2", "w4"], [3, 9])]]
    prints = [build(tagging(write(tmp_path, QUESTIONS, test))).fingerprint() for test in (*made, made[0])]
    assert len({*prints}) == 3 and prints[0] == prints[-1]


def test_another_border_of_prompt_and_answer_is_other_data(tmp_path: Path) -> None:
    def told(prompt: str, answer: str) -> str:
        rows = [{"instruction": prompt, "response": answer}] * 8
        more: dict[str, Any] = {"model": str(language_model("llama")), "task": "instructions", "template": "{text}"}
        e = replace(tagging(write(tmp_path, rows, rows[:1])), **more)
        world = build(e)
        tokens.append(world.splits["train"].tokens.tolist())
        return world.fingerprint()

    tokens: list[list[int]] = []
    assert told("w1 w2", "w3 w4") != told("w1 w2 w3", "w4")
    assert tokens[0] == tokens[1]


def test_of_classes_and_of_plain_texts_tokens_say_all(tmp_path: Path) -> None:
    """Their fingerprints are those of earlier releases, by which their runs are known."""
    texts = {"data": str(write(tmp_path, rows := [{"body": f"w{i} w2 w3"} for i in range(8)], rows[:1])), "task": "text"}
    plain: dict[str, Any] = {**texts, "model": str(language_model("llama"))}
    for e in (small.experiment("lora"), replace(small.experiment("lora", clients=2, cohort=2), **plain)):
        world, digest = build(e), hashlib.sha256()
        for split, of in world.splits.items():
            for array in (of.tokens, of.offsets, of.store_labels, np.concatenate(world.partition.shards(split))):
                digest.update(array.tobytes())
        assert world.fingerprint() == digest.hexdigest()[:16]
