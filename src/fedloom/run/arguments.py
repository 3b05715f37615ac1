"""What the commands about run folders take: required fields are words, the others options. Imports nothing heavy.

The options of the commands that start from an experiment are made in ``options.py``.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Report:
    """An HTML page about run folders, or about the folder of a comparison.

    Attributes:
        folders: run folders, or folders of comparisons.
        out: the file to write (default: report.html in the folder, or here if several were named).
    """

    folders: tuple[Path, ...]
    out: Path | None = None


@dataclass(frozen=True)
class Export:
    """Write what a run trained as a folder that ``peft.PeftModel.from_pretrained`` loads.

    Attributes:
        folder: the run folder.
        out: the folder to write; it must be new or empty.
        client: that device's own model, instead of the shared one.
        merge: merge the adapter into the model: a folder that transformers loads by itself.
        recipe: the Python file that defines the run's method, if it is not one of the package.
    """

    folder: Path
    out: Path
    client: int | None = None
    merge: bool = False
    recipe: Path | None = None


@dataclass(frozen=True)
class Evaluate:
    """Evaluate the last checkpoint of a run again, by both protocols, and say whether it gives what was recorded.

    Attributes:
        folder: the run folder.
        method: evaluate what was trained as this method instead (a run of lora as lora-finetuned or lora-prior).
        recipe: the Python file that defines the run's method, if it is not one of the package.
    """

    folder: Path
    method: str | None = None
    recipe: Path | None = None


@dataclass(frozen=True)
class Nothing:
    """No options."""
