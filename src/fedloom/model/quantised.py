"""Frozen linear layers in 8 or 4 bits: the base of QLoRA (2305.14314, eq. 5), by PyTorch's own operations and the wire's own codes.

    y = Q(W)·x + b − s·B0·(A0·x)        Q(W) = scale · code, a float32 scale for each 256 numbers of int8 and 64 of nf4 (``encodings.py``)

The last term is there where LoRA starts from singular vectors (``principal.py``): a frozen pair that takes out of the layer what the pair
that is trained brings at its start. So Q(W) is untouched, and the start is the function of the quantised model.

Q(W) is made for a product and gone after it: made once more in the backward pass, and never kept by autograd. What is held is 1 byte a
number and 1/64 for scales, or 1/2 and 1/16. The product is ``kernels.times``, so what a row becomes depends on that row alone. Its gradient
is a product of the same kind, to any order, and under ``torch.func.vmap`` the mapped rows are rows like others.

Held so are the linear layers of the transformer's layers of which nothing is trained: not embeddings, norms, biases, a pooler, a head, a
language model's output layer.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal, cast

import torch
from torch import nn
from torch.autograd import Function

from fedloom.encodings import Encoding, Few, coded, decoded
from fedloom.model.blocks import layer_of
from fedloom.model.kernels import times

Base = Literal["exact", "int8", "nf4"]
"""How a frozen base is held: its numbers as they are, or in 8 or 4 bits."""


class Quantised(nn.Module):
    """A frozen linear layer (or GPT-2's ``Conv1D``, which is one turned round) whose weight W (d_out, d_in) is held as codes and scales."""

    def __init__(self, layer: nn.Module, name: Few) -> None:
        """``layer`` loses its weight."""
        nn.Module.__init__(self)
        own: Any = layer
        self.turned = "nf" in vars(layer)
        self.name: Few = name
        weight = own.weight.detach().T if self.turned else own.weight.detach()
        self.shape = weight.shape
        codes, scales = coded(weight.float().reshape(-1), name)
        # no part of the state dict: what is done to a file's tensors (rounding to 16 bits) would destroy them
        for what, tensor in (("codes", codes), ("scales", scales), ("less_a", None), ("less_b", None)):
            self.register_buffer(what, tensor, persistent=False)
        self.scaling, self.bias = 0.0, own.bias
        own.weight, own.bias = nn.Parameter(torch.empty(0), False), None
        vars(self)["emptied"] = layer  # no part of the module, or it would be called and saved

    @property
    def held(self) -> list[torch.Tensor]:
        """The tensors that stand for the weight."""
        return [tensor for name, tensor in self.named_buffers() if name in ("codes", "scales", "less_a", "less_b")]

    @torch.no_grad()
    def weight(self) -> torch.Tensor:
        """Q(W), float32 (d_out, d_in); a new tensor."""
        return decoded(cast(torch.Tensor, self.codes), cast(torch.Tensor, self.scales), self.name, self.shape.numel()).view(self.shape)

    @torch.no_grad()
    def rest(self) -> torch.Tensor:
        """Q(W) − s·B0·A0, float32; Q(W) where nothing was taken out."""
        a, b = self.less_a, self.less_b
        return self.weight() if a is None else (self.weight().double() - self.scaling * b.double() @ a.double()).float()  # type: ignore[union-attr, operator]

    def take_out(self, a: torch.Tensor, b: torch.Tensor, scaling: float) -> None:
        """From here on s·B0·A0 is missing, and nothing else. ``a``: (r, d_in); ``b``: (d_out, r)."""
        at = cast(torch.Tensor, self.codes).device
        self.less_a, self.less_b, self.scaling = a.detach().to(at, copy=True), b.detach().to(at, copy=True), scaling

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(…, d_in) -> (…, d_out), in the precision of x."""
        made = cast(torch.Tensor, _Times.apply(x, self, False))
        return made if self.bias is None else made + self.bias

    def product(self, x: torch.Tensor, backwards: bool) -> torch.Tensor:
        """Rows x (N, d_in) times (Q(W) − s·B0·A0)ᵀ; ``backwards``: (N, d_out) times the same, not transposed."""
        weight = self.weight().to(x.dtype)
        made = times(x, weight.T if backwards else weight)
        if self.less_a is not None:
            a, b = (cast(torch.Tensor, t).to(x.dtype) for t in (self.less_a, self.less_b))
            first, second = (b.T, a.T) if backwards else (a, b)
            made -= self.scaling * times(times(x, first), second)
        return made

    def plain(self) -> nn.Module:
        """The layer as it was, with :meth:`rest` for its weight, on the processor."""
        made: Any = vars(self)["emptied"]
        rest = self.rest().cpu()
        made.weight = nn.Parameter((rest.T if self.turned else rest).contiguous(), False)
        made.bias = None if self.bias is None else nn.Parameter(self.bias.detach().float().cpu(), False)
        return made

    def extra_repr(self) -> str:
        """What tells two of them apart."""
        return f"{self.shape[1]}, {self.shape[0]}, {self.name}, bias={self.bias is not None}, less={self.less_a is not None}"


class _Times(Function):
    """``Quantised.product`` for x of any shape. Nothing is saved: the gradient needs the layer alone."""

    @staticmethod
    def forward(x: torch.Tensor, layer: Quantised, backwards: bool) -> torch.Tensor:
        rows = layer.product(x.reshape(-1, x.shape[-1]), backwards)
        return rows.view(*x.shape[:-1], rows.shape[-1])

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: torch.Tensor) -> None:
        _, ctx.layer, ctx.backwards = inputs

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor, None, None]:
        return cast(torch.Tensor, _Times.apply(gradient, ctx.layer, not ctx.backwards)), None, None

    @staticmethod
    def vmap(info: Any, in_dims: tuple[Any, ...], x: torch.Tensor, layer: Quantised, backwards: bool) -> tuple[torch.Tensor, int]:
        return cast(torch.Tensor, _Times.apply(x.movedim(in_dims[0], 0), layer, backwards)), 0


def quantise(module: nn.Module, name: Few) -> dict[str, Quantised]:
    """Hold the frozen linear layers of a module's transformer layers so, in place. Returns them by the names that their weights had.

    Raises:
        LookupError: there are none.
    """
    found = {n: part for n, part in module.named_modules() if _is_linear(part) and layer_of(f"{n}.") is not None}
    frozen = {n: part for n, part in found.items() if not any(p.requires_grad for p in part.parameters())}
    if not frozen:
        raise LookupError(
            f"no frozen linear layer within the transformer layers of {type(module).__name__}; of {len(found)} all are trained"
        )
    made = {}
    for n, layer in frozen.items():
        parent, _, last = n.rpartition(".")
        made[f"{n}.weight"] = Quantised(layer, name)
        setattr(module.get_submodule(parent), last, made[f"{n}.weight"])
    return made


def _is_linear(part: nn.Module) -> bool:
    return type(part) is nn.Linear or type(part).__name__ == "Conv1D"


def restore(module: nn.Module) -> None:
    """Put plain layers in place of the quantised ones, in place: the same function, in float32 on the processor."""
    for n, part in list(module.named_modules()):
        if isinstance(part, Quantised):
            parent, _, last = n.rpartition(".")
            setattr(module.get_submodule(parent), last, part.plain())


def numbers(module: nn.Module) -> int:
    """How many numbers a module is made of, in however many bits."""
    return sum(p.numel() for p in module.parameters()) + numbers_in_few(module)


def numbers_in_few(module: nn.Module) -> int:
    """How many of them are in 8 or 4 bits."""
    return sum(part.shape.numel() for part in module.modules() if isinstance(part, Quantised))


def size_of(count: int, base: Base) -> int:
    """Bytes of so many numbers of a base in 8 or 4 bits, with their scales.

    >>> size_of(4096, "int8"), size_of(4096, "nf4")
    (4160, 2304)
    """
    return Encoding(base).size(count)


def as_common(quantised: Mapping[str, Quantised]) -> dict[str, torch.Tensor]:
    """Codes and scales by name, by which two bases are compared; not what was taken out of them."""
    return {
        f"{n}.{what}": cast(torch.Tensor, tensor)
        for n, q in quantised.items()
        for what, tensor in (("codes", q.codes), ("scales", q.scales))
    }
