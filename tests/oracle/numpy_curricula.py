"""What each curriculum's paper says is open in round t of T, in plain Python and NumPy float64, sentence by sentence.

Where a paper draws at random, the draw is given. ``test_numpy_curricula.py`` holds this to cases worked out by hand,
``test_curricula.py`` holds Fedloom to this.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Sequence

import numpy as np

from tests.oracle.numpy_encoder import Encoder, Example, Tensors, pad

Draw = Callable[[int, int], list[np.ndarray]]
"""(how many, local epoch) -> batches of positions 0..count−1, as the run drew them."""


# ------------------------------------------------------------------------------- competence-based curriculum, 1903.09848


def rarity(texts: Sequence[Example]) -> list[float]:
    # "p̂(w_j) = 1/N_total Σ_i Σ_k 1[w_k^i = w_j]": relative unigram frequency over the corpus; here the device's own texts
    counts = Counter(word for text in texts for word in text.ids)
    total = sum(counts.values())
    # "d_rarity(s_i) = − Σ_k log p̂(w_k^i)"
    return [-sum(math.log(counts[word] / total) for word in text.ids) for text in texts]


def places(difficulties: Sequence[float]) -> list[float]:
    # "the cumulative density function of the difficulties ... d̄(s_i) ∈ [0, 1]". Read as: the share of texts that are not harder.
    return [sum(other <= d for other in difficulties) / len(difficulties) for d in difficulties]


def competence(t: int, rounds: int, initial: float, share: float) -> float:
    # "c_sqrt(t) = min(1, sqrt(t (1 − c_0²) / T + c_0²))"; T is the length of the curriculum, here a share of the rounds
    return min(1.0, math.sqrt(t * (1 - initial**2) / (share * rounds) + initial**2))


def able(texts: Sequence[Example], c: float, batch: int) -> list[int]:
    # "sample a batch from all s_i such that d̄(s_i) ≤ c(t)". Read as: at least as many as fill one batch, the easiest ones.
    hard = rarity(texts)
    chosen = {i for i, place in enumerate(places(hard)) if place <= c}
    return sorted(chosen | set(sorted(range(len(texts)), key=lambda i: (hard[i], i))[:batch]))


# -------------------------------------------------------------------------- lengths: SLW, 2108.06084; Shortformer, 2012.15832


def cut(text: Example, length: int) -> Example:
    # "truncate"; here a text's last token (the separator) stays, as a tokenizer's own truncation has it
    if len(text.ids) <= length:
        return text
    kinds = text.segments and (*text.segments[: length - 1], text.segments[-1])
    return Example((*text.ids[: length - 1], text.ids[-1]), text.label, kinds or ())


def warmed_length(t: int, rounds: int, first: int, whole: int, share: float) -> int:
    # "seqlen_t = seqlen_s + (seqlen_e − seqlen_s) · min(t/T, 1)", in whole tokens; seqlen_e is the device's longest text
    return first + math.floor(max(0, whole - first) * min(t / (share * rounds), 1) + 1e-9)


def staged_length(t: int, rounds: int, first: int, whole: int, share: float) -> int:
    # "two-stage training": "shorter subsequences" in the first stage, "the final subsequence length" in the second
    return first if t < share * rounds - 1e-9 else max(first, whole)


# ------------------------------------------------------------------------------------------------------ sorted by the loss


def losses(encoder: Encoder, tensors: Tensors, texts: Sequence[Example]) -> np.ndarray:
    return encoder.forward(tensors, pad(texts)).losses
