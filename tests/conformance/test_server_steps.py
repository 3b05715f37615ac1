"""Every method under the server's optimisers: each round is one step of the rule towards what the method itself would have averaged, or the
method says that it cannot follow. And FedProx's term over the others, in the same way."""

from __future__ import annotations

import importlib.util
from collections.abc import Mapping
from copy import deepcopy
from dataclasses import replace
from functools import cache
from itertools import cycle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from fedloom.client.host import Host
from fedloom.client.store import ClientStore
from fedloom.compute.stacked import Stacked
from fedloom.compute.work import Held
from fedloom.engines.engine import drive
from fedloom.engines.local import Local
from fedloom.messages import CohortFailed, Update
from fedloom.methods import all_methods
from fedloom.methods.adalora import AdaLora
from fedloom.methods.fedalt import FedAlt
from fedloom.methods.fedavg import FedAvg
from fedloom.methods.fedopt import FedOpt
from fedloom.methods.ffa import FfaLora
from fedloom.methods.fibecfed import Curriculum, FibecFed, Gal
from fedloom.methods.local import Local as Alone
from fedloom.methods.method import State, one_round, says
from fedloom.methods.rolora import RoLora
from fedloom.methods.scaffold import Scaffold
from fedloom.methods.slora import SLora
from fedloom.model.base import Model
from fedloom.model.names import is_down, is_up
from fedloom.run import checkpoint
from fedloom.run.checkpoint import fingerprint_of
from fedloom.run.experiment import Experiment
from fedloom.run.loop import run
from fedloom.run.terminal.console import Progress
from fedloom.run.world import store_in
from fedloom.server.optimizers import ServerStep, Steps
from fedloom.server.participation import Pool
from fedloom.server.robust import Aggregation
from tests import small, tiny
from tests.flows import SIZES, play, start

pytestmark = pytest.mark.no_cover
"""The same lines again for every method, kind or size: which lines are reached at all, other tests tell (conftest.py)."""

Step = Any
RULES: list[Step] = ["momentum", "adagrad", "yogi", "adam"]
NUMBERS = {"lr": 0.3, "beta1": 0.8, "beta2": 0.95, "tau": 0.05}
POOL = Pool((0, 1, 2, 3), 3, 4, 3)
ROUNDS = 2
METHODS: dict[str, Any] = {name: kind() for name, kind in all_methods().items()}
METHODS |= {
    "fibecfed": FibecFed(curriculum=Curriculum(head_rounds=1), gal=Gal(count=1), keep=0.5),
    "slora": SLora(first=0.6),
    "lora+robust": FedAvg(),
}
REFUSING = {"fedcybgd", "handover", "fedex", "flexlora", "deltalora", "fedalt", "local", "centralised", "embracingfl"}
REFUSING |= {"adalora", "fedopt"}
FOLLOWING = [name for name in METHODS if name not in REFUSING]
COVER = {*zip(FOLLOWING, cycle(RULES), strict=False), *[("lora", rule) for rule in RULES], ("ffa", "momentum"), ("ffa", "yogi")}
COVER = sorted({*COVER, ("rolora", "momentum")})
"""Every method with one rule, every rule with several methods; and what does not train everything with what goes on by itself."""


@cache
def model(kind: Any, start: Any) -> Model:
    return tiny.model(kind=kind, start=start)


class Played:
    """A method over made-up devices, whose rounds can be tried on copies of them."""

    def __init__(self, method: Any, pool: Pool) -> None:
        self.of = model(says(method, "adapter_kind"), says(method, "adapter_start"))
        self.method, self.pool, self.devices, self.store = method, pool, tiny.clients(), ClientStore()
        self.state: State = drive(method.setup(method.init(self.of), pool), self.engine(self.store), quorum=0)

    def engine(self, store: ClientStore) -> Any:
        fresh = lambda k: replace(self.devices[k], private={}, memory={})  # noqa: E731
        return Local(Host(self.method, fresh, Stacked(self.of), store, "steps"))

    def without_a_step(self) -> State:
        """What this round would come to if the server took the aggregate over; nothing has happened."""
        return drive(self.method.round(self.state, replace(self.pool, optimizer=None)), self.engine(deepcopy(self.store)))

    def round(self) -> None:
        self.state = drive(one_round(self.method, self.state, self.pool), self.engine(self.store))


