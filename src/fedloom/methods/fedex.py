"""FedEx-LoRA: exact aggregation (FedEx-LoRA: Exact Aggregation for Federated and Efficient Fine-Tuning of Foundation Models, 2410.09432).

Factors are averaged as in FedIT, and what the product of the means is short of the mean of the products goes into the frozen weights:

    A^k, B^k <- AdamW on device k from A_t, B_t, on W_t                      A (r, d_in), B (d_out, r), W (d_out, d_in)
    A_t+1 <- Σ p_k A^k,   B_t+1 <- Σ p_k B^k,   p_k = n_k / Σ_{j in S_t} n_j
    W_t+1 <- W_t + s·(Σ p_k B^k A^k − B_t+1 A_t+1)                           the residual

so that W_t+1 + s·B_t+1·A_t+1 = W_t + Σ p_k s·B^k A^k, the mean of the devices' models.

Deviations: a device is sent W_t itself, not the residual's factors, for the reason given in ``flora.py``: a device that is drawn every
tenth round needs the residuals of all rounds between. The paper weighs devices alike; here p_k is FedAvg's. The task head is averaged as
the factors are. AdamW, fresh at each participation.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import ClassVar

from fedloom.client.client import Client
from fedloom.messages import Asking, Flow, Task, Tensors, Update, Work, ask, due, on_client
from fedloom.methods.fedavg import FedAvg
from fedloom.methods.method import Predictor, State, predict
from fedloom.model.base import Model
from fedloom.model.factors import Products, moved, products
from fedloom.model.names import is_beneath, need_pairs
from fedloom.server.aggregation import Average
from fedloom.server.participation import Pool, uniform
from fedloom.tensors import only, without


@dataclass(frozen=True)
class FedExLora:
    """``inner``: local training and its optimiser."""

    name: ClassVar[str] = "fedex"
    paper: ClassVar[str] = "FedEx-LoRA 2410.09432"

    inner: FedAvg = field(default_factory=FedAvg)

    def init(self, model: Model) -> State:
        """Every trainable tensor is shared, and the weights under the pairs.

        Raises:
            ValueError: no LoRA is trained; or a base in few bits.
        """
        need_pairs(model.initial, self.name)
        model.need_own_weights(self.name)
        return State(0, {**model.initial, **model.weights}, facts={"scaling": model.beneath.scaling})

    def setup(self, state: State, pool: Pool) -> Flow[State]:
        """As inner."""
        uncorrected = replace(pool, controls=False)  # the factors are trained and averaged as in FedIT, so gradients may be corrected
        uncorrected.insist_on_the_mean(self.name, "its server needs the mean of the products")
        return self.inner.setup(state, pool)

    def round(self, state: State, pool: Pool) -> Flow[State]:
        """S_t trains; the server takes the means of the factors and puts the residual under them."""
        ideal, mean = Products(), Average()

        def take(update: Update) -> Update:
            ideal.add(update.num_examples, update.tensors)
            return mean.take(update)

        trained = without(state.shared, list(filter(is_beneath, state.shared)))
        asked = [ask(self.train, k, state.shared, **self.inner.clock(state.round, pool)) for k in uniform(pool, state.round)]
        yield Asking([due(task, trained) for task in asked], take)
        averaged = mean.value()
        reached = products(averaged)
        residual = {name: wanted - reached[name] for name, wanted in ideal.mean().items()}
        return state.after_round({**averaged, **moved(state.shared, residual, float(state.facts["scaling"]))})

    @on_client
    def train(self, c: Client, task: Task) -> Work[Update]:
        """Train the pairs and the head on the weights that came; send them."""
        weights = only(task.tensors, list(filter(is_beneath, task.tensors)))
        fitted = yield from self.inner.learn(c, without(task.tensors, weights), task, fixed=weights)
        return Update(c.id, len(c.train), fitted.tensors, {"loss": fitted.loss})

    def personalise(self, client: Client, shared: Tensors) -> Work[Predictor]:
        """The shared model as it is."""
        yield from ()
        return Predictor(shared)

    def assembled(self, state: State) -> Tensors | None:
        """The shared model."""
        return state.shared

    predict = predict
