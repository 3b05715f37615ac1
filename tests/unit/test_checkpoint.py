"""One source of truth, replaced in one step: a torn, altered or missing part is refused and nothing is overwritten."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from fedloom.client.store import ClientStore
from fedloom.methods.method import State
from fedloom.run import checkpoint
from fedloom.run.checkpoint import CheckpointError, Saved, fingerprint_of, only_one, write_atomically
from fedloom.tensors import fingerprint


def saved(round: int = 1, value: float = 1.0) -> Saved:
    shared = {"w": torch.full((2, 2), value), "h": torch.ones(3).bfloat16()}
    return Saved(State(round, shared, {"m": torch.tensor(value)}, {"gal": [0, 2]}), {"bytes_up": 7, "participations": {"1": 2}}, "data-1")


def stores(folder: Path) -> ClientStore:
    return ClientStore(folder / "checkpoints" / "clients")


def written(folder: Path, round: int = 1, value: float = 1.0) -> ClientStore:
    store = stores(folder)
    store.save(1, {"own": torch.full((2,), value)}, {"seen": torch.tensor(round)})
    checkpoint.save(folder, saved(round, value), store)
    return store


def files(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def test_nothing_saved_is_none(tmp_path: Path) -> None:
    assert checkpoint.load(tmp_path, stores(tmp_path)) is None
    with pytest.raises(CheckpointError, match="holds no checkpoint"):
        fingerprint_of(tmp_path)


def test_what_is_saved_is_loaded_bit_for_bit(tmp_path: Path) -> None:
    before = written(tmp_path, 3, 0.1).fingerprint()
    store = stores(tmp_path)
    loaded = checkpoint.load(tmp_path, store)
    assert loaded is not None
    assert fingerprint(loaded.state.shared) == fingerprint(saved(3, 0.1).state.shared)
    assert fingerprint(loaded.state.server) == fingerprint(saved(3, 0.1).state.server)
    assert (loaded.state.round, loaded.state.facts) == (3, {"gal": [0, 2]})
    assert (loaded.totals, loaded.data) == (saved().totals, "data-1")
    assert store.fingerprint() == before


def test_the_last_round_replaces_the_one_before_and_its_files(tmp_path: Path) -> None:
    written(tmp_path, 1, 1.0)
    first = set(files(tmp_path))
    written(tmp_path, 2, 2.0)
    second = set(files(tmp_path))
    assert len(second) == len(first) == 3
    assert first & second == {"checkpoints/latest.json"}
    assert checkpoint.load(tmp_path, stores(tmp_path)).state.round == 2  # type: ignore[union-attr]


def test_the_fingerprint_sees_every_part(tmp_path: Path) -> None:
    prints = set()
    for i, (round, value) in enumerate([(1, 1.0), (2, 1.0), (1, 2.0)]):
        written(tmp_path / str(i), round, value)
        prints.add(fingerprint_of(tmp_path / str(i)))
    store = stores(tmp_path / "facts")
    store.save(1, {"own": torch.full((2,), 1.0)}, {"seen": torch.tensor(1)})
    one = saved()
    checkpoint.save(tmp_path / "facts", Saved(State(1, one.state.shared, one.state.server, {"gal": [1]}), one.totals, one.data), store)
    prints.add(fingerprint_of(tmp_path / "facts"))
    checkpoint.save(tmp_path / "clients", one, stores(tmp_path / "clients"))
    prints.add(fingerprint_of(tmp_path / "clients"))
    assert len(prints) == 5
    written(tmp_path / "again", 1, 1.0)
    assert fingerprint_of(tmp_path / "again") in prints


def latest(folder: Path) -> Path:
    return folder / "checkpoints" / "latest.json"


def edited(folder: Path, **changes: object) -> None:
    latest(folder).write_text(json.dumps({**json.loads(latest(folder).read_text()), **changes}))


def tampered(path: Path) -> None:
    tensors = load_file(path)
    name = sorted(tensors)[0]
    save_file({**tensors, name: tensors[name] + 1}, path)


def one(folder: Path, pattern: str) -> Path:
    (path,) = folder.rglob(pattern)
    return path


DAMAGE: dict[str, Callable[[Path], object]] = {
    "torn json": lambda f: latest(f).write_text(latest(f).read_text()[:-20]),
    "empty json": lambda f: latest(f).write_text(""),
    "a list": lambda f: latest(f).write_text("[1]"),
    "not text": lambda f: latest(f).write_bytes(b"\xff\xfe\x00"),
    "another round": lambda f: edited(f, round=0),
    "another total": lambda f: edited(f, totals={"bytes_up": 0}),
    "no sha256": lambda f: latest(f).write_text(json.dumps({"round": 1})),
    "an altered server file": lambda f: tampered(one(f, "server-*")),
    "a torn server file": lambda f: one(f, "server-*").write_bytes(one(f, "server-*").read_bytes()[:-3]),
    "no server file": lambda f: one(f, "server-*").unlink(),
    "an altered client file": lambda f: tampered(one(f, "client-*")),
    "a torn client file": lambda f: one(f, "client-*").write_bytes(b""),
    "no client file": lambda f: one(f, "client-*").unlink(),
}


@pytest.mark.parametrize("damage", DAMAGE.values(), ids=DAMAGE)
def test_a_corrupt_checkpoint_is_refused_and_nothing_changes(damage: Callable[[Path], object], tmp_path: Path) -> None:
    written(tmp_path)
    damage(tmp_path)
    before = files(tmp_path)
    with pytest.raises(CheckpointError, match=r"latest.json is corrupt: (.|\n)*Nothing was overwritten. Delete"):
        checkpoint.load(tmp_path, stores(tmp_path))
    assert files(tmp_path) == before


@pytest.mark.parametrize("moment", [0, 1, 2])
def test_a_kill_while_saving_leaves_the_round_before(moment: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Saving renames three files into place: the server's, the client's, the index. Killed at any of them, the old round stands."""
    written(tmp_path, 1, 1.0)
    before, renames, rename = fingerprint_of(tmp_path), 0, checkpoint.os.replace

    def killed(source: Path, target: Path) -> None:
        nonlocal renames
        renames += 1
        if renames > moment:
            raise KeyboardInterrupt
        rename(source, target)

    with monkeypatch.context() as patch:
        patch.setattr(checkpoint.os, "replace", killed)
        with pytest.raises(KeyboardInterrupt):
            written(tmp_path, 2, 2.0)
    assert renames == moment + 1
    assert fingerprint_of(tmp_path) == before
    written(tmp_path, 2, 2.0)
    assert len(files(tmp_path)) == 3 + sum(name.endswith("latest.json.tmp") for name in files(tmp_path))
    assert fingerprint_of(tmp_path) != before


