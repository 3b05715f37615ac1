"""An experiment: the only configuration there is.

Recipes build it, the command line is generated from it, its JSON lies in every run folder.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
import math
import types
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal, Union, get_args, get_origin, get_type_hints

from fedloom.client.curricula import named as curriculum_named
from fedloom.client.curriculum import Curriculum
from fedloom.data.tasks import TaskKind
from fedloom.encodings import Encoding
from fedloom.methods import named
from fedloom.methods.method import parts, says
from fedloom.model.adapters import OF_THE_BASE, Adapter, Kind
from fedloom.model.base import Precision
from fedloom.run.costs.profiles import insist_on_device
from fedloom.run.errors import ExperimentError
from fedloom.run.reading import full_name
from fedloom.server.masks import Mask
from fedloom.server.optimizers import ServerStep
from fedloom.server.robust import Aggregation
from fedloom.server.sharing import Sharing

FAR = 10**300
"""No number of an experiment is as large; beyond, an integer may be no float."""
LEVELS = 16
"""How deep an experiment's JSON may be nested."""


@dataclass(frozen=True)
class EngineSettings:
    """How to compute; never what.

    Attributes:
        kind: local (the fast one) or flower (the same tasks as real Flower messages, in memory).
        stack: clients computed in one pass (0: as many as pay; 1: one by one).
        threads: CPU threads of a process (0: PyTorch's default, divided among the workers).
        workers: processes that share the devices, each with its own model and, where there are several, GPU (0 or 1: this process).
        overcommit: run what by prediction does not fit into memory.
        recompute: keep nothing of what is inside the model's layers for backward passes, and compute it again there: less memory, more time
            (gradient checkpointing).
    """

    kind: Literal["local", "flower"] = "local"
    stack: int = 0
    threads: int = 0
    workers: int = 0
    overcommit: bool = False
    recompute: bool = False


