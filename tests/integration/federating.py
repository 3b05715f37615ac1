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
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import psutil
import torch
from safetensors.torch import load_file

from fedloom.client.store import ClientStore
from fedloom.data.shards import write_shards
from fedloom.engines.engine import Engine, drive
from fedloom.engines.local import Local
from fedloom.engines.wrap import Faulty
from fedloom.messages import Task
from fedloom.methods import named
from fedloom.methods.fibecfed import FibecFed
from fedloom.methods.method import State
from fedloom.run.deployment.certificates import issue
from fedloom.run.experiment import Experiment
from fedloom.run.world import build, read_data
from tests import tiny

DEVICES = 3
SIZE = {"max_train": 90, "max_validation": 20, "max_test": 30, "max_length": 24}
COMMAND = (sys.executable, "-W", "ignore", "-m", "fedloom")
HERE = "127.0.0.1"
PRIVATE = ("--method.gal.count", "1")
"""Of FibecFed, so that two of the tiny model's three layers are a device's own: with as many global as it takes by itself, nothing of a
device's state would change after the set-up, and there would be nothing to lose."""


def experiment(method: str, rounds: int) -> Experiment:
    """The simulation that the federation must equal."""
    shape = {"clients": DEVICES, "cohort": 2, "rounds": rounds, "alpha": 0.5, "evaluate_every": 0, "seed": 5}
    made = named(method)()
    if isinstance(made, FibecFed):
        made = replace(made, gal=replace(made.gal, count=int(PRIVATE[1])))
    return Experiment(made, model=str(tiny.folder()), **shape, **SIZE)


