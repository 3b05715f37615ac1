"""What a machine says to another of an error: the kind and the place, and no word of the data."""

from __future__ import annotations

import re
import sys
from collections.abc import Callable
from multiprocessing import Pipe
from pathlib import Path
from typing import NoReturn

import pytest
import torch

from fedloom.client import store
from fedloom.client.store import ClientStore, StoreError
from fedloom.compute.lowrank import Diverged
from fedloom.data.sources import load
from fedloom.data.tasks import DataError
from fedloom.engines import workers
from fedloom.engines.workers import WorkerError, receive
from fedloom.messages import DIVERGED
from fedloom.model.loading import load as load_model
from fedloom.model.places import ModelError, folder_of
from fedloom.model.spans import SpanError
from fedloom.run import worker
from fedloom.run.deployment import device
from fedloom.run.deployment.greeting import Own, digest_of_file, kinds_of
from fedloom.run.errors import ExperimentError
from fedloom.run.recipes import kind_in, resolve
from fedloom.telling import for_others, in_full
from fedloom.wire import WireError
from tests.conformance.test_own_methods import MINE

SECRET = "Mrs Miller, born 3 May 1961"
RAISED = r"raised at test_telling.py:\d+: its text may quote data, and is in the device's own log alone"


def raised(error: Exception) -> Exception:
    try:
        raise error
    except Exception as caught:
        return caught


@pytest.mark.parametrize(
    ("error", "told"),
    [
        (DataError(f"row 3 is {SECRET}", "row 3 of the train split is odd"), "^DataError: row 3 of the train split is odd$"),
        (DataError(f"the columns are: {SECRET}"), f"^DataError, {RAISED}$"),
        (SpanError(f"remove the question {SECRET}"), f"^SpanError, {RAISED}$"),
        (KeyError(SECRET), f"^KeyError, {RAISED}$"),
        (UnicodeEncodeError("utf-8", SECRET, 0, 1, "no"), f"^UnicodeEncodeError, {RAISED}$"),
        (WireError("tensor 'x' holds NaN"), "^WireError: tensor 'x' holds NaN$"),
        (WorkerError("worker 0 could not start"), "^WorkerError: worker 0 could not start$"),
        (Diverged(f"a gradient is not finite; {DIVERGED}"), f"^Diverged: a gradient is not finite; {DIVERGED}$"),
        (ExperimentError(f"line 3: {SECRET}", "line 3"), "^ExperimentError: line 3$"),
        (ExperimentError("there is no recipe"), "^ExperimentError: there is no recipe$"),
        (ModelError(f"it has {SECRET}", "a folder"), "^ModelError: a folder$"),
        (MemoryError("one pass needs 3 GiB"), "^MemoryError: one pass needs 3 GiB$"),
    ],
    ids=lambda value: type(value).__name__,
)
def test_only_words_that_may_be_told_are_told(error: Exception, told: str) -> None:
    assert re.search(told, for_others(raised(error))) and SECRET not in for_others(raised(error))
    assert in_full(error) == f"{type(error).__name__}: {error}"


BAD = {
    "label": (
        "train.csv",
        f'text,label\nhello,a\nhi,"{SECRET}"\n',
        "DataError: row 1 of the train split has a label that is no class, or none",
    ),
    "torn line": ("train.jsonl", f'{{"text": "x", "label": "a"}}\n{{"text": "{SECRET}, has', "DataError: line 2 is not JSON"),
    "no object": ("train.json", f'["{SECRET}"]', "DataError: record 0 is no object of columns"),
    "cells": ("train.csv", f"{SECRET}\nx,y,z\n", "DataError: line 2 has 3 cells, and the first 2"),
    "no header": ("train.csv", f'"{SECRET}","{SECRET}"\n', "DataError: the first line does not name each column once"),
    "columns": ("train.csv", f'"{SECRET}",1.5\n"x",2.5\n', "DataError, raised at "),
}


@pytest.mark.parametrize(("name", "text", "told"), BAD.values(), ids=BAD)
def test_no_row_and_no_label_is_quoted_to_another_machine(name: str, text: str, told: str, tmp_path: Path) -> None:
    """They were in the server's log, and in what every other device may ask it for."""
    (tmp_path / name).write_text(text)
    with pytest.raises(DataError, match="Mrs Miller") as caught:
        load(tmp_path, seed=3, task="classification", metric="accuracy", classes=("a", "b"))
    assert for_others(caught.value).startswith(told) and "Miller" not in for_others(caught.value)


