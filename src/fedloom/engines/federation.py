"""The engine of a real federation: tasks to devices that may be away, slow, dead or hostile, and what of their answers is to be used.

**What a task carries** beside its packed blob: the name of the state from which the device is to start (``store.py``), and of the one that
the server's checkpoint has, to which it goes back if it is killed or a round does not count; a round may change a state more than once. An
answer carries the name of the state after it. Only names are here (:class:`~fedloom.client.elsewhere.Elsewhere`); the tensors never leave
the device. So the server's checkpoint decides which state is a device's state: an answer that was lost, came late or was not taken has not
happened, on either side, and a server that was killed goes on from its last round with devices that have moved on.

**Greeting**: before its first task a device is told the experiment; it loads its model and data once and says what it found. A device that
was started anew asks to be greeted again.

**Whose answer counts**: of each asking, those that arrived before the deadline, can be read, are of this experiment and this client,
repeat the nonce that was drawn for this client in this asking, are finite, and belong with the others (``agreement.py``). Everyone else
has failed, with the reason, and is left out for a while: :data:`FIRST` seconds, twice as many each time in a row, :data:`MOST` at most.
Then it is asked again; an asking waits for that as it does for a device that is away.

**Nonces**: an answer that was made for an earlier asking, or for another device, repeats another nonce, and the reason says whose. The
last :data:`REMEMBERED` are known by name; of others it is said that no such task was given.

**Memory**: what came is laid aside in a file until all of it is here, looked at one answer at a time, and taken in one at a time. However
many devices answer, one update is in memory, unless the method wants to see all of them at once.

**Nothing waits for ever**: a device that has not been heard of is waited for ``wait`` seconds, before its task and within it, an answer
for ``deadline``. Where some of those asked are :class:`Enough`, the rest has ``linger`` seconds once as many answers that may be used
are here.
"""

from __future__ import annotations

import json
import logging
import math
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol, cast

from fedloom.client.elsewhere import Elsewhere
from fedloom.client.store import FILE
from fedloom.encodings import EXACT, Encoding, Sender
from fedloom.engines.agreement import Outline, agreeing, outlined
from fedloom.engines.boxes import BLOB, CLIENT, REFUSED, TO, boxed, unboxed
from fedloom.engines.flower import with_nonces  # first: it switches off what Flower must not do

# isort: split
from flwr.app import ConfigRecord, Context, Error, Message, MessageType, RecordDict
from flwr.clientapp import ClientApp

from fedloom.engines.aside import Aside, Kept
from fedloom.engines.heap import give_memory_back
from fedloom.engines.link import PAUSE, Link
from fedloom.engines.local import gather, joined, may_cross
from fedloom.messages import CohortFailed, Failure, Replies, Take, Task, Update, whole
from fedloom.telling import for_others
from fedloom.wire import LONGEST, SHORT, Blob, WireError

log = logging.getLogger("fedloom")

UNGREETED = 101
"""Code of an error reply from a device that does not know this experiment (yet, or any more)."""

STATE, COMMITTED, GREETING, TOLD = "state", "committed", "greeting", "told"
AT_ONCE = 32
"""Tasks that are laid out at a time: the server's memory does not grow with the number of devices asked."""

BREATH = 4
"""Answers that are read before freed memory is given back."""

LATE = "TimeoutError: it was late, and the others were enough"
"""Why an answer does not count that was not waited for. It is nobody's fault."""

TELLS = 2**16
"""Characters that a device may tell of itself."""

REMEMBERED = 2**16
"""Nonces of tasks of which it is known whose they were."""

FIRST, MOST = 5.0, 600.0


@dataclass(frozen=True)
class Patience:
    """Seconds: for a device to appear (``wait``), for an answer (``deadline``), for the rest once enough are here (``linger``)."""

    wait: float = 60.0
    deadline: float = 600.0
    linger: float = 10.0

    def __post_init__(self) -> None:
        if not all(seconds >= 0 and math.isfinite(seconds) for seconds in (self.wait, self.deadline, self.linger)) or not self.deadline:
            raise ValueError(f"{self}: seconds must be finite, none below 0, the deadline above it: nothing may wait for ever")


