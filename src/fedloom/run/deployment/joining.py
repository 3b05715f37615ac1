"""A device of a real federation, as one call, and what anybody with a key may ask of the server.

The process that talks to the server computes nothing: it has none of the libraries of models, which are its worker's (``device.py``).
"""

from __future__ import annotations

import json
import os
import threading
from collections.abc import Callable, Collection, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from fedloom.data.opening import PACKAGED, insist_on_a_place
from fedloom.engines.device import device_app
from fedloom.engines.node import STATUS, Credentials, Node
from fedloom.engines.node import asked as asked_of
from fedloom.engines.resident import Resident, bytes_of
from fedloom.engines.workers import Start
from fedloom.model.places import folder_of
from fedloom.run.deployment.certificates import insist_secret
from fedloom.run.deployment.device import STATES, command, order
from fedloom.run.deployment.greeting import Own, digest_of_file
from fedloom.run.errors import ExperimentError
from fedloom.run.lock import only_one
from fedloom.run.terminal.console import human_seconds


def join(
    server: str,
    certs: Path,
    own: Own,
    folder: Path,
    deadline: float,
    said: Callable[[str], None],
    stop: threading.Event,
    memory: float = 0.0,
) -> None:
    """Be a device of the federation at ``server``, with its state in ``folder``, until ``stop`` is set. ``memory``: GiB that its worker may
    hold (0: nine tenths of the machine's).

    Raises:
        Refused: this device does not belong there.
        CertificateError, ExperimentError, ValueError: it cannot begin so.
        CheckpointError: another process is this device.
    """
    host, port = address(server)
    insist_on_a_place(own.data)  # what is missing is seen now, and not when the server wants it
    if own.model:
        folder_of(own.model)
    if own.recipe:
        digest_of_file(Path(own.recipe))
    credentials, bound = Credentials.read(insist_secret(certs / "device.key"), certs / "ca.pem"), bytes_of(memory)
    data, model = placed(own.data, PACKAGED), placed(own.model, ("", "minilm"))
    own = replace(own, data=data, model=model, memory=bound, said=memory > 0, folder=str(folder.resolve()))
    with only_one(folder):
        resident = Resident(folder / STATES, lambda greeting: Start(command(), order(greeting, own), lambda _: {}), deadline, bound)
        try:
            Node(f"[{host}]:{port}" if ":" in host else f"{host}:{port}", credentials, device_app(resident), said).serve(stop)
        finally:
            resident.close()


def placed(name: str, known: Collection[str]) -> str:
    """Data or a model, as they are called from any folder; those of a ``known`` name, or of none that lies here, as they are."""
    path = Path(name).expanduser()
    return os.path.abspath(path) if name not in known and path.exists() else name


def asked(server: str, certs: Path) -> list[tuple[str, str]]:
    """How the federation at ``server`` stands, as lines to show.

    Raises:
        Refused: the folder's key is none of the federation.
        OSError: nobody is there.
    """
    host, port = address(server)
    credentials = Credentials.read(insist_secret(certs / "device.key"), certs / "ca.pem")
    return shown(asked_of(f"[{host}]:{port}" if ":" in host else f"{host}:{port}", credentials, STATUS))


def shown(told: Mapping[str, Any]) -> list[tuple[str, str]]:
    """What the server told (``federation.about``), as lines to show.

    Raises:
        OSError: it is something else.
    """
    try:
        return _lines(told)
    except (ValueError, TypeError, KeyError, AttributeError, OverflowError, RecursionError) as error:
        raise OSError(f"the server tells something else than a fedloom serve would ({type(error).__name__}: {error})") from error


def _lines(told: Mapping[str, Any]) -> list[tuple[str, str]]:
    row = json.loads(told["last_round"]) if told["last_round"] else {}
    ago = told["written_seconds_ago"]
    lines = [("experiment", str(told["experiment"])), ("devices", str(told["devices"]))]
    lines += [("here", ", ".join(map(str, told["here"])) or "none"), ("away", ", ".join(map(str, told["away"])) or "none")]
    lines += [("round", str(row.get("round", "none yet"))), ("last written", "-" if ago is None else f"{human_seconds(ago)} ago")]
    if "joined" in row:
        lines += [(f"joined late: {client}", f"takes part from round {since} on") for client, since in row["joined"].items()]
        lines += [("not in yet", ", ".join(map(str, row["missing"])) or "none")]
    lines += [("answered", ", ".join(map(str, row.get("answered", []))) or "-")]
    return [*lines, *((f"failed: {client}", str(reason)) for client, reason in row.get("failed", {}).items())]


def address(text: str) -> tuple[str, int]:
    """HOST:PORT, or [HOST]:PORT.

    Raises:
        ExperimentError: it is none.
    """
    host, colon, port = text.rpartition(":")
    if not colon or not host or not port.isdecimal() or int(port) > 65535:
        raise ExperimentError(f"'{text}' is no address; give HOST:PORT, such as 192.168.1.10:9092")
    return host.strip("[]"), int(port)
