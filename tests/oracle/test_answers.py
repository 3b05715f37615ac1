"""Models that write answers, against the library's own language models: losses, gradients, what is trained and what is predicted."""

from __future__ import annotations

import json
from functools import cache
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from fedloom.compute.serial import Serial
from fedloom.compute.stacked import Stacked
from fedloom.compute.work import AdamW, Fisher, Fit, Predict, Score, Sensitivity
from fedloom.data.examples import Examples
from fedloom.model.adapters import Adapter, AdapterError, Kind
from fedloom.model.answers import PLAIN, AnswerError, Speaker, first_of
from fedloom.model.base import Model
from fedloom.model.loading import load
from fedloom.model.places import ModelError
from fedloom.model.writing import continued
from tests import families, tiny
from tests.oracle.test_cloze import assert_slopes, folder

FAMILIES = ("gpt2", "llama", "qwen2", "mistral", "bloom")
TEMPLATE = "w1 {text} w2"
PROMPTS = ["w5 w6 w7", "w9", "w10 w11 w12 w13 w14 w15 w16 w17 w18 w19 w20 w21 w22 w23"]
ANSWERS = ["w30 w31", "w32 w33 w34 w35", "w36 w37 w38 w39 w40 w41 w42 w43"]


@cache
def model(family: str, kind: Kind = "lora") -> Model:
    adapter = Adapter(rank=2, alpha=4.0, targets=families.TARGETS.get(family, ()), kind=kind)
    return load(str(folder(family)), num_labels=2, adapter=adapter, seed=1, max_length=16, answers=TEMPLATE)


def examples(of: Model) -> Examples:
    ids, segments = of.encode(PROMPTS, ANSWERS)
    return Examples.of(ids, [0, 0, 0], segments)


def library(family: str) -> Any:
    return AutoModelForCausalLM.from_pretrained(folder(family), attn_implementation="eager").eval()


def its_losses(lm: Any, texts: Examples) -> list[torch.Tensor]:
    """The library's own loss of each example by itself, its prompt's tokens left out (-100)."""
    made = []
    for row in texts.rows:
        ids = torch.tensor(texts.tokens[texts.offsets[row] : texts.offsets[row + 1]].astype(np.int64))[None]
        answer = torch.tensor(texts.segments[texts.offsets[row] : texts.offsets[row + 1]] > 0)[None]
        made.append(lm(input_ids=ids, labels=torch.where(answer, ids, -100)).loss)
    return made


@pytest.mark.parametrize("family", FAMILIES)
def test_losses_and_what_is_kept_of_predictions_are_the_librarys(family: str) -> None:
    of, lm = model(family), library(family)
    texts = examples(of)
    with torch.no_grad():
        losses = torch.stack(its_losses(lm, texts))
    counts = np.array([int((texts.segments[a:b] > 0).sum()) for a, b in zip(texts.offsets, texts.offsets[1:], strict=False)])
    right = []
    for row in texts.rows:
        span = slice(texts.offsets[row], texts.offsets[row + 1])
        ids = torch.tensor(texts.tokens[span].astype(np.int64))
        told = lm(input_ids=ids[None]).logits[0].argmax(1)
        right.append(sum(int(told[i - 1]) == int(ids[i]) for i in range(1, len(ids)) if texts.segments[span][i]))
    for compute in (Serial(of), Stacked(of)):
        (made,) = compute.run([Predict(of.initial, texts)])
        assert made.result.shape == (3, 3)
        torch.testing.assert_close(made.result[:, 0] / made.result[:, 2], losses, atol=2e-5, rtol=0)
        assert made.result[:, 1].tolist() == right
        assert made.result[:, 2].tolist() == counts.tolist()
    batch = Serial(of).batch(texts, np.arange(3))
    assert float(of.loss(of.initial, batch, torch.float32)) == pytest.approx(float(losses.mean()), abs=2e-5), "every example counts alike"
    assert of.together_by == ("padded rows" if family == "bloom" else "packed, whole last layer")
    assert of.causal and not of.head and of.width == 3


