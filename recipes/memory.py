"""What FedCyBGD turns take of memory, against 2·M + 16·|block|: peak resident set of a real run's turns, measured and predicted.

    python recipes/memory.py                        about 100 million numbers, Llama-shaped, random; a few minutes, 2 GB
    python recipes/memory.py --hidden 1024 --layers 22 --words 32000     about 307 million, 6 GB
    python recipes/memory.py --hidden 256           smaller
    python recipes/memory.py --length 512 --recompute    with layers that are computed again in the backward pass, and without, one after
                                                         the other; at lengths where what layers keep counts

A process of its own writes such a model in bfloat16 and data for one device to a folder, builds the world that ``fedloom run fedcybgd
--precision bf16`` builds of them, and plays turns as the loop does: server, message, host, store on the disk, message back, checkpoint. Two
are measured. In the first everything has changed since the device was last there, so the whole model comes down; in the second what changed
is the block before, and the device holds the rest. The process is server and device at once, so beside the device's 2·M + 16·|block|
stand the message (once: its tensors are its bytes) and what lies in files that are mapped: the server's state (4 bytes a number, read where
it goes down, and where it is the start that comes back into the model) and the blocks as the device keeps them.

"Measured" is the operating system's peak of resident memory, which was reset before each turn: it counts pages of mapped files, which the
system may take back when it needs room. "Of that anonymous" is what it may not, by a look every few milliseconds, so a little less than the
true peak can be told. What the process had before the model was there (interpreter, libraries, which a first small run has set up) is
subtracted of both. "Written by the checkpoint" are the bytes of its files that the turn made. Writes OUT: one JSON object. Linux only.
"""

from __future__ import annotations

import argparse
import gc
import json
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForSequenceClassification, PreTrainedTokenizerFast

from fedloom.engines.engine import drive
from fedloom.engines.heap import give_memory_back
from fedloom.messages import Replies, Task
from fedloom.methods.fedavg import FedAvg
from fedloom.methods.fedcybgd import FedCyBGD
from fedloom.model.memory import kept
from fedloom.run import checkpoint
from fedloom.run.checkpoint import Saved, write_atomically
from fedloom.run.costs.memory import needed, on_a_device, sizes_of
from fedloom.run.experiment import EngineSettings, Experiment
from fedloom.run.starting import begin_on_disk
from fedloom.run.world import build, store_in
from fedloom.tensors import nbytes

STEPS, BATCH = 3, 4


def resident(which: str) -> int:
    """Bytes: VmRSS, now; RssAnon, what no file stands behind; VmHWM, at the most since it was reset."""
    said = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
    return next(int(line.split()[1]) for line in said if line.startswith(which)) * 1024


def settled() -> int:
    """Bytes that are resident once what was freed is given back; the peak begins anew from there."""
    gc.collect()
    give_memory_back()
    Path("/proc/self/clear_refs").write_text("5", encoding="ascii")
    return resident("VmRSS")


@contextmanager
def watching() -> Iterator[list[int]]:
    """Inside, what comes out has the most of RssAnon that was seen."""
    most, over = [resident("RssAnon")], threading.Event()

    def look() -> None:
        while not over.wait(0.003):
            most[0] = max(most[0], resident("RssAnon"))

    watcher = threading.Thread(target=look, daemon=True)
    watcher.start()
    try:
        yield most
    finally:
        over.set()
        watcher.join()


def files(folder: Path) -> dict[str, int]:
    """The server's files of a checkpoint: bytes by name."""
    return {path.name: path.stat().st_size for path in (folder / "checkpoints").glob("server-*")}


