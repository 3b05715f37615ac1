"""EmbracingFL: weak devices train the layers at the output that fit into their memory (Embracing Federated Learning: Enabling Weak Client
Participation via Partial Model Training, 2406.15125).

The model is cut into parts from the input to the output: embeddings, transformer layers, and the end with the head (``model/memory.py``).
Device k trains the end and as many consecutive parts before it, ℓ_k, as its memory M_k allows:

    ℓ_k = max { ℓ : needs(ℓ) <= M_k }        weights, gradients, AdamW's moments, activations from the first trained layer on
    down:   w_t, all of it
    local:  AdamW on the output side w[ℓ_k], from m = v = 0; the input side stays as it came; no backward pass goes below
    up:     w[ℓ_k]
    w_t+1[part] <- Σ_{k in S_t, part in w[ℓ_k]} n_k w^k[part] / Σ_{k in S_t, part in w[ℓ_k]} n_k      a part that nobody trained stays

A device that no layer fits trains the end alone; one that not even the end fits cannot take part, and ends the run before its first
round. Where nothing is said of devices all train everything.

Deviations: the paper has a weak device take the input side in pieces, pass its data through each and forget it, so that it need not hold
the whole model; here it holds the frozen weights, which the formula counts, and a step passes through all of them. How many layers fit is
the formula's to say, where the paper has strong, moderate and weak devices of given capacities. Devices weigh by their numbers of
examples. AdamW, fresh at each participation.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field, replace
from typing import ClassVar

import torch

from fedloom.client.client import Client
from fedloom.messages import Asking, Flow, Task, Tensors, Update, Work, ask, due, on_client
from fedloom.methods.fedavg import FedAvg
from fedloom.methods.method import Predictor, State, predict
from fedloom.model.base import Model
from fedloom.model.memory import fitting, needs, output_side, parts
from fedloom.server.aggregation import HELD, Average
from fedloom.server.participation import Pool, uniform
from fedloom.tensors import only, same_names, without


@dataclass(frozen=True)
class EmbracingFL:
    """EmbracingFL.

    Attributes:
        inner: local training and its optimiser.
    """

    name: ClassVar[str] = "embracingfl"
    paper: ClassVar[str] = "EmbracingFL 2406.15125"
    adapter_kind: ClassVar[str] = "full"

    inner: FedAvg = field(default_factory=lambda: FedAvg(lr=2e-4))

    def __post_init__(self) -> None:
        if self.inner.batch_by_memory:
            raise ValueError(
                f"'{self.name}' has devices train as many layers as their memory allows, and not fewer texts: leave batch_by_memory out"
            )

    def init(self, model: Model) -> State:
        """Everything is shared; the server keeps what each number of layers needs, in bytes.

        Raises:
            ValueError: what is trained lies in no layers.
        """
        if not parts(model.initial)[0]:
            raise ValueError(
                f"'{self.name}' trains some layers of a model, and none of the {len(model.initial)} trainable tensors belongs to one "
                f"({sorted(model.initial)[:3]}); give --adapter.kind full or lora"
            )
        needed = [each.total for each in needs(model, self.inner.batch_size)]
        return State(0, model.initial, {"needed": torch.tensor(needed)}, {"needed_bytes": needed})

    def setup(self, state: State, pool: Pool) -> Flow[State]:
        """As inner; and how many layers each device trains.

        Raises:
            ValueError: a device whose memory does not even hold what the end needs, or a layer where nothing of the end is trained.
        """
        pool.insist_on_no_mask(self.name, "what a device trains is chosen by its memory")
        pool.insist_on_the_mean(self.name, "each of its layers is averaged over the devices that trained it, which may be few")
        state = yield from self.inner.setup(state, pool)
        layers = torch.tensor([self.layers(state, pool, k) for k in pool.clients])
        facts = {**state.facts, "devices_by_layers": {str(n): count for n, count in sorted(Counter(layers.tolist()).items())}}
        return replace(state, server={**state.server, "layers": layers}, facts=facts)

    def layers(self, state: State, pool: Pool, client: int) -> int:
        """ℓ_k."""
        needed = state.server["needed"].tolist()
        if pool.fleet is None:
            return len(needed) - 1
        profile = pool.fleet.of(client)
        found = fitting(needed, profile.memory_bytes)
        least = 0 if parts(state.shared)[1] else 1  # a language model with LoRA has nothing behind its layers that is trained
        if found is None or found < least:
            raise ValueError(
                f"device {client} ('{profile.name}') has {profile.memory_bytes:,.0f} bytes, and the least that can be trained, "
                f"{'one layer' if least else 'the head alone'}, takes {needed[least]:,}; leave such devices out, or take a smaller model, "
                "--method.inner.batch-size or --max-length"
            )
        return found

    def round(self, state: State, pool: Pool) -> Flow[State]:
        """S_t trains, each its own output side; every part is averaged over those who trained it."""
        layers, clock = dict(zip(pool.clients, state.server["layers"].tolist(), strict=True)), self.inner.clock(state.round, pool)
        before, end = parts(state.shared)
        means = {part: Average(HELD // (len(before) + 1)) for part in (*before, end)}
        trained = set[tuple[str, ...]]()

        def take(update: Update) -> Update:
            same_names(only(state.shared, output_side(state.shared, layers[update.client])), update.tensors)
            for part, mean in means.items():
                if part and part[0] in update.tensors:
                    mean.take(replace(update, tensors=only(update.tensors, part)))
                    trained.add(part)
            return replace(update, tensors={})

        asked = [ask(self.train, k, state.shared, layers=layers[k], **clock) for k in uniform(pool, state.round)]
        yield Asking([due(task, only(state.shared, output_side(state.shared, layers[task.client]))) for task in asked], take)
        made = {n: t for part in means if part in trained for n, t in means[part].value().items()}
        return state.after_round({n: made.get(n, t) for n, t in state.shared.items()})

    @on_client
    def train(self, c: Client, task: Task) -> Work[Update]:
        """Train the output side that was asked for on top of what came; send it."""
        start = only(task.tensors, output_side(task.tensors, int(task.settings["layers"])))  # type: ignore[arg-type]
        fitted = yield from self.inner.learn(c, start, task, fixed=without(task.tensors, start))
        return Update(c.id, len(c.train), fitted.tensors, {"loss": fitted.loss})

    def personalise(self, client: Client, shared: Tensors) -> Work[Predictor]:
        """The shared model as it is."""
        yield from ()
        return Predictor(shared)

    def assembled(self, state: State) -> Tensors | None:
        """The shared model."""
        return state.shared

    predict = predict
