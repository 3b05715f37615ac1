"""FedAlt: alternating partial personalisation (Federated Learning with Partial Model Personalization, 2204.03809, ICML 2022).

The trainable tensors are split into a shared part u and a local part v_k. A participation of device k trains one after the other:

    v_k  <- AdamW on device k from v_k,   u_t frozen,       E_v epochs
    u^k  <- AdamW on device k from u_t,   the new v_k frozen, E_u epochs
    u_t+1 <- Σ_{k in S_t} p_k u^k,   p_k = n_k / Σ_{j in S_t} n_j

Only u travels. v_k starts from the common start, which every device receives once, in the set-up, and persists between participations. A
device that never took part predicts with the start's v.

Which part is local is the paper's choice of architecture: its output layer, here the task head (``top_layers = 0``, the default), or
transformer layers, here the LoRA pairs of the ``top_layers`` highest adapted layers; with as many as there are, that is its adapter
personalisation: all LoRA is local and the head is shared. With a local head there is no global model; with a shared head the global model
is u alone, the local layers being at the start, where B = 0 or singular vectors.

The paper's other algorithm, FedSim, trains both parts at once; with the head as local part that is ``lora-personal-head``.

The name: another FedALT (2503.11880) mixes two adapters; it is ``fedalt``.

Deviations: the optimiser is AdamW, fresh for each part as in the authors' code; both parts walk through the same batches; the paper's
pre-training of the whole model by FedAvg before, and its local fine-tuning afterwards, are not here. The loss that is told is the mean of
both parts', as in the authors' code.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import ClassVar

from fedloom.client.client import Client
from fedloom.messages import Flow, Task, Tensors, Update, Work, on_client
from fedloom.methods.fedavg import FedAvg
from fedloom.methods.method import Predictor, State, hand_out, predict, receive, round_of
from fedloom.model.base import Model
from fedloom.model.blocks import layer_of, layers
from fedloom.model.names import is_head, need_head
from fedloom.seeds import derive_int
from fedloom.server.participation import Pool
from fedloom.tensors import only, without


@dataclass(frozen=True)
class FedAltPartial:
    """FedAlt.

    Attributes:
        inner: training of the shared part, E_u epochs; its optimiser trains the local part too.
        epochs: epochs E_v over the device's data in which the local part is trained first.
        top_layers: the LoRA of so many highest adapted layers is local and the head shared; 0: the head is local and all LoRA shared.
    """

    name: ClassVar[str] = "fedalt-partial"
    paper: ClassVar[str] = "FedAlt 2204.03809"
    joins_late: ClassVar[bool] = True

    inner: FedAvg = field(default_factory=FedAvg)
    epochs: int = 2
    top_layers: int = 0

    def __post_init__(self) -> None:
        if self.epochs < 1:
            raise ValueError(f"epochs is {self.epochs}; it must be 1 or more, for the local part is trained before the shared one")

    def init(self, model: Model) -> State:
        """The common start."""
        return State(0, model.initial)

    def setup(self, state: State, pool: Pool) -> Flow[State]:
        """Every device receives the start of its local part once; the rest is shared."""
        pool.insist_on_every_layer(self.name, "which part stays on a device is its own to say (--method.top-layers)")
        local = local_part(state.shared, self.top_layers)
        yield from hand_out(self.receive, pool.clients, local)
        return (yield from self.inner.setup(replace(state, shared=without(state.shared, local)), pool))

    def round(self, state: State, pool: Pool) -> Flow[State]:
        """FedAvg on u."""
        return self.inner.round(state, pool)

    @on_client
    def train(self, c: Client, task: Task) -> Work[Update]:
        """Train v_k under u_t and keep it, then u under v_k and send it."""
        t = round_of(task)
        first = replace(self.inner, local_epochs=self.epochs)
        examples, batches = yield from first.open(c, {**task.tensors, **c.private}, task)
        own = self.inner.fit(c, c.private, batches, t, fixed=task.tensors, examples=examples, own=c.private)
        own = yield replace(own, dropout_seed=derive_int(c.seed, "fit local part", t, c.id))
        common = yield from self.inner.learn(c, task.tensors, task, fixed=own.tensors)
        c.private = own.tensors
        loss = (own.loss + common.loss) / 2
        return Update(c.id, len(c.train), common.tensors, {"loss": loss})

    def personalise(self, client: Client, shared: Tensors) -> Work[Predictor]:
        """The device's v_k with the shared u."""
        yield from ()
        return Predictor({**client.private, **shared})

    def assembled(self, state: State) -> Tensors | None:
        """u alone where the head is shared; None where it is local."""
        return state.shared if self.top_layers else None

    receive = receive
    predict = predict


def local_part(tensors: Tensors, top_layers: int) -> Tensors:
    """The tensors that stay on the devices: the LoRA of the ``top_layers`` highest layers that have any, or the head if that is 0.

    Raises:
        ValueError: more layers than are adapted, or a negative number.
    """
    adapted = list(layers([name for name in tensors if not is_head(name)]))
    if not 0 <= top_layers <= len(adapted):
        raise ValueError(f"top_layers must be 0 (the head is local) to {len(adapted)}, the layers with LoRA {adapted}; got {top_layers}")
    if not top_layers:
        need_head(tensors, "fedalt-partial")
        return only(tensors, [name for name in tensors if is_head(name)])
    chosen = adapted[-top_layers:]
    return only(tensors, [name for name in tensors if not is_head(name) and layer_of(name) in chosen])
