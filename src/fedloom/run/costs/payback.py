"""After which round a set-up has paid for itself, against plain federated LoRA.

A run's cost after a round is that of its set-up and of all rounds up to that one. The set-up has paid for itself after the first round
at which this is no more than plain LoRA's, which has none: once for what devices upload, once for simulated device time. Plain LoRA is
the same local training (epochs, batch size, seed, cohorts) with everything shared and without a curriculum. Where other tensors than
LoRA's pairs are trained, plain LoRA would have another model, and nothing is told. It is not trained for this: it
is played with a compute that only counts, so its operations are those of a real run of it, and its messages are as long, but for the
digits of a loss.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from itertools import accumulate
from typing import Any

from fedloom.client.curricula.everything import Everything
from fedloom.client.store import ClientStore
from fedloom.engines.engine import drive
from fedloom.engines.local import Local
from fedloom.fleet import Fleet
from fedloom.methods.fedavg import FedAvg
from fedloom.methods.method import parts
from fedloom.run.costs.ledger import Section
from fedloom.run.costs.pretended import Pretended
from fedloom.run.world import World, adapter_of

Row = Mapping[str, Any]
KEYS = ("bytes_up", "device_seconds")


def paid_back(world: World, fleet: Fleet, totals: Row, rows: Sequence[Row]) -> dict[str, Any] | None:
    """``{"against": "lora", "bytes_up": round or None, "device_seconds": round or None}``; None in it means: not within this run. None
    altogether where set-up asked nothing of devices (a start that each makes for itself saves nothing in a round), or the method's local
    training is not one that plain LoRA could do, or not of LoRA's pairs.

    ``totals``, ``rows``: of the run's ledger; rows from round 0 on.
    """
    plain = plain_of(world.experiment.method) if adapter_of(world.experiment).kind == "lora" else None
    if world.far is not None or plain is None or not any(totals[f"setup_{key}"] for key in ("bytes_up", "bytes_down")):
        return None
    theirs = played(world, plain, fleet)
    mine = [row for row in rows if row["round"] > 0]
    return {"against": plain.name, **{k: first_paid(totals[f"setup_{k}"], [r[k] for r in mine], [r[k] for r in theirs]) for k in KEYS}}


def first_paid(setup: float, mine: Sequence[float], theirs: Sequence[float]) -> int | None:
    """The first round (from 1) after which ``setup`` and all of ``mine`` so far are no more than all of ``theirs``.

    >>> first_paid(10, [1, 1, 1, 1], [4, 4, 4, 4])
    4
    """
    spent = zip(accumulate(mine), accumulate(theirs), strict=True)
    return next((t for t, (own, other) in enumerate(spent, 1) if setup + own <= other), None)


def plain_of(method: Any) -> FedAvg | None:
    """Plain LoRA with the method's own local training; None where it has another kind."""
    return next((replace(part, curriculum=Everything()) for part in parts(method) if isinstance(part, FedAvg)), None)


def played(world: World, plain: FedAvg, fleet: Fleet) -> list[dict[str, float]]:
    """What each round of ``plain`` would cost in this world."""
    e = world.experiment
    there = replace(world, experiment=replace(e, method=plain), compute=Pretended(world.model))
    engine, made = Local(there.host(ClientStore(None)), world.wave), []
    pool = world.pool.plain()
    state = drive(plain.setup(plain.init(world.model), pool), engine)
    for _ in range(e.rounds):
        section = Section(fleet)
        state = drive(plain.round(state, pool), engine, seen=section.hear)
        made.append({key: getattr(section, key) for key in KEYS})
    return made
