"""``fedloom`` as the command line runs it, up to its first training step: prints when that begins, and ends.

    python -m bench.first_step run lora --out FOLDER

The moment is ``time.perf_counter()`` at the first call of a compute that holds a ``Fit``; on Linux that clock is the same in all
processes. The compute's modules are watched, not imported: nothing is loaded earlier or later than without this file.
"""

from __future__ import annotations

import importlib.abc
import importlib.machinery
import os
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from types import ModuleType
from typing import Any

WATCHED = {"fedloom.compute.stacked": "Stacked", "fedloom.compute.serial": "Serial"}
"""The computes there are: module, class."""

MARK = "first training step at"


class Watch(importlib.abc.MetaPathFinder):
    """Finds the watched modules where Python would, and has them loaded by :class:`Listening`."""

    def find_spec(self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None) -> Any:
        """A spec for the watched modules only."""
        spec = importlib.machinery.PathFinder.find_spec(fullname, path) if fullname in WATCHED else None
        if spec is not None and spec.loader is not None:
            spec.loader = Listening(spec.loader)
        return spec


@dataclass(frozen=True)
class Listening(importlib.abc.Loader):
    """Loads as ``inner`` does, then puts a listener before the compute's ``run``."""

    inner: Any

    def create_module(self, spec: Any) -> ModuleType | None:
        """As ``inner``."""
        return self.inner.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        """As ``inner``; the listener ends the process at the first training step."""
        self.inner.exec_module(module)
        compute = vars(module)[WATCHED[module.__name__]]
        begin = compute.run

        def run(self: Any, items: Sequence[Any]) -> Any:
            if any(type(item).__name__ == "Fit" for item in items):
                print(f"{MARK} {time.perf_counter()}", flush=True)
                os._exit(0)
            return begin(self, items)

        compute.run = run


if __name__ == "__main__":
    sys.meta_path.insert(0, Watch())
    from fedloom.cli import main

    sys.exit(main(sys.argv[1:]))
