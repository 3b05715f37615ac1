"""A real federation whose devices echo, in processes of its own: what ``bench/figures/federation.py`` measures.

    python -m bench.federating server FOLDER PARTS   the link and the rounds; prints JSON, a line each: its port, then what it measured
    python -m bench.federating device FOLDER PORT K  device K: a node, and the resident worker that it starts
    python -m bench.federating crowd FOLDER PORT N   N nodes in one process, each with a key of its own, that answer without workers
    python -m bench.federating worker SOCKET         what a device starts

Server, nodes and workers are the package's own, over TLS and signed; only the method is another: nothing is computed, what came goes back.
Every process but the server ends when its standard input is closed, so nobody outlives the one who started them.
"""

from __future__ import annotations

import json
import subprocess
import sys
import threading
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import psutil
import torch

from bench.timing import timed
from fedloom.client.client import Client
from fedloom.client.elsewhere import Elsewhere
from fedloom.client.host import Host
from fedloom.client.store import ClientStore
from fedloom.data.examples import Examples
from fedloom.encodings import Encoding
from fedloom.engines.engine import Engine, drive
from fedloom.engines.heap import give_memory_back
from fedloom.messages import Asking, Failure, Flow, Task, Tensors, Update, Work, ask, on_client
from fedloom.run.worker import end_with_parent
from fedloom.server.aggregation import Average
from fedloom.wire import Blob

DIGEST = "echoes"
LONGEST, DEADLINE = 600.0, 240.0
"""Seconds until everybody must have started, and for an answer."""


@dataclass(frozen=True)
class Part:
    """The first ``devices`` echo a tensor of ``floats`` float32 for ``rounds`` rounds, after ``warm`` that are thrown away.

    ``every``: rounds between two looks at the server's size, threads and files (0: none).
    """

    devices: int
    floats: int
    rounds: int
    warm: int = 1
    every: int = 0


class Echoes:
    """The method: devices return what came."""

    @on_client
    def echo(self, c: Client, task: Task) -> Work[Update]:
        yield from ()
        return Update(c.id, len(c.train), task.tensors)

    def round(self, clients: Sequence[int], tensors: Tensors) -> Flow[Tensors]:
        """Ask everybody, and take the mean of what comes back."""
        mean = Average()
        yield Asking([ask(self.echo, k, tensors) for k in clients], mean.take)
        return mean.value()


class Nothing:
    """A compute that is never asked."""

    def run(self, items: Sequence[Any]) -> list[Any]:
        return [None for _ in items]


def host(wire: str = "exact") -> Host:
    """What answers on a device."""
    one = Examples.of([[1]], [0])
    return Host(Echoes(), lambda k: Client(k, one, one, one, seed=1), Nothing(), ClientStore(), DIGEST, encoding=Encoding.of(wire))


def blob(floats: int) -> dict[str, torch.Tensor]:
    """What is sent around."""
    return {"blob": torch.randn(floats, generator=torch.Generator().manual_seed(1))}


def insist_the_same(after: Tensors, before: Tensors) -> None:
    """The mean of equal echoes is what was sent, or somebody did something else.

    Raises:
        AssertionError: it is not.
    """
    if not torch.allclose(after["blob"], before["blob"]):
        raise AssertionError("the mean of equal echoes is not what was sent; this figure would time something else")


# ---- who starts them --------------------------------------------------------------------------------------------------------


