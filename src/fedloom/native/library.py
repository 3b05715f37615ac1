"""The C kernels, compiled on first use for the processor at hand, kept in the user's cache, and called through ctypes.

PyTorch's operations start in some microseconds each, which is what most of them take on a text of a dozen tokens: in a packed pass of many
small models a third to a half of the time went to gathering, padding and scattering around small products. ``kernels.c`` does these in
loops over texts and owners. Nothing needs it: without a C compiler (``cc``, or what ``CC`` names), or with ``FEDLOOM_NATIVE=0``, the same
formulas run as PyTorch operations, slower; ``fedloom doctor`` says which. Results differ in their last bits between the two, so a run is
resumed to the bit only where it began.

This module knows tensors and numbers; what they mean is said where it is called (``model/kernels.py``, ``tensors.py``).
"""

from __future__ import annotations

import ctypes
import functools
import hashlib
import logging
import os
import platform
import shutil
import subprocess
import tempfile
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch

from fedloom import cache

log = logging.getLogger("fedloom")

VARIABLE = "FEDLOOM_NATIVE"
"""The environment variable that turns the kernels off (0)."""

SOURCE = Path(__file__).with_name("kernels.c")
FLAGS = ("-std=gnu11", "-O3", "-fno-math-errno", "-fopenmp", "-shared", "-fPIC")
TUNED = ("-march=native", "-mcpu=native", "")
"""How compilers are told to use all that the processor has; the first that this one takes."""

PATIENCE = 120
"""Seconds that a compiler may take."""

whole, number, place = ctypes.c_int64, ctypes.c_float, ctypes.c_void_p
flag = ctypes.c_int
SIGNATURES: dict[str, tuple[object, ...]] = {
    "owned_forward": (whole, place, *[whole] * 4, *[place] * 6, flag, flag),
    "owned_backward": (whole, place, *[whole] * 4, *[place] * 8, flag, flag),
    "attention_forward": (whole, *[place] * 4, *[whole] * 3, *[place] * 5, number, flag, whole, flag),
    "attention_backward": (whole, *[place] * 3, *[whole] * 3, *[place] * 8, number, flag),
    "gelu": (whole, place, place, place, flag, flag),
    "weighted_sum": (whole, whole, place, place, place, flag),
}
"""The functions of ``kernels.c`` and what they take, in its order."""


class Unavailable(RuntimeError):
    """Why there are no C kernels here."""


@functools.cache
def why_not() -> str:
    """Why the kernels cannot be used; "" if they can."""
    try:
        _library()
    except Unavailable as why:
        return str(why)
    return ""


def takes(*tensors: torch.Tensor) -> bool:
    """Whether the kernels are there for such tensors: all on a processor, all float32 or all bfloat16."""
    dtypes = {tensor.dtype for tensor in tensors}
    alike = len(dtypes) == 1 and dtypes <= {torch.float32, torch.bfloat16}
    return alike and all(tensor.device.type == "cpu" for tensor in tensors) and not why_not()


def call(function: str, *arguments: object) -> None:
    """Call a kernel: tensors and arrays (contiguous) go by where they lie, None by nowhere; the number of threads is PyTorch's.

    Raises:
        MemoryError: it could not get the few kilobytes a thread that it works in.
    """
    given = [_place(argument) if isinstance(argument, torch.Tensor | np.ndarray) else argument for argument in arguments]
    if getattr(_library(), function)(*given, torch.get_num_threads()):
        raise MemoryError(f"not enough memory for the working space of '{function}'")


def weighted_sum(tensors: Sequence[torch.Tensor], weights: Sequence[float], sums: torch.Tensor) -> None:
    """sums (n,) float64 += Σ weight · tensor (n,) float32, one after another.

    Raises:
        TypeError: sums of another precision.
    """
    if sums.dtype is not torch.float64:
        raise TypeError(f"the sums are {sums.dtype}; they must be torch.float64")
    places = np.array([tensor.data_ptr() for tensor in tensors], np.uint64)
    call("weighted_sum", sums.numel(), len(tensors), places, np.array(weights, np.float64), sums)


def _place(argument: torch.Tensor | np.ndarray) -> int:
    return argument.data_ptr() if isinstance(argument, torch.Tensor) else argument.ctypes.data


@functools.cache
def _library() -> ctypes.CDLL:
    """The compiled file, loaded.

    Raises:
        Unavailable: turned off, no compiler, or one that fails.
    """
    if os.environ.get(VARIABLE, "1") == "0":
        raise Unavailable(f"turned off by {VARIABLE}=0")
    compiler = shutil.which(os.environ.get("CC") or "cc")
    if compiler is None:
        raise Unavailable(f"no C compiler '{os.environ.get('CC') or 'cc'}' was found; install one (Debian: apt install gcc)")
    try:
        library = ctypes.CDLL(str(_compiled(compiler)))
        for name, takes in SIGNATURES.items():
            getattr(library, name).argtypes = takes
            getattr(library, name).restype = None if name in ("gelu", "weighted_sum") else flag
    except (OSError, RuntimeError, AttributeError, subprocess.SubprocessError) as error:
        told = error.stderr if isinstance(error, subprocess.CalledProcessError) else str(error)
        why = f"{compiler} did not make them: {told.strip()[:300]}"
        log.warning("small operations run as PyTorch operations, slower: %s", why)
        raise Unavailable(why) from error
    return library


def _compiled(compiler: str) -> Path:
    """The shared library for this source, compiler and processor; compiled if it is not in the cache."""
    about = os.stat(compiler)
    told = [
        SOURCE.read_text(encoding="utf-8"),
        *FLAGS,
        os.path.realpath(compiler),
        str(about.st_size),
        str(about.st_mtime_ns),
        _processor(),
    ]
    path = cache.folder() / "native" / (hashlib.sha256("\0".join(told).encode()).hexdigest() + ".so")
    if path.exists() and path.stat().st_uid == os.getuid():  # what others wrote is not run
        return path
    path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=path.parent, prefix=".") as scratch:
        made = Path(scratch) / path.name
        for i, tuned in enumerate(TUNED):
            command = [compiler, *FLAGS, *([tuned] if tuned else []), str(SOURCE), "-o", str(made), "-lm"]
            try:
                subprocess.run(command, check=True, capture_output=True, text=True, timeout=PATIENCE)
                break
            except subprocess.CalledProcessError:
                if i + 1 == len(TUNED):
                    raise
        os.replace(made, path)  # whole or not at all: several workers may come here at once
    return path


def _processor() -> str:
    """What ``-march=native`` depends on."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.machine() + platform.processor()
    named = ("flags", "Features", "model name", "CPU part")
    return "\n".join([platform.machine(), *dict.fromkeys(line for line in lines if line.startswith(named))])
