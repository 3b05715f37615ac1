"""``fedloom serve`` or ``fedloom join`` that go wrong when a file says so, for ``faults.py``.

    python tests/integration/wrapped.py FOLDER serve|join ...

The command runs as it is, but for the points below. ``FOLDER/order`` says what is to go wrong there, and nothing does while it is empty
or away; ``FOLDER/until`` lets a server go on to that round and no further (there is none: it goes on).
``LEFT_OUT`` in the environment says for how many seconds a server leaves out at first who has failed.

A server: ``aggregating`` kills it (signal 9) between the first and the second update of an average, ``row`` after a round's row was
written and before its checkpoint, ``index`` between the checkpoint's tensors and the index that names them.

A device: ``die`` and ``worker dies`` kill it or its worker while it trains; :data:`LIES` change its answer, :data:`PUSHES` what it pushes;
``record`` keeps its pushes, as they went out, in ``FOLDER/recorded``.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import threading
import time
from base64 import b64encode
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import httpx
import psutil
import torch
from flwr.supernode.fleet_http_client import FleetHttpClient

from fedloom import cli, wire
from fedloom.engines import federation
from fedloom.engines.resident import Resident
from fedloom.engines.wrap import scaled
from fedloom.messages import Failure, Task, Update
from fedloom.run import checkpoint
from fedloom.server.aggregation import Average

Lie = Callable[[Task, Update], Update]


def first(change: Callable[[torch.Tensor], torch.Tensor]) -> Lie:
    """The update with another first tensor of more than one number."""

    def lie(task: Task, update: Update) -> Update:
        name = next(name for name, tensor in update.tensors.items() if tensor.is_floating_point() and tensor.numel() > 1)
        return replace(update, tensors={**update.tensors, name: change(update.tensors[name].clone())})

    return lie


def with_one(value: float) -> Callable[[torch.Tensor], torch.Tensor]:
    """The tensor with ``value`` as its first number."""

    def change(tensor: torch.Tensor) -> torch.Tensor:
        tensor.view(-1)[0] = value
        return tensor

    return change


def far(by: float) -> Lie:
    """The whole way from what was sent, ``by`` times."""
    return lambda task, update: replace(update, tensors=scaled(by)(task, update))


LIES: dict[str, Lie] = {
    "nan": first(with_one(float("nan"))),
    "infinity": first(with_one(float("inf"))),
    "shape": first(lambda tensor: tensor.view(-1)[:-1].clone()),
    "type": first(lambda tensor: tensor.double()),
    "missing": lambda task, update: replace(update, tensors=dict(list(update.tensors.items())[1:])),
    "extra": lambda task, update: replace(update, tensors={**update.tensors, "zzz": torch.ones(3)}),
    "absurd": far(1e6),
    "backwards": far(-10),
    "negative": lambda task, update: replace(update, num_examples=-5),
    "another client": lambda task, update: replace(update, client=update.client + 1),
}
PUSHES = ("flipped bit", "another name", "another round")
BLOBS = ("another experiment", "no message", "old answer")


class Ordered:
    """The orders in a folder, and what must be remembered to carry them out."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.answers, self.asked = folder, list[wire.Blob](), list[str]()

    @property
    def now(self) -> str:
        path = self.folder / "order"
        return path.read_text() if path.exists() else ""

    def once(self, order: str) -> bool:
        """Whether this is the order; it is one no more."""
        found = self.now == order
        if found:
            (self.folder / "order").unlink()
        return found

    def done(self, order: str) -> None:
        """Say that it was carried out."""
        (self.folder / "done").write_text(order)


def kill(number: int) -> None:
    """As ``kill -9``; of oneself, it does not return."""
    os.kill(number, signal.SIGKILL)
    time.sleep(0.5)


def wrap_server(ordered: Ordered) -> None:
    """The points of a server."""
    federation.FIRST = float(os.environ.get("LEFT_OUT", federation.FIRST))
    take, save, write = Average.take, checkpoint.save, checkpoint.write_atomically

    def taken(average: Average, update: Update) -> Update:
        if average._clients and ordered.once("aggregating"):
            kill(os.getpid())
        return take(average, update)

    def saved(folder: Path, state: checkpoint.Saved, store: Any) -> checkpoint.Saved:
        if ordered.once("row"):
            kill(os.getpid())
        made = save(folder, state, store)
        until = ordered.folder / "until"
        while until.exists() and state.state.round >= int(until.read_text() or 0):
            (ordered.folder / "held").write_text(str(state.state.round))
            time.sleep(0.02)
        return made

    def written(path: Path, text: str) -> None:
        if path.name == checkpoint.LATEST and ordered.once("index"):
            kill(os.getpid())
        write(path, text)

    Average.take, checkpoint.save, checkpoint.write_atomically = taken, saved, written


