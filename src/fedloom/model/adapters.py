"""Adapters: what of a pre-trained model is trained, and under which names. The only file that imports ``peft``.

LoRA (2106.09685): a frozen weight W0 (d_out, d_in) becomes W0 + s·B·A with A (r, d_in), B (d_out, r), s = alpha/r; A starts random,
B starts at zero, so the start is the pre-trained function. The other kinds are in :class:`Adapter`. Tensors carry the names under which
they are saved: PEFT's (``base_model.model.….lora_A.weight``) where PEFT has the kind, so any set of them can be written as an adapter
folder, and the base model's own otherwise. The task head is trained with every kind.

This file does not know transformers, data, or who trains.
"""

from __future__ import annotations

import copy
import hashlib
import json
import math
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple, get_args

import torch
from peft import IA3Config, LoraConfig, PeftConfig, PeftModel, TaskType, get_peft_model, get_peft_model_state_dict
from peft.tuners.lora import LoraLayer
from safetensors.torch import save_file
from torch import nn

from fedloom.model import bottleneck, mixing
from fedloom.model.factors import widened
from fedloom.model.names import HEADS, is_beneath, is_down, is_up
from fedloom.model.principal import drawn, principal_factors
from fedloom.model.quantised import Base, Quantised, quantise, restore
from fedloom.telling import Tellable
from fedloom.tensors import fingerprint

ADAPTER = "default"

Kind = Literal["auto", "lora", "ia3", "houlsby", "pfeiffer", "bitfit", "full", "mixed"]
OF_THE_BASE = ("full", "bitfit")
"""Kinds that train numbers of the base itself."""

Start = Literal["auto", "zero", "svd", "fast-svd"]
SPLITTING: tuple[Start, ...] = ("svd", "fast-svd")
"""Starts that take a part out of the weights under the pairs."""
LOADABLE: tuple[Kind, ...] = ("lora", "ia3", "bitfit", "full")
"""Kinds that other libraries load."""


@dataclass(frozen=True)
class Adapter:
    """What is trained, beside the task head.

    Attributes:
        rank: rank r of each LoRA pair; width of a bottleneck.
        alpha: a LoRA pair is scaled by s = alpha / rank.
        targets: ends of the module names that get a pair, or an (IA)³ scale (empty: PEFT's choice for the architecture).
        dropout: rate for LoRA's input and for every dropout site of the base model (0: none).
        kind: lora; ia3: scales of keys, values and the feed-forward part ((IA)³ 2205.05638); houlsby, pfeiffer: bottleneck adapters;
            bitfit: the biases (2106.10199); full: every weight; mixed: two LoRA pairs and a mixer that weighs them by what comes in
            (``mixing.py``); auto: as the method has it, else lora.
        start: where LoRA starts: at zero, from the weights' singular vectors (svd; ``principal.py``), from what random subspace iteration
            finds of them in a fraction of the time (fast-svd), or auto: as the method has it, else at zero.
        base: what the frozen linear layers of the transformer's layers are held in: exact, as ``precision`` says, or int8 or nf4, 8 or 4
            bits a number and a scale for some (``quantised.py``); for kinds that train none of them.
    """

    rank: int = 8
    alpha: float = 16.0
    targets: tuple[str, ...] = ()
    dropout: float = 0.0
    kind: Kind = "auto"
    start: Start = "auto"
    base: Base = "exact"


class AdapterError(ValueError, Tellable):
    """An adapter that cannot be put on this model; the message lists what could."""


