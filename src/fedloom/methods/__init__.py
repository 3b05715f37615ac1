"""The methods by name. A file in this folder that defines a method is found by itself; there is no list to keep."""

from __future__ import annotations

from types import ModuleType
from typing import Any

from fedloom.finding import chosen, found_below, found_in
from fedloom.methods.method import insist_on_what_is_said


def methods_in(module: ModuleType) -> dict[str, type[Any]]:
    """The methods that a module defines (not those it imports): dataclasses with the class attributes ``name`` and ``paper``.

    Raises:
        ValueError: two of them have the same name, or one says of itself what nobody listens to.
    """
    found = found_in(module)
    for kind in found.values():
        insist_on_what_is_said(kind)
    return found


def all_methods() -> dict[str, type[Any]]:
    """Every method of this package, by name, in order of names.

    Raises:
        ValueError: as :func:`methods_in`.
    """
    return found_below(__name__, __path__, methods_in)


def named(name: str) -> type[Any]:
    """The method of that name.

    Raises:
        ValueError: there is none; the message lists those that exist.
    """
    return chosen(all_methods(), name, "method", ". A Python file that defines one works too")
