"""Blobs in a file: what was laid aside comes back, places are used again, and a full disk takes nothing."""

from __future__ import annotations

import os
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from fedloom.engines.aside import SLOT, Aside, slot


@pytest.mark.parametrize(
    ("size", "due"), [(0, SLOT), (1, SLOT), (SLOT, SLOT), (SLOT + 1, 2 * SLOT), (2 * SLOT, 2 * SLOT), (5 * 2**20, 2**23)]
)
def test_a_slot_is_a_power_of_two_that_holds_it(size: int, due: int) -> None:
    assert slot(size) == due


def test_what_is_laid_aside_comes_back_and_a_dropped_place_is_used_again() -> None:
    with Aside() as aside:
        blobs = [bytes([k]) * size for k, size in enumerate((0, 1, SLOT, SLOT + 1, 3 * SLOT))]
        places = [aside.keep(blob) for blob in blobs]
        assert [aside.read(place) for place in places] == blobs
        aside.drop(places[3])
        assert aside.keep(b"x" * (SLOT + 7)).begin == places[3].begin, "of the same slot"
        assert aside.keep(b"y" * (SLOT + 7)).begin not in {place.begin for place in places}
        assert [aside.read(place) for place in places[:3] + places[4:]] == blobs[:3] + blobs[4:]


def test_what_is_read_in_several_times_is_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    blob, read = os.urandom(3 * SLOT + 5), os.preadv
    with Aside() as aside:
        aside.keep(b"before")
        kept = aside.keep(blob)
        monkeypatch.setattr(os, "preadv", lambda number, into, begin: read(number, [into[0][:SLOT]], begin))
        assert aside.read(kept) == blob
        monkeypatch.setattr(os, "preadv", lambda number, into, begin: 0)
        with pytest.raises(OSError, match=f"{len(blob)} bytes"):
            aside.read(kept)


def test_it_is_safe_for_threads() -> None:
    def kept_and_read(k: int) -> bool:
        blob = os.urandom(1000 + 50 * k)
        place = aside.keep(blob)
        same = aside.read(place) == blob
        aside.drop(place)
        return same

    with Aside() as aside, ThreadPoolExecutor(16) as pool:
        assert all(pool.map(kept_and_read, range(400)))


def test_nobody_else_sees_the_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    with Aside() as aside:
        aside.keep(b"x")
        assert list(tmp_path.iterdir()) == []


def test_it_lies_in_the_folder_that_is_given_which_may_be_made_later(tmp_path: Path) -> None:
    with Aside(tmp_path / "run") as aside:
        with pytest.raises(FileNotFoundError, match="run"):
            aside.keep(b"x")
        (tmp_path / "run").mkdir()
        place = aside.keep(b"x")
        assert os.fstat(aside._number).st_dev == (tmp_path / "run").stat().st_dev and aside.read(place) == b"x"
        assert str(tmp_path / "run") in os.readlink(f"/proc/self/fd/{aside._number}"), "and not where temporary files lie"
        assert list((tmp_path / "run").iterdir()) == [], "without a name"


def test_a_full_disk_is_said_and_its_place_is_free_again(monkeypatch: pytest.MonkeyPatch) -> None:
    def written_in_part(number: int, blob: memoryview, begin: int) -> int:
        if len(blob) <= SLOT:
            raise OSError(28, "No space left on device")
        return write(number, blob[:SLOT], begin)

    write = os.pwrite
    with Aside() as aside:
        with monkeypatch.context() as full:
            full.setattr(os, "pwrite", written_in_part)
            with pytest.raises(OSError, match=rf"No space left on device: '{tempfile.gettempdir()}'"):
                aside.keep(bytes(2 * SLOT))
        assert aside.keep(b"x" * 2 * SLOT).begin == 0
