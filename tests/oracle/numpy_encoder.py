"""A BERT sequence classifier with LoRA in NumPy float64: forward, and the derivative worked out by hand.

Notable: examples never meet each other in an encoder without dropout, so one backward pass keeps the batch axis and gives
every example's own gradient ∂ℓ_i/∂P. It knows neither torch nor Fedloom; ``test_numpy_encoder.py`` holds it to both
transformers + PEFT and to central differences.

Shape letters: B examples, L tokens, H hidden width, h heads, d = H/h, I inner width, r LoRA rank, C classes, D layers.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np
from scipy.special import erf

Tensors = Mapping[str, np.ndarray]


class Example(NamedTuple):
    """One text: token ids, its class, token types (all 0 when left empty)."""

    ids: tuple[int, ...]
    label: int
    segments: tuple[int, ...] = ()


class Batch(NamedTuple):
    """ids, mask (1 at real tokens), segments: (B, L); labels: (B,)."""

    ids: np.ndarray
    mask: np.ndarray
    segments: np.ndarray
    labels: np.ndarray


class Forward(NamedTuple):
    """loss: mean over the batch; losses (B,); logits (B, C); layers: D outputs (B, L, H), first layer first."""

    loss: float
    losses: np.ndarray
    logits: np.ndarray
    layers: list[np.ndarray]


class Backward(NamedTuple):
    """Per example, not averaged: tensors[name] (B, *shape) = ∂ℓ_i/∂tensor; embeddings (B, L, H) = ∂ℓ_i/∂E_i. loss: as forward has it."""

    tensors: dict[str, np.ndarray]
    embeddings: np.ndarray
    loss: float


def pad(examples: Sequence[Example], pad_id: int = 0) -> Batch:
    """The examples as one rectangle, filled up on the right."""
    width = max(len(e.ids) for e in examples)
    ids = np.full((len(examples), width), pad_id, np.int64)
    mask, segments = np.zeros_like(ids), np.zeros_like(ids)
    for row, example in enumerate(examples):
        length = len(example.ids)
        ids[row, :length], mask[row, :length] = example.ids, 1
        segments[row, :length] = example.segments or 0
    return Batch(ids, mask, segments, np.array([e.label for e in examples], np.int64))


def canonical(name: str) -> str:
    """The plain name of a weight: live PEFT, saved PEFT and transformers names of one tensor all become the same."""
    for noise in ("base_model.model.", ".base_layer", ".modules_to_save", ".default"):
        name = name.replace(noise, "")
    return name


@dataclass(frozen=True)
class Encoder:
    """The frozen weights (float64, canonical names) and the few numbers that are not weights; ``scaling`` is s = alpha/r.
    Layers that are ``skipped`` hand on what they are given."""

    weights: Tensors
    heads: int
    scaling: float
    eps: float = 1e-12
    skipped: frozenset[int] = frozenset()

    @staticmethod
    def of(weights: Tensors, *, heads: int, scaling: float, eps: float = 1e-12) -> Encoder:
        """From a dict under transformers or PEFT names (PEFT's untrained copies, ``original_module``, are left out)."""
        kept = {canonical(n): np.array(w, np.float64) for n, w in weights.items() if ".original_module." not in n}
        return Encoder(kept, heads, scaling, eps)

    @property
    def layers(self) -> int:
        """D."""
        return sum(name.endswith("attention.self.key.weight") for name in self.weights)

    def embed(self, batch: Batch) -> np.ndarray:
        """E (B, L, H): the word embeddings, before positions, token types and the first LayerNorm."""
        return self.weights["bert.embeddings.word_embeddings.weight"][batch.ids]

    def forward(self, tensors: Tensors, batch: Batch, embeddings: np.ndarray | None = None, offset: float | np.ndarray = 0.0) -> Forward:
        """Loss, logits and layer outputs with ``tensors`` in place of the weights they name, from ``embeddings`` if given. The loss is
        that of logits + ``offset`` (C,)."""
        return self._run(tensors, batch, embeddings, offset)[0]

    def backward(self, tensors: Tensors, batch: Batch, embeddings: np.ndarray | None = None, offset: float | np.ndarray = 0.0) -> Backward:
        """Every example's gradient in each of ``tensors`` and in the embeddings, the loss being that of logits + ``offset`` (C,).

        Raises:
            KeyError: a tensor is not the weight, bias, lora_A or lora_B of a linear map of this model.
        """
        answer, run = self._run(tensors, batch, embeddings, offset)
        at_embeddings = run.classify_back(answer.logits + offset, batch.labels)
        return Backward({name: run.found[canonical(name)] for name in tensors}, at_embeddings, answer.loss)

    def _run(self, tensors: Tensors, batch: Batch, embeddings: np.ndarray | None, offset: float | np.ndarray) -> tuple[Forward, _Pass]:
        own = {canonical(name): np.asarray(tensor, np.float64) for name, tensor in tensors.items()}
        wanted = frozenset(own)
        run = _Pass({**self.weights, **own}, wanted, self.heads, self.scaling, self.eps, self.layers, batch.mask, self.skipped)
        logits, layers = run.classify(self.embed(batch) if embeddings is None else embeddings, batch.segments)
        seen = logits + offset
        top = seen.max(1, keepdims=True)
        log_p = seen - top - np.log(np.exp(seen - top).sum(1, keepdims=True))  # (B, C)
        losses = -log_p[np.arange(len(logits)), batch.labels]
        return Forward(float(losses.mean()), losses, logits, layers), run


@dataclass
class _Pass:
    """One forward pass that remembers what its derivative needs (``seen``), and the gradients of what is ``wanted`` found so far
    (``found``)."""

    w: Tensors
    wanted: frozenset[str]
    heads: int
    scaling: float
    eps: float
    depth: int
    mask: np.ndarray
    skipped: frozenset[int] = frozenset()
    seen: dict[str, tuple[np.ndarray, ...]] = field(default_factory=dict)
    found: dict[str, np.ndarray] = field(default_factory=dict)

    def linear(self, at: str, x: np.ndarray) -> np.ndarray:
        """y = x Wᵀ + b + s·(x Aᵀ) Bᵀ, the last term where the map has a LoRA pair. x: (B, L, in)."""
        self.seen[at] = (x,)
        y = x @ self.w[f"{at}.weight"].T + self.w[f"{at}.bias"]
        if f"{at}.lora_A.weight" in self.w:
            y = y + self.scaling * (x @ self.w[f"{at}.lora_A.weight"].T) @ self.w[f"{at}.lora_B.weight"].T
        return y

    def linear_back(self, at: str, dy: np.ndarray) -> np.ndarray:
        (x,) = self.seen[at]
        if f"{at}.weight" in self.wanted:
            self.found[f"{at}.weight"] = np.einsum("blo,bli->boi", dy, x)
        if f"{at}.bias" in self.wanted:
            self.found[f"{at}.bias"] = dy.sum(1)
        dx = dy @ self.w[f"{at}.weight"]
        if f"{at}.lora_A.weight" in self.w:
            a, b = self.w[f"{at}.lora_A.weight"], self.w[f"{at}.lora_B.weight"]
            self.found[f"{at}.lora_B.weight"] = self.scaling * np.einsum("blo,blr->bor", dy, x @ a.T)
            self.found[f"{at}.lora_A.weight"] = self.scaling * np.einsum("blr,bli->bri", dy @ b, x)
            dx = dx + self.scaling * (dy @ b) @ a
        return dx

    def norm(self, at: str, x: np.ndarray) -> np.ndarray:
        """LayerNorm over the last axis, biased variance."""
        centred = x - x.mean(-1, keepdims=True)
        deviation = np.sqrt((centred**2).mean(-1, keepdims=True) + self.eps)
        self.seen[at] = (centred / deviation, deviation)
        return centred / deviation * self.w[f"{at}.weight"] + self.w[f"{at}.bias"]

    def norm_back(self, at: str, dy: np.ndarray) -> np.ndarray:
        unit, deviation = self.seen[at]
        d_unit = dy * self.w[f"{at}.weight"]
        mean_part = d_unit.mean(-1, keepdims=True) + unit * (d_unit * unit).mean(-1, keepdims=True)
        return (d_unit - mean_part) / deviation

    def gelu(self, at: str, x: np.ndarray) -> np.ndarray:
        """x·Φ(x) with the exact normal distribution function."""
        phi = 0.5 * (1 + erf(x / math.sqrt(2)))
        self.seen[at] = (x, phi)
        return x * phi

    def gelu_back(self, at: str, dy: np.ndarray) -> np.ndarray:
        x, phi = self.seen[at]
        return dy * (phi + x * np.exp(-(x**2) / 2) / math.sqrt(2 * math.pi))

    def split(self, x: np.ndarray) -> np.ndarray:
        """(B, L, H) -> (B, h, L, d)."""
        return x.reshape(*x.shape[:2], self.heads, -1).swapaxes(1, 2)

    def join(self, x: np.ndarray) -> np.ndarray:
        """(B, h, L, d) -> (B, L, H)."""
        return x.swapaxes(1, 2).reshape(x.shape[0], x.shape[2], -1)

    def attention(self, at: str, x: np.ndarray) -> np.ndarray:
        """softmax(q kᵀ/√d) v, every token looking at real tokens only."""
        q, k, v = (self.split(self.linear(f"{at}.{part}", x)) for part in ("query", "key", "value"))
        scores = np.where(self.mask[:, None, None, :] == 1, q @ k.swapaxes(2, 3) / math.sqrt(q.shape[-1]), -np.inf)
        weight = np.exp(scores - scores.max(-1, keepdims=True))
        weight = weight / weight.sum(-1, keepdims=True)  # (B, h, L, L)
        self.seen[at] = (q, k, v, weight)
        return self.join(weight @ v)

    def attention_back(self, at: str, dy: np.ndarray) -> np.ndarray:
        q, k, v, weight = self.seen[at]
        d_context = self.split(dy)
        d_weight = d_context @ v.swapaxes(2, 3)
        d_scores = weight * (d_weight - (d_weight * weight).sum(-1, keepdims=True)) / math.sqrt(q.shape[-1])
        parts = {"query": d_scores @ k, "key": d_scores.swapaxes(2, 3) @ q, "value": weight.swapaxes(2, 3) @ d_context}
        return sum((self.linear_back(f"{at}.{part}", self.join(d)) for part, d in parts.items()), np.zeros_like(dy))

    def layer(self, at: str, x: np.ndarray) -> np.ndarray:
        """Attention and feed-forward, each followed by residual and LayerNorm."""
        attended = self.linear(f"{at}.attention.output.dense", self.attention(f"{at}.attention.self", x))
        x = self.norm(f"{at}.attention.output.LayerNorm", x + attended)
        inner = self.gelu(f"{at}.intermediate", self.linear(f"{at}.intermediate.dense", x))
        return self.norm(f"{at}.output.LayerNorm", x + self.linear(f"{at}.output.dense", inner))

    def layer_back(self, at: str, dy: np.ndarray) -> np.ndarray:
        dy = self.norm_back(f"{at}.output.LayerNorm", dy)
        inner = self.gelu_back(f"{at}.intermediate", self.linear_back(f"{at}.output.dense", dy))
        dy = dy + self.linear_back(f"{at}.intermediate.dense", inner)
        dy = self.norm_back(f"{at}.attention.output.LayerNorm", dy)
        return dy + self.attention_back(f"{at}.attention.self", self.linear_back(f"{at}.attention.output.dense", dy))

    def classify(self, embeddings: np.ndarray, segments: np.ndarray) -> tuple[np.ndarray, list[np.ndarray]]:
        """Logits (B, C) from the token at position 0, and every layer's output."""
        positions = self.w["bert.embeddings.position_embeddings.weight"][: embeddings.shape[1]]
        kinds = self.w["bert.embeddings.token_type_embeddings.weight"][segments]
        x = self.norm("bert.embeddings.LayerNorm", embeddings + positions + kinds)
        layers = []
        for i in range(self.depth):
            x = x if i in self.skipped else self.layer(f"bert.encoder.layer.{i}", x)
            layers.append(x)
        pooled = np.tanh(self.linear("bert.pooler.dense", x[:, :1]))  # (B, 1, H)
        self.seen["pooled"] = (pooled, x)
        return self.linear("classifier", pooled)[:, 0], layers

    def classify_back(self, logits: np.ndarray, labels: np.ndarray) -> np.ndarray:
        """From ∂ℓ_i/∂logits = softmax − onehot down to ∂ℓ_i/∂E."""
        p = np.exp(logits - logits.max(1, keepdims=True))
        d_logits = p / p.sum(1, keepdims=True) - np.eye(logits.shape[1])[labels]
        pooled, last = self.seen["pooled"]
        d_pooled = self.linear_back("classifier", d_logits[:, None]) * (1 - pooled**2)
        dx = np.zeros_like(last)
        dx[:, :1] = self.linear_back("bert.pooler.dense", d_pooled)
        for i in reversed(range(self.depth)):
            dx = dx if i in self.skipped else self.layer_back(f"bert.encoder.layer.{i}", dx)
        return self.norm_back("bert.embeddings.LayerNorm", dx)


def central_differences(function: Callable[[Tensors], float], tensors: Tensors, step: float = 1e-5) -> dict[str, np.ndarray]:
    """∂function/∂tensor for every scalar of every tensor: (f(x + step) − f(x − step)) / (2·step)."""
    gradients = {}
    for name, tensor in tensors.items():
        gradient = np.zeros(tensor.shape)
        for at in np.ndindex(tensor.shape):
            nudge = np.zeros(tensor.shape)
            nudge[at] = step
            above, below = ({**tensors, name: tensor + sign * nudge} for sign in (1, -1))
            gradient[at] = (function(above) - function(below)) / (2 * step)
        gradients[name] = gradient
    return gradients