def step(rule: str, w: np.ndarray, delta: np.ndarray, m: np.ndarray, v: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """2003.00295, algorithm 2; FedAvgM. w', m, v."""
    lr, beta1, beta2, tau = NUMBERS.values()
    if rule == "momentum":
        m = beta1 * m + delta
        return w + lr * m, m, v
    m = beta1 * m + (1 - beta1) * delta
    v = {
        "adagrad": v + delta**2,
        "yogi": v - (1 - beta2) * delta**2 * np.sign(v - delta**2),
        "adam": beta2 * v + (1 - beta2) * delta**2,
    }[rule]
    return w + lr * m / (np.sqrt(v) + tau), m, v


def arrays(tensors: Mapping[str, torch.Tensor]) -> dict[str, np.ndarray]:
    return {n: t.double().numpy() for n, t in tensors.items()}


@pytest.mark.parametrize(("name", "rule"), COVER)
def test_every_round_is_one_step_towards_what_the_method_averages(name: str, rule: Step) -> None:
    aggregation = Aggregation("median", 0.3) if name == "lora+robust" else Aggregation()
    here = Played(METHODS[name], replace(POOL, aggregation=aggregation, optimizer=ServerStep(rule, **NUMBERS).optimizer))
    m: dict[str, np.ndarray] = {}
    v: dict[str, np.ndarray] = {}
    moved = set()
    for _ in range(3 if name == "rolora" else ROUNDS):  # where the third round trains what the second did not
        before, plain = arrays(here.state.shared), arrays(here.without_a_step().shared)
        here.round()
        after = arrays(here.state.shared)
        assert set(after) == set(before) == set(plain)
        for n, w in before.items():
            delta = plain[n] - w
            if not delta.any():  # it was not aggregated in this round: it stays, whatever momentum there is
                np.testing.assert_array_equal(after[n], w)
                continue
            due, m[n], v[n] = step(rule, w, delta, m.get(n, np.zeros_like(w)), v.get(n, np.full_like(w, NUMBERS["tau"] ** 2)))
            np.testing.assert_allclose(after[n], due, rtol=1e-5, atol=1e-6)
            moved.add(n)
        furthest = lambda one, other: max(float(np.abs(one[n] - other[n]).max()) for n in one)  # noqa: E731
        assert furthest(after, plain) > 0.05 * furthest(before, plain), "the mean was not taken over"
    assert moved
    kinds = {n.split("/", 1)[0] for n in here.state.moments}
    assert kinds == ({"m"} if rule == "momentum" else {"m", "v"})
    assert not any(n.startswith(("m/", "v/")) for n in here.state.server), "they are not the method's"


@pytest.mark.parametrize("name", sorted(REFUSING))
def test_a_method_whose_server_does_not_step_says_so_before_it_trains(name: str) -> None:
    with pytest.raises(ValueError, match=f"'{name}' cannot follow server optimiser 'adam': .*--server.rule"):
        Played(METHODS[name], replace(POOL, optimizer=ServerStep("adam").optimizer))


@pytest.mark.parametrize("rule", RULES)
def test_fedopt_is_lora_with_a_server_step(rule: Step) -> None:
    given: dict[str, Any] = {"server_lr": NUMBERS["lr"], **{n: NUMBERS[n] for n in ("beta1", "beta2", "tau")}}
    mine, theirs = (
        Played(FedAvg(), replace(POOL, optimizer=ServerStep(rule, **NUMBERS).optimizer)),
        Played(FedOpt(rule=rule, **given), POOL),
    )
    for _ in range(ROUNDS):
        mine.round()
        theirs.round()
    assert all(torch.equal(t, theirs.state.shared[n]) for n, t in mine.state.shared.items())


def test_rolora_moves_nothing_but_the_factor_that_was_trained() -> None:
    """With momentum a frozen factor would go on; then devices' products would not have one factor in common with what is averaged."""
    here = Played(RoLora(), replace(POOL, optimizer=ServerStep("momentum", **NUMBERS).optimizer))
    for t, still in enumerate((is_down, is_up, is_down)):
        before = here.state.shared
        here.round()
        for n, tensor in before.items():
            assert torch.equal(here.state.shared[n], tensor) == still(n), (t, n)


def test_slora_begins_with_new_moments_when_it_begins_with_pairs() -> None:
    here = Played(SLora(first=0.4), replace(POOL, optimizer=ServerStep("momentum", **NUMBERS).optimizer))
    for _ in range(3):
        here.round()
    assert {n.removeprefix("m/") for n in here.state.moments} == set(here.state.shared)
    assert any(map(is_up, here.state.shared))


def test_a_round_that_was_missed_leaves_the_moments() -> None:
    pool = replace(POOL, clients=tuple(SIZES), optimizer=ServerStep("adam", **NUMBERS).optimizer)
    answered = lambda task: Update(task.client, 3, {n: t + 1.0 for n, t in task.tensors.items()})  # noqa: E731
    _, state = play(one_round(METHODS["lora"], State(0, start()), pool), answered)
    flow = one_round(METHODS["lora"], state, pool)
    next(flow)
    with pytest.raises(CohortFailed):
        flow.throw(CohortFailed((), 0, 1))
    steps = Steps(pool.optimizer, state.moments)  # type: ignore[arg-type]
    assert all(torch.equal(t, state.moments[n]) for n, t in steps.moments().items())


# whole runs

WHOLE: list[tuple[str, Step]] = [("ffa", "momentum"), ("fibecfed", "yogi"), ("flasc", "adagrad")]
OPTS: list[Step] = ["momentum", "yogi", "adagrad"]


def experiment(name: str, rule: Step, kind: str = "local") -> Experiment:
    made = small.experiment(name, kind=kind, evaluate_every=0)
    return replace(made, method=FedOpt(rule=rule)) if name == "fedopt" else replace(made, server=ServerStep(rule, **NUMBERS))


@pytest.mark.parametrize(("name", "rule"), [*WHOLE, *[("fedopt", rule) for rule in OPTS]])
def test_a_run_resumes_to_the_same_bits_on_either_engine(name: str, rule: Step, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    small.build_once(monkeypatch)
    e, show = experiment(name, rule), Progress.round

    def dying(self: Progress, row: dict[str, Any]) -> None:
        show(self, row)
        if row["round"] > 1:
            raise KeyboardInterrupt

    results = run(e, tmp_path / "whole", plain=True)
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(Progress, "round", dying)
        run(e, tmp_path / "killed", plain=True)
    saved = checkpoint.load(tmp_path / "killed", store_in(tmp_path / "killed"))
    assert saved is not None and saved.state.round == 1
    assert any(bool(t.any()) for t in (saved.state.server if name == "fedopt" else saved.state.moments).values())
    assert run(e, tmp_path / "killed", plain=True)["final"] == results["final"]
    assert fingerprint_of(tmp_path / "killed") == fingerprint_of(tmp_path / "whole")
    if importlib.util.find_spec("fedloom.engines.flower") is not None and name in ("flasc", "fedopt"):
        run(experiment(name, rule, "flower"), tmp_path / "flower", plain=True)
        assert fingerprint_of(tmp_path / "flower") == fingerprint_of(tmp_path / "whole")


def test_a_run_of_another_optimiser_is_another_run() -> None:
    digests = {experiment("lora", rule).digest() for rule in RULES} | {small.experiment("lora").digest()}
    assert len(digests) == 5


# FedProx over others, and what holds no others

PROX = 5.0
TAKING = [
    "lora",
    "ffa",
    "rolora",
    "fedsa",
    "federa",
    "lora-personal-head",
    "flasc",
    "fedex",
    "flora",
    "flexlora",
    "slora",
    "scaffold",
    "fedsb",
    "fedalt-partial",
    "ditto",
    "deltalora",
    "embracingfl",
    "fibecfed",
    "fedeven",
    "fedopt",
    "galore",
    "lisa",
    "lora-finetuned",
    "lora-prior",
]
KEEPING = {"fedsa", "lora-personal-head", "fedalt-partial", "fibecfed"}
"""Whose devices train parts that they were not sent: those that are not shared."""

PARTLY = {"flasc", "flexlora"}
"""Whose devices are sent some of a shared tensor's numbers, or some of its directions."""


@pytest.mark.parametrize("name", TAKING)
def test_fedproxs_term_holds_a_device_to_what_it_was_sent(name: str) -> None:
    """(μ/2)·‖w − w_t‖²: the stronger, the less every device moves from what came."""
    moved = {}
    for prox in (0.0, PROX):
        method = replace(METHODS[name], **{"fibecfed": {"keep": 1.0}, "lisa": {"inner": FedAvg(local_epochs=4), "every": 4}}.get(name, {}))
        here = Played(replace(method, inner=replace(method.inner, prox=prox)) if name != "lora" else FedAvg(prox=prox), POOL)
        fits, before = list[Any](), here.state
        compute = Stacked(here.of)
        ran = compute.run

        def seen(items: Any, ran: Any = ran, fits: list[Any] = fits) -> Any:
            done = ran(items)
            fits.extend((i, d.result) for i, d in zip(items, done, strict=True) if type(i).__name__ == "Fit" and i.optimizer.lr)
            return done

        compute.run = seen  # type: ignore[method-assign]
        host = Host(here.method, lambda k: replace(here.devices[k], private={}, memory={}), compute, here.store, "steps")  # noqa: B023
        drive(here.method.round(here.state, POOL), Local(host))
        plain = [(item, made) for item, made in fits if item.penalty is None or isinstance(item.penalty, Held)]
        if name == "lisa":
            assert len(fits) > POOL.cohort, "in periods"
        else:
            assert len(fits) == POOL.cohort * (2 if name in ("ditto", "fedalt-partial") else 1)
        assert len(plain) == (len(fits) // 2 if name == "ditto" else len(fits)), "a personal model has a pull of its own, and no other"
        moved[prox] = 0.0
        for item, made in plain:
            sent = {n for n in item.start if name not in KEEPING or n in before.shared}
            assert (item.penalty.names if item.penalty else set()) == (sent if prox else set())
            held_to = item.anchor or item.start
            came = (sent & before.shared.keys()) if prox and name not in PARTLY else ()
            assert all(torch.equal(held_to[n], before.shared[n]) for n in came), "w_t is what was sent"
            moved[prox] += sum(float((made.tensors[n] - held_to[n]).square().sum()) for n in sent)
    assert moved[PROX] < 0.9 * moved[0.0]


def test_who_is_sent_nothing_that_it_trains_takes_no_term() -> None:
    for kind in (FedAlt, Alone):
        with pytest.raises(ValueError, match=f"'{kind.name}' trains a device's own parts .* and prox is 0.1; leave it out"):
            kind(FedAvg(prox=0.1))


def test_who_has_a_term_of_its_own_takes_no_other() -> None:
    with pytest.raises(ValueError, match="AdaLoRA has a term of its own in the loss and takes no other: give prox 0.1 or an orthogonality"):
        AdaLora(FedAvg(prox=0.1))
    with pytest.raises(ValueError, match="'fibecfed' trains some rows of B only, for which FedProx's term is not defined here"):
        FibecFed(FedAvg(prox=0.1)).init(model("lora", "zero"))
    assert AdaLora(FedAvg(prox=0.1), orthogonality=0.0).inner.prox == 0.1


def test_who_holds_plain_lora_says_so() -> None:
    with pytest.raises(
        ValueError, match="FedOpt is a server optimiser over plain federated LoRA, and inner is FfaLora.*--server.rule adam"
    ):
        FedOpt(inner=FfaLora())  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="SCAFFOLD corrects the gradients of plain federated LoRA, and inner is RoLora.*--controls"):
        Scaffold(inner=RoLora())  # type: ignore[arg-type]
