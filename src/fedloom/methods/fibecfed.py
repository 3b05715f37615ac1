"""FibecFed: Fisher-information-based efficient curriculum federated learning (2410.00131, EMNLP 2024).

Set-up, once, every device (insisted on):

0. the new task head is trained for a few rounds, alone (``head="warm"``): a fresh head's gradient would drown the difficulty score;
1. device k scores its examples, d_i = ‖∇_P ℓ(s_i; P⁰)‖² (the trace of the empirical Fisher; n_k numbers that stay there), and its
   layers, s_l^k (work item ``Sensitivity``), and uploads the layer scores (D,);
2. the server takes s_l = Σ_k (n_k/n) s_l^k, picks the Global Aggregation Layers (GAL) and broadcasts them;
3. device k warms all LoRA up for E_w epochs from the common start, keeps F <- γF + (1−γ)F̃ over the epochs, throws the weights away,
   and fixes its mask: of each local layer's output neurons the ``keep`` share of highest Fisher. Neuron μ of a pair scores
   Σ F[row μ of B] + ΣF[A]/d_out. Of a local B the device has the rows of its mask from then on, and nothing of the others: they are zero,
   take no storage, no optimiser state, and no product (work item ``Fit``, ``rows``). Where B did not start at zero (``--adapter.start
   svd``) they are a part of the model: they are stored and multiplied as they began, and have no optimiser state.

Each round t of T: the server sends the GAL and the head; device k trains them (dense) and its other LoRA (masked) on the batches that
the curriculum opens, easy to hard: batches are cut once and fixed, ordered by mean d_i, the first ceil(fraction(t)·#batches) are used in
each local epoch. It uploads the GAL and the head; the server averages with p_k. Local layers never leave the device.

Before round t, if t % R = 0 (``gal.refresh``; default never): every device scores its layers again, at its own model as it is; the server
picks as many layers as before by the new s_l. Random layers are drawn again and not scored; where all are global, nothing is done. A layer
that leaves the GAL goes on from its last shared value, on every device, and is trained whole there: its rows are no longer zero. A layer
that joins the GAL starts at the devices' mean, Σ_k (n_k/n) of their own, of which rows that are not there do not travel and are zero in it.

Deviations from the paper and its code: docs/papers.md.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, ClassVar, Literal

import numpy as np
import torch

from fedloom.client.client import Client
from fedloom.client.curricula.fisher import ByFisher
from fedloom.client.curriculum import Curriculum as AnyCurriculum
from fedloom.client.curriculum import Granularity, Opened, Pacing, Turn
from fedloom.client.neurons import KEPT, keep, neuron_masks, rows_kept, whole_private
from fedloom.compute.spectrum import first_gap
from fedloom.compute.work import Fisher, Norm, Sensitivity, Spectrum
from fedloom.messages import Asking, Flow, Task, Tensors, Update, Work, ask, due, insist, on_client
from fedloom.methods.fedavg import FedAvg
from fedloom.methods.method import Predictor, State, predict, round_of
from fedloom.model.base import Model
from fedloom.model.blocks import layer_of, layers
from fedloom.model.names import is_factor, is_head, need_pairs, stays
from fedloom.seeds import derive_int
from fedloom.server.masks import ROWS, completed
from fedloom.server.participation import Pool, uniform
from fedloom.server.sharing import Which, choose_gal, how_many
from fedloom.tensors import nbytes, only, rounded_up, without

WARM_UP = -1000
"""The "round" of the first warm-up epoch in the seeds' paths; no real round has it."""

LEAST = 1e-12
"""The share of a layer's output neurons that is trained where a spectrum says that all may be pruned: one of them."""

log = logging.getLogger("fedloom.methods")

MASK = "mask/"
"""Before a tensor's name in a device's memory: which of its rows are trained, 0/1 (d_out, 1), where it could not be cut to them."""


