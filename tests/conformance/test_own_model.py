"""A device's own model out of the folder of its ``fedloom join``: the one that a simulation's export of that device is, to the bit."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from shutil import copy, copytree

import pytest
from safetensors.torch import load_file

from fedloom import cli
from fedloom.client.store import StoreError
from fedloom.data.shards import write_shards
from fedloom.engines.asked import ASKED, Asked, read
from fedloom.messages import Task, ask
from fedloom.run import checkpoint
from fedloom.run.deployment.device import insist_same_data, made_ready, order
from fedloom.run.deployment.greeting import Own, greeting_of
from fedloom.run.deployment.own_model import asked_in, export_own, kept_in
from fedloom.run.errors import CheckpointError, ExperimentError
from fedloom.run.experiment import Experiment
from fedloom.run.export import ExportError, export
from fedloom.run.loop import run
from fedloom.run.world import build, store_in
from fedloom.server.masks import Mask
from fedloom.server.sharing import LAYERS, Sharing
from fedloom.tensors import fingerprint
from fedloom.wire import pack
from tests import small

CLIENT = 2
HOW: dict[str, Experiment] = {
    "personal layers and masks": small.experiment("fibecfed"),
    "a model of its own": small.experiment("ditto"),
    "training before it predicts": small.experiment("lora-finetuned"),
    "a bias of its own": small.experiment("lora-prior"),
    "nothing of its own": small.experiment("lora"),
    "layers of its own and a mask, whatever the method": small.experiment("lora", share=Sharing(count=1), mask=Mask(keep=0.5)),
    "a wire that loses something": small.experiment("fibecfed", wire="int8"),
    "all weights": small.experiment("fedfft"),
}


def simulated(e: Experiment, folder: Path) -> checkpoint.Saved:
    run(e, folder, plain=True)
    saved = checkpoint.load(folder, store_in(folder))
    assert saved is not None
    return saved


def joined(e: Experiment, folder: Path, saved: checkpoint.Saved, there: Path) -> Path:
    """What lies in a device's folder after the last prediction of the run in ``folder``."""
    world, store = build(e), store_in(folder)
    checkpoint.load(folder, store)
    write_shards(world.source, world.partition, there / "shards")
    layers = e.share.layers(saved.state.facts)
    task: Task = ask(e.method.predict, CLIENT, saved.state.shared, splits=["validation", "test"], **({LAYERS: layers} if layers else {}))
    own = Own(str(there / "shards" / str(CLIENT)), folder=str(there / "device"))
    place = there / "device" / "states" / e.digest()
    place.mkdir(parents=True)
    if store.name(CLIENT):
        copy(folder / "checkpoints" / "clients" / store.name(CLIENT), place)
    greeting = {**greeting_of(world), "digest": e.digest()}
    insist_same_data(place, made_ready(json.loads(json.dumps(order(greeting, own)))))
    Asked(CLIENT, store.name(CLIENT), json.loads(json.dumps(order(greeting, own))), pack(e.encoding.down(task), e.digest())).write(place)
    return there / "device"


@pytest.mark.parametrize("how", HOW)
def test_it_is_what_a_simulation_exports_of_the_device(how: str, tmp_path: Path) -> None:
    e = HOW[how]
    saved = simulated(e, tmp_path / "run")
    said = export(e, tmp_path / "run", tmp_path / "simulated", CLIENT)
    place = asked_in(joined(e, tmp_path / "run", saved, tmp_path))
    assert place is not None
    whose, told = export_own(place, tmp_path / "own")
    assert whose.startswith(f"device 2 under {e.method_name} on ") and f"experiment {e.digest()}, predicted 20" in whose
    assert told.replace("own", "") == said.replace("simulated", "")
    file = "model.safetensors" if "model" in {p.stem for p in (tmp_path / "own").iterdir()} else "adapter_model.safetensors"
    own, due = (load_file(tmp_path / name / file) for name in ("own", "simulated"))
    assert fingerprint(own) == fingerprint(due)
    if how != "nothing of its own" and how != "all weights":
        export(e, tmp_path / "run", tmp_path / "other", CLIENT - 1)
        assert fingerprint(own) != fingerprint(load_file(tmp_path / "other" / file)), "devices differ"


