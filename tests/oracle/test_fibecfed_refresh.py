"""The Global Aggregation Layers chosen anew: "refreshed every R rounds" at the current model, derived in NumPy from what devices and server
held right before. What the paper leaves open is decided in docs/decisions/0014."""

from __future__ import annotations

from functools import cache

import numpy as np
import pytest
import torch

from fedloom.client.neurons import KEPT
from fedloom.methods.fibecfed import Curriculum, FibecFed, Gal
from fedloom.model.blocks import layer_of
from fedloom.model.names import is_factor, is_up
from fedloom.server.masks import ROWS, completed
from fedloom.server.participation import Pool, uniform
from fedloom.tensors import nbytes, packed
from tests.oracle import numpy_fibecfed as numpy
from tests.oracle import real

pytestmark = pytest.mark.no_cover

POOL = Pool(real.POOL.clients, 3, 6, 8)
EVERY, RHO = 2, 0.8
METHOD = FibecFed(real.INNER, Curriculum(head_rounds=1), Gal(0.5, rho=RHO, norm="norms", refresh=EVERY), keep=0.4)
DUE = [t for t in range(POOL.rounds) if t and t % EVERY == 0]
EXAMPLES = sum(real.SIZES)


@cache
def made(kind: real.Kind) -> real.Run:
    return real.watch(METHOD, real.compute(kind), POOL)


every_kind = pytest.mark.parametrize("kind", ["serial", "stacked"])


def gals(run: real.Run) -> list[list[int]]:
    """The GAL of each round."""
    return [list(state.facts["gal"]) for state in run.states[1:]]


@cache
def due_scores(kind: real.Kind, t: int) -> dict[int, np.ndarray]:
    """s_l^k at device k's own model right before round t: its own layers under the shared ones, on the first of its batches."""
    run, scores = made(kind), {}
    for k in real.POOL.clients:
        batch = METHOD.inner.cut(real.devices()[k], "batches")[0]
        now = real.arrays({**run.private[t][k], **run.states[t].shared})
        scores[k] = numpy.sensitivity(real.encoder(), now, [real.questions(k)[i] for i in batch], RHO, "norms")
    return scores


@every_kind
def test_sensitivity_is_taken_again_at_the_current_model(kind: real.Kind) -> None:
    """Every R rounds, and in no other round; on every device, whoever trains then; only scores go up."""
    asked = made(kind).asked("rescore")
    assert len(asked) == len(DUE) == 2
    for t, exchange in zip(DUE, asked, strict=True):
        assert tuple(exchange.down) == POOL.clients
        for k, update in exchange.up.items():
            assert all(torch.equal(x, made(kind).states[t].shared[n]) for n, x in exchange.down[k].tensors.items())
            assert set(update.tensors) == {"layer_scores"} and nbytes(update.tensors) == 8 * real.LAYERS
            np.testing.assert_allclose(update.tensors["layer_scores"].numpy(), due_scores(kind, t)[k], rtol=1e-3, atol=5e-6)
            first = numpy.sensitivity(
                real.encoder(),
                real.arrays(made(kind).asked("inspect")[0].down[k].tensors),
                [real.questions(k)[i] for i in METHOD.inner.cut(real.devices()[k], "batches")[0]],
                RHO,
                "norms",
            )
            assert np.abs(first - update.tensors["layer_scores"].numpy()).max() > 1e-3, "the model has moved since the set-up"


@every_kind
def test_the_layers_are_chosen_by_the_new_scores(kind: real.Kind) -> None:
    """s_l = Σ_k (n_k/n) s_l^k again; as many layers as before, the least sensitive; the history is told."""
    run, history = made(kind), made(kind).states[-1].facts["gal_history"]
    assert [entry["round"] for entry in history] == [0, *DUE]
    for entry, t in zip(history[1:], DUE, strict=True):
        scores = numpy.combine([due_scores(kind, t)[k] for k in POOL.clients], real.SIZES)
        np.testing.assert_allclose(entry["layer_scores"], scores, rtol=1e-3, atol=5e-6)
        assert tuple(entry["gal"]) == numpy.choose_gal(scores, 2) == tuple(gals(run)[t])
        gaps = np.diff(np.sort(scores))
        assert gaps[1] > 3e-3 * scores.max(), "nothing hangs on the last digits"
    assert all(gals(run)[t] == gals(run)[t - 1] for t in range(1, POOL.rounds) if t not in DUE)
    assert changed(run) == DUE, "the choice changes each time here"
    assert run.states[-1].facts["layer_scores"] == history[-1]["layer_scores"]


def changed(run: real.Run) -> list[int]:
    """The rounds before which the GAL changed."""
    before = [list(run.states[0].facts["gal"]), *gals(run)]
    return [t for t in range(POOL.rounds) if before[t] != before[t + 1]]


