"""The peer benchmark: its job is Fedloom's own work, other work is refused, and its rows say what was measured and what was not.

No peer is installed here. Speed is not tested.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from statistics import median

import pytest
from safetensors.torch import load_file

from bench.figure import BF16
from bench.figures import throughput
from bench.figures.throughput import FEDLOOM, RIVALS, SCRIPT, TUNED, Contestant, Course, Failed, Race, Taken, crews, rows, turn
from bench.job import experiment, export
from bench.peers import environment
from bench.peers.environment import NotInstalled, python_of

pytestmark = pytest.mark.no_cover

BY_TRAINER = RIVALS[4]
"""The research script as its users run it."""


@pytest.fixture(scope="module")
def course(tmp_path_factory: pytest.TempPathFactory) -> Course:
    """A small job of one round, with what the research script made of it in float32."""
    here = Course(tmp_path_factory.mktemp("job"), 1)
    export(here.folder, experiment(1, rows=400))
    assert here.run(SCRIPT, "float32", "eager", (1, 1))[0]["examples"] == [sum(len(d["rows"]) for d in job(here)["rounds"][0])]
    return here


@pytest.fixture(scope="module")
def ours(course: Course) -> Path:
    """What Fedloom made of it, in the job's folder."""
    course.run(FEDLOOM, "float32", "eager", (1, 1))
    return course.folder / f"{FEDLOOM.key}-float32.safetensors"


def job(course: Course) -> dict:
    return json.loads((course.folder / "job.json").read_text())


@pytest.mark.parametrize("who", [FEDLOOM, BY_TRAINER], ids=lambda who: who.key)
@pytest.mark.usefixtures("ours")
def test_the_reference_and_whoever_runs_without_an_environment_of_its_own_do_the_same_work(course: Course, who: Contestant) -> None:
    if who is not FEDLOOM:
        course.run(who, "float32", "eager", (1, 1))
    assert 0 < course.apart(who, "float32") < 1e-3


BOTH = """
from dataclasses import replace
from pathlib import Path
from safetensors.torch import save_file
from setups import SETUPS
from task import job_of, settings, start_of

how = settings()
rows = [row for place in job_of(how.job).cohort(0) for row in job_of(how.job).rows(0, place)]
for name, setup in SETUPS.items():
    mine = replace(how, setup=name)
    model = setup.model(mine)
    setup.load(model, start_of(mine))
    setup.train(model, rows, mine)
    save_file(setup.copied(model), how.out / f"{name}.safetensors")
    print(len(rows), setup.model(mine) is model)
"""
"""Train on all rows of the cohort, as if one device held them, in both set-ups."""


def test_both_set_ups_take_the_same_steps_and_only_the_tuned_keeps_its_model(course: Course, tmp_path: Path) -> None:
    given = {"job": course.folder, "out": tmp_path, "rounds": 1, "precision": "float32", "setup": "", "attention": "eager"}
    words = [word for name, value in {**given, "processes": 1, "threads": 1}.items() for word in (f"--{name}", str(value))]
    environment_ = {**os.environ, "PYTHONPATH": str(environment.PEERS)}
    ended = subprocess.run([sys.executable, "-c", BOTH, *words], env=environment_, capture_output=True, text=True)
    assert ended.returncode == 0, ended.stderr
    every = sum(len(device["rows"]) for device in job(course)["rounds"][0])
    assert every > 2 * 8 and every % 8, "several steps, the last one smaller"
    assert ended.stdout.splitlines() == [f"{every} False", f"{every} True"]
    start, plain, tuned = (load_file(f) for f in (course.folder / "start.safetensors", *sorted(tmp_path.iterdir())))
    assert set(start) == set(plain) == set(tuned)
    way = max(float((tuned[name] - start[name]).abs().max()) for name in start)
    assert 0 < max(float((tuned[name] - plain[name]).abs().max()) for name in start) < 1e-3 * way


def test_the_job_is_a_hundred_devices_ten_a_round_batch_eight_one_epoch(course: Course) -> None:
    told = job(course)
    assert (told["devices"], told["batch"], told["rank"], told["alpha"], told["clip"]) == (100, 8, 8, 16.0, 1.0)
    (cohort,) = told["rounds"]
    assert len({device["device"] for device in cohort}) == len(cohort) == 10
    trained = [row for device in cohort for row in device["rows"]]
    assert len(set(trained)) == len(trained)


def test_one_example_less_on_one_device_is_other_work(course: Course, ours: Path, tmp_path: Path) -> None:
    """The reference trains without it; Fedloom, which draws its batches itself, trained on all."""
    told = job(course)
    max(told["rounds"][0], key=lambda device: len(device["rows"]))["rows"].pop()
    for name in ("data.npz", "start.safetensors", ours.name):
        (tmp_path / name).symlink_to(course.folder / name)
    (tmp_path / "job.json").write_text(json.dumps(told))
    other = Course(tmp_path, 1)
    other.run(SCRIPT, "float32", "eager", (1, 1))
    with pytest.raises(Failed, match="did other work: its tensors are 0"):
        other.apart(FEDLOOM, "float32")
    with pytest.raises(Failed, match="left no tensors"):
        other.apart(Contestant("pfl", "pfl"), "float32")
    with pytest.raises(Failed, match="left no tensors"):
        other.apart(BY_TRAINER, "float32")  # the tuned script's are not its


