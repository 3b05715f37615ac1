"""The recipes. Of the core table: what it keeps comes back, nothing else does, and its tables go to their places on the page. Of the
ablations: each changes what its name says and makes sense as a plan. Of the wires: the table tells what the runs took."""

from __future__ import annotations

import importlib.util
import json
from argparse import Namespace
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from zipfile import ZipFile

import pytest

from fedloom.encodings import NAMES
from fedloom.methods import all_methods
from fedloom.run.experiment import as_json
from fedloom.run.plan import Plan
from fedloom.server.cycle import block_at, turns
from tests.unit.run_folder import write_run

RECIPES = Path(__file__).resolve().parents[2] / "recipes"


def loaded(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(f"{name}_recipe", RECIPES / f"{name}.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def core() -> ModuleType:
    return loaded("core")


@pytest.fixture(scope="module")
def ablations() -> ModuleType:
    return loaded("ablations")


def files(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def test_what_is_kept_comes_back_and_grows(core: ModuleType, tmp_path: Path) -> None:
    first, second, kept = tmp_path / "first", tmp_path / "second", tmp_path / "deep" / "trec.zip"
    write_run(first / "lora-seed1", rounds=3, alpha=0.1)
    write_run(first / "ditto-seed1", rounds=8, ended=False)
    (first / "lora-seed1" / "checkpoint.bin").write_bytes(b"large")
    core.keep(first, kept)
    write_run(second / "lora-seed1", rounds=4, alpha=1.0)
    core.keep(second, kept)
    again = tmp_path / "again"
    write_run(again / "alpha1.0-lora-seed1", rounds=5, alpha=1.0)
    own = files(again)
    core.unpack(kept, again)
    made = files(again)
    names = [f"alpha{alpha}-lora-seed1/{file}" for alpha in ("0.1", "1.0") for file in core.FILES]
    assert sorted(made) == sorted(names), "three files a finished run under a name that tells alpha, nothing of what had not ended"
    assert all(made[f"alpha0.1-{name}"] == files(first)[name] for name in files(first) if name.startswith("lora") and "check" not in name)
    assert {name: made[name] for name in own} == own, "one's own finished run stays as it is"
    assert not list(kept.parent.glob("*.tmp"))
    before = kept.read_bytes()
    core.keep(second, kept)
    assert kept.read_bytes() == before, "the same runs make the same archive"


@pytest.mark.parametrize("name", ["../x/results.json", "a/b/results.json", "run/model.pt", "results.json"])
def test_an_archive_with_anything_else_is_refused(core: ModuleType, tmp_path: Path, name: str) -> None:
    with ZipFile(tmp_path / "odd.zip", "w") as archive:
        archive.writestr(name, "{}")
    with pytest.raises(ValueError, match="no file of a run"):
        core.unpack(tmp_path / "odd.zip", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_an_alpha_is_told_when_all_of_its_runs_are_there(core: ModuleType, tmp_path: Path) -> None:
    for method in core.METHODS:
        for i in range(5):
            write_run(tmp_path / f"{method}-{i}", method, 2, alpha=0.1)
            if i < 4 or method != "local":
                write_run(tmp_path / f"{method}-mild-{i}", method, 2, alpha=1.0)
    assert core.measured(tmp_path) == ("0.1",)
    write_run(tmp_path / "local-mild-4", "local", 2, alpha=1.0)
    assert core.measured(tmp_path) == ("0.1", "1.0")


def test_tables_go_between_their_marks(core: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    page = tmp_path / "results.md"
    monkeypatch.setattr(core, "PAGE", page)
    page.write_text("a\n<!-- trec -->\nold\n<!-- /trec -->\nb\n<!-- rte -->\n<!-- /rte -->\nc\n")
    core.write_page({"trec": r"| \1 |"})
    core.write_page({"trec": r"| \1 |"})
    assert page.read_text() == "a\n<!-- trec -->\n\n| \\1 |\n<!-- /trec -->\nb\n<!-- rte -->\n<!-- /rte -->\nc\n"
    with pytest.raises(ValueError, match="sst2"):
        core.write_page({"sst2": "x"})


def test_what_lies_beside_the_page_are_runs_of_this_recipe(core: ModuleType) -> None:
    assert list(core.KEPT.glob("*.zip")), "there is one slice at least"
    assert set(core.METHODS) <= set(all_methods())
    for kept in core.KEPT.glob("*.zip"):
        words = core.shape(kept.stem).replace(" --adapter.kind lora", "").replace("--", "").split()
        due = {key.replace("-", "_"): int(value) for key, value in zip(words[::2], words[1::2], strict=True)}  # the later one counts
        with ZipFile(kept) as archive:
            told = [json.loads(archive.read(name)) for name in archive.namelist() if name.endswith("results.json")]
        for result in told:
            experiment = result["experiment"]
            assert {key: experiment[key] for key in due} == due
            assert experiment["adapter"].get("kind", "lora") == "lora", "the field came later than the first runs"
            assert (experiment["data"].removeprefix("./"), experiment["precision"]) == (kept.stem, "float32")
            assert result["method"] in core.METHODS


def test_every_ablation_is_a_plan_of_different_methods(ablations: ModuleType) -> None:
    for name, make in ablations.VARIANTS.items():
        methods = make()
        assert methods["fibecfed"] == ablations.WHOLE
        plan = Plan(ablations.SHAPE, methods, ("trec",), (0.1,), (1, 2, 3), (8e-3,))
        assert len({json.dumps(as_json(run.experiment)) for run in plan.every()}) == 3 * len(methods), f"{name}: two variants are one"
    for name, values in ablations.SETTINGS.items():
        bases = [replace(ablations.SHAPE, **change) for change in values.values()]
        assert len({base.digest() for base in bases}) == len(values), name


@pytest.mark.parametrize("asked", [["partz"], []])
def test_an_ablation_that_is_not_there_is_told_what_is(
    ablations: ModuleType, asked: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("sys.argv", ["ablations.py", *asked])
    with pytest.raises(SystemExit):
        ablations.main()
    assert "parts, pacing, order, layers, keep, skew, devices, cohort" in capsys.readouterr().err


def test_every_group_of_cycles_sees_every_example_as_often() -> None:
    """Twice a cycle; and what is compared is what the paper compares: block-cyclic in turns and in cohorts, whole models handed over and
    averaged, GaLore, LISA, LoRA, everything in one place, and BAdam: one place that trains the blocks in turn."""
    cycles = loaded("cycles")
    base = cycles.base_of(Namespace(data="trec", model="minilm", skew="0.1", train=480, length=96))
    made = {}
    for methods, change, worth in cycles.GROUPS.values():
        experiment = replace(base, **change)
        assert experiment.rounds * worth == cycles.TURNS, "a round is worth as many turns as it says"
        for name, method in methods.items():
            made[name] = replace(experiment, method=method)
            inner = method
            while "inner" in vars(inner):
                inner = inner.inner
            assert experiment.rounds * experiment.cohort * inner.local_epochs == 2 * cycles.CYCLES * experiment.clients, name
    assert set(made) == {
        *("fedcybgd", "fedcybgd-random", "handover", "fedbavg", "fedfft", "galore", "lisa", "lora", "centralised", "badam")
    }
    badam = made["badam"]
    assert (badam.clients, badam.cohort, badam.method.order) == (1, 1, "ascending")
    blocks = 6  # MiniLM's layers
    visited = [block_at(t, turns(badam.clients, blocks), blocks, badam.method.order, 5) for t in range(badam.rounds)]
    assert visited[:blocks] == sorted(set(visited)) and len(set(visited)) == blocks, "every block, from the input up, then again"


def test_every_wire_is_a_plan_of_its_own_in_a_folder_of_its_own() -> None:
    wires = loaded("wires")
    plans = {wire: wires.plan(wire, 0.1, (1, 2)) for wire in [*NAMES, "top-k:0.01"]}
    digests = {run.experiment.digest() for plan in plans.values() for run in plan.every()}
    assert len(digests) == len(plans) * len(wires.METHODS) * 2 and len({wires.folder(wire) for wire in plans}) == len(plans)
    assert all(run.experiment.wire == wire and run.experiment.method.name in wires.METHODS for wire in plans for run in plans[wire].every())


def test_the_table_of_wires_tells_bytes_a_round_and_their_share() -> None:
    def run(method: str, seed: int, kilobytes: int, score: float) -> dict:
        sizes = {"rounds": 4, "bytes_down": 3000 * kilobytes, "bytes_up": 1000 * kilobytes}
        return {"method": method, "seed": seed, "final": {"personalised": score}, **sizes}

    wires = loaded("wires")
    found = {
        "exact": [run("lora", 2, 120, 0.8), run("lora", 1, 80, 0.7), run("fibecfed", 1, 40, 0.9)],
        "int8": [run("lora", 1, 25, 0.6)],
    }
    lines = wires.table(found).splitlines()
    assert lines[2:] == [
        "| exact | lora | 75.0 | 25.0 | 100.0 % | 75.0 | 70.0, 80.0 |",
        "| exact | fibecfed | 30.0 | 10.0 | 100.0 % | 90.0 | 90.0 |",
        "| int8 | lora | 18.8 | 6.2 | 25.0 % | 60.0 | 60.0 |",
    ]
    assert "| - | 60.0 |" in wires.table({"int8": found["int8"]}), "without the exact wire there is nothing to set it against"
