"""Kill −9 at a random moment loses no round that was written, and a run that was killed ten times in a row ends bit-identical."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]
RUNS = ("fibecfed:0:10", "centralised:1:3", "fedcybgd:0:3")
"""Method, how many clients at once, and how many kills."""


def test_runs_killed_again_and_again_end_bit_identical(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "tests.integration.killing", str(tmp_path), *RUNS]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.count("equal: True") == len(RUNS)
    assert done.stdout.count("died with") >= 8, f"most kills must hit a run that was going on\n{done.stdout}"
