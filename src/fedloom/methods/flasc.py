"""FLASC: federated LoRA with sparse communication (2406.05233).

Devices train whole pairs; what travels is sparse, each way by itself:

    down:   the share d_↓ of all factors' entries of P_t that is largest in size; the others arrive as zero
    local:  P^k <- AdamW on device k from what arrived; all entries are trained
    up:     the share d_↑ of the entries of P^k − (what arrived) that is largest in size
    P_t+1 <- P_t + Σ_{k in S_t} p_k Δ^k,   p_k = n_k / Σ_{j in S_t} n_j

The entries of all factors are ranked together. They travel as values (float32) and places (int32): eight bytes each, so that a share of one
half costs what sending all costs. The task head is not among them; it travels whole and is averaged.

Deviations: the server adds the mean; the paper's step of FedAdam along it is ``--server.rule adam``, here over the head as well. AdamW,
fresh at each participation. Devices are evaluated at the server's P_t, none of it cut.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import ClassVar

import torch

from fedloom.client.client import Client
from fedloom.messages import Asking, Flow, Task, Tensors, Update, Work, ask, due, on_client
from fedloom.methods.fedavg import FedAvg
from fedloom.methods.method import Predictor, State, predict
from fedloom.model.base import Model
from fedloom.model.factors import need_zero_start
from fedloom.model.names import is_factor, need_pairs
from fedloom.server.participation import Pool, uniform
from fedloom.tensors import only, rounded_up, without

VALUES, PLACES = "values", "places"
CHANGE = "change/"
"""Before these names on the way up: what they hold are changes of other entries than those that came down."""


@dataclass(frozen=True)
class Flasc:
    """FLASC.

    Attributes:
        inner: local training and its optimiser.
        down: d_↓, the share of the factors' entries that is sent to a device.
        up: d_↑, the share of the changes that it sends back.
    """

    name: ClassVar[str] = "flasc"
    paper: ClassVar[str] = "FLASC 2406.05233"

    inner: FedAvg = field(default_factory=FedAvg)
    down: float = 0.25
    up: float = 0.25

    def __post_init__(self) -> None:
        if not (0 < self.down <= 1 and 0 < self.up <= 1):
            raise ValueError(f"FLASC's shares must be above 0 and at most 1; got down {self.down}, up {self.up}")

    def init(self, model: Model) -> State:
        """Every trainable tensor is shared.

        Raises:
            ValueError: no LoRA is trained, or one that does not start at zero.
        """
        need_pairs(model.initial, self.name)
        need_zero_start(model.initial, self.name)
        return self.inner.init(model)

    def setup(self, state: State, pool: Pool) -> Flow[State]:
        """As inner."""
        pool.insist_on_what_was_sent(self.name, "what is averaged is the largest changes, and not the factors that were trained")
        return self.inner.setup(state, pool)

    def round(self, state: State, pool: Pool) -> Flow[State]:
        """S_t trains from the largest entries; the mean of the largest changes is added."""
        pairs = only(state.shared, list(filter(is_factor, state.shared)))
        sent = {**without(state.shared, pairs), **largest(joined(pairs), self.down)}
        names = sorted(pairs)
        shapes = {"names": names, "rows": [pairs[n].shape[0] for n in names], "columns": [pairs[n].shape[1] for n in names]}
        length = sum(t.numel() for t in pairs.values())
        mean = pool.average({**without(state.shared, pairs), VALUES: torch.zeros(length)})

        def take(update: Update) -> Update:
            sparse = {n.removeprefix(CHANGE): t for n, t in update.tensors.items() if n.startswith(CHANGE)}
            heads = {n: t for n, t in update.tensors.items() if not n.startswith(CHANGE)}
            return mean.take(replace(update, tensors={**heads, VALUES: scattered(sparse, length)}))

        cohort = uniform(pool, state.round)
        few = torch.empty(rounded_up(self.up, length), device="meta")
        back = {**without(state.shared, pairs), CHANGE + VALUES: few, CHANGE + PLACES: few.to(torch.int32)}
        yield Asking([due(ask(self.train, k, sent, **shapes, **self.inner.clock(state.round, pool)), back) for k in cohort], take)
        came = mean.value()
        added = (joined(pairs).double() + came[VALUES].double()).float()
        return state.after_round({**without(came, (VALUES,)), **parted(added, pairs)})

    @on_client
    def train(self, c: Client, task: Task) -> Work[Update]:
        """Train everything from what arrived; send the head and the largest changes."""
        s = task.settings
        shaped = {n: torch.empty(a, b) for n, a, b in zip(s["names"], s["rows"], s["columns"], strict=True)}  # type: ignore[arg-type]
        arrived = parted(scattered(task.tensors, sum(t.numel() for t in shaped.values())), shaped)
        heads = without(task.tensors, (VALUES, PLACES))
        fitted = yield from self.inner.learn(c, {**heads, **arrived}, task)
        change = joined(only(fitted.tensors, list(shaped))) - joined(arrived)
        made = {**only(fitted.tensors, list(heads)), **{CHANGE + n: t for n, t in largest(change, self.up).items()}}
        return Update(c.id, len(c.train), made, {"loss": fitted.loss})

    def personalise(self, client: Client, shared: Tensors) -> Work[Predictor]:
        """The shared model as it is."""
        return self.inner.personalise(client, shared)

    def assembled(self, state: State) -> Tensors | None:
        """The shared model."""
        return self.inner.assembled(state)

    predict = predict


def joined(tensors: Tensors) -> torch.Tensor:
    """All entries in order of names (P,)."""
    return torch.cat([tensors[n].reshape(-1) for n in sorted(tensors)])


def parted(entries: torch.Tensor, like: Tensors) -> dict[str, torch.Tensor]:
    """The tensors that :func:`joined` made (P,) of, shaped as ``like``."""
    parts = entries.split([like[n].numel() for n in sorted(like)])
    return {n: part.view(like[n].shape) for n, part in zip(sorted(like), parts, strict=True)}


def largest(entries: torch.Tensor, share: float) -> dict[str, torch.Tensor]:
    """The ⌈share·P⌉ entries of (P,) that are largest in size, the first of equals, as values and ascending places."""
    count = rounded_up(share, len(entries))
    places = entries.abs().sort(descending=True, stable=True).indices[:count].sort().values
    return {VALUES: entries[places], PLACES: places.to(torch.int32)}


def scattered(sparse: Tensors, length: int) -> torch.Tensor:
    """(P,) with these values at their places and zero elsewhere.

    Raises:
        ValueError: places that (P,) has not, or has twice.
    """
    places = sparse[PLACES].long()
    if len(places) and not (int(places[0]) >= 0 and int(places[-1]) < length and bool((places.diff() > 0).all())):
        raise ValueError(f"places must ascend from 0 to {length - 1} at most; those that came begin with {places[:4].tolist()}")
    return sparse[VALUES].new_zeros(length).index_copy_(0, places, sparse[VALUES])
