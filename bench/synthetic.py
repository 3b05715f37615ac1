"""What a figure needs that need not be real: a small BERT with random weights, and texts of random words with a learnable label.

python -m bench.synthetic FOLDER --rows 24000         FOLDER/model and FOLDER/data
"""

from __future__ import annotations

import argparse
import csv
import random
from pathlib import Path

WORDS = [f"w{i}" for i in range(400)]
SPECIAL = ["[PAD]", "[UNK]", "[CLS]", "[SEP]"]
CLASSES = 4
HELD_OUT = 2000


def tokenizer_into(folder: Path, words: list[str] = WORDS) -> None:
    """A tokenizer with one token a word, ``[CLS] … [SEP]``, that transformers loads."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    made = Tokenizer(models.WordLevel({word: i for i, word in enumerate([*SPECIAL, *words])}, unk_token="[UNK]"))
    made.pre_tokenizer = pre_tokenizers.WhitespaceSplit()  # type: ignore[assignment]
    made.post_processor = processors.TemplateProcessing(  # type: ignore[assignment]
        single="[CLS] $A [SEP]", pair="[CLS] $A [SEP] $B:1 [SEP]:1", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    named = {"pad_token": "[PAD]", "unk_token": "[UNK]", "cls_token": "[CLS]", "sep_token": "[SEP]"}
    PreTrainedTokenizerFast(tokenizer_object=made, model_max_length=128, **named).save_pretrained(folder)


def bert_into(folder: Path, *, hidden: int = 64, layers: int = 2) -> Path:
    """A BERT of ``layers`` layers of size ``hidden``, weights random but fixed, with its tokenizer."""
    import torch
    from transformers import BertConfig, BertForSequenceClassification
    from transformers.utils import logging

    logging.disable_progress_bar()
    config = BertConfig(
        vocab_size=len(SPECIAL) + len(WORDS),
        hidden_size=hidden,
        num_hidden_layers=layers,
        num_attention_heads=4,
        intermediate_size=2 * hidden,
        max_position_embeddings=128,
        pad_token_id=0,
        initializer_range=0.2,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(7)
        BertForSequenceClassification(config).save_pretrained(folder)
    tokenizer_into(folder)
    return folder


def texts_into(folder: Path, rows: int, held_out: int = HELD_OUT, seed: int = 7) -> Path:
    """``train.csv`` of ``rows`` rows, two more of ``held_out``: 3 to 9 random words, labelled by the first."""
    folder.mkdir(parents=True, exist_ok=True)
    draw = random.Random(seed)
    for split, count in (("train", rows), ("validation", held_out), ("test", held_out)):
        with (folder / f"{split}.csv").open("w", newline="") as file:
            table = csv.writer(file)
            table.writerow(["text", "label"])
            for _ in range(count):
                words = draw.choices(range(len(WORDS)), k=draw.randint(3, 9))
                table.writerow([" ".join(WORDS[w] for w in words), f"class{words[0] % CLASSES}"])
    return folder


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--rows", type=int, default=24000)
    parser.add_argument("--held-out", type=int, default=HELD_OUT)
    given = parser.parse_args()
    bert_into(given.folder / "model")
    texts_into(given.folder / "data", given.rows, given.held_out)