@pytest.mark.parametrize("family", FAMILIES)
def test_training_moves_what_the_language_models_own_gradient_moves(family: str) -> None:
    """The gradient by B at B = 0 is s·G·Aᵀ for the gradient G of the weight under it."""
    of, lm = model(family), library(family)
    torch.stack(its_losses(lm, examples(of))).mean().backward()
    assert_slopes(of, examples(of), dict(lm.named_parameters()), 2.0, family == "gpt2")


@pytest.mark.parametrize("family", FAMILIES)
def test_full_parameter_training_is_the_librarys_with_torchs_adamw(family: str) -> None:
    """Three steps on every weight, the tied embeddings among them, one text a step."""
    of, lm = model(family, "full"), library(family)
    texts = examples(of)
    adam = torch.optim.AdamW(lm.parameters(), lr=1e-2, eps=1e-3, weight_decay=0.1)
    for i in range(3):
        adam.zero_grad()
        its_losses(lm, texts)[i].backward()
        torch.nn.utils.clip_grad_norm_(lm.parameters(), 1.0)
        adam.step()
    own = dict(lm.named_parameters())
    fit = Fit(of.initial, texts, [np.array([i]) for i in range(3)], AdamW(1e-2, eps=1e-3, weight_decay=0.1))
    for compute in (Serial(of), Stacked(of)):
        (made,) = compute.run([fit])
        assert set(made.result.tensors) == set(of.initial)
        for name, tensor in made.result.tensors.items():
            torch.testing.assert_close(tensor, own[of.parameters[name]].detach(), atol=2e-4, rtol=0, msg=name)


@pytest.mark.parametrize("kind", ["lora", "full", "bitfit"])
@pytest.mark.parametrize("family", FAMILIES)
def test_stacked_equals_one_by_one(family: str, kind: Kind) -> None:
    if kind == "bitfit" and family in ("llama", "mistral"):
        with pytest.raises(AdapterError, match="bitfit trains biases"):
            model(family, kind)
        return
    of = model(family, kind)
    start = [families.moved(of, seed, by=0.02) for seed in (0, 1)]
    whole = examples(of)
    shards = [whole, whole.subset([1, 2])]
    fits = [
        Fit(at, mine, [np.array([0, 1]), np.array([len(mine) - 1])], AdamW(1e-2, eps=1e-3)) for at, mine in zip(start, shards, strict=True)
    ]
    for one, other in zip(Serial(of).run(fits), Stacked(of).run(fits), strict=True):
        np.testing.assert_allclose(other.result.losses, one.result.losses, rtol=1e-4)
        for name, tensor in one.result.tensors.items():
            torch.testing.assert_close(other.result.tensors[name], tensor, atol=2e-4, rtol=0)
    if kind == "lora":
        asked: list[Any] = [Sensitivity(at, mine, np.arange(2), 0.1) for at, mine in zip(start, shards, strict=True)]
        asked += [Score(at, mine) for at, mine in zip(start, shards, strict=True)]
        for one, other in zip(Serial(of).run(asked), Stacked(of).run(asked), strict=True):
            np.testing.assert_allclose(other.result, one.result, rtol=2e-3)
        for one, other in zip(*(c.run([Fisher(start[0], whole)]) for c in (Serial(of), Stacked(of))), strict=True):
            for name, tensor in one.result.items():
                torch.testing.assert_close(other.result[name], tensor, atol=1e-6, rtol=2e-3)


def test_as_many_reads_as_tokens_are_still_told_apart() -> None:
    """A pass of 32 tokens of two clients that reads 30, which are rounded up to 32: what reads belong to whom is not what tokens do."""
    of = model("llama")
    texts = Examples.of([[2] + [(5 + i) % 60 for i in range(15)]], [0], [[0] + [1] * 15])
    asked = [Predict(families.moved(of, seed, by=0.3), texts) for seed in (0, 1)]
    for one, other in zip(Serial(of).run(asked), Stacked(of).run(asked), strict=True):
        torch.testing.assert_close(other.result, one.result, atol=1e-3, rtol=0)


