"""Exact match: the number that a model writes to held-out prompts, against the one that their answers end in (``####``).

Greedy, by the library's own ``generate``, by both protocols on both splits (``evaluation.py``):

- **global**: the one assembled model writes to every prompt.
- **personalised**: every prompt is answered by the model of the device that holds it.

Writing an answer takes a pass a token, so prompts are few (``--exact-match``), drawn by seed: the same ones at every evaluation, and for
every method. Those whose devices all have one and the same model are answered together, and once if it is the global one.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from decimal import Decimal
from typing import Any, NamedTuple

import numpy as np

from fedloom.client.elsewhere import Elsewhere, Store
from fedloom.data.instructions import Instructions
from fedloom.data.numbers import due, last, marked
from fedloom.data.tasks import HELD_OUT, Split
from fedloom.messages import Tensors
from fedloom.methods.method import State
from fedloom.model.writing import continued
from fedloom.run.personal import as_sent, personal
from fedloom.run.world import World
from fedloom.seeds import derive
from fedloom.tensors import equal

LONGEST = 256
"""Tokens of an answer at most."""

TOGETHER = 16
"""Prompts that are answered at once."""


class Drawn(NamedTuple):
    """Of a split the prompts that are written to: their rows in the data (ascending), their token ids, the numbers due; and of how many
    ``held`` rows whose answers end in a number."""

    rows: list[int]
    prompts: list[list[int]]
    due: list[Decimal | None]
    held: int


class Share(NamedTuple):
    """Shares of answers: those whose first ``####`` is followed by the number that is due, and those whose last number is it."""

    marked: float
    last: float


@dataclass(frozen=True)
class Solved:
    """By split and protocol the shares of right numbers (None: no such model, or no prompt to write to), and what was written to."""

    shares: Mapping[Split, Mapping[str, Share | None]]
    drawn: Mapping[Split, Drawn]

    def scores(self, split: Split) -> dict[str, float | None]:
        """Exact match by protocol, as rows tell it."""
        return {protocol: None if share is None else share.marked for protocol, share in self.shares[split].items()}


NOT_WRITTEN: dict[str, float | None] = {"personalised": None, "global": None}
"""Exact match after a round that was not evaluated."""


def tells(world: World) -> bool:
    """Whether this run tells exact match: prompts are to be written to, and some held-out answer ends in a number."""
    return any(_held(world, split) for split in HELD_OUT)


def drawn(world: World) -> dict[Split, Drawn]:
    """At most ``--exact-match`` prompts of each split whose answers end in ``#### number``, drawn by seed, cut at their end where an answer
    of :data:`LONGEST` tokens (half of what the model reads, if that is less) would not fit behind them. Splits without any are left out."""
    e, speaker, made = world.experiment, world.model.speaker, {}
    for split in HELD_OUT:
        held = _held(world, split)
        if not held or speaker is None:
            continue
        prompts, answers = world.source.task.written(world.source.splits[split])  # type: ignore[union-attr]
        chosen = derive(e.seed, "exact-match").permutation(len(held))[: e.exact_match]
        rows = [held[i] for i in sorted(chosen)]
        asked = [speaker.asked(prompts[row], world.model.reads - most(world)) for row in rows]
        made[split] = Drawn(rows, asked, [due(answers[row]) for row in rows], len(held))
    return made


def solved(world: World, state: State, store: Store) -> Solved | None:
    """Exact match of the state's models; None where the run tells none. Devices that are elsewhere write nothing."""
    of = drawn(world)
    if not of:
        return None
    asked = [prompt for one in of.values() for prompt in one.prompts]
    assembled = world.experiment.method.assembled(state)
    written: dict[str, Sequence[str | None] | None] = {
        "global": None if assembled is None else _continued(world, assembled, asked),
    }
    written["personalised"] = None if isinstance(store, Elsewhere) else _personally(world, state, store, of, assembled, written["global"])
    shares: dict[Split, dict[str, Share | None]] = {split: dict.fromkeys(NOT_WRITTEN) for split in HELD_OUT}
    at = 0
    for split, one in of.items():
        for protocol, texts in written.items():
            shares[split][protocol] = None if texts is None else _share(texts[at : at + len(one.rows)], one.due)
        at += len(one.rows)
    return Solved(shares, of)


