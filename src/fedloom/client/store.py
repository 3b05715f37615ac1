"""Where clients' private state lives: one file a client, named by its content, seen by everyone only after a commit.

``save`` writes the file at once and is visible to the next ``load`` of this store; nothing of it stays in memory. ``commit`` makes what
was saved durable and returns an index (client -> file); the caller writes that index into its checkpoint, so client state and server state
change together or not at all. A client without any state has no file.
"""

from __future__ import annotations

import ctypes
import os
import re
from collections.abc import Iterable, Mapping
from hashlib import sha256
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from fedloom.telling import Tellable
from fedloom.tensors import apart, clone, fingerprint
from fedloom.wire import SHORT

State = tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]
"""(private, memory) as in :class:`fedloom.client.client.Client`."""

FILE = re.compile(r"client-(0|-?[1-9][0-9]{0,18})-([0-9a-f]{16})\.safetensors")
"""The only names of states: they come from checkpoints and over the wire, and each client has one way to be written."""

MANY = 64
"""Files in one commit from which on the whole file system is flushed in one call, where the system has such a call."""


class StoreError(Tellable, RuntimeError):
    """Stored client state that is missing or not what was written."""


class DiskError(StoreError):
    """State that the disk did not take."""


class ClientStore:
    """Client state in ``folder``, or in memory only when ``folder`` is None.

    With ``aside`` every file goes there instead: whoever only looks at a run leaves its folder as it is, and cannot commit.
    """

    def __init__(self, folder: Path | None = None, aside: Path | None = None) -> None:
        self.folder, self.aside = folder, aside
        self._held: dict[int, State] = {}
        self._fresh: dict[int, str] = {}
        self._index: dict[int, str] = {}

    def load(self, client: int) -> State:
        """(private, memory) of one client; two empty dicts when it has none.

        Raises:
            StoreError: its file is missing or altered.
        """
        if client in self._held:
            private, memory = self._held[client]
            return clone(private), clone(memory)
        name = self.name(client)
        return self._read(name) if name else ({}, {})

    def save(self, client: int, private: Mapping[str, torch.Tensor], memory: Mapping[str, torch.Tensor]) -> None:
        """Replace one client's state.

        Raises:
            DiskError: it could not be written; the client has the state that it had.
        """
        if self.folder is None:
            self._held[client] = (clone(private), clone(memory))
            return
        tensors = _flat(private, memory)
        name = f"client-{client}-{fingerprint(tensors)[:16]}.safetensors" if tensors else ""
        if name not in ("", self._index.get(client), self._fresh.get(client)):
            place = self.aside or self.folder
            try:
                place.mkdir(parents=True, exist_ok=True)
                save_file(tensors, place / f"{name}.tmp")
                os.replace(place / f"{name}.tmp", place / name)
            except (OSError, SafetensorError) as error:
                (place / f"{name}.tmp").unlink(missing_ok=True)
                said = f"the state of device {client} could not be written to {place} ({error})"
                raise DiskError(said, said.replace(str(place), "its folder")) from error
        self.take(client, name)

    def name(self, client: int) -> str:
        """The file that holds the client's state; empty when it has none."""
        return self._fresh.get(client, self._index.get(client, ""))

    def size(self, client: int) -> int:
        """Bytes of the client's file; 0 where it has none."""
        name = self.name(client)
        return self._path(name).stat().st_size if name else 0

    def take(self, client: int, name: str) -> None:
        """Make ``name``, a file that is there already, the client's state (empty: it has none); delete the uncommitted one it replaces."""
        before = self._fresh.pop(client, "")
        if name != self._index.get(client, ""):
            self._fresh[client] = name
        if before and before != name:
            self._path(before).unlink(missing_ok=True)

    def keep(self, names: Iterable[str]) -> None:
        """Delete every client's file that is not named; of a store that somebody else indexes."""
        assert self.folder is not None
        for name in os.listdir(self.folder) if self.folder.exists() else []:
            if (FILE.fullmatch(name) or name.endswith(".tmp")) and name not in set(names):
                (self.folder / name).unlink()

    def commit(self) -> dict[str, str]:
        """Make durable what was saved since the last commit. Returns the index: client id as text -> file name.

        Raises:
            StoreError: this store writes aside.
        """
        if self.folder is None:
            return {}
        if self.aside is not None:
            raise StoreError(f"this store writes to {self.aside}, not to {self.folder}; nothing of it can be committed")
        made_durable(self.folder, [name for name in self._fresh.values() if name])
        self._index |= self._fresh
        self._index = {client: name for client, name in self._index.items() if name}
        self._fresh.clear()
        return {str(client): name for client, name in sorted(self._index.items())}

    def restore(self, index: Mapping[str, str]) -> None:
        """Forget everything since the commit that returned ``index``.

        Raises:
            StoreError: an entry is not a file name of this store.
        """
        read = read_index(index)
        self._held.clear()
        self._fresh.clear()
        self._index = read

    def sweep(self) -> None:
        """Delete files that nothing names any more. Call it once the checkpoint holds the new index."""
        if self.folder is None or not self.folder.exists():
            return
        keep = {*self._index.values(), *self._fresh.values()}
        for name in os.listdir(self.folder):
            if name not in keep and (FILE.fullmatch(name) or name.endswith(".tmp")):
                (self.folder / name).unlink()

    def fingerprint(self) -> str:
        """sha256 over the state of all clients that have any."""
        digest = sha256()
        for client in sorted({*self._held, *self._fresh, *self._index}):
            tensors = _flat(*self.load(client))
            digest.update(f"{client}:{fingerprint(tensors)}|".encode() if tensors else b"")
        return digest.hexdigest()

    def _path(self, name: str) -> Path:
        assert self.folder is not None
        written = self.aside / name if self.aside is not None else None
        return written if written is not None and written.exists() else self.folder / name

    def _read(self, name: str) -> State:
        path = self._path(name)
        try:
            tensors = dict(sorted(load_file(path).items()))  # of which bytes are read as they are wanted
        except (OSError, SafetensorError) as error:
            said = f"client state {path} cannot be read ({error})"
            raise StoreError(said, said.replace(str(path), name)) from error
        found = FILE.fullmatch(name)
        if found is None or fingerprint(tensors)[:16] != found[2]:
            raise StoreError(
                f"client state {path} was altered after it was written", f"client state {name} was altered after it was written"
            )
        private = {key.removeprefix("private/"): value for key, value in tensors.items() if key.startswith("private/")}
        memory = {key.removeprefix("memory/"): value for key, value in tensors.items() if key.startswith("memory/")}
        return private, memory


