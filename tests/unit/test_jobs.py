"""Carrying out runs in this process, with runs that only pretend: what is started, in which order, and what a failure takes with it."""

from __future__ import annotations

import io
import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any, ClassVar

import pytest

from fedloom.messages import DIVERGED, CohortFailed, Failure
from fedloom.methods.fedavg import FedAvg
from fedloom.run.adopt import TAKEN_OVER
from fedloom.run.comparison import jobs
from fedloom.run.comparison.compare import homes
from fedloom.run.comparison.job import Event, failed, obey
from fedloom.run.comparison.jobs import Crew, Process, carry_out, order_of
from fedloom.run.comparison.plan import Ended, Run
from fedloom.run.costs.memory import Portion
from fedloom.run.errors import CheckpointError
from fedloom.run.experiment import Experiment, as_json
from fedloom.run.folder import claim
from fedloom.run.worker import ordered_experiment
from tests import tiny

BASE = Experiment(FedAvg(), clients=6, cohort=3, rounds=2)


@dataclass(frozen=True)
class Ours(FedAvg):
    """A method of somebody's own, with a kind of adapter and a field that no other has."""

    name: ClassVar[str] = "ours"
    adapter_kind: ClassVar[str] = "bias"
    strength: float = 1.0


def run(name: str, trained: str = "") -> Run:
    return Run(name, replace(BASE, seed=sum(map(ord, name))), trained)


class Heard:
    """A watch that keeps what it is told."""

    def __init__(self) -> None:
        self.said: list[tuple[str, ...]] = []
        self.notes: list[str] = []

    def started(self, run: str) -> None:
        self.said.append(("started", run))

    def heard(self, run: str, event: Event) -> None:
        if event["kind"] == "note":
            self.said.append(("note", run))
            self.notes.append(event["text"])

    def ended(self, run: str, how: Ended, before: bool) -> None:
        self.said.append(("before" if before else "ended" if how.results else "failed", run))

    def idle(self) -> None:
        raise AssertionError("nothing is waited for in one process")


@pytest.fixture
def pretended(monkeypatch: pytest.MonkeyPatch) -> None:
    """A run whose folder is named bad fails; any other writes what a run writes."""

    def perform(experiment: Experiment, folder: Path, trained: Path | None, tell: Any, track: Any) -> None:
        if folder.name.startswith("bad"):
            tell({"kind": "failed", "text": "no luck", "diverged": folder.name == "bad-nan"})
            return
        write(folder, experiment, trained=None if trained is None else trained.name)
        tell({"kind": "done"})

    monkeypatch.setattr(jobs, "perform", perform)


def write(folder: Path, experiment: Experiment, **results: Any) -> None:
    folder.mkdir(parents=True)
    (folder / "experiment.json").write_text(json.dumps(as_json(experiment)))
    (folder / "results.json").write_text(json.dumps({"name": folder.name, **results}))


def carried(out: Path, *runs: Run) -> tuple[Heard, dict[str, Ended]]:
    watch = Heard()
    return watch, carry_out(lambda ended: {r.name: r for r in runs}, homes(out), 1, watch)


def test_a_failure_is_kept_and_loses_nothing_else(tmp_path: Path, pretended: None) -> None:
    watch, ended = carried(tmp_path, run("a"), run("bad"), run("b"))
    assert [said for said in watch.said if said[0] != "started"] == [("ended", "a"), ("failed", "bad"), ("ended", "b")]
    assert {name: how.results for name, how in ended.items()} == {
        "a": {"name": "a", "trained": None},
        "bad": None,
        "b": {"name": "b", "trained": None},
    }
    assert (ended["bad"].failure, ended["bad"].diverged) == ("no luck", False)


def test_what_had_ended_is_not_run_again_and_may_be_called_otherwise(tmp_path: Path, pretended: None) -> None:
    write(tmp_path / "old-name", run("a").experiment, kept=True)
    watch, ended = carried(tmp_path, run("a"), run("b"))
    assert watch.said == [("before", "a"), ("started", "b"), ("ended", "b")]
    assert ended["a"].results == {"name": "old-name", "kept": True}


