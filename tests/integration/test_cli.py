"""The command line with a tiny model: every command does its work, and every bad input is one paragraph that overwrites nothing."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from fedloom import cli
from fedloom.client.elsewhere import Elsewhere
from fedloom.run import checkpoint
from fedloom.run.export import predictor_of, whole
from fedloom.run.lock import only_one
from fedloom.run.recipes import experiment_in
from fedloom.run.world import build, store_in
from tests import tiny

pytestmark = [pytest.mark.no_cover, pytest.mark.usefixtures("no_pictures")]

CLASSES = 3
TEXTS = ["w1 w2 w5", "w9", "w30 w31 w32 w33 w34"]


def sentences(rows: int, seed: int) -> list[tuple[str, str]]:
    rng = np.random.default_rng(seed)
    words = [rng.integers(0, 60, size=rng.integers(1, 9)) for _ in range(rows)]
    return [(" ".join(f"w{i}" for i in text), f"kind{text[0] % CLASSES}") for text in words]


def write_csv(path: Path, rows: list[tuple[str, str]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("text,label\n" + "".join(f'"{text}",{label}\n' for text, label in rows), encoding="utf-8")


def write_data(folder: Path) -> Path:
    for i, (split, rows) in enumerate({"train": 60, "validation": 20, "test": 20}.items()):
        write_csv(folder / f"{split}.csv", sentences(rows, i))
    return folder


def small(data: Path, *words: str) -> list[str]:
    """Options of a run of a second."""
    size = ["--clients", "6", "--cohort", "3", "--rounds", "2", "--evaluate-every", "1", "--max-length", "16", "--adapter.rank", "2"]
    return ["--data", str(data), "--model", str(tiny.folder()), *size, *words]


def hashes(folder: Path) -> dict[str, str]:
    """Every file below ``folder`` and what is in it."""
    files = (p for p in sorted(folder.rglob("*")) if p.is_file())
    return {str(p.relative_to(folder)): hashlib.sha256(p.read_bytes()).hexdigest() for p in files}


def refused(capsys: pytest.CaptureFixture[str], words: list[str], *wanted: str) -> None:
    """The command ends with another code than 0 and one paragraph, which holds what is ``wanted``."""
    capsys.readouterr()
    code = cli.main(words)
    lines = capsys.readouterr().err.splitlines()
    assert code in (1, 2)
    assert [line.startswith("fedloom: ") for line in lines].count(True) == 1
    assert lines[-1].startswith("fedloom: ")
    assert not any("Traceback" in line for line in lines)
    assert [text for text in wanted if text not in lines[-1]] == []


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with data and finished runs of four methods in ``ended``."""
    place = tmp_path_factory.mktemp("cli")
    data = write_data(place / "data")
    assert cli.main(["compare", "lora", "fibecfed", "local", "lora-prior", *small(data), "--out", str(place / "ended")]) == 0
    return place


