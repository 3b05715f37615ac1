"""Comparisons with a tiny model: any number of processes gives the same, stopping loses nothing, one failure loses no other run."""

from __future__ import annotations

import csv
import itertools
import json
import os
import shutil
import signal
import time
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file, save_file

from fedloom import cli
from fedloom.methods.fedavg import FedAvg
from fedloom.methods.fibecfed import FibecFed, Gal
from fedloom.run.comparison import compare
from fedloom.run.comparison.plan import Plan
from fedloom.run.errors import ExperimentError
from tests import tiny
from tests.integration.test_cli import command, hashes, refused, small, write_data
from tests.small import data, experiment

pytestmark = [pytest.mark.no_cover, pytest.mark.usefixtures("no_pictures")]

RECIPE = """
import os
from dataclasses import dataclass
from typing import ClassVar
from fedloom.methods.fedavg import FedAvg

@dataclass(frozen=True)
class Bad(FedAvg):
    name: ClassVar[str] = "{name}"
    paper: ClassVar[str] = "none"

    def round(self, state, pool):
        {how}
"""
CLOCKS = {"host_seconds", "setup_host_seconds", "peak_rss_bytes", "experiment"}


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with data and, in ``one``, a comparison carried out in this process."""
    folder = tmp_path_factory.mktemp("compare")
    write_data(folder / "data")
    assert cli.main([*asked(folder), "--out", str(folder / "one")]) == 0
    return folder


def asked(place: Path) -> list[str]:
    return ["compare", "lora", "local", *small(place / "data"), "--seeds", "1", "2", "--lrs", "1e-3", "0.05"]


def listed(out: Path) -> list[dict[str, Any]]:
    return [{k: v for k, v in r.items() if k not in CLOCKS} for r in json.loads((out / "comparison.json").read_text())]


def test_two_processes_give_what_one_gives(place: Path, capfd: pytest.CaptureFixture[str]) -> None:
    assert cli.main([*asked(place), "--out", str(place / "two"), "--jobs", "2"]) == 0
    assert listed(place / "two") == listed(place / "one")
    for name in ("summary.json", "comparison.csv", "comparison.md", "comparison.tex"):
        assert (place / "two" / name).read_text() == (place / "one" / name).read_text()
    said = capfd.readouterr().err.splitlines()
    assert said[-1].startswith("[6/6 runs]  done after ")
    names = {path.parent.name for path in (place / "one").glob("*/results.json")}
    assert [line for line in said[1:-1] if not line.startswith("[") and line.split(": ")[0] not in names] == []


def test_the_files_say_the_same(place: Path) -> None:
    out = place / "one"
    summary = json.loads((out / "summary.json").read_text())
    rows = {row["method"]: row for row in summary["cases"][0]["rows"]}
    results = json.loads((out / "comparison.json").read_text())
    assert [(r["method"], r["seed"]) for r in results] == [("lora", 1), ("local", 1), ("lora", 2), ("local", 2)]
    for result in results:
        row = rows[result["method"]]
        assert result == json.loads((out / row["runs"][str(result["seed"])] / "results.json").read_text())
        assert row["scores"]["final"]["personalised"]["each"][str(result["seed"])] == result["final"]["personalised"]
        assert (result["experiment"]["method"].get("inner") or result["experiment"]["method"])["lr"] == row["lr"]
    for method, row in rows.items():
        scores = {t["lr"]: t["validation"] for t in row["grid"]}
        folders = {lr: out / f"{method}-lr{lr}-seed1" / "results.json" for lr in (0.001, 0.05)}
        assert scores == {lr: json.loads(p.read_text())["validation"]["final"]["personalised"] for lr, p in folders.items()}
        assert row["lr"] == max(scores, key=lambda lr: scores[lr])
    found = rows["local"]["against"]["personalised"]
    means = [rows[m]["scores"]["final"]["personalised"]["mean"] for m in ("local", "lora")]
    assert found["difference"] == pytest.approx(means[0] - means[1])
    assert rows["lora"]["against"]["personalised"] is None
    assert rows["local"]["against"]["global"] is None
    assert rows["lora"]["reached"]["personalised"]["reached"] == 2, "the reference reaches its own score"
    lines = list(csv.DictReader((out / "comparison.csv").read_text().splitlines()))
    assert [line["method"] for line in lines] == ["lora", "local"]
    page = (out / "report.html").read_text()
    assert 'id="comparison"' in page
    assert "Personalised accuracy against uploads" in page


def test_finished_runs_are_used_when_a_comparison_grows(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = place / "growing"
    few = ["compare", "lora", *small(place / "data"), "--seed", "1", "--lr", "1e-3", "--out", str(out)]
    assert cli.main(few) == 0
    before = hashes(out / "lora")
    more = ["compare", "lora", *small(place / "data"), "--seeds", "1", "2", "--lrs", "1e-3", "--out", str(out)]
    assert cli.main(more) == 0
    assert "(1 from before)" in capsys.readouterr().err
    assert hashes(out / "lora") == before
    assert {p.parent.name for p in out.glob("*/results.json")} == {"lora", "lora-seed2"}
    page = (out / "report.html").read_bytes()
    (out / "report.html").unlink()
    assert cli.main(["report", str(out)]) == 0
    assert (out / "report.html").read_bytes() == page
    # what is finished is told without the data, rates that no search chose included; and who names the kind of adapter asks for the same
    searched = ["compare", "lora", *small(place / "data"), "--seeds", "1", "2", "--lrs", "1e-3", "1e-6", "--out", str(out)]
    assert cli.main(searched) == 0
    kept = {p.parent.name for p in out.glob("*/results.json")}
    (place / "data").rename(place / "elsewhere")
    try:
        assert cli.main([*searched, "--adapter.kind", "lora"]) == 0
    finally:
        (place / "elsewhere").rename(place / "data")
    assert {p.parent.name for p in out.glob("*/results.json")} == kept


def test_runs_that_saw_other_data_stand_in_no_table(place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """All labels are turned round between two commands. What was trained before stays, and is named; nothing is trained once both are
    there."""
    shutil.copytree(place / "data", tmp_path / "data")
    one = ["compare", "lora", *small(tmp_path / "data"), "--seed", "1", "--lr", "1e-3", "--out", str(tmp_path / "c")]
    assert cli.main(one) == 0
    table = (tmp_path / "c" / "comparison.csv").read_text()
    for path in (tmp_path / "data").glob("*.csv"):
        with path.open(newline="") as file:
            header, *rows = list(csv.reader(file))
        at = header.index("label")
        classes = sorted({row[at] for row in rows})
        turned = dict(zip(classes, reversed(classes), strict=True))
        with path.open("w", newline="") as file:
            csv.writer(file).writerows([header, *([*row[:at], turned[row[at]], *row[at + 1 :]] for row in rows)])
    for _ in range(2):
        capsys.readouterr()
        assert cli.main([*one[:2], "local", *one[2:]]) == 2
        said = capsys.readouterr().err
        assert "changed between runs that would stand in one table: " in said and "lora (" in said and "local (" in said
        assert (tmp_path / "c" / "comparison.csv").read_text() == table
    shutil.rmtree(tmp_path / "c" / "lora")
    assert cli.main([*one[:2], "local", *one[2:]]) == 0


def test_a_run_that_fails_and_a_process_that_dies_lose_no_other(
    place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    wrong = {"bad": "raise ValueError('this method is broken')", "dies": "os._exit(3)"}
    for name, how in wrong.items():
        Path(f"{name}.py").write_text(RECIPE.format(name=name, how=how))
    words = ["compare", "bad.py", "dies.py", "lora", *small(place / "data"), "--out", "c"]
    assert cli.main([*words, "--jobs", "2"]) == 1
    bad, dies = sorted(capfd.readouterr().err.splitlines()[-2:])
    assert bad.startswith("fedloom: bad failed: ") and "this method is broken" in bad
    assert dies.startswith("fedloom: dies failed: ") and "its process was ended with code 3" in dies
    assert [r["method"] for r in json.loads(Path("c/comparison.json").read_text())] == ["lora"]
    assert json.loads(Path("c/summary.json").read_text())["failed"].keys() == wrong.keys()
    for name in wrong:
        Path(f"{name}.py").write_text(RECIPE.format(name=name, how="return (yield from FedAvg.round(self, state, pool))"))
    assert cli.main(words) == 0
    assert [r["method"] for r in json.loads(Path("c/comparison.json").read_text())] == ["bad", "dies", "lora"]


@pytest.mark.parametrize(("methods", "wire"), [(["local"], "exact"), (["lora", "fibecfed"], "up:int8")])
def test_a_rate_that_diverges_is_no_failure_of_a_search(
    methods: list[str], wire: str, place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """In a set-up too, as FibecFed's warm-up of the head does."""
    words = ["compare", *methods, *small(place / "data"), "--rounds", "3", "--lrs", "1e38", "0.01"]
    words += ["--wire", wire, "--out", str(tmp_path / "c")]
    assert cli.main(words) == 0
    assert "diverged" in capsys.readouterr().out
    rows = json.loads((tmp_path / "c" / "summary.json").read_text())["cases"][0]["rows"]
    assert [row["method"] for row in rows] == methods
    for row in rows:
        assert row["lr"] == 0.01
        assert row["grid"][0] == {"lr": 1e38, "validation": None, "diverged": True}
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "c").glob("*-lr*/*")}
    assert cli.main(words) == 0
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "c").glob("*-lr*/*")} == before, "neither rate is run again"


