"""Fed-SB's, FedALT's, HetLoRA's and the one place's conversations played by hand: what is made of made-up updates, what is refused."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from fedloom.client.curriculum import shuffled
from fedloom.compute.work import Fit, Fitted, Moments
from fedloom.messages import Task, Update, ask
from fedloom.methods.centralised import Centralised
from fedloom.methods.fedalt import FedAlt, rest_of_world
from fedloom.methods.fedavg import FedAvg
from fedloom.methods.fedsb import CORE, FedSb, whole
from fedloom.methods.hetlora import HetLora
from fedloom.methods.method import State
from fedloom.model.mixing import as_rest, is_own, is_rest
from fedloom.server.participation import uniform
from tests.flows import POOL, SIZES, client, play, same, start, work

UPS = [name for name in start() if ".lora_B." in name]


def gradients(task: Task) -> Update:
    """Device k's gradient is k + 1 everywhere but in one place; one example."""
    if task.op != "gradient":
        return Update(task.client, SIZES[task.client])
    made = {n.replace("lora_B", "base_layer"): torch.full((4, 3), task.client + 1.0) for n in UPS}
    made[min(made)][1, 2] = -10.0
    return Update(task.client, 1, made)


def pairs_and_heads() -> State:
    pairs = {n: t for n, t in start().items() if ".lora_" in n}
    return State(0, {n: t for n, t in start().items() if n not in pairs}, pairs, {"scaling": 2.0})


def test_fedsb_asks_the_first_cohort_for_gradients_and_hands_b_and_a_to_everybody() -> None:
    (first, second), state = play(FedSb().setup(pairs_and_heads(), POOL), gradients)
    assert [(t.op, t.client, set(t.tensors)) for t in first] == [("gradient", k, set(pairs_and_heads().shared)) for k in uniform(POOL, 0)]
    assert [(t.op, t.client, set(t.tensors)) for t in second] == [("receive", k, set(pairs_and_heads().server)) for k in POOL.clients]
    assert set(state.shared) == {*pairs_and_heads().shared, *(CORE + n for n in UPS)}
    signs = torch.ones(4, 3)
    signs[1, 2] = -1
    for b in UPS:
        delta = -FedSb().inner.lr * (signs if b.replace("lora_B", "base_layer") == min(gradients(first[0]).tensors) else torch.ones(4, 3))
        a = state.server[b.replace("lora_B", "lora_A")]
        torch.testing.assert_close(2.0 * state.server[b] @ state.shared[CORE + b] @ a, delta, atol=1e-7, rtol=0)  # of rank 2 at most
        torch.testing.assert_close(state.server[b].T @ state.server[b], torch.eye(2), atol=1e-6, rtol=0)


def test_fedsb_asks_a_device_of_the_first_cohort_again_and_counts_it_once() -> None:
    asked: list[int] = []
    late = uniform(POOL, 0)[1]

    def lazy(task: Task) -> Update | None:
        asked.append(task.client)
        return None if task.client == late and asked.count(late) == 1 else gradients(task)

    askings, state = play(FedSb().setup(pairs_and_heads(), POOL), lazy)
    assert [[(t.op, t.client) for t in tasks] for tasks in askings[:2]] == [
        [("gradient", k) for k in uniform(POOL, 0)],
        [("gradient", late)],
    ]
    (_, __), whole_state = play(FedSb().setup(pairs_and_heads(), POOL), gradients)
    assert all(torch.equal(state.shared[n], whole_state.shared[n]) for n in whole_state.shared)


def test_hetlora_keeps_the_share_of_the_rank_that_is_a_whole_number() -> None:
    """γ·r = .58·50 = 29 directions: floats have it a little below. The rest is held down, and given up once it is smaller."""
    rng, c, method = np.random.default_rng(4), client(), HetLora(keep=0.58, penalty=0.5)
    a, b = "m.layer.0.q.lora_A.weight", "m.layer.0.q.lora_B.weight"
    sent = {a: torch.tensor(rng.normal(size=(50, 60))), b: torch.tensor(rng.normal(size=(55, 50)))}
    due = 0.5 * np.linalg.norm(sent[b].numpy()[:, 29:]) * np.linalg.norm(sent[a].numpy()[29:])
    assert float(method.held_down(sent, sent)) == pytest.approx(due)
    operation = method.train(c, ask(method.train, 1, sent, round=0))
    fit = next(operation)
    zero = {n: torch.zeros_like(t) for n, t in sent.items()}
    with pytest.raises(StopIteration) as done:
        operation.send(Fitted({a: sent[a] * 0.9, b: sent[b] * 0.9}, np.array([1.0]), Moments(zero, zero, 1)))
    assert isinstance(fit, Fit) and fit.penalty is not None
    assert (done.value.value.tensors[a].shape, done.value.value.tensors[b].shape) == ((29, 60), (55, 29))
    assert int(c.memory["rank"]) == 29