@pytest.fixture
def ended(world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of the finished runs, which a test may spoil."""
    monkeypatch.chdir(tmp_path)
    return Path(shutil.copytree(world / "ended", tmp_path / "ended"))


# ---- what each command does ---------------------------------------------------------------------------------------------------


def test_run_ends_with_a_table_and_paths_and_the_same_command_uses_it_again(
    world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert cli.main(["run", "lora", *small(world / "data")]) == 0
    first = capsys.readouterr()
    (folder,) = (tmp_path / "runs").iterdir()
    assert folder.name.startswith("lora-data-")
    assert {"experiment.json", "rounds.jsonl", "results.json", "report.html", "checkpoints", "adapter"} <= {
        p.name for p in folder.iterdir()
    }
    assert "lora" in first.out
    assert f"runs/{folder.name}/report.html" in first.out
    assert "round 2/2" in first.err
    before = hashes(folder)
    assert cli.main(["run", "lora", *small(world / "data")]) == 0
    again = capsys.readouterr()
    assert "round" not in again.err
    assert "holds this run's results already, and nothing was run; delete it, or give another --out" in again.out
    assert "results already" not in first.out
    assert {**hashes(folder), "report.html": ""} == {**before, "report.html": ""}
    assert cli.main(["run", str(folder / "experiment.json"), "--seed", "7"]) == 0
    assert len(list((tmp_path / "runs").iterdir())) == 2


def test_compare_writes_what_its_runs_hold(world: Path) -> None:
    out = world / "ended"
    listed = json.loads((out / "comparison.json").read_text())
    assert [r["method"] for r in listed] == ["lora", "fibecfed", "local", "lora-prior"]
    assert listed[1] == json.loads((out / "fibecfed" / "results.json").read_text())
    assert len({json.dumps(r["partition"]) for r in listed}) == 1
    assert "fibecfed" in (out / "report.html").read_text()


def test_compare_over_seeds_with_one_learning_rate(
    world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "200")
    assert cli.main(["compare", "lora", "local", *small(world / "data"), "--seeds", "1", "2", "--lr", "0.125", "--out", "c"]) == 0
    assert {p.name for p in Path("c").iterdir() if p.is_dir()} == {"lora-seed1", "local-seed1", "lora-seed2", "local-seed2"}
    listed = json.loads(Path("c/comparison.json").read_text())
    rates = [(r["experiment"]["method"].get("inner") or r["experiment"]["method"])["lr"] for r in listed]
    assert rates == [0.125] * 4
    scores = [r["final"]["personalised"] for r in listed if r["method"] == "lora"]
    assert f"{np.mean(scores):.4f} ± {np.std(scores, ddof=1):.3f}" in capsys.readouterr().out


def test_one_method_that_fails_does_not_lose_the_others(
    world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    recipe = tmp_path / "bad.py"
    recipe.write_text(
        "from dataclasses import dataclass\nfrom typing import ClassVar\nfrom fedloom.methods.fedavg import FedAvg\n\n"
        "@dataclass(frozen=True)\nclass Bad(FedAvg):\n    name: ClassVar[str] = 'bad'\n    paper: ClassVar[str] = 'none'\n\n"
        "    def round(self, state, pool):\n        raise ValueError('this method is broken')\n"
    )
    assert cli.main(["compare", "bad.py", "lora", *small(world / "data"), "--out", "c"]) == 1
    captured = capsys.readouterr()
    assert captured.err.splitlines()[-1] == "fedloom: bad failed: this method is broken"
    assert [r["method"] for r in json.loads(Path("c/comparison.json").read_text())] == ["lora"]


def test_a_recipe_brings_its_method_or_its_experiment(world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    source = (
        "from dataclasses import dataclass\nfrom typing import ClassVar\nfrom fedloom.methods.fedavg import FedAvg\n\n"
        "@dataclass(frozen=True)\nclass Mine(FedAvg):\n    name: ClassVar[str] = 'mine'\n    paper: ClassVar[str] = 'none'\n"
        "    depth: int = 3\n"
    )
    Path("mine.py").write_text(source)
    assert cli.main(["run", "mine.py", *small(world / "data"), "--method.depth", "5", "--out", "r"]) == 0
    assert json.loads(Path("r/experiment.json").read_text())["method"]["depth"] == 5
    assert cli.main(["evaluate", "r", "--recipe", "mine.py"]) == 0
    Path("whole.py").write_text(
        source + "\nfrom fedloom.run.experiment import Experiment\nexperiment = Experiment(Mine(depth=8), rounds=9)\n"
    )
    assert cli.main(["run", "whole.py", *small(world / "data"), "--out", "s"]) == 0
    saved = json.loads(Path("s/experiment.json").read_text())
    assert (saved["method"]["depth"], saved["rounds"]) == (8, 2)


def test_report_takes_a_comparison_or_runs(ended: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (ended / "report.html").unlink()
    assert cli.main(["report", str(ended)]) == 0
    assert "lora-prior" in (ended / "report.html").read_text()
    assert cli.main(["report", str(ended / "lora"), str(ended / "local"), "--out", "two.html"]) == 0
    assert "lora-prior" not in Path("two.html").read_text()


def test_describe_says_what_would_be_run(world: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """And what it says of bytes and examples is what the run had."""
    monkeypatch.setenv("COLUMNS", "220")
    assert cli.main(["describe", "lora", *small(world / "data")]) == 0
    out = capsys.readouterr().out
    row = [json.loads(line) for line in (world / "ended/lora/rounds.jsonl").read_text().splitlines()][1]
    assert f"{row['bytes_down'] / 1000:.1f} kB down" in out
    assert f"{row['examples']:,} examples" in out
    assert "60 train, 20 validation, 20 test" in out
    assert "query, value" in out
    assert "packed: all texts of a stack in one row" in out
    assert cli.main(["describe", "lora", *small(world / "data"), "--adapter.kind", "bitfit"]) == 0
    out = capsys.readouterr().out
    assert "vmap over padded batches" in out
    assert "LoRA" not in out


def test_partition_shows_saves_and_draws(
    world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.undo()  # pictures are drawn
    monkeypatch.chdir(tmp_path)
    data = ["--data", str(world / "data"), "--clients", "6"]
    assert cli.main(["partition", *data, "--save", "p.json", "--plot"]) == 0
    assert Path("partition.png").read_bytes().startswith(b"\x89PNG")
    assert cli.main(["partition", *data, "--plot", "p.svg"]) == 0
    assert "<svg" in Path("p.svg").read_text()
    first = capsys.readouterr().out.split("note:")[0]
    assert "kind1" in first
    assert cli.main(["partition", *data, "--partition", "p.json", "--seed", "42"]) == 0
    assert capsys.readouterr().out.split("note:")[0] == first


def test_partition_writes_every_device_a_folder_of_its_own(world: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """What --save says of each, as text and class; together they are the data."""
    data, shards = ["--data", str(world / "data"), "--clients", "6"], tmp_path / "shards"
    assert cli.main(["partition", *data, "--save", str(tmp_path / "p.json"), "--shards", str(shards)]) == 0
    assert f"shards:  {shards}/0 to {shards}/5 (a device: fedloom join HOST:PORT {shards}/0)" in capsys.readouterr().out
    clients = json.loads((tmp_path / "p.json").read_text())["clients"]
    assert sorted(path.name for path in shards.iterdir()) == [str(k) for k in range(6)] and len(clients) == 6
    for i, (split, rows) in enumerate({"train": 60, "validation": 20, "test": 20}.items()):
        whole, held = sentences(rows, i), []
        for k, client in enumerate(clients):
            table = pq.read_table(shards / str(k) / f"{split}.parquet")
            mine = list(zip(table["text"].to_pylist(), table["label"].to_pylist(), strict=True))
            assert mine == [whole[row] for row in client[split]]
            held += mine
        assert sorted(held) == sorted(whole)
    refused(capsys, ["partition", *data, "--shards", str(shards)], "is not empty", "give a new folder")


def test_evaluate_gives_what_was_recorded_and_notices_when_not(ended: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for method in ("lora", "fibecfed", "local", "lora-prior"):
        before = hashes(ended / method)
        assert cli.main(["evaluate", str(ended / method)]) == 0
        assert "equal to what was recorded" in capsys.readouterr().out
        assert {**before, ".lock": ""} == {**hashes(ended / method), ".lock": ""}
    assert cli.main(["evaluate", str(ended / "lora"), "--method", "lora-finetuned"]) == 0
    rows = [json.loads(line) for line in (ended / "lora/rounds.jsonl").read_text().splitlines()]
    rows[-1]["personalised"] += 0.05
    (ended / "lora/rounds.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert cli.main(["evaluate", str(ended / "lora")]) == 1
    assert "NOT equal" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("method", "client"), [("lora", None), ("fibecfed", None), ("fibecfed", 0), ("fibecfed", 5), ("lora-prior", 2), ("local", 1)]
)
def test_an_export_loads_with_the_same_logits(method: str, client: int | None, ended: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """As printed: in plain PEFT, and merged in plain transformers, against the run's own predictor; devices differ from each other."""
    who = [] if client is None else ["--client", str(client)]
    assert cli.main(["export", str(ended / method), "out", *who]) == 0
    assert cli.main(["export", str(ended / method), "merged", "--merge", *who]) == 0
    world = build(experiment_in(ended / method))
    found = predictor_of(world, ended / method, client)
    tokenizer = AutoTokenizer.from_pretrained("out")
    loaders = {"PeftModel": PeftModel, "AutoModelForSequenceClassification": AutoModelForSequenceClassification}
    said = capsys.readouterr().out.splitlines()
    adapted, plain = (eval(line.removeprefix("load it with: "), loaders).eval() for line in said if line.startswith("load it with: "))
    assert [plain.config.id2label[i] for i in range(CLASSES)] == list(world.classes)
    own = world.model.module
    state = own.state_dict()
    try:
        with torch.no_grad():
            for name, tensor in whole(world.model, found.tensors).items():
                dict(own.named_parameters())[world.model.parameters[name]].copy_(tensor)
            given = tokenizer(TEXTS, padding=True, return_tensors="pt")
            wanted = own(**given).logits + (0 if found.bias is None else found.bias)
            assert float((adapted(**given).logits - wanted).abs().max()) <= 1e-6
            assert float((plain(**given).logits - wanted).abs().max()) <= 1e-5
    finally:
        own.load_state_dict(state)
    if found.bias is not None:
        assert float(found.bias.abs().max()) > 0.01


def test_two_devices_export_two_models(ended: Path) -> None:
    for client in (0, 5):
        assert cli.main(["export", str(ended / "lora-prior"), f"out{client}", "--client", str(client)]) == 0
    assert hashes(Path("out0"))["adapter_model.safetensors"] != hashes(Path("out5"))["adapter_model.safetensors"]


def test_beside_a_run_that_goes_on_the_shared_model_alone_is_exported(ended: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """What a device has is read after the rest, and the next round could have replaced it in between."""
    place = str(ended / "lora-prior")
    with only_one(Path(place)):
        refused(capsys, ["export", place, "own", "--client", "0"], "another process is running", "wait for it, or stop it")
        assert cli.main(["export", place, "shared"]) == 0
    assert cli.main(["export", place, "own", "--client", "0"]) == 0


def served(folder: Path) -> Path:
    """The run as the server of a real federation would have it: its devices' states are names there, and nothing behind them."""
    store, names = store_in(folder), Elsewhere()
    saved = checkpoint.load(folder, store)
    assert saved is not None
    for client, name in store.commit().items():
        names.take(int(client), name)
    shutil.rmtree(folder / "checkpoints/clients", ignore_errors=True)
    checkpoint.save(folder, saved, names)
    return folder


def test_of_a_servers_run_the_shared_model_is_exported_and_what_devices_keep_is_refused(
    ended: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["export", str(ended / "fibecfed"), "before"]) == 0
    place = str(served(ended / "fibecfed"))
    assert cli.main(["export", place, "after"]) == 0
    before, after = (hashes(Path(name))["adapter_model.safetensors"] for name in ("before", "after"))
    assert before == after
    refused(capsys, ["export", place, "new", "--client", "0"], "is a server's", "leave --client out")
    refused(capsys, ["evaluate", place], "is a server's", "only they can predict again")
    refused(capsys, ["export", str(served(ended / "local")), "new"], "no global model", "keeps it")
    assert not Path("new").exists()


# ---- what is odd but must work ------------------------------------------------------------------------------------------------


def test_an_empty_text_and_one_of_ten_thousand_tokens(world: Path, tmp_path: Path) -> None:
    data = Path(shutil.copytree(world / "data", tmp_path / "data"))
    for split in ("train", "test"):
        rows = [("", "kind0"), (" ".join(["w7"] * 10_000), "kind1"), *sentences(40, 5)]
        write_csv(data / f"{split}.csv", rows)
    assert cli.main(["run", "fibecfed", *small(data), "--out", str(tmp_path / "r")]) == 0


def test_devices_that_lack_labels_and_test_rows(world: Path, tmp_path: Path) -> None:
    out = tmp_path / "r"
    words = ["--alpha", "0.001", "--max-test", "4", "--max-validation", "4", "--out", str(out)]
    assert cli.main(["run", "fibecfed", *small(world / "data"), *words]) == 0
    devices = json.loads((out / "results.json").read_text())["per_device"]
    assert any(0 in device["labels"] for device in devices)
    assert any(device["test"] == 0 and device["score"] is None for device in devices)


# ---- bad input ----------------------------------------------------------------------------------------------------------------


BAD = {
    "--text wrods": ["wrods", "text"],
    "--label lable": ["lable", "label"],
    "--model ./nowhere": ["./nowhere", "minilm"],
    "--data ./nowhere": ["./nowhere"],
    "--adapter.targets qeury": ["qeury", "query"],
    "--adapter.rank 0": ["rank"],
    "--clients 100": ["60 training rows", "at most"],
    "--partition by-luck": ["by-luck", "iid", "label"],
    "--partition column:nope": ["nope", "label"],
    "--rounds -1": ["--rounds is -1"],
}


def test_bad_input_is_one_paragraph_and_the_folder_stays_free(
    world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    for words, wanted in BAD.items():
        refused(capsys, ["run", "local", *small(world / "data"), *words.split(), "--out", "r"], *wanted)
        assert hashes(tmp_path) in ({}, {"r/.lock": hashlib.sha256(b"").hexdigest()}), words
    assert cli.main(["run", "local", *small(world / "data"), "--out", "r"]) == 0


def test_a_rate_that_diverges_is_one_paragraph(
    world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    words = ["run", "local", *small(world / "data"), "--method.inner.lr", "1e38", "--rounds", "3", "--out", "r"]
    refused(capsys, words, "client", "is nan", "learning rate")


def test_bad_data_files(world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.chdir(tmp_path)
    data = Path(shutil.copytree(world / "data", tmp_path / "latin"))
    (data / "train.csv").write_bytes("text,label\ncafé,kind0\nthé,kind1\n".encode("latin-1"))
    refused(capsys, ["run", "lora", *small(data), "--out", "r"], "train.csv", "UTF-8")
    other = Path(shutil.copytree(world / "data", tmp_path / "labels"))
    write_csv(other / "test.csv", [*sentences(10, 2), ("w1 w2", "never-trained")])
    refused(capsys, ["run", "lora", *small(other), "--out", "r"], "never-trained")
    empty = tmp_path / "empty"
    empty.mkdir()
    refused(capsys, ["run", "lora", *small(empty), "--out", "r"], "empty")


def test_a_saved_partition_with_an_empty_device(
    world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert cli.main(["partition", "--data", str(world / "data"), "--clients", "6", "--save", "p.json"]) == 0
    saved = json.loads(Path("p.json").read_text())
    saved["clients"][1]["train"] += saved["clients"][4]["train"]
    saved["clients"][4]["train"] = []
    Path("p.json").write_text(json.dumps(saved))
    refused(capsys, ["run", "lora", *small(world / "data"), "--partition", "p.json", "--out", "r"], "client 4", "0 training rows")


def test_a_folder_of_another_experiment(ended: Path, world: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = hashes(ended)
    common = [*small(world / "data"), "--alpha", "0.5", "--rounds", "3"]
    refused(capsys, ["run", "lora", *common, "--out", str(ended / "lora")], "rounds is 2 there and 3 here", "--out")
    refused(capsys, ["compare", "lora", "local", *common, "--out", str(ended)], "rounds is 2 there and 3 here")
    refused(capsys, ["run", "lora", *common, "--out", str(ended)], "is not a run folder")
    refused(capsys, ["run", "lora", *common, "--out", str(ended / "comparison.json")], "is a file")
    refused(capsys, ["export", str(ended / "lora"), str(ended / "local")], "not an empty folder")
    refused(capsys, ["export", str(ended / "lora"), "new", "--client", "6"], "no device 6", "0 to 5")
    refused(capsys, ["export", str(ended / "local"), "new"], "no global model", "--client")
    refused(capsys, ["evaluate", str(ended / "lora"), "--method", "local"], "must be trained")
    refused(capsys, ["evaluate", str(ended)], "is no run folder", "comparison.json")
    after = {name: digest for name, digest in hashes(ended).items() if not name.endswith(".lock")}
    assert after == {name: digest for name, digest in before.items() if not name.endswith(".lock")}
    assert not Path("new").exists()


@pytest.mark.parametrize("spoil", ["cut", "flip", "tensors", "client"])
def test_a_corrupt_checkpoint(spoil: str, ended: Path, world: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = ended / "fibecfed"
    (folder / "results.json").unlink()
    kinds = {"cut": "latest.json", "flip": "latest.json", "tensors": "server-*", "client": "clients/client-*"}
    path = next((folder / "checkpoints").glob(kinds[spoil]))
    whole = path.read_bytes()
    path.write_bytes(whole[:-50] if spoil == "cut" else whole[:-9] + bytes([whole[-9] ^ 1]) + whole[-8:])
    before = hashes(folder)
    refused(capsys, ["run", "fibecfed", *small(world / "data"), "--out", str(folder)], "corrupt", "Nothing was overwritten", "Delete")
    assert hashes(folder) == before
    if spoil == "client":  # nothing was overwritten in the others either: what goes on from one goes on from each
        path.write_bytes(whole)
        assert cli.main(["run", "fibecfed", *small(world / "data"), "--out", str(folder)]) == 0


def test_changed_data_is_not_gone_on_with(ended: Path, world: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data = Path(shutil.copytree(world / "data", tmp_path / "changing"))
    folder = tmp_path / "r"
    assert cli.main(["run", "lora", *small(data), "--out", str(folder)]) == 0
    (folder / "results.json").unlink()
    write_csv(data / "test.csv", sentences(20, 99))
    before = hashes(folder)
    refused(capsys, ["run", "lora", *small(data), "--out", str(folder)], "changed since it began", "--out")
    assert hashes(folder) == before


# ---- stopping -----------------------------------------------------------------------------------------------------------------


def command(words: list[str], **more: object) -> subprocess.Popen[str]:
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    pipe = subprocess.PIPE
    return subprocess.Popen([sys.executable, "-m", "fedloom", *words], stdout=pipe, stderr=pipe, text=True, env=environment, **more)  # type: ignore[call-overload]


def stopped(process: subprocess.Popen[str], number: int, *begins: str) -> str:
    """The line at which it was stopped: the first that ``begins`` so. It says that it was, and how to go on."""
    assert process.stderr is not None
    said = []
    for line in process.stderr:
        said.append(line)
        if line.startswith(begins):
            process.send_signal(number)
            break
    _, rest = process.communicate(timeout=60)
    assert process.returncode == 128 + number
    assert rest.splitlines()[-1] == "fedloom: stopped; the same command resumes"
    assert "Traceback" not in "".join(said) + rest
    return said[-1]


def test_a_stopped_run_says_so_and_goes_on(world: Path, tmp_path: Path) -> None:
    words = ["run", "lora", *small(world / "data"), "--rounds", "400", "--evaluate-every", "0", "--plain", "--out", str(tmp_path / "r")]
    stopped(command(words), signal.SIGINT, "round 3/")
    assert stopped(command(words), signal.SIGTERM, "resuming", "round").startswith("resuming after round ")


def test_a_full_disk_is_told(world: Path, tmp_path: Path) -> None:
    """Files may not grow beyond a few kilobytes: the checkpoint cannot be written."""
    import resource

    words = ["run", "lora", *small(world / "data"), "--out", str(tmp_path / "r")]
    process = command(words, preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (4096, 4096)))
    _, said = process.communicate(timeout=60)
    assert process.returncode == 1
    assert "Traceback" not in said
    assert said.splitlines()[-1].startswith("fedloom: ")
    assert "ree some space" in said.splitlines()[-1]
    assert cli.main(words) == 0
