"""Methods and curricula are found by their names, and what a method says of itself is heard or refused."""

from __future__ import annotations

import sys
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType
from typing import Any, ClassVar

import pytest

from fedloom.finding import found_below
from fedloom.methods import methods_in
from fedloom.methods.fedavg import FedAvg
from fedloom.methods.fedbavg import FedBAvg
from fedloom.methods.fedcybgd import FedCyBGD
from fedloom.methods.federa import FeDeRA
from fedloom.methods.fibecfed import FibecFed, Gal
from fedloom.methods.finetuned import FineTuned
from fedloom.methods.kinds import FedFFT
from fedloom.methods.method import SAYS, parts, says
from fedloom.methods.slora import SLora
from fedloom.run.comparison.plan import trains_as
from fedloom.run.errors import ExperimentError
from fedloom.run.experiment import Experiment
from fedloom.run.late import may_join_late
from fedloom.run.recipes import resolve
from fedloom.run.world import adapter_of

ONE = """
from dataclasses import dataclass
@dataclass(frozen=True)
class {kind}:
    name = "{name}"
    paper = "nobody's"
    {more}
"""


@dataclass(frozen=True)
class OfFedFFT(FedFFT):
    name: ClassVar[str] = "of-fedfft"


@dataclass(frozen=True)
class OfFedCyBGD(FedCyBGD):
    name: ClassVar[str] = "of-fedcybgd"


@dataclass(frozen=True)
class OfFeDeRA(FeDeRA):
    name: ClassVar[str] = "of-federa"


@dataclass(frozen=True)
class OfFineTuned(FineTuned):
    name: ClassVar[str] = "of-finetuned"


@dataclass(frozen=True)
class Outer:
    inner: FedBAvg = field(default_factory=FedBAvg)


def test_two_files_that_define_the_same_name_are_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whichever of the two was trained, it might be the other one that was meant."""
    package = tmp_path / "two_of_a_name"
    package.mkdir()
    for file, kind, name in (("__init__", "", ""), ("a", "First", "mine"), ("b", "Second", "mine"), ("c", "Third", "other")):
        (package / f"{file}.py").write_text(ONE.format(kind=kind, name=name, more="") if kind else "", encoding="utf-8")
    monkeypatch.syspath_prepend(str(tmp_path))
    with pytest.raises(ValueError, match=r"two are called 'mine': First in two_of_a_name\.a and Second in two_of_a_name\.b; give one"):
        found_below("two_of_a_name", [str(package)])
    (package / "b.py").write_text("from two_of_a_name.a import First\nSame = First\n", encoding="utf-8")
    for name in [name for name in sys.modules if name.startswith("two_of_a_name")]:
        del sys.modules[name]
    assert {n: kind.__name__ for n, kind in found_below("two_of_a_name", [str(package)]).items()} == {"mine": "First", "other": "Third"}


def test_a_file_that_defines_a_name_twice_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "mine.py"
    file.write_text(ONE.format(kind="First", name="mine", more="") + ONE.format(kind="Second", name="mine", more=""), encoding="utf-8")
    with pytest.raises(ExperimentError, match=r"mine\.py: two are called 'mine': First in .* and Second in "):
        resolve(str(file))


@pytest.mark.parametrize("more", ["adapter_knd = 'full'", "join_late = True"])
def test_what_a_method_says_of_itself_and_nobody_hears_is_refused(more: str, tmp_path: Path) -> None:
    file, said = tmp_path / "mine.py", more.split(" ")[0]
    file.write_text(ONE.format(kind="Mine", name="mine", more=more), encoding="utf-8")
    with pytest.raises(ExperimentError, match=rf"Mine says {said} of itself, .*it may say {', '.join(SAYS)}"):
        resolve(str(file))


def test_settings_and_constants_are_not_what_a_method_says_of_itself() -> None:
    module: Any = ModuleType("mine")

    @dataclass(frozen=True)
    class Mine:
        name: ClassVar[str] = "mine"
        paper: ClassVar[str] = "nobody's"
        LEAST: ClassVar[bool] = True
        which: str = "least"
        whole: bool = False

    Mine.__module__, module.Mine = "mine", Mine
    assert methods_in(module) == {"mine": Mine}


def test_what_a_method_says_holds_for_those_that_are_made_from_it() -> None:
    assert Experiment(OfFedFFT()).trained.kind == "full" and Experiment(FedAvg()).trained.kind == "lora"
    assert Experiment(OfFedCyBGD(), cohort=3).asked == 1 and Experiment(OfFedCyBGD(inner=FedAvg()), cohort=3).trained.kind == "full"
    assert adapter_of(Experiment(OfFeDeRA())).start == "svd" and adapter_of(Experiment(FedAvg())).start == "zero"
    assert [says(kind, "rounds_differ") for kind in (OfFedCyBGD(), SLora(), FedAvg(), FibecFed(), FibecFed(gal=Gal(refresh=2)))] == [
        *(True, True, False),
        *(False, True),
    ]
    with pytest.raises(KeyError):
        says(FedAvg(), "adapter_knd")


def test_what_a_method_is_allowed_it_says_itself() -> None:
    """Devices that come late, and a training that is another method's: what is added may make either untrue."""
    assert may_join_late(FedFFT()) and not may_join_late(OfFedFFT())
    assert trains_as(FineTuned()) == "lora" and trains_as(OfFineTuned()) == ""
    assert may_join_late(FibecFed()) and not may_join_late(FibecFed(gal=Gal(refresh=2)))


def test_the_way_down() -> None:
    outer = Outer()
    assert list(parts(outer)) == [outer, outer.inner, outer.inner.inner, outer.inner.inner.inner]
    assert list(parts(FedAvg())) == [FedAvg()]
