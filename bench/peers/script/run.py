"""FedAvg as in a typical research script: for each device of the cohort load the global state, train, keep the new state; then average.

As documented: rui-ye/OpenFedLLM: main_sft.py and federated_learning/fed_global.py: the states are deep copies of what PEFT gives, and the
model trains by a Trainer. JayZhang42/FederatedGPT-Shepherd does the same and, besides, writes each device's state to a file and reads it
for the mean, which this leaves out. Tuned: a loop of its own, and the tensors straight from the parameters.
"""

from __future__ import annotations

import time

from setups import by_trainer, setup_of
from task import job_of, settings, start_of, write

how = settings()
job, setup = job_of(how.job), setup_of(how)
train = by_trainer if how.setup == "as-documented" else setup.train
model = setup.model(how)
shared = start_of(how)
seconds, after_first = [], None
for t in range(how.rounds):
    began = time.perf_counter()
    sizes, states = [], []
    for place in job.cohort(t):
        rows = job.rows(t, place)
        setup.load(model, shared)
        train(model, rows, how)
        sizes.append(len(rows))
        states.append(setup.copied(model))
    shared = {name: sum(s[name] * n / sum(sizes) for n, s in zip(sizes, states, strict=True)) for name in shared}
    seconds.append(time.perf_counter() - began)
    after_first = after_first or shared
write(how, seconds, after_first)