@dataclass(frozen=True)
class Experiment:
    """Everything that decides a result.

    Attributes:
        method: the method and its hyper-parameters.
        data: ``trec`` (packaged), a Hub name, or a folder or file of Parquet, CSV or JSON lines.
        task: classification; instructions, a prompt and its answer; text, all of it to be learnt; chat, conversations; tagging, a tag a
            word; qa, the words of a context that answer a question; auto: one of them but text, by the columns.
        model: ``minilm`` (the demo extra), a Hub name, or a Hugging Face folder.
        adapter: what is trained beside the task's head; LoRA if nothing is said.
        clients: number of devices K.
        cohort: devices drawn a round.
        rounds: number of rounds T.
        partition: ``label`` (Dirichlet skew), ``iid``, ``column:NAME``, or a saved partition file.
        alpha: Dirichlet concentration of the devices' label priors; smaller is more skewed.
        beta: Dirichlet concentration of the devices' sizes.
        min_examples: the fewest training examples of a device.
        seed: every random choice derives from it.
        precision: what training and evaluation compute in, and what the model is held in; trained tensors stay float32.
        evaluate_every: rounds between evaluations (0: only at the end).
        max_train: keep that many training rows (0: all).
        max_validation: keep that many validation rows (0: all).
        max_test: keep that many test rows (0: all).
        max_length: tokens after which a text is cut.
        exact_match: prompts of each held-out split at most that are answered in full at every evaluation, where answers end in
            "#### number" (0: none).
        head: linear, new and trained; or cloze: the pre-trained language model's own, asked for a word a class.
        template: the cloze's sentence with {mask}, {text} and, of pairs, {pair} (empty: what is known of the data set); or of instructions
            the one with {text} for the prompt, which the answer follows (empty: the tokenizer's chat template, or a plain one).
        label_words: the cloze's word for each class, in order (empty: what is known of the data set, or the classes' names).
        text: text column or columns; of instructions the prompt's, its context's if there is one, and the answer's; of tagging the words';
            of qa question, context and answers (empty: found).
        label: label column; of instructions what devices are skewed by; of tagging the tags'; of qa the article (empty: found).
        metric: headline metric: auto (by the data's name), accuracy, mcc or f1; answers have token_accuracy, tags entity_f1, found answers
            answer_f1, always.
        quorum: share of a cohort that must answer for a round to count.
        aggregation: what the server makes of a round's updates: mean, or a rule that a share of hostile devices cannot sway, as NAME or
            NAME:SHARE (0.25): median, trimmed, krum, multi-krum, geometric-median, clip.
        server: what the server does with the aggregate: takes it over, or a step of FedAvgM, FedAdagrad, FedYogi or FedAdam towards it.
        controls: have every step's gradient on a device corrected by how the device's own differ from everybody's (SCAFFOLD), whatever the
            method, so far as it averages what is trained. Twice the bytes, both ways.
        mask: which rows of LoRA's pairs a device trains, whatever the method, so far as it trains pairs as they are.
        share: which layers of LoRA's pairs are shared, the others staying on each device, whatever the method, so far as it shares pairs.
        wire: how numbers travel: exact, or with a loss bf16, fp16, int8, nf4, or top-k:SHARE (0.05) of a device's changes, the rest later;
            up:bf16 loses on the way up alone, and so of the others.
        device: what devices are like, for simulated device time and for methods that ask less of the weaker: jetson, laptop or phone, all
            alike; mixed, a third of each; or a .csv or .json file of profiles (docs/devices.md).
        engine: how to compute.
    """

    method: Any
    data: str = "trec"
    task: TaskKind = "auto"
    model: str = "minilm"
    adapter: Adapter = field(default_factory=Adapter)
    clients: int = 100
    cohort: int = 10
    rounds: int = 20
    partition: str = "label"
    alpha: float = 1.0
    beta: float = 5.0
    min_examples: int = 2
    seed: int = 42
    precision: Precision = "float32"
    evaluate_every: int = 5
    max_train: int = 0
    max_validation: int = 0
    max_test: int = 0
    max_length: int = 128
    exact_match: int = 32
    head: Literal["linear", "cloze"] = "linear"
    template: str = ""
    label_words: tuple[str, ...] = ()
    text: tuple[str, ...] = ()
    label: str = ""
    metric: Literal["auto", "accuracy", "mcc", "f1"] = "auto"
    quorum: float = 1.0
    aggregation: str = "mean"
    server: ServerStep = field(default_factory=ServerStep)
    controls: bool = False
    mask: Mask = field(default_factory=Mask)
    share: Sharing = field(default_factory=Sharing)
    wire: str = "exact"
    device: str = "jetson"
    engine: EngineSettings = field(default_factory=EngineSettings)

    HOW: ClassVar[tuple[str, ...]] = ("engine",)
    """Fields that say how and not what: no part of the digest. Resumed with others, a run's last bits differ (docs/engines.md)."""

    def __post_init__(self) -> None:
        for name in ("clients", "cohort", "rounds", "min_examples", "max_length"):
            if getattr(self, name) < 1:
                raise ExperimentError(f"--{name.replace('_', '-')} is {getattr(self, name)}; it must be at least 1")
        for name in ("evaluate_every", "max_train", "max_validation", "max_test", "exact_match"):
            if getattr(self, name) < 0:
                raise ExperimentError(
                    f"--{name.replace('_', '-')} is {getattr(self, name)}; it must be 0 or more (0 has a meaning: see --help)"
                )
        for name in ("alpha", "beta"):
            if not getattr(self, name) > 0:
                raise ExperimentError(f"--{name} is {getattr(self, name)}; a Dirichlet concentration must be positive")
        if self.head == "linear" and (self.label_words or (self.template and self.task not in ("instructions", "chat"))):
            raise ExperimentError(
                "--label-words and --template belong to --head cloze, a template also to --task instructions and chat; the head is "
                f"linear and the task {self.task}"
            )
        if self.head == "cloze" and self.task in ("instructions", "text", "chat"):
            raise ExperimentError(f"--head cloze is for classification, and the task is {self.task}; leave --head out")
        if self.cohort > self.clients:
            raise ExperimentError(
                f"--cohort {self.cohort} is more than --clients {self.clients}; a cohort is drawn from the clients: give --cohort "
                f"{self.clients} or fewer"
            )
        if not 0 < self.quorum <= 1:
            raise ExperimentError(f"--quorum is {self.quorum}; it is a share of the cohort, above 0 and at most 1")
        try:
            self.rule.insist_on(self.cohort)
        except ValueError as error:
            raise ExperimentError(f"--aggregation {self.aggregation}: {error}") from error
        try:
            _ = self.encoding
        except ValueError as error:
            raise ExperimentError(f"--wire {self.wire}: {error}") from error
        for name in ("stack", "threads", "workers"):
            if getattr(self.engine, name) < 0:
                raise ExperimentError(f"--engine.{name} is {getattr(self.engine, name)}; it must be 0 (automatic) or more")
        if self.engine.workers > 1 and self.engine.kind != "local":
            raise ExperimentError(
                f"--engine.workers {self.engine.workers} needs --engine.kind local; kind {self.engine.kind} is one process"
            )
        insist_on_device(self.device)
        self._insist_on_a_frozen_base()
        if self.mask.keep < 1:
            self._insist_on_pairs(f"--mask.keep is {self.mask.keep}")
            self._insist_on_no_term()
        if self.share.some:
            self._insist_on_pairs("--share asks for some of the layers")

    @property
    def method_name(self) -> str:
        """The method's name, with its curriculum's where that is not the method's own: ``lora``, ``lora+voc``."""
        return full_name(as_json(self.method))

    @property
    def asked(self) -> int:
        """Devices that a round asks: the cohort, or one where the method asks one at a time."""
        return 1 if says(self.method, "one_at_a_time") else self.cohort

    @property
    def rule(self) -> Aggregation:
        """The rule of aggregation."""
        return Aggregation.of(self.aggregation)

    @property
    def encoding(self) -> Encoding:
        """How numbers travel."""
        return Encoding.of(self.wire)

    def _insist_on_pairs(self, asked: str) -> None:
        """Insist that there are pairs, of which something was ``asked``.

        Raises:
            ExperimentError: no pairs are trained.
        """
        if self.trained.kind != "lora":
            raise ExperimentError(f"{asked} and is of LoRA's pairs, and {self._who_trains()} has none; leave one of the two out")

    def _insist_on_a_frozen_base(self) -> None:
        """Insist that a base in few bits is not what is trained.

        Raises:
            ExperimentError: it is.
        """
        if self.adapter.base != "exact" and self.trained.kind in OF_THE_BASE:
            blocks = "; --method.rest is what sends blocks down in few bits" if self.trained.kind == "full" else ""
            raise ExperimentError(
                f"--adapter.base {self.adapter.base} holds the base in few bits, frozen, and {self._who_trains()} trains numbers of it; "
                f"leave one of the two out (in few bits: {', '.join(sorted(set(get_args(Kind)) - {'auto', *OF_THE_BASE}))}){blocks}"
            )

    def _who_trains(self) -> str:
        """Whose choice it is what is trained: the method's own, or the option's."""
        kind = self.trained.kind
        return f"method '{self.method.name}', which trains kind {kind}," if self.adapter.kind == "auto" else f"--adapter.kind {kind}"

    def _insist_on_no_term(self) -> None:
        """Insist that the loss has no term that rows do not have.

        Raises:
            ExperimentError: it has.
        """
        prox = next((part.prox for part in parts(self.method) if "prox" in vars(part)), 0.0)
        if prox:
            raise ExperimentError(
                f"--mask.keep is {self.mask.keep}, and FedProx's term, which is not defined for some rows of B, has prox {prox}; "
                "leave one of the two out"
            )

    @property
    def trained(self) -> Adapter:
        """The adapter with its kind as the method has it, where that is left to it; LoRA where it has none."""
        own = says(self.method, "adapter_kind") if self.adapter.kind == "auto" else self.adapter.kind
        return dataclasses.replace(self.adapter, kind=own)

    def digest(self) -> str:
        """16 hex digits over everything that decides the result."""
        return digest_of(as_json(self))


