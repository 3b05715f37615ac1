"""Real processes: a server and three devices over TLS, killed and stopped, come to the bits of the same participation without faults."""

from __future__ import annotations

import stat
from pathlib import Path

import pytest

pytest.importorskip("flwr", reason="the extra 'flower' is not installed: pip install 'fedloom[flower]'")

from tests.integration.federating import difference, play

pytestmark = pytest.mark.flower


def test_a_federation_with_faults_ends_as_without(tmp_path: Path) -> None:
    there = play(tmp_path, "fibecfed", rounds=30, faults=4, seed=3)
    assert there.rows()[-1]["round"] == 30
    assert difference(there) == ""
    results = (there.folder / "out" / "results.json").read_text()
    assert "PRIVATE KEY" not in results + "".join(there.said(who) for who in there.processes)
    assert (there.folder / "out" / "report.html").exists()
    assert stat.S_IMODE((there.folder / "certs" / "device-0" / "device.key").stat().st_mode) == 0o600
