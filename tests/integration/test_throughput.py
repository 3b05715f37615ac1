"""The peer benchmark: its job is Fedloom's own work, other work is refused, and its rows say what was measured and what was not.

No peer is installed here. Speed is not tested.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from statistics import median

import pytest

from bench.figures import throughput
from bench.figures.throughput import FEDLOOM, RIVALS, SCRIPT, Contestant, Course, Failed, Race, Taken, crews, rows, turn
from bench.job import experiment, export
from bench.peers import environment
from bench.peers.environment import NotInstalled, python_of


@pytest.fixture(scope="module")
def course(tmp_path_factory: pytest.TempPathFactory) -> Course:
    """A small job of one round, with what the research script made of it in float32."""
    here = Course(tmp_path_factory.mktemp("job"), 1)
    export(here.folder, experiment(1, rows=400))
    assert here.run(SCRIPT, "float32", "eager", (1, 1))[0]["examples"] == [sum(len(d["rows"]) for d in job(here)["rounds"][0])]
    return here


def job(course: Course) -> dict:
    return json.loads((course.folder / "job.json").read_text())


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_the_research_script_and_fedloom_do_the_same_work(course: Course, attention: str) -> None:
    course.run(FEDLOOM, "float32", attention, (1, 1))
    assert 0 < course.apart(FEDLOOM, "float32") < 1e-3


def test_the_job_is_a_hundred_devices_ten_a_round_batch_eight_one_epoch(course: Course) -> None:
    told = job(course)
    assert (told["devices"], told["batch"], told["rank"], told["alpha"], told["clip"]) == (100, 8, 8, 16.0, 1.0)
    (cohort,) = told["rounds"]
    assert len({device["device"] for device in cohort}) == len(cohort) == 10
    trained = [row for device in cohort for row in device["rows"]]
    assert len(set(trained)) == len(trained)


def test_one_example_less_on_one_device_is_other_work(course: Course, tmp_path: Path) -> None:
    told = job(course)
    max(told["rounds"][0], key=lambda device: len(device["rows"]))["rows"].pop()
    for name in ("data.npz", "start.safetensors"):
        (tmp_path / name).symlink_to(course.folder / name)
    (tmp_path / "job.json").write_text(json.dumps(told))
    other = Course(tmp_path, 1)
    other.run(SCRIPT, "float32", "eager", (1, 1))
    other.run(FEDLOOM, "float32", "eager", (1, 1))  # it draws its batches itself
    with pytest.raises(Failed, match="did other work: its tensors are 0"):
        other.apart(FEDLOOM, "float32")
    with pytest.raises(Failed, match="left no tensors"):
        other.apart(Contestant("pfl", "pfl"), "float32")


def test_a_contestant_that_breaks_is_told_with_its_last_words(course: Course, monkeypatch: pytest.MonkeyPatch) -> None:
    stale = course.folder / "script-bf16.json"
    stale.write_text("{}")
    mine = Taken()
    turn(course, SCRIPT, "bf16", "no such attention", (1, 1), mine)
    assert mine.fault.startswith("exit code 1: ValueError")
    assert not mine.rates
    assert not stale.exists()
    monkeypatch.setattr(throughput, "LONGEST", 0.2)
    turn(course, SCRIPT, "bf16", "eager", (1, 1), mine)
    assert mine.fault == "stopped after 0.2 s"


def race() -> Race:
    """What a race could have made: Fedloom is ten times as fast as the others, whose n-th rival is 1 + n slow; pfl broke."""
    taken = {}
    for precision in throughput.PRECISIONS:
        both = {(1, 2): [100.0, 200.0, 300.0], (2, 1): [400.0, 400.0, 400.0]}
        taken[FEDLOOM.folder, precision] = Taken(both, [5.0, 7.0], 1e-5)
        for n, who in enumerate(RIVALS):
            slow = {(1, 2): [10.0 / (1 + n)] * 3, (2, 1): [1.0, 1.0]}
            taken[who.folder, precision] = Taken(fault="no wheel") if who.folder == "pfl" else Taken(slow, [9.0], 1e-5)
    ceiling = {"rates": {"64": 250.0, "128": 400.0}, "gflops": 90.0}
    return Race(dict.fromkeys(throughput.PRECISIONS, "sdpa"), taken, {p: [ceiling] for p in throughput.PRECISIONS})


def test_rows_hold_the_median_of_ratios_the_better_crew_and_what_was_not_measured() -> None:
    made = {row.name: row for row in rows(race(), "bf16")}
    assert made["examples/s, Fedloom, bf16"].value == 400.0
    flower = made["Fedloom / Flower simulation, bf16"]
    assert (flower.value, flower.at_least, flower.aim) == (40.0, 5.0, 10.0)
    assert made["Fedloom / plain PEFT loop, bf16"].value == 80.0, "a single process against a single process"
    assert "1 process of 2 threads, sdpa attention" in made["examples/s, Flower simulation, bf16"].note
    assert made["examples/s, Flower simulation, bf16"].samples["examples/s, 2 processes of 1 thread"] == [1.0, 1.0]
    assert made["Fedloom / pfl, bf16"].value is made["examples/s, pfl, bf16"].value is None
    assert made["Fedloom / pfl, bf16"].note == "no wheel"
    share = made["share of the large-batch rate, bf16"]
    assert (share.value, share.at_least, share.aim) == (50.0, 60.0, 85.0)
    assert all(row.note for row in made.values())
    bounds = [(row.at_least, row.aim) for row in made.values() if row.name.startswith("Fedloom /")]
    assert bounds == [(5.0, 10.0), (2.0, 4.0), (5.0, 10.0), (2.0, 3.0), (None, None)]


def test_the_better_crew_is_that_of_the_higher_median() -> None:
    assert Taken({(1, 2): [1.0, 9.0, 1.0], (2, 1): [2.0, 2.0, 2.0]}).crew == (2, 1)
    assert median(Taken({(1, 2): [3.0]}).best) == 3.0
    fell_behind = Taken({(1, 2): [5.0, 5.0, 5.0], (2, 1): [6.0, 6.0, 6.0, 1.0, 1.0, 1.0]})
    assert fell_behind.crew == (2, 1), "the other one did not run as often: there is nothing to hold neighbours against"
    assert fell_behind.single == [5.0, 5.0, 5.0]
    assert crews("fedloom", 2) == crews("flower", 2) == crews("pfl", 2) == ((1, 2), (2, 1))
    assert crews("flower", 1) == crews("plain", 1) == ((1, 1),)


def test_an_environment_is_built_once_with_torch_alone_and_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    commands: list[list[str]] = []

    def ran(command: list[str]) -> None:
        commands.append(command)
        (tmp_path / "venvs" / "pfl").mkdir(parents=True, exist_ok=True)

    monkeypatch.setattr(environment, "VENVS", tmp_path / "venvs")
    monkeypatch.setattr(environment, "_run", ran)
    assert python_of("pfl") == python_of("pfl") == tmp_path / "venvs" / "pfl" / "bin" / "python"
    _, torch_alone, rest = commands
    assert torch_alone[-2:] == ["--quiet", "torch==2.13.0"]
    assert rest[-4:] == ["-c", str(environment.CONSTRAINTS), "-r", str(environment.PEERS / "pfl" / "requirements.txt")]
    assert python_of("plain") == Path(sys.executable)
    monkeypatch.setattr(environment, "TORCH", "torch==0")
    python_of("pfl")
    assert len(commands) == 6


def test_what_pip_cannot_install_is_told_in_its_words() -> None:
    with pytest.raises(NotInstalled, match="^ERROR: nothing of that name$"):
        environment._run([sys.executable, "-c", "import sys; sys.exit('looking\\nERROR: nothing of that name\\nsorry')"])
