"""A method out of a user's own file in a federation: the file is on both sides, is compared, and never travels."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from fedloom.client.store import ClientStore
from fedloom.data.shards import write_shards
from fedloom.messages import Failure, Task, Update
from fedloom.run.deployment.device import hosted, order
from fedloom.run.deployment.greeting import Own, digest_of_file, greeting_of, kinds_of, recipe_digest
from fedloom.run.errors import ExperimentError
from fedloom.run.experiment import Experiment
from fedloom.run.recipes import resolve
from fedloom.run.world import build, read_data
from fedloom.wire import pack, unpack
from tests import tiny

MINE = """
import pathlib
from dataclasses import dataclass, field
from typing import ClassVar

from fedloom.messages import on_client
from fedloom.methods.fedavg import FedAvg
from fedloom.methods.method import predict

pathlib.Path(__file__).with_suffix(".ran").touch()


@dataclass(frozen=True)
class Halved:
    name: ClassVar[str] = "halved"
    paper: ClassVar[str] = "none"

    share: float = 0.5
    inner: FedAvg = field(default_factory=FedAvg)

    def init(self, model):
        return self.inner.init(model)

    def setup(self, state, pool):
        return self.inner.setup(state, pool)

    def round(self, state, pool):
        return self.inner.round(state, pool)

    @on_client
    def train(self, c, task):
        update = yield from self.inner.train(c, task)
        moved = {n: task.tensors[n] + self.share * (t - task.tensors[n]) for n, t in update.tensors.items()}
        return type(update)(update.client, update.num_examples, moved, update.metrics)

    def personalise(self, client, shared):
        return self.inner.personalise(client, shared)

    def assembled(self, state):
        return self.inner.assembled(state)

    predict = predict
"""


@pytest.fixture
def sides(tmp_path: Path) -> tuple[Path, Path]:
    """The file on the server and the file on the device."""
    made = tmp_path / "server" / "mine.py", tmp_path / "device" / "other_name.py"
    for file in made:
        file.parent.mkdir()
        file.write_text(MINE)
    return made


def ran(file: Path) -> bool:
    return file.with_suffix(".ran").exists()


def greeting(digest: str) -> dict[str, Any]:
    return {"recipe": digest, "experiment": {"method": {"name": "halved"}}}


def test_the_same_file_on_both_sides_is_the_method(sides: tuple[Path, Path], tmp_path: Path) -> None:
    server, device = sides
    shape = {"clients": 2, "cohort": 2, "rounds": 1, "max_train": 24, "max_validation": 4, "max_test": 4, "max_length": 16, "seed": 5}
    e = Experiment(replace(resolve(str(server)).method, share=0.25), model=str(tiny.folder()), **shape)  # type: ignore[arg-type]
    write_shards(*read_data(e), tmp_path / "shards")
    world = build(e)
    told = {**greeting_of(world), "digest": e.digest()}
    assert told["recipe"] == digest_of_file(server) == recipe_digest(e.method) and MINE not in str(told)
    own = Own(str(tmp_path / "shards" / "1"), recipe=str(device), recompute=True)
    assert not ran(device)
    host, _ = hosted(order(told, own))
    assert ran(device) and type(e.method) is not kinds_of(told, own)["halved"], "each side has loaded its own file"
    assert vars(host.compute)["model"].recomputes and not world.model.recomputes, "what a device keeps is its own affair"
    sent, sent_again = (pack(Task("train", 1, world.model.initial, {"round": 0}), e.digest()) for _ in range(2))
    (blob,) = host.answer([sent])
    (due,) = world.host(ClientStore(tmp_path / "states")).answer([sent_again])
    assert not isinstance(blob, Failure) and not isinstance(due, Failure), (blob, due)
    there, here = unpack(blob, e.digest()), unpack(due, e.digest())
    assert isinstance(there, Update) and isinstance(here, Update) and there.num_examples == here.num_examples
    for name, tensor in here.tensors.items():
        assert (there.tensors[name] - tensor).abs().max() < 1e-5, name
    assert any(not bool((tensor == world.model.initial[name]).all()) for name, tensor in there.tensors.items())


def test_another_file_is_refused_before_a_line_of_it_runs(sides: tuple[Path, Path]) -> None:
    server, device = sides
    device.write_text(MINE.replace("0.5", "0.6"))
    with pytest.raises(
        ExperimentError, match=f"comes to {digest_of_file(device)}, and the server's to '{digest_of_file(server)}'; .* byte"
    ):
        kinds_of(greeting(digest_of_file(server)), Own("data", recipe=str(device)))
    assert not ran(device)


def test_a_device_without_the_file_is_told_to_have_it(sides: tuple[Path, Path]) -> None:
    with pytest.raises(ExperimentError, match="code is never sent: have the same file here, and give it as --recipe FILE"):
        kinds_of(greeting(digest_of_file(sides[0])), Own("data"))
    with pytest.raises(ExperimentError, match="there is no recipe 'away.py'"):
        kinds_of(greeting("0" * 16), Own("data", recipe="away.py"))


def test_for_a_method_of_the_package_no_file_is_looked_at(sides: tuple[Path, Path]) -> None:
    assert recipe_digest(resolve("lora").method) == ""
    assert kinds_of(greeting(""), Own("data", recipe=str(sides[1]))) == {} and not ran(sides[1])


def test_a_file_without_that_method_says_what_it_has(sides: tuple[Path, Path]) -> None:
    told = greeting(digest_of_file(sides[0])) | {"experiment": {"method": {"name": "doubled"}}}
    with pytest.raises(ExperimentError, match="defines no method 'doubled'; it defines halved"):
        kinds_of(told, Own("data", recipe=str(sides[1])))
