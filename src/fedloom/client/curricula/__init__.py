"""The curricula by name. A file in this folder that defines a curriculum is found by itself; there is no list to keep."""

from __future__ import annotations

from types import ModuleType
from typing import Any

from fedloom.finding import chosen, found_below, found_in


def curricula_in(module: ModuleType) -> dict[str, type[Any]]:
    """The curricula that a module defines (not those it imports): dataclasses with the class attributes ``name`` and ``paper``.

    Raises:
        ValueError: two of them have the same name.
    """
    return found_in(module)


def all_curricula() -> dict[str, type[Any]]:
    """Every curriculum of this package, by name, in order of names.

    Raises:
        ValueError: two of them have the same name.
    """
    return found_below(__name__, __path__)


def named(name: str) -> type[Any]:
    """The curriculum of that name.

    Raises:
        ValueError: there is none; the message lists those that exist.
    """
    return chosen(all_curricula(), name, "curriculum")
