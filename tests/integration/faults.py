"""Faults against a small real federation, one after another, and what came of each: real processes on loopback, over TLS.

    python -m tests.integration.faults FOLDER [NAME ...]
    python -m tests.integration.faults --list

Prints a Markdown table, a row a fault: what was done, rounds that counted of those in which it was done, whether the server's state and the
names of all devices' states (which are fingerprints of what they hold) are to the bit those of the same participation in one process
without any fault, the accuracy (of the devices with their own layers; for the hostile quarter of the global model), and what was told.
Exits with 1 if anything is not as it must be.

Most faults hit one federation that stands still between them: four devices, three a round, FibecFed. Device 1 is ``wrapped.py``, which
lies when it is told to; the server is too, so that it can be killed at a given line and stands still between faults. Device 2 is behind a
network of its own: a network namespace where this may make one, a proxy that swallows everything otherwise. The server's folder and device
3's are small file systems of their own (tmpfs) where this may mount them; otherwise a limit on the size of files (RLIMIT_FSIZE) fills them.
The hostile quarter has federations of its own, of eight devices, two of them wrapped.
"""

from __future__ import annotations

import contextlib
import json
import os
import resource
import signal
import socket
import ssl
import subprocess
import sys
import tempfile
import threading
import time
import warnings
from base64 import b64decode, b64encode
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from datetime import timedelta
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import psutil
import torch

from fedloom.client.store import ClientStore
from fedloom.engines.local import Local
from fedloom.engines.wrap import Hostile, scaled
from fedloom.methods import named
from fedloom.methods.fibecfed import FibecFed
from fedloom.run.deployment.certificates import issue
from fedloom.run.evaluation import evaluate
from fedloom.run.experiment import Experiment
from fedloom.run.world import build
from fedloom.server.robust import RULES
from tests import tiny
from tests.integration.federating import COMMAND, HERE, Federation, checkpointed, differs, free_port, replay, strayed

with warnings.catch_warnings():  # libraries that Flower imports use deprecated names of their own
    warnings.simplefilter("ignore", DeprecationWarning)
    from flwr.supercore.date import now
    from flwr.supercore.primitives.asymmetric import public_key_to_bytes, sign_message

    from fedloom.engines.federation import LATE
    from fedloom.engines.node import STATUS, Credentials, asked

WRAPPED = (sys.executable, "-W", "ignore", str(Path(__file__).with_name("wrapped.py")))
PATIENCE = ("--wait", "12", "--deadline", "45", "--linger", "1")
LINGER = 1.0
LR = 0.02
GLOBAL = 1
"""Layers of the tiny model's three that are global in the standing federation: the others are its devices' state."""
LIAR, BEHIND, SMALL = "1", "2", "3"
EVERYBODY = ("0", LIAR, BEHIND, SMALL)
ROUND = 120.0
"""Seconds after which whatever was waited for has not happened."""


class Broken(AssertionError):
    """Something is not as it must be."""


def must(holds: object, said: str) -> None:
    """Insist.

    Raises:
        Broken: it does not hold.
    """
    if not holds:
        raise Broken(said)


def until(holds: Callable[[], Any], what: str, seconds: float = ROUND) -> Any:
    """Wait for it, and return what it gives.

    Raises:
        Broken: it did not come.
    """
    end = time.monotonic() + seconds
    while not (found := holds()):
        must(time.monotonic() < end, f"within {seconds:g} s it did not happen that {what}")
        time.sleep(0.05)
    return found


# ---- data ---------------------------------------------------------------------------------------------------------------------


