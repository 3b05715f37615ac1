"""What the two sides of a real federation tell each other before the first task: which experiment it is, and what a device brings to it.

The server tells all that decides a result, what labels mean, and which model, release and method's file it must be; a device that has
another is refused with the mend. Code and data never travel.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, replace
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fedloom.run.errors import ExperimentError

if TYPE_CHECKING:
    from fedloom.data.sources import Source
    from fedloom.data.tasks import Task as DataTask
    from fedloom.run.world import World


@dataclass(frozen=True)
class Own:
    """What a device brings: its data, where its columns or its model are others than the experiment's, and the Python file of a method that
    is not the package's. ``memory``: bytes that its process may hold, and whether its owner has ``said`` so; 0: what is free. ``folder``:
    where the process may write, if anywhere."""

    data: str
    model: str = ""
    text: tuple[str, ...] = ()
    label: str = ""
    threads: int = 0
    recipe: str = ""
    recompute: bool = False
    memory: int = 0
    said: bool = False
    folder: str = ""


def greeting_of(world: World) -> dict[str, Any]:
    """What a device is told of the experiment (JSON): all that decides a result, what labels mean, which model and release it must be."""
    from fedloom.run.experiment import as_json
    from fedloom.run.starting import identity

    return {
        "release": version("fedloom"),
        "experiment": as_json(world.experiment),
        "recipe": recipe_digest(world.experiment.method),
        "task": task_of(world.source),
        "model": identity(world.model),
    }


def task_of(source: Source) -> dict[str, Any]:
    """What a device is told of the server's data (JSON): the task, and what names it has for what."""
    task = source.task
    return {
        "kind": kind_of(task),
        "name": source.name,
        "classes": list(task.classes),
        "metric": task.metric,
        "tags": tags_of(task),
        **columns_of(task),
    }


def kind_of(task: DataTask) -> str:
    """The task's kind as ``--task`` names it."""
    from fedloom.data.instructions import Instructions
    from fedloom.data.questions import Questions
    from fedloom.data.tagging import Tagging

    if isinstance(task, Tagging):
        return "tagging"
    if isinstance(task, Questions):
        return "qa"
    if isinstance(task, Instructions):
        return task.form
    return "classification"


def tags_of(task: DataTask) -> list[str]:
    """The tags' names; none where the task has no tags."""
    from fedloom.data.tagging import Tagging

    return list(task.tags) if isinstance(task, Tagging) else []


def columns_of(task: DataTask) -> dict[str, Any]:
    """The columns that are read: of texts, and of labels where the task learns to tell those. Of tagging words and tags are one each."""
    from fedloom.data.tagging import Tagging
    from fedloom.data.tasks import Classification

    if isinstance(task, Tagging):
        return {"text": [task.words], "label": task.tagged}
    return {"text": list(task.texts), "label": task.label if isinstance(task, Classification) else ""}


def source_of(greeting: Mapping[str, Any], own: Own, seed: int) -> Source:
    """The device's own data, with labels as the server's task numbers them, out of the columns that the server reads where the device has
    them and its owner names no others.

    Raises:
        DataError: it cannot be read so.
    """
    from fedloom.data.sources import Names, load

    task = greeting["task"]
    classes, tags = tuple(map(str, task["classes"])), tuple(map(str, task["tags"]))
    learns = task["kind"] in ("classification", "tagging", "qa")
    found = load(
        own.data,
        seed=seed,
        text=own.text,
        label=own.label,
        elsewhere=Names(tuple(map(str, task.get("text", ()))), str(task.get("label", ""))),
        task=task["kind"],
        metric=task["metric"] if task["kind"] == "classification" else "auto",
        classes=classes if learns else (),
        tags=tags,
    )
    return replace(found, name=str(task["name"]))


def insist_same_release(greeting: Mapping[str, Any]) -> None:
    """Insist that the server is of this release: others compute, write and check otherwise, and nothing else might show it.

    Raises:
        ExperimentError: it is not.
    """
    from fedloom.wire import SHORT

    theirs, here = str(greeting.get("release", "of an earlier release")), version("fedloom")
    if theirs != here:
        raise ExperimentError(
            f"the server is Fedloom {SHORT.repr(theirs)}, and this device {here!r}; install the same release on both sides"
        )


def recipe_digest(method: Any) -> str:
    """What the Python file of a method comes to; empty for one of the package.

    Raises:
        ExperimentError: a method that no file defines.
    """
    from fedloom.run.recipes import file_of

    file = file_of(method)
    if file == "":
        raise ExperimentError("the method is defined in no Python file, so devices cannot have it; put it into one")
    return "" if file is None else digest_of_file(Path(file))


def digest_of_file(path: Path) -> str:
    """16 hex digits over a Python file as it is; of the files that it imports, nothing.

    Raises:
        ExperimentError: there is none.
    """
    if not path.is_file():
        raise ExperimentError(f"there is no recipe '{path}'; give a Python file that defines the method", "there is no recipe")
    return hashlib.sha256(path.read_bytes()).hexdigest()[:16]


def kinds_of(greeting: Mapping[str, Any], own: Own) -> dict[str, type[Any]]:
    """The experiment's method by its name, out of this device's own file, where the server has it from a file too; nothing otherwise, and
    then the file is not looked at. The two files must be the same, byte for byte.

    Raises:
        ExperimentError: this device has no such file, or another.
    """
    from fedloom.run.recipes import kind_in
    from fedloom.wire import SHORT

    wanted, name = greeting["recipe"], greeting["experiment"]["method"]["name"]
    if not wanted:
        return {}
    if not own.recipe:
        raise ExperimentError(
            f"the server's method {SHORT.repr(name)} is out of a Python file of its own, which comes to {SHORT.repr(wanted)}; code is "
            "never sent: have the same file here, and give it as --recipe FILE"
        )
    found = digest_of_file(Path(own.recipe))
    if found != wanted:
        said = (
            f"comes to {found}, and the server's to {SHORT.repr(wanted)}; the method's file must be the same on both sides, byte for byte"
        )
        raise ExperimentError(f"the file {own.recipe} {said}", f"this device's recipe {said}")
    return {str(name): kind_in(Path(own.recipe), str(name))}