@dataclass
class Sent:
    """A task on its way: when it was laid out, whether the device is only being greeted yet, how often it has been, and since when it has
    been silent (inf: it has not)."""

    task: Task
    since: float
    greeting: bool
    greeted: int = 0
    silent: float = math.inf


class Federation:
    """An :class:`~fedloom.engines.engine.Engine` over the devices of a link. ``greeting``: what they are told of the experiment, JSON."""

    def __init__(
        self,
        link: Link,
        states: Elsewhere,
        digest: str,
        greeting: Mapping[str, Any],
        patience: Patience,
        encoding: Encoding = EXACT,
    ) -> None:
        self.link, self.states, self.digest, self.patience, self.encoding = link, states, digest, patience, encoding
        self.greeting = json.dumps({**greeting, "digest": digest})
        self.told: dict[int, dict[str, Any]] = {}
        """What each greeted device said of itself."""
        self._greeted: set[int] = set()
        self._faults: dict[int, tuple[int, float, str]] = {}
        self._given: dict[str, tuple[int, str]] = {}
        self._read = 0

    def run(self, tasks: Sequence[Task], take: Take = whole, enough: int | None = None) -> Replies:
        """Ask every device, and return what may be used of their answers. ``enough``: how many answers are (None: all).

        Raises:
            WireError: a task may not cross the wire; that is the method's fault and ends the run. No task was sent then.
        """
        may_cross(tasks)
        tasks = self._numbered(tasks)
        asked = {task.client: task for task in tasks}
        with Aside(self.link.folder) as aside:
            answers, sizes, names = self._exchanged(tasks, len(tasks) if enough is None else enough, aside)
            replies = self._judged(tasks, answers, aside)
            replies = replace(replies, traffic=tuple(replace(t, bytes_down=sizes.get(t.client, 0)) for t in replies.traffic))
            for update in replies.updates:
                self.states.take(update.client, names[update.client])
                self._faults.pop(update.client, None)
            for failure in replies.failures:
                if failure.client in sizes and failure.reason != LATE:
                    self._leave_out(failure)
            answered = [asked[outline.client] for outline in replies.updates]
            whole_again = (update for task in answered for update in self._opened(task, answers[task.client], aside).updates)
            return replace(replies, updates=tuple(self._taken(update, take) for update in whole_again))

    def _numbered(self, tasks: Sequence[Task]) -> list[Task]:
        """The tasks with a nonce each, which is remembered."""
        made = with_nonces(tasks)
        self._given |= {task.nonce: (task.client, task.op) for task in made}
        for old in list(self._given)[: max(0, len(self._given) - REMEMBERED)]:
            del self._given[old]
        return made

    def _whose(self, task: Task, nonce: str) -> str:
        """What an answer to ``task`` is that repeats another nonce than the task's."""
        client, op = self._given.get(nonce, (None, ""))
        if client is None:
            return "the answer repeats no nonce of a task that was given"
        if client != task.client:
            return f"the answer is to the task '{op}' of client {client}"
        return f"the answer is to an earlier task of this client, '{op}'; it was made before, or is late"

    def _taken(self, update: Update, take: Take) -> Update:
        """What the method makes of an update. One that it can make nothing of voids the asking: half of it may be in the sums.

        Raises:
            CohortFailed: the method refused it.
        """
        try:
            return take(update)
        except (ValueError, KeyError, IndexError) as error:
            failure = Failure(update.client, f"the method can make nothing of its update ({type(error).__name__}: {error})"[:LONGEST])
            self._leave_out(failure)
            raise CohortFailed([failure], 0, 1) from error

    def _exchanged(
        self, tasks: Sequence[Task], enough: int, aside: Aside
    ) -> tuple[dict[int, Kept | Failure], dict[int, int], dict[int, str]]:
        """What came back of each, laid aside, the bytes that were sent, and the states' new names."""
        answers: dict[int, Kept | Failure] = {}
        sizes, names, sender = dict[int, int](), dict[int, str](), Sender(self.digest, self.encoding)
        waiting, out = deque(self._allowed(tasks, answers)), dict[str, Sent]()
        began, last, looked_at = time.monotonic(), None, 0
        unheard = f"TimeoutError: not heard of for {self.patience.wait:g} s"
        while waiting or out:
            now, present = time.monotonic(), self.link.present()
            for _ in range(len(waiting)):
                task = waiting.popleft()
                times, until, reason = self._faults.get(task.client, (0, 0.0, ""))
                if task.client in present and now >= until and len(out) < AT_ONCE:
                    self._send(task, sender, out, sizes, answers)
                elif now < began + self.patience.wait or (task.client in present and now >= until):
                    waiting.append(task)
                elif now < until:
                    answers[task.client] = Failure(task.client, f"left out for {until - now:.0f} s more, after {times} in a row: {reason}")
                else:
                    answers[task.client] = Failure(task.client, unheard)
            for reply in self.link.pull_messages(list(out)):
                sent = out.pop(reply.metadata.reply_to_message_id)
                self._hear(sent, reply, sender, out, sizes, answers, names, aside)
            came = sum(isinstance(answer, Kept) for answer in answers.values())
            if last is None and (waiting or out) and came >= enough and came != looked_at:
                looked_at = came
                here = [task for task in tasks if isinstance(answers.get(task.client), Kept)]
                if len(self._judged(here, answers, aside).updates) >= enough:  # who answers at once, and wrongly, makes nobody late
                    last = time.monotonic() + self.patience.linger
            for name, sent in list(out.items()):
                sent.silent = math.inf if sent.task.client in present else min(sent.silent, now)
                over, away = last is not None and now > last, now > sent.silent + self.patience.wait
                if over or away or now > sent.since + self.patience.deadline:
                    del out[name]
                    self.link.forget([name])
                    why = LATE if over else unheard if away else f"TimeoutError: no answer within {self.patience.deadline:g} s"
                    answers[sent.task.client] = Failure(sent.task.client, why)
            if last is not None and now > last:
                answers |= {task.client: Failure(task.client, LATE) for task in waiting}
                waiting.clear()
            if waiting or out:
                time.sleep(PAUSE)
        return answers, sizes, names

    def _judged(self, tasks: Sequence[Task], answers: Mapping[int, Kept | Failure], aside: Aside) -> Replies:
        """What came, without tensors, less what may not be used; one answer is in memory at a time."""
        outlines, seen = list[Outline](), list[Replies]()
        for task in tasks:
            one = self._opened(task, answers[task.client], aside)
            outlines += [outlined(task, update) for update in one.updates]
            seen.append(replace(one, updates=tuple(replace(update, tensors={}) for update in one.updates)))
        return agreeing(tasks, joined(seen), outlines)

    def _opened(self, task: Task, answer: Kept | Failure, aside: Aside) -> Replies:
        self._read += 1
        if self._read % BREATH == 0:
            give_memory_back()
        blob = answer if isinstance(answer, Failure) else aside.read(answer)
        return gather([task], [0], [blob], self.digest, self.encoding, self._whose)

    def _allowed(self, tasks: Sequence[Task], answers: dict[int, Kept | Failure]) -> list[Task]:
        """The tasks of those who can be asked at all."""
        for task in tasks:
            if task.client not in self.link.nodes:
                answers[task.client] = Failure(task.client, "LookupError: the server was given no key of this client")
        return [task for task in tasks if task.client not in answers]

    def _leave_out(self, failure: Failure) -> None:
        times = self._faults.get(failure.client, (0, 0.0, ""))[0] + 1
        pause = min(FIRST * 2 ** (times - 1), MOST)
        self._faults[failure.client] = (times, time.monotonic() + pause, failure.reason)
        log.warning("client %d is left out for %.0f s: %s", failure.client, pause, failure.reason)

    def _send(
        self,
        task: Task,
        sender: Sender,
        out: dict[str, Sent],
        sizes: dict[int, int],
        answers: dict[int, Kept | Failure],
        greeted: int = 0,
    ) -> None:
        greeting = task.client not in self._greeted
        head = ConfigRecord({CLIENT: task.client, STATE: self.states.name(task.client), COMMITTED: self.states.committed(task.client)})
        if greeting:
            content, kind, size = RecordDict({TO: ConfigRecord({CLIENT: task.client, GREETING: self.greeting})}), MessageType.QUERY, 0
        else:
            blob = sender.pack(task)
            content, kind, size = RecordDict({BLOB: boxed(blob), TO: head}), MessageType.TRAIN, len(blob)
        message = Message(content, self.link.nodes[task.client], kind, ttl=self.patience.deadline + 60)
        if list(self.link.push_messages([message])):
            sizes[task.client] = sizes.get(task.client, 0) + size
            out[message.metadata.message_id] = Sent(task, time.monotonic(), greeting, greeted)
        else:
            answers[task.client] = Failure(task.client, "LookupError: the link took no message for it")

    def _hear(
        self,
        sent: Sent,
        reply: Message,
        sender: Sender,
        out: dict[str, Sent],
        sizes: dict[int, int],
        answers: dict[int, Kept | Failure],
        names: dict[int, str],
        aside: Aside,
    ) -> None:
        """Take in one reply: go on to the task after a greeting, greet whoever asks for it, keep the rest."""
        client = sent.task.client
        if reply.has_error():
            code, reason = reply.error.code, (reply.error.reason or "no reason given")[:LONGEST]
            if code == UNGREETED and sent.greeted < 2:
                self._greeted.discard(client)
                self._send(sent.task, sender, out, sizes, answers, sent.greeted + 1)
            else:
                answers[client] = Failure(client, reason if code in (REFUSED, UNGREETED) else f"Flower error {code}: {reason}")
            return
        try:
            if sent.greeting:
                self.told[client] = _told(reply.content)
                self._greeted.add(client)
                self._send(sent.task, sender, out, sizes, answers, sent.greeted)
            else:
                names[client] = _state_of(reply.content, client)
                answers[client] = aside.keep(unboxed(reply.content))
        except WireError as error:
            answers[client] = Failure(client, f"WireError: {error}")