def digest_of(saved: Mapping[str, Any]) -> str:
    """The digest of an experiment's JSON."""
    what = {name: value for name, value in saved.items() if name not in Experiment.HOW}
    return hashlib.sha256(json.dumps(what, sort_keys=True).encode()).hexdigest()[:16]


def as_json(value: Any) -> Any:
    """Plain JSON of an experiment or any part of it; a method carries its name, and so does a curriculum."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        fields = {f.name: as_json(getattr(value, f.name)) for f in dataclasses.fields(value)}
        named_kind = "name" in vars(type(value)) and "name" not in fields
        return {"name": vars(type(value))["name"], **fields} if named_kind else fields
    if isinstance(value, tuple | list):
        return [as_json(item) for item in value]
    return value


def as_meant(experiment: Experiment) -> Any:
    """Its JSON with the kind of adapter that is meant where that is left to the method: whoever names it asks for the same."""
    return as_json(dataclasses.replace(experiment, adapter=experiment.trained))


def from_json(saved: Mapping[str, Any], kinds: Mapping[str, type[Any]] | None = None) -> Experiment:
    """The experiment that :func:`as_json` wrote. ``kinds``: methods by name besides the package's own.

    Raises:
        ExperimentError: unknown or missing fields, or values of another type.
        ValueError: no method, or no curriculum, of that name.
    """
    if not isinstance(saved, Mapping) or not _shallow(saved):
        raise ExperimentError("an experiment is an object of fields, nested a few levels at most")
    method = saved.get("method")
    if not isinstance(method, Mapping) or "name" not in method:
        raise ExperimentError("the experiment names no method: its field 'method' must be an object with a 'name'")
    name = str(method["name"])
    kind = (kinds or {}).get(name) or named(name)
    rest = {key: value for key, value in saved.items() if key != "method"}
    fields = {key: value for key, value in method.items() if key != "name"}
    return _build(Experiment, {**rest, "method": _build(kind, fields, f"method {name}")}, "the experiment")


def _shallow(saved: Any) -> bool:
    """Whether nothing in it is nested more than :data:`LEVELS` levels: what may come over a wire is read by functions that recurse."""
    level = [saved]
    for _ in range(LEVELS):
        level = [
            item for one in level if isinstance(one, Mapping | list | tuple) for item in (one.values() if isinstance(one, Mapping) else one)
        ]
    return not level


def completed(saved: Mapping[str, Any], kinds: Mapping[str, type[Any]] | None = None) -> Mapping[str, Any]:
    """An experiment's JSON with every field that it lacks at its default, as :func:`as_meant`: a field that came later means by default
    what was done before. As it is where it is no experiment."""
    try:
        return as_meant(from_json(saved, kinds))
    except (ValueError, TypeError, AttributeError):
        return saved


def first_difference(saved: Mapping[str, Any], wanted: Mapping[str, Any], prefix: str = "") -> str | None:
    """``field: saved value against wanted value`` of the first field that differs, or None."""
    for key in [*wanted, *(k for k in saved if k not in wanted)]:
        old, new = saved.get(key, "absent"), wanted.get(key, "absent")
        if isinstance(old, Mapping) and isinstance(new, Mapping):
            inner = first_difference(old, new, f"{prefix}{key}.")
            if inner:
                return inner
        elif old != new:
            return f"{prefix}{key} is {old!r} there and {new!r} here"
    return None


def _build(kind: type[Any], saved: Mapping[str, Any], what: str) -> Any:
    names = {f.name for f in dataclasses.fields(kind)}
    unknown = sorted(set(saved) - names)
    if unknown:
        raise ExperimentError(f"{what} has no fields {unknown}; it has {sorted(names)}")
    hints = get_type_hints(kind)
    hints |= {f.name: _curriculum_kind(f, saved.get(f.name), what) for f in dataclasses.fields(kind) if hints[f.name] is Curriculum}
    try:
        return kind(**{key: _value(hints[key], value, f"{what}: {key}") for key, value in saved.items()})
    except TypeError as error:
        raise ExperimentError(f"{what} is incomplete: {error}") from error


def _curriculum_kind(field: dataclasses.Field[Any], saved: Any, what: str) -> type[Any]:
    """The kind of the curriculum in a field: the one whose name was saved, or, without a name, the method's own."""
    if isinstance(saved, Mapping) and "name" in saved:
        return curriculum_named(str(saved["name"]))
    if not callable(field.default_factory):
        raise ExperimentError(f"{what}: {field.name} has no name, and the method has no curriculum of its own")
    return type(field.default_factory())


