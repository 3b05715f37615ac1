"""What a run cost: heard from the engine asking by asking, written to ``rounds.jsonl`` row by row.

Bytes are whole messages as packed. Predicting held-out examples is not heard: it is a measurement, not part of a method's work. What a
method has devices train before they predict is (:class:`Personalising`), but stands beside the rounds and in no total: a device does it
once, when it is to predict, however often a run is evaluated.
"""

from __future__ import annotations

import json
import os
import re
import resource
import sys
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from fedloom.fleet import Fleet
from fedloom.messages import CENTRE, Replies, Task
from fedloom.run.checkpoint import write_atomically
from fedloom.run.costs.profiles import round_seconds
from fedloom.run.errors import CheckpointError

PROCESS = Path("/proc/self")
"""Where Linux tells a process of itself."""


@dataclass
class Section:
    """The cost of one round, or of the whole set-up, while it is being added up."""

    fleet: Fleet
    started: float = field(default_factory=time.monotonic)
    bytes_up: int = 0
    bytes_down: int = 0
    examples: int = 0
    flops: float = 0.0
    device_seconds: float = 0.0
    losses: list[tuple[float, int]] = field(default_factory=list)
    answered: list[int] = field(default_factory=list)
    trained: set[int] = field(default_factory=set)
    failed: dict[str, str] = field(default_factory=dict)

    def hear(self, tasks: Sequence[Task], replies: Replies) -> None:
        """Add one asking. The cohort works in parallel, so its device time is that of its slowest member. Where all data are in one place,
        nothing travels to it."""
        traffic = [replace(t, bytes_down=0, bytes_up=0) if t.client == CENTRE else t for t in replies.traffic]
        self.bytes_down += sum(t.bytes_down for t in traffic)
        self.bytes_up += sum(t.bytes_up for t in traffic)
        self.examples += sum(t.examples for t in traffic)
        self.flops += sum(t.flops for t in traffic)
        costs = ((t.client, t.flops, float(t.bytes_down), float(t.bytes_up)) for t in traffic)
        self.device_seconds += round_seconds(self.fleet, costs)
        told = ((u.metrics.get("loss"), u.num_examples) for u in replies.updates)
        self.losses += [(float(loss), count) for loss, count in told if isinstance(loss, int | float) and count > 0]
        self.answered = list(dict.fromkeys([*self.answered, *(u.client for u in replies.updates)]))
        self.trained |= {t.client for t in replies.traffic if t.examples}
        self.failed |= {str(f.client): f.reason for f in replies.failures}

    def begin(self, clients: Sequence[int], flops: float) -> None:
        """Add what each of these computes for itself before it is asked anything: the start of its model. They do it in parallel."""
        self.flops += flops * len(clients)
        self.device_seconds += round_seconds(self.fleet, [(k, flops, 0.0, 0.0) for k in clients])

    @property
    def loss(self) -> float | None:
        """Mean training loss, weighted by what the devices weigh (their examples; FedEven's m_k); None if nobody told one."""
        if not self.losses:
            return None
        values, weights = zip(*self.losses, strict=True)
        return float(np.average(values, weights=weights))

    @property
    def seconds(self) -> float:
        """Seconds on this machine since the section began."""
        return time.monotonic() - self.started


@dataclass
class Personalising:
    """What ``personalise`` took at one evaluation, on all devices that were asked. Nothing travels for it: a method has no word with its
    server meanwhile."""

    fleet: Fleet
    flops: float = 0.0
    device_seconds: float = 0.0

    def hear(self, tasks: Sequence[Task], replies: Replies) -> None:
        """Add one asking of some of the devices, which all work at the same time."""
        self.flops += sum(t.flops for t in replies.traffic)
        costs = ((t.client, t.flops, 0.0, 0.0) for t in replies.traffic)
        self.device_seconds = max(self.device_seconds, round_seconds(self.fleet, costs))

    @property
    def told(self) -> dict[str, float]:
        """Operations of all devices together, and the simulated seconds of the slowest."""
        return {"flops": self.flops, "device_seconds": self.device_seconds}


