"""Simulated device time: what a round would take on real devices, from counted work and counted bytes.

A device downloads its task, computes, uploads its update; a round lasts as long as its slowest device, because the server
waits for the cohort. For device k with profile (v, d, u), f_k FLOPs, and messages of b_k and c_k bytes:

    seconds_k = b_k / d + f_k / v + c_k / u          round = max over the cohort of seconds_k

The profiles are **chosen round figures, not measurements of ours**. They make two methods comparable on one stated device; they
do not predict a product's latency. Not modelled: memory limits, energy, queueing, devices that differ within one cohort.

This module does not know who counts the FLOPs, how messages are packed or what a method is.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

MEGABIT = 125_000.0
"""Bytes in a megabit, the unit in which links are sold."""


@dataclass(frozen=True)
class DeviceProfile:
    """One kind of device: sustained training speed in FLOP/s and its link to the server in bytes/s, all positive and finite."""

    name: str
    flops_per_second: float
    upload_bytes_per_second: float
    download_bytes_per_second: float

    def __post_init__(self) -> None:
        rates = {
            "flops_per_second": self.flops_per_second,
            "upload_bytes_per_second": self.upload_bytes_per_second,
            "download_bytes_per_second": self.download_bytes_per_second,
        }
        for field, rate in rates.items():
            if not (math.isfinite(rate) and rate > 0):
                raise ValueError(f"device profile '{self.name}' has {field}={rate}; it must be a positive finite number")


PROFILES = {
    profile.name: profile
    for profile in (
        # A flagship phone's GPU is rated near 1 TFLOP/s in float32; a tenth is assumed for training that must not overheat.
        # Mobile link of 10 Mbit/s up and 40 Mbit/s down: assumed.
        DeviceProfile("phone", 1e11, 10 * MEGABIT, 40 * MEGABIT),
        # Jetson TX2 class: 256 CUDA cores x 2 FLOPs x 1.3 GHz = 0.67 TFLOP/s peak in float32; about a third of it is assumed
        # to be sustained in small-batch training. Wide-area link of 20 Mbit/s up and 50 Mbit/s down: assumed.
        DeviceProfile("jetson", 2e11, 20 * MEGABIT, 50 * MEGABIT),
        # Eight cores x 32 float32 FLOPs a cycle x 4 GHz = 1 TFLOP/s peak; half is assumed to be sustained.
        # Office or fibre link of 100 Mbit/s up and 200 Mbit/s down: assumed.
        DeviceProfile("laptop", 5e11, 100 * MEGABIT, 200 * MEGABIT),
    )
}
"""Named profiles. Each comment says what is arithmetic and what is assumed."""

DEFAULT = PROFILES["jetson"]


def named(name: str) -> DeviceProfile:
    """The profile of that name.

    Raises:
        ValueError: no such profile; the message lists those there are.
    """
    if name not in PROFILES:
        raise ValueError(f"no device profile '{name}'; there are {sorted(PROFILES)}, or give the rates yourself")
    return PROFILES[name]


def seconds(profile: DeviceProfile, flops: float, bytes_down: float, bytes_up: float) -> float:
    """Simulated seconds of one device's turn: download, compute, upload, one after another.

    Raises:
        ValueError: a cost that is negative or not finite.
    """
    for name, cost in (("flops", flops), ("bytes_down", bytes_down), ("bytes_up", bytes_up)):
        if not (math.isfinite(cost) and cost >= 0):
            raise ValueError(f"{name} is {cost}; a device's cost must be zero or a positive finite number")
    download = bytes_down / profile.download_bytes_per_second
    upload = bytes_up / profile.upload_bytes_per_second
    return download + flops / profile.flops_per_second + upload


def round_seconds(profile: DeviceProfile, costs: Iterable[tuple[float, float, float]]) -> float:
    """Simulated seconds of a round: that of its slowest device, or 0. ``costs``: (flops, bytes_down, bytes_up) of each."""
    return max((seconds(profile, *cost) for cost in costs), default=0.0)
