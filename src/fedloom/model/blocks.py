"""Which transformer layer a tensor belongs to, read from its name. Pure functions: both sides of the wire agree on them."""

from __future__ import annotations

import re
from collections.abc import Collection

LAYER = re.compile(r"\.(\d+)\.")


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
