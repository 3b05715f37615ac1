"""Simulated device time against sums done by hand, and who is like what: by name, by mix, by file."""

from __future__ import annotations

import dataclasses
import json
import math
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from fedloom.fleet import DeviceProfile, Fleet
from fedloom.messages import CENTRE
from fedloom.methods.fedavg import FedAvg
from fedloom.run.costs.profiles import MIXES, PROFILES, by_name, drawn, fleet_of, insist_on_device, named, round_seconds, seconds
from fedloom.run.experiment import Experiment
from fedloom.seeds import derive

SLOW = DeviceProfile("slow", flops_per_second=10.0, upload_bytes_per_second=2.0, download_bytes_per_second=5.0, memory_bytes=100.0)
FAST = DeviceProfile("fast", flops_per_second=40.0, upload_bytes_per_second=1.0, download_bytes_per_second=50.0, memory_bytes=400.0)
ALIKE = Fleet((SLOW,))
TWO = Fleet((SLOW, FAST), (0, 1, 1))


def test_a_turn_is_download_then_compute_then_upload():
    assert seconds(SLOW, flops=30, bytes_down=20, bytes_up=14) == 20 / 5 + 30 / 10 + 14 / 2


def test_each_cost_goes_over_its_own_rate():
    assert (seconds(SLOW, 10, 0, 0), seconds(SLOW, 0, 10, 0), seconds(SLOW, 0, 0, 10)) == (1.0, 2.0, 5.0)


def test_a_round_waits_for_its_slowest_device():
    assert round_seconds(ALIKE, [(4, 10, 0, 0), (2, 0, 0, 6), (9, 0, 5, 0)]) == 3.0
    assert round_seconds(ALIKE, []) == 0.0


def test_each_device_is_as_fast_as_its_own_profile():
    """Device 0 takes 4 + 4 + 1 s, devices 1 and 2 at the same cost 0.4 + 1 + 2 s; who uploads much is slower on the fast one."""
    assert round_seconds(TWO, [(0, 40, 20, 2), (1, 40, 20, 2)]) == 9.0
    assert round_seconds(TWO, [(1, 40, 20, 2), (2, 40, 20, 2)]) == pytest.approx(3.4)
    assert round_seconds(TWO, [(0, 0, 0, 8), (2, 0, 0, 8)]) == 8.0


@pytest.mark.parametrize("rate", [0.0, -1.0, math.inf, math.nan])
@pytest.mark.parametrize("field", ["flops_per_second", "upload_bytes_per_second", "download_bytes_per_second", "memory_bytes"])
def test_a_figure_must_be_positive_and_finite(field, rate):
    with pytest.raises(ValueError, match=field):
        dataclasses.replace(SLOW, **{field: rate})


@pytest.mark.parametrize("costs", [(-1, 0, 0), (0, math.nan, 0), (0, 0, math.inf)])
def test_a_cost_must_be_finite_and_not_negative(costs):
    with pytest.raises(ValueError, match="must be zero or a positive finite number"):
        seconds(SLOW, *costs)


def test_profiles_are_found_by_their_own_name_and_the_default_is_one_of_them():
    assert all(named(name).name == name for name in PROFILES)
    assert named(Experiment(FedAvg()).device) is PROFILES["jetson"]
    with pytest.raises(ValueError, match=r"no device profile 'toaster'; there are \['jetson', 'laptop', 'phone'\], \['mixed'\] of several"):
        named("toaster")


