"""What the house itself costs: a round of devices that compute nothing and send back what they got.

Ten of 100 devices a round, one tensor of 1 MB (and 32 MiB) each way. A round is everything between two states: the cohort is drawn,
ten tasks are packed, checked and unpacked, ten devices are made with their shards and stored, ten updates are packed, checked and
unpacked, and the server takes their weighted mean. Nothing is computed on a device, so all of it is overhead.
"""

from __future__ import annotations

from dataclasses import dataclass
from statistics import median
from typing import ClassVar

import torch

from bench.figure import command
from bench.row import Row
from bench.timing import interleaved
from bench.trec import of, small_bert, world
from fedloom.client.client import Client
from fedloom.client.store import ClientStore
from fedloom.engines.engine import drive
from fedloom.messages import Asking, Flow, Task, Tensors, Update, Work, ask, on_client
from fedloom.methods.method import Predictor, State, nothing_to_set_up, predict
from fedloom.model.base import Model
from fedloom.run.world import World
from fedloom.server.aggregation import Average
from fedloom.server.participation import Pool, uniform

AT_LEAST, AIM = 0.02, 0.005
SIZES = {"1 MB": (250_000, 100), "32 MiB": (2**23, 5)}
"""Floats of the tensor, and rounds measured."""


@dataclass(frozen=True)
class Echo:
    """A method whose devices return the ``floats`` float32 that came."""

    name: ClassVar[str] = "echo"
    paper: ClassVar[str] = "none"

    floats: int = 250_000

    def init(self, model: Model) -> State:
        return State(0, {"blob": torch.randn(self.floats, generator=torch.Generator().manual_seed(1))})

    def setup(self, state: State, pool: Pool) -> Flow[State]:
        return nothing_to_set_up(state)

    def round(self, state: State, pool: Pool) -> Flow[State]:
        mean = Average()
        yield Asking([ask(self.echo, k, state.shared) for k in uniform(pool, state.round)], mean.take)
        return state.after_round(mean.value())

    @on_client
    def echo(self, c: Client, task: Task) -> Work[Update]:
        yield from ()
        return Update(c.id, len(c.train), task.tensors)

    def personalise(self, client: Client, shared: Tensors) -> Work[Predictor]:
        yield from ()
        return Predictor({})

    def assembled(self, state: State) -> Tensors | None:
        return None

    predict = predict


def rounds(here: World, floats: int, count: int) -> list[float]:
    """Seconds of each of ``count`` rounds, after two that are thrown away."""
    method = Echo(floats)
    engine, state = of(here, method).engine(ClientStore()), method.init(here.model)
    before = state.shared["blob"]

    def one() -> None:
        nonlocal state
        state = drive(method.round(state, here.pool), engine)

    (seconds,) = interleaved({"a round": one}, count, warm=2).values()
    if not torch.allclose(state.shared["blob"], before):
        raise AssertionError("the mean of equal echoes is not what was sent; this figure would time something else")
    return seconds


def measure(quick: bool) -> list[Row]:
    """Seconds a round."""
    here = world(Echo(), quick, rows=240 if quick else 0, model=small_bert())  # the encoder is loaded and never used: a small one will do
    taken = {size: rounds(here, floats // 100 if quick else floats, 3 if quick else count) for size, (floats, count) in SIZES.items()}
    small, large = (median(seconds) for seconds in taken.values())
    name, note = "a round in which 10 of 100 devices echo", "wire and server mean included"
    return [
        Row(f"{name} 1 MB", small, "s", AT_LEAST, AIM, "less", {"s a round": taken["1 MB"]}, note),
        Row(f"{name} 32 MiB", large, "s", None, None, "less", {"s a round": taken["32 MiB"]}, note),
    ]


if __name__ == "__main__":
    command(measure)
