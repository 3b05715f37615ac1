"""One source of truth, replaced in one step: a torn, altered or missing part is refused and nothing is overwritten."""

from __future__ import annotations

import errno
import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from fedloom import folders
from fedloom.client.store import ClientStore
from fedloom.methods.method import State
from fedloom.run import checkpoint, parts
from fedloom.run.checkpoint import Saved, fingerprint_of, write_atomically
from fedloom.run.errors import CheckpointError
from fedloom.run.lock import only_one
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


def in_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    """From here on every layer, and every tensor that is in none, has a file of its own."""
    monkeypatch.setattr(parts, "PART", 1)


def several(round: int, second: float) -> Saved:
    shared = {"m.0.w": torch.ones(3), "m.1.w": torch.full((3,), second), "m.2.w": torch.zeros(3)}
    return Saved(State(round, shared, {"seen": torch.tensor(1)}), {"bytes_up": round}, "data-1")


def named(folder: Path) -> set[str]:
    return set(json.loads(latest(folder).read_text())["server"])


def lying(folder: Path) -> set[str]:
    return {path.name for path in (folder / "checkpoints").glob("server-*")}


def test_what_a_round_did_not_change_stays_where_it_lies(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    in_parts(monkeypatch)
    first = checkpoint.save(tmp_path, several(1, 1.0), stores(tmp_path))
    before = {name: (tmp_path / "checkpoints" / name).stat().st_mtime_ns for name in lying(tmp_path)}
    assert lying(tmp_path) == named(tmp_path) and len(before) == 4
    changed = {**first.state.shared, "m.1.w": torch.full((3,), 2.0)}
    second = checkpoint.save(tmp_path, replace(first, state=first.state.after_round(changed)), stores(tmp_path))
    assert lying(tmp_path) == named(tmp_path) and len(named(tmp_path)) == 4, "what nothing names is deleted"
    kept = named(tmp_path) & set(before)
    assert len(kept) == 3 and all((tmp_path / "checkpoints" / name).stat().st_mtime_ns == before[name] for name in kept)
    assert all(second.state.shared[n] is first.state.shared[n] for n in ("m.0.w", "m.2.w")), "the same objects"
    found = checkpoint.load(tmp_path, stores(tmp_path))
    assert found is not None and fingerprint(found.state.shared) == fingerprint(several(2, 2.0).state.shared)
    assert fingerprint(found.state.shared) == fingerprint(second.state.shared) and found.state.server["seen"].tolist() == 1
    again = checkpoint.save(tmp_path, replace(found, totals={"bytes_up": 3}), stores(tmp_path))
    assert [part is old for part, old in zip(again.parts, found.parts, strict=True)] == [True] * 4, "what was loaded is known too"


@pytest.mark.parametrize("spoil", ["missing", "altered", "torn"])
def test_a_part_that_is_missing_or_altered_is_named(spoil: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    in_parts(monkeypatch)
    checkpoint.save(tmp_path, several(1, 5.0), stores(tmp_path))
    for name in sorted(named(tmp_path)):
        path = tmp_path / "checkpoints" / name
        whole = path.read_bytes()
        {"missing": path.unlink, "altered": lambda p=path: tampered(p), "torn": lambda p=path, w=whole: p.write_bytes(w[:-2])}[spoil]()
        before = files(tmp_path)
        with pytest.raises(CheckpointError, match=rf"latest.json is corrupt: {name} (.|\n)*Nothing was overwritten"):
            checkpoint.load(tmp_path, stores(tmp_path))
        assert files(tmp_path) == before
        path.write_bytes(whole)
    assert checkpoint.load(tmp_path, stores(tmp_path)) is not None


def as_before(folder: Path) -> None:
    """The checkpoint as releases wrote it that had one file for all the server's tensors."""
    place, body = folder / "checkpoints", json.loads(latest(folder).read_text())
    whole = {name: tensor for file in body["server"] for name, tensor in load_file(place / file).items()}
    for file in body["server"]:
        (place / file).unlink()
    name = f"server-{fingerprint(whole)[:16]}.safetensors"
    save_file(whole, place / name)
    resigned(folder, server=name, begun=...)


def test_a_checkpoint_of_an_earlier_release_is_read_and_gone_on_from(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    in_parts(monkeypatch)
    checkpoint.save(tmp_path, several(1, 5.0), stores(tmp_path))
    print_before = fingerprint_of(tmp_path)
    as_before(tmp_path)
    (old,) = lying(tmp_path)
    assert fingerprint_of(tmp_path) == print_before
    found = checkpoint.load(tmp_path, stores(tmp_path))
    assert found is not None
    checkpoint.save(tmp_path, found, stores(tmp_path))
    assert fingerprint_of(tmp_path) == print_before and len(named(tmp_path)) == 4
    assert old not in lying(tmp_path) and lying(tmp_path) == named(tmp_path)


@pytest.mark.parametrize("moment", range(5))
def test_a_kill_between_parts_leaves_the_round_before(moment: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Four parts are renamed into place, one after another, then the index; what lies there of the round that was lost is swept."""
    in_parts(monkeypatch)
    checkpoint.save(tmp_path, several(1, 1.0), stores(tmp_path))
    before, rename, left = fingerprint_of(tmp_path), folders.os.replace, [moment]
    moved = {n: t + 9 for n, t in several(2, 2.0).state.shared.items()}
    wanted = Saved(State(2, moved, {"seen": torch.tensor(2)}), {}, "data-1")

    def killed(source: Path, target: Path) -> None:
        if left[0] == 0:
            raise KeyboardInterrupt
        left[0] -= 1
        rename(source, target)

    with monkeypatch.context() as patch:
        patch.setattr(folders.os, "replace", killed)
        with pytest.raises(KeyboardInterrupt):
            checkpoint.save(tmp_path, wanted, stores(tmp_path))
    assert left == [0] and fingerprint_of(tmp_path) == before
    checkpoint.save(tmp_path, wanted, stores(tmp_path))
    assert fingerprint_of(tmp_path) != before and lying(tmp_path) == named(tmp_path)


def test_a_kill_within_a_part_leaves_no_half_of_it_under_its_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    checkpoint.save(tmp_path, several(1, 1.0), stores(tmp_path))
    before = fingerprint_of(tmp_path)

    def killed(_: object, path: Path) -> None:
        path.write_bytes(b"half")
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(parts, "save_file", killed)
        checkpoint.save(tmp_path, several(2, 2.0), stores(tmp_path))
    assert fingerprint_of(tmp_path) == before
    checkpoint.save(tmp_path, several(2, 2.0), stores(tmp_path))
    assert fingerprint_of(tmp_path) != before and lying(tmp_path) == named(tmp_path)


@pytest.mark.parametrize("moment", [0, 1, 2])
def test_a_kill_while_saving_leaves_the_round_before(moment: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Saving renames three files into place: the server's, the client's, the index. Killed at any of them, the old round stands."""
    written(tmp_path, 1, 1.0)
    before, renames, rename = fingerprint_of(tmp_path), 0, folders.os.replace

    def killed(source: Path, target: Path) -> None:
        nonlocal renames
        renames += 1
        if renames > moment:
            raise KeyboardInterrupt
        rename(source, target)

    with monkeypatch.context() as patch:
        patch.setattr(folders.os, "replace", killed)
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
        patch.setattr(folders.os, "fsync", killed)
        with pytest.raises(KeyboardInterrupt):
            write_atomically(path, "new" * 1000)
    assert path.read_text() == "old"
    write_atomically(path, "new")
    assert path.read_text() == "new"
    assert [p.name for p in path.parent.iterdir()] == ["file.json"]

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(folders.os, "fsync", full)
    with pytest.raises(OSError, match="No space left"):
        write_atomically(path, "newer" * 1000)
    assert path.read_text() == "new" and [p.name for p in path.parent.iterdir()] == ["file.json"]


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
    "a server's part elsewhere": {"server": ["../../server-0123456789abcdef.safetensors"]},
    "a server's part that is no text": {"server": [3]},
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


def refusing(monkeypatch: pytest.MonkeyPatch, number: int) -> None:
    """From now on no lock can be opened for writing."""
    opened = Path.open

    def refused(self: Path, *how: Any, **more: Any) -> Any:
        if self.name == ".lock" and how:
            raise OSError(number, "no")
        return opened(self, *how, **more)

    monkeypatch.setattr(Path, "open", refused)


@pytest.mark.parametrize("number", [errno.EACCES, errno.EROFS])
def test_a_folder_that_takes_no_lock_is_read_all_the_same_and_never_written_to(
    number: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    refusing(monkeypatch, number)
    entered = []
    with only_one(tmp_path, reading=True):
        entered.append(1)
    with pytest.raises(OSError, match="no"), only_one(tmp_path):
        entered.append(2)
    refusing(monkeypatch, errno.ENOSPC)
    with pytest.raises(OSError, match="no"), only_one(tmp_path, reading=True):
        entered.append(3)
    assert entered == [1]


def test_what_is_being_run_is_not_read_beside_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Not by whoever may write there, who has no other --out to give, and not by whoever may not."""
    with only_one(tmp_path):
        with (
            pytest.raises(CheckpointError, match="another process is running in .*; wait for it, or stop it$"),
            only_one(tmp_path, reading=True),
        ):
            raise AssertionError("two at once")
        refusing(monkeypatch, errno.EACCES)
        with pytest.raises(CheckpointError, match="another process"), only_one(tmp_path, reading=True):
            raise AssertionError("two at once")
    with only_one(tmp_path, reading=True), only_one(tmp_path, reading=True):
        assert (tmp_path / ".lock").exists(), "several may read"


def test_a_round_that_ends_while_the_one_before_is_read_is_read_instead(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As where a server's model is exported after any round: what the next round deletes is not called corrupt."""
    store, found, read = written(tmp_path, 1), [], parts.read

    def meanwhile(*given: Any) -> Any:
        if not found:
            found.append(written(tmp_path, 2, 5.0))
        return read(*given)

    monkeypatch.setattr(checkpoint, "read", meanwhile)
    loaded = checkpoint.load(tmp_path, stores(tmp_path))
    assert loaded is not None and loaded.state.round == 2 and torch.equal(loaded.state.shared["w"], torch.full((2, 2), 5.0))
    for path in (tmp_path / "checkpoints").glob("server-*"):
        path.unlink()
    with pytest.raises(CheckpointError, match="is corrupt"):
        checkpoint.load(tmp_path, store)
