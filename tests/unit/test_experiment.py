"""The configuration: written and read without loss, refused when it makes no sense, and its digest says what decides a result."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from typing import Any, ClassVar

import pytest

from fedloom.client.curricula.everything import Everything
from fedloom.client.curricula.fisher import ByFisher
from fedloom.client.curricula.slw import LengthWarmup
from fedloom.client.curricula.voc import ByRarity
from fedloom.methods import all_methods, named
from fedloom.methods.fedalt_partial import FedAltPartial
from fedloom.methods.fedavg import FedAvg
from fedloom.methods.fedcybgd import FedCyBGD
from fedloom.methods.fibecfed import Curriculum, FibecFed, Gal
from fedloom.methods.finetuned import FineTuned
from fedloom.methods.prior import PriorCorrected
from fedloom.model.adapters import Adapter
from fedloom.run.errors import ExperimentError
from fedloom.run.experiment import EngineSettings, Experiment, as_json, as_meant, completed, first_difference, from_json
from fedloom.server.masks import Mask
from fedloom.server.optimizers import ServerStep

RICH = Experiment(
    FibecFed(
        FedAvg(lr=1e-3, local_epochs=3), Curriculum(0.5, 0.7, "sqrt", "example", 4, "left-out", 1), Gal(0.5, 2, "most", 0.1, "norms"), 0.9
    ),
    adapter=Adapter(4, 8.0, ("query", "key"), 0.1),
    text=("a", "b"),
    label="y",
    metric="f1",
    precision="bf16",
    engine=EngineSettings("flower", 3, 2),
)


@pytest.mark.parametrize("experiment", [*(Experiment(kind()) for kind in all_methods().values()), RICH], ids=[*all_methods(), "rich"])
def test_json_round_trip(experiment: Experiment) -> None:
    text = json.dumps(as_json(experiment))
    again = from_json(json.loads(text))
    assert again == experiment
    assert json.dumps(as_json(again)) == text
    assert again.digest() == experiment.digest()


def test_a_field_that_came_later_means_its_default() -> None:
    new = as_json(RICH)
    old = json.loads(json.dumps(new))
    del old["max_length"], old["method"]["gal"], old["engine"]["workers"]
    filled = dataclasses.replace(
        RICH,
        max_length=128,
        method=dataclasses.replace(RICH.method, gal=Gal()),  # type: ignore[type-var]
        engine=dataclasses.replace(RICH.engine, workers=EngineSettings().workers),
    )
    assert completed(old) == as_meant(filled) != old
    assert completed(new) == as_meant(from_json(new))
    assert completed({**new, "unheard": 1}) == {**new, "unheard": 1}, "what is no experiment is left as it is, to be told where it is used"


CURRICULA = {
    "lora+voc": FedAvg(curriculum=ByRarity(0.2, 0.5)),
    "lora-finetuned+slw": FineTuned(FedAvg(curriculum=LengthWarmup(5))),
    "fibecfed+fisher": FibecFed(curriculum=ByFisher(0.1, over="all")),
    "fibecfed+none": FibecFed(curriculum=Everything()),
}


@pytest.mark.parametrize("name", CURRICULA)
def test_a_curriculum_is_part_of_the_experiment(name: str) -> None:
    method = CURRICULA[name]
    experiment = Experiment(method)
    again = from_json(json.loads(json.dumps(as_json(experiment))))
    assert again == experiment
    assert (again.digest(), again.method_name) == (experiment.digest(), name)
    assert experiment.digest() not in {Experiment(other).digest() for other in (type(method)(), *CURRICULA.values()) if other != method}


def test_a_methods_own_curriculum_has_no_name_and_needs_none() -> None:
    assert "name" not in as_json(RICH)["method"]["curriculum"]
    assert as_json(RICH)["method"]["inner"]["curriculum"] == {"name": "none"}
    assert [Experiment(kind()).method_name for kind in all_methods().values()] == list(all_methods())
    before = as_json(RICH)  # as written before curricula were values
    del before["method"]["inner"]["curriculum"]
    assert from_json(before) == RICH


def test_an_unknown_curriculum_lists_those_there_are() -> None:
    with pytest.raises(ValueError, match="no curriculum 'vok'; there are fisher, loss, none, shortformer, slw, voc"):
        from_json(changed(method={"name": "lora", "curriculum": {"name": "vok"}}))
    with pytest.raises(ExperimentError, match=r"curriculum has no fields \['pacing'\]; it has \['full_at', 'start'\]"):
        from_json(changed(method={"name": "lora", "curriculum": {"name": "voc", "pacing": "sqrt"}}))
    with pytest.raises(ExperimentError, match="curriculum is 'voc'; it must be"):
        from_json(changed(method={"name": "lora", "curriculum": "voc"}))


def test_a_method_carries_its_name_in_json_at_every_depth() -> None:
    saved = as_json(RICH)
    assert saved["method"]["name"] == "fibecfed"
    assert saved["method"]["inner"]["name"] == "lora"
    assert saved["method"]["gal"]["which"] == "most"
    assert RICH.method_name == "fibecfed"


def other(value: Any) -> Any:
    """Another valid value of the same kind."""
    match value:
        case bool():
            return not value
        case int():
            return value + 1
        case float():
            return value * 0.75 or 0.5
        case str():
            return {
                "float32": "bf16",
                "auto": "mcc",
                "jetson": "phone",
                "mean": "median",
                "exact": "int8",
                "adam": "yogi",
                "least": "most",
            }.get(value, value + "x")
        case tuple():
            return (*value, "z")
    raise AssertionError(value)


def variants(value: Any) -> list[tuple[str, Any]]:
    """Every way to change one field of a dataclass, at any depth."""
    found = []
    for field in dataclasses.fields(value):
        inner = getattr(value, field.name)
        if dataclasses.is_dataclass(inner):
            found += [(f"{field.name}.{name}", dataclasses.replace(value, **{field.name: made})) for name, made in variants(inner)]
        else:
            found.append((field.name, dataclasses.replace(value, **{field.name: other(inner)})))
    return found


def test_the_digest_ignores_the_engine_and_changes_with_any_other_field() -> None:
    base = Experiment(FibecFed(), head="cloze", server=ServerStep("adam"))
    digests = {"": base.digest()}
    for name, changed in variants(base):
        if name.startswith("engine."):
            assert changed != base and changed.digest() == base.digest(), name
            continue
        assert changed.digest() not in digests.values(), f"{name} does not change the digest"
        digests[name] = changed.digest()
    assert len(digests) > 35
    assert len({Experiment(kind()).digest() for kind in all_methods().values()}) == len(all_methods())


def test_the_digest_is_the_same_in_every_process_and_release() -> None:
    assert len(base := Experiment(FedAvg()).digest()) == 16
    assert base == Experiment(FedAvg(), engine=EngineSettings("flower", 4, 1)).digest()
    assert base == Experiment(FedAvg(), engine=EngineSettings(workers=4, recompute=True)).digest()


def test_an_experiment_of_before_takes_the_aggregate_over() -> None:
    before = {name: value for name, value in as_json(RICH).items() if name != "server"}
    assert from_json(before).server == ServerStep() and ServerStep().optimizer is None
    stepping = Experiment(FedAvg(), server=ServerStep("yogi", 0.1))
    assert from_json(json.loads(json.dumps(as_json(stepping)))) == stepping
    wrongs: list[tuple[dict[str, Any], str]] = [
        ({"lr": 0.1}, "lr 0.1 is a server optimiser's, and the rule is none; give one of"),
        ({"rule": "sgd"}, "no server optimiser 'sgd'; there are momentum"),
    ]
    for wrong, said in wrongs:
        with pytest.raises(ValueError, match=said):
            ServerStep(**wrong)


def test_first_difference_names_the_field_and_both_values() -> None:
    saved = as_json(Experiment(FibecFed()))
    assert first_difference(saved, saved) is None
    wanted = as_json(Experiment(FibecFed(gal=Gal(which="most")), rounds=7))
    assert first_difference(saved, wanted) == "method.gal.which is 'least' there and 'most' here"
    assert first_difference(saved, as_json(Experiment(FibecFed(), rounds=7))) == "rounds is 20 there and 7 here"
    assert first_difference({**saved, "old": 1}, saved) == "old is 1 there and 'absent' here"
    assert first_difference({k: v for k, v in saved.items() if k != "alpha"}, saved) == "alpha is 'absent' there and 1.0 here"
    assert str(first_difference(saved, as_json(Experiment(FedAvg())))).startswith("method.name is 'fibecfed' there and 'lora' here")


def changed(**fields: Any) -> dict[str, Any]:
    return {**as_json(Experiment(FibecFed())), **fields}


BAD_JSON = {
    "an unknown field": (changed(speed=3), r"the experiment has no fields \['speed'\]; it has \['adapter', 'aggregation', 'alpha'"),
    "no method": (changed(method=None), "names no method"),
    "a nameless method": (changed(method={"lr": 1.0}), "names no method"),
    "an unknown method field": (
        changed(method={"name": "lora", "rate": 1}),
        r"method lora has no fields \['rate'\]; it has \['batch_by_memory', 'batch_size'",
    ),
    "an unknown nested field": (changed(adapter={"r": 8}), r"adapter has no fields \['r'\]"),
    "text for a number": (changed(rounds="ten"), "rounds is 'ten'; it must be int"),
    "a fraction for a count": (changed(rounds=2.5), "rounds is 2.5; it must be int"),
    "true for a number": (changed(rounds=True), "rounds is True; it must be int"),
    "true for a float": (changed(alpha=True), "alpha is True; it must be float"),
    "an unknown choice": (changed(precision="fp8"), "precision is 'fp8'; it must be"),
    "a string for a tuple": (changed(text="question"), "text is 'question'"),
    "a list for a text": (changed(text=[["a"]]), r"text\[0\] is \['a'\]; it must be str"),
    "nothing for a text": (changed(label_words=["a", None]), r"label_words\[1\] is None; it must be str"),
    "a number for a target": (changed(adapter={"targets": [1]}), r"adapter: targets\[0\] is 1; it must be str"),
    "a text for a rank": (changed(method={"name": "hetlora", "ranks": ["8"]}), r"ranks\[0\] is '8'; it must be int"),
    "a number for a part": (changed(adapter=3), "adapter is 3; it must be Adapter"),
}


@pytest.mark.parametrize(("saved", "says"), BAD_JSON.values(), ids=BAD_JSON)
def test_json_that_is_no_experiment(saved: dict[str, Any], says: str) -> None:
    with pytest.raises(ExperimentError, match=says):
        from_json(saved)


@dataclasses.dataclass(frozen=True)
class Fields:
    """A method of somebody's own."""

    name: ClassVar[str] = "fields"
    two: tuple[float, str] = (0.0, "")
    parts: tuple[Gal, ...] = ()
    maybe: float | None = None
    either: float | int | str = 0


