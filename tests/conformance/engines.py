"""The engines that the laws are shown on, as pytest's parameters. (Not in ``toy.py``: toy workers import that, and need no pytest.)"""

from __future__ import annotations

import pytest

from tests.conformance.toy import federation, flower, in_waves, local

ENGINES = {
    "local": pytest.param(local, id="local"),
    "waves": pytest.param(in_waves, id="waves"),
    "flower": pytest.param(flower, id="flower", marks=pytest.mark.flower),
    "federation": pytest.param(federation, id="federation", marks=pytest.mark.flower),
}
