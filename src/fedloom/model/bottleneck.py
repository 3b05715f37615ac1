"""Bottleneck adapters: small networks behind the output projections of a layer's parts.

    y = W h  becomes  y + W_up gelu(W_down y + b_down) + b_up          W_down (r, d), W_up (d, r)

before dropout, the skip connection and the layer norm. W_up and b_up start at zero, so the start is the pre-trained function.
``houlsby`` (1902.00751) puts one behind attention and one behind the feed-forward part of every layer, ``pfeiffer`` (2005.00247) one
behind the feed-forward part. Deviations: the layer norms stay frozen (Houlsby trains them too); Pfeiffer's stands behind the
projection, where it stands behind the layer norm that follows.
"""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import nn

from fedloom.model.blocks import layer_of

Placing = Literal["houlsby", "pfeiffer"]

PLACES = (
    ("attention.output.dense", "output.dense"),
    ("attn.Wo", "mlp.Wo"),
    ("self_attn.o_proj", "mlp.down_proj"),
    ("attn.c_proj", "mlp.c_proj"),
    ("self_attention.dense", "mlp.dense_4h_to_h"),
)
"""Ends of the names of (attention's, the feed-forward part's) output projection, as architectures call them."""


class Bottleneck(nn.Module):
    """A projection to (…, d) and the small network behind it."""

    def __init__(self, projection: nn.Module, rank: int) -> None:
        nn.Module.__init__(self)
        self.projection = projection
        weight: Any = projection.weight
        width = int(vars(projection).get("nf", weight.shape[0]))  # GPT-2's projections say it so, their weights being transposed
        self.down, self.up = nn.Linear(width, rank), nn.Linear(rank, width)
        nn.init.zeros_(self.up.weight)
        nn.init.zeros_(self.up.bias)

    def forward(self, h: torch.Tensor) -> torch.Tensor:
        """y + W_up gelu(W_down y + b_down) + b_up."""
        y = self.projection(h)
        return y + self.up(nn.functional.gelu(self.down(y)))


def insert(base: nn.Module, placing: Placing, rank: int) -> None:
    """Put bottlenecks into ``base``, in place.

    Raises:
        LookupError: the architecture's projections are called otherwise; the message says how they could be.
    """
    inside = [name for name, _ in base.named_modules() if layer_of(f"{name}.") is not None]
    for attention, feed_forward in PLACES:
        behind = {
            "attention": [n for n in inside if n.endswith(f".{attention}")],
            "feed-forward": [n for n in inside if n.endswith(f".{feed_forward}") and not n.endswith(f".{attention}")],
        }
        if all(behind.values()):
            break
    else:
        raise LookupError(
            f"{type(base).__name__} calls the output projections of its layers otherwise than {'; '.join(', '.join(p) for p in PLACES)}"
        )
    for name in [*(behind["attention"] if placing == "houlsby" else []), *behind["feed-forward"]]:
        parent, _, last = name.rpartition(".")
        setattr(base.get_submodule(parent), last, Bottleneck(base.get_submodule(name), rank))
