"""A virtual environment for each peer that has a ``requirements.txt``, under ``bench/.venvs``; the others run in Fedloom's own.

PyTorch goes in first and by itself, as everywhere in this project, so that pip takes a CPU build where one is provided; the rest is held
to ``constraints.txt``, so that every contestant has the same PyTorch, transformers and PEFT.
"""

from __future__ import annotations

import hashlib
import shutil
import subprocess
import sys
import time
from pathlib import Path

PEERS = Path(__file__).parent
ROOT = PEERS.parent.parent
VENVS = ROOT / "bench" / ".venvs"
CONSTRAINTS = ROOT / "constraints.txt"
TORCH = "torch==2.13.0"


class NotInstalled(RuntimeError):
    """A peer's released packages could not be installed; the message is pip's own."""


def python_of(peer: str) -> Path:
    """The Python that runs ``bench/peers/PEER/run.py``; its environment is built first if it is not there or out of date.

    Raises:
        NotInstalled: pip could not install the requirements.
    """
    requirements = PEERS / peer / "requirements.txt"
    if not requirements.exists():
        return Path(sys.executable)
    folder = VENVS / peer
    python, stamp = folder / "bin" / "python", folder / ".installed"
    wanted = hashlib.sha256(TORCH.encode() + requirements.read_bytes() + CONSTRAINTS.read_bytes()).hexdigest()
    if stamp.exists() and stamp.read_text() == wanted:
        return python
    print(f"bench: building bench/.venvs/{peer} (once, one or two minutes)", flush=True)
    began = time.perf_counter()
    shutil.rmtree(folder, ignore_errors=True)
    _run([sys.executable, "-m", "venv", "--without-pip", str(folder)])
    pip = [sys.executable, "-m", "pip", "--python", str(python), "install", "--quiet"]
    _run([*pip, TORCH])
    _run([*pip, "-c", str(CONSTRAINTS), "-r", str(requirements)])
    stamp.write_text(wanted)
    print(f"bench: built in {time.perf_counter() - began:.0f} s", flush=True)
    return python


def _run(command: list[str]) -> None:
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        errors = [line for line in done.stderr.splitlines() if line.startswith("ERROR")] or done.stderr.splitlines()[-1:]
        raise NotInstalled(" ".join(errors)[:600])
