"""The picture of a comparison's cases: whatever stands on it is a number of the summary."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from fedloom.run.pages import standings as module
from fedloom.run.pages.comparison_page import comparison_of
from fedloom.run.pages.standings import standings
from tests.unit.test_tables import summary

pytestmark = pytest.mark.no_cover

METHODS = ("lora", "my_method", "local")


@pytest.fixture
def drawn(monkeypatch: pytest.MonkeyPatch) -> Callable[..., list[Axes]]:
    """The two halves of a picture, as they are before they are pixels."""

    def of(cases: list[dict[str, Any]], methods: tuple[str, ...]) -> list[Axes]:
        halves: list[Axes] = []

        def render(draw: Callable[[Figure], None], *_: Any, **__: Any) -> bytes:
            draw(figure := Figure())
            halves.extend(figure.axes)
            return b""

        with monkeypatch.context() as patch:
            patch.setattr(module, "render", render)
            standings(cases, methods)
        return halves

    return of


def points(ax: Axes) -> dict[str, list[tuple[float, int]]]:
    """By method (score, the case's row)."""
    found = {str(line.get_label()): np.asarray(line.get_xydata()) for line in ax.lines}
    return {name: [(float(x), round(float(y))) for x, y in xy] for name, xy in found.items() if not name.startswith("_")}


def spans(ax: Axes) -> list[tuple[float, float]]:
    """From where to where each horizontal stroke goes."""
    segments = [segment for lines in ax.collections for segment in lines.get_segments()]
    return [(float(a[0]), float(b[0])) for a, b in segments if a[1] == b[1]]


def test_every_method_has_its_mean_and_its_deviation_in_every_case(drawn: Callable[..., list[Axes]]) -> None:
    one, two = summary()["cases"][0], summary()["cases"][0] | {"metric": "accuracy", "label": "trec, α = 1"}
    personalised, shared = drawn([one, two], METHODS)
    assert points(personalised) == {"lora": [(-0.2, 0), (-0.2, 1)], "my_method": [(0.9, 0), (0.9, 1)], "local": [(-0.3, 0), (-0.3, 1)]}
    assert points(shared) == {"lora": [(-0.2, 0), (-0.2, 1)], "my_method": [], "local": []}, "no shared model, no point"
    assert np.array(spans(personalised)) == pytest.approx(np.array([(-0.21, -0.19)] * 2 + [(0.89, 0.91)] * 2 + [(-0.31, -0.29)] * 2))
    assert [text.get_text() for text in personalised.get_yticklabels()] == ["r_te, α = 0.1 (mcc)", "trec, α = 1"], (
        "the metric if it is another"
    )
    assert personalised.get_ylim() == (1.5, -0.5), "the first case on top, as in the tables"


def test_methods_of_a_case_stand_apart_within_its_row(drawn: Callable[..., list[Axes]]) -> None:
    ax, _ = drawn(summary()["cases"], METHODS)
    heights = sorted(float(y) for line in ax.lines if not str(line.get_label()).startswith("_") for _, y in np.asarray(line.get_xydata()))
    assert min(np.diff(heights)) > 0.2 and heights[0] > -0.5 and heights[-1] < 1.5
    alone, _ = drawn(summary()["cases"], ("lora",))
    assert [float(y) for _, y in np.asarray(alone.lines[0].get_xydata())] == [0, 1]


def test_the_answer_that_reads_no_text_is_a_tick_of_the_personalised_half(drawn: Callable[..., list[Axes]]) -> None:
    one, two = summary()["cases"][0], summary()["cases"][0] | {"commonest": {"score": {"mean": 0.4}, "over": {}}}
    halves = drawn([one, two], METHODS)
    upright = [
        [(float(a[0]), float(a[1]), float(b[1])) for lines in ax.collections for a, b in lines.get_segments() if a[1] != b[1]]
        for ax in halves
    ]
    assert upright == [[(0.4, pytest.approx(0.56), pytest.approx(1.44))], []]


def test_the_picture_is_the_same_each_time_and_names_every_method() -> None:
    one, two = (standings(summary()["cases"], METHODS) for _ in range(2))
    assert one == two and all(name.encode() in one for name in (*METHODS, "Personalised", "Global"))
    assert standings(summary()["cases"], METHODS, "png").startswith(b"\x89PNG")


def test_a_page_shows_it_where_there_is_more_than_one_case() -> None:
    more = {"failed": {}, "diverged": {}, "chosen_by": "validation"}
    assert comparison_of(summary(1, **more), [])["standings"] is None
    assert "my_method" in comparison_of(summary(2, **more), [])["standings"]
