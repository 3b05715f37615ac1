"""When the C kernels are there, what is said when they are not, and that they are compiled once."""

from __future__ import annotations

import logging
import subprocess
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch

from fedloom import cache
from fedloom.native import library
from fedloom.tensors import weighted_mean

COMPILED = library.why_not()
needs_compiler = pytest.mark.skipif(bool(COMPILED), reason=COMPILED or "there are C kernels")


@pytest.fixture
def afresh(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[pytest.MonkeyPatch]:
    """As a new process would find it, with an empty cache."""
    monkeypatch.setenv(cache.VARIABLE, str(tmp_path / "cache"))
    for found in (library.why_not, library._library):
        found.cache_clear()
    yield monkeypatch
    for found in (library.why_not, library._library):
        found.cache_clear()


def test_turned_off_by_the_environment(afresh: pytest.MonkeyPatch) -> None:
    afresh.setenv(library.VARIABLE, "0")
    assert library.why_not() == "turned off by FEDLOOM_NATIVE=0"
    assert not library.takes(torch.zeros(2))


def test_no_compiler_is_said_and_stops_nobody(afresh: pytest.MonkeyPatch) -> None:
    afresh.setenv("CC", "no-such-compiler")
    assert "no C compiler 'no-such-compiler' was found; install one" in library.why_not()
    assert torch.equal(weighted_mean([(1.0, {"a": torch.ones(3)}), (3.0, {"a": torch.full((3,), 5.0)})])["a"], torch.full((3,), 4.0))


def test_a_compiler_that_fails_is_told_with_its_own_words(
    afresh: pytest.MonkeyPatch, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    broken = tmp_path / "cc"
    broken.write_text("#!/bin/sh\necho 'no such processor' >&2\nexit 1\n")
    broken.chmod(0o755)
    afresh.setenv("CC", str(broken))
    with caplog.at_level(logging.WARNING, "fedloom"):
        assert "no such processor" in library.why_not()
    assert "small operations run as PyTorch operations, slower" in caplog.text
    assert not list((tmp_path / "cache" / "native").iterdir())


@needs_compiler
def test_compiled_once_a_machine_and_again_for_another_source(afresh: pytest.MonkeyPatch, tmp_path: Path) -> None:
    runs = []
    run = subprocess.run

    def counted(command: list[str], **given: object) -> object:
        runs.append(command)
        return run(command, **given)  # type: ignore[call-overload]

    afresh.setattr(library.subprocess, "run", counted)
    for _ in range(2):
        library._library.cache_clear()
        library._library()
    (made,) = (tmp_path / "cache" / "native").iterdir()
    assert len(runs) == 1 and made.suffix == ".so"
    assert (tmp_path / "cache" / "native").stat().st_mode & 0o077 == 0
    other = tmp_path / "kernels.c"
    other.write_text(library.SOURCE.read_text() + "/* changed */\n")
    afresh.setattr(library, "SOURCE", other)
    library._library.cache_clear()
    library._library()
    assert len(runs) == 2 and len(list((tmp_path / "cache" / "native").iterdir())) == 2


def test_what_they_take() -> None:
    assert not library.takes(torch.zeros(2, dtype=torch.float64))
    assert not library.takes(torch.zeros(2), torch.zeros(2, dtype=torch.bfloat16))
    assert not library.takes(torch.zeros(2, device="meta"))
    assert library.takes(torch.zeros(2)) is not bool(COMPILED)


@needs_compiler
@pytest.mark.parametrize("count", [1, 5, 1023, 1024, 5000])
@pytest.mark.parametrize("updates", [1, 3, 4, 9])
def test_sums_add_to_what_is_there(count: int, updates: int) -> None:
    generator = torch.Generator().manual_seed(count + updates)
    tensors = [torch.randn(count, generator=generator) for _ in range(updates)]
    weights = [0.5 + k for k in range(updates)]
    sums = torch.linspace(0, 1, count, dtype=torch.float64)
    wanted = sums + sum(w * t.double() for w, t in zip(weights, tensors, strict=True))
    library.weighted_sum(tensors, weights, sums)
    assert torch.allclose(sums, wanted, rtol=1e-14, atol=1e-14)


@needs_compiler
def test_small_numbers_survive_large_ones() -> None:
    """Float64, not float32: 2²⁵ + 1 − 2²⁵ is 1."""
    tensors = [torch.full((9,), value) for value in (2.0**25, 1.0, 1.0, 1.0, -(2.0**25), 1.0)]
    sums = torch.zeros(9, dtype=torch.float64)
    library.weighted_sum(tensors, np.ones(6).tolist(), sums)
    assert sums.tolist() == [4.0] * 9
