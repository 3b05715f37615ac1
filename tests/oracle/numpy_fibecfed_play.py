"""FibecFed from set-up to the last round, made of the pieces in ``numpy_fibecfed.py``; every phase is kept to be compared.

What the specification draws at random (start, batch cuts, scoring batch, cohorts) is given here, so nothing is seeded.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np

from tests.oracle.numpy_encoder import Encoder, Example, Tensors
from tests.oracle.numpy_fibecfed import (
    Pacing,
    batch_order,
    choose_gal,
    combine,
    difficulty,
    fisher_diagonal,
    fraction,
    gal_count,
    is_lora,
    momentum_fisher,
    neuron_masks,
    open_batches,
    sensitivity,
    shared_names,
)
from tests.oracle.numpy_training import AdamW, Indices, aggregate, payload, train


class Shard(NamedTuple):
    """Device k: its examples, its batches as cut once (not yet sorted), and the positions its layers are scored on.

    ``head_batches[i]``: what it trains the head on in warm-up round i (empty: on ``batches``).
    """

    examples: Sequence[Example]
    batches: Sequence[Indices]
    probe: Indices
    head_batches: Sequence[Sequence[Indices]] = ()


@dataclass(frozen=True)
class Settings:
    """The hyper-parameters, under the specification's defaults. ``head_cohorts``: who takes part in each head warm-up round."""

    rule: AdamW
    rounds: int
    local_epochs: int = 2
    pacing: Pacing = "linear"
    start: float = 0.6
    full_at: float = 0.8
    score_head: bool = True
    gal_share: float = 0.75
    which: str = "least"
    rho: float = 0.5
    norm: str = "difference"
    warm_epochs: int = 1
    gamma: float = 0.5
    keep: float = 0.95
    head_cohorts: Sequence[Sequence[int]] = ()
    head_epochs: int = 1
    head_rule: AdamW | None = None


@dataclass(frozen=True)
class Round:
    """One round t, by client where a dict has int keys. ``private`` is every device's after the round."""

    fraction: float
    open: dict[int, int]
    down: frozenset[str]
    up: frozenset[str]
    bytes_down: int
    bytes_up: int
    updates: dict[int, dict[str, np.ndarray]]
    losses: dict[int, list[float]]
    shared: dict[str, np.ndarray]
    private: dict[int, dict[str, np.ndarray]]


@dataclass
class Played:
    """Everything that one run of the method made, phase by phase."""

    head_rounds: list[dict[str, np.ndarray]] = field(default_factory=list)
    common: dict[str, np.ndarray] = field(default_factory=dict)
    difficulties: dict[int, np.ndarray] = field(default_factory=dict)
    order: dict[int, list[np.ndarray]] = field(default_factory=dict)
    layer_scores: dict[int, np.ndarray] = field(default_factory=dict)
    scores: np.ndarray = field(default_factory=lambda: np.zeros(0))
    gal: tuple[int, ...] = ()
    fishers: dict[int, dict[str, np.ndarray]] = field(default_factory=dict)
    masks: dict[int, dict[str, np.ndarray]] = field(default_factory=dict)
    rounds: list[Round] = field(default_factory=list)

    def personal(self, client: int, t: int = -1) -> dict[str, np.ndarray]:
        # "personalised: each device with its own local tensors + the shared ones"
        return {**self.rounds[t].shared, **self.rounds[t].private[client]}

    def alone(self, t: int = -1) -> dict[str, np.ndarray]:
        # "global: the shared tensors alone". Read as: the other layers as they were at the common start (B = 0).
        return {**self.common, **self.rounds[t].shared}


def warm_head(encoder: Encoder, start: Tensors, clients: Mapping[int, Shard], s: Settings) -> list[dict[str, np.ndarray]]:
    # "score ... after a short federated head warm-up (default)". Read as: rounds of averaging in which only the head is
    # trained, on batches that hold every example once, in the order they were cut, and weighted with p_k. The sentence leaves
    # open whether these are the batches of the curriculum or cut anew, so ``Shard`` may give others for each round.
    head = [n for n in start if not is_lora(n)]
    now, made = dict(start), []
    for i, cohort in enumerate(s.head_cohorts):
        updates = []
        for k in cohort:
            batches = list(clients[k].head_batches[i] if clients[k].head_batches else clients[k].batches) * s.head_epochs
            fitted, _ = train(encoder, now, head, clients[k].examples, batches, s.head_rule or s.rule)
            updates.append({n: fitted[n] for n in head})
        made.append(aggregate(updates, [len(clients[k].examples) for k in cohort]))
        now |= made[-1]
    return made


