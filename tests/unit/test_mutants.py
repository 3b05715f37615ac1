"""Every mutant on the list still fits the source, and a misfit is told. (That the runner judges right: tests/integration.)"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path

import pytest

from tools.mutants import LEAST, LIST, ROOT, TIMES, Misfit, Mutant, corrupted, judge, patience, read

MINUS = Mutant("minus", "adds by subtracting", "arithmetic.py", "a + b", "a - b", ("tests/test_good.py",))


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"file": "gone.py"}, "no file gone.py"),
        ({"old": "a * b"}, "occurs 0 times"),
        ({"old": "a"}, "must occur exactly once"),
        ({"new": "a + b"}, "the same text"),
        ({"new": "a +"}, "not Python"),
    ],
)
def test_a_misfit_says_why(tmp_path: Path, change: dict[str, str], said: str) -> None:
    (tmp_path / "src").mkdir()
    (tmp_path / "src" / "arithmetic.py").write_text("def add(a, b):\n    return a + b\n")
    misfit = dataclasses.replace(MINUS, **change)
    with pytest.raises(Misfit, match=said):
        corrupted(misfit, tmp_path / "src")
    assert judge(misfit, tmp_path, 1.0).verdict == "DOES NOT APPLY"


def test_patience_goes_by_what_the_files_took_before() -> None:
    both = dataclasses.replace(MINUS, tests=("tests/test_good.py::test_one", "tests/test_good.py::test_two", "tests/test_other.py"))
    assert patience(both, {"tests/test_good.py": 40.0, "tests/test_other.py": 10.0, "tests/test_third.py": 900.0}) == TIMES * 50
    assert patience(MINUS, {"tests/test_good.py": 0.1}) == LEAST


@pytest.mark.parametrize("text", ['[[mutant]]\nid = "a"', '[[mutant]]\nid="a"\nsays=""\nfile=""\nold=""\nnew=""\ntests=[]\nx=1'])
def test_an_incomplete_entry_is_refused(tmp_path: Path, text: str) -> None:
    (tmp_path / "mutants.toml").write_text(text)
    with pytest.raises(ValueError, match="mutant 'a' has fields"):
        read(tmp_path / "mutants.toml")


def test_an_id_stands_for_one_mutant(tmp_path: Path) -> None:
    entry = '[[mutant]]\nid = "a"\nsays = ""\nfile = ""\nold = ""\nnew = ""\ntests = []\n'
    (tmp_path / "mutants.toml").write_text(entry * 2)
    with pytest.raises(ValueError, match=r"more than once: \['a'\]"):
        read(tmp_path / "mutants.toml")


def test_every_mutant_on_the_list_still_fits() -> None:
    misfits = []
    for mutant in read(LIST):
        try:
            corrupted(mutant, ROOT / "src")
        except Misfit as misfit:
            misfits.append(f"{mutant.id}: {misfit}")
        misfits += [] if mutant.tests else [f"{mutant.id} names no test"]
        files = {test.split("::")[0] for test in mutant.tests}
        misfits += [f"{mutant.id} names {file}, which is not there" for file in sorted(files) if not (ROOT / file).is_file()]
    assert misfits == []


def lost(mutants: Sequence[Mutant], there: set[str]) -> list[str]:
    """What these mutants name and what is not ``there``, of the files of which anything is."""
    files = {name.split("::")[0] for name in there}
    whole = files | {name.split("[")[0] for name in there}
    return [f"{m.id}: {test}" for m in mutants for test in m.tests if test.split("::")[0] in files and test not in whole | there]


def test_what_is_named_and_not_there_is_told() -> None:
    there = {"tests/test_good.py::test_one[a]", "tests/test_good.py::test_two"}
    names = ("tests/test_good.py", "tests/test_good.py::test_one", "tests/test_good.py::test_one[a]", "tests/test_good.py::test_two")
    assert lost([dataclasses.replace(MINUS, tests=(*names, "tests/test_other.py::test_that_was_not_collected"))], there) == []
    for name in ("tests/test_good.py::test_one[b]", "tests/test_good.py::test_three", "tests/test_good.py::test_two[a]"):
        assert lost([dataclasses.replace(MINUS, tests=(name,))], there) == [f"minus: {name}"]


def test_mutants_name_tests_that_are_there(request: pytest.FixtureRequest) -> None:
    """Of the files that were collected together with this one, so that nothing is collected for it: of all of them, in the whole suite."""
    config = request.config
    if config.option.keyword or config.option.markexpr or config.option.deselect or any("::" in arg for arg in config.args):
        pytest.skip("not all tests of the files were collected")
    assert lost(read(LIST), {item.nodeid for item in request.session.items}) == []
