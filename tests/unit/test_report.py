"""Figures and the page, on synthetic run folders."""

from __future__ import annotations

import json
import os
import re
import warnings
from html.parser import HTMLParser

import matplotlib
import matplotlib.axes
import numpy as np
import pytest

from fedloom.run.pages import figures
from fedloom.run.pages.report import write_report
from fedloom.run.pages.spent import spent
from fedloom.run.reading import label_runs, read
from tests.unit.run_folder import CLASSES, counts_of, rows_of, write_run

pytestmark = pytest.mark.no_cover

FACTS = {"gal": [0, 1, 3], "layer_scores": [0.1, 0.2, 0.5, 0.3], "pacing": [0.6, 0.8, 1.0], "scored": "after a head warm-up"}


class Page(HTMLParser):
    """Collects table rows (by section id), addresses and ids; fails on tags closed out of order."""

    VOID = frozenset({"meta", "br", "link", "img", "input"})

    def __init__(self, text: str):
        super().__init__()
        self.open, self.section, self.rows, self.addresses, self.ids = [], "", {}, [], []
        self.feed(text)
        assert not self.open, f"not closed: {self.open}"

    def handle_starttag(self, tag, attrs):
        values = dict(attrs)
        self.addresses += [v for k, v in values.items() if k in ("src", "href", "xlink:href", "action", "poster", "data")]
        if "id" in values:
            self.ids.append(values["id"])
        if tag == "h2":
            self.section = values.get("id", "")
        if tag == "tr":
            self.rows.setdefault(self.section, []).append([])
        if tag in ("td", "th"):
            self.rows[self.section][-1].append("")
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.handle_starttag(tag, attrs)
        if tag not in self.VOID:
            self.open.pop()

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if self.open and {"td", "th"} & set(self.open):
            self.rows[self.section][-1][-1] += data.strip() + " " if data.strip() else ""


@pytest.fixture
def undrawn(monkeypatch):
    """Empty pictures, for tests that look at the rest of the page: drawing is what takes time."""
    monkeypatch.setattr(figures, "render", lambda *_, **__: b"<svg></svg>")


def page(folders, out) -> tuple[str, Page]:
    text = write_report(folders, out).read_text(encoding="utf-8")
    return text, Page(text)


def table(parsed: Page, section: str) -> list[list[str]]:
    return [[cell.strip() for cell in row] for row in parsed.rows[section]]


def test_headline_shows_scores_and_costs_with_and_without_set_up(tmp_path, undrawn):
    runs = [write_run(tmp_path / "a", "lora"), write_run(tmp_path / "b", "fibecfed", height=0.93, facts=FACTS)]
    _, parsed = page(runs, tmp_path / "out" / "report.html")
    costs = ["90.0 MB + 5.0 MB set-up", "120 MB + 20.0 MB set-up", "10 min 00 s", "11 min 35 s", "1 min 30 s"]
    assert table(parsed, "result")[2:] == [
        ["lora", "0.8960", "0.8520", "0.8910 round 25", "0.8430 round 25", *costs],
        ["fibecfed", "0.9260", "0.8820", "0.9210 round 25", "0.8730 round 25", *costs],
    ]


def test_page_asks_nothing_of_the_network_and_has_no_double_ids(tmp_path):
    runs = [write_run(tmp_path / "a", "lora", clients=1500), write_run(tmp_path / "b", "fibecfed", facts=FACTS)]
    text, parsed = page(runs, tmp_path / "report.html")
    assert all(a.startswith(("#", "data:")) for a in parsed.addresses)
    assert not re.search(r"@import|url\((?!#)", text)
    assert not re.search(r"https?://(?!www\.w3\.org/(2000/svg|1999/xlink))", text)
    assert len(parsed.ids) == len(set(parsed.ids))
    targets = [a[1:] for a in parsed.addresses if a.startswith("#")] + re.findall(r"url\(#([^)]+)\)", text)
    assert set(targets) <= set(parsed.ids)


