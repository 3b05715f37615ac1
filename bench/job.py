"""The job that Fedloom and every peer do: federated LoRA on 100 devices that hold TREC questions, 10 of them a round.

:func:`export` writes it to a plain folder, so that a peer needs nothing of Fedloom to do literally the same steps:

    job.json            the experiment (for Fedloom), the model's folder, LoRA's and AdamW's settings, and for each round the devices
                        of its cohort, each with the rows it trains on in their order; every ``batch`` rows are one step, the last
                        step may be smaller
    data.npz            tokens (int32), offsets (int64) and labels (int64): row j is tokens[offsets[j]:offsets[j + 1]]
    start.safetensors   what every trained tensor starts from, in float32, by the names that PEFT saves
"""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
from safetensors.torch import save_file

from fedloom.methods.fedavg import FedAvg
from fedloom.model.places import folder_of
from fedloom.run.experiment import Experiment, as_json
from fedloom.run.world import build
from fedloom.server.participation import uniform


def experiment(rounds: int, rows: int = 0) -> Experiment:
    """The job as Fedloom states it, on that many training questions (0: all). Few others: nothing is evaluated here."""
    return Experiment(FedAvg(local_epochs=1), rounds=rounds, max_train=rows, max_validation=200, max_test=200)


def export(folder: Path, e: Experiment) -> None:
    """Write the job into ``folder``, which is made."""
    world, method = build(e), e.method
    train = world.splits["train"]
    cohorts = []
    for t in range(e.rounds):
        devices = [world.device(k) for k in uniform(world.pool, t)]
        orders = [device.train.rows[np.concatenate(method.batches(device, t))] for device in devices]
        cohorts.append([{"device": device.id, "rows": rows.tolist()} for device, rows in zip(devices, orders, strict=True)])
    job = {
        "experiment": as_json(e),
        "model": folder_of(e.model),
        "classes": len(world.classes),
        "rank": e.adapter.rank,
        "alpha": e.adapter.alpha,
        "lr": method.lr,
        "weight_decay": method.weight_decay,
        "clip": method.clip,
        "batch": method.batch_size,
        "devices": e.clients,
        "rounds": cohorts,
    }
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "job.json").write_text(json.dumps(job), encoding="utf-8")
    np.savez(folder / "data.npz", tokens=train.tokens, offsets=train.offsets, labels=train.store_labels)
    save_file({name: tensor.contiguous() for name, tensor in world.model.initial.items()}, folder / "start.safetensors")