def test_what_a_methods_own_file_or_a_models_folder_quotes_is_not_told(tmp_path: Path) -> None:
    (tmp_path / "own.py").write_text(f"x = 1\nraise KeyError({SECRET!r})\n")
    (tmp_path / "miller_1961.csv").write_text("")
    recipe, model = str(tmp_path / "own.py"), str(tmp_path)
    for wrong, told in (
        (lambda: resolve(recipe), r"KeyError in line 2$"),
        (lambda: folder_of(model), "without config.json$"),
    ):
        with pytest.raises((ExperimentError, ModelError), match="(?i)miller") as caught:
            wrong()
        assert re.search(told, for_others(caught.value)) and "iller" not in for_others(caught.value)


def no_room(tensors: object, path: Path) -> NoReturn:
    raise OSError(28, "No space left on device", str(path))


def test_no_folder_of_a_device_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Paths have names of people and patients in them. Others ask the server what failed, and were told them."""
    home = tmp_path / "miller_1961"
    (home / "broken").mkdir(parents=True)
    (home / "broken" / "config.json").write_text("{}")
    (home / "both").mkdir()
    (home / "both" / "config.json").write_text('{"model_type": "t5"}')
    (home / "empty.py").write_text("")
    (home / "two.py").write_text(MINE)
    lost, full = ClientStore(home / "states"), ClientStore(home / "states")
    lost.restore({"3": f"client-3-{'0' * 16}.safetensors"})
    monkeypatch.setattr(store, "save_file", no_room)
    greeting = {"recipe": "0" * 16, "experiment": {"method": {"name": "other"}}}
    same = {**greeting, "recipe": digest_of_file(home / "two.py")}
    wrong: dict[str, Callable[[], object]] = {
        "^ExperimentError: this device's recipe comes to": lambda: kinds_of(greeting, Own("data", recipe=str(home / "two.py"))),
        "^ExperimentError: the recipe defines no method 'other'; it": lambda: kinds_of(same, Own("data", recipe=str(home / "two.py"))),
        "^ExperimentError: there is no recipe$": lambda: kinds_of(greeting, Own("data", recipe=str(home / "gone.py"))),
        "^ExperimentError: the recipe defines no method$": lambda: kind_in(home / "empty.py", "other"),
        "^ModelError: the model's folder is not there$": lambda: folder_of(str(home / "gone" / "model")),
        "^ModelError: this device's model cannot be loaded: [A-Za-z]+$": lambda: load_model(str(home / "broken"), num_labels=2),
        r"^ModelError: this device's model is an encoder-decoder \(t5\);": lambda: load_model(str(home / "both"), num_labels=2),
        "^DiskError: the state of device 3 could not be written to its folder": lambda: full.save(3, {"a": torch.zeros(1)}, {}),
        "^StoreError: client state client-3-0+.safetensors cannot be read": lambda: lost.load(3),
    }
    for told, fails in wrong.items():
        with pytest.raises((ExperimentError, ModelError, StoreError), match="miller_1961") as caught:
            fails()
        assert re.search(told, for_others(caught.value)) and "iller" not in for_others(caught.value), for_others(caught.value)


def test_a_device_that_cannot_begin_tells_its_own_log_all_and_the_server_no_word_of_its_data(monkeypatch: pytest.MonkeyPatch) -> None:
    here, there = Pipe()

    def refused(_: object) -> NoReturn:
        raise DataError(f"row 1 of the train split has the label {SECRET!r}", "row 1 of the train split has a label that is no class")

    monkeypatch.setattr(workers, "ordered", lambda number: (there, {}))
    monkeypatch.setattr(worker, "end_with_parent", lambda: None)
    monkeypatch.setattr(device, "hosted", refused)
    monkeypatch.setattr(sys, "argv", ["device", "0"])
    assert device.main() == 1
    said, failed = receive(here)[0], receive(here)[0]
    assert said["kind"] == "said" and said["text"] == f"DataError: row 1 of the train split has the label {SECRET!r}"
    assert failed["kind"] == "failed" and failed["text"] == "DataError: row 1 of the train split has a label that is no class"
