"""What LoRA's pairs stand on in a model: the frozen weights W under them, which a method may exchange, or take a start out of.

Weights come and go by saved name as float32 (d_out, d_in), however a module keeps them. What is held in few bits stays as it is.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import nn

from fedloom.messages import Tensors
from fedloom.model.adapters import Beneath
from fedloom.model.names import is_down, partner, under
from fedloom.model.quantised import Quantised
from fedloom.tensors import fingerprint


@dataclass
class Ground:
    """``beneath``: which weights those are. ``quantised``: what is held in 8 or 4 bits, by the names of the weights. ``now``: what lies in
    the places of the model's own, and ``stands_on``, its fingerprint; nothing where they are the model's own."""

    beneath: Beneath = field(default_factory=Beneath)
    quantised: dict[str, Quantised] = field(default_factory=dict)
    now: Tensors = field(default_factory=dict)
    stands_on: str = ""
    _own: dict[str, torch.Tensor] = field(default_factory=dict)

    def weights(self, module: nn.Module) -> dict[str, torch.Tensor]:
        """The model's own, whatever lies in their places now; copies."""
        if self.quantised:
            return {n: self.quantised[n].rest().cpu() for n in self.beneath.names}
        self.remember(module)
        return {n: self.turned(n, t).clone() for n, t in self._own.items()}

    def remember(self, module: nn.Module) -> None:
        """Keep the model's own, which are to be written over or left out."""
        if not self._own and not self.quantised:
            own = dict(module.named_parameters())
            self._own = {n: own[n].detach().float().cpu().clone() for n in self.beneath.names}

    def put(self, weights: Tensors, *modules: nn.Module) -> None:
        """Put these in the places of the model's own in all its modules, of which the first has them exactly; where there are none, its own
        again."""
        wanted = fingerprint(weights) if weights else ""
        if wanted == self.stands_on:
            return
        self.remember(modules[0])
        self.stands_on, self.now = wanted, weights
        for module in {id(m): m for m in modules}.values():
            self._lay(module)

    def lay(self, module: nn.Module) -> None:
        """Have a copy of a module, which rounded what lies there, stand on it in its own precision."""
        if self.stands_on:
            self._lay(module)

    @torch.no_grad()
    def _lay(self, module: nn.Module) -> None:
        own = dict(module.named_parameters())
        for n, original in self._own.items():
            own[n].copy_(self.turned(n, self.now[n]) if n in self.now else original)

    @torch.no_grad()
    def begin_at(self, pairs: Tensors, before: Tensors, own: Tensors) -> None:
        """W_res = W0 − s·B0·A0 with these A0 and B0 in place of those ``before``, whose W_res lies in ``own``, a module's parameters."""
        for a in filter(is_down, pairs):
            b, name = partner(a), under(a)
            if name in self.quantised:
                self.quantised[name].take_out(pairs[a], pairs[b], self.beneath.scaling)
            else:
                old, new = (at[b].double() @ at[a].double() for at in (before, pairs))
                change = (self.beneath.scaling * (old - new)).to(own[name].device)
                own[name].copy_(own[name].double() + self.turned(name, change))
        self._own = {}

    def turned(self, name: str, weight: torch.Tensor) -> torch.Tensor:
        """From (d_out, d_in) to as the module keeps it, and back."""
        return weight.transpose(-1, -2) if name in self.beneath.transposed else weight
