"""The model that one device would use, made in this process from what its checkpoint holds: without asking an engine."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from fedloom.client.client import Client
from fedloom.client.masks import make_whole
from fedloom.client.sharing import own_layers, own_unheld
from fedloom.client.store import ClientStore
from fedloom.messages import Task, Tensors, Work
from fedloom.methods.method import Predictor
from fedloom.run.world import World
from fedloom.tensors import without


def personal(world: World, store: ClientStore, client: int, shared: Tensors, facts: Mapping[str, Any]) -> Predictor:
    """The model of device ``client``, given the ``shared`` tensors as they reach it, and the state's ``facts``. Changes neither the device
    nor the store."""
    device = world.device(client)
    device.private, device.memory = store.load(client)
    make_whole(device)
    work, answer = _made(world, device, shared, world.experiment.share.layers(facts)), None
    try:
        while True:
            asked = work.send(answer)
            done = world.compute.run(asked if isinstance(asked, list) else [asked])
            answer = [d.result for d in done] if isinstance(asked, list) else done[0].result
    except StopIteration as finished:
        return finished.value


def _made(world: World, device: Client, shared: Tensors, layers: Sequence[int] | None) -> Work[Predictor]:
    own = {} if layers is None else (yield from own_layers(device, shared, layers))
    device.private = without(device.private, own)
    return (yield from own_unheld(world.experiment.method.personalise(device, {**own, **shared} if own else shared), own))


def as_sent(world: World, shared: Tensors) -> Tensors:
    """The shared tensors as they reach a device: where the wire loses something, without it."""
    encoding = world.experiment.encoding
    return encoding.arrived(encoding.down(Task("predict", 0, shared))).tensors
