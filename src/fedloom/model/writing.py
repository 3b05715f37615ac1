"""What a causal language model writes after a prompt."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch

from fedloom.messages import Tensors
from fedloom.model.names import is_beneath
from fedloom.tensors import only, without

if TYPE_CHECKING:
    from fedloom.model.base import Model


def continued(model: Model, tensors: Tensors, prompts: Sequence[Sequence[int]], most: int, together: int = 1) -> list[str]:
    """What a speaker writes after each prompt's token ids, the likeliest token every time, ``most`` at most, and no more than the model
    reads; in the precision that training computes in. ``tensors`` override the model's own by saved name while it writes;
    ``together`` prompts are answered at once, padded on the left."""
    module: Any = model.base(model.dtype)
    model.stand_on(only(tensors, [n for n in tensors if is_beneath(n)]))
    own = dict(module.named_parameters())
    given = without({**model.initial, **tensors}, model.beneath.names)
    kept, end = {name: own[model.parameters[name]].data for name in given}, model.tokenizer.eos_token_id
    try:
        for name, tensor in given.items():  # a pair has the rank that it comes with, so its own lies aside for the while
            own[model.parameters[name]].data = tensor.detach().to(kept[name])
        with torch.no_grad():
            made = []
            for at in range(0, len(prompts), together):
                some = prompts[at : at + together]
                width = max(map(len, some))
                ids = torch.tensor([[*[model.pad_id] * (width - len(p)), *p] for p in some], device=model.device)
                mask = torch.tensor([[*[0] * (width - len(p)), *[1] * len(p)] for p in some], device=model.device)
                how = {"max_new_tokens": max(1, min(most, model.reads - width)), "pad_token_id": model.pad_id, "eos_token_id": end}
                how |= {"do_sample": False, "num_beams": 1, "repetition_penalty": 1.0}  # whatever the model's own settings are
                made += module.generate(input_ids=ids, attention_mask=mask, **how)[:, width:].tolist()
    finally:
        for name, tensor in kept.items():
            own[model.parameters[name]].data = tensor
    ended = [ids[: ids.index(end)] if end in ids else ids for ids in made]
    return [model.tokenizer.decode(ids, skip_special_tokens=True) for ids in ended]
