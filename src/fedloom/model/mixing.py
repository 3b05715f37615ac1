"""Two LoRAs on one weight, and a mixer that weighs them by what comes in (FedALT, 2503.11880).

    y = W x + s·(α_1(x)·B_own A_own x + α_2(x)·B_rest A_rest x),   α(x) = softmax(G x)        A (r, d_in), B (d_out, r), G (2, d_in)

for every token x by itself. Both B's start at zero, so the start is the pre-trained function; A's and G start as PEFT's A does. Dropout is
on what the A's read, one mask for both, and not on what the mixer reads. Each tensor is a linear layer's weight, and so runs packed.

Which of them is trained is not this file's to say.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable
from typing import Any

import torch
from torch import nn

OWN, REST, GATE = (".own_A.", ".own_B."), (".rest_A.", ".rest_B."), ".gate."
"""What the names of the factors hold, and those of the mixers."""


class Mixed(nn.Module):
    """A linear layer with two LoRAs of rank r, scaled by s, and their mixer."""

    def __init__(self, layer: nn.Module, rank: int, scaling: float, dropout: float) -> None:
        nn.Module.__init__(self)
        weight: Any = layer.weight
        transposed = "nf" in vars(layer)  # GPT-2's projections
        d_in, d_out = weight.shape if transposed else weight.shape[::-1]
        self.base_layer, self.scaling = layer, scaling
        self.own_A, self.rest_A = nn.Linear(d_in, rank, bias=False), nn.Linear(d_in, rank, bias=False)
        self.own_B, self.rest_B = nn.Linear(rank, d_out, bias=False), nn.Linear(rank, d_out, bias=False)
        self.gate = nn.Linear(d_in, 2, bias=False)
        for part in (self.own_A, self.rest_A, self.gate):
            nn.init.kaiming_uniform_(part.weight, a=math.sqrt(5))
        for part in (self.own_B, self.rest_B):
            nn.init.zeros_(part.weight)
        self.dropout = nn.Dropout(dropout) if dropout else nn.Identity()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """W x + s·(α_1·B_own A_own x + α_2·B_rest A_rest x)."""
        alpha = nn.functional.softmax(self.gate(x).float(), -1).to(x.dtype)
        read = self.dropout(x)
        own, rest = self.own_B(self.own_A(read)), self.rest_B(self.rest_A(read))
        return self.base_layer(x) + self.scaling * (alpha[..., :1] * own + alpha[..., 1:] * rest)


def insert(base: nn.Module, places: Iterable[str], rank: int, scaling: float, dropout: float) -> None:
    """Put two LoRAs and a mixer on the linear layers of ``base`` that are called so, in place."""
    for name in places:
        parent, _, last = name.rpartition(".")
        setattr(base.get_submodule(parent), last, Mixed(base.get_submodule(name), rank, scaling, dropout))


def is_own(name: str) -> bool:
    """Whether a saved name is a factor of the first LoRA."""
    return any(part in name for part in OWN)


def is_rest(name: str) -> bool:
    """Whether a saved name is a factor of the second LoRA."""
    return any(part in name for part in REST)


def as_rest(name: str) -> str:
    """The second LoRA's factor for the first one's.

    Raises:
        ValueError: the name is no factor of the first.
    """
    if not is_own(name):
        raise ValueError(f"'{name}' is no factor of a device's own LoRA; these hold {' or '.join(OWN)}")
    return name.replace(OWN[0], REST[0]).replace(OWN[1], REST[1])


def need_mixers(names: Collection[str], who: str) -> None:
    """For methods that train one of two LoRAs and a mixer.

    Raises:
        ValueError: there are none among ``names``.
    """
    if not any(is_own(name) for name in names):
        raise ValueError(
            f"'{who}' works on two LoRAs and their mixer, and this model has none, but {sorted(names)[:2]} …; give it --adapter.kind mixed"
        )