def written(folder: Path, hidden: int, layers: int, words: int, length: int) -> None:
    """A random Llama in bfloat16 with a tokenizer of one token a word, and texts for one device."""
    config = LlamaConfig(
        vocab_size=words,
        hidden_size=hidden,
        intermediate_size=8 * hidden // 3 // 64 * 64 or 64,
        num_hidden_layers=layers,
        num_attention_heads=max(1, hidden // 64),
        max_position_embeddings=length,
        pad_token_id=0,
    )
    config.num_labels = 4
    torch.set_default_dtype(torch.bfloat16)
    LlamaForSequenceClassification(config).save_pretrained(folder)
    torch.set_default_dtype(torch.float32)
    vocabulary = Tokenizer(models.WordLevel({f"w{i}": i for i in range(words)}, unk_token="w1"))
    vocabulary.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    PreTrainedTokenizerFast(tokenizer_object=vocabulary, pad_token="w0", unk_token="w1").save_pretrained(folder)
    rng, rows = np.random.default_rng(0), []
    for i in range(STEPS * BATCH + 8):
        rows.append(json.dumps({"text": " ".join(f"w{w}" for w in rng.integers(5, words, length)), "label": "abcd"[i % 4]}))
    (folder / "data").mkdir()
    for split, some in (("train", rows[:-8]), ("validation", rows[-8:-4]), ("test", rows[-4:])):
        (folder / "data" / f"{split}.jsonl").write_text("\n".join(some), encoding="utf-8")


def played(folder: Path, before: tuple[int, int], length: int, recompute: bool) -> dict[str, Any]:
    """Turns of one device, by the bytes that are resident, and of these anonymous, beside ``before``."""
    method = FedCyBGD(FedAvg(lr=1e-4, batch_size=BATCH, local_epochs=1))
    shape: dict[str, Any] = {"clients": 1, "cohort": 1, "max_length": length, "precision": "bf16", "task": "classification"}
    how = EngineSettings(recompute=recompute)
    world = build(Experiment(method, data=str(folder / "data"), model=str(folder), partition="iid", engine=how, **shape))
    loading, run = resident("VmHWM"), folder / "run"
    store, sizes = store_in(run), sizes_of(world.model, method)
    engine, begun = world.engine(store), begin_on_disk(world.model, run)
    state = drive(method.setup(method.init(world.model), world.pool), engine, quorum=0)
    saved = checkpoint.save(run, Saved(state, {}, "", parts=begun, begun=begun), store)
    state = replace(
        saved.state, server={**saved.state.server, "changed": torch.ones_like(saved.state.server["changed"])}, round=world.model.depth // 2
    )
    books, start = on_a_device(sizes, low=True), nbytes(saved.state.shared)
    found: dict[str, Any] = {"numbers": sizes.model, "block": sizes.at_once, "predicted on a device": books}
    found |= {"a device's full Adam, predicted": on_a_device(replace(sizes, at_once=sizes.model), low=True), "the server's state": start}
    found |= {"this machine, predicted": needed(sizes, world.experiment).total, "loading, measured": loading - before[0]}
    layers = world.model.depth - world.model.depth // 2
    activations = BATCH * length * kept(world.model, layers, recompute)
    for turn in ("everything comes down", "a block comes down, the rest is there"):
        came: list[int] = []

        def heard(tasks: Sequence[Task], replies: Replies, came: list[int] = came) -> None:
            assert not replies.failures, replies.failures
            came += [nbytes(task.tensors) for task in tasks]

        held, there, began = settled() - before[0], files(run), time.perf_counter()
        alone = resident("RssAnon") - before[1]
        with watching() as most:
            saved = checkpoint.save(run, replace(saved, state=drive(method.round(state, world.pool), engine, seen=heard)), store)
        state, seconds, measured = saved.state, time.perf_counter() - began, resident("VmHWM") - before[0]
        keeps = 2 * (nbytes(state.shared) // 4)
        predicted = books + came[0] + start + keeps + activations
        more = {"of that activations, estimated": activations, "of that the message": came[0], "of that mapped": start + keeps}
        mine = {
            "measured": measured,
            "of that anonymous": most[0] - before[1],
            "predicted": predicted,
            "ratio": measured / predicted,
            **more,
        }
        mine["predicted, anonymous"] = predicted - start - keeps
        new = sum(size for name, size in files(run).items() if name not in there)
        found[turn] = {
            **mine,
            "between turns": held,
            "of that anonymous, between turns": alone,
            "written by the checkpoint": new,
            "seconds": seconds,
        }
    return found


def measure(given: argparse.Namespace) -> dict[str, Any]:
    """Measured and predicted bytes of turns, in this process."""
    with TemporaryDirectory() as small, TemporaryDirectory() as large:
        written(Path(small), 64, 2, 500, given.length)
        played(Path(small), (0, 0), given.length, given.recompute)
        written(Path(large), given.hidden, given.layers, given.words, given.length)
        return played(Path(large), (settled(), resident("RssAnon")), given.length, given.recompute)


def main() -> int:
    """Measure in fresh processes; the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--hidden", type=int, default=768)
    parser.add_argument("--layers", type=int, default=12)
    parser.add_argument("--words", type=int, default=16000)
    parser.add_argument("--length", type=int, default=64, help="tokens of a text (default: 64)")
    parser.add_argument("--recompute", action="store_true", help="measure again with layers that are computed again")
    parser.add_argument("--out", type=Path, default=Path("runs/memory.json"))
    parser.add_argument("--here", action="store_true", help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.here:
        print(json.dumps(measure(given)))
        return 0
    found = measured_apart([word for word in sys.argv[1:] if word != "--recompute"])
    if given.recompute:
        found["layers computed again"] = measured_apart(sys.argv[1:])
    given.out.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(given.out, json.dumps(found, indent=1))
    print(*lines(found), sep="\n")
    return 0


def measured_apart(words: list[str]) -> dict[str, Any]:
    """What :func:`measure` finds in a process of its own.

    Raises:
        CalledProcessError: it failed.
    """
    done = subprocess.run([sys.executable, __file__, *words, "--here"], stdout=subprocess.PIPE, text=True, check=True)
    return json.loads(done.stdout.splitlines()[-1])


def lines(found: dict[str, Any], indent: str = "") -> list[str]:
    """One a figure, for a person."""
    made: list[str] = []
    for name, value in found.items():
        if isinstance(value, dict):
            made += [f"{indent}{name}:", *lines(value, indent + "  ")]
        else:
            made.append(f"{indent}{name}: " + (f"{value:.2f}" if name in ("ratio", "seconds") else f"{value / 1e6:.1f} million"))
    return made


if __name__ == "__main__":
    raise SystemExit(main())
