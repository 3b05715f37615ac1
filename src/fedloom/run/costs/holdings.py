"""What devices hold at the end of a run, measured: their files, their tensors, their optimiser's state, what a step costs; and what it
would be if every row of every tensor were there (a method may leave rows out, ``client/neurons.py``).
"""

from __future__ import annotations

from statistics import mean
from typing import Any

import numpy as np

from fedloom.client.elsewhere import Store
from fedloom.client.neurons import rows_kept
from fedloom.client.store import ClientStore
from fedloom.compute.flops import Flops
from fedloom.run.world import World
from fedloom.tensors import nbytes

MOST = 256
"""Devices that are looked at; of more, evenly spaced ones."""


def held(world: World, store: Store) -> dict[str, Any] | None:
    """Means over the devices that hold anything, in bytes: ``private_bytes`` (tensors that stay there), ``memory_bytes`` (what else they
    remember), ``file_bytes`` (both on disk), ``optimizer_bytes`` (AdamW's state in their last participation, over those that told it, else
    None), ``step_flops`` (one example of the device's mean length, forth and back, of all that the model trains, also where a method trains
    a part at a time). Each ``…_whole`` is the same with all rows. None if no device holds anything. ``devices``: how many were looked at
    and hold something.
    """
    if not isinstance(store, ClientStore):  # only they themselves can look
        return None
    model, flops = world.model, Flops(world.model)
    ids = np.unique(np.linspace(0, len(world.pool.clients) - 1, min(len(world.pool.clients), MOST)).round().astype(int))
    found: list[dict[str, float]] = []
    for k in (world.pool.clients[i] for i in ids):
        device = world.device(k)
        device.private, device.memory = store.load(k)
        if not device.private and not device.memory:
            continue
        rows = rows_kept(device)
        own = nbytes(device.private)
        whole = own + sum(nbytes({n: model.initial[n]}) - nbytes({n: device.private[n]}) for n in rows)
        names, length = frozenset(model.initial), float(np.mean(device.train.lengths))
        one: dict[str, float] = {"private_bytes": own, "private_bytes_whole": whole}
        one |= {"memory_bytes": nbytes(device.memory), "file_bytes": store.size(k)}
        rank = int(device.memory["rank"]) if "rank" in device.memory else 0
        one["step_flops"] = float(flops.step(names, length, {n: len(at) for n, at in rows.items()}, rank=rank))  # type: ignore[arg-type]
        one["step_flops_whole"] = float(flops.step(names, length))  # type: ignore[arg-type]
        if "optimizer_bytes" in device.memory:
            one["optimizer_bytes"] = int(device.memory["optimizer_bytes"])
            of_all = device.memory.get("optimizer_bytes_whole")
            one["optimizer_bytes_whole"] = one["optimizer_bytes"] + 2 * (whole - own) if of_all is None else int(of_all)
        found.append(one)
    keys = ("private_bytes", "private_bytes_whole", "memory_bytes", "file_bytes", "optimizer_bytes", "optimizer_bytes_whole")
    keys += ("step_flops", "step_flops_whole")
    told = {key: [one[key] for one in found if key in one] for key in keys}
    return {"devices": len(found), **{key: mean(values) if values else None for key, values in told.items()}} if found else None
