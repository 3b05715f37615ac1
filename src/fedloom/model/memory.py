"""How many bytes training a model from some layer on takes on a device: a stated formula, not a measurement.

A model is cut into parts from the input to the output: what lies before the layers (embeddings), layers 0..D−1, and the end: what lies
behind the layers, and the head. Of these the end and the last ℓ others are trained, and everything before is frozen. With P the model's
parameters, b the bytes of a number in training's precision, T_ℓ the numbers trained, B examples a step and L tokens a text:

    weights      b·P, and 4·T_ℓ for the float32 that is trained where b < 4; of what is held in few bits (``quantised.py``) 65/64
                 bytes a number (int8) or 9/16 (nf4) instead of b
    gradients    4·T_ℓ
    optimiser    8·T_ℓ                                        AdamW's two moments
    activations  B·L·(a·max(1, min(ℓ, D)) + w)                a, w: of one token, for a layer and for a language model's words
                 B·L·(a + h·min(ℓ, D) + w)                    where layers are computed again in the backward pass; h: between two

Below the first trained layer nothing is kept for a backward pass: one layer's activations are there at a time, which the 1 stands for.
Computed again (``recomputed.py``), a layer keeps its input, a float32 vector of the hidden size, and one layer's inside is there at a time.
a is an estimate from above of what a layer keeps in float32 (:func:`token_bytes`); kernels that keep no attention maps need less. Not
counted: the program, its libraries, the data.

This module does not know who has how much memory.
"""

from __future__ import annotations

from collections.abc import Collection
from typing import NamedTuple, get_args

from fedloom.model.base import Model
from fedloom.model.blocks import End, cover, layer_of
from fedloom.model.names import is_head
from fedloom.model.quantised import Base, numbers, size_of

MOMENTS = 2
"""Numbers that AdamW keeps of each that it trains."""


class Needs(NamedTuple):
    """Bytes by what they are for, when the end and the last ``layers`` parts before it are trained."""

    layers: int
    weights: int
    gradients: int
    optimizer: int
    activations: int

    @property
    def total(self) -> int:
        """All of it."""
        return self.weights + self.gradients + self.optimizer + self.activations


def parts(names: Collection[str]) -> tuple[list[tuple[str, ...]], tuple[str, ...]]:
    """Of tensors with these names, the parts from the input to the output that have any, and the end. Every name is in exactly one."""
    head = tuple(sorted(filter(is_head, names)))
    blocks = [block.names for block in cover(names, "layers", get_args(End), head)]
    last = max((at for at, block in enumerate(blocks) if layer_of(block[0]) is not None), default=-1)
    return blocks[: last + 1], tuple(n for block in blocks[last + 1 :] for n in block) + head


def output_side(names: Collection[str], layers: int) -> list[str]:
    """The names of the end and of the last ``layers`` parts before it, sorted.

    Raises:
        ValueError: there are not so many parts.
    """
    before, end = parts(names)
    if not 0 <= layers <= len(before):
        raise ValueError(f"{layers} layers are to be trained, and the tensors make {len(before)} before the end; 0 to {len(before)} can be")
    return sorted([*end, *(n for part in before[len(before) - layers :] for n in part)])


def needs(model: Model, batch_size: int, recomputed: bool = False) -> list[Needs]:
    """What it takes to train the end alone, the end and the last part before it, and so on to everything, with steps of ``batch_size``
    texts of the model's greatest length. ``recomputed``: where layers are computed again. A method that chooses by it leaves that out,
    whatever the model does: it says how, and what is chosen is part of what."""
    before, _ = parts(model.initial)
    own, number = numbers(model.module), model.dtype.itemsize
    tokens, made = batch_size * model.max_length, []
    for layers in range(len(before) + 1):
        trained = sum(model.initial[n].numel() for n in output_side(model.initial, layers))
        made.append(Needs(layers, *resident(own, trained, number, model.few, model.base_in), tokens * kept(model, layers, recomputed)))
    return made


def texts_that_fit(one: Needs, memory: float) -> int:
    """How many texts of the greatest length a step can have in ``memory`` bytes: the most whose activations fit beside weights, gradients
    and moments, and 1 where not even one does. ``one``: what training on one takes."""
    return max(1, int((memory - (one.total - one.activations)) // one.activations))


def resident(parameters: int, trained: int, number: int, few: int = 0, base: Base = "exact") -> tuple[int, int, int]:
    """Bytes of the weights, of their gradients and of AdamW's moments, where so many of the ``parameters`` are trained at a time and
    ``number`` is what one of the others takes: b·P (and 4·T where b < 4), 4·T, 8·T. ``few`` of them are held as ``base`` says."""
    return held(parameters, number, few, base) + (4 * trained if number < 4 else 0), 4 * trained, 4 * MOMENTS * trained


def held(parameters: int, number: int, few: int = 0, base: Base = "exact") -> int:
    """Bytes of so many parameters, ``few`` of them held as ``base`` says and ``number`` what one of the others takes."""
    return number * (parameters - few) + size_of(few, base)


def fitting(totals: Collection[int], memory: float) -> int | None:
    """How many parts before the end can be trained in ``memory`` bytes: the most whose total is no more; None if not even the end.
    ``totals``: for 0, 1, … parts."""
    return max((layers for layers, total in enumerate(totals) if total <= memory), default=None)


def kept(model: Model, layers: int, recomputed: bool) -> int:
    """Bytes that a forward and backward pass keeps alive for one token where a gradient passes the last ``layers`` parts before the end, by
    the formula above."""
    inside, between, words = token_bytes(model)
    passed = min(layers, model.depth)
    return (inside + between * passed if recomputed else inside * max(1, passed)) + words


class PerToken(NamedTuple):
    """Bytes of one token, roughly and in float32: inside a layer, between two layers, and of a language model's words."""

    inside: int
    between: int
    words: int


def token_bytes(model: Model) -> PerToken:
    """What a forward and backward pass keeps alive for one token: of a layer 16 vectors of the hidden size, three of the feed-forward size
    and three attention maps a head over a text of the greatest length; and, of a speaker, three rows of the vocabulary. An upper
    estimate."""
    c = model.config.to_dict()
    hidden = int(c.get("hidden_size") or c.get("n_embd") or c.get("dim") or 1024)
    inner = int(c.get("intermediate_size") or c.get("n_inner") or 4 * hidden)
    heads = int(c.get("num_attention_heads") or c.get("n_head") or 16)
    words = 0 if model.speaker is None else 3 * int(c["vocab_size"])
    return PerToken(4 * (16 * hidden + 3 * inner + 3 * heads * model.max_length), 4 * hidden, 4 * words)
