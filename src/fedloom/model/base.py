"""The pre-trained model: loaded once (``loading.py``), frozen, shared by all clients.

A forward pass is a pure function of (trainable tensors, batch), for one client (``forward``) or for the texts of many at once
(``together``, see ``ways.py``). The model gets a ready attention mask and positions, built here from the (B, L) token mask.

Encoders are padded on the right and pooled at position 0; causal decoders are padded on the left and pooled at the last position, or
read before every token of an answer (``answers.py``). This module does not know data sets, clients or methods.
"""

from __future__ import annotations

import copy
import hashlib
import importlib.metadata
import json
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
import torch
from torch import nn
from torch.func import functional_call

from fedloom.messages import Tensors
from fedloom.model.adapters import Beneath
from fedloom.model.answers import Speaker
from fedloom.model.asked import Asked
from fedloom.model.calls import CALLS, Call, Shape
from fedloom.model.cloze import Filler
from fedloom.model.ground import Ground
from fedloom.model.names import is_beneath, is_head
from fedloom.model.outputs import last_caught, logits_of, of_layers
from fedloom.model.passes import Unpackable
from fedloom.model.places import of_model
from fedloom.model.quantised import Base, Quantised, numbers, numbers_in_few
from fedloom.model.reader import Reader, ReadsMany
from fedloom.model.recomputed import Recomputed
from fedloom.model.skipped import answers_of, left_out, stack_of
from fedloom.model.spans import Finder, Spans
from fedloom.model.tags import Tagger
from fedloom.model.texts import Batch, Texts
from fedloom.model.ways import WAYS, Packed, Way, mapped

Precision = Literal["float32", "bf16"]
DTYPES = {"float32": torch.float32, "bf16": torch.bfloat16}


