"""FedProx (Federated Optimization in Heterogeneous Networks, 1812.06127) on what the adapter trains and the task head.

    w^k   <- AdamW on device k from w_t on F_k(w) + (μ/2)·‖w − w_t‖²
    w_t+1 <- Σ_{k in S_t} p_k w^k,   p_k = n_k / Σ_{j in S_t} n_j

The term is local training's (``prox`` in ``fedavg.py``), so every method that trains as FedAvg does takes it: ``--method.inner.prox``. This
one is ``lora`` with μ > 0. Where a device keeps parts to itself (heads, B's, layers) these have no w_t: the term is over what was sent.

Deviations: AdamW, fresh at each participation, where the paper allows any solver; every device does all of its epochs, and the gradient
that is clipped is the whole sum's.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from fedloom.methods.fedavg import FedAvg


@dataclass(frozen=True)
class FedProx(FedAvg):
    """FedProx. Attributes as FedAvg's; ``prox`` is μ."""

    name: ClassVar[str] = "fedprox"
    paper: ClassVar[str] = "FedProx 1812.06127"
    joins_late: ClassVar[bool] = True

    prox: float = 0.1