def test_page_has_every_picture_and_explains_each_protocol(tmp_path):
    text, _ = page([write_run(tmp_path / "a", "fibecfed", facts=FACTS)], tmp_path / "report.html")
    for title in [f"{p} accuracy against {x}" for p in ("Personalised", "Global") for x in ("rounds", "traffic", "device time")]:
        assert text.count(f"{title}</text>") == 1
    for title in (
        "Training loss of each round",
        "Sensitivity of each layer",
        "Data opened by the curriculum",
        "Training examples on each of",
    ):
        assert title in text
    for term in ("Personalised", "Global", "Final", "Best by validation"):
        assert f"<dt>{term}</dt>" in text
    assert "after a head warm-up" in text and "one standard error" in text


def test_a_run_in_progress_is_shown_as_far_as_it_went(tmp_path, undrawn):
    folder = write_run(tmp_path / "a", "fibecfed", ended=False)
    with (folder / "rounds.jsonl").open("a") as file:
        file.write('{"round": 15, "lo')
    text, parsed = page([folder], tmp_path / "report.html")
    assert "has not ended" in text and "14 of 30 rounds" in text and "half written" in text
    row = table(parsed, "result")[2]
    last = rows_of(30)[10]
    assert row[1:6] == [f"{last['personalised']:.4f} round 10", f"{last['global']:.4f} round 10", "–", "–", "42.0 MB"]
    assert row[8] == "–"


def test_a_run_before_its_first_row_is_shown(tmp_path):
    folder = write_run(tmp_path / "a", ended=False)
    (folder / "rounds.jsonl").write_text("")
    assert "No round has been written yet" in page([folder], tmp_path / "report.html")[0]


def test_device_table_shows_every_device_with_its_most_common_label(tmp_path, undrawn):
    folder = write_run(tmp_path / "a", clients=260)
    text, parsed = page([folder], tmp_path / "report.html")
    rows = table(parsed, "devices")
    counts = counts_of(260, 6)
    top = int(counts[4].argmax())
    assert len(rows) == 1 + 260
    share = f"{100 * counts[4][top] / counts[4].sum():.0f} %"
    assert rows[5] == ["4", str(counts[4].sum()), "5", "4", "0.800", "0", str((counts[4] > 0).sum()), CLASSES[top], share]
    assert rows[4][4] == "–"
    assert "nth-child(n+201)" in text and "Show all 260 devices" in text


def test_two_runs_that_differ_in_more_than_the_method_are_flagged(tmp_path, undrawn):
    one, two = (
        write_run(tmp_path / "a", "lora"),
        write_run(tmp_path / "b", "local", seed=7, device="phone", engine={"kind": "flower"}),
    )
    text, parsed = page([one, two], tmp_path / "report.html")
    assert "differ in more than the method:</strong> seed, device. " in text
    configuration = {row[0]: row[1:] for row in table(parsed, "configuration")}
    assert configuration["seed"] == ["42", "7"] and configuration["adapter.rank"] == ["8", "8"]
    assert configuration["engine.kind"] == ["local", "flower"] and configuration["engine.stack"] == ["0", "–"]
    text, _ = page([one, write_run(tmp_path / "c", "local")], tmp_path / "same.html")
    assert "differ in more than" not in text


def test_text_from_data_is_escaped(tmp_path):
    evil = "<script>alert('x')</script>"
    classes = [evil, *CLASSES[1:]]
    text, _ = page([write_run(tmp_path / "a", evil, notes=(evil,), facts={"why": evil}, classes=classes)], tmp_path / "report.html")
    assert "<script>alert" not in text and text.count("&lt;script&gt;alert") > 5