@pytest.mark.parametrize("family", FAMILIES)
def test_what_is_written_is_what_the_library_generates(family: str) -> None:
    """With the tensors given, and the model is as it was afterwards."""
    of = model(family)
    moved, prompt = families.moved(of, 3, by=1.0), of.encode(PROMPTS, ANSWERS)[0][0][:5]
    (plain,) = continued(of, {}, [prompt], 6)
    (other,) = continued(of, moved, [prompt], 6)
    own = dict(of.module.named_parameters())
    assert all(torch.equal(own[of.parameters[n]], t) for n, t in of.initial.items())
    (again,) = continued(of, {}, [prompt], 6)
    assert plain == again != other
    written = library(family).generate(input_ids=torch.tensor([prompt]), max_new_tokens=6, do_sample=False, pad_token_id=0, eos_token_id=3)
    assert of.tokenizer.decode(written[0, 5:], skip_special_tokens=True) == plain


@pytest.mark.parametrize("family", FAMILIES)
def test_prompts_answered_together_are_answered_as_alone(family: str) -> None:
    """Padded on the left to the longest; what follows an answer's end is not told, and nobody writes more than the model reads."""
    of = model(family)
    prompts = [row[:k] for row, k in zip(of.encode(PROMPTS, ANSWERS)[0], (5, 2, 9), strict=True)]
    moved = families.moved(of, 3, by=0.3)
    alone = continued(of, moved, prompts, 6)
    assert continued(of, moved, prompts, 6, together=2) == alone
    assert continued(of, moved, prompts, 6, together=3) == alone and len(set(alone)) > 1
    assert len(continued(of, moved, [[5] * (of.reads - 2)], 6)[0].split()) <= 2


# ---- prompts and answers as tokens ------------------------------------------------------------------------------------------------


def speaker(template: str = TEMPLATE, length: int = 16) -> Speaker:
    tokenizer = tiny.tokenizer()
    tokenizer.add_special_tokens({"eos_token": "[SEP]"})
    return Speaker(tokenizer, template, length)


def words(ids: list[int]) -> str:
    return tiny.tokenizer().decode(ids)


def test_an_example_is_its_template_its_answer_and_the_end() -> None:
    ids, segments = speaker().encode(PROMPTS[:2], ANSWERS[:2])
    assert [words(row) for row in ids] == ["w1 w5 w6 w7 w2 w30 w31 [SEP]", "w1 w9 w2 w32 w33 w34 w35 [SEP]"]
    assert segments == [[0] * 5 + [1] * 3, [0] * 3 + [1] * 5]


