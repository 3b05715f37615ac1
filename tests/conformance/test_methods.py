"""Every method of the package in a whole tiny experiment: it runs, resumes to the same bits, tells what it must, and survives failures."""

from __future__ import annotations

import json
import math
import warnings
from collections.abc import Callable
from dataclasses import replace
from functools import cache
from pathlib import Path
from tempfile import mkdtemp
from typing import Any

import numpy as np
import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForSequenceClassification

from fedloom.client.neurons import KEPT, unpacked
from fedloom.client.store import ClientStore
from fedloom.compute.work import Predict
from fedloom.data.examples import Examples
from fedloom.engines.engine import Engine
from fedloom.engines.local import Local
from fedloom.engines.wrap import Faulty, Lossy
from fedloom.messages import CohortFailed, Task, ask
from fedloom.methods import all_methods
from fedloom.methods import fibecfed as fibecfed_module
from fedloom.methods.fibecfed import Curriculum, FibecFed, Gal
from fedloom.model.blocks import layer_of
from fedloom.run import checkpoint
from fedloom.run.adopt import adopt
from fedloom.run.checkpoint import fingerprint_of
from fedloom.run.comparison.plan import trains_as
from fedloom.run.costs.memory import Portion
from fedloom.run.errors import ExperimentError
from fedloom.run.evaluation import evaluate
from fedloom.run.experiment import Experiment, from_json
from fedloom.run.export import ExportError, export, predictor_of
from fedloom.run.loop import run
from fedloom.run.terminal.console import Progress
from fedloom.run.world import World, build, store_in
from fedloom.server.participation import uniform
from fedloom.tensors import fingerprint
from tests import small, tiny
from tests.conformance.toy import OF_EVERY_TRAFFIC

pytestmark = pytest.mark.no_cover
"""The same lines again for every method, kind or size: which lines are reached at all, other tests tell (conftest.py)."""

ROUNDS = 2
METHODS = list(all_methods())
TRAINS_AS = {"lora-finetuned": "lora", "lora-prior": "lora"}
NO_GLOBAL = {"local", "lora-personal-head", "fedsa", "fedalt-partial", "fedalt"}
NO_PERSONAL_PART = {
    "lora",
    "federa",
    "centralised",
    "ffa",
    "rolora",
    "fedopt",
    "fedcybgd",
    "fedbavg",
    "handover",
    "embracingfl",
    "fedfft",
    "fedbf",
    "fedap",
    "flora",
    "fedex",
    "flasc",
    "fedprox",
    "scaffold",
    "slora",
    "fedsb",
    "adalora",
    "deltalora",
    "galore",
    "lisa",
}

WHOLE_MODEL = {"fedcybgd", "fedbavg", "handover", "fedfft", "fedbf", "flora", "fedex", "deltalora", "embracingfl", "galore", "lisa"}
"""What they change PEFT has no adapter for; ``transformers`` loads it."""
NOT_LOADABLE = {"fedap"}
"""No library loads their bottlenecks."""
TURNS = {"fedcybgd", "handover"}
"""One client a round: whoever is away costs its turn, whatever the quorum."""

RESULT_KEYS = {
    "method", "metric", "rounds", "seed", "digest", "final", "best", "bytes_up", "bytes_down", "setup_bytes_up", "setup_bytes_down",
    "examples", "setup_examples", "host_seconds", "device_seconds", "setup_device_seconds", "setup_host_seconds", "peak_rss_bytes",
    "validation", "notes", "per_device", "partition", "facts", "experiment", "flops", "setup_flops", "setup_paid_back", "device_state",
    "numbers", "samples", "exact_match", "devices",
}  # fmt: skip
ROW_KEYS = {
    "round", "loss", "personalised", "global", "examples", "train_seconds", "bytes_up", "bytes_down", "host_seconds",
    "device_seconds", "flops", "peak_rss_bytes", "answered", "failed", "validation", "personalising",
}  # fmt: skip
MEASURED = {"train_seconds", "host_seconds", "peak_rss_bytes", "setup_host_seconds"}


@pytest.fixture(autouse=True)
def worlds_are_built_once(monkeypatch: pytest.MonkeyPatch) -> None:
    small.build_once(monkeypatch)


def rows(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "rounds.jsonl").read_text().splitlines()]


def without_clock(entry: dict[str, Any]) -> dict[str, Any]:
    """What must be the same whenever and wherever it is computed."""
    return {k: v for k, v in entry.items() if k not in MEASURED | {"experiment"}}


