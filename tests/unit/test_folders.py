"""Folders that are there whole or not at all."""

from __future__ import annotations

from pathlib import Path

import pytest

from fedloom.folders import whole_or_gone


@pytest.mark.parametrize("end", [OSError(28, "No space left on device"), KeyboardInterrupt()])
@pytest.mark.parametrize("there", [False, True])
def test_what_ends_badly_leaves_the_folder_as_it_was(end: BaseException, there: bool, tmp_path: Path) -> None:
    folder = tmp_path / "out"
    if there:
        folder.mkdir()
    with pytest.raises(type(end)), whole_or_gone(folder):
        (folder / "0").mkdir(parents=True)
        (folder / "0" / "half").write_text("half")
        raise end
    assert [path.name for path in tmp_path.iterdir()] == (["out"] if there else [])
    assert not there or not [*folder.iterdir()]


def test_what_ends_well_stays(tmp_path: Path) -> None:
    with whole_or_gone(tmp_path / "out"):
        (tmp_path / "out").mkdir()
        (tmp_path / "out" / "file").write_text("whole")
    assert (tmp_path / "out" / "file").read_text() == "whole"
