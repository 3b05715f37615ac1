"""Question answering, against loops written from the sentences, and the library's own model for it.

Each test's docstring is the sentence that it holds the code to.
"""

from __future__ import annotations

import math
from functools import cache
from pathlib import Path
from tempfile import mkdtemp
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import AutoModelForQuestionAnswering

from fedloom.compute.serial import Serial
from fedloom.compute.stacked import Stacked
from fedloom.compute.work import AdamW, Fit, Predict, Score, Sensitivity, Spectrum, WorkItem
from fedloom.data.examples import Examples
from fedloom.data.questions import Questions, exact, f1, marks, with_place
from fedloom.data.rows import Rows
from fedloom.model.adapters import Adapter
from fedloom.model.base import Model
from fedloom.model.loading import load
from fedloom.model.places import ModelError
from fedloom.model.spans import BEGIN, CONTEXT, END, FIRST, SECOND, TORN, Finder, SpanError, best_span, first_of, torn
from fedloom.run.judging import Judge
from fedloom.run.world import cut
from tests import families, tiny

FAMILIES = ("bert", "roberta", "deberta-v2", "deberta-v3", "modernbert")
LENGTH = 16


@cache
def folder(family: str) -> Path:
    path = Path(mkdtemp(prefix=f"spans-{family}-"))
    torch.manual_seed(11)
    AutoModelForQuestionAnswering.from_config(families.CONFIGS[family]()).save_pretrained(path)
    tiny.tokenizer().save_pretrained(path)
    return path


@cache
def model(family: str) -> Model:
    adapter = Adapter(rank=2, alpha=4.0, targets=families.TARGETS.get(family, ()))
    return load(str(folder(family)), num_labels=0, adapter=adapter, seed=1, max_length=LENGTH, finds=True)


def asked(count: int, seed: int = 0, longest: int = 40) -> tuple[list[str], list[str], list[tuple[int, int]]]:
    """Questions of 1 to 4 words, contexts of up to ``longest``, and the words [i, j] of each that answer."""
    rng = np.random.default_rng(seed)
    questions = [" ".join(f"w{w}" for w in rng.integers(0, 60, rng.integers(1, 5))) for _ in range(count)]
    contexts = [" ".join(f"w{w}" for w in rng.integers(0, 60, rng.integers(3, longest + 1))) for _ in range(count)]
    words = []
    for context in contexts:
        i = int(rng.integers(0, len(context.split())))
        words.append((i, min(i + int(rng.integers(0, 3)), len(context.split()) - 1)))
    return questions, contexts, words


def placed(context: str, i: int, j: int) -> str:
    """The context with the characters of its words i to j."""
    words = context.split()
    begin = len(" ".join(words[:i])) + (1 if i else 0)
    return with_place(context, (begin, begin + len(" ".join(words[i : j + 1]))))


def examples(of: Model, count: int, seed: int = 0) -> Examples:
    questions, contexts, words = asked(count, seed)
    ids, segments = of.encode(questions, [placed(c, i, j) for c, (i, j) in zip(contexts, words, strict=True)])
    return Examples.of(ids, [0] * len(ids), segments)


def windows_by_loops(questions: list[str], contexts: list[str], words: list[tuple[int, int]]) -> list[dict[str, Any]]:
    """Each window: its question, its words of the context [from, to), and where in its tokens the answer is, or (0, 0)."""
    made = []
    for q, (question, context, (i, j)) in enumerate(zip(questions, contexts, words, strict=True)):
        before = len(question.split()) + 2  # [CLS] question [SEP]
        room, total, begin = LENGTH - before - 1, len(context.split()), 0
        while True:
            end = min(begin + room, total)
            whole = begin <= i and j < end
            made.append({"question": q, "from": begin, "to": end, "due": (before + i - begin, before + j - begin) if whole else (0, 0)})
            if end == total:
                break
            begin += room - LENGTH // 4
    return made


