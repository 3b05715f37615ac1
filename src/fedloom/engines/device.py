"""The device's end of a real federation: a Flower app that answers greetings and tasks, and refuses all else with its reason."""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping
from typing import Any, Protocol

from fedloom.engines.boxes import BLOB, CLIENT, REFUSED, TO, boxed, unboxed  # first: it switches off what Flower must not do

# isort: split
from flwr.app import ConfigRecord, Context, Error, Message, RecordDict
from flwr.clientapp import ClientApp

from fedloom.engines.talk import COMMITTED, GREETING, STATE, TOLD, UNGREETED, head_of
from fedloom.messages import Failure
from fedloom.telling import for_others
from fedloom.wire import LONGEST, Blob, WireError

log = logging.getLogger("fedloom")


class Ungreeted(LookupError):
    """This device does not know the experiment of a task."""


class Device(Protocol):
    """What answers on a device: :class:`~fedloom.engines.resident.Resident`."""

    def greet(self, greeting: str) -> Mapping[str, Any]:
        """Make ready for the experiment that the greeting tells of; what to say of oneself."""
        ...

    def answer(self, client: int, state: str, committed: str, blob: Blob) -> tuple[Blob | Failure, str]:
        """The packed update, or why there is none, and the name of the state after it. ``state``: that from which to start; ``committed``:
        that to which the server may go back."""
        ...


def _refusal(message: Message, code: int, reason: str) -> Message:
    """An error as an answer. It may quote what came, so it is cut, and what no encoding can write is replaced."""
    return Message(Error(code, reason[:LONGEST].encode("utf-8", "replace").decode("utf-8")), reply_to=message)


def device_app(device: Device) -> ClientApp:
    """The Flower app of a deployed device: greetings and tasks. Whatever else comes is refused with its reason."""
    app = ClientApp()

    @app.query()
    def greeted(message: Message, context: Context) -> Message:
        record = head_of(message.content)
        text = record.get(GREETING)
        if not isinstance(text, str):
            return _refusal(message, REFUSED, "WireError: a greeting that says nothing")
        try:
            said = json.dumps(device.greet(text))
        except Exception as error:
            log.warning("this device cannot take part", exc_info=error)
            return _refusal(message, REFUSED, for_others(error))
        return Message(RecordDict({TO: ConfigRecord({TOLD: said})}), reply_to=message)

    @app.train()
    def carried_out(message: Message, context: Context) -> Message:
        record = head_of(message.content)
        number, state, committed = record.get(CLIENT), record.get(STATE), record.get(COMMITTED)
        if not (isinstance(number, int) and isinstance(state, str) and isinstance(committed, str)):
            return _refusal(message, REFUSED, "WireError: a task that names no client or no states")
        try:
            answer, after = device.answer(number, state, committed, unboxed(message.content))
        except Ungreeted as error:
            return _refusal(message, UNGREETED, str(error))
        except WireError as error:
            return _refusal(message, REFUSED, f"WireError: {error}")
        if isinstance(answer, Failure):
            return _refusal(message, REFUSED, answer.reason)
        return Message(RecordDict({BLOB: boxed(answer), TO: ConfigRecord({STATE: after})}), reply_to=message)

    return app