def test_a_contestant_that_breaks_is_told_with_its_last_words(course: Course, monkeypatch: pytest.MonkeyPatch) -> None:
    stale = course.folder / "script-tuned-bf16.json"
    stale.write_text("{}")
    mine = Taken()
    turn(course, SCRIPT, "bf16", "no such attention", (1, 1), mine)
    assert mine.fault.startswith("exit code 1: ValueError")  # the attention; whoever runs as documented is told none
    assert not mine.rates
    assert not stale.exists()
    monkeypatch.setattr(throughput, "LONGEST", 0.2)
    turn(course, SCRIPT, "bf16", "eager", (1, 1), mine)
    assert mine.fault == "stopped after 0.2 s"


def race() -> Race:
    """What a race could have made: Fedloom is ten times as fast as the others, whose n-th rival is 1 + n slow; the documented pfl broke.
    The tuned ones are twice as fast and took part in one of two passes."""
    taken = {FEDLOOM.key: Taken({(1, 2): [100.0, 200.0, 300.0], (2, 1): [400.0, 400.0, 400.0]}, [5.0, 7.0], 1e-5)}
    for n, who in enumerate(RIVALS):
        crew = (10, 1) if who.folder == "nvflare" else (1, 2)
        taken[who.key] = Taken(fault="no wheel") if who.folder == "pfl" else Taken({crew: [10.0 / (1 + n)] * 3}, [9.0], 1e-5)
    for n, who in enumerate(TUNED):
        taken[who.key] = Taken({(1, 2): [20.0 / (1 + n)] * 2} | ({(2, 1): [1.0]} if who.folder in ("flower", "pfl") else {}), [9.0], 1e-5)
    return Race("eager", taken, [{"rates": {"64": 250.0, "128": 400.0}, "gflops": 90.0, "arithmetic": 900.0}])


def test_rows_hold_the_median_of_ratios_the_better_crew_and_what_was_not_measured() -> None:
    made = {row.name: row for row in rows(race(), "bf16")}
    assert made["examples/s, Fedloom, bf16"].value == 400.0
    flower = made["Fedloom / Flower simulation, bf16"]
    assert (flower.value, flower.at_least, flower.aim) == (20.0, 5.0, 10.0), "one process by its default: against one process"
    assert made["Fedloom / NVFlare simulator, bf16"].value == 120.0, "ten processes: against Fedloom's better way"
    assert made["Fedloom / plain PEFT loop, bf16"].value == 80.0, "a single process against a single process"
    assert "1 process of 2 threads, the default attention" in made["examples/s, Flower simulation, bf16"].note
    assert made["Fedloom / pfl, bf16"].value is made["examples/s, pfl, bf16"].value is None
    assert made["Fedloom / pfl, bf16"].note == "no wheel"
    share = made["share of the large-batch rate, bf16"]
    assert (share.value, share.at_least, share.aim) == (50.0, 60.0, 85.0)
    assert all(row.note for row in made.values())
    bounds = [(row.at_least, row.aim) for row in made.values() if row.name.startswith("Fedloom /")]
    assert bounds == [(5.0, 10.0), (2.0, 4.0), (5.0, 10.0), (2.0, 3.0), (None, None), *[(None, None)] * 5]


def test_those_tuned_by_hand_are_for_information_and_held_against_the_pass_that_they_took_part_in() -> None:
    made = {row.name: row for row in rows(race(), "float32")}
    assert [row.name for row in made.values() if row.verdict() == "informative" and row.name.startswith("Fedloom /")] == [
        "Fedloom / FedAvg in a research script, float32",
        *(f"Fedloom / {who.name} tuned by hand, float32" for who in TUNED),
    ]
    assert made["Fedloom / Flower simulation tuned by hand, float32"].value == 20.0, "it could spread: against Fedloom's better way"
    assert made["Fedloom / plain PEFT loop tuned by hand, float32"].value == 30.0, "of 100 and 200 over 5, without the third, 300"
    note = made["examples/s, Flower simulation tuned by hand, float32"].note
    assert "1 process of 2 threads, eager attention" in note
    assert made["examples/s, Flower simulation tuned by hand, float32"].samples["examples/s, 2 processes of 1 thread"] == [1.0]


def test_without_a_figure_of_fedloom_the_others_keep_theirs() -> None:
    broken = race()
    broken.taken[FEDLOOM.key] = Taken(fault="stopped after 9 s")
    made = {row.name: row for row in rows(broken, "bf16")}
    assert made["examples/s, Flower simulation, bf16"].value == 10.0
    unknown = ("Fedloom / Flower simulation, bf16", "examples/s, Fedloom, bf16", "share of the large-batch rate, bf16")
    assert all(made[name].verdict() == "not measured" and "stopped after 9 s" in made[name].note for name in unknown)
    assert made["Fedloom / pfl, bf16"].note == "no wheel", "its own fault comes first"


