"""Aggregation that some devices may lie to: what the server makes of n updates of which it takes f to be anything at all.

f = ⌊share·n⌋ of the n that were asked. x_k is device k's vector, w what was sent to it (zero where nothing was), Δ_k = x_k − w.

    mean               Σ_k p_k x_k, p_k = n_k/Σ n_j: one device is enough to take it anywhere         FedAvg, 1602.05629
    median             each number's median over the devices; of an even many, the middle two's mean   1803.01498, definition 1
    trimmed            each number's mean without the f largest and the f smallest                     1803.01498, definition 2
    krum               the x_k with the least Σ ‖x_k − x_j‖² over its n − f − 2 nearest j               1703.02757, section 3
    multi-krum         the mean of the n − f best by the same sum                                      1703.02757, section 5
    geometric-median   argmin_z Σ_k ‖z − x_k‖, by Weiszfeld's steps                                     RFA 1912.13445, algorithm 2
    clip               w + (1/n) Σ_k Δ_k·min(1, c/‖Δ_k‖), c the median of all ‖Δ_k‖                      1911.07963; c as in 2101.02281

Only the mean believes what a device says of its own size; under every other rule all devices count alike, for a device that claims a
million examples must not count a million times. Each rule needs enough devices for f to be outvoted: n ≥ 2f + 1, for Krum n ≥ 2f + 3.

Tensors that the same devices have sent are one vector; those that fewer have sent are another, and the rule goes over each by itself.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Protocol

import torch

from fedloom.messages import CohortFailed, Tensors, Update
from fedloom.server.aggregation import Average

SHARE = 0.25
"""The share of devices that are taken to be hostile, where none is given."""

STEPS, SMOOTHING = 100, 1e-6
"""Weiszfeld's steps at most, and ν, the least distance that is divided by (RFA, algorithm 2)."""

Coordinates = Callable[[torch.Tensor, int], torch.Tensor]
"""(n, d) in float64, one row a device, and f, to (d,)."""

Weights = Callable[[torch.Tensor, int], torch.Tensor]
"""G = ΔΔᵀ (n, n) in float64, and f, to a_k (n,): the aggregate is w + Σ_k a_k Δ_k."""


class Averaging(Protocol):
    """What a method makes its next tensors with: ``mean = pool.average(sent)``, ``yield Asking(tasks, mean.take)``, ``mean.value()``."""

    def take(self, update: Update) -> Update:
        """Take an update in; what is kept of it has no tensors."""
        ...

    def value(self) -> dict[str, torch.Tensor]:
        """The aggregate of all that was taken in."""
        ...


# ---- the rules ------------------------------------------------------------------------------------------------------------------


