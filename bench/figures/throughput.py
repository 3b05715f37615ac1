"""Examples trained a second: Fedloom, those whom a user would pick instead, and what the machine gives at large batches.

LoRA r 8 on MiniLM, the packaged TREC questions on 100 devices (label Dirichlet 1), 10 devices a round, batch 8, one local epoch, AdamW,
gradients clipped; float32, and bf16 with trained tensors in float32. Everybody trains on the same rows in the same order from the same
start (``bench/job.py``), and after the first round everybody's tensors must be those of the research script, or there is no figure.

The peers run twice. **As their users run them**: as each framework's own documentation does it for a transformers model with PEFT
(``bench/peers/setups.py`` and each peer's ``run.py`` say which example, file by file); Fedloom's bounds are about these. **Tuned by hand**:
the faster of transformers' ways of attention for the step that they all do, fused AdamW, the model kept in each process, tensors without
PEFT's functions, and, where they can spread over processes, the better of one with all cores and one a core; attention and processes
are found out in each run. It is the hardest comparison that we could build, and for information. Whoever runs in one process is held
against Fedloom in one process, the others against Fedloom in its better way.

Only rounds are timed, and not the first: loading, starting workers and ending are told apart, as seconds outside rounds. Contestants
take turns. Where a processor lacks bfloat16 instructions, bf16 is not measured (``BENCH_BF16=1``, ``--bf16``: it is).
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
from typing import Any, Literal

from safetensors.torch import load_file

from bench.figure import BF16, NO_BF16, command
from bench.job import experiment, export
from bench.peers.environment import PEERS, NotInstalled, python_of
from bench.row import Row
from bench.timing import ratio
from fedloom.model.base import Precision
from fedloom.model.kernels import computes_bf16

Crew = tuple[int, int]
"""Worker processes, and PyTorch threads of each."""

PRECISIONS: tuple[Precision, ...] = ("float32", "bf16")

WARM, TIMED = 1, 2
"""Rounds that are thrown away and rounds that are timed in a pass."""

PASSES: Mapping[Precision, int] = {"float32": 2, "bf16": 1}
"""Passes in each precision. Only Fedloom and peers as their users run them take part after the first one."""

SITES = 10
"""NVFlare's: as many as a cohort has devices."""

LONGEST = 150
"""Seconds after which a contestant is stopped."""


AGREE: Mapping[Precision, float] = {"float32": 1e-3, "bf16": 0.3}
"""How far tensors after one round may lie from the tuned research script's in float32, as a share of the way that these went. The same work
was within 1e-4 in float32 and 0.03 in bf16. Other work: another cohort 0.67, the last step of every device left out 0.12, the last step,
of one example, of one device left out 0.026. So float32 shows that the steps are the same; bf16 is the same code."""

QUIET = {
    "CUDA_VISIBLE_DEVICES": "",
    "FLWR_DISABLE_UPDATE_CHECK": "1",
    "FLWR_TELEMETRY_ENABLED": "0",
    "HF_HUB_OFFLINE": "1",
    "RAY_USAGE_STATS_ENABLED": "0",
    "TOKENIZERS_PARALLELISM": "false",
}
"""Nobody uses an accelerator, or the network."""


Setup = Literal["as-documented", "tuned"]


@dataclass(frozen=True)
class Contestant:
    """A folder of ``bench/peers``, its name, what Fedloom's ratio to it should be, what one should know about it, and its set-up.

    Fedloom has one set-up; it counts as documented.
    """

    folder: str
    name: str
    at_least: float | None = None
    aim: float | None = None
    note: str = ""
    setup: Setup = "as-documented"

    @property
    def label(self) -> str:
        """Its name in the rows."""
        return f"{self.name} tuned by hand" if self.setup == "tuned" else self.name

    @property
    def key(self) -> str:
        """What its files are called, and what it is looked up by."""
        return f"{self.folder}-{self.setup}"


FEDLOOM = Contestant("fedloom", "Fedloom", note="local engine or its workers, everything through its wire, as in fedloom run")
RIVALS = (
    Contestant("flower", "Flower simulation", 5.0, 10.0, "flwr 1.41, 100 virtual nodes on Ray, the model loaded for every message"),
    Contestant("pfl", "pfl", 2.0, 4.0, "pfl 0.6, PyTorchModel, the model resident in its process"),
    Contestant("nvflare", "NVFlare simulator", 5.0, 10.0, "nvflare 2.9, ten resident sites that play each round's cohort"),
    Contestant("plain", "plain PEFT loop", 2.0, 3.0, "no federation: one model, the same batches one after another"),
    Contestant("script", "FedAvg in a research script", note="a Trainer for each device, the means of PEFT's state dicts"),
)
"""The peers as their users run them."""

