"""Layers that stay on devices, over every method or refused by it; in whole runs: what travels and what is said of it, resumed, exported,
evaluated again, over a wire with a loss, and on other engines."""

from __future__ import annotations

import json
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from fedloom.client.curriculum import shuffled
from fedloom.client.sharing import layer_scores
from fedloom.compute.serial import Serial
from fedloom.compute.work import Initial, Predict
from fedloom.engines.engine import drive
from fedloom.messages import Flow, Update, ask
from fedloom.methods import all_methods
from fedloom.methods.fedavg import FedAvg
from fedloom.methods.method import State, set_up
from fedloom.model.adapters import Adapter
from fedloom.model.blocks import layer_of
from fedloom.model.names import is_factor
from fedloom.run import checkpoint
from fedloom.run.adopt import adopt
from fedloom.run.again import evaluate_again
from fedloom.run.checkpoint import fingerprint_of
from fedloom.run.costs.pretended import Pretended
from fedloom.run.describe import describe, played
from fedloom.run.errors import ExperimentError
from fedloom.run.experiment import EngineSettings, Experiment
from fedloom.run.export import export
from fedloom.run.loop import run
from fedloom.run.personal import personal
from fedloom.run.world import World, build, store_in
from fedloom.server.masks import Mask
from fedloom.server.participation import Pool
from fedloom.server.sharing import Sharing, choose_gal
from fedloom.tensors import nbytes
from tests import small, tiny
from tests.conformance.played import Played
from tests.conformance.test_masks import METHODS, NO_PAIRS, SHARING

POOL = Pool((0, 1, 2, 3), 3, 2, 3, sharing=Sharing(0.4))
REFUSING = sorted(all_methods().keys() - {*SHARING, "fedprox"} - NO_PAIRS)


def experiment(name: str = "lora", share: Sharing = Sharing(count=1), **fields: Any) -> Experiment:
    return replace(small.experiment(name, **fields), share=share)


@pytest.mark.parametrize("name", REFUSING)
def test_a_method_that_cannot_says_so_before_it_trains(name: str) -> None:
    with pytest.raises(ValueError, match=rf"'{name}' cannot share some of the layers \(fraction 0.4\): .*--share.fraction"):
        pool, method = POOL, METHODS[name]
        next(method.setup(State(0, {}), pool))


def test_kinds_without_pairs_and_shares_of_nothing_are_refused() -> None:
    for name in sorted(NO_PAIRS):
        with pytest.raises(ExperimentError, match=f"of the layers and is of LoRA's pairs, and method '{name}', which trains"):
            experiment(name, Sharing(0.4))
    with pytest.raises(ExperimentError, match="and --adapter.kind ia3 has none"):
        replace(small.experiment("lora"), adapter=Adapter(kind="ia3"), share=Sharing(count=1))
    wrong: Any = ({"fraction": 0.0}, {"fraction": 1.5}, {"count": -1})
    for of in wrong:
        with pytest.raises(ValueError, match=r"above 0 and at most 1 is shared, or a count of 1 or more .*; got fraction"):
            Sharing(**of)


def test_more_layers_than_there_are_is_said_before_anybody_is_asked() -> None:
    with pytest.raises(ValueError, match="the GAL must hold 1 to 3 layers; fraction 1.0, count 4 give 4"):
        next(set_up(METHODS["lora"], tiny.model(), replace(POOL, sharing=Sharing(count=4))))


@pytest.mark.parametrize("sharing", [Sharing(count=3), Sharing(0.99, which="most"), Sharing(count=2, which="random")])
def test_nobody_is_asked_for_scores_that_decide_nothing(sharing: Sharing) -> None:
    with pytest.raises(StopIteration) as ended:
        next(set_up(METHODS["lora"], tiny.model(), replace(POOL, sharing=sharing)))
    state: State = ended.value.value
    drawn = choose_gal(torch.zeros(3).numpy(), [0, 1, 2], sharing, POOL.seed)
    assert state.facts["gal"] == (drawn if sharing.which == "random" else [0, 1, 2]) and "layer_scores" not in state.facts
    assert {layer_of(n) for n in state.shared if is_factor(n)} == set(state.facts["gal"])


