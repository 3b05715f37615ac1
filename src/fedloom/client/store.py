"""Where clients' private state lives: one file a client, named by its content, seen by everyone only after a commit.

``save`` is visible to the next ``load`` at once and reaches the disk at ``commit``. ``commit`` returns an index (client -> file);
the caller writes that index into its checkpoint, so client state and server state change together or not at all.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from fedloom.tensors import clone, fingerprint

State = tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]
"""(private, memory) as in :class:`fedloom.client.client.Client`."""

FILE = re.compile(r"client-(-?\d+)-([0-9a-f]{16})\.safetensors")


class StoreError(RuntimeError):
    """Stored client state that is missing or not what was written."""


class ClientStore:
    """Client state in ``folder``, or in memory only when ``folder`` is None."""

    def __init__(self, folder: Path | None = None) -> None:
        self.folder = folder
        self._fresh: dict[int, State] = {}
        self._index: dict[int, str] = {}

    def load(self, client: int) -> State:
        """(private, memory) of one client; two empty dicts when it never stored anything.

        Raises:
            StoreError: its file is missing or altered.
        """
        if client in self._fresh:
            private, memory = self._fresh[client]
            return clone(private), clone(memory)
        return self._read(self._index[client]) if client in self._index else ({}, {})

    def save(self, client: int, private: Mapping[str, torch.Tensor], memory: Mapping[str, torch.Tensor]) -> None:
        """Replace one client's state."""
        self._fresh[client] = (clone(private), clone(memory))

    def commit(self) -> dict[str, str]:
        """Write what was saved since the last commit. Returns the index: client id as text -> file name."""
        if self.folder is None:
            return {}
        self.folder.mkdir(parents=True, exist_ok=True)
        for client, (private, memory) in sorted(self._fresh.items()):
            tensors = _flat(private, memory)
            name = f"client-{client}-{fingerprint(tensors)[:16]}.safetensors"
            if not (self.folder / name).exists():
                scratch = self.folder / f"{name}.tmp"
                save_file(tensors, scratch)
                with scratch.open("rb") as file:
                    os.fsync(file.fileno())
                os.replace(scratch, self.folder / name)
            self._index[client] = name
        self._fresh.clear()
        return {str(client): name for client, name in sorted(self._index.items())}

    def restore(self, index: Mapping[str, str]) -> None:
        """Forget everything since the commit that returned ``index``.

        Raises:
            StoreError: an entry is not a file name of this store.
        """
        for name in index.values():
            if not FILE.fullmatch(name):
                raise StoreError(f"'{name}' is no client file; the checkpoint is corrupt")
        self._fresh.clear()
        self._index = {int(client): name for client, name in index.items()}

    def sweep(self) -> None:
        """Delete files that the last commit no longer names. Call it once the checkpoint holds the new index."""
        if self.folder is None or not self.folder.exists():
            return
        keep = set(self._index.values())
        for path in self.folder.iterdir():
            if path.name not in keep and (FILE.fullmatch(path.name) or path.suffix == ".tmp"):
                path.unlink()

    def fingerprint(self) -> str:
        """sha256 over the state of all clients that have any."""
        clients = sorted(set(self._fresh) | set(self._index))
        return fingerprint({f"{k}:{name}": tensor for k in clients for name, tensor in _flat(*self.load(k)).items()})

    def _read(self, name: str) -> State:
        assert self.folder is not None
        try:
            tensors = dict(sorted(load_file(self.folder / name).items()))
        except (OSError, SafetensorError) as error:
            raise StoreError(f"client state {self.folder / name} cannot be read ({error}); delete the run folder to start anew") from error
        found = FILE.fullmatch(name)
        if found is None or fingerprint(tensors)[:16] != found[2]:
            raise StoreError(f"client state {self.folder / name} was altered after it was written; delete the run folder to start anew")
        private = {key.removeprefix("private/"): value for key, value in tensors.items() if key.startswith("private/")}
        memory = {key.removeprefix("memory/"): value for key, value in tensors.items() if key.startswith("memory/")}
        return private, memory


def _flat(private: Mapping[str, torch.Tensor], memory: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    named = {**{f"private/{n}": t for n, t in private.items()}, **{f"memory/{n}": t for n, t in memory.items()}}
    return {name: tensor.detach().cpu().contiguous() for name, tensor in named.items()}