def test_finished_runs_of_somebodys_own_method_are_found_under_any_name(tmp_path: Path, pretended: None) -> None:
    """Its class is known from what is compared, not from the package; of two strengths each has its own."""
    mine = Run("ours", replace(BASE, method=Ours()))
    other = Run("ours-2", replace(BASE, method=Ours(strength=2.0)))
    write(tmp_path / "old-name", mine.experiment)
    write(tmp_path / "packaged", run("a").experiment)
    watch, ended = carried(tmp_path, mine, other, run("a"))
    assert watch.said == [("before", "ours"), ("before", "a"), ("started", "ours-2"), ("ended", "ours-2")]
    assert ended["ours"].results == {"name": "old-name"}


@pytest.mark.parametrize("content", ["", '{"final": ', "[1]"])
@pytest.mark.parametrize("name", ["results.json", "diverged.json"])
def test_a_torn_result_is_named_with_what_mends_it(tmp_path: Path, name: str, content: str) -> None:
    write(tmp_path / "a", run("a").experiment)
    (tmp_path / "a" / "results.json").unlink()
    (tmp_path / "a" / name).write_text(content)
    with pytest.raises(CheckpointError, match=rf"{tmp_path / 'a' / name} is corrupt: (.|\n)*Delete {tmp_path / 'a'} "):
        jobs.ended_before(tmp_path / "a", run("a").experiment)


def test_a_training_that_was_taken_over_is_told_where_runs_are_to_train_themselves(tmp_path: Path, pretended: None) -> None:
    """It has no rounds but its last: costs to a target are those of the whole run. Its note may be followed by others."""
    taken = f"{TAKEN_OVER}lora; evaluated after the last round only"
    write(tmp_path / "a", run("a").experiment, notes=["800 rows", taken, "another"])
    write(tmp_path / "b", run("b").experiment, notes=["800 rows"])
    watch, _ = carried(tmp_path, run("a"), run("b"))
    assert watch.said == [("note", "a"), ("before", "a"), ("before", "b")]
    (said,) = watch.notes
    assert "trained by lora" in said and f"delete {tmp_path / 'a'} " in said
    watch, _ = carried(tmp_path, run("b"), run("a", "b"))
    assert watch.said == [("before", "b"), ("before", "a")], "here it is what was asked for"


def test_what_diverged_is_not_run_again_until_its_folder_is_another_experiments(tmp_path: Path, pretended: None) -> None:
    """Also who was to take over such a training; a failure of any other kind is tried again."""
    runs = run("bad-nan"), run("c", "bad-nan"), run("bad")
    _, first = carried(tmp_path, *runs)
    watch, again = carried(tmp_path, *runs)
    assert watch.said == [("before", "bad-nan"), ("before", "c"), ("started", "bad"), ("failed", "bad")]
    assert {name: (how.failure, how.diverged) for name, how in again.items()} == {
        name: (how.failure, how.diverged) for name, how in first.items()
    }
    other = Run("bad-nan", replace(BASE, seed=7), "")
    assert jobs.ended_before(tmp_path / "bad-nan", other.experiment) is None, "it tells of another experiment"
    claim(tmp_path / "bad-nan", other.experiment)
    assert jobs.ended_before(tmp_path / "bad-nan", other.experiment) is None
    write(tmp_path / "new", run("new").experiment)
    (tmp_path / "new" / "diverged.json").write_text('{"failure": "with an earlier version"}')
    assert jobs.ended_before(tmp_path / "new", run("new").experiment) == Ended({"name": "new"}), "results count"


