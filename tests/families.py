"""Tiny random models of the families that Fedloom must be able to call, saved as Hugging Face folders with a word tokenizer."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from pathlib import Path
from tempfile import mkdtemp
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForSequenceClassification, Qwen2Tokenizer

from fedloom.model.adapters import Adapter, Kind
from fedloom.model.base import Model, Precision
from fedloom.model.loading import load
from tests import tiny

WIDE = {"vocab_size": 70, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "pad_token_id": 0}
LONG = {"intermediate_size": 32, "max_position_embeddings": 40, "initializer_range": 0.3}
LLAMA = {**WIDE, **LONG, "num_key_value_heads": 1, "bos_token_id": 2, "eos_token_id": 3}
NONE = {"bos_token_id": 2, "eos_token_id": 3, "cls_token_id": 2, "sep_token_id": 3}
V3: dict[str, Any] = {
    "relative_attention": True,
    "position_buckets": 8,
    "max_relative_positions": -1,
    "pos_att_type": "p2c|c2p",
    "type_vocab_size": 0,
    "share_att_key": True,
    "norm_rel_ebd": "layer_norm",
    "position_biased_input": False,
    "layer_norm_eps": 1e-7,
}
"""What tells microsoft/deberta-v3-base from its predecessor, by its config.json; with fewer buckets, so that short texts fill several."""

CONFIGS: dict[str, Callable[[], Any]] = {
    "bert": lambda: AutoConfig.for_model("bert", **WIDE, **LONG),
    "roberta": lambda: AutoConfig.for_model("roberta", **WIDE, **LONG, type_vocab_size=1),
    "deberta-v2": lambda: AutoConfig.for_model(
        "deberta-v2", **WIDE, **LONG, type_vocab_size=0, relative_attention=True, position_buckets=8, pos_att_type=["p2c", "c2p"]
    ),
    "deberta-v3": lambda: AutoConfig.for_model("deberta-v2", **WIDE, **LONG, **V3),
    "modernbert": lambda: AutoConfig.for_model("modernbert", **WIDE, **LONG, **NONE, local_attention=6, global_attn_every_n_layers=2),
    "gpt2": lambda: AutoConfig.for_model(
        "gpt2", vocab_size=70, n_embd=16, n_layer=2, n_head=2, n_positions=40, pad_token_id=0, initializer_range=0.3
    ),
    "llama": lambda: AutoConfig.for_model("llama", **LLAMA),
    "qwen2": lambda: AutoConfig.for_model("qwen2", **LLAMA),
    "mistral": lambda: AutoConfig.for_model("mistral", **LLAMA, sliding_window=6),
    "bloom": lambda: AutoConfig.for_model(
        "bloom", vocab_size=70, hidden_size=16, n_layer=2, n_head=2, pad_token_id=0, bos_token_id=2, eos_token_id=3, initializer_range=0.3
    ),
}
CAUSAL = {"gpt2", "llama", "qwen2", "mistral", "bloom"}
UNPACKED = {"deberta-v2", "deberta-v3", "bloom"}
"""Families whose attention cannot be replaced, so that they do not run packed."""
APART = [family for family in CONFIGS if family != "mistral"]
"""Those that run by code of their own: Mistral is built as Llama is. DeBERTa-v3 is built as v2, but called for many devices otherwise. For
tests that are dear."""
TARGETS = {"modernbert": ("Wqkv",), "qwen2": ("q_proj", "v_proj")}


@cache
def folder(family: str) -> Path:
    """A saved tiny model of the family, weights random but fixed."""
    path = Path(mkdtemp(prefix=f"tiny-{family}-"))
    torch.manual_seed(11)
    AutoModelForSequenceClassification.from_config(CONFIGS[family]()).save_pretrained(path)
    tiny.tokenizer().save_pretrained(path)
    return path


def qwen_tokenizer() -> Qwen2Tokenizer:
    """Of Qwen2's own kind, which the library makes of any tokenizer beside such a model: bytes, digits by themselves."""
    marks = ["[PAD]", "[UNK]", "[CLS]", "[SEP]"]
    vocab = {token: i for i, token in enumerate([*marks, *"0123456789", "w", "Ġ", "Ġw"])}
    merges: Any = [("Ġ", "w")]
    return Qwen2Tokenizer(vocab=vocab, merges=merges, unk_token="[UNK]", eos_token="[SEP]", pad_token="[PAD]", model_max_length=32)


@cache
def model(family: str, dropout: float = 0.0, precision: Precision = "float32") -> Model:
    """The family's tiny model with rank-2 LoRA."""
    adapter = Adapter(rank=2, alpha=4.0, targets=TARGETS.get(family, ()), dropout=dropout)
    return load(str(folder(family)), num_labels=3, adapter=adapter, seed=1, max_length=16, precision=precision)


@cache
def of_kind(family: str, kind: Kind) -> Model:
    """The family's tiny model with an adapter of this kind, of rank 2."""
    return load(str(folder(family)), num_labels=3, adapter=Adapter(rank=2, kind=kind), seed=1, max_length=16)


def moved(of: Model, seed: int = 0, by: float = 0.2) -> dict[str, torch.Tensor]:
    """The model's trainable tensors somewhere else than at the start: B is no longer zero, so every tensor has a gradient."""
    generator = torch.Generator().manual_seed(seed)
    return {name: t + by * torch.randn(t.shape, generator=generator) for name, t in of.initial.items()}
