"""Tensors as files: cut by layers, written where they changed, mapped once they are written."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch

from fedloom.run import parts
from fedloom.run.parts import cut, put, read, tensors_of


def floats(count: int) -> torch.Tensor:
    return torch.arange(float(count))


def wholes(**counts: int) -> dict[str, torch.Tensor]:
    return {name.replace("_", "."): floats(count) for name, count in counts.items()}


@pytest.fixture
def of_40_bytes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(parts, "PART", 40)


@pytest.mark.usefixtures("of_40_bytes")
def test_a_layer_is_a_part_and_what_is_small_lies_together() -> None:
    """Ten numbers make a part. Layer 1 has them in two tensors, layer 10 is another; the embeddings have them alone; small layers are
    closed when they have them, and the head, which every round changes, is with none of these."""
    tensors = wholes(e_weight=12, m_1_a=4, m_1_b=6, m_10_a=10, m_2_a=3, m_3_a=7, m_4_a=2, head_w=2, head_b=1)
    assert cut(tensors) == [["m.1.a", "m.1.b"], ["m.10.a"], ["m.2.a", "m.3.a"], ["e.weight"], ["m.4.a", "head.b", "head.w"]]
    assert cut(wholes(m_1_a=9, m_2_a=9, m_3_a=1)) == [["m.1.a", "m.2.a"], ["m.3.a"]]
    assert cut({"shared/m.1.a": floats(10), "moments/m.1.a": floats(10)}) == [["moments/m.1.a"], ["shared/m.1.a"]], "two kinds are two"
    assert cut({}) == []


def test_a_small_state_is_one_file(tmp_path: Path) -> None:
    assert len(put(tmp_path, wholes(m_1_a=50_000, m_2_a=50_000, head_w=4, empty_x=0))) == 1
    assert len(put(tmp_path, {"a.1.w": torch.zeros(2**20), "a.2.w": torch.ones(2**20)})) == 2, "4 MiB of a layer are not small"


@pytest.mark.usefixtures("of_40_bytes")
def test_what_has_not_changed_is_neither_written_nor_looked_at(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = put(tmp_path, wholes(m_1_a=10, m_2_a=10, m_3_a=10))
    looked: list[list[str]] = []
    prints = parts.fingerprint
    monkeypatch.setattr(parts, "fingerprint", lambda tensors: looked.append([*tensors]) or prints(tensors))
    times = {path.name: path.stat().st_mtime_ns for path in tmp_path.iterdir()}
    old = tensors_of(before)
    after = put(tmp_path, {**old, "m.2.a": old["m.2.a"] + 1}, before)
    assert looked == [["m.2.a"]]
    assert [new is part for new, part in zip(after, before, strict=True)] == [True, False, True]
    assert {name: (tmp_path / name).stat().st_mtime_ns for name in times} == times and len([*tmp_path.iterdir()]) == 4
    assert torch.equal(tensors_of(after)["m.2.a"], floats(10) + 1) and torch.equal(tensors_of(before)["m.2.a"], floats(10))


@pytest.mark.usefixtures("of_40_bytes")
def test_the_same_numbers_in_other_objects_have_the_same_name(tmp_path: Path) -> None:
    before = put(tmp_path, wholes(m_1_a=10))
    time = (tmp_path / before[0].name).stat().st_mtime_ns
    (after,) = put(tmp_path, wholes(m_1_a=10), before)
    assert after is not before[0] and after.name == before[0].name and (tmp_path / after.name).stat().st_mtime_ns == time


@pytest.mark.usefixtures("of_40_bytes")
def test_what_was_written_over_in_memory_is_written_anew_and_its_file_stands(tmp_path: Path) -> None:
    before = put(tmp_path, wholes(m_1_a=10))
    tensors_of(before)["m.1.a"][0] = 7.0
    (after,) = put(tmp_path, tensors_of(before), before)
    assert after.name != before[0].name
    assert float(read(tmp_path, after.name).tensors["m.1.a"][0]) == 7.0
    assert float(read(tmp_path, before[0].name).tensors["m.1.a"][0]) == 0.0


def test_tensors_that_share_memory_are_written_apart(tmp_path: Path) -> None:
    one = floats(6)
    found = tensors_of(put(tmp_path, {"shared/w": one, "late/0/w": one, "part": one[2:], "turned": one.view(2, 3).T}))
    assert {name: tensor.tolist() for name, tensor in found.items()} == {
        "late/0/w": one.tolist(),
        "part": [2.0, 3.0, 4.0, 5.0],
        "shared/w": one.tolist(),
        "turned": [[0.0, 3.0], [1.0, 4.0], [2.0, 5.0]],
    }


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_what_was_written_is_the_files_and_not_memory(tmp_path: Path) -> None:
    """Where a large tensor's numbers are, the process has a file mapped: also once it is deleted. What is small stays the same object."""
    made = put(tmp_path, {"a.1.w": torch.zeros(2**20), "b": (small := floats(3))})
    assert [[*part.tensors] for part in made] == [["a.1.w"], ["b"]] and made[1].tensors["b"] is small
    for part in made[:1]:
        (tmp_path / part.name).unlink()
        for tensor in part.tensors.values():
            lines = [line.split(maxsplit=5) for line in Path("/proc/self/maps").read_text().splitlines()]
            ends = [([int(end, 16) for end in line[0].split("-")], line[5:]) for line in lines]
            (file,) = [file for (begin, end), file in ends if begin <= tensor.data_ptr() < end]
            assert file and part.name in file[0], file


def test_a_part_that_is_not_what_its_name_says_is_named(tmp_path: Path) -> None:
    (part,) = put(tmp_path, wholes(a=3))
    path, whole = tmp_path / part.name, (tmp_path / part.name).read_bytes()
    for wrong, reason in ((whole[:-1] + b"\x01", "altered"), (whole[:-3], "cannot be read"), (None, "cannot be read")):
        path.unlink()
        if wrong is not None:
            path.write_bytes(wrong)
        with pytest.raises(ValueError, match=f"{part.name} .*{reason}|{part.name} {reason}"):
            read(tmp_path, part.name)
    with pytest.raises(ValueError, match=r"'\.\./x' is no file of the server's"):
        read(tmp_path, "../x")
