"""PEFT without federation: one model trained on the same batches, one after another; nothing is sent, copied or averaged."""

from __future__ import annotations

import time

from task import job_of, model_of, optimizer_of, settings, step, write

how = settings()
job, model = job_of(how.job), model_of(how)
model.train()
optimizer = optimizer_of(model, how)
seconds = []
for t in range(how.rounds):
    began = time.perf_counter()
    for place in job.cohort(t):
        for batch in job.batches(job.rows(t, place)):
            step(model, optimizer, batch, how)
    seconds.append(time.perf_counter() - began)
write(how, seconds)
