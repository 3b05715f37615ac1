"""What LoRA's start costs is booked once with the set-up, of every device that makes it: by hand on the tiny model, six weights of 16 × 16.

Of one such weight at rank 8, p = q = 16: 2p²q = 8192, 4p³/3 = 16384/3, 2p²r = 4096, 4pqr = 8192; six of them are 155648 operations."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from fedloom.compute.flops import start_operations
from fedloom.fleet import DeviceProfile, Fleet
from fedloom.model.adapters import Adapter, Start
from fedloom.model.principal import operations
from fedloom.run.costs.ledger import Section
from fedloom.run.costs.profiles import PROFILES
from fedloom.run.describe import describe
from fedloom.run.loop import begin, run
from fedloom.run.pages.spent import spent
from tests import small, tiny

ONE = 6 * (8192 + 16384 / 3 + 4096 + 8192)


def started(name: str, start: Start = "svd", **fields: Any) -> Any:
    return replace(small.experiment(name, rounds=1, evaluate_every=0, **fields), adapter=Adapter(rank=8, start=start))


def test_the_operations_of_one_weight() -> None:
    """p = 3, q = 5, r = 2 by hand: 90 + 36 + 36 + 120; a weight and its transpose cost the same."""
    assert operations(5, 3, 2) == operations(3, 5, 2) == 282
    assert operations(16, 16, 8) == pytest.approx(ONE / 6)
    assert ONE == 155648


def test_a_model_costs_as_many_as_it_has_weights_under_pairs_and_none_from_zero() -> None:
    one = 2 * 16**3 + 4 * 16**3 / 3 + 2 * 16**2 * 2 + 4 * 16**2 * 2
    assert start_operations(tiny.model(start="svd", layers=2)) == pytest.approx(4 * one)
    assert start_operations(tiny.model(layers=2)) == 0


def test_a_fast_start_is_booked_as_it_is_computed() -> None:
    """By hand for 40 × 30 and rank 2, so 12 columns: ten products of 2·40·30·12, and 4·40·30·2. Of what is no larger than its columns, as
    the tiny model is, fast is dearer; of an encoder's weight it is a seventh."""
    assert operations(40, 30, 2, fast=True) == operations(30, 40, 2, fast=True) == 288000 + 9600
    assert start_operations(tiny.model(start="fast-svd", layers=2)) == 4 * (20 * 16 * 16 * 12 + 4 * 16 * 16 * 2)
    assert operations(768, 768, 8, fast=True) < operations(768, 768, 8) / 6


def test_the_slowest_device_decides_how_long_it_takes() -> None:
    fast, slow = DeviceProfile("fast", 100.0, 1.0, 1.0, 1.0), DeviceProfile("slow", 20.0, 1.0, 1.0, 1.0)
    section = Section(Fleet((fast, slow), (0, 1, 0)))
    section.begin([0, 1, 2], 60.0)
    assert (section.flops, section.device_seconds, section.bytes_up, section.bytes_down, section.examples) == (180.0, 3.0, 0, 0, 0)
    section.begin([0], 60.0)
    assert (section.flops, section.device_seconds) == (240.0, 3.6)


def test_a_run_books_it_with_the_set_up_once(tmp_path: Path) -> None:
    made = run(started("federa"), tmp_path / "federa", plain=True)
    assert made["setup_flops"] == pytest.approx(4 * ONE), "four devices, each for itself"
    assert made["setup_device_seconds"] == pytest.approx(ONE / PROFILES["jetson"].flops_per_second), "all at once"
    assert made["setup_bytes_up"] == made["setup_bytes_down"] == made["setup_examples"] == 0
    assert f"{4 * ONE:.3g} operations" in spent(made)["set-up"]
    assert made["setup_paid_back"] is None, "it saves nothing in a round"
    longer = run(replace(started("federa"), rounds=2), tmp_path / "longer", plain=True)
    assert longer["setup_flops"] == made["setup_flops"]
    zero = run(started("lora", "zero"), tmp_path / "zero", plain=True)
    assert zero["setup_flops"] == zero["setup_device_seconds"] == 0 and "set-up" not in spent(zero)


def test_any_method_pays_for_it_and_it_is_told_beforehand(monkeypatch: pytest.MonkeyPatch) -> None:
    booked: dict[str, list[float]] = {}
    for name in ("lora", "fibecfed", "centralised"):
        for start in ("zero", "svd"):
            world = small.BUILT(started(name, start))
            section = Section(world.fleet)
            begin(section, world, world.pool.clients)
            booked.setdefault(name, []).append(section.flops)
    assert booked == {"lora": [0, pytest.approx(4 * ONE)], "fibecfed": [0, pytest.approx(4 * ONE)], "centralised": [0, pytest.approx(ONE)]}
    small.build_once(monkeypatch)
    told = {start: dict(describe(started("lora", start)).lines) for start in ("zero", "svd", "fast-svd")}  # type: ignore[arg-type]
    assert told["fast-svd"]["set-up"] == "6 weights decomposed nearly on every device, each for itself"
    assert told["svd"]["set-up"] == "6 weights decomposed on every device, each for itself" and told["zero"]["set-up"] == "none"
    assert f"{4 * ONE:.3g} FLOPs" in told["svd"]["set-up costs"] and " 0 FLOPs" in told["zero"]["set-up costs"]
