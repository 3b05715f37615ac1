"""FedAvg of something else than LoRA: what FeDeRA's paper (2404.18848) and others compare with, beside ``lora`` (their FedLR).

    w_t+1 <- Σ_{k in S_t} p_k w^k,   p_k = n_k / Σ_{j in S_t} n_j        w: what the kind of adapter trains, and the task head

The method is ``fedavg.py``'s to the letter; only what is trained differs, and with it the learning rate to start from.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from fedloom.methods.fedavg import FedAvg


@dataclass(frozen=True)
class FedFFT(FedAvg):
    """Full fine-tuning: every weight is trained and sent. Attributes as FedAvg's."""

    name: ClassVar[str] = "fedfft"
    paper: ClassVar[str] = "FedAvg 1602.05629 of all weights; FedFFT in FeDeRA 2404.18848"
    joins_late: ClassVar[bool] = True
    adapter_kind: ClassVar[str] = "full"

    lr: float = 2e-4


@dataclass(frozen=True)
class FedBF(FedAvg):
    """BitFit: the biases alone. Attributes as FedAvg's."""

    name: ClassVar[str] = "fedbf"
    paper: ClassVar[str] = "BitFit 2106.10199 in FedAvg 1602.05629; FedBF in FeDeRA 2404.18848"
    joins_late: ClassVar[bool] = True
    adapter_kind: ClassVar[str] = "bitfit"


@dataclass(frozen=True)
class FedAP(FedAvg):
    """Bottleneck adapters of Houlsby's places (``--adapter.kind pfeiffer``: of Pfeiffer's). Attributes as FedAvg's."""

    name: ClassVar[str] = "fedap"
    paper: ClassVar[str] = "Houlsby 1902.00751 in FedAvg 1602.05629; FedAP in FeDeRA 2404.18848"
    joins_late: ClassVar[bool] = True
    adapter_kind: ClassVar[str] = "houlsby"
