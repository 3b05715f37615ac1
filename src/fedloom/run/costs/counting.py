"""An engine over devices whose messages are measured and not made: what many rounds would cost that build on each other, in little time.

The method's own halves talk to each other, over tasks and updates that are handed on as they are; what each would take on the wire is told
by shapes (``wire.size_of``), what it would compute by the world's compute, which counts (``pretended.py``). Of what a device keeps only the
names and shapes matter: where the model has such a tensor that one stands for it, so that a hundred devices take no more memory than one.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

import torch

from fedloom.client.host import UNSENT, operations
from fedloom.client.masks import carried_out
from fedloom.client.sharing import layer_scores
from fedloom.compute.compute import Done
from fedloom.messages import Replies, Take, Task, Tensors, Traffic, Update, whole
from fedloom.run.world import World
from fedloom.wire import checked_settings, size_of


class Counting:
    """An :class:`~fedloom.engines.engine.Engine`. Everyone answers; what an operation raises ends the count."""

    def __init__(self, world: World) -> None:
        self.world, self.digest = world, world.experiment.digest()
        self.operations = {**operations(world.experiment.method), layer_scores.__name__: layer_scores}
        self.kept: dict[int, tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]] = {}

    def run(self, tasks: Sequence[Task], take: Take = whole) -> Replies:
        """Updates as the operations return them, in order."""
        updates, traffic = [], []
        for task in tasks:
            update, cost = self._answer(replace(task, settings=checked_settings(task.settings)))
            updates.append(take(update))
            traffic.append(cost)
        return Replies(tuple(updates), (), tuple(traffic))

    def _answer(self, task: Task) -> tuple[Update, Traffic]:
        client, encoding = self.world.device(task.client), self.world.experiment.encoding
        private, memory = self.kept.get(task.client, ({}, {}))
        client.private, client.memory = dict(private), {n: t for n, t in memory.items() if not n.startswith(UNSENT)}
        unsent = {n.removeprefix(UNSENT): t for n, t in memory.items() if n.startswith(UNSENT)}
        work, answer, done = carried_out(self.operations[task.op], client, task), None, list[Done]()
        while True:
            try:
                asked = work.send(answer)
            except StopIteration as ended:
                made: Update = ended.value
                break
            came = self.world.compute.run(asked if isinstance(asked, list) else [asked])
            answer = [one.result for one in came] if isinstance(asked, list) else came[0].result
            done += came
        update = replace(made, flops=sum(one.flops for one in done), examples=sum(one.examples for one in done))
        sent, unsent = encoding.up(update, task, unsent)
        self.kept[task.client] = self._standing(client.private), {**client.memory, **{UNSENT + n: t for n, t in unsent.items()}}
        down, up = size_of(encoding.down(task), self.digest), size_of(sent, self.digest)
        return update, Traffic(task.client, down, up, update.flops, update.examples)

    def _standing(self, private: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """The same names and shapes, the model's own tensors where it has them."""
        return {n: _instead(t, n, self.world.model.initial) for n, t in private.items()}


def _instead(tensor: torch.Tensor, name: str, of: Tensors) -> torch.Tensor:
    own = of.get(name)
    return own if own is not None and own.shape == tensor.shape and own.dtype == tensor.dtype else tensor
