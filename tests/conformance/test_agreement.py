"""Honest answers belong together, whatever the method has devices leave out, and others do not: each method, judged as in a real
federation.

What goes with masks, layers that stay on devices, controls and curricula is played under the same judge (``played.py``) by the tests of
these; here are the methods as they come, what leaves most out, and those who lie.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import pytest
import torch

from fedloom.engines.agreement import agreeing, outlined
from fedloom.engines.engine import Engine, drive
from fedloom.engines.local import taken
from fedloom.messages import Flow, Replies, Take, Task, Tensors, Update, whole
from fedloom.methods import all_methods
from fedloom.methods.fedavg import FedAvg
from fedloom.methods.flora import FLoRA
from fedloom.methods.hetlora import HetLora
from fedloom.methods.lisa import Lisa
from fedloom.methods.method import one_round
from fedloom.model.names import is_down, is_factor, is_up
from fedloom.run.evaluation import of_any_length
from fedloom.server.masks import Mask, completed
from fedloom.server.participation import Pool
from fedloom.tensors import packed, unpacked
from tests.conformance.played import Played

POOL = Pool((0, 1, 2, 3), 4, 3, 3)
MASKED = replace(POOL, mask=Mask(0.4))
PRUNING = HetLora(FedAvg(lr=0.01), ranks=(2,), keep=0.5, penalty=10.0)
LISA = Lisa(layers=1, every=1)


@pytest.mark.no_cover
@pytest.mark.parametrize("name", [name for name in all_methods() if name != "centralised"])
def test_all_honest_answers_count(name: str) -> None:
    here = Played(all_methods()[name](), POOL)
    for _ in range(2):  # of three: the first round and one that goes on from it
        here.round()


@dataclass
class Heard:
    """An engine in which client 1 says something else than it made; what came, and what a real federation uses of it."""

    inner: Engine
    lies: Callable[[Tensors], Tensors]
    said: list[Update] = field(default_factory=list)
    reasons: dict[int, str] = field(default_factory=dict)

    def run(self, tasks: Sequence[Task], take: Take = whole) -> Replies:
        replies = self.inner.run(tasks)
        self.said = [replace(u, tensors=self.lies(u.tensors)) if u.client == 1 else u for u in replies.updates]
        kept = agreeing(tasks, replace(replies, updates=tuple(self.said)))
        self.reasons = {failure.client: failure.reason for failure in kept.failures}
        return taken(kept, take)


def heard(method: Any, pool: Pool, lies: Callable[[Tensors], Tensors] = dict, rounds: int = 1) -> Heard:
    """The last of so many rounds, the others honest."""
    here = Played(method, pool)
    for _ in range(rounds - 1):
        here.round()
    engine = Heard(here.engine.inner, lies)
    after = drive(one_round(method, here.state, pool), engine, quorum=0.75)
    assert {n: t.shape for n, t in after.shared.items()} == {n: t.shape for n, t in here.state.shared.items()}
    return engine


def shapes(updates: Sequence[Update], chosen: Callable[[str], bool]) -> set[tuple[torch.Size, ...]]:
    return {tuple(t.shape for n, t in update.tensors.items() if chosen(n)) for update in updates}


def test_those_who_drew_other_layers_belong_together() -> None:
    engine = heard(LISA, POOL)
    assert engine.reasons == {} and len({tuple(update.tensors) for update in engine.said}) > 1, "they trained other layers"


def test_whoever_prunes_belongs_to_those_who_do_not() -> None:
    engine = heard(PRUNING, POOL, rounds=2)
    assert engine.reasons == {} and len(shapes(engine.said, is_factor)) == 2, "two of four give a direction up"
    assert heard(PRUNING, POOL, rounds=3).reasons == {}, "and from then on they are sent one"


def test_those_who_train_other_rows_belong_together() -> None:
    engine = heard(FedAvg(), MASKED)
    assert engine.reasons == {} and len(shapes(engine.said, is_up)) > 1, "they keep other numbers of rows in a layer's pairs"


def test_other_layers_and_rows_belong_together() -> None:
    """LISA over LoRA's pairs, under a mask: what completes an answer is the mask's and then the method's."""
    here = Played(LISA, MASKED, kind="lora")
    here.round()
    here.round()


Lie = Callable[[Tensors], Tensors]


def first(tensors: Tensors, chosen: Callable[[str], bool]) -> str:
    return next(filter(chosen, tensors))


def each(chosen: Callable[[str], bool], change: Callable[[torch.Tensor], torch.Tensor]) -> Lie:
    return lambda tensors: {n: change(t) if chosen(n) else t for n, t in tensors.items()}


