"""Simulated device time against sums done by hand."""

from __future__ import annotations

import dataclasses
import math

import pytest

from fedloom.run.devices import DEFAULT, PROFILES, DeviceProfile, named, round_seconds, seconds

SLOW = DeviceProfile("slow", flops_per_second=10.0, upload_bytes_per_second=2.0, download_bytes_per_second=5.0)


def test_a_turn_is_download_then_compute_then_upload():
    assert seconds(SLOW, flops=30, bytes_down=20, bytes_up=14) == 20 / 5 + 30 / 10 + 14 / 2


def test_each_cost_goes_over_its_own_rate():
    assert (seconds(SLOW, 10, 0, 0), seconds(SLOW, 0, 10, 0), seconds(SLOW, 0, 0, 10)) == (1.0, 2.0, 5.0)


def test_a_round_waits_for_its_slowest_device():
    assert round_seconds(SLOW, [(10, 0, 0), (0, 0, 6), (0, 5, 0)]) == 3.0
    assert round_seconds(SLOW, []) == 0.0


@pytest.mark.parametrize("rate", [0.0, -1.0, math.inf, math.nan])
@pytest.mark.parametrize("field", ["flops_per_second", "upload_bytes_per_second", "download_bytes_per_second"])
def test_a_rate_must_be_positive_and_finite(field, rate):
    with pytest.raises(ValueError, match=field):
        dataclasses.replace(SLOW, **{field: rate})


@pytest.mark.parametrize("costs", [(-1, 0, 0), (0, math.nan, 0), (0, 0, math.inf)])
def test_a_cost_must_be_finite_and_not_negative(costs):
    with pytest.raises(ValueError, match="must be zero or a positive finite number"):
        seconds(SLOW, *costs)


def test_profiles_are_found_by_their_own_name_and_the_default_is_one_of_them():
    assert all(named(name).name == name for name in PROFILES)
    assert DEFAULT is named("jetson")
    with pytest.raises(ValueError, match=r"no device profile 'toaster'; there are \['jetson', 'laptop', 'phone'\]"):
        named("toaster")


def test_a_stronger_device_is_never_slower():
    turns = [seconds(named(name), 1e12, 3e6, 3e6) for name in ("phone", "jetson", "laptop")]
    assert turns == sorted(turns, reverse=True) and len(set(turns)) == 3