def test_windows_share_a_quarter_and_only_one_with_the_whole_answer_asks_for_it() -> None:
    """Windows of the length, each with the whole question, begin a quarter of the length before the one before them ends; what is due is
    the answer's first and last token where the window holds all of it, else the first token of the window."""
    questions, contexts, words = asked(30)
    tokens, segments = model("bert").encode(questions, [placed(c, i, j) for c, (i, j) in zip(contexts, words, strict=True)])
    due, seen = windows_by_loops(questions, contexts, words), set()
    assert len(tokens) == len(due) > 60
    assert {w["due"] == (0, 0) for w in due} == {True, False}
    for ids, said, window in zip(tokens, segments, due, strict=True):
        context = contexts[window["question"]].split()[window["from"] : window["to"]]
        wanted = f"[CLS] {questions[window['question']]} [SEP] {' '.join(context)} [SEP]"
        assert [tiny.WORDS[i] for i in ids] == wanted.split()
        before = len(ids) - len(context) - 1
        assert [s & SECOND for s in said] == [0] * before + [1] * (len(context) + 1)
        assert [bool(s & CONTEXT) for s in said] == [False] * before + [True] * len(context) + [False]
        marked = [tuple(i for i, s in enumerate(said) if s & bit) for bit in (BEGIN, END)]
        assert marked == [(), ()] if window["due"] == (0, 0) else marked == [(window["due"][0],), (window["due"][1],)]
        assert bool(said[0] & FIRST) == (window["question"] not in seen)
        seen.add(window["question"])


THIRTY = " ".join(f"w{i}" for i in range(30))
"""Windows of 16 tokens over it, with a question of one word: words 0 to 11, 8 to 19, 16 to 27, 24 to 29."""


@pytest.mark.parametrize(
    ("answer", "due"),
    [
        ((8, 11), ["whole", "whole", "not here", "not here"]),
        ((7, 11), ["whole", "not here", "not here", "not here"]),
        ((7, 12), ["torn", "torn", "not here", "not here"]),
        ((2, 20), ["torn", "torn", "torn", "not here"]),
        ((10, 27), ["torn", "torn", "torn", "torn"]),
    ],
)
def test_windows_with_a_part_of_an_answer_that_none_holds_whole_have_no_loss(answer: tuple[int, int], due: list[str]) -> None:
    """Where a window holds the answer whole, it is not here in the others; where none does, windows with a part of it are told nothing."""
    tokens, segments = model("bert").encode(["w40"], [placed(THIRTY, *answer)])
    kinds = {(True, False): "whole", (False, True): "torn", (False, False): "not here"}
    assert [kinds[any(s & BEGIN for s in of) and any(s & END for s in of), bool(of[0] & TORN)] for of in segments] == due
    of = Examples.of(tokens, [0] * 4, segments)
    assert torn(of.segments, of.offsets).tolist() == ["torn" in due]
    start = model("bert").initial
    for compute in (Serial(model("bert")), Stacked(model("bert"))):
        told, each = (done.result for done in compute.run([Predict(start, of), Score(start, of)]))
        assert [float(loss) == 0 for loss in told[:, 0]] == [float(score) == 0 for score in each] == [one == "torn" for one in due]


def test_answers_that_no_window_holds_whole_are_told_of() -> None:
    contexts = [placed(THIRTY, 7, 12), placed(THIRTY, 7, 11), placed(THIRTY, 2, 20)]
    ids, segments = model("bert").encode(["w40"] * 3, contexts)
    some, none = Examples.of(ids, [0] * len(ids), segments), examples(model("bert"), 3)
    said = cut({"train": some, "test": none}, model("bert"))
    assert len(said) == 1 and said[0].endswith("2 of 3 train, 0 of 3 test")
    assert "no window of 16 tokens (--max-length) holds these answers whole" in said[0]
    assert cut({"test": none}, model("bert")) == []


def spans_of(lengths: list[int], segments: np.ndarray) -> Any:
    return model("bert").finder.due(np.zeros(0), segments, np.array(lengths), torch.device("cpu"))  # type: ignore[union-attr]


