"""What a comparison runs: methods × data sets × α × seeds, and the search for each one's learning rate.

The search, the same for every method: for each (method, data, α) every rate is run with the **first seed**; the one whose *final* round has
the highest *personalised validation* score (the first named of equals) is used with all seeds. A rate whose training diverges cannot win.
The test split has no part in it. Which runs follow thus depends on how others end: :meth:`Plan.wanted` is a pure function of that.

This module runs nothing and reads no file.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from fedloom.methods.method import says
from fedloom.run.errors import ExperimentError
from fedloom.run.experiment import Experiment, as_json
from fedloom.run.reading import full_name
from fedloom.run.recipes import with_learning_rate


@dataclass(frozen=True)
class Case:
    """A data set at one α: what methods are compared on."""

    data: str
    alpha: float


@dataclass(frozen=True)
class Run:
    """One run by name; ``trained`` is the name of the run whose training it takes over ("": it trains itself), ``method`` what the
    comparison calls its method: several may be variants of one class."""

    name: str
    experiment: Experiment
    trained: str = ""
    method: str = ""


@dataclass(frozen=True)
class Ended:
    """How a run ended: with results, or with a paragraph that says why not. ``diverged``: its numbers stopped being finite."""

    results: Mapping[str, Any] | None
    failure: str = ""
    diverged: bool = False

    @property
    def settled(self) -> bool:
        """Whether running it again could not change how it ends."""
        return self.results is not None or self.diverged


@dataclass(frozen=True)
class Search:
    """A search: validation score by rate (None: diverged, or not known), and what came of it. ``rate`` None: the method's own."""

    tried: Mapping[float | None, float | None]
    made: bool = False
    rate: float | None = None


