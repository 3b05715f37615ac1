"""FedAvg as in a typical research script: for each device of the cohort load the global state, train, keep the new state; then average."""

from __future__ import annotations

import time

import torch
from task import job_of, load, model_of, settings, state, train, write

how = settings()
job, model = job_of(how.job), model_of(how)
model.train()
shared = state(model)
seconds, after_first = [], None
for t in range(how.rounds):
    began = time.perf_counter()
    sizes, states = [], []
    for place in job.cohort(t):
        rows = job.rows(t, place)
        load(model, shared)
        train(model, rows, how)
        sizes.append(len(rows))
        states.append(state(model))
    shared = {name: torch.stack([n / sum(sizes) * s[name] for n, s in zip(sizes, states, strict=True)]).sum(0) for name in shared}
    seconds.append(time.perf_counter() - began)
    after_first = after_first or shared
write(how, seconds, after_first)
