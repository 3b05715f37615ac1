"""How work is divided into passes: as many texts in each as pay and memory allows, and fewer where it runs out all the same.

Nothing here knows what is computed in a pass. Shapes: n texts.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch

from fedloom.compute.work import Fit, Initial, Pretrained, WorkItem
from fedloom.data.examples import Examples
from fedloom.model.base import Model
from fedloom.model.machine import own_part
from fedloom.model.memory import kept as kept_bytes
from fedloom.model.ways import Extent, computed

log = logging.getLogger("fedloom")

TOKENS = {"cpu": 2048, "cuda": 65536}
"""Tokens in one pass at most: beyond it nothing gets faster."""

CHUNK = 512
"""Tokens of one client that are predicted together."""

MEMORY_SHARE = 0.4
"""Share of the free memory that a pass may fill."""

SPENT = ("not enough memory", "can't allocate", "CUDA error: out of memory", "CUBLAS_STATUS_ALLOC_FAILED", "CUDNN_STATUS_ALLOC_FAILED")
"""Words of plain errors by which PyTorch and the libraries below it say that there is no memory left."""


class Part(NamedTuple):
    """Some texts of one item: its number among the items, positions in its examples, and the place in its batch of the first of them."""

    item: int
    rows: np.ndarray
    first: int = 0


class Passes:
    """Passes through one model. ``tokens``: what one computes at most, which is less once memory has run out."""

    def __init__(self, model: Model) -> None:
        self.model, self.tokens = model, TOKENS.get(model.device.type, TOKENS["cpu"])

    def do(self, items: Sequence[Any], parts: Sequence[Part], act: Callable[[list[Part]], None], each: int = 0, unsplit: str = "") -> None:
        """Have all ``parts`` acted on, as many at once as a pass may hold. ``each``: bytes that a part needs besides its tokens.
        ``unsplit``: for what the texts of a part must be together.

        When memory runs out all the same, passes get smaller, for good; a part that does not fit alone is halved, unless it must stay
        whole.

        Raises:
            MemoryError: a single text does not fit, or a part that must stay whole. Passes then hold what they held before.
        """
        waiting, before = list(reversed(parts)), self.tokens
        per_token, by = pass_bytes(self.model), self.model.together_by
        lengths = {k: items[k].examples.lengths for k in {part.item for part in parts}}
        while waiting:
            free = MEMORY_SHARE * own_part(self.model.device)
            taken, extent = [], Extent()
            while waiting:
                more = extent.and_of(lengths[waiting[-1].item][waiting[-1].rows])
                tokens = computed(by, more)
                if taken and (tokens > self.tokens or tokens * per_token + (len(taken) + 1) * each > free):
                    break
                taken.append(waiting.pop())
                extent = more
            tokens = computed(by, extent)
            try:
                act(taken)
            except (MemoryError, RuntimeError) as error:
                if not out_of_memory(error):
                    raise
                if len(taken) == 1 and (unsplit or len(taken[0].rows) == 1):
                    self.tokens, count = before, len(taken[0].rows)
                    one = f"one text of {tokens} tokens does not fit into memory ({error}); use a shorter --max-length or a smaller model"
                    many = f"a batch of {count} texts does not fit into memory for its {unsplit} ({error}); take a smaller batch size"
                    raise MemoryError(one if count == 1 else many) from error
                self.tokens = max(1, tokens // 2)
                log.warning("a pass of %d tokens ran out of memory; passes hold at most %d from here on", tokens, self.tokens)
                if len(taken) == 1:
                    item, rows, first = taken[0]
                    half = len(rows) // 2
                    taken = [Part(item, rows[:half], first), Part(item, rows[half:], first + half)]
                waiting += reversed(taken)


def chunks(item: int, examples: Examples) -> list[Part]:
    """All examples in parts of about :data:`CHUNK` tokens; where they are cut depends on the item alone."""
    if not len(examples):
        return []
    cuts = np.flatnonzero(np.diff((np.cumsum(examples.lengths) - 1) // CHUNK)) + 1
    return [Part(item, rows) for rows in np.split(np.arange(len(examples)), cuts)]


def states_that_fit(item: WorkItem, device: torch.device) -> int:
    """How many clients' tensors fit into memory at once, at least one: what is trained, what training keeps beside it, and what stays."""
    if isinstance(item, Pretrained | Initial):
        return 1
    numbers, beside = sum(t.numel() for t in (item.start if isinstance(item, Fit) else item.at).values()), 0
    if isinstance(item, Fit):
        kept = 8 + 2 * (item.watch is not None) + item.means + (item.anchor is not None) + bool(item.mask) + bool(item.correction)
        beside = sum(t.numel() for t in item.fixed.values())
    else:
        kept = 4
    return max(1, int(MEMORY_SHARE * own_part(device) / max(1, 4 * (kept * numbers + beside))))


def pass_bytes(model: Model, twice: bool = False) -> int:
    """What a pass through all layers keeps alive for one token (:func:`fedloom.model.memory.kept`). ``twice``: one whose gradients are
    differentiated again, for which nothing is computed again."""
    return kept_bytes(model, model.depth, model.recomputes and not twice)


def out_of_memory(error: Exception) -> bool:
    """Whether an error says that memory ran out, in whichever words its library has for it."""
    return isinstance(error, MemoryError | torch.OutOfMemoryError) or any(words in str(error) for words in SPENT)
