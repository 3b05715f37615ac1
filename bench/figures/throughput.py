"""Examples trained a second: Fedloom, those whom a user would pick instead, and what the machine gives at large batches.

LoRA r 8 on MiniLM, the packaged TREC questions on 100 devices (label Dirichlet 1), 10 devices a round, batch 8, one local epoch, AdamW,
gradients clipped; float32, and bf16 with trained tensors in float32. Everybody trains on the same rows in the same order from the same
start (``bench/job.py``), and after the first round everybody's tensors must be those of the research script, or there is no figure.

Only rounds are timed, and not the first: loading, starting workers and ending are told apart, as seconds outside rounds. Contestants
take turns in several passes. The peers get what is fastest for them: of transformers' ways of attention the faster one for the step
that they all do, and, where they can spread over processes, the better of one with all cores and one a core. Both are found out in each
run. Fedloom is held in its better way against those that spread, and in one process against those that do not.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory
from typing import Any

from safetensors.torch import load_file

from bench.figure import command
from bench.job import experiment, export
from bench.peers.environment import PEERS, NotInstalled, python_of
from bench.row import Row
from bench.timing import ratio
from fedloom.model.base import Precision

Crew = tuple[int, int]
"""Worker processes, and PyTorch threads of each."""

PRECISIONS: tuple[Precision, ...] = ("float32", "bf16")

WARM, TIMED, PASSES = 1, 3, 2
"""Rounds that are thrown away and rounds that are timed in a pass, and passes."""

LONGEST = 240
"""Seconds after which a contestant is stopped."""

AGREE: Mapping[Precision, float] = {"float32": 1e-3, "bf16": 0.3}
"""How far tensors after one round may lie from the research script's in float32, as a share of the way that these went. The same work was
within 1e-4 in float32 and 0.03 in bf16. Other work: another cohort 0.67, the last step of every device left out 0.12, the last step, of
one example, of one device left out 0.026. So float32 shows that the steps are the same; bf16 is the same code."""

QUIET = {
    "CUDA_VISIBLE_DEVICES": "",
    "FLWR_DISABLE_UPDATE_CHECK": "1",
    "FLWR_TELEMETRY_ENABLED": "0",
    "HF_HUB_OFFLINE": "1",
    "RAY_USAGE_STATS_ENABLED": "0",
    "TOKENIZERS_PARALLELISM": "false",
}
"""Nobody uses an accelerator, or the network."""


@dataclass(frozen=True)
class Contestant:
    """A folder of ``bench/peers``, its name, what Fedloom's ratio to it should be, what one should know about it, and whether it can
    spread over processes: one that cannot is held against Fedloom in one process."""

    folder: str
    name: str
    at_least: float | None = None
    aim: float | None = None
    note: str = ""
    spreads: bool = False


FEDLOOM = Contestant("fedloom", "Fedloom", note="local engine or its workers, everything through its wire, as in fedloom run")
SCRIPT = Contestant("script", "FedAvg in a research script", note="load the global state, train, average the state dicts")
PLAIN = Contestant("plain", "plain PEFT loop", 2.0, 3.0, "no federation: one model, the same batches one after another")
RIVALS = (
    Contestant(
        "flower", "Flower simulation", 5.0, 10.0, "flwr 1.41, 100 virtual nodes on Ray, the model cached in each worker", spreads=True
    ),
    Contestant("pfl", "pfl", 2.0, 4.0, "pfl 0.6, PyTorchModel, the model resident in each process", spreads=True),
    Contestant("nvflare", "NVFlare simulator", 5.0, 10.0, "nvflare 2.9, ten resident sites that play each round's cohort", spreads=True),
    PLAIN,
    SCRIPT,
)
CEILING = Contestant(
    "ceiling", "large batches", 60.0, 85.0, "the plain PEFT step on rows of the timed rounds sorted by length, best of batches"
)


class Failed(RuntimeError):
    """A contestant broke, took too long or did other work; the message says which."""


@dataclass
class Taken:
    """What one contestant did in one precision.

    ``rates``: examples a second of each timed round, by crew. ``outside``: seconds outside rounds of each pass. ``apart``: the largest
    distance of its tensors after one round from the reference. ``fault``: why there is no figure, if there is none.
    """

    rates: dict[Crew, list[float]] = field(default_factory=dict)
    outside: list[float] = field(default_factory=list)
    apart: float = 0.0
    fault: str = ""

    @property
    def crew(self) -> Crew:
        """The one that did best, of those with the most samples: after the first pass only the best goes on."""
        return max(self.rates, key=lambda crew: (len(self.rates[crew]), median(self.rates[crew])))

    @property
    def best(self) -> list[float]:
        """The rates of that crew."""
        return self.rates[self.crew]

    @property
    def single(self) -> list[float]:
        """The rates of one process."""
        return next(rates for (processes, _), rates in self.rates.items() if processes == 1)


@dataclass(frozen=True)
class Course:
    """The job's folder, and how many rounds of it a contestant runs in a pass."""

    folder: Path
    rounds: int

    def run(self, who: Contestant, precision: Precision, attention: str, crew: Crew, script: str = "run") -> tuple[dict[str, Any], float]:
        """What the contestant's script wrote, and the seconds from its start to its end.

        Raises:
            NotInstalled: its packages cannot be had.
            Failed: it broke or took too long.
        """
        (processes, threads), peer = crew, who.folder
        out, log = self.folder / f"{who.folder}-{precision}.json", self.folder / f"{who.folder}-{precision}.log"
        given = {"job": self.folder, "out": out, "rounds": self.rounds, "precision": precision, "attention": attention}
        given |= {"processes": processes, "threads": threads}
        words = [str(python_of(peer)), "-W", "ignore"]
        if peer == "pfl" and processes > 1:
            words += ["-m", "torch.distributed.run", "--nproc-per-node", str(processes)]
        words += [str(PEERS / peer / f"{script}.py"), *(word for name, value in given.items() for word in (f"--{name}", str(value)))]
        environment = {**os.environ, **QUIET, "OMP_NUM_THREADS": str(threads), "PYTHONPATH": str(PEERS)}
        for stale in (out, out.with_suffix(".safetensors")):
            stale.unlink(missing_ok=True)
        began = time.perf_counter()
        with log.open("w") as said:
            process = subprocess.Popen(words, env=environment, cwd=self.folder, stdout=said, stderr=said, start_new_session=True)
            try:
                code = process.wait(LONGEST)
            except subprocess.TimeoutExpired as late:
                raise Failed(f"stopped after {LONGEST} s") from late
            finally:
                _end(process)
        if code or not out.exists():
            last = [line for line in log.read_text(errors="replace").splitlines() if line.strip()][-1:]
            raise Failed(f"exit code {code}: {' '.join(last)[:300]}")
        return json.loads(out.read_text()), time.perf_counter() - began

    def apart(self, who: Contestant, precision: Precision) -> float:
        """How far its tensors after the first round are from the reference, as a share of the way that this went.

        0 for the plain loop, which averages nothing.

        Raises:
            Failed: it left none, or they are so far that it was other work.
        """
        made = self.folder / f"{who.folder}-{precision}.safetensors"
        if who is PLAIN:
            return 0.0
        if not made.exists():
            raise Failed("it left no tensors of its first round, so nobody knows what it did")
        start, wanted, got = (load_file(f) for f in (self.folder / "start.safetensors", self.reference, made))
        if set(got) != set(wanted):
            raise Failed(f"it trained other tensors: {sorted(set(got) ^ set(wanted))[:4]}")
        way = sum(float((wanted[n] - start[n]).double().square().sum()) for n in start) ** 0.5
        apart = sum(float((got[n] - wanted[n]).double().square().sum()) for n in start) ** 0.5 / way
        if not apart <= AGREE[precision]:
            raise Failed(
                f"it did other work: its tensors are {apart:.2g} from the reference after one round, {AGREE[precision]:g} is allowed"
            )
        return apart

    @property
    def reference(self) -> Path:
        """The research script's tensors after one round in float32."""
        return self.folder / f"{SCRIPT.folder}-float32.safetensors"


