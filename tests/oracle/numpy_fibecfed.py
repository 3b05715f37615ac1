"""FibecFed (arXiv 2410.00131) derived again in NumPy float64, sentence by sentence of the specification.

The pieces are here; ``numpy_fibecfed_play.py`` runs them in order and ``numpy_training.py`` has what is not FibecFed's own.
It shares nothing with the product: no torch, no Fedloom. Every sentence of the specification stands as a comment over the
lines that do what it says; a line marked "Read as" is a decision where the sentence leaves room.
What it leaves out: dropout, the ``random`` and ``lossless`` choices of the GAL (the latter only as ``first_gap``), refreshing
the scores every R rounds, the cloze head.

Shapes: D layers, n examples of a device, K devices, LoRA pair A (r, d_in), B (d_out, r).
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Sequence
from typing import Literal

import numpy as np

from tests.oracle.numpy_encoder import Encoder, Example, Tensors, pad
from tests.oracle.numpy_training import Indices

Pacing = Literal["linear", "sqrt", "quadratic", "exp", "none"]


def ceil(value: float) -> int:
    """⌈value⌉, where a value within 1e-9 above a whole number is that number: 0.1·3·10 must give 3, not 4."""
    return math.ceil(value - 1e-9)


def layer_of(name: str) -> int | None:
    """The transformer layer a tensor belongs to, counted from 0; None for the head."""
    found = re.search(r"\.layer\.(\d+)\.", name)
    return int(found.group(1)) if found else None


def is_lora(name: str) -> bool:
    return ".lora_A." in name or ".lora_B." in name


# ------------------------------------------------------------------------------------------- (a) difficulty and curriculum


def difficulty(encoder: Encoder, tensors: Tensors, examples: Sequence[Example], names: Iterable[str]) -> np.ndarray:
    """(n,): how hard each example is, over the tensors called ``names`` (leave out the head's for that option)."""
    # "F̃_i = (∇_P ℓ(s_i; P⁰))², difficulty d_i = tr F̃_i = ‖∇_P ℓ(s_i; P⁰)‖²"; "true labels"; "dropout off".
    gradients = encoder.backward(tensors, pad(examples)).tensors
    return sum(((gradients[n] ** 2).reshape(len(examples), -1).sum(1) for n in sorted(names)), np.zeros(len(examples)))


def batch_order(difficulties: np.ndarray, batches: Sequence[Indices]) -> list[np.ndarray]:
    """The fixed batches, easy first."""
    # "d(batch) = mean_i d_i; sort ascending (easy first)." Read as: equal batches keep the order they were cut in.
    means = [float(np.mean(difficulties[np.asarray(batch)])) for batch in batches]
    return [np.asarray(batches[i]) for i in sorted(range(len(batches)), key=lambda i: means[i])]


def sample_order(difficulties: np.ndarray, size: int) -> list[np.ndarray]:
    # "Option: sample granularity (sort samples, then cut)." Read as: equal samples keep their order in the shard.
    order = np.argsort(difficulties, kind="stable")
    return [order[i : i + size] for i in range(0, len(order), size)]


def fraction(kind: Pacing, t: int, rounds: int, start: float, full_at: float) -> float:
    """The share of the data open in global round t = 0..T-1; β₀ = start, α = full_at, T = rounds."""
    # "none": everything is open from the first round. Read as: so it is with α = 0.
    if kind == "none" or full_at * rounds == 0:
        return 1.0
    # "the point α (0.8) at which all data is open"
    x = t / (full_at * rounds)
    # "linear β₀ + (1-β₀)·t/(αT), sqrt β₀ + (1-β₀)·√(t/(αT)), quadratic β₀ + (1-β₀)·(t/(αT))²"
    growth = {"linear": x, "sqrt": math.sqrt(x), "quadratic": x**2}
    # "exp": the specification gives no formula. Read as: geometric from β₀ at t = 0 to 1 at t = αT, β₀^(1 − t/(αT)).
    reached = start ** (1 - x) if kind == "exp" else start + (1 - start) * growth[kind]
    # "capped at 1"
    return min(1.0, reached)


def open_batches(share: float, count: int) -> int:
    # "A device uses its first ceil(fraction · #batches) batches"
    return ceil(share * count)


# ------------------------------------------------------------------------------------------ (b) layer sensitivity, the GAL


def sensitivity(encoder: Encoder, tensors: Tensors, examples: Sequence[Example], rho: float = 0.5, norm: str = "difference") -> np.ndarray:
    """(D,): the score of every layer on one device batch; norm is "difference" (default) or "norms"."""
    batch = pad(examples)
    # "On one device batch: E = input embeddings, g = ∂L/∂E" — over real tokens only. Read as: E is the word embeddings, what
    # a model takes as inputs_embeds. The mean or the sum over the batch makes the same unit vector g/‖g‖_F.
    embeddings, real = encoder.embed(batch), batch.mask[:, :, None]
    g = encoder.backward(tensors, batch).embeddings * real
    # "with ρ relative to ‖E‖_F" in the default form, absolute in the first form
    radius = rho * np.linalg.norm(embeddings * real) if norm == "difference" else rho
    # "E' = E + ρ·g/‖g‖_F"
    moved = embeddings + radius * g / np.linalg.norm(g)
    # "H_l the layer's output at the pooled position (mask/CLS/last token)": position 0 here, all examples of the batch.
    before = [layer[:, 0] for layer in encoder.forward(tensors, batch).layers]
    after = [layer[:, 0] for layer in encoder.forward(tensors, batch, moved).layers]
    # default "‖H'_l − H_l‖_F / ‖H_l‖_F"; first form "s_l = | ‖H'_l‖_F − ‖H_l‖_F | / ‖H_l‖_F"
    forms = {
        "difference": lambda h, h2: np.linalg.norm(h2 - h) / np.linalg.norm(h),
        "norms": lambda h, h2: abs(np.linalg.norm(h2) - np.linalg.norm(h)) / np.linalg.norm(h),
    }
    return np.array([forms[norm](h, h2) for h, h2 in zip(before, after, strict=True)])


def combine(scores: Sequence[np.ndarray], sizes: Sequence[int]) -> np.ndarray:
    # "Server: s_l = Σ_k (n_k/n) s_l^k." Read as: over all K devices, n_k the training examples of the whole shard.
    return np.asarray(sizes, np.float64) @ np.stack(scores) / sum(sizes)


def gal_count(share: float, layers: int) -> int:
    # "How many: ... a fraction (default 0.75 of the layers)". Read as: rounded up, at least one, at most all.
    return min(layers, max(1, ceil(share * layers)))


def choose_gal(scores: np.ndarray, count: int, which: str = "least") -> tuple[int, ...]:
    """The Global Aggregation Layers, ascending; of equal layers the lower index goes first."""
    # "shares the layers with the smallest score (robust layers global, sensitive layers personal) ... Make it a switch"
    sign = {"least": 1.0, "most": -1.0}[which]
    return tuple(sorted(sorted(range(len(scores)), key=lambda layer: (sign * scores[layer], layer))[:count]))


def first_gap(eigenvalues: np.ndarray, lipschitz: float) -> int | None:
    """m, the prunable number of parameters; None where no gap is wide enough (the fraction is used then)."""
    # "sorted ascending ...: the first gap λ_{m+1} − λ_m > 4ℒ_k gives the prunable share m_k/d_k" (λ_1 is the smallest)
    wide = np.flatnonzero(np.diff(np.sort(eigenvalues)) > 4 * lipschitz)
    return int(wide[0]) + 1 if len(wide) else None


# ---------------------------------------------------------------------------------------------------- (c) local update mask


def fisher_diagonal(encoder: Encoder, tensors: Tensors, examples: Sequence[Example], names: Iterable[str]) -> dict[str, np.ndarray]:
    # "F̃ = mean squared gradient": the mean over the device's examples of each example's squared gradient.
    gradients = encoder.backward(tensors, pad(examples)).tensors
    return {name: (gradients[name] ** 2).mean(0) for name in sorted(names)}


def momentum_fisher(epochs: Sequence[Tensors], gamma: float = 0.5) -> dict[str, np.ndarray]:
    # "Diagonal Fisher with momentum over the warm-up epochs: F ← γF + (1−γ)F̃". Read as: F starts at 0.
    fisher = {name: np.zeros_like(tensor) for name, tensor in epochs[0].items()}
    for estimate in epochs:
        fisher = {name: gamma * fisher[name] + (1 - gamma) * estimate[name] for name in fisher}
    return fisher


def neuron_scores(fisher_a: np.ndarray, fisher_b: np.ndarray) -> np.ndarray:
    """(d_out,): the score of every output neuron of one LoRA pair."""
    # "Neuron score: sum of F over the parameters feeding output neuron μ of layer l (row μ of B, plus its share through A)."
    # Read as: A feeds all d_out neurons alike, so each takes 1/d_out of A's sum. That never changes the ranking inside one
    # module; it does between query and value of one layer.
    return fisher_b.sum(1) + fisher_a.sum() / len(fisher_b)


def neuron_masks(fisher: Tensors, layer: int, keep: float) -> dict[str, np.ndarray]:
    """For every B of one layer its rows to train, 0/1 (d_out, 1)."""
    # "Keep the highest-scoring fraction". Read as: of all the layer's neurons together (query's, then value's: the order of
    # the tensors' names), rounded up; of equal neurons the earlier stays.
    factors = sorted(name for name in fisher if layer_of(name) == layer and ".lora_B." in name)
    scores = [neuron_scores(fisher[name.replace(".lora_B.", ".lora_A.")], fisher[name]) for name in factors]
    together = np.concatenate(scores)
    kept = np.zeros(len(together))
    kept[np.argsort(-together, kind="stable")[: ceil(keep * len(together))]] = 1.0
    parts = np.split(kept, np.cumsum([len(s) for s in scores])[:-1])
    return {name: part[:, None] for name, part in zip(factors, parts, strict=True)}


# ------------------------------------------------------------------------------------------------------------- the exchange


def shared_names(names: Iterable[str], gal: Iterable[int]) -> frozenset[str]:
    """What travels in a round, down and up: the tensors of the GAL and the head. Nothing else."""
    # "the server sends the GAL tensors to the cohort"; "it uploads GAL only"; "The task head is trainable too: shared and
    # aggregated unless the recipe says local."
    chosen = set(gal)
    return frozenset(n for n in names if layer_of(n) is None or layer_of(n) in chosen)
