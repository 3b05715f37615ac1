"""Every module can be imported by itself, what it promises in ``__all__`` exists, and its examples hold."""

from __future__ import annotations

import ast
import doctest
import importlib
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

import fedloom

SOURCE = Path(fedloom.__file__).parent
NEED_FLOWER = {"fedloom.engines.boxes", "fedloom.engines.flower", "fedloom.engines.quiet", "fedloom.flower_app"}
NEED_TRACK = {"fedloom.run.trackers.tensorboard", "fedloom.run.trackers.mlflow", "fedloom.run.trackers.wandb"}


def module_name(path: Path) -> str:
    parts = path.relative_to(SOURCE.parent).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def modules(that_say: str = "") -> list[Any]:
    return [
        pytest.param(name, marks=[pytest.mark.flower] if name in NEED_FLOWER else [pytest.mark.track] if name in NEED_TRACK else [])
        for path in sorted(SOURCE.rglob("*.py"))
        if path.name != "__main__.py" and that_say in path.read_text(encoding="utf-8")
        for name in [module_name(path)]
    ]


@pytest.mark.parametrize("name", modules())
def test_module_keeps_its_promises(name: str) -> None:
    module = importlib.import_module(name)
    promised = vars(module).get("__all__", [])
    missing = [export for export in promised if export not in vars(module)]
    assert missing == [], f"{name}.__all__ names what the module lacks"
    assert len(promised) == len(set(promised))


@pytest.mark.parametrize("name", modules())
def test_module_says_what_it_is(name: str) -> None:
    path = Path(importlib.import_module(name).__file__ or "")
    source = path.read_text(encoding="utf-8")
    assert not source.strip() or ast.get_docstring(ast.parse(source)), f"{name} has code and no docstring"


@pytest.mark.parametrize("name", modules(that_say=">>>"))
def test_examples_in_docstrings_hold(name: str) -> None:
    failed, _ = doctest.testmod(importlib.import_module(name), optionflags=doctest.NORMALIZE_WHITESPACE)
    assert failed == 0


def test_importing_the_package_does_not_pull_in_the_optional_parts() -> None:
    """In a process of its own: here everything may have been imported already."""
    code = "import sys, fedloom; print(sorted({'flwr', 'matplotlib', 'tyro'} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