def one(chosen: Callable[[str], bool], change: Callable[[torch.Tensor], torch.Tensor]) -> Lie:
    return lambda tensors: {**tensors, (n := first(tensors, chosen)): change(tensors[n])}


def none(chosen: Callable[[str], bool]) -> Lie:
    return lambda tensors: {n: t for n, t in tensors.items() if not chosen(n)}


def more(tensors: Tensors) -> Tensors:
    return {**tensors, "more": torch.ones(3)}


def is_rows(name: str) -> bool:
    return name.startswith("rows/")


def is_head(name: str) -> bool:
    return name.endswith("classifier.weight")


def absurd(t: torch.Tensor) -> torch.Tensor:
    return t * 1e9 if t.is_floating_point() else t


def every(name: str) -> bool:
    return True


def elsewhere(bits: torch.Tensor) -> torch.Tensor:
    """As many rows, none of which there is."""
    return packed(torch.cat([torch.zeros(99), unpacked(bits).float()]))


LIES = {
    "lisa, a shape": (LISA, POOL, one(is_head, lambda t: t[:, 1:]), r"'.*classifier.weight' came back with shape \(3, 15\)"),
    "lisa, a name": (LISA, POOL, more, r"\[\] missing, \['more'\] more"),
    "lisa, a type": (LISA, POOL, one(is_head, lambda t: t.double()), "came back in torch.float64, and was sent in torch.float32"),
    "lisa, absurd": (LISA, POOL, each(every, absurd), "it moved .*, and the median of the others"),
    "rows, a shape": (FedAvg(), MASKED, one(is_up, lambda t: t[:, :1]), "it cannot be completed with what was sent"),
    "rows, too few": (
        FedAvg(),
        MASKED,
        one(is_up, lambda t: t[1:]),
        "ValueError: '.*lora_B.* came with .* rows, and .* are said to have come",
    ),
    "rows, untold": (FedAvg(), MASKED, none(is_rows), r"'.*lora_B.*' came back with shape \(\d+, 2\), and was sent with \(16, 2\)"),
    "rows, nowhere": (FedAvg(), MASKED, each(is_rows, elsewhere), "it cannot be completed with what was sent"),
    "rows, no bits": (FedAvg(), MASKED, each(is_rows, torch.zeros_like), "it cannot be completed with what was sent"),
    "rows, no bytes": (FedAvg(), MASKED, each(is_rows, lambda t: t.float()), "it cannot be completed with what was sent"),
    "rows, of nothing": (FedAvg(), MASKED, none(is_up), r"\['.*lora_B.*'\] missing, \[\] more"),
    "rows, a head": (FedAvg(), MASKED, one(is_head, lambda t: t[1:]), r"'.*classifier.weight' came back with shape \(2, 16\)"),
    "rows, a name": (FedAvg(), MASKED, more, r"\[\] missing, \['more'\] more"),
    "rows, absurd": (FedAvg(), MASKED, each(is_up, absurd), "it moved .*, and the median of the others"),
    "ranks, in one": (PRUNING, POOL, one(is_down, lambda t: t[:1]), r"one rank is needed in all pairs; they have \[1, 2\]"),
    "ranks, in half": (PRUNING, POOL, each(is_down, lambda t: t[:1]), "of pairs of rank 2 the first directions may be left"),
    "ranks, in one half": (PRUNING, POOL, one(is_up, lambda t: t[:, :1]), "of pairs of rank 2 the first directions may be left"),
    "ranks, none": (
        PRUNING,
        POOL,
        lambda ts: {n: t[:0] if is_down(n) else t[:, :0] if is_up(n) else t for n, t in ts.items()},
        "of rank 0",
    ),
    "ranks, more": (
        PRUNING,
        POOL,
        lambda ts: {n: torch.cat([t, t], 0 if is_down(n) else 1) if is_factor(n) else t for n, t in ts.items()},
        "of rank 4",
    ),
    "ranks, a shape": (PRUNING, POOL, one(is_down, lambda t: t[:, 1:]), r"'.*lora_A.*' came back with shape \(2, 15\)"),
    "ranks, no pairs": (PRUNING, POOL, none(is_factor), "one rank is needed in all pairs; they have "),
    "stacked, a shape": (
        FLoRA(),
        POOL,
        one(is_up, lambda t: t[1:]),
        r"'.*lora_B.*' is torch.float32 of shape \(15, 2\); torch.float32 of \(16, 2\) is due",
    ),
    "stacked, a rank": (
        FLoRA(),
        POOL,
        one(is_up, lambda t: t[:, :1]),
        r"is torch.float32 of shape \(16, 1\); torch.float32 of \(16, 2\) is due",
    ),
    "stacked, no pair": (FLoRA(), POOL, none(is_up), r"\['.*lora_B.*'\] missing, \[\] more"),
    "ranks, absurd": (PRUNING, POOL, each(is_down, absurd), "it moved .*, and the median of the others"),
}
"""What a device may say where others leave something out, and why it does not count then."""


