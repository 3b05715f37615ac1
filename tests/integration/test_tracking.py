"""Trackers with their real local backends: what the library reads back is what ``rounds.jsonl`` holds, however often the run was killed."""

from __future__ import annotations

import importlib.util
import json
import logging
import math
import os
import subprocess
import sys
from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import cache
from pathlib import Path
from tempfile import mkdtemp
from typing import Any

import pytest

from fedloom import cli
from fedloom.run import checkpoint, loop
from fedloom.run.checkpoint import fingerprint_of
from fedloom.run.errors import ExperimentError
from fedloom.run.loop import run
from fedloom.run.tracking import KINDS, Kind, Tracking, numbers
from tests import small

pytestmark = pytest.mark.no_cover

Found = dict[str, list[tuple[int, float]]]
"""Of each number the (round, value) pairs, in the order in which the tracker has them."""

SCORES = {"final/personalised", "final/global", "best/personalised", "best/global"}


@pytest.fixture(autouse=True)
def nobodys_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    """As if the user had set nothing; and what a run sets is gone afterwards."""
    for name in [name for name in os.environ if name.startswith(("MLFLOW_", "WANDB_"))]:
        monkeypatch.delenv(name)
    for kind in KINDS.values():
        for name, value in kind.environment.items():
            monkeypatch.setenv(name, value)


def of_tensorboard(folder: Path) -> tuple[Found, Found, Mapping[str, Any]]:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
    from tensorboard.plugins.hparams.plugin_data_pb2 import HParamsPluginData

    read = EventAccumulator(str(folder / "tensorboard"), size_guidance={"scalars": 0})
    read.Reload()
    (settings_told,) = read.Tensors("settings")
    assert b"| rounds |" in settings_told.tensor_proto.string_val[0]
    told = {tag: [(event.step, event.value) for event in read.Scalars(tag)] for tag in read.Tags()["scalars"]}
    content = read.SummaryMetadata("_hparams_/session_start_info").plugin_data.content
    hparams = HParamsPluginData.FromString(content).session_start_info.hparams
    settings = {key: value.string_value or value.number_value for key, value in hparams.items()}
    return *parted(told), settings


def of_mlflow(folder: Path) -> tuple[Found, Found, Mapping[str, Any]]:
    from mlflow.tracking import MlflowClient

    client = MlflowClient(tracking_uri=f"sqlite:///{folder / 'mlflow' / 'mlflow.db'}")
    (experiment,) = [e for e in client.search_experiments() if e.name == "fedloom"]
    (found,) = client.search_runs([experiment.experiment_id])
    assert found.info.run_name == folder.name
    assert found.info.status == "FINISHED"
    history = {key: client.get_metric_history(found.info.run_id, key) for key in found.data.metrics}
    told = {key: [(metric.step, metric.value) for metric in metrics] for key, metrics in history.items()}
    return *parted(told), found.data.params


def of_wandb(folder: Path) -> tuple[Found, Found, Mapping[str, Any]]:
    """The one offline run: a log of records, each a message of the library's own protocol."""
    from fedloom.run.trackers.wandb import records

    (path,) = (folder / "wandb").glob("offline-run-*/run-*.wandb")
    told: Found = {}
    ended: Found = {}
    settings: dict[str, Any] = {}
    for record in records(path):
        if record.WhichOneof("record_type") == "history":
            row = {item.key or "/".join(item.nested_key): json.loads(item.value_json) for item in record.history.item}
            for key, value in row.items():
                if not key.startswith("_"):
                    told.setdefault(key, []).append((row.get("_step", record.history.step.num), value))
        for item in record.summary.update:
            if (item.key or "/".join(item.nested_key)) in SCORES:
                ended[item.key or "/".join(item.nested_key)] = [(-1, json.loads(item.value_json))]
        for item in record.run.config.update:
            settings[item.key] = json.loads(item.value_json)
    return told, ended, settings


def parted(told: Found) -> tuple[Found, Found]:
    """(the numbers of rounds, the scores at the end)."""
    ends = {key: values for key, values in told.items() if key.startswith(("final/", "best/"))}
    return {key: values for key, values in told.items() if key not in ends}, ends


