"""FedCyBGD on every weight of a tiny language model, cut in every way: whole cycles against the library's own gradients and torch's AdamW.

The words' matrix is not tied to the embeddings, so that what lies behind the layers is a block of its own.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import cache
from typing import Any

import pytest
import torch

from fedloom.client.client import Client
from fedloom.client.host import Host
from fedloom.client.store import ClientStore
from fedloom.compute.compute import Compute, Done
from fedloom.compute.serial import Serial
from fedloom.compute.stacked import Stacked
from fedloom.compute.work import Fit, WorkItem
from fedloom.engines.engine import drive
from fedloom.engines.local import Local
from fedloom.engines.wrap import Recording
from fedloom.messages import Task, Update
from fedloom.methods.fedavg import FedAvg
from fedloom.methods.fedcybgd import FedCyBGD
from fedloom.methods.method import State
from fedloom.model.adapters import Adapter
from fedloom.model.base import Model, Precision
from fedloom.model.loading import load
from fedloom.server.participation import Pool
from tests import families, tiny
from tests.oracle.test_answers import TEMPLATE, examples, its_losses, library
from tests.oracle.test_cloze import folder

INNER = FedAvg(lr=0.01, local_epochs=2, batch_size=1, weight_decay=0.1, schedule="cosine")
POOL = Pool((0, 1), 1, 4, 3)
HELD = {0: [0, 1], 1: [2]}
"""The texts of each device."""


@cache
def model(precision: Precision = "float32") -> Model:
    return load(
        str(folder("llama")), num_labels=2, adapter=Adapter(kind="full"), seed=1, max_length=16, answers=TEMPLATE, precision=precision
    )


def device(client: int, of: Model) -> Client:
    mine = examples(of).subset(HELD[client])
    return Client(client, mine, mine, mine, POOL.seed)


def expected(name: str, cut: str) -> int | None:
    """Which block a weight of the library's is in: counted from the input to the output. Two layers, of two halves; of the ends the
    embeddings and the output, and the last norm in none."""
    layer = next((i for i in (0, 1) if name.startswith(f"model.layers.{i}.")), None)
    match cut:
        case "layers":
            return layer
        case "halves":
            return None if layer is None else 2 * layer + (".self_attn." not in name)
        case _:
            return layer + 1 if layer is not None else {"model.embed_tokens.weight": 0, "lm_head.weight": 3}.get(name)


def blocks(cut: str) -> list[set[str]]:
    where = {n: expected(n, cut) for n, _ in library("llama").named_parameters()}
    return [{n for n, block in where.items() if block == b} for b in range(1 + max(b for b in where.values() if b is not None))]


@cache
def by_hand(cut: str) -> list[dict[str, torch.Tensor]]:
    """All weights by the library's names before the first turn and after each: client t mod 2 trains block t mod D with an AdamW of its
    own, whose rate falls to 0 along half a cosine, everything else frozen."""
    lm, of, parts = library("llama"), model(), blocks(cut)
    own, texts = dict(lm.named_parameters()), examples(of)
    made = [{n: w.detach().clone() for n, w in own.items()}]
    for t in range(POOL.rounds):
        trained, client = [own[n] for n in sorted(parts[t % len(parts)])], t % 2
        for w in own.values():
            w.requires_grad_(False)
        for w in trained:
            w.requires_grad_(True)
        adam = torch.optim.AdamW(trained, lr=INNER.lr, weight_decay=INNER.weight_decay)
        batches = INNER.batches(device(client, of), t)
        for i, batch in enumerate(batches):
            adam.param_groups[0]["lr"] = INNER.lr * (1 + math.cos(math.pi * i / len(batches))) / 2
            adam.zero_grad()
            losses = its_losses(lm, texts)
            torch.stack([losses[HELD[client][row]] for row in batch]).mean().backward()
            torch.nn.utils.clip_grad_norm_(trained, 1.0)
            adam.step()
        made.append({n: w.detach().clone() for n, w in own.items()})
    return made


@dataclass
class Kept:
    """A compute that keeps what it was asked to train."""

    inner: Compute
    fits: list[Fit] = field(default_factory=list)

    def run(self, items: Sequence[WorkItem]) -> list[Done]:
        """As inner."""
        self.fits += [item for item in items if isinstance(item, Fit)]
        return self.inner.run(items)


def turns(method: FedCyBGD, compute: Compute, of: Model, devices: Any, pool: Pool) -> tuple[list[State], list[tuple[Task, Update]]]:
    """The server's state before the first turn and after each, and what was said in each."""
    recording = Recording(Local(Host(method, devices, compute, ClientStore(), "turns")))
    states = [drive(method.setup(method.init(of), pool), recording)]
    for _ in range(pool.rounds):
        states.append(drive(method.round(states[-1], pool), recording))
    return states, [(tasks[0], replies.updates[0]) for tasks, replies in recording.calls]


CUTS = {"layers": FedCyBGD(INNER), "halves": FedCyBGD(INNER, parts="halves"), "ends": FedCyBGD(INNER, ends=("embeddings", "output"))}