def test_failed_answers_are_named(tmp_path, undrawn):
    folder = write_run(tmp_path / "a")
    rows = [{**row, "failed": {"3": "out of memory"} if row["round"] in (2, 9) else {}} for row in rows_of(30)]
    (folder / "rounds.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    text, _ = page([folder], tmp_path / "report.html")
    assert "2 answers failed: round 2, device 3: out of memory; round 9, device 3: out of memory." in text


@pytest.mark.parametrize("name", ["experiment.json", "rounds.jsonl"])
def test_a_missing_file_is_named(tmp_path, name):
    folder = write_run(tmp_path / "a")
    (folder / name).unlink()
    with pytest.raises(FileNotFoundError, match=name):
        write_report([folder], tmp_path / "report.html")


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("experiment.json", b"{", "not JSON"),
        ("experiment.json", b"[]", "a list came"),
        ("rounds.jsonl", b'{"round": 0}\n', "line 1 is corrupt: it lacks"),
        ("rounds.jsonl", b"nonsense\n", "line 1 is corrupt"),
        ("results.json", b'{"method": "lora"}', "it lacks"),
        ("results.json", b"\xff\xfe", "corrupt"),
    ],
)
def test_a_corrupt_file_is_named_and_nothing_is_written(tmp_path, name, content, words):
    folder, out = write_run(tmp_path / "a"), tmp_path / "report.html"
    out.write_text("before")
    (folder / name).write_bytes(content)
    with pytest.raises(ValueError, match=words) as caught:
        write_report([folder], out)
    assert str(folder / name) in str(caught.value)
    assert "delete it and run anew" in str(caught.value), "running it again uses what is there"
    assert out.read_text() == "before" and sorted(p.name for p in tmp_path.iterdir()) == ["a", "report.html"]


def test_the_page_is_replaced_in_one_step(tmp_path, monkeypatch, undrawn):
    folder, out = write_run(tmp_path / "a"), tmp_path / "report.html"
    first = write_report([folder], out).read_bytes()
    assert write_report([folder], out).read_bytes() == first, "the same folder gives the same bytes"

    def fail(source, target):
        raise OSError("disk full")

    monkeypatch.setattr(os, "replace", fail)
    with pytest.raises(OSError, match="disk full"):
        write_report([folder], out)
    assert out.read_bytes() == first and sorted(p.name for p in tmp_path.iterdir()) == ["a", "report.html"]


def test_who_may_read_the_page_the_user_says(tmp_path, undrawn):
    before = os.umask(0o077)
    try:
        out = write_report([write_run(tmp_path / "a")], tmp_path / "report.html")
    finally:
        os.umask(before)
    assert out.stat().st_mode & 0o777 == 0o600


def test_a_report_needs_folders_and_a_file_to_write(tmp_path):
    with pytest.raises(ValueError, match="none was named"):
        write_report([], tmp_path / "report.html")
    with pytest.raises(ValueError, match="name the file to write"):
        write_report([write_run(tmp_path / "a")], tmp_path)


def test_labels_tell_runs_apart(tmp_path):
    def labels(*named):
        return label_runs([read(write_run(tmp_path / name, method, 2, seed=seed)) for name, method, seed in named])

    assert labels(("a", "lora", 1), ("b", "local", 1)) == ["lora", "local"]
    assert labels(("a", "lora", 1), ("b", "lora", 2)) == ["lora, seed 1", "lora, seed 2"]
    assert labels(("a", "lora", 1), ("b", "lora", 1)) == ["lora, a", "lora, b"]
    assert labels(("x/a", "lora", 1), ("y/a", "lora", 1)) == [f"lora, {tmp_path}/x/a", f"lora, {tmp_path}/y/a"]


def test_axes_start_at_what_set_up_cost():
    track = figures.Track("a", rows_of(2), setup_bytes=5.0, setup_seconds=7.0)
    assert track.axis("round").tolist() == [0, 1, 2]
    assert track.axis("bytes").tolist() == [5, 7_000_005, 14_000_005]
    assert track.axis("device").tolist() == track.axis("device", "personalised").tolist() == [7, 27, 47]
    told = [{**row, "personalising": None if row["round"] == 1 else {"flops": 9.0, "device_seconds": 3.0}} for row in rows_of(2)]
    track = figures.Track("a", told, setup_bytes=5.0, setup_seconds=7.0)
    assert track.axis("device", "personalised").tolist() == [10, 27, 50], "what was trained for that score, and for none before it"
    assert track.axis("device", "global").tolist() == [7, 27, 47]
    assert track.axis("bytes", "personalised").tolist() == [5, 7_000_005, 14_000_005]


def test_only_evaluated_points_are_drawn(monkeypatch):
    drawn = []
    monkeypatch.setattr(matplotlib.axes.Axes, "plot", lambda self, xs, ys, *a, **k: drawn.append((list(xs), list(ys))))
    rows = rows_of(10)
    figures.metric_curve([figures.Track("a", rows, best_round=5)], "global", "round", "accuracy")
    assert drawn[0] == ([0, 5, 10], [rows[t]["global"] for t in (0, 5, 10)])
    assert drawn[1] == ([5], [rows[5]["global"]])


