"""Calls to the C library that others than glibc do without."""

from __future__ import annotations

import platform
import subprocess
import sys
from pathlib import Path
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


def test_a_process_is_told_of_large_pages_unless_the_user_has_said_otherwise(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(heap.TUNABLES, raising=False)
    assert heap.in_large_pages() == {"GLIBC_TUNABLES": "glibc.malloc.hugetlb=1"}
    monkeypatch.setenv(heap.TUNABLES, "glibc.malloc.tcache_count=3")
    assert heap.in_large_pages() == {"GLIBC_TUNABLES": "glibc.malloc.tcache_count=3:glibc.malloc.hugetlb=1"}
    monkeypatch.setenv(heap.TUNABLES, "glibc.malloc.hugetlb=0")
    assert heap.in_large_pages() == {"GLIBC_TUNABLES": "glibc.malloc.hugetlb=0"}


SETTING = Path("/sys/kernel/mm/transparent_hugepage/enabled")
GIVES = platform.libc_ver()[0] == "glibc" and SETTING.is_file() and "[madvise]" in SETTING.read_text()

HELD = """
import re
held = bytes(2**26 - 1) + b"1"
print(re.search(r"AnonHugePages: *([0-9]+)", open("/proc/self/smaps_rollup").read())[1])
"""


@pytest.mark.skipif(not GIVES, reason="no glibc, or a Linux that gives large pages never or always")
def test_a_process_that_is_told_has_them() -> None:
    held = [int(subprocess.check_output([sys.executable, "-c", HELD], env=env)) for env in ({}, heap.in_large_pages())]
    assert held[0] == 0
    assert held[1] >= 2**15, "at least half of 64 MB"
