"""FedALT, as it runs on both computes, against plain PyTorch in float64: two LoRAs and a mixer written out again, local training by a loop,
and the means of the others taken one by one. Each test's docstring is the sentence that it holds the method to."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import cache
from typing import Any, Literal

import numpy as np
import pytest
import torch
from transformers import BertForSequenceClassification

from fedloom.compute.serial import Serial
from fedloom.compute.stacked import Stacked
from fedloom.compute.work import Predict
from fedloom.encodings import NAMES, Encoding
from fedloom.methods.fedalt import FedAlt
from fedloom.model.base import Model
from fedloom.server.participation import Pool, uniform
from fedloom.server.robust import Aggregation
from tests import families, tiny
from tests.oracle import real
from tests.oracle.numpy_training import adamw_step, clip_to
from tests.oracle.test_baselines import COHORTS, EVERYBODY, epochs, kinds

S = 2.0
"""s = alpha/r of the tiny model: 4/2."""
Arrays = dict[str, np.ndarray]
PLACES = [f"bert.encoder.layer.{i}.attention.self.{part}" for i in range(3) for part in ("query", "value")]
HEAD = ["classifier.weight", "classifier.bias"]
LORA = [f"{place}.own_{f}.weight" for place in PLACES for f in "AB"]
REST = [name.replace("own_", "rest_") for name in LORA]
GATES = [f"{place}.gate.weight" for place in PLACES]


@cache
def model() -> Model:
    return tiny.model(kind="mixed")


@cache
def run(kind: Literal["serial", "stacked"]) -> real.Run:
    return real.watch(FedAlt(real.INNER), Serial(model()) if kind == "serial" else Stacked(model()), real.POOL, model())


# ---- the derivation -------------------------------------------------------------------------------------------------------------


@cache
def base() -> Any:
    """The untouched BERT, in float64."""
    return (
        BertForSequenceClassification.from_pretrained(
            tiny.folder(3), num_labels=3, attn_implementation="eager", ignore_mismatched_sizes=True
        )
        .double()
        .eval()
    )


@contextmanager
def mixed(at: Mapping[str, torch.Tensor]) -> Iterator[Any]:
    """The BERT whose projections have Σ over the two LoRAs of softmax(G x)_i · s·B_i A_i x added, and with this head."""
    hooks = []

    def added(place: str) -> Any:
        def hook(_: Any, given: tuple[torch.Tensor], made: torch.Tensor) -> torch.Tensor:
            (x,) = given
            scores = torch.einsum("blj,ij->bli", x, at[f"{place}.gate.weight"])
            weights = scores.exp() / scores.exp().sum(-1, keepdim=True)
            for i, which in enumerate(("own", "rest")):
                product = at[f"{place}.{which}_B.weight"] @ at[f"{place}.{which}_A.weight"]
                made = made + S * weights[..., i, None] * torch.einsum("blj,oj->blo", x, product)
            return made

        return hook

    def head(_: Any, given: tuple[torch.Tensor], made: torch.Tensor) -> torch.Tensor:
        return given[0] @ at["classifier.weight"].T + at["classifier.bias"]

    hooks += [base().get_submodule(place).register_forward_hook(added(place)) for place in PLACES]
    hooks.append(base().classifier.register_forward_hook(head))
    try:
        yield base()
    finally:
        for hook in hooks:
            hook.remove()


def logits(at: Mapping[str, torch.Tensor], texts: Sequence[Any]) -> torch.Tensor:
    with mixed(at) as bert:
        rows = [bert(input_ids=torch.tensor([text.ids])).logits for text in texts]
    return torch.cat(rows)


def trained(client: int, own: Arrays, rest: Arrays, batches: Sequence[np.ndarray]) -> tuple[Arrays, list[float]]:
    """The device's own LoRA, mixers and head after training, the rest of the world's LoRA frozen; the loss before each step."""
    now, losses = dict(own), []
    first, second = ({n: np.zeros_like(t) for n, t in own.items()} for _ in range(2))
    for number, batch in enumerate(batches, 1):
        leaves = {n: torch.from_numpy(t).requires_grad_(True) for n, t in now.items()}
        chosen = [real.questions(client)[i] for i in batch]
        due = torch.tensor([text.label for text in chosen])
        said = logits({**leaves, **{n: torch.from_numpy(t) for n, t in rest.items()}}, chosen)
        loss = (said.logsumexp(1) - said[torch.arange(len(due)), due]).mean()
        losses.append(float(loss.detach()))
        gradients = dict(zip(leaves, (g.numpy() for g in torch.autograd.grad(loss, list(leaves.values()))), strict=True))
        for n, g in clip_to(gradients, real.RULE.clip).items():
            now[n], first[n], second[n] = adamw_step(now[n], g, first[n], second[n], number, real.RULE)
    return now, losses


def others(client: int, sent: Mapping[int, Arrays]) -> Arrays:
    """1/(K−1) Σ_{j≠k}: of every factor by itself, over those who sent one; B is zero before anybody has."""
    there = [lora for k, lora in sent.items() if k != client]
    if not there:
        return {n.replace("own_", "rest_"): np.zeros_like(real.arrays(model().initial)[n]) for n in LORA}
    return {n.replace("own_", "rest_"): sum(lora[n] for lora in there) / len(there) for n in LORA}


# ---- the sentences --------------------------------------------------------------------------------------------------------------


def test_the_layer() -> None:
    """W x + α(x)_1·s·B A x + α(x)_2·s·B' A' x, α = softmax(G x), for every token; the start is the pre-trained function."""
    of = model()
    at = families.moved(of, 5)
    shard = tiny.examples(6, seed=9)
    alone, together = (c.run([Predict(at, shard)])[0].result for c in (Serial(of), Stacked(of)))
    due = logits({n: t.double() for n, t in at.items()}, real.as_oracle(shard)).detach()
    assert torch.allclose(alone.double(), due, atol=1e-4) and torch.allclose(together.double(), due, atol=1e-4)
    turned = {**at, **{n: -at[n] for n in GATES}}
    assert not torch.allclose(logits({n: t.double() for n, t in turned.items()}, real.as_oracle(shard)).detach(), due, atol=1e-2)
    plain = {n: t.double() for n, t in of.initial.items()}
    nothing = {**plain, **{n: torch.zeros_like(plain[n]) for n in (*LORA, *REST)}}
    assert torch.equal(logits(plain, real.as_oracle(shard)), logits(nothing, real.as_oracle(shard)))
    assert {tuple(of.initial[n].shape) for n in GATES} == {(2, 16)}
    assert all(of.initial[n].abs().max() <= 1 / 4 and of.initial[n].std() > 0.1 for n in GATES), "uniform in ±1/√d_in"


@kinds
def test_fedalt(kind: real.Kind) -> None:
    """Each client continues training its individual LoRA and its mixer; the RoW LoRA, the average of the other clients' individual LoRAs,
    stays frozen during local training; only individual LoRAs are sent."""
    made = run(kind)
    assert [exchange.op for exchange in made.exchanges] == ["receive", *["train"] * len(COHORTS), "predict"]
    start = {n: t for n, t in real.arrays(model().initial).items() if n not in REST}
    assert set(start) == {*LORA, *GATES, *HEAD}
    (received,) = made.asked("receive")
    for k in EVERYBODY:
        real.assert_close(received.down[k].tensors, start, 1e-7, 1e-7)
    own, sent = dict.fromkeys(EVERYBODY, start), dict[int, Arrays]()
    for t, exchange in enumerate(made.asked("train")):
        assert tuple(exchange.down) == COHORTS[t]
        mean = {n: sum((lora[n] for lora in sent.values()), np.zeros(start[n].shape)) / max(1, len(sent)) for n in LORA}
        after = dict(sent)
        for k, task in exchange.down.items():
            assert task.tensors["sent"].tolist() == sorted(sent)
            real.assert_close({n: x for n, x in task.tensors.items() if n != "sent"}, mean)
            (fit,) = exchange.fits(k)
            rest = others(k, sent)
            real.assert_close(fit.fixed, rest)
            fitted, losses = trained(k, own[k], rest, epochs(k, "batches", t))
            assert set(exchange.up[k].tensors) == set(LORA), "neither mixers nor heads nor anybody else's LoRA are sent"
            real.assert_close(exchange.up[k].tensors, {n: fitted[n] for n in LORA})
            assert exchange.up[k].metrics["loss"] == pytest.approx(np.mean(losses), abs=1e-4)
            assert (exchange.up[k].num_examples, exchange.up[k].examples) == (real.SIZES[k], 2 * real.SIZES[k])
            assert t == 0 or any(np.abs(fitted[n] - own[k][n]).max() > 1e-3 for n in GATES), "the mixer learns"
            own[k], after[k] = fitted, {n: fitted[n] for n in LORA}
        sent = after
        assert made.states[t + 1].shared["sent"].tolist() == sorted(sent)
        for k in EVERYBODY:
            real.assert_close(made.private[t + 1][k], own[k])
    assert set(sent) == set(EVERYBODY), "everybody took part at some time, so that the means are of others that differ"
    for k in EVERYBODY:
        whole = {n: torch.from_numpy(t) for n, t in {**own[k], **others(k, sent)}.items()}
        for split in ("validation", "test"):
            due = logits(whole, real.as_oracle(real.devices()[k].shard(split))).detach().numpy()
            np.testing.assert_allclose(made.logits[k][split].numpy(), due, atol=3e-3)
    assert made.assembled is None


def test_what_a_device_sent_before_is_replaced_and_not_added_to() -> None:
    """The mean has every device once: what it sent last."""
    made = run("stacked")
    last = {k: real.arrays(update.tensors) for exchange in made.asked("train") for k, update in exchange.up.items()}
    times = [k for exchange in made.asked("train") for k in exchange.up]
    assert len(times) > len(set(times)), "somebody took part twice"
    shared = real.arrays({n: t for n, t in made.states[-1].shared.items() if n != "sent"})
    for n in LORA:
        np.testing.assert_allclose(shared[n], sum(lora[n] for lora in last.values()) / len(last), atol=1e-6)


def test_another_rule_than_the_mean_is_refused() -> None:
    pool = replace(Pool((0, 1, 2, 3), 3, 3, 8), aggregation=Aggregation("median"))
    assert uniform(pool, 0)
    with pytest.raises(ValueError, match="'fedalt' cannot follow aggregation 'median'.*what all the others sent last"):
        next(FedAlt().setup(FedAlt().init(model()), pool))


STEP = {"bf16": 2.0**-8, "fp16": 2.0**-10, "int8": 1 / 253, "nf4": 0.152}
"""How far a wire rounds a number at most, as a share of the largest there is."""


@pytest.mark.parametrize("wire", ["up:int8", *[name for name in NAMES if name != "exact"]])
def test_the_server_has_of_each_device_what_it_trained(wire: str) -> None:
    """The server keeps the LoRA that each device sent last: over any wire it is that, to the wire's rounding of the mean that came down and
    of how far the LoRA is from it; a wire that would add what it left out of another one is refused before anybody is asked."""
    pool = replace(Pool((0, 1, 2, 3), 3, 2, 8), encoding=Encoding.of(wire))
    if pool.encoding.owes:
        with pytest.raises(ValueError, match="'fedalt' cannot go over wire 'top-k'.*where its own pair stands"):
            next(FedAlt().setup(FedAlt().init(model()), pool))
        return
    made = real.watch(FedAlt(real.INNER), Stacked(model()), pool, model())
    for t, exchange in enumerate(made.asked("train")):
        means, kept = made.states[t].shared, made.states[t + 1].server
        for k in exchange.up:
            trained = made.private[t + 1][k]
            down = 0.0 if pool.encoding.up_only else largest(means[n] for n in LORA)
            most = STEP[pool.encoding.name] * (down + largest(trained[n] - means[n] for n in LORA))
            assert largest(kept[n][k] - trained[n] for n in LORA) <= 1.1 * most + 1e-6


def largest(tensors: Iterable[torch.Tensor]) -> float:
    return max(float(t.abs().max()) for t in tensors)
