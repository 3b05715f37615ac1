"""The machine that this process runs on: how much memory it may have there, and how much of that is free.

Where a control group of Linux bounds its processes, as that of a container or of a cluster's job does, the rest of the machine's memory is
not theirs, and a process that takes it is ended without a word. Groups lie in groups, and each of them bounds. What a group holds of files
is taken back where room is needed, and counts as free, as it does of the whole machine.

This module does not know what the memory is for.
"""

from __future__ import annotations

import os
from functools import cache
from pathlib import Path
from typing import NamedTuple

import psutil
import torch

OWN = Path("/proc/self/cgroup")
"""Where Linux tells a process which control groups it is in."""

ROOT = Path("/sys/fs/cgroup")
"""Where it tells of the groups; of version 1 those of memory lie in a folder ``memory``."""

NO_LIMIT = 2**62
"""More bytes than any machine has."""

TAKEN_BACK = ("inactive_file", "active_file", "slab_reclaimable")
"""What of a group's memory the system takes back where room is needed, as ``memory.stat`` calls it (version 1: ``total_`` of them)."""

SHARERS = "FEDLOOM_SHARERS"
"""The environment variable that tells a process how many were started to compute on this machine at a time, itself among them."""


class Group(NamedTuple):
    """The files that say how many bytes the processes of a control group may hold, how many they hold, and of what kind these are."""

    limit: Path
    held: Path
    kinds: Path

    @property
    def most(self) -> int:
        """Bytes that they may hold; more than any machine has where nothing is said."""
        return _number(self.limit, NO_LIMIT)

    @property
    def free(self) -> int:
        """Bytes that they may take besides, once what can be taken back is."""
        kinds = dict(line.split() for line in _text(self.kinds).splitlines() if len(line.split()) == 2)
        back = sum(int(kinds.get(f"total_{name}", kinds.get(name, 0))) for name in TAKEN_BACK)
        return max(0, self.most - max(0, _number(self.held, 0) - back))


def groups_of(said: str, root: Path) -> list[Group]:
    """The control groups of memory that a process is in, from the innermost. ``said``: what Linux tells of them (:data:`OWN`);
    ``root``: where they lie."""
    found = []
    for line in said.splitlines():
        _, kinds, place = line.split(":", 2)
        if kinds and "memory" not in kinds.split(","):
            continue
        top = root / "memory" if kinds else root
        limit, held = ("memory.limit_in_bytes", "memory.usage_in_bytes") if kinds else ("memory.max", "memory.current")
        inner = top / place.lstrip("/")
        folders = [folder for folder in (inner, *inner.parents) if folder.is_relative_to(top)]
        found += [Group(f / limit, f / held, f / "memory.stat") for f in folders if _text(f / limit)]
    return found


@cache
def own_groups() -> tuple[Group, ...]:
    """Those that bound this process: of most machines none. Looked for once; what they allow and hold is read anew each time."""
    total = psutil.virtual_memory().total
    return tuple(group for group in groups_of(_text(OWN), ROOT) if group.most < total)


def all_bytes() -> int:
    """Memory that this process may hold: the machine's, or what its control groups allow."""
    return min([psutil.virtual_memory().total, *(group.most for group in own_groups())])


def free_bytes(device: torch.device) -> int:
    """Memory that is free on a device; on a processor as far as the control groups of this process allow, on a GPU with what PyTorch has
    of it for later and does not use."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0] + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    return min([psutil.virtual_memory().available, *(group.free for group in own_groups())])


def own_part(device: torch.device) -> int:
    """What this process may take of the memory that is free on a device: of a processor's an equal part, where others were started with it
    that take as much (:data:`SHARERS`). Of a GPU's all: there whoever comes too late is told so, and makes its passes smaller."""
    return free_bytes(device) if device.type == "cuda" else free_bytes(device) // sharers()


def sharers() -> int:
    """How many processes take their parts of this machine, this one among them; 1 where nothing is said."""
    return int(os.environ.get(SHARERS, "1"))


def held_bytes() -> int:
    """Memory that this process holds."""
    return psutil.Process().memory_info().rss


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""


def _number(path: Path, otherwise: int) -> int:
    said = _text(path).strip()
    return int(said) if said.isdecimal() else otherwise