def test_the_named_profiles_are_those_of_the_documentation():
    """docs/devices.md: 1·10¹¹ FLOP/s, Mbit/s up and down (10⁶ bits, of which eight are a byte), GB."""
    power = str.maketrans("⁰¹²³⁴⁵⁶⁷⁸⁹", "0123456789")
    told = {}
    for line in (Path(__file__).parents[2] / "docs" / "devices.md").read_text(encoding="utf-8").splitlines():
        if line.startswith("| `"):
            name, flops, up, down, memory, _ = (cell.strip() for cell in line.strip("| ").split(" | "))
            digit, ten = flops.split("·10")
            links = [float(link.removesuffix(" Mbit/s")) * 1e6 / 8 for link in (up, down)]
            told[name.strip("`")] = (float(digit) * 10 ** int(ten.translate(power)), *links, float(memory.removesuffix(" GB")) * 1e9)
    known = {n: (p.flops_per_second, p.upload_bytes_per_second, p.download_bytes_per_second, p.memory_bytes) for n, p in PROFILES.items()}
    assert told == known and len(told) == 3


def test_a_stronger_device_is_never_slower_nor_smaller():
    kinds = [named(name) for name in ("phone", "jetson", "laptop")]
    turns = [seconds(kind, 1e12, 3e6, 3e6) for kind in kinds]
    assert turns == sorted(turns, reverse=True) and len(set(turns)) == 3
    assert [kind.memory_bytes for kind in kinds] == sorted({kind.memory_bytes for kind in kinds})


def test_strength_is_the_share_of_the_most_memory_and_nothing_where_all_are_alike():
    assert [TWO.strength(k) for k in range(3)] == [0.25, 1.0, 1.0]
    assert [fleet.strength(0) for fleet in (ALIKE, Fleet((SLOW, FAST), (1, 1)))] == [None, None]
    unused = Fleet((SLOW, FAST, dataclasses.replace(FAST, name="huge", memory_bytes=4000.0)), (0, 1, 1))
    assert unused.strength(1) == 1.0, "of what devices have, not of what is listed"


def test_the_place_that_holds_everything_is_the_fastest_and_there_are_no_other_devices():
    assert (TWO.of(CENTRE), ALIKE.of(CENTRE), ALIKE.of(77)) == (FAST, SLOW, SLOW)
    for client in (3, -2):
        with pytest.raises(ValueError, match=f"there is no device {client}; there are profiles of devices 0 to 2"):
            TWO.of(client)


def test_what_is_told_of_a_fleet():
    told = TWO.as_json(range(3))
    assert told["of"] == ["slow", "fast", "fast"]
    assert told["profiles"] == [{**dataclasses.asdict(SLOW), "devices": 1}, {**dataclasses.asdict(FAST), "devices": 2}]
    assert ALIKE.as_json(range(7)) == {"profiles": [{**dataclasses.asdict(SLOW), "devices": 7}], "of": []}


def test_a_mix_is_drawn_device_by_device_from_the_seed():
    fleet = fleet_of("mixed", 3000, 5)
    assert fleet == by_name("mixed", 3000, 5) and fleet != by_name("mixed", 3000, 6)
    assert by_name("mixed", 10, 5).which == fleet.which[:10], "whoever else there is"
    counts = Counter(fleet.of(k).name for k in range(3000))
    assert all(abs(counts[name] - 1000) < 4 * math.sqrt(3000 * 2 / 9) for name in MIXES["mixed"])
    draws = [derive(5, "device", k).random() for k in range(50)]
    assert drawn([0.2, 0.5, 0.3], range(50), 5) == tuple((d >= 0.2) + (d >= 0.7) for d in draws)
    assert fleet_of("phone", 9, 5) == Fleet((named("phone"),))


CSV = """name,flops_per_second,upload_bytes_per_second,download_bytes_per_second,memory_bytes,device,share
board,1e9,100,200,3000,1-2,
phone,,,,5e8,0,
laptop,,,,,,0.25
jetson,,,,,,0.75
"""


