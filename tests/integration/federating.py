"""A federation of real processes over TLS, and the same participation played again in one process: the two must come to the same bits.

    python tests/integration/federating.py FOLDER METHOD ROUNDS FAULTS [SEED]

``FAULTS`` faults, drawn by seed, hit it while it runs: signal 9 to a device, to its worker, to the server; a device or its worker stopped
(SIGSTOP) for a while. What was killed is started again. Prints one line a fault, and at the end how many rounds counted and whether all of
the server's state is what the replay gives; exits with 1 if it is not.
"""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import psutil
import torch
from safetensors.torch import load_file

from fedloom.client.store import ClientStore
from fedloom.data.shards import write_shards
from fedloom.engines.engine import drive
from fedloom.engines.local import Local
from fedloom.engines.wrap import Faulty
from fedloom.messages import Task
from fedloom.methods import named
from fedloom.methods.method import State
from fedloom.run.certificates import issue
from fedloom.run.experiment import Experiment
from fedloom.run.world import build, read_data
from tests import tiny

DEVICES = 3
SIZE = {"max_train": 90, "max_validation": 20, "max_test": 30, "max_length": 24}
COMMAND = (sys.executable, "-W", "ignore", "-m", "fedloom")


def experiment(method: str, rounds: int) -> Experiment:
    """The simulation that the federation must equal."""
    shape = {"clients": DEVICES, "cohort": 2, "rounds": rounds, "alpha": 0.5, "evaluate_every": 0, "seed": 5}
    return Experiment(named(method)(), model=str(tiny.folder()), **shape, **SIZE)