def test_write_atomically_never_shows_half_a_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "deep" / "file.json"
    write_atomically(path, "old")

    def killed(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(checkpoint.os, "fsync", killed)
        with pytest.raises(KeyboardInterrupt):
            write_atomically(path, "new" * 1000)
    assert path.read_text() == "old"
    write_atomically(path, "new")
    assert path.read_text() == "new"
    assert [p.name for p in path.parent.iterdir()] == ["file.json"]


def test_only_one_process_at_a_time(tmp_path: Path) -> None:
    with only_one(tmp_path / "run"):
        with pytest.raises(CheckpointError, match="another process is running in"), only_one(tmp_path / "run"):
            raise AssertionError("two at once")
        with only_one(tmp_path / "other"):
            pass
    with only_one(tmp_path / "run"):
        pass


def resigned(folder: Path, **changes: Any) -> None:
    """The checkpoint with other fields, and the digest that belongs to them."""
    path = folder / "checkpoints" / "latest.json"
    body = {**json.loads(path.read_text()), **changes}
    body = {name: value for name, value in body.items() if name != "sha256" and value is not ...}
    path.write_text(json.dumps({"sha256": checkpoint._digest(body), **body}))


UNUSABLE: dict[str, dict[str, Any]] = {
    "no round": {"round": ...},
    "a round that is text": {"round": "1"},
    "facts that are a list": {"facts": []},
    "no totals": {"totals": ...},
    "data that is a number": {"data": 1},
    "a server's file elsewhere": {"server": "../../server-0123456789abcdef.safetensors"},
    "a server's file that is no text": {"server": 3},
    "clients that are a list": {"clients": ["1"]},
    "a client that is none": {"clients": {"x": "client-1-0123456789abcdef.safetensors"}},
}


@pytest.mark.parametrize("changes", UNUSABLE.values(), ids=UNUSABLE)
def test_a_checkpoint_that_matches_its_digest_and_cannot_be_used_is_corrupt(tmp_path: Path, changes: dict[str, Any]) -> None:
    written(tmp_path)
    resigned(tmp_path)
    assert checkpoint.load(tmp_path, stores(tmp_path)) is not None
    resigned(tmp_path, **changes)
    with pytest.raises(CheckpointError, match="is corrupt"):
        checkpoint.load(tmp_path, stores(tmp_path))


def test_a_checkpoint_nested_without_end_is_corrupt(tmp_path: Path) -> None:
    written(tmp_path)
    (tmp_path / "checkpoints" / "latest.json").write_text("[" * 100_000)
    with pytest.raises(CheckpointError, match="is corrupt"):
        checkpoint.load(tmp_path, stores(tmp_path))
