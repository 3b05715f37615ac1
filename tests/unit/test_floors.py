"""The floors of the house, over syntax trees: who may import whom, one door per third-party library, and the forbidden words.

``faults`` is the checker. It is tested first, on small bad sources: a checker that cannot fail checks nothing.
"""

from __future__ import annotations

import ast
import re
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path, PurePosixPath

import pytest

import fedloom

SOURCE = Path(fedloom.__file__).parent

FLOOR = {
    "messages.py": 0,
    "tensors.py": 0,
    "seeds.py": 0,
    "telling.py": 0,
    "wire.py": 0,
    "encodings.py": 0,
    "hub.py": 0,
    "fleet.py": 0,
    "cache.py": 0,
    "folders.py": 0,
    "finding.py": 0,
    "native": 0,
}
FLOOR |= {"data": 1, "model": 1, "server": 1, "client": 2, "compute": 2, "methods": 3, "engines": 3, "run": 4}
FLOOR |= {"cli.py": 5, "flower_app.py": 5, "__init__.py": 5, "__main__.py": 5}

BLIND_FLOORS = (1, 3)
"""On these floors the neighbours may not import each other."""

FLOOR_0_LIBRARIES = {"torch", "numpy", "safetensors"}
LIBRARIES = FLOOR_0_LIBRARIES | {"scipy"}
"""What any file above floor 0 may import; everything else has a door."""

DOORS = {
    "peft": {"model/adapters.py"},
    "transformers": {"model/loading.py"},
    "datasets": {"data/opening.py"},
    "pyarrow": {"data/"},
    "psutil": {"model/machine.py", "engines/resident.py"},
    "flwr": {
        *(f"engines/{name}.py" for name in ("boxes", "device", "federation", "flower", "gate", "link", "mailbox", "node", "quiet", "talk")),
        "flower_app.py",
    },
    "fastapi": {"engines/gate.py", "engines/link.py"},
    "starlette": {"engines/gate.py", "engines/link.py"},
    "uvicorn": {"engines/link.py"},
    "httpx": {"engines/node.py"},
    "cryptography": {"engines/node.py", "run/deployment/certificates.py"},
    "tyro": {"cli.py"},
    "matplotlib": {"run/pages/drawing.py", "run/pages/figures.py", "run/pages/standings.py"},
    "jinja2": {"run/pages/report.py"},
    "tensorboard": {"run/trackers/tensorboard.py"},
    "mlflow": {"run/trackers/mlflow.py"},
    "wandb": {"run/trackers/wandb.py"},
    "rich": {"run/terminal/console.py", "run/comparison/watching.py", "cli.py"},
}
"""Each third-party library and the files that may import it; a folder stands for all its files."""


def place(path: str) -> str:
    """``data/tasks.py`` -> ``data``; ``wire.py`` -> ``wire.py``."""
    return PurePosixPath(path).parts[0]


def place_of_module(module: str) -> str:
    """``fedloom.data.tasks`` -> ``data``; ``fedloom.wire`` -> ``wire.py``; ``fedloom`` -> ``__init__.py``."""
    parts = module.split(".")
    if len(parts) == 1:
        return "__init__.py"
    return parts[1] if parts[1] in FLOOR else f"{parts[1]}.py"


def imported(tree: ast.AST) -> Iterator[tuple[int, str]]:
    """(line, module) of every import, wherever it stands. ``from fedloom import wire`` counts as ``fedloom.wire``."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.level == 0 and node.module == "fedloom":
            yield from ((node.lineno, f"fedloom.{alias.name}") for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.level == 0 and node.module:
            yield node.lineno, node.module


def import_fault(path: str, module: str) -> str | None:
    """Why the file at ``path`` may not import ``module``; None if it may."""
    here, root = place(path), module.split(".")[0]
    if root == "fedloom":
        there = place_of_module(module)
        if there not in FLOOR:
            return f"imports {module}, which has no floor"
        if FLOOR[there] > FLOOR[here]:
            return f"imports {module}, floor {FLOOR[there]} from floor {FLOOR[here]}"
        if FLOOR[here] in BLIND_FLOORS and FLOOR[there] == FLOOR[here] and there != here:
            return f"imports {module}, its blind neighbour on floor {FLOOR[here]}"
        return None
    if root in sys.stdlib_module_names:
        return None
    if root in DOORS:
        return None if {path, f"{here}/"} & DOORS[root] else f"imports {root}, whose door is {sorted(DOORS[root])}"
    allowed = FLOOR_0_LIBRARIES if FLOOR[here] == 0 else LIBRARIES
    return None if root in allowed else f"imports {root}, which floor {FLOOR[here]} may not"


def swallows(handler: ast.ExceptHandler) -> bool:
    """``except:`` in any form, or a catch of everything whose body does nothing."""
    if handler.type is None:
        return True
    catches_all = any(isinstance(n, ast.Name) and n.id in {"Exception", "BaseException"} for n in ast.walk(handler.type))
    nothing = all(
        isinstance(s, ast.Pass | ast.Continue) or (isinstance(s, ast.Expr) and isinstance(s.value, ast.Constant)) for s in handler.body
    )
    return catches_all and nothing


def suppresses_all(call: ast.Call) -> bool:
    """``contextlib.suppress(Exception)``: the same silence by another name."""
    name = call.func.attr if isinstance(call.func, ast.Attribute) else call.func.id if isinstance(call.func, ast.Name) else ""
    return name == "suppress" and any(isinstance(a, ast.Name) and a.id in {"Exception", "BaseException"} for a in call.args)


def word_fault(node: ast.AST) -> str | None:
    """Why this node is forbidden wherever it stands; None if it is not."""
    if isinstance(node, ast.ImportFrom) and node.level > 0:
        return "a relative import"
    if isinstance(node, ast.ExceptHandler) and swallows(node):
        return "a swallowed exception"
    if isinstance(node, ast.Call) and suppresses_all(node):
        return "a swallowed exception"
    if isinstance(node, ast.Call) and isinstance(node.func, ast.Name):
        if node.func.id == "super" and not node.args:
            return "super()"
        if node.func.id == "hasattr":
            return "hasattr"
        if node.func.id == "getattr" and len(node.args) == 3:
            return "getattr with a default"
    return None


def is_exception_init(tree: ast.AST) -> set[int]:
    """Lines of ``super().__init__(...)`` in exception classes: the one way Python has to set an exception's message."""
    classes = [n for n in ast.walk(tree) if isinstance(n, ast.ClassDef)]
    errors = [c for c in classes if any("Error" in ast.unparse(b) or "Exception" in ast.unparse(b) for b in c.bases)]
    calls = (n for c in errors for n in ast.walk(c) if isinstance(n, ast.Call))
    return {n.lineno for n in calls if ast.unparse(n.func) == "super().__init__"}


