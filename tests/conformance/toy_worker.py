"""A worker over the toy, for ``test_workers.py``: ``python -m tests.conformance.toy_worker SOCKET``.

As a program of its own, with the word ``parent``, it is a process that starts workers and waits to be killed.
"""

from __future__ import annotations

import os
import signal
import sys
import threading
import time
from pathlib import Path

from fedloom.client.client import Client
from fedloom.client.host import Host
from fedloom.client.store import ClientStore
from fedloom.engines.workers import Start, Workers, ordered, serve
from fedloom.messages import Task, Update, on_client
from fedloom.run.worker import end_with_parent
from tests.conformance.toy import DIGEST, Adder, Toy, device


class Mortal(Toy):
    """The toy, with operations that take time or the whole process with them."""

    @on_client
    def where(self, c: Client, task: Task):
        """Says in which process it ran, after so many seconds."""
        self._begun("where", c)
        time.sleep(float(task.settings["seconds"]))
        return Update(c.id, 1, {}, {"process": os.getpid(), "number": os.environ["TOY_NUMBER"], "visits": float(c.private["visits"])})
        yield

    @on_client
    def grow(self, c: Client, task: Task):
        """Holds so many bytes for a minute."""
        self._begun("grow", c)
        held = b"x" * int(task.settings["bytes"])
        time.sleep(60.0)
        return Update(c.id, len(held))
        yield

    @on_client
    def die(self, c: Client, task: Task):
        """Kills its process with signal 9, after its neighbours in the wave have stored their state, as often as the file has letters."""
        self._begun("die", c)
        yield []
        path = Path(str(task.settings["lives"]))
        left = path.read_text()
        path.write_text(left[1:])
        if left:
            os.kill(os.getpid(), signal.SIGKILL)
        return Update(c.id, 1, {}, {"visits": float(c.private["visits"])})


def start() -> Start:
    """How a toy worker starts."""
    return Start((sys.executable, "-m", "tests.conformance.toy_worker"), {}, lambda number: {"TOY_NUMBER": str(number)})


def main() -> None:
    """Serve."""
    threading.Thread(target=end_with_parent, daemon=True).start()
    line, _ = ordered(sys.argv[-1])
    serve(
        line,
        Host(Mortal(), device, Adder(), ClientStore(), os.environ.get("TOY_DIGEST", DIGEST)),
        {"notes": os.environ["TOY_NOTES"].split(";")} if "TOY_NOTES" in os.environ else None,
    )


def parent(folder: Path) -> None:
    """Keep a worker busy for a minute; its id is in ``folder``."""
    engine = Workers(start(), 1, ClientStore(folder / "clients"), DIGEST, 1)
    engine.run([Task("where", 0, {}, {"seconds": 0.0})])
    (folder / "workers").write_text(" ".join(str(worker.process.pid) for worker in engine.workers))
    engine.run([Task("where", 0, {}, {"seconds": 60.0})])


if __name__ == "__main__":
    parent(Path(sys.argv[2])) if sys.argv[1] == "parent" else main()
