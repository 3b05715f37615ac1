"""Fedloom on the local engine: the rounds of ``fedloom run lora`` without its files and its evaluation."""

from __future__ import annotations

import tempfile
import time
from dataclasses import replace
from pathlib import Path

from task import job_of, settings, write

from fedloom.engines.engine import drive
from fedloom.run.experiment import from_json
from fedloom.run.world import build, store_in

how = settings()
experiment = from_json(job_of(how.job).settings["experiment"])
workers = how.processes if how.processes > 1 else 0
engine_settings = replace(experiment.engine, workers=workers, threads=how.threads)
world = build(replace(experiment, precision=how.precision, engine=engine_settings))
method = world.experiment.method
seconds, after_first = [], None
with tempfile.TemporaryDirectory() as folder:
    engine = world.engine(store_in(Path(folder)))
    state = drive(method.setup(method.init(world.model), world.pool), engine, quorum=0)
    for _ in range(how.rounds):
        began = time.perf_counter()
        state = drive(method.round(state, world.pool), engine)
        seconds.append(time.perf_counter() - began)
        after_first = after_first or dict(state.shared)
write(how, seconds, after_first)