def test_the_loss_and_the_best_span_of_a_window_by_loops() -> None:
    """ℓ = (−log softmax(b)[i] − log softmax(e)[j]) / 2 over all tokens of the window, [CLS] where nothing is due; the best span is that of
    the context's tokens with end ≥ begin, at most 30 of them, with the highest sum."""
    rng, lengths = np.random.default_rng(1), [5, 40, 9, 12]
    logits = rng.normal(size=(sum(lengths), 2)) * 3
    segments = np.zeros(sum(lengths), np.int64)
    starts = np.cumsum([0, *lengths[:-1]])
    due = [(3, 4), (12, 30), (0, 0), (7, 7)]
    for start, length, (i, j) in zip(starts, lengths, due, strict=True):
        segments[start + 2 : start + length - 1 + (length == 5)] |= CONTEXT
        logits[start : start + 2] += 9  # what is not the context's is never chosen, however high
        if (i, j) != (0, 0):
            segments[start + i] |= BEGIN
            segments[start + j] |= END
    told = spans_of(lengths, segments).told(torch.tensor(logits)).numpy()
    lost = spans_of(lengths, segments).losses(torch.tensor(logits)).numpy()
    for w, (start, length, (i, j)) in enumerate(zip(starts, lengths, due, strict=True)):
        b, e = logits[start : start + length].T
        mean = -(b[i] - math.log(sum(math.exp(x) for x in b)) + e[j] - math.log(sum(math.exp(x) for x in e))) / 2
        assert lost[w] == pytest.approx(mean, abs=1e-12)
        best = (-math.inf, -1, -1)
        for first in range(length):
            for last in range(first, min(first + 30, length)):
                inside = segments[start + first] & CONTEXT and segments[start + last] & CONTEXT
                if inside and np.float32(b[first]) + np.float32(e[last]) > best[0]:
                    best = (np.float32(b[first]) + np.float32(e[last]), first, last)
        assert told[w].tolist() == pytest.approx([mean, *best], abs=1e-5)


@given(st.lists(st.tuples(st.integers(-4, 4), st.integers(-4, 4)), min_size=1, max_size=12), st.integers(1, 5))
def test_of_equals_the_first_span_is_the_best(logits: list[tuple[int, int]], longest: int) -> None:
    """The highest sum; of equals that which begins first, then that which ends first."""
    best = (-99, 0, 0)
    for i in range(len(logits)):
        for j in range(i, min(len(logits), i + longest)):
            if logits[i][0] + logits[j][1] > best[0]:
                best = (logits[i][0] + logits[j][1], i, j)
    begin, end = np.array(logits, np.float32).T
    assert best_span(begin, end, longest) == best


def test_a_window_that_lost_the_end_of_its_answer_asks_for_nothing() -> None:
    """A curriculum may cut a window short; an answer that is no longer whole is none."""
    segments = np.array([FIRST, 0, CONTEXT | BEGIN, CONTEXT, 0, FIRST, CONTEXT | BEGIN | END, 0])
    made = spans_of([5, 3], segments)
    assert made.begin.tolist() == [0, 6] and made.end.tolist() == [0, 6]


@pytest.mark.parametrize("family", FAMILIES)
def test_the_loss_is_the_librarys(family: str) -> None:
    """The library's loss with start_positions and end_positions, of one window without padding."""
    made, library = model(family), AutoModelForQuestionAnswering.from_pretrained(folder(family), attn_implementation="eager")
    own = dict(made.module.named_parameters())
    at = {n: own[p] for n, p in made.parameters.items()}
    of = examples(made, 4)
    got = Serial(made).run([Predict(at, of)])[0].result
    for window in range(len(of)):
        begin, end = of.offsets[window], of.offsets[window + 1]
        ids, segments = (torch.from_numpy(x[begin:end].astype(np.int64))[None] for x in (of.tokens, of.segments))
        i, j = (torch.argmax((segments & bit).int(), 1) for bit in (BEGIN, END))
        kinds = {"token_type_ids": segments & SECOND} if family == "bert" else {}
        with torch.no_grad():
            wanted = library(input_ids=ids, start_positions=i, end_positions=j, **kinds)
        assert float(got[window, 0]) == pytest.approx(float(wanted.loss), abs=2e-5)
        first, last = (int(x) for x in got[window, 2:])
        said = wanted.start_logits[0, first] + wanted.end_logits[0, last]
        assert float(got[window, 1]) == pytest.approx(float(said), abs=2e-5)


@pytest.mark.parametrize("family", FAMILIES)
def test_many_at_once_are_as_one_by_one(family: str) -> None:
    """Training, scores and predictions of several devices in one pass."""
    made = model(family)
    assert made.together_by == {"deberta-v2": "padded rows", "deberta-v3": "vmap"}.get(family, "packed, whole last layer")
    items: list[WorkItem] = []
    for k, size in enumerate((3, 5, 2)):
        generator = torch.Generator().manual_seed(k)
        start = {n: t + 0.1 * torch.randn(t.shape, generator=generator) for n, t in made.initial.items()}
        texts = examples(made, size, 40 + k)
        rows = np.arange(len(texts))
        items += [Fit(start, texts, [rows[:2], rows[2:]], AdamW(1e-2)), Score(start, texts), Predict(start, texts)]
        items += [Sensitivity(start, texts, rows[:3]), Spectrum(start, texts, rows[:2], steps=3)] if family == "bert" else []
    for item, one, many in zip(items, Serial(made).run(items), Stacked(made).run(items), strict=True):
        assert one.flops == many.flops
        if isinstance(item, Fit):
            for name, tensor in one.result.tensors.items():
                torch.testing.assert_close(many.result.tensors[name], tensor, atol=2e-4, rtol=0)
            np.testing.assert_allclose(one.result.losses, many.result.losses, atol=1e-4)
        elif isinstance(item, Spectrum):
            np.testing.assert_allclose(many.result.nodes, one.result.nodes, rtol=2e-2, atol=1e-3)
        else:
            torch.testing.assert_close(torch.as_tensor(many.result), torch.as_tensor(one.result), atol=1e-4, rtol=1e-3)


