"""How a round's cohort S_t is drawn. A cohort is a pure function of (seed, round): resuming needs no replay."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import torch

from fedloom.encodings import EXACT, Encoding
from fedloom.fleet import Fleet
from fedloom.messages import Tensors, Update
from fedloom.seeds import derive
from fedloom.server.masks import Mask
from fedloom.server.optimizers import ServerOptimizer, Steps
from fedloom.server.robust import Aggregation, Averaging
from fedloom.server.sharing import Sharing


@dataclass(frozen=True)
class Pool:
    """The clients that exist (by id), how many are drawn a round, the experiment's seed, number of rounds T and rule of aggregation, what
    the devices are like (None: nothing is said of them), the server's optimiser (None: an aggregate is taken over), whether gradients
    are corrected by SCAFFOLD's controls (``server/controls.py``), which rows devices train (``server/masks.py``), which layers they
    share (``server/sharing.py``), and how numbers travel (``encodings.py``). ``steps``: the optimiser's in the round that is under way;
    outside of rounds there are none, so what a set-up averages is the mean."""

    clients: tuple[int, ...]
    cohort: int
    rounds: int
    seed: int
    aggregation: Aggregation = field(default_factory=Aggregation)
    fleet: Fleet | None = None
    optimizer: ServerOptimizer | None = None
    steps: Steps | None = None
    controls: bool = False
    mask: Mask = field(default_factory=Mask)
    sharing: Sharing = field(default_factory=Sharing)
    encoding: Encoding = EXACT

    def __post_init__(self) -> None:
        if not 1 <= self.cohort <= len(self.clients):
            raise ValueError(f"a cohort of {self.cohort} cannot be drawn from {len(self.clients)} clients; use 1 to {len(self.clients)}")

    def strength(self, client: int) -> float | None:
        """A device's memory as a share of the most that any has; None where all are alike, or nothing is said."""
        return None if self.fleet is None else self.fleet.strength(client)

    def average(self, sent: Tensors | None = None) -> Averaging:
        """What a round's updates are aggregated with, by the experiment's rule. ``sent``: the tensors that the devices started from, from
        which the server's optimiser takes its step."""
        mean = self.aggregation.averaging(sent or {}, self.cohort)
        return mean if self.steps is None or not sent else self.steps.towards(mean, sent)

    def mean(self, updates: Sequence[Update], sent: Tensors | None = None) -> dict[str, torch.Tensor]:
        """The same of updates that are all here."""
        mean = self.average(sent)
        for update in updates:
            mean.take(update)
        return mean.value()

    def stepped(self, sent: Tensors, made: Tensors) -> Tensors:
        """What the server's optimiser makes of ``made``, a method's own next value of the tensors ``sent``; that itself without one."""
        return made if self.steps is None else self.steps.take(sent, made)

    def insist_on_the_mean(self, method: str, because: str, steps: bool = False) -> None:
        """For methods whose server does something else with updates than to aggregate them by name. ``steps``: it takes the optimiser's
        step towards what that comes to (:meth:`stepped`).

        Raises:
            ValueError: another rule was asked for, a server optimiser that it does not follow, controls, or that layers stay on devices.
        """
        if not steps:
            self.insist_on_no_optimizer(method, because)
        self.insist_on_what_was_sent(method, because)
        if self.aggregation != Aggregation():
            raise ValueError(
                f"'{method}' cannot follow aggregation '{self.aggregation.name}': {because}. Leave --aggregation out, or choose a method "
                "that averages tensor by tensor (lora, fibecfed, federa, fedopt, ...)"
            )

    def insist_on_no_optimizer(self, method: str, because: str) -> None:
        """For methods whose next model is no step from the last one, tensor by tensor.

        Raises:
            ValueError: there is a server optimiser.
        """
        if self.optimizer is not None:
            raise ValueError(
                f"'{method}' cannot follow server optimiser '{self.optimizer.rule}': {because}. Leave --server.rule out, or choose a "
                "method that averages tensor by tensor (lora, ffa, rolora, fedsa, federa, fibecfed, flasc, ...)"
            )

    def insist_on_what_was_sent(self, method: str, because: str) -> None:
        """For methods whose devices do not all train what they were sent, as it was sent, and send that back; of which no layer can stay
        on a device either.

        Raises:
            ValueError: gradients are to be corrected by controls, or layers to stay on devices.
        """
        self.insist_on_every_layer(method, because)
        if self.controls:
            raise ValueError(
                f"'{method}' cannot follow SCAFFOLD's controls: {because}. Leave --controls out, or choose a method whose devices train "
                "the tensors that they are sent (lora, ffa, rolora, fedsa, fedex, federa, fibecfed, slora, ...)"
            )

    def insist_on_no_mask(self, method: str, because: str) -> None:
        """For methods whose devices do not train B's rows one beside the other.

        Raises:
            ValueError: devices are to train some rows.
        """
        if self.mask.keep < 1:
            raise ValueError(
                f"'{method}' cannot follow a mask that keeps {self.mask.keep:g} of the neurons: {because}. Leave --mask.keep out, or "
                "choose a method that trains LoRA's pairs as they are (lora, ffa, rolora, fedsa, federa, fedopt, flasc, ...)"
            )

    def insist_on_every_layer(self, method: str, because: str) -> None:
        """For methods whose devices do not take part of a layer's pairs from what they are sent and send that part back.

        Raises:
            ValueError: some layers are to stay on devices.
        """
        if self.sharing.some:
            asked = f"count {self.sharing.count}" if self.sharing.count else f"fraction {self.sharing.fraction:g}"
            raise ValueError(
                f"'{method}' cannot share some of the layers ({asked}): {because}. Leave --share.fraction and --share.count out, or choose "
                "a method that trains and shares LoRA's pairs as they are (lora, ffa, rolora, fedsa, federa, fedopt, fedprox, ...)"
            )

    def insist_on_nothing_owed(self, method: str, because: str) -> None:
        """For methods whose devices send, under the name of what came, something else than a step from it.

        Raises:
            ValueError: what a device does not send is added to what it sends later.
        """
        if self.encoding.owes:
            raise ValueError(
                f"'{method}' cannot go over wire '{self.encoding.name}', which adds what a device has not sent to what it sends later: "
                f"{because}. Give another --wire (up:int8, up:nf4, ...), or choose a method whose devices send steps from what they are "
                "sent (lora, ffa, rolora, fedsa, fedex, federa, fibecfed, ...)"
            )

    def plain(self) -> Pool:
        """The same, by the mean and without an optimiser, controls or a mask, all layers being shared."""
        return replace(self, aggregation=Aggregation(), optimizer=None, steps=None, controls=False, mask=Mask(), sharing=Sharing())


def uniform(pool: Pool, round: int) -> tuple[int, ...]:
    """S_t: ``pool.cohort`` distinct clients, uniform without replacement, in ascending order of id."""
    drawn = derive(pool.seed, "cohort", round).choice(len(pool.clients), size=pool.cohort, replace=False)
    return tuple(pool.clients[i] for i in sorted(drawn))
