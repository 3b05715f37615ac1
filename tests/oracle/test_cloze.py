"""Cloze heads against the library's own language models: their logits at the gap, at the words' rows, and their gradients."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from tempfile import mkdtemp
from typing import Any

import numpy as np
import pytest
import torch
from torch.nn import functional
from transformers import AutoModelForCausalLM, AutoModelForMaskedLM

from fedloom.client.client import Client
from fedloom.client.host import Host
from fedloom.client.store import ClientStore
from fedloom.compute.serial import Serial
from fedloom.compute.stacked import Stacked
from fedloom.compute.work import AdamW, Fit, Predict, Sensitivity
from fedloom.data import sources
from fedloom.data.examples import Examples
from fedloom.data.tasks import Classification, DataError
from fedloom.data.templates import KNOWN, template_for
from fedloom.engines.engine import drive
from fedloom.engines.local import Local
from fedloom.methods.fibecfed import FibecFed, Gal
from fedloom.methods.personal_head import PersonalHead
from fedloom.model.adapters import Adapter
from fedloom.model.base import Model
from fedloom.model.blocks import layer_of
from fedloom.model.cloze import Cloze, ClozeError, Filler
from fedloom.model.loading import load
from fedloom.model.places import ModelError
from fedloom.server.participation import Pool
from tests import families, tiny

WORDS = ("w3", "w40", "w7")
FAMILIES = [family for family in families.APART if family != "qwen2"]
"""The library reads any tokenizer beside a Qwen2 as that family's own, in which these words are not one token each; the model is built as
Llama is."""
MASKED, CAUSAL = "w1 {mask} w2 {text}", "{text} w1 w2 {mask}"


@cache
def folder(family: str) -> Path:
    """A tiny language model with a word tokenizer that knows a mask."""
    path = Path(mkdtemp(prefix=f"tiny-lm-{family}-"))
    torch.manual_seed(13)
    kind = AutoModelForCausalLM if family in families.CAUSAL else AutoModelForMaskedLM
    made: Any = kind.from_config(families.CONFIGS[family]())
    with torch.no_grad():
        for name, p in made.named_parameters():
            if name.endswith("bias"):
                p.copy_(0.2 * torch.randn(p.shape))
    made.save_pretrained(path)
    tokenizer = families.qwen_tokenizer() if family == "qwen2" else tiny.tokenizer()
    tokenizer.add_special_tokens({"mask_token": "[MASK]", "eos_token": "[SEP]"})
    tokenizer.save_pretrained(path)
    return path


def cloze(family: str) -> Cloze:
    return Cloze(CAUSAL if family in families.CAUSAL else MASKED, WORDS)


@cache
def model(family: str) -> Model:
    adapter = Adapter(rank=2, targets=families.TARGETS.get(family, ()))
    return load(str(folder(family)), num_labels=3, adapter=adapter, seed=1, max_length=16, cloze=cloze(family))


TEXTS = ["w5 w6 w7 w8", "w9", "w10 w11 w12 w13 w14 w15 w16 w17 w18 w19 w20 w21 w22 w23 w24 w25"]


def examples(of: Model, labels: tuple[int, ...] = (0, 2, 1)) -> Examples:
    return Examples.of(of.encode(TEXTS, None)[0], list(labels))


def whole(family: str) -> tuple[Any, list[list[int]], int]:
    """The library's model, the tokenised templates, and where the answer is read."""
    kind = AutoModelForCausalLM if family in families.CAUSAL else AutoModelForMaskedLM
    lm: Any = kind.from_pretrained(folder(family), attn_implementation="eager").eval()
    ids = model(family).encode(TEXTS, None)[0]
    mask = model(family).tokenizer.mask_token_id
    return lm, ids, -1 if family in families.CAUSAL else ids[0].index(mask)


