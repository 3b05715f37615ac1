"""Clients' state: seen at once, durable at a commit, named by its content, refused when altered."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from fedloom.client.store import FILE, ClientStore, StoreError
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


def test_what_is_saved_is_seen_at_once_and_reaches_the_disk_at_commit(tmp_path: Path) -> None:
    store = ClientStore(tmp_path / "clients")
    store.save(7, private(1), memory(1))
    assert same(store.load(7), private(1), memory(1))
    assert names(tmp_path) == []
    index = store.commit()
    assert list(index) == ["7"]
    assert names(tmp_path / "clients") == list(index.values())
    assert same(store.load(7), private(1), memory(1))


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


def test_nothing_is_shared_with_whoever_saves_or_loads() -> None:
    store, mine = ClientStore(), private(1)
    store.save(1, mine, {})
    mine["w"].zero_()
    loaded, _ = store.load(1)
    loaded["w"].zero_()
    assert store.load(1)[0]["w"].tolist() == [1, 1]


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
    with pytest.raises(StoreError, match=r"was altered.*delete the run folder"):
        store.load(1)


@pytest.mark.parametrize("content", [b"", b"garbage", None])
def test_a_file_that_cannot_be_read_is_refused(tmp_path: Path, content: bytes | None) -> None:
    store, path = committed(tmp_path)
    path.unlink() if content is None else path.write_bytes(content)
    with pytest.raises(StoreError, match=r"cannot be read.*delete the run folder"):
        store.load(1)


def test_a_crash_before_the_file_has_its_name_leaves_no_half_state(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = ClientStore(tmp_path)
    store.save(1, private(1), {})

    def killed(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("fedloom.client.store.os.replace", killed)
        with pytest.raises(KeyboardInterrupt):
            store.commit()
    assert [name for name in names(tmp_path) if FILE.fullmatch(name)] == []
    index = store.commit()
    store.sweep()
    assert names(tmp_path) == list(index.values())


def test_a_store_without_a_folder_keeps_everything_in_memory() -> None:
    store = ClientStore()
    store.save(1, private(1), memory(2))
    assert store.commit() == {}
    assert same(store.load(1), private(1), memory(2))
