"""The shared model is not asked again what every device has told of it; what is told is the same to the bit."""

from __future__ import annotations

from typing import Any

import pytest

from fedloom.client.store import ClientStore
from fedloom.engines.engine import drive
from fedloom.messages import Tensors
from fedloom.methods.method import one_round, set_up
from fedloom.run import evaluation
from fedloom.run.evaluation import evaluate
from fedloom.run.world import World
from fedloom.server.sharing import Sharing
from tests import small
from tests.conformance import test_questions as questions

SHARED = ["lora", "federa", "fedex", "scaffold", "fedfft", "fedcybgd", "centralised"]
"""Devices predict with the shared model and nothing else."""
OWN = {"lora-prior": {}, "fedeven": {}, "ditto": {}, "fibecfed": {}, "lora": {"wire": "bf16"}, "federa": {"share": Sharing(count=1)}}
"""They do not, or not with the server's own numbers."""


ARRANGED, ASKED = evaluation._rearranged, evaluation._of_one_model


def evaluated(name: str, monkeypatch: pytest.MonkeyPatch, again: bool, **fields: Any) -> tuple[Any, list[int]]:
    """After a round, and how many times the shared model was asked. ``again``: in any case."""
    world, asked = small.BUILT(small.experiment(name, **fields)), list[int]()
    engine, method = world.engine(ClientStore(None)), world.experiment.method
    state = drive(set_up(method, world.model, world.pool), engine, quorum=0)
    state = drive(one_round(method, state, world.pool), engine, quorum=0)

    def counted(of: World, tensors: Tensors) -> Any:
        asked.append(1)
        return ASKED(of, tensors)

    monkeypatch.setattr(evaluation, "_of_one_model", counted)
    monkeypatch.setattr(evaluation, "_rearranged", lambda of, logits: counted(of, state.shared) if again else ARRANGED(of, logits))
    return evaluate(world, state, engine), asked


@pytest.mark.parametrize("name", SHARED)
def test_one_pass_tells_what_two_do(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    found, asked = evaluated(name, monkeypatch, again=False)
    twice, then = evaluated(name, monkeypatch, again=True)
    assert (asked, then) == ([], [1])
    assert found.scores == twice.scores and found.confusion == twice.confusion
    assert found.scores["test"]["global"] == found.scores["test"]["personalised"] is not None


@pytest.mark.parametrize("partition", ["iid", "label"])
def test_windows_are_asked_once_too(partition: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of questions of several windows, which devices hold in another order than the data."""
    fields: dict[str, Any] = {"data": str(questions.data()), "max_length": 16, "partition": partition}
    world = small.BUILT(small.experiment("lora", **fields))
    assert all(len(world.splits[split]) > len(world.source.splits[split]) for split in ("validation", "test"))
    found, asked = evaluated("lora", monkeypatch, again=False, **fields)
    twice, then = evaluated("lora", monkeypatch, again=True, **fields)
    assert (asked, then) == ([], [1])
    assert found.scores == twice.scores and found.confusion == twice.confusion
    assert found.scores["test"]["global"] == pytest.approx(found.scores["test"]["personalised"]) is not None


@pytest.mark.parametrize("name", OWN)
def test_a_model_that_devices_do_not_predict_with_is_asked_by_itself(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    assert evaluated(name, monkeypatch, again=False, **OWN[name])[1] == [1]
