"""What a comparison runs, and how it chooses rates, on endings made up here."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from fedloom.client.curricula.voc import ByRarity
from fedloom.methods.fedavg import FedAvg
from fedloom.methods.fibecfed import FibecFed
from fedloom.methods.finetuned import FineTuned
from fedloom.methods.local import Local
from fedloom.methods.prior import PriorCorrected
from fedloom.run.comparison.plan import Case, Ended, Plan, data_labels, named_methods
from fedloom.run.errors import ExperimentError
from fedloom.run.experiment import Experiment

BASE = Experiment(FedAvg(), clients=6, cohort=3, rounds=2)


def plan(*methods: Any, **fields: Any) -> Plan:
    grid: dict[str, Any] = {"data": ("trec",), "alphas": (1.0,), "seeds": (1,), "rates": ()}
    return Plan(BASE, named_methods(methods or (FedAvg(), FibecFed())), **{**grid, **fields})


def scored(validation: float | None, test: float = 0.5) -> Ended:
    return Ended({"validation": {"final": {"personalised": validation}, "best": {"personalised": 1.0}}, "final": {"personalised": test}})


DIVERGED, FAILED = Ended(None, "nan", diverged=True), Ended(None, "disk full")


def lr(method: Any) -> float:
    return method.lr if isinstance(method, FedAvg) else method.inner.lr


def test_names_tell_what_there_is_several_of() -> None:
    assert list(plan().wanted({})) == ["lora", "fibecfed"]
    assert list(plan(seeds=(1, 2)).wanted({})) == ["lora-seed1", "fibecfed-seed1", "lora-seed2", "fibecfed-seed2"]
    assert list(plan(FedAvg(), rates=(0.5,)).wanted({})) == ["lora"]
    every = plan(FedAvg(), data=("trec", "a/rte"), alphas=(1.0, 0.1), seeds=(1, 2), rates=(0.5, 0.25)).every()
    names = [run.name for run in every]
    assert len(names) == len(set(names)) == 16
    assert "rte-alpha0.1-lora-lr0.25-seed2" in names


def test_a_run_is_the_base_with_what_its_name_says() -> None:
    made = plan(FibecFed(), data=("trec", "rte"), alphas=(1.0, 0.1), seeds=(1, 2), rates=(0.5, 0.25))
    run = made.run(Case("rte", 0.1), "fibecfed", 0.25, 2)
    assert run.experiment == replace(BASE, method=FibecFed(inner=FedAvg(lr=0.25)), data="rte", alpha=0.1, seed=2)


def test_a_curriculum_is_part_of_the_name() -> None:
    made = plan(FedAvg(), FedAvg(curriculum=ByRarity()), FineTuned(inner=FedAvg(curriculum=ByRarity())), shared=True)
    runs = made.wanted({})
    assert list(runs) == ["lora", "lora+voc", "lora-finetuned+voc"]
    assert runs["lora-finetuned+voc"].trained == "lora+voc"
    with pytest.raises(ExperimentError, match=r"named twice: lora\+voc"):
        plan(FedAvg(curriculum=ByRarity()), FedAvg(curriculum=ByRarity()))


def test_without_rates_every_method_keeps_its_own() -> None:
    assert [lr(run.experiment.method) for run in plan(FedAvg(lr=0.7), FibecFed()).wanted({}).values()] == [0.7, FibecFed().inner.lr]


def test_every_rate_is_run_with_the_first_seed_only_and_the_best_by_validation_with_all() -> None:
    made = plan(FedAvg(), Local(), seeds=(7, 8, 9), rates=(0.1, 0.2, 0.3))
    searches = made.wanted({})
    assert list(searches) == [f"{m}-lr{r}-seed7" for m in ("lora", "local") for r in (0.1, 0.2, 0.3)]
    ended = {"lora-lr0.1-seed7": scored(0.6, 0.9), "lora-lr0.2-seed7": scored(0.8, 0.1), "lora-lr0.3-seed7": scored(0.7, 0.5)}
    assert list(made.wanted(ended))[6:] == ["lora-lr0.2-seed8", "lora-lr0.2-seed9"], "the test score has no part in it"
    assert [run.name for run in made.chosen(made.cases[0], "lora", ended)] == [f"lora-lr0.2-seed{s}" for s in (7, 8, 9)]
    assert made.chosen(made.cases[0], "local", ended) == []
    assert made.expected({}) == made.expected(ended) == 2 * (3 + 2)


def test_of_equals_the_first_named_is_chosen() -> None:
    made = plan(FedAvg(), rates=(0.3, 0.1, 0.2))
    ended = {f"lora-lr{r}": scored(0.5) for r in (0.3, 0.1, 0.2)}
    assert made.choice(made.cases[0], "lora", ended).rate == 0.3


def test_a_rate_without_a_validation_score_cannot_win() -> None:
    made = plan(FedAvg(), rates=(0.1, 0.2))
    for other, wanted in ((0.3, 0.2), (None, None)):
        choice = made.choice(made.cases[0], "lora", {"lora-lr0.1": scored(None, 0.9), "lora-lr0.2": scored(other)})
        assert (choice.rate, choice.made, choice.tried) == (wanted, wanted is not None, {0.1: None, 0.2: other})


def test_each_case_is_searched_by_itself() -> None:
    made = plan(FedAvg(), alphas=(1.0, 0.1), rates=(0.1, 0.2))
    ended = {"alpha1.0-lora-lr0.1": scored(0.9), "alpha1.0-lora-lr0.2": scored(0.1)}
    ended |= {"alpha0.1-lora-lr0.1": scored(0.1), "alpha0.1-lora-lr0.2": scored(0.9)}
    assert [made.choice(case, "lora", ended).rate for case in made.cases] == [0.1, 0.2]


def test_a_rate_that_diverged_cannot_win_and_one_that_failed_leaves_the_search_open() -> None:
    made = plan(FedAvg(), seeds=(1, 2), rates=(0.1, 0.2))
    for other, wanted in ((DIVERGED, 0.1), (FAILED, None)):
        choice = made.choice(made.cases[0], "lora", {"lora-lr0.1-seed1": scored(0.3), "lora-lr0.2-seed1": other})
        assert (choice.rate, choice.made) == (wanted, wanted is not None)
        assert choice.tried == {0.1: 0.3, 0.2: None}
    both = {f"lora-lr{r}-seed1": DIVERGED for r in (0.1, 0.2)}
    assert not made.choice(made.cases[0], "lora", both).made
    assert (made.expected({}), made.expected(both)) == (3, 2)


def test_shared_training_runs_what_is_held_first_and_at_every_rate_that_is_needed() -> None:
    made = plan(FedAvg(), PriorCorrected(), FineTuned(), seeds=(1, 2), rates=(0.1, 0.2), shared=True)
    first = made.wanted({})
    assert list(first) == [f"{m}-lr{r}-seed1" for m in ("lora", "lora-prior", "lora-finetuned") for r in (0.1, 0.2)]
    assert (first["lora-prior-lr0.2-seed1"].trained, first["lora-lr0.2-seed1"].trained) == ("lora-lr0.2-seed1", "")
    ended = {name: scored(0.5 if "lr0.1" in name or name.startswith("lora-lr") else 0.9) for name in first}
    assert list(made.wanted(ended))[6:] == [
        *("lora-lr0.1-seed2", "lora-lr0.2-seed2", "lora-prior-lr0.2-seed2", "lora-finetuned-lr0.2-seed2")
    ], "lora itself chose the first rate; the others need the second"
    assert made.wanted(ended)["lora-lr0.2-seed2"].experiment.method == FedAvg(lr=0.2)


def test_shared_training_needs_no_place_in_the_table_and_no_other_settings() -> None:
    alone = plan(PriorCorrected(), shared=True)
    assert list(alone.wanted({})) == ["lora", "lora-prior"]
    with pytest.raises(ExperimentError, match="'lora-prior' holds 'lora' with other settings"):
        plan(FedAvg(local_epochs=5), PriorCorrected(), shared=True)
    assert not any(run.trained for run in plan(FedAvg(), PriorCorrected()).every())
    assert not any(run.trained for run in plan(FibecFed(), Local(), shared=True).every()), "those train by themselves"


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"rates": (0.1, -1.0)}, r"positive and finite; -1.0 came among \[0.1, -1.0\]"),
        ({"rates": (float("nan"),)}, "positive and finite"),
        ({"rates": (float("inf"), 0.1)}, "positive and finite"),
        ({"rates": (0.1, 0.1)}, "learning rate named twice: 0.1"),
        ({"seeds": (1, 1)}, "seed named twice: 1"),
        ({"alphas": (0.1, 0.1)}, "alpha named twice"),
        ({"alphas": (0.1, 0.0)}, "--alpha is 0.0"),
        ({"data": ("a", "a")}, "data set named twice: a"),
        ({"data": ()}, "a data set"),
    ],
)
def test_a_grid_that_makes_no_sense_is_refused(fields: dict[str, Any], said: str) -> None:
    with pytest.raises(ExperimentError, match=said):
        plan(**fields)


def test_alphas_need_label_skew() -> None:
    with pytest.raises(ExperimentError, match="no meaning with --partition iid"):
        Plan(replace(BASE, partition="iid"), {"lora": FedAvg()}, ("trec",), (1.0, 0.1), (1,))


def test_data_sets_have_short_names_that_differ() -> None:
    assert data_labels(["trec", "a/rte", "b/my set"]) == {"trec": "trec", "a/rte": "rte", "b/my set": "my-set"}
    assert data_labels(["a/rte", "b/rte"]) == {"a/rte": "a-rte", "b/rte": "b-rte"}
    with pytest.raises(ExperimentError, match="cannot be told apart"):
        data_labels(["a b", "a-b"])
