"""Which answers belong with the others: what a real federation asks of them beyond that they can be read.

An answer has the shapes and types that were sent, the names that most have who were asked the same, of what was not sent the shapes and
types that most of these have to whom alike tensors were sent, and is no more than :data:`ABSURD` times as far from what was sent as the
median is. It is looked at as its task says that it is meant (``Task.complete``): what a device left out because it is as it came is put
back, and nothing else is known here of what the tensors are. One that cannot be completed does not belong with the others, nor one that is
not what is due where a task says what that is (``messages.due``): so who answers alone is judged too, but for how far it is.

What is looked at is an :class:`Outline`; so the answers themselves need not be in memory together.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass
from statistics import median

import torch

from fedloom.messages import Failure, Replies, Task, Tensors, Update

ABSURD = 1000.0


@dataclass(frozen=True)
class Outline:
    """Of a client's answer its tensors' names, shapes and types, without numbers, and how far it is from what was sent; or why it could not
    be completed (``broken``)."""

    client: int
    tensors: Tensors
    far: float
    broken: str = ""


def outlined(task: Task, update: Update) -> Outline:
    """The outline of an answer to this task."""
    try:
        tensors = dict(sorted(task.complete(update.tensors).items()))
    except Exception as error:  # an honest answer can be completed; another may be anything
        return Outline(update.client, {}, 0.0, f"it cannot be completed with what was sent ({type(error).__name__}: {error})")
    return Outline(update.client, {n: torch.empty_like(t, device="meta") for n, t in tensors.items()}, _way(tensors, task.tensors))


def agreeing(tasks: Sequence[Task], replies: Replies, outlines: Sequence[Outline] | None = None) -> Replies:
    """The replies without those that do not belong with the others. ``outlines``: of the updates, where their tensors are elsewhere."""
    asked = {task.client: task for task in tasks}
    if outlines is None:
        outlines = [outlined(asked[update.client], update) for update in replies.updates]
    reasons = _reasons(asked, outlines)
    if not reasons:
        return replies
    failures = {failure.client: failure for failure in replies.failures}
    failures |= {client: Failure(client, f"WireError: {reason}") for client, reason in reasons.items()}
    return Replies(
        tuple(update for update in replies.updates if update.client not in reasons),
        tuple(failures[task.client] for task in tasks if task.client in failures),
        replies.traffic,
    )


def _reasons(asked: Mapping[int, Task], outlines: Sequence[Outline]) -> dict[int, str]:
    """By client, why its answer does not belong with the others."""
    reasons = {one.client: one.broken for one in outlines if one.broken}
    for one in outlines:
        for name, tensor in one.tensors.items():
            was = asked[one.client].tensors.get(name)
            if was is not None and was.shape != tensor.shape:
                reasons[one.client] = f"'{name}' came back with shape {tuple(tensor.shape)}, and was sent with {tuple(was.shape)}"
            elif was is not None and was.dtype != tensor.dtype:
                reasons[one.client] = f"'{name}' came back in {tensor.dtype}, and was sent in {was.dtype}"
    left = [one for one in outlines if one.client not in reasons]
    same = {client: f"{task.op} {sorted(task.settings.items())}" for client, task in asked.items()}
    for question in sorted({same[one.client] for one in left}):
        alike = [one for one in left if same[one.client] == question]
        sent = asked[alike[0].client].tensors
        counted = Counter(tuple(one.tensors) for one in alike)
        usual = max(counted, key=lambda names: (counted[names], names == tuple(sorted(sent)), names))
        for one in alike:
            if tuple(one.tensors) != usual:
                missing, extra = sorted(set(usual) - set(one.tensors)), sorted(set(one.tensors) - set(usual))
                reasons[one.client] = f"its tensors are not those of the others: {missing[:3]} missing, {extra[:3]} more than they have"
        fitting = [one for one in alike if one.client not in reasons]
        for like in _groups(fitting, lambda one: tuple(sorted((n, *t.shape) for n, t in asked[one.client].tensors.items()))):
            for name in usual:
                kinds = Counter(_kind(one.tensors[name]) for one in like)
                kind = max(kinds, key=lambda kind: (kinds[kind], kind))
                others = [one for one in like if _kind(one.tensors[name]) != kind]
                reasons |= {o.client: f"'{name}' is {_kind(o.tensors[name])}, and the others' {kind}" for o in others}
        reasons |= _absurd({one.client: one.far for one in alike if one.client not in reasons})
    return reasons


def _groups(outlines: Sequence[Outline], by: Callable[[Outline], Hashable]) -> list[list[Outline]]:
    """The outlines, those together that are the same by this."""
    groups = dict[Hashable, list[Outline]]()
    for one in outlines:
        groups.setdefault(by(one), []).append(one)
    return list(groups.values())


def _kind(tensor: torch.Tensor) -> str:
    """A tensor's type and shape."""
    return f"{tensor.dtype} of shape {tuple(tensor.shape)}"


def _way(tensors: Tensors, sent: Tensors) -> float:
    """How far tensors are from what was sent; where the two do not fit, how large they are."""
    ways = [
        t.double() - sent[n].double() if n in sent and sent[n].shape == t.shape else t.double()
        for n, t in tensors.items()
        if t.is_floating_point() and t is not sent.get(n)
    ]
    return math.sqrt(sum(float(way.square().sum()) for way in ways))


def _absurd(far: Mapping[int, float]) -> dict[int, str]:
    """Reasons of those who are absurdly far from what they were sent; three must answer for a median to say anything."""
    middle = median(far.values()) if len(far) >= 3 else 0.0
    return {k: f"it moved {d:.3g}, and the median of the others {middle:.3g}" for k, d in far.items() if middle and d > ABSURD * middle}
