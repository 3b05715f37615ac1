"""The bench: what its rows and verdicts mean, that its figures run at toy size, and that its page says what was measured.

Speed is not tested: a figure is a measurement, and a test machine is no place for one.
"""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from bench import figure, page, results, run
from bench.figures import aggregation, echo, evaluation, federation, gpu, scaling, scores
from bench.row import Row, dumps, loads
from bench.timing import interleaved, ratio
from fedloom.server.aggregation import Average

pytestmark = pytest.mark.no_cover

MORE = Row("speed", 1.0, "x", 5.0, 10.0, "more")
LESS = Row("wait", 1.0, "s", 5.0, 3.0, "less")


@pytest.mark.parametrize(
    ("row", "value", "verdict"),
    [
        (MORE, 10.0, "aim"),
        (MORE, 9.99, "met"),
        (MORE, 5.0, "met"),
        (MORE, 4.99, "missed"),
        (LESS, 3.0, "aim"),
        (LESS, 3.01, "met"),
        (LESS, 5.0, "met"),
        (LESS, 5.01, "missed"),
        (replace(LESS, aim=None), 1.0, "met"),
        (replace(LESS, aim=None), 6.0, "missed"),
        (replace(LESS, aim=None, at_least=None), 6.0, "informative"),
        (MORE, None, "not measured"),
        (MORE, math.nan, "missed"),
    ],
)
def test_a_verdict_is_about_the_bound_and_the_way_it_points(row: Row, value: float | None, verdict: str) -> None:
    assert replace(row, value=value).verdict() == verdict


def test_rows_survive_their_file() -> None:
    rows = [replace(MORE, samples={"s": [1.0, 2.5]}, note="n"), replace(LESS, value=None)]
    assert loads(dumps(rows)) == rows


def test_contestants_take_turns_and_neighbours_are_compared() -> None:
    calls: list[str] = []
    taken = interleaved({"a": lambda: calls.append("a"), "b": lambda: calls.append("b")}, repeats=2, warm=1)
    assert calls == ["a", "b", "a", "b", "b", "a"]
    assert {name: len(seconds) for name, seconds in taken.items()} == {"a": 2, "b": 2}
    assert ratio([2.0, 9.0, 40.0], [1.0, 3.0, 10.0]) == 3.0  # of (2, 3, 4); the ratio of the medians is 3 too: see the next
    assert ratio([1.0, 30.0, 100.0], [1.0, 100.0, 10.0]) == 1.0  # the ratio of the medians is 3
    with pytest.raises(ValueError, match="zip"):
        ratio([1.0], [1.0, 2.0])


def well_formed(rows: list[Row]) -> bool:
    """Every row is named once, has a positive number, and its samples are numbers."""
    numbers = [sample for row in rows for taken in row.samples.values() for sample in taken]
    named = len({row.name for row in rows}) == len(rows) and all(row.name and row.note for row in rows)
    return named and all(row.value is not None and row.value > 0 for row in rows) and all(math.isfinite(n) for n in numbers)