def attach(
    base: nn.Module,
    adapter: Adapter,
    classifier: bool = True,
    tags: bool = False,
    finds: bool = False,
    new: Collection[str] = (),
) -> nn.Module:
    """``base`` with the adapter and, of a ``classifier`` (of whole texts, of their words: ``tags``, or of where an
    answer is: ``finds``), a trainable task head; everything else is frozen (``requires_grad`` says which is which). ``new``: names of
    parameters that no checkpoint brought, which are of the head too. LoRA's pairs are at zero after this, whatever the adapter's start:
    see :func:`take_principal_parts`.

    Raises:
        AdapterError: rank or alpha is not positive, no target exists in this architecture, or it lacks what the kind trains.
    """
    if adapter.rank < 1 or not 0 <= adapter.dropout < 1:
        raise AdapterError(f"an adapter needs rank >= 1 and 0 <= dropout < 1; got rank {adapter.rank}, dropout {adapter.dropout}")
    if not 0 < adapter.alpha < math.inf:
        raise AdapterError(f"an adapter needs alpha > 0, for what it adds counts alpha/rank; got alpha {adapter.alpha}")
    if adapter.start in SPLITTING and adapter.kind not in ("auto", "lora"):
        raise AdapterError(f"start {adapter.start} is one of LoRA's pairs, and kind {adapter.kind} has none; give --adapter.kind lora")
    if adapter.base != "exact" and adapter.kind in OF_THE_BASE:
        raise AdapterError(
            f"kind {adapter.kind} trains numbers of the base itself, and --adapter.base {adapter.base} holds those in few bits, frozen; "
            "leave it out, or give --adapter.kind lora, ia3, houlsby, pfeiffer or mixed"
        )
    targets = list(adapter.targets) or None
    task = None if finds or not classifier else TaskType.TOKEN_CLS if tags else TaskType.SEQ_CLS
    # PEFT's own class for finding answers (QUESTION_ANS, as of 0.21) passes neither token types nor positions on to the model
    heads = [name for name, _ in base.named_children() if name in HEADS] if finds else []
    heads += sorted({name.rpartition(".")[0] for name in new if HEADS.isdisjoint(name.split("."))})
    head: dict[str, Any] = {"modules_to_save": heads} if heads else {}
    match adapter.kind:
        case "auto" | "lora":
            scaling: dict[str, Any] = {"lora_alpha": adapter.alpha, "lora_dropout": adapter.dropout}
            config = LoraConfig(task_type=task, r=adapter.rank, target_modules=targets, **scaling, **head)
            return _by_peft(base, adapter, config)
        case "ia3":
            fed: dict[str, Any] = {"feedforward_modules": []} if targets else {}
            return _by_peft(base, adapter, IA3Config(task_type=task, target_modules=targets, **fed, **head))
        case "houlsby" | "pfeiffer":
            before = {id(p) for p in base.parameters()}
            try:
                bottleneck.insert(base, adapter.kind, adapter.rank)
            except LookupError as error:
                raise AdapterError(f"{adapter.kind} has no place: {error}. Other kinds: {_other(adapter.kind)}") from error
            train = {name for name, p in base.named_parameters() if id(p) not in before}
        case "bitfit":
            train = {name for name, _ in base.named_parameters() if name.endswith(".bias") and HEADS.isdisjoint(name.split("."))}
            if not train:
                raise AdapterError(f"bitfit trains biases, and {type(base).__name__} has none. Other kinds: {_other('bitfit')}")
        case "mixed":
            base = _mixed(base, adapter, targets)
            train = {name for name, _ in base.named_parameters() if mixing.is_own(name) or mixing.is_rest(name) or mixing.GATE in name}
        case "full":
            train = {name for name, _ in base.named_parameters()}
        case _:
            raise AdapterError(f"there is no kind '{adapter.kind}'; there are {', '.join(get_args(Kind)[1:])}")
    for name, parameter in base.named_parameters():
        parameter.requires_grad_(name in train or name in new or not HEADS.isdisjoint(name.split(".")))
    return base


def _mixed(base: nn.Module, adapter: Adapter, targets: list[str] | None) -> nn.Module:
    """With two pairs and a mixer wherever PEFT would put a pair."""
    found = _by_peft(base, adapter, LoraConfig(r=1, target_modules=targets))
    places = [name.removeprefix("base_model.model.") for name, part in found.named_modules() if isinstance(part, LoraLayer)]
    plain: Any = found.unload()  # type: ignore[operator]
    mixing.insert(plain, places, adapter.rank, adapter.alpha / adapter.rank, adapter.dropout)
    return plain


def _ours(model: nn.Module) -> str:
    """What no library knows of a model's adapter, or nothing."""
    kinds = {bottleneck.Bottleneck: "bottleneck adapters", mixing.Mixed: "mixed pairs"}
    return next((what for kind, what in kinds.items() if any(isinstance(part, kind) for part in model.modules())), "")


def _other(kind: str) -> str:
    return ", ".join(one for one in get_args(Kind)[1:] if one != kind)


def _by_peft(base: nn.Module, adapter: Adapter, config: PeftConfig) -> nn.Module:
    try:
        return get_peft_model(base, config)  # type: ignore[arg-type]
    except ValueError as error:
        ends = sorted(
            {n.rsplit(".", 1)[-1] for n, m in base.named_modules() if "Linear" in type(m).__name__ or "Conv1D" in type(m).__name__}
        )
        name = "LoRA" if adapter.kind != "ia3" else "(IA)³"
        wanted = f"targets {list(adapter.targets)}" if adapter.targets else "no known default targets"
        raise AdapterError(
            f"{name} has {wanted} for {type(base).__name__}. Name some of its linear modules, e.g. --adapter.targets {' '.join(ends[:2])}; "
            f"it has {ends}"
        ) from error


