"""Server optimisers: what the server does with a round's mean besides taking it over.

Adaptive Federated Optimization (2003.00295, ICLR 2021) treats Δ_t = Σ_k p_k (w^k − w_t) as the negative of a gradient, elementwise:

    m_t = β₁ m_{t−1} + (1 − β₁) Δ_t
    adagrad   v_t = v_{t−1} + Δ_t²
    yogi      v_t = v_{t−1} − (1 − β₂) Δ_t² sign(v_{t−1} − Δ_t²)
    adam      v_t = β₂ v_{t−1} + (1 − β₂) Δ_t²
    w_{t+1} = w_t + η m_t / (√v_t + τ)                          m_{−1} = 0, v_{−1} = τ²; no correction of the start

FedAvgM (1909.06335) accumulates instead, and divides by nothing:

    momentum  m_t = β₁ m_{t−1} + Δ_t,    w_{t+1} = w_t + η m_t

:class:`ServerStep` is a rule as an experiment chooses it, over any method whose server aggregates tensor by tensor (``Pool.average``): w_t
is what the method says that the devices started from, the mean is whatever the rule of aggregation makes of the round. Moments go by a
tensor's name. A tensor that was not aggregated in a round keeps its value and its moments; one that is no longer sent loses them, and one
that is new begins with those of the start.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Literal

import torch

from fedloom.messages import Tensors, Update
from fedloom.server.robust import Averaging
from fedloom.tensors import only, same_names

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


@dataclass(frozen=True)
class ServerStep:
    """What the server does with a round's aggregate.

    Attributes:
        rule: none, the aggregate is the new model; or a step towards it: momentum (FedAvgM), adagrad, yogi, adam.
        lr: η of the step; the default is for the adaptive rules, and FedAvgM's (momentum) is usually 1.
        beta1: momentum β₁.
        beta2: memory β₂ of the squares (yogi, adam).
        tau: τ, which bounds how adaptive the step is (adagrad, yogi, adam).
    """

    rule: Literal["none", "momentum", "adagrad", "yogi", "adam"] = "none"
    lr: float = 0.01
    beta1: float = 0.9
    beta2: float = 0.99
    tau: float = 0.001

    def __post_init__(self) -> None:
        given = [f"{f.name} {getattr(self, f.name)}" for f in fields(self) if getattr(self, f.name) != f.default]
        if self.rule == "none" and given:
            raise ValueError(f"{given[0]} is a server optimiser's, and the rule is none; give one of {', '.join(Rule.__args__)} too")  # type: ignore[attr-defined]
        _ = self.optimizer

    @property
    def optimizer(self) -> ServerOptimizer | None:
        """The rule with its numbers; None: no step."""
        return None if self.rule == "none" else ServerOptimizer(self.rule, self.lr, (self.beta1, self.beta2), self.tau)


class Steps:
    """The steps of one round, and the moments after it."""

    def __init__(self, optimizer: ServerOptimizer, moments: Tensors) -> None:
        self.optimizer, self._before = optimizer, moments
        self._after = dict[str, torch.Tensor]()

    def towards(self, mean: Averaging, sent: Tensors) -> Averaging:
        """The step from ``sent`` towards what ``mean`` comes to."""
        return _Stepping(self, mean, sent)

    def take(self, sent: Tensors, mean: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """``mean`` with the tensors that are of ``sent`` replaced by the step there. Moments of what is not in ``mean`` stay."""
        there = [name for name in mean if name in sent]
        start, came = only(sent, there), only(mean, there)
        moments = {**self.optimizer.start(sent), **{n: t for n, t in self._before.items() if n.split("/", 1)[1] in sent}}
        now, kept = self.optimizer.step(start, came, moments)
        self._after |= {**moments, **kept}
        return {**mean, **now}

    def moments(self) -> dict[str, torch.Tensor]:
        """By ``m/NAME`` and ``v/NAME``; those from before the round if nothing was aggregated."""
        return dict(sorted((self._after or dict(self._before)).items()))


class _Stepping:
    def __init__(self, steps: Steps, mean: Averaging, sent: Tensors) -> None:
        self.steps, self.mean, self.sent = steps, mean, sent

    def take(self, update: Update) -> Update:
        """Take an update in."""
        return self.mean.take(update)

    def value(self) -> dict[str, torch.Tensor]:
        """Where the step leads."""
        return self.steps.take(self.sent, self.mean.value())