@dataclass(frozen=True)
class Plan:
    """A comparison.

    Attributes:
        base: every other setting; its method, data, α and seed are not looked at.
        methods: what is compared, by name; the first is the reference unless another is named.
        data: data sets, as ``--data`` takes them.
        alphas: Dirichlet concentrations.
        seeds: the first is the one that rates are searched with.
        rates: learning rates to choose from (none: each method's own; one: that one).
        shared: evaluate methods that train as the one they hold (:func:`trains_as`) on what that one trained.
    """

    base: Experiment
    methods: Mapping[str, Any]
    data: tuple[str, ...]
    alphas: tuple[float, ...]
    seeds: tuple[int, ...]
    rates: tuple[float, ...] = ()
    shared: bool = False
    labels: Mapping[str, str] = field(init=False, default_factory=dict)

    def __post_init__(self) -> None:
        for what, values in (("data set", self.data), ("alpha", self.alphas), ("seed", self.seeds), ("learning rate", self.rates)):
            if twice := sorted({str(v) for v in values if list(values).count(v) > 1}):
                raise ExperimentError(f"{what} named twice: {', '.join(twice)}; a comparison has each once")
        if bad := [rate for rate in self.rates if not (math.isfinite(rate) and rate > 0)]:
            raise ExperimentError(f"learning rates must be positive and finite; {', '.join(map(repr, bad))} came among {list(self.rates)}")
        if not (self.methods and self.data and self.alphas and self.seeds):
            raise ExperimentError("a comparison needs a method, a data set, an alpha and a seed at least")
        if len(self.alphas) > 1 and self.base.partition != "label":
            raise ExperimentError(f"--alphas has no meaning with --partition {self.base.partition}: only label skew has an alpha; name one")
        object.__setattr__(self, "labels", data_labels(self.data))
        for run in self.every():  # whatever makes no sense is refused here
            self.trainer(run)

    @cached_property
    def cases(self) -> tuple[Case, ...]:
        """Data sets in order, each with all α."""
        return tuple(Case(data, alpha) for data in self.data for alpha in self.alphas)

    def label(self, case: Case) -> str:
        """What a table calls a case."""
        alpha = f", α = {case.alpha:g}" if self.base.partition == "label" else ""
        return f"{self.labels[case.data]}{alpha}"

    def run(self, case: Case, method: str, rate: float | None, seed: int) -> Run:
        """One run. Its name tells what the comparison has several of."""
        kind = self.methods[method]
        experiment = replace(
            self.base, method=kind if rate is None else with_learning_rate(kind, rate), data=case.data, alpha=case.alpha, seed=seed
        )
        held = trains_as(kind) if self.shared else ""
        return Run(self._name(case, method, rate, seed), experiment, self._name(case, held, rate, seed) if held else "", method)

    def trainer(self, run: Run) -> Run | None:
        """The run whose training ``run`` takes over.

        Raises:
            ExperimentError: the method it holds is not the one of the comparison, or layers stay on devices.
        """
        if not run.trained:
            return None
        if run.experiment.share.some:
            raise ExperimentError(
                f"--share-training: layers that stay on devices (--share) lie in the folder of the run that trained them, where "
                f"'{run.experiment.method_name}' cannot take them over; leave one of the two out"
            )
        held, case = replace(run.experiment, method=run.experiment.method.inner), Case(run.experiment.data, run.experiment.alpha)
        rate = next((r for r in self.options if run.trained == self._name(case, held.method_name, r, held.seed)), None)
        own = self.run(case, held.method_name, rate, held.seed) if held.method_name in self.methods else None
        if own is not None and own.experiment != held:
            raise ExperimentError(
                f"--share-training: '{run.experiment.method_name}' holds '{held.method_name}' with other settings than those that it is "
                "compared with; give both the same, or leave the option out"
            )
        return Run(run.trained, held, method=held.method_name)

    @property
    def options(self) -> tuple[float | None, ...]:
        """The rates to try; None is the method's own."""
        return self.rates or (None,)

    def tries(self, case: Case, method: str) -> dict[float | None, Run]:
        """The first seed's run with each rate."""
        return {rate: self.run(case, method, rate, self.seeds[0]) for rate in self.options}

    def every(self) -> list[Run]:
        """Every run that could come to be wanted for itself."""
        pairs = [(case, method) for case in self.cases for method in self.methods]
        return [self.run(*pair, rate, seed) for seed in self.seeds for pair in pairs for rate in self.options]

    def choice(self, case: Case, method: str, ended: Mapping[str, Ended]) -> Search:
        """What the search has come to. It is made when every rate has a score or has diverged, and one has a score."""
        found = {rate: ended.get(run.name) for rate, run in self.tries(case, method).items()}
        tried = {rate: None if e is None or e.results is None else validation(e.results) for rate, e in found.items()}
        if len(self.options) == 1:
            return Search(tried, True, self.options[0])
        known = {rate: score for rate, score in tried.items() if score is not None}
        if not known or any(e is None or not e.settled for e in found.values()):
            return Search(tried)
        return Search(tried, True, max(known, key=lambda rate: known[rate]))

    def chosen(self, case: Case, method: str, ended: Mapping[str, Ended]) -> list[Run]:
        """The runs that the table tells: the chosen rate with each seed; none while nothing is chosen."""
        choice = self.choice(case, method, ended)
        return [self.run(case, method, choice.rate, seed) for seed in self.seeds] if choice.made else []

    def wanted(self, ended: Mapping[str, Ended]) -> dict[str, Run]:
        """Every run that is known to be needed, in order, after the one whose training it takes over: searches first."""
        pairs = [(case, method) for case in self.cases for method in self.methods]
        found = [run for pair in pairs for run in self.tries(*pair).values()]
        later = [self.chosen(*pair, ended) for pair in pairs]
        found += [runs[i] for i in range(1, len(self.seeds)) for runs in later if runs]
        wanted: dict[str, Run] = {}
        for run in found:
            trainer = self.trainer(run)
            if trainer is not None:
                wanted.setdefault(trainer.name, trainer)
            wanted.setdefault(run.name, run)
        return wanted

    def expected(self, ended: Mapping[str, Ended]) -> int:
        """How many runs there will be, as far as is known: searches that are not over count as if they ended well."""
        open_still = sum(not self._lost(case, m, ended) and not self.chosen(case, m, ended) for case in self.cases for m in self.methods)
        return len(self.wanted(ended)) + open_still * (len(self.seeds) - 1)

    def _lost(self, case: Case, method: str, ended: Mapping[str, Ended]) -> bool:
        """Whether every rate's run has ended and nothing can be chosen."""
        return all(run.name in ended for run in self.tries(case, method).values()) and not self.choice(case, method, ended).made

    def _name(self, case: Case, method: str, rate: float | None, seed: int) -> str:
        parts = [self.labels[case.data]] if len(self.data) > 1 else []
        parts += [f"alpha{case.alpha!r}"] if len(self.alphas) > 1 else []
        parts += [method, *([f"lr{rate!r}"] if len(self.rates) > 1 else []), *([f"seed{seed}"] if len(self.seeds) > 1 else [])]
        return "-".join(parts)

    def as_json(self) -> dict[str, Any]:
        """What was asked for."""
        methods = {name: as_json(method) for name, method in self.methods.items()}
        lists = {"data": list(self.data), "alphas": list(self.alphas), "seeds": list(self.seeds), "rates": list(self.rates)}
        return {"methods": methods, **lists, "share_training": self.shared}


def trains_as(method: Any) -> str:
    """The name of the method that this one trains exactly as, only predicting otherwise; "" if it is none. A conformance test holds
    methods to what they say of it (``Method``)."""
    return full_name(as_json(method.inner)) if says(method, "trains_as_inner") else ""


def validation(results: Mapping[str, Any]) -> float | None:
    """What rates are chosen by; None where there is no such score, with which no rate can win."""
    score = results["validation"]["final"]["personalised"]
    return None if score is None else float(score)


def data_labels(data: Sequence[str]) -> dict[str, str]:
    """A short name for each data set that no other has: the last part of its path, or the whole where two end alike.

    Raises:
        ExperimentError: two that differ only in what a file name cannot hold.
    """
    for shorten in (lambda name: Path(name).name, lambda name: name):
        labels = {name: re.sub(r"[^\w.-]+", "-", shorten(name)).strip("-.") or "data" for name in data}
        if len(set(labels.values())) == len(data):
            return labels
    raise ExperimentError(f"the data sets {list(data)} cannot be told apart in a file's name; rename one")


def named_methods(methods: Sequence[Any]) -> dict[str, Any]:
    """By name, in order.

    Raises:
        ExperimentError: one was named twice.
    """
    names = [full_name(as_json(method)) for method in methods]
    if twice := sorted({name for name in names if names.count(name) > 1}):
        raise ExperimentError(f"named twice: {', '.join(twice)}; a comparison has each method once")
    return dict(zip(names, methods, strict=True))
