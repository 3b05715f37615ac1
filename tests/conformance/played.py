"""A method over made-up devices, a round at a time, whose Fits and whose devices' memory can be looked at, and whose answers are judged
as in a real federation."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cache
from typing import Any

import torch

from fedloom.client.host import Host
from fedloom.client.masks import carried_out
from fedloom.client.sharing import layer_scores
from fedloom.client.store import ClientStore
from fedloom.compute.serial import Serial
from fedloom.compute.stacked import Stacked
from fedloom.compute.work import Fit
from fedloom.engines.agreement import agreeing
from fedloom.engines.engine import Engine, drive
from fedloom.engines.local import Local, taken
from fedloom.messages import Flow, Replies, Take, Task, Update, ask, whole
from fedloom.methods.method import SAYS, State, one_round, says, set_up
from fedloom.model.base import Model
from fedloom.server.participation import Pool
from tests import tiny


@cache
def _model(kind: Any, start: Any) -> Model:
    return tiny.model(kind=kind, start=start)


def _asking(task: Task) -> Flow[list[Update]]:
    return (yield [task])


@dataclass(frozen=True)
class Judged:
    """An engine whose devices are honest, and every answer of which a real federation would use."""

    inner: Engine

    def run(self, tasks: Sequence[Task], take: Take = whole) -> Replies:
        replies = self.inner.run(tasks)
        refused = agreeing(tasks, replies).failures
        assert not refused, refused
        return taken(replies, take)


class Played:
    """Set up, and then as many rounds as are asked for."""

    def __init__(self, method: Any, pool: Pool, start: str = "", stacked: bool = True, kind: str = "") -> None:
        """``start``: of LoRA, where the method does not say its own. ``kind``: of adapter, instead of the method's."""
        own = says(method, "adapter_start")
        self.of = _model(kind or says(method, "adapter_kind"), start if start and own == SAYS["adapter_start"] else own)
        self.compute: Any = (Stacked if stacked else Serial)(self.of)
        self.fits, self.method, self.pool, self.store = list[Fit](), method, pool, ClientStore()
        ran, devices = self.compute.run, tiny.clients()

        def seen(items: Any) -> Any:
            self.fits.extend(item for item in items if isinstance(item, Fit))
            return ran(items)

        self.compute.run = seen
        fresh = lambda k: replace(devices[k], private={}, memory={})  # noqa: E731
        host = Host(method, fresh, self.compute, self.store, "played", doing=carried_out, besides=[layer_scores])
        self.engine = Judged(Local(host))
        self.state: State = drive(set_up(method, self.of, pool), self.engine, quorum=0)

    def round(self) -> State:
        """One more, of which alone ``fits`` are."""
        self.fits.clear()
        self.state = drive(one_round(self.method, self.state, self.pool), self.engine)
        return self.state

    def predictions(self, client: int) -> dict[str, torch.Tensor]:
        """What a device predicts of its test examples, and whatever else it answers, as one tensor a split."""
        asked = ask(self.method.predict, client, self.state.shared, splits=["test"])
        (said,) = drive(self.pool.sharing.over(_asking(asked), self.state.facts), self.engine)
        return dict(said.tensors)

    def kept(self, prefix: str) -> dict[int, dict[str, torch.Tensor]]:
        """By device, what is in its memory under a prefix, by the names behind it."""
        return {k: {n.removeprefix(prefix): t for n, t in self.store.load(k)[1].items() if n.startswith(prefix)} for k in self.pool.clients}