@pytest.mark.parametrize(
    ("cut", "kind"), [("layers", Serial), ("halves", Serial), ("ends", Serial), ("layers", Stacked), ("ends", Stacked)]
)
def test_a_cycle_is_block_after_block_of_the_librarys_model(cut: str, kind: Any) -> None:
    """Of layers two cycles, of halves and of layers and ends one: every block once, each weight in one, those of no block as they were."""
    of, due, parts = model(), by_hand(cut), blocks(cut)
    assert not library("llama").config.tie_word_embeddings and of.initial and not of.head
    states, said = turns(CUTS[cut], kind(of), of, lambda k: device(k, of), POOL)
    for t, (task, update) in enumerate(said):
        names = {of.parameters[n] for n in update.tensors}
        assert task.client == t % 2 and names == parts[t % len(parts)], "one block, exactly"
        now = {of.parameters[n]: tensor for n, tensor in states[t + 1].shared.items()}
        before = {of.parameters[n]: tensor for n, tensor in states[t].shared.items()}
        assert set(now) == set().union(*parts)
        for n, tensor in now.items():
            assert torch.equal(tensor, before[n]) == (n not in names), n
            torch.testing.assert_close(tensor, due[t + 1][n], atol=5e-5, rtol=0, msg=n)
    assert set().union(*parts) == (set(due[0]) - {"model.norm.weight"} if cut == "ends" else {n for n in due[0] if ".layers." in n})
    assert sum(map(len, parts)) == len(set().union(*parts))


@pytest.mark.parametrize("method", [FedCyBGD(INNER, ends=("embeddings", "norm")), FedCyBGD(INNER, parts="halves")], ids=["ends", "halves"])
def test_a_fresh_head_is_trained_in_every_turn_and_is_in_no_block(method: FedCyBGD) -> None:
    """Of a classifier, one whole cycle: up comes the turn's block and the head, and both have moved."""
    of, devices = families.of_kind("llama", "full"), tiny.clients((5, 9))
    cut = method.blocks(of.initial)
    states, said = turns(method, Serial(of), of, lambda k: replace(devices[k], private={}, memory={}), POOL)
    assert len(cut) == len(said) == 4 and of.head == {"score.weight"}
    trained = list[str]()
    for t, (task, update) in enumerate(said):
        assert of.head <= set(task.tensors) and of.head.isdisjoint(task.settings["block"])  # type: ignore[arg-type]
        assert set(update.tensors) == of.head.union(cut[t].names)
        assert all(torch.equal(task.tensors[n], states[t].shared[n]) for n in of.head)
        before, now = states[t].shared, states[t + 1].shared
        assert {n for n in now if not torch.equal(now[n], before[n])} == set(update.tensors)
        trained += set(update.tensors) - of.head
    assert len(trained) == len(set(trained)) and of.head.union(trained) == (set(of.initial) if method.ends else set(states[0].shared))


@pytest.mark.parametrize("kind", [Serial, Stacked])
def test_a_turn_in_16_bits_trains_float32_on_top_of_a_rest_in_16_bits(kind: Any) -> None:
    """Steps that 16 bits would lose move every number that has a gradient; the rest may as well have been rounded before, the block not.
    Every turn begins without moments."""
    of, method = model("bf16"), FedCyBGD(replace(INNER, lr=1e-5, weight_decay=0.0))
    kept = Kept(kind(of))
    states, said = turns(method, kept, of, lambda k: device(k, of), POOL)
    assert len(kept.fits) == POOL.rounds and all(fit.moments is None for fit in kept.fits)
    for (task, update), fit, state in zip(said, kept.fits, states, strict=False):
        for tensors in (task.tensors, fit.start, update.tensors, state.shared):
            assert {tensor.dtype for tensor in tensors.values()} == {torch.float32}
        moved = torch.cat([(update.tensors[n] - tensor).flatten() for n, tensor in fit.start.items()])
        assert ((moved != 0).float().mean() > 0.9) and moved.abs().max() < 5e-5
        rounded = {n: tensor.bfloat16().float() for n, tensor in fit.start.items()}
        assert sum(int((rounded[n] != tensor).sum()) for n, tensor in update.tensors.items()) > 0.9 * len(moved)
    last = kept.fits[-1]
    assert set(last.fixed) and not set(last.fixed) & set(last.start)
    (made,), (same,), (other,) = (
        kind(of).run([fit])
        for fit in (
            last,
            replace(last, fixed={n: tensor.bfloat16().float() for n, tensor in last.fixed.items()}),
            replace(last, start={n: tensor.bfloat16().float() for n, tensor in last.start.items()}),
        )
    )
    for n, tensor in made.result.tensors.items():
        assert torch.equal(tensor, said[-1][1].tensors[n]) and torch.equal(tensor, same.result.tensors[n])
    assert any(not torch.equal(tensor, other.result.tensors[n]) for n, tensor in made.result.tensors.items())
