"""TensorBoard: event files in the run's folder, for ``tensorboard --logdir``. TensorBoard keeps numbers as float32."""

from __future__ import annotations

import time
from collections.abc import Collection, Iterator, Mapping

from tensorboard.backend.event_processing.event_file_loader import EventFileLoader
from tensorboard.compat.proto.event_pb2 import Event  # pyright: ignore[reportAttributeAccessIssue]
from tensorboard.compat.proto.summary_pb2 import Summary  # pyright: ignore[reportAttributeAccessIssue]
from tensorboard.plugins.hparams.summary_v2 import hparams_pb
from tensorboard.plugins.text.summary_v2 import text_pb
from tensorboard.summary.writer.event_file_writer import EventFileWriter

from fedloom.run.tracking import ALWAYS, Subject

SETTINGS = "settings"
"""The tag of the table of settings."""


class TensorBoard:
    """A :class:`~fedloom.run.tracking.Tracker`. A round is one record of an event file: of a torn one nothing is read. A run that goes on
    has one more file, with the rounds that the others lack."""

    def __init__(self, subject: Subject) -> None:
        self.folder = subject.folder
        self.tags = {value.tag for event in self._events() for value in event.summary.value}
        self.writer = EventFileWriter(str(subject.folder))
        if SETTINGS not in self.tags:
            shown = {key: value if isinstance(value, bool | int | float | str) else str(value) for key, value in subject.settings.items()}
            table = "".join(f"| {key} | {value} |\n" for key, value in shown.items())
            text = text_pb(SETTINGS, f"| setting | value |\n|---|---|\n{table}")
            self._write(0, Summary(value=[*text.value, *hparams_pb(shown, trial_id=subject.id).value]))

    def known(self) -> Collection[int]:
        """Those in the files."""
        return {event.step for event in self._events() for value in event.summary.value if value.tag == ALWAYS}

    def round(self, round: int, numbers: Mapping[str, float]) -> None:
        """One record of scalars."""
        self._write(round, Summary(value=[Summary.Value(tag=tag, simple_value=number) for tag, number in numbers.items()]))

    def end(self, round: int, numbers: Mapping[str, float]) -> None:
        """Scalars at the last round, those that there are not yet."""
        self.round(round, {tag: number for tag, number in numbers.items() if tag not in self.tags})

    def close(self, failed: bool) -> None:
        """Close the file."""
        self.writer.close()

    def _write(self, step: int, summary: Summary) -> None:
        self.writer.add_event(Event(wall_time=time.time(), step=step, summary=summary))
        self.writer.flush()

    def _events(self) -> Iterator[Event]:
        for path in sorted(self.folder.glob("events.out.tfevents.*")):
            yield from EventFileLoader(str(path)).Load()
