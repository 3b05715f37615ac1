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
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from fedloom.client.elsewhere import Elsewhere
from fedloom.encodings import EXACT, Encoding, Sender
from fedloom.engines.agreement import Outline, agreeing, outlined
from fedloom.engines.boxes import BLOB, CLIENT, REFUSED, TO, boxed, unboxed
from fedloom.engines.flower import with_nonces  # first: it switches off what Flower must not do

# isort: split
from flwr.app import ConfigRecord, Message, MessageType, RecordDict

from fedloom.engines.aside import Aside, Kept
from fedloom.engines.heap import give_memory_back
from fedloom.engines.link import PAUSE, Link
from fedloom.engines.local import gather, joined, may_cross
from fedloom.engines.talk import COMMITTED, GREETING, STATE, UNGREETED, state_of, told_of
from fedloom.messages import CohortFailed, Failure, Replies, Take, Task, Update, whole
from fedloom.wire import LONGEST, WireError

log = logging.getLogger("fedloom")

AT_ONCE = 32
"""Tasks that are laid out at a time: the server's memory does not grow with the number of devices asked."""

BREATH = 4
"""Answers that are read before freed memory is given back."""

LATE = "TimeoutError: it was late, and the others were enough"
"""Why an answer does not count that was not waited for. It is nobody's fault."""

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


