"""The curricula by name. A file in this folder that defines a curriculum is found by itself; there is no list to keep."""

from __future__ import annotations

import importlib
import pkgutil
from dataclasses import is_dataclass
from types import ModuleType
from typing import Any


def curricula_in(module: ModuleType) -> dict[str, type[Any]]:
    """The curricula that a module defines (not those it imports): dataclasses with the class attributes ``name`` and ``paper``."""
    found = (value for value in vars(module).values() if isinstance(value, type) and value.__module__ == module.__name__)
    return {kind.name: kind for kind in found if is_dataclass(kind) and {"name", "paper"} <= set(vars(kind))}  # type: ignore[attr-defined]


def all_curricula() -> dict[str, type[Any]]:
    """Every curriculum of this package, by name, in order of names."""
    names = [f"{__name__}.{module.name}" for module in pkgutil.iter_modules(__path__)]
    found: dict[str, type[Any]] = {}
    for name in names:
        found |= curricula_in(importlib.import_module(name))
    return dict(sorted(found.items()))


def named(name: str) -> type[Any]:
    """The curriculum of that name.

    Raises:
        ValueError: there is none; the message lists those that exist.
    """
    found = all_curricula()
    if name not in found:
        raise ValueError(f"no curriculum '{name}'; there are {', '.join(found)}")
    return found[name]
