"""Words and answers in pieces of real tokenizers, trained here: WordPiece, byte-level BPE and Unigram, against a walk over the pieces.

The walk reads the spelling of the pieces ("##ing", "Ġnew", "▁new") and the text, and knows nothing of what tokenizers tell of places.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import pytest
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from fedloom.data.questions import with_place
from fedloom.model.spans import BEGIN, CONTEXT, END, TORN, Finder
from fedloom.model.tags import Tagger

SPECIAL = ["[PAD]", "[UNK]", "[CLS]", "[SEP]"]
TEXTS = [
    "the old harbour of New York was rebuilt in 1921 by harbour workers",
    "newer workers worked in the oldest rebuilding of the café",
    "who rebuilt the harbour and when was the harbour rebuilt ?",
    "it's an U.S.-based company , said the worker of the year",
] * 3
SENTENCES = ["New Yorkers rebuild U.S.-based cafés", "the harbourworkers of 1921", "who works , café ?"]
KINDS = ("wordpiece", "bytes", "unigram")


@cache
def tokenizer(kind: str) -> Any:
    """A tokenizer of a few dozen pieces over the texts, with [CLS] … [SEP] … [SEP] around them."""
    size = {"special_tokens": SPECIAL, "show_progress": False}
    if kind == "wordpiece":
        made = Tokenizer(models.WordPiece(unk_token="[UNK]"))
        made.normalizer = normalizers.BertNormalizer(strip_accents=False)
        made.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
        trainer: Any = trainers.WordPieceTrainer(vocab_size=90, **size)
    elif kind == "bytes":
        made = Tokenizer(models.BPE())
        made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
        made.decoder = decoders.ByteLevel()
        trainer = trainers.BpeTrainer(vocab_size=310, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), **size)
    else:
        made = Tokenizer(models.Unigram())
        made.pre_tokenizer = pre_tokenizers.Metaspace()
        trainer = trainers.UnigramTrainer(vocab_size=70, unk_token="[UNK]", **size)
    made.train_from_iterator(TEXTS, trainer)
    made.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", pair="[CLS] $A [SEP] $B:1 [SEP]:1", special_tokens=[(t, made.token_to_id(t)) for t in SPECIAL[2:]]
    )
    names = dict(zip(("pad_token", "unk_token", "cls_token", "sep_token"), SPECIAL, strict=True))
    return PreTrainedTokenizerFast(tokenizer_object=made, add_prefix_space=True, **names)


def walk(kind: str, pieces: list[str], text: str) -> list[tuple[int, int]]:
    """The units [begin, end) of the text that every piece spells, without the space before a word; of bytes, for byte-level pieces."""
    marker, of = {"wordpiece": ("##", text.lower()), "bytes": ("Ġ", text), "unigram": ("▁", text)}[kind]
    units = of.encode() if kind == "bytes" else of
    space = b" " if kind == "bytes" else " "
    spelt, at = [], 0
    for piece in pieces:
        bare = piece.removeprefix(marker)
        if units[at : at + 1] == space:
            at += 1
        length = 1 if piece == "[UNK]" else len(bare)
        spelt.append((at, at + length))
        at += length
    assert at == len(units), f"{pieces} do not spell {text!r}"
    return spelt


def place(kind: str, text: str, character: int) -> int:
    return len(text[:character].encode()) if kind == "bytes" else character


@pytest.mark.parametrize("kind", KINDS)
def test_a_words_tag_is_due_at_its_first_piece_and_nowhere_else(kind: str) -> None:
    tagger = Tagger(tokenizer(kind), ("O", "B-a", "I-a"), " ", 64)
    tags = [[(i + j) % 3 for j, _ in enumerate(sentence.split())] for i, sentence in enumerate(SENTENCES)]
    ids, segments = tagger.encode(SENTENCES, [" ".join(map(str, mine)) for mine in tags])
    several = 0
    for sentence, due, row, said in zip(SENTENCES, tags, ids, segments, strict=True):
        begins = [place(kind, sentence, len(" ".join(sentence.split()[:i])) + (i > 0)) for i in range(len(due))]
        spelt = walk(kind, tokenizer(kind).convert_ids_to_tokens(row[1:-1]), sentence)
        first = [next(i for i, (begin, _) in enumerate(spelt) if begin == at) for at in begins]
        wanted = [0] * len(row)
        for i, tag in zip(first, due, strict=True):
            wanted[1 + i] = tag + 1
        assert said == wanted
        several += len(spelt) - len(due)
    assert several > 10, "words of several pieces are what this is about"


ANSWERS = ["New York", "1921", "U.S.-based", "café", "harbourworkers of", "worker"]
CONTEXT_OF = "The café of New York , a U.S.-based one , was rebuilt by harbourworkers of 1921 and another worker"


@pytest.mark.parametrize("answer", ANSWERS)
@pytest.mark.parametrize("kind", KINDS)
def test_an_answers_characters_are_the_pieces_that_spell_them(kind: str, answer: str) -> None:
    """Whole pieces: the one that spells the answer's first character to the one that spells its last."""
    finder, begin = Finder(tokenizer(kind), 128), CONTEXT_OF.rindex(answer)
    end = begin + len(answer)
    (ids,), (said,) = finder.encode(["who rebuilt the harbour ?"], [with_place(CONTEXT_OF, (begin, end))])
    inside = [i for i, bits in enumerate(said) if bits & CONTEXT]
    spelt = walk(kind, tokenizer(kind).convert_ids_to_tokens([ids[i] for i in inside]), CONTEXT_OF)
    low, high = place(kind, CONTEXT_OF, begin), place(kind, CONTEXT_OF, end) - 1
    first = next(i for i, (a, b) in zip(inside, spelt, strict=True) if a <= low < b)
    last = next(i for i, (a, b) in zip(inside, spelt, strict=True) if a <= high < b)
    assert [i for i, bits in enumerate(said) if bits & BEGIN] == [first]
    assert [i for i, bits in enumerate(said) if bits & END] == [last]