def test_a_round_of_all_data_is_a_batch_at_least() -> None:
    """A hundredth of nine examples is less than half a batch; and yet every round trains, on one batch after another."""
    method, c = Centralised(FedAvg(batch_size=4)), client()
    endless = [batch for epoch in range(2) for batch in shuffled(9, 4, c.seed, "centralised", epoch)]
    for t in range(5):
        zero = {n: torch.zeros_like(tensor) for n, tensor in start().items()}
        came = Fitted(start(), np.array([1.0]), Moments(zero, zero, t + 1))
        (fit,), update = work(method.train(c, ask(method.train, 1, start(), round=t, share=0.01)), came)
        assert isinstance(fit, Fit) and same(fit.batches, endless[t : t + 1]), t
        assert update.num_examples == 9


def test_fedsb_needs_an_example() -> None:
    with pytest.raises(ValueError, match="at least one example a device; examples is 0"):
        FedSb(examples=0)


def test_a_core_goes_into_its_b_and_everything_else_stays() -> None:
    b, a, core = torch.randn(4, 2), torch.randn(2, 3), torch.randn(2, 2)
    made = whole({"x.lora_B.weight": b, "x.lora_A.weight": a, f"{CORE}x.lora_B.weight": core, "head": a})
    assert set(made) == {"x.lora_B.weight", "x.lora_A.weight", "head"}
    assert torch.equal(made["x.lora_B.weight"], b @ core) and made["x.lora_A.weight"] is a


def shared(sent: list[int], by: dict[int, float]) -> dict[str, torch.Tensor]:
    """The mean of what these devices sent: everywhere the same number each."""
    mean = sum(by[k] for k in sent) / max(1, len(sent))
    return {"q.own_A.weight": torch.full((2, 3), mean), "q.own_B.weight": torch.full((4, 2), -mean), "sent": torch.tensor(sent)}


@pytest.mark.parametrize(
    ("sent", "due"), [([], 0.0), ([1], 0.0), ([0], 2.0), ([0, 1], 2.0), ([0, 2], 5.0), ([0, 1, 2], 5.0), ([0, 1, 2, 3], 6.0)]
)
def test_the_rest_of_the_world_is_everybody_who_sent_but_oneself(sent: list[int], due: float) -> None:
    by = {0: 2.0, 1: 100.0, 2: 8.0, 3: 8.0}
    c = client(1)
    c.private = {"q.own_A.weight": torch.full((2, 3), by[1]), "q.own_B.weight": torch.full((4, 2), -by[1])}
    made = rest_of_world(c, shared(sent, by))
    torch.testing.assert_close(made["q.rest_A.weight"], torch.full((2, 3), due))
    torch.testing.assert_close(made["q.rest_B.weight"], torch.full((4, 2), -due))
    assert set(made) == {"q.rest_A.weight", "q.rest_B.weight"}


def test_fedalt_keeps_what_each_device_sent_last() -> None:
    own = {"q.own_A.weight": torch.zeros(2, 3), "q.own_B.weight": torch.zeros(4, 2)}
    state = State(
        0,
        {**own, "sent": torch.zeros(0, dtype=torch.int64)},
        {**own, "q.gate.weight": torch.ones(2, 3), "classifier.bias": own["q.own_A.weight"]},
    )
    (receive,), state = play(FedAlt().setup(state, POOL), lambda task: Update(task.client, 1))
    assert [(t.op, t.client, len(t.tensors)) for t in receive] == [("receive", k, 4) for k in POOL.clients]
    assert {n: tuple(t.shape) for n, t in state.server.items()} == {"q.own_A.weight": (4, 2, 3), "q.own_B.weight": (4, 4, 2)}
    last: dict[int, float] = {}
    for t in range(3):
        before = {n: x.clone() for n, x in state.server.items()}
        old = state

        def answer(task: Task, t: int = t) -> Update | None:
            if (task.client, t) == (2, 1):
                return None
            last[task.client] = 10.0 * t + task.client
            return Update(task.client, SIZES[task.client], {n: x * 0 + last[task.client] for n, x in task.tensors.items() if is_own(n)})

        (tasks,), state = play(FedAlt().round(state, POOL), answer)
        assert all(set(task.tensors) == {*own, "sent"} for task in tasks)
        assert all(torch.equal(old.server[n], before[n]) for n in before), "the state that was passed in stays as it is"
        assert state.shared["sent"].tolist() == sorted(last)
        mean = sum(last.values()) / len(last)  # all alike, whatever they hold
        assert all(torch.allclose(state.shared[n], torch.full_like(own[n], mean)) for n in own)


def test_names_of_the_two() -> None:
    assert as_rest("a.q.own_A.weight") == "a.q.rest_A.weight" and as_rest("a.q.own_B.weight") == "a.q.rest_B.weight"
    assert is_own("a.q.own_B.weight") and not is_rest("a.q.own_B.weight") and is_rest("a.q.rest_A.weight")
    with pytest.raises(ValueError, match="'a.q.gate.weight' is no factor of a device's own LoRA"):
        as_rest("a.q.gate.weight")