@dataclass
class Federation:
    """Processes of one federation in ``folder``. ``options``: of the server, beside what says which experiment it is."""

    folder: Path
    experiment: Experiment
    port: int
    options: Sequence[str] = ("--wait", "20", "--deadline", "40", "--linger", "1")
    listen: str = HERE
    addresses: dict[str, str] = field(default_factory=dict)
    """Where a device finds the server, HOST:PORT, if not at the server's own address."""
    programs: dict[str, Sequence[str]] = field(default_factory=dict)
    """What runs instead of ``fedloom``, by who it is."""
    out: str = "out"
    processes: dict[str, subprocess.Popen[bytes]] = field(default_factory=dict)

    def prepare(self, names: Sequence[str] = (HERE,)) -> None:
        """Certificates, and each device's rows as files."""
        issue(self.folder / "certs", self.experiment.clients, names)
        write_shards(*read_data(self.experiment), self.folder / "shards")

    def words(self, who: str) -> list[str]:
        """The command of the server, or of device K, without the program."""
        e = self.experiment
        if who == "server":
            words = [
                "serve",
                e.method_name,
                "--certs",
                "certs/server",
                "--listen",
                f"{self.listen}:{self.port}",
                "--out",
                self.out,
                "--plain",
            ]
            fields = {
                "data": e.data,
                "model": e.model,
                "rounds": e.rounds,
                "cohort": e.cohort,
                "seed": e.seed,
                "aggregation": e.aggregation,
            }
            fields |= {"evaluate_every": e.evaluate_every} | {name: vars(e)[name] for name in SIZE}
            return [
                *words,
                *(word for name, value in fields.items() for word in (f"--{name.replace('_', '-')}", str(value))),
                *self.options,
            ]
        server = self.addresses.get(who, f"{HERE}:{self.port}")
        return ["join", server, f"shards/{who}", "--certs", f"certs/device-{who}", "--out", f"device-{who}", "--threads", "1"]

    def start(self, who: str) -> None:
        """Start the server, or device K."""
        with (self.folder / f"{who}.log").open("ab") as log:
            environment = {**os.environ, "OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}
            command = [*self.programs.get(who, COMMAND), *self.words(who)]
            self.processes[who] = subprocess.Popen(command, cwd=self.folder, stdout=log, stderr=log, env=environment)

    def begun(self, seconds: float = 240) -> None:
        """Until the set-up is done.

        Raises:
            RuntimeError: it is not.
        """
        until = time.monotonic() + seconds
        while not self.rows():
            if time.monotonic() > until or self.processes["server"].poll() is not None:
                raise RuntimeError(f"it did not begin: {self.said('server')[-2000:]}\n{self.said('0')[-1000:]}")
            time.sleep(0.1)

    def rows(self) -> list[dict]:
        """The rounds so far."""
        path = self.folder / self.out / "rounds.jsonl"
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


Wrap = Callable[[Engine], Engine]


def replay(due: Experiment, rows: Sequence[dict], store: ClientStore, wrap: Wrap = lambda engine: engine) -> Iterator[State]:
    """The state after the set-up and after every row, of the same participation without any fault, in one process. ``wrap``: what is put
    around its engine."""
    world = build(due)
    answered: set[int] = set(world.pool.clients)

    def away(task: Task, attempt: int) -> str | None:
        return None if task.client in answered else "it did not take part"

    engine, made = wrap(Faulty(Local(world.host(store)), away)), world.experiment.method
    state = drive(made.setup(made.init(world.model), world.pool), engine)
    yield state
    for row in rows[1:]:
        answered = set(row["answered"])
        state = drive(made.round(state, world.pool), engine, 0.01) if answered else replace(state, round=state.round + 1)
        yield state


def checkpointed(folder: Path) -> tuple[dict, dict[str, torch.Tensor]]:
    """The index and the server's tensors of a run's last completed round, also of one that goes on meanwhile."""
    place = folder / "checkpoints"
    while True:
        body = json.loads((place / "latest.json").read_text())
        try:
            return body, {name: tensor for file in body["server"] for name, tensor in load_file(place / file).items()}
        except FileNotFoundError:  # the next round is complete
            time.sleep(0.02)


def differs(body: dict, found: Mapping[str, torch.Tensor], due: State) -> str:
    """What of a checkpoint is another than this state; empty: nothing."""
    wanted = {f"shared/{n}": t for n, t in due.shared.items()} | {f"server/{n}": t for n, t in due.server.items()}
    if set(found) != set(wanted) or body["round"] != due.round:
        return f"{sorted(set(found) ^ set(wanted))[:3]}, round {body['round']} against {due.round}"
    return ", ".join(name for name in wanted if not torch.equal(found[name], wanted[name]))


def strayed(body: dict, store: ClientStore, devices: int) -> str:
    """Whose state, by the name that says what it holds, is another in a checkpoint than in a store; empty: nobody's."""
    return ", ".join(f"device {k}'s state" for k in range(devices) if body["clients"].get(str(k), "") != store.name(k))


def difference(there: Federation) -> str:
    """What of the server's and the devices' state is another than the replay's; empty: nothing."""
    body, found = checkpointed(there.folder / there.out)
    with tempfile.TemporaryDirectory() as place:
        store = ClientStore(Path(place))
        *_, due = replay(there.experiment, there.rows(), store)
        return differs(body, found, due) or strayed(body, store, there.experiment.clients)


def free_port() -> int:
    """One that nobody listens on."""
    import socket

    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        return one.getsockname()[1]


def play(folder: Path, method: str, rounds: int, faults: int, seed: int = 0) -> Federation:
    """A whole federation with faults, to its end."""
    there, rng = Federation(folder, experiment(method, rounds), free_port()), random.Random(seed)
    there.options = (*there.options, *(PRIVATE if isinstance(there.experiment.method, FibecFed) else ()))
    there.prepare()
    for who in ("server", *map(str, range(DEVICES))):
        there.start(who)
    try:
        there.begun()
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
    rows, other = there.rows()[1:], difference(there)
    counted = sum(bool(row["answered"]) for row in rows)
    alone = sum(len(row["answered"]) == 1 for row in rows)
    print(f"{counted} of {len(rows)} rounds counted, {alone} of them with one device; {'differs: ' + other if other else 'bit-identical'}")
    return 1 if other else 0


if __name__ == "__main__":
    sys.exit(main())