@dataclass
class Model:
    """A frozen base with an adapter. ``reader``: how the task's texts are put before it and read. ``initial``: float32 start of every
    trainable tensor, by saved name, on the processor. ``ground``: what LoRA's pairs stand on. ``alone``: why it cannot run for many owners
    at once, or nothing; ``together_by``: how it does. ``fresh``: of the names in ``initial`` those of the base and its head that no file
    brought, so that they were drawn. ``still``: what of the head no loss depends on, which is not trained. ``recomputes``: whether its
    layers are computed again in backward passes, and what is inside them not kept (``recomputed.py``). ``split``: the fingerprint of the
    weights under the pairs before their principal parts were taken out, or nothing where none were; ``split_fast``: whether those were
    found by random subspace iteration (``principal.py``)."""

    name: str
    module: Any
    config: Any
    tokenizer: Any
    num_labels: int
    max_length: int
    precision: Precision
    dropout: float
    device: torch.device
    reader: Reader
    causal: bool = False
    pad_id: int = 0
    call: Call = CALLS[0]
    initial: dict[str, torch.Tensor] = field(default_factory=dict)
    parameters: dict[str, str] = field(default_factory=dict)
    ground: Ground = field(default_factory=Ground)
    alone: str = ""
    together_by: str = ""
    fresh: frozenset[str] = frozenset()
    still: dict[str, torch.Tensor] = field(default_factory=dict)
    recomputes: bool = False
    split: str = ""
    split_fast: bool = False
    _copies: dict[torch.dtype, nn.Module] = field(default_factory=dict)
    _ways: dict[torch.dtype, Way] = field(default_factory=dict)
    _recomputed: dict[int, Recomputed] = field(default_factory=dict)
    _answers: int | None = None

    @property
    def beneath(self) -> Beneath:
        """The frozen weights under LoRA's pairs, which a method may change as well (:meth:`stand_on`)."""
        return self.ground.beneath

    @property
    def quantised(self) -> dict[str, Quantised]:
        """What of the module is held in 8 or 4 bits, by the names of the weights."""
        return self.ground.quantised

    @property
    def head(self) -> frozenset[str]:
        """Names of the task head's tensors."""
        return frozenset(name for name in self.initial if is_head(name))

    @property
    def depth(self) -> int:
        """Number of transformer layers D."""
        return int(self.config.num_hidden_layers)

    @property
    def few(self) -> int:
        """How many numbers of the base are held in few bits."""
        return numbers_in_few(self.module)

    @property
    def base_in(self) -> Base:
        """What its frozen layers are held in."""
        return next(iter(self.quantised.values())).name if self.quantised else "exact"

    @property
    def is_whole(self) -> bool:
        """Whether most of the model's own numbers are trained."""
        return 2 * sum(t.numel() for t in self.initial.values()) > numbers(self.module)

    @property
    def side(self) -> Literal["left", "right"]:
        """The side that is padded."""
        return "left" if self.causal else "right"

    @property
    def pooled(self) -> int:
        """The position that the head reads: the last of a causal model, the first of another, or a cloze's gap."""
        return -1 if self.causal else self.reader.place

    @property
    def filler(self) -> Filler | None:
        """The reader, if it is a cloze's."""
        return self.reader if isinstance(self.reader, Filler) else None

    @property
    def speaker(self) -> Speaker | None:
        """The reader, if the model writes answers."""
        return self.reader if isinstance(self.reader, Speaker) else None

    @property
    def tagger(self) -> Tagger | None:
        """The reader, if the model tags words."""
        return self.reader if isinstance(self.reader, Tagger) else None

    @property
    def finder(self) -> Finder | None:
        """The reader, if the model finds answers."""
        return self.reader if isinstance(self.reader, Finder) else None

    @property
    def _many(self) -> ReadsMany | None:
        """The reader, if many tokens of a text are read."""
        return self.reader if isinstance(self.reader, Speaker | Tagger | Finder) else None

    @property
    def width(self) -> int:
        """Numbers kept of each example's prediction: C logits, or those of what is asked, told (``asked.py``, ``spans.py``)."""
        return self.num_labels if self._many is None else self._many.width

    @property
    def reads_many(self) -> bool:
        """Whether many tokens of a text are read and not one: those before each of an answer, every word's first, or
        all."""
        return self._many is not None

    @property
    def first_of(self) -> Callable[[np.ndarray, np.ndarray], np.ndarray] | None:
        """Where a row may become several examples, what finds the first of each row, and their number, from segments and offsets."""
        return None if self._many is None else self._many.first_of

    @property
    def trial_segment(self) -> int:
        """The segment number of all tokens of a made-up text: as the task's have, and of the first kind to the model."""
        return 0 if self._many is None else self._many.segment

    def kinds_of(self, segments: torch.Tensor) -> torch.Tensor:
        """The token types among what ``segments`` say; those also say what is due."""
        return segments if self._many is None else self._many.kinds_of(segments)

    def asked(self, batch: Batch) -> Asked | Spans | None:
        """Which tokens of a padded batch are read, and what is due there; None where each text is read at one place."""
        return None if self._many is None else self._many.due_in_rows(batch.ids, batch.segments, batch.mask)

    def asking(self, ids: np.ndarray, segments: np.ndarray, lengths: np.ndarray) -> Asked | Spans | None:
        """The same of the tokens (T,) of texts of ``lengths`` (n,), one after another."""
        return None if self._many is None else self._many.due(ids, segments, lengths, self.device)

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
        """The module in ``dtype``. One copy a precision a process, never one a client; in the precision that training computes in it is the
        module itself. What is held in few bits is shared by all."""
        if dtype not in self._copies:
            shared = {id(tensor): tensor for q in self.quantised.values() for tensor in q.held}
            self._copies[dtype] = kept_in(copy.deepcopy(self.module, shared), dtype)
            self.ground.lay(self._copies[dtype])
        return self._copies[dtype]

    def settle(self) -> None:
        """From here on the model is held once, in the precision that training computes in, and what was made of it in another is gone. The
        start of what is trained stays float32."""
        kept_in(self.module, self.dtype)
        self._copies, self._ways = {self.dtype: self.module}, {}

    @contextmanager
    def lent(self, tensors: Tensors, dtype: torch.dtype) -> Iterator[None]:
        """Inside, trained tensors that stay still for a while lie in the places of those of :meth:`base`, whose memory is free meanwhile;
        then the start's are there again. ``tensors``: by saved name, of any precision; one that is in ``dtype`` already is not copied."""
        own = dict(self.base(dtype).named_parameters())
        try:
            for name, tensor in tensors.items():
                own[self.parameters[name]].data = tensor.detach().to(self.device, dtype)
            yield
        finally:
            for name in tensors:
                own[self.parameters[name]].data = self.initial[name].to(self.device, dtype)

    @property
    def weights(self) -> dict[str, torch.Tensor]:
        """The pre-trained weights under the pairs, float32 (d_out, d_in), by saved name; copies."""
        return self.ground.weights(self.module)

    def stand_on(self, weights: Tensors) -> None:
        """Put these under the pairs, for every call from now on; where there are none, the model's own again. (d_out, d_in), by saved name.

        Raises:
            ModelError: a name that no pair stands on, or a base in few bits, which stays as it is.
        """
        if weights and self.quantised:
            raise of_model(self.name, f"the base of '{self.name}' is held in few bits and stays as it is; leave --adapter.base out")
        if unknown := sorted(set(weights) - set(self.beneath.names)):
            raise of_model(
                self.name, f"no LoRA pair of '{self.name}' stands on {unknown[:2]}; they stand on {list(self.beneath.names)[:2]} …"
            )
        self.ground.put(weights, self.module, *self._copies.values())

    def start_at(self, pairs: Tensors) -> None:
        """Take these A0 and B0 for the start in place of its own, and W_res = W0 − s·B0·A0 for what lies under them; W0 is what the old
        start and its W_res make, to rounding. ``pairs``: all factors by saved name."""
        own = dict(self.module.named_parameters())
        self.ground.begin_at(pairs, self.initial, own)
        with torch.no_grad():
            for name, factor in pairs.items():
                own[self.parameters[name]].copy_(factor)
                self.initial[name] = factor.clone()
        self._copies, self._ways = {self.dtype: self.module}, {}

    def encode(self, texts: list[str], pairs: list[str] | None) -> tuple[list[list[int]], list[list[int]]]:
        """Token ids and segment ids of each text (or pair; or prompt and its answer), cut to ``max_length``; at least one token each.
        Of questions those of all windows.

        Raises:
            ValueError: as the reader's.
        """
        return self.reader.encode(texts, pairs)

    @property
    def cut_from(self) -> int | None:
        """Tokens that every text has at least which was cut; None where long ones become several examples."""
        return self.reader.cut_from

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
        return hashlib.sha256(json.dumps([*said, *self.reader.says]).encode()).hexdigest()

    @contextmanager
    def skipping(self, layers: Collection[int], dtype: torch.dtype) -> Iterator[None]:
        """Inside, the transformer layers of these numbers are left out of every call in ``dtype``: what comes in goes out.

        Raises:
            ModelError: there is no such layer, or no list of them is found.
        """
        if not layers:
            yield
            return
        if wrong := sorted(layer for layer in layers if not 0 <= layer < self.depth):
            raise of_model(self.name, f"'{self.name}' has no layers {wrong} to leave out; it has 0 to {self.depth - 1}")
        modules: list[nn.Module] = [self.base(dtype)]
        if not self.alone and isinstance(way := self.way(dtype), Packed):
            modules.append(way.module)
        try:
            stacks = [stack_of(module, self.depth) for module in modules]
        except LookupError as error:
            raise of_model(self.name, f"no layer of '{self.name}' can be left out: {error}") from error
        self.ground.remember(self.module)  # while all of them are there
        if self._answers is None:
            ids = torch.full((1, 4), 5, device=self.device)
            some = Batch(ids, ids > 0, torch.full_like(ids, self.trial_segment), ids[:, 0] * 0, torch.ones(1, device=self.device))
            self._answers = answers_of(stacks[0], lambda: self.forward({}, some, dtype))
        with left_out(stacks, layers, self._answers):
            yield

    def embed(self, ids: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        """Input embeddings E of token ids, (B, L, d)."""
        return self.base(dtype).get_input_embeddings()(ids)  # type: ignore[operator]

    def forward(
        self,
        tensors: Tensors,
        batch: Batch,
        dtype: torch.dtype,
        embeddings: torch.Tensor | None = None,
        layers: bool = False,
        twice: bool = False,
    ) -> tuple[torch.Tensor, tuple[torch.Tensor, ...]]:
        """(logits (B, C) float32, outputs (B, L, d) of the D layers if ``layers`` else ()). ``tensors`` override the model's own by saved
        name. Where many tokens of a text are read: logits (r, V), one row for each. ``twice``: gradients are to be differentiated again,
        so all is kept, whatever :attr:`recomputes` says."""
        named = self._named(tensors, dtype)
        given = (batch.ids, batch.mask, batch.segments, embeddings, layers, twice)
        logits, hidden = self.on_rows(self.base(dtype), dtype, named, *given)
        return self.read(logits, batch) if self.reads_many else logits, hidden

    def read(self, of: torch.Tensor, batch: Batch) -> torch.Tensor:
        """What the head reads of (B, L, …): one place of each text, or many (r, …)."""
        asked = self.asked(batch)
        return of[:, self.pooled] if asked is None else of.flatten(0, 1)[asked.at]

    def _named(self, tensors: Tensors, dtype: torch.dtype) -> dict[str, torch.Tensor]:
        """By parameter name, as the module keeps them. What lies under a pair can be among them, where it is trained itself."""
        beneath = {n: self.ground.turned(n, t).to(dtype) for n, t in tensors.items() if is_beneath(n)}
        return {self.parameters[n]: t.to(dtype) for n, t in tensors.items() if n not in beneath} | beneath

    def on_rows(
        self,
        module: nn.Module,
        dtype: torch.dtype,
        named: Tensors,
        ids: torch.Tensor,
        mask: torch.Tensor,
        segments: torch.Tensor,
        embeddings: torch.Tensor | None = None,
        layers: bool = False,
        twice: bool = False,
    ) -> tuple[torch.Tensor, tuple[torch.Tensor, ...]]:
        """:meth:`forward` with tensors by parameter name and a batch's fields (B, L)."""
        given: dict[str, object] = {"input_ids": ids} if embeddings is None else {"inputs_embeds": embeddings}
        mask_of, positions_of = self.call
        given["attention_mask"] = mask_of(self.shape, mask, dtype)
        positions = positions_of(self.shape, mask)
        if positions is not None:
            given["position_ids"] = positions
        if self.segmented:
            given["token_type_ids"] = self.kinds_of(segments)
        if layers:
            given["output_hidden_states"] = True
        again = self._recomputing(module).forward() if self.recomputes and not twice else nullcontext()
        with again, last_caught(module, self.depth) if layers else nullcontext([]) as caught:
            out = functional_call(module, dict(named), (), given)
        logits = logits_of(out)
        logits = logits[:, self.pooled] if logits.dim() > 2 and not self.reads_many else logits
        return logits.float(), of_layers(out.hidden_states, caught) if layers else ()

    def _recomputing(self, module: nn.Module) -> Recomputed:
        """What computes the module's layers again.

        Raises:
            ModelError: no list of them is found.
        """
        if id(module) not in self._recomputed:
            try:
                self._recomputed[id(module)] = Recomputed(module, self.depth)
            except LookupError as error:
                raise of_model(
                    self.name, f"no layer of '{self.name}' can be computed again: {error}; leave --engine.recompute out"
                ) from error
        return self._recomputed[id(module)]

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
        return mapped(self, torch.float32)(self._named(tensors, torch.float32), texts)[0]

    def way(self, dtype: torch.dtype) -> Way:
        """How texts of many owners are called in ``dtype``."""
        if dtype not in self._ways:
            self._ways[dtype] = WAYS[self.together_by](self, dtype)
        return self._ways[dtype]

    def loss(self, tensors: Tensors, batch: Batch, dtype: torch.dtype, twice: bool = False) -> torch.Tensor:
        """Mean loss over the batch's real rows. ``twice``: see :meth:`forward`."""
        return self.weighted(self.forward(tensors, batch, dtype, twice=twice)[0], batch)

    def weighted(self, logits: torch.Tensor, batch: Batch) -> torch.Tensor:
        """Mean over the batch's real rows of the cross-entropies of logits (B, C), or of the losses of what is read, (r, V)."""
        asked = self.asked(batch)
        each = nn.functional.cross_entropy(logits, batch.labels, reduction="none") if asked is None else asked.losses(logits)
        return (each * batch.weights).sum() / batch.weights.sum()

    def told(self, logits: torch.Tensor, batch: Batch) -> torch.Tensor:
        """What is kept of a prediction, (B, width)."""
        asked = self.asked(batch)
        return logits if asked is None else asked.told(logits)

    @property
    def reads(self) -> int:
        """Tokens of a text, prompt and answer, that the model reads at most: what its positions reach, or, where nothing says so, 2048."""
        return reach(self.module, self.config) or 2048

    def need_classes(self, who: str) -> None:
        """For methods that count labels.

        Raises:
            ValueError: the model answers in words, finds answers or tags words; its texts have no classes.
        """
        if self.reads_many:
            raise ValueError(f"'{who}' counts each device's labels, and the texts of this task have none of their own; take another method")

    def need_own_weights(self, who: str) -> None:
        """For methods that change the weights under the pairs, or take gradients by them.

        Raises:
            ValueError: they are held in few bits, in which small changes cannot be held.
        """
        if self.quantised:
            raise ValueError(
                f"'{who}' works on the weights under the pairs, and these are held in few bits, where a small change is lost; leave "
                "--adapter.base out"
            )

    @property
    def segmented(self) -> bool:
        """Whether the base reads segment (token-type) ids."""
        return self.kinds > 1

    @property
    def kinds(self) -> int:
        """How many kinds of segments the base knows (0: it takes none)."""
        return 0 if self.causal else int(self.config.to_dict().get("type_vocab_size") or 0)


def kept_in(module: nn.Module, dtype: torch.dtype) -> nn.Module:
    """The module with what a file would hold of it in ``dtype``, one tensor after another. What it computes for itself (the angles by which
    positions turn, say) stays as it is: in 16 bits an angle at place 500 can be off by most of a radian."""
    for tensor in module.state_dict(keep_vars=True).values():
        if tensor.is_floating_point():
            tensor.data = tensor.data.to(dtype)
    return module


def reach(base: nn.Module, config: Any) -> int | None:
    """Tokens of a text that the positions of a model reach, or None where nothing bounds them. Of as many positions as its config names,
    one that keeps places for padding (RoBERTa's kin: the table of positions has an entry for it) begins behind that entry.
    """
    said = config.to_dict()
    if not (named := said.get("max_position_embeddings") or said.get("n_positions")):
        return None
    tables = (part for part in base.modules() if isinstance(part, nn.Embedding) and part is not base.get_input_embeddings())  # type: ignore[operator]
    begins = (part.padding_idx + 1 for part in tables if part.padding_idx is not None and part.num_embeddings == named)
    return int(named) - max(begins, default=0)