READ: dict[str, Callable[[Path], tuple[Found, Found, Mapping[str, Any]]]] = {
    "tensorboard": of_tensorboard,
    "mlflow": of_mlflow,
    "wandb": of_wandb,
}
every_tracker = pytest.mark.parametrize("name", [pytest.param(name, marks=pytest.mark.track) for name in READ])


def written(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "rounds.jsonl").read_text().splitlines()]


def agrees(name: str, folder: Path) -> None:
    """The tracker has every number of every round once, in order, and what the run came to."""
    told, ended, settings = READ[name](folder)
    expected: Found = {}
    for row in written(folder):
        for key, value in numbers(row).items():
            expected.setdefault(key, []).append((row["round"], value))
    assert {"loss", "personalised", "validation/global", "bytes_up", "bytes_down", "host_seconds", "answered", "failed"} <= set(expected)
    assert told.keys() == expected.keys()
    for key, values in expected.items():
        assert [step for step, _ in told[key]] == [step for step, _ in values], key
        for (_, found), (_, wanted) in zip(told[key], values, strict=True):
            assert math.isclose(found, wanted, rel_tol=1e-6 if name == "tensorboard" else 0), key  # float32
    results = json.loads((folder / "results.json").read_text())
    assert set(ended) >= SCORES
    for key in SCORES:
        at, protocol = key.split("/")
        assert [value for _, value in ended[key]] == [pytest.approx(results[at][protocol], rel=1e-6)]
    assert settings["digest"] == results["digest"]
    assert float(settings["method.lr"]) == results["experiment"]["method"]["lr"]
    assert (folder / name / "complete").exists()


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file() and path.name != ".lock"}


@cache
def untracked() -> tuple[Path, dict[str, Any]]:
    """The same run without trackers."""
    folder = Path(mkdtemp(prefix="untracked-")) / "run"
    return folder, run(small.experiment(rounds=3, evaluate_every=2), folder, plain=True)


@every_tracker
def test_a_tracker_has_what_the_rows_have_and_changes_no_result_and_a_run_again_adds_nothing(name: str, tmp_path: Path) -> None:
    results = run(small.experiment(rounds=3, evaluate_every=2), tmp_path / "run", plain=True, track=(name, name))
    agrees(name, tmp_path / "run")
    alone, expected = untracked()
    assert fingerprint_of(tmp_path / "run") == fingerprint_of(alone)
    same = ("final", "best", "digest", "bytes_up", "bytes_down", "per_device", "experiment")
    assert {key: results[key] for key in same} == {key: expected[key] for key in same}
    assert (tmp_path / "run" / "experiment.json").read_bytes() == (alone / "experiment.json").read_bytes()
    before = contents(tmp_path / "run")
    run(small.experiment(rounds=3, evaluate_every=2), tmp_path / "run", plain=True, track=(name,))
    assert contents(tmp_path / "run") == before
    (tmp_path / "run" / name / "complete").unlink()  # as if killed right before it was marked
    run(small.experiment(rounds=3, evaluate_every=2), tmp_path / "run", plain=True, track=(name,))
    agrees(name, tmp_path / "run")


class Killed(BaseException):
    """As good as kill −9: nobody catches it."""


