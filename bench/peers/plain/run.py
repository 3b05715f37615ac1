"""PEFT without federation: one model trained on the same batches, one after another; nothing is sent, copied or averaged.

As documented: huggingface/peft: examples/sequence_classification/LoRA.ipynb, without its schedule.
"""

from __future__ import annotations

import time

from setups import setup_of
from task import job_of, settings, start_of, write

how = settings()
job, setup = job_of(how.job), setup_of(how)
model = setup.model(how)
setup.load(model, start_of(how))
optimizer = setup.optimizer(model, how)
seconds = []
for t in range(how.rounds):
    began = time.perf_counter()
    for place in job.cohort(t):
        for batch in setup.batches(job.rows(t, place), how):
            setup.step(model, optimizer, batch, how)
    seconds.append(time.perf_counter() - began)
write(how, seconds)