@pytest.mark.parametrize("module", [aggregation, echo, evaluation, scaling, scores], ids=lambda m: m.__name__.split(".")[-1])
def test_a_figure_runs_at_toy_size(module, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(figure.BF16, "1")  # also on processors that bfloat16 is slow on
    rows = module.measure(True)
    assert well_formed(rows)
    assert any(row.at_least is not None for row in rows)
    assert all(len(taken) > 0 for row in rows if row.at_least for taken in row.samples.values())


@pytest.mark.flower
def test_the_figure_of_a_real_federation_runs_at_toy_size() -> None:
    pytest.importorskip("flwr", reason="the extra 'flower' is not installed: pip install 'fedloom[flower]'")
    rows = federation.measure(True)
    assert well_formed(rows)
    assert [(row.at_least, row.better) for row in rows if row.at_least] == [(1.0, "less"), (5.0, "less"), *[(1.1, "less")] * 4]
    assert all(len(taken) > 0 for row in rows for taken in row.samples.values())


def test_bytes_of_a_round_are_those_of_the_formats() -> None:
    """Of many numbers the heads are next to nothing; int8 shares a scale of 32 bits among 256, nf4 among 64; top-k goes up only."""
    shares = [row.value for row in federation.sizes(400_000)]
    assert shares == pytest.approx([100, 50, 50, 100 * (8 + 32 / 256) / 32, 100 * (4 + 32 / 64) / 32, (100 + 2 * 5) / 2], abs=0.1)


def test_growth_is_of_the_most() -> None:
    assert federation.grown([4.0, 8.0, 9.0, 3.0, 12.0], first=2) == 1.5


SECONDS = {
    scores: {"stacked Score": 2.0, "stacked Fit": 1.6, "one-by-one loop": 3.0},
    evaluation: {"100 models": 3.0, "one model": 2.0, "one model, plain": 1.5},
    aggregation: {"weighted_mean": 4.0, "sum": 1.0, "triad": 1.0},
    scaling: {"×1": 1.0, "×4": 2.0, "×16": 4.0},
}
VALUES = {
    scores: [2.0 / 1.6, (3.0 / 8) / (2.0 / 240), 1e3 * 2.0 / 240],
    evaluation: [2.0, 2.0],  # against the faster of the two
    aggregation: [25.0, 4.0],
    scaling: [0.5, 1.5],  # the second: 16, 4 and 1 cohorts in that time, so 1/16, 1/2 and 4 a round
}


@pytest.mark.parametrize("module", list(SECONDS), ids=lambda m: m.__name__.split(".")[-1])
def test_what_a_figure_makes_of_its_seconds(module, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(figure.BF16, "1")
    monkeypatch.setattr(module, "interleaved", lambda contestants, repeats: {name: [SECONDS[module][name]] * 3 for name in contestants})
    assert [row.value for row in module.measure(True)] == pytest.approx(VALUES[module], rel=1e-6)


def test_the_accelerator_figure_runs_on_a_processor_at_toy_size_and_names_the_same_rows_without() -> None:
    rows = gpu.figures("cpu", gpu.TOY[1:], repeats=1)
    assert {row.unit for row in rows} == {"x", "%", "1/s", "GB", "nats"}
    assert rows[-1].value == 0.0  # the processor against itself
    assert [(row.at_least, row.aim, row.better) for row in rows if row.at_least] == [
        (3.0, None, "more"),
        (35.0, 50.0, "more"),
        (gpu.PARITY, None, "less"),
    ]
    if not torch.cuda.is_available():
        without = gpu.measure(False)
        assert [row.verdict() for row in without] == ["not measured"] * len(without)
        shared = [row for row in without if row.name.startswith(gpu.SHAPES[0].name)]
        assert [(r.at_least, r.aim, r.better, r.name.partition(": ")[2]) for r in rows] == [
            (r.at_least, r.aim, r.better, r.name.partition(": ")[2]) for r in shared
        ]


def test_a_mean_that_is_wrong_is_no_figure(monkeypatch: pytest.MonkeyPatch) -> None:
    value = Average.value
    monkeypatch.setattr(Average, "value", lambda mean: {n: 2 * t for n, t in value(mean).items()})
    with pytest.raises(AssertionError, match="would time something else"):
        echo.measure(True)


def test_the_slope_of_a_law_is_its_exponent() -> None:
    assert scaling.slope([1, 4, 16], [3.0, 12.0, 48.0]) == pytest.approx(1.0)
    assert scaling.slope([1, 4, 16], [3.0, 6.0, 12.0]) == pytest.approx(0.5)


def test_the_bench_measures_in_processes_merges_and_tells_what_breaks(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture
) -> None:
    monkeypatch.setattr(run, "machine", lambda: {"processor": "p"})
    assert run.main(["aggregation", "--quick", "--out", str(tmp_path)]) == 0
    first = results.load(tmp_path / "results.json")
    assert list(first.figures) == ["aggregation"] and well_formed(first.rows) and first.quick
    assert {"figures.svg", "figures.png"} <= {path.name for path in tmp_path.iterdir()}
    assert first.rows[0].name in capfd.readouterr().out

    monkeypatch.setattr(run, "_measured", lambda name, quick: ([Row(name, None, "", note="broke with exit code 7")], True))
    assert run.main(["echo", "--quick", "--out", str(tmp_path)]) == 1
    both = results.load(tmp_path / "results.json")
    assert list(both.figures) == ["echo", "aggregation"]  # in the order of FIGURES
    assert both.figures["aggregation"] == first.figures["aggregation"]
    said = capfd.readouterr().out
    assert "broke: echo" in said and "not measured: echo: broke with exit code 7" in said

    monkeypatch.setattr(run, "machine", lambda: {"processor": "another"})
    run.main(["echo", "--quick", "--out", str(tmp_path)])
    assert list(results.load(tmp_path / "results.json").figures) == ["echo"]
    assert "processor was p and is another" in capfd.readouterr().out


def test_a_figure_that_breaks_is_told_apart_from_one_that_misses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(run, "sys", type("S", (), {"executable": "false"}))
    rows, broke = run._measured("echo", True)
    assert broke and rows[0].value is None and "exit code 1" in rows[0].note


def test_bf16_without_instructions_is_asked_for_by_a_flag(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[str] = []

    def measure(quick: bool) -> list[Row]:
        asked.append(os.environ[figure.BF16])
        return []

    monkeypatch.setenv(figure.BF16, "")
    monkeypatch.setattr(run, "machine", dict)
    monkeypatch.setattr(run, "_measured", lambda name, quick: (measure(quick), False))
    for flag in ([], ["--bf16"]):
        monkeypatch.setenv(figure.BF16, "")
        figure.command(measure, ["--quick", *flag])
        monkeypatch.setenv(figure.BF16, "")
        run.main(["throughput", "--quick", "--out", str(tmp_path), *flag])
    assert asked == ["", "", "1", "1"]


def test_unknown_figures_are_named(capsys: pytest.CaptureFixture) -> None:
    with pytest.raises(SystemExit):
        run.main(["echoes"])
    assert "no figures ['echoes']; there are throughput echo" in capsys.readouterr().err
    with pytest.raises(ValueError, match="no figure 'echoes'"):
        figure.measure_of("echoes")


@pytest.fixture
def measured() -> results.Results:
    """Made-up results."""
    machine = {"processor": "P", "cores": 2, "memory_gb": 8, "system": "S", "accelerator": "none", "bf16 instructions": True}
    rows = (replace(MORE, value=7.5, note="how"), replace(LESS, value=None, note="why not"))
    entries = {"echo": results.Entry("2020-01-02T03:04:05+00:00", "abc1234", 90.0, rows)}
    return results.Results(False, {**machine, "torch threads": 2}, {"python": "3"}, entries)


def test_the_page_is_filled_from_results_and_from_nothing_else(tmp_path: Path, measured: results.Results) -> None:
    to = tmp_path / "performance.md"
    to.write_text(f"above\n{page.BEGIN}\nold\n{page.END}\nbelow\n")
    page.write(measured, to)
    text = to.read_text()
    assert "| speed | 7.50 x | ≥ 5 x | ≥ 10 x | met |" in text and "| wait | - | ≤ 5 s | ≤ 3 s | not measured |" in text
    assert text.startswith("above\n") and text.endswith("below\n") and "old" not in text
    assert "P, 2 cores, 8 GB" in text and "echo 2020-01-02 at abc1234 (90 s)" in text
    assert (tmp_path / "performance.svg").read_bytes().startswith(b"<?xml")
    page.write(measured, to)
    assert to.read_text() == text


def test_the_page_of_the_documentation_can_be_filled(tmp_path: Path, measured: results.Results) -> None:
    to = tmp_path / "performance.md"
    to.write_text((results.ROOT / "docs" / "performance.md").read_text(encoding="utf-8"), encoding="utf-8")
    page.write(measured, to)
    assert "| speed | 7.50 x | ≥ 5 x | ≥ 10 x | met |" in to.read_text(encoding="utf-8")


def test_a_page_keeps_what_was_measured_before_on_an_equal_machine_only(tmp_path: Path, measured: results.Results) -> None:
    to, out = tmp_path / "performance.md", tmp_path / "results.json"
    to.write_text(f"{page.BEGIN}\n{page.END}\n")
    words = ["--write-docs", str(to), "--out", str(tmp_path)]
    later = {"scaling": replace(measured.figures["echo"], rows=(replace(MORE, name="slope", value=12.0),))}
    results.save(measured, out)
    assert run.main(words) == 0
    results.save(replace(measured, figures=later), out)
    assert run.main(words) == 0
    assert "| speed | 7.50 x |" in to.read_text() and "| slope | 12.0 x |" in to.read_text()
    results.save(replace(measured, figures=later, machine={**measured.machine, "cores": 4}), out)
    assert run.main(words) == 0
    assert "| speed |" not in to.read_text() and "| slope | 12.0 x |" in to.read_text()


def test_toy_numbers_and_pages_without_markers_are_refused(tmp_path: Path, measured: results.Results) -> None:
    to = tmp_path / "performance.md"
    to.write_text("no markers\n")
    with pytest.raises(page.PageError, match="must hold the line"):
        page.write(measured, to)
    with pytest.raises(page.PageError, match="toy size"):
        page.write(replace(measured, quick=True), to)
    results.save(measured, tmp_path / "results.json")
    assert results.load(tmp_path / "results.json") == measured
    assert run.main(["--write-docs", str(to), "--out", str(tmp_path)]) == 1
    assert to.read_text() == "no markers\n"


def test_the_first_training_step_is_seen_from_outside(tmp_path: Path) -> None:
    """A module of another name stands in for the compute's, so that this takes no time."""
    (tmp_path / "fedloom" / "compute").mkdir(parents=True)
    for folder in ("fedloom", "fedloom/compute"):
        (tmp_path / folder / "__init__.py").touch()
    stand_in = "class Fit: pass\nclass Stacked:\n    def run(self, items): return 'done'\n"
    (tmp_path / "fedloom" / "compute" / "stacked.py").write_text(stand_in)
    program = (
        "import sys; from bench.first_step import Watch; sys.meta_path.insert(0, Watch()); sys.path.insert(0, sys.argv[1])\n"
        "from fedloom.compute.stacked import Fit, Stacked\n"
        "print(Stacked().run([1]), flush=True); Stacked().run([1, Fit()]); print('too late')"
    )
    ended = subprocess.run([sys.executable, "-c", program, str(tmp_path)], capture_output=True, text=True, cwd=results.ROOT)
    first, second = ended.stdout.splitlines()
    assert (ended.returncode, first) == (0, "done") and float(second.removeprefix("first training step at ")) > 0


def test_results_are_plain_json(tmp_path: Path, measured: results.Results) -> None:
    results.save(measured, tmp_path / "results.json")
    saved = json.loads((tmp_path / "results.json").read_text())
    assert saved["figures"]["echo"]["rows"][0]["value"] == 7.5 and saved["versions"] == {"python": "3"}