def test_figures_are_deterministic_leave_settings_alone_and_keep_text():
    before = dict(matplotlib.rcParams)
    one, two = (figures.partition_picture(counts_of(10, 3), ["a<b", "$x$", "c"]) for _ in range(2))
    assert one == two and b"a&lt;b</text>" in one and b"$x$</text>" in one and b"<dc:date>" not in one
    assert dict(matplotlib.rcParams) == before
    assert figures.partition_picture(counts_of(4, 2), ["a", "b"], "png").startswith(b"\x89PNG")


def test_names_in_a_script_that_the_font_lacks_are_drawn_without_a_warning():
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        drawn = figures.partition_picture(counts_of(4, 2), ["\u65b0\u805e", "b"])
    assert [str(warning.message) for warning in said] == [] and "\u65b0\u805e</text>".encode() in drawn


@pytest.mark.parametrize(("clients", "classes"), [(10, 2), (100, 6), (10_000, 77)])
def test_partition_picture_stays_small_and_says_what_it_leaves_out(clients, classes):
    counts = np.random.default_rng(1).poisson(3.0, (clients, classes))
    svg = figures.partition_picture(counts, [f"label {c}" for c in range(classes)])
    assert len(svg) < 400_000
    assert (b"evenly spaced" in svg) == (clients > figures.MOST_DEVICES)


def test_partition_picture_orders_devices_by_size_and_by_common_label(monkeypatch):
    stacks = []
    monkeypatch.setattr(figures, "_stack", lambda ax, heights, *a: stacks.append(heights.tolist()))
    figures.partition_picture(np.array([[0, 0], [1, 3], [2, 0], [3, 1]]), ["a", "b"])
    assert stacks[0] == [[1, 3], [3, 1], [2, 0], [0, 0]]
    assert stacks[1] == [[1, 0], [0.75, 0.25], [0.25, 0.75], [0, 0]]


def test_layer_scores_refuse_a_chosen_layer_without_a_score():
    with pytest.raises(ValueError, match=r"layers \[4\] are chosen but there are scores for layers 0 to 3"):
        figures.layer_scores([0.1, 0.2, 0.3, 0.4], [0, 4])


def test_layers_chosen_anew_are_drawn_round_by_round(tmp_path, monkeypatch):
    history = [{"round": 0, "gal": [0, 2], "layer_scores": [1, 3, 2]}, {"round": 4, "gal": [1, 2], "layer_scores": [3, 1, 2]}]
    bars = []
    monkeypatch.setattr(matplotlib.axes.Axes, "barh", lambda self, y, width, left, **how: bars.append((y, left, left + width)))
    figures.shared_layers({entry["round"]: entry["gal"] for entry in history}, 3, 10)
    assert bars == [(0, 0, 4), (2, 0, 4), (1, 4, 10), (2, 4, 10)]
    monkeypatch.undo()
    facts = {"gal": [1, 2], "layer_scores": [3, 1, 2], "depth": 3, "adapted": [0, 1, 2], "gal_history": history}
    text, _ = page([write_run(tmp_path / "a", "fibecfed", facts=facts)], tmp_path / "report.html")
    assert "Which layers are shared" in text and "gal_history" not in text and "adapted" not in text


