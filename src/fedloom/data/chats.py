"""Conversations of several turns, as OpenAI's API (``role``, ``content``) or ShareGPT (``from``, ``value``) write them.

A conversation is an instruction, if there is one (system), and then the user and the assistant in turn. Which columns hold conversations,
and what is wrong with one. Knows nothing of tokenizers, models or devices.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from fedloom.data.tasks import Column, DataError

COLUMNS = ("messages", "conversations", "conversation", "dialogue", "chat")
FORMS = (("role", "content"), ("from", "value"))
"""Whose turn it is, and what is said."""
ROLES = {"human": "user", "gpt": "assistant", "chatgpt": "assistant", "model": "assistant", "bot": "assistant", "bing": "assistant"}
"""What others call the two."""
SPEAKERS = ("system", "user", "assistant")
RIGHT = (
    'a conversation is a list of {"role": "user", "content": "…"} or {"from": "human", "value": "…"}, '
    "the assistant (gpt) answering the user"
)


def as_texts(values: Sequence[Any], where: str) -> tuple[list[str], int]:
    """Every conversation as JSON of [role, text] of its turns, up to the assistant's last one, and how many had something behind that.

    Raises:
        DataError: a row that is no conversation: its number, what came, what would be right.
    """
    made, cut = [], 0
    for row, given in enumerate(values):
        turns = _turns(given, f"row {row} of {where}")
        answered = turns[: 1 + max(i for i, (role, _) in enumerate(turns) if role == "assistant")]
        cut += len(answered) < len(turns)
        made.append(json.dumps(answered, ensure_ascii=False))
    return made, cut


def as_turns(text: str) -> list[dict[str, str]]:
    """A conversation that :func:`as_texts` wrote, as others write and read it."""
    return [dict(zip(FORMS[0], turn, strict=True)) for turn in json.loads(text)]


def _turns(given: Any, row: str) -> list[tuple[str, str]]:
    if isinstance(given, str):
        try:
            given = json.loads(given)
        except json.JSONDecodeError as error:
            raise DataError(f"{row} is the text {given[:60]!r}; {RIGHT}") from error
    if not isinstance(given, list) or not given:
        raise DataError(f"{row} is {_short(given)}; {RIGHT}")
    turns: list[tuple[str, str]] = []
    for i, turn in enumerate(given):
        role, said = _turn(turn, f"turn {i} of {row}")
        due = "user" if not turns or turns[-1][0] != "user" else "assistant"
        if role != due and (role != "system" or i):
            others = " or system" if not i else ""
            raise DataError(f"turn {i} of {row} is the {role}'s, and the {due}'s{others} would be right there; the two take turns")
        turns.append((role, said))
    if all(role != "assistant" for role, _ in turns):
        raise DataError(f"{row} has no turn of the assistant's, so nothing of it is due; add its answer or remove the row")
    return turns


def _turn(turn: Any, which: str) -> tuple[str, str]:
    known = [(who, what) for who, what in FORMS if isinstance(turn, Mapping) and turn.get(who) is not None]
    if not known:
        raise DataError(f"{which} is {_short(turn)}, which does not say whose it is; {RIGHT}")
    who, what = known[0]
    role = ROLES.get(str(turn[who]).lower(), str(turn[who]).lower())
    if role not in SPEAKERS:
        there = ", ".join((*SPEAKERS, *ROLES))
        raise DataError(f"{which} is that of '{turn[who]}'; there are {there}. Leave out conversations with others, as with tools")
    if not isinstance(said := turn.get(what), str):
        raise DataError(f"{which} has {_short(said)} as its {what}; it must be text ('' is fine)")
    return role, said


def _short(value: Any) -> str:
    return "nothing" if value is None else json.dumps(value, ensure_ascii=False, default=str)[:60]


def choose_columns(columns: Mapping[str, Column], text: Sequence[str]) -> str:
    """The column of conversations: the one named, else by name, else the only one.

    Raises:
        DataError: a named column does not exist or cannot hold any, or nothing or more than one thing fits.
    """
    listed = ", ".join(columns) or "none"
    found = list(text) or [lower[name] for lower in [{n.lower(): n for n in chats(columns)}] for name in COLUMNS if name in lower][:1]
    found = found or chats(columns)
    if len(found) != 1:
        raise DataError(f"conversations are one column, and {len(found)} fit; name it with text= (--text), among: {listed}. There, {RIGHT}")
    if found[0] not in columns:
        raise DataError(f"the training data has no column '{found[0]}'; its columns are: {listed}")
    if columns[found[0]].kind not in ("chats", "string"):
        raise DataError(f"column '{found[0]}' holds no conversations; {RIGHT}")
    return found[0]


def chats(columns: Mapping[str, Column]) -> list[str]:
    """The columns that hold conversations."""
    return [name for name, column in columns.items() if column.kind == "chats"]


def looks_like_chats(columns: Mapping[str, Column]) -> bool:
    """Whether a column is named like conversations and holds some."""
    return any(name.lower() in COLUMNS for name in chats(columns))