TUNED = (
    Contestant("flower", "Flower simulation", note="as above, and the model cached in each worker", setup="tuned"),
    Contestant("pfl", "pfl", note="as above, in one process or several", setup="tuned"),
    Contestant("nvflare", "NVFlare simulator", note="as above", setup="tuned"),
    Contestant("plain", "plain PEFT loop", note="as above", setup="tuned"),
    Contestant("script", "FedAvg in a research script", note="load the global state, train, average the states", setup="tuned"),
)
"""The same, with whatever is fastest for them here."""

SCRIPT, PLAIN = TUNED[4], TUNED[3]
"""Whose tensors in float32 are the reference, and on whom attention is tried."""

CEILING = Contestant(
    "ceiling", "large batches", 60.0, 85.0, "the tuned PEFT step on rows of the timed rounds sorted by length, best of batches", "tuned"
)


LIMIT = "examples/s, the frozen layers' products alone"
LIMIT_NOTE = "oneDNN on packed weights, real tokens only, nothing else: nobody who trains LoRA in every layer here can be faster"


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

    @property
    def spreads(self) -> bool:
        """Whether it ran, or could have run, in several processes."""
        return any(processes > 1 for processes, _ in self.rates)


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
        out, log = self.folder / f"{who.key}-{precision}.json", self.folder / f"{who.key}-{precision}.log"
        given = {"job": self.folder, "out": out, "rounds": self.rounds, "precision": precision}
        given |= {"setup": who.setup, "attention": attention if who.setup == "tuned" else "default"}
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
        made = self.folder / f"{who.key}-{precision}.safetensors"
        if who.folder == "plain":
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
        """The tuned research script's tensors after one round in float32."""
        return self.folder / f"{SCRIPT.key}-float32.safetensors"


def _end(process: subprocess.Popen[bytes]) -> None:
    """End whatever is left of a contestant."""
    try:
        os.killpg(process.pid, signal.SIGKILL)
    except ProcessLookupError:
        return
    finally:
        process.wait()