def in_few_bits(model: nn.Module, base: Base) -> dict[str, Quantised]:
    """Hold the frozen base of a model with its adapter as ``base`` says: what is held in few bits, by the names of the weights.

    Raises:
        AdapterError: nothing of it can be.
    """
    if base == "exact":
        return {}
    try:
        return quantise(model, base)
    except LookupError as error:
        raise AdapterError(f"--adapter.base {base}: {error}; leave it out") from error


def take_principal_parts(model: nn.Module, fast: bool = False) -> str:
    """Put A0 and B0, found exactly or ``fast``, into every pair and W_res under it; where the base is held in few bits, W0 is what these
    are, and s·B0·A0 is taken out beside it. The model's copy in memory is changed, never a file. Returns the fingerprint of the weights W0
    as they were, by which models are compared: what is left of them differs in its last digits from one machine to another.
    What was drawn to find directions fast is in it too: who draws otherwise has other directions, and cannot be averaged with the rest.

    Raises:
        AdapterError: the rank is higher than that of a weight.
    """
    were = {}
    for name, module in model.named_modules():
        if isinstance(module, LoraLayer) and ADAPTER in module.lora_A:
            pair: Any = module
            layer = pair.get_base_layer()
            transposed = "Conv1D" in type(layer).__name__
            weight = layer.weight() if isinstance(layer, Quantised) else _upright(layer.weight.detach(), transposed)
            rank, scaling = int(pair.r[ADAPTER]), float(pair.scaling[ADAPTER])
            by = {"drawn": torch.from_numpy(drawn(weight.shape, rank))} if fast else {}
            were[name] = fingerprint({"weight": weight, **by})
            try:
                a, b = principal_factors(weight, rank, scaling, fast)
            except ValueError as error:
                raise AdapterError(f"LoRA cannot start from singular vectors: {error}") from error
            with torch.no_grad():
                pair.lora_A[ADAPTER].weight.copy_(a)
                pair.lora_B[ADAPTER].weight.copy_(b)
                if isinstance(layer, Quantised):
                    layer.take_out(a, b, scaling)
                    continue
                rest = weight.double() - scaling * b.double() @ a.double()
                layer.weight.copy_(_upright(rest, transposed))
    return hashlib.sha256(json.dumps(were, sort_keys=True).encode()).hexdigest()


def _upright(weight: torch.Tensor, transposed: bool) -> torch.Tensor:
    return weight.T if transposed else weight


def trainable_names(model: nn.Module) -> dict[str, str]:
    """Saved name -> parameter name in the module, for every trainable parameter.

    Raises:
        AdapterError: PEFT would save other tensors than are trained (a PEFT release that this file does not know).
    """
    names = {_saved(name): name for name, p in model.named_parameters() if p.requires_grad}
    saved = set(get_peft_model_state_dict(model)) if isinstance(model, PeftModel) else set(names)  # type: ignore[arg-type]
    if saved != set(names):
        raise AdapterError(f"PEFT saves other tensors than are trained: {sorted(saved ^ set(names))[:4]}")
    return names


def _saved(name: str) -> str:
    return (
        name.replace(f".modules_to_save.{ADAPTER}.", ".")
        .replace(f".lora_A.{ADAPTER}.", ".lora_A.")
        .replace(f".lora_B.{ADAPTER}.", ".lora_B.")
        .removesuffix(f".{ADAPTER}")
    )


class Beneath(NamedTuple):
    """The frozen weights W (d_out, d_in) that LoRA's pairs stand on. ``names``: saved names (:func:`under`), which are also those of the
    module's parameters; ``transposed``: those that the module keeps as (d_in, d_out); ``scaling``: s = alpha/r of every pair."""

    names: tuple[str, ...] = ()
    transposed: frozenset[str] = frozenset()
    scaling: float = 0.0


def beneath(model: nn.Module) -> Beneath:
    """What lies under the pairs of a model with LoRA; nothing of another kind."""
    pairs = {f"{name}.base_layer.weight": part for name, part in model.named_modules() if isinstance(part, LoraLayer)}
    pairs = {name: part for name, part in pairs.items() if ADAPTER in part.lora_A}
    turned = frozenset(name for name, part in pairs.items() if "Conv1D" in type(part.get_base_layer()).__name__)
    scalings = {float(part.scaling[ADAPTER]) for part in pairs.values()}
    return Beneath(tuple(sorted(pairs)), turned, scalings.pop() if scalings else 0.0)


