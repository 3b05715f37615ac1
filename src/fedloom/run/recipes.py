"""What the word after ``fedloom run`` stands for: a method's name, a Python file, or an experiment saved by a run; each with a curriculum
behind a plus, if it is to have one.

This module does not know options or the command line.
"""

from __future__ import annotations

import dataclasses
import hashlib
import importlib.util
import json
import logging
import re
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

from fedloom.client.curricula import all_curricula
from fedloom.finding import meant
from fedloom.methods import all_methods, methods_in
from fedloom.methods.method import parts
from fedloom.run.errors import ExperimentError
from fedloom.run.experiment import Experiment, as_meant, from_json
from fedloom.run.reading import flat_settings

log = logging.getLogger("fedloom")


@dataclass(frozen=True)
class Recipe:
    """A kind of method, the experiment to start from where the word named one, and the method to start from where it is not the default."""

    kind: type[Any]
    experiment: Experiment | None = None
    start: Any = None

    @property
    def method(self) -> Any:
        """The method as the recipe has it, or with its defaults."""
        return self.experiment.method if self.experiment else self.start or self.kind()


def resolve(word: str) -> Recipe:
    """The recipe that ``word`` names: METHOD, FILE.py, FILE.py:METHOD, or an ``experiment.json`` (or the run folder that holds it), each
    alone or as WORD+CURRICULUM. Where something lies here that is called as a method is, the method is meant, and the other by ./WORD.

    Raises:
        ExperimentError: it names none; the message lists what there is.
    """
    base, plus, curriculum = word.rpartition("+")
    known = all_methods()
    if plus and ((base in known and curriculum in all_curricula()) or not Path(word).exists()):
        return _with_curriculum(resolve(base), curriculum)
    if word in known:
        return Recipe(known[word])
    path, _, chosen = word.partition(".py:") if ".py:" in word else (word, "", "")
    path = Path(f"{path}.py" if chosen else path).expanduser()
    if path.suffix == ".py":
        return _of_module(path, chosen)
    if path.suffix == ".json" or (path / "experiment.json").is_file():
        saved = experiment_in(path)
        return Recipe(type(saved.method), saved)
    raise ExperimentError(
        f"there is no method '{word}'.{meant(word, known)} There are: {', '.join(known)}. A Python file that defines a method, or the "
        "experiment.json of a run, works too"
    )


def experiment_in(path: Path, recipe: Path | None = None) -> Experiment:
    """The experiment that a run folder or a JSON file holds; ``recipe`` is the Python file of its method, if it is not the package's.

    Raises:
        ExperimentError: there is none, or it is not one.
    """
    file = path if path.suffix == ".json" else path / "experiment.json"
    if not file.is_file():
        held = sorted(p.name for p in path.iterdir())[:8] if path.is_dir() else None
        what = f"it holds {held}" if held is not None else "it does not exist"
        raise ExperimentError(f"{path} is no run folder: {what}. Give the folder that 'fedloom run' wrote; it has an experiment.json")
    try:
        saved = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ExperimentError(f"{file} is not JSON ({error}); give the experiment.json of a run") from error
    if not isinstance(saved, dict):
        raise ExperimentError(f"{file} is no experiment: a JSON object is needed, a {type(saved).__name__} came")
    method = saved.get("method")
    if recipe is None and isinstance(method, dict) and method.get("name") not in all_methods():
        raise ExperimentError(
            f"{file} is of the method '{method.get('name')}', which is none of the package's ({', '.join(all_methods())}); give the "
            "Python file that defines it: --recipe FILE, or fedloom run FILE"
        )
    if recipe is None:
        return from_json(saved)
    found = from_json(saved, _methods_of(_module(recipe), recipe))
    if found.method.name in all_methods() and file_of(found.method) is not None:
        log.warning("%s is read as a run of %s's '%s', and not of the package's method of that name", file, recipe, found.method.name)
    return found


def file_of(method: Any) -> str | None:
    """The Python file that defines a method, from which another process can load it; None for the package's, "" if there is none."""
    module = sys.modules[type(method).__module__]
    return None if module.__name__.startswith("fedloom.") else str(vars(module).get("__file__", ""))


def kind_in(path: Path, name: str) -> type[Any]:
    """The method called ``name`` of a Python file.

    Raises:
        ExperimentError: it defines none of that name.
    """
    methods = _methods_of(_module(path), path)
    if name not in methods:
        said = f"defines no method '{name}'; it defines {', '.join(methods)}"
        raise ExperimentError(f"{path} {said}", f"the recipe {said}")
    return methods[name]


def with_learning_rate(method: Any, lr: float) -> Any:
    """``method`` with its field ``lr``, or that of the method it holds as ``inner``, replaced.

    Raises:
        ExperimentError: it has neither.
    """
    if (made := _replaced(method, "lr", lr)) is None:
        *_, last = parts(method)
        raise ExperimentError(f"--lr: {type(last).__name__} has no field 'lr' or 'inner'; it has {_fields(last)}")
    return made


def with_curriculum(method: Any, curriculum: Any) -> Any:
    """``method`` with its field ``curriculum``, or that of the method it holds as ``inner``, replaced.

    Raises:
        ExperimentError: it has neither, or takes no curriculum.
    """
    try:
        made = _replaced(method, "curriculum", curriculum)
    except ValueError as refused:
        raise ExperimentError(str(refused)) from refused
    if made is None:
        *_, last = parts(method)
        raise ExperimentError(f"{type(last).__name__} takes no curriculum: it has no field 'curriculum' or 'inner'; it has {_fields(last)}")
    return made