def of(name: str, stack: int = 0, kind: str = "local", **fields: Any) -> Experiment:
    """The tiny experiment, evaluated before the first round and after the last; where that is looked at, after each."""
    return small.experiment(name, stack, kind, **{"rounds": ROUNDS, "evaluate_every": 1 if name in TURNS else ROUNDS, **fields})


of_each = pytest.mark.parametrize("name", METHODS, scope="module")
"""Of each method by itself; the scope has pytest do all tests of one method before those of the next, which share its whole runs."""


@cache
def whole(name: str, stack: int = 0, kind: str = "local") -> tuple[Path, dict[str, Any]]:
    """One uninterrupted run."""
    folder = Path(mkdtemp(prefix="whole-")) / "run"
    with warnings.catch_warnings():  # the command-line library that Flower imports uses a deprecated name of click's
        warnings.simplefilter("ignore", DeprecationWarning)
        return folder, run(of(name, stack, kind), folder, plain=True)


@of_each
def test_it_runs_and_tells_what_the_run_folder_promises(name: str) -> None:
    folder, results = whole(name)
    assert json.loads((folder / "results.json").read_text()) == results
    assert set(results) == RESULT_KEYS
    numbers = results["numbers"]
    assert 0 < numbers["at_once"] <= numbers["trained"] <= numbers["model"]
    assert (numbers["at_once"] < numbers["trained"]) == (name in {"fedcybgd", "fedbavg"}), "a block and the head, or everything"
    assert (results["method"], results["rounds"], results["seed"], results["metric"]) == (name, ROUNDS, 5, "accuracy")
    for which in ("final", "best"):
        assert set(results[which]) == {"round", "personalised", "global", "loss", "personalising"}
        assert set(results["validation"][which]) == {"personalised", "global", "loss"}
    assert results["final"]["round"] == ROUNDS
    told = rows(folder)
    assert [row["round"] for row in told] == list(range(ROUNDS + 1))
    assert all(set(row) == ROW_KEYS for row in told)
    assert (told[0]["loss"], told[0]["examples"], told[0]["bytes_up"], told[0]["bytes_down"]) == (None, 0, 0, 0)
    assert all(row["loss"] is not None and row["examples"] > 0 for row in told[1:])
    assert from_json(json.loads((folder / "experiment.json").read_text())).digest() == results["digest"]
    assert (folder / "adapter" / "adapter_config.json").exists() == (name not in NO_GLOBAL | WHOLE_MODEL | NOT_LOADABLE)
    assert (folder / "model" / "config.json").exists() == (name in WHOLE_MODEL)
    assert any("no other library" in note for note in results["notes"]) == (name in NOT_LOADABLE)


@of_each
def test_per_device_figures_add_up_to_the_personalised_score(name: str) -> None:
    folder, results = whole(name)
    devices = results["per_device"]
    assert [d["client"] for d in devices] == [0, 1, 2, 3]
    assert all(set(d) == {"client", "train", "test", "correct", "score", "participations", "labels", "confusion"} for d in devices)
    assert sum(d["correct"] for d in devices) / sum(d["test"] for d in devices) == pytest.approx(results["final"]["personalised"])
    for protocol in ("personalised", "global"):
        told = [d["confusion"][protocol] for d in devices]
        assert (told == [None] * 4) == (results["final"][protocol] is None)
        if told[0] is not None:
            assert [sum(n for _, _, n in cells) for cells in told] == [d["test"] for d in devices]
            right = [sum(n for true, predicted, n in cells if true == predicted) for cells in told]
            assert sum(right) / small.ROWS["test"] == pytest.approx(results["final"][protocol])
            assert protocol == "global" or right == [d["correct"] for d in devices]
    if name in NO_PERSONAL_PART:
        assert all(d["confusion"]["global"] == d["confusion"]["personalised"] for d in devices), "each device's own rows"
    assert (sum(d["train"] for d in devices), sum(d["test"] for d in devices)) == (small.ROWS["train"], small.ROWS["test"])
    counts = results["partition"]["train_counts"]
    assert [d["labels"] for d in devices] == counts
    assert results["partition"]["classes"] == ["a", "b", "c"]
    answered = [k for row in rows(folder) for k in row["answered"]]
    assert [d["participations"] for d in devices] == [answered.count(k) for k in range(4)]
    if name != "centralised":
        pool = small.BUILT(of(name)).pool
        due = [[t] if name in TURNS else list(uniform(pool, t)) for t in range(ROUNDS)]
        assert [row["answered"] for row in rows(folder)[1:]] == due


