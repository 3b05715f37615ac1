"""Transformer layers of whose inside nothing is kept for the backward pass: gradient checkpointing, "Training Deep Nets with Sublinear
Memory Cost" (1604.06174), a layer a segment.

Of a layer that a gradient passes, what it was called with is kept and no more: its input, and the tensors that stood in it (in a functional
call they are not the module's own, and stand there only while it lasts). When the backward pass first asks for something of its inside, the
layer is computed a second time, with the same tensors and in the same modes (``modes.py``: masks of dropout, rows, owners), as far as the
last thing that is kept. The graph is that of the first time, so gradients are those without any of this, to the bit where products are.

Of a layer that no gradient passes (below what is trained) autograd keeps nothing, so it is computed once and its call is forgotten. Layers
that were called with key-value caches would write into them twice, so there are none meanwhile. Not under ``torch.func``, which knows no
hooks of saved tensors (PyTorch says so itself); and no gain where gradients are differentiated again, whose graph keeps everything.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.autograd.graph import saved_tensors_hooks
from torch.func import functional_call

from fedloom.model.modes import as_now
from fedloom.model.skipped import stack_of


class Recomputed:
    """The transformer layers of a module, to be computed again in the backward pass; the last ``but`` of them are not."""

    def __init__(self, module: nn.Module, depth: int, but: int = 0) -> None:
        """
        Raises:
            LookupError: the module has no list of ``depth`` layers.
        """
        self.stack, self.count = stack_of(module, depth), depth - but
        configs = {id(config): config for part in module.modules() if (config := vars(part).get("config")) is not None}
        self.caching = [config for config in configs.values() if "use_cache" in vars(config)]

    @contextmanager
    def forward(self) -> Iterator[None]:
        """Inside, a call of the module keeps of its layers' insides nothing. The backward pass may come later, outside."""
        layers, cached = [_Inside(layer) for layer in list(self.stack)[: self.count]], [config.use_cache for config in self.caching]
        try:
            for config in self.caching:
                config.use_cache = False
            for inside in layers:
                vars(inside.layer)["forward"] = partial(_called, inside)  # what hangs on a layer's end stays outside
            yield
        finally:
            for inside in layers:
                vars(inside.layer).pop("forward", None)
            for config, before in zip(self.caching, cached, strict=True):
                config.use_cache = before


class _Inside(nn.Module):
    """A layer's own forward pass, without what hangs on its beginning and its end."""

    def __init__(self, layer: nn.Module) -> None:
        nn.Module.__init__(self)
        self.layer, self.forward = layer, layer.forward


class _Enough(Exception):
    """All that was kept the first time is there again."""


class _Call:
    """One call of a layer. Whatever autograd would keep of its inside is a number instead, by which it is found when that is computed
    again."""

    def __init__(self, inside: _Inside, args: Sequence[Any], kwargs: Mapping[str, Any]) -> None:
        named = (*inside.named_parameters(remove_duplicate=False), *inside.named_buffers(remove_duplicate=False))
        self.inside, self.args, self.kwargs, self.own, self.modes = inside, tuple(args), dict(kwargs), dict(named), as_now()
        self.forms: list[tuple[torch.Size, torch.dtype]] = []
        self.again: dict[int, torch.Tensor] = {}

    def first(self) -> Any:
        """What the layer makes of its input."""
        with saved_tensors_hooks(self._number, self._found):
            return self.inside.forward(*self.args, **self.kwargs)

    def _number(self, tensor: torch.Tensor) -> int:
        self.forms.append((tensor.shape, tensor.dtype))
        return len(self.forms) - 1

    def _found(self, number: int) -> torch.Tensor:
        if number not in self.again:
            self._second()
        return self.again.pop(number)

    def _second(self) -> None:
        """Compute it again, as far as the last tensor that was kept.

        Raises:
            RuntimeError: it is not what it was.
        """
        made: dict[int, torch.Tensor] = {}

        def keep(tensor: torch.Tensor) -> int:
            if (form := (tensor.shape, tensor.dtype)) != self.forms[len(made)]:
                raise RuntimeError(f"{self._name} made {form} at its second computation where it had made {self.forms[len(made)]}")
            made[len(made)] = tensor.detach()
            if len(made) == len(self.forms):
                raise _Enough
            return len(made) - 1

        try:
            with ExitStack() as modes, torch.enable_grad(), saved_tensors_hooks(keep, made.__getitem__):
                for mode in self.modes:
                    modes.enter_context(copy.copy(mode))  # it may be asked for once more
                functional_call(self.inside, self.own, self.args, self.kwargs, tie_weights=False)
        except _Enough:
            self.again = made
            return
        raise RuntimeError(f"{self._name} kept {len(made)} tensors at its second computation and {len(self.forms)} at its first")

    @property
    def _name(self) -> str:
        return f"a {type(self.inside.layer).__name__}"


def _called(inside: _Inside, *args: Any, **kwargs: Any) -> Any:
    return _Call(inside, args, kwargs).first()