class Ledger:
    """Totals of a run and its ``rounds.jsonl``. ``totals`` travel in the checkpoint, so a resumed run adds to them."""

    def __init__(self, folder: Path, fleet: Fleet, totals: dict[str, Any] | None = None) -> None:
        self.path, self.fleet = folder / "rounds.jsonl", fleet
        names = ("bytes_up", "bytes_down", "setup_bytes_up", "setup_bytes_down", "examples", "setup_examples")
        names += ("flops", "setup_flops", "host_seconds", "device_seconds", "setup_device_seconds", "setup_host_seconds", "peak_rss_bytes")
        self.totals: dict[str, Any] = {**dict.fromkeys(names, 0), "participations": {}, **(totals or {})}

    def section(self) -> Section:
        """A new section, begun now."""
        return Section(self.fleet)

    def rows(self) -> list[dict[str, Any]]:
        """The rows written so far."""
        return [json.loads(line) for line in self.path.read_text().splitlines()] if self.path.exists() else []

    def rewind(self, round: int) -> list[dict[str, Any]]:
        """Drop rows after ``round`` (of rounds whose checkpoint was never completed), and a torn last line. Returns those kept.

        Raises:
            CheckpointError: a row up to ``round`` lacks or is torn, so that what a round had cost is not known any more.
        """
        lines = self.path.read_bytes().split(b"\n")[:-1] if self.path.exists() else []
        try:
            kept = [json.loads(line) for line in lines[: round + 1]]
            rounds = [row["round"] for row in kept]
        except ValueError as error:
            raise self._spoilt(f"a line is no JSON ({error})") from error
        except (TypeError, KeyError) as error:
            raise self._spoilt("a line is no row of a round") from error
        if rounds != list(range(round + 1)):
            known = sum(t in rounds for t in range(round + 1))
            raise self._spoilt(f"it begins with {known} of the {round + 1} rounds that are due")
        write_atomically(self.path, "".join(json.dumps(row) + "\n" for row in kept))
        return kept

    def _spoilt(self, why: str) -> CheckpointError:
        folder = self.path.parent
        return CheckpointError(
            f"{self.path} does not tell every round up to the checkpoint: {why}. Nothing was overwritten. Delete {folder} to start the run "
            "anew, or restore the folder from a copy"
        )

    def set_up(self, section: Section) -> None:
        """Book the set-up."""
        self.totals["setup_bytes_up"] += section.bytes_up
        self.totals["setup_bytes_down"] += section.bytes_down
        self.totals["setup_examples"] += section.examples
        self.totals["setup_flops"] += section.flops
        self.totals["setup_device_seconds"] += section.device_seconds
        self.totals["setup_host_seconds"] += section.seconds

    def write(
        self, round: int, section: Section, train_seconds: float, scores: Mapping[Any, Any], besides: Mapping[str, Any] | None = None
    ) -> dict[str, Any]:
        """Book a round (round 0 is the evaluation after set-up, with a section that heard nothing) and append its row, with what else there
        is to say ``besides``. ``scores`` by split; those of the test split stand in the row itself."""
        row = {
            "round": round,
            "loss": section.loss,
            **scores["test"],
            "examples": section.examples,
            "train_seconds": train_seconds,
            "bytes_up": section.bytes_up,
            "bytes_down": section.bytes_down,
            "host_seconds": section.seconds,
            "device_seconds": section.device_seconds,
            "flops": section.flops,
            "peak_rss_bytes": peak_rss_bytes(),
            "answered": section.answered,
            "failed": section.failed,
            "validation": scores["validation"],
            **(besides or {}),
        }
        for name in ("bytes_up", "bytes_down", "examples", "flops", "host_seconds", "device_seconds"):
            self.totals[name] += row[name]
        self.totals["peak_rss_bytes"] = max(self.totals["peak_rss_bytes"], row["peak_rss_bytes"])
        for client in section.trained.intersection(section.answered):  # who was only asked for scores took no part
            self.totals["participations"][str(client)] = self.totals["participations"].get(str(client), 0) + 1
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(row) + "\n")
            file.flush()
            os.fsync(file.fileno())
        return row


def forget_peak() -> None:
    """Have the most that this process has held begin anew, from what it holds now. Linux allows that; elsewhere nothing happens."""
    with suppress(OSError):
        (PROCESS / "clear_refs").write_text("5", encoding="ascii")


def peak_rss_bytes() -> int:
    """The most memory this process has held, since :func:`forget_peak` where that is allowed."""
    try:
        said = (PROCESS / "status").read_text(encoding="utf-8", errors="replace")
    except OSError:
        said = ""
    if (most := re.search(r"^VmHWM:\s*(\d+) kB$", said, re.MULTILINE)) is not None:
        return int(most[1]) * 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
