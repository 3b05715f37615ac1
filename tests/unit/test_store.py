"""Clients' state: on disk and seen at once, named by an index and durable at a commit, named by its content, refused when altered."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from fedloom.client import store as module
from fedloom.client.elsewhere import Elsewhere
from fedloom.client.store import FILE, MANY, ClientStore, StoreError, read_index
from fedloom.tensors import fingerprint


def private(value: float) -> dict[str, torch.Tensor]:
    return {"w": torch.full((2,), value), "half": torch.ones(3).bfloat16()}


def memory(value: int) -> dict[str, torch.Tensor]:
    return {"w": torch.tensor(value), "mask/w": torch.tensor([True, False])}


def same(state: tuple[dict, dict], first: dict, second: dict) -> bool:
    return (fingerprint(state[0]), fingerprint(state[1])) == (fingerprint(first), fingerprint(second))


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir()) if folder.exists() else []


def test_a_client_that_never_stored_anything_has_nothing(tmp_path: Path) -> None:
    assert ClientStore(tmp_path).load(4) == ({}, {})
    assert ClientStore().load(4) == ({}, {})


def test_what_is_saved_is_seen_and_written_at_once_and_named_at_commit(tmp_path: Path) -> None:
    store = ClientStore(tmp_path / "clients")
    store.save(7, private(1), memory(1))
    assert same(store.load(7), private(1), memory(1))
    (written,) = names(tmp_path / "clients")
    index = store.commit()
    assert index == {"7": written}
    assert same(store.load(7), private(1), memory(1))


def test_what_is_saved_stays_on_disk_only(tmp_path: Path) -> None:
    store = ClientStore(tmp_path)
    store.save(7, private(1), memory(1))
    (tmp_path / store.name(7)).unlink()
    with pytest.raises(StoreError, match="cannot be read"):
        store.load(7)


def test_a_client_without_state_costs_nothing_on_disk(tmp_path: Path) -> None:
    store = ClientStore(tmp_path / "clients")
    store.save(1, {}, {})
    assert store.commit() == {}
    assert not (tmp_path / "clients").exists()
    store.save(1, private(1), {})
    first = store.commit()
    store.save(1, {}, {})
    assert store.load(1) == ({}, {})
    assert names(tmp_path / "clients") == [first["1"]], "the checkpoint still names it"
    assert store.commit() == {}
    store.sweep()
    assert names(tmp_path / "clients") == []


def test_a_state_that_was_never_committed_is_deleted_with_its_successor(tmp_path: Path) -> None:
    store = ClientStore(tmp_path)
    store.save(1, private(1), {})
    committed = store.commit()["1"]
    for value in (2, 3):
        store.save(1, private(value), {})
    assert names(tmp_path) == sorted([committed, store.name(1)])
    store.save(1, private(1), {})
    assert names(tmp_path) == [committed]
    assert store.commit() == {"1": committed}
    assert same(store.load(1), private(1), {})


def test_a_torn_file_of_the_right_name_is_written_anew(tmp_path: Path) -> None:
    """What a power cut may leave of a state that was saved and never committed."""
    store = ClientStore(tmp_path)
    store.save(1, private(1), {})
    (tmp_path / store.name(1)).write_bytes(b"")
    other = ClientStore(tmp_path)
    other.save(1, private(1), {})
    assert same(other.load(1), private(1), {})


def test_a_store_aside_leaves_the_folder_as_it_is(tmp_path: Path) -> None:
    store = ClientStore(tmp_path / "run")
    store.save(1, private(1), {})
    index = store.commit()
    aside = ClientStore(tmp_path / "run", tmp_path / "aside")
    aside.restore(index)
    assert same(aside.load(1), private(1), {})
    aside.save(1, private(2), {})
    aside.save(2, private(3), {})
    assert same(aside.load(1), private(2), {})
    assert same(aside.load(2), private(3), {})
    assert names(tmp_path / "run") == list(index.values())
    with pytest.raises(StoreError, match="nothing of it can be committed"):
        aside.commit()


def test_what_another_process_wrote_is_taken_by_its_name(tmp_path: Path) -> None:
    mine, theirs = ClientStore(tmp_path), ClientStore(tmp_path)
    mine.save(1, private(1), {})
    theirs.restore({"1": mine.name(1)})
    theirs.save(1, private(2), memory(2))
    mine.take(1, theirs.name(1))
    assert same(mine.load(1), private(2), memory(2))
    assert names(tmp_path) == list(mine.commit().values())
    mine.take(1, "")
    assert mine.load(1) == ({}, {})
    assert mine.commit() == {}


@pytest.mark.parametrize(("count", "one_call", "flushed"), [(3, True, 4), (MANY, True, 1), (MANY, False, MANY + 1)])
def test_a_commit_flushes_every_file_before_it_names_any(
    count: int, one_call: bool, flushed: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Files and folder one by one when they are few or the system has no call for all of them."""
    store, calls, fsync = ClientStore(tmp_path), [], os.fsync

    def heard(number: int) -> None:
        calls.append(os.readlink(f"/proc/self/fd/{number}"))
        fsync(number)

    for client in range(count):
        store.save(client, private(1), {})
    whole = module._flushed
    monkeypatch.setattr(module, "_flushed", lambda folder: one_call and whole(folder))
    monkeypatch.setattr(module.os, "fsync", heard)
    index = store.commit()
    assert len(calls) == flushed
    assert calls[-1] == str(tmp_path), "the folder comes last: it holds the names"
    if flushed > 1:
        assert sorted(calls[:-1]) == sorted(str(tmp_path / name) for name in index.values())
    calls.clear()
    assert store.commit() == index
    assert calls == [], "nothing changed"


