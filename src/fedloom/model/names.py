"""What the saved names of tensors say: of which layer, factor of a LoRA pair or task head each one is, and what lies under it.

Pure functions of names: this file knows no library's modules. Which names a model has is ``adapters.py``'s.
"""

from __future__ import annotations

from collections.abc import Collection

from fedloom.model.blocks import layer_of

PEFT = "base_model.model."
"""What PEFT puts before the names of a model's tensors."""
HEADS = frozenset({"classifier", "score", "qa_outputs"})
"""What the libraries call the head of a classifier, and of what finds answers."""
BESIDE = frozenset({"pooler", "head", "pre_classifier", "sequence_summary", "logits_proj"})
"""What they call that stands between the body and such a head."""


def under(name: str) -> str:
    """The saved name of the frozen weight that a factor's pair stands on.

    Raises:
        ValueError: the name is no LoRA factor.
    """
    if not is_factor(name):
        raise ValueError(f"'{name}' is no LoRA factor; factors hold '.lora_A.' or '.lora_B.'")
    return name.replace(".lora_A.", ".base_layer.").replace(".lora_B.", ".base_layer.")


def is_beneath(name: str) -> bool:
    """Whether a saved name is that of a frozen weight under a pair."""
    return ".base_layer." in name


def is_head(name: str) -> bool:
    """Whether a saved name of what is trained is a tensor of the task head: of the head itself, or of what stands beside the body before
    it; a pooler within the body, where the body's own is frozen (of PEFT's kinds), so that one that is trained came with the head."""
    parts = name.removeprefix(PEFT).split(".")
    if not HEADS.isdisjoint(parts):
        return True
    return (parts[0] in BESIDE or (name.startswith(PEFT) and "pooler" in parts)) and not is_factor(name) and not is_beneath(name)


def is_drawn(name: str, trained: Collection[str]) -> bool:
    """Whether a tensor of the module is none of the pre-trained model's: the task head's and its copies, and of what stands beside the body
    only what is ``trained``, for that came with the head."""
    parts = set(name.split("."))
    return bool(parts & {*HEADS, "modules_to_save", "original_module"}) or (name in trained and is_head(name))


def need_head(names: Collection[str], who: str) -> None:
    """For methods whose heads are personal.

    Raises:
        ValueError: none is trained among ``names``.
    """
    if not any(is_head(name) for name in names):
        raise ValueError(
            f"'{who}' keeps each device's head to itself, and this one is the language model's own; give it a new one: --head linear"
        )


def need_pairs(names: Collection[str], who: str) -> None:
    """For methods that treat LoRA's factors apart.

    Raises:
        ValueError: there are none among ``names``.
    """
    if not any(is_factor(name) for name in names):
        raise ValueError(
            f"'{who}' works on LoRA's factors, and this model trains none, but {sorted(names)[:2]} …; give it --adapter.kind lora"
        )


def is_factor(name: str) -> bool:
    """Whether a saved name is one of a LoRA pair."""
    return is_down(name) or is_up(name)


def stays(name: str, shared: Collection[int]) -> bool:
    """Whether it is a factor of a layer that is not among the ``shared`` ones, so that every device has its own. What is of no layer (a
    pair on a pooler) is everybody's."""
    return is_factor(name) and layer_of(name) is not None and layer_of(name) not in shared


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
