"""Who may write to a run folder. What a run does in it: ``tests/conformance/test_loop.py``."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest

from fedloom.data.shards import write_shards
from fedloom.run import checkpoint, loop
from fedloom.run.again import evaluate_again
from fedloom.run.costs.ledger import Ledger
from fedloom.run.errors import CheckpointError
from fedloom.run.evaluation import Evaluation
from fedloom.run.experiment import as_json
from fedloom.run.export import ExportError, export
from fedloom.run.folder import claim
from fedloom.run.lock import only_one
from fedloom.run.loop import OneDisk, results_of, run
from fedloom.run.world import build, read_data
from tests import small


def test_claiming_writes_the_experiment_and_claiming_again_finds_it(tmp_path: Path) -> None:
    claim(tmp_path / "new", small.experiment())
    assert json.loads((tmp_path / "new" / "experiment.json").read_text()) == as_json(small.experiment())
    claim(tmp_path / "new", small.experiment())
    claim(tmp_path / "new", small.experiment(stack=3, kind="flower"))
    assert json.loads((tmp_path / "new" / "experiment.json").read_text())["engine"]["stack"] == 0


@pytest.mark.parametrize("kept", ["checkpoints/latest.json", "results.json"])
def test_another_experiment_is_refused_naming_the_first_field_and_nothing_is_overwritten(kept: str, tmp_path: Path) -> None:
    claim(tmp_path, small.experiment())
    (tmp_path / kept).parent.mkdir(exist_ok=True)
    (tmp_path / kept).write_text("{}")
    before = (tmp_path / "experiment.json").read_bytes()
    with pytest.raises(CheckpointError, match=r"another experiment: rounds is 2 there and 3 here. Give another --out"):
        run(small.experiment(rounds=3), tmp_path, plain=True)
    with pytest.raises(CheckpointError, match="method.name is 'lora' there and 'local' here"):
        claim(tmp_path, small.experiment("local"))
    assert (tmp_path / "experiment.json").read_bytes() == before


def test_what_was_refused_and_has_kept_nothing_leaves_the_folder_free(tmp_path: Path) -> None:
    """Whoever follows a refusal's advice and changes an option need not change --out as well."""
    refused = replace(small.experiment("hetlora"), controls=True)
    with pytest.raises(ValueError, match="'hetlora' cannot follow SCAFFOLD's controls"):
        run(refused, tmp_path / "run", plain=True)
    results = run(small.experiment("hetlora", rounds=1), tmp_path / "run", plain=True)
    assert results["rounds"] == 1
    assert json.loads((tmp_path / "run" / "experiment.json").read_text())["controls"] is False


def test_a_folder_that_is_no_run_folder_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").write_text("years of work")
    with pytest.raises(CheckpointError, match=r"is not a run folder \(it holds \['thesis.tex'\]\); give --out an empty or new one"):
        run(small.experiment(), tmp_path, plain=True)
    assert [p.name for p in tmp_path.iterdir()] == ["thesis.tex"]


@pytest.mark.parametrize("text", ["{", "[1]", "\udcff", ""])
def test_a_broken_experiment_file_is_refused(text: str, tmp_path: Path) -> None:
    (tmp_path / "experiment.json").write_bytes(text.encode(errors="surrogateescape"))
    with pytest.raises(CheckpointError, match="is no JSON object"):
        claim(tmp_path, small.experiment())
    assert (tmp_path / "experiment.json").read_bytes() == text.encode(errors="surrogateescape")


def test_a_file_where_the_folder_should_be(tmp_path: Path) -> None:
    (tmp_path / "out").write_text("x")
    with pytest.raises(CheckpointError, match="is a file; --out must name a folder"):
        claim(tmp_path / "out", small.experiment())


def test_a_folder_in_use_is_refused(tmp_path: Path) -> None:
    claim(tmp_path, small.experiment())
    with only_one(tmp_path), pytest.raises(CheckpointError, match="another process is running"):
        run(small.experiment(), tmp_path, plain=True)
    assert not (tmp_path / "rounds.jsonl").exists()


def test_texts_that_the_length_cuts_are_told_with_their_number(tmp_path: Path) -> None:
    world = build(small.experiment("lora", rounds=1, evaluate_every=0, max_length=6))
    long = {split: sum(len(text.split()) + 2 >= 6 for text in world.source.splits[split]["text"]) for split in world.splits}
    told = ", ".join(f"{long[split]} of {len(world.splits[split])} {split}" for split in ("train", "validation", "test"))
    wanted = f"texts are cut after 6 tokens (--max-length, or what the model reads if that is less): at most {told}"
    assert long["train"] > 0 and wanted in world.notes
    assert not [note for note in build(small.experiment("lora", max_length=16)).notes if "--max-length" in note]
    assert wanted in run(world.experiment, tmp_path / "run", plain=True)["notes"]


