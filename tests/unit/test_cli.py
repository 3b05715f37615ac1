"""The command line without a run: which options there are, what is said when words are wrong, and that help is quick."""

from __future__ import annotations

import errno
import gc
import json
import math
import os
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors import SafetensorError

from fedloom import cli
from fedloom.client.curricula import all_curricula
from fedloom.client.curricula.slw import LengthWarmup
from fedloom.client.curricula.voc import ByRarity
from fedloom.client.store import DiskError, StoreError
from fedloom.compute.lowrank import directions
from fedloom.data.tasks import Classification
from fedloom.encodings import CODES, WHICH, Encoding
from fedloom.messages import DIVERGED, CohortFailed, Failure, Task, Update
from fedloom.methods import all_methods, named
from fedloom.methods.fedavg import FedAvg
from fedloom.methods.prior import PriorCorrected
from fedloom.model.adapters import Adapter
from fedloom.run import recipes
from fedloom.run.comparison.compare import Comparison
from fedloom.run.errors import CheckpointError, ExperimentError
from fedloom.run.experiment import EngineSettings, Experiment, as_json
from fedloom.run.terminal import arguments, options
from fedloom.run.terminal.failures import RESUMES, diverged, explain
from fedloom.run.terminal.overview import what_it_is
from fedloom.wire import WireError, pack


def names(text: str) -> list[str]:
    return text.split()


EXPERIMENT = names("""
--adapter.alpha --adapter.base --adapter.dropout --adapter.kind --adapter.rank --adapter.start --adapter.targets
--aggregation --alpha --beta --clients --cohort --controls --data --device --engine.kind --engine.overcommit
--engine.recompute --engine.stack --engine.threads --engine.workers --evaluate-every --exact-match --head --label --label-words
--mask.keep --max-length --max-test --max-train --max-validation --metric
--min-examples --model --partition --precision --quorum --rounds --seed
--server.beta1 --server.beta2 --server.lr --server.rule --server.tau --share.count --share.fraction --share.which
--task --template --text --wire
""")

FIBECFED = names("""
--method.curriculum.full-at --method.curriculum.granularity --method.curriculum.head --method.curriculum.head-rounds
--method.curriculum.over --method.curriculum.pacing --method.curriculum.refresh --method.curriculum.start --method.gal.count
--method.gal.fraction --method.gal.lossless --method.gal.norm --method.gal.refresh --method.gal.rho --method.gal.which
--method.inner.batch-by-memory --method.inner.batch-size --method.inner.clip --method.inner.local-epochs --method.inner.lr
--method.inner.no-reshuffle --method.inner.prox --method.inner.schedule --method.inner.weight-decay --method.keep
--method.keep-lossless --method.lossless-probes --method.momentum --method.warmup-epochs
""")


def said(capsys: pytest.CaptureFixture[str], *words: str) -> tuple[int, str]:
    """Exit code and the one paragraph on stderr."""
    code = cli.main(words)
    captured = capsys.readouterr()
    assert captured.err.startswith("fedloom: ")
    assert captured.err.count("\n") == 1
    assert captured.out == ""
    return code, captured.err


def test_the_options_of_run_are_frozen() -> None:
    """Scripts rely on these names: add to them, rename none."""
    assert cli.long_options(options.for_run(recipes.resolve("fibecfed"))) == sorted(
        [*EXPERIMENT, *FIBECFED, "--help", "--out", "--plain", "--track"]
    )