def test_private_and_memory_of_the_same_name_stay_apart(tmp_path: Path) -> None:
    store = ClientStore(tmp_path)
    store.save(1, {"x": torch.ones(1)}, {"x": torch.zeros(2)})
    index = store.commit()
    other = ClientStore(tmp_path)
    other.restore(index)
    assert same(other.load(1), {"x": torch.ones(1)}, {"x": torch.zeros(2)})


def test_another_process_finds_the_committed_state_only(tmp_path: Path) -> None:
    store = ClientStore(tmp_path)
    store.save(1, private(1), memory(1))
    store.save(-1, private(5), {})
    index = store.commit()
    store.save(1, private(2), memory(2))
    other = ClientStore(tmp_path)
    other.restore(index)
    assert same(other.load(1), private(1), memory(1))
    assert same(other.load(-1), private(5), {})


@pytest.mark.parametrize("kept", ["in memory", "on disk"])
def test_nothing_is_shared_with_whoever_saves_or_loads(kept: str, tmp_path: Path) -> None:
    store, mine = ClientStore(tmp_path if kept == "on disk" else None), private(1)
    store.save(1, mine, {})
    mine["w"].zero_()
    loaded, _ = store.load(1)
    loaded["w"].zero_()
    assert store.load(1)[0]["w"].tolist() == [1, 1]


def test_tensors_that_share_memory_are_stored_as_they_are(tmp_path: Path) -> None:
    store, whole = ClientStore(tmp_path), torch.arange(6.0)
    state = {"whole": whole, "half": whole[:3], "turned": whole.view(2, 3).T, "again": whole}
    store.save(1, state, {"whole": whole})
    assert same(store.load(1), state, {"whole": whole})


def test_the_name_is_the_content(tmp_path: Path) -> None:
    store = ClientStore(tmp_path)
    store.save(1, private(1), {})
    first = store.commit()["1"]
    store.save(1, private(1), {})
    assert store.commit()["1"] == first
    store.save(1, private(2), {})
    second = store.commit()["1"]
    assert second != first
    assert FILE.fullmatch(second)
    assert names(tmp_path) == sorted([first, second]), "the old file must last until the sweep: the checkpoint still names it"


def test_sweep_deletes_what_the_last_commit_no_longer_names_and_nothing_else(tmp_path: Path) -> None:
    store = ClientStore(tmp_path)
    store.save(1, private(1), {})
    store.save(2, private(1), {})
    old = store.commit()
    store.save(1, private(2), {})
    new = store.commit()
    (tmp_path / "client-9-half.safetensors.tmp").write_text("torn")
    (tmp_path / "notes.txt").write_text("mine")
    store.sweep()
    assert old["1"] != new["1"]
    assert names(tmp_path) == sorted([new["1"], new["2"], "notes.txt"])
    ClientStore().sweep()
    ClientStore(tmp_path / "nowhere").sweep()


