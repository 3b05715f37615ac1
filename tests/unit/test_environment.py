"""What the environment of a process that shares this machine says."""

from __future__ import annotations

import pytest
import torch

from fedloom.engines.environment import environment
from fedloom.model import machine
from fedloom.run import world
from fedloom.run.comparison import jobs


def test_each_process_has_one_thread_unless_told_and_none_for_its_tokenizer() -> None:
    assert environment(0, 0, 4)["OMP_NUM_THREADS"] == environment(3, 0, 4)["MKL_NUM_THREADS"] == "1"
    assert environment(0, 3, 4)["OMP_NUM_THREADS"] == environment(0, 3, 4)["MKL_NUM_THREADS"] == "3"
    assert environment(0, 3, 4)["TOKENIZERS_PARALLELISM"] == "false"


def test_each_process_takes_an_equal_part_of_a_processors_memory_and_all_that_is_free_of_a_gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine, "free_bytes", lambda device: 1000)
    cpu, gpu = torch.device("cpu"), torch.device("cuda", 0)
    monkeypatch.delenv(machine.SHARERS, raising=False)
    assert (machine.own_part(cpu), machine.own_part(gpu)) == (1000, 1000), "nobody else was started"
    monkeypatch.setenv(machine.SHARERS, environment(1, 1, 3)[machine.SHARERS])
    assert (machine.own_part(cpu), machine.own_part(gpu)) == (333, 1000)
    assert environment(0, 1, 2)[machine.SHARERS] == "6", "two workers of one of three runs at a time"


def test_each_process_asks_for_large_pages() -> None:
    assert "hugetlb" in environment(0, 0, 1)["GLIBC_TUNABLES"]


@pytest.mark.parametrize(
    ("visible", "count", "expected"),
    [
        ("", 0, [None, None]),
        ("", 1, [None, None]),
        ("", 2, ["0", "1", "0"]),
        ("5,7", 2, ["5", "7", "5"]),
        ("MIG-a,MIG-b", 2, ["MIG-a", "MIG-b"]),
    ],
)
def test_of_several_gpus_each_has_one(visible: str, count: int, expected: list[str | None], monkeypatch: pytest.MonkeyPatch) -> None:
    """Of those that may be seen, by the names that they have there."""
    monkeypatch.setattr(torch.cuda, "device_count", lambda: count)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    assert [environment(i, 1, 3).get("CUDA_VISIBLE_DEVICES") for i in range(len(expected))] == expected


def test_workers_of_a_run_and_processes_of_a_comparison_have_the_same() -> None:
    assert jobs.environment is world.environment is environment  # type: ignore[attr-defined]
