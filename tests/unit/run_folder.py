"""Synthetic run folders with the files and keys that a run writes, for the tests of what a person looks at."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np

CLASSES = ["ABBR", "DESC", "ENTY", "HUM", "LOC", "NUM"]


def rows_of(rounds: int, height: float = 0.9, every: int = 5) -> list[dict]:
    """Rows 0..rounds; evaluated every ``every`` rounds and at the end, to multiples of 1/1000."""
    rows = []
    for t in range(rounds + 1):
        seen = t % every == 0 or t == rounds
        personalised = round(height - 0.6 * math.exp(-t / 6), 3) if seen else None
        shared = round(height - 0.04 - 0.6 * math.exp(-t / 7), 3) if seen else None
        rows.append(
            {
                "round": t,
                "loss": None if t == 0 else round((2.7 - height) * math.exp(-t / 9) + 0.03 * math.cos(t), 4),
                "personalised": personalised,
                "global": shared,
                "examples": 0 if t == 0 else 1080,
                "train_seconds": 0.0 if t == 0 else 2.5,
                "bytes_up": 0 if t == 0 else 3_000_000,
                "bytes_down": 0 if t == 0 else 4_000_000,
                "host_seconds": 0.5 if t == 0 else 3.0,
                "device_seconds": 0.0 if t == 0 else 20.0,
                "peak_rss_bytes": 900_000_000,
                "answered": [] if t == 0 else [1, 5, 7],
                "failed": {},
                "validation": {"personalised": personalised, "global": shared, "loss": None},
            }
        )
    return rows


def counts_of(clients: int, classes: int, seed: int = 7) -> np.ndarray:
    """Skewed training label counts (clients, classes)."""
    rng = np.random.default_rng(seed)
    sizes = 4 + (rng.dirichlet([5.0] * clients) * 50 * clients).astype(int)
    return np.array([rng.multinomial(n, rng.dirichlet([0.6] * classes)) for n in sizes])


def experiment_of(method: str | dict, rounds: int, clients: int = 100, **fields: Any) -> dict:
    """An experiment's JSON."""
    experiment = {
        "method": {"name": method, "lr": 0.001} if isinstance(method, str) else method,
        "data": "trec",
        "model": "minilm",
        "adapter": {"rank": 8, "alpha": 16.0, "targets": [], "dropout": 0.0},
        "clients": clients,
        "cohort": 10,
        "rounds": rounds,
        "partition": "label",
        "alpha": 1.0,
        "seed": 42,
        "device": "jetson",
        "engine": {"kind": "local", "stack": 0, "threads": 0},
    }
    return {**experiment, **fields}


def results_of(experiment: dict, rows: list[dict], facts: dict, notes: list[str], classes: list[str]) -> dict:
    """A result that agrees with the rows."""
    final = {**{k: rows[-1][k] for k in ("round", "personalised", "global")}, "loss": 0.3}
    seen = [row for row in rows if row["personalised"] is not None]
    best = {**{k: seen[-2][k] for k in ("round", "personalised", "global")}, "loss": 0.4}
    counts = counts_of(experiment["clients"], len(classes))
    devices = [
        {"client": k, "train": int(c.sum()), "test": 5, "correct": k % 6, "score": None if k == 3 else k % 6 / 5}
        | {"participations": k % 4, "labels": c.tolist()}
        for k, c in enumerate(counts)
    ]
    total = {key: sum(row[key] for row in rows) for key in ("bytes_up", "bytes_down", "examples", "host_seconds", "device_seconds")}
    setup = {"setup_bytes_up": 5_000_000, "setup_bytes_down": 20_000_000, "setup_examples": 5000, "setup_device_seconds": 95.0}
    return {
        "method": experiment["method"]["name"],
        "metric": "accuracy",
        "rounds": experiment["rounds"],
        "seed": experiment["seed"],
        "digest": "0" * 64,
        "final": final,
        "best": best,
        "peak_rss_bytes": 900_000_000,
        **total,
        **setup,
        "validation": {"final": final, "best": best},
        "notes": notes,
        "per_device": devices,
        "facts": facts,
        "partition": {"classes": classes, "train_counts": counts.tolist()},
        "experiment": experiment,
    }


def write_run(
    folder: Path,
    method: str | dict = "lora",
    rounds: int = 30,
    *,
    height: float = 0.9,
    ended: bool = True,
    facts: dict | None = None,
    notes: tuple[str, ...] = (),
    classes: tuple[str, ...] | list[str] = CLASSES,
    **fields: Any,
) -> Path:
    """Write a run folder and return it; ``fields`` go into the experiment."""
    folder.mkdir(parents=True, exist_ok=True)
    experiment = experiment_of(method, rounds, **fields)
    rows = rows_of(rounds, height)
    shown = rows if ended else rows[: rounds // 2]
    (folder / "experiment.json").write_text(json.dumps(experiment), encoding="utf-8")
    (folder / "rounds.jsonl").write_text("".join(json.dumps(row) + "\n" for row in shown), encoding="utf-8")
    if ended:
        results = results_of(experiment, rows, facts or {}, list(notes), list(classes))
        (folder / "results.json").write_text(json.dumps(results), encoding="utf-8")
    return folder
