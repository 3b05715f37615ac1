"""A process that carries out runs: it reads one order a line and tells what happens, one JSON object a line.

``python -m fedloom.run.comparison.job`` starts it.
Whatever else would be printed goes to the error output, so that nothing mixes with what is told. The process ignores Ctrl-C, which
reaches every process of a terminal, and ends at once when its standard input is closed, by whatever: at most the round in progress is
lost. Nothing heavy is imported before the first order. The other side is ``jobs.py``.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import threading
import traceback
import warnings
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from queue import SimpleQueue
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from fedloom.run.costs.memory import Portion
    from fedloom.run.experiment import Experiment

Event = Mapping[str, Any]
"""What is told: an object with ``kind``: phase, note, round, resume, done or failed."""

OF_THE_RATE = "It asks for a smaller learning rate: name smaller --lrs. This one is not run again while its folder is there"
"""What a run that diverged wants."""

SHOWN = ("round", "loss", "personalised", "global")
"""What of a row is told."""


class Teller:
    """A run's progress as events (a :class:`~fedloom.run.terminal.console.Show`)."""

    def __init__(self, tell: Callable[[Event], None]) -> None:
        self.tell = tell

    def phase(self, text: str) -> None:
        """Something begins."""
        self.tell({"kind": "phase", "text": text})

    def note(self, text: str) -> None:
        """Something to know."""
        self.tell({"kind": "note", "text": text})

    def round(self, row: Mapping[str, Any]) -> None:
        """A round has ended."""
        self.tell({"kind": "round", **{key: row[key] for key in SHOWN}})

    def resume(self, rows: Sequence[Mapping[str, Any]]) -> None:
        """These rounds had ended before."""
        if rows:
            known = [row for row in rows if row["personalised"] is not None]
            self.tell({"kind": "resume", **{key: rows[-1][key] for key in SHOWN}, **{key: known[-1][key] for key in SHOWN[2:] if known}})


def perform(
    experiment: Experiment,
    folder: Path,
    trained: Path | None,
    tell: Callable[[Event], None],
    track: Sequence[str] = (),
    portion: Portion | None = None,
) -> None:
    """Carry out one run and tell it, to the end; never raises but to be stopped. With ``trained``, that run's training is taken over.
    ``track``: trackers that are told too. ``portion``: its part of the machine's memory, where others run beside it."""
    try:
        from fedloom.run.adopt import adopt
        from fedloom.run.loop import run

        if trained is None:
            run(experiment, folder, show=Teller(tell), track=track, portion=portion)
        else:
            adopt(experiment, folder, trained, Teller(tell), track, portion)
    except Exception as error:
        tell(failed(error))
    else:
        tell({"kind": "done"})


def failed(error: Exception) -> Event:
    """What is told of an error: a paragraph; of a fault of the program also where it is. A run that diverged is not begun again."""
    from fedloom.run.terminal.failures import diverged, explain

    of_the_rate = diverged(error)
    explained = explain(error, resumes=not of_the_rate)
    if explained is not None:
        more = f" {OF_THE_RATE}" if of_the_rate else ""
        return {"kind": "failed", "text": f"{explained[0]}{more}", "diverged": of_the_rate}
    text = f"a fault of the program: {type(error).__name__}: {error}"
    return {"kind": "failed", "text": text, "diverged": False, "trace": "".join(traceback.format_exception(error))}


def obey(order: Mapping[str, Any], tell: Callable[[Event], None]) -> None:
    """Carry out what was ordered (``jobs.order_of``), or tell why not."""
    try:
        from fedloom.run.costs.memory import Portion
        from fedloom.run.worker import ordered_experiment

        experiment, portion = ordered_experiment(order), None if order["portion"] is None else Portion(**order["portion"])
    except Exception as error:
        tell(failed(error))
        return
    perform(experiment, Path(order["folder"]), Path(order["trained"]) if order["trained"] else None, tell, order["track"], portion)


def main() -> int:
    """Carry out orders until there are no more."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    out = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    orders: SimpleQueue[str] = SimpleQueue()
    threading.Thread(target=_read, args=(orders,), daemon=True).start()
    warnings.simplefilter("ignore", FutureWarning)  # the libraries' own, about calls between them
    from fedloom.run.terminal.ending import quiet

    def tell(event: Event) -> None:
        out.write(json.dumps(event) + "\n")
        out.flush()

    with quiet():
        while True:
            obey(json.loads(orders.get()), tell)


def _read(orders: SimpleQueue[str]) -> None:
    """Hand on each line; at the end of them end the process, whatever it does."""
    for line in sys.stdin:
        orders.put(line)
    os._exit(0)


if __name__ == "__main__":
    sys.exit(main())