def test_shared_training_is_evaluated_and_not_done_again(place: Path, tmp_path: Path) -> None:
    words = ["compare", "lora", "lora-finetuned", *small(place / "data"), "--share-training", "--out", str(tmp_path / "c")]
    assert cli.main(words) == 0
    trained, other = (json.loads((tmp_path / "c" / name / "results.json").read_text()) for name in ("lora", "lora-finetuned"))
    assert other["notes"][-1] == "trained by lora; evaluated after the last round only"
    assert other["host_seconds"] == trained["host_seconds"]
    rows = [
        [json.loads(line)["personalising"] for line in (tmp_path / "c" / name / "rounds.jsonl").read_text().splitlines()]
        for name in ("lora", "lora-finetuned")
    ]
    assert other["final"]["personalising"]["device_seconds"] > 0, "its own, not what the trained run's devices took"
    assert [told and told["flops"] for told in rows[0]] == [0.0] * len(rows[0])
    assert rows[1] == [None] * (len(rows[0]) - 1) + [other["final"]["personalising"]]
    assert cli.main(["evaluate", str(tmp_path / "c" / "lora-finetuned")]) == 0
    assert cli.main(["export", str(tmp_path / "c" / "lora-finetuned"), str(tmp_path / "x"), "--client", "2"]) == 0


