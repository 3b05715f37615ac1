"""How much memory a process may have, by files as Linux writes them of control groups, of both versions."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

import psutil
import pytest
import torch

from fedloom.model import machine
from fedloom.model.machine import all_bytes, free_bytes, groups_of
from fedloom.run.terminal import doctor
from fedloom.run.terminal.console import human_bytes

GB = 10**9


class Seen(NamedTuple):
    """What psutil says of the whole machine."""

    total: int
    available: int


def group(folder: Path, most: int | str, held: int = 0, kinds: str = "", first: bool = False) -> Path:
    """A control group with this limit, whose processes hold so much. ``first``: of version 1."""
    folder.mkdir(parents=True, exist_ok=True)
    limit, usage = ("memory.limit_in_bytes", "memory.usage_in_bytes") if first else ("memory.max", "memory.current")
    (folder / limit).write_text(f"{most}\n")
    (folder / usage).write_text(f"{held}\n")
    (folder / "memory.stat").write_text(kinds)
    return folder


def bounds(said: str, root: Path) -> list[tuple[int, int]]:
    return [(one.most, one.free) for one in groups_of(said, root)]


def test_a_group_is_free_of_what_it_may_hold_and_does_not_or_could_give_back(tmp_path: Path) -> None:
    """free = limit − (held − what is of files); never below 0, nor more than the limit where counters lag."""
    kinds = "anon 100\nfile 70\ninactive_file 40\nactive_file 20\nslab_reclaimable 5\nslab 9\n"
    group(tmp_path, 1000, 300, kinds)
    assert bounds("0::/\n", tmp_path) == [(1000, 1000 - (300 - 40 - 20 - 5))]
    group(tmp_path, 1000, 2000, kinds)
    assert bounds("0::/\n", tmp_path) == [(1000, 0)]
    group(tmp_path, 1000, 30, kinds)
    assert bounds("0::/\n", tmp_path) == [(1000, 1000)]
    group(tmp_path, "max", 300, kinds)
    assert groups_of("0::/\n", tmp_path)[0].most == machine.NO_LIMIT


def test_every_group_around_a_process_bounds_it(tmp_path: Path) -> None:
    """A cluster's job is a group in groups; the machine's own has no limit, and a neighbour's is nobody else's. What is told of other than
    memory is passed over."""
    group(tmp_path / "slurm" / "job_1", 500, 100)
    group(tmp_path / "slurm" / "job_1" / "task", "max", 100)
    group(tmp_path / "slurm" / "job_2", 7, 7)
    assert bounds("12:cpu:/x\n0::/slurm/job_1/task\n", tmp_path)[1:] == [(500, 400)]
    assert [one.limit.parent.name for one in groups_of("0::/slurm/job_1/task\n", tmp_path)] == ["task", "job_1"]
    assert groups_of("", tmp_path) == groups_of("0::/elsewhere\n", tmp_path) == groups_of("0::/../..\n", tmp_path) == []


def test_groups_of_the_first_version_are_read_too(tmp_path: Path) -> None:
    """Their kinds are told of the group itself and, as ``total_``, with those inside it, as what is held is. In a container the group's
    folder is the outermost, whatever its name is outside."""
    kinds = "inactive_file 1\nactive_file 1\ntotal_inactive_file 40\ntotal_active_file 20\n"
    group(tmp_path / "memory", 1000, 300, kinds, first=True)
    assert bounds("4:cpu,memory:/docker/abc\n3:cpuset:/\n0::/\n", tmp_path) == [(1000, 1000 - (300 - 60))]


@pytest.mark.parametrize(
    ("limits", "all_here", "free_here"),
    [([], 256 * GB, 200 * GB), ([8 * GB], 8 * GB, 7 * GB), ([8 * GB, 5 * GB], 5 * GB, 4 * GB), ([2**62, 300 * GB], 256 * GB, 200 * GB)],
    ids=["none", "a container", "one in another", "more than there is"],
)
def test_what_is_free_is_no_more_than_a_container_may_have(
    limits: list[int], all_here: int, free_here: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A container of 8 GB on a machine of 256: psutil tells the machine's. Everybody who asks is told the group's: which passes, stacks,
    copies and runs fit, a device's own, and the doctor."""
    place = Path()
    for i, most in enumerate(limits):
        group(tmp_path / (place := place / str(i)), most, GB)
    (tmp_path / "own").write_text(f"0::/{place}\n")
    monkeypatch.setattr(machine, "OWN", tmp_path / "own")
    monkeypatch.setattr(machine, "ROOT", tmp_path)
    monkeypatch.setattr(machine, "own_groups", machine.own_groups.__wrapped__)
    monkeypatch.setattr(psutil, "virtual_memory", lambda: Seen(256 * GB, 200 * GB))
    assert (all_bytes(), free_bytes(torch.device("cpu"))) == (all_here, free_here)
    assert len(machine.own_groups()) == sum(most < 256 * GB for most in limits), "what does not bound is not looked at again"
    (told,) = [finding for finding in doctor._machine(tmp_path) if finding.name == "memory"]
    assert told.text.startswith(human_bytes(all_here))
    for name, seen in (("mem_get_info", (100, 456)), ("memory_reserved", 40), ("memory_allocated", 17)):
        monkeypatch.setattr(torch.cuda, name, lambda device, seen=seen: seen)
    assert free_bytes(torch.device("cuda", 0)) == 123, "a GPU's is not the group's, and what PyTorch holds unused is free"
