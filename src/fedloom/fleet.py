"""What devices are like: a profile each, as a value that the server's half of a method and the ledger of a run both read.

This module does not know where profiles come from (``run/costs/profiles.py``) or what is done with them.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from fedloom.messages import CENTRE


@dataclass(frozen=True)
class DeviceProfile:
    """One kind of device: sustained training speed in FLOP/s, its link to the server in bytes/s, and the bytes of memory that training may
    take; all positive and finite.

    Raises:
        ValueError: a figure that is not; the message names it.
    """

    name: str
    flops_per_second: float
    upload_bytes_per_second: float
    download_bytes_per_second: float
    memory_bytes: float

    def __post_init__(self) -> None:
        for field, figure in asdict(self).items():
            if field != "name" and not (math.isfinite(figure) and figure > 0):
                raise ValueError(f"device profile '{self.name}' has {field}={figure}; it must be a positive finite number")


@dataclass(frozen=True)
class Fleet:
    """The devices' profiles. ``which``: of devices 0..K−1 the place of each one's profile; empty where all have the first."""

    profiles: tuple[DeviceProfile, ...]
    which: tuple[int, ...] = ()

    @property
    def alike(self) -> bool:
        """Whether all devices are of one profile."""
        return len(set(self.which)) <= 1

    def of(self, client: int) -> DeviceProfile:
        """A device's profile; of the place that holds all data (``CENTRE``) that of the fastest device.

        Raises:
            ValueError: there is no such device.
        """
        if not self.which:
            return self.profiles[0]
        if client == CENTRE:
            return max((self.profiles[at] for at in set(self.which)), key=lambda profile: profile.flops_per_second)
        if not 0 <= client < len(self.which):
            raise ValueError(f"there is no device {client}; there are profiles of devices 0 to {len(self.which) - 1}")
        return self.profiles[self.which[client]]

    def strength(self, client: int) -> float | None:
        """A device's memory as a share of the most that any has, above 0 and at most 1; None where all are alike, which says nothing."""
        if self.alike:
            return None
        return self.of(client).memory_bytes / max(self.profiles[at].memory_bytes for at in self.which)

    def kinds(self, clients: int) -> list[tuple[DeviceProfile, int]]:
        """Every profile that a device has, and how many of ``clients`` have it, in the profiles' order."""
        count = Counter(self.which) if self.which else Counter({0: clients})
        return [(profile, count[at]) for at, profile in enumerate(self.profiles) if count[at]]

    def as_json(self, clients: Sequence[int]) -> dict[str, Any]:
        """``profiles``: figures, and how many devices have them; ``of``: the name of each device's profile, empty where all are alike."""
        profiles = [{**asdict(profile), "devices": count} for profile, count in self.kinds(len(clients))]
        return {"profiles": profiles, "of": [] if self.alike else [self.of(k).name for k in clients]}
