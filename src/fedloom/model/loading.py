"""Loading a pre-trained model and putting the adapter on it. The only file that imports ``transformers``.

How it is called is found out afterwards, by trying (``trials.py``).
"""

from __future__ import annotations

import logging
import warnings
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

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
from fedloom.model.adapters import SPLITTING, Adapter, attach, beneath, in_few_bits, take_principal_parts, trainable_names
from fedloom.model.answers import Form, Speaker
from fedloom.model.base import Model, Precision, reach
from fedloom.model.cloze import Cloze, Filler, keep_rows
from fedloom.model.ground import Ground
from fedloom.model.names import BESIDE, HEADS, PEFT
from fedloom.model.passes import ATTENTION, attend
from fedloom.model.places import ModelError, folder_of, of_model
from fedloom.model.reader import Reader, Whole
from fedloom.model.spans import Finder
from fedloom.model.tags import Tagger
from fedloom.model.trials import learn_to_call, learn_to_pack, leave_unreached_out
from fedloom.seeds import derive_int

AttentionInterface.register(ATTENTION, attend)

Use = Literal["", "tags", "finds", "writes"]
"""What a model is loaded for, beside classifying texts or being asked for a word."""


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
    model.parameters, model.split, model.ground = parameters, split, Ground(beneath(module), quantised)
    model.split_fast = fast
    own = dict(module.named_parameters())
    # of a model all of which is trained, the start is the module's own weights: a copy would be a second model
    kept = (lambda t: t) if adapter.kind == "full" else torch.clone
    model.initial = {saved: kept(own[parameter].detach().float()) for saved, parameter in sorted(model.parameters.items())}
    model._copies[torch.float32] = module
    model.recomputes = recompute
    learn_to_call(model, base)
    leave_unreached_out(model)
    model.fresh = frozenset(saved for saved in model.initial if saved.removeprefix(PEFT) in new)
    learn_to_pack(model)
    # the start lies with the server's state, wherever the model computes
    model.initial, model.still = ({n: t.cpu() for n, t in of.items()} for of in (model.initial, model.still))
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
            raise of_model(name, f"'{name}' is an encoder-decoder ({config.model_type}); give an encoder or a decoder")
        spaced = {"add_prefix_space": True} if use == "tags" else {}  # a word by itself is then the word that it is within a sentence
        tokenizer = AutoTokenizer.from_pretrained(folder, **spaced, **local)
        if len(tokenizer) <= len(set(tokenizer.all_special_ids)):
            raise of_model(
                name,
                f"'{name}' brings no tokenizer: what was found has {len(tokenizer)} special tokens and no word, so that all text would be "
                "unknown. Save it beside the model: tokenizer.save_pretrained(FOLDER)",
            )
        kind: Any = {"tags": AutoModelForTokenClassification, "finds": AutoModelForQuestionAnswering}.get(use)
        kind = kind or AutoModelForSequenceClassification
        if not num_labels:
            masked = type(config) in MODEL_FOR_MASKED_LM_MAPPING
            if masked and use == "writes":
                raise of_model(
                    name,
                    f"'{name}' ({config.model_type}) fills gaps and writes no answers; give --model the folder or Hub name of a causal "
                    "language model, or --task classification",
                )
            kind = AutoModelForMaskedLM if masked else AutoModelForCausalLM
        how: dict[str, Any] = {"dtype": torch.float32, "attn_implementation": "eager", "ignore_mismatched_sizes": True, **local}
        base, found = kind.from_pretrained(folder, config=config, output_loading_info=True, **how)
        if not num_labels and found["missing_keys"]:
            new, other = ", ".join(sorted(found["missing_keys"])[:3]), "--task classification" if use == "writes" else "--head linear"
            raise of_model(
                name,
                f"'{name}' has no trained language-model head: {new} would be new, and that head is what is asked. Give a model that has "
                f"one, or {other}",
            )
        new = {*found["missing_keys"], *(key[0] for key in found["mismatched_keys"])} & {n for n, _ in base.named_parameters()}
        if lost := sorted(n for n in new if (HEADS | BESIDE).isdisjoint(n.split("."))):
            raise of_model(
                name,
                f"'{name}' brings no {', '.join(lost[:3])}{' …' if len(lost) > 3 else ''}: of a model that is adapted only the head may be "
                f"new ({', '.join(sorted(HEADS | BESIDE))}). Give a model whose files hold the rest",
            )
    except ModelError:
        raise
    except (OSError, ValueError, KeyError, SafetensorError) as error:
        first = str(error).strip().splitlines()[0]
        if isinstance(error, SafetensorError):
            raise ModelError(
                f"the weights in '{name}' are damaged or cut off ({first}); bring the folder's .safetensors anew",
                "the weights of this device's model are damaged or cut off",
            ) from error
        if "tiktoken" in first:  # what the library asks for where it could not read the file as sentencepiece's
            raise of_model(
                name,
                f"the tokenizer of '{name}' comes as a sentencepiece model alone, as DeBERTa-v3's does, and to read it takes the extra "
                "'spm' (sentencepiece and protobuf): pip install -e '.[spm]' in Fedloom's folder",
            ) from error
        raise ModelError(
            f"model '{name}' cannot be loaded: {first} Give 'minilm', a Hugging Face model folder, or a Hub name (which needs a network)",
            f"this device's model cannot be loaded: {type(error).__name__}",
        ) from error
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token or tokenizer.unk_token
    return base.eval(), tokenizer, base.config, new