@dataclass(frozen=True)
class Curriculum:
    """FibecFed's own curriculum: easy first by Fisher information (``client/curricula/fisher.py``), and what becomes of a fresh head.

    Attributes:
        start: share of batches open in the first round, β₀.
        full_at: share of the rounds after which all are open, α.
        pacing: how the share grows between them.
        granularity: sort fixed batches, or sort examples and then cut, or sort nothing: batches as they were cut.
        refresh: score anew at the current model when the scores are this many rounds old (0: never).
        head: what keeps a fresh head from drowning the score: warm (train it first), left-out (of the score), as-is (nothing).
        head_rounds: rounds in which the head alone is trained first, if warm (0: as-is).
        over: whose gradient is the score: the adapter's, or that of all that is trained, the head too, frozen weights never; auto: all,
            unless the head is left out.
    """

    start: float = 0.6
    full_at: float = 0.8
    pacing: Pacing = "linear"
    granularity: Granularity = "batch"
    refresh: int = 0
    head: Literal["warm", "left-out", "as-is"] = "warm"
    head_rounds: int = 3
    over: Literal["auto", "adapter", "all"] = "auto"

    def __post_init__(self) -> None:
        _ = self.on_device
        if self.head_rounds < 0:
            raise ValueError(f"head_rounds is {self.head_rounds}; it is a number of rounds, 0 or more")
        if self.head == "left-out" and self.over == "all":
            raise ValueError("the head is left-out of the score, and over all would have it in; give over adapter, or another head")

    @property
    def on_device(self) -> ByFisher:
        """What a device follows."""
        over = "adapter" if self.over == "adapter" or self.head == "left-out" else "all"
        return ByFisher(self.start, self.full_at, self.pacing, self.granularity, self.refresh, over)

    def prepare(self, c: Client, at: Tensors, round: int, trained: Collection[str] = ()) -> Work[None]:
        """The difficulty of every example."""
        return self.on_device.prepare(c, at, round, trained)

    def open(self, c: Client, turn: Turn) -> Opened:
        """The easiest batches."""
        return self.on_device.open(c, turn)

    def facts(self, rounds: int) -> dict[str, Any]:
        """The share of batches open in each round, and how the head was kept from drowning the score."""
        warmed = self.head_rounds > 0 or self.head != "warm"
        return {**self.on_device.facts(rounds), "difficulty_head": self.head if warmed else "as-is"}


@dataclass(frozen=True)
class Gal:
    """Which layers are global.

    Attributes:
        fraction: share of the adapted layers that are global at least: rounded up.
        count: number of global layers; overrides the fraction when above 0.
        which: those with the least or the most sensitive output, or random ones.
        rho: size of the perturbation; see the work item Sensitivity.
        norm: form of the score; see the work item Sensitivity.
        lossless: as many as the devices' Hessian spectra allow without loss, instead of the fraction or count; see ``first_gap``.
        refresh: choose anew, at the current model, before every round whose number is a multiple of this (0: never).
    """

    fraction: float = 0.75
    count: int = 0
    which: Which = "least"
    rho: float = 0.5
    norm: Norm = "difference"
    lossless: bool = False
    refresh: int = 0

    def __post_init__(self) -> None:
        if not (0 < self.fraction <= 1 and self.count >= 0):
            raise ValueError(
                f"a share of the layers above 0 and at most 1 is global, or a count of 1 or more (0: the fraction says); got fraction "
                f"{self.fraction}, count {self.count}"
            )
        if not 0 < self.rho < math.inf:
            raise ValueError(f"rho is {self.rho}; embeddings are moved by a positive number, or no layer's output moves")
        if self.refresh < 0:
            raise ValueError(f"refresh is {self.refresh}; layers are chosen anew every so many rounds, 1 or more, or never with 0")


