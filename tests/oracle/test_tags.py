"""Tagging, against the library's own token classifier and CoNLL's rules.

Each test's docstring is the sentence that it holds the code to.
"""

from __future__ import annotations

import re
import shutil
from dataclasses import replace
from functools import cache
from pathlib import Path
from tempfile import mkdtemp

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import AutoModelForTokenClassification, RobertaTokenizer

from fedloom.compute.serial import Serial
from fedloom.compute.stacked import Stacked
from fedloom.compute.work import AdamW, Fisher, Fit, Predict, Score, Sensitivity, Spectrum, WorkItem
from fedloom.data.examples import Examples
from fedloom.data.tagging import BETWEEN, Tagging, as_texts
from fedloom.model.adapters import Adapter
from fedloom.model.base import Model
from fedloom.model.loading import load
from fedloom.model.tags import TagError, Tagger, entities
from tests import families, tiny

TAGS = ("O", "B-a", "I-a", "B-b", "I-b")
FAMILIES = families.APART
OTHERWISE = {"deberta-v2": "padded rows", "deberta-v3": "vmap", "bloom": "padded rows"}


@cache
def folder(family: str) -> Path:
    path = Path(mkdtemp(prefix=f"tags-{family}-"))
    torch.manual_seed(11)
    config = families.CONFIGS[family]()
    config.num_labels = len(TAGS)
    AutoModelForTokenClassification.from_config(config).save_pretrained(path)
    tiny.tokenizer().save_pretrained(path)
    return path


@cache
def model(family: str) -> Model:
    adapter = Adapter(rank=2, alpha=4.0, targets=families.TARGETS.get(family, ()))
    return load(str(folder(family)), num_labels=0, adapter=adapter, seed=1, max_length=12, tags=TAGS, between=BETWEEN)


def sentences(count: int, seed: int = 0) -> tuple[list[list[str]], list[list[int]]]:
    """Sentences of 1 to 14 words, of which the longest do not fit, and tags that anything may follow."""
    rng = np.random.default_rng(seed)
    lengths = rng.integers(1, 15, count)
    return [[f"w{w}" for w in rng.integers(0, 60, n)] for n in lengths], [rng.integers(0, len(TAGS), n).tolist() for n in lengths]


def examples(of: Model, count: int, seed: int = 0) -> Examples:
    words, tags = sentences(count, seed)
    texts, ids, _ = as_texts(words, tags, TAGS, "train", TAGS)
    tokens, segments = of.encode(texts, ids)
    return Examples.of(tokens, [0] * count, segments)


@pytest.mark.parametrize("family", [name for name in FAMILIES if name != "qwen2"])  # its tokenizer class knows no words of tiny's
def test_the_loss_is_the_librarys_of_first_pieces(family: str) -> None:
    """The cross-entropy of each word's tag at its first piece, averaged over a sentence's words; the library's loss with −100 elsewhere."""
    made, library = model(family), AutoModelForTokenClassification.from_pretrained(folder(family), attn_implementation="eager")
    for seed in range(4):
        words, tags = sentences(1, seed)
        ids = made.tokenizer(words, is_split_into_words=True, truncation=True, max_length=12)["input_ids"][0]
        kept = tags[0][: len(ids) - 2]  # one piece a word; the first and the last are the tokenizer's own
        labels = torch.tensor([[-100, *kept, -100]])
        with torch.no_grad():
            wanted = library(input_ids=torch.tensor([ids]), labels=labels)
        at = {n: dict(made.module.named_parameters())[p] for n, p in made.parameters.items()}
        head = {n: t for n, t in library.state_dict().items() if n.startswith(("classifier", "score"))}
        at = {n: next((t for h, t in head.items() if n.endswith(h)), t) for n, t in at.items()}
        got = Serial(made).run([Predict(at, examples(made, 1, seed))])[0].result[0]
        assert float(got[0] / got[2]) == pytest.approx(float(wanted.loss), abs=2e-5)
        assert int(got[2]) == len(kept)
        said = wanted.logits[0, 1:-1].argmax(1)
        assert int(got[1]) == int((said == torch.tensor(kept)).sum())


