"""The engines that the laws are shown on, as pytest's parameters. (Not in ``toy.py``: toy workers import that, and need no pytest.)"""

from __future__ import annotations

from collections.abc import Collection, Iterable
from typing import Any

import pytest

from tests.conformance.toy import federation, flower, in_waves, local

ENGINES = {
    "local": pytest.param(local, id="local"),
    "waves": pytest.param(in_waves, id="waves"),
    "flower": pytest.param(flower, id="flower", marks=pytest.mark.flower),
    "federation": pytest.param(federation, id="federation", marks=pytest.mark.flower),
}


def over(values: Iterable[Any], far: Collection[Any]) -> list[Any]:
    """(engine, value): all values on every engine, but over a federation, whose askings take longest, those ``far``.

    For what a host finds before there is an engine: that it crosses alike a few cases show."""
    return [
        pytest.param(*engine.values, value, id=f"{name}-{value}", marks=engine.marks)
        for name, engine in ENGINES.items()
        for value in values
        if name != "federation" or value in far
    ]
