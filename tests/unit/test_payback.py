"""After which round a set-up has paid for itself."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from fedloom.client.curricula.everything import Everything
from fedloom.client.curricula.fisher import ByFisher
from fedloom.methods.ditto import Ditto
from fedloom.methods.fedavg import FedAvg
from fedloom.methods.fibecfed import FibecFed
from fedloom.methods.finetuned import FineTuned
from fedloom.run.costs.payback import first_paid, plain_of
from fedloom.run.loop import run
from fedloom.server.participation import Pool
from tests import small


@pytest.mark.parametrize(
    ("setup", "mine", "theirs", "due"),
    [
        (10, [1, 1, 1, 1], [4, 4, 4, 4], 4),  # saved 3, 6, 9, 12
        (9, [1, 1, 1, 1], [4, 4, 4, 4], 3),  # what is as much has paid
        (9, [1, 1], [4, 4], None),
        (0, [5, 1], [5, 1], 1),
        (1, [5, 5], [5, 5], None),
        (2, [1, 9], [4, 4], 1),  # later rounds may lose it again
        (2, [4, 1], [4, 4], 2),
        (1, [], [], None),
    ],
)
def test_the_first_round_after_which_all_that_was_spent_is_no_more(setup: float, mine: list, theirs: list, due: int | None) -> None:
    assert first_paid(setup, mine, theirs) == due


def test_rounds_must_match() -> None:
    with pytest.raises(ValueError, match="shorter"):
        first_paid(9, [1, 1], [4])


def test_plain_lora_trains_as_the_method_does_but_on_everything() -> None:
    inner = FedAvg(lr=0.5, local_epochs=7, batch_size=3)
    assert plain_of(FibecFed(inner)) == inner
    assert plain_of(FineTuned(FedAvg(local_epochs=7, curriculum=ByFisher()))) == FedAvg(local_epochs=7, curriculum=Everything())
    assert plain_of(inner) == inner
    assert plain_of(replace(Ditto(), inner=inner)) == inner
    assert plain_of(Pool((0,), 1, 1, 1)) is None, "nothing within it that plain LoRA could do"


@pytest.mark.parametrize(("name", "told"), [("fibecfed", True), ("fedalt", False)])
def test_only_who_trains_loras_pairs_is_held_against_plain_lora(name: str, told: bool, tmp_path: Path) -> None:
    """Of FedALT's two pairs a place plain LoRA would train both, and so be another."""
    assert (run(small.experiment(name, rounds=1), tmp_path / "run", plain=True)["setup_paid_back"] is not None) == told