@contextmanager
def started(*words: str) -> Iterator[subprocess.Popen[str]]:
    """One of the programs above, killed at the end."""
    with subprocess.Popen(
        [sys.executable, "-W", "ignore", "-m", "bench.federating", *words], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as process:
        try:
            yield process
        finally:
            process.kill()


def measured(folder: Path, parts: Sequence[Part], crowd: bool = False) -> list[dict[str, Any]]:
    """What the server of a federation tells of each part, one after another. ``crowd``: the nodes share a process and have no workers.
    In ``folder`` are the certificates of as many devices as the parts need.

    Raises:
        RuntimeError: the server ended without telling.
    """
    count = max(part.devices for part in parts)
    with ExitStack() as stack:
        server = stack.enter_context(started("server", str(folder), json.dumps([asdict(part) for part in parts])))
        port = str(_told(server)["port"])
        for words in [("crowd", str(count))] if crowd else [("device", str(k)) for k in range(count)]:
            stack.enter_context(started(words[0], str(folder), port, words[1]))
        return [_told(server) for _ in parts]


def _told(server: subprocess.Popen[str]) -> dict[str, Any]:
    assert server.stdout is not None
    line = server.stdout.readline()
    if not line:
        raise RuntimeError(f"the server ended with exit code {server.wait()} and told nothing; what went wrong is above")
    return json.loads(line)


# ---- the processes ----------------------------------------------------------------------------------------------------------


def serve(folder: Path, parts: Sequence[Part]) -> None:
    """Be the server."""
    from fedloom.engines.federation import Federation, Patience
    from fedloom.engines.link import Link, Tls
    from fedloom.run.deployment.certificates import public_keys

    place, count = folder / "server", max(part.devices for part in parts)
    keys = {k: key for k, key in public_keys(place).items() if k < count}
    with Link(keys, "127.0.0.1", 0, Tls(place / "server.pem", place / "server.key")) as link:
        print(json.dumps({"port": link.port}), flush=True)
        engine = Federation(link, Elsewhere(), DIGEST, {}, Patience(LONGEST, DEADLINE, DEADLINE))
        drive(Echoes().round(list(keys), blob(1)), engine)  # greets everybody: workers start
        for part in parts:
            print(json.dumps(played(engine, part)), flush=True)


def played(engine: Engine, part: Part) -> dict[str, Any]:
    """The seconds of each round, the looks, and the resident memory before and at most, in MiB."""
    sent, clients, method = blob(part.floats), list(range(part.devices)), Echoes()
    state: Tensors = sent
    seconds, looks = list[float](), list[list[float]]()
    give_memory_back()  # what the part before took
    before = resident_peak(reset=True)

    def one() -> None:
        nonlocal state
        state = drive(method.round(clients, state), engine)

    for number in range(1, part.warm + part.rounds + 1):
        took = timed(one)
        seconds += [took] if number > part.warm else []
        if part.every and number % part.every == 0:
            looks.append(look())
    peak = resident_peak()
    insist_the_same(state, sent)
    return {"seconds": seconds, "looks": looks, "before": before, "peak": peak}


def resident_peak(reset: bool = False) -> float:
    """The most memory that this process has had resident, MiB; with ``reset`` what it has now, from which the most is counted anew.

    Unlike what ``getrusage`` tells it does not begin with the size of the parent. Of Linux.
    """
    if reset:
        Path("/proc/self/clear_refs").write_text("5")
    (kib,) = (line.split()[1] for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM:"))
    return int(kib) / 1024


def look() -> list[float]:
    """[resident MiB, threads, open files] of this process."""
    own = psutil.Process()
    return [own.memory_info().rss / 2**20, float(own.num_threads()), float(own.num_fds())]


class Light:
    """A :class:`~fedloom.engines.federation.Device` without a worker; all of a process share one host."""

    lock = threading.Lock()

    def __init__(self) -> None:
        self.host = host()

    def greet(self, greeting: str) -> dict[str, Any]:
        """Nothing to make ready."""
        return {}

    def answer(self, client: int, state: str, committed: str, blob: Blob) -> tuple[Blob | Failure, str]:
        """The echo."""
        with self.lock:
            (answer,) = self.host.answer([blob])
        return answer, state


def attend(folder: Path, port: str, k: int, device: Any) -> None:
    """Be the node of device ``k``."""
    from fedloom.engines.device import device_app
    from fedloom.engines.node import Credentials, Node

    place = folder / f"device-{k}"
    credentials = Credentials.read(place / "device.key", place / "ca.pem")
    Node(
        f"127.0.0.1:{port}",
        credentials,
        device_app(device),
        lambda said: print(f"device {k}: {said}", file=sys.stderr) if "joined" not in said else None,
    ).serve(threading.Event())


def main(words: Sequence[str]) -> None:
    """One of the programs above."""
    role, *rest = words
    if role == "server":
        serve(Path(rest[0]), [Part(**part) for part in json.loads(rest[1])])
        return
    threading.Thread(target=end_with_parent, daemon=True).start()
    if role == "worker":
        from fedloom.engines.workers import ordered
        from fedloom.engines.workers import serve as answer

        answer(ordered(rest[-1])[0], host())
    elif role == "device":
        from fedloom.engines.resident import Resident
        from fedloom.engines.workers import Start

        folder, port, k = rest
        start = Start((sys.executable, "-W", "ignore", "-m", "bench.federating", "worker"), {}, lambda number: {})
        attend(Path(folder), port, int(k), Resident(Path(folder) / f"device-{k}" / "states", lambda greeting: start, LONGEST))
    elif role == "crowd":
        folder, port, count = rest
        nodes = [threading.Thread(target=attend, args=(Path(folder), port, k, Light())) for k in range(int(count))]
        for node in nodes:
            node.start()
        for node in nodes:
            node.join()
    else:
        sys.exit(f"no role '{role}'; there are server, device, crowd and worker")


if __name__ == "__main__":
    main(sys.argv[1:])
