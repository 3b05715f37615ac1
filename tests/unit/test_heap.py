"""Calls to the C library that others than glibc do without."""

from __future__ import annotations

from types import SimpleNamespace

import pytest

from fedloom.engines import heap


def test_where_the_library_knows_none_of_it_nothing_happens(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(heap.ctypes, "CDLL", lambda name: SimpleNamespace())
    heap.give_memory_back()
    heap.share_heaps()


def test_all_threads_share_two_heaps(monkeypatch: pytest.MonkeyPatch) -> None:
    told: list[tuple[int, int]] = []
    monkeypatch.setattr(heap.ctypes, "CDLL", lambda name: SimpleNamespace(mallopt=lambda *words: told.append(words)))
    heap.share_heaps()
    assert told == [(-8, 2)], "M_ARENA_MAX of malloc.h"