def test_restore_forgets_everything_since_that_commit(tmp_path: Path) -> None:
    store = ClientStore(tmp_path)
    store.save(1, private(1), {})
    index = store.commit()
    before = store.fingerprint()
    store.save(1, private(2), {})
    store.save(2, private(3), {})
    assert store.fingerprint() != before
    store.restore(index)
    assert same(store.load(1), private(1), {})
    assert store.load(2) == ({}, {})
    assert store.fingerprint() == before


def test_restore_refuses_what_is_no_file_of_a_store(tmp_path: Path) -> None:
    store = ClientStore(tmp_path)
    for name in ("../../etc/passwd", "client-1.safetensors", "client-1-0123456789abcdef.safetensors/x"):
        with pytest.raises(StoreError, match="no client file"):
            store.restore({"1": name})


def committed(folder: Path) -> tuple[ClientStore, Path]:
    store = ClientStore(folder)
    store.save(1, private(1), {})
    return store, folder / store.commit()["1"]


def test_an_altered_file_is_refused(tmp_path: Path) -> None:
    store, path = committed(tmp_path)
    save_file({"private/w": torch.zeros(2)}, path)
    with pytest.raises(StoreError, match=r"was altered after it was written$"):
        store.load(1)


@pytest.mark.parametrize("content", [b"", b"garbage", None])
def test_a_file_that_cannot_be_read_is_refused(tmp_path: Path, content: bytes | None) -> None:
    store, path = committed(tmp_path)
    path.unlink() if content is None else path.write_bytes(content)
    with pytest.raises(StoreError, match=r"cannot be read \(.*\)$"):
        store.load(1)


def test_a_crash_before_the_file_has_its_name_leaves_no_half_state(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = ClientStore(tmp_path)
    store.save(1, private(1), {})
    index = store.commit()

    def killed(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("fedloom.client.store.os.replace", killed)
        with pytest.raises(KeyboardInterrupt):
            store.save(1, private(2), {})
    assert [name for name in names(tmp_path) if FILE.fullmatch(name)] == list(index.values())
    assert same(store.load(1), private(1), {})
    assert store.commit() == index
    store.sweep()
    assert names(tmp_path) == list(index.values())


def test_a_store_without_a_folder_keeps_everything_in_memory() -> None:
    store = ClientStore()
    store.save(1, private(1), memory(2))
    assert store.commit() == {}
    assert same(store.load(1), private(1), memory(2))


def test_the_size_of_a_clients_file_is_known(tmp_path: Path) -> None:
    store = ClientStore(tmp_path)
    assert store.size(1) == 0
    store.save(1, {"a": torch.zeros(1000)}, {})
    assert store.size(1) == (tmp_path / store.name(1)).stat().st_size > 4000
    assert ClientStore().size(1) == 0


NO_NAMES = {
    "a path": "../client-3-0123456789abcdef.safetensors",
    "a zero too many": "client-03-0123456789abcdef.safetensors",
    "digits of another script": "client-\u0663-0123456789abcdef.safetensors",
    "minus nothing": "client--0-0123456789abcdef.safetensors",
    "more digits than a number may have": f"client-{'3' * 5000}-0123456789abcdef.safetensors",
    "a line more": "client-3-0123456789abcdef.safetensors\n",
    "another client": "client-4-0123456789abcdef.safetensors",
    "no text": 3,
    "no end": json.loads("[" * 900 + "]" * 900),
    "nothing": None,
}


@pytest.mark.parametrize("name", NO_NAMES.values(), ids=NO_NAMES)
def test_an_index_names_each_clients_own_state_and_nothing_else(name: object) -> None:
    for store in (ClientStore(), Elsewhere()):
        with pytest.raises(StoreError, match="is no client file of client '3'"):
            store.restore({"3": name})  # type: ignore[dict-item]


@pytest.mark.parametrize("client", ["x", "03", "\u0663", "", "3 "])
def test_an_index_has_each_client_once_and_in_one_way(client: str) -> None:
    with pytest.raises(StoreError, match="is no client file"):
        ClientStore().restore({client: "client-3-0123456789abcdef.safetensors"})


def test_what_an_index_says_is_what_it_comes_to() -> None:
    index = {"-1": "client--1-0123456789abcdef.safetensors", "0": "client-0-0123456789abcdef.safetensors"}
    assert read_index(index) == {-1: index["-1"], 0: index["0"]}