def lm_logits(family: str, lm: Any) -> torch.Tensor:
    """Of each text by itself, unpadded, over the whole vocabulary, at the gap; then the words' columns."""
    _, ids, gap = whole(family)
    columns = [model(family).tokenizer.convert_tokens_to_ids(word) for word in WORDS]
    return torch.stack([lm(input_ids=torch.tensor([row])).logits[0, gap, columns] for row in ids])


@pytest.mark.parametrize("family", FAMILIES)
def test_logits_are_the_language_models_at_the_gap(family: str) -> None:
    of = model(family)
    lm, ids, gap = whole(family)
    with torch.no_grad():
        wanted = lm_logits(family, lm)
    for compute in (Serial(of), Stacked(of)):
        (made,) = compute.run([Predict(of.initial, examples(of))])
        torch.testing.assert_close(made.result, wanted, atol=2e-5, rtol=0)
    if family in families.CAUSAL:
        assert all(row[-3:] == ids[0][-3:] for row in ids), "the template ends every example, however long the text"
    else:
        assert all(row[gap] == of.tokenizer.mask_token_id for row in ids)
    assert all(len(row) <= of.max_length for row in ids)
    assert not of.head, "nothing of the head is trained"
    assert of.together_by.startswith("packed") == (family not in families.UNPACKED), of.together_by


@pytest.mark.parametrize("family", FAMILIES)
def test_training_moves_what_the_language_models_own_gradient_moves(family: str) -> None:
    """One step of plain size on every LoRA weight: the gradient by B at B = 0 is s·G·Aᵀ for the gradient G of the weight under it."""
    of = model(family)
    lm, _, _ = whole(family)
    functional.cross_entropy(lm_logits(family, lm), torch.tensor([0, 2, 1])).backward()
    own = dict(lm.named_parameters())
    assert_slopes(of, examples(of), own, 8.0, family == "gpt2")


def assert_slopes(of: Model, texts: Examples, own: dict[str, Any], scale: float, transposed: bool) -> None:
    """At B = 0 the gradient by every B is ``scale``·G·Aᵀ, G being that of the library's weight under it (``own``, after its backward)."""
    ups = [name for name in of.initial if ".lora_B." in name]
    at = {n: t.clone().requires_grad_() for n, t in of.initial.items()}
    batch = Serial(of).batch(texts, np.arange(len(texts)))
    made = dict(zip(at, torch.autograd.grad(of.loss(at, batch, torch.float32), list(at.values()), allow_unused=True), strict=True))
    assert ups
    for name in ups:
        slope = own[name.removeprefix("base_model.model.").split(".lora_B.")[0] + ".weight"].grad
        wanted = scale * (slope.T if transposed else slope) @ of.initial[name.replace(".lora_B.", ".lora_A.")].T
        torch.testing.assert_close(made[name], wanted, atol=1e-5, rtol=1e-3)


@pytest.mark.parametrize("family", FAMILIES)
def test_stacked_equals_one_by_one(family: str) -> None:
    of = model(family)
    start = [families.moved(of, seed, by=0.1) for seed in (0, 1)]
    fits = [Fit(at, examples(of), [np.array([0, 1]), np.array([2])], AdamW(1e-2, eps=1e-4)) for at in start]
    for one, other in zip(Serial(of).run(fits), Stacked(of).run(fits), strict=True):
        for name, tensor in one.result.tensors.items():
            torch.testing.assert_close(other.result.tensors[name], tensor, atol=2e-4, rtol=0)
    asked = [Sensitivity(at, examples(of), np.arange(3), 0.1) for at in start]
    for one, other in zip(Serial(of).run(asked), Stacked(of).run(asked), strict=True):
        np.testing.assert_allclose(other.result, one.result, rtol=1e-3)