def wrap_device(ordered: Ordered) -> None:
    """The points of a device."""
    wire._insist_finite = wire._insist_countable = lambda *_: None  # whoever lies packs what it likes
    answer, push, push_object, send = Resident.answer, FleetHttpClient.PushMessages, FleetHttpClient.PushObject, httpx.Client.send

    def answered(resident: Resident, client: int, state: str, committed: str, blob: wire.Blob) -> tuple[wire.Blob | Failure, str]:
        task, order = wire.unpack(bytes(blob), wire.digest_of(blob)), ordered.now
        assert isinstance(task, Task)
        honest = task.op == "predict" or not order
        if not honest and order in ("die", "worker dies"):
            ordered.once(order)
            assert resident._worker is not None
            whom = os.getpid() if order == "die" else resident._worker.process.pid
            busy = psutil.Process(resident._worker.process.pid)
            before = sum(busy.cpu_times()[:2])

            def when_it_trains() -> None:
                while sum(busy.cpu_times()[:2]) == before:
                    time.sleep(0.005)
                (ordered.folder / "killed").write_text(f"{task.op} {whom}")
                kill(whom)

            threading.Thread(target=when_it_trains, daemon=True).start()
        made, after = answer(resident, client, state, committed, blob)
        if isinstance(made, Failure):
            return made, after
        ordered.answers.append(made)
        if not honest and order in LIES:
            update = wire.unpack(bytes(made), wire.digest_of(made))
            assert isinstance(update, Update)
            if update.tensors:
                made = wire.pack(LIES[order](task, update), wire.digest_of(made))
                ordered.done(order)
        if not honest and order == "another experiment":
            update = wire.unpack(bytes(made), wire.digest_of(made))
            made = wire.pack(update, "0123456789abcdef")
            ordered.done(order)
        if not honest and order == "no message":
            made = b"\x80\x04" + os.urandom(200)
            ordered.done(order)
        if not honest and order == "old answer" and len(ordered.answers) > 1:
            made = ordered.answers[-2]
            ordered.done(order)
        return made, after

    def pushed(client: FleetHttpClient, request: Any) -> Any:
        (head,) = request.messages_list
        asked = head.metadata.reply_to_message_id
        if ordered.now == "another name":
            head.metadata.src_node_id += 1
            ordered.done("another name")
        if ordered.now == "another round" and ordered.asked:
            head.metadata.reply_to_message_id = ordered.asked[0]
            ordered.done("another round")
        ordered.asked.append(asked)
        return push(client, request)

    def pushed_object(client: FleetHttpClient, request: Any) -> Any:
        if ordered.now == "flipped bit" and len(request.object_content) > 1000:
            content = bytearray(request.object_content)
            content[len(content) // 2] ^= 1
            request.object_content = bytes(content)
            ordered.done("flipped bit")
        return push_object(client, request)

    def sent(client: httpx.Client, request: httpx.Request, **how: Any) -> httpx.Response:
        if ordered.now == "record" and request.url.path.startswith("/v1/fleet/push"):
            body = b64encode(request.read()).decode()
            one = {"url": str(request.url), "headers": list(request.headers.multi_items()), "body": body}
            with (ordered.folder / "recorded").open("a") as file:
                file.write(json.dumps(one) + "\n")
        return send(client, request, **how)

    Resident.answer, FleetHttpClient.PushMessages, FleetHttpClient.PushObject = answered, pushed, pushed_object
    httpx.Client.send = sent


def main() -> int:
    """As above."""
    folder, words = Path(sys.argv[1]), sys.argv[2:]
    folder.mkdir(parents=True, exist_ok=True)
    (wrap_server if words[0] == "serve" else wrap_device)(Ordered(folder))
    return cli.main(words)


if __name__ == "__main__":
    sys.exit(main())
