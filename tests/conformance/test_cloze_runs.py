"""Whole runs with a cloze head: templates and words as the data set, the experiment or the model says, layers chosen, results, exports."""

from __future__ import annotations

import json
from dataclasses import replace
from functools import cache
from pathlib import Path
from tempfile import mkdtemp
from typing import Any

import pytest
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoModelForMaskedLM

from fedloom.client.curricula.shortformer import Staged
from fedloom.client.curricula.slw import LengthWarmup
from fedloom.model.base import Model
from fedloom.run.describe import describe
from fedloom.run.errors import ExperimentError
from fedloom.run.experiment import Experiment
from fedloom.run.export import ExportError, export
from fedloom.run.loop import run
from fedloom.run.recipes import with_curriculum
from fedloom.run.world import build
from tests import small
from tests.oracle.test_cloze import CAUSAL, MASKED, WORDS, folder

BY_DEFAULT = {"bert": "{mask} : {text}", "gpt2": "{text} : {mask}"}
families = pytest.mark.parametrize("family", BY_DEFAULT)


@cache
def data() -> Path:
    """The small data, whose classes are called by words that the tiny models know."""
    path, called = Path(mkdtemp(prefix="tiny-cloze-")), dict(zip("abc", WORDS, strict=True))
    for file in small.data().glob("*.jsonl"):
        rows = [json.loads(line) for line in file.read_text().splitlines()]
        (path / file.name).write_text("".join(json.dumps({**row, "label": called[row["label"]]}) + "\n" for row in rows))
    return path


def experiment(family: str, name: str = "fibecfed", **fields: Any) -> Experiment:
    return replace(small.experiment(name, evaluate_every=0), data=str(data()), model=str(folder(family)), head="cloze", **fields)


def words_of(of: Model) -> tuple[str, ...]:
    assert of.filler is not None
    return of.filler.cloze.words


@families
def test_fibecfed_scores_chooses_and_predicts_by_the_language_models_own_head(family: str, tmp_path: Path) -> None:
    e = experiment(family)
    results = run(e, tmp_path / "run", plain=True)
    facts = results["facts"]
    assert len(facts["gal"]) == 1 and len(facts["layer_scores"]) == 2 and min(facts["layer_scores"]) > 0
    assert facts["difficulty_head"] == "none: the head is the language model's own"
    classes, final = results["partition"]["classes"], results["final"]
    assert sorted(classes) == sorted(WORDS) and 0 <= final["global"] <= 1 and 0 <= final["personalised"] <= 1
    assert any("cloze" in " ".join(line) for line in describe(e).lines)
    with pytest.raises(ExportError, match="without --merge"):
        export(e, tmp_path / "run", tmp_path / "merged", merge=True)
    line = export(e, tmp_path / "run", tmp_path / "out")
    assert json.loads((tmp_path / "out" / "cloze.json").read_text()) == {"template": BY_DEFAULT[family], "words": classes}
    kind = AutoModelForCausalLM if family == "gpt2" else AutoModelForMaskedLM
    assert kind.__name__ in line
    loaded = PeftModel.from_pretrained(kind.from_pretrained(folder(family)), tmp_path / "out").state_dict()
    written = load_file(tmp_path / "out" / "adapter_model.safetensors")
    assert written and all((loaded[n.replace(".weight", ".default.weight")] == t).all() for n, t in written.items())


@families
def test_a_template_and_words_of_ones_own_are_what_the_model_reads(family: str) -> None:
    template, words = CAUSAL if family == "gpt2" else MASKED, ("w11", "w12", "w13")
    of = build(experiment(family, "lora", template=template, label_words=words)).model
    assert of.filler is not None and (of.filler.cloze.template, words_of(of)) == (template, words)
    read = of.tokenizer.decode(of.encode(["w20 w21"], None)[0][0])
    assert read.replace(" ", "").replace("[CLS]", "").replace("[SEP]", "") == ("w20w21w1w2" if family == "gpt2" else "w1[MASK]w2w20w21")
    assert words_of(build(experiment(family, "lora")).model) == tuple(build(experiment(family, "lora")).classes)


@families
@pytest.mark.parametrize("curriculum", [LengthWarmup(), Staged()])
def test_curricula_that_cut_what_is_read_are_refused(family: str, curriculum: Any) -> None:
    """At eight tokens a masked model would read its template and no text, and a causal one no question."""
    e = experiment(family, "lora")
    with pytest.raises(ExperimentError, match="cuts what a model reads at its end.*another curriculum, or --head linear"):
        build(replace(e, method=with_curriculum(e.method, curriculum)))
