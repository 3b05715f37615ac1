"""The quick ones of ``faults.py``: one federation of real processes over TLS, hit by one fault after another."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

pytest.importorskip("flwr", reason="the extra 'flower' is not installed: pip install 'fedloom[flower]'")

from tests.integration.faults import FAULTS, Row, Standing, compared, standing

pytestmark = pytest.mark.flower

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


@pytest.fixture(scope="module")
def here(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Standing]:
    with standing(tmp_path_factory.mktemp("faults") / "standing") as there:
        yield there


@pytest.fixture(scope="module")
def rows() -> list[Row]:
    return []


@pytest.mark.parametrize("name", QUICK)
def test_a_fault_does_what_it_must_and_no_more(name: str, here: Standing, rows: list[Row]) -> None:
    made, order = FAULTS[name]
    rows.append(made(here, order))


def test_the_federation_is_where_it_would_be_without(here: Standing, rows: list[Row]) -> None:
    here.stop()
    assert any(row.rounds for row in rows)
    compared(here.there.experiment, here.there.rows(), here.snapshots, rows, scored=False)
    assert [row.wrong for row in rows if row.wrong] == []
    assert all(row.identical for row in rows if row.rounds)
