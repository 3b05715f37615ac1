"""Every method of the package, on a tiny random model: the Flower engine gives the local engine's result to the last bit."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cache, partial
from typing import Any

import pytest

from fedloom.client.client import Client
from fedloom.client.host import Host
from fedloom.client.masks import carried_out
from fedloom.client.store import ClientStore
from fedloom.compute.compute import Compute
from fedloom.compute.serial import Serial
from fedloom.compute.stacked import Stacked
from fedloom.encodings import NAMES, Encoding
from fedloom.engines.engine import Engine, drive
from fedloom.engines.local import Local
from fedloom.engines.wrap import Faulty, Lossy, Recording
from fedloom.messages import CENTRE, Replies, Task, ask, insist
from fedloom.methods import all_methods
from fedloom.methods.fedavg import FedAvg
from fedloom.methods.fedcybgd import FedCyBGD
from fedloom.methods.hetlora import HetLora
from fedloom.methods.method import State, one_round, says
from fedloom.model.base import Model
from fedloom.model.factors import rank_in
from fedloom.model.names import is_up
from fedloom.run.evaluation import of_any_length
from fedloom.server.masks import Mask
from fedloom.server.participation import Pool
from fedloom.tensors import fingerprint
from tests import tiny
from tests.conformance.toy import OF_EVERY_TRAFFIC, same_replies

pytestmark = pytest.mark.no_cover
"""The same lines again for every method, kind or size: which lines are reached at all, other tests tell (conftest.py)."""

DIGEST = "tiny-experiment"
POOL = Pool((0, 1, 2, 3), 3, 2, 5)
EVERYWHERE = tiny.examples(33)


def device(client: int) -> Client:
    """One of the tiny devices, or the place that holds everything."""
    return Client(CENTRE, EVERYWHERE, EVERYWHERE, EVERYWHERE, 3) if client == CENTRE else tiny.clients()[client]


def over_local(host: Host) -> Engine:
    return Local(host)


def over_flower(host: Host) -> Engine:
    with warnings.catch_warnings():  # the command-line library that Flower imports uses a deprecated name of click's
        warnings.simplefilter("ignore", DeprecationWarning)
        from fedloom.engines.flower import in_memory
    return in_memory(host, [*POOL.clients, CENTRE])


def over_federation(host: Host) -> Engine:
    from tests.federated import engine_over

    return engine_over(host, [*POOL.clients, CENTRE])


@dataclass(frozen=True)
class Played:
    """What is left of a run: everything that was said, the server's state, the clients' after training and after predicting; over the
    local engine, what they said when they were asked to predict once more."""

    said: list[tuple[tuple[Task, ...], Replies]]
    state: State
    trained: str
    predicted: str
    again: Replies | None


MODEL = cache(partial(tiny.model, layers=4))
"""Four layers, so that FibecFed's default three quarters leave one local layer, with a mask."""


def compute(kind: str, model: Model) -> Compute:
    """Stacked, where a device's bits do not depend on its company (docs/engines.md): an engine may then ask it alone or in any."""
    return Stacked(model) if kind in ("lora", "mixed") else Serial(model)


@cache
def play(
    name: str,
    engine_over: Callable[[Host], Engine],
    disturbed: Callable[[Engine], Engine],
    wire: str = "exact",
    given: Any = None,
    mask: Mask | None = None,
) -> Played:
    """Set-up, two rounds and the personal predictions of one method, or of the one ``given``, under a mask if there is one."""
    method, store = given or all_methods()[name](), ClientStore()
    kind = says(method, "adapter_kind")
    model = MODEL(start=says(method, "adapter_start"), kind=kind)
    computing, pool = compute(kind, model), replace(POOL, mask=mask or Mask(), encoding=Encoding.of(wire))
    host = Host(method, device, computing, store, DIGEST, encoding=pool.encoding, doing=carried_out)
    engine = disturbed(engine_over(host))
    recording = Recording(engine)
    state = drive(method.setup(method.init(model), pool), recording, quorum=0)
    for _ in range(POOL.rounds):
        state = drive(one_round(method, state, pool), recording, quorum=0.3)
    trained = store.fingerprint()
    asked = [ask(method.predict, k, state.shared, splits=["validation", "test"]) for k in POOL.clients]
    asked = [replace(task, complete=of_any_length) for task in asked]
    drive(insist(asked), recording, quorum=0)
    again = engine.run(asked) if engine_over is over_local else None
    return Played(recording.calls, state, trained, store.fingerprint(), again)


def unlucky(task: Task, attempt: int) -> str | None:
    """Client 1 never hears the first asking of anything."""
    return "out of range" if task.client == 1 and attempt == 0 else None


DISTURBANCES: dict[str, Callable[[Engine], Engine]] = {
    "undisturbed": lambda engine: engine,
    "tasks lost": lambda engine: Faulty(engine, unlucky),
    "answers lost": lambda engine: Lossy(engine, unlucky),
}