@dataclass(frozen=True)
class Moving:
    """Its set-up moves what is shared; and it says no batch size."""

    name = "moving"
    paper = "none"
    by: float = 1.0
    what: str = ""
    inner: Any = field(default_factory=SimpleNamespace)

    def init(self, model: Any) -> State:
        return State(0, model.initial)

    def setup(self, state: State, pool: Pool) -> Any:
        yield from ()
        return replace(state, shared={n: t + self.by * (self.what in n) for n, t in state.shared.items()})


def test_a_set_up_that_moves_layers_is_refused_and_one_that_moves_the_head_has_it_sent_along() -> None:
    method: Any = Moving(what="lora_B")
    with pytest.raises(ValueError, match=r"'moving' leaves '.*lora_B.*' elsewhere in its set-up than at the model's start"):
        next(set_up(method, tiny.model(), POOL))
    with pytest.raises(ValueError, match="'moving' has no batch_size, by which layers are scored; give --share.which random"):
        next(set_up(replace(method, by=0.0), tiny.model(), POOL))  # type: ignore[arg-type]
    tasks: Any = next(set_up(replace(method, what="classifier", inner=FedAvg(batch_size=5)), tiny.model(), POOL)).tasks  # type: ignore[union-attr]
    assert {n.rsplit(".", 1)[0] for n in tasks[0].tensors} == {"base_model.model.classifier"}
    assert [(t.op, t.client, dict(t.settings)) for t in tasks] == [(layer_scores.__name__, k, {"batch_size": 5}) for k in POOL.clients]


@pytest.mark.parametrize("name", ["lora", "fedsa", "rolora"])
def test_stacked_is_one_by_one(name: str) -> None:
    one, many = (Played(METHODS[name], replace(POOL, controls=True), stacked=stacked) for stacked in (False, True))
    for _ in range(2):
        one.round()
        many.round()
    assert one.state.facts["gal"] == many.state.facts["gal"]
    for kind in ("shared", "controls"):
        mine, theirs = getattr(many.state, kind), getattr(one.state, kind)
        assert set(mine) == set(theirs) and all(torch.allclose(t, theirs[n], atol=5e-4) for n, t in mine.items())
    for k in POOL.clients:
        mine, theirs = many.store.load(k)[0], one.store.load(k)[0]
        assert mine.keys() == theirs.keys() and all(torch.allclose(t, theirs[n], atol=5e-4) for n, t in mine.items())


def test_layers_are_scored_on_as_many_texts_as_a_device_takes() -> None:
    """Where a method's batches follow memory, the probe does; its first texts are the batch's then."""
    tasks = next(set_up(FedAvg(batch_size=5, batch_by_memory=True), tiny.model(), POOL)).tasks  # type: ignore[union-attr]
    assert all(dict(task.settings) == {"batch_size": 5, "by_memory": True} for task in tasks)
    for texts, size in ((2, 2), (9, 5), (None, 5)):
        c = replace(tiny.clients()[1], texts=texts)
        work = layer_scores(c, tasks[1])
        assert isinstance(next(work), Initial)
        item = work.send(dict(tiny.model().initial))
        assert item.batch.tolist() == shuffled(len(c.train), size, c.seed, "batches", c.id)[0].tolist()
    (plain,) = {str(dict(task.settings)) for task in next(set_up(FedAvg(batch_size=5), tiny.model(), POOL)).tasks}  # type: ignore[union-attr]
    assert plain == "{'batch_size': 5}"


def test_own_layers_are_not_held_to_what_was_sent() -> None:
    """FedProx's term is over w - w_t, and of a device's own layers no w_t was sent; with a share of everything it is over all."""
    for sharing, shares in ((POOL.sharing, True), (Sharing(), False)):
        here = Played(FedAvg(prox=0.5), replace(POOL, sharing=sharing))
        before = here.state.shared.keys()
        here.round()
        held: Any = [item.penalty for item in here.fits]
        assert [penalty.names for penalty in held] == [before] * POOL.cohort
        assert all((item.start.keys() > before) == shares for item in here.fits)


def test_controls_are_of_what_is_shared_and_correct_nothing_else() -> None:
    here = Played(FedAvg(), replace(POOL, controls=True))
    here.round()
    here.round()
    shared = set(here.state.shared)
    assert set(here.state.controls) == shared and all(set(fit.correction) == shared < set(fit.start) for fit in here.fits)


