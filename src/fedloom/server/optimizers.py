"""Server optimisers: what the server does with a round's mean besides taking it over.

Adaptive Federated Optimization (2003.00295, ICLR 2021) treats Δ_t = Σ_k p_k (w^k − w_t) as the negative of a gradient, elementwise:

    m_t = β₁ m_{t−1} + (1 − β₁) Δ_t
    adagrad   v_t = v_{t−1} + Δ_t²
    yogi      v_t = v_{t−1} − (1 − β₂) Δ_t² sign(v_{t−1} − Δ_t²)
    adam      v_t = β₂ v_{t−1} + (1 − β₂) Δ_t²
    w_{t+1} = w_t + η m_t / (√v_t + τ)                          m_{−1} = 0, v_{−1} = τ²; no correction of the start

FedAvgM (1909.06335) accumulates instead, and divides by nothing:

    momentum  m_t = β₁ m_{t−1} + Δ_t,    w_{t+1} = w_t + η m_t
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch

from fedloom.messages import Tensors
from fedloom.tensors import same_names

Rule = Literal["momentum", "adagrad", "yogi", "adam"]


@dataclass(frozen=True)
class ServerOptimizer:
    """One of the rules above, with η = ``lr``, β₁ and β₂ = ``betas``, τ = ``tau``.

    Raises:
        ValueError: an unknown rule, or a number out of its range.
    """

    rule: Rule
    lr: float
    betas: tuple[float, float]
    tau: float

    def __post_init__(self) -> None:
        known = Rule.__args__  # type: ignore[attr-defined]
        if self.rule not in known:
            raise ValueError(f"no server optimiser '{self.rule}'; there are {', '.join(known)}")
        if not (self.lr > 0 and self.tau > 0 and all(0 <= beta < 1 for beta in self.betas)):
            raise ValueError(
                f"a server optimiser needs lr > 0, tau > 0 and betas in [0, 1); got lr {self.lr}, tau {self.tau}, {self.betas}"
            )

    def start(self, shared: Tensors) -> dict[str, torch.Tensor]:
        """The moments before the first round, by ``m/NAME`` and, where the rule has them, ``v/NAME``."""
        first = {f"m/{name}": torch.zeros_like(tensor) for name, tensor in shared.items()}
        if self.rule == "momentum":
            return first
        return {**first, **{f"v/{name}": torch.full_like(tensor, self.tau**2) for name, tensor in shared.items()}}

    def step(self, shared: Tensors, mean: Tensors, moments: Tensors) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
        """w_{t+1} and the moments after it, from w_t = ``shared`` and the round's Σ_k p_k w^k = ``mean``. Computed in float64.

        Raises:
            ValueError: ``mean`` is not named and shaped as ``shared``.
        """
        same_names(shared, mean)
        (beta1, beta2), now, kept = self.betas, {}, {}
        for name, tensor in shared.items():
            delta = mean[name].double() - tensor.double()
            m, square = moments[f"m/{name}"].double(), delta.square()
            if self.rule == "momentum":
                m = beta1 * m + delta
                move = m
            else:
                m = beta1 * m + (1 - beta1) * delta
                v = moments[f"v/{name}"].double()
                match self.rule:
                    case "adagrad":
                        v = v + square
                    case "yogi":
                        v = v - (1 - beta2) * square * torch.sign(v - square)
                    case "adam":
                        v = beta2 * v + (1 - beta2) * square
                kept[f"v/{name}"] = v.to(tensor.dtype)
                move = m / (v.sqrt() + self.tau)
            kept[f"m/{name}"] = m.to(tensor.dtype)
            now[name] = (tensor.double() + self.lr * move).to(tensor.dtype)
        return now, kept
