"""What is remembered is what was made, bit for bit, or it is made anew and that is said; nothing here touches the user's own cache."""

from __future__ import annotations

import logging
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from fedloom import cache
from fedloom.cache import Arrays, folder, nbytes, remembered

KEY = "0123abcd"


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("FEDLOOM_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def arrays(size: int = 5) -> Arrays:
    return {
        "b": np.arange(size, dtype=np.int8),
        "a": np.arange(size, dtype=np.int64),
        "c": np.arange(2 * size, dtype=np.int32).reshape(2, -1),
    }


def same(one: Arrays, other: Arrays) -> bool:
    return set(one) == set(other) and all(one[n].dtype == other[n].dtype and np.array_equal(one[n], other[n]) for n in one)


def never() -> Arrays:
    raise AssertionError("made although it was there")


class Counted:
    def __init__(self, make: Callable[[], Arrays] = arrays) -> None:
        self.make, self.times = make, 0

    def __call__(self) -> Arrays:
        self.times += 1
        return self.make()


@pytest.mark.parametrize("size", [0, 1, 5, 200_000])
def test_what_was_made_once_is_there_the_next_time(place: Path, size: int, caplog: pytest.LogCaptureFixture) -> None:
    assert same(remembered("things", KEY, lambda: arrays(size)), arrays(size))
    assert same(remembered("things", KEY, never), arrays(size))
    assert [path.relative_to(place) for path in place.rglob("*") if path.is_file()] == [Path("things") / KEY]
    assert nbytes() == (place / "things" / KEY).stat().st_size
    assert not caplog.records


def test_each_kind_and_key_has_its_own(place: Path) -> None:
    remembered("things", KEY, lambda: arrays(1))
    remembered("things", "ff", lambda: arrays(2))
    remembered("others", KEY, lambda: arrays(3))
    assert [len(remembered(k, key, never)["a"]) for k, key in (("things", KEY), ("things", "ff"), ("others", KEY))] == [1, 2, 3]


@pytest.mark.parametrize("size", [5, 200_000])
def test_writing_into_what_was_read_changes_nothing_but_that(place: Path, size: int) -> None:
    remembered("things", KEY, lambda: arrays(size))
    mine = remembered("things", KEY, never)
    mine["a"][:] = 7
    assert same(remembered("things", KEY, never), arrays(size))
    assert same({"b": mine["b"]}, {"b": arrays(size)["b"]})


@pytest.mark.parametrize(("size", "mapped"), [(5, False), (200_000, True)])
def test_large_entries_are_mapped_and_small_ones_are_not(place: Path, size: int, mapped: bool) -> None:
    remembered("things", KEY, lambda: arrays(size))
    base = remembered("things", KEY, never)["a"]
    while isinstance(base, np.ndarray) and not isinstance(base, np.memmap) and base.base is not None:
        base = base.base
    assert isinstance(base, np.memmap) == mapped


DAMAGE: dict[str, Callable[[bytes], bytes]] = {
    "empty": lambda blob: b"",
    "a few bytes": lambda blob: blob[:20],
    "cut": lambda blob: blob[:-1],
    "longer": lambda blob: blob + b"x",
    "a flipped bit": lambda blob: blob[:300] + bytes([blob[300] ^ 1]) + blob[301:],
    "another header": lambda blob: bytes([blob[0] ^ 8]) + blob[1:],
}


@pytest.mark.parametrize("size", [50, 200_000])
@pytest.mark.parametrize("damage", DAMAGE.values(), ids=DAMAGE)
def test_a_damaged_entry_is_made_anew_and_said_once(
    place: Path, size: int, damage: Callable[[bytes], bytes], caplog: pytest.LogCaptureFixture
) -> None:
    remembered("things", KEY, lambda: arrays(size))
    path = place / "things" / KEY
    path.write_bytes(damage(path.read_bytes()))
    make = Counted(lambda: arrays(size))
    assert same(remembered("things", KEY, make), arrays(size)) and make.times == 1
    assert [record.getMessage() for record in caplog.records] == [f"{path} is not what was written; it is made anew"]
    assert same(remembered("things", KEY, never), arrays(size))


def test_a_folder_that_cannot_be_one_is_said_in_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "file").write_text("")
    for wrong in (tmp_path / "file", tmp_path / "file" / "below"):
        caplog.clear()
        monkeypatch.setenv("FEDLOOM_CACHE", str(wrong))
        make = Counted()
        assert same(remembered("things", KEY, make), arrays()) and make.times == 1
        (said,) = [record.getMessage() for record in caplog.records if record.levelno == logging.WARNING]
        assert said.startswith("the cache cannot be used, so the things are made anew (NotADirectoryError: ") and "FEDLOOM_CACHE" in said


def test_an_entry_that_cannot_be_written_leaves_nothing_behind(
    place: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(cache.os, "replace", full)
    assert same(remembered("things", KEY, arrays), arrays())
    assert [path for path in place.rglob("*") if path.is_file()] == []
    assert "No space left on device" in caplog.text and len(caplog.records) == 1


def test_what_goes_wrong_in_making_is_not_taken_for_the_cache(place: Path, caplog: pytest.LogCaptureFixture) -> None:
    def broken() -> Arrays:
        raise OSError("the tokenizer's file is gone")

    with pytest.raises(OSError, match="the tokenizer's file is gone"):
        remembered("things", KEY, broken)
    assert not caplog.records


def test_where_the_folder_is(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("FEDLOOM_CACHE", "~/elsewhere")
    assert folder() == tmp_path / "elsewhere"
    monkeypatch.delenv("FEDLOOM_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert folder() == tmp_path / "xdg" / "fedloom"
    for ignored in ("relative", ""):
        monkeypatch.setenv("XDG_CACHE_HOME", ignored)
        assert folder() == tmp_path / ".cache" / "fedloom"


def test_the_tests_have_a_cache_of_their_own() -> None:
    assert folder().parent.name.startswith("fedloom-tests-")
    code = "from fedloom import cache; print(cache.folder())"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip() == str(folder())


def test_only_the_user_may_look_into_it(place: Path) -> None:
    remembered("things", KEY, arrays)
    assert (place / "things").stat().st_mode & 0o077 == 0
    assert (place / "things" / KEY).stat().st_mode & 0o077 == 0