CASES = [pytest.param(name, DISTURBANCES["undisturbed"], id=name) for name in all_methods()]
CASES += [pytest.param("fibecfed", DISTURBANCES[how], id=f"fibecfed, {how}") for how in ("tasks lost", "answers lost")]


@pytest.mark.flower
@pytest.mark.parametrize(("name", "disturbed"), CASES)
def test_determinism_flower_equals_local(name: str, disturbed: Callable[[Engine], Engine]) -> None:
    one, other = play(name, over_local, disturbed), play(name, over_flower, disturbed)
    assert len(one.said) == len(other.said) > POOL.rounds
    for (asked, heard), (asked_too, heard_too) in zip(one.said, other.said, strict=True):
        assert [replace(t, tensors={}) for t in asked] == [replace(t, tensors={}) for t in asked_too]
        assert [fingerprint(t.tensors) for t in asked] == [fingerprint(t.tensors) for t in asked_too]
        assert same_replies(heard, heard_too)
    assert fingerprint(one.state.shared) == fingerprint(other.state.shared)
    assert fingerprint(one.state.server) == fingerprint(other.state.server)
    assert (one.state.round, one.state.facts) == (other.state.round, other.state.facts)
    assert (one.trained, one.predicted) == (other.trained, other.predicted)


PLAYED_ELSEWHERE = {"lora": "what some leave out", "fedcybgd": "what goes down smaller", "federa": "test_late.py"}
"""Where these go over a federation anyhow, with more than they have by themselves."""


@pytest.mark.flower
@pytest.mark.parametrize("name", [name for name in OF_EVERY_TRAFFIC if name not in PLAYED_ELSEWHERE])
def test_determinism_a_federation_equals_local(name: str) -> None:
    one, other = play(name, over_local, DISTURBANCES["undisturbed"]), play(name, over_federation, DISTURBANCES["undisturbed"])
    assert all(same_replies(mine, theirs) for (_, mine), (_, theirs) in zip(one.said, other.said, strict=True))
    assert (one.trained, one.predicted) == (other.trained, other.predicted)
    assert fingerprint(one.state.shared) == fingerprint(other.state.shared)
    assert fingerprint(one.state.server) == fingerprint(other.state.server)


LEAVING_OUT = {
    "rows": ("lora", None, Mask(0.4), lambda update: {len(t) for n, t in update.tensors.items() if is_up(n)}),
    "rows over a wire with a loss": ("lora", None, Mask(0.4), lambda update: {len(t) for n, t in update.tensors.items() if is_up(n)}),
    "directions": ("hetlora", HetLora(FedAvg(lr=0.01), ranks=(2,), keep=0.5, penalty=10.0), None, lambda update: rank_in(update.tensors)),
}


@pytest.mark.flower
@pytest.mark.parametrize("what", LEAVING_OUT)
def test_what_some_devices_leave_out_a_federation_does_not_miss(what: str) -> None:
    """All of them answered honestly, and other devices leave out other things, so all must count."""
    name, given, mask, of = LEAVING_OUT[what]
    wire = "nf4" if "wire" in what else "exact"
    one, other = (play(name, over, DISTURBANCES["undisturbed"], wire, given, mask) for over in (over_local, over_federation))
    trained = [(tasks, replies) for tasks, replies in other.said if tasks[0].op == "train"]
    assert [len(replies.updates) for _, replies in trained] == [POOL.cohort] * POOL.rounds
    assert any(len({str(of(update)) for update in replies.updates}) > 1 for _, replies in trained)
    assert all(same_replies(mine, theirs) for (_, mine), (_, theirs) in zip(one.said, other.said, strict=True))
    assert (one.trained, fingerprint(one.state.shared)) == (other.trained, fingerprint(other.state.shared))


SMALLER = FedCyBGD(FedAvg(lr=0.05, schedule="cosine"), drop=0.34, prune=0.4, rest="nf4")


@pytest.mark.flower
def test_determinism_what_goes_down_smaller_is_the_same_on_every_engine() -> None:
    """The second turn's device is sent what the first one changed."""
    played = [play("fedcybgd", over, DISTURBANCES["undisturbed"], given=SMALLER) for over in (over_local, over_flower, over_federation)]
    trained = [task for tasks, _ in played[0].said for task in tasks if task.op == "train"]
    assert any("rest/encoded/codes" in task.tensors for task in trained) and all("skips" in task.settings for task in trained)
    for other in played[1:]:
        assert all(same_replies(mine, theirs) for (_, mine), (_, theirs) in zip(played[0].said, other.said, strict=True))
        assert (played[0].trained, played[0].predicted) == (other.trained, other.predicted)
        assert fingerprint(played[0].state.shared) == fingerprint(other.state.shared)


