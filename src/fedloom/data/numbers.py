"""Numbers that answers end in, as GSM8K's do (2110.14168): what is due after ``####``, and what a model wrote.

Numbers are compared by value after the commas between thousands, a currency sign ($, € or £) and a sign + are gone; so 1,080, $1080 and
1080.00 are one. What follows a number (a full stop, a percent sign, a unit) is no part of it. Knows nothing of models.
"""

from __future__ import annotations

import re
from decimal import Decimal

EXACT = "exact_match"
"""What the share of right numbers is called in rows and results."""

MARK = "####"
"""What stands before the final number."""

NUMBER = re.compile(r"(?:(?<![\w.)\]])[-−+])?(?:[$€£][-−+]?)?((?:\d{1,3}(?:,\d{3})+(?!\d)|\d+)(?:\.\d+)?|\.\d+)")
"""A number as people write them. In 7-3 the dash is no sign of the 3."""


def marked(text: str) -> Decimal | None:
    """The number right after the first :data:`MARK` of a text; None where there is none."""
    _, mark, after = text.partition(MARK)
    found = NUMBER.match(after.lstrip()) if mark else None
    return _value(found) if found else None


def last(text: str) -> Decimal | None:
    """The last number of a text; None where there is none."""
    found = list(NUMBER.finditer(text))
    return _value(found[-1]) if found else None


def due(answer: str) -> Decimal | None:
    """The number that an answer of the data ends in, after :data:`MARK`; None where it ends in something else."""
    return marked(MARK + answer.rpartition(MARK)[2]) if MARK in answer else None


def _value(found: re.Match[str]) -> Decimal:
    number = Decimal(found[1].replace(",", ""))
    return -number if any(sign in found[0] for sign in "-−") else number