@every_kind
def test_a_layer_that_leaves_goes_on_from_its_last_shared_value_on_every_device(kind: real.Kind) -> None:
    run = made(kind)
    for t, exchange in zip(changed(run), run.asked("regroup"), strict=True):
        now, was = set(gals(run)[t]), set(run.states[t].facts["gal"])
        left = {n for n in run.states[t].shared if layer_of(n) in was - now}
        assert left and set(gals(run)[t]) != was
        for k in POOL.clients:
            assert set(exchange.down[k].tensors) == left and not exchange.up[k].tensors
            assert list(exchange.down[k].settings["gal"]) == gals(run)[t]  # type: ignore[call-overload]
            own, before, last = run.private[t + 1][k], run.private[t][k], run.states[t].shared
            assert {layer_of(n) for n in own} == set(range(real.LAYERS)) - now
            if k not in uniform(POOL, t):
                assert all(torch.equal(x, last[n] if n in left else before[n]) for n, x in own.items())
            else:
                fit = run.asked("train")[t].fits(k)[0]
                assert all(torch.equal(fit.start[n], last[n]) for n in left), "trained whole: its rows are not zero"
                assert not left & set(fit.rows) and not fit.mask


@every_kind
def test_a_layer_that_joins_starts_at_the_devices_mean_and_is_whole_again(kind: real.Kind) -> None:
    run = made(kind)
    for t, exchange in zip(changed(run), run.asked("hand_over"), strict=True):
        now, was = set(gals(run)[t]), set(run.states[t].facts["gal"])
        joined = {n for n in real.start() if is_factor(n) and layer_of(n) in now - was}
        sent = next(iter(run.asked("train")[t].down.values())).tensors
        assert joined and joined <= set(sent)
        for name in joined:
            mean = sum(real.SIZES[k] / EXAMPLES * run.private[t][k][name].double() for k in POOL.clients)
            torch.testing.assert_close(sent[name].double(), mean, rtol=1e-6, atol=1e-8)
        for k, update in exchange.up.items():
            came = completed(update.tensors, {})
            assert set(came) == joined, "no other local layer leaves the device"
            assert all(torch.equal(x, run.private[t][k][n]) for n, x in came.items())
            cut = {n for n in joined if f"mask/{n}" in run.memory[t][k]}
            whole = [update.tensors[n] for n in joined - cut]
            assert {n.removeprefix(ROWS) for n in update.tensors if n.startswith(ROWS)} == cut and cut == set(filter(is_up, joined))
            assert sum(x.numel() for x in whole) == sum(real.start()[n].size for n in joined - cut)
            assert not exchange.down[k].tensors and 0 < sum(len(update.tensors[n]) for n in cut) < 0.5 * sum(len(came[n]) for n in cut)
            assert not [n for n in run.memory[t + 1][k] if n.startswith(KEPT) and layer_of(n) in now]


@every_kind
def test_uploads_follow_the_choice(kind: real.Kind) -> None:
    """A device uploads the GAL of the round and the head, nothing else."""
    run = made(kind)
    for t, exchange in enumerate(run.asked("train")):
        due = numpy.shared_names(real.start(), gals(run)[t])
        assert all(set(update.tensors) == due for update in exchange.up.values())
        assert set(run.states[t + 1].shared) == due and list(run.states[t + 1].shared) == sorted(due)
    heads = {n for n in real.start() if not is_factor(n)}
    assert all(heads <= set(state.shared) for state in run.states)


def test_whoever_is_asked_twice_does_it_once() -> None:
    """An answer can be lost: handing over changes nothing on a device, and regrouping does nothing more the second time. A B of which the
    device has some rows is handed over with which they are, and is forgotten with them."""
    from fedloom.messages import ask
    from tests.flows import client, of_layers, start, work

    c = client()
    bits = torch.tensor([0.0, 1.0, 0.0, 1.0])
    cut = set(filter(is_up, of_layers(0, 2)))
    c.private = {n: t[bits > 0] + 5 if n in cut else t + 5 for n, t in start().items() if n in of_layers(0, 2)}
    c.memory = {f"{KEPT}{n}": packed(bits) for n in cut}
    for _ in range(2):
        _, update = work(METHOD.hand_over(c, ask(METHOD.hand_over, c.id, layers=[2])))
        told = {f"{ROWS}{n}" for n in cut & of_layers(2)}
        assert set(update.tensors) == of_layers(2) | told and set(c.private) == of_layers(0, 2)
        assert all(torch.equal(update.tensors[n], packed(bits)) for n in told) and len(told) == 2
        assert all(len(update.tensors[n.removeprefix(ROWS)]) == 2 for n in told)
    left = {n: t + 9 for n, t in start().items() if n in of_layers(1)}
    for plus in (0.0, 1.0):
        work(METHOD.regroup(c, ask(METHOD.regroup, c.id, left, gal=[2, 3])))
        assert set(c.private) == of_layers(0, 1) and list(c.private) == sorted(c.private)
        assert set(c.memory) == {f"{KEPT}{n}" for n in cut & of_layers(0)}
        assert all(torch.equal(c.private[n], t + plus) for n, t in left.items())
        c.private |= {n: t + 1 for n, t in c.private.items()}


def test_never_is_the_default_and_sends_what_it_always_did() -> None:
    assert Gal().refresh == 0
    run = real.run(FibecFed(real.INNER, Curriculum(head_rounds=2), Gal(0.5), keep=0.4), "stacked")
    assert not [e for e in run.exchanges if e.op in ("rescore", "hand_over", "regroup")]
    assert not {"gal_history", "adapted"} & set(run.states[-1].facts)