def test_every_item_of_a_tuple_and_every_choice_of_a_union_is_checked() -> None:
    def read(**fields: Any) -> Fields:
        return from_json(changed(method={"name": "fields", **fields}), {"fields": Fields}).method

    assert read(two=[1, "a"], parts=[{"rho": 0.5}], maybe=2.0, either=3) == Fields((1.0, "a"), (Gal(rho=0.5),), 2.0, 3)
    assert isinstance(read(either=3).either, int) and isinstance(read(maybe=3).maybe, float) and read(maybe=None).maybe is None
    filled = Experiment(Fields(parts=(Gal(), Gal(which="most")), maybe=0.5))
    assert from_json(json.loads(json.dumps(as_json(filled))), {"fields": Fields}) == filled
    wrongs = {
        r"two\[1\] is 2; it must be str": {"two": [1, 2]},
        r"two is \[1\.0\]; it must be 2 values": {"two": [1.0]},
        r"parts\[0\] has no fields \['r'\]": {"parts": [{"r": 1}]},
        r"maybe is 'a'; it must be float \| None": {"maybe": "a"},
        r"either is \[\]; it must be float \| int \| str": {"either": []},
    }
    for said, fields in wrongs.items():
        with pytest.raises(ExperimentError, match=said):
            read(**fields)