def merged(model: nn.Module, names: Mapping[str, str], tensors: Mapping[str, torch.Tensor]) -> Any:
    """The base with ``tensors`` in their places and PEFT's adapters merged into the weights (W0 + s·B·A): a plain model, in float32 and on
    the processor; of a base in few bits W0 is what these are. What is so already and nothing is merged into is not copied: neither the base
    nor ``tensors`` may change meanwhile.

    ``names``: saved name -> parameter name of all trained tensors (:func:`trainable_names`).

    Raises:
        AdapterError: a tensor that the model trains is missing, or one is unknown; or bottlenecks or mixed pairs, which no plain model has.
    """
    if what := _ours(model):
        raise AdapterError(f"{what} cannot be exported: no library loads them. Of other kinds there are {', '.join(LOADABLE)}")
    if set(tensors) != set(names):
        raise AdapterError(f"the adapter needs exactly the trained tensors; these differ: {sorted(set(tensors) ^ set(names))[:6]}")
    placed = {names[name]: tensor for name, tensor in tensors.items()}
    shared: dict[int, nn.Parameter] = {}
    for name, own in model.named_parameters():
        tensor = placed.get(name, own).detach().to("cpu", torch.float32)
        shared[id(own)] = nn.Parameter(tensor.clone() if is_beneath(name) else tensor, False)
    copied: Any = copy.deepcopy(model, shared).cpu()
    restore(copied)
    if not isinstance(copied, PeftModel):
        return copied
    try:
        return copied.merge_and_unload()  # type: ignore[operator]
    except AttributeError as error:  # (IA)³ under a head of several modules, as of PEFT 0.21
        raise AdapterError(f"PEFT cannot merge this adapter ({error}); export it without --merge") from error


def saved_as(model: nn.Module) -> Literal["adapter", "model", ""]:
    """How others can load what was trained: as PEFT's adapter, as a whole plain model, or not at all (bottlenecks, mixed pairs)."""
    if isinstance(model, PeftModel):
        return "adapter"
    return "" if _ours(model) else "model"


def write_adapter(
    model: nn.Module,
    names: Collection[str],
    tensors: Mapping[str, torch.Tensor],
    folder: Path,
    base: str,
    start: Mapping[str, torch.Tensor] | None = None,
) -> None:
    """Write a folder that ``peft.PeftModel.from_pretrained`` loads: ``adapter_config.json`` and ``adapter_model.safetensors``.

    ``names`` are the saved names of all trained tensors, ``base`` the folder or Hub name of the base model. ``start``: A0 and B0, if
    that is where the pairs started; then the adapter stands on the untouched base with twice the rank, [B | −B0] and [A ; A0]. Pairs of
    other ranks than the adapter's are written with the highest one, zeros behind their own directions, and the same s.

    Raises:
        AdapterError: a tensor that the model trains is missing, or one is unknown; or a kind that PEFT does not have.
    """
    if not isinstance(model, PeftModel):
        raise AdapterError("PEFT has no adapter of this kind; bitfit and full are written as whole models, bottlenecks not at all")
    if set(tensors) != set(names):
        raise AdapterError(f"the adapter needs exactly the trained tensors; these differ: {sorted(set(tensors) ^ set(names))[:6]}")
    folder.mkdir(parents=True, exist_ok=True)
    config = model.peft_config[ADAPTER].to_dict()
    config |= {"base_model_name_or_path": base, "inference_mode": True}
    if start is not None and any(bool(tensor.any()) for name, tensor in start.items() if is_up(name)):
        config |= {"r": 2 * config["r"], "lora_alpha": 2 * config["lora_alpha"]}
        downs = {n: torch.cat([t, start[n]]) for n, t in tensors.items() if is_down(n)}
        ups = {n: torch.cat([t, -start[n]], 1) for n, t in tensors.items() if is_up(n)}
        tensors = {**tensors, **downs, **ups}
    if ranks := {len(tensor) for name, tensor in tensors.items() if is_down(name)}:
        config |= {"r": max(ranks), "lora_alpha": config["lora_alpha"] * max(ranks) / config["r"]}
        tensors = widened(tensors, max(ranks)) if len(ranks) > 1 else tensors
    config = {key: sorted(value) if isinstance(value, set) else value for key, value in config.items()}
    (folder / "adapter_config.json").write_text(json.dumps(config, indent=2, sort_keys=True, default=str))
    save_file(
        {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()},
        folder / "adapter_model.safetensors",
        {"format": "pt"},
    )
