"""Adapters: LoRA through PEFT, and the names of what is trained. The only file that imports ``peft``.

LoRA (2106.09685): a frozen weight W0 (d_out, d_in) becomes W0 + s·B·A with A (r, d_in), B (d_out, r), s = alpha/r; A starts random,
B starts at zero, so the start is the pre-trained function. Tensors carry the names that PEFT saves
(``base_model.model.….lora_A.weight``), so any set of them can be written as an adapter folder.

This file does not know transformers, data, or who trains.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel, TaskType, get_peft_model, get_peft_model_state_dict
from safetensors.torch import save_file
from torch import nn

ADAPTER = "default"


@dataclass(frozen=True)
class Lora:
    """LoRA's settings.

    Attributes:
        rank: rank r of each pair.
        alpha: the pair is scaled by s = alpha / rank.
        targets: ends of the module names that get a pair (empty: PEFT's choice for the architecture, query and value in most).
        dropout: rate for LoRA's input and for every dropout site of the base model (0: none).
    """

    rank: int = 8
    alpha: float = 16.0
    targets: tuple[str, ...] = ()
    dropout: float = 0.0


class AdapterError(ValueError):
    """An adapter that cannot be put on this model; the message lists what could."""


def attach(base: nn.Module, lora: Lora) -> nn.Module:
    """``base`` with LoRA pairs on its targets and a trainable task head; everything else is frozen.

    Raises:
        AdapterError: the rank is not positive, or no target exists in this architecture (the message lists the linear modules).
    """
    if lora.rank < 1 or not 0 <= lora.dropout < 1:
        raise AdapterError(f"LoRA needs rank >= 1 and 0 <= dropout < 1; got rank {lora.rank}, dropout {lora.dropout}")
    config = LoraConfig(
        task_type=TaskType.SEQ_CLS,
        r=lora.rank,
        lora_alpha=lora.alpha,  # type: ignore[arg-type]
        lora_dropout=lora.dropout,
        target_modules=list(lora.targets) or None,
    )
    try:
        model = get_peft_model(base, config)  # type: ignore[arg-type]
    except ValueError as error:
        ends = sorted(
            {n.rsplit(".", 1)[-1] for n, m in base.named_modules() if "Linear" in type(m).__name__ or "Conv1D" in type(m).__name__}
        )
        wanted = f"targets {list(lora.targets)}" if lora.targets else "no known default targets"
        raise AdapterError(
            f"LoRA has {wanted} for {type(base).__name__}. Name some of its linear modules, e.g. --adapter.targets {' '.join(ends[:2])}; "
            f"it has {ends}"
        ) from error
    return model


def trainable_names(model: nn.Module) -> dict[str, str]:
    """Saved name -> parameter name in the module, for every trainable parameter.

    Raises:
        AdapterError: PEFT would save other tensors than are trained (a PEFT release that this file does not know).
    """
    names = {_saved(name): name for name, p in model.named_parameters() if p.requires_grad}
    saved = set(get_peft_model_state_dict(model))  # type: ignore[arg-type]
    if saved != set(names):
        raise AdapterError(f"PEFT saves other tensors than are trained: {sorted(saved ^ set(names))[:4]}")
    return names


def _saved(name: str) -> str:
    return (
        name.replace(f".modules_to_save.{ADAPTER}.", ".")
        .replace(f".lora_A.{ADAPTER}.", ".lora_A.")
        .replace(f".lora_B.{ADAPTER}.", ".lora_B.")
    )


def is_factor(name: str) -> bool:
    """Whether a saved name is one of a LoRA pair (the rest is the task head)."""
    return is_down(name) or is_up(name)


def is_down(name: str) -> bool:
    """Whether a saved name is an A (r, d_in), the factor that projects down."""
    return ".lora_A." in name


def is_up(name: str) -> bool:
    """Whether a saved name is a B (d_out, r), the factor that projects up."""
    return ".lora_B." in name


def partner(name: str) -> str:
    """The name of A for B's and of B for A's.

    Raises:
        ValueError: the name is no LoRA factor.
    """
    if not is_factor(name):
        raise ValueError(f"'{name}' is no LoRA factor; factors hold '.lora_A.' or '.lora_B.'")
    return name.replace(".lora_A.", ".lora_B.") if ".lora_A." in name else name.replace(".lora_B.", ".lora_A.")


def merged(model: nn.Module, tensors: Mapping[str, torch.Tensor]) -> Any:
    """A copy of the base with W0 + s·B·A in place of the pairs and ``tensors``' task head: a plain model that needs no PEFT.

    Raises:
        AdapterError: a tensor that the model trains is missing, or one is unknown.
    """
    copied: Any = copy.deepcopy(model)
    own = dict(copied.named_parameters())
    names = {_saved(name): name for name in own if is_factor(_saved(name)) or f".modules_to_save.{ADAPTER}." in name}
    if set(tensors) != set(names):
        raise AdapterError(f"the adapter needs exactly the trained tensors; these differ: {sorted(set(tensors) ^ set(names))[:6]}")
    with torch.no_grad():
        for name, tensor in tensors.items():
            own[names[name]].copy_(tensor)
    return copied.merge_and_unload()


def write_adapter(model: nn.Module, names: Collection[str], tensors: Mapping[str, torch.Tensor], folder: Path, base: str) -> None:
    """Write a folder that ``peft.PeftModel.from_pretrained`` loads: ``adapter_config.json`` and ``adapter_model.safetensors``.

    ``names`` are the saved names of all trained tensors, ``base`` the folder or Hub name of the base model.

    Raises:
        AdapterError: a tensor that the model trains is missing, or one is unknown.
    """
    if set(tensors) != set(names):
        raise AdapterError(f"the adapter needs exactly the trained tensors; these differ: {sorted(set(tensors) ^ set(names))[:6]}")
    assert isinstance(model, PeftModel)
    folder.mkdir(parents=True, exist_ok=True)
    config = model.peft_config[ADAPTER].to_dict()
    config |= {"base_model_name_or_path": base, "inference_mode": True}
    config = {key: sorted(value) if isinstance(value, set) else value for key, value in config.items()}
    (folder / "adapter_config.json").write_text(json.dumps(config, indent=2, sort_keys=True, default=str))
    save_file(
        {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()},
        folder / "adapter_model.safetensors",
        {"format": "pt"},
    )