def test_a_devices_own_rows_are_stored_as_rows() -> None:
    """Of a device's own B, rows that its mask does not keep are zero for ever and take no room."""
    here = Played(FedAvg(), replace(POOL, mask=Mask(0.4)))
    here.round()
    here.round()
    of = [(here.store.load(k)[0], rows) for k, rows in here.kept("kept/").items() if rows]
    assert len(of) >= POOL.cohort
    assert all(len(private[n]) < 16 for private, rows in of for n in rows) and all(n in private for private, rows in of for n in rows)
    assert here.predictions(0)["test"].shape == (3, 3)


# whole runs


def pooled_loss(world: World, folder: Path, personal: bool) -> float:
    """Of all devices' validation examples, each with its own layers, or with the start's."""
    saved = checkpoint.load(folder, store := store_in(folder))
    assert saved is not None
    devices = [world.device(k) for k in world.pool.clients]
    own = [store.load(c.id)[0] if personal else {} for c in devices]
    items = [Predict({**saved.state.shared, **private}, c.validation) for c, private in zip(devices, own, strict=True)]
    logits = np.concatenate([done.result.numpy() for done in Serial(world.model).run(items)])
    return float(world.source.task.loss(np.concatenate([c.validation.labels for c in devices]), logits))


def test_a_run_says_what_travels_resumes_and_exports(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The bytes that ``describe`` says are those of the run; resumed, it is the same to the bit; the global model has the devices' layers
    at their start, a device's model its own."""
    small.build_once(monkeypatch)
    asked = experiment(rounds=4)
    results = run(asked, tmp_path / "whole", plain=True)
    rows = [json.loads(line) for line in (tmp_path / "whole" / "rounds.jsonl").read_text().splitlines()]
    world = small.BUILT(asked)
    told = played(replace(world, compute=Pretended(world.model)))
    assert dict(told.steps) == {"layer scores on 4 devices": 1}
    assert (told.setup.bytes_up, told.setup.bytes_down) == (results["setup_bytes_up"], results["setup_bytes_down"])
    assert told.setup.flops == results["setup_flops"] > 0
    for row, due in zip((rows[1], rows[-1]), told.rounds, strict=True):
        assert row["bytes_down"] == due.bytes_down and abs(row["bytes_up"] - due.bytes_up) <= 16 * asked.cohort
    everything = run(small.experiment(rounds=4, evaluate_every=0), tmp_path / "lora", plain=True)
    own = [n for n in world.model.initial if is_factor(n) and layer_of(n) not in results["facts"]["gal"]]
    size, each = nbytes({n: world.model.initial[n] for n in own}), asked.cohort * asked.rounds
    assert everything["bytes_up"] - (results["bytes_up"] - results["setup_bytes_up"]) > size * each
    assert results["device_state"]["private_bytes"] == size
    assert rows[-1]["validation"]["loss"] == pytest.approx(pooled_loss(world, tmp_path / "whole", True), rel=1e-4)
    assert rows[-1]["validation"]["loss"] != pytest.approx(pooled_loss(world, tmp_path / "whole", False), rel=1e-3)
    assert results["setup_paid_back"]["bytes_up"] is not None
    assert dict(describe(asked).lines)["sharing"] == "1 of the layers, the least sensitive; the others stay on each device"
    small.stopped(asked, tmp_path / "stopped", 2)
    assert run(asked, tmp_path / "stopped", plain=True)["final"] == results["final"]
    assert fingerprint_of(tmp_path / "stopped") == fingerprint_of(tmp_path / "whole")
    assert evaluate_again(asked, tmp_path / "whole").equal
    assert evaluate_again(asked, tmp_path / "whole", all_methods()["lora-finetuned"]).scores["test"]["global"] == results["final"]["global"]
    with pytest.raises(ExperimentError, match="lie in the folder of the run that trained them and nowhere else; train 'lora-finetuned'"):
        adopt(replace(asked, method=METHODS["lora-finetuned"]), tmp_path / "adopted", tmp_path / "whole", show=None)  # type: ignore[arg-type]
    saved = checkpoint.load(tmp_path / "whole", store := store_in(tmp_path / "whole"))
    assert saved is not None
    for client in (None, 1):
        export(asked, tmp_path / "whole", tmp_path / f"out-{client}", client)
        written = load_file(tmp_path / f"out-{client}" / "adapter_model.safetensors")
        due = {**world.model.initial, **saved.state.shared, **({} if client is None else store.load(client)[0])}
        assert all(torch.equal(written[n], due[n]) for n in own) and set(own) <= written.keys()
        assert any(bool((written[n] != world.model.initial[n]).any()) for n in own) == (client is not None)


@pytest.mark.parametrize("name", ["lora-finetuned", "fedeven"])
def test_a_devices_model_is_that_which_was_evaluated(name: str, tmp_path: Path) -> None:
    """Where a prediction trains under FedProx's term, a device's own layers are not held: neither evaluated nor exported."""
    kind = all_methods()[name]
    asked = replace(experiment(name, rounds=2, evaluate_every=0), method=kind(inner=FedAvg(lr=0.02, prox=5.0), epochs=3))
    run(asked, tmp_path, plain=True)
    world, store = build(asked), store_in(tmp_path)
    saved = checkpoint.load(tmp_path, store)
    assert saved is not None
    for k in world.pool.clients:
        (said,) = drive(world.pool.sharing.over(_predicting(asked.method, saved.state, k), saved.state.facts), world.engine(store))
        of = personal(world, store, k, saved.state.shared, saved.state.facts)
        (made,) = Serial(world.model).run([Predict(of.tensors, world.device(k).shard("test"))])
        logits = made.result if of.bias is None else made.result + of.bias
        torch.testing.assert_close(logits, said.tensors["test"], atol=1e-3, rtol=0)


def _predicting(method: Any, state: State, client: int) -> Flow[list[Update]]:
    return (yield [ask(method.predict, client, state.shared, splits=["test"])])


@pytest.mark.parametrize("wire", ["top-k:0.2", "int8"])
def test_a_wire_with_a_loss_loses_nothing_of_what_stays(wire: str, tmp_path: Path) -> None:
    asked = experiment("federa", wire=wire, evaluate_every=0)
    gal = run(asked, tmp_path, plain=True)["facts"]["gal"]
    world, store = build(asked), store_in(tmp_path)
    initial = world.model.initial
    assert world.pool.encoding == asked.encoding, "the server knows the wire, which some methods refuse"
    saved = checkpoint.load(tmp_path, store)
    assert saved is not None and {layer_of(n) for n in saved.state.shared if is_factor(n)} == set(gal)
    for k in range(asked.clients):
        private, memory = store.load(k)
        unsent = {n.removeprefix("unsent/") for n in memory if n.startswith("unsent/")}
        assert unsent <= set(saved.state.shared) and set(private) == ({n for n in initial if is_factor(n) and n not in saved.state.shared})
        assert all(bool((t != initial[n]).any()) for n, t in private.items())


@pytest.mark.flower
def test_flower_gives_the_same_bits(tmp_path: Path) -> None:
    pytest.importorskip("flwr", reason="the extra 'flower' is not installed: pip install 'fedloom[flower]'")
    asked = replace(experiment("fedsa", Sharing(0.5, which="most")), controls=True)
    flower = replace(asked, engine=EngineSettings(kind="flower"))
    here, there = run(asked, tmp_path / "here", plain=True), run(flower, tmp_path / "there", plain=True)
    assert here["facts"] == there["facts"] and here["final"] == there["final"] and here["bytes_up"] == there["bytes_up"]


def test_described_rounds_that_build_on_each_other_have_the_devices_layers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Masks and controls have all rounds played by an engine that only counts: it too carries operations out as devices do."""
    small.build_once(monkeypatch)
    asked = replace(experiment(evaluate_every=0), controls=True, mask=Mask(0.4))
    run(asked, tmp_path, plain=True)
    rows = [json.loads(line) for line in (tmp_path / "rounds.jsonl").read_text().splitlines()][1:]
    world = small.BUILT(asked)
    told = played(replace(world, compute=Pretended(world.model)))
    assert told.whole and len(told.rounds) == len(rows)
    for row, due in zip(rows, told.rounds, strict=True):
        digits = abs(row["bytes_up"] - due.bytes_up)  # of a loss, and of where tensors lie
        assert row["bytes_down"] == due.bytes_down and digits <= 24 * asked.cohort
        assert row["examples"] == due.examples


def test_where_all_layers_are_shared_none_is_chosen() -> None:
    with pytest.raises(ValueError, match="all layers are shared, and there is nothing to choose by 'most'; give --share.fraction below 1"):
        next(set_up(FedAvg(), tiny.model(), replace(POOL, sharing=Sharing(which="most"))))
