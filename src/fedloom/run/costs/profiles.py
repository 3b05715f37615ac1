"""Simulated device time: what a round would take on real devices, from counted work and counted bytes; and which device is like what.

A device downloads its task, computes, uploads its update; a round lasts as long as its slowest device, because the server
waits for the cohort. For device k with profile (v_k, d_k, u_k), f_k FLOPs, and messages of b_k and c_k bytes:

    seconds_k = b_k / d_k + f_k / v_k + c_k / u_k          round = max over the cohort of seconds_k

``--device`` says who is like what: one named profile for all, a mix by its name (each device's profile is drawn once, from the
experiment's seed), or a file (:func:`read`). A profile has memory too: what it allows is decided elsewhere (``model/memory.py``).

The named profiles are **chosen round figures, not measurements of ours**. They make two methods comparable on stated devices; they
do not predict a product's latency. Not modelled: energy, queueing, a link that many share, devices that change while a run goes on.

This module does not know who counts the FLOPs, how messages are packed or what a method is.
"""

from __future__ import annotations

import csv
import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, fields
from itertools import accumulate
from pathlib import Path
from typing import Any

from fedloom.fleet import DeviceProfile, Fleet
from fedloom.seeds import derive

MEGABIT = 125_000.0
"""Bytes in a megabit, the unit in which links are sold."""
GIGABYTE = 1e9

PROFILES = {
    profile.name: profile
    for profile in (
        # A flagship phone's GPU is rated near 1 TFLOP/s in float32; a tenth is assumed for training that must not overheat.
        # Mobile link of 10 Mbit/s up and 40 Mbit/s down: assumed. A quarter of 8 GB for one application: assumed.
        DeviceProfile("phone", 1e11, 10 * MEGABIT, 40 * MEGABIT, 2 * GIGABYTE),
        # Jetson TX2 class: 256 CUDA cores x 2 FLOPs x 1.3 GHz = 0.67 TFLOP/s peak in float32; about a third of it is assumed
        # to be sustained in small-batch training. Wide-area link of 20 Mbit/s up and 50 Mbit/s down: assumed.
        # Half of the board's 8 GB, which CPU and GPU share: assumed.
        DeviceProfile("jetson", 2e11, 20 * MEGABIT, 50 * MEGABIT, 4 * GIGABYTE),
        # Eight cores x 32 float32 FLOPs a cycle x 4 GHz = 1 TFLOP/s peak; half is assumed to be sustained.
        # Office or fibre link of 100 Mbit/s up and 200 Mbit/s down: assumed. Half of 16 GB: assumed.
        DeviceProfile("laptop", 5e11, 100 * MEGABIT, 200 * MEGABIT, 8 * GIGABYTE),
    )
}
"""Named profiles. Each comment says what is arithmetic and what is assumed."""

MIXES: dict[str, dict[str, float]] = {"mixed": {"phone": 1 / 3, "jetson": 1 / 3, "laptop": 1 / 3}}
"""Named distributions: the share of devices that each profile is drawn for. Thirds are assumed: nobody's census."""

FILES = (".csv", ".json")
FIGURES = tuple(field.name for field in fields(DeviceProfile) if field.name != "name")


def named(name: str) -> DeviceProfile:
    """The profile of that name.

    Raises:
        ValueError: no such profile; the message lists those there are.
    """
    if name not in PROFILES:
        raise ValueError(
            f"no device profile '{name}'; there are {sorted(PROFILES)}, {sorted(MIXES)} of several, or give a file of profiles "
            f"({' or '.join(FILES)})"
        )
    return PROFILES[name]


def is_file(device: str) -> bool:
    """Whether ``--device`` names a file and not what is known by name."""
    return Path(device).suffix.lower() in FILES


def insist_on_device(device: str) -> None:
    """Insist that ``--device`` names a profile, a mix or, by its ending, a file, which is not opened.

    Raises:
        ValueError: it does not.
    """
    if device not in MIXES and not is_file(device):
        named(device)


def fleet_of(device: str, clients: int, seed: int) -> Fleet:
    """What ``--device`` says of devices 0..``clients`` − 1.

    Raises:
        ValueError: no such name; or a file that cannot be read, or does not say what every device is like.
    """
    return read(Path(device), clients, seed) if is_file(device) else by_name(device, clients, seed)


def by_name(device: str, clients: int, seed: int) -> Fleet:
    """:func:`fleet_of` what is known by name; no file is opened.

    Raises:
        ValueError: no such name.
    """
    if device not in MIXES:
        return Fleet((named(device),))
    mix = MIXES[device]
    return Fleet(tuple(named(name) for name in mix), drawn(list(mix.values()), range(clients), seed))


def drawn(shares: Sequence[float], devices: Iterable[int], seed: int) -> tuple[int, ...]:
    """For each device which of the ``shares`` it falls to, drawn for it once and for all: a device's draw does not depend on the others."""
    ends = list(accumulate(shares))
    draws = (derive(seed, "device", k).random() * ends[-1] for k in devices)
    return tuple(next((at for at, end in enumerate(ends) if draw < end), len(ends) - 1) for draw in draws)


