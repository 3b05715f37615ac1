"""Which part of a transformer a tensor belongs to, read from its name. Pure functions: both sides of the wire agree on them."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable
from itertools import chain
from typing import Literal, NamedTuple, get_args

LAYER = re.compile(r"\.(\d+)\.")
ATTENTION = re.compile(r"(attn|attention)$")
EMBEDDING = re.compile(r"(embed|^wte$|^wpe$)")
NORM = re.compile(r"(norm|^ln_f$)", re.IGNORECASE)

Parts = Literal["layers", "halves"]
"""What a block is: a transformer layer, or the attention of one and the rest of it as two."""

End = Literal["embeddings", "norm", "output"]
"""What may be a block besides: the embeddings before the layers; behind them the last norm; and what else is there (a language model's
output, a pooler)."""


class Block(NamedTuple):
    """Tensors that are trained together. ``names`` are sorted."""

    label: str
    names: tuple[str, ...]

    @property
    def layer(self) -> int | None:
        """The transformer layer that it is, or is a part of; None of what lies before or behind them."""
        return layer_of(self.names[0])


def layer_of(name: str) -> int | None:
    """The number of the transformer layer that a tensor belongs to: the first whole-number part of its name. None: no layer.

    ``layers.1.`` and ``layers.10.`` are different layers; nothing is matched by prefix.
    """
    found = LAYER.search(name)
    return int(found[1]) if found else None


def layers(names: Collection[str]) -> dict[int, list[str]]:
    """Layer number -> its tensor names (sorted), ascending; tensors of no layer (the head) are left out."""
    groups: dict[int, list[str]] = {}
    for name in sorted(names):
        layer = layer_of(name)
        if layer is not None:
            groups.setdefault(layer, []).append(name)
    return dict(sorted(groups.items()))


def in_attention(name: str) -> bool:
    """Whether a tensor lies in a layer's attention module (a norm beside it does not)."""
    return any(ATTENTION.search(part) for part in name.split(".")[:-1])


def cover(names: Collection[str], parts: Parts = "layers", ends: Collection[End] = (), head: Collection[str] = ()) -> list[Block]:
    """The model cut into blocks from the input to the output, no tensor in two of them.

    ``ends``: what of that which is no layer makes a block, each its own; the others are in none. Tensors of the ``head`` are never in one.
    """
    blocks: list[Block] = []
    for number, of_layer in layers([n for n in names if n not in head]).items():
        if parts == "layers":
            blocks.append(Block(f"layer {number}", tuple(of_layer)))
        else:
            blocks += _some(f"layer {number}, attention", filter(in_attention, of_layer))
            blocks += _some(f"layer {number}, rest", (n for n in of_layer if not in_attention(n)))
    outside: dict[End, list[str]] = {"embeddings": [], "norm": [], "output": []}
    for name in sorted(names):
        if layer_of(name) is None and name not in head:
            outside[end_of(name)].append(name)
    before, *behind = ([] if end not in ends else _some(end, of) for end, of in outside.items())
    return [*before, *blocks, *chain.from_iterable(behind)]


def ends_of(names: Iterable[str]) -> list[End]:
    """The ends that a model with these tensors (the head's not among them) has, from the input to the output."""
    found = {end_of(name) for name in names if layer_of(name) is None}
    return [end for end in get_args(End) if end in found]


def end_of(name: str) -> End:
    """Which end of the model a tensor of no layer belongs to."""
    parts = name.split(".")
    if any(EMBEDDING.search(part) for part in parts):
        return "embeddings"  # and so do norms among them
    return "norm" if NORM.search(parts[-2] if len(parts) > 1 else name) else "output"


def _some(label: str, names: Iterable[str]) -> list[Block]:
    """The block, unless it is empty."""
    found = tuple(names)
    return [Block(label, found)] if found else []
