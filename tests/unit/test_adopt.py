"""What a method takes over of what another trained."""

from __future__ import annotations

from dataclasses import fields, replace
from typing import Any

import pytest
import torch

from fedloom.methods.method import State
from fedloom.run import adopt
from fedloom.run.adopt import prepared_for
from fedloom.run.errors import ExperimentError
from tests import small

OWN = {"server", "facts"}
"""What a method's set-up makes for itself, whoever trained."""


class Made:
    """As much of a world as is asked for."""

    def __init__(self) -> None:
        self.experiment: Any = small.experiment("lora-finetuned")
        self.model = self.pool = None


def state(number: float) -> State:
    """One of whose every field is another's."""
    of = {f.name: int(number) if f.name == "round" else {"a": torch.tensor([number])} for f in fields(State)}
    return State(**of)  # type: ignore[arg-type]


def test_everything_but_what_set_up_makes_is_taken_over(monkeypatch: pytest.MonkeyPatch) -> None:
    """Round, tensors, the server optimiser's moments, SCAFFOLD's control: whatever a state has, now or later."""
    trained, own, world = state(3.0), state(5.0), Made()
    monkeypatch.setattr(adopt, "set_up", lambda *_: None)
    monkeypatch.setattr(adopt, "drive", lambda flow, engine, **_: own)
    found = prepared_for(world, None, trained)  # type: ignore[arg-type]
    assert {f.name: getattr(found, f.name) for f in fields(State)} == {
        f.name: getattr(own if f.name in OWN else trained, f.name) for f in fields(State)
    }
    monkeypatch.setattr(adopt, "drive", lambda flow, engine, **_: replace(own, shared={"b": torch.ones(1)}))
    with pytest.raises(ExperimentError, match="^'lora-finetuned' shares other tensors than 'lora' did; it must be trained$"):
        prepared_for(world, None, trained)  # type: ignore[arg-type]