@pytest.mark.parametrize(
    ("context", "answer", "words"),
    [
        ("so said Zoe\u0301", "Zoe\u0301", ["zoe"]),
        ("so said ada\u00ad", "ada\u00ad", ["ada"]),
        ("so said ada zoe\u00ad", "ada zoe\u00ad", ["ada", "zoe"]),
        ("\u200bada said so", "\u200bada", ["ada"]),
        ("\u00ad\u200bada said so zoe\u0301", "\u00ad\u200bada said so zoe\u0301", ["ada", "said", "so", "zoe"]),
        ("so Zoe\u0301 said", "Zoe\u0301", ["zoe"]),
        ("so said\u00ad", "\u00ad", []),
    ],
)
def test_an_answer_goes_as_far_as_its_tokens(context: str, answer: str, words: list[str]) -> None:
    """At the edge of a context as within it: characters that the tokenizer drops are not looked for. Where it drops all, nothing is due."""
    names = [*SPECIAL, "so", "said", "ada", "zoe"]
    made = Tokenizer(models.WordLevel({word: i for i, word in enumerate(names)}, unk_token="[UNK]"))
    made.normalizer = normalizers.BertNormalizer()
    made.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    made.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", pair="[CLS] $A [SEP] $B:1 [SEP]:1", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    finder = Finder(PreTrainedTokenizerFast(tokenizer_object=made, pad_token="[PAD]", unk_token="[UNK]"), 16)
    begin = context.index(answer)
    (ids,), (segments,) = finder.encode(["ada"], [with_place(context, (begin, begin + len(answer)))])
    marked = [i for bit in (BEGIN, END) for i, segment in enumerate(segments) if segment & bit]
    assert bool(segments[0] & TORN) == (not words)
    assert [names[i] for i in ids[marked[0] : marked[1] + 1]] == words if words else not marked