ARTICLES = ("a", "an", "the")


def plain(text: str) -> list[str]:
    """The words that SQuAD's script compares: lower case, without punctuation, then without articles."""
    kept = "".join(c for c in text.lower() if c not in "!\"#$%&'()*+,-./:;<=>?@[\\]^_`{|}~")
    return [word for word in kept.split() if word not in ARTICLES]


def f1_by_loops(said: str, due: str) -> float:
    mine, theirs, common = plain(said), plain(due), 0
    left = list(theirs)
    for word in mine:
        if word in left:
            left.remove(word)
            common += 1
    if not common:
        return 0.0
    precision, recall = common / len(mine), common / len(theirs)
    return 2 * precision * recall / (precision + recall)


@pytest.mark.parametrize(
    ("said", "due", "matches", "score"),
    [
        ("Denver Broncos", "Denver Broncos", 1, 1.0),
        ("the  Denver Broncos!", "denver broncos", 1, 1.0),
        ("The Denver", "Denver Broncos", 0, 2 / 3),
        ("U.S. Army", "us army", 1, 1.0),
        ("a", "the", 1, 0.0),  # nothing is left of either: SQuAD's script counts a match, and no word in common
        ("blue blue red", "blue green", 0, 2 * (1 / 3) * (1 / 2) / (1 / 3 + 1 / 2)),
        ("an answer", "answered", 0, 0.0),
        ("1,000", "1000", 1, 1.0),
        ("", "something", 0, 0.0),
        ("theatre", "the atre", 0, 0.0),
        ("in the\tpark", "in park", 1, 1.0),
    ],
)
def test_exact_match_and_f1_are_squads(said: str, due: str, matches: int, score: float) -> None:
    """Lower case, no punctuation, no articles, one blank between words; F1 of the words in common, each as often as both have it."""
    assert exact(said, due) == matches
    assert f1(said, due) == pytest.approx(score)
    assert f1_by_loops(said, due) == pytest.approx(score)


WORDS = st.lists(st.sampled_from(["a", "The", "x", "X,", "y", "z!", "an"]), max_size=6).map(" ".join)


@given(WORDS, WORDS)
def test_f1_of_any_words(said: str, due: str) -> None:
    assert f1(said, due) == pytest.approx(f1_by_loops(said, due))
    assert exact(said, due) == float(plain(said) == plain(due))


def test_the_best_of_several_answers_counts_for_each_of_the_two() -> None:
    assert marks("red fox", ["dog", "red fox runs", "a red fox"]) == (1.0, 1.0)
    assert marks("red", ["dog", "red fox", "red fox runs"]) == (pytest.approx(2 / 3), 0.0)


def judge(questions: list[str], contexts: list[str], words: list[tuple[int, int]]) -> tuple[Judge, Examples]:
    """Of the tiny BERT; what is due are the words of the context, and something else."""
    import json

    import pyarrow as pa

    answers = []
    for context, (i, j) in zip(contexts, words, strict=True):
        begin = int(placed(context, i, j).split()[0])
        answers.append(json.dumps([["nothing", -1], [" ".join(context.split()[i : j + 1]), begin]]))
    task = Questions("q", "c", "a", ("all",))
    rows = Rows(pa.table({"q": questions, "c": contexts, "a": answers}))
    ids, segments = model("bert").encode(*task.written(rows))
    of = Examples.of(ids, [0] * len(ids), segments)
    source: Any = SimpleNamespace(task=task, splits={"test": rows})
    return Judge(source, {"test": of}, model("bert")), of


