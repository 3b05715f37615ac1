"""Flows played by hand: no engine, no model. The list of tasks goes out, a list of updates comes in."""

from __future__ import annotations

import dataclasses
from dataclasses import replace

import pytest
import torch

from fedloom.messages import Asking, CohortFailed, Failure, Task, Update, ask, insist, is_client_operation, on_client, quorum_of


class Method:
    """Stands for any method: two operations, one of them marked."""

    @on_client
    def train(self, client: object, task: Task) -> None: ...

    def save(self) -> None: ...


def answer(task: Task) -> Update:
    return Update(task.client, num_examples=10 + task.client)


def test_only_the_mark_makes_a_client_operation() -> None:
    method = Method()
    assert is_client_operation(method.train)
    assert is_client_operation(Method.train)
    assert not is_client_operation(method.save)
    assert not is_client_operation("train")
    assert not is_client_operation(print)


def test_the_mark_leaves_the_function_itself() -> None:
    def operation() -> int:
        return 7

    assert on_client(operation) is operation
    assert operation() == 7


def test_ask_names_the_operation_the_client_the_tensors_and_the_settings() -> None:
    tensors = {"a": torch.ones(2)}
    task = ask(Method().train, 3, tensors, round=5, lr=0.1)
    assert (task.op, task.client, dict(task.settings)) == ("train", 3, {"round": 5, "lr": 0.1})
    assert task.tensors == tensors
    tensors["b"] = torch.zeros(1)
    assert set(task.tensors) == {"a"}, "the task must not change with the mapping it was made from"


def test_ask_without_tensors_or_settings_sends_none() -> None:
    task = ask(Method().train, 0)
    assert dict(task.tensors) == {}
    assert dict(task.settings) == {}


def test_ask_refuses_an_unmarked_function_and_says_how_to_mend_it() -> None:
    with pytest.raises(TypeError, match=r"save.*not a client operation.*@on_client"):
        ask(Method().save, 0)


def test_messages_cannot_be_changed() -> None:
    for message in (Task("train", 0), Update(0, 1), Failure(0, "gone")):
        with pytest.raises(dataclasses.FrozenInstanceError):
            message.client = 1  # type: ignore[misc]


def test_cohort_failed_names_every_client_and_its_reason() -> None:
    error = CohortFailed([Failure(4, "out of memory"), Failure(9, "no route")], answered=1, needed=2)
    assert str(error) == "1 of 3 clients answered, 2 are needed. client 4: out of memory; client 9: no route"
    assert error.failures == (Failure(4, "out of memory"), Failure(9, "no route"))


def asked(of: list[Task] | Asking) -> list[Task]:
    """The tasks of an asking whose quorum is nobody's to say but its own: whoever is missing is asked again."""
    assert isinstance(of, Asking) and of.needed == 0
    return of.tasks


def test_insist_asks_once_where_all_answer() -> None:
    tasks = [Task("init", k) for k in (2, 0, 1)]
    flow = insist(tasks)
    assert asked(next(flow)) == tasks
    with pytest.raises(StopIteration) as done:
        flow.send([answer(task) for task in tasks])
    assert done.value.value == [answer(task) for task in tasks]


def test_insist_asks_again_only_whom_it_must_and_keeps_the_order_of_the_tasks() -> None:
    tasks = [Task("init", k) for k in (2, 0, 1)]
    flow = insist(tasks)
    next(flow)
    assert asked(flow.send([answer(tasks[1])])) == [tasks[0], tasks[2]]
    assert asked(flow.send([answer(tasks[2])])) == [tasks[0]]
    with pytest.raises(StopIteration) as done:
        flow.send([answer(tasks[0])])
    assert [update.client for update in done.value.value] == [2, 0, 1]


def test_insist_takes_the_last_attempt_and_then_gives_up_naming_whom() -> None:
    tasks = [Task("init", k) for k in range(3)]
    flow = insist(tasks, attempts=2)
    next(flow)
    assert asked(flow.send([answer(tasks[1])])) == [tasks[0], tasks[2]]
    with pytest.raises(CohortFailed) as failed:
        flow.send([answer(tasks[0])])
    assert failed.value.failures == (Failure(2, "no answer to 'init' in 2 attempts"),)
    assert str(failed.value).startswith("2 of 3 clients answered, 3 are needed.")


def test_insist_shows_each_update_as_it_comes_and_keeps_what_is_left_of_it() -> None:
    seen: list[int] = []

    def take(update: Update) -> Update:
        seen.append(update.client)
        return replace(update, tensors={})

    tasks = [Task("init", k) for k in (2, 0)]
    flow = insist(tasks, take=take)
    first = next(flow)
    assert isinstance(first, Asking) and (first.tasks, first.needed) == (tasks, 0)
    again = flow.send([first.take(answer(tasks[1]))])
    assert isinstance(again, Asking) and again.tasks == [tasks[0]]
    with pytest.raises(StopIteration) as done:
        flow.send([again.take(answer(tasks[0]))])
    assert [(update.client, dict(update.tensors)) for update in done.value.value] == [(2, {}), (0, {})]
    assert seen == [0, 2]


def test_insist_on_nobody_asks_nobody() -> None:
    with pytest.raises(StopIteration) as done:
        next(insist([]))
    assert done.value.value == []


@pytest.mark.parametrize(
    ("asked", "share", "needed"),
    [(10, 0.5, 5), (10, 0.51, 6), (100, 0.07, 7), (3, 0.5, 2), (10, 0.0, 1), (10, 1.0, 10), (1, 0.1, 1), (0, 0.5, 0)],
)
def test_quorum_rounds_up_and_is_at_least_one_of_anybody(asked: int, share: float, needed: int) -> None:
    assert quorum_of(asked, share) == needed