def test_a_file_says_who_is_like_what(tmp_path: Path) -> None:
    """Devices by number and range, the rest by drawn share; a known name brings the figures that are left out."""
    (tmp_path / "d.csv").write_text(CSV)
    fleet = fleet_of(str(tmp_path / "d.csv"), 60, 5)
    assert fleet.of(1) == fleet.of(2) == DeviceProfile("board", 1e9, 100.0, 200.0, 3000.0)
    assert fleet.of(0) == dataclasses.replace(named("phone"), memory_bytes=5e8)
    draws = {k: derive(5, "device", k).random() for k in range(3, 60)}
    assert [fleet.of(k).name for k in draws] == ["laptop" if d < 0.25 else "jetson" for d in draws.values()]
    entries = [{"name": "board", "device": "1-2", **dict(zip(FIGURES, (1e9, 100, 200, 3000), strict=True))}]
    entries += [{"name": "phone", "memory_bytes": 5e8, "device": 0}, {"name": "laptop", "share": 0.25}, {"name": "jetson", "share": 0.75}]
    (tmp_path / "d.json").write_text(json.dumps(entries))
    assert fleet_of(str(tmp_path / "d.json"), 60, 5) == fleet


FIGURES = ("flops_per_second", "upload_bytes_per_second", "download_bytes_per_second", "memory_bytes")
PHONE: dict[str, Any] = {"name": "phone", "share": 1}


@pytest.mark.parametrize(
    ("entries", "error"),
    [
        ([], "holds no list of device profiles"),
        ({"name": "phone"}, "holds no list of device profiles"),
        ([{"name": "phone"}], r"entry 1 needs a name, and either a device .* or a share; it has \['name'\]"),
        ([{"name": "phone", "device": 0, "share": 1}], "either a device"),
        ([{"share": 1}], "needs a name"),
        ([{**PHONE, "ram": 3}], r"has \['ram'\], which mean nothing"),
        ([{"name": "board", "share": 1, "memory_bytes": 3}], r"'board' is none of .* and lacks \['flops_per_second'"),
        ([{**PHONE, "memory_bytes": "much"}], "memory_bytes 'much'; it must be a number"),
        ([{**PHONE, "memory_bytes": -1}], "has memory_bytes=-1"),
        ([{"name": "phone", "share": 0.5}], "the shares add up to 0.5; they must add up to 1"),
        ([{"name": "phone", "share": 2}], "has share 2; it is above 0 and at most 1"),
        ([{"name": "phone", "device": 0}], r"says nothing of devices \[1, 2, 3\]"),
        ([PHONE, {"name": "jetson", "device": "3-9"}], r"device 4 does not exist: there are devices 0 to 3 \(--clients 4\)"),
        ([PHONE, {"name": "jetson", "device": 1}, {"name": "laptop", "device": "0-1"}], "device 1 is named twice"),
        ([PHONE, {"name": "jetson", "device": "2-1"}], "has device '2-1'; it must be a number from 0, or a range"),
        ([PHONE, {"name": "jetson", "device": -1}], "has device -1"),
        ([PHONE, {"name": "phone", "device": 0, "memory_bytes": 3}], "two kinds of device are named 'phone' and differ"),
    ],
)
def test_a_file_that_says_too_little_or_too_much_is_refused(entries: Any, error: str, tmp_path: Path) -> None:
    (tmp_path / "d.json").write_text(json.dumps(entries))
    with pytest.raises(ValueError, match=error):
        fleet_of(str(tmp_path / "d.json"), 4, 5)


def test_a_file_is_known_by_its_ending_and_opened_when_it_is_needed(tmp_path: Path) -> None:
    insist_on_device(str(tmp_path / "gone.csv"))
    with pytest.raises(ValueError, match=r"gone.csv cannot be read"):
        fleet_of(str(tmp_path / "gone.csv"), 4, 5)
    (tmp_path / "d.json").write_text("{")
    with pytest.raises(ValueError, match=r"d.json cannot be read"):
        fleet_of(str(tmp_path / "d.json"), 4, 5)
    with pytest.raises(ValueError, match="no device profile"):
        by_name(str(tmp_path / "d.json"), 4, 5)