def as_told(world: World, found: Solved | None) -> dict[str, Any] | None:
    """What ``results.json`` tells of the test prompts: the shares ``before`` training and after it, of the global model (``after``) and
    ``personalised``; the same of the ``last_number`` written anywhere; of how many ``prompts`` (of how many ``held`` that there are), and
    the same of the validation split. None where nothing was written to the test split."""
    if found is None or "test" not in found.drawn:
        return None
    of, counts = found.drawn["test"], {split: {"prompts": len(one.rows), "held": one.held} for split, one in found.drawn.items()}
    before = _share(_continued(world, {}, of.prompts), of.due)
    shares = {"before": before, "after": found.shares["test"]["global"], "personalised": found.shares["test"]["personalised"]}
    return {
        **{name: None if share is None else share.marked for name, share in shares.items()},
        "last_number": {name: None if share is None else share.last for name, share in shares.items()},
        **counts["test"],
        "validation": counts.get("validation"),
    }


def _held(world: World, split: Split) -> list[int]:
    """Rows whose answers end in a number; none where nothing is to be written."""
    task = world.source.task
    if not world.experiment.exact_match or world.model.speaker is None or not isinstance(task, Instructions) or not task.prompts:
        return []
    _, answers = task.written(world.source.splits[split])
    return [row for row, answer in enumerate(answers) if due(answer) is not None]


def most(world: World) -> int:
    """Tokens of an answer at most."""
    return min(LONGEST, world.model.reads // 2)


def _continued(world: World, tensors: Tensors, asked: Sequence[list[int]]) -> list[str]:
    return continued(world.model, tensors, asked, most(world), TOGETHER)


def _personally(
    world: World, state: State, store: Any, of: Mapping[Split, Drawn], assembled: Tensors | None, general: Sequence[str | None] | None
) -> list[str | None]:
    """What each prompt's device writes (None: nobody holds it), in order of ``of``. ``general``: what the ``assembled`` model writes."""
    asked = [prompt for one in of.values() for prompt in one.prompts]
    written: list[str | None] = [None] * len(asked)
    for model, places in _alike(world, state, store, _holders(world, of)):
        known = assembled is not None and general is not None and equal(model, assembled)
        texts = [general[i] for i in places] if known and general else _continued(world, model, [asked[i] for i in places])
        for place, text in zip(places, texts, strict=True):
            written[place] = text
    return written


def _alike(world: World, state: State, store: Any, holders: Mapping[int, list[int]]) -> Iterator[tuple[Tensors, list[int]]]:
    """The devices' models and the places of the prompts that each answers; devices one after another with the same model are one."""
    shared = as_sent(world, state.shared)
    model, places = None, []
    for client, mine in holders.items():
        own = personal(world, store, client, shared, state.facts).tensors
        if model is not None and equal(own, model):
            places = places + mine
            continue
        if model is not None:
            yield model, places
        model, places = own, mine
    if model is not None:
        yield model, places


def _holders(world: World, of: Mapping[Split, Drawn]) -> dict[int, list[int]]:
    """The devices that hold a drawn row, ascending, and the places of these rows among all that are drawn."""
    held: dict[int, list[int]] = {}
    at = 0
    for split, one in of.items():
        for client, rows in enumerate(world.partition.shards(split)):
            if mine := (at + np.flatnonzero(np.isin(one.rows, rows))).tolist():
                held.setdefault(client, []).extend(mine)
        at += len(one.rows)
    return dict(sorted(held.items()))


def _share(texts: Sequence[str | None], wanted: Sequence[Decimal | None]) -> Share | None:
    """Of the texts that there are."""
    known = [(text, number) for text, number in zip(texts, wanted, strict=True) if text is not None]
    if not known:
        return None
    return Share(*(float(np.mean([read(text) == number for text, number in known])) for read in (marked, last)))
