"""Which of transformers' two ways of attention is the faster here, for the step that all peers do: the tuned ones get that one."""

from __future__ import annotations

import dataclasses
import json
import time
from statistics import median

from setups import setup_of
from task import job_of, settings

STEPS = 24

how = settings()
job, setup = job_of(how.job), setup_of(how)
batches = [batch for place in job.cohort(0) for batch in job.batches(job.rows(0, place))][:STEPS]
ways = [dataclasses.replace(how, attention=attention) for attention in ("eager", "sdpa")]
optimizers = [setup.optimizer(setup.model(way), way) for way in ways]
seconds: dict[str, list[float]] = {way.attention: [] for way in ways}
pairs = list(zip(ways, optimizers, strict=True))
for i, batch in enumerate(batches[: STEPS // 4] + batches):
    for way, optimizer in pairs if i % 2 == 0 else reversed(pairs):  # who comes second finds the batch in the cache
        began = time.perf_counter()
        setup.step(setup.model(way), optimizer, batch, way)
        seconds[way.attention].append(time.perf_counter() - began)
how.out.write_text(json.dumps({name: median(taken[STEPS // 4 :]) for name, taken in seconds.items()}), encoding="utf-8")
