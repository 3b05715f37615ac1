"""What a package's files define, found by its name: there is no list to keep, of methods or of curricula."""

from __future__ import annotations

import difflib
import importlib
import pkgutil
from collections.abc import Callable, Iterable, Mapping
from dataclasses import is_dataclass
from types import ModuleType
from typing import Any

Within = Callable[[ModuleType], Mapping[str, type[Any]]]
"""By name what one module defines."""


def found_in(module: ModuleType) -> dict[str, type[Any]]:
    """By name what a module defines (not what it imports): dataclasses with the class attributes ``name`` and ``paper``.

    Raises:
        ValueError: two of them have the same name.
    """
    made = [value for value in vars(module).values() if isinstance(value, type) and value.__module__ == module.__name__]
    return _by_name(kind for kind in made if is_dataclass(kind) and {"name", "paper"} <= set(vars(kind)))


def found_below(package: str, path: Iterable[str], within: Within = found_in) -> dict[str, type[Any]]:
    """By name what the files of a package define, in order of names. ``within``: what of a file counts.

    Raises:
        ValueError: two of them have the same name.
    """
    modules = [importlib.import_module(f"{package}.{module.name}") for module in pkgutil.iter_modules(path)]
    return dict(sorted(_by_name(kind for module in modules for kind in within(module).values()).items()))


def chosen(found: Mapping[str, type[Any]], name: str, what: str, more: str = "") -> type[Any]:
    """The one of that name.

    Raises:
        ValueError: there is none; the message says ``what`` that would be, lists those that exist, and ends with ``more``.
    """
    if name not in found:
        raise ValueError(f"no {what} '{name}'; there are {', '.join(found)}{more}")
    return found[name]


def meant(word: str, known: Iterable[str]) -> str:
    """What to put behind "there is no such ..." where ``word`` is nearly one that there is; else nothing.

    >>> meant("fedavgg", ["fedavg", "local"])
    " Did you mean 'fedavg'?"
    """
    close = difflib.get_close_matches(word, list(known), 1)
    return f" Did you mean '{close[0]}'?" if close else ""


def _by_name(kinds: Iterable[Any]) -> dict[str, type[Any]]:
    found: dict[str, type[Any]] = {}
    for kind in kinds:
        other = found.setdefault(kind.name, kind)
        if other is not kind:
            raise ValueError(f"two are called '{kind.name}': {_place(other)} and {_place(kind)}; give one of them another name")
    return found


def _place(kind: type[Any]) -> str:
    return f"{kind.__qualname__} in {kind.__module__}"