def _value(hint: Any, value: Any, what: str) -> Any:
    if hint is Any:
        return value
    if dataclasses.is_dataclass(hint) and isinstance(value, Mapping):
        if "name" in vars(hint):
            value = {key: item for key, item in value.items() if key != "name"}
        return _build(hint, value, what)  # type: ignore[arg-type]
    origin = get_origin(hint)
    if origin is tuple and isinstance(value, list | tuple):
        return _tuple(get_args(hint), value, what)
    if origin is list and isinstance(value, list):
        return [_value(get_args(hint)[0], item, f"{what}[{i}]") for i, item in enumerate(value)]
    if origin is dict and isinstance(value, Mapping):
        return {key: _value(get_args(hint)[1], item, f"{what}[{key!r}]") for key, item in value.items()}
    if origin is Literal:
        if value in get_args(hint):
            return value
    elif origin in (Union, types.UnionType):
        if found := _as_any_of(get_args(hint), value, what):
            return next((one for one in found if type(one) is type(value)), found[0])
    elif hint is float and isinstance(value, int | float) and not isinstance(value, bool) and not FAR < abs(value) < math.inf:
        return float(value)
    elif isinstance(hint, type) and isinstance(value, hint) and not (hint is int and isinstance(value, bool)):
        return value
    raise ExperimentError(f"{what} is {value!r}; it must be {hint.__name__ if isinstance(hint, type) else hint}")


def _tuple(hints: tuple[Any, ...], value: Sequence[Any], what: str) -> tuple[Any, ...]:
    """``value`` as a tuple of these types: the first throughout where ``...`` follows it, and otherwise one for each place."""
    each = hints[:1] * len(value) if hints[1:] == (...,) else hints
    if len(each) != len(value):
        raise ExperimentError(f"{what} is {value!r}; it must be {len(each)} values")
    return tuple(_value(hint, item, f"{what}[{i}]") for i, (hint, item) in enumerate(zip(each, value, strict=True)))


def _as_any_of(hints: Sequence[Any], value: Any, what: str) -> list[Any]:
    """``value`` as each of these types that takes it."""
    found = []
    for hint in hints:
        with contextlib.suppress(ExperimentError):
            found.append(_value(hint, value, what))
    return found
