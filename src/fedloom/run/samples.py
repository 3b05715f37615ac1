"""What a model answers to held-out prompts, before and after training: greedy, by the library's own ``generate``."""

from __future__ import annotations

import numpy as np

from fedloom.messages import Tensors
from fedloom.run.world import World

COUNT = 3
"""Prompts that are shown."""

LONGEST = 64
"""Tokens of an answer at most."""


def samples(world: World, trained: Tensors) -> list[dict[str, str]]:
    """Of the first test prompts (of plain texts their first halves): ``prompt``, the answer that is ``due``, and those ``before`` and
    ``after`` training; none where the task is not to write answers."""
    model, examples = world.model, world.splits["test"]
    if model.speaker is None:
        return []
    prompts, due = [], []
    for row in examples.rows[:COUNT]:
        tokens = examples.tokens[examples.offsets[row] : examples.offsets[row + 1]]
        answer = examples.segments[examples.offsets[row] : examples.offsets[row + 1]] > 0
        asked = len(tokens) // 2 if model.speaker.form == "text" else int(np.argmax(answer))
        ended = asked + int(np.argmin([*answer[asked:], False]))  # of a conversation the first answer
        prompts.append(tokens[: max(1, asked)].tolist())
        due.append(model.tokenizer.decode(tokens[asked:ended], skip_special_tokens=True))
    written = [model.continued(tensors, prompts, LONGEST) for tensors in ({}, trained)]
    shown = [model.tokenizer.decode(prompt, skip_special_tokens=True) for prompt in prompts]
    return [
        {"prompt": prompt, "due": wanted, "before": before, "after": after}
        for prompt, wanted, before, after in zip(shown, due, *written, strict=True)
    ]
