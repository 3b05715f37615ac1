"""Saving a run after every round, so that a kill at any moment loses at most the round in progress.

``checkpoints/latest.json`` is the one source of truth and is replaced in one step. It names the files of the server's tensors
(``parts.py``) and every client's; those are written before it, and what it no longer names is deleted after it. Of the server's tensors
only what a round has changed is written, and once written what is large lies in its file and not in memory.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from fedloom.client.elsewhere import Elsewhere, Store
from fedloom.client.store import ClientStore, StoreError, flush
from fedloom.folders import replacing
from fedloom.messages import Tensors
from fedloom.methods.method import State
from fedloom.run.errors import CheckpointError
from fedloom.run.late import Late, Step
from fedloom.run.parts import Part, put, read, tensors_of, written
from fedloom.tensors import fingerprint

LATEST = "latest.json"
START = re.compile(r"start-([0-9a-f]{16})\.safetensors")
"""What A0 and B0 are called, where LoRA started from a decomposition: written once, for they do not change."""


@dataclass(frozen=True)
class Saved:
    """A completed round: the server's state, the ledger's totals, the fingerprint of the data it was made with, who is in where some
    were not from the start, (A0, B0) where those are not zero, which the frozen weights are short of, what the pre-trained weights came to
    (``starting.py``), and what the model's outputs are called; "" and nothing of an earlier release.

    ``parts``: where the state lies, or that of the round before. ``begun``: where the start of a whole model does, while the run goes on.
    """

    state: State
    totals: dict[str, Any]
    data: str
    late: Late | None = None
    start: Tensors = field(default_factory=dict)
    parts: tuple[Part, ...] = ()
    begun: tuple[Part, ...] = ()
    model: str = ""
    names: tuple[str, ...] = ()


def write_atomically(path: Path, text: str, ending: str = "tmp") -> None:
    """Replace ``path`` by ``text`` in one step (:func:`~fedloom.folders.replacing`). ``ending``: of the file that is written first, where
    another process may write to ``path`` too."""
    with replacing(path, ending) as file:
        file.write(text.encode("utf-8"))


def save(folder: Path, saved: Saved, store: Store) -> Saved:
    """Write the checkpoint of one completed round of the run in ``folder``. Returns it as it lies there: the same numbers, in files."""
    place = folder / "checkpoints"
    place.mkdir(parents=True, exist_ok=True)
    state, steps = saved.state, saved.late.steps if saved.late else ()
    tensors = {f"{kind}/{n}": t for kind, part in _parts(state).items() for n, t in part.items()}
    tensors |= {f"late/{i}/{n}": t for i, step in enumerate(steps) for n, t in step.tensors.items()}
    parts = put(place, tensors, (*saved.parts, *saved.begun))
    body = {
        "round": state.round,
        "server": [part.name for part in parts],
        "facts": dict(state.facts),
        "clients": store.commit(),
        "totals": saved.totals,
        "data": saved.data,
        **({"elsewhere": True} if isinstance(store, Elsewhere) else {}),
        **({"model": saved.model, "names": list(saved.names)} if saved.model else {}),
    }
    if saved.late is not None:
        asked = [{"op": step.op, "settings": dict(step.settings), "exact": step.exact} for step in steps]
        body["late"] = {"since": {str(k): at for k, at in saved.late.since.items()}, "steps": asked}
    if saved.start:
        body["start"] = written(place, "start", saved.start)
    if saved.begun:
        body["begun"] = [part.name for part in saved.begun]
    write_atomically(place / LATEST, json.dumps({"sha256": _digest(body), **body}, indent=1))
    flush(place)  # the new index is on the disk before what only the old one names is deleted
    store.sweep()
    named = {part.name for part in (*parts, *saved.begun)}
    for path in place.glob("server-*"):
        if path.name not in named:
            path.unlink()
    tensors = tensors_of(parts)
    late = saved.late and replace(saved.late, steps=tuple(replace(s, tensors=_named(tensors, f"late/{i}/")) for i, s in enumerate(steps)))
    return replace(saved, state=_state(state.round, state.facts, tensors), late=late, parts=tuple(parts))


def holds_training(folder: Path) -> bool:
    """Whether a run's last completed round is kept there: a run known by its results alone has none."""
    return (folder / "checkpoints" / LATEST).exists()


def data_of(folder: Path) -> str | None:
    """The fingerprint of the data that the last completed round was made with; None if there is none, or it cannot be read."""
    found = _said(folder, "data")
    return found if isinstance(found, str) else None


def model_of(folder: Path) -> str | None:
    """The fingerprint of the pre-trained weights that the last completed round began with; None if there is none, or it cannot be read."""
    found = _said(folder, "model")
    return found if isinstance(found, str) and found else None