@pytest.mark.parametrize("width", ["40", "200"])
def test_which_options_there_are_does_not_depend_on_the_terminal(width: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", width)
    assert cli.long_options(options.for_run(recipes.resolve("lora"))) == (found := options_at_eighty())
    assert os.environ["COLUMNS"] == width and "--method.lr" in found


def options_at_eighty() -> list[str]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("COLUMNS", "80")
        return cli.long_options(options.for_run(recipes.resolve("lora")))


def test_the_options_of_the_other_commands_are_frozen() -> None:
    grid = "--alphas --jobs --lr --lrs --reference --seeds --share-training --target"
    assert cli.long_options(options.for_compare()) == sorted([*EXPERIMENT, *grid.split(), "--help", "--out", "--plain", "--track"])
    assert cli.long_options(options.for_describe(recipes.resolve("fibecfed"))) == sorted([*EXPERIMENT, *FIBECFED, "--help"])
    data = (
        "--alpha --beta --clients --data --label --max-test --max-train --max-validation --metric --min-examples --partition --seed --task"
    )
    assert cli.long_options(options.for_partition()) == sorted([*data.split(), "--help", "--plot", "--save", "--shards", "--text"])
    assert cli.long_options(cli.arguments.Export) == ["--client", "--help", "--merge", "--recipe"]
    assert cli.long_options(cli.arguments.Evaluate) == ["--help", "--method", "--recipe"]
    assert cli.long_options(cli.arguments.Report) == ["--help", "--out"]


def test_the_options_of_a_curriculum_stand_where_the_method_has_it() -> None:
    """METHOD+CURRICULUM: the method's own options and the curriculum's, and no other curriculum's."""
    plain = cli.long_options(options.for_run(recipes.resolve("lora")))
    assert not [option for option in plain if "curriculum" in option]
    added = {
        "lora+voc": "--method.curriculum.full-at --method.curriculum.start",
        "lora-personal-head+slw": "--method.inner.curriculum.full-at --method.inner.curriculum.start",
        "lora+fisher": "--method.curriculum.full-at --method.curriculum.granularity --method.curriculum.over --method.curriculum.pacing "
        "--method.curriculum.refresh --method.curriculum.start",
        "lora+none": "",
    }
    for word, listed in added.items():
        bare = cli.long_options(options.for_run(recipes.resolve(word.split("+")[0])))
        assert cli.long_options(options.for_run(recipes.resolve(word))) == sorted([*bare, *listed.split()]), word
    own = [option for option in FIBECFED if not option.startswith("--method.curriculum.")]
    given = cli.long_options(options.for_run(recipes.resolve("fibecfed+shortformer")))
    assert [o for o in given if o.startswith("--method.")] == sorted([*own, *added["lora+voc"].split()])


def test_a_method_with_a_curriculum_becomes_the_experiment() -> None:
    recipe = recipes.resolve("lora-prior+voc")
    assert recipe.method == PriorCorrected(FedAvg(curriculum=ByRarity())), "what a comparison takes"
    experiment = options.experiment_of(cli._parse(options.for_run(recipe), names("--method.inner.curriculum.start 0.2 --rounds 3"), "x"))
    assert experiment.method == PriorCorrected(FedAvg(curriculum=ByRarity(start=0.2)))
    assert (experiment.method_name, experiment.rounds) == ("lora-prior+voc", 3)
    assert recipes.default_folder(experiment).name.startswith("lora-prior+voc-trec-")
    assert options.experiment_of(cli._parse(options.for_run(recipes.resolve("lora+none")), [], "x")) == Experiment(method=FedAvg())


def test_a_saved_experiment_can_be_given_a_curriculum(tmp_path: Path) -> None:
    start = Experiment(method=FedAvg(lr=0.25), rounds=7)
    (tmp_path / "a+voc").mkdir()
    (tmp_path / "a+voc" / "experiment.json").write_text(json.dumps(as_json(start)))
    assert recipes.resolve(str(tmp_path / "a+voc")).experiment == start, "a folder's name is a folder's name"
    recipe = recipes.resolve(f"{tmp_path / 'a+voc'}+slw")
    assert options.experiment_of(cli._parse(options.for_run(recipe), [], "x")) == replace(
        start, method=FedAvg(lr=0.25, curriculum=LengthWarmup())
    )


def test_options_become_the_experiment() -> None:
    words = names("--rounds 3 --method.inner.lr 0.5 --method.gal.which random --adapter.targets a b --text q p --engine.stack 4")
    given = cli._parse(options.for_run(recipes.resolve("fibecfed")), words, "x")
    experiment = options.experiment_of(given)
    assert isinstance(experiment, Experiment)
    assert (experiment.rounds, experiment.method.inner.lr, experiment.method.gal.which) == (3, 0.5, "random")
    assert (experiment.adapter.targets, experiment.text, experiment.engine.stack) == (("a", "b"), ("q", "p"), 4)


@pytest.mark.parametrize("name", all_methods())
def test_no_options_are_the_experiment_of_python(name: str) -> None:
    recipe = recipes.resolve(name)
    assert options.experiment_of(cli._parse(options.for_run(recipe), [], "x")) == Experiment(method=recipe.kind())


def test_a_saved_experiment_is_where_options_start() -> None:
    start = Experiment(method=recipes.with_learning_rate(recipes.resolve("fibecfed").method, 0.25), rounds=7, text=("q",), alpha=0.1)
    recipe = recipes.Recipe(type(start.method), start)
    assert options.experiment_of(cli._parse(options.for_run(recipe), [], "x")) == start
    changed = options.experiment_of(cli._parse(options.for_run(recipe), ["--alpha", "9"], "x"))
    assert (changed.alpha, changed.rounds, changed.method.inner.lr) == (9.0, 7, 0.25)


@pytest.mark.parametrize(
    ("words", "wanted"),
    [
        (["rnu"], ["'rnu'", "Did you mean 'run'?", "evaluate", "doctor"]),
        (["run"], ["name one method", "fedloom methods"]),
        (["run", "--rounds", "3"], ["'--rounds' came first"]),
        (["run", "lora", "fibecfed"], ["2 came: lora fibecfed"]),
        (["run", "fibecfd"], ["'fibecfd'", "Did you mean 'fibecfed'?", "lora-finetuned"]),
        (["run", "nowhere.py"], ["no recipe 'nowhere.py'"]),
        (["run", "lora", "--alhpa", "1"], ["--alhpa", "Perhaps you meant: --alpha", "There are: --adapter.alpha", "--method.lr"]),
        (["run", "lora", "--method.keep", "1"], ["--method.keep", "--method.lr"]),
        (["run", "lora", "--precision", "fp16"], ["'fp16'", "float32", "bf16"]),
        (["run", "lora", "--track", "tensorbord"], ["--track", "'tensorbord'", "tensorboard", "mlflow", "wandb"]),
        (["run", "lora", "--rounds", "many"], ["--rounds", "'many'"]),
        (["run", "lora", "--mask.keep", "-0.3"], ["--mask.*: a mask keeps", "got keep -0.3. For full helptext"]),
        (["run", "fibecfed", "--method.keep", "1.5"], ["--method.*: keep is 1.5; a share of the neurons"]),
        (["run", "fibecfed", "--method.gal.rho", "0"], ["--method.gal.*: rho is 0", "positive"]),
        (["run", "fibecfed", "--method.curriculum.refresh", "-2"], ["--method.curriculum.*: refresh is -2"]),
        (["run", "lora+slw", "--method.curriculum.full-at", "0"], ["--method.curriculum.*: full_at is 0.0", "0 < full_at <= 1"]),
        (["run", "lora", "--rounds", "-3"], ["--rounds is -3", "at least 1"]),
        (["run", "lora", "--cohort", "11", "--clients", "10"], ["--cohort 11", "--clients 10"]),
        (["run", "lora", "--alpha", "0"], ["--alpha is 0.0", "positive"]),
        (["run", "lora", "--device", "fridge"], ["'fridge'", "jetson"]),
        (["run", "lora+vok"], ["no curriculum 'vok'", "Did you mean 'voc'?", "shortformer"]),
        (["run", "lroa+voc"], ["no method 'lroa'", "Did you mean 'lora'?"]),
        (["run", "centralised+voc"], ["'centralised' takes no curriculum", "devices' own"]),
        (["run", "lora+voc", "--method.curriculum.start", "0"], ["0 < start <= 1"]),
        (["run", "lora+voc", "--method.curriculum.pacing", "sqrt"], ["--method.curriculum.pacing", "--method.curriculum.start"]),
        (["compare", "lora", "lora"], ["named twice: lora"]),
        (["compare", "lora", "--seeds", "1", "1"], ["named twice: 1"]),
        (["compare", "lora", "nope"], ["'nope'", "fibecfed"]),
        (
            ["compare", "lora", "--data", "./nowhere", "--alpha", "0.5", "--alphas", "1", "2"],
            ["--alpha names one", "--alphas several", "one of them"],
        ),
        (["compare", "lora", "--data", "./nowhere", "--alphas", "1", "2", "--alpha=1"], ["--alpha names one"]),
        (["compare", "lora", "--data", "./nowhere", "--seed", "3", "--seeds", "1", "2"], ["--seed names one", "--seeds several"]),
        (
            ["compare", "lora", "local", "--data", "./nowhere", "--share-training"],
            ["--share-training", "lora-finetuned", "lora, local", "leave it out"],
        ),
        (["evaluate", "nowhere"], ["nowhere is no run folder", "it does not exist"]),
        (["export", "nowhere"], ["fedloom export", "--help"]),
        (["partition", "--plot", "a.gif"], ["a.gif", ".png or .svg"]),
        (["methods", "lora"], ["lora", "--help"]),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else None,
)
def test_wrong_words(
    words: list[str], wanted: list[str], capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    code, paragraph = said(capsys, *words)
    assert code == 2
    assert [text for text in wanted if text not in paragraph] == []


def test_errors_have_a_code_and_a_mend() -> None:
    cohort = CohortFailed([Failure(3, "ValueError: no")], 1, 2)
    full = OSError(errno.ENOSPC, "No space left on device", "/a/b")
    cases = [
        (cohort, 1, ["client 3: ValueError: no", "--quorum", "the same command"]),
        (CohortFailed([Failure(0, f"WireError: x is NaN; {DIVERGED}")], 0, 1), 1, ["learning rate"]),
        (full, 1, ["/a/b", "free some space", "the same command"]),
        (PermissionError(errno.EACCES, "Permission denied", "/a"), 1, ["/a", "--out"]),
        (FileNotFoundError(errno.ENOENT, "No such file", "/a"), 2, ["check the path"]),
        (MemoryError(), 1, ["out of memory", "--engine.stack 1"]),
        (torch.OutOfMemoryError("CUDA"), 1, ["--engine.stack 1"]),
        (CheckpointError("corrupt\n  in two lines"), 2, ["corrupt in two lines"]),
        (StoreError("gone"), 2, ["gone"]),
        (ExperimentError("bad"), 2, ["bad"]),
    ]
    for error, code, wanted in cases:
        explained = explain(error)
        assert explained is not None
        assert explained[1] == code, error
        assert [text for text in wanted if text not in explained[0]] == []
    assert explain(TypeError("a fault of ours")) is None
    assert explain(KeyError("a fault of ours")) is None


def test_numbers_that_stopped_being_finite_ask_for_a_smaller_rate_however_they_are_told() -> None:
    bad, task = torch.tensor([[1.0, math.nan]]), Task("train", 0, {"w": torch.full((1, 2), 3e38)})
    large = Update(0, 1, {CODES: task.tensors["w"].flatten().bfloat16()}, {WHICH: ["w"]})
    ways: dict[str, Any] = {
        "a tensor": lambda: pack(Update(0, 1, {"w": bad}), "x"),
        "a loss": lambda: pack(Update(0, 1, {}, {"loss": math.nan}), "x"),
        "over a wire that loses something": lambda: Encoding.of("up:int8").up(Update(0, 1, {"w": bad}), task, {}),
        "at the server": lambda: Encoding.of("up:bf16").received(large, task),
        "logits": lambda: Classification(("text",), "label", ("a", "b"), "accuracy").scores(np.zeros(1, int), bad.numpy()),
        "a gradient": lambda: directions(bad, 1),
    }
    for name, way in ways.items():
        with pytest.raises((ValueError, FloatingPointError)) as told:
            way()
        cohort = CohortFailed([Failure(0, f"{type(told.value).__name__}: {told.value}")], 0, 1)
        assert diverged(cohort) and "smaller learning rate" in (explain(cohort) or ("", 0))[0], name
    with pytest.raises(WireError, match="not finite") as counted:
        pack(Update(0, 1, flops=-1.0), "x")
    assert not diverged(counted.value), "this is no matter of a rate"


def test_a_fault_of_the_program_is_not_hidden(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(words: object) -> int:
        raise TypeError("ours")

    monkeypatch.setattr(cli, "COMMANDS", {"doctor": broken})
    with pytest.raises(TypeError, match="ours"):
        cli.main(["doctor"])


@pytest.mark.parametrize(("stop", "code"), [(KeyboardInterrupt, 130), (cli.Terminated, 143)])
def test_stopping_says_that_the_same_command_resumes(
    stop: type[BaseException], code: int, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def stopped(words: object) -> int:
        raise stop

    monkeypatch.setattr(cli, "COMMANDS", {"run": stopped, "doctor": stopped})
    assert said(capsys, "run", "lora") == (code, "fedloom: stopped; the same command resumes\n")
    assert said(capsys, "doctor") == (code, "fedloom: stopped\n")


def test_loading_is_not_interrupted_by_garbage_collection_and_what_follows_is() -> None:
    gc.unfreeze()
    with cli.loading():
        assert not gc.isenabled()
    assert gc.isenabled() and gc.get_freeze_count() > 1000
    with pytest.raises(ImportError, match="gone"), cli.loading():
        raise ImportError("gone")
    assert gc.isenabled()
    assert cli.main(["--version"]) == 0
    assert gc.get_freeze_count() == 0


def test_with_a_variable_set_errors_show_their_place(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FEDLOOM_TRACEBACK", "1")
    with pytest.raises(ExperimentError):
        cli.main(["run", "nope"])


def test_help_names_every_command_and_every_example_is_one(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["--help"]) == 0
    out = capsys.readouterr().out
    assert [name for name in cli.COMMANDS if f"\n  {name} " not in out] == []
    examples = [line.split()[1] for line in out.splitlines() if line.startswith("  fedloom ")]
    assert len(examples) >= 5
    assert set(examples) <= set(cli.COMMANDS)


def test_what_help_and_documentation_say_of_compare_it_takes(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        cli.main(["compare", "--help"])
    page = (Path(__file__).parents[2] / "docs" / "comparing.md").read_text(encoding="utf-8")
    said = capsys.readouterr().out + page
    lines = [line.strip().split("  ")[0] for line in said.splitlines() if line.strip().startswith("fedloom compare ")]
    assert len(lines) >= 4
    for line in lines:
        words = line.split()[2:]
        first = next((i for i, word in enumerate(words) if word.startswith("--")), len(words))
        assert set(words[:first]) <= {*all_methods(), "METHOD", "..."}
        cli._parse(options.for_compare(), words[first:], "x")
    named = {word for row in page.splitlines() if row.startswith("| `--") for word in row.split("`")[1].split()[:1]}
    assert named == {"--data", *names("--alphas --seeds --lrs --share-training --jobs --reference --target")}


def test_what_a_saved_experiment_says_besides_its_method_is_told_where_it_is_not_taken(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Values that some run of the comparison has are as they are there, the kind of adapter that the method brings too; and how a run
    computes is no part of it."""
    monkeypatch.setattr("fedloom.run.comparison.compare.compare", lambda *_: Comparison([], None, {}, None))
    saved = Experiment(named("fedbf")(), data="rte", rounds=7, seed=2, adapter=Adapter(kind="bitfit"), engine=EngineSettings(threads=2))
    (tmp_path / "saved.json").write_text(json.dumps(as_json(saved)))
    words = ["compare", str(tmp_path / "saved.json"), "lora", "--out", str(tmp_path / "c")]
    assert cli.main([*words, "--seeds", "1", "2", "--rounds", "7", "--data", "trec", "rte"]) == 0
    assert "note" not in capsys.readouterr().err
    assert cli.main([*words, "--seeds", "1", "3"]) == 0
    assert capsys.readouterr().err == (
        f"note: of {tmp_path / 'saved.json'} the method alone is taken; data is 'rte' there and 'trec' here, rounds is 7 there and 20 "
        "here, seed is 2 there and 1, 3 here\n"
    )


def test_of_options_given_twice_the_later_counts() -> None:
    """``recipes/rivals.py`` counts on it."""
    given = cli._parse(options.for_compare(), names("--lrs 1 2 3 --seeds 1 2 --rounds 5 --rounds 6 --lrs 4 --data a --data b c"), "x")
    assert (given.lrs, given.seeds, given.rounds, given.data) == ((4.0,), (1, 2), 6, ("b", "c"))


@pytest.mark.parametrize("name", cli.COMMANDS)
def test_every_command_has_help(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        cli.main([name, "--help"])
    assert not ended.value.code
    assert f"usage: fedloom {name}" in capsys.readouterr().out


def test_methods_are_listed_with_their_papers(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    assert cli.main(["methods"]) == 0
    out = capsys.readouterr().out
    assert [name for name, kind in all_methods().items() if name not in out or kind.paper not in out] == []
    assert [name for name, kind in all_curricula().items() if name not in out or kind.paper not in out] == []
    assert "METHOD+CURRICULUM" in out


@pytest.mark.parametrize(
    ("name", "sentence"),
    [
        ("adalora", "AdaLoRA: the rank is spent where it matters, federated."),  # longer than a line, in brackets where it is from
        ("fedsb", "Fed-SB: one small square matrix a module, which federates LoRA-SB."),  # brackets in brackets
        ("lora", "Federated LoRA: average the factors."),  # the first of several sentences
        ("fedbf", "BitFit: the biases alone."),  # of the class: its file has others
        ("fedcybgd", "FedCyBGD: full-parameter tuning, one client and one block at a time."),
        ("fibecfed", "FibecFed: Fisher-information-based efficient curriculum federated learning."),  # beside parts that are no methods
    ],
)
def test_the_list_tells_of_each_method_its_first_sentence_without_its_source(name: str, sentence: str) -> None:
    assert what_it_is(all_methods()[name]) == sentence


def test_help_and_version_load_nothing_heavy() -> None:
    code = "import sys; from fedloom.cli import main; main(['--help']); main(['--version']); main(['rnu']); "
    code += "print('heavy:', sorted({'torch', 'numpy', 'transformers', 'datasets', 'matplotlib'} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60)
    assert "\nfedloom 0." in done.stdout
    assert done.stdout.endswith("heavy: []\n")


def test_a_devices_data_are_found_from_any_folder_and_what_has_a_name_keeps_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("flwr", reason="the extra 'flower' is not installed: pip install 'fedloom[flower]'")
    from fedloom.run.deployment.joining import placed

    monkeypatch.chdir(tmp_path)
    (tmp_path / "cache").write_text("text,label")
    (tmp_path / "mine.csv").symlink_to(tmp_path / "cache")
    (tmp_path / "trec").mkdir()
    assert placed("mine.csv", ("trec",)) == str(tmp_path / "mine.csv"), "its name says what it holds, and that of what it leads to does not"
    assert [placed(name, ("", "trec")) for name in ("trec", "", "nobody/has-it")] == ["trec", "", "nobody/has-it"]
    assert placed("./trec", ("trec",)) == str(tmp_path / "trec")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert placed("~/mine.csv", ()) == str(tmp_path / "mine.csv")


@pytest.mark.flower
def test_the_process_that_talks_to_a_server_has_no_library_of_models() -> None:
    """They are its worker's: some 200 MB, and two thirds of the time that ``fedloom join`` takes to begin."""
    pytest.importorskip("flwr", reason="the extra 'flower' is not installed: pip install 'fedloom[flower]'")
    code = "import sys; from fedloom.run.deployment import joining; from fedloom.cli import main; joining.join = lambda *_: None; "
    code += "print('code', main(['join', '127.0.0.1:9', 'mine']), sorted({'transformers', 'peft', 'datasets', 'scipy'} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-W", "ignore", "-c", code], capture_output=True, text=True, check=True, timeout=60)
    assert done.stdout == "code 0 []\n"


def test_the_same_experiment_has_the_same_folder_and_another_another() -> None:
    method = recipes.resolve("lora").method
    first, again, other = Experiment(method=method), Experiment(method=method), Experiment(method=method, data="./my data/rte/", seed=1)
    assert recipes.default_folder(first) == recipes.default_folder(again)
    assert recipes.default_folder(first).name == f"lora-trec-{first.digest()[:8]}"
    assert recipes.default_folder(other).name == f"lora-rte-{other.digest()[:8]}"
    assert recipes.default_folder(first, served=True).name == f"lora-trec-{first.digest()[:8]}-served", "no simulation's results are there"
    assert recipes.comparison_folder([first]) != recipes.comparison_folder([first, other])


def lr_of(method: Any) -> float:
    """The rate of whatever trains in the end."""
    return lr_of(method.inner) if "inner" in vars(method) else method.lr


def test_one_learning_rate_reaches_every_method() -> None:
    changed = {name: recipes.with_learning_rate(kind(), 0.125) for name, kind in all_methods().items()}
    assert {name: lr_of(m) for name, m in changed.items()} == dict.fromkeys(all_methods(), 0.125)


def test_a_recipe_that_is_none_says_why(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.chdir(tmp_path)
    method = "\n@dataclass(frozen=True)\nclass {0}:\n    name: ClassVar[str] = '{0}'\n    paper: ClassVar[str] = ''\n"
    head = "from dataclasses import dataclass\nfrom typing import ClassVar\n"
    cases = {
        "nothing.py": ("x = 1\n", "defines no method"),
        "syntax.py": ("x = 1\ndef f(:\n", "SyntaxError in line 2"),
        "raises.py": ("x = 1\n\nraise RuntimeError('no')\n", "RuntimeError in line 3: no"),
        "lora.py": (head + method.format("lora"), "calls its method 'lora', as one of the package's is called"),
        "whole.py": (
            f"from fedloom.run.experiment import Experiment\n{head}{method.format('lora')}experiment = Experiment(lora())\n",
            "calls its method 'lora'",
        ),
        "two.py": (head + method.format("a") + method.format("b"), "name one: two.py:a, two.py:b"),
    }
    for name, (source, wanted) in cases.items():
        (tmp_path / name).write_text(source)
        code, paragraph = said(capsys, "run", name)
        assert (code, wanted in paragraph) == (2, True), paragraph
    assert recipes.resolve("two.py:b").kind.name == "b"
    ran = tmp_path / "ran.json"
    ran.write_text(json.dumps({**as_json(Experiment(FedAvg())), "method": {"name": "lora"}}))
    for recipe, told in (("lora.py", True), (None, False)):
        caplog.clear()
        recipes.experiment_in(ran, Path(recipe) if recipe else None)
        assert any("lora.py's 'lora', and not of the package's" in record.getMessage() for record in caplog.records) == told
    (tmp_path / "experiment.json").write_text('{"method": {"name": "mine"}}')
    assert "--recipe FILE" in said(capsys, "export", ".", "out")[1]


def test_what_a_device_is_told_reaches_it(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[Any] = []
    monkeypatch.setattr("fedloom.run.deployment.joining.join", lambda server, certs, own, *_: seen.append(own))
    for words in ([], ["--recompute", "--threads", "2"]):
        assert cli.main(["join", "127.0.0.1:9", "mine", *words]) == 0
    assert [(own.data, own.recompute, own.threads) for own in seen] == [("mine", False, 0), ("mine", True, 2)]


@pytest.mark.flower
def test_a_federation_that_has_ended_says_that_nothing_was_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """As a run does (``test_cli.py`` of the integration). A simulation of the same settings is not what it shows by default."""
    pytest.importorskip("flwr", reason="the extra 'flower' is not installed: pip install 'fedloom[flower]'")
    monkeypatch.chdir(tmp_path)
    (tmp_path / "certs" / "devices").mkdir(parents=True)
    for k in range(2):
        (tmp_path / "certs" / "devices" / f"{k}.pub").touch()
    scores = dict.fromkeys(("personalised", "global"))
    costs = dict.fromkeys(("bytes_up", "bytes_down", "device_seconds", "setup_device_seconds", "host_seconds"), 0)
    results = {"method": "lora", "metric": "accuracy", "final": scores, "best": scores, **costs}
    simulated, folders = [], []

    def ended(experiment: Experiment, folder: Path, *_: Any, **__: Any) -> dict[str, Any]:
        simulated.append(recipes.default_folder(experiment))
        folders.append(folder)
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "results.json").touch()
        return results

    monkeypatch.setattr("fedloom.run.deployment.federation.serve", ended)
    monkeypatch.setattr("fedloom.run.pages.report.write_report", lambda folders, page: page)
    for again in (False, True):
        assert cli.main(["serve", "lora", "--certs", "certs"]) == 0
        told = capsys.readouterr().out
        assert ("holds this run's results already, and nothing was run" in told) == again and "results.json" in told
    assert folders[0] == folders[1] != simulated[0]


@pytest.mark.flower
def test_status_shows_what_the_server_tells(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """What that is, and who may ask, is ``test_federation.py``'s of the conformance."""
    pytest.importorskip("flwr", reason="the extra 'flower' is not installed: pip install 'fedloom[flower]'")
    seen: list[tuple[str, Path]] = []

    def asked(server: str, certs: Path) -> list[tuple[str, str]]:
        seen.append((server, certs))
        return [("devices", "4"), ("away", "2, 3")]

    monkeypatch.setattr("fedloom.run.deployment.joining.asked", asked)
    assert cli.main(["status", "example.org:9092", "--certs", "certs/device-0"]) == 0
    lines = [re.split(r"\s{2,}", line.strip()) for line in capsys.readouterr().out.splitlines()]
    assert ["devices", "4"] in lines and ["away", "2, 3"] in lines
    assert cli.main(["status", "example.org:9092"]) == 0
    assert seen == [("example.org:9092", Path("certs/device-0")), ("example.org:9092", Path("certs"))]
    capsys.readouterr()
    code, _ = said(capsys, "status")
    assert code == 2 and len(seen) == 2


DEPLOY = Path(__file__).parents[2] / "examples" / "deploy" / "run.sh"
TOLD = """
fedloom() {
    local made; made="$(mktemp "$TOLD/.$1-XXXXXX")"
    printf '%s\\n' "$@" > "$made"
    mv "$made" "$TOLD/${made##*/.}"
    while [ "$1" = serve ] && [ "$(ls "$TOLD" | grep -c ^join)" -lt 4 ]; do sleep 0.02; done
}
python() { cat > python.txt; }
export -f fedloom python
exec bash "$0" "$@"
"""
"""Instead of running Fedloom, write down what it was asked, a word a line. Who serves waits until all devices have been asked."""


@pytest.mark.parametrize(
    ("words", "data", "method", "folder"),
    [
        ([], "", "fibecfed", "runs/deploy-fibecfed"),
        (["federa", "runs/mine", "--method.inner.lr", "4e-3"], "", "federa", "runs/mine"),
        (["fedcybgd", "runs/cy", "--model", "models/llama"], "--data notes.jsonl --task text", "fedcybgd", "runs/cy"),
    ],
)
def test_the_example_of_a_federation_asks_for_what_there_is(words: list[str], data: str, method: str, folder: str, tmp_path: Path) -> None:
    """As its own first lines have it. What is served and what is simulated are one experiment, on the data that was dealt for it."""
    assert subprocess.run(["bash", "-n", DEPLOY], check=False).returncode == 0
    told = tmp_path / "told"
    told.mkdir()
    environment = {**os.environ, "TOLD": str(told), "DATA": data}
    done = subprocess.run(
        ["bash", "-c", TOLD, DEPLOY, *words], cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=60, check=False
    )
    assert done.returncode == 0, done.stderr
    compile((tmp_path / folder / "python.txt").read_text(), "run.sh", "exec")
    asked: dict[str, list[list[str]]] = {}
    for path in told.iterdir():
        command, *rest = path.read_text().splitlines()
        asked.setdefault(command, []).append(rest)
    assert {command: len(of) for command, of in asked.items()} == {"certs": 1, "partition": 1, "join": 4, "serve": 1, "run": 1}
    assert asked["serve"][0][0] == asked["run"][0][0] == method
    recipe = recipes.resolve(method)
    serve = cli._parse(options.for_serve(recipe), asked["serve"][0][1:], "x")
    run = cli._parse(options.for_run(recipe), asked["run"][0][1:], "x")
    dealt = cli._parse(options.for_partition(), asked["partition"][0], "x")
    certs = cli._parse(arguments.Certs, asked["certs"][0], "x")
    differ = {name for name, value in vars(serve).items() if name in vars(run) and vars(run)[name] != value}
    assert differ == {"out"}, "served and simulated with the same options"
    assert certs.devices == run.clients == dealt.clients == 4 and certs.folder / "server" == serve.certs
    both = vars(dealt).keys() & vars(run).keys()
    assert {"alpha", "seed", "data", "max_train"} <= both and all(vars(dealt)[name] == vars(run)[name] for name in both)
    joined = [cli._parse(arguments.Join, of, "x") for of in asked["join"]]
    assert {(of.data, of.certs) for of in joined} == {(f"{dealt.shards}/{k}", certs.folder / f"device-{k}") for k in range(4)}
    assert {of.server for of in joined} == {serve.listen} and len({of.out for of in joined}) == 4


@pytest.mark.parametrize("broken", [False, True])
def test_doctor_says_whether_this_machine_has_what_is_needed(
    broken: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def data() -> str:
        if broken:
            raise OSError("no such data")
        return "5,452 train"

    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("FEDLOOM_CACHE", str(tmp_path / "cache"))
    for name, value in {"_trec": data, "_minilm": lambda: "22,000,000 parameters", "all_bytes": lambda: 8e9, "LITTLE_DISK": 0.0}.items():
        monkeypatch.setattr(f"fedloom.run.terminal.doctor.{name}", value)
    assert cli.main(["doctor"]) == int(broken)
    *table, last = capsys.readouterr().out.strip().splitlines()
    rows = {parts[0]: parts[1:] for parts in (re.split(r"\s{2,}", line.strip()) for line in table) if len(parts) == 3}
    assert rows["torch"] == ["ok", torch.__version__] and rows["memory"][0] == rows["disk"][0] == rows["cache"][0] == "ok"
    assert rows["data 'trec'"] == (["BAD", "OSError: no such data"] if broken else ["ok", "5,452 train"])
    assert last == ("mend these: data 'trec'" if broken else f"fedloom {cli.version()} has what it needs")
    assert [name for name, (mark, _) in rows.items() if mark == "BAD"] == (["data 'trec'"] if broken else [])


def test_what_to_do_about_a_lost_state_is_said_once() -> None:
    """By the checkpoint where it is read with one, and otherwise here."""
    alone, _ = explain(StoreError("client state x cannot be read (y)")) or ("", 0)
    assert alone.lower().count("delete the run folder") == 1
    assert explain(CheckpointError("the checkpoint is corrupt. Delete r")) == ("the checkpoint is corrupt. Delete r", 2)


@pytest.mark.parametrize(("name", "asked"), [("lora", 3), ("fedbavg", 3), ("fedcybgd", 1), ("handover", 1)])
def test_a_method_of_turns_asks_one_device_a_round(name: str, asked: int) -> None:
    assert Experiment(all_methods()[name](), cohort=3).asked == asked


@pytest.mark.parametrize(
    "error",
    [
        *(OSError(28, "No space left on device", "x"), DiskError("x is full"), MemoryError("much"), SafetensorError("x")),
        *(CohortFailed([Failure(1, "gone")], 1, 2), CohortFailed([Failure(1, DIVERGED)], 1, 2)),
    ],
)
def test_only_a_command_that_resumes_promises_to(error: Exception) -> None:
    (with_rounds, _), (without, _) = explain(error) or ("", 0), explain(error, resumes=False) or ("", 0)
    assert "the same command goes on from there" in with_rounds
    assert without and "goes on" not in without and "--" not in without


@pytest.mark.parametrize("error", [CohortFailed([Failure(1, "gone")], 1, 2), MemoryError("much")])
def test_a_server_is_told_options_that_it_has(error: Exception) -> None:
    """Its devices compute, not it. What it is told of a model that does not fit is ``test_memory.py``'s."""
    said, _ = explain(error, served=True) or ("", 0)
    has = cli.long_options(options.for_serve(recipes.resolve("lora")))
    assert "--overcommit" in has and "the same command goes on" in said
    assert set(re.findall(r"--[a-z][\w.-]*", said)) <= set(has)


def test_a_refused_permission_names_an_option_that_the_command_has() -> None:
    (with_rounds, _), (without, _) = (
        explain(PermissionError(13, "Permission denied", "x"), resumes) or ("", 0) for resumes in (True, False)
    )
    assert with_rounds == "x: Permission denied; check the permissions, or give another --out"
    assert without == "x: Permission denied; check the permissions"


def test_doctor_tells_a_cache_that_takes_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from fedloom.run.terminal.doctor import examine

    (tmp_path / "file").write_text("")
    monkeypatch.setattr("fedloom.run.terminal.doctor._trec", str)
    monkeypatch.setattr("fedloom.run.terminal.doctor._minilm", str)
    for place, ok in ((tmp_path / "file" / "below", None), (tmp_path / "new", True)):
        monkeypatch.setenv("FEDLOOM_CACHE", str(place))
        (found,) = [finding for finding in examine(tmp_path) if finding.name == "cache"]
        assert found.ok is ok and "FEDLOOM_CACHE" in found.text, found
        assert ("NotADirectoryError" in found.text) == (ok is None)


@pytest.mark.parametrize(
    ("words", "wanted"),
    [
        (["./nowhere"], "there is no file or folder './nowhere'; "),
        (["trec", "--model", "some/where/else"], "no model folder 'some/where/else'; give 'minilm', a Hugging Face model folder, or"),
    ],
)
def test_a_device_without_its_data_or_model_says_so_before_a_server_is_there(
    words: list[str], wanted: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    code, paragraph = said(capsys, "join", "127.0.0.1:9", *words)
    assert code == 2 and wanted in paragraph and [*tmp_path.iterdir()] == []


def test_a_full_disk_is_told_by_what_the_command_can_do(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def full(words: Any) -> int:
        raise OSError(28, "No space left on device", "x")

    monkeypatch.setattr(cli, "COMMANDS", dict.fromkeys(("run", "export"), full))
    assert said(capsys, "run") == (1, f"fedloom: x: No space left on device; free some space. {RESUMES}\n")
    assert said(capsys, "export") == (1, "fedloom: x: No space left on device; free some space.\n")


def test_a_methods_name_is_the_methods_whatever_lies_here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """``fedloom run lora`` takes nothing from a folder ``lora`` that an earlier command has left; ``./lora`` is that folder."""
    monkeypatch.chdir(tmp_path)
    for name in ("lora", "lora+voc", "lora+voc-trec-1a2b3c4d"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "experiment.json").write_text(json.dumps(as_json(Experiment(method=FedAvg(lr=0.25), rounds=7))))
    assert recipes.resolve("lora") == recipes.Recipe(FedAvg)
    assert recipes.resolve("lora+voc").method == FedAvg(curriculum=ByRarity())
    for word in ("./lora", "./lora+voc", "lora+voc-trec-1a2b3c4d"):
        there = recipes.resolve(word).experiment
        assert there is not None and there.rounds == 7, word
