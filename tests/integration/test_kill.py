"""Kill −9 at a random moment loses at most the round in progress, and the resumed run ends bit-identical: ten times in a row."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize(("method", "stack", "times"), [("fibecfed", 0, 10), ("centralised", 1, 3), ("fedcybgd", 0, 3)])
def test_kills_in_a_row_end_bit_identical(method: str, stack: int, times: int, tmp_path: Path) -> None:
    command = [sys.executable, "-m", "tests.integration.killing", str(tmp_path), method, str(stack), str(times)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.count("equal: True") == times
    assert done.stdout.count("died with") >= times // 2, f"most kills must hit a run that was going on\n{done.stdout}"