def warm_masks(
    encoder: Encoder, common: Tensors, shard: Shard, order: Sequence[Indices], gal: Iterable[int], s: Settings
) -> tuple[dict[str, np.ndarray], dict[str, np.ndarray]]:
    """One device's Fisher over all LoRA tensors, and its masks for the layers outside the GAL."""
    # "Warm up all LoRA on the device for E_w epochs (default 1) from the common start; the warm-up weights are thrown away."
    # Read as: the head stays put; an epoch is every batch, easy to hard; one optimiser runs through all epochs; F̃ is taken
    # after each epoch, over all the device's examples. (So the epochs are trained again from the start: same steps.)
    lora = [n for n in common if is_lora(n)]
    estimates = []
    for epoch in range(1, s.warm_epochs + 1):
        warm, _ = train(encoder, common, lora, shard.examples, list(order) * epoch, s.rule)
        estimates.append(fisher_diagonal(encoder, warm, shard.examples, lora))
    fisher = momentum_fisher(estimates, s.gamma)
    # "every device computes its own sparse local-update mask on the layers outside the GAL"
    outside = sorted(set(range(encoder.layers)) - set(gal))
    return fisher, {n: m for layer in outside for n, m in neuron_masks(fisher, layer, s.keep).items()}


def play(encoder: Encoder, start: Tensors, clients: Mapping[int, Shard], cohorts: Sequence[Sequence[int]], s: Settings) -> Played:
    """FibecFed from the initial tensors to the last round; ``cohorts[t]`` is S_t."""
    sizes, played = {k: len(shard.examples) for k, shard in clients.items()}, Played()
    played.head_rounds = warm_head(encoder, start, clients, s)
    played.common = {**start, **(played.head_rounds[-1] if played.head_rounds else {})}
    common = played.common
    # "every device scores its data (difficulty) and its layers (sensitivity)"
    scored = [n for n in start if s.score_head or is_lora(n)]
    for k, shard in clients.items():
        played.difficulties[k] = difficulty(encoder, common, shard.examples, scored)
        # "Batches are cut once per device (seeded shuffle) and stay fixed"
        played.order[k] = batch_order(played.difficulties[k], shard.batches)
        played.layer_scores[k] = sensitivity(encoder, common, [shard.examples[i] for i in shard.probe], s.rho, s.norm)
    # "it uploads the layer scores only"; "the server combines them, picks the GAL, and broadcasts the choice"
    played.scores = combine([played.layer_scores[k] for k in clients], [sizes[k] for k in clients])
    played.gal = choose_gal(played.scores, gal_count(s.gal_share, encoder.layers), s.which)
    for k, shard in clients.items():
        # "the mask is per device and fixed"
        played.fishers[k], played.masks[k] = warm_masks(encoder, common, shard, played.order[k], played.gal, s)

    travels = shared_names(start, played.gal)
    shared = {n: common[n] for n in travels}
    # "Non-GAL LoRA never leaves the device and persists between its participations." It begins at the common start.
    private = {k: {n: common[n] for n in start if n not in travels} for k in clients}
    for t, cohort in enumerate(cohorts):
        # "Pacing, clock = global round"
        share = fraction(s.pacing, t, s.rounds, s.start, s.full_at)
        opened, updates, losses = {}, {}, {}
        for k in cohort:
            # "trains GAL (dense) and its own non-GAL LoRA (masked) on the part of its data that the curriculum opens", "easy
            # to hard, each local epoch"
            opened[k] = open_batches(share, len(played.order[k]))
            batches = played.order[k][: opened[k]] * s.local_epochs
            mine = {**shared, **private[k]}
            fitted, losses[k] = train(encoder, mine, start, clients[k].examples, batches, s.rule, played.masks[k])
            private[k] = {n: fitted[n] for n in private[k]}
            updates[k] = {n: fitted[n] for n in travels}
        shared = aggregate([updates[k] for k in cohort], [sizes[k] for k in cohort])
        each = payload(start, travels) * len(cohort)
        kept = {k: dict(own) for k, own in private.items()}
        played.rounds.append(Round(share, opened, travels, travels, each, each, updates, losses, shared, kept))
    return played