LOSSY = [wire for wire in NAMES if wire != "exact"]
OVER = [("scaffold", wire) for wire in LOSSY] + [
    ("fibecfed", "top-k"),
    ("lora", "int8"),
    ("flasc", "top-k"),
    ("fedcybgd", "fp16"),
    ("fedcybgd", "up:bf16"),
]
"""Every wire with what has states of its own on both sides; methods that send other things over one each. A wire knows no method."""
OVER_A_FEDERATION = (("fibecfed", "top-k"),)
"""What is encoded passes through a federation as through Flower's grid: one that owes what it left out. Codes go with rows that are left
out, above; tensors of 16 bits are among the laws'."""


@pytest.mark.flower
@pytest.mark.parametrize(("name", "wire"), OVER)
def test_determinism_what_a_wire_loses_it_loses_on_every_engine(name: str, wire: str) -> None:
    over = (over_local, over_flower, over_federation)[: 3 if (name, wire) in OVER_A_FEDERATION else 2]
    played = [play(name, engine_over, DISTURBANCES["undisturbed"], wire) for engine_over in over]
    for other in played[1:]:
        assert all(same_replies(mine, theirs) for (_, mine), (_, theirs) in zip(played[0].said, other.said, strict=True))
        assert (played[0].trained, played[0].predicted) == (other.trained, other.predicted)
        assert fingerprint(played[0].state.shared) == fingerprint(other.state.shared)
    assert fingerprint(played[0].state.shared) != fingerprint(play(name, over_local, DISTURBANCES["undisturbed"]).state.shared)


NO_STEPS = {
    "fedalt": "a device sends where its own pair stands",
    "flora": "every round trains new pairs",
    "flexlora": "every round decomposes anew",
}
"""Methods whose devices send, under the name of what came, something else than a step from it that the next steps add to."""

AS_LORA = {"fedfft", "fedbf", "fedap", "federa", "fedeven", "fedprox", "lora-finetuned", "lora-prior", "ffa"}
AS_LORA |= {"fedsa", "fedsb", "fedalt-partial", "lora-personal-head"}
"""Methods that go over a wire as ``lora`` does, with other tensors: in every round the same come down, and their mean is taken over (or
there is but one who sends)."""


@pytest.mark.parametrize(
    ("name", "wire"), [(name, wire) for name in all_methods() for wire in ("nf4", "top-k:0.3") if wire == "nf4" or name not in AS_LORA]
)
def test_every_method_goes_over_every_wire_with_fewer_bytes(name: str, wire: str) -> None:
    """But for top-k with those that are as ``lora``, which goes over it, and for those over top-k that would have what is owed added to
    what it is not of, and where all data are in one place: they say so before anybody is asked. What a set-up hands out for good arrives as
    it is. What is left of an answer and owed is a client's, whatever its tensors are."""
    if name == "centralised":
        with pytest.raises(ValueError, match="'centralised' has all data in one place, and nothing there goes over a wire"):
            play(name, over_local, DISTURBANCES["undisturbed"], wire)
        return
    if name in NO_STEPS and wire.startswith("top-k"):
        with pytest.raises(ValueError, match=f"'{name}' cannot go over wire 'top-k', .*: {NO_STEPS[name]}.*--wire"):
            play(name, over_local, DISTURBANCES["undisturbed"], wire)
        return
    exact, lossy = play(name, over_local, DISTURBANCES["undisturbed"]), play(name, over_local, DISTURBANCES["undisturbed"], wire)
    assert not [failure for _, replies in lossy.said for failure in replies.failures]
    assert all(bool(t.isfinite().all()) for t in lossy.state.shared.values() if t.is_floating_point())
    assert {n: t.shape for n, t in lossy.state.shared.items()} == {n: t.shape for n, t in exact.state.shared.items()}
    rounds = [slice(None), slice(0, 0)][name in ("local", "flasc")]  # one sends nothing, one is sparse already
    for (asked, mine), (_, theirs) in [*zip(exact.said, lossy.said, strict=True)][rounds]:
        if asked[0].op == "train":
            assert sum(t.bytes_up for t in theirs.traffic) < sum(t.bytes_up for t in mine.traffic)
    for (asked, mine), (_, theirs) in zip(exact.said, lossy.said, strict=True):
        if asked[0].op in ("receive", "inspect"):
            assert [t.bytes_down for t in theirs.traffic] == [t.bytes_down for t in mine.traffic]
    assert lossy.trained != "" and (name == "local" or fingerprint(exact.state.shared) != fingerprint(lossy.state.shared))


@pytest.mark.parametrize("name", all_methods())
def test_failure_no_real_operation_fails_on_healthy_devices(name: str) -> None:
    for _, replies in play(name, over_local, DISTURBANCES["undisturbed"]).said:
        assert replies.failures == ()


@pytest.mark.parametrize("name", all_methods())
def test_durability_predicting_changes_no_device(name: str) -> None:
    played = play(name, over_local, DISTURBANCES["undisturbed"])
    assert played.trained == played.predicted
    _, first = played.said[-1]
    assert played.again is not None and len(first.updates) == len(POOL.clients) and same_replies(first, played.again)
