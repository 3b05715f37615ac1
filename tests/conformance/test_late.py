"""A device that comes into a federation late is given what the set-up gave the others, takes part from the next round on, and the run is,
to the bit, the one of the same participation in one process."""

from __future__ import annotations

import json
import threading
import time
import warnings
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import pytest
import torch

pytest.importorskip("flwr", reason="the extra 'flower' is not installed: pip install 'fedloom[flower]'")

from fedloom.client.client import Client
from fedloom.client.elsewhere import Elsewhere
from fedloom.client.host import Host
from fedloom.client.masks import carried_out
from fedloom.client.sharing import layer_scores
from fedloom.client.store import ClientStore
from fedloom.compute.flops import start_operations
from fedloom.engines.engine import drive
from fedloom.engines.local import WAVE, Local
from fedloom.messages import Failure, Replies, Task, Update, ask, insist
from fedloom.methods import all_methods, named
from fedloom.methods.fibecfed import FibecFed, Gal
from fedloom.methods.method import State, one_round, set_up
from fedloom.run import checkpoint
from fedloom.run.checkpoint import Saved
from fedloom.run.errors import ExperimentError
from fedloom.run.experiment import Experiment
from fedloom.run.late import Late, Remembering, Step, may_join_late, welcome
from fedloom.run.loop import run
from fedloom.run.terminal.console import Show
from fedloom.run.world import World, build, build_far
from fedloom.server.participation import Pool
from fedloom.server.sharing import Sharing
from tests import tiny
from tests.federated import Bell, Here, rings
from tests.integration.federating import checkpointed, differs, strayed

with warnings.catch_warnings():  # libraries that Flower imports use deprecated names of their own
    warnings.simplefilter("ignore", DeprecationWarning)
    from flwr.supercore.primitives.asymmetric import generate_key_pairs, public_key_to_bytes

    from fedloom.engines.device import device_app
    from fedloom.engines.federation import Patience
    from fedloom.engines.link import Link
    from fedloom.engines.node import Credentials, Node
    from fedloom.run.deployment.federation import Joined, insist_may_start
    from fedloom.run.deployment.joining import shown

pytestmark = [pytest.mark.flower, pytest.mark.no_cover]
"""Which lines are reached at all, other tests tell (conftest.py)."""

DEVICES, LATE, ROUNDS = 4, 3, 3
TOLD = [("fibecfed", "round 3/"), ("federa", ""), ("lora", ""), ("lora in part", "round 3/")]
TOLD += [("fedeven", ""), ("fedfft", ""), ("ffa", ""), ("fedsa", "")]
"""Methods, and where the server is killed. (``fedap`` and ``fedbf`` are ``lora`` over other kinds; ``ditto``, ``fedalt-partial`` and
``lora-personal-head`` hand out what a device keeps as ``ffa`` and ``fedsa`` do.)"""
ALONE = ("fedfft",)
"""Which train biases of keys: these have no gradient but rounding, which AdamW makes steps of, and rounding is as devices are stacked."""


class Crash(RuntimeError):
    """The server is gone."""


def experiment(method: str) -> Experiment:
    made = named(method.removesuffix(" in part"))()
    if isinstance(made, FibecFed):  # two layers of three stay on the devices, so that there is something to adopt
        made = replace(made, gal=Gal(count=1))
    shape = {"clients": DEVICES, "cohort": 3, "rounds": ROUNDS, "alpha": 0.5, "evaluate_every": 0, "seed": 0, "quorum": 0.5}
    share = Sharing(count=1) if method.endswith(" in part") else Sharing()
    return Experiment(made, share=share, model=str(tiny.folder()), max_train=60, max_validation=8, max_test=8, max_length=24, **shape)  # type: ignore[arg-type]


def told(client: Client, task: Task, update: Update) -> Update:
    """Of a prediction one right answer a split: what is told of scores is nothing here."""
    if task.op != "predict":
        return update
    return replace(update, tensors={s: torch.tensor([[0, 0, 1]]) for s in update.tensors}, metrics={"validation_loss": 0.5})


