"""Whole runs of this tier have pages without pictures: what they show is for the unit and the integration tests to hold."""

from __future__ import annotations

import pytest


@pytest.fixture(autouse=True)
def pages_without_pictures(no_pictures: None) -> None:
    """As :func:`tests.conftest.no_pictures`, of every test here."""
