"""Every random choice has a path: ``derive(seed, "cohort", t)`` is one stream, whatever was drawn before it.

Nothing here keeps state, so a resumed run needs no replay and the order of clients cannot matter.
"""

from __future__ import annotations

import hashlib

import numpy as np

Part = str | int


def derive_int(seed: int, *path: Part) -> int:
    """A 63-bit integer that depends on the seed and the whole path, the same on every machine.

    Raises:
        ValueError: the path is empty; two purposes would then share one stream.
    """
    if not path:
        raise ValueError("derive needs a path that names the purpose, such as derive(seed, 'cohort', round)")
    text = repr((int(seed), *(p if isinstance(p, str) else int(p) for p in path)))
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") >> 1


def derive(seed: int, *path: Part) -> np.random.Generator:
    """A NumPy generator for one purpose: ``derive(seed, "batches", round, client)``."""
    return np.random.default_rng(derive_int(seed, *path))