def test_of_a_long_example_the_prompt_is_cut_and_the_template_never() -> None:
    for length in (8, 12, 16):
        ids, segments = speaker(length=length).encode(PROMPTS[2:], ANSWERS[2:])
        (row,), (segment,) = ids, segments
        asked = row[: segment.index(1)]
        assert len(row) == length
        assert words(asked).startswith("w1 w10") and words(asked).endswith(" w2")
        assert sum(segment) == min(9, (length - 2) // 2), "half of what the template leaves"
    (row,), _ = speaker(length=16).encode(["w9"], ["w30 " * 20])
    assert words(row) == "w1 w9 w2" + " w30" * 13, "a short prompt leaves the rest to the answer, which has no end then"


def test_an_empty_prompt_or_answer_is_one() -> None:
    ids, segments = speaker().encode(["", "w5"], ["w3", ""])
    assert [words(row) for row in ids] == ["w1 w2 w3 [SEP]", "w1 w5 w2 [SEP]"]
    assert segments == [[0, 0, 1, 1], [0, 0, 0, 1]]


def test_the_tokenizers_chat_template_is_taken_unless_one_is_given() -> None:
    of = speaker("")
    assert of.written("w5") == PLAIN.replace("{text}", "w5")
    of.tokenizer.chat_template = "{% for m in messages %}w7 {{ m['content'] }} w8{% endfor %}"
    assert Speaker(of.tokenizer, "", 16).written("w5") == "w7 w5 w8"
    assert Speaker(of.tokenizer, "w1 {text}", 16).written("w5") == "w1 w5"


# ---- conversations and texts as tokens --------------------------------------------------------------------------------------------

CHAT = [["system", "w40"], ["user", "w5 w6"], ["assistant", "w30 w31"], ["user", "w7"], ["assistant", "w32"]]
MARKED = (
    "{% for m in messages %}{{ {'user': 'w10 ', 'assistant': 'w11 ', 'system': 'w12 '}[m['role']] }}{{ m['content'] }} [SEP] w13 "
    "{% endfor %}"
    "{% if add_generation_prompt %}w11 {% endif %}"
)


def talker(template: str = TEMPLATE, length: int = 40, own: str = "") -> Speaker:
    tokenizer = speaker().tokenizer
    tokenizer.chat_template = own or None
    return Speaker(tokenizer, template, length, "chat")


def marked(of: Speaker, *chats: list[list[str]]) -> list[str]:
    """The words of each conversation, those that are due in brackets."""
    made = of.encode([""] * len(chats), [json.dumps(chat) for chat in chats])
    return [" ".join(f"({words([t])})" if s else words([t]) for t, s in zip(*one, strict=True)) for one in zip(*made, strict=True)]


def test_of_a_conversation_every_answer_is_due_with_its_end_and_nothing_else() -> None:
    assert marked(talker("w1 {text} w2 "), CHAT) == ["w40 w1 w5 w6 w2 (w30) (w31) ([SEP]) w1 w7 w2 (w32) ([SEP])"]
    own = talker("", own=MARKED)
    due = "w12 w40 [SEP] w13 w10 w5 w6 [SEP] w13 w11 (w30) (w31) ([SEP]) w13 w10 w7 [SEP] w13 w11 (w32) ([SEP])"
    assert marked(own, CHAT) == [due], "what the template writes behind an answer's end is not due, and at the end it is left out"
    said = [{"role": role, "content": text} for role, text in CHAT]
    ids = own.encode([""], [json.dumps(CHAT)])[0][0]
    assert own.tokenizer(own.tokenizer.apply_chat_template(said, tokenize=False), add_special_tokens=False)["input_ids"][: len(ids)] == ids
    assert len(ids) == len(due.split())


def test_one_turn_is_an_example_of_instructions() -> None:
    alone = speaker("w1 {text} w2 ").encode(PROMPTS[:2], ANSWERS[:2])
    chats = [json.dumps([["user", p], ["assistant", a]]) for p, a in zip(PROMPTS[:2], ANSWERS[:2], strict=True)]
    assert talker("w1 {text} w2 ").encode(["", ""], chats) == alone


def test_where_a_template_writes_no_end_one_follows_the_last_answer() -> None:
    own = "{% for m in messages %}{{ m['content'] }} {% endfor %}"
    assert marked(talker("", own=own), CHAT) == ["w40 w5 w6 (w30) (w31) w7 (w32) ([SEP])"]


def test_a_long_conversation_is_cut_at_its_end_and_its_first_answer_keeps_half() -> None:
    assert marked(talker("w1 {text} w2 ", 10), CHAT) == ["w40 w1 w5 w6 w2 (w30) (w31) ([SEP]) w1 w7"]
    long = [["user", " ".join(f"w{i}" for i in range(20, 40))], ["assistant", "w3 w4 w5 w6 w7"], *CHAT[3:]]
    assert marked(talker("w1 {text} w2 ", 10), long) == ["w1 w20 w21 w22 w23 w2 (w3) (w4) (w5) (w6)"]
    assert marked(talker("w1 {text} w2 ", 20), long) == [
        "w1 " + " ".join(f"w{i}" for i in range(20, 32)) + " w2 (w3) (w4) (w5) (w6) (w7) ([SEP])"
    ]


@pytest.mark.parametrize(
    ("own", "says"),
    [
        (
            "{{ messages | length }} {% for m in messages %}{{ m['content'] }} {% endfor %}",
            r"earlier turns otherwise when others follow \(turn 2",
        ),
        ("{{ raise_exception('no system') }}", r"takes no conversation of .*no system.*--template"),
        ("{% for m in messages %}{{ m['content'] + ' w9 w9 w9 w9 w9 w9' }} {% endfor %}", "the 13 tokens around 'w5 w6' leave none of 12"),
    ],
)
def test_a_template_that_cannot_be_followed_is_refused(own: str, says: str) -> None:
    with pytest.raises(AnswerError, match=says):
        talker("", 12, own).encode([""], [json.dumps([*CHAT[:1], ["user", "w5 w6"], ["assistant", "w3 " * 9]])])


def test_of_a_text_all_is_due_in_no_template() -> None:
    of = Speaker(speaker().tokenizer, "", 4, "text")
    assert of.encode(["", ""], ["w5 w6", "w5 w6 w7 w8 w9"]) == (
        [[9, 10, 3], [9, 10, 11, 12], [12, 13, 3]],
        [[2, 1, 1], [2, 1, 1, 1], [0, 1, 1]],
    )
    of.tokenizer.add_special_tokens({"bos_token": "[CLS]"})
    assert Speaker(of.tokenizer, "", 4, "text").encode([""], ["w5 w6"]) == ([[2, 9, 10, 3]], [[2, 1, 1, 1]])
    assert Speaker(of.tokenizer, "", 4, "text").encode([""], [""]) == ([[2, 3]], [[2, 1]])
    with pytest.raises(AnswerError, match="a window of 1 token"):
        Speaker(of.tokenizer, "", 1, "text")


@pytest.mark.parametrize("family", FAMILIES)
def test_texts_of_many_lengths_in_one_pass_are_read_as_alone(family: str) -> None:
    """Long texts in windows, short ones beside them: every token but a text's first is due once, after its own window's tokens alone, at
    positions that begin with the window. The library has each window by itself."""
    of = load(str(folder(family)), num_labels=2, adapter=Adapter(rank=2), seed=1, max_length=8, answers="", form="text")
    lines = [" ".join(f"w{(7 * i + j) % 60}" for j in range(k)) for i, k in enumerate((19, 1, 4, 7, 13))]
    ids, segments = of.encode([""] * len(lines), lines)
    texts = Examples.of(ids, [0] * len(ids), segments)
    first = first_of(texts.segments, texts.offsets)
    whole = [len(of.tokenizer(line, add_special_tokens=False)["input_ids"]) + 1 for line in lines]
    assert first.tolist() == [0, *np.cumsum([max(1, -(-(n - 1 + int(of.speaker._begins)) // 7)) for n in whole]).tolist()]  # type: ignore[union-attr]
    losses, lm = [], library(family)
    with torch.no_grad():
        for row in ids:
            losses.append(float(lm(input_ids=torch.tensor([row]), labels=torch.tensor([row])).loss) * (len(row) - 1))
    for compute in (Serial(of), Stacked(of)):
        (made,) = compute.run([Predict(of.initial, texts)])
        np.testing.assert_allclose(made.result[:, 0], losses, atol=2e-4)
        due = [int(made.result[a:b, 2].sum()) for a, b in pairwise(first)]
        assert due == [n - 1 + int(of.speaker._begins) for n in whole]  # type: ignore[union-attr]


@pytest.mark.parametrize(
    ("template", "length", "says"), [("w1", 16, "must have {text} once"), ("w1 {text} w2 w3", 4, "alone takes 3 of the 4")]
)
def test_what_no_answer_can_follow_is_refused(template: str, length: int, says: str) -> None:
    with pytest.raises(AnswerError, match=says):
        speaker(template, length)


def test_a_model_that_fills_gaps_is_refused() -> None:
    with pytest.raises(ModelError, match=r"fills gaps and writes no answers.*--task classification"):
        load(str(folder("bert")), num_labels=2, adapter=Adapter(rank=2), max_length=16, answers="")
    with pytest.raises(ModelError, match=r"no trained language-model head.*--task classification"):
        load(str(families.folder("llama")), num_labels=2, adapter=Adapter(rank=2), max_length=16, answers=TEMPLATE)
