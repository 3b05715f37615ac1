"""The model that one device would use, made in this process from what its checkpoint holds: without asking an engine."""

from __future__ import annotations

from fedloom.client.masks import make_whole
from fedloom.client.store import ClientStore
from fedloom.messages import Task, Tensors
from fedloom.methods.method import Predictor
from fedloom.run.world import World


def personal(world: World, store: ClientStore, client: int, shared: Tensors) -> Predictor:
    """The model of device ``client``, given the ``shared`` tensors as they reach it. Changes neither the device nor the store."""
    device = world.device(client)
    device.private, device.memory = store.load(client)
    make_whole(device)
    work, answer = world.experiment.method.personalise(device, shared), None
    try:
        while True:
            asked = work.send(answer)
            done = world.compute.run(asked if isinstance(asked, list) else [asked])
            answer = [d.result for d in done] if isinstance(asked, list) else done[0].result
    except StopIteration as finished:
        return finished.value


def as_sent(world: World, shared: Tensors) -> Tensors:
    """The shared tensors as they reach a device: where the wire loses something, without it."""
    encoding = world.experiment.encoding
    return encoding.arrived(encoding.down(Task("predict", 0, shared))).tensors
