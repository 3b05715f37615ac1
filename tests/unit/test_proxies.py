"""What stands for a rest that goes down smaller, and back: by hand, and what is no such thing."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from fedloom.encodings import Encoding
from fedloom.messages import Task
from fedloom.model.proxies import bytes_of, restored, smaller
from fedloom.tensors import nbytes
from fedloom.wire import WireError

EXACT = Encoding()
REST = {
    "b.weight": torch.tensor([[0.5, -3.0, 0.5], [2.0, 0.1, -0.5]]),
    "b.bias": torch.tensor([0.1, 0.2, 9.0]),
    "a.weight": torch.tensor([[1.0]]),
}


def sent(prune: float, encoding: Encoding = EXACT) -> Task:
    pieces, told = smaller(REST, prune, encoding)
    return Task("train", 0, {"head": torch.ones(1), **pieces}, {"round": 3, **told})


def test_the_smallest_become_zero_and_vectors_stay() -> None:
    """Half of six: 0.1, and of the three that are 0.5 in size the two that come first. Half of one number is none of it."""
    task = sent(0.5)
    back = restored(task, EXACT)
    assert back["b.weight"].tolist() == [[0.0, -3.0, 0.0], [2.0, 0.0, -0.5]]
    assert torch.equal(back["b.bias"], REST["b.bias"]) and torch.equal(back["a.weight"], REST["a.weight"])
    assert set(back) == {"head", *REST} and torch.equal(back["head"], torch.ones(1))
    assert task.tensors["rest/b.weight/where"].tolist() == [0b01010100], "-3, 2 and -0.5 are left"
    assert nbytes(task.tensors) - 4 == 4 * (3 + 3 + 1) + 1 + 1 == bytes_of(REST, 0.5, EXACT)


@pytest.mark.parametrize("name", ["exact", "bf16", "fp16", "int8", "nf4"])
@pytest.mark.parametrize("prune", [0.0, 0.5])
def test_bytes_are_as_predicted(name: str, prune: float) -> None:
    generator = torch.Generator().manual_seed(1)
    rest = {"w": torch.randn(37, 11, generator=generator), "v": torch.randn(13, generator=generator)}
    pieces, told = smaller(rest, prune, Encoding(name))
    assert nbytes(pieces) == bytes_of(rest, prune, Encoding(name))
    back = restored(Task("train", 0, pieces, told), Encoding(name))
    near = {"exact": 0.0, "bf16": 0.02, "fp16": 2e-3, "int8": 0.02, "nf4": 0.5}[name]
    assert {n: t.shape for n, t in back.items()} == {n: t.shape for n, t in rest.items()}
    assert float((back["v"] - rest["v"]).abs().max()) <= near
    assert round(float((back["w"] == 0).float().sum())) >= round(prune * 407)


def test_what_is_no_such_thing_is_refused() -> None:
    task = sent(0.5)
    for wrong, match in (
        (
            replace(task, tensors={n: t for n, t in task.tensors.items() if not n.endswith("/where")}),
            "without its numbers, or without a bit",
        ),
        (replace(task, tensors={**task.tensors, "rest/b.weight/left": torch.ones(5)}), "5 numbers for 3 places"),
        (replace(task, settings={**task.settings, "rest/pruned/sizes": [2]}), "pruned tensors of 2 ranks with 1 sizes"),
    ):
        with pytest.raises(WireError, match=match):
            restored(wrong, EXACT)