@every_tracker
def test_a_run_killed_between_row_and_checkpoint_goes_on_in_the_same_tracked_run(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The row of round 2 is written, taken back, and written again with other times: a tracker has only the second."""
    save, rounds = checkpoint.save, small.experiment(rounds=3)

    def dying(folder: Path, saved: Any, store: Any) -> checkpoint.Saved:
        if saved.state.round == 2:
            raise Killed
        return save(folder, saved, store)

    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(checkpoint, "save", dying)
        run(rounds, tmp_path / "run", plain=True, track=(name,))
    first = (tmp_path / "run" / name / "id").read_text()
    assert len(written(tmp_path / "run")) == 3
    assert not (tmp_path / "run" / name / "complete").exists()
    run(rounds, tmp_path / "run", plain=True, track=(name,))
    agrees(name, tmp_path / "run")
    assert (tmp_path / "run" / name / "id").read_text() == first


DYING = """
import os, signal, sys
from dataclasses import replace
from pathlib import Path
from fedloom.run import tracking
from fedloom.run.loop import run
from tests import small

folder, data, model, *names = sys.argv[1:]
true = tracking.Tracking.round
for when, at in (("before", 1), ("after", 3)):

    def dying(self, row):
        if when == "after":
            true(self, row)
        if row["round"] == at:
            os.kill(os.getpid(), signal.SIGKILL)
        if when == "before":
            true(self, row)

    process = os.fork()
    if process == 0:
        tracking.Tracking.round = dying
        run(replace(small.experiment(rounds=4), data=data, model=model), Path(folder), plain=True, track=names)
        os._exit(0)
    _, status = os.waitpid(process, 0)
    rows = len((Path(folder) / "rounds.jsonl").read_text().splitlines())
    ids = [(Path(folder) / name / "id").read_text() for name in names]
    print(f"killed by {os.WTERMSIG(status)} with {rows} rows, known as {ids}", flush=True)
"""


@pytest.mark.track
def test_kill_9_before_and_after_a_round_is_told_loses_none_and_repeats_none(tmp_path: Path) -> None:
    """What a library's own process had not written when its run was killed is told again."""
    experiment, folder = small.experiment(rounds=4), tmp_path / "run"
    words = [sys.executable, "-c", DYING, str(folder), experiment.data, experiment.model, *READ]
    done = subprocess.run(words, capture_output=True, text=True, cwd=Path(__file__).parents[2])
    assert [step for step, _ in of_tensorboard(folder)[0]["bytes_up"]] == [0, 1, 2, 3], "on the disk as soon as it is told"
    run(experiment, folder, plain=True, track=tuple(READ))
    for name in READ:
        agrees(name, folder)
    ids = [(folder / name / "id").read_text() for name in READ]
    killed = [line for line in done.stdout.splitlines() if line.startswith("killed")]
    assert killed == [f"killed by 9 with {rows} rows, known as {ids}" for rows in (2, 4)], done.stderr


@pytest.mark.track
def test_the_log_of_a_long_run_is_read_to_its_end(tmp_path: Path) -> None:
    """Many blocks of 32 KiB, and a record that is longer than one."""
    row = {"loss": 0.5, "bytes_up": 8, "answered": [0, 1], "failed": {}, "validation": {"global": 0.25}}
    with Tracking(("wandb",), replace(small.experiment(), template="{mask}" * 20000, head="cloze"), tmp_path) as tracking:
        for round in range(600):
            tracking.round({"round": round, **row})
        tracking.end({"final": {"personalised": 0.5}, "best": {"personalised": 0.25}})
    (path,) = (tmp_path / "wandb").glob("offline-run-*/run-*.wandb")
    assert path.stat().st_size > 4 * 32768
    told, ended, _ = of_wandb(tmp_path)
    assert told["validation/global"] == [(round, 0.25) for round in range(600)]
    assert ended == {"final/personalised": [(-1, 0.5)], "best/personalised": [(-1, 0.25)]}


@every_tracker
def test_a_run_that_has_ended_is_told_afterwards(name: str, tmp_path: Path) -> None:
    run(small.experiment(), tmp_path / "run", plain=True)
    run(small.experiment(), tmp_path / "run", plain=True, track=(name,))
    agrees(name, tmp_path / "run")


class Broken:
    """A tracker on a full disk: it can be opened and told one round."""

    def __init__(self) -> None:
        self.told: list[int] = []

    def known(self) -> list[int]:
        return []

    def round(self, round: int, numbers: Mapping[str, float]) -> None:
        self.told.append(round)
        if round:
            raise OSError(28, "No space left on device")

    def end(self, round: int, numbers: Mapping[str, float]) -> None:
        raise AssertionError("told after it failed")

    def close(self, failed: bool) -> None:
        raise AssertionError("told after it failed")


@pytest.mark.track
def test_a_tracker_that_fails_is_warned_of_once_and_neither_the_run_nor_another_tracker_ends(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    broken, true = Broken(), KINDS["wandb"]
    monkeypatch.setitem(KINDS, "wandb", Kind(lambda subject: broken, ()))
    with caplog.at_level(logging.WARNING, "fedloom"):
        results = run(small.experiment(rounds=3), tmp_path / "run", plain=True, track=("wandb", "tensorboard"))
    assert broken.told == [0, 1]
    assert results["final"]["round"] == 3
    (warning,) = [record.getMessage() for record in caplog.records if record.name == "fedloom"]
    assert warning.startswith("--track wandb failed (OSError: [Errno 28] No space left on device); the run goes on without it")
    agrees("tensorboard", tmp_path / "run")
    assert not (tmp_path / "run" / "wandb" / "complete").exists()
    monkeypatch.setitem(KINDS, "wandb", true)
    run(small.experiment(rounds=3), tmp_path / "run", plain=True, track=("wandb", "tensorboard"))
    agrees("wandb", tmp_path / "run")


@every_tracker
def test_a_library_that_cannot_write_does_not_end_the_run(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """A file lies where the folder should be: put there when the run begins to train."""
    claim = loop.claim

    def claimed(folder: Path, experiment: Any) -> None:
        claim(folder, experiment)
        (folder / name).write_text("in the way")

    monkeypatch.setattr(loop, "claim", claimed)
    with caplog.at_level(logging.WARNING, "fedloom"):
        assert run(small.experiment(), tmp_path / "run", plain=True, track=(name,))["final"]["round"] == 2
    assert [f"--track {name} failed" in record.getMessage() for record in caplog.records if record.name == "fedloom"] == [True]


@pytest.mark.track
def test_the_users_environment_says_where(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from mlflow.tracking import MlflowClient

    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{tmp_path / 'ours.db'}")
    monkeypatch.setenv("MLFLOW_EXPERIMENT_NAME", "questions")
    monkeypatch.setenv("WANDB_MODE", "disabled")
    run(small.experiment(), tmp_path / "run", plain=True, track=("mlflow", "wandb"))
    client = MlflowClient(tracking_uri=f"sqlite:///{tmp_path / 'ours.db'}")
    experiment = client.get_experiment_by_name("questions")
    assert experiment is not None
    (found,) = client.search_runs([experiment.experiment_id])
    assert [metric.step for metric in client.get_metric_history(found.info.run_id, "loss")] == [1, 2]
    assert not (tmp_path / "run" / "mlflow" / "mlflow.db").exists()
    assert not [*(tmp_path / "run" / "wandb").glob("*run-*")]


@pytest.mark.track
def test_a_server_that_is_away_does_not_end_the_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://127.0.0.1:9")
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    with caplog.at_level(logging.WARNING, "fedloom"):
        assert run(small.experiment(), tmp_path / "run", plain=True, track=("mlflow",))["final"]["round"] == 2
    assert ["--track mlflow failed" in record.getMessage() for record in caplog.records if record.name == "fedloom"] == [True]


@pytest.mark.parametrize(("name", "libraries"), [("tensorboard", ["tensorboard"]), ("mlflow", ["mlflow", "alembic"]), ("wandb", ["wandb"])])
def test_a_missing_library_is_an_error_before_anything_is_computed(
    name: str, libraries: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    true = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda each, *more: None if each in libraries else true(each, *more))
    monkeypatch.setattr(loop, "build", lambda experiment: pytest.fail("it was begun"))
    asked = small.experiment()
    words = ["--data", asked.data, "--model", asked.model, "--out", str(tmp_path / "run"), "--track", name]
    for command in ("run", "compare"):
        assert cli.main([command, "lora", *words]) == 2
        said = capsys.readouterr().err
        assert f"--track {name} needs {', '.join(libraries)}" in said
        assert "pip install -e '.[track]'" in said
        assert not (tmp_path / "run").exists()


def test_a_tracker_that_does_not_exist_is_refused_naming_those_that_do(tmp_path: Path) -> None:
    with pytest.raises(ExperimentError, match="--track comet: there is no such tracker; there are tensorboard, mlflow, wandb"):
        run(small.experiment(), tmp_path / "run", track=("comet",))
    assert not (tmp_path / "run").exists()


@pytest.mark.track
def test_a_comparison_tracks_each_run_also_one_that_takes_over_a_training(tmp_path: Path) -> None:
    asked = small.experiment()
    size = ["--clients", "4", "--cohort", "3", "--rounds", "2", "--max-length", "16"]
    words = ["--data", asked.data, "--model", asked.model, *size, "--share-training", "--out", str(tmp_path), "--track", "tensorboard"]
    assert cli.main(["compare", "lora", "lora-prior", *words]) == 0
    folders = sorted(path.parent for path in tmp_path.glob("*/experiment.json"))
    assert len(folders) == 2
    for folder in folders:
        assert {step for step, _ in of_tensorboard(folder)[0]["bytes_up"]} == {0, 1, 2}
        assert (folder / "tensorboard" / "complete").exists()