@dataclass
class Federation:
    """Processes of one federation in ``folder``."""

    folder: Path
    method: str
    rounds: int
    port: int
    processes: dict[str, subprocess.Popen[bytes]] = field(default_factory=dict)

    def prepare(self) -> None:
        """Certificates, and each device's rows as files."""
        issue(self.folder / "certs", DEVICES, ("127.0.0.1",))
        write_shards(*read_data(experiment(self.method, self.rounds)), self.folder / "shards")

    def start(self, who: str) -> None:
        """Start the server, or device K."""
        sizes = [word for name, value in SIZE.items() for word in (f"--{name.replace('_', '-')}", str(value))]
        if who == "server":
            words = ["serve", self.method, "--certs", "certs/server", "--listen", f"127.0.0.1:{self.port}", "--out", "out", "--plain"]
            words += ["--rounds", str(self.rounds), "--cohort", "2", "--seed", "5", "--evaluate-every", "0", "--model", str(tiny.folder())]
            words += [*sizes, "--wait", "20", "--deadline", "40", "--linger", "1"]
        else:
            words = ["join", f"127.0.0.1:{self.port}", f"shards/{who}", "--certs", f"certs/device-{who}", "--out", f"device-{who}"]
            words += ["--threads", "1"]
        with (self.folder / f"{who}.log").open("ab") as log:
            environment = {**os.environ, "OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}
            self.processes[who] = subprocess.Popen([*COMMAND, *words], cwd=self.folder, stdout=log, stderr=log, env=environment)

    def rows(self) -> list[dict]:
        """The rounds so far."""
        path = self.folder / "out" / "rounds.jsonl"
        return [json.loads(line) for line in path.read_bytes().split(b"\n")[:-1]] if path.exists() else []

    def wait(self, seconds: float) -> int:
        """Until the server has ended; its exit code."""
        return self.processes["server"].wait(seconds)

    def end(self) -> None:
        """End everybody."""
        for process in self.processes.values():
            with process:
                process.kill()

    def said(self, who: str) -> str:
        """What a process has said."""
        return (self.folder / f"{who}.log").read_text()


def hit(there: Federation, rng: random.Random) -> str:
    """One fault; what it was."""
    kind = rng.choice(("device killed", "worker killed", "server killed", "device stopped", "worker stopped"))
    who = "server" if kind == "server killed" else str(rng.randrange(DEVICES))
    process = there.processes[who]
    if process.poll() is not None:
        return f"{kind}: {who} has ended"
    target = process.pid
    if kind.startswith("worker"):
        children = psutil.Process(process.pid).children()
        if not children:
            return f"{kind}: {who} has none"
        target = children[0].pid
    if kind.endswith("killed"):
        os.kill(target, signal.SIGKILL)
        if target == process.pid:
            process.wait()
            there.start(who)
    else:
        os.kill(target, signal.SIGSTOP)
        time.sleep(rng.uniform(0.5, 3.0))
        os.kill(target, signal.SIGCONT)
    return f"{kind}: {who}"


def replayed(method: str, rounds: int, rows: Sequence[dict]) -> State:
    """The state after the same participation without any fault, in one process."""
    world = build(experiment(method, rounds))
    answered: set[int] = set(world.pool.clients)

    def away(task: Task, attempt: int) -> str | None:
        return None if task.client in answered else "it did not take part"

    engine, made = Faulty(Local(world.host(ClientStore())), away), world.experiment.method
    state = drive(made.setup(made.init(world.model), world.pool), engine)
    for row in rows[1:]:
        answered = set(row["answered"])
        state = drive(made.round(state, world.pool), engine, 0.01) if answered else replace(state, round=state.round + 1)
    return state


def difference(there: Federation) -> str:
    """What of the server's state is another than the replay's; empty: nothing."""
    place = there.folder / "out" / "checkpoints"
    body = json.loads((place / "latest.json").read_text())
    found, due = load_file(place / body["server"]), replayed(there.method, there.rounds, there.rows())
    wanted = {f"shared/{n}": t for n, t in due.shared.items()} | {f"server/{n}": t for n, t in due.server.items()}
    if set(found) != set(wanted) or body["round"] != due.round:
        return f"{sorted(set(found) ^ set(wanted))[:3]}, round {body['round']} against {due.round}"
    return ", ".join(name for name in wanted if not torch.equal(found[name], wanted[name]))


def free_port() -> int:
    """One that nobody listens on."""
    import socket

    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        return one.getsockname()[1]


def play(folder: Path, method: str, rounds: int, faults: int, seed: int = 0) -> Federation:
    """A whole federation with faults, to its end."""
    there, rng = Federation(folder, method, rounds, free_port()), random.Random(seed)
    there.prepare()
    for who in ("server", *map(str, range(DEVICES))):
        there.start(who)
    try:
        begun = time.monotonic()
        while not there.rows():
            if time.monotonic() > begun + 240 or there.processes["server"].poll() is not None:
                raise RuntimeError(f"it did not begin: {there.said('server')[-2000:]}\n{there.said('0')[-1000:]}")
            time.sleep(0.1)
        for _ in range(faults):
            time.sleep(rng.uniform(0.5, 4.0))
            if there.processes["server"].poll() is not None:
                break
            print(f"after round {there.rows()[-1]['round']}: {hit(there, rng)}", flush=True)
        code = there.wait(600)
        if code:
            raise RuntimeError(f"the server ended with {code}: {there.said('server')[-2000:]}")
        return there
    finally:
        there.end()


def main() -> int:
    """As above."""
    folder, method, rounds, faults = Path(sys.argv[1]), sys.argv[2], int(sys.argv[3]), int(sys.argv[4])
    there = play(folder, method, rounds, faults, int(sys.argv[5]) if len(sys.argv) > 5 else 0)
    rows, differs = there.rows()[1:], difference(there)
    counted = sum(bool(row["answered"]) for row in rows)
    alone = sum(len(row["answered"]) == 1 for row in rows)
    print(
        f"{counted} of {len(rows)} rounds counted, {alone} of them with one device; {'differs: ' + differs if differs else 'bit-identical'}"
    )
    return 1 if differs else 0


if __name__ == "__main__":
    sys.exit(main())
