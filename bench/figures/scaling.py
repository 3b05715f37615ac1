"""Does a round get dearer per example as it gets larger? Seconds of a round at ×1, ×4 and ×16 examples, and the slope of their logarithms.

A slope of 1 means the cost of an example is constant; below 1, that a round has a share that does not grow. A whole round is timed:
tasks, wire, training and the server's mean. ×1 is 10 devices with 8 examples each, one batch. Two ways to grow, both on the very same
examples, so that lengths of texts cannot tilt the slope:

- **more batches a device**: the same 10 devices train for 1, 4 and 16 epochs;
- **more devices a cohort**: 10, 40 and 160 devices with one batch each; 160 devices are dealt into 16, 4 and 1 cohorts and the time is
  that of all cohorts, divided by their number.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from statistics import median

import numpy as np

from bench.figure import command
from bench.row import Row
from bench.timing import interleaved
from bench.trec import of, world
from fedloom.client.store import ClientStore
from fedloom.engines.engine import drive
from fedloom.messages import Replies, Task
from fedloom.methods.fedavg import FedAvg
from fedloom.run.world import World
from fedloom.server.participation import Pool

TIMES, COHORT, BATCH, REPEATS = (1, 4, 16), 10, 8, 5


def one_round(here: World, method: FedAvg, pool: Pool) -> Callable[[], object]:
    """A round of ``method`` with exactly the clients of ``pool``, which must train on as many examples as the figure says."""
    engine, state, due = of(here, method).engine(ClientStore()), method.init(here.model), method.local_epochs * BATCH * pool.cohort

    def seen(tasks: Sequence[Task], replies: Replies) -> None:
        trained = sum(one.examples for one in replies.traffic)
        if trained != due:
            raise AssertionError(f"the round trained on {trained} examples; this figure is about rounds of {due}")

    return lambda: drive(method.round(state, pool), engine, seen=seen)


def cohorts(here: World, size: int) -> list[Pool]:
    """All devices dealt into pools of ``size``, each its own cohort."""
    clients = here.pool.clients
    return [Pool(clients[at : at + size], size, 1, here.experiment.seed) for at in range(0, len(clients), size)]


def slope(times: list[int], seconds: list[float]) -> float:
    """The exponent e of the least-squares line log(seconds) = e·log(times) + c."""
    return float(np.polyfit(np.log(times), np.log(seconds), 1)[0])


def row(way: str, seconds: dict[str, list[float]], note: str) -> Row:
    """The exponent of one way to grow: the median over turns, each a line through its own three rounds."""
    slopes = [slope(list(TIMES), list(turn)) for turn in zip(*seconds.values(), strict=True)]
    exponent, samples = median(slopes), {"exponent": slopes, **{f"{name}, s a round": taken for name, taken in seconds.items()}}
    return Row(f"cost of a round against its examples, exponent, {way}", exponent, "", 1.0, None, "less", samples, note)


def measure(quick: bool) -> list[Row]:
    """The two exponents."""
    method = FedAvg(local_epochs=1, batch_size=BATCH)
    cohort, repeats = (2, 1) if quick else (COHORT, REPEATS)
    clients = cohort * TIMES[-1]
    here = world(method, quick, rows=clients * BATCH, clients=clients, cohort=cohort, partition="iid", max_validation=10, max_test=10)
    sizes = {len(here.device(k).train) for k in here.pool.clients}
    if sizes != {BATCH}:
        raise AssertionError(f"devices hold {sorted(sizes)} examples; every one must hold {BATCH} for rounds to be exactly ×1, ×4, ×16")
    first = cohorts(here, cohort)[0]
    longer = {f"×{n}": one_round(here, FedAvg(local_epochs=n, batch_size=BATCH), first) for n in TIMES}
    wider = {f"×{n}": [one_round(here, method, pool) for pool in cohorts(here, cohort * n)] for n in TIMES}
    batches = interleaved(longer, repeats)
    devices = interleaved({name: lambda rounds=rounds: [act() for act in rounds] for name, rounds in wider.items()}, repeats)
    devices = {name: [s / len(wider[name]) for s in taken] for name, taken in devices.items()}
    note = f"{', '.join(str(cohort * BATCH * n) for n in TIMES)} examples a round, MiniLM, LoRA r8, float32"
    return [row("more batches a device", batches, note), row("more devices a cohort", devices, note)]


if __name__ == "__main__":
    command(measure)
