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
        folder: the run folder; or, on a device of a federation, the folder of its fedloom join: the device's own model, as it predicted
            last.
        out: the folder to write; it must be new or empty.
        client: that device's own model, instead of the shared one.
        merge: merge the adapter into the model: a folder that transformers loads by itself. What trained no adapter is always such a one.
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
class Certs:
    """Make what a federation is secured with: an authority, the server's certificate, a key for each device. What is there stays, so the
    same command with more devices adds them.

    Attributes:
        folder: where they go: FOLDER/server for the server, FOLDER/device-K for device K, FOLDER/ca.key for nobody's eyes.
        devices: number of devices.
        names: the names and addresses under which devices reach the server.
    """

    folder: Path
    devices: int = 4
    names: tuple[str, ...] = ("localhost", "127.0.0.1")


@dataclass(frozen=True)
class Join:
    """Take part in a federation with this machine's own data: training, validation and test rows never leave it. It goes on until Ctrl-C,
    waits for a server that is away, and starts its worker anew if that dies.

    Attributes:
        server: HOST:PORT, as the server's certificate names it.
        data: folder or file of Parquet, CSV or JSON lines; labels are known by the names that the server's data gives them.
        certs: this device's folder from fedloom certs: ca.pem and device.key.
        model: folder or name of the model, if it lies elsewhere than the experiment says; it must be the same one.
        text: text column or columns (empty: found).
        label: label column (empty: found).
        recipe: the Python file of the server's method, if it is not the package's: the same file as there.
        threads: CPU threads (0: PyTorch's default).
        recompute: keep nothing of what is inside the model's layers for backward passes, and compute it again there: less memory, more
            time.
        memory: GiB that the process may hold that computes here; one that holds more is ended, its task has failed, and another is started
            for the next (0: nine tenths of what this machine has). A model that by prediction does not fit, into this or, of 0, into what
            is free, is not loaded.
        deadline: seconds that one task may take here.
        out: where this device keeps its state, and its own model, which fedloom export takes out (default: one named after the data).
    """

    server: str
    data: str
    certs: Path = Path("certs")
    model: str = ""
    text: tuple[str, ...] = ()
    label: str = ""
    recipe: Path | None = None
    threads: int = 0
    recompute: bool = False
    memory: float = 0.0
    deadline: float = 3600.0
    out: Path | None = None


@dataclass(frozen=True)
class Status:
    """Who is in a federation and how far it is: asked of the server, by anybody who has a key of it.

    Attributes:
        server: HOST:PORT, as the server's certificate names it.
        certs: a device's folder from fedloom certs.
    """

    server: str
    certs: Path = Path("certs")


@dataclass(frozen=True)
class Nothing:
    """No options."""
