"""A random encoder and random questions, small enough that a whole federated run takes a second in NumPy."""

from __future__ import annotations

import numpy as np

from tests.oracle.numpy_encoder import Encoder, Example, Tensors

HIDDEN, RANK, CLASSES, LAYERS = 16, 2, 3, 2


def tiny(seed: int = 0, layers: int = LAYERS) -> tuple[Encoder, dict[str, np.ndarray]]:
    """A random encoder and its trainable tensors at the start of LoRA: A random, B = 0, a random head."""
    rng = np.random.default_rng(seed)
    sizes = {"word": 30, "position": 10, "token_type": 2}
    shapes = {f"bert.embeddings.{kind}_embeddings.weight": (n, HIDDEN) for kind, n in sizes.items()}
    norms, start = ["bert.embeddings.LayerNorm"], {}
    maps = {"bert.pooler.dense": (HIDDEN, HIDDEN)}
    for layer in (f"bert.encoder.layer.{i}" for i in range(layers)):
        maps |= {f"{layer}.attention.self.{part}": (HIDDEN, HIDDEN) for part in ("query", "key", "value")}
        maps |= {f"{layer}.attention.output.dense": (HIDDEN, HIDDEN)}
        maps |= {f"{layer}.intermediate.dense": (24, HIDDEN), f"{layer}.output.dense": (HIDDEN, 24)}
        norms += [f"{layer}.attention.output.LayerNorm", f"{layer}.output.LayerNorm"]
        for part in ("query", "value"):
            start[f"base_model.model.{layer}.attention.self.{part}.lora_A.weight"] = rng.normal(0, 0.3, (RANK, HIDDEN))
            start[f"base_model.model.{layer}.attention.self.{part}.lora_B.weight"] = np.zeros((HIDDEN, RANK))
    start["base_model.model.classifier.weight"] = rng.normal(0, 0.3, (CLASSES, HIDDEN))
    start["base_model.model.classifier.bias"] = np.zeros(CLASSES)
    weights = {name: rng.normal(0, 0.3, shape) for name, shape in shapes.items()}
    weights |= {f"{name}.weight": rng.normal(0, 0.3, shape) for name, shape in maps.items()}
    weights |= {f"{name}.bias": rng.normal(0, 0.3, shape[0]) for name, shape in maps.items()}
    weights |= {f"{name}.weight": rng.normal(1, 0.3, HIDDEN) for name in norms}
    weights |= {f"{name}.bias": rng.normal(0, 0.3, HIDDEN) for name in norms}
    return Encoder.of(weights, heads=2, scaling=2.0), start


def questions(n: int, seed: int = 0) -> list[Example]:
    rng = np.random.default_rng(seed)
    ids = [(1, *(int(i) for i in rng.integers(2, 30, rng.integers(2, 7)))) for _ in range(n)]
    return [Example(text, int(rng.integers(CLASSES))) for text in ids]


def moved(start: Tensors, seed: int = 5) -> dict[str, np.ndarray]:
    """The tensors somewhere else than the start, B no longer 0."""
    rng = np.random.default_rng(seed)
    return {name: tensor + rng.normal(0, 0.2, tensor.shape) for name, tensor in start.items()}