@pytest.mark.parametrize("lie", LIES)
def test_whoever_lies_is_refused_and_the_others_count(lie: str) -> None:
    method, pool, lies, reason = LIES[lie]
    engine = heard(method, pool, lies)
    assert set(engine.reasons) == {1}
    with pytest.raises(AssertionError, match=reason):
        raise AssertionError(engine.reasons[1])


def test_predictions_may_be_of_any_length() -> None:
    tasks = [Task("predict", k, complete=of_any_length) for k in range(4)]
    cells = [torch.ones(count, 3, dtype=torch.int64) for count in (2, 0, 5)]
    updates = tuple(Update(k, 1, {"test": told}) for k, told in enumerate([*cells, torch.ones(2, 4, dtype=torch.int64)]))
    assert [failure.client for failure in agreeing(tasks, Replies(updates)).failures] == [3]


@pytest.mark.parametrize("keep", [0.5, 1.0])
def test_layers_that_are_handed_over_may_have_other_rows_of_each_device(keep: float) -> None:
    """One device tells all rows of a B, others those that their mask keeps, and not as many each."""
    rows = [torch.ones(4), torch.tensor([1, 0, 0, 0.0]), torch.tensor([1, 1, 0, 1.0])]
    said = [{"b": torch.ones(int(flags.sum()), 2), **({} if flags.all() and keep == 1 else {"rows/b": packed(flags)})} for flags in rows]
    tasks = [Task("hand_over", k, complete=partial(completed, sent={})) for k in range(3)]
    replies = Replies(tuple(Update(k, 1, tensors) for k, tensors in enumerate(said)))
    assert agreeing(tasks, replies) is replies


ALONE = [name for name in all_methods() if name not in ("centralised", "local")]
"""Methods that take what came for what is shared, if one device answers."""


@pytest.mark.no_cover
@pytest.mark.parametrize("name", ALONE)
def test_who_answers_alone_and_lies_is_refused(name: str) -> None:
    alone(all_methods()[name](), replace(POOL, cohort=1))


@pytest.mark.parametrize("pool", [replace(POOL, controls=True), replace(MASKED, controls=True), MASKED], ids=["controls", "both", "mask"])
def test_who_answers_alone_and_lies_is_refused_also_with_controls_and_a_mask(pool: Pool) -> None:
    control = one(lambda n: n.startswith("control/"), lambda t: t[1:])
    alone(FedAvg(), replace(pool, cohort=1), *([control] if pool.controls else []))


def alone(method: Any, pool: Pool, *lies: Lie) -> None:
    """Have a round of one device, which is refused if it tells one of these lies, or another, and counts otherwise."""
    here = Played(method, pool)
    asking: Any = next(one_round(method, here.state, pool))
    honest = here.engine.inner.run(asking.tasks)
    assert len(honest.updates) == 1 and agreeing(asking.tasks, honest) is honest
    left_out = [] if method.name == "lisa" else [lambda ts: {}, lambda ts: dict([*ts.items()][1:])]
    for lie in (more, each(every, lambda t: t.double()), each(every, lambda t: t[None]), each(every, lambda t: t.bool()), *left_out, *lies):
        said = replace(honest, updates=tuple(replace(u, tensors=lie(u.tensors)) for u in honest.updates))
        assert agreeing(asking.tasks, said).updates == (), lie


def test_an_answer_is_as_far_as_it_is_when_completed() -> None:
    """What a device left out did not move; of what it sent the way counts, and not the size."""
    sent = {"b": torch.full((4, 3), 5.0), "a": torch.ones(2)}
    asking: Any = next(Mask(0.5).over(asked([Task("train", 0, sent, {"round": 0})]), {"batch_size": 2}))
    (task,) = asking.tasks
    came = {"a": torch.ones(2), "b": torch.full((2, 3), 5.5), "rows/b": packed(torch.tensor([0, 1, 0, 1.0]))}
    found = outlined(task, Update(0, 1, came))
    assert found.far == pytest.approx(0.5 * 6**0.5) and not found.broken
    assert {n: tuple(t.shape) for n, t in found.tensors.items()} == {"a": (2,), "b": (4, 3)}


def asked(tasks: list[Task]) -> Flow[list[Update]]:
    return (yield tasks)
