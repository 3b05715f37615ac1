"""The quick ones of ``faults.py``: one federation of real processes over TLS, hit by one fault after another."""

from __future__ import annotations

from pathlib import Path

import pytest

pytest.importorskip("flwr", reason="the extra 'flower' is not installed: pip install 'fedloom[flower]'")

from tests.integration.faults import one_after_another

pytestmark = [pytest.mark.flower, pytest.mark.no_cover]

QUICK = (
    "worker killed",
    "NaN",
    "missing tensor",
    "earlier answer again",
    "flipped bit",
    "another round",
    "replayed at once",
    "signed by another device",
    "open key",
)


def test_faults_do_what_they_must_and_no_more(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """And the state after each is what it would be without. Whoever lies is left out for half a second, not for five."""
    monkeypatch.setenv("LEFT_OUT", "0.5")
    rows = one_after_another(tmp_path / "standing", QUICK, scored=False, max_train=240, max_test=40)
    assert [f"{row.name}: {row.wrong}" for row in rows if row.wrong] == []
    assert [row.name for row in rows] == list(QUICK)
    assert [row.name for row in rows if not row.rounds] == ["open key"], (
        "whom the server does not hear costs no round; of all others some counted"
    )
    assert all(row.identical for row in rows if row.rounds)
