"""Exact match: the number that the global model writes to held-out prompts, against the one that their answers end in (``####``).

Greedy, by the library's own ``generate``, before and after training. Told at the end of a run only: writing an answer takes a pass a token.
"""

from __future__ import annotations

import numpy as np

from fedloom.data.instructions import Instructions
from fedloom.data.numbers import due, last, marked
from fedloom.messages import Tensors
from fedloom.run.world import World
from fedloom.seeds import derive

LONGEST = 256
"""Tokens of an answer at most."""

TOGETHER = 16
"""Prompts that are answered at once."""


def exact_match(world: World, trained: Tensors) -> dict[str, object] | None:
    """Over at most ``--exact-match`` test prompts whose answers end in ``#### number``, drawn by seed: the shares ``before`` and ``after``
    training whose first ``####`` is followed by that number; the same of the ``last_number`` written anywhere; and of how many ``prompts``
    (of how many ``held`` that there are). None where nothing is to be written, or no answer ends so."""
    e, task, speaker = world.experiment, world.source.task, world.model.speaker
    if not e.exact_match or speaker is None or not isinstance(task, Instructions) or not task.prompts:
        return None
    prompts, answers = task.written(world.source.splits["test"])
    held = [row for row, answer in enumerate(answers) if due(answer) is not None]
    if not held:
        return None
    drawn = derive(e.seed, "exact-match").permutation(len(held))[: e.exact_match]
    rows = [held[i] for i in sorted(drawn)]
    most = min(LONGEST, world.model.reads // 2)
    asked = [speaker.asked(prompts[row], world.model.reads - most) for row in rows]
    wanted, told = [due(answers[row]) for row in rows], {}
    for when, tensors in (("before", {}), ("after", trained)):
        written = world.model.continued(tensors, asked, most, TOGETHER)
        for name, read in (("", marked), ("last_number_", last)):
            told[name + when] = float(np.mean([read(text) == number for text, number in zip(written, wanted, strict=True)]))
    return {
        "before": told["before"],
        "after": told["after"],
        "last_number": {"before": told["last_number_before"], "after": told["last_number_after"]},
        "prompts": len(rows),
        "held": len(held),
    }
