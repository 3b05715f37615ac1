"""The server of a real federation as one call: :func:`serve` runs an experiment over devices that join (``joining.py``).

The round loop, the checkpoints, the results and the report are those of a simulation (``loop.py``); only the engine is another. What the
server knows of a device's data is what the device tells: how many examples, and how many of which class it told as which.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from fedloom.client.elsewhere import Elsewhere
from fedloom.data.tasks import Split
from fedloom.engines.engine import Engine
from fedloom.engines.federation import Enough, Federation, Patience
from fedloom.engines.link import Link, Tls
from fedloom.engines.mailbox import MOST
from fedloom.messages import quorum_of
from fedloom.model.quantised import numbers
from fedloom.run.costs.profiles import MIXES, PROFILES, is_file
from fedloom.run.deployment.certificates import insist_secret, public_keys
from fedloom.run.deployment.greeting import greeting_of
from fedloom.run.deployment.joining import address
from fedloom.run.errors import ExperimentError
from fedloom.run.experiment import Experiment
from fedloom.run.late import may_join_late, those_who_may
from fedloom.run.loop import run
from fedloom.run.terminal.console import Progress, Show
from fedloom.run.tracking import insist_on_trackers
from fedloom.run.world import World, build_far
from fedloom.wire import COUNTED

log = logging.getLogger("fedloom")

WHOLE = 4
"""How many times the whole model in float32 an answer may hold, and `mailbox.MOST` bytes: no method sends as much."""

LOOK = 0.2
"""Seconds between two looks at who has joined."""


@dataclass
class Joined:
    """A :class:`~fedloom.run.world.Far`: the devices of a link. ``about``: what the server says when it is asked how things stand."""

    link: Link
    experiment: Experiment
    patience: Patience
    show: Show
    greeting: Mapping[str, Any] = field(default_factory=dict)
    federation: Federation | None = None
    start_with: int = 0
    """Devices that are enough to begin with; 0: all."""

    def engine(self, store: Elsewhere) -> Engine:
        """The engine, once every device has joined: a set-up needs all, and who is to be told of is not to be missed."""
        e = self.experiment
        self.federation = Federation(self.link, store, e.digest(), self.greeting, self.patience, e.encoding)
        return self.federation

    def hurried(self, engine: Engine) -> Engine:
        """The engine for rounds: a quorum is enough, or as many as the rule of aggregation needs if those are more."""
        assert isinstance(engine, Federation)
        e = self.experiment
        return Enough(engine, lambda asked: min(asked, max(quorum_of(asked, e.quorum), e.rule.needed(asked))))

    def examples(self, client: int, split: Split) -> int:
        """What the device said when it was greeted."""
        told = self.federation.told.get(client, {}) if self.federation is not None else {}
        held = told.get("examples", {})
        number = held.get(split, 0) if isinstance(held, dict) else 0
        return number if type(number) is int and 0 <= number < COUNTED else 0

    def gather(self) -> tuple[int, ...]:
        """Wait until every device has joined, or enough to begin with. Whoever is missing is named."""
        everyone = set(self.link.nodes)
        while (missing := sorted(everyone - self.link.present())) and len(everyone) - len(missing) < (self.start_with or len(everyone)):
            named = ", ".join(map(str, missing[:8])) + (" ..." if len(missing) > 8 else "")
            self.show.phase(f"{len(everyone) - len(missing)} of {len(everyone)} devices have joined; waiting for {named}")
            time.sleep(LOOK)
        return tuple(sorted(everyone - set(missing)))

    def here(self) -> set[int]:
        """Who has been heard of lately."""
        return self.link.present()


def serve(
    experiment: Experiment,
    folder: Path,
    certs: Path,
    listen: str,
    patience: Patience,
    plain: bool | None = None,
    show: Show | None = None,
    track: Sequence[str] = (),
    start_with: int = 0,
) -> dict[str, Any]:
    """Run ``experiment`` in ``folder`` (or go on where it stopped) over the devices whose keys lie in ``certs``. Returns what
    ``results.json`` holds. ``track``: trackers that are told, by name (``tracking.py``). ``start_with``: begin when so many devices are
    there (0: all), and let the others in between rounds.

    Raises:
        ExperimentError, CertificateError, LinkError: it cannot begin so.
        CheckpointError: the folder belongs to another experiment.
        CohortFailed: too few devices answered, again and again.
    """
    insist_on_trackers(track)
    if is_file(experiment.device):
        raise ExperimentError(
            f"--device {experiment.device} is a file of this machine, and every device must know what it is like; give one of "
            f"{sorted(PROFILES)} or {sorted(MIXES)}"
        )
    keys = public_keys(certs)
    host, port = address(listen)
    tls = Tls(certs / "server.pem", insist_secret(certs / "server.key"))
    if experiment.clients != len(keys):
        raise ExperimentError(f"the experiment is for {experiment.clients} devices, and {certs} has the keys of {len(keys)}")
    insist_may_start(experiment, start_with)
    title = f"{experiment.method_name}, {len(keys)} devices, {experiment.asked} a round, at {host}:{port} -> {folder}"

    def running(shown: Show) -> dict[str, Any]:
        with Link(keys, host, port, tls, folder) as link:
            joined = Joined(link, experiment, patience, shown, start_with=start_with)
            link.about = lambda: about(joined, folder)

            def built(e: Experiment) -> World:
                world = build_far(e, joined)
                link.state.most = MOST + WHOLE * 4 * numbers(world.model.module)
                joined.greeting = greeting_of(world)
                return world

            return run(experiment, folder, show=shown, built=built, track=track)

    if show is not None:
        return running(show)
    with Progress(experiment.rounds, title, plain) as display:
        return running(display)


def insist_may_start(experiment: Experiment, devices: int) -> None:
    """Insist that the experiment can begin with so many devices (0: all of them).

    Raises:
        ExperimentError: it cannot, and why.
    """
    if not devices:
        return
    if not experiment.cohort <= devices <= experiment.clients:
        raise ExperimentError(
            f"--start-with is {devices}; it must be from --cohort, {experiment.cohort}, to the number of devices, {experiment.clients}"
        )
    if devices < experiment.clients and experiment.controls:
        raise ExperimentError(
            f"--start-with {devices}: with --controls no device can come after the set-up, for the server's control is the mean of as many "
            "devices' as there were. Leave one of the two out"
        )
    if devices < experiment.clients and not may_join_late(experiment.method):
        raise ExperimentError(
            f"--start-with {devices}: to '{experiment.method_name}', as it is set, no device can come after the set-up. Leave it out and "
            f"all are waited for, or choose one of {', '.join(those_who_may())}"
        )


def about(joined: Joined, folder: Path) -> dict[str, Any]:
    """How things stand: who is here and who is not, and the last row that was written."""
    path = folder / "rounds.jsonl"
    lines = path.read_bytes().split(b"\n")[:-1] if path.exists() else []
    here = sorted(joined.link.present())
    return {
        "experiment": joined.experiment.digest(),
        "devices": len(joined.link.nodes),
        "here": here,
        "away": sorted(set(joined.link.nodes) - set(here)),
        "last_round": lines[-1].decode() if lines else "",
        "written_seconds_ago": time.time() - path.stat().st_mtime if lines else None,
    }
