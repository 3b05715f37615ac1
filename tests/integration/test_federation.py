"""Real processes: a server and three devices over TLS, killed and stopped, come to the bits of the same participation without faults."""

from __future__ import annotations

import json
import stat
from pathlib import Path

import pyarrow.parquet as pq
import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForSequenceClassification, AutoTokenizer

pytest.importorskip("flwr", reason="the extra 'flower' is not installed: pip install 'fedloom[flower]'")

from fedloom import cli
from tests.integration.federating import DEVICES, difference, play

pytestmark = [pytest.mark.flower, pytest.mark.no_cover]


def test_a_federation_with_faults_ends_as_without(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The seed draws, within five seconds: a worker stopped for a while, another device's worker, a device and the server killed."""
    there = play(tmp_path, "fibecfed", rounds=20, faults=4, seed=39286)
    hits = [line.split(": ", 1)[1] for line in capsys.readouterr().out.splitlines()]
    assert hits == ["worker stopped: 0", "device killed: 0", "worker killed: 2", "server killed: server"]
    assert there.rows()[-1]["round"] == 20
    assert difference(there) == ""
    results = (there.folder / "out" / "results.json").read_text()
    capsys.readouterr()
    for k, told in enumerate(json.loads(results)["per_device"]):
        assert cli.main(["export", str(there.folder / f"device-{k}"), str(tmp_path / f"own-{k}")]) == 0
        assert right(capsys.readouterr().out, tmp_path / f"own-{k}", there.folder / "shards" / str(k)) == told["correct"]
    weights = {(tmp_path / f"own-{k}" / "adapter_model.safetensors").read_bytes() for k in range(DEVICES)}
    assert len(weights) == DEVICES, "each has layers of its own"
    assert "PRIVATE KEY" not in results + "".join(there.said(who) for who in there.processes)
    assert (there.folder / "out" / "report.html").exists()
    assert stat.S_IMODE((there.folder / "certs" / "device-0" / "device.key").stat().st_mode) == 0o600


def right(said: str, own: Path, shard: Path) -> int:
    """How many of its test texts the device's exported model has right, by PEFT and transformers alone."""
    loaders = {"PeftModel": PeftModel, "AutoModelForSequenceClassification": AutoModelForSequenceClassification}
    model = eval(said.split("load it with: ")[1], loaders).eval()
    tokenizer, rows = AutoTokenizer.from_pretrained(own), pq.read_table(shard / "test.parquet").to_pylist()
    with torch.no_grad():
        found = [int(model(**tokenizer(row["text"], truncation=True, max_length=24, return_tensors="pt")).logits.argmax()) for row in rows]
    return sum(model.config.id2label[i] == row["label"] for i, row in zip(found, rows, strict=True))