def faults(path: str, source: str) -> list[str]:
    """Everything wrong with one file of ``src/fedloom``; ``path`` is relative to it, with forward slashes."""
    if place(path) not in FLOOR:
        return [f"{path}: no floor has a place for it; floors have {sorted(FLOOR)}"]
    tree = ast.parse(source)
    allowed_super = is_exception_init(tree)
    found = [(line, import_fault(path, module)) for line, module in imported(tree)]
    for node in ast.walk(tree):
        fault = word_fault(node)
        if fault and not (fault == "super()" and node.lineno in allowed_super):  # type: ignore[attr-defined]
            found.append((node.lineno, fault))  # type: ignore[attr-defined]
    return [f"{path}:{line}: {fault}" for line, fault in found if fault]


FILES = sorted(p.relative_to(SOURCE).as_posix() for p in SOURCE.rglob("*.py"))

BAD = {
    "upwards": ("server/a.py", "from fedloom.methods.lora import Adapter", "floor 3 from floor 1"),
    "upwards, inside a function": ("messages.py", "def f():\n    import fedloom.data.tasks", "floor 1 from floor 0"),
    "upwards, by the package's name": ("wire.py", "from fedloom import cli", "floor 5 from floor 0"),
    "the package itself": ("client/a.py", "import fedloom", "floor 5 from floor 2"),
    "blind neighbours, floor 1": ("data/a.py", "from fedloom.model.base import Base", "blind neighbour on floor 1"),
    "blind neighbours, floor 3": ("methods/a.py", "from fedloom.engines import local", "blind neighbour on floor 3"),
    "no floor": ("run/a.py", "from fedloom.extras import x", "no floor"),
    "a file without a floor": ("extras/a.py", "", "no floor"),
    "a library on floor 0": ("tensors.py", "import scipy.linalg", "floor 0 may not"),
    "an unknown library": ("methods/a.py", "import yaml", "floor 3 may not"),
    "past a door": ("model/base.py", "from peft import LoraConfig", "whose door is ['model/adapters.py']"),
    "past a door that is a folder": ("model/a.py", "import pyarrow", "whose door is ['data/']"),
    "a submodule past a door": ("client/a.py", "import datasets.arrow_dataset", "whose door"),
    "relative": ("data/a.py", "from .tasks import x", "a relative import"),
    "super": ("model/a.py", "class A(B):\n    def f(self):\n        super().f()", "super()"),
    "super outside an exception": ("model/a.py", "class A(B):\n    def __init__(self):\n        super().__init__()", "super()"),
    "hasattr": ("data/a.py", "hasattr(x, 'y')", "hasattr"),
    "getattr with default": ("data/a.py", "getattr(x, 'y', None)", "getattr with a default"),
    "bare except": ("run/a.py", "try:\n    f()\nexcept:\n    log()", "a swallowed exception"),
    "except Exception: pass": ("run/a.py", "try:\n    f()\nexcept Exception:\n    pass", "a swallowed exception"),
    "except (A, Exception): ...": ("run/a.py", "try:\n    f()\nexcept (OSError, Exception):\n    ...", "a swallowed exception"),
    "suppress": ("run/a.py", "import contextlib\nwith contextlib.suppress(Exception):\n    f()", "a swallowed exception"),
}

