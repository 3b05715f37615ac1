"""What a model answers to held-out prompts, before and after training: greedy, by the library's own ``generate``."""

from __future__ import annotations

import numpy as np

from fedloom.client.elsewhere import Elsewhere, Store
from fedloom.methods.method import State
from fedloom.model.writing import continued
from fedloom.run.personal import as_sent, personal
from fedloom.run.world import World

COUNT = 3
"""Prompts that are shown."""

LONGEST = 64
"""Tokens of an answer at most."""


def samples(world: World, state: State, store: Store) -> list[dict[str, str]]:
    """Of the first test prompts (of plain texts their first halves): ``prompt``, the answer that is ``due``, and those ``before`` and
    ``after`` training, of the global model, or, where there is none, of the device that holds the prompt. None where the task is not to
    write answers, or only devices elsewhere could."""
    model, examples = world.model, world.splits["test"]
    assembled = world.experiment.method.assembled(state)
    if model.speaker is None or (assembled is None and isinstance(store, Elsewhere)):
        return []
    whose = _holders(world) if assembled is None else {}
    rows = examples.rows[:COUNT].tolist() if assembled is not None else sorted(whose)[:COUNT]
    prompts, due = [], []
    for row in rows:
        tokens = examples.tokens[examples.offsets[row] : examples.offsets[row + 1]]
        answer = examples.segments[examples.offsets[row] : examples.offsets[row + 1]] > 0
        asked = len(tokens) // 2 if model.speaker.form == "text" else int(np.argmax(answer))
        ended = asked + int(np.argmin([*answer[asked:], False]))  # of a conversation the first answer
        prompts.append(tokens[: max(1, asked)].tolist())
        due.append(model.tokenizer.decode(tokens[asked:ended], skip_special_tokens=True))
    before = continued(model, {}, prompts, LONGEST)
    if assembled is not None:
        after = continued(model, assembled, prompts, LONGEST)
    else:
        shared = as_sent(world, state.shared)
        own = (personal(world, store, whose[row], shared, state.facts).tensors for row in rows)  # type: ignore[arg-type]
        after = [continued(model, tensors, [prompt], LONGEST)[0] for tensors, prompt in zip(own, prompts, strict=True)]
    shown = [model.tokenizer.decode(prompt, skip_special_tokens=True) for prompt in prompts]
    return [
        {"prompt": prompt, "due": wanted, "before": first, "after": then}
        for prompt, wanted, first, then in zip(shown, due, before, after, strict=True)
    ]


def _holders(world: World) -> dict[int, int]:
    """Whose each test example is."""
    return {int(i): k for k, rows in enumerate(world.partition.shards("test")) for i in world.judge.examples("test", rows)}