class Federated:
    """A link with four keys, and a node for each device that is there. It is the run's display, and lets device 3 in before round 2."""

    def __init__(self, folder: Path, world: World, crash: str = "") -> None:
        self.folder, self.world, self.crash = folder, world, crash
        self.keys = {k: generate_key_pairs() for k in range(DEVICES)}
        e = world.experiment
        how: Any = {"doing": carried_out, "besides": [layer_scores]}
        self.host = Host(e.method, world.device, world.compute, ClientStore(None), e.digest(), told, **how)
        self.device, self.threads, self.notes = Here(self.host, folder / "states"), list[threading.Thread](), list[str]()
        self.link = Link({k: public_key_to_bytes(public) for k, (_, public) in self.keys.items()})
        self.bells = {k: Bell() for k in range(DEVICES)}
        rings(self.link, self.bells)

    def __enter__(self) -> Federated:
        self.link.__enter__()
        for k in range(DEVICES):
            if k != LATE:
                self.come(k)
        return self

    def __exit__(self, *_: object) -> None:
        for bell in self.bells.values():
            bell.set()
        for thread in self.threads:
            thread.join(5)
        self.link.__exit__()

    def come(self, client: int) -> None:
        one = Node(f"127.0.0.1:{self.link.port}", Credentials(self.keys[client][0], None), device_app(self.device), lambda text: None)
        self.threads.append(threading.Thread(target=one.serve, args=(self.bells[client],), daemon=True))
        self.threads[-1].start()
        while client not in self.link.present():
            time.sleep(0.02)

    def phase(self, text: str) -> None:
        if text.startswith("round 2/") and LATE not in self.link.present():
            self.come(LATE)
        if self.crash and text.startswith(self.crash):
            self.crash = ""
            raise Crash

    def note(self, text: str) -> None:
        self.notes.append(text)

    def round(self, row: dict) -> None:
        pass

    def resume(self, rows: Sequence[dict]) -> None:
        pass

    def served(self, e: Experiment) -> dict[str, Any]:
        def built(e: Experiment) -> World:
            return build_far(e, Joined(self.link, e, Patience(5.0, 60.0, 5.0), cast(Show, self), start_with=3))

        return run(e, self.folder / "out", show=cast(Show, self), built=built)


def replayed(world: World, rows: Sequence[dict], store: ClientStore) -> tuple[State, State]:
    """The states after the set-up and after all rounds, of the same participation in one process: devices 0 to 2 are set up, device 3 is
    asked the operations of the method's set-up by name before its first round."""
    method: Any = world.experiment.method
    engine, at = Local(world.host(store), 1 if method.name in ALONE else WAVE), {}
    first, all_four = replace(world.pool, clients=(0, 1, 2)), world.pool

    def seen(tasks: Sequence[Task], replies: Replies) -> None:
        at.update({task.op: task.tensors for task in tasks})

    begun = state = drive(set_up(method, world.model, first), engine, seen=seen)
    for row in rows[1:]:
        if row["round"] == 2 and method.name == "fibecfed":
            drive(insist([ask(method.inspect, LATE, at["inspect"])]), engine)
            drive(insist([ask(method.adopt, LATE, gal=state.facts["gal"])]), engine)
        if row["round"] == 2 and "receive" in at:
            drive(insist([ask(method.receive, LATE, at["receive"])]), engine)
        state = drive(one_round(method, state, first if row["round"] == 1 else all_four), engine)
    return begun, state


@pytest.mark.parametrize(("method", "crash"), TOLD)
def test_a_late_device_takes_part_and_the_run_is_that_of_the_same_participation(method: str, crash: str, tmp_path: Path) -> None:
    e = experiment(method)
    insist_may_start(e, 3)
    world = build(e)
    with Federated(tmp_path, world, crash) as there:
        if crash:
            with pytest.raises(Crash):
                there.served(e)
        results = there.served(e)
    body, found = checkpointed(tmp_path / "out")
    rows = [json.loads(line) for line in (tmp_path / "out" / "rounds.jsonl").read_text().splitlines()]
    assert [row["missing"] for row in rows] == [[3], [3], *[[]] * (ROUNDS - 1)]
    assert [row["joined"] for row in rows] == [{}, {}, *[{"3": 2}] * (ROUNDS - 1)] and results["joined"] == {"3": 2}
    assert rows[1]["answered"] == [0, 1, 2] and all(len(row["answered"]) == 3 and not row["failed"] for row in rows[1:])
    assert all(LATE in row["answered"] for row in rows[2:]), "the seed draws it into every round that is left"
    assert there.notes.count("device 3 takes part from round 2 on") == 1
    if method in ("federa", "lora"):
        start = start_operations(world.model)
        assert (start > 0) == (method == "federa") and results["setup_flops"] == pytest.approx(DEVICES * start), "the late one's start too"
    store = ClientStore(tmp_path / "replay")
    begun, due = replayed(world, rows, store)
    assert differs(body, found, due) == "" and strayed(body, store, DEVICES) == ""
    assert body["facts"]["gal"] == begun.facts["gal"] if method in ("fibecfed", "lora in part") else "gal" not in body["facts"]
    assert not any(name.startswith("late/") for name in found), "nothing is kept for others when all are in"
    assert dict(shown_of(rows[-1]))["joined late: 3"] == "takes part from round 2 on"