def test_the_longer_text_of_a_pair_is_cut_and_the_template_never() -> None:
    filler = Filler(Cloze("{mask} w1 {text} w2 {pair} w3", WORDS, True), model("bert").tokenizer, False, 14)
    assert filler.gap == 1
    long, short = "w10 w11 w12 w13 w14 w15 w16 w17 w18", "w30 w31"
    (made,) = filler.fill([long], [short])
    assert made == "[MASK] w1 w10 w11 w12 w13 w2 w30 w31 w3"
    (made,) = filler.fill([short], [long])
    assert made == "[MASK] w1 w30 w31 w2 w10 w11 w12 w13 w3"
    (made,) = filler.fill([long], [long])
    assert made == "[MASK] w1 w10 w11 w12 w2 w10 w11 w12 w3"
    (made,) = filler.fill(["w10 [MASK] w11"], ["w12"])
    assert made.count("[MASK]") == 1, "a text cannot bring a gap of its own"


def test_a_word_of_several_pieces_has_the_mean_of_their_rows() -> None:
    of = load(str(folder("bert")), num_labels=2, adapter=Adapter(rank=2), seed=1, max_length=16, cloze=Cloze(MASKED, ("w3 w4", "w7")))
    lm, _, gap = whole("bert")
    columns = of.tokenizer.convert_tokens_to_ids(["w3", "w4", "w7"])
    ids = of.encode(TEXTS[:1], None)[0]
    with torch.no_grad():
        three = lm(input_ids=torch.tensor(ids)).logits[0, gap, columns]
    (made,) = Serial(of).run([Predict(of.initial, Examples.of(ids, [0]))])
    torch.testing.assert_close(made.result[0], torch.stack([three[:2].mean(), three[2]]), atol=1e-5, rtol=0)


@pytest.mark.parametrize(
    ("template", "words", "says"),
    [
        ("{text}", WORDS, r"must have each of \['mask', 'text'\] once"),
        ("{mask} {text} {text}", WORDS, "once"),
        ("{mask} {text} {pair}", WORDS, "once"),
        ("{text} {mask}", WORDS, "before {text}"),
        (MASKED, WORDS[:2], "3 classes"),
        (MASKED, ("w3", "w3", "w4"), "one of its own"),
        (MASKED, ("w3", "zzz", "w4"), "does not know the word 'zzz'"),
        ("w1 w2 w3 w4 w5 w6 w7 w8 w9 w10 w11 w12 {mask} {text}", WORDS, "--max-length"),
    ],
)
def test_what_makes_no_cloze_is_refused(template: str, words: tuple[str, ...], says: str) -> None:
    with pytest.raises(ClozeError, match=says):
        load(str(folder("bert")), num_labels=3, adapter=Adapter(rank=2), max_length=16, cloze=Cloze(template, words))


def test_a_causal_template_ends_with_the_gap() -> None:
    with pytest.raises(ClozeError, match="must end with {mask}"):
        load(str(folder("gpt2")), num_labels=3, adapter=Adapter(rank=2), max_length=16, cloze=Cloze(MASKED, WORDS))


def test_a_model_without_a_language_models_head_is_refused() -> None:
    with pytest.raises(ModelError, match="no trained language-model head.*--head linear"):
        load(str(families.folder("bert")), num_labels=3, adapter=Adapter(rank=2), max_length=16, cloze=Cloze("{mask} {text}", WORDS))


@pytest.mark.parametrize("family", ["bert", "gpt2"])
def test_fibecfed_needs_no_warm_up_of_a_head_that_is_not_new(family: str) -> None:
    """Scores, layers and rounds under a cloze, stacked as one by one; and what says that no head was warmed up."""
    of, shards = model(family), (slice(0, 2), slice(1, 3))
    made = []
    for compute in (Serial(of), Stacked(of)):
        method, said = FibecFed(gal=Gal(count=1)), []
        whole = examples(of)
        devices = {k: Client(k, whole.subset(np.arange(3)[at]), whole, whole, 3) for k, at in enumerate(shards)}
        engine = Local(Host(method, lambda k, d=devices: d[k], compute, ClientStore(None), "cloze"))
        pool = Pool((0, 1), 2, 2, 8)
        state = drive(method.setup(method.init(of), pool), engine, seen=lambda tasks, _, s=said: s.append(tasks[0].op))
        for _ in range(2):
            state = drive(method.round(state, pool), engine)
        assert "warm_head" not in said
        assert state.facts["difficulty_head"].startswith("none")
        assert len(state.facts["gal"]) == 1
        assert all(layer_of(name) in state.facts["gal"] for name in state.shared)
        made.append(state.shared)
    for name, tensor in made[0].items():
        torch.testing.assert_close(made[1][name], tensor, atol=5e-4, rtol=0)
    with pytest.raises(ValueError, match="lora-personal-head.*--head linear"):
        PersonalHead().init(of)