@dataclass
class Asking:
    """One asking of several devices: what of it is still to be laid out and what is on its way, and, by client, what came of it."""

    tasks: Sequence[Task]
    enough: int
    sender: Sender
    aside: Aside
    began: float = field(default_factory=time.monotonic)
    ends: float = math.inf
    """When whoever is not here is late, since enough are."""
    looked_at: int = 0
    """Answers that were here when it was last looked whether they are enough."""
    waiting: deque[Task] = field(default_factory=deque)
    out: dict[str, Sent] = field(default_factory=dict)
    """By the name of its message."""
    answers: dict[int, Kept | Failure] = field(default_factory=dict)
    bytes_down: dict[int, int] = field(default_factory=dict)
    states: dict[int, str] = field(default_factory=dict)
    """The names of the devices' states after it."""

    def failed(self, client: int, reason: str) -> None:
        """There is no answer of this client, for this reason."""
        self.answers[client] = Failure(client, reason)

    def here(self) -> list[Task]:
        """The tasks that were answered, however well."""
        return [task for task in self.tasks if isinstance(self.answers.get(task.client), Kept)]


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
        with Aside(self.link.folder) as aside:
            numbered = self._numbered(tasks)
            asking = Asking(numbered, len(tasks) if enough is None else enough, Sender(self.digest, self.encoding), aside)
            self._exchange(asking)
            replies = self._judged(asking, asking.tasks)
            replies = replace(replies, traffic=tuple(replace(t, bytes_down=asking.bytes_down.get(t.client, 0)) for t in replies.traffic))
            for update in replies.updates:
                self.states.take(update.client, asking.states[update.client])
                self._faults.pop(update.client, None)
            for failure in replies.failures:
                if failure.client in asking.bytes_down and failure.reason != LATE:
                    self._leave_out(failure)
            asked = {task.client: task for task in asking.tasks}
            whole_again = (update for outline in replies.updates for update in self._opened(asking, asked[outline.client]).updates)
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

    def _exchange(self, asking: Asking) -> None:
        """Lay the tasks out and hear the answers, until there is an answer of everyone or a reason why there is none."""
        for task in asking.tasks:
            if task.client in self.link.nodes:
                asking.waiting.append(task)
            else:
                asking.failed(task.client, "LookupError: the server was given no key of this client")
        while asking.waiting or asking.out:
            now, present = time.monotonic(), self.link.present()
            self._lay_out(asking, now, present)
            for reply in self.link.pull_messages(list(asking.out)):
                self._hear(asking, asking.out.pop(reply.metadata.reply_to_message_id), reply)
            self._look(asking)
            self._give_up(asking, now, present)
            if asking.waiting or asking.out:
                time.sleep(PAUSE)

    def _lay_out(self, asking: Asking, now: float, present: Collection[int]) -> None:
        """Send what waits to whoever is here and is not left out; whoever is not, for as long as is waited, has failed."""
        for _ in range(len(asking.waiting)):
            task = asking.waiting.popleft()
            times, until, reason = self._faults.get(task.client, (0, 0.0, ""))
            if task.client in present and now >= until and len(asking.out) < AT_ONCE:
                self._send(asking, task)
            elif now < asking.began + self.patience.wait or (task.client in present and now >= until):
                asking.waiting.append(task)
            elif now < until:
                asking.failed(task.client, f"left out for {until - now:.0f} s more, after {times} in a row: {reason}")
            else:
                asking.failed(task.client, self._unheard)

    def _look(self, asking: Asking) -> None:
        """Whether enough answers are here that may be used. Who answers at once, and wrongly, makes nobody late."""
        here = asking.here()
        if math.isinf(asking.ends) and (asking.waiting or asking.out) and len(here) >= asking.enough and len(here) != asking.looked_at:
            asking.looked_at = len(here)
            if len(self._judged(asking, here).updates) >= asking.enough:
                asking.ends = time.monotonic() + self.patience.linger

    def _give_up(self, asking: Asking, now: float, present: Collection[int]) -> None:
        """Whoever is silent, over the deadline, or late has failed."""
        over = now > asking.ends
        for name, sent in list(asking.out.items()):
            sent.silent = math.inf if sent.task.client in present else min(sent.silent, now)
            away = now > sent.silent + self.patience.wait
            if over or away or now > sent.since + self.patience.deadline:
                del asking.out[name]
                self.link.forget([name])
                why = LATE if over else self._unheard if away else f"TimeoutError: no answer within {self.patience.deadline:g} s"
                asking.failed(sent.task.client, why)
        while over and asking.waiting:
            asking.failed(asking.waiting.popleft().client, LATE)

    def _judged(self, asking: Asking, tasks: Sequence[Task]) -> Replies:
        """What came of these tasks, without tensors, less what may not be used; one answer is in memory at a time."""
        outlines, seen = list[Outline](), list[Replies]()
        for task in tasks:
            one = self._opened(asking, task)
            outlines += [outlined(task, update) for update in one.updates]
            seen.append(replace(one, updates=tuple(replace(update, tensors={}) for update in one.updates)))
        return agreeing(tasks, joined(seen), outlines)

    def _opened(self, asking: Asking, task: Task) -> Replies:
        self._read += 1
        if self._read % BREATH == 0:
            give_memory_back()
        answer = asking.answers[task.client]
        blob = answer if isinstance(answer, Failure) else asking.aside.read(answer)
        return gather([task], [0], [blob], self.digest, self.encoding, self._whose)

    @property
    def _unheard(self) -> str:
        return f"TimeoutError: not heard of for {self.patience.wait:g} s"

    def _leave_out(self, failure: Failure) -> None:
        times = self._faults.get(failure.client, (0, 0.0, ""))[0] + 1
        pause = min(FIRST * 2 ** (times - 1), MOST)
        self._faults[failure.client] = (times, time.monotonic() + pause, failure.reason)
        log.warning("client %d is left out for %.0f s: %s", failure.client, pause, failure.reason)

    def _send(self, asking: Asking, task: Task, greeted: int = 0) -> None:
        """Lay out the task, or first a greeting."""
        greeting = task.client not in self._greeted
        head = ConfigRecord({CLIENT: task.client, STATE: self.states.name(task.client), COMMITTED: self.states.committed(task.client)})
        if greeting:
            content, kind, size = RecordDict({TO: ConfigRecord({CLIENT: task.client, GREETING: self.greeting})}), MessageType.QUERY, 0
        else:
            blob = asking.sender.pack(task)
            content, kind, size = RecordDict({BLOB: boxed(blob), TO: head}), MessageType.TRAIN, len(blob)
        message = Message(content, self.link.nodes[task.client], kind, ttl=self.patience.deadline + 60)
        if list(self.link.push_messages([message])):
            asking.bytes_down[task.client] = asking.bytes_down.get(task.client, 0) + size
            asking.out[message.metadata.message_id] = Sent(task, time.monotonic(), greeting, greeted)
        else:
            asking.failed(task.client, "LookupError: the link took no message for it")

    def _hear(self, asking: Asking, sent: Sent, reply: Message) -> None:
        """Take in one reply: go on to the task after a greeting, greet whoever asks for it, keep the rest."""
        client = sent.task.client
        if reply.has_error():
            code, reason = reply.error.code, (reply.error.reason or "no reason given")[:LONGEST]
            if code == UNGREETED and sent.greeted < 2:
                self._greeted.discard(client)
                self._send(asking, sent.task, sent.greeted + 1)
            else:
                asking.failed(client, reason if code in (REFUSED, UNGREETED) else f"Flower error {code}: {reason}")
            return
        try:
            if sent.greeting:
                self.told[client] = told_of(reply.content)
                self._greeted.add(client)
                self._send(asking, sent.task, sent.greeted)
            else:
                asking.states[client] = state_of(reply.content, client)
                asking.answers[client] = asking.aside.keep(unboxed(reply.content))
        except WireError as error:
            asking.failed(client, f"WireError: {error}")


@dataclass(frozen=True)
class Enough:
    """A federation that waits for ``enough`` of so many asked, and a moment for the rest: for rounds. Set-up and evaluation want
    everyone."""

    inner: Federation
    enough: Callable[[int], int]

    def run(self, tasks: Sequence[Task], take: Take = whole) -> Replies:
        """As ``inner``, for so many."""
        return self.inner.run(tasks, take, self.enough(len(tasks)))