@pytest.fixture(scope="module")
def device(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of one."""
    e, there = small.experiment("fibecfed"), tmp_path_factory.mktemp("there")
    return joined(e, there / "run", simulated(e, there / "run"), there)


def files(folder: Path) -> dict[str, tuple[bytes, int]]:
    return {str(p.relative_to(folder)): (p.read_bytes(), p.stat().st_mtime_ns) for p in sorted(folder.rglob("*")) if p.is_file()}


def test_the_command_takes_the_folder_of_join_wherever_it_lies_by_now_and_writes_nothing_there(
    device: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    moved = copytree(device, tmp_path / "a" / "b" / "moved")
    alone = copytree(next((moved / "states").iterdir()), tmp_path / "a" / "b" / "c")
    (moved / "start").mkdir()
    (moved / "start" / "a worker's").touch()
    (tmp_path / "a" / "start").mkdir()
    (tmp_path / "a" / "start" / "somebody's").touch()
    before, outs = (files(device), files(tmp_path)), []
    for i, folder in enumerate((device, moved, next((moved / "states").iterdir()), alone)):
        outs.append(tmp_path / f"out{i}")
        assert cli.main(["export", str(folder), str(outs[-1])]) == 0
        assert "load it with: PeftModel" in capsys.readouterr().out
    assert len({(out / "adapter_model.safetensors").read_bytes() for out in outs}) == 1
    assert (files(device), {name: of for name, of in files(tmp_path).items() if not name.startswith("out")}) == before
    assert cli.main(["export", str(device), str(tmp_path / "merged"), "--merge"]) == 0
    assert (tmp_path / "merged" / "model.safetensors").exists()


def test_what_cannot_be_exported_is_told_with_the_mend(device: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def refused(*words: object) -> str:
        assert cli.main(["export", *map(str, words)]) == 2
        return capsys.readouterr().err

    assert "leave --client out" in refused(device, tmp_path / "own", "--client", 2)
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "x").write_text("x")
    assert "nothing was overwritten" in refused(device, tmp_path / "full")
    (tmp_path / "new" / "states" / "abc").mkdir(parents=True)
    assert "keeps no prediction yet" in refused(tmp_path / "new", tmp_path / "own")
    two = copytree(device, tmp_path / "two")
    (first,) = (two / "states").iterdir()
    (two / "states" / "another").mkdir()
    told = refused(two, tmp_path / "own")
    assert "in 2 experiments; give one of them" in told and f"{first} (predicted 20" in told and "another (no prediction yet)" in told
    assert not (tmp_path / "own").exists()


def test_what_was_altered_is_refused_wherever_it_was(device: Path, tmp_path: Path) -> None:
    place = next((copytree(device, tmp_path / "altered") / "states").iterdir())
    as_it_was = (place / ASKED).read_bytes()
    for at in (5, as_it_was.index(b'"client": 2') + 10, as_it_was.index(b'"data"') + 4, -5):
        kept = bytearray(as_it_was)
        kept[at] ^= 1
        (place / ASKED).write_bytes(kept)
        with pytest.raises(ExportError, match="was altered after it was written. The device keeps it anew"):
            export_own(place, tmp_path / "own")
    (place / ASKED).unlink()
    with pytest.raises(StoreError, match="cannot be read"):
        read(place)


def test_other_data_another_release_or_a_lost_state_are_no_model_of_this_device(device: Path, tmp_path: Path) -> None:
    place = next((copytree(device, tmp_path / "moved") / "states").iterdir())
    asked = read(place)
    own, greeting = (dict(asked.order[part]) for part in ("own", "greeting"))
    replace(asked, order={**asked.order, "own": {**own, "data": str(Path(own["data"]).parent / "1")}}).write(place)
    with pytest.raises(ExperimentError, match=r"not those with which it began.*Put them back as they were$"):
        export_own(place, tmp_path / "own")
    replace(asked, order={**asked.order, "greeting": {**greeting, "release": "0.0.1"}}).write(place)
    with pytest.raises(ExportError, match="took part with Fedloom 0.0.1, and this is .*; export with the same release"):
        export_own(place, tmp_path / "own")
    asked.write(place)
    noted = place / "data.json"
    as_it_was = noted.read_bytes()
    noted.unlink()
    with pytest.raises(CheckpointError, match="join once more"):
        export_own(place, tmp_path / "own")
    noted.write_bytes(as_it_was)
    (place / asked.state).unlink()
    with pytest.raises(ExportError, match="cannot be read .*The device keeps it anew when"):
        export_own(place, tmp_path / "own")
    assert not (tmp_path / "own").exists()


def test_a_device_that_predicts_again_meanwhile_is_read_again(device: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its earlier state is gone by then."""
    place = next((copytree(device, tmp_path / "moved") / "states").iterdir())
    now = read(place)
    before = replace(now, state="client-2-0123456789abcdef.safetensors")
    found = iter((before, now, now))
    monkeypatch.setattr("fedloom.run.deployment.own_model.read", lambda place: next(found))
    asked, (private, _) = kept_in(place)
    assert asked == now and private


def test_a_run_folder_is_no_devices(tmp_path: Path) -> None:
    assert asked_in(tmp_path) is None
    (tmp_path / "states").mkdir()
    (tmp_path / "experiment.json").write_text("{}")
    assert asked_in(tmp_path) is None
    (tmp_path / "experiment.json").unlink()
    with pytest.raises(ExportError):
        asked_in(tmp_path)