@of_each
def test_a_protocol_that_a_method_cannot_have_is_null(name: str) -> None:
    folder, _ = whole(name)
    for row in rows(folder):
        if row["round"] % of(name).evaluate_every:
            continue
        assert row["personalised"] is not None
        assert (row["global"] is None) == (name in NO_GLOBAL)
        assert (row["validation"]["global"] is None) == (name in NO_GLOBAL)


@pytest.mark.parametrize("name", sorted(NO_PERSONAL_PART))
def test_without_personal_parts_personalised_equals_global(name: str) -> None:
    for row in rows(whole(name)[0]):
        assert row["personalised"] == row["global"]
        assert row["validation"]["personalised"] == row["validation"]["global"]


@of_each
def test_totals_are_sums_of_rows(name: str) -> None:
    folder, results = whole(name)
    for key in ("bytes_up", "bytes_down", "examples", "device_seconds"):
        assert results[key] == pytest.approx(sum(row[key] for row in rows(folder)))
    assert all(row["device_seconds"] > 0 for row in rows(folder)[1:])


def test_traffic_is_ordered_as_the_methods_say() -> None:
    up = {name: whole(name)[1]["bytes_up"] for name in METHODS}
    assert up["local"] < 0.2 * up["fibecfed"]
    assert up["fibecfed"] < 0.6 * up["lora"], "one layer of three and the head"
    assert up["lora-personal-head"] < up["lora"]
    assert up["lora-finetuned"] == up["lora-prior"] == up["lora"]
    assert max(up["ffa"], up["fedsa"], up["rolora"]) < up["lora"], "one factor of the two"
    assert up["fedalt-partial"] == pytest.approx(up["lora-personal-head"], rel=0.002), "the same tensors, with another loss and cost"
    assert up["fedsb"] < min(up["ffa"], up["fedsa"], up["rolora"]), "r by r numbers of a module"
    assert up["fedalt"] < up["lora"], "a pair of each module, and no head"
    assert up["deltalora"] == pytest.approx(up["lora"], rel=0.002), "W is the server's to move"
    told = [row["bytes_up"] for row in rows(whole("adalora")[0])[1:]]
    assert told[1] < 0.75 * told[0], "two thirds of the triplets are left after the first round"
    assert up["fedopt"] == pytest.approx(up["lora"], rel=0.002), "the moments are the server's"
    assert up["ditto"] == pytest.approx(up["lora"], rel=0.002), "the personal model stays"
    setup = {name: whole(name)[1]["setup_bytes_down"] for name in METHODS}
    assert setup["lora"] == setup["centralised"] == setup["lora-finetuned"] == setup["rolora"] == setup["fedopt"] == 0
    assert min(setup[name] for name in WITH_SET_UP) > 0


def test_rivals_of_lora_train_exactly_as_lora_does() -> None:
    shared = {}
    for name in ("lora", "lora-finetuned", "lora-prior"):
        folder, results = whole(name)
        shared[name] = ([row["global"] for row in rows(folder)], [row["loss"] for row in rows(folder)], results["final"]["global"])
    assert shared["lora"] == shared["lora-finetuned"] == shared["lora-prior"]


@pytest.mark.parametrize(
    ("name", "client"),
    [("ffa", None), ("ffa", 2), ("rolora", None), ("fedsa", 2), ("fedalt-partial", 2), ("ditto", None), ("ditto", 2), ("fedopt", None)],
)
def test_an_export_holds_what_the_server_shares_and_the_device_keeps(name: str, client: int | None, tmp_path: Path) -> None:
    """The device's own tensors over the shared ones, and the start where neither has any. Global: the shared ones alone."""
    folder, _ = whole(name)
    experiment = of(name)
    export(experiment, folder, tmp_path / "out", client)
    store = ClientStore(folder / "checkpoints" / "clients")
    saved = checkpoint.load(folder, store)
    assert saved is not None
    start = small.BUILT(experiment).model.initial
    due = {**start, **saved.state.shared, **(store.load(client)[0] if client is not None else {})}
    written = load_file(tmp_path / "out" / "adapter_model.safetensors")
    assert fingerprint(written) == fingerprint(due)
    assert fingerprint(written) != fingerprint(start)


