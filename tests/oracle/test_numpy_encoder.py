"""The NumPy encoder equals transformers' BERT with PEFT's LoRA in float64, forward and backward."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import torch
from peft import LoraConfig, TaskType, get_peft_model, get_peft_model_state_dict
from transformers import BertConfig, BertForSequenceClassification

from tests.oracle.numpy_encoder import Batch, Encoder, Example, Tensors, canonical, central_differences, pad

EXAMPLES = [
    Example((2, 17, 9, 31, 3), 1),
    Example((2, 8, 3), 0),
    Example((2, 22, 5, 3, 11, 39, 3), 2, (0, 0, 0, 0, 1, 1, 1)),
    Example((2, 30, 30, 4, 3), 2, (0, 0, 1, 1, 1)),
]


@dataclass(frozen=True)
class Twin:
    """One random model, twice: in transformers + PEFT and in NumPy. ``tensors`` are the trainable ones, under saved names."""

    model: Any
    encoder: Encoder
    tensors: dict[str, np.ndarray]


def twin(layers: int, seed: int = 0) -> Twin:
    """Every weight drawn anew and wide enough that no part of the model is close to linear; B is random too."""
    torch.manual_seed(seed)
    config = BertConfig(vocab_size=40, hidden_size=16, num_hidden_layers=layers, num_attention_heads=2, intermediate_size=24)
    config.max_position_embeddings, config.type_vocab_size, config.num_labels = 12, 2, 3
    config._attn_implementation = "eager"
    lora = LoraConfig(task_type=TaskType.SEQ_CLS, r=2, lora_alpha=6, target_modules=["query", "value"], lora_dropout=0.0)
    model = get_peft_model(BertForSequenceClassification(config), lora).double().eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.normal_(float("LayerNorm.weight" in name), 0.25)
    weights = {name: value.detach().numpy() for name, value in model.state_dict().items()}
    tensors = {name: value.detach().numpy().copy() for name, value in get_peft_model_state_dict(model).items()}
    return Twin(model, Encoder.of(weights, heads=2, scaling=3.0, eps=config.layer_norm_eps), tensors)


def through_transformers(model: Any, batch: Batch, embeddings: torch.Tensor) -> Any:
    return model(
        inputs_embeds=embeddings,
        attention_mask=torch.as_tensor(batch.mask),
        token_type_ids=torch.as_tensor(batch.segments),
        labels=torch.as_tensor(batch.labels),
        output_hidden_states=True,
    )


def as_torch(batch: Batch) -> dict[str, torch.Tensor]:
    named = {"input_ids": batch.ids, "attention_mask": batch.mask, "token_type_ids": batch.segments, "labels": batch.labels}
    return {name: torch.as_tensor(array) for name, array in named.items()}


def loss_of(encoder: Encoder, batch: Batch, tensors: Tensors) -> float:
    return encoder.forward(tensors, batch).loss


@pytest.mark.parametrize("layers", [2, 3])
def test_forward_equals_transformers(layers: int) -> None:
    pair, batch = twin(layers), pad(EXAMPLES)
    ids = torch.as_tensor(batch.ids)
    theirs = through_transformers(pair.model, batch, pair.model.get_input_embeddings()(ids))
    by_ids = pair.model(**as_torch(batch))
    ours = pair.encoder.forward(pair.tensors, batch)
    assert pair.encoder.layers == layers == len(ours.layers)
    assert abs(ours.loss - theirs.loss.item()) < 1e-9
    np.testing.assert_allclose(ours.logits, by_ids.logits.detach().numpy(), rtol=0, atol=1e-9)
    real = batch.mask == 1
    for layer, hidden in zip(ours.layers, theirs.hidden_states[1:], strict=True):
        np.testing.assert_allclose(layer[real], hidden.detach().numpy()[real], rtol=0, atol=1e-9)


def test_given_embeddings_are_what_is_run() -> None:
    pair, batch = twin(2), pad(EXAMPLES)
    moved = pair.encoder.embed(batch) + np.random.default_rng(1).normal(0, 0.3, (*batch.ids.shape, 16))
    theirs = through_transformers(pair.model, batch, torch.as_tensor(moved))
    ours = pair.encoder.forward(pair.tensors, batch, moved)
    np.testing.assert_allclose(ours.logits, theirs.logits.detach().numpy(), rtol=0, atol=1e-9)
    assert abs(ours.loss - pair.encoder.forward(pair.tensors, batch).loss) > 1e-3


@pytest.mark.parametrize("layers", [2, 3])
def test_gradients_equal_autograd(layers: int) -> None:
    pair, batch = twin(layers), pad(EXAMPLES)
    embeddings = pair.model.get_input_embeddings()(torch.as_tensor(batch.ids)).detach().requires_grad_()
    loss = through_transformers(pair.model, batch, embeddings).loss
    loss.backward()
    live = {canonical(n): p.grad.numpy() for n, p in pair.model.named_parameters() if p.grad is not None}
    ours = pair.encoder.backward(pair.tensors, batch)
    assert len(pair.tensors) == 4 * layers + 2
    for name, gradients in ours.tensors.items():
        assert np.abs(live[canonical(name)]).max() > 1e-4, f"{name} has no gradient to compare with"
        np.testing.assert_allclose(gradients.mean(0), live[canonical(name)], rtol=0, atol=1e-9, err_msg=name)
    assert embeddings.grad is not None
    np.testing.assert_allclose(ours.embeddings / len(EXAMPLES), embeddings.grad.numpy(), rtol=0, atol=1e-9)


def test_gradients_equal_central_differences_and_those_equal_autograd() -> None:
    pair, batch = twin(2), pad(EXAMPLES)
    numeric = central_differences(lambda tensors: loss_of(pair.encoder, batch, tensors), pair.tensors)
    ours = pair.encoder.backward(pair.tensors, batch).tensors
    pair.model(**as_torch(batch)).loss.backward()
    live = {canonical(n): p.grad.numpy() for n, p in pair.model.named_parameters() if p.grad is not None}
    for name, gradient in numeric.items():
        np.testing.assert_allclose(ours[name].mean(0), gradient, rtol=0, atol=1e-8, err_msg=name)
        np.testing.assert_allclose(gradient, live[canonical(name)], rtol=0, atol=1e-6, err_msg=name)


def test_an_example_in_a_padded_batch_has_the_gradient_it_has_alone() -> None:
    pair = twin(2)
    together = pair.encoder.backward(pair.tensors, pad(EXAMPLES))
    for i, example in enumerate(EXAMPLES):
        alone = pair.encoder.backward(pair.tensors, pad([example]))
        for name in pair.tensors:
            np.testing.assert_allclose(together.tensors[name][i], alone.tensors[name][0], rtol=0, atol=1e-12)
        assert not together.embeddings[i, len(example.ids) :].any(), "padding must not matter"


def test_without_b_the_gradient_of_a_is_exactly_zero() -> None:
    pair = twin(2)
    start = {n: np.zeros_like(t) if "lora_B" in n else t for n, t in pair.tensors.items()}
    found = pair.encoder.backward(start, pad(EXAMPLES)).tensors
    assert all((g == 0).all() for n, g in found.items() if "lora_A" in n)
    assert all((g != 0).any() for n, g in found.items() if "lora_A" not in n)
