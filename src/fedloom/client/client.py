"""A client: one device's data and what it keeps between its participations."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch

from fedloom.data.examples import Examples
from fedloom.data.tasks import Split


@dataclass
class Client:
    """Device k of K.

    ``private``: trainable tensors that stay here (never sent). ``memory``: anything else the device must remember, as tensors
    (difficulty scores, masks, optimiser moments). Both survive restarts; the engine stores them if and only if the operation
    returned. ``seed`` is the experiment's; derive with it and the id. ``strength``: the device's memory as a share of the most that any
    device has; None where all are alike, or nothing is said. ``frozen``: the precision in which it computes, and in which it keeps tensors
    of the model that it does not train. ``classes``: how many labels its examples can have, also those that none has (0: it is not said).
    ``texts``: how many of the greatest length a step can have in its memory (``model/memory.py``); None where nothing is said.
    """

    id: int
    train: Examples
    validation: Examples
    test: Examples
    seed: int
    strength: float | None = None
    frozen: torch.dtype = torch.float32
    classes: int = 0
    texts: int | None = None
    private: dict[str, torch.Tensor] = field(default_factory=dict)
    memory: dict[str, torch.Tensor] = field(default_factory=dict)

    def texts_a_step(self, batch_size: int, by_memory: bool) -> int:
        """Examples in a step of ``batch_size``; ``by_memory``: no more than its memory holds."""
        return min(batch_size, self.texts) if by_memory and self.texts is not None else batch_size

    def shard(self, split: Split) -> Examples:
        """The device's own examples of one split.

        Raises:
            ValueError: an unknown split.
        """
        shards = {"train": self.train, "validation": self.validation, "test": self.test}
        if split not in shards:
            raise ValueError(f"no split '{split}'; a client has {sorted(shards)}")
        return shards[split]