@pytest.mark.parametrize("family", FAMILIES)
def test_many_at_once_are_as_one_by_one(family: str) -> None:
    """Training, scores and predictions of several devices in one pass."""
    made = model(family)
    assert made.together_by == {"deberta-v2": "padded rows", "deberta-v3": "vmap", "bloom": "padded rows"}.get(
        family, "packed, whole last layer"
    )
    items: list[WorkItem] = []
    for k, size in enumerate((5, 9, 3)):
        generator = torch.Generator().manual_seed(k)
        start = {n: t + 0.1 * torch.randn(t.shape, generator=generator) for n, t in made.initial.items()}
        texts, rows = examples(made, size, 40 + k), np.arange(size)
        items += [Fit(start, texts, [rows[:2], rows[2:]], AdamW(1e-2)), Score(start, texts), Predict(start, texts)]
    for one, many in zip(Serial(made).run(items), Stacked(made).run(items), strict=True):
        assert one.flops == many.flops
        if hasattr(one.result, "tensors"):
            for name, tensor in one.result.tensors.items():
                torch.testing.assert_close(many.result.tensors[name], tensor, atol=2e-4, rtol=0)
            np.testing.assert_allclose(one.result.losses, many.result.losses, atol=1e-4)
        else:
            torch.testing.assert_close(torch.as_tensor(many.result), torch.as_tensor(one.result), atol=1e-4, rtol=2e-4)


@pytest.mark.parametrize("family", ["bert", "deberta-v2", "deberta-v3", "gpt2"])
@pytest.mark.parametrize("compute", [Serial, Stacked])
def test_a_sentence_of_which_nothing_is_read_counts_for_nothing(compute: type[Serial | Stacked], family: str) -> None:
    """An empty sentence by itself, and beside another device's that is read: its loss is 0 and so is all that is made of it."""
    made = model(family)
    tokens, segments = made.encode(*as_texts([[], ["w1", "w2"]], [[], [1, 0]], TAGS, "train", TAGS)[:2])
    both = Examples.of(tokens, [0, 0], segments)
    assert not both.segments[: both.offsets[1]].any()
    generator = torch.Generator().manual_seed(0)
    at = {n: t + 0.1 * torch.randn(t.shape, generator=generator) for n, t in made.initial.items()}
    one, alone = np.array([0]), both.subset([0])
    items = [Fit(at, alone, [one, one], AdamW(1e-2)), Predict(at, alone), Score(at, alone), Fisher(at, alone), Sensitivity(at, alone, one)]
    items += [Spectrum(at, alone, one, steps=3)] if family == "bert" else []
    read = [replace(item, examples=both.subset([1])) for item in items]
    for beside in ([], read):
        fit, told, scores, fisher, layers, *spectra = (done.result for done in compute(made).run([*beside, *items])[len(beside) :])
        assert fit.losses.tolist() == [0, 0] and all(torch.equal(fit.tensors[n], t) for n, t in at.items())
        assert told.tolist() == [[0] * 6] and scores.tolist() == [0] and not any(t.any() for t in fisher.values())
        assert layers.tolist() == [0, 0]
        assert all(of.lipschitz == 0 and not of.nodes.any() for of in spectra)


@pytest.mark.parametrize(
    ("tags", "found"),
    [
        ("O B-a I-a O", {("a", 1, 3)}),
        ("B-a B-a", {("a", 0, 1), ("a", 1, 2)}),
        ("B-a I-b", {("a", 0, 1), ("b", 1, 2)}),
        ("I-a I-a O I-b", {("a", 0, 2), ("b", 3, 4)}),
        ("O O", set()),
        ("B-b", {("b", 0, 1)}),
        ("B-a I-a B-a I-a I-a", {("a", 0, 2), ("a", 2, 5)}),
    ],
)
def test_entities_are_those_of_conlls_script(tags: str, found: set[tuple[str, int, int]]) -> None:
    """An entity begins at B-, or at I- of another type than what is before it; it goes on with I- of its own type."""
    assert entities(np.array([TAGS.index(t) for t in tags.split()]), TAGS) == found


@given(st.lists(st.integers(0, len(TAGS) - 1), max_size=12))
def test_entities_are_what_a_pattern_finds(tags: list[int]) -> None:
    """The same by a regular expression over one letter a tag: B or I, then I, of one type."""
    letters = "".join("OAaBb"[t] for t in tags)
    due = {(m[0][0].lower(), m.start(), m.end()) for m in re.finditer("[Aa]a*|[Bb]b*", letters)}
    assert entities(np.array(tags, np.int64), TAGS) == due


