"""Tensors of which a device trains or keeps some rows only: which, how they lie in its ``private`` and ``memory``, and how they are made
whole.

A B (d_out, r) of which all rows but k are zero for ever lies as these rows (k, r); which they are lies beside it in ``memory`` under
``kept/`` and its name, one bit a row. Nothing here knows methods.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch

from fedloom.client.client import Client
from fedloom.model.blocks import layer_of, layers
from fedloom.model.names import partner
from fedloom.model.some_rows import whole
from fedloom.tensors import packed, rounded_up, unpacked

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


def neuron_masks(fisher: Mapping[str, torch.Tensor], keep: float) -> dict[str, torch.Tensor]:
    """0/1 masks (d_out, 1) for every B among the local layers' Fisher: in each layer the ``ceil(keep · neurons)`` highest-scoring output
    neurons of all its pairs together, one at least (equal scores: the earlier name and row first); pairs of no layer are one more. A row's
    score is its own Fisher and, of an A that is trained too, the d_out-th part.

    Raises:
        ValueError: ``keep`` is not in (0, 1].
    """
    if not 0 < keep <= 1:
        raise ValueError(f"keep must be in (0, 1]; got {keep}")
    masks: dict[str, torch.Tensor] = {}
    for names in [*layers(fisher.keys()).values(), sorted(n for n in fisher if layer_of(n) is None)]:
        ups = [name for name in names if ".lora_B." in name]
        shares = [fisher[partner(b)].double().sum() / len(fisher[b]) if partner(b) in fisher else 0.0 for b in ups]
        if not ups:
            continue
        rows = [fisher[b].double().sum(1) + share for b, share in zip(ups, shares, strict=True)]
        scores = torch.cat(rows)
        kept = torch.zeros_like(scores)
        kept[torch.argsort(-scores, stable=True)[: max(1, rounded_up(keep, len(scores)))]] = 1
        for name, part in zip(ups, kept.split([len(r) for r in rows]), strict=True):
            masks[name] = part.float()[:, None]
    return masks
