"""The model that one device would use, made in this process from what its state holds: without asking an engine."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from fedloom.client.client import Client
from fedloom.client.masks import carried_out
from fedloom.client.store import ClientStore
from fedloom.compute.compute import Compute
from fedloom.engines.asked import PREDICTS
from fedloom.messages import Setting, Task, Tensors, Update, Work
from fedloom.methods.method import Method, Predictor
from fedloom.run.world import World
from fedloom.server.sharing import LAYERS


def personal(world: World, store: ClientStore, client: int, shared: Tensors, facts: Mapping[str, Any]) -> Predictor:
    """The model of device ``client``, given the ``shared`` tensors as they reach it, and the state's ``facts``. Changes neither the device
    nor the store."""
    device, layers = world.device(client), world.experiment.share.layers(facts)
    device.private, device.memory = store.load(client)
    told: dict[str, Setting] = {} if layers is None else {LAYERS: layers}
    return predicting(world.experiment.method, device, Task(PREDICTS, client, shared, told), world.compute)


def predicting(method: Method, device: Client, asked: Task, compute: Compute) -> Predictor:
    """The model with which ``device``, as its state has it, answers a prediction that it is ``asked`` for."""
    made: list[Predictor] = []

    def made_only(c: Client, task: Task) -> Work[Update]:
        made.append((yield from method.personalise(c, task.tensors)))
        return Update(c.id, len(c.train))

    work, answer = carried_out(made_only, device, asked), None
    try:
        while True:
            items = work.send(answer)
            done = compute.run(items if isinstance(items, list) else [items])
            answer = [d.result for d in done] if isinstance(items, list) else done[0].result
    except StopIteration:
        return made[0]


def as_sent(world: World, shared: Tensors) -> Tensors:
    """The shared tensors as they reach a device: where the wire loses something, without it."""
    encoding = world.experiment.encoding
    return encoding.arrived(encoding.down(Task(PREDICTS, 0, shared))).tensors
