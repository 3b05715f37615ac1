"""A tiny random world for tests: a BERT of a few thousand weights with a word tokenizer, and seeded sentences whose label is learnable."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from tempfile import mkdtemp

import numpy as np
import torch
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import BertConfig, BertForSequenceClassification, PreTrainedTokenizerFast

from fedloom.client.client import Client
from fedloom.data.examples import Examples
from fedloom.model.adapters import Adapter, Kind, Start
from fedloom.model.base import Model, Precision
from fedloom.model.loading import load

WORDS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]"] + [f"w{i}" for i in range(60)]


def tokenizer() -> PreTrainedTokenizerFast:
    """One token a word, [CLS] … [SEP]."""
    words = Tokenizer(models.WordLevel({w: i for i, w in enumerate(WORDS)}, unk_token="[UNK]"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    words.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", pair="[CLS] $A [SEP] $B:1 [SEP]:1", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=words, pad_token="[PAD]", unk_token="[UNK]", cls_token="[CLS]", sep_token="[SEP]", model_max_length=32
    )


@cache
def folder(layers: int = 3, hidden: int = 16) -> Path:
    """A saved tiny BERT with its tokenizer."""
    path = Path(mkdtemp(prefix="tiny-bert-"))
    torch.manual_seed(7)
    config = BertConfig(
        vocab_size=len(WORDS),
        hidden_size=hidden,
        num_hidden_layers=layers,
        num_attention_heads=2,
        intermediate_size=2 * hidden,
        max_position_embeddings=32,
        pad_token_id=0,
        initializer_range=0.3,
    )
    BertForSequenceClassification(config).save_pretrained(path)
    tokenizer().save_pretrained(path)
    return path


def model(
    precision: Precision = "float32",
    dropout: float = 0.0,
    labels: int = 3,
    layers: int = 3,
    start: Start = "zero",
    kind: Kind = "lora",
    rank: int = 2,
) -> Model:
    """The tiny model with rank-2 LoRA (alpha 4: s = 2) on query and value, or another kind of adapter."""
    adapter = Adapter(rank=rank, alpha=4.0, dropout=dropout, start=start, kind=kind)
    return load(str(folder(layers)), num_labels=labels, adapter=adapter, seed=1, max_length=16, precision=precision)


def examples(count: int, seed: int = 0, labels: int = 3) -> Examples:
    """Sentences of 1 to 9 words; the label is decided by the first word."""
    rng = np.random.default_rng(seed)
    ids = [[2, *rng.integers(4, len(WORDS), size=rng.integers(1, 10)).tolist(), 3] for _ in range(count)]
    return Examples.of(ids, [text[1] % labels for text in ids])


def clients(sizes: tuple[int, ...] = (5, 9, 12, 7), seed: int = 3) -> dict[int, Client]:
    """Devices with these numbers of training examples, and a few held-out ones."""
    return {
        k: Client(k, examples(n, seed=10 + k), examples(2, seed=100 + k), examples(3, seed=200 + k), seed, classes=3)
        for k, n in enumerate(sizes)
    }
