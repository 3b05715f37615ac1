"""Driving a flow: who must answer, and what may not be asked."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import pytest
import torch

from fedloom.engines.engine import drive
from fedloom.engines.local import waves
from fedloom.messages import Asking, CohortFailed, Failure, Flow, Replies, Take, Task, Update, insist, whole
from fedloom.server.aggregation import Average


class Half:
    """An engine over which clients with odd numbers never answer."""

    def run(self, tasks: Sequence[Task], take: Take = whole) -> Replies:
        answered = tuple(take(Update(t.client, 1)) for t in tasks if t.client % 2 == 0)
        return Replies(answered, tuple(Failure(t.client, "odd") for t in tasks if t.client % 2))


def asking(*clients: int) -> Flow[list[int]]:
    updates = yield [Task("op", k) for k in clients]
    return [update.client for update in updates]


def test_the_flow_hears_the_updates_and_its_value_comes_back() -> None:
    heard: list[tuple[int, int]] = []
    assert drive(asking(2, 1, 0), Half(), 0.6, lambda tasks, replies: heard.append((len(tasks), len(replies.updates)))) == [2, 0]
    assert heard == [(3, 2)]


def test_answers_of_no_weight_are_a_round_to_which_nobody_came() -> None:
    def idle() -> Flow[dict[str, torch.Tensor]]:
        mean = Average()
        yield Asking([Task("op", k) for k in (0, 1, 2)], lambda update: mean.take(replace(update, num_examples=0)))
        return mean.value()

    with pytest.raises(CohortFailed, match=r"0 of 3 clients answered, 2 are needed. client 1: odd; client 0: its answer has no weight"):
        drive(idle(), Half(), 0.5)


def test_a_quorum_is_rounded_up_and_zero_means_that_the_flow_insists_itself() -> None:
    with pytest.raises(CohortFailed, match="2 of 3 clients answered, 3 are needed. client 1: odd"):
        drive(asking(0, 1, 2), Half(), 0.67)
    with pytest.raises(CohortFailed, match="0 of 1 clients answered, 1 are needed"):
        drive(asking(1), Half(), 0.01)
    assert drive(asking(1), Half(), 0) == []


def test_who_insisted_in_vain_is_told_why() -> None:
    why = r"1 of 2 clients answered, 2 are needed. client 1: no answer to 'op' in 2 attempts \(the last time: odd\)$"
    with pytest.raises(CohortFailed, match=why):
        drive(insist([Task("op", 0), Task("op", 1)], attempts=2), Half(), 0)


def test_whoever_insists_is_given_everyone_where_rounds_are_hurried() -> None:
    class Everyone(Half):
        def run(self, tasks: Sequence[Task], take: Take = whole) -> Replies:
            return Replies(tuple(take(Update(t.client, 1)) for t in tasks))

    def both() -> Flow[tuple[list[int], list[int]]]:
        chosen = yield from insist([Task("op", k) for k in (0, 1, 2)], attempts=1)
        return [update.client for update in chosen], (yield from asking(0, 1, 2))

    assert drive(both(), Half(), 0.5, patient=Everyone()) == ([0, 1, 2], [0, 2])


def test_what_was_heard_is_told_before_the_cohort_fails() -> None:
    heard: list[int] = []
    with pytest.raises(CohortFailed):
        drive(asking(1, 3), Half(), seen=lambda tasks, replies: heard.append(len(replies.failures)))
    assert heard == [2]


def test_one_asking_may_not_name_a_client_twice() -> None:
    with pytest.raises(ValueError, match=r"clients \[4, 6\] are asked twice at once"):
        drive(asking(6, 4, 2, 4, 6), Half())


def test_a_wave_holds_so_many_clients_or_so_many_bytes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fedloom.engines.local.HEAVY", 100)

    def cut(*numbers: int) -> list[list[int]]:
        tasks = [Task("op", k, {"w": torch.zeros(n)}) for k, n in enumerate(numbers)]
        return [[task.client for task in wave] for wave in waves(tasks, 3)]

    assert cut() == []
    assert cut(0, 0, 0, 0) == [[0, 1, 2], [3]]
    assert cut(5, 20, 1, 1) == [[0, 1], [2, 3]], "25 numbers of four bytes are 100"
    assert cut(1, 60, 1) == [[0], [1], [2]], "one that is too heavy goes alone"