def median(rows: torch.Tensor, f: int) -> torch.Tensor:
    """Coordinate-wise median."""
    ordered, n = rows.sort(dim=0).values, len(rows)
    return (ordered[(n - 1) // 2] + ordered[n // 2]) / 2


def trimmed(rows: torch.Tensor, f: int) -> torch.Tensor:
    """Coordinate-wise mean of all but the f largest and the f smallest."""
    return rows.sort(dim=0).values[f : len(rows) - f].mean(dim=0)


def krum_scores(gram: torch.Tensor, f: int) -> torch.Tensor:
    """(n,): Σ of the squared distances to each one's n − f − 2 nearest others."""
    n, squares = len(gram), gram.diagonal()
    apart = (squares[:, None] + squares[None, :] - 2 * gram).clamp(min=0)
    apart.fill_diagonal_(math.inf)
    return apart.sort(dim=1).values[:, : n - f - 2].sum(dim=1)


def krum(gram: torch.Tensor, f: int) -> torch.Tensor:
    """All weight on the best by :func:`krum_scores`, the first of equals."""
    return _alike(gram, krum_scores(gram, f).sort(stable=True).indices[:1])


def multi_krum(gram: torch.Tensor, f: int) -> torch.Tensor:
    """The same weight for each of the n − f best."""
    return _alike(gram, krum_scores(gram, f).sort(stable=True).indices[: len(gram) - f])


def geometric_median(gram: torch.Tensor, f: int) -> torch.Tensor:
    """Weights a with Σ a_k = 1 of the point with the least sum of distances: a_k ∝ 1/max(ν, ‖z − x_k‖), z = Σ a_k x_k, again and again."""
    squares = gram.diagonal()
    weights = torch.full_like(squares, 1 / len(gram))
    smallest = SMOOTHING * max(float(squares.sqrt().median()), 1e-30)
    for _ in range(STEPS):
        apart = (weights @ gram @ weights - 2 * gram @ weights + squares).clamp(min=0).sqrt()
        inverse = 1 / apart.clamp(min=smallest)
        last, weights = weights, inverse / inverse.sum()
        if float((weights - last).abs().max()) < 1e-12:
            break
    return weights


def clip(gram: torch.Tensor, f: int) -> torch.Tensor:
    """min(1, c/‖Δ_k‖)/n with the median norm c."""
    norms = gram.diagonal().sqrt()
    bound = median(norms[:, None], f)
    return torch.where(norms > bound, bound / norms.clamp(min=1e-300), torch.ones_like(norms)) / len(gram)


def _alike(gram: torch.Tensor, chosen: torch.Tensor) -> torch.Tensor:
    weights = torch.zeros_like(gram.diagonal())
    weights[chosen] = 1 / len(chosen)
    return weights


BY_COORDINATE: dict[str, Coordinates] = {"median": median, "trimmed": trimmed}
BY_WEIGHT: dict[str, Weights] = {"krum": krum, "multi-krum": multi_krum, "geometric-median": geometric_median, "clip": clip}
MEAN = "mean"
RULES = (MEAN, *BY_COORDINATE, *BY_WEIGHT)


# ---- a rule as an experiment chooses it -----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Aggregation:
    """A rule of aggregation by its name, and the share of the devices that are taken to be hostile."""

    name: str = MEAN
    share: float = SHARE

    @staticmethod
    def of(text: str) -> Aggregation:
        """``NAME`` or ``NAME:SHARE``.

        Raises:
            ValueError: no such rule, or a share that no rule withstands.
        """
        name, colon, share = text.partition(":")
        if name not in RULES:
            raise ValueError(f"no aggregation '{name}'; there are {', '.join(RULES)}")
        try:
            given = float(share) if colon else SHARE
        except ValueError:
            given = math.nan
        if not 0 < given < 0.5:
            raise ValueError(f"'{text}': the share of hostile devices must be a number above 0 and below 0.5, such as {name}:{SHARE}")
        if name == MEAN and colon:
            raise ValueError(f"'{text}': the mean withstands nobody, and takes no share")
        return Aggregation(name, given)

    def hostile(self, asked: int) -> int:
        """f of so many."""
        return math.floor(self.share * asked + 1e-9)

    def needed(self, asked: int) -> int:
        """How many of so many must answer for the rule to hold."""
        if self.name == MEAN:
            return 1
        return 2 * self.hostile(asked) + (3 if self.name.endswith("krum") else 1)

    def insist_on(self, cohort: int) -> None:
        """Insist that it means something for cohorts of this size.

        Raises:
            ValueError: it would protect from nobody, or could never be computed.
        """
        f = self.hostile(cohort)
        if self.name != MEAN and not (f and cohort >= self.needed(cohort)):
            enough = next(n for n in range(1, 10**6) if self.hostile(n) and n >= self.needed(n))
            raise ValueError(
                f"aggregation '{self.name}' takes {f} of {cohort} devices to be hostile and needs {self.needed(cohort)} to outvote them; "
                f"with a share of {self.share:g} it wants a cohort of {enough} or more"
            )

    def averaging(self, sent: Tensors, asked: int) -> Averaging:
        """An empty one, for updates of about ``asked`` devices that were ``sent`` these tensors."""
        return Average() if self.name == MEAN else Robust(self, sent, asked)


class Robust:
    """Keeps all updates of a round, for every rule but the mean has to see them together.

    In memory are all of them once, and a tensor of each in float64.
    """

    def __init__(self, rule: Aggregation, sent: Tensors, asked: int) -> None:
        self.rule, self.sent, self.asked = rule, sent, asked
        self._came: list[Tensors] = []

    def take(self, update: Update) -> Update:
        """Keep its tensors; what is left of it has none."""
        self._came.append(update.tensors)
        return replace(update, tensors={})

    def value(self) -> dict[str, torch.Tensor]:
        """The aggregate, each tensor in the dtype in which it came.

        Raises:
            CohortFailed: too few sent a tensor for the rule to hold.
            ValueError: nobody sent anything, or shapes differ.
        """
        if not self._came:
            raise ValueError("nothing to aggregate: no updates")
        made: dict[str, torch.Tensor] = {}
        for names, rows in self._groups():
            asked = max(self.asked, len(rows))
            if len(rows) < self.rule.needed(asked):
                raise CohortFailed((), len(rows), self.rule.needed(asked))
            made |= self._aggregated(names, rows, self.rule.hostile(asked))
        return dict(sorted(made.items()))

    def _groups(self) -> list[tuple[list[str], list[Tensors]]]:
        """Names that the same devices sent, and what those sent."""
        senders: dict[str, list[int]] = {}
        for k, tensors in enumerate(self._came):
            for name in tensors:
                senders.setdefault(name, []).append(k)
        groups: dict[tuple[int, ...], list[str]] = {}
        for name, who in sorted(senders.items()):
            groups.setdefault(tuple(who), []).append(name)
        return [(names, [self._came[k] for k in who]) for who, names in groups.items()]

    @torch.no_grad()
    def _aggregated(self, names: Sequence[str], rows: Sequence[Tensors], f: int) -> dict[str, torch.Tensor]:
        if self.rule.name in BY_COORDINATE:
            rule = BY_COORDINATE[self.rule.name]
            return {name: self._shaped(name, rule(self._changes(name, rows), f), rows) for name in names}
        gram = torch.zeros(len(rows), len(rows), dtype=torch.float64)
        for name in names:
            changes = self._changes(name, rows)
            gram += (changes @ changes.T).cpu()
        weights = BY_WEIGHT[self.rule.name](gram, f)
        return {
            name: self._shaped(name, (weights.to(changes.device)[:, None] * changes).sum(0), rows)
            for name in names
            for changes in [self._changes(name, rows)]
        }

    def _changes(self, name: str, rows: Sequence[Tensors]) -> torch.Tensor:
        """Δ (n, d) of one tensor in float64."""
        shapes = {tuple(row[name].shape) for row in rows}
        if len(shapes) > 1:
            raise ValueError(
                f"tensor '{name}' came in several shapes, {sorted(shapes)}; this method's devices send what no rule can compare"
            )
        came = torch.stack([row[name].double().reshape(-1) for row in rows])
        return came - self._reference(name).to(came.device) if name in self.sent else came

    def _reference(self, name: str) -> torch.Tensor:
        return self.sent[name].double().reshape(-1)

    def _shaped(self, name: str, change: torch.Tensor, rows: Sequence[Tensors]) -> torch.Tensor:
        like = rows[0][name]
        value = change + self._reference(name).to(change.device) if name in self.sent else change
        return value.view(like.shape).to(like.dtype)