GOOD = {
    "downwards": ("methods/a.py", "from fedloom.client.client import Client\nfrom fedloom import tensors"),
    "same floor, not blind": ("compute/a.py", "from fedloom.client.client import Client"),
    "same place": ("data/a.py", "from fedloom.data.tasks import x"),
    "at a door that is a folder": ("data/a.py", "import pyarrow.csv"),
    "at the door": ("engines/flower.py", "from flwr.app import Message"),
    "standard library": ("wire.py", "import json\nfrom collections.abc import Mapping"),
    "getattr without default": ("data/a.py", "getattr(x, 'y')"),
    "a named exception": ("run/a.py", "try:\n    f()\nexcept FileNotFoundError:\n    pass"),
    "an exception's message": ("run/a.py", "class A(ValueError):\n    def __init__(self):\n        super().__init__('x')"),
}


@pytest.mark.parametrize(("path", "source", "said"), BAD.values(), ids=BAD)
def test_the_checker_catches(path: str, source: str, said: str) -> None:
    found = faults(path, source)
    assert len(found) == 1
    assert said in found[0]


@pytest.mark.parametrize(("path", "source"), GOOD.values(), ids=GOOD)
def test_the_checker_lets_pass(path: str, source: str) -> None:
    assert faults(path, source) == []


def test_it_sees_the_whole_package() -> None:
    assert {"messages.py", "seeds.py", "data/examples.py", "compute/work.py", "client/client.py"} <= set(FILES)


@pytest.mark.parametrize("path", FILES)
def test_file_keeps_the_house(path: str) -> None:
    assert faults(path, (SOURCE / path).read_text(encoding="utf-8")) == []


OF_EXTRAS = {"flwr", "fastapi", "starlette", "uvicorn", "httpx", "cryptography", "tensorboard", "mlflow", "wandb"}
"""Libraries that an extra brings."""


def test_the_package_requires_what_it_imports_and_nothing_else() -> None:
    """Whatever a door opens to is asked for by name: another library that brings it today may not tomorrow."""
    project = tomllib.loads((Path(__file__).parents[2] / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    required = {re.match(r"[\w.-]+", line)[0] for line in project["dependencies"]}  # type: ignore[index]
    found = {module.split(".")[0] for path in FILES for _, module in imported(ast.parse((SOURCE / path).read_text(encoding="utf-8")))}
    assert found - sys.stdlib_module_names - OF_EXTRAS - {"fedloom"} == required


LATE = {"matplotlib", "jinja2", "datasets", "pandas", "sklearn", "scipy", "flwr", "tensorboard", "mlflow", "wandb"}
"""Libraries that ``fedloom run`` does not load before its first round: each takes a third of a second, or more, and is not needed yet."""


def loaded_with(tree: ast.AST) -> Iterator[str]:
    """The modules that loading a file loads: those of its imports outside functions and ``if TYPE_CHECKING``."""
    waiting: list[ast.AST] = [tree]
    while waiting:
        node = waiting.pop()
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda):
            continue
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            continue
        if isinstance(node, ast.Import | ast.ImportFrom):
            yield from (module for _, module in imported(node))
            if isinstance(node, ast.ImportFrom) and node.module:
                yield from (f"{node.module}.{alias.name}" for alias in node.names)
        waiting.extend(ast.iter_child_nodes(node))


def loaded_by(paths: set[str]) -> dict[str, str]:
    """Every library that loading these files of the package loads -> the file that does."""
    found: dict[str, str] = {}
    waiting, seen = sorted(paths), set()
    while waiting:
        path = waiting.pop()
        if path in seen:
            continue
        seen.add(path)
        for module in loaded_with(ast.parse((SOURCE / path).read_text(encoding="utf-8"))):
            if module.split(".")[0] != "fedloom":
                found.setdefault(module.split(".")[0], path)
            for file in (f"{module.replace('.', '/')}.py", f"{module.replace('.', '/')}/__init__.py"):
                if file.startswith("fedloom/") and (SOURCE.parent / file).is_file():
                    waiting.append(file.removeprefix("fedloom/"))
    return found


def test_what_loading_a_file_loads() -> None:
    source = """
import a.b
from fedloom.data import sources
if TYPE_CHECKING:
    import c
def f():
    import d
class K:
    import e
try:
    from g import h
except ImportError:
    pass
"""
    assert {name.split(".")[0] for name in loaded_with(ast.parse(source))} == {"a", "fedloom", "e", "g"}
    assert "fedloom.data.sources" in set(loaded_with(ast.parse(source)))


def test_a_run_loads_nothing_it_does_not_need_before_its_first_round() -> None:
    loaded = loaded_by(
        {
            "cli.py",
            "run/terminal/options.py",
            "run/recipes.py",
            "run/terminal/console.py",
            "run/comparison/compare.py",
            "run/loop.py",
            "methods/fedavg.py",
        }
    )
    assert {"torch", "peft", "transformers", "pyarrow", "tyro", "rich"} <= set(loaded), "it looks far enough"
    assert {name: file for name, file in loaded.items() if name in LATE} == {}
    assert {"matplotlib", "jinja2"} <= set(loaded_by({"run/pages/report.py"}))
