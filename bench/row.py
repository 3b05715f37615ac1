"""One figure of the bench: a number, what it was made from, and what it is held against."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field
from typing import Literal

Verdict = Literal["aim", "met", "missed", "informative", "not measured"]


@dataclass(frozen=True)
class Row:
    """One measured figure.

    `value` is in `unit`; None means it was not measured, and `note` says why. `at_least` is the bound the figure has to
    keep ("at least as good as", whichever way `better` points), `aim` is what we would like; None: a figure for information.
    `samples` holds every single measurement `value` was made from, by name, in the unit their name says.
    """

    name: str
    value: float | None
    unit: str
    at_least: float | None = None
    aim: float | None = None
    better: Literal["more", "less"] = "more"
    samples: dict[str, list[float]] = field(default_factory=dict)
    note: str = ""

    def verdict(self) -> Verdict:
        """`aim` reached, bound `met`, bound `missed`, `informative` (nothing to hold it against) or `not measured`."""
        value = self.value
        if value is None:
            return "not measured"
        if self.at_least is None and self.aim is None:
            return "informative"

        def reaches(bound: float) -> bool:
            return value >= bound if self.better == "more" else value <= bound

        if self.aim is not None and reaches(self.aim):
            return "aim"
        if self.at_least is None or reaches(self.at_least):
            return "met"
        return "missed"


def dumps(rows: list[Row]) -> str:
    """`rows` as JSON text."""
    return json.dumps([asdict(row) for row in rows], indent=1)


def loads(text: str) -> list[Row]:
    """The rows of JSON text that `dumps` wrote."""
    return [Row(**entry) for entry in json.loads(text)]