def test_a_set_up_and_what_devices_hold_are_told_as_far_as_they_were_measured():
    costs = {"setup_bytes_up": 3000, "setup_bytes_down": 2_000_000, "setup_device_seconds": 0.5}
    assert spent(costs) == {"set-up": "0.50 s of device time, 3.0 kB up, 2.0 MB down"}
    assert spent(dict.fromkeys(costs, 0)) == {}
    own = [
        {"final": {"personalised": 0.5, "personalising": of}}
        for of in (None, {"flops": 2e9, "device_seconds": 1.5}, dict.fromkeys(("flops", "device_seconds"), 0.0))
    ]
    said = [spent({**dict.fromkeys(costs, 0), **one})["personalising"] for one in (*own, {"final": {"personalised": 0.5}})]
    earlier = "not told: this run is of a version that did not count it"
    trained = "2e+09 operations on all devices, 1.5 s on the slowest; beside the device time of the rounds"
    assert said == [earlier, trained, "nothing is computed for it", earlier]
    state = {"devices": 30, "private_bytes": 65_000, "private_bytes_whole": 100_000, "memory_bytes": 469}
    state |= {"optimizer_bytes": 300_000, "optimizer_bytes_whole": 400_000, "step_flops": 9.9e8, "step_flops_whole": 1e9}
    told = spent(
        {
            **costs,
            "setup_flops": 1.5e12,
            "setup_host_seconds": 8.1,
            "setup_paid_back": {"against": "lora", "bytes_up": 4, "device_seconds": None},
            "device_state": state,
        }
    )
    assert told == {
        "set-up": "0.50 s of device time, 8.1 s here, 1.5e+12 operations, 3.0 kB up, 2.0 MB down",
        "set-up paid for": "in uploads after round 4, in device time not within this run; against plain lora",
        "kept on a device": "65.0 kB (100 kB with all rows, −35%) of its own tensors, 469 B else; mean of 30 devices that keep anything",
        "optimiser's state": "300 kB (400 kB with all rows, −25%)",
        "a step": "9.9e+08 operations an example, 1e+09 with all rows (−1.00%)",
    }
    whole = {**state, "private_bytes": 100_000, "optimizer_bytes": None, "step_flops": 1e9}
    told = spent({**costs, "device_state": whole})
    assert set(told) == {"set-up", "kept on a device"} and told["kept on a device"].startswith("100 kB of its own")


def test_many_lines_stay_apart():
    assert len({figures.appearance(i)[:2] for i in range(24)}) == 24


@pytest.mark.parametrize(
    ("facts", "title", "label"),
    [
        ({"pacing": [0.6, 1.0]}, "Data opened by the curriculum, easy first", "share of batches"),
        ({"pacing": [0.6, 1.0], "opens": "batches as cut"}, "Data opened by the curriculum, in the order of the cut", "share of batches"),
        ({"pacing": [0.1, 1.0], "opens": "examples"}, "Data opened by the curriculum, easy first", "share of examples"),
        ({"pacing": [0.0, 1.0], "opens": "length"}, "Text length opened by the curriculum", "way to whole texts"),
    ],
)
def test_the_pacing_of_any_method_is_drawn_and_says_what_it_opens(tmp_path, facts, title, label):
    text, _ = page([write_run(tmp_path / "a", "lora", facts=facts)], tmp_path / "report.html")
    assert title in text and label in text
    assert "opens" not in text.replace("opened", ""), "what is drawn is not told again"


def test_a_run_goes_by_its_method_and_its_curriculum(tmp_path):
    slw, voc = ({"name": "lora", "curriculum": {"name": name, "start": 8}} for name in ("slw", "voc"))
    held = {"name": "lora-prior", "inner": {"name": "lora", "curriculum": {"name": "none"}}}
    runs = []
    for i, method in enumerate((slw, voc, held)):
        folder = write_run(tmp_path / str(i), "lora")
        written = json.loads((folder / "experiment.json").read_text())
        (folder / "experiment.json").write_text(json.dumps({**written, "method": method}))
        runs.append(read(folder))
    assert label_runs(runs) == ["lora+slw", "lora+voc", "lora-prior"]


def test_both_protocols_have_one_scale_with_bands_and_target(monkeypatch: pytest.MonkeyPatch) -> None:
    limits, rows = (
        [],
        [{"round": t, "personalised": 0.5, "global": 0.6, "bytes_up": 1, "bytes_down": 1, "device_seconds": 1} for t in (0, 1)],
    )
    apart = {"personalised": [0.01, 0.02], "global": [0.2, 0.1]}
    monkeypatch.setattr(figures, "_scale", lambda ax, scores: limits.append((min(scores), max(scores))))
    for protocol in ("personalised", "global"):
        figures.metric_curve([figures.Track("a", rows, deviations=apart)], protocol, "round", "accuracy", target=0.95)
    assert limits == [pytest.approx((0.4, 0.95))] * 2