def shown_of(row: dict) -> list[tuple[str, str]]:
    return shown({"experiment": "x", "devices": 4, "here": [0], "away": [], "last_round": json.dumps(row), "written_seconds_ago": 1.0})


# what is remembered, and of whom


class Answering:
    """Answers all but those who are ``away``."""

    def __init__(self, *away: int) -> None:
        self.away, self.asked = set(away), list[tuple[str, int]]()

    def run(self, tasks: Sequence[Task], take: Any = None) -> Replies:
        self.asked += [(task.op, task.client) for task in tasks]
        away = [task.client for task in tasks if task.client in self.away]
        return Replies(tuple(Update(t.client, 1) for t in tasks if t.client not in away), tuple(Failure(k, "away") for k in away))


def test_what_everybody_was_asked_alike_is_remembered_also_if_some_were_asked_again() -> None:
    tensors, engine = {"w": torch.ones(2)}, Answering(1)
    heard = Remembering(engine, (0, 1, 2))
    heard.run([Task("few", k, tensors) for k in (0, 2)])
    heard.run([Task("warm_up", k, tensors, {"round": -1}) for k in (0, 1, 2)])
    heard.run([Task("score", k, tensors) for k in (0, 1, 2)])
    assert heard.steps == ()
    engine.away.clear()
    heard.run([Task("warm_up", k, tensors, {"round": -2}) for k in (0, 1, 2)])  # a cohort that is everybody trains, and that is all
    heard.run([Task("score", 1, tensors)])
    heard.run([Task("own", k, tensors, {"k": k}) for k in (0, 1, 2)])
    heard.run([Task("adopt", k, {}, {"gal": [1]}, exact=True) for k in (0, 1, 2)])
    assert [(step.op, step.settings, step.exact) for step in heard.steps] == [("score", {}, False), ("adopt", {"gal": [1]}, True)]
    assert heard.steps[0].tensors["w"] is tensors["w"]


def test_whoever_misses_a_step_is_asked_no_more_and_nobody_waits_for_it() -> None:
    engine = Answering(4)
    assert drive(welcome([Step("score"), Step("adopt")], [3, 4]), engine) == [3]
    assert engine.asked == [("score", 3), ("score", 4), ("adopt", 3)]
    assert drive(welcome([], [3, 4]), engine) == [3, 4]


def test_a_checkpoint_keeps_who_is_in_and_what_the_others_are_to_be_asked(tmp_path: Path) -> None:
    w = torch.arange(3.0)
    late = Late({0: 0, 2: 4}, (Step("score", {"w": w}, {"round": 1, "names": ["a"]}), Step("adopt", {}, {"gal": [2]}, True)))
    checkpoint.save(tmp_path, Saved(State(5, {"w": w}), {}, "data", late), Elsewhere())
    found = checkpoint.load(tmp_path, Elsewhere())
    assert found is not None and found.late is not None and found.late.since == late.since
    assert [(s.op, s.settings, {n: t.tolist() for n, t in s.tensors.items()}, s.of(1).exact) for s in found.late.steps] == [
        ("score", {"round": 1, "names": ["a"]}, {"w": [0.0, 1.0, 2.0]}, False),
        ("adopt", {"gal": [2]}, {}, True),
    ]
    everyone = Pool((0, 1, 2), 1, 9, 0)
    assert late.pool(everyone).clients == (0, 2) and late.missing(everyone) == [1]
    whole = late.with_these([1], 6, everyone)
    assert whole.steps == () and whole.told(everyone) == {"joined": {"1": 6, "2": 4}, "missing": []}


def test_only_methods_that_say_so_begin_without_everybody() -> None:
    e = experiment("fibecfed")
    insist_may_start(e, 3)
    refreshing = replace(e, method=replace(e.method, gal=Gal(count=1, refresh=2)))
    for wrong, start, reason in (
        (refreshing, 3, "no device can come after the set-up"),
        (replace(e, method=named("scaffold")()), 3, "no device can come after the set-up"),
        (e, 2, "from --cohort, 3, to the number of devices, 4"),
        (e, 5, "from --cohort, 3, to the number of devices, 4"),
    ):
        with pytest.raises(ExperimentError, match=reason):
            insist_may_start(wrong, start)
    insist_may_start(refreshing, 0)
    insist_may_start(refreshing, 4)
    per_device = {"fedalt", "fedcybgd", "fedbavg", "hetlora", "scaffold", "centralised", "lora-prior", "fedsb", "embracingfl"}
    may = {name for name, kind in all_methods().items() if may_join_late(kind())}
    assert not may & per_device and may >= {"fedeven", "fedfft", "fedbf", "fedap"}, "a device counts its labels itself"