def test_training_that_is_taken_over_comes_first_and_its_failure_is_passed_on(
    tmp_path: Path, pretended: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("fedloom.run.comparison.jobs.holds_training", lambda folder: True)
    watch, ended = carried(tmp_path, run("b", "a"), run("a"), run("c", "bad-nan"), run("bad-nan"))
    assert [name for what, name in watch.said if what == "started"] == ["a", "b", "bad-nan"]
    assert ended["b"].results == {"name": "b", "trained": "a"}
    assert (ended["c"].failure, ended["c"].diverged) == ("bad-nan, whose training it was to take over, failed", True)


def test_training_of_which_the_results_alone_are_left_is_not_taken_over(tmp_path: Path, pretended: None) -> None:
    """A run out of an archive has no checkpoint: who was to take its training over trains itself, and says so."""
    write(tmp_path / "a", run("a").experiment)
    watch, ended = carried(tmp_path, run("a"), run("b", "a"))
    assert ended["b"].results == {"name": "b", "trained": None}
    assert ("note", "b") in watch.said


def test_what_ends_decides_what_else_is_wanted(tmp_path: Path, pretended: None) -> None:
    write(tmp_path / "first", run("first").experiment)

    def wanted(ended: Mapping[str, Ended]) -> dict[str, Run]:
        names = ["first", *(["second"] if "first" in ended else []), *(["third"] if "second" in ended else [])]
        return {name: run(name) for name in names}

    watch = Heard()
    assert list(carry_out(wanted, homes(tmp_path), 1, watch)) == ["first", "second", "third"]
    assert watch.said[0] == ("before", "first")


def test_an_order_is_read_as_it_was_written(tmp_path: Path) -> None:
    order = json.loads(json.dumps(order_of(run("a").experiment, tmp_path / "a", tmp_path / "b", ("mlflow",))))
    assert ordered_experiment(order) == run("a").experiment
    assert (order["folder"], order["trained"], order["track"]) == (str(tmp_path / "a"), str(tmp_path / "b"), ["mlflow"])


def test_each_of_several_runs_is_handed_its_share_of_the_machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of what was free before the first began, whatever has been taken since; of GPUs so many runs as are dealt out to each."""
    free = {"cpu": 1000}
    monkeypatch.setattr(jobs, "free_bytes", lambda device: free[device.type])
    for gpus, beside in ((0, 1), (1, 3), (2, 2), (4, 1)):
        monkeypatch.setattr("torch.cuda.device_count", lambda gpus=gpus: gpus)
        crew, free["cpu"] = Crew(3), 1000
        assert crew.portion() == Portion(3, 333, beside)
        free["cpu"] = 10
        assert crew.portion() == Portion(3, 333, beside)
    free["cpu"] = 1000
    assert Crew(3, expected=2).portion() == Portion(2, 500, 1) and Crew(3, expected=0).portion() == Portion(1, 1000, 1), (
        "as many as there are"
    )
    free["cpu"] = 10
    written = io.StringIO()
    started: Any = SimpleNamespace(stdin=written)
    monkeypatch.setattr(Crew, "_start", lambda self, slot, threads: Process(started))
    Crew(2).give(run("a"), tmp_path, None)
    assert json.loads(written.getvalue())["portion"] == {"jobs": 2, "room": 5, "on_gpu": 1}


@pytest.mark.parametrize("known", [True, False], ids=["by its files", "once it is loaded"])
def test_a_run_that_does_not_fit_into_its_share_is_refused(known: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Before its model is loaded, if its files tell, and again when it is; in the process that was handed the order."""
    if not known:
        monkeypatch.setattr("fedloom.run.loop.sizes_before", lambda experiment: None)
    else:
        monkeypatch.setattr("fedloom.run.loop.build", lambda experiment: pytest.fail("it was loaded"))
    asked = replace(BASE, model=str(tiny.folder()), max_train=12, max_validation=2, max_test=2)
    told: list[Event] = []
    obey(json.loads(json.dumps(order_of(asked, tmp_path / "a", None, portion=Portion(2, 5)))), told.append)
    assert told[-1]["kind"] == "failed" and "and 5 B are there for each of 2 runs at a time (--jobs): " in told[-1]["text"]
    assert ("data" in "".join(e["text"] for e in told[:-1])) and not (tmp_path / "a" / "experiment.json").exists()


def test_a_fault_of_the_program_tells_where_it_is() -> None:
    event = failed(TypeError("ours"))
    assert event["text"] == "a fault of the program: TypeError: ours"
    assert "TypeError" in event["trace"]
    assert not event["diverged"]
    assert "trace" not in failed(ValueError("theirs"))


def test_what_diverged_is_told_with_what_mends_it_in_a_comparison() -> None:
    """It is not gone on with, and no other folder is needed."""
    event = failed(CohortFailed((Failure(3, f"ValueError: {DIVERGED}"),), 0, 1))
    assert event["diverged"] and event["text"].endswith("name smaller --lrs. This one is not run again while its folder is there")
    assert "goes on from there" not in event["text"] and "another --out" not in event["text"]
    assert "goes on from there" in failed(CohortFailed((Failure(3, "MemoryError: none left"),), 0, 1))["text"]
