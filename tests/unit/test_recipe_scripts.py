"""The recipes. Of tables whose runs are kept: what is kept comes back, nothing else does, and the tables go to their places on the page. Of
the ablations: each changes what its name says and makes sense as a plan. Of the wires: the table tells what the runs took."""

from __future__ import annotations

import importlib.util
import json
import sys
from argparse import Namespace
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from types import ModuleType
from typing import Any
from zipfile import ZipFile

import pytest
import torch

from fedloom import cli
from fedloom.encodings import NAMES
from fedloom.run.adopt import TAKEN_OVER
from fedloom.run.comparison.compare import Comparison
from fedloom.run.comparison.plan import Plan, named_methods
from fedloom.run.errors import CheckpointError
from fedloom.run.experiment import as_json
from fedloom.run.reading import ROW_KEYS
from fedloom.run.recipes import resolve
from fedloom.run.terminal import options
from fedloom.server.cycle import block_at, turns
from fedloom.tensors import nbytes
from tests.unit.run_folder import write_run

RECIPES = Path(__file__).resolve().parents[2] / "recipes"


def loaded(name: str) -> ModuleType:
    """A recipe as a module; what recipes share is found beside it, as when it is run."""
    spec = importlib.util.spec_from_file_location(f"{name}_recipe", RECIPES / f"{name}.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    sys.path.insert(0, str(RECIPES))
    try:
        spec.loader.exec_module(module)
    finally:
        sys.path.remove(str(RECIPES))
    return module


@pytest.fixture(scope="module")
def kept() -> ModuleType:
    return loaded("kept")


@pytest.fixture(scope="module", params=["core", "federa", "further"])
def table(request: pytest.FixtureRequest) -> Any:
    return loaded(request.param).TABLE


@pytest.fixture(scope="module")
def ablations() -> ModuleType:
    return loaded("ablations")


def named(method: str) -> Any:
    """As a run's folder holds it: METHOD, or METHOD+CURRICULUM."""
    name, _, curriculum = method.partition("+")
    return {"name": name, "lr": 0.001, **({"curriculum": {"name": curriculum}} if curriculum else {})}


def files(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def test_what_is_kept_comes_back_and_grows(kept: ModuleType, tmp_path: Path) -> None:
    first, second, archive = tmp_path / "first", tmp_path / "second", tmp_path / "deep" / "trec.zip"
    write_run(first / "lora-seed1", rounds=3, alpha=0.1)
    write_run(first / "ditto-seed1", rounds=8, ended=False)
    (first / "lora-seed1" / "checkpoint.bin").write_bytes(b"large")
    kept.keep(first, archive)
    write_run(second / "lora-seed1", rounds=4, alpha=1.0)
    kept.keep(second, archive)
    again = tmp_path / "again"
    write_run(again / "alpha1.0-lora-seed1", rounds=5, alpha=1.0)
    own = files(again)
    kept.unpack(archive, again)
    made = files(again)
    names = [f"alpha{alpha}-lora-seed1/{file}" for alpha in ("0.1", "1.0") for file in kept.FILES if file != "diverged.json"]
    assert sorted(made) == sorted(names), "three files a finished run under a name that tells alpha, nothing of what had not ended"
    assert all(made[f"alpha0.1-{name}"] == files(first)[name] for name in files(first) if name.startswith("lora") and "check" not in name)
    assert {name: made[name] for name in own} == own, "one's own finished run stays as it is"
    assert not list(archive.parent.glob("*.tmp"))
    before = archive.read_bytes()
    kept.keep(second, archive)
    assert archive.read_bytes() == before, "the same runs make the same archive"


@pytest.mark.parametrize("name", ["../x/results.json", "a/b/results.json", "run/model.pt", "results.json"])
def test_an_archive_with_anything_else_is_refused(kept: ModuleType, tmp_path: Path, name: str) -> None:
    with ZipFile(tmp_path / "odd.zip", "w") as archive:
        archive.writestr(name, "{}")
    with pytest.raises(ValueError, match="no file of a run"):
        kept.unpack(tmp_path / "odd.zip", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_an_alpha_is_told_when_all_of_its_runs_are_there(table: Any, tmp_path: Path) -> None:
    """Three rates with the first seed, one with the two others; another method's runs more do not stand for what is missing."""
    *_, last = table.methods
    for method in table.methods:
        for i, seed in enumerate((1, 1, 1, 2, 3)):
            write_run(tmp_path / f"{method}-{i}", named(method), 2, alpha=0.1, seed=seed)
            if i < 4 or method != last:
                write_run(tmp_path / f"{method}-mild-{i}", named(method), 2, alpha=1.0, seed=seed)
    write_run(tmp_path / "more", named(table.methods[0]), 2, alpha=1.0, seed=1)
    assert table.measured(tmp_path) == ("0.1",)
    write_run(tmp_path / f"{last}-mild-4", named(last), 2, alpha=1.0, seed=3)
    assert table.measured(tmp_path) == ("0.1", "1.0")


def test_further_baselines_have_the_settings_of_the_core_table() -> None:
    """So that what both have (``lora``, ``fedeven``) is the same; but not its kind of adapter, for ``fedalt`` has one of its own."""
    core, further = loaded("core").TABLE, loaded("further").TABLE
    assert (further.alphas, further.seeds, further.rates, further.packaged) == (core.alphas, core.seeds, core.rates, core.packaged)
    for task in ("trec", "rte"):
        assert core.options(task).replace("--share-training ", "").replace(" --adapter.kind lora", "") == further.options(task)
    page = further.page.read_text(encoding="utf-8")
    assert page.count("<!-- further -->") == page.count("<!-- /further -->") == 1


def test_a_rate_that_diverged_is_settled_and_kept(table: Any, kept: ModuleType, tmp_path: Path) -> None:
    """Where all of a method's rates did, no further seed is due."""
    first, second, *others = table.methods
    for method in others:
        for i, seed in enumerate((1, 1, 1, 2, 3)):
            write_run(tmp_path / "a" / f"{method}-{i}", named(method), 2, alpha=0.1, seed=seed)
    for i, seed in enumerate((1, 1, 1, 2, 3)):
        write_run(tmp_path / "a" / f"{first}-{i}", named(first), 2, alpha=0.1, seed=seed, ended=i != 2)
        if i < 3:
            write_run(tmp_path / "a" / f"{second}-{i}", named(second), 2, alpha=0.1, seed=1, ended=False)
    assert table.measured(tmp_path / "a") == ()
    for name in (f"{first}-2", *(f"{second}-{i}" for i in range(3))):
        (tmp_path / "a" / name / "diverged.json").write_text('{"failure": "not finite"}')
    assert table.measured(tmp_path / "a") == ("0.1",)
    kept.keep(tmp_path / "a", tmp_path / "kept.zip")
    kept.unpack(tmp_path / "kept.zip", tmp_path / "b")
    assert table.measured(tmp_path / "b") == ("0.1",)
    lost = tmp_path / "b" / f"alpha0.1-{first}-2"
    assert sorted(path.name for path in lost.iterdir()) == ["diverged.json", "experiment.json", "rounds.jsonl"]


def test_the_hours_of_the_runs_are_told(kept: ModuleType) -> None:
    told = kept.took({"trec, α = 0.1": 9000.0, "rte, α = 1": 5400.0}, 14)
    assert "trec, α = 0.1: 2.5 h, rte, α = 1: 1.5 h. Together 4.0 h (14,400 s) for 2 of the table's 14 cells" in told


def test_what_is_told_of_all_goes_between_its_marks(table: Any, tmp_path: Path) -> None:
    page = tmp_path / "results.md"
    page.write_text(f"a\n<!-- {table.name} -->\nold\n<!-- /{table.name} -->\nb\n")
    elsewhere = replace(table, page=page)
    for _ in range(2):
        elsewhere.write(r"| \1 |")
    assert page.read_text() == f"a\n<!-- {table.name} -->\n\n| \\1 |\n<!-- /{table.name} -->\nb\n"
    with pytest.raises(ValueError, match="needs one line <!-- other -->"):
        replace(elsewhere, name="other").write("x")


def test_what_lies_beside_the_page_are_runs_of_this_recipe(table: Any) -> None:
    kinds = [resolve(method).method for method in table.methods]
    assert list(named_methods(kinds)) == list(table.methods), "each word of the command line is the name in the table"
    page = table.page.read_text(encoding="utf-8")
    for archive_path in table.kept.glob("*.zip"):
        assert f"]({table.name}/{archive_path.stem}.md)" in page and table.tables(archive_path.stem).exists(), "what is kept is told"
        words = [w for w in table.options(archive_path.stem).replace(" --adapter.kind lora", "").split() if w != "--share-training"]
        due = {key.strip("-").replace("-", "_"): value for key, value in zip(words[::2], words[1::2], strict=True)}  # the later counts
        due = {"precision": "float32", **due, "data": archive_path.stem}
        with ZipFile(archive_path) as archive:
            told = [json.loads(archive.read(name)) for name in archive.namelist() if name.endswith("results.json")]
        for result in told:
            experiment = result["experiment"]
            assert {key: str(experiment[key]).removeprefix("./") for key in due} == due
            assert result["method"] in table.methods
            assert experiment["adapter"].get("kind", "lora") in ("lora", "auto"), "the field came later than the first runs"


def test_the_board_counts_firsts_and_what_is_level_and_finds_the_furthest_leads(kept: ModuleType) -> None:
    def row(
        method: str, personalised: float, spread: float, rank: float, up: int, over: dict[str, tuple[float, float | None]]
    ) -> dict[str, Any]:
        told = {"mean": personalised, "deviation": spread, "count": 3}
        none = {"mean": None, "deviation": None, "count": 0}
        scores = {"personalised": told, "global": none if method == "local" else told}
        told_of = {"personalising_counted": method != "ours"}
        by = {o: {"personalised": {"margin": margin, "time_saved": s, **told_of}, "global": None} for o, (margin, s) in over.items()}
        ranks = {"personalised": rank, "global": None if method == "local" else rank}
        return {
            "method": method,
            "scores": {"final": scores},
            "rank": ranks,
            "costs": {"bytes_up": up, "setup_bytes_up": 10 * (method == "ours")},
            "over": by,
        }

    one = [
        row("lora", 0.70, 0.02, 3, 100, {"local": (-0.2, None), "ours": (-0.1, -0.5)}),
        row("local", 0.90, 0.01, 1, 0, {"lora": (0.2, 0.25), "ours": (0.1, None)}),
        row("ours", 0.80, 0.01, 2, 70, {"lora": (0.1, 0.5), "local": (-0.1, None)}),
    ]
    other = [
        row("lora", 0.60, 0.03, 3, 100, {"local": (-0.01, 0.0), "ours": (-0.02, -0.1)}),
        row("local", 0.61, 0.00, 2, 0, {"lora": (0.01, None), "ours": (-0.01, None)}),
        row("ours", 0.62, 0.03, 1, 50, {"lora": (0.02, 0.75), "local": (0.01, 0.1)}),
    ]
    third = [
        row("lora", 0.00, 0.00, 3, 100, {"local": (-0.8, None), "ours": (-0.7, -0.5)}),
        row("local", 0.80, 0.01, 1, 0, {"lora": (0.8, 0.2), "ours": (0.1, None)}),
        row("ours", 0.70, 0.90, 2, 70, {"lora": (0.7, 0.3), "local": (-0.1, None)}),
    ]
    both = [
        {"personalised": {"level": mine}, "global": {"level": all_}} for mine, all_ in ((["local"], ["ours"]), (["local", "ours"],) * 2)
    ]
    cases: list[Any] = [
        {"label": label, "rows": rows, "metric": "accuracy", "first": first}
        for label, rows, first in zip("ab", (one, other), both, strict=True)
    ]
    cases[1]["took_part"] = {"level": ["lora", "local"]}  # in the other case everybody did
    cases[0]["commonest"] = {
        "over": {"lora": {"low": -0.01}, "local": {"low": 0.0}, "ours": {"low": 0.001}}
    }  # in the other it is not known
    lines = kept.board(cases, ("lora", "local", "ours")).splitlines()
    assert lines[0] == (
        "**Over all 2 cells (level: the paired bootstrap over devices does not separate it at 95 % from the method with the highest mean)**"
    )
    assert lines[4:7] == [
        "| lora | 0 of 2 | 1 of 2 | 0 of 2 | 0 of 1 | 3.0 | 3.0 | 100% |",
        "| local | 2 of 2 | 2 of 2 | - | 0 of 1 | 1.5 | - | 0% |",
        "| ours | 1 of 2 | 0 of 2 | 2 of 2 | 1 of 1 | 1.5 | 1.5 | 70% |",
    ]
    assert lines[-3:] == [
        "| lora | - | - |",
        "| local | +0.2000 (lora; a) | 25% (lora; a) |",
        "| ours | +0.1000 (lora; a) | 75%† (lora; b) |",
    ]
    assert "†: without what devices train" in lines[8]
    diverged = [{**row, "costs": dict.fromkeys(row["costs"])} if row["method"] == "ours" else row for row in cases[0]["rows"]]
    assert kept.board([{**cases[0], "rows": diverged}], ("lora", "local", "ours")).splitlines()[6].endswith("| - |")
    none = {"personalised": None, "global": {"level": ["lora"]}}
    lines = kept.board([*cases, {"label": "c", "rows": third, "metric": "mcc", "first": none}], ("lora", "local", "ours")).splitlines()
    assert lines[-5] == "| method | accuracy above it, personalised | mcc above it, personalised | device time saved to where it ends |"
    assert lines[-2:] == [
        "| local | +0.2000 (lora; a) | +0.8000 (lora; c) | 25% (lora; a) |",
        "| ours | +0.1000 (lora; a) | +0.7000 (lora; c) | 75%† (lora; b) |",
    ]
    assert lines[4] == "| lora | 0 of 3 | 1 of 3 | 1 of 3 | 0 of 1 | 3.0 | 3.0 | 100% |"


def test_all_scores_stand_in_two_tables_and_those_that_are_no_order_are_bold(kept: ModuleType) -> None:
    def row(method: str, personalised: float | None, shared: float | None, count: int = 3) -> dict[str, Any]:
        told = {p: {"mean": of, "count": 0 if of is None else count} for p, of in (("personalised", personalised), ("global", shared))}
        return {"method": method, "scores": {"final": told}}

    cases = [
        {"label": "a", "rows": [row("lora", 0.5, 0.5), row("local", 0.93, None)], "commonest": {"score": {"mean": 0.9499, "count": 3}}},
        {"label": "b", "rows": [row("lora", 0.25, -0.01), row("local", 0.271, None)], "commonest": None},
        {"label": "c", "rows": [row("lora", 0.3, None), row("local", 0.9, None, 2)], "commonest": None},  # of a seed less
    ]
    assert kept.scores(cases, ("lora", "local")).splitlines() == [
        "**Personalised, mean over seeds (bold: within 0.02 of the highest)**",
        "",
        "|  | own commonest label | lora | local |",
        "| --- | --- | --- | --- |",
        "| a | **.950** | .500 | **.930** |",
        "| b | - | .250 | **.271** |",
        "| c | - | **.300** | .900 |",
        "",
        "**Global, mean over seeds (bold: within 0.02 of the highest)**",
        "",
        "|  | lora |",
        "| --- | --- |",
        "| a | **.500** |",
        "| b | **-.010** |",
        "| c | - |",
    ]


def test_some_bytes_more_are_the_same_traffic() -> None:
    """Two orders of the same blocks send the same numbers under other names, and neither ends before the other."""
    rows = [{"bytes_up": up, "bytes_down": 500, "validation": {"loss": loss}} for up, loss in ((500, 3.0), (501, 2.0), (510, 1.0))]
    assert [loaded("cycles")._within(rows, budget) for budget in (999, 1000, 2000, 3000)] == [None, 3.0, 2.0, 2.0]


def test_training_that_was_taken_over_is_spent_once_and_set_up_counts(kept: ModuleType) -> None:
    trained = {"notes": ["800 rows"], "host_seconds": 60.0, "setup_host_seconds": 5.0}
    assert kept.spent(trained) == 65.0
    assert kept.spent({**trained, "notes": ["800 rows", f"{TAKEN_OVER}lora-seed1; evaluated after the last round only"]}) == 0.0


def test_the_hours_of_a_cell_are_those_of_all_its_runs_what_diverged_among_them(kept: ModuleType, tmp_path: Path) -> None:
    """A run that diverged has no results: its rows tell what its rounds took (here half a second and three times three)."""
    write_run(tmp_path / "a", rounds=2, alpha=0.1)
    write_run(tmp_path / "b", rounds=8, alpha=0.1, ended=False)
    write_run(tmp_path / "going-on", rounds=8, alpha=0.1, ended=False)
    write_run(tmp_path / "c", rounds=4, alpha=1.0)
    (tmp_path / "b" / "diverged.json").write_text('{"failure": "not finite"}')
    write_run(tmp_path / "set-up", rounds=8, alpha=1.0, ended=False)
    (tmp_path / "set-up" / "rounds.jsonl").unlink()
    (tmp_path / "set-up" / "diverged.json").write_text('{"failure": "not finite"}')
    for name in "ac":
        path = tmp_path / name / "results.json"
        path.write_text(json.dumps({**json.loads(path.read_text()), "setup_host_seconds": 100.0}))
    cases = [{"label": "trec, α = 0.1", "alpha": 0.1}, {"label": "trec, α = 1", "alpha": 1.0}]
    assert kept.hours(tmp_path, cases) == {"trec, α = 0.1": 100 + 0.5 + 2 * 3 + (0.5 + 3 * 3), "trec, α = 1": 100 + 0.5 + 4 * 3}


def test_what_comes_out_of_an_archive_is_there_whole_or_not_at_all(
    kept: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_run(tmp_path / "a" / "lora", rounds=2, alpha=0.1)
    kept.keep(tmp_path / "a", tmp_path / "kept.zip")

    def killed(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr("fedloom.folders.os.replace", killed)
        kept.unpack(tmp_path / "kept.zip", tmp_path / "b")
    assert not [path for path in (tmp_path / "b").rglob("*") if path.is_file()]
    kept.unpack(tmp_path / "kept.zip", tmp_path / "b")
    assert (tmp_path / "b" / "alpha0.1-lora" / "results.json").read_bytes() == (tmp_path / "a" / "lora" / "results.json").read_bytes()


def test_a_small_share_is_not_told_as_none(kept: ModuleType) -> None:
    assert [kept.share_text(share) for share in (0.0, 0.0034, 0.0081, 0.01, 0.836, 1.0)] == ["0%", "0.34%", "0.81%", "1%", "84%", "100%"]


def test_there_is_one_slice_at_least() -> None:
    assert list(loaded("core").TABLE.kept.glob("*.zip"))


@pytest.mark.parametrize("asked", [["trecc"], []])
def test_a_task_that_is_not_there_is_told_what_is(
    table: Any, asked: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("sys.argv", ["recipe.py", *asked])
    with pytest.raises(SystemExit):
        table.command("A table.")
    assert f"there are {', '.join(table.shapes)}" in capsys.readouterr().err


@pytest.mark.parametrize("name", ["core", "federa", "further"])
def test_every_task_of_a_table_is_a_comparison_that_its_command_line_takes(
    name: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Each task is handed to ``fedloom compare`` in the folder of the data sets, with all methods; what is added comes last."""
    recipe, asked = loaded(name), []
    monkeypatch.setattr(sys.modules[type(recipe.TABLE).__module__], "main", lambda words: asked.append((Path.cwd(), words)) or 0)
    (tmp_path / "sets").mkdir()
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.argv", ["recipe.py", *recipe.TABLE.shapes, "--folder", "sets", "--out", "o", "--alphas", "0.1", "--jobs", "2"])
    table = replace(recipe.TABLE, name="nothing-is-kept-of-this")
    assert table.command(None) == 0
    assert len(asked) == len(table.shapes)
    for task, (folder, words) in zip(table.shapes, asked, strict=True):
        told = vars(cli._parse(options.for_compare(), words[1 + len(table.methods) :], "x"))
        assert (words[0], tuple(words[1 : 1 + len(table.methods)]), folder) == ("compare", table.methods, tmp_path / "sets")
        assert Path(told["out"]) == tmp_path / "o" / f"{task}-0.1" and told["jobs"] == 2


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
    assert "parts, pacing, order, layers, keep, skew, devices, cohort, model" in capsys.readouterr().err


def compared(
    ablations: ModuleType, words: list[str], failures: dict[str, dict[str, str]], patch: pytest.MonkeyPatch
) -> tuple[int, list[Any]]:
    """The exit code, and what was asked of ``compare``: (plan, folder, jobs, reference). ``failures``: by folder's name, of its runs."""
    asked: list[Any] = []

    def compare(plan: Plan, out: Path, jobs: int, *, reference: str) -> Comparison:
        asked.append((plan, out, jobs, reference))
        return Comparison([], None, failures.get(out.name, {}), out / "report.html")

    patch.setattr(ablations, "compare", compare)
    patch.setattr("sys.argv", ["ablations.py", *words])
    return ablations.main(), asked


def test_an_ablation_is_a_comparison_in_a_folder_of_its_name(
    ablations: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Against plain LoRA where it is there, else against FibecFed as it is; settings have a folder for each value below their name's."""
    words = ["parts", "keep", "cohort", "--seeds", "4", "5", "--lr", "0.002", "--jobs", "3", "--alpha", "0.5", "--out", str(tmp_path)]
    code, asked = compared(ablations, words, {}, monkeypatch)
    sizes = (5, 10, 20, 50)
    assert code == 0
    assert [out for _, out, _, _ in asked] == [tmp_path / w for w in ("parts", "keep", *(f"cohort/cohort-{n}" for n in sizes))]
    assert [reference for *_, reference in asked] == ["lora", "fibecfed", *["lora"] * 4]
    assert [jobs for _, _, jobs, _ in asked] == [3] * 6
    assert [plan.base.cohort for plan, *_ in asked] == [10, 10, *sizes]
    assert [list(plan.methods) for plan, *_ in asked[2:]] == [["lora", "fibecfed"]] * 4
    assert asked[0][0].methods == ablations.VARIANTS["parts"]() and asked[1][0].methods == ablations.VARIANTS["keep"]()
    for plan, *_ in asked:
        assert (plan.data, plan.alphas, plan.seeds, plan.rates) == (("trec",), (0.5,), (4, 5), (0.002,))
        assert replace(plan.base, cohort=10) == replace(ablations.SHAPE, alpha=0.5)
    assert f"cohort/cohort-5: {tmp_path / 'cohort' / 'cohort-5' / 'report.html'}" in capsys.readouterr().out


def test_where_methods_meet_in_another_setting_each_has_its_rate_searched(
    ablations: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Among those of the core table; variants of FibecFed have FibecFed's."""
    _, asked = compared(ablations, ["parts", "skew", "--out", str(tmp_path)], {}, monkeypatch)
    assert [plan.rates for plan, *_ in asked] == [(8e-3,), *[(5e-4, 2e-3, 8e-3)] * 3]


def test_skews_are_those_of_their_names_whatever_alpha_is_given(
    ablations: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _, asked = compared(ablations, ["skew", "--alpha", "0.5", "--out", str(tmp_path)], {}, monkeypatch)
    assert [(out.name, plan.alphas, plan.base.alpha) for plan, out, *_ in asked] == [
        ("alpha-0.1", (0.1,), 0.1), ("alpha-1", (1.0,), 1.0), ("alpha-10", (10.0,), 10.0)
    ]  # fmt: skip


def test_a_run_that_fails_is_named_and_the_others_go_on(
    ablations: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    failures = {"keep": {"keep-10-seed1": "the disk is full"}}
    code, asked = compared(ablations, ["keep", "layers", "--out", str(tmp_path)], failures, monkeypatch)
    assert (code, [out.name for _, out, _, _ in asked]) == (1, ["keep", "layers"])
    assert "keep-10-seed1 failed: the disk is full" in capsys.readouterr().out


def test_another_model_is_set_beside_minilm(
    ablations: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    code, asked = compared(ablations, ["model", "--model", "/models/roberta", "--out", str(tmp_path)], {}, monkeypatch)
    assert code == 0
    assert [(out.name, plan.base.model, reference) for plan, out, _, reference in asked] == [
        ("model-minilm", "minilm", "lora"), ("model-roberta", "/models/roberta", "lora")
    ]  # fmt: skip
    another = "'model' compares MiniLM with another model, 'head' that model's own head with a new one: model head --model FOLDER"
    same = "--model minilm is called as the one that it is set beside"
    wrong = ((["model"], another), (["head"], another), (["parts", "--model", "x"], another), (["model", "--model", "minilm"], same))
    for words, said in wrong:
        with pytest.raises(SystemExit):
            compared(ablations, words, {}, monkeypatch)
        assert said in capsys.readouterr().err


def test_a_language_models_own_head_is_set_beside_a_new_one(ablations: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    code, asked = compared(ablations, ["head", "--model", "/models/roberta", "--out", str(tmp_path)], {}, monkeypatch)
    assert code == 0
    assert [(out.name, plan.base.head, plan.base.model) for plan, out, *_ in asked] == [
        ("head-linear", "linear", "/models/roberta"), ("head-cloze", "cloze", "/models/roberta")
    ]  # fmt: skip


def test_an_ablation_can_be_of_another_data_set(ablations: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _, asked = compared(ablations, ["parts", "cohort", "--data", "/sets/sst2", "--out", str(tmp_path)], {}, monkeypatch)
    assert {(plan.data, plan.base.data) for plan, *_ in asked} == {(("/sets/sst2",), "/sets/sst2")} and len(asked) == 5


@pytest.mark.parametrize(
    ("name", "words", "wanted"),
    [
        ("wires", "", "runs/wires/exact"),
        ("wires", "--alpha 1.0 --seeds 3", "runs/wires-alpha1.0/exact"),
        ("wires", "--alpha 1.0 --out o", "o/exact"),
        ("cycles", "", "runs/cycles/turns"),
        ("cycles", "--rates 4e-5 2e-4 --skip thinner", "runs/cycles/turns"),
        ("cycles", "--data a/dolly15k --model b/stories260K", "runs/cycles-dolly15k-stories260K/turns"),
        ("cycles", "--data a/dolly15k/ --model b/stories260K --skew iid", "runs/cycles-dolly15k-stories260K-iid/turns"),
        ("cycles", "--skew 1.0 --train 240 --length 64", "runs/cycles-skew1.0-train240-length64/turns"),
        ("ablations", "parts", "runs/ablations/parts"),
        ("ablations", "parts --data a/sst2", "runs/ablations-sst2/parts"),
        ("ablations", "cohort --alpha 1 --lr 2e-3", "runs/ablations-alpha1.0-lr0.002/cohort/cohort-5"),
        ("ablations", "model --model m/gpt2", "runs/ablations/model/model-minilm"),
        ("ablations", "head --model m/gpt2", "runs/ablations/head-gpt2/head-linear"),
        ("ablations", "parts --lr 2e-3 --out o", "o/parts"),
    ],
)
def test_settings_other_than_a_recipes_own_have_a_folder_of_their_own(
    name: str, words: str, wanted: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The first comparison's folder. Seeds, groups and the rates that are searched are not among them: by these a comparison grows, from
    two on; one alone needs ``--out``. What the folder holds
    nevertheless, of others, is told as what was asked wrongly."""
    recipe, asked = loaded(name), []

    def compare(plan: Plan, out: Path, jobs: int, reference: str = "") -> Comparison:
        asked.append(out)
        return Comparison([], None, {"lora": "no"}, None)

    def refused(*_: object, **__: object) -> None:
        raise CheckpointError("it holds another experiment")

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.argv", [f"{name}.py", *words.split()])
    monkeypatch.setattr(recipe, "compare", compare)
    assert recipe.main() == 1
    assert str(asked[0]) == wanted
    monkeypatch.setattr(recipe, "compare", refused)
    with pytest.raises(SystemExit) as ended:
        recipe.main()
    assert ended.value.code == 2 and f"{name}.py: error: it holds another experiment" in capsys.readouterr().err


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
        *("fedcybgd", "fedcybgd-random", "handover", "fedbavg", "fedfft", "galore", "lisa", "lora", "centralised", "badam"),
        *(f"fedcybgd-{less}" for less in ("subset", "drop", "prune", "int8", "nf4")),
    }
    assert len({json.dumps(as_json(one.method)) for name, one in made.items() if name.startswith("fedcybgd")}) == 7, "each is another"
    badam = made["badam"]
    assert (badam.clients, badam.cohort, badam.method.order) == (1, 1, "ascending")
    blocks = 6  # MiniLM's layers
    visited = [block_at(t, turns(badam.clients, blocks), blocks, badam.method.order, 5) for t in range(badam.rounds)]
    assert visited[:blocks] == sorted(set(visited)) and len(set(visited)) == blocks, "every block, from the input up, then again"


def test_the_table_of_cycles_tells_losses_by_cycle_and_at_equal_bytes(tmp_path: Path) -> None:
    """What passes in one place is no traffic; a method that sends less than FedCyBGD is told at its end, one that sends more before."""
    cycles = loaded("cycles")

    def row(round: int, loss: float | None, up: int, down: int) -> dict[str, Any]:
        return {**dict.fromkeys(ROW_KEYS), "round": round, "validation": {"loss": loss}, "bytes_up": up, "bytes_down": down}

    sent = {
        "turns": (1, 2),
        "thinner": (1, 1),
        "cohorts": (8, 8),
        "sparing": (8, 8),
        "lora": (1, 0),
        "centre": (5, 5),
        "one-client": (5, 5),
    }
    for group, (up, down) in sent.items():
        worth = cycles.GROUPS[group][2]
        rounds = [0, *(turns // worth for turns in cycles.TOLD if turns % worth == 0)]
        rows = [row(0, 9.0, 0, 0)]
        for last, this in pairwise(rounds):
            rows += [row(r, None, up * 10**6, down * 10**6) for r in range(last + 1, this)]
            rows.append(row(this, 8.0 - this * worth / 96, up * 10**6, down * 10**6))
        runs = {}
        for seed, shift in (("1", 0.0), ("2", 1.0)):
            folder = tmp_path / group / f"one-{group}-{seed}"
            write_run(folder, rounds=2)
            moved = [r if r["validation"]["loss"] is None else {**r, "validation": {"loss": r["validation"]["loss"] + shift}} for r in rows]
            (folder / "rounds.jsonl").write_text("".join(json.dumps(r) + "\n" for r in moved))
            runs[seed] = folder.name
        told = {"cases": [{"rows": [{"method": f"one-{group}", "lr": 1e-3, "runs": runs}]}]}
        (tmp_path / group / "summary.json").write_text(json.dumps(told))
    lines = {
        line.split(" | ")[0].removeprefix("| one-"): line.split(" | ")[2:]
        for line in cycles.table(tmp_path, cycles.GROUPS).splitlines()[2:-2]
    }
    assert list(lines) == list(cycles.GROUPS)
    foot = cycles.table(tmp_path, cycles.GROUPS).splitlines()[-2:]
    assert foot == ["", "‡: the whole run, or that of some seeds, sent fewer bytes; then it is the loss at its end."]
    assert "‡" not in cycles.table(tmp_path, ["turns", "cohorts", "centre"]), "an equal number of bytes is not fewer; one place sends none"
    assert cycles.table(tmp_path, ["turns", "lora"]).splitlines()[2:-2] == [
        line for line in cycles.table(tmp_path, cycles.GROUPS).splitlines() if line.startswith(("| one-turns", "| one-lora"))
    ]
    every = [f"{8.5 - turns / 96:.4f} ± 0.7071" for turns in cycles.TOLD]
    assert lines["turns"] == [*every, "96.0", "192.0", "7.5000 ± 0.7071 |"]
    assert lines["thinner"] == [*every, "96.0", "96.0", "7.5000 ± 0.7071‡ |"]
    assert lines["cohorts"] == [*every, "192.0", "192.0", f"{8.5 - 72 / 96:.4f} ± 0.7071 |"], "18 rounds of 16 MB fit into 288, 24 do not"
    assert lines["lora"] == [*every, "24.0", "0.0", "7.5000 ± 0.7071‡ |"]
    assert lines["centre"] == ["-", *every[1:], "-", "-", "- |"], "a third of a cycle is no round there"
    assert lines["one-client"] == ["-", *every[1:], "-", "-", "- |"]


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


# the papers' settings


def test_fibecfeds_paper() -> None:
    """100 devices, 10 a round, 100 rounds, 2 local epochs, batch 8, length 128, r 8, α 16 on query and value, no decay, clip 1.0, seed 42;
    sizes by Dirichlet(5), labels by Dirichlet(1); β₀ 0.6, α 0.8; ρ 0.5, ¾ of the layers; E_w 1, γ 0.5, keep 0.95; rates 1e-4 to 8e-4."""
    e = resolve(str(RECIPES / "fibecfed_paper.py")).experiment
    assert e is not None and (e.clients, e.cohort, e.rounds, e.max_length, e.seed, e.beta, e.alpha) == (100, 10, 100, 128, 42, 5.0, 1.0)
    assert (e.trained.kind, e.adapter.rank, e.adapter.alpha, e.adapter.targets, e.partition) == (
        "lora",
        8,
        16.0,
        ("query", "value"),
        "label",
    )
    m = e.method
    assert (m.inner.local_epochs, m.inner.batch_size, m.inner.weight_decay, m.inner.clip, m.inner.schedule) == (2, 8, 0.0, 1.0, "constant")
    assert 1e-4 <= m.inner.lr <= 8e-4 and (m.curriculum.start, m.curriculum.full_at, m.curriculum.pacing) == (0.6, 0.8, "linear")
    assert (m.gal.fraction, m.gal.which, m.gal.rho, m.keep, m.warmup_epochs, m.momentum) == (0.75, "least", 0.5, 0.95, 1, 0.5)


def test_fedcybgds_paper() -> None:
    """64 clients, 6 cycles, 3 local epochs, batch 16, 1e-6, cosine within a turn, length 512+512, ascending. Up comes a layer of
    LLaMA-2-7B (four matrices of 4096², three of 4096 · 11008, two norms) in half precision, 404.8 MB."""
    e = resolve(str(RECIPES / "fedcybgd_paper.py")).experiment
    assert e is not None and (e.clients, e.cohort, e.max_length, e.rounds) == (64, 1, 1024, 384)
    layer = torch.zeros(4 * 4096**2 + 3 * 4096 * 11008 + 2 * 4096, device="meta")
    assert e.wire == "up:fp16" and nbytes({"as it travels": layer.to(torch.float16)}) / 1e6 == pytest.approx(404.8, abs=0.05)
    m = e.method
    assert (m.inner.local_epochs, m.inner.batch_size, m.inner.lr, m.inner.schedule, m.order) == (3, 16, 1e-6, "cosine", "ascending")
    given = cli._parse(options.for_run(resolve(str(RECIPES / "fedcybgd_paper.py"))), ["--rounds", "2"], "x")
    assert options.experiment_of(given) == replace(e, rounds=2), "an option goes over it, and nothing else changes"


def test_each_variant_of_the_curriculum_changes_what_it_says(ablations: ModuleType) -> None:
    """From the whole method to plain batches, one thing after another is taken away: the pacing, the order, the warm-up, the one cut."""
    order, parts, whole = ablations.VARIANTS["order"](), ablations.VARIANTS["parts"](), ablations.WHOLE.curriculum
    assert order["unsorted"].curriculum == replace(whole, granularity="unsorted")
    assert parts["no-pacing"].curriculum == replace(whole, start=1.0)
    assert order["off"].curriculum == parts["no-curriculum"].curriculum == replace(whole, start=1.0, granularity="unsorted")
    alone, plain = order["off-and-no-warm-up"], order["off-no-warm-up-and-cut-anew"]
    assert alone.curriculum == plain.curriculum and alone.curriculum.name == "none"
    assert (order["off"].inner.reshuffle, alone.inner.reshuffle, plain.inner.reshuffle) == (True, False, True)
    kept = [replace(of, curriculum=whole, inner=ablations.WHOLE.inner) for of in (*order.values(), parts["no-curriculum"])]
    assert set(map(repr, kept)) == {repr(ablations.WHOLE)}, "nothing else"
