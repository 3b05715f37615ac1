"""FibecFed's lossless choices, played by hand: what a device tells of its spectrum, and what the server and the mask make of it."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from fedloom.client.neurons import rows_kept
from fedloom.compute.work import Score, Sensitivity, Spectral, Spectrum
from fedloom.messages import Task, Update, ask
from fedloom.methods.fedavg import FedAvg
from fedloom.methods.fibecfed import Curriculum, FibecFed, Gal
from fedloom.methods.method import State
from fedloom.seeds import derive_int
from fedloom.server.participation import Pool
from fedloom.server.robust import Aggregation
from tests.flows import POOL, SIZES, Answer, client, of_layers, play, start, told, work
from tests.unit.test_flows_fibecfed_device import drive

GAP = Spectral(np.array([0.0, 0.1, 3.0]), np.array([0.5, 0.1, 0.4]), 0.25)
"""The first gap above 4ℒ = 1 is the second one; 0.6 of the spectrum lies below."""

NO_GAP = Spectral(np.array([0.0, 0.1, 3.0]), np.array([0.5, 0.1, 0.4]), 0.75)


def inspected(method: FibecFed, spectral: Spectral | None):
    """Device 1 after scoring: its items, its update, and the device."""
    c = client(1)
    results = [np.array([0.1, 0.2, 0.3, 0.4]), *([] if spectral is None else [spectral])]
    (score, items), update = work(method.inspect(c, ask(method.inspect, 1, start())), np.arange(len(c.train), dtype=np.float64), results)
    assert isinstance(score, Score)
    return items, update, c


@pytest.mark.parametrize("method", [FibecFed(gal=Gal(lossless=True)), FibecFed(keep_lossless=True, lossless_probes=3)])
@pytest.mark.parametrize(("spectral", "tells"), [(GAP, [0.6, 1.0]), (NO_GAP, [0.0, 0.0])])
def test_a_device_tells_what_its_spectrum_lets_be_pruned(method: FibecFed, spectral: Spectral, tells: list[float]) -> None:
    items, update, c = inspected(method, spectral)
    asked = items[1]
    assert isinstance(asked, Spectrum)
    assert asked.batch.tolist() == method.inner.cut(c, "batches")[0].tolist()
    assert asked.over is None
    assert (asked.probes, asked.steps, asked.radius) == (method.lossless_probes, 32, 0.05)
    assert asked.seed == derive_int(c.seed, "spectrum", 1)
    assert set(asked.at) == set(start())
    assert update.tensors["prunable"].tolist() == pytest.approx(tells)
    assert ("prunable" in c.memory) == bool(tells[1])


def test_nobody_pays_for_a_spectrum_that_nobody_asked_for() -> None:
    items, update, _ = inspected(FibecFed(), None)
    assert [type(item) for item in items] == [Sensitivity]
    assert set(update.tensors) == {"layer_scores"}


def told_of(prunable: dict[int, float]) -> Answer:
    """Devices whose spectra have these shares (one that is not named has no gap)."""

    def answer(task: Task) -> Update:
        update = replace(told(replace(task, client=task.client % 4)), client=task.client)
        if task.op != "inspect":
            return update
        share = [prunable[task.client], 1.0] if task.client in prunable else [0.0, 0.0]
        return replace(update, tensors={**update.tensors, "prunable": torch.tensor(share, dtype=torch.float64)})

    return answer


def chosen(gal: Gal, prunable: dict[int, float], keep_lossless: bool = False, pool: Pool = POOL) -> tuple[list[int], object]:
    """The GAL and what is told of it when the devices answer with these shares."""
    begun = State(0, start(), facts={"depth": 4})
    _, state = play(FibecFed(gal=gal, keep_lossless=keep_lossless).setup(begun, pool), told_of(prunable))
    return state.facts["gal"], state.facts.get("lossless")


def test_the_complement_of_the_mean_prunable_share_is_global() -> None:
    everyone = {0: 0.9, 1: 0.5, 2: 0.6, 3: 0.2}
    mean = sum(SIZES[k] * share for k, share in everyone.items()) / sum(SIZES.values())
    assert 0.5 < mean < 0.75  # so two of the four layers
    gal, facts = chosen(Gal(lossless=True, fraction=1.0), everyone)
    assert gal == [1, 2]
    assert facts == {"prunable": pytest.approx(mean), "examples_on_devices_with_a_gap": pytest.approx(1.0)}


def test_as_many_layers_are_chosen_anew_as_the_spectra_allowed() -> None:
    method = FibecFed(gal=Gal(lossless=True, fraction=1.0, refresh=1))
    _, state = play(method.setup(State(0, start(), facts={"depth": 4}), POOL), told_of({0: 0.9, 1: 0.5, 2: 0.6, 3: 0.2}))
    assert state.facts["gal"] == [1, 2]
    moved = torch.tensor([0.9, 0.4, 0.3, 0.1], dtype=torch.float64)

    def answer(task: Task) -> Update:
        update = told(task)
        return replace(update, tensors={"layer_scores": moved}) if task.op == "rescore" else update

    (rescored, *_), state = play(method.round(replace(state, round=1), POOL), answer)
    assert {task.op for task in rescored} == {"rescore"}
    assert state.facts["gal"] == [2, 3]


def test_devices_without_a_gap_do_not_count_and_none_with_one_means_the_fraction() -> None:
    gal, facts = chosen(Gal(lossless=True, fraction=1.0), {1: 0.2})
    assert len(gal) == 4  # ceil(0.8 * 4)
    found = {"prunable": pytest.approx(0.2), "examples_on_devices_with_a_gap": pytest.approx(SIZES[1] / sum(SIZES.values()))}
    assert facts == {**found, "without_a_gap": f"3 of 4 {GAPLESS}; used instead: what the others tell"}
    gal, facts = chosen(Gal(lossless=True, fraction=0.5), {})
    assert len(gal) == 2
    assert facts == {"without_a_gap": f"4 of 4 {GAPLESS}; used instead: fraction 0.5"}
    assert len(chosen(Gal(lossless=True), {0: 1.0, 1: 1.0, 2: 1.0, 3: 1.0})[0]) == 1, "at least one layer is global"


GAPLESS = "devices have no gap above 4ℒ in their Hessian's spectrum"


@pytest.mark.parametrize(
    ("gal", "keep_lossless", "prunable", "said"),
    [
        (Gal(lossless=True, fraction=0.5), True, {}, "4 of 4 {}; used instead: fraction 0.5, keep 0.95"),
        (Gal(lossless=True, count=3), True, {}, "4 of 4 {}; used instead: count 3, keep 0.95"),
        (Gal(fraction=0.5), True, {}, "4 of 4 {}; used instead: keep 0.95"),
        (Gal(lossless=True, fraction=0.5), True, {0: 0.5, 2: 0.5}, "2 of 4 {}; used instead: keep 0.95"),
        (Gal(lossless=True), True, dict.fromkeys(range(4), 0.5), ""),
    ],
    ids=["a fraction", "a count", "the mask's", "on some devices", "nothing to tell"],
)
def test_what_is_used_where_there_is_no_gap_is_told_with_its_value(
    gal: Gal, keep_lossless: bool, prunable: dict[int, float], said: str, caplog: pytest.LogCaptureFixture
) -> None:
    _, facts = chosen(gal, prunable, keep_lossless)
    due = said.format(GAPLESS)
    assert facts.get("without_a_gap", "") == due  # type: ignore[attr-defined]
    assert [record.getMessage() for record in caplog.records] == ([f"fibecfed: {due}"] if said else [])


def test_a_mask_alone_may_be_lossless() -> None:
    gal, facts = chosen(Gal(fraction=0.5), {0: 0.9, 1: 0.9, 2: 0.9, 3: 0.9}, keep_lossless=True)
    assert len(gal) == 2
    assert facts == {"prunable": pytest.approx(0.9), "examples_on_devices_with_a_gap": pytest.approx(1.0)}


@pytest.mark.parametrize(("spectral", "kept"), [(GAP, 2), (NO_GAP, 3)])  # of four neurons: ceil(0.4 * 4), else ceil(0.75 * 4)
def test_the_mask_keeps_what_the_devices_own_spectrum_says(spectral: Spectral, kept: int) -> None:
    method = FibecFed(FedAvg(batch_size=4), keep=0.75, keep_lossless=True)
    _, _, c = inspected(method, spectral)
    drive(method.adopt(c, ask(method.adopt, 1, gal=[1, 3])))
    rows = rows_kept(c)
    assert set(rows) == {n for n in of_layers(0, 2) if "lora_B" in n}
    total = sum(len(kept) for kept in rows.values())
    assert total == 2 * (4 if kept == 2 else 6)  # two modules a layer are ranked together


@pytest.mark.parametrize("share", [1.0, 1.0 + 1e-15, 1 - 1e-13, 0.999])
def test_of_a_spectrum_that_may_be_pruned_whole_a_row_of_each_layer_is_kept(share: float) -> None:
    """Weights above the gap that are nothing but rounding; and a share of eight neurons that is less than one."""
    whole = Spectral(np.array([0.0, 3.0]), np.array([share, 1 - share]), 0.25)
    method = FibecFed(FedAvg(batch_size=4), keep_lossless=True)
    _, _, c = inspected(method, whole)
    assert float(c.memory["prunable"]) == share
    drive(method.adopt(c, ask(method.adopt, 1, gal=[1, 3])))
    rows = rows_kept(c)
    assert {layer: sum(len(kept) for name, kept in rows.items() if f".{layer}." in name) for layer in (0, 2)} == {0: 1, 2: 1}


def test_under_a_rule_of_aggregation_the_share_is_that_rule_over_the_devices_that_have_a_gap() -> None:
    """Of four one has none: the median of .9, .5 and .6, and not that of these and a zero."""
    pool = replace(POOL, aggregation=Aggregation("median"))
    _, facts = chosen(Gal(lossless=True, fraction=1.0), {0: 0.9, 1: 0.5, 2: 0.6}, pool=pool)
    found = {"prunable": pytest.approx(0.6), "examples_on_devices_with_a_gap": pytest.approx(26 / 33)}
    assert facts == {**found, "without_a_gap": f"1 of 4 {GAPLESS}; used instead: what the others tell"}


TWELVE = Pool(tuple(range(12)), 10, 8, 5, Aggregation("median"))
"""Of a cohort of ten, the rule takes two to be hostile, and needs five."""


def test_a_rule_that_too_few_devices_with_a_gap_can_hold_decides_nothing() -> None:
    """Two of three could then say what they like: it is as if there were no gap, and told."""
    gal, facts = chosen(Gal(lossless=True, fraction=0.5), {0: 0.9, 1: 0.5, 2: 0.6}, pool=TWELVE)
    assert len(gal) == 2
    few = "3 with one are too few for aggregation 'median', which needs 5"
    assert facts == {"without_a_gap": f"9 of 12 {GAPLESS}, and {few}; used instead: fraction 0.5"}
    gal, facts = chosen(Gal(fraction=0.5), {0: 0.9, 1: 0.5, 2: 0.6}, True, TWELVE)
    assert facts == {"without_a_gap": f"9 of 12 {GAPLESS}, and {few}; used instead: keep 0.95"}
    gal, facts = chosen(Gal(lossless=True, fraction=0.5), {0: 0.1, 1: 0.1, 2: 0.1, 3: 0.1, 4: 0.9}, pool=TWELVE)
    assert len(gal) == 4 and facts["prunable"] == pytest.approx(0.1)  # type: ignore[index]
    _, facts = chosen(Gal(lossless=True, fraction=0.5), {}, pool=TWELVE)
    assert facts == {"without_a_gap": f"12 of 12 {GAPLESS}; used instead: fraction 0.5"}


def test_what_spectra_tell_does_not_move_the_layers_that_a_rule_chooses() -> None:
    """Krum takes the scores of the device that is nearest to the others, device 0's, also when it alone has no gap."""
    pool = Pool(tuple(range(8)), 8, 8, 5, Aggregation("krum"))
    scores = np.array([0.3, 0.31, 0.32, 0.33]) + 0.1 * np.vstack([np.zeros((1, 4)), np.eye(4), -np.eye(4)[:3]])

    def answer(task: Task) -> Update:
        found = {"layer_scores": torch.from_numpy(scores[task.client])} if task.op == "inspect" else {}
        share = torch.tensor([0.5, 1.0] if task.client else [0.0, 0.0], dtype=torch.float64)
        return Update(task.client, 5, found | ({"prunable": share} if found and keep_lossless else {}))

    for keep_lossless in (False, True):
        method = FibecFed(curriculum=Curriculum(head="as-is"), gal=Gal(count=2), keep_lossless=keep_lossless)
        _, state = play(method.setup(State(0, start(), facts={"depth": 4}), pool), answer)
        assert state.facts["gal"] == [0, 1], keep_lossless
        assert state.facts["layer_scores"] == pytest.approx(scores[0])
