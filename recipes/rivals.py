"""FibecFed, plain federated LoRA, its cheap rivals, floor and ceiling, under one protocol: the table of docs/log.md.

    python recipes/rivals.py trec --out runs/rivals                       the packaged questions
    python recipes/rivals.py PATH/TO/rte --out runs/rivals --rows 500 --clients 20 --cohort 5 --rounds 12 --max-length 96

Every method gets the same grid of learning rates; the one whose last round has the best personalised *validation* score with the
first seed is used for all seeds. The test split is only told, never chosen by. Fine-tuning and prior correction train as ``lora`` does,
so they are evaluated on its runs. Finished runs are reused: stop it and run it again.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from fedloom.client.store import ClientStore
from fedloom.engines.engine import drive
from fedloom.methods.centralised import Centralised
from fedloom.methods.fedavg import FedAvg
from fedloom.methods.fibecfed import FibecFed
from fedloom.methods.finetuned import FineTuned
from fedloom.methods.local import Local
from fedloom.methods.personal_head import PersonalHead
from fedloom.methods.prior import PriorCorrected
from fedloom.run import checkpoint
from fedloom.run.checkpoint import write_atomically
from fedloom.run.evaluation import evaluate
from fedloom.run.experiment import Experiment
from fedloom.run.loop import run
from fedloom.run.world import build, store_in

TRAINED = {"lora": FedAvg, "lora-personal-head": PersonalHead, "fibecfed": FibecFed, "local": Local, "centralised": Centralised}
ON_LORA = {"lora-finetuned": FineTuned, "lora-prior": PriorCorrected}
TWO_CORES: dict[str, Any] = {"precision": "bf16", "evaluate_every": 0}


def with_rate(name: str, rate: float) -> Any:
    """The method of that name with this learning rate."""
    return FedAvg(lr=rate) if name == "lora" else {**TRAINED, **ON_LORA}[name](inner=FedAvg(lr=rate))


def outcome(experiment: Experiment, name: str, rate: float, out: Path) -> dict[str, Any]:
    """Scores and costs of one method: run it, or evaluate it on ``lora``'s run."""
    trained = "lora" if name in ON_LORA else name
    skew = "any" if name == "centralised" else f"alpha{experiment.alpha}"
    folder = out / f"{Path(experiment.data).name}-{skew}-{trained}-lr{rate}-seed{experiment.seed}"
    base = replace(experiment, method=with_rate(trained, rate))
    results = run(replace(base, alpha=1.0) if name == "centralised" else base, folder, plain=True)
    if name not in ON_LORA:
        return {**results, "validation": results["validation"]["final"], "test": results["final"]}
    kept = folder / f"{name}.json"
    if not kept.exists():
        write_atomically(kept, json.dumps(on_lora(replace(experiment, method=with_rate(name, rate)), folder)))
    return {**results, **json.loads(kept.read_text())}


def on_lora(experiment: Experiment, folder: Path) -> dict[str, Any]:
    """Evaluate a method that trains as ``lora`` does on what ``lora`` trained."""
    world, saved = build(experiment), checkpoint.load(folder, store_in(folder))
    assert saved is not None
    engine = world.engine(ClientStore())
    state = replace(saved.state, facts={"classes": len(world.classes)})
    state = drive(experiment.method.setup(state, world.pool), engine)
    scores = evaluate(world, state, engine).scores
    return {"validation": scores["validation"], "test": scores["test"]}


def told(scores: Sequence[dict[str, Any]], protocol: str) -> str:
    """Mean ± standard deviation over seeds, or a dash."""
    values = [s["test"][protocol] for s in scores]
    return "–" if None in values else f"{np.mean(values):.3f} ± {np.std(values, ddof=1) if len(values) > 1 else 0:.3f}"


def main() -> None:
    """Run the grid and print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data")
    parser.add_argument("--out", type=Path, default=Path("runs/rivals"))
    parser.add_argument("--alphas", type=float, nargs="+", default=[1.0, 0.1])
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3])
    parser.add_argument("--rates", type=float, nargs="+", default=[5e-4, 2e-3, 8e-3])
    parser.add_argument("--methods", nargs="+", default=[*TRAINED, *ON_LORA])
    for name, default in (("rows", 2000), ("clients", 50), ("cohort", 10), ("rounds", 20), ("max-length", 128)):
        parser.add_argument(f"--{name}", type=int, default=default)
    a = parser.parse_args()
    shape = {"clients": a.clients, "cohort": a.cohort, "rounds": a.rounds, "max_train": a.rows, "max_length": a.max_length}
    lines = ["| α | method | lr | personalised | global | up a round, kB | examples | device s, set-up + rounds |", "|---" * 8 + "|"]
    table = []
    for alpha in a.alphas:
        for name in a.methods:
            base = Experiment(FedAvg(), data=a.data, alpha=alpha, **shape, **TWO_CORES)
            tried = {rate: outcome(replace(base, seed=a.seeds[0]), name, rate, a.out) for rate in a.rates}
            best = max(a.rates, key=lambda rate: tried[rate]["validation"]["personalised"])
            scores = [tried[best], *(outcome(replace(base, seed=seed), name, best, a.out) for seed in a.seeds[1:])]
            first = scores[0]
            up = first["bytes_up"] / first["rounds"] / a.cohort / 1e3
            device = f"{first['setup_device_seconds']:.0f} + {first['device_seconds']:.0f}"
            personal, whole = told(scores, "personalised"), told(scores, "global")
            lines.append(f"| {alpha} | {name} | {best} | {personal} | {whole} | {up:.0f} | {first['examples']} | {device} |")
            table.append({"alpha": alpha, "method": name, "lr": best, "grid": {str(r): t["validation"] for r, t in tried.items()}})
            table[-1] |= {"seeds": [{"validation": s["validation"], "test": s["test"]} for s in scores]}
            write_atomically(a.out / f"{Path(a.data).name}.md", "\n".join(lines) + "\n")
            write_atomically(a.out / f"{Path(a.data).name}.json", json.dumps(table, indent=1))
            print(lines[-1], flush=True)


if __name__ == "__main__":
    main()