def test_an_unknown_method_lists_those_there_are() -> None:
    with pytest.raises(ValueError, match=f"no method 'fibecfet'; there are {', '.join(all_methods())}"):
        from_json(changed(method={"name": "fibecfet"}))
    with pytest.raises(ValueError, match="no method"):
        named("FibecFed")


def test_a_whole_number_does_for_a_float() -> None:
    assert from_json(changed(alpha=2)).alpha == 2.0
    assert type(from_json(changed(alpha=2)).alpha) is float


def test_a_method_of_ones_own_can_be_given() -> None:
    @dataclasses.dataclass(frozen=True)
    class Mine:
        lr: float = 1.0

    Mine.name = "mine"  # type: ignore[attr-defined]
    assert from_json(changed(method={"name": "mine", "lr": 3}), {"mine": Mine}).method == Mine(3.0)


IMPOSSIBLE = [
    ({"rounds": 0}, "--rounds is 0; it must be at least 1"),
    ({"rounds": -3}, "--rounds is -3; it must be at least 1"),
    ({"clients": 0}, "--clients is 0"),
    ({"cohort": 0}, "--cohort is 0"),
    ({"min_examples": 0}, "--min-examples is 0"),
    ({"max_length": 0}, "--max-length is 0"),
    ({"evaluate_every": -1}, "--evaluate-every is -1; it must be 0 or more"),
    ({"max_train": -1}, "--max-train is -1"),
    ({"alpha": 0.0}, "--alpha is 0.0; a Dirichlet concentration must be positive"),
    ({"beta": -1.0}, "--beta is -1.0"),
    ({"alpha": float("nan")}, "--alpha is nan"),
    ({"cohort": 11, "clients": 10}, "--cohort 11 is more than --clients 10"),
    ({"quorum": 0.0}, "--quorum is 0.0"),
    ({"wire": "int4"}, "--wire int4: no wire 'int4'; there are exact, bf16"),
    ({"wire": "up:int4"}, "--wire up:int4: no wire 'int4'; there are exact, .*each also up alone, as up:bf16"),
    ({"wire": "top-k:0"}, "--wire top-k:0: .* above 0 and at most 1"),
    ({"aggregation": "krumm"}, "--aggregation krumm: no aggregation 'krumm'; there are mean, median"),
    ({"aggregation": "krum", "cohort": 4}, "--aggregation krum: .* wants a cohort of 5 or more"),
    ({"quorum": 1.1}, "--quorum is 1.1"),
    ({"engine": EngineSettings(stack=-1)}, "--engine.stack is -1"),
    ({"engine": EngineSettings(threads=-1)}, "--engine.threads is -1; it must be 0"),
    ({"engine": EngineSettings(workers=-2)}, "--engine.workers is -2"),
    ({"engine": EngineSettings("flower", workers=2)}, "--engine.workers 2 needs --engine.kind local"),
    ({"device": "mainframe"}, r"no device profile 'mainframe'; there are \['jetson'"),
]