@pytest.mark.parametrize(
    ("words", "wanted"),
    [
        (["--lrs", "0.1", "-1"], ["positive and finite", "-1.0"]),
        (["--lrs", "0.1", "--lr", "0.1"], ["--lr sets one", "--lrs searches"]),
        (["--lrs", "0.1", "many"], ["'many'"]),
        (["--alphas", "1", "0"], ["--alpha is 0.0"]),
        (["--alphas", "1", "0.1", "--partition", "iid"], ["--partition iid"]),
        (["--reference", "fibecfed"], ["fibecfed is not compared", "lora, local"]),
        (["--jobs", "0"], ["--jobs is 0"]),
        (["--data", "./nowhere", "trec"], ["./nowhere"]),
        (["hetlora", "fibecfed", "--aggregation", "median", "--cohort", "4"], ["nothing was started. local: ", "; hetlora: "]),
        (["ffa", "slora", "fedex", "--adapter.base", "nf4"], ["nothing was started. slora: ", "; fedex: "]),
        (["fedsa", "slora", "--share.fraction", "0.5"], ["nothing was started. local: ", "; slora: "]),
        (["lora-prior", "--share.fraction", "0.5", "--share-training"], ["--share-training", "leave one of the two out"]),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else None,
)
def test_what_makes_no_sense_is_refused_before_anything_starts(
    words: list[str], wanted: list[str], place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The last of these only when a model is there: a method refuses where its set-up begins, and the others have not begun theirs."""
    methods = list(itertools.takewhile(lambda word: not word.startswith("-"), words))
    asked = ["compare", "lora", "local", *methods, *small(place / "data"), *words[len(methods) :], "--out", str(tmp_path / "c")]
    refused(capsys, asked, *wanted)
    assert not list(tmp_path.glob("c/*/*"))


def test_of_variants_of_one_method_each_is_asked_once_and_by_its_own_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """tiny has three layers. Of two data partitions, seeds and rates each variant begins one set-up, whichever of them come first."""
    begun: list[str] = []
    rehearse = compare.rehearse
    monkeypatch.setattr(compare, "rehearse", lambda asked: begun.extend(name for name, _ in asked) or rehearse(asked))
    monkeypatch.setattr(compare, "carry_out", lambda *_: pytest.fail("something was started"))
    methods = {"nine": FibecFed(gal=Gal(count=9)), "lora": FedAvg(), "ten": FibecFed(gal=Gal(count=10)), "whole": FibecFed()}
    plan = Plan(experiment(), methods, (str(data()),), (1.0, 0.5), (1, 2), (1e-3, 2e-3))
    said = r"nothing was started\. nine: the GAL must hold 1 to 3 layers.* give 9; ten: .* give 10$"
    with pytest.raises(ExperimentError, match=said):
        compare.compare(plan, tmp_path / "c", plain=True)
    assert begun == list(methods)
    assert not list(tmp_path.glob("c/*/*"))


def test_stopped_it_ends_its_processes_and_the_same_command_goes_on(place: Path, tmp_path: Path) -> None:
    out = tmp_path / "c"
    words = [
        "compare",
        "lora",
        "local",
        *small(place / "data"),
        "--rounds",
        "40",
        "--evaluate-every",
        "0",
        "--out",
        str(out),
    ]
    process = command([*words, "--jobs", "2"])

    def lines(name: str) -> list[str]:
        path = out / name / "rounds.jsonl"
        return path.read_text().splitlines() if path.exists() else []

    while process.poll() is None and min(len(lines("lora")), len(lines("local"))) < 4:
        time.sleep(0.02)
    children = [int(p) for p in Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()]
    process.send_signal(signal.SIGINT)
    _, said = process.communicate(timeout=60)
    assert process.returncode == 130
    assert said.splitlines()[-1] == "fedloom: stopped; the same command resumes"
    assert "Traceback" not in said
    assert len(children) == 2
    assert not [pid for pid in children if Path(f"/proc/{pid}").exists()]
    before = {name: lines(name) for name in ("lora", "local")}
    assert not (out / "lora" / "results.json").exists()
    assert cli.main(words) == 0
    for name, kept in before.items():
        rows = lines(name)
        assert [json.loads(row)["round"] for row in rows] == list(range(41))
        assert rows[: len(kept) - 1] == kept[:-1], "what was done was not done again"


def test_processes_end_with_the_one_that_started_them(place: Path, tmp_path: Path) -> None:
    words = ["compare", "lora", "local", *small(place / "data"), "--rounds", "400", "--jobs", "2", "--out", str(tmp_path / "c")]
    process = command(words)
    while process.poll() is None and not list(tmp_path.glob("c/*/rounds.jsonl")):
        time.sleep(0.02)
    children = [int(p) for p in Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()]
    process.kill()
    process.communicate(timeout=60)
    end = time.monotonic() + 20
    while any(alive(pid) for pid in children) and time.monotonic() < end:
        time.sleep(0.05)
    assert children
    assert not any(alive(pid) for pid in children)


def alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
        return Path(f"/proc/{pid}/stat").read_text().split()[2] != "Z"
    except (ProcessLookupError, FileNotFoundError):
        return False


def test_runs_that_began_with_other_weights_stand_in_no_table(place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The model's folder is written anew between two commands."""
    model = Path(shutil.copytree(tiny.folder(), tmp_path / "model"))
    words = [*small(place / "data"), "--model", str(model), "--seed", "1", "--lr", "1e-3", "--out", str(tmp_path / "c")]
    assert cli.main(["compare", "lora", "fedsa", "fedalt", *words]) == 0
    table = (tmp_path / "c" / "comparison.csv").read_text()
    weights = load_file(model / "model.safetensors")
    save_file({n: t + 1e-3 if t.is_floating_point() else t for n, t in weights.items()}, model / "model.safetensors", {"format": "pt"})
    assert cli.main(["compare", "lora", "fedsa", "fedalt", "local", *words]) == 2
    said = capsys.readouterr().err
    assert f"the model '{model}' changed between runs that would stand in one table: lora, fedsa (" in said and "local (" in said
    assert (tmp_path / "c" / "comparison.csv").read_text() == table


def test_the_folder_of_one_run_is_no_comparisons(place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = [*small(place / "data"), "--rounds", "1", "--out", str(tmp_path / "r")]
    assert cli.main(["run", "lora", *words]) == 0
    before = (tmp_path / "r" / "report.html").read_bytes()
    assert cli.main(["compare", "lora", "local", *words]) == 2
    assert "is the folder of one run, whose report would be written over; give another --out" in capsys.readouterr().err
    assert (tmp_path / "r" / "report.html").read_bytes() == before
