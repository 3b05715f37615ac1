"""The offline model and the public data sets beside a checkout: the commands of the documentation, with caps that make them a matter of
seconds."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from fedloom import cli

SHARED = Path(__file__).parents[3] / "shared"
CAPS = {"train": 200, "validation": 16, "test": 16, "length": 48}
SMALL = [word for of, most in CAPS.items() for word in (f"--max-{of}", str(most))] + ["--exact-match", "0", "--evaluate-every", "2"]


@pytest.mark.skipif(not SHARED.is_dir(), reason=f"needs the data sets and the model in {SHARED}")
def test_fedit_on_dollys_ten_clients_is_one_command(tmp_path: Path) -> None:
    """docs/instructions.md's first command, with a real trained Llama of 260,032 weights: two rounds of five of the ten devices."""
    model, data = str(SHARED / "models" / "stories260K"), str(SHARED / "data" / "dolly15k")
    words = ["run", "lora", "--model", model, "--data", data, "--partition", "column:client", "--clients", "10", "--cohort", "5"]
    assert cli.main([*words, "--rounds", "2", *SMALL, "--out", str(tmp_path / "run")]) == 0
    rows = [json.loads(line) for line in (tmp_path / "run" / "rounds.jsonl").read_text().splitlines()]
    trained = [row for row in rows if row["round"]]
    assert [len(row["answered"]) for row in trained] == [5, 5]
    assert all(0 < row["loss"] < 8 and row["bytes_up"] > 0 for row in trained)
    results = json.loads((tmp_path / "run" / "results.json").read_text())
    assert results["final"]["global"] > 0.05, "a trained model: of 512 tokens the likeliest is right far more often than by chance"
    assert (tmp_path / "run" / "adapter" / "adapter_model.safetensors").exists()
