"""What every test has: offline, one thread, an empty cache, the same Hypothesis examples each run, and a marker from its folder.
Whatever tests put into the system's temporary folder goes with them, but what pytest keeps of its last three runs.

Watching which lines a test reaches makes Python take half as long again, in libraries too. Files that hold one law for every method, kind
or size go without (``no_cover``), and so do those of whole commands, of statistics and pages, and of methods whose every round another
watched file plays: the coverage that is asked for is that of all the others.
"""

from __future__ import annotations

import atexit
import gc
import importlib.util
import itertools
import os
import shutil
import signal
import tempfile
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("HF_DATASETS_OFFLINE", "1")
os.environ.setdefault("HF_DATASETS_DISABLE_PROGRESS_BARS", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("FLWR_TELEMETRY_ENABLED", "0")
os.environ.setdefault("MPLBACKEND", "Agg")

if "PYTEST_XDIST_WORKER" not in os.environ:  # workers share the folder of the process that started them
    os.environ.setdefault("PYTEST_DEBUG_TEMPROOT", tempfile.gettempdir())  # where pytest keeps the files of its last three runs
    tempfile.tempdir = os.environ["TMPDIR"] = tempfile.mkdtemp(prefix="fedloom-tests-")
    os.environ["FEDLOOM_CACHE"] = os.path.join(tempfile.tempdir, "cache")
    atexit.register(shutil.rmtree, tempfile.tempdir, ignore_errors=True)

import pytest
import torch
from hypothesis import settings

TESTS = Path(__file__).parent
TIERS_WITH_MARKER = ("conformance", "oracle", "integration", "gpu")

KEPT_EVERY = 10
"""Tests of one process after which what is in memory is taken for what stays: libraries, and what tests keep for those after them."""

_TESTS_DONE = itertools.count(1)

settings.register_profile("house", deadline=None, derandomize=True, max_examples=50)
settings.load_profile("house")

torch.set_num_threads(1)
os.fsync = lambda fd: (
    None
)  # a tenth of the time of whole runs; what a test ends by a kill, and not by a power cut, the system writes all the same
signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background ignores it, and so would the processes that tests stop


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark each test by its folder; skip, visibly, what this machine cannot run; what starts processes first.

    Tests that take half a minute, begun last, would leave one of two processes waiting for the other, or be divided between them, and
    what a file makes once would be made twice.
    """
    no_gpu = pytest.mark.skip(reason="no accelerator: torch.cuda.is_available() is False")
    no_flower = pytest.mark.skip(reason="the extra 'flower' is not installed: pip install 'fedloom[flower]'")
    no_track = pytest.mark.skip(reason="the extra 'track' is not installed: pip install 'fedloom[track]'")
    has_track = all(importlib.util.find_spec(name) is not None for name in ("tensorboard", "mlflow", "sqlalchemy", "alembic", "wandb"))
    has_flower = importlib.util.find_spec("flwr") is not None
    for item in items:
        if not item.path.is_relative_to(TESTS):
            continue
        tier = item.path.relative_to(TESTS).parts[0]
        if tier in TIERS_WITH_MARKER:
            item.add_marker(tier)
        if item.get_closest_marker("gpu") and not torch.cuda.is_available():
            item.add_marker(no_gpu)
        if item.get_closest_marker("flower") and not has_flower:
            item.add_marker(no_flower)
        if item.get_closest_marker("track") and not has_track:
            item.add_marker(no_track)
    items.sort(key=lambda item: item.get_closest_marker("integration") is None)


def pytest_collection_finish(session: pytest.Session) -> None:
    """Libraries and collected tests stay to the end: whoever looks for garbage, as a run does at its end, need not look at them again.
    That was more than a quarter of the time that whole runs took here."""
    _keep_what_is_there()


@pytest.hookimpl(trylast=True)
def pytest_runtest_logfinish() -> None:
    """So does what the tests so far left behind: libraries that they were the first to need, and what they keep for others."""
    if next(_TESTS_DONE) % KEPT_EVERY == 0:
        _keep_what_is_there()


def _keep_what_is_there() -> None:
    gc.collect()
    gc.freeze()


@pytest.fixture
def no_pictures(monkeypatch: pytest.MonkeyPatch) -> None:
    """Pages of runs and comparisons have empty pictures: drawing them takes two thirds of a tiny run's time. What pictures show is
    ``unit/test_report.py``'s and ``unit/test_summary.py``'s to hold; ``monkeypatch.undo()`` in a test draws them there."""
    for where in ("figures", "standings"):
        monkeypatch.setattr(f"fedloom.run.pages.{where}.render", lambda *_, **__: b'<svg xmlns="http://www.w3.org/2000/svg"></svg>')