def sentences(folder: Path) -> Path:
    """Texts of the tiny model's words, four of five of them from the third of the words that the label names."""
    folder.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(5)
    for split, count in {"train": 480, "validation": 40, "test": 120}.items():
        rows = []
        for _ in range(count):
            label, words = int(rng.integers(3)), rng.integers(0, 20, size=rng.integers(2, 9))
            words = np.where(rng.random(len(words)) < 0.2, rng.integers(0, 60, size=len(words)), 20 * label + words)
            rows.append({"text": " ".join(f"w{word}" for word in words), "label": "abc"[label]})
        (folder / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def experiment_of(folder: Path, layers: int, **fields: Any) -> Experiment:
    """FibecFed with the tiny model on :func:`sentences`, so many layers global (0: three of four, as it comes)."""
    method = named("fibecfed")()
    assert isinstance(method, FibecFed)
    method = replace(method, inner=replace(method.inner, lr=LR), gal=replace(method.gal, count=layers))
    shape: dict[str, Any] = {"alpha": 1.0, "evaluate_every": 0, "seed": 5, "max_length": 24, **fields}
    return Experiment(method, data=str(sentences(folder / "data")), model=str(tiny.folder()), **shape)


# ---- what is around the devices -------------------------------------------------------------------------------------------------


def tried(*command: str) -> bool:
    """Whether the command can be run, and ends well."""
    try:
        return subprocess.run(command, capture_output=True, timeout=20).returncode == 0
    except (OSError, subprocess.TimeoutExpired):
        return False


class Namespace:
    """A network of its own, joined to this one by a pair of virtual interfaces (root)."""

    kind = "a network namespace, its interface taken down"

    def __init__(self, port: int) -> None:
        self.name, self.link = f"fl{os.getpid()}", f"fl{os.getpid() % 10**6}"
        self.outside, self.inside = (f"10.213.{os.getpid() % 250}.{last}" for last in (1, 2))
        self.address, self.prefix = f"{self.outside}:{port}", ("ip", "netns", "exec", self.name)

    def made(self) -> bool:
        """Make it; False, with nothing left, if that is not allowed."""
        inner = ("ip", "-n", self.name)
        steps = (
            ("ip", "netns", "add", self.name),
            ("ip", "link", "add", self.link, "type", "veth", "peer", "name", f"{self.link}p"),
            ("ip", "link", "set", f"{self.link}p", "netns", self.name),
            ("ip", "addr", "add", f"{self.outside}/30", "dev", self.link),
            ("ip", "link", "set", self.link, "up"),
            (*inner, "addr", "add", f"{self.inside}/30", "dev", f"{self.link}p"),
            (*inner, "link", "set", f"{self.link}p", "up"),
            (*inner, "link", "set", "lo", "up"),
        )
        if all(tried(*step) for step in steps):
            return True
        self.end()
        return False

    def cut(self) -> None:
        must(tried("ip", "link", "set", self.link, "down"), "the interface went down")

    def mend(self) -> None:
        must(tried("ip", "link", "set", self.link, "up"), "the interface came up")

    def end(self) -> None:
        tried("ip", "link", "del", self.link)
        tried("ip", "netns", "del", self.name)


class Proxy:
    """Carries TCP between a device and the server; while it is cut it takes everything and passes nothing on."""

    kind = "a TCP proxy that passes nothing on (no namespace without root)"
    outside, prefix = HERE, ()

    def __init__(self, port: int) -> None:
        self.to, self.whole, self.ended = port, threading.Event(), False
        self.whole.set()
        self.listening = socket.create_server((HERE, 0))
        self.address = f"{HERE}:{self.listening.getsockname()[1]}"
        threading.Thread(target=self._accept, daemon=True).start()

    def _accept(self) -> None:
        with contextlib.suppress(OSError):
            while True:
                one, _ = self.listening.accept()
                threading.Thread(target=self._join, args=(one,), daemon=True).start()

    def _join(self, one: socket.socket) -> None:
        self.whole.wait()
        with contextlib.suppress(OSError), one, socket.create_connection((HERE, self.to)) as other:
            back = threading.Thread(target=self._carry, args=(other, one), daemon=True)
            back.start()
            self._carry(one, other)
            back.join()

    def _carry(self, one: socket.socket, other: socket.socket) -> None:
        with contextlib.suppress(OSError):
            while some := one.recv(65536):
                self.whole.wait()
                other.sendall(some)
            other.shutdown(socket.SHUT_WR)

    def cut(self) -> None:
        self.whole.clear()

    def mend(self) -> None:
        self.whole.set()

    def end(self) -> None:
        self.listening.close()


class Disk:
    """A folder on a file system of its own (root), or in whose processes files may not grow."""

    def __init__(self, folder: Path, size: str) -> None:
        folder.mkdir(parents=True)
        self.folder, self.own = folder, tried("mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(folder))
        self.kind = f"a tmpfs of {size}, filled" if self.own else "RLIMIT_FSIZE, files cannot grow (no mount without root)"

    def fill(self, process: int, said: int = 0) -> None:
        """Leave no room; where it is a limit that does so, ``said`` bytes and some more, so that the process can still tell of it."""
        if not self.own:
            resource.prlimit(process, resource.RLIMIT_FSIZE, (said + 500, resource.RLIM_INFINITY))
            return
        with (self.folder / "filler").open("wb", buffering=0) as file, contextlib.suppress(OSError):
            while True:
                file.write(bytes(1024))

    def empty(self, process: int) -> None:
        if self.own:
            (self.folder / "filler").unlink()
        elif psutil.pid_exists(process):
            resource.prlimit(process, resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))

    def end(self) -> None:
        if self.own:
            tried("umount", "-l", str(self.folder))


# ---- the federation that most faults hit ----------------------------------------------------------------------------------------


@dataclass
class Row:
    """What came of a fault. ``rounds``: after which round it began and after which it ended. ``identical``: None where
    nothing is compared."""

    name: str
    what: str
    told: str
    rounds: tuple[int, int] | None = None
    counted: str = "–"
    identical: bool | None = None
    score: float | None = None
    wrong: str = ""

    def __str__(self) -> str:
        same = {True: "yes", False: "**no**", None: "–"}[self.identical]
        cells = (self.name, self.what, self.counted, same, "–" if self.score is None else f"{self.score:.3f}", self.told)
        line = "| " + " | ".join(" ".join(cell.replace("|", "/").split()) for cell in cells) + " |"
        return line + (f" **WRONG: {self.wrong}**" if self.wrong else "")


HEAD = "| fault | what was done | rounds that counted | same bits | accuracy | what was told |\n|---|---|---|---|---|---|"


@dataclass
class Standing:
    """The federation that faults hit one after another, and what its state was after each."""

    there: Federation
    cable: Namespace | Proxy
    disks: dict[str, Disk]
    snapshots: dict[int, tuple[dict, dict[str, torch.Tensor]]] = field(default_factory=dict)
    recorded_at: float = 0.0

    def path(self, who: str, name: str) -> Path:
        return self.there.folder / f"wrapped-{who}" / name

    def order(self, who: str, what: str) -> None:
        """Tell a wrapped one what is to go wrong; empty: nothing."""
        path = self.path(who, "order")
        path.with_suffix(".new").write_text(what)
        os.replace(path.with_suffix(".new"), path)

    def round(self) -> int:
        """The last that was completed."""
        rows = self.there.rows()
        return rows[-1]["round"] if rows else -1

    def go(self) -> None:
        """Let the server go on."""
        self.path("server", "until").unlink(missing_ok=True)

    def stop(self, rounds: int = 0) -> int:
        """Have the server stand still after so many rounds more; the round after which it does."""
        at = max(self.round(), 0) + rounds
        self.path("server", "until").write_text(str(at))

        def stands() -> bool:
            path = self.path("server", "held")
            return path.exists() and int(path.read_text() or -1) == self.round() >= at

        until(stands, f"the server stands still after round {at}")
        self.snapshots[self.round()] = checkpointed(self.there.folder / self.there.out)
        return self.round()

    def since(self, round: int) -> list[dict]:
        """The rows after that round."""
        return [row for row in self.there.rows() if row["round"] > round]

    def answers_again(self, who: str, after: int) -> int:
        """Go on until this device's answer counts in a round after that one, and stand still."""
        self.go()
        until(lambda: any(int(who) in row["answered"] for row in self.since(after)), f"device {who} answers again")
        return self.stop()

    def failed(self, who: str, after: int, but: Sequence[str] = (LATE,)) -> str:
        """Go on until this device has failed in a round after that one, for another reason than these. The reason."""
        self.go()

        def reason() -> str:
            reasons = [row["failed"].get(who, "") for row in self.since(after)]
            return next((reason for reason in reasons if reason and reason not in but), "")

        return until(reason, f"device {who} fails")

    def restart(self, who: str) -> None:
        """Start somebody again who has ended."""
        self.there.processes[who].wait(20)
        self.path("server", "held").unlink(missing_ok=True) if who == "server" else None
        self.there.start(who)

    def present(self) -> list[int]:
        """Who is there, as the server says."""
        certs = self.there.folder / "certs" / "device-0"
        told = asked(f"{HERE}:{self.there.port}", Credentials.read(certs / "device.key", certs / "ca.pem"), STATUS)
        return list(told["here"])

    def worker(self, who: str) -> int:
        """The process number of a device's worker."""
        process = self.there.processes[who].pid
        return until(lambda: [child.pid for child in psutil.Process(process).children()], f"device {who} has a worker")[0]

    def said_since(self, who: str, length: int) -> str:
        return self.there.said(who)[length:]

    def ready(self) -> None:
        """Go on until the last faults are over: all four answer, none is left out, and stand still."""
        self.order(LIAR, "")
        self.order("server", "")
        at = self.round()
        self.go()
        until(lambda: {k for row in self.since(at) for k in row["answered"]} == {0, 1, 2, 3}, "all devices answer", 90)
        self.stop()


@contextlib.contextmanager
def standing(folder: Path, **fields: Any) -> Iterator[Standing]:
    """The federation, after its set-up; all of it is gone afterwards. ``fields``: of its experiment."""
    port = free_port()
    experiment = experiment_of(folder, GLOBAL, clients=4, cohort=3, rounds=3000, **fields)
    cable: Namespace | Proxy = Namespace(port)
    if isinstance(cable, Namespace) and not cable.made():
        cable = Proxy(port)
    disks: dict[str, Disk] = {}
    listen = "0.0.0.0" if isinstance(cable, Namespace) else HERE
    there = Federation(
        folder,
        experiment,
        port,
        (*PATIENCE, "--method.inner.lr", str(LR), "--method.gal.count", str(GLOBAL)),
        listen,
        {BEHIND: cable.address},
    )
    try:
        there.prepare([HERE, *({cable.outside} - {HERE})])
        disks["server"], disks[SMALL] = Disk(folder / there.out, "2m"), Disk(folder / f"device-{SMALL}", "256k")
        for who in ("server", LIAR):
            (folder / f"wrapped-{who}").mkdir()
            there.programs[who] = (*WRAPPED, str(folder / f"wrapped-{who}"))
        there.programs[BEHIND] = (*cable.prefix, *COMMAND)
        here = Standing(there, cable, disks)
        here.path("server", "until").write_text("2")
        for who in ("server", *EVERYBODY):
            there.start(who)
        there.begun()
        until(lambda: here.round() >= 2, "two rounds are done")
        here.stop()
        yield here
    finally:
        for process in there.processes.values():
            with contextlib.suppress(psutil.NoSuchProcess):
                for one in [*psutil.Process(process.pid).children(recursive=True), process]:
                    one.kill()
        there.end()
        for disk in disks.values():
            disk.end()
        cable.end()


Fault = Callable[[Standing, str], Row]
FAULTS: dict[str, tuple[Fault, str]] = {}
"""Each fault by its name, and what it needs to know beside it."""


def fault(*names: str, **orders: str) -> Callable[[Fault], Fault]:
    """Name a fault; with ``orders``, several alike."""

    def known(made: Fault) -> Fault:
        FAULTS.update({name.replace("_", " "): (made, order) for name, order in {**dict.fromkeys(names, ""), **orders}.items()})
        return made

    return known


# ---- processes that end or stop -------------------------------------------------------------------------------------------------


@fault("device killed")
def device_killed(here: Standing, _: str) -> Row:
    at = here.round()
    here.path(LIAR, "killed").unlink(missing_ok=True)
    here.order(LIAR, "die")
    here.go()
    until(lambda: here.there.processes[LIAR].poll() is not None, "the device is dead")
    must(here.path(LIAR, "killed").read_text().startswith("train"), "it died while it trained")
    here.restart(LIAR)
    end = here.answers_again(LIAR, at)
    reasons = [row["failed"]["1"] for row in here.since(at) if "1" in row["failed"]]
    told = " ".join(sorted(set(reasons))) or "nothing: it was back in time"
    return Row("", f"signal 9 to device {LIAR} while its worker trained; started again", told, (at, end))


@fault("worker killed")
def worker_killed(here: Standing, _: str) -> Row:
    at, said = here.round(), len(here.there.said(LIAR))
    here.path(LIAR, "killed").unlink(missing_ok=True)
    here.order(LIAR, "worker dies")
    here.go()
    until(here.path(LIAR, "killed").exists, "the worker is dead")
    end = here.answers_again(LIAR, at)
    told = [line for line in here.said_since(LIAR, said).splitlines() if "another takes its place" in line]
    must(told, "the device tells of it")
    return Row("", "signal 9 to a device's worker while it trained", f"the device: {told[0]}", (at, end))


@fault(
    server_killed_while_it_aggregates="aggregating",
    server_killed_before_its_checkpoint="row",
    server_killed_within_its_checkpoint="index",
)
def server_killed(here: Standing, order: str) -> Row:
    at = here.round()
    here.order("server", order)
    here.go()
    until(lambda: here.there.processes["server"].poll() == -signal.SIGKILL, "the server is dead")
    body, _ = checkpointed(here.there.folder / here.there.out)
    rows = here.there.rows()
    begun = rows[-1]["round"] - body["round"]
    must(begun == (0 if order == "aggregating" else 1), f"{begun} rows are ahead of the checkpoint")
    here.path("server", "until").write_text(str(at + 3))
    here.restart("server")
    until(lambda: here.path("server", "held").exists() and here.round() >= at + 3, "it goes on", 90)
    end = here.stop()
    must([row["round"] for row in here.there.rows()] == list(range(end + 1)), "every round has one row")
    where = {"aggregating": "after the first of three updates was summed", "row": "after a round's row, before its checkpoint"}
    where["index"] = "after a checkpoint's tensors, before its index"
    lost = {0: "the round in progress was done again", 1: "the round without a checkpoint was done again"}[begun]
    return Row("", f"signal 9 to the server {where[order]}; the same command again", lost, (at, end))


@fault("device stopped")
def device_stopped(here: Standing, _: str) -> Row:
    at, process = here.round(), here.there.processes["0"].pid
    both = (process, here.worker("0"))
    for one in both:
        os.kill(one, signal.SIGSTOP)
    try:
        here.go()
        reason = here.failed("0", at, ())
        begun = time.monotonic()
        until(lambda: time.monotonic() > begun + 3 * LINGER, "more than the linger is over")
    finally:
        for one in both:
            os.kill(one, signal.SIGCONT)
    end = here.answers_again("0", here.round())
    return Row("", f"SIGSTOP to device 0 and its worker, for longer than --linger {LINGER:g}", reason, (at, end))


# ---- network and disk -----------------------------------------------------------------------------------------------------------


@fault("network cut")
def network_cut(here: Standing, _: str) -> Row:
    at = here.round()
    here.cable.cut()
    try:
        here.go()
        first = here.failed(BEHIND, at, ())
        gone = until(lambda: int(BEHIND) not in here.present(), "the server sees that it is away", 60) is True
        cut = here.round()
        until(lambda: here.round() >= cut + 2, "rounds go on without it")
        later = [row["failed"][BEHIND] for row in here.since(cut) if BEHIND in row["failed"]]
    finally:
        here.cable.mend()
    end = here.answers_again(BEHIND, here.round())
    must(gone and here.there.processes[BEHIND].poll() is None, "the device's process stayed")
    return Row(
        "",
        f"device {BEHIND}: {here.cable.kind}, until the server took it for away; then mended",
        "; ".join(dict.fromkeys([first, *later])),
        (at, end),
    )


@fault("server's disk full")
def server_disk(here: Standing, _: str) -> Row:
    at, disk, said = here.round(), here.disks["server"], len(here.there.said("server"))
    process = here.there.processes["server"]
    disk.fill(process.pid, said + 1500)
    try:
        here.go()
        code = until(lambda: process.poll() is not None and (process.returncode, None), "the server ends")[0]
    finally:
        disk.empty(process.pid)
    told = here.said_since("server", said).strip().splitlines()[-1]
    must(code == 1 and "free" in told.lower() and "same command" in told, f"it ended with {code}: {told}")
    here.path("server", "until").write_text(str(at + 3))
    here.restart("server")
    until(lambda: here.round() >= at + 3, "it goes on", 90)
    end = here.stop()
    must([row["round"] for row in here.there.rows()] == list(range(end + 1)), "every round has one row")
    return Row("", f"{disk.kind}; emptied, and the same command again", f"the server ended with 1: {told}", (at, end))


@fault("device's disk full")
def device_disk(here: Standing, _: str) -> Row:
    at, disk, worker = here.round(), here.disks[SMALL], here.worker(SMALL)
    disk.fill(worker)
    try:
        reason = here.failed(SMALL, at)
    finally:
        disk.empty(worker)
    must("pace" in reason or "large" in reason, f"the reason is another: {reason}")
    return Row("", f"device {SMALL}: {disk.kind}; emptied", reason, (at, here.answers_again(SMALL, at)))


@fault("corrupt checkpoint tensors", corrupt_checkpoint_index="latest.json")
def corrupt_checkpoint(here: Standing, which: str) -> Row:
    at, place = here.round(), here.there.folder / here.there.out / "checkpoints"
    process = here.there.processes["server"]
    process.terminate()
    process.wait(20)
    before = here.there.rows()
    path = place / (which or json.loads((place / "latest.json").read_text())["server"][0])
    good, said = path.read_bytes(), len(here.there.said("server"))
    bad = bytearray(good)
    bad[good.index(b'"round": ') + len('"round": ') if which else len(good) - 9] ^= 1
    path.write_bytes(bytes(bad))
    try:
        here.there.start("server")
        code = here.there.wait(ROUND)
        told = here.said_since("server", said).strip().splitlines()[-1]
        must(code == 2 and "corrupt" in told and "Nothing was overwritten" in told and "Delete" in told, f"it ended with {code}: {told}")
        must(path.read_bytes() == bytes(bad) and here.there.rows() == before, "nothing was overwritten")
    finally:
        path.write_bytes(good)
    here.path("server", "until").write_text(str(at + 2))
    here.restart("server")
    until(lambda: here.round() >= at + 2, "it goes on", 90)
    what = f"one bit of {'latest.json' if which else 'the server file of tensors'} flipped; put back, and the same command again"
    told = told.replace(str(place.parent), "OUT").replace(str(here.there.out), "OUT")
    return Row("", what, f"the server ended with 2: {told}", (at, here.stop()))


# ---- who does not belong --------------------------------------------------------------------------------------------------------


def stranger(here: Standing, certs: Path, server: str) -> tuple[int, str]:
    """Try to join; the exit code and the last that was said. Nobody may be there who was not there before."""
    before, devices = here.present(), here.there.folder / "stranger"
    words = ["join", server, str(here.there.folder / "shards" / "0"), "--certs", str(certs), "--out", str(devices)]
    done = subprocess.run([*COMMAND, *words], capture_output=True, text=True, timeout=ROUND)
    must(done.returncode != 0, f"it was let in: {done.stderr}")
    must(here.present() == before, "who is there is who was there before")
    return done.returncode, done.stderr.strip().splitlines()[-1].replace(str(here.there.folder) + "/", "").replace(server, "SERVER")


def other_authority(here: Standing) -> Path:
    """Certificates and keys of another federation."""
    issue(here.there.folder / "others", 1, (HERE,))
    return here.there.folder / "others"


def copied(here: Standing, key: Path, name: str) -> Path:
    """A device's folder with this key and the federation's own ca.pem."""
    place = here.there.folder / name
    place.mkdir(exist_ok=True)
    (place / "ca.pem").write_bytes((here.there.folder / "certs" / "device-0" / "ca.pem").read_bytes())
    (place / "device.key").write_bytes(key.read_bytes())
    (place / "device.key").chmod(0o600)
    return place


@fault("wrong authority")
def wrong_authority(here: Standing, _: str) -> Row:
    code, told = stranger(here, other_authority(here) / "device-0", f"{HERE}:{here.there.port}")
    must("not certified by the authority" in told, told)
    return Row("", "a device that trusts another authority meets this server", f"exit {code}: {told}")


@fault("wrong name")
def wrong_name(here: Standing, _: str) -> Row:
    code, told = stranger(here, here.there.folder / "certs" / "device-0", f"localhost:{here.there.port}")
    must("not certified by the authority" in told and "name mismatch" in told, told)
    return Row("", "the server under a name that its certificate is not for", f"exit {code}: {told}")


@fault("unknown key")
def unknown_key(here: Standing, _: str) -> Row:
    place = copied(here, other_authority(here) / "device-0" / "device.key", "unknown")
    code, told = stranger(here, place, f"{HERE}:{here.there.port}")
    must("does not know this device's key" in told, told)
    return Row("", "a key that the server was not given, with the right authority", f"exit {code}: {told}")


@fault("open key")
def open_key(here: Standing, _: str) -> Row:
    place = copied(here, here.there.folder / "certs" / "device-0" / "device.key", "open")
    (place / "device.key").chmod(0o644)
    code, told = stranger(here, place, f"{HERE}:{here.there.port}")
    must("chmod 600" in told, told)
    return Row("", "a device's key of mode 644", f"exit {code}: {told}")


# ---- the wire -------------------------------------------------------------------------------------------------------------------


def sent_again(here: Standing, one: dict, changed: dict[str, str] | None = None) -> int:
    """The recorded request once more, as it went out but for these headers; the status that came back."""
    trusted = ssl.create_default_context(cafile=str(here.there.folder / "certs" / "device-0" / "ca.pem"))
    headers = {name: value for name, value in dict(map(tuple, one["headers"])).items() if name != "content-length"}
    return httpx.post(one["url"], headers=headers | (changed or {}), content=b64decode(one["body"]), verify=trusted, timeout=20).status_code


def recorded(here: Standing) -> list[dict]:
    """Pushes of the lying device, as they went out, from a round that is complete."""
    path = here.path(LIAR, "recorded")
    if not path.exists():
        at = here.round()
        here.order(LIAR, "record")
        here.answers_again(LIAR, at)
        here.order(LIAR, "")
        here.recorded_at = time.monotonic()
    return [json.loads(line) for line in path.read_text().splitlines()]


def statuses(here: Standing, changed: Callable[[dict], dict[str, str]] = lambda one: {}) -> str:
    """All recorded requests again, twice: while the server stands still and while it goes on."""
    pushes = recorded(here)
    found = [sent_again(here, one, changed(one)) for one in pushes]
    here.go()
    found += [sent_again(here, one, changed(one)) for one in pushes]
    return ", ".join(f"{found.count(status)} × {status}" for status in sorted(set(found)))


@fault("replayed at once")
def replayed_at_once(here: Standing, _: str) -> Row:
    pushes, at = recorded(here), here.round()
    told = statuses(here)
    end = here.answers_again(LIAR, at)
    what = f"{len(pushes)} signed requests with which device {LIAR} pushed an answer, recorded and sent again, byte for byte, twice"
    return Row("", what, f"HTTP {told}; nothing counted twice", (at, end))


@fault("replayed later")
def replayed_later(here: Standing, _: str) -> Row:
    pushes, at = recorded(here), here.round()
    key = Credentials.read(here.there.folder / "certs" / f"device-{LIAR}" / "device.key", None).key
    waited = time.monotonic() - here.recorded_at

    def older(one: dict) -> dict[str, str]:
        if waited > 310:
            return {}
        stamp = (now() - timedelta(seconds=310)).isoformat()
        return {"flwr-timestamp": stamp, signature_header(one): b64encode(sign_message(key, stamp.encode())).decode()}

    told = statuses(here, older)
    must(told == f"{2 * len(pushes)} × 401", f"an old signature was taken: {told}")
    how = f"recorded {waited:.0f} s before" if waited > 310 else "with the device's own signature of 310 s before"
    return Row("", f"{len(pushes)} signed requests sent again, {how}", f"HTTP {told}", (at, here.stop(1)))


@fault("replayed with another stamp")
def replayed_stamped(here: Standing, _: str) -> Row:
    pushes, at = recorded(here), here.round()
    told = statuses(here, lambda one: {"flwr-timestamp": now().isoformat()})
    must(told == f"{2 * len(pushes)} × 401", f"another stamp was taken: {told}")
    return Row("", f"{len(pushes)} signed requests sent again with a time stamp of now", f"HTTP {told}", (at, here.stop(1)))


@fault("signed by another device")
def signed_by_another(here: Standing, _: str) -> Row:
    pushes, at = recorded(here), here.round()
    key = Credentials.read(here.there.folder / "certs" / "device-0" / "device.key", None).key

    def other(one: dict) -> dict[str, str]:
        stamp, public = now().isoformat(), b64encode(public_key_to_bytes(key.public_key())).decode()
        names = [name for name, _ in one["headers"] if "public-key" in name]
        return {"flwr-timestamp": stamp, names[0]: public, signature_header(one): b64encode(sign_message(key, stamp.encode())).decode()}

    told = statuses(here, other)
    must(told == f"{2 * len(pushes)} × 401", f"device 0 spoke as device {LIAR}: {told}")
    return Row("", f"{len(pushes)} requests of device {LIAR} signed by device 0", f"HTTP {told}", (at, here.stop(1)))


def signature_header(one: dict) -> str:
    return next(name for name, _ in one["headers"] if "signature" in name)


@fault(
    flipped_bit="flipped bit",
    another_name="another name",
    another_round="another round",
    another_client="another client",
    another_experiment="another experiment",
    no_message="no message",
    NaN="nan",
    infinity="infinity",
    another_shape="shape",
    another_type="type",
    missing_tensor="missing",
    extra_tensor="extra",
    absurd_norm="absurd",
    negative_examples="negative",
    earlier_answer_again="old answer",
)
def hostile_device(here: Standing, order: str) -> Row:
    what = {
        "flipped bit": "a bit of a pushed object flipped",
        "another name": "an answer in another node's name",
        "another round": "a reply to a message of an earlier round",
        "another client": "an answer of another client",
        "another experiment": "an answer of another experiment",
        "no message": "202 bytes that are no message",
        "nan": "a NaN",
        "infinity": "an infinity",
        "shape": "a tensor with another shape",
        "type": "a tensor in float64",
        "missing": "a tensor missing",
        "extra": "a tensor that was not asked for",
        "absurd": "a million times as far",
        "negative": "−5 examples",
        "old answer": "the answer of an earlier round as that of this one",
    }[order]
    at, said = here.round(), len(here.there.said(LIAR))
    here.path(LIAR, "done").unlink(missing_ok=True)
    here.order(LIAR, order)
    here.go()
    until(here.path(LIAR, "done").exists, "the device lies")
    told_at = here.round()
    never = order in ("flipped bit", "another name", "another round")
    reason = here.failed(LIAR, told_at, () if never else (LATE,))
    lied = here.round()
    must(not any(1 in row["answered"] for row in here.since(at) if row["round"] <= lied), "the lie counted")
    here.order(LIAR, "")
    end = here.answers_again(LIAR, lied)
    away = [line for line in here.said_since(LIAR, said).splitlines() if "away" in line]
    told = f"{reason} (the device: {away[0]})" if never and away else reason
    return Row("", f"device {LIAR}: {what}", told.replace(f"{HERE}:{here.there.port}", "SERVER"), (at, end))


# ---- the table ------------------------------------------------------------------------------------------------------------------


def one_after_another(folder: Path, names: Sequence[str], scored: bool = True, **fields: Any) -> list[Row]:
    """The faults on one federation, and its state after each against a replay of all of it. ``fields``: of its experiment."""
    rows: list[Row] = []
    with standing(folder, **fields) as there:
        for name in names:
            made, order = FAULTS[name]
            begun = time.monotonic()
            try:
                row = replace(made(there, order), name=name)
                rows.append(row)
            except (Broken, OSError, subprocess.SubprocessError, psutil.Error) as error:
                rows.append(Row(name, "", "", wrong=f"{type(error).__name__}: {error}"))
            print(f"{name}: {time.monotonic() - begun:.0f} s {rows[-1].wrong}", file=sys.stderr, flush=True)
            if rows[-1].wrong:
                (folder / f"kept-{name}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in there.there.rows()))
                try:
                    there.ready()
                except Broken as error:
                    rows.append(Row("", "", "", wrong=f"it did not recover: {error}"))
                    break
        there.stop()
        lines = there.there.rows()
        (folder / "kept.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
        snapshots = dict(there.snapshots)
    compared(there.there.experiment, lines, snapshots, rows, scored)
    return rows


def compared(
    experiment: Experiment,
    lines: Sequence[dict],
    snapshots: dict[int, tuple[dict, dict[str, torch.Tensor]]],
    rows: Sequence[Row],
    scored: bool,
) -> None:
    """Fill in, from one replay of all rounds, what was the same and, if that is wanted, what the devices score."""
    due = {row.rounds[1]: [one for one in rows if one.rounds and one.rounds[1] == row.rounds[1]] for row in rows if row.rounds}
    world = build(experiment)
    with tempfile.TemporaryDirectory() as place:
        store = ClientStore(Path(place))
        for state in replay(experiment, lines, store):
            if state.round not in due:
                continue
            body, found = snapshots[state.round]
            other = differs(body, found, state) or strayed(body, store, experiment.clients)
            score = evaluate(world, state, Local(world.host(store))).scores["test"]["personalised"] if scored else None
            for row in due[state.round]:
                first, last = row.rounds or (0, 0)
                during = [line for line in lines if first < line["round"] <= last]
                row.counted = f"{sum(bool(line['answered']) for line in during)} / {len(during)}"
                row.identical, row.score = not other, score
                if other and not row.wrong:
                    row.wrong = f"not the same bits: {other}"
                if not all(line["answered"] for line in during) and not row.wrong:
                    row.wrong = "a round did not count"


# ---- a quarter of hostile devices -----------------------------------------------------------------------------------------------

QUARTER = (1, 4)
ROUNDS = 6


def quarter(folder: Path, rules: Sequence[str]) -> list[Row]:
    """Two devices of eight that send ten times their step, backwards, under each rule. It must cost the mean 0.15 of
    accuracy or more, and a rule less, against the same rule with nobody hostile."""
    rows: list[Row] = []
    port = free_port()
    experiment = experiment_of(folder, 0, clients=8, cohort=8, rounds=ROUNDS)
    there = Federation(folder, experiment, port, ("--method.inner.lr", str(LR), "--wait", "60", "--deadline", "120", "--linger", "60"))
    try:
        there.prepare()
        for k in QUARTER:
            place = folder / f"wrapped-{k}"
            place.mkdir()
            (place / "order").write_text("backwards")
            there.programs[str(k)] = (*WRAPPED, str(place))
        for k in range(8):
            there.start(str(k))
        for rule in rules:
            begun = time.monotonic()
            there.out, there.experiment = f"out-{rule}", replace(experiment, aggregation=rule)
            there.start("server")
            row = Row(f"hostile quarter, {rule}", f"2 of 8 devices send −10 times their step; --aggregation {rule}", "")
            try:
                code = there.wait(600)
                must(code == 0, f"the server ended with {code}: {there.said('server')[-500:]}")
                lines, results = there.rows()[1:], json.loads((folder / there.out / "results.json").read_text())
                counted = sum(bool(line["answered"]) for line in lines)
                row.counted, row.score = f"{counted} / {len(lines)}", results["final"]["global"]
                honest = played(there.experiment, (), [{"answered": list(range(8))}] * (ROUNDS + 1))[1]
                row.told = f"nothing: the form of the answers is right (with nobody hostile, in one process: {honest:.3f})"
                other, simulated = played(there.experiment, QUARTER, there.rows(), checkpointed(folder / there.out))
                row.identical = not other
                must(not other and simulated == row.score, f"not the bits of the same lies in one process: {other}, {simulated}")
                must(counted == ROUNDS, "a round did not count")
                if rule == "mean":
                    must(row.score < honest - 0.15, "the mean withstood")
                else:
                    must(row.score > honest - 0.15, "the rule did not withstand")
            except (Broken, OSError, subprocess.SubprocessError) as error:
                row.wrong = f"{type(error).__name__}: {error}"
                there.processes["server"].kill()
            rows.append(row)
            print(f"{row.name}: {time.monotonic() - begun:.0f} s {row.wrong}", file=sys.stderr, flush=True)
    finally:
        there.end()
    return rows


def played(
    experiment: Experiment, hostile: Sequence[int], lines: Sequence[dict], found: tuple[dict, dict[str, torch.Tensor]] | None = None
) -> tuple[str, float]:
    """The same participation with the same lies in one process: what of the checkpoint differs, and the global model's accuracy."""
    store, world = ClientStore(), build(experiment)
    *_, state = replay(experiment, lines, store, lambda engine: Hostile(engine, hostile, scaled(-10)))
    score = evaluate(world, state, Local(world.host(store))).scores["test"]["global"]
    return differs(*found, state) if found else "", score


def main() -> int:
    """As above."""
    words = sys.argv[1:]
    known = [*FAULTS, *(f"hostile quarter, {rule}" for rule in RULES)]
    if words == ["--list"] or not words:
        print("\n".join(known))
        return 0 if words else 2
    folder, names = Path(words[0]).resolve(), words[1:] or known
    unknown = sorted(set(names) - set(known))
    if unknown:
        print(f"there is no fault {unknown[0]!r}; --list shows them", file=sys.stderr)
        return 2
    torch.set_num_threads(1)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # what was begun is cleaned up
    on_one = [name for name in FAULTS if name in names]
    rules = [rule for rule in RULES if f"hostile quarter, {rule}" in names]
    print(HEAD, flush=True)
    rows = one_after_another(folder / "standing", on_one) if on_one else []
    print(*rows, sep="\n", flush=True)
    if rules:
        rows += (found := quarter(folder / "quarter", rules))
        print(*found, sep="\n")
    return 1 if any(row.wrong for row in rows) else 0


if __name__ == "__main__":
    sys.exit(main())