def read_index(index: Mapping[str, str]) -> dict[int, str]:
    """The index that a store's ``commit`` returned: client -> name.

    Raises:
        StoreError: an entry is not the name of a state of its client.
    """
    read: dict[int, str] = {}
    for client, name in index.items():
        found = FILE.fullmatch(name) if isinstance(name, str) else None
        if found is None or found[1] != client:
            raise StoreError(f"{SHORT.repr(name)} is no client file of client {SHORT.repr(client)}; the checkpoint is corrupt")
        read[int(client)] = name
    return read


def made_durable(folder: Path, names: Iterable[str]) -> None:
    """Have these files of ``folder``, and their names in it, survive a power cut.

    Raises:
        OSError: the disk did not take them.
    """
    names = list(names)
    if not names:
        return
    if len(names) < MANY or not _flushed(folder):
        for name in names:
            flush(folder / name)
    flush(folder)


def flush(path: Path) -> None:
    """Have a file's content, or the names in a folder, survive a power cut."""
    number = os.open(path, os.O_RDONLY)
    try:
        os.fsync(number)
    finally:
        os.close(number)


def _flushed(folder: Path) -> bool:
    """Flush the file system that holds ``folder`` in one call; False where the system has no such call (Linux has)."""
    try:
        syncfs = ctypes.CDLL(None, use_errno=True).syncfs
    except AttributeError:
        return False
    number = os.open(folder, os.O_RDONLY)
    try:
        if syncfs(number) != 0:
            raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()), str(folder))
    finally:
        os.close(number)
    return True


def _flat(private: Mapping[str, torch.Tensor], memory: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Both under one prefix each, on the CPU, contiguous, none sharing storage with another."""
    named = {**{f"private/{n}": t for n, t in private.items()}, **{f"memory/{n}": t for n, t in memory.items()}}
    return apart({name: tensor.detach().cpu().contiguous() for name, tensor in named.items()})
