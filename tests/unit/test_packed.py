"""A packed pass' linear layers, called as a module calls them: the owner's own weight, the owner's own bias, or both frozen."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional

from fedloom.model.kernels import Owners
from fedloom.model.passes import Layout, Pass, Unpackable, Weights
from fedloom.model.texts import Texts

ROWS = np.array([2, 0, 3])
TEXTS = Texts(*(torch.zeros(6, dtype=torch.int64),) * 4, np.array([6]), np.array([0]), np.array([0]))


def called(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, weights: Weights | None = None) -> torch.Tensor:
    """``functional.linear`` inside a pass of three owners with 2, 0 and 3 rows and one row of nobody."""
    owners = Owners(ROWS, 6, torch.device("cpu"))
    with Pass(Layout(TEXTS, False, {6: owners}), {} if weights is None else weights, 0.0, {}):
        return functional.linear(x, weight, bias)


@pytest.mark.parametrize("own_weight", [True, False])
@pytest.mark.parametrize("own_bias", [True, False, None])
def test_every_row_meets_what_is_its_owners_and_what_is_frozen(own_weight: bool, own_bias: bool | None) -> None:
    generator = torch.Generator().manual_seed(1)
    x, of = torch.randn(6, 4, generator=generator), torch.tensor([0, 0, 2, 2, 2])
    kept = nn.Parameter(torch.randn(5, 4, generator=generator), requires_grad=False)
    weight = torch.randn(3, 5, 4, generator=generator) if own_weight else kept
    bias = None if own_bias is None else torch.randn(*((3, 5) if own_bias else (5,)), generator=generator)
    weights: Weights = {}
    made = called(x[None], weight, bias, weights)
    due = torch.stack([x[i] @ (weight[k] if own_weight else weight).T for i, k in enumerate(of)])
    if bias is not None:
        due = due + (bias[of] if own_bias else bias)
    assert made.shape == (1, 6, 5)
    assert torch.allclose(made[0, :5], due, atol=1e-6)
    assert len(weights) <= int(not own_weight)


def test_a_layer_that_sees_other_rows_is_refused_by_name() -> None:
    with pytest.raises(Unpackable, match=r"a trained linear layer saw 4 rows; rows of tokens or texts are \[6\]"):
        called(torch.zeros(4, 4), torch.zeros(3, 5, 4), None)
