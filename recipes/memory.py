"""What one FedCyBGD turn takes of memory, against 2·M + 16·|block|: peak resident set of a device, measured and predicted.

    python recipes/memory.py                        about 100 million numbers, Llama-shaped, random; a few minutes, 2 GB
    python recipes/memory.py --hidden 256           smaller
    python recipes/memory.py --length 512 --recompute    with layers that are computed again in the backward pass, and without, one after
                                                         the other; at lengths where what layers keep counts

A process of its own builds the model in bfloat16 and no other precision, is given the block in float32 (as it would come) and trains it
for a few steps as a device does (``compute/serial.py``). What it had before the model was there (interpreter, libraries, which a first
small turn has set up) is subtracted; its peak is the operating system's, reset before the turn. Writes OUT: one JSON object. Linux only.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import LlamaConfig, LlamaForSequenceClassification, PreTrainedTokenizerFast

from fedloom.compute.serial import Serial
from fedloom.compute.work import AdamW, Fit
from fedloom.data.examples import Examples
from fedloom.model.adapters import is_head
from fedloom.model.base import Model
from fedloom.model.blocks import cover
from fedloom.model.memory import kept
from fedloom.run.checkpoint import write_atomically
from fedloom.run.memory import Sizes, on_a_device

STEPS, BATCH = 3, 4


def resident(which: str) -> int:
    """Bytes: VmRSS, now; VmHWM, at the most since it was reset."""
    said = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
    return next(int(line.split()[1]) for line in said if line.startswith(which)) * 1024


def device(hidden: int, layers: int, words: int, length: int, recompute: bool = False) -> Model:
    """A Llama in bfloat16 as a device holds it: once. Its blocks are not named as trained tensors of a copy of their own."""
    config = LlamaConfig(
        vocab_size=words,
        hidden_size=hidden,
        intermediate_size=8 * hidden // 3 // 64 * 64 or 64,
        num_hidden_layers=layers,
        num_attention_heads=max(1, hidden // 64),
        max_position_embeddings=length,
        num_labels=4,
        pad_token_id=0,
        attn_implementation="eager",
    )
    torch.set_default_dtype(torch.bfloat16)
    module = LlamaForSequenceClassification(config).eval().requires_grad_(False)
    torch.set_default_dtype(torch.float32)
    config.pad_token_id = -1  # no token is padding: the head reads the last
    tokenizer: Any = PreTrainedTokenizerFast.__new__(PreTrainedTokenizerFast)
    model = Model("llama", module, config, tokenizer, 4, length, "bf16", 0.0, torch.device("cpu"), causal=True)
    model.parameters = {name: name for name, _ in module.named_parameters()}
    model._copies[torch.bfloat16] = module
    model.recomputes = recompute
    return model


def turn(model: Model, block: int, length: int) -> tuple[int, int]:
    """Train one block and the head; (M, numbers trained)."""
    own = dict(model.module.named_parameters())
    names = [*cover(own)[block].names, *filter(is_head, own)]
    start = {n: own[n].detach().float() for n in names}
    rng = np.random.default_rng(0)
    texts = Examples.of([rng.integers(5, model.config.vocab_size, size=length).tolist() for _ in range(BATCH)], [0, 1, 2, 3])
    item = Fit(start, texts, [np.arange(BATCH)] * STEPS, AdamW(1e-4))
    fitted = Serial(model)._fit(item)
    assert np.isfinite(fitted.losses).all() and set(fitted.tensors) == set(names)
    return sum(p.numel() for p in own.values()), sum(t.numel() for t in start.values())


def measure(given: argparse.Namespace) -> dict[str, float]:
    """Measured and predicted bytes of one turn, in this process."""
    turn(device(64, 2, 500, given.length, given.recompute), 0, given.length)
    before = resident("VmRSS")
    model = device(given.hidden, given.layers, given.words, given.length, given.recompute)
    held = resident("VmRSS") - before
    Path("/proc/self/clear_refs").write_text("5", encoding="ascii")
    began = time.perf_counter()
    numbers, trained = turn(model, given.layers // 2, given.length)
    seconds = time.perf_counter() - began
    measured, predicted = resident("VmHWM") - before, on_a_device(Sizes(numbers, numbers, trained), low=True)
    whole = on_a_device(Sizes(numbers, numbers, numbers), low=True)
    found = {"numbers": numbers, "block": trained, "measured": measured, "predicted": predicted, "ratio": measured / predicted}
    activations = BATCH * given.length * kept(model, given.layers - given.layers // 2, given.recompute)
    more = {"activations, estimated": activations, "the model alone, measured": held, "before the model": before, "seconds": seconds}
    return {**found, "full Adam, predicted": whole, **more}


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
    for name, value in found.items():
        if isinstance(value, dict):
            print(f"{name}:", *(f"  {line}" for line in lines(value)), sep="\n")
        else:
            print(*lines({name: value}))
    return 0


def measured_apart(words: list[str]) -> dict[str, Any]:
    """What :func:`measure` finds in a process of its own.

    Raises:
        CalledProcessError: it failed.
    """
    done = subprocess.run([sys.executable, __file__, *words, "--here"], stdout=subprocess.PIPE, text=True, check=True)
    return json.loads(done.stdout.splitlines()[-1])


def lines(found: dict[str, float]) -> list[str]:
    """One a figure, for a person."""
    return [f"{n}: {v:.2f}" if n in ("ratio", "seconds") else f"{n}: {v / 1e6:.1f} million" for n, v in found.items()]


if __name__ == "__main__":
    raise SystemExit(main())