def _end(process: subprocess.Popen[bytes]) -> None:
    """End whatever is left of a contestant."""
    try:
        os.killpg(process.pid, signal.SIGKILL)
    except ProcessLookupError:
        return
    finally:
        process.wait()


def crews(peer: str, cores: int) -> tuple[Crew, ...]:
    """What to try for a contestant on that many cores. NVFlare's sites are processes in any case."""
    match peer:
        case "nvflare":
            return ((10, 1),)
        case "fedloom" | "flower" | "pfl" if cores > 1:
            return ((1, cores), (cores, 1))
        case _:
            return ((1, cores),)


def turn(course: Course, who: Contestant, precision: Precision, attention: str, crew: Crew, mine: Taken) -> None:
    """One contestant's turn, written down in ``mine``; if it fails, why."""
    try:
        result, life = course.run(who, precision, attention, crew)
        mine.apart = max(mine.apart, course.apart(who, precision))
    except (NotInstalled, Failed) as error:
        mine.fault = str(error)
        print(f"bench: {who.name}, {precision}: {error}", flush=True)
        return
    rates = [examples / seconds for examples, seconds in zip(result["examples"], result["seconds"], strict=True)]
    mine.rates.setdefault(crew, []).extend(rates[WARM:])
    mine.outside.append(life - sum(result["seconds"]))
    print(f"bench: {who.name}, {precision}, {_told(crew)}: {median(rates[WARM:]):.0f} examples/s, {life:.0f} s in all", flush=True)


