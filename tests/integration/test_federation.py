"""Real processes: a server and three devices over TLS, killed and stopped, come to the bits of the same participation without faults."""

from __future__ import annotations

import stat
from pathlib import Path

import pytest

pytest.importorskip("flwr", reason="the extra 'flower' is not installed: pip install 'fedloom[flower]'")

from tests.integration.federating import difference, play

pytestmark = [pytest.mark.flower, pytest.mark.no_cover]


def test_a_federation_with_faults_ends_as_without(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The seed draws, within five seconds: a worker stopped for a while, another device's worker, a device and the server killed."""
    there = play(tmp_path, "fibecfed", rounds=20, faults=4, seed=39286)
    hits = [line.split(": ", 1)[1] for line in capsys.readouterr().out.splitlines()]
    assert hits == ["worker stopped: 0", "device killed: 0", "worker killed: 2", "server killed: server"]
    assert there.rows()[-1]["round"] == 20
    assert difference(there) == ""
    results = (there.folder / "out" / "results.json").read_text()
    assert "PRIVATE KEY" not in results + "".join(there.said(who) for who in there.processes)
    assert (there.folder / "out" / "report.html").exists()
    assert stat.S_IMODE((there.folder / "certs" / "device-0" / "device.key").stat().st_mode) == 0o600