def test_what_is_told_counts_whole_entities() -> None:
    """F1 = 2·found / (predicted + there) over all sentences together; an entity with a wrong end is not found."""
    tagger = model("bert").tagger
    assert tagger is not None
    due = ["B-a I-a O B-b", "O O", "B-b I-b"]
    said = ["B-a O O B-b", "O B-a", "B-b I-b"]
    number = {t: i for i, t in enumerate(TAGS)}
    segments = np.array([number[t] + 1 for s in due for t in s.split()])
    lengths = np.array([len(s.split()) for s in due])
    asked = tagger.due(np.zeros(0), segments, lengths, torch.device("cpu"))
    logits = torch.full((len(segments), 5), -9.0)
    logits[torch.arange(len(segments)), torch.tensor([number[t] for s in said for t in s.split()])] = 9.0
    told = asked.told(logits).numpy()
    assert told[:, 1:].tolist() == [[3, 4, 1, 2, 2], [1, 2, 0, 1, 0], [2, 2, 1, 1, 1]]
    task = Tagging("words", "tags", TAGS, ("a", "b", "none"))
    scores = task.scores(np.zeros(3), told)
    assert scores == {"entity_f1": pytest.approx(2 * 2 / (4 + 3)), "word_accuracy": 6 / 8}
    assert task.loss(np.zeros(3), told) == pytest.approx((6 * 0.0 + 2 * 18.0) / 8, abs=1e-3)
    made = task.outcomes(np.zeros(3), told)
    cells = {(int(t), int(p)): int(made.count[(made.true == t) & (made.predicted == p)].sum()) for t in (0, 1) for p in (0, 1)}
    assert cells == {(0, 0): 0, (0, 1): 2, (1, 0): 1, (1, 1): 2}


def test_every_word_is_read_at_its_first_piece_and_what_does_not_fit_is_not_there() -> None:
    made = model("bert")
    words, tags = [[f"w{i}" for i in range(14)], ["w1", "w2"]], [list(range(5)) * 2 + [0] * 4, [3, 4]]
    texts, ids, types = as_texts(words, tags, TAGS, "train", TAGS)
    tokens, segments = made.encode(texts, ids)
    assert [len(t) for t in tokens] == [12, 4] and types == ["a", "b"]
    assert segments == [[0, *(t + 1 for t in tags[0][:10]), 0], [0, 4, 5, 0]]


class Pieces:
    """A tokenizer of two pieces a word."""

    is_fast = True

    def __call__(self, words: list[list[str]], **_: object) -> Pieces:
        self.words = words
        return self

    def __getitem__(self, name: str) -> list[list[int]]:
        return [[7] * (2 * len(sentence)) for sentence in self.words]

    def num_special_tokens_to_add(self) -> int:
        return 0

    def word_ids(self, i: int) -> list[int]:
        return [w for w in range(len(self.words[i])) for _ in "ab"]


def test_further_pieces_of_a_word_are_not_read() -> None:
    made = Tagger(Pieces(), TAGS, " ", 9).encode(["x y"], ["1 0"])
    assert made == ([[7, 7, 7, 7]], [[2, 0, 1, 0]])


def test_a_tokenizer_that_tells_no_words_is_refused() -> None:
    slow = Pieces()
    slow.is_fast = False
    with pytest.raises(TagError, match="fast tokenizer"):
        Tagger(slow, TAGS, " ", 9)
    with pytest.raises(TagError, match="200 tags came; at most 126"):
        Tagger(Pieces(), tuple(map(str, range(200))), " ", 9)


def test_a_word_of_a_byte_level_family_has_the_space_before_it_that_it_has_in_a_sentence(tmp_path: Path) -> None:
    """Without it RoBERTa reads every word as the end of another, and says nothing."""
    shutil.copytree(folder("roberta"), tmp_path / "roberta")
    marks = ["<s>", "<pad>", "</s>", "<unk>", "<mask>"]
    vocab = {token: i for i, token in enumerate([*marks, *"0123456789", "w", "Ġ", "Ġw"])}
    for file in (tmp_path / "roberta").glob("tokenizer*"):
        file.unlink()
    RobertaTokenizer(vocab=vocab, merges=[("Ġ", "w")]).save_pretrained(tmp_path / "roberta")
    of = load(str(tmp_path / "roberta"), num_labels=0, adapter=Adapter(rank=2), seed=1, max_length=16, tags=TAGS, between=BETWEEN)
    texts, due, _ = as_texts([["w1", "w20"]], [[1, 2]], TAGS, "train", TAGS)
    ids, segments = of.encode(texts, due)
    assert of.tokenizer.convert_ids_to_tokens(ids[0]) == ["<s>", "Ġw", "1", "Ġw", "2", "0", "</s>"]
    assert segments[0] == [0, 2, 0, 3, 0, 0, 0]


def test_a_length_that_special_tokens_fill_is_refused() -> None:
    with pytest.raises(TagError, match="--max-length 2 leaves no room for a word: 2 tokens are added to each sentence; give more"):
        Tagger(tiny.tokenizer(), TAGS, BETWEEN, 2)
    assert Tagger(tiny.tokenizer(), TAGS, BETWEEN, 3).length == 3