@dataclass
class Race:
    """The peers' attention by precision, what everybody did, and of each pass the rates at large batches and that of a matmul."""

    attention: dict[Precision, str]
    taken: dict[tuple[str, Precision], Taken]
    ceilings: dict[Precision, list[dict[str, Any]]]


def race(course: Course, passes: int, cores: int) -> Race:
    """Everybody in both precisions, in turns.

    Raises:
        Failed: Fedloom or the research script, or a loop without federation, failed; there is nothing to compare then.
    """
    attention: dict[Precision, str] = {}
    for precision in PRECISIONS:
        seconds = course.run(PLAIN, precision, "eager", (1, cores), "attention")[0]
        attention[precision] = min(seconds, key=lambda way: seconds[way])
    order = (SCRIPT, FEDLOOM, *(who for who in RIVALS if who is not SCRIPT))  # the reference first
    made = Race(attention, {(who.folder, p): Taken() for who in order for p in PRECISIONS}, {p: [] for p in PRECISIONS})
    for i in range(passes):
        for precision in PRECISIONS:
            for who in order if i % 2 == 0 else reversed(order):
                mine = made.taken[who.folder, precision]
                tried = crews(who.folder, cores) if i == 0 or who is FEDLOOM else (mine.crew,) if mine.rates else ()
                for crew in tried:
                    if not mine.fault:
                        turn(course, who, precision, attention[precision], crew, mine)
                if mine.fault and who in (FEDLOOM, SCRIPT):
                    raise Failed(f"{who.name}, {precision}: {mine.fault}")
            made.ceilings[precision].append(course.run(CEILING, precision, attention[precision], (1, cores))[0])
    return made


def rows(made: Race, precision: Precision) -> list[Row]:
    """Rates, ratios and the share, in one precision."""
    ours, out = made.taken[FEDLOOM.folder, precision], []
    for who in (FEDLOOM, *RIVALS):
        mine = made.taken[who.folder, precision]
        name, versus = f"examples/s, {who.name}, {precision}", f"Fedloom / {who.name}, {precision}"
        if mine.fault:
            out += [Row(name, None, "1/s", note=mine.fault), Row(versus, None, "x", who.at_least, who.aim, note=mine.fault)]
            continue
        samples = {f"examples/s, {_told(crew)}": rates for crew, rates in mine.rates.items()} | {"s outside rounds": mine.outside}
        note = f"{who.note}; {_told(mine.crew)}"
        note += "" if who is FEDLOOM else f", {made.attention[precision]} attention"
        note += f"; {median(mine.outside):.0f} s outside rounds"
        note += f"; after a round {mine.apart:.1g} from the reference" if mine.apart else ""
        out.append(Row(name, median(mine.best), "1/s", samples=samples, note=note))
        if who is not FEDLOOM:
            held, note = (ours.best, who.note) if who.spreads else (ours.single, f"{who.note}; Fedloom in one process too")
            out.append(Row(versus, ratio(held, mine.best), "x", who.at_least, who.aim, note=note))
    tops = [max(one["rates"].values()) for one in made.ceilings[precision]]
    peaks = [one["gflops"] for one in made.ceilings[precision]]
    note = f"{CEILING.note} of {', '.join(made.ceilings[precision][0]['rates'])}; {made.attention[precision]} attention"
    share = 100 * median(ours.single) / median(tops)
    return [
        *out,
        Row(f"examples/s, {CEILING.name}, {precision}", median(tops), "1/s", samples={"examples/s": tops}, note=note),
        Row(f"share of the large-batch rate, {precision}", share, "%", CEILING.at_least, CEILING.aim, note=note),
        Row(f"matmul rate, {precision}", median(peaks), "GFLOP/s", samples={"GFLOP/s": peaks}, note="torch.mm, 2048 x 2048 x 2048"),
    ]


def _told(crew: Crew) -> str:
    workers, threads = crew
    return f"{workers} {'process' if workers == 1 else 'processes'} of {threads} {'thread' if threads == 1 else 'threads'}"


def measure(quick: bool) -> list[Row]:
    """Rates, Fedloom's ratios, and its share of the rate at large batches."""
    cores, load = len(os.sched_getaffinity(0)), os.getloadavg()[0]
    if load > cores / 4:
        print(f"bench: the machine is busy (load {load:.1f}); rates will be too low, most of all of those with several threads", flush=True)
    for who in RIVALS:
        try:
            python_of(who.folder)
        except NotInstalled as error:
            print(f"bench: {who.name} cannot be installed: {error}", flush=True)
    with TemporaryDirectory(prefix="fedloom-bench-") as folder:
        course = Course(Path(folder), WARM + (1 if quick else TIMED))
        export(course.folder, experiment(course.rounds, rows=600 if quick else 0))
        made = race(course, 1 if quick else PASSES, cores)
    return [row for precision in PRECISIONS for row in rows(made, precision)]


if __name__ == "__main__":
    command(measure)