@pytest.mark.parametrize(("fields", "says"), IMPOSSIBLE)
def test_impossible_settings(fields: dict[str, Any], says: str) -> None:
    with pytest.raises(ValueError, match=says):
        Experiment(FedAvg(), **fields)


def test_a_kind_that_is_left_to_the_method_is_the_methods() -> None:
    for method, kind in ((FedAvg(), "lora"), (FedCyBGD(), "full")):
        left, named = Experiment(method), Experiment(method, adapter=Adapter(kind=kind))  # type: ignore[arg-type]
        assert as_meant(left) == as_meant(named) == as_json(named) != as_json(left)
        assert completed(as_json(left)) == completed(as_json(named))
    assert Experiment(FedCyBGD(), adapter=Adapter(kind="lora")).trained.kind == "lora"


@pytest.mark.parametrize(
    "saved", [[], None, 3, "x", {"method": {"name": "lora"}, "text": [[[[[[[[[[[[[[[[[["x"]]]]]]]]]]]]]]]]]]}], ids=str
)
def test_what_is_no_experiment_is_refused_as_one(saved: Any) -> None:
    with pytest.raises(ExperimentError, match="nested a few levels at most"):
        from_json(saved)


@pytest.mark.parametrize("alpha", [10**400, -(10**400), 10**301], ids=lambda alpha: f"{alpha.bit_length()} bits")
def test_an_integer_that_no_float_holds_is_refused(alpha: int) -> None:
    with pytest.raises(ExperimentError, match="alpha is"):
        from_json({"method": {"name": "lora"}, "alpha": alpha})


def test_a_base_in_few_bits_that_would_be_trained_is_refused_by_whoever_trains_it() -> None:
    """Before any run of a comparison begins, and naming what was given: nobody gave --adapter.kind where the method has its own."""
    with pytest.raises(
        ExperimentError,
        match=r"base nf4 .* and method 'fedcybgd', which trains kind full, trains numbers of it.*houlsby.*; --method\.rest is what",
    ):
        Experiment(FedCyBGD(), adapter=Adapter(base="nf4"))
    with pytest.raises(ExperimentError, match=r"base int8 .* and --adapter.kind bitfit trains numbers of it; leave one of the two out"):
        Experiment(FedAvg(), adapter=Adapter(kind="bitfit", base="int8"))
    with pytest.raises(ExperimentError, match=r"keep is 0.3 .* and method 'fedcybgd', which trains kind full, has none"):
        Experiment(FedCyBGD(), mask=Mask(0.3))
    assert Experiment(FedCyBGD(), adapter=Adapter(kind="lora", base="nf4")).trained.kind == "lora"


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        ({"lr": -1.0}, "lr is -1.0"),
        ({"lr": float("nan")}, "lr is nan"),
        ({"batch_size": 0}, "batch_size is 0; .* from 1 on"),
        ({"local_epochs": 0}, "local_epochs is 0; .* from 1 on"),
    ],
)
def test_rates_and_batches_that_cannot_be_are_refused(wrong: dict[str, Any], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        FedAvg(**wrong)


@pytest.mark.parametrize(
    ("made", "said"),
    [
        (lambda: FedAltPartial(epochs=0), "epochs is 0; .* 1 or more"),
        (lambda: FedAltPartial(epochs=-1), "epochs is -1; .* 1 or more"),
        (lambda: PriorCorrected(smoothing=0.0), "smoothing is 0.0; it must be positive"),
        (lambda: PriorCorrected(smoothing=float("nan")), "smoothing is nan; it must be positive"),
        (lambda: FineTuned(epochs=-1), "epochs is -1; .* 0 or more"),
    ],
)
def test_numbers_that_would_train_nothing_or_end_in_infinity_are_refused(made: Callable[[], Any], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        made()
    assert FineTuned(epochs=0).epochs == 0