def test_a_model_is_not_taken_away_under_other_classes_than_it_was_trained_with(tmp_path: Path) -> None:
    data = shutil.copytree(small.data(), tmp_path / "data")
    e, out = replace(small.experiment("lora", rounds=2, evaluate_every=0), data=str(data)), tmp_path / "run"
    small.stopped(e, out, last=1)
    export(e, out, tmp_path / "one")
    for file in data.glob("*.jsonl"):
        file.write_text(file.read_text().replace('"label": "b"', '"label": "z"'))
    with pytest.raises(
        ExportError, match="'data' are called a, c, z now, and were called a, b, c when .*run was trained.*Restore the data"
    ):
        export(e, out, tmp_path / "two")
    assert not (tmp_path / "two").exists()
    shutil.rmtree(tmp_path / "data")
    shutil.copytree(small.data(), tmp_path / "data")
    run(e, out, plain=True)
    latest = out / "checkpoints" / "latest.json"
    body = {key: value for key, value in json.loads(latest.read_text()).items() if key not in ("sha256", "names")}
    latest.write_text(json.dumps({"sha256": checkpoint._digest(body), **body}))  # as an earlier release wrote it
    export(e, out, tmp_path / "three")
    for file in data.glob("*.jsonl"):
        file.write_text(file.read_text().replace('"label": "b"', '"label": "z"'))
    with pytest.raises(ExportError, match="are called a, c, z now, and were called a, b, c"):
        export(e, out, tmp_path / "four")


@pytest.mark.parametrize(
    ("validation", "test", "best"),
    [
        ((None, 0.2, 0.2, None), (0.9, 0.5, 0.6, 0.7), 1),
        ((None, 0.1, 0.2, 0.1), (0.9, 0.5, None, 0.7), 2),
        ((None, None, None, None), (0.9, 0.5, None, 0.7), 3),
        ((None, None, None, None), (None, None, None, None), 3),
    ],
)
def test_a_round_without_a_validation_score_is_below_every_one_that_has_one(
    validation: tuple[float | None, ...], test: tuple[float | None, ...], best: int, tmp_path: Path
) -> None:
    """Devices that are elsewhere may have no score to tell: none of them answered, or none has an entity and none is predicted."""
    e = small.experiment("lora", rounds=3)
    world = build(e)
    ledger, nobody = Ledger(tmp_path, world.fleet), np.zeros(e.clients, np.int64)
    for t, (chosen, told) in enumerate(zip(validation, test, strict=True)):
        blank: dict[str, Any] = {"personalised": None, "global": None}
        scores = {"validation": {**blank, "loss": None, "personalised": chosen}, "test": {**blank, "personalised": told}}
        ledger.write(t, ledger.section(), 0.0, scores)
    found = Evaluation({}, nobody.astype(float), nobody, {"personalised": None, "global": None}, {})
    results = results_of(world, e.method.init(world.model), ledger, found)
    assert (results["best"]["round"], results["best"]["personalised"]) == (best, test[best])
    assert results["validation"]["best"]["personalised"] == validation[best]
    assert (results["final"]["round"], results["final"]["personalised"]) == (3, test[3])
    assert results["validation"]["final"]["personalised"] == validation[3]


def test_a_run_that_may_only_be_read_is_evaluated_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    e, opened = small.experiment("lora", rounds=1), Path.open
    run(e, tmp_path, plain=True)

    def refused(self: Path, *how: Any, **more: Any) -> Any:
        if self.is_relative_to(tmp_path) and how and how[0][0] in "wax":
            raise PermissionError(13, "Permission denied", str(self))
        return opened(self, *how, **more)

    before = sorted(tmp_path.rglob("*"))
    monkeypatch.setattr(Path, "open", refused)
    assert evaluate_again(e, tmp_path).equal and sorted(tmp_path.rglob("*")) == before


def test_who_insists_within_a_round_is_given_the_engine_that_waits_for_everyone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def heard(*given: Any, **named: Any) -> Any:
        patient.extend(given[4:])
        return drive(*given, **named)

    drive, patient = loop.drive, list[Any]()
    monkeypatch.setattr(loop, "drive", heard)
    run(small.experiment("lora", clients=2, cohort=2, rounds=1, evaluate_every=0), tmp_path / "run", plain=True)
    assert [type(engine) for engine in patient] == [OneDisk], "whatever rounds are hurried by"


def test_what_cannot_be_written_whole_is_not_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    e = small.experiment("lora", rounds=1, evaluate_every=0)
    run(e, tmp_path / "run", plain=True)
    write = pq.write_table

    def full(*told: Any, **more: Any) -> None:
        raise OSError(28, "No space left on device")

    def half(rows: Any, path: Path) -> None:
        write(rows, path) if "test" not in path.name else full()

    with monkeypatch.context() as patch:
        patch.setattr("fedloom.run.export.write_tokenizer", full)
        with pytest.raises(OSError, match="No space"):
            export(e, tmp_path / "run", tmp_path / "out")
    with monkeypatch.context() as patch:
        patch.setattr("fedloom.data.shards.pq.write_table", half)
        with pytest.raises(OSError, match="No space"):
            write_shards(*read_data(e), tmp_path / "shards")
    assert [path.name for path in tmp_path.iterdir()] == ["run"]


def test_a_folder_that_is_anothers_now_forgets_what_trackers_were_told(tmp_path: Path) -> None:
    """They write settings where there are none, and would show those of what was refused."""
    refused = replace(small.experiment("hetlora"), controls=True)
    with pytest.raises(ValueError, match="cannot follow SCAFFOLD's controls"):
        run(refused, tmp_path, plain=True)
    for name in ("tensorboard", "mlflow"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "id").write_text("the refused one's")
    (tmp_path / "wandb").mkdir()
    claim(tmp_path, refused)
    assert (tmp_path / "mlflow" / "id").exists(), "its own are kept"
    claim(tmp_path, small.experiment("hetlora", rounds=1))
    assert not (tmp_path / "tensorboard").exists() and not (tmp_path / "mlflow").exists()
    assert (tmp_path / "wandb").exists(), "somebody else's"