def test_over_all_windows_of_a_question_the_highest_score_answers() -> None:
    """The span with the highest begin + end over all windows of the question, the words between it as the context has them; of equals the
    first window. The loss is the mean over the question's windows."""
    questions, contexts, words = asked(12, seed=3)
    judged, of = judge(questions, contexts, words)
    windows, rng = windows_by_loops(questions, contexts, words), np.random.default_rng(8)
    made = np.zeros((len(of), 4))
    for n, window in enumerate(windows):
        before = len(questions[window["question"]].split()) + 2
        i, j = np.sort(rng.integers(0, window["to"] - window["from"], 2))
        if rng.random() < 0.5 and window["due"] != (0, 0):
            i, j = window["due"][0] - before, window["due"][1] - before
        made[n] = (rng.random(), rng.integers(0, 3), before + i, before + j)
    wanted = []
    for q in range(len(questions)):
        mine = [(n, w) for n, w in enumerate(windows) if w["question"] == q]
        best, chosen = -1.0, ""
        for n, window in mine:
            if made[n, 1] > best:
                before = len(questions[q].split()) + 2
                low, high = (window["from"] + int(made[n, k]) - before for k in (2, 3))
                best, chosen = made[n, 1], " ".join(contexts[q].split()[low : high + 1])
        due = " ".join(contexts[q].split()[words[q][0] : words[q][1] + 1])
        lost = sum(made[n, 0] for n, _ in mine) / len(mine)
        wanted.append([lost, f1_by_loops(chosen, due), float(plain(chosen) == plain(due))])
    assert {row[2] for row in wanted} == {0.0, 1.0}
    np.testing.assert_allclose(judged.judged("test", np.arange(12), made), wanted)
    some = np.array([7, 2, 3])
    places = judged.examples("test", some)
    assert places.tolist() == [n for row in some for n, w in enumerate(windows) if w["question"] == row]
    np.testing.assert_allclose(judged.judged("test", some, made[places]), np.array(wanted)[some])
    task = judged.source.task
    scores = task.scores(np.zeros(12), np.array(wanted))
    assert scores == {"answer_f1": pytest.approx(np.mean(wanted, 0)[1]), "exact_match": pytest.approx(np.mean(wanted, 0)[2])}
    assert task.loss(np.zeros(12), np.array(wanted)) == pytest.approx(np.mean(wanted, 0)[0])
    found = task.outcomes(np.zeros(12), np.array(wanted))
    assert (np.bincount(found.example, found.count) == task.unit).all(), "every question counts alike"
    right = found.count[(found.true == 0) & (found.predicted == 0)].sum() / found.count.sum()
    assert right == pytest.approx(scores["answer_f1"], abs=1e-5)


def test_the_first_windows_are_found() -> None:
    segments, offsets = np.array([FIRST, 1, 0, 1, FIRST, FIRST, 0]), np.array([0, 2, 4, 5, 7])
    assert first_of(segments, offsets).tolist() == [0, 2, 3, 4]


def test_what_cannot_be_looked_for_says_so() -> None:
    finder = model("bert").finder
    assert finder is not None
    with pytest.raises(SpanError, match=r"a question of 9 tokens leaves 4 of the 16 of --max-length .* more than 4 must be left.* 'w1 w1"):
        finder.encode(["w2", " ".join(["w1"] * 9)], ["0 2 w3", "0 2 w3"])
    assert len(finder.encode([" ".join(["w1"] * 8)], ["0 2 w3"])[0]) == 1
    with pytest.raises(SpanError, match="a context has no tokens"):
        finder.encode(["w2"], ["0 2   "])
    with pytest.raises(SpanError, match="--max-length 11 leaves no room"):
        Finder(finder.tokenizer, 11)
    slow: Any = SimpleNamespace(is_fast=False)
    with pytest.raises(SpanError, match="fast tokenizer"):
        Finder(slow, 16)
    bare = tiny.tokenizer()
    bare.backend_tokenizer.post_processor = None  # type: ignore[assignment]
    with pytest.raises(SpanError, match="no token before a question"):
        Finder(bare, 16)


@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_a_model_that_reads_forwards_only_is_refused(family: str) -> None:
    with pytest.raises(ModelError, match="reads forwards only, and answers are looked for with an encoder"):
        model(family)


def test_a_context_longer_than_the_model_is_cut_by_the_models_length() -> None:
    """--max-length may ask for more than the model reads."""
    made = load(str(folder("bert")), num_labels=0, adapter=Adapter(rank=2), seed=1, max_length=900, finds=True)
    assert made.max_length == 32
    tokens, _ = made.encode(["w1 w2"], [with_place(" ".join(["w5"] * 200), (0, 2))])
    assert len(tokens) > 8 and max(map(len, tokens)) == 32