def said_elsewhere(folder: Path, examples: Examples) -> torch.Tensor:
    """(n, C): what transformers, or PEFT on the base, says of the texts, one by one."""
    if (folder / "adapter_config.json").exists():
        base = AutoModelForSequenceClassification.from_pretrained(tiny.folder(), num_labels=3, ignore_mismatched_sizes=True)
        loaded: Any = PeftModel.from_pretrained(base, folder).eval()
    else:
        loaded = AutoModelForSequenceClassification.from_pretrained(folder).eval()
    texts = [torch.from_numpy(examples.pad(np.array([i]), pad_id=0).ids) for i in range(len(examples))]
    with torch.no_grad():
        return torch.cat([loaded(input_ids=text).logits for text in texts])


OTHERWISE: dict[str, Callable[[str], Experiment]] = {
    "": of,
    "from singular vectors": lambda name: replace(e := of(name, evaluate_every=0), adapter=replace(e.adapter, start="svd")),
    "over int8": lambda name: of(name, evaluate_every=0, wire="int8"),
}


@cache
def otherwise(name: str, how: str) -> Path:
    """The folder of a whole run."""
    if not how:
        return whole(name)[0]
    folder = Path(mkdtemp(prefix="otherwise-")) / "run"
    run(OTHERWISE[how](name), folder, plain=True)
    return folder


def said_by_the_device(world: World, folder: Path, client: int, aside: Path) -> torch.Tensor:
    """(n, C): what it answers when it is asked for its test shard's predictions, as in an evaluation."""
    store = store_in(folder, aside)
    saved = checkpoint.load(folder, store)
    assert saved is not None
    asked = ask(world.experiment.method.predict, client, saved.state.shared, splits=["test"])
    return Local(world.host(store), 1).run([asked]).updates[0].tensors["test"]


EXPORTED = [(name, None) for name in METHODS if name not in NO_GLOBAL | NOT_LOADABLE]
EXPORTED += [(name, 2) for name in METHODS if name not in NO_PERSONAL_PART | NOT_LOADABLE | {"fedalt"}]
EXPORTED += [(f"{name} from singular vectors", 2) for name in ("fibecfed", "ffa", "rolora")]
EXPORTED += [(f"{name} over int8", 2) for name in ("lora", "fibecfed", "fedsa", "ditto")]
EXPORTED += [("lora over int8", None)]