def crews(who: Contestant, cores: int) -> tuple[Crew, ...]:
    """What to try for a contestant on that many cores.

    As documented: Flower gives each worker two CPUs, and PyTorch takes all cores. Tuned, and Fedloom: one process with all cores or one
    a core. NVFlare has a process a site in any case, each with one thread.
    """
    both = ((1, cores), (cores, 1)) if cores > 1 else ((1, 1),)
    match who.setup, who.folder:
        case _, "nvflare":
            return ((SITES, 1),)
        case "as-documented", "flower":
            return ((max(1, cores // 2), min(2, cores)),)
        case ("tuned", "flower" | "pfl") | (_, "fedloom"):
            return both
        case _:
            return ((1, cores),)


def turn(course: Course, who: Contestant, precision: Precision, attention: str, crew: Crew, mine: Taken) -> None:
    """One contestant's turn, written down in ``mine``; if it fails, why."""
    try:
        result, life = course.run(who, precision, attention, crew)
        mine.apart = max(mine.apart, course.apart(who, precision))
    except (NotInstalled, Failed) as error:
        mine.fault = str(error)
        print(f"bench: {who.label}, {precision}: {error}", flush=True)
        return
    rates = [examples / seconds for examples, seconds in zip(result["examples"], result["seconds"], strict=True)]
    mine.rates.setdefault(crew, []).extend(rates[WARM:])
    mine.outside.append(life - sum(result["seconds"]))
    print(f"bench: {who.label}, {precision}, {_told(crew)}: {median(rates[WARM:]):.0f} examples/s, {life:.0f} s in all", flush=True)


@dataclass
class Race:
    """What everybody did, by key; the tuned peers' attention; of each pass the rates at large batches and that of a matmul."""

    attention: str
    taken: dict[str, Taken]
    ceilings: list[dict[str, Any]]


def race(course: Course, precision: Precision, passes: int, cores: int) -> Race:
    """Everybody in one precision, in turns. Whoever breaks or takes too long has no further turn.

    Raises:
        Failed: the reference, the trial of attention or the large batches failed; nothing can be said in this precision then.
    """
    seconds = course.run(PLAIN, precision, "eager", (1, cores), "attention")[0]
    attention = min(seconds, key=lambda way: seconds[way])
    order = (
        SCRIPT,
        FEDLOOM,
        *(who for pair in zip(RIVALS, TUNED, strict=True) for who in pair if who is not SCRIPT),
    )  # the reference first
    made = Race(attention, {who.key: Taken() for who in order}, [])
    for i in range(passes):
        for who in (one for one in (order if i % 2 == 0 else reversed(order)) if i == 0 or one.setup == "as-documented"):
            mine = made.taken[who.key]
            tried = crews(who, cores) if i == 0 or who is FEDLOOM else (mine.crew,) if mine.rates else ()
            for crew in tried:
                if not mine.fault:
                    turn(course, who, precision, attention, crew, mine)
            if mine.fault and who is SCRIPT and precision == "float32":
                raise Failed(f"{who.label}, {precision}: {mine.fault}")
        made.ceilings.append(course.run(CEILING, precision, attention, (1, cores))[0])
    return made


def rows(made: Race, precision: Precision) -> list[Row]:
    """Rates, ratios and the share, in one precision."""
    ours, out = made.taken[FEDLOOM.key], []
    for who in (FEDLOOM, *RIVALS, *TUNED):
        mine = made.taken[who.key]
        name, versus = f"examples/s, {who.label}, {precision}", f"Fedloom / {who.label}, {precision}"
        fault = mine.fault or (f"Fedloom: {ours.fault}" if ours.fault else "")
        if mine.fault:
            out.append(Row(name, None, "1/s", note=mine.fault))
        else:
            samples = {f"examples/s, {_told(crew)}": rates for crew, rates in mine.rates.items()} | {"s outside rounds": mine.outside}
            note = f"{who.note}; {_told(mine.crew)}"
            note += "" if who is FEDLOOM else f", {made.attention if who.setup == 'tuned' else 'the default'} attention"
            note += f"; {median(mine.outside):.0f} s outside rounds"
            note += f"; after a round {mine.apart:.1g} from the reference" if mine.apart else ""
            out.append(Row(name, median(mine.best), "1/s", samples=samples, note=note))
        if who is not FEDLOOM and fault:
            out.append(Row(versus, None, "x", who.at_least, who.aim, note=fault))
        elif who is not FEDLOOM:
            held, note = (ours.best, who.note) if mine.spreads else (ours.single, f"{who.note}; Fedloom in one process too")
            out.append(Row(versus, ratio(held[: len(mine.best)], mine.best), "x", who.at_least, who.aim, note=note))
    tops = [max(one["rates"].values()) for one in made.ceilings]
    peaks, limits = ([one[of] for one in made.ceilings] for of in ("gflops", "arithmetic"))
    note = f"{CEILING.note} of {', '.join(made.ceilings[0]['rates'])}; {made.attention} attention"
    share = None if ours.fault else 100 * median(ours.single) / median(tops)
    return [
        *out,
        Row(f"examples/s, {CEILING.name}, {precision}", median(tops), "1/s", samples={"examples/s": tops}, note=note),
        Row(_share(precision), share, "%", CEILING.at_least, CEILING.aim, note=ours.fault or note),
        Row(f"{LIMIT}, {precision}", median(limits), "1/s", samples={"examples/s": limits}, note=LIMIT_NOTE),
        Row(f"matmul rate, {precision}", median(peaks), "GFLOP/s", samples={"GFLOP/s": peaks}, note="torch.mm, 2048 x 2048 x 2048"),
    ]


def missing(precision: Precision, why: str) -> list[Row]:
    """The rows that have a bound, not measured in this precision."""
    bounded = [(f"Fedloom / {who.label}, {precision}", who, "x") for who in RIVALS if who.at_least]
    bounded.append((_share(precision), CEILING, "%"))
    return [Row(name, None, unit, who.at_least, who.aim, note=why) for name, who, unit in bounded]


def _share(precision: Precision) -> str:
    return f"share of the large-batch rate, {precision}"


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
        return [row for precision in PRECISIONS for row in measured(course, precision, 1 if quick else PASSES[precision], cores)]


def measured(course: Course, precision: Precision, passes: int, cores: int) -> list[Row]:
    """The rows of one precision; of bf16 those that were not measured if the processor lacks it, nobody asked, or its reference failed.

    Raises:
        Failed: float32 has no reference; there is nothing to compare then.
    """
    if precision == "bf16" and not (os.environ.get(BF16) or computes_bf16()):
        return missing(precision, NO_BF16)
    try:
        return rows(race(course, precision, passes, cores), precision)
    except Failed as error:
        if precision == "float32":
            raise
        return missing(precision, str(error))


if __name__ == "__main__":
    command(measure)
