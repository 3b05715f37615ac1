"""What the C library does with freed memory. Those other than glibc do without these calls."""

from __future__ import annotations

import ctypes
import os

TUNABLES = "GLIBC_TUNABLES"
"""The environment variable that glibc reads when a process begins."""

LARGE_PAGES = "glibc.malloc.hugetlb=1"
"""What it says there of large pages (2 MB) wherever Linux has them."""

MOST_HEAPS = -8
"""glibc's M_ARENA_MAX."""


def give_memory_back() -> None:
    """Return to the system what this process has freed.

    glibc keeps it, in holes between the little that is still in use. Waves are not quite alike, so what one leaves does not fit the next,
    and after many of them, or after a dozen runs, the holes are most of the process.
    """
    try:
        trim = ctypes.CDLL(None).malloc_trim
    except AttributeError:
        return
    trim(0)


def share_heaps() -> None:
    """Let all threads that begin from now on share two heaps.

    glibc makes eight a processor, for threads that allocate at the same time. Threads that take turns, as those of a server do which mostly
    hold Python's lock, leave holes in all of them instead.
    """
    try:
        option = ctypes.CDLL(None).mallopt
    except AttributeError:
        return
    option(MOST_HEAPS, 2)


def in_large_pages() -> dict[str, str]:
    """What the environment of a process that is to be started says, so that glibc asks for large pages.

    A whole model's gradient, moments or message is mapped anew each time, and each of its 4 kB pages is a fault: with pages of 2 MB whole
    models take a quarter less of the processor's time (docs/log.md). What the user has set there stays, and decides.
    """
    already = os.environ.get(TUNABLES, "")
    return {TUNABLES: already if "hugetlb" in already else ":".join(filter(None, (already, LARGE_PAGES)))}