@pytest.mark.parametrize(("which", "client"), EXPORTED)
def test_an_export_says_elsewhere_what_the_run_says(
    which: str, client: int | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The global model as the run left it in its folder, and a device's own, which is what it predicts with: logits to 1e-4."""
    monkeypatch.setattr("fedloom.run.export.build", small.BUILT)
    name, _, how = which.partition(" ")
    experiment, folder = OTHERWISE[how](name), otherwise(name, how)
    world = small.BUILT(experiment)
    out = folder / ("model" if name in WHOLE_MODEL else "adapter")
    examples = world.splits["test"]
    if client is not None:
        export(experiment, folder, out := tmp_path / "out", client)
        examples = world.device(client).test
        mine = said_by_the_device(world, folder, client, tmp_path / "aside")
    else:
        mine = world.compute.run([Predict(predictor_of(world, folder, None).tensors, examples)])[0].result
    start = world.compute.run([Predict(world.model.initial, examples)])[0].result
    assert float((mine - start).abs().max()) > 1e-2, "it learnt something that an export could lose"
    torch.testing.assert_close(said_elsewhere(out, examples), mine, atol=1e-4, rtol=0)


@pytest.mark.parametrize("name", sorted(NO_GLOBAL))
def test_without_a_global_model_there_is_none_to_export(name: str, tmp_path: Path) -> None:
    with pytest.raises(ExportError, match=f"'{name}' has no global model; give --client 0 to 3"):
        export(of(name), whole(name)[0], tmp_path / "out")


def test_which_train_alike() -> None:
    assert {name: held for name, kind in all_methods().items() if (held := trains_as(kind()))} == TRAINS_AS


@pytest.mark.parametrize("name", TRAINS_AS)
def test_what_trains_alike_is_the_same_when_it_takes_the_training_over(name: str, tmp_path: Path) -> None:
    """Evaluated on what ``lora`` trained, in a folder that has all of a run's, it is what it would have trained itself."""
    folder, expected = whole(name)
    show = Progress(ROUNDS, "", plain=True)
    with pytest.raises(ExperimentError, match="5 B are there"):
        adopt(of(name), tmp_path / "run", whole(TRAINS_AS[name])[0], show, portion=Portion(2, 5))
    results = adopt(of(name), tmp_path / "run", whole(TRAINS_AS[name])[0], show)
    assert fingerprint_of(tmp_path / "run") == fingerprint_of(folder)
    assert results["final"] == expected["final"] == results["best"]
    assert {**without_clock(results), "best": 0, "notes": 0} == {
        **without_clock(expected),
        "best": 0,
        "notes": 0,
        "validation": results["validation"],
    }
    assert results["validation"]["final"] == expected["validation"]["final"]
    assert [row["personalised"] is None for row in rows(tmp_path / "run")] == [True, True, False]
    assert adopt(of(name), tmp_path / "run", tmp_path / "gone", show) == results


class Killed(BaseException):
    """As good as kill −9: nobody catches it."""


@of_each
def test_interrupted_after_every_round_it_ends_at_the_same_bits(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    experiment, show = of(name), Progress.round
    for seen in range(ROUNDS + 1):

        def dying(self: Progress, row: dict[str, Any], last: int = seen) -> None:
            show(self, row)
            if row["round"] > last:
                raise Killed

        if seen < ROUNDS:
            monkeypatch.setattr(Progress, "round", dying)
            with pytest.raises(Killed):
                run(experiment, tmp_path / "run", plain=True)
            saved = checkpoint.load(tmp_path / "run", store_in(tmp_path / "run"))
            assert saved is not None
            assert saved.state.round == seen, "the row was written, the checkpoint was not: this round is lost and no other"
    monkeypatch.setattr(Progress, "round", show)
    results = run(experiment, tmp_path / "run", plain=True)
    folder, expected = whole(name)
    assert fingerprint_of(tmp_path / "run") == fingerprint_of(folder)
    assert [without_clock(row) for row in rows(tmp_path / "run")] == [without_clock(row) for row in rows(folder)]
    assert without_clock(results) == without_clock(expected)


def assert_same_end(name: str, one: tuple[Path, dict[str, Any]], other: tuple[Path, dict[str, Any]]) -> None:
    """The same bits. Where weights of the base itself are trained passes are not packed, and a device's last bits depend on its company
    (docs/engines.md): there the same tensors to rounding."""
    (here, first), (there, second) = one, other
    if name in WHOLE_MODEL:
        states = [checkpoint.load(folder, ClientStore(folder / "checkpoints" / "clients")) for folder in (here, there)]
        ours, theirs = (saved.state.shared for saved in states if saved is not None)
        assert set(ours) == set(theirs)
        rounding = {n for n in ours if n.endswith("key.bias")}  # softmax cancels them: rounding is their gradient, and AdamW steps by it
        assert all((ours[n] - theirs[n]).abs().max() < (2e-3 if n in rounding else 1e-6) for n in ours)
        for key in ("bytes_up", "bytes_down", "examples", "flops"):  # a loss of another last digit is told in more or fewer characters
            assert first[key] == pytest.approx(second[key], rel=1e-3)
        return
    assert fingerprint_of(here) == fingerprint_of(there)
    assert [without_clock(row) for row in rows(here)] == [without_clock(row) for row in rows(there)]
    assert without_clock(first) == without_clock(second)


@of_each
def test_one_by_one_and_stacked_end_at_the_same_bits(name: str) -> None:
    assert_same_end(name, whole(name, 1), whole(name, 0))


@pytest.mark.parametrize("name", ["lora", "fibecfed"])
def test_a_stack_of_two_of_three_ends_at_the_same_bits(name: str) -> None:
    assert_same_end(name, whole(name, 1), whole(name, 2))


@pytest.mark.flower
@pytest.mark.parametrize("name", ["fibecfed", "fedcybgd", "scaffold"])
def test_local_and_flower_end_at_the_same_bits(name: str) -> None:
    """Whole runs of a few; that all methods say and hear the same over both engines is in ``test_methods_on_engines.py``."""
    assert_same_end(name, whole(name, 0), whole(name, 0, "flower"))


@of_each
def test_evaluation_leaves_every_device_and_the_server_as_they_were(name: str, tmp_path: Path) -> None:
    folder, _ = whole(name)
    world, store = small.BUILT(of(name)), ClientStore(folder / "checkpoints" / "clients")
    saved = checkpoint.load(folder, store)
    assert saved is not None
    before = store.fingerprint()
    first, second = (evaluate(world, saved.state, world.engine(store)) for _ in range(2))
    assert store.fingerprint() == before
    assert first.scores == second.scores
    last = rows(folder)[-1]
    assert first.scores["test"] == {"personalised": last["personalised"], "global": last["global"]}
    assert first.scores["validation"] == last["validation"]


# failures

Wrap = Callable[[Engine], Engine]


def disturbed(name: str, wrap: Wrap, monkeypatch: pytest.MonkeyPatch, folder: Path, **fields: Any) -> dict[str, Any]:
    """A run whose engine is wrapped."""
    whole(name)  # made now if it was not, and not while engines are wrapped
    engine = World.engine
    monkeypatch.setattr(World, "engine", lambda self, store: wrap(engine(self, store)))
    return run(of(name, **fields), folder, plain=True)


def first_asking_lost(task: Task, attempt: int) -> str | None:
    return "out of range" if task.client == 2 and attempt == 0 and task.op not in ("train", "predict") else None


WITH_SET_UP = ["fibecfed", "local", "lora-personal-head", "lora-prior", "ffa", "fedsa", "fedalt-partial", "ditto", "fedsb", "fedalt"]
NEVER_HEARD = ["fibecfed", "local", "fedsb"]
"""Of an asking that is lost on its way the device knows nothing, whatever the method. Whose answer is lost carries it out twice."""


@pytest.mark.parametrize(("name", "wrapper"), [*((name, Lossy) for name in WITH_SET_UP), *((name, Faulty) for name in NEVER_HEARD)])
def test_the_set_up_asks_again_and_ends_as_if_nobody_had_failed(
    name: str, wrapper: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    results = disturbed(name, lambda engine: wrapper(engine, first_asking_lost), monkeypatch, tmp_path / "run")
    folder, expected = whole(name)
    assert fingerprint_of(tmp_path / "run") == fingerprint_of(folder)
    assert results["final"] == expected["final"]
    if wrapper is Lossy:
        assert results["setup_bytes_down"] > expected["setup_bytes_down"], "asking again is paid for"


@pytest.mark.parametrize("name", WITH_SET_UP)
def test_a_device_that_never_answers_the_set_up_ends_the_run_by_name(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def deaf(task: Task, attempt: int) -> str | None:
        return "switched off" if task.client == 3 else None

    with pytest.raises(CohortFailed, match=r"client 3: no answer to '\w+' in 3 attempts"):
        disturbed(name, lambda engine: Faulty(engine, deaf), monkeypatch, tmp_path / "run")
    assert rows(tmp_path / "run") == []


def lost_in_round_one(task: Task, attempt: int) -> str | None:
    lost = task.op == "train" and task.settings.get("round") == 1 and task.client == uniform_of_one()[0]
    return "battery empty" if lost else None


@cache
def uniform_of_one() -> tuple[int, ...]:
    return uniform(small.BUILT(of("lora")).pool, 1)


LOSING = [name for name in METHODS if name in {*OF_EVERY_TRAFFIC, "adalora", "fedalt-partial", "fedsb", "slora"} - TURNS]
"""A round that loses a device is the loop's and the engine's to bear: of every kind of traffic, and whose rounds come in stages."""


@pytest.mark.parametrize("name", LOSING)
def test_a_round_that_keeps_its_quorum_goes_on_without_who_failed(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    results = disturbed(name, lambda engine: Faulty(engine, lost_in_round_one), monkeypatch, tmp_path / "run", quorum=0.6)
    row = rows(tmp_path / "run")[2]
    assert row["failed"] == {str(uniform_of_one()[0]): "battery empty"}
    assert row["answered"] == list(uniform_of_one()[1:])
    assert results["final"]["round"] == ROUNDS
    assert fingerprint_of(tmp_path / "run") != fingerprint_of(whole(name)[0])


@pytest.mark.parametrize("name", ["fibecfed", "scaffold", "slora", "flora", "fedsb"])
def test_a_round_that_misses_its_quorum_ends_the_run_names_who_and_can_be_resumed(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Such a round is thrown away before the method sees an answer: one of each way to keep something between rounds."""
    lost = uniform_of_one()[0]
    with (
        monkeypatch.context() as patch,
        pytest.raises(CohortFailed, match=rf"2 of 3 clients answered, 3 are needed. client {lost}: battery"),
    ):
        disturbed(name, lambda engine: Faulty(engine, lost_in_round_one), patch, tmp_path / "run")
    assert len(rows(tmp_path / "run")) == 2
    run(of(name), tmp_path / "run", plain=True)
    assert fingerprint_of(tmp_path / "run") == fingerprint_of(whole(name)[0])


@pytest.mark.parametrize("name", sorted(TURNS))
def test_whoever_is_away_costs_its_turn_and_no_more(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def away(task: Task, attempt: int) -> str | None:
        return "battery empty" if task.op == "train" and task.client == 1 else None

    disturbed(name, lambda engine: Faulty(engine, away), monkeypatch, tmp_path / "run")
    told = rows(tmp_path / "run")
    assert (told[1]["answered"], told[1]["failed"]) == ([0], {})
    assert (told[2]["answered"], told[2]["failed"], told[2]["loss"]) == ([], {"1": "battery empty"}, None)
    assert told[2]["global"] == told[1]["global"] == rows(whole(name)[0])[1]["global"]


def test_fibecfed_with_lossless_choices_takes_what_its_own_spectra_say_in_any_stack(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The gaps are looked for by their definition in what the run found. Its bounds are made 25 times as wide, so that one of the four
    devices has no gap above 4 of them, and the others' is not the first one that there is."""
    lossless = FibecFed(curriculum=Curriculum(head_rounds=1), gal=Gal(fraction=0.5, lossless=True), keep_lossless=True)
    spectra: list[tuple[np.ndarray, np.ndarray, float]] = []
    looks = fibecfed_module.first_gap

    def wider(nodes: np.ndarray, weights: np.ndarray, bound: float) -> float | None:
        spectra.append((nodes, weights, 25 * bound))
        return looks(*spectra[-1])

    monkeypatch.setattr(fibecfed_module, "first_gap", wider)
    made = {}
    for stack in (1, 0):
        e = replace(small.experiment("fibecfed", stack=stack), method=lossless)
        made[stack] = run(e, tmp_path / str(stack), plain=True)
    assert made[0]["facts"] == made[1]["facts"] and fingerprint_of(tmp_path / "0") == fingerprint_of(tmp_path / "1")
    world, store, prunable = (
        build(replace(small.experiment("fibecfed"), method=lossless)),
        ClientStore(tmp_path / "0" / "checkpoints" / "clients"),
        {},
    )
    for k, (nodes, weights, bound) in enumerate(spectra[4:]):
        below = [m for m in range(len(nodes) - 1) if nodes[m + 1] - nodes[m] > 4 * bound]
        if below:
            prunable[k] = sum(weights[: below[0] + 1])
    assert 0 < len(prunable) < 4, "some have a gap and some do not"
    sizes = {k: len(world.device(k).train) for k in range(4)}
    mean = sum(sizes[k] * share for k, share in prunable.items()) / sum(sizes[k] for k in prunable)
    gal, told = made[0]["facts"]["gal"], made[0]["facts"]["lossless"]
    assert told["prunable"] == pytest.approx(mean)
    assert told["examples_on_devices_with_a_gap"] == pytest.approx(sum(sizes[k] for k in prunable) / sum(sizes.values()))
    assert told["without_a_gap"].startswith(f"{4 - len(prunable)} of 4 devices have no gap") and told["without_a_gap"].endswith(
        "instead: keep 0.95"
    )
    scores = made[0]["facts"]["layer_scores"]
    assert len(gal) == max(1, math.ceil((1 - mean) * 3)) < 3
    assert gal == sorted(sorted(range(3), key=lambda layer: scores[layer])[: len(gal)])
    assert checkpoint.load(tmp_path / "0", store) is not None
    for k in range(4):
        _, memory = store.load(k)
        kept = {n.removeprefix(KEPT): unpacked(bits) for n, bits in memory.items() if n.startswith(KEPT)}
        share = 1 - prunable[k] if k in prunable else 0.95
        for layer in set(range(3)) - set(gal):
            rows_of = [flags for name, flags in kept.items() if layer_of(name) == layer]
            assert sum(flags.sum() for flags in rows_of) == max(1, math.ceil(share * sum(map(len, rows_of)))), (k, layer)
    assert made[0]["setup_device_seconds"] > run(small.experiment("fibecfed"), tmp_path / "plain", plain=True)["setup_device_seconds"]