def _replaced(method: Any, name: str, value: Any) -> Any:
    """``method`` with the field of that name, its own or that of the first below it that has it, replaced; None if none has."""
    above = list[Any]()
    for part in parts(method):
        if name in _fields(part):
            made = dataclasses.replace(part, **{name: value})
            for outer in reversed(above):
                made = dataclasses.replace(outer, inner=made)
            return made
        above.append(part)
    return None


def _fields(method: Any) -> list[str]:
    return [f.name for f in dataclasses.fields(method)]


def _with_curriculum(recipe: Recipe, name: str) -> Recipe:
    known = all_curricula()
    if name not in known:
        raise ExperimentError(f"there is no curriculum '{name}'.{meant(name, known)} There are: {', '.join(known)}")
    method = with_curriculum(recipe.method, known[name]())
    return Recipe(recipe.kind, dataclasses.replace(recipe.experiment, method=method) if recipe.experiment else None, method)


def default_folder(experiment: Experiment, served: bool = False) -> Path:
    """``runs/METHOD-DATA-DIGEST``: the same experiment has the same folder, another one another; and another one if it is ``served``, for
    the same experiment says nothing of the data that devices bring."""
    return Path("runs") / f"{experiment.method_name}-{data_name(experiment)}-{experiment.digest()[:8]}{'-served' if served else ''}"


def comparison_folder(experiments: Sequence[Experiment], shared: bool = False) -> Path:
    """``runs/compare-DATA-DIGEST``, by the same rule; another one if trainings are ``shared``, for then less is known of a run."""
    digest = hashlib.sha256(" ".join(e.digest() for e in experiments).encode()).hexdigest()
    return Path("runs") / f"compare-{data_name(experiments[0])}-{digest[:8]}{'-shared' if shared else ''}"


def passed_over(saved: Experiment, runs: Sequence[Experiment]) -> list[str]:
    """What an experiment says, but for its method and how to compute, and none of the ``runs`` of that method does: ``rounds is 2 there and
    20 here``."""
    theirs = {name: value for name, value in as_meant(saved).items() if name not in ("method", *Experiment.HOW)}
    ours = [flat_settings(as_meant(run)) for run in runs if type(run.method) is type(saved.method)]
    told = []
    for name, value in flat_settings(theirs).items():
        here = list(dict.fromkeys(repr(run[name]) for run in ours))
        if repr(value) not in here:
            told.append(f"{name} is {value!r} there and {', '.join(here)} here")
    return told


def data_name(experiment: Experiment) -> str:
    """The data's name as part of a file name."""
    return re.sub(r"[^\w.-]+", "-", Path(experiment.data).name).strip("-.") or "data"


def _of_module(path: Path, chosen: str) -> Recipe:
    module = _module(path)
    found = vars(module).get("experiment")
    if isinstance(found, Experiment) and not chosen:
        return _with_a_name_of_its_own(Recipe(type(found.method), found), path)
    methods = _methods_of(module, path)
    if chosen and chosen not in methods:
        raise ExperimentError(f"{path} defines no method '{chosen}'; it defines {', '.join(methods)}")
    if not chosen and len(methods) > 1:
        raise ExperimentError(f"{path} defines several methods; name one: " + ", ".join(f"{path}:{name}" for name in methods))
    return _with_a_name_of_its_own(Recipe(methods[chosen] if chosen else next(iter(methods.values()))), path)


def _with_a_name_of_its_own(recipe: Recipe, path: Path) -> Recipe:
    """The recipe, unless its saved runs would be taken for those of another method."""
    name = recipe.kind.name
    if recipe.kind is not all_methods().get(name, recipe.kind):
        raise ExperimentError(
            f"{path} calls its method '{name}', as one of the package's is called, and whoever reads its runs would take them for that "
            "one's; give it another name"
        )
    return recipe


def _methods_of(module: ModuleType, path: Path) -> dict[str, type[Any]]:
    try:
        methods = methods_in(module)
    except ValueError as refused:
        raise ExperimentError(f"{path}: {refused}", f"the recipe: {refused}") from refused
    if not methods:
        raise ExperimentError(
            f"{path} defines no method (a dataclass with the class attributes 'name' and 'paper') and no Experiment named "
            "'experiment'; the tutorial shows both",
            "the recipe defines no method",
        )
    return methods


def _module(path: Path) -> ModuleType:
    if not path.is_file():
        raise ExperimentError(
            f"there is no recipe '{path}'; give a Python file, or a method's name (fedloom methods lists them)", "there is no recipe"
        )
    name = f"fedloom_recipe_{re.sub(r'[^0-9a-zA-Z]', '_', path.stem)}"
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # dataclasses look their module up
    try:
        spec.loader.exec_module(module)
    except Exception as error:  # whatever the file does wrong is told, with its place
        place = f"line {error.lineno}" if isinstance(error, SyntaxError) else _last_line(error, path)
        said = f"cannot be loaded: {type(error).__name__} in {place}"
        raise ExperimentError(f"the recipe {path} {said}: {error}", f"the recipe {said}") from error
    return module


def _last_line(error: Exception, path: Path) -> str:
    trace, line = error.__traceback__, 0
    while trace is not None:
        line = trace.tb_lineno if Path(trace.tb_frame.f_code.co_filename).resolve() == path.resolve() else line
        trace = trace.tb_next
    return f"line {line}"