PAIR = Classification(("a", "b"), "label", ("a.No", "b.Yes"), "accuracy")
SAID = {"ABBR": "abbreviation", "ENTY": "thing", "DESC": "description", "HUM": "person", "LOC": "place", "NUM": "number"}


def test_the_packaged_questions_have_the_words_of_their_own_classes() -> None:
    """Not of another order of them: the packaged set's classes are its file's."""
    task = sources.load("trec", seed=0).task
    assert isinstance(task, Classification)
    put = template_for("trec", task)
    assert put[:2] == KNOWN["trec"][:2]
    assert dict(zip(task.classes, put.words, strict=True)) == SAID


def test_words_go_by_the_classes_names_and_by_order_where_these_are_numbers() -> None:
    turned = ("NUM", "LOC", "HUM", "DESC", "ENTY", "ABBR")
    assert template_for("./trec", Classification(("text",), "label", turned, "accuracy")).words == tuple(SAID[one] for one in turned)
    for name, known in KNOWN.items():
        texts = ("text", "other") if "{pair}" in known.masked else ("text",)
        names, numbers = tuple(known.words), tuple(map(str, range(len(known.words))))
        for classes in (names, numbers):
            assert template_for(name, Classification(texts, "label", classes, "accuracy")).words == tuple(known.words.values())
        backwards = Classification(texts, "label", tuple(one.lower() for one in reversed(names)), "accuracy")
        assert template_for(name, backwards).words == tuple(reversed(known.words.values()))
    strange = Classification(("text",), "label", ("neg", "pos"), "accuracy")
    assert template_for("sst2", strange) == (*KNOWN["sst2"][:2], ("neg", "pos")), "words of other classes are nobody's"


def test_templates_are_those_of_the_data_set_or_ones_own_or_plain() -> None:
    trec = Classification(("text",), "label", tuple(SAID), "accuracy")
    moods = Classification(("text",), "label", ("negative", "positive"), "accuracy")
    assert template_for("sst2_glue", moods) == (*KNOWN["sst2"][:2], ("terrible", "great"))
    assert template_for("my-ag_news", Classification(("text",), "label", tuple("0123"), "accuracy")).masked == KNOWN["ag_news"].masked
    assert template_for("sst25", moods).masked == "{mask} : {text}", "a part of a word is none"
    assert template_for("trec", trec, "{mask} {text}", ("a", "b", "c", "d", "e", "f")) == (*["{mask} {text}"] * 2, tuple("abcdef"))
    assert template_for("mine", PAIR) == ("{mask} : {text} , {pair}", "{text} , {pair} : {mask}", ("no", "yes"))
    with pytest.raises(DataError, match="--label-words"):
        template_for("mine", Classification(("text",), "label", ("0", "1"), "accuracy"))


@pytest.mark.parametrize("name", KNOWN)
def test_every_known_template_makes_a_cloze_either_way(name: str) -> None:
    known = KNOWN[name]
    paired = "{pair}" in known.masked
    Cloze(known.masked, tuple(known.words.values()), paired).check(False, len(known.words))
    Cloze(known.causal, tuple(known.words.values()), paired).check(True, len(known.words))