def same_data(one: str, other: str) -> bool:
    """Whether two fingerprints may be of the same data: one of an earlier release tells tokens alone, and what the other has behind its
    dash is not compared.

    >>> same_data("a1", "a1-b2"), same_data("a1-b2", "a1-c3"), same_data("a1", "a2")
    (True, False, False)
    """
    return all(a == b for a, b in zip(one.split("-"), other.split("-"), strict=False))


def is_served(folder: Path) -> bool:
    """Whether the run is a real federation's, of which the server has this folder: states and data of devices lie with them."""
    return _said(folder, "elsewhere") is True


def _said(folder: Path, what: str) -> object:
    """One entry of the last completed round; None if there is none, or it cannot be read."""
    try:
        return json.loads((folder / "checkpoints" / LATEST).read_text(encoding="utf-8"))[what]
    except (OSError, ValueError, KeyError, TypeError):
        return None


def load(folder: Path, store: Store) -> Saved | None:
    """The last completed round, with ``store`` put back to it; None if there is none.

    What is read while the run goes on may have been followed by the next round, which deletes it; that one is read then.

    Raises:
        CheckpointError: the checkpoint is corrupt; nothing is changed.
    """
    path = folder / "checkpoints" / LATEST
    while holds_training(folder):
        before = _bytes(path)
        try:
            return _read(folder, path, store)
        except CheckpointError:
            if _bytes(path) == before:
                raise
    return None


def _read(folder: Path, path: Path, store: Store) -> Saved:
    """The round that ``path`` tells of."""
    mend = f"Nothing was overwritten. Delete {folder} to start the run anew, or restore the folder from a copy"
    try:
        body = json.loads(path.read_text(encoding="utf-8"))
        signed = body.pop("sha256")
        if _digest(body) != signed:
            raise ValueError("its content does not match its sha256")
        names = [body["server"]] if isinstance(body["server"], str) else body["server"]  # of an earlier release
        parts = tuple(read(path.parent, name) for name in names)
        tensors = tensors_of(parts)
        start = read(path.parent, body["start"], START).tensors if "start" in body else {}
        round, facts, totals, data = (body[name] for name in ("round", "facts", "totals", "data"))
        model, outputs = body.get("model", ""), tuple(body.get("names", ()))
        if not (type(round) is int and isinstance(facts, dict) and isinstance(totals, dict) and isinstance(data, str)):
            raise ValueError("its round, facts, totals or data are none")
        late = None if "late" not in body else _late(body["late"], tensors)
        store.restore(body["clients"])
        for client in body["clients"]:
            store.load(int(client))
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError, StoreError) as error:
        raise CheckpointError(f"the checkpoint {path} is corrupt: {error}. {mend}") from error
    return Saved(_state(round, facts, tensors), totals, data, late, start, parts, model=model, names=outputs)


def _bytes(path: Path) -> bytes:
    """Those of a file; none of one that cannot be read."""
    try:
        return path.read_bytes()
    except OSError:
        return b""


def fingerprint_of(folder: Path) -> str:
    """sha256 over all state of a run: round, facts, every server tensor and every client's state, bit for bit."""
    store = ClientStore(folder / "checkpoints" / "clients")
    saved = load(folder, store)
    if saved is None:
        raise CheckpointError(f"{folder} holds no checkpoint")
    parts = {kind: fingerprint(tensors) for kind, tensors in _parts(saved.state).items()}
    parts |= {"start": fingerprint(saved.start)} if saved.start else {}
    return _digest({"round": saved.state.round, "facts": dict(saved.state.facts), **parts, "clients": store.fingerprint()})


def _parts(state: State) -> dict[str, Mapping[str, torch.Tensor]]:
    parts = {"shared": state.shared, "server": state.server, "moments": state.moments, "controls": state.controls}
    return {kind: tensors for kind, tensors in parts.items() if tensors or kind in ("shared", "server")}


def _state(round: int, facts: Mapping[str, Any], tensors: Tensors) -> State:
    shared, server, moments, controls = (_named(tensors, f"{kind}/") for kind in ("shared", "server", "moments", "controls"))
    return State(round, shared, server, facts, moments, controls)


def _late(saved: Mapping[str, Any], tensors: Mapping[str, torch.Tensor]) -> Late:
    steps = [
        Step(str(one["op"]), _named(tensors, f"late/{i}/"), dict(one["settings"]), bool(one.get("exact")))  # earlier releases said nothing
        for i, one in enumerate(saved["steps"])
    ]
    return Late({int(k): int(at) for k, at in saved["since"].items()}, tuple(steps))


def _named(tensors: Mapping[str, torch.Tensor], prefix: str) -> dict[str, torch.Tensor]:
    return {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}


def _digest(body: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(body, sort_keys=True).encode()).hexdigest()