def test_the_reference_goes_first_and_only_the_documented_go_on(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    went: list[tuple[str, tuple[int, int]]] = []

    def turned(course: Course, who: Contestant, precision: str, attention: str, crew: tuple[int, int], mine: Taken) -> None:
        went.append((who.key, crew))
        mine.rates.setdefault(crew, []).append(float(crew[0]))
        mine.fault = "stopped after 150 s" if who.key == "pfl-as-documented" else ""

    ran = {"attention": {"eager": 2.0, "sdpa": 1.0}, "run": {"rates": {"64": 1.0}, "gflops": 1.0, "arithmetic": 1.0}}
    monkeypatch.setattr(throughput, "turn", turned)
    monkeypatch.setattr(Course, "run", lambda *given: (ran[given[5] if len(given) > 5 else "run"], 1.0))
    made = throughput.race(Course(tmp_path, 2), "float32", 2, 2)
    assert made.attention == "sdpa" and len(made.ceilings) == 2
    assert went[:3] == [("script-tuned", (1, 2)), ("fedloom-as-documented", (1, 2)), ("fedloom-as-documented", (2, 1))]
    second = went[len(went) - 6 :]
    assert [key.removesuffix("-as-documented") for key, _ in second] == ["script", "plain", "nvflare", "flower", "fedloom", "fedloom"]
    assert sorted({key for key, _ in went[:-6]}) == sorted({FEDLOOM.key, *(who.key for who in (*RIVALS, *TUNED))})


def test_bf16_is_not_measured_without_instructions_unless_asked_for(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    class Asked(Exception):
        pass

    def started(*_: object) -> Race:
        raise Asked

    monkeypatch.setattr(throughput, "race", started)
    monkeypatch.delenv(BF16, raising=False)
    course = Course(tmp_path, 1)
    monkeypatch.setattr(throughput, "computes_bf16", lambda: False)
    made = throughput.measured(course, "bf16", 1, 2)
    assert {row.verdict() for row in made} == {"not measured"}
    assert {row.note for row in made} == {"this processor has no bfloat16 instructions; --bf16 measures it all the same"}
    whole = [row for row in rows(race(), "bf16") if row.at_least]
    assert [(row.name, row.unit, row.at_least, row.aim) for row in made] == [(r.name, r.unit, r.at_least, r.aim) for r in whole]
    with pytest.raises(Asked):
        throughput.measured(course, "float32", 1, 2)
    monkeypatch.setenv(BF16, "1")
    with pytest.raises(Asked):
        throughput.measured(course, "bf16", 1, 2)
    monkeypatch.delenv(BF16)
    monkeypatch.setattr(throughput, "computes_bf16", lambda: True)
    with pytest.raises(Asked):
        throughput.measured(course, "bf16", 1, 2)


def test_what_stops_the_race_in_bf16_is_told_and_in_float32_breaks_the_figure(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def stopped(*_: object) -> Race:
        raise Failed("stopped after 150 s")

    monkeypatch.setattr(throughput, "race", stopped)
    monkeypatch.setenv(BF16, "1")
    assert {row.note for row in throughput.measured(Course(tmp_path, 1), "bf16", 1, 2)} == {"stopped after 150 s"}
    with pytest.raises(Failed):
        throughput.measured(Course(tmp_path, 1), "float32", 1, 2)


def test_the_better_crew_is_that_of_the_higher_median() -> None:
    assert Taken({(1, 2): [1.0, 9.0, 1.0], (2, 1): [2.0, 2.0, 2.0]}).crew == (2, 1)
    assert median(Taken({(1, 2): [3.0]}).best) == 3.0
    fell_behind = Taken({(1, 2): [5.0, 5.0, 5.0], (2, 1): [6.0, 6.0, 6.0, 1.0, 1.0, 1.0]})
    assert fell_behind.crew == (2, 1), "the other one did not run as often: there is nothing to hold neighbours against"
    assert fell_behind.single == [5.0, 5.0, 5.0]


def test_as_documented_each_has_its_frameworks_default_and_tuned_the_trial_of_both() -> None:
    both = ((1, 2), (2, 1))
    assert [crews(who, 2) for who in RIVALS] == [((1, 2),), ((1, 2),), ((10, 1),), ((1, 2),), ((1, 2),)]
    assert [crews(who, 2) for who in TUNED] == [both, both, ((10, 1),), ((1, 2),), ((1, 2),)]
    assert crews(FEDLOOM, 2) == both
    assert crews(RIVALS[0], 8) == ((4, 2),), "Flower: two CPUs each"
    assert [crews(who, 1)[0][1] for who in (FEDLOOM, *RIVALS, *TUNED)] == [1] * 11
    assert crews(FEDLOOM, 1) == crews(TUNED[0], 1) == crews(RIVALS[0], 1) == ((1, 1),)


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
