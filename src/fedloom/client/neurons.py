"""Local tensors of which a device keeps some rows only: how they lie in its ``private`` and ``memory``, and how they are made whole.

A B (d_out, r) of which all rows but k are zero for ever lies as these rows (k, r); which they are lies beside it in ``memory`` under
``kept/`` and its name, one bit a row. Nothing here knows methods.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import torch

from fedloom.client.client import Client
from fedloom.model.some_rows import whole

KEPT = "kept/"


def keep(c: Client, masks: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Have the device keep of its private tensors only the rows where ``masks`` (0/1, (d_out, 1)) are 1. Returns the masks that this could
    not be done for: a row that is left out and is not zero is a part of the model, and has to be kept although it is not trained."""
    held = {n: mask for n, mask in masks.items() if bool((c.private[n] * (mask == 0)).any())}
    for name in masks.keys() - held.keys():
        c.memory[KEPT + name] = packed(masks[name])
        c.private[name] = c.private[name][masks[name][:, 0] > 0].clone()
    return held


def rows_kept(c: Client) -> dict[str, torch.Tensor]:
    """Of the device's private tensors that are not whole, which rows are there: int64 (k,), ascending."""
    return {n.removeprefix(KEPT): torch.nonzero(unpacked(bits)).flatten() for n, bits in sorted(c.memory.items()) if n.startswith(KEPT)}


def whole_private(c: Client) -> dict[str, torch.Tensor]:
    """The device's private tensors with all their rows."""
    made = dict(c.private)
    for name, rows in rows_kept(c).items():
        made[name] = whole(made[name], rows, len(unpacked(c.memory[KEPT + name])))
    return made


def packed(mask: torch.Tensor) -> torch.Tensor:
    """A mask's bits, eight a byte, uint8. One more bit that is set says where they end."""
    bits = np.append(mask.numpy().reshape(-1) > 0, True)
    return torch.from_numpy(np.packbits(bits))


def unpacked(bits: torch.Tensor) -> torch.Tensor:
    """The mask (d_out,) bool that was packed."""
    flags = np.unpackbits(bits.numpy())
    return torch.from_numpy(flags[: np.flatnonzero(flags)[-1]].astype(bool))
