"""Tensors as files of a folder: parts that are named by their content, so that what has not changed is not written again.

A part is a transformer layer, or a tensor that is in none, if that is :data:`PART` bytes or more; what is smaller lies together, layers
before the rest. What was written in a part of that size is what the file holds from then on: its pages are mapped, read when they are
wanted, and the system may take them back at any time, which it may not with memory that no file stands behind. A file that is deleted is
there while it is mapped.

State is a value: tensors that have not changed are the same objects, and are recognised without reading their numbers. Others are
recognised by their numbers, which give the name.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from fedloom.client.store import DiskError, flush
from fedloom.messages import Tensors
from fedloom.model.blocks import layer_of
from fedloom.tensors import apart, fingerprint, nbytes

PART = 4 * 2**20
"""Bytes from which on a layer has a file of its own: a state of adapters is one file or few, a block of a whole model one."""

SERVER = re.compile(r"server-([0-9a-f]{16})\.safetensors")
"""What a part is called."""


@dataclass(frozen=True)
class Part:
    """A file's name, and the tensors in it: mapped, or, of a small part, those that were written."""

    name: str
    tensors: Tensors

    def holds(self, tensors: Tensors) -> bool:
        """Whether these are the file's own tensors, by identity; one that was written over in memory, as none should be, is not."""
        mine = self.tensors
        return tensors.keys() == mine.keys() and all(t is mine[name] and t._version == 0 for name, t in tensors.items())


def cut(tensors: Tensors) -> list[list[str]]:
    """The names of every part, each name in one; a function of names and sizes alone. What stands before a name's last ``/`` is its kind:
    layers of two kinds are two."""
    units: dict[tuple[str, int | str], list[str]] = {}
    for name in sorted(tensors):
        layer = layer_of(name)
        units.setdefault((name.rpartition("/")[0], name if layer is None else layer), []).append(name)
    parts: list[list[str]] = []
    small: list[str] = []
    for unit in sorted(units, key=lambda unit: isinstance(unit[1], str)):
        names = units[unit]
        if _bytes(tensors, names) >= PART:
            parts.append(names)
            continue
        small += names
        if _bytes(tensors, small) >= PART:
            parts.append(small)
            small = []
    return [*parts, small] if small else parts


def put(place: Path, tensors: Tensors, there: Sequence[Part] = ()) -> list[Part]:
    """Have these tensors lie in the folder ``place``, durably. Returns the parts that hold them; what was there before is the same
    objects again. ``there``: parts that are in the folder."""
    made: list[Part] = []
    for wanted in ({name: tensors[name] for name in names} for names in cut(tensors)):
        found = next((part for part in there if part.holds(wanted)), None)
        if found is None:
            name = written(place, "server", wanted)
            found = Part(name, _mapped(place, name) if nbytes(wanted) >= PART else wanted)
        made.append(found)
    return made


def tensors_of(parts: Iterable[Part]) -> dict[str, torch.Tensor]:
    """The tensors of all parts, in order of names."""
    return dict(sorted((name, tensor) for part in parts for name, tensor in part.tensors.items()))


def written(place: Path, kind: str, tensors: Tensors) -> str:
    """The name, by its content, of the file that holds these tensors, which is written if it is not there.

    Raises:
        DiskError: it could not be written; nothing of it is left.
    """
    tensors = apart({name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()})
    name = f"{kind}-{fingerprint(tensors)[:16]}.safetensors"
    if not (place / name).exists():
        scratch = place / f"{name}.tmp"
        try:
            save_file(tensors, scratch)
            flush(scratch)
            os.replace(scratch, place / name)
        except (OSError, SafetensorError) as error:
            scratch.unlink(missing_ok=True)
            said = f"the server's state could not be written to {place / name} ({error})"
            raise DiskError(said, said.replace(str(place), "its folder")) from error
    return name


def read(place: Path, name: str, kind: re.Pattern[str] = SERVER) -> Part:
    """The part with this name.

    Raises:
        ValueError: the name is none of the kind, the file cannot be read, or its content is not what the name says.
    """
    named = kind.fullmatch(name)
    if named is None:
        raise ValueError(f"{name!r} is no file of the server's")
    try:
        tensors = _mapped(place, name)
    except (OSError, SafetensorError) as error:
        raise ValueError(f"{name} cannot be read ({error})") from error
    if fingerprint(tensors)[:16] != named[1]:
        raise ValueError(f"{name} was altered after it was written")
    return Part(name, tensors)


def _mapped(place: Path, name: str) -> dict[str, torch.Tensor]:
    return dict(sorted(load_file(place / name).items()))  # of which bytes are read as they are wanted


def _bytes(tensors: Tensors, names: Iterable[str]) -> int:
    return nbytes({name: tensors[name] for name in names})