@dataclass(frozen=True)
class FibecFed:
    """FibecFed.

    Attributes:
        inner: local training and its optimiser.
        curriculum: FibecFed's own curriculum, or another in its place; then nobody warms a head up.
        gal: which layers are global.
        keep: share of the output neurons of each local layer that is trained.
        keep_lossless: the share that a device's own Hessian spectrum allows without loss, where it tells; ``keep`` otherwise.
        warmup_epochs: epochs E_w of the warm-up behind the mask.
        momentum: γ of the mask's Fisher over those epochs.
        lossless_probes: random starts behind a device's Hessian spectrum, each as costly as the first, and directions behind its ℒ, where
            one of the two lossless choices asks for them.
    """

    name: ClassVar[str] = "fibecfed"
    paper: ClassVar[str] = "FibecFed 2410.00131"

    inner: FedAvg = field(default_factory=FedAvg)
    curriculum: AnyCurriculum = field(default_factory=Curriculum)
    gal: Gal = field(default_factory=Gal)
    keep: float = 0.95
    keep_lossless: bool = False
    warmup_epochs: int = 1
    momentum: float = 0.5
    lossless_probes: int = 1

    def __post_init__(self) -> None:
        if self.inner.has_curriculum:
            raise ValueError(f"FibecFed follows its own curriculum; give it {self.inner.curriculum} as curriculum=, not within inner=")
        if not 0 < self.keep <= 1:
            raise ValueError(f"keep is {self.keep}; a share of the neurons above 0 and at most 1 is trained, and with 1 there is no mask")
        if self.warmup_epochs < 1:
            raise ValueError(f"warmup_epochs is {self.warmup_epochs}; the mask comes of one epoch at least (keep 1: no mask, no warm-up)")
        if not 0 <= self.momentum < 1:
            raise ValueError(f"momentum is {self.momentum}; it must be 0 or more and below 1, where the mask's Fisher would stay at 0")
        if self.lossless_probes < 1:
            raise ValueError(f"lossless_probes is {self.lossless_probes}; a spectrum takes one random start at least")

    @property
    def joins_late(self) -> bool:
        """A device that comes late adopts the GAL of the set-up, which must be the one there is."""
        return not self.gal.refresh

    @property
    def rounds_differ(self) -> bool:
        """Before some rounds the GAL is chosen anew."""
        return bool(self.gal.refresh)

    @property
    def local(self) -> FedAvg:
        """Local training under this method's curriculum."""
        return replace(self.inner, curriculum=self.curriculum)

    # ---- server -------------------------------------------------------------------------------------------------------------

    def init(self, model: Model) -> State:
        """Everything is shared until the GAL is chosen. ``facts["depth"]`` is D.

        Raises:
            ValueError: no LoRA is trained; the mask is one of its pairs. Or a term in the loss that rows of B do not have, or more global
                layers than there are.
        """
        need_pairs(model.initial, self.name)
        how_many(self.gal, len(layers(model.initial)))
        if self.inner.prox and (self.keep < 1 or self.keep_lossless):
            raise ValueError(
                f"'{self.name}' trains some rows of B only, for which FedProx's term is not defined here, and prox is {self.inner.prox}; "
                "give keep 1.0 (--method.keep 1) as well, or leave prox out"
            )
        return State(0, model.initial, facts={"depth": model.depth})

    def setup(self, state: State, pool: Pool) -> Flow[State]:
        """Head, scores, GAL, masks (the four steps above)."""
        pool.insist_on_no_mask(self.name, "it has one of its own (--method.keep)")
        pool.insist_on_every_layer(self.name, "it chooses them itself (--method.gal.fraction)")
        shared = dict(state.shared)
        head = {name for name in shared if is_head(name)}
        own = self.curriculum if isinstance(self.curriculum, Curriculum) else None
        for i in range(own.head_rounds if own and own.head == "warm" and head else 0):
            cohort = uniform(pool, -1 - i)
            updates = yield from insist([due(ask(self.warm_head, k, only(shared, head), round=-1 - i)) for k in cohort])
            shared |= pool.mean(updates, shared)
        answers = yield from insist([replace(ask(self.inspect, k, shared), exact=True) for k in pool.clients])  # kept for good
        scores, adapted = mean_of(pool, answers, "layer_scores").numpy(), sorted(layers(shared))
        gal, told = self._without_loss(answers, pool, len(adapted)) if self.gal.lossless or self.keep_lossless else (self.gal, {})
        chosen = choose_gal(scores, adapted, gal, pool.seed)
        yield from insist([ask(self.adopt, k, gal=chosen) for k in pool.clients])
        kept = {n: t for n, t in shared.items() if not stays(n, chosen)}
        told |= {} if head else {"difficulty_head": "none: the head is the language model's own"}
        facts = {"gal": chosen, "layer_scores": scores.tolist(), **self.curriculum.facts(pool.rounds), **told}
        if self.gal.refresh:
            facts |= {"adapted": adapted, "gal_history": [{"round": 0, "gal": chosen, "layer_scores": scores.tolist()}]}
        return State(0, kept, facts={**state.facts, **facts})

    def round(self, state: State, pool: Pool) -> Flow[State]:
        """S_t trains on what is open; the GAL and the head are averaged. Before, if it is due, the GAL is chosen anew."""
        if self.gal.refresh and state.round and state.round % self.gal.refresh == 0:
            state = yield from self._choose_again(state, pool)
        cohort = uniform(pool, state.round)
        mean = pool.average(state.shared)
        yield Asking([due(ask(self.train, k, state.shared, **self.local.clock(state.round, pool))) for k in cohort], mean.take)
        return state.after_round(mean.value())

    def assembled(self, state: State) -> Tensors | None:
        """The shared tensors alone; local layers stay at their start, where B = 0 (or singular vectors: --adapter.start)."""
        return state.shared

    def _without_loss(self, answers: Sequence[Update], pool: Pool, adapted: int) -> tuple[Gal, dict[str, Any]]:
        """The GAL's size as spectra have it, and what is told. Fewer devices with a gap than the pool's rule needs decide nothing."""
        gap = [a for a in answers if float(a.tensors["prunable"][1])]
        needed = pool.aggregation.needed(max(pool.cohort, len(gap)))
        few = f", and {len(gap)} with one are too few for aggregation '{pool.aggregation.name}', which needs {needed}" if gap else ""
        heard = gap if len(gap) >= needed else []
        share = sum(a.num_examples for a in heard) / max(1, sum(a.num_examples for a in answers))
        prunable = float(mean_of(pool, heard, "prunable")[0]) if heard else 0.0
        gal, found = lossless_gal(self.gal, prunable, share, adapted)
        return gal, self._tell_lossless(found, len(answers) - len(gap), len(answers), "" if heard else few)

    def _tell_lossless(self, found: dict[str, Any], without_gap: int, devices: int, few: str) -> dict[str, Any]:
        """What facts and log say of a lossless choice: ``found``, on how many ``devices`` there is no gap, that there are too ``few``
        others, and what is used instead."""
        layers_given = f"count {self.gal.count}" if self.gal.count else f"fraction {self.gal.fraction:g}"
        instead = ([layers_given] if self.gal.lossless and not found else []) + ([f"keep {self.keep:g}"] if self.keep_lossless else [])
        if without_gap:
            what = f"{without_gap} of {devices} devices have no gap above 4ℒ in their Hessian's spectrum{few}"
            told = f"{what}; used instead: {', '.join(instead) or 'what the others tell'}"
            log.warning("%s: %s", self.name, told)
            found = {**found, "without_a_gap": told}
        return {"lossless": found}

    def _choose_again(self, state: State, pool: Pool) -> Flow[State]:
        """Scores, GAL, and what changes hands between server and devices if it is another. Nobody is asked for scores that decide nothing:
        where layers are random, or all are shared and there is no choice."""
        before, adapted = list(state.facts["gal"]), list(state.facts["adapted"])
        if before == adapted:
            return state
        scores, now = np.zeros(0), {}
        if self.gal.which != "random":
            answers = yield from insist([ask(self.rescore, k, state.shared) for k in pool.clients])
            scores = mean_of(pool, answers, "layer_scores").numpy()
            now = {"layer_scores": scores.tolist()}
        chosen = choose_gal(scores, adapted, replace(self.gal, count=len(before)), pool.seed, state.round)
        shared = dict(state.shared)
        if chosen != before:
            joining, leaving = sorted(set(chosen) - set(before)), set(before) - set(chosen)
            complete = partial(completed, sent={})  # devices may keep other rows, and so many of them as their spectra say
            handed = yield from insist([replace(ask(self.hand_over, k, layers=joining), complete=complete) for k in pool.clients])
            copies = [replace(one, tensors=complete(one.tensors)) for one in handed]
            left = {n: t for n, t in shared.items() if layer_of(n) in leaving}
            yield from insist([replace(ask(self.regroup, k, left, gal=chosen), exact=True) for k in pool.clients])  # kept for good
            shared = dict(sorted({**without(shared, left), **pool.mean(copies)}.items()))
        now = {"gal": chosen, **now}
        history = [*state.facts["gal_history"], {"round": state.round, **now}]
        return replace(state, shared=shared, facts={**state.facts, **now, "gal_history": history})

    # ---- client -------------------------------------------------------------------------------------------------------------

    @on_client
    def warm_head(self, c: Client, task: Task) -> Work[Update]:
        """Step 0: train the head only, on the frozen pre-trained features."""
        t = round_of(task)
        fitted = yield self.inner.fit(c, task.tensors, self.inner.cut(c, "warm-head", t), t)
        return Update(c.id, len(c.train), fitted.tensors, {"loss": fitted.loss})

    @on_client
    def inspect(self, c: Client, task: Task) -> Work[Update]:
        """Step 1: difficulty of every example (kept here) and the layers' sensitivity on one batch (uploaded)."""
        batch = self.inner.cut(c, "batches")[0]
        spectrum = Spectrum(task.tensors, c.train, batch, probes=self.lossless_probes, seed=derive_int(c.seed, "spectrum", c.id))
        c.private, c.memory = dict(task.tensors), {}
        yield from self.curriculum.prepare(c, task.tensors, 0)
        scores, *spectral = yield [
            Sensitivity(task.tensors, c.train, batch, self.gal.rho, self.gal.norm),
            *([spectrum] if self.gal.lossless or self.keep_lossless else []),
        ]
        found = {"layer_scores": torch.from_numpy(scores)}
        for one in spectral:
            share = first_gap(one.nodes, one.weights, one.lipschitz)
            found["prunable"] = torch.tensor([0.0, 0.0] if share is None else [share, 1.0], dtype=torch.float64)
            if share is not None:
                c.memory["prunable"] = torch.tensor(share, dtype=torch.float64)
        return Update(c.id, len(c.train), found)

    @on_client
    def adopt(self, c: Client, task: Task) -> Work[Update]:
        """Step 3: the mask from warm-up Fisher; from here on ``private`` holds the local layers and nothing else."""
        chosen = set(task.settings["gal"])  # type: ignore[arg-type]
        local = [n for n in c.private if stays(n, chosen)]
        if set(local) == set(c.private):  # asked again because the answer was lost: this device has adopted already
            return Update(c.id, len(c.train))
        share = max(LEAST, 1 - float(c.memory["prunable"])) if self.keep_lossless and "prunable" in c.memory else self.keep
        if local and share < 1:
            fisher = yield from self._warm_up(c)
            c.memory |= {MASK + name: mask for name, mask in keep(c, neuron_masks(only(fisher, local), share)).items()}
        c.private = only(c.private, local)
        return Update(c.id, len(c.train))

    @on_client
    def train(self, c: Client, task: Task) -> Work[Update]:
        """GAL and head dense, local layers masked, on the easiest open batches; only what came goes back."""
        at = {name.removeprefix(MASK): torch.nonzero(kept[:, 0]).flatten() for name, kept in c.memory.items() if name.startswith(MASK)}
        whole = only(c.private, at)
        opened = yield from self.local.open(c, {**whole_private(c), **task.tensors}, task)
        few = {n: whole[n][rows] for n, rows in at.items()}
        start, t = {**c.private, **few, **task.tensors}, round_of(task)
        rows = {**rows_kept(c), **at}
        fitted = yield self.inner.fit(c, start, opened.batches, t, fixed=whole, examples=opened.examples, rows=rows, own=c.private)
        trained = without(fitted.tensors, task.tensors.keys())
        c.private = {n: whole[n].index_copy(0, at[n], tensor) if n in at else tensor for n, tensor in trained.items()}
        held = nbytes(fitted.moments.first) + nbytes(fitted.moments.second)
        all_rows = held + 2 * (nbytes(whole_private(c)) - nbytes(trained))
        c.memory |= {"optimizer_bytes": torch.tensor(held), "optimizer_bytes_whole": torch.tensor(all_rows)}
        return Update(c.id, len(c.train), only(fitted.tensors, task.tensors.keys()), {"loss": fitted.loss})

    def personalise(self, client: Client, shared: Tensors) -> Work[Predictor]:
        """The device's local layers under the shared ones."""
        yield from ()
        return Predictor({**whole_private(client), **shared})

    predict = predict

    @on_client
    def rescore(self, c: Client, task: Task) -> Work[Update]:
        """The layers' sensitivity at the device's own model as it is now, on the batch of the set-up."""
        batch = self.inner.cut(c, "batches")[0]
        scores = yield Sensitivity({**whole_private(c), **task.tensors}, c.train, batch, self.gal.rho, self.gal.norm)
        return Update(c.id, len(c.train), {"layer_scores": torch.from_numpy(scores)})

    @on_client
    def hand_over(self, c: Client, task: Task) -> Work[Update]:
        """The device's own of the layers that will be shared, of a B the rows that there are and which these are. It keeps them until it is
        told the new GAL."""
        yield from ()
        joining = set(task.settings["layers"])  # type: ignore[arg-type]
        rows = {ROWS + n.removeprefix(KEPT): bits for n, bits in c.memory.items() if n.startswith(KEPT)}
        return Update(c.id, len(c.train), {n: t for n, t in {**c.private, **rows}.items() if layer_of(n) in joining})

    @on_client
    def regroup(self, c: Client, task: Task) -> Work[Update]:
        """Take over the layers that are no longer shared, as they came, and drop those that now are. Asked twice, nothing more happens."""
        yield from ()
        chosen = set(task.settings["gal"])  # type: ignore[arg-type]
        c.private = {n: t for n, t in sorted({**task.tensors, **c.private}.items()) if layer_of(n) not in chosen}
        c.memory = {n: t for n, t in c.memory.items() if not n.startswith((KEPT, MASK)) or layer_of(n) not in chosen}
        return Update(c.id, len(c.train))

    def _warm_up(self, c: Client) -> Work[dict[str, torch.Tensor]]:
        """Diagonal Fisher of all LoRA with momentum: F <- γF + (1−γ)F̃ after each of E_w epochs over all batches, easy first, from F = 0."""
        lora = {n: t for n, t in c.private.items() if is_factor(n)}
        head, batches = without(c.private, lora), self.local.whole(c).batches
        fisher, moments = {n: torch.zeros_like(t) for n, t in lora.items()}, None
        for epoch in range(self.warmup_epochs):
            fitted = yield self.inner.fit(c, lora, batches, WARM_UP - epoch, moments=moments, fixed=head)
            lora, moments = fitted.tensors, fitted.moments
            now = yield Fisher({**head, **lora}, c.train, frozenset(lora))
            fisher = {n: self.momentum * f + (1 - self.momentum) * now[n] for n, f in fisher.items()}
        return fisher


def mean_of(pool: Pool, updates: Sequence[Update], name: str) -> torch.Tensor:
    """The aggregate of one tensor of the updates, which a rule would not have apart from others that came with it."""
    return pool.mean([replace(update, tensors=only(update.tensors, [name])) for update in updates])[name]


def lossless_gal(gal: Gal, prunable: float, told: float, adapted: int) -> tuple[Gal, dict[str, Any]]:
    """``gal`` with the count that the spectra allow, if it is to be lossless, and what to tell of it.

    ``prunable``: the mean of m_k/d_k, as the pool's rule of aggregation has it, over the devices whose spectrum has a gap above 4ℒ_k;
    ``told``: their share Σ n_k/n of all examples. The complement of the mean is the share of the ``adapted`` layers that become global, at
    least one. Where no device has such a gap, or too few for the rule, ``gal`` stays, and nothing is told.
    """
    if not told:
        return gal, {}
    facts = {"prunable": prunable, "examples_on_devices_with_a_gap": told}
    return replace(gal, count=max(1, rounded_up(1 - prunable, adapted))) if gal.lossless else gal, facts