@dataclass(frozen=True)
class Enough:
    """A federation that waits for ``enough`` of so many asked, and a moment for the rest: for rounds. Set-up and evaluation want
    everyone."""

    inner: Federation
    enough: Callable[[int], int]

    def run(self, tasks: Sequence[Task], take: Take = whole) -> Replies:
        """As ``inner``, for so many."""
        return self.inner.run(tasks, take, self.enough(len(tasks)))


def _head(content: RecordDict) -> dict[str, Any]:
    return dict(content.config_records[TO]) if TO in content.config_records else {}


def _state_of(content: RecordDict, client: int) -> str:
    record = _head(content)
    name = record.get(STATE)
    found = FILE.fullmatch(name) if isinstance(name, str) else None
    if name != "" and (found is None or int(found[1]) != client):
        raise WireError(f"a reply whose state is named {SHORT.repr(name)}; a state of client {client} is due, or none")
    return cast(str, name)


def _told(content: RecordDict) -> dict[str, Any]:
    record = _head(content)
    text = record.get(TOLD)
    try:
        told = json.loads(text) if isinstance(text, str) and len(text) < TELLS else None
    except (ValueError, RecursionError):
        told = None
    if not isinstance(told, dict):
        raise WireError("a device that was greeted and does not say what it is")
    return told


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
        record = _head(message.content)
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
        record = _head(message.content)
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