@dataclass(frozen=True)
class Row:
    """A line of a file of profiles: whom it is about, either these devices or a share of those that no line names."""

    profile: DeviceProfile
    devices: range
    share: float


def read(path: Path, clients: int, seed: int) -> Fleet:
    """The fleet of a file: CSV with a header, or JSON (a list of objects), a kind of device a line.

    ``name``; ``flops_per_second``, ``upload_bytes_per_second``, ``download_bytes_per_second``, ``memory_bytes`` (each may be left empty
    where the name is that of a known profile, whose figure it then has); and either ``device``, a number or a range of numbers (``0-9``),
    or ``share`` of the devices that no line names. Shares add up to 1.

    Raises:
        ValueError: the file cannot be read, or a line says too little or too much, or a device is named twice, or not at all; the
            message names file and line.
    """
    rows = [_row(f"{path}, entry {at}", entry) for at, entry in enumerate(_entries(path), 1)]
    profiles: dict[str, DeviceProfile] = {}
    for row in rows:
        if profiles.setdefault(row.profile.name, row.profile) != row.profile:
            raise ValueError(f"{path}: two kinds of device are named '{row.profile.name}' and differ; give each a name of its own")
    place, which = {name: at for at, name in enumerate(profiles)}, dict[int, int]()
    for row in rows:
        for k in row.devices:
            if k in which or k >= clients:
                why = "is named twice" if k in which else f"does not exist: there are devices 0 to {clients - 1} (--clients {clients})"
                raise ValueError(f"{path}: device {k} {why}")
            which[k] = place[row.profile.name]
    shared, rest = [row for row in rows if row.share], [k for k in range(clients) if k not in which]
    if shared and not math.isclose(sum(row.share for row in shared), 1, rel_tol=1e-6):
        raise ValueError(f"{path}: the shares add up to {sum(row.share for row in shared):g}; they must add up to 1")
    if rest and not shared:
        raise ValueError(f"{path} says nothing of devices {rest[:5]}; name every device, or give lines with a share for those not named")
    for k, at in zip(rest, drawn([row.share for row in shared], rest, seed) if rest else (), strict=True):
        which[k] = place[shared[at].profile.name]
    return Fleet(tuple(profiles.values()), tuple(which[k] for k in range(clients)))


def _entries(path: Path) -> list[Mapping[str, Any]]:
    """The entries of a file of profiles, as they stand there."""
    try:
        with path.open(encoding="utf-8", newline="") as file:
            found: Any = list(csv.DictReader(file)) if path.suffix.lower() == ".csv" else json.load(file)
    except (OSError, ValueError, csv.Error) as error:
        raise ValueError(f"--device {path} cannot be read: {error}") from error
    if not isinstance(found, list) or not found or not all(isinstance(entry, Mapping) for entry in found):
        raise ValueError(f"{path} holds no list of device profiles; a line of CSV, or an object of a JSON list, is one")
    return found


def _row(where: str, entry: Mapping[str, Any]) -> Row:
    known = ("name", *FIGURES, "device", "share")
    said = {key: value for key, value in entry.items() if value not in ("", None)}
    if unknown := sorted(map(str, set(said) - set(known))):
        raise ValueError(f"{where} has {unknown}, which mean nothing; there are {list(known)}")
    if "name" not in said or ("device" in said) == ("share" in said):
        raise ValueError(f"{where} needs a name, and either a device (a number, or a range such as 0-9) or a share; it has {sorted(said)}")
    name = str(said["name"])
    figures = {
        **(vars(PROFILES[name]) if name in PROFILES else {}),
        **{key: _number(where, key, said[key]) for key in FIGURES if key in said},
    }
    if missing := [key for key in FIGURES if key not in figures]:
        raise ValueError(f"{where}: '{name}' is none of {sorted(PROFILES)}, whose figures are known, and lacks {missing}")
    share = _number(where, "share", said["share"]) if "share" in said else 0.0
    if "share" in said and not 0 < share <= 1:
        raise ValueError(f"{where} has share {share:g}; it is above 0 and at most 1")
    return Row(DeviceProfile(**{**figures, "name": name}), _devices(where, said["device"]) if "device" in said else range(0), share)


def _number(where: str, key: str, value: Any) -> float:
    try:
        return float(value)
    except (TypeError, ValueError, OverflowError) as error:
        raise ValueError(f"{where} has {key} {value!r}; it must be a number") from error


def _devices(where: str, value: Any) -> range:
    first, dash, last = str(value).partition("-")
    if first.strip().isdecimal() and (last.strip().isdecimal() or not dash):
        found = range(int(first), int(last if dash else first) + 1)
        if found:
            return found
    raise ValueError(f"{where} has device {value!r}; it must be a number from 0, or a range such as 0-9")


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


def round_seconds(fleet: Fleet, costs: Iterable[tuple[int, float, float, float]]) -> float:
    """Simulated seconds of a round: that of its slowest device, or 0. ``costs``: (device, flops, bytes_down, bytes_up) of each."""
    return max((seconds(fleet.of(client), *cost) for client, *cost in costs), default=0.0)
