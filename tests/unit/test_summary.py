"""What a comparison comes to, from run folders written by hand."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from fedloom.methods.fedavg import FedAvg
from fedloom.methods.local import Local
from fedloom.run.comparison.as_csv import as_csv
from fedloom.run.comparison.as_tex import as_tex
from fedloom.run.comparison.cells import reached_text
from fedloom.run.comparison.compare import run_folders, summary_in
from fedloom.run.comparison.plan import Ended, Plan
from fedloom.run.comparison.summary import summarise
from fedloom.run.comparison.tables import as_markdown, terminal
from fedloom.run.experiment import Experiment
from fedloom.run.pages import figures
from fedloom.run.pages.comparison_page import comparison_of, track_of
from fedloom.run.pages.report import write_report
from fedloom.run.reading import read
from tests.unit.run_folder import write_run

pytestmark = pytest.mark.no_cover

SEEDS = (1, 2)
PLAN = Plan(Experiment(FedAvg(), clients=3, cohort=3, rounds=10), {"lora": FedAvg(), "local": Local()}, ("trec",), (1.0,), SEEDS)


def ended_in(out: Path, confusions: bool = True, without: tuple[str, ...] = (), local: float = 0.9) -> dict[str, Ended]:
    """lora ends at .8 - .1134, local at .9 - .1134, both a hundredth lower with the second seed."""
    ended = {}
    for name, run in PLAN.wanted({}).items():
        if name in without:
            continue
        seed, method = run.experiment.seed, run.experiment.method_name
        folder = write_run(out / name, method, 10, height={"lora": 0.8, "local": local}[method] - 0.01 * seed, clients=3, seed=seed)
        results = json.loads((folder / "results.json").read_text())
        for device in results["per_device"] if confusions else ():
            right = device["correct"] + (method == "local")
            device["confusion"] = {"personalised": [[0, 0, right], [0, 1, 5 - right]], "global": None}
        ended[name] = Ended(results)
    return ended


def summed(out: Path, target: float | None = None, **how: Any) -> dict[str, Any]:
    return summarise(PLAN, ended_in(out, **how), lambda run: out / run.name, "lora", target)


def rows_of(summary: dict[str, Any]) -> list[dict[str, Any]]:
    return summary["cases"][0]["rows"]


def test_scores_ranks_and_the_bootstrap_against_the_reference(tmp_path: Path) -> None:
    lora, local = rows_of(summed(tmp_path))
    final = lora["scores"]["final"]["personalised"]
    assert final["mean"] == pytest.approx(sum(final["each"].values()) / 2)
    assert set(final["each"]) == {"1", "2"}
    assert (lora["rank"], local["rank"]) == ({"personalised": 2, "global": 2}, {"personalised": 1, "global": 1})
    assert lora["against"] == {"personalised": None, "global": None}
    assert local["against"]["global"] is None, "no confusions of that protocol"
    assert local["against"]["personalised"]["difference"] == pytest.approx(1 / 5), "one more right of five on each device"
    assert local["runs"] == {"1": "local-seed1", "2": "local-seed2"}


def test_who_is_first_and_whom_the_bootstrap_does_not_separate_from_it(tmp_path: Path) -> None:
    """local is higher by one more right on every device, which no draw of devices undoes. By one on one of three, which a draw may leave
    out, the two are level, and so they are with the same predictions. Of the global model there are no confusions: nobody is known to be
    level with the first."""
    first = summed(tmp_path)["cases"][0]["first"]
    assert (first["personalised"]["method"], first["personalised"]["level"]) == ("local", ["local"])
    assert first["personalised"]["against"]["lora"]["high"] < 0
    assert first["global"] == {"method": "local", "against": {"lora": None}, "level": ["local"]}
    ended = ended_in(tmp_path / "b")
    for fewer in (1, 0):
        for name, how in ended.items():
            assert how.results is not None
            for k, device in enumerate(how.results["per_device"]):
                right = 3 - fewer * (name.startswith("lora") and k == 0)
                device["confusion"]["personalised"] = [[0, 0, right], [0, 1, 5 - right]]
        alike = summarise(PLAN, ended, lambda run: tmp_path / "b" / run.name, "lora")["cases"][0]["first"]["personalised"]
        assert (alike["method"], alike["level"]) == ("local", ["lora", "local"])
        assert (alike["against"]["lora"]["low"] < 0) == bool(fewer) and alike["against"]["lora"]["high"] == 0
    lacking = summed(tmp_path / "c", without=("local-seed2",))["cases"][0]["first"]["personalised"]
    assert lacking == {"method": "lora", "against": {}, "level": ["lora"]}, "who lacks a seed is neither"


def test_a_method_that_lacks_a_seed_is_neither_ranked_nor_set_against_another(tmp_path: Path) -> None:
    summary = summed(tmp_path, without=("local-seed2",))
    lora, local = rows_of(summary)
    assert (lora["rank"]["personalised"], local["rank"]["personalised"]) == (1, None)
    assert local["scores"]["final"]["personalised"]["count"] == 1
    assert local["against"]["personalised"] is None
    assert summary["mean_rank"]["personalised"] == {"lora": 1, "local": None}


def test_a_method_that_lacks_a_seed_has_no_cost_to_the_target_in_the_mean(tmp_path: Path) -> None:
    """local is above lora's end after 5 rounds with the one seed that it has: over that seed alone it would have saved 100 of lora's 295
    seconds, which are a mean over two. Where the reference lacks one, no other method is known to reach what it would have ended with."""
    lora, local = rows_of(summed(tmp_path, local=1.1, without=("local-seed2",)))
    found = local["reached"]["personalised"]
    assert (found["reached"], found["seeds"], found["device_seconds"], found["bytes_up"], found["saved"]) == (1, 2, None, None, None)
    assert found["bytes_down"] is None
    assert found["personalising"] is None and set(found["each"]) == {"1"}
    assert reached_text(found, "device_seconds") == "1 of 2 seeds"
    assert lora["reached"]["personalised"]["device_seconds"] == 295.0
    both = rows_of(summed(tmp_path / "b", local=1.1, without=("lora-seed2",)))
    assert [row["reached"]["personalised"]["device_seconds"] for row in both] == [None, None]
    assert [reached_text(row["reached"]["global"], "bytes_up") for row in both] == ["1 of 2 seeds"] * 2


def test_runs_without_confusions_have_no_bootstrap(tmp_path: Path) -> None:
    assert rows_of(summed(tmp_path, confusions=False))[1]["against"] == {"personalised": None, "global": None}


def test_what_a_set_up_cost_and_when_it_had_paid(tmp_path: Path) -> None:
    """Means over seeds; rounds by seed; what an earlier version did not tell is not known; without a set-up there is nothing to tell."""
    ended = ended_in(tmp_path)
    for name, how in ended.items():
        assert how.results is not None
        if name.startswith("local"):
            back = {"against": "lora", "bytes_up": how.results["seed"], "device_seconds": None}
            how.results.update({"setup_flops": 10.0 * how.results["seed"], "setup_paid_back": back})  # type: ignore[attr-defined]
        else:
            zero = dict.fromkeys(("setup_bytes_up", "setup_bytes_down", "setup_device_seconds", "setup_flops"), 0)
            how.results.update(zero)  # type: ignore[attr-defined]
    lora, local = rows_of(summarise(PLAN, ended, lambda run: tmp_path / run.name, "lora", None))
    assert lora["setup"] is None
    assert local["setup"] == {
        "device_seconds": 95.0,
        "flops": 15.0,
        "bytes_up": 5_000_000,
        "bytes_down": 20_000_000,
        "paid_back": {"bytes_up": {"1": 1, "2": 2}, "device_seconds": {"1": None, "2": None}},
        "seeds": 2,
    }
    earlier = rows_of(summed(tmp_path))[1]["setup"]
    assert (earlier["flops"], earlier["paid_back"], earlier["bytes_up"]) == (None, None, 5_000_000)


def test_the_target_is_the_references_end_seed_by_seed_or_what_is_given(tmp_path: Path) -> None:
    summary = summed(tmp_path)
    lora, local = rows_of(summary)
    ends = lora["scores"]["final"]["personalised"]["each"]
    assert summary["cases"][0]["target"]["personalised"] == ends
    assert {seed: cost["round"] for seed, cost in lora["reached"]["personalised"]["each"].items()} == {"1": 10, "2": 10}
    assert {seed: cost["round"] for seed, cost in local["reached"]["personalised"]["each"].items()} == {"1": 10, "2": 10}
    setup = 95.0
    assert lora["reached"]["personalised"]["device_seconds"] == setup + 10 * 20.0
    assert lora["reached"]["personalised"]["bytes_up"] == 5_000_000 + 10 * 3_000_000
    assert lora["reached"]["personalised"]["bytes_down"] == 20_000_000 + 10 * 4_000_000
    between = summed(tmp_path / "b", target=0.775)
    told = [row["reached"]["personalised"] for row in rows_of(between)]
    assert [(t["reached"], t["device_seconds"]) for t in told] == [(0, None), (1, None)], "of two seeds one is high enough"


def test_a_lead_is_over_each_other_method_at_its_own_end(tmp_path: Path) -> None:
    """Evaluated every 5 rounds of 20 s, after 95 s of set-up: local is above where lora ends after 5 rounds, lora itself after its 10."""
    lora, local = rows_of(summed(tmp_path, local=1.1))
    assert (set(lora["over"]), set(local["over"])) == ({"local"}, {"lora"})
    over = local["over"]["lora"]["personalised"]
    uncounted = {"personalising_counted": False}
    assert over == {"margin": pytest.approx(0.3), "time_saved": pytest.approx(1 - (95 + 5 * 20) / (95 + 10 * 20)), **uncounted}
    assert lora["over"]["local"]["personalised"] == {"margin": pytest.approx(-0.3), "time_saved": None, **uncounted}, "it never gets there"
    saved = {p: (lora["reached"][p]["saved"], local["reached"][p]["saved"]) for p in ("personalised", "global")}
    assert saved == dict.fromkeys(saved, (None, over["time_saved"])), "to the reference's end it is the same; the reference saves nothing"
    lower = [row["reached"]["personalised"]["saved"] for row in rows_of(summed(tmp_path / "b", target=0.5, local=1.1))]
    assert lower == [None, 0.0], "both have a lower target after 5 rounds"


def test_what_was_there_before_the_first_round_saves_nothing(tmp_path: Path) -> None:
    """local has lora's end from the start: a matter of the target, not of the method's rounds, also where its devices train for 50·s
    seconds before they predict."""
    _, local = rows_of(summed(tmp_path, local=2.0))
    found = local["reached"]["personalised"]
    assert (found["at_start"], found["device_seconds"], found["saved"]) == (2, 95.0, None)
    assert local["over"]["lora"]["personalised"]["time_saved"] is None
    ended = tell_personalising(tmp_path / "b", local=2.0)
    _, local = rows_of(summarise(PLAN, ended, lambda run: tmp_path / "b" / run.name, "lora"))
    found = local["reached"]["personalised"]
    assert (found["at_start"], found["device_seconds"], found["saved"]) == (2, 95.0 + 75, None)
    assert local["over"]["lora"]["personalised"]["time_saved"] is None
    assert (local["reached"]["global"]["at_start"], local["reached"]["global"]["saved"]) == (2, None)


def test_the_score_before_the_first_round_is_told_with_what_the_rounds_brought(tmp_path: Path) -> None:
    """Of local the second seed was not evaluated there, of lora neither was: the one's rows begin with the fifth round."""
    ended = ended_in(tmp_path)
    path = tmp_path / "lora-seed1" / "rounds.jsonl"
    path.write_text("".join(line for line in path.read_text().splitlines(keepends=True) if json.loads(line)["round"] >= 5))
    for name, t in (("lora-seed2", 0), ("local-seed2", 0)):
        path = tmp_path / name / "rounds.jsonl"
        rows = [json.loads(line) for line in path.read_text().splitlines()]
        rows[t]["personalised"] = rows[t]["global"] = None
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    summary = summarise(PLAN, ended, lambda run: tmp_path / run.name, "lora")
    lora, local = rows_of(summary)
    start, final = local["scores"]["start"]["personalised"], local["scores"]["final"]["personalised"]
    first = read(tmp_path / "local-seed1").rows[0]["personalised"]
    assert (start["mean"], start["deviation"], start["count"], start["each"]) == (first, None, 1, {"1": first, "2": None})
    assert lora["scores"]["start"]["personalised"]["mean"] is None
    (table,) = [rows for title, _, rows in terminal(summary) if title.endswith("before the first round, and what the rounds brought")]
    brought = final["each"]["1"] - first
    assert table == [["local", f"{first:.4f}", f"{final['mean']:.4f} ± 0.007", f"{brought:+.4f}"]], "of the seed that tells both"
    assert brought != pytest.approx(final["mean"] - first)
    assert [line["start_personalised_mean"] for line in csv.DictReader(io.StringIO(as_csv(summary)))] == ["", repr(first)]


def test_a_second_reading_is_of_the_devices_that_took_part(tmp_path: Path) -> None:
    """Of three devices with five texts one was never drawn, the third with seed 1 and the first with seed 2: there local is right in all
    and lora in none. On the other two lora is right in four of five and local in three, or, of the second reading's first, level."""
    ended = ended_in(tmp_path)
    for name, how in ended.items():
        assert how.results is not None
        local, undrawn = name.startswith("local"), 2 if name.endswith("1") else 0
        for k, device in enumerate(how.results["per_device"]):
            right = 5 * local if k == undrawn else 4 - local
            device["participations"] = 0 if k == undrawn else 3
            device["confusion"]["personalised"] = [[0, 0, right], [0, 1, 5 - right]]
    summary = summarise(PLAN, ended, lambda run: tmp_path / run.name, "lora")
    part = summary["cases"][0]["took_part"]
    assert (part["devices"], part["of"]) == ({"1": 2, "2": 2}, {"1": 3, "2": 3})
    assert (part["method"], part["level"]) == ("lora", ["lora"])
    assert {m: of["mean"] for m, of in part["scores"].items()} == {"lora": pytest.approx(0.8), "local": pytest.approx(0.6)}
    against = part["against"]["local"]
    assert [against[key] for key in ("difference", "low", "high", "better")] == [*[pytest.approx(-0.2)] * 3, 0]
    (table,) = [(title, headers, rows) for title, headers, rows in terminal(summary) if "took part" in title]
    assert table[0] == "trec, α = 1: personalised test accuracy on the devices alone that took part (2 of 3 by seed)"
    assert table[1][2] == "against\nlora"
    assert [row[:3] for row in table[2]] == [["lora", "0.8000 ± 0.000", "-"], ["local", "0.6000 ± 0.000", "-0.2000"]]
    assert [float(line["took_part_personalised_mean"]) for line in csv.DictReader(io.StringIO(as_csv(summary)))] == pytest.approx(
        [0.8, 0.6]
    )
    for fewer in (1, 0):  # local is right as often as lora but on one of the two, which a draw may leave out; then on both
        for name, how in ended.items():
            undrawn = 2 if name.endswith("1") else 0
            for k, device in enumerate(how.results["per_device"]):  # type: ignore[index]
                right = 4 - (k == 1) * fewer * name.startswith("local")
                device["confusion"]["personalised"] = [[0, 0, right if k != undrawn else 0], [0, 1, 5 - right if k != undrawn else 5]]
        part = summarise(PLAN, ended, lambda run: tmp_path / run.name, "lora")["cases"][0]["took_part"]
        assert (part["method"], part["level"], part["against"]["local"]["high"]) == ("lora", ["lora", "local"], 0)
        assert (part["against"]["local"]["low"] < 0) == bool(fewer)
    lora_only = {name: how for name, how in ended.items() if name != "local-seed2"}
    part = summarise(PLAN, lora_only, lambda run: tmp_path / run.name, "lora")["cases"][0]["took_part"]
    assert (part["method"], part["against"], set(part["scores"])) == ("lora", {}, {"lora"}), "who lacks a seed is left out"
    for everywhere in (1, 0):  # local drew every device, or has no devices: lora decides
        for name, how in ended.items():
            for device in how.results["per_device"] if name.startswith("local") else ():  # type: ignore[index]
                device["participations"] = everywhere
        found = summarise(PLAN, ended, lambda run: tmp_path / run.name, "lora")["cases"][0]["took_part"]
        assert found["devices"] == {"1": 2, "2": 2}
    for how in ended.values():  # the other device too: of nobody it is left
        how.results["per_device"][1]["participations"] = 0  # type: ignore[index]
    assert summarise(PLAN, ended, lambda run: tmp_path / run.name, "lora")["cases"][0]["took_part"]["devices"] == {"1": 1, "2": 1}
    for how in ended.values():
        for device in how.results["per_device"]:  # type: ignore[index]
            device["participations"] = int(how.results["method"] == "lora")  # type: ignore[index]
    told = summarise(PLAN, ended, lambda run: tmp_path / run.name, "lora")
    assert told["cases"][0]["took_part"] is None, "everybody did, but of a method that has no devices"
    assert "took part" not in as_markdown(told)
    for how in ended.values():
        for device in how.results["per_device"]:  # type: ignore[index]
            device["participations"] = 0
    assert summarise(PLAN, ended, lambda run: tmp_path / run.name, "lora")["cases"][0]["took_part"] is None, "nobody did"


UNREAD = {  # by seed and device: training labels (of two), and of the five test texts how many are of the first class
    1: (([3, 1], 4), ([0, 2], 4), ([2, 2], 1)),
    2: (([1, 0], 5), ([0, 4], 0), ([5, 1], 2)),
}


def told_of_labels(out: Path, **how: Any) -> dict[str, Ended]:
    """The runs of :func:`ended_in` whose test texts are of two classes, all of them predicted as the first."""
    ended = ended_in(out, **how)
    for run in ended.values():
        assert run.results is not None
        for device, (labels, of_first) in zip(run.results["per_device"], UNREAD[run.results["seed"]], strict=True):
            cells = [[true, 0, count] for true, count in ((0, of_first), (1, 5 - of_first)) if count]
            device |= {"labels": labels, "confusion": {"personalised": cells, "global": None}}
    return ended


def test_an_answer_that_reads_no_text_stands_beside_the_methods(tmp_path: Path) -> None:
    """Seed 1: 4 + 1 + 1 of 15 right (the third device has both labels alike, and the first of them counts); seed 2: 5 + 5 + 2."""
    summary = summarise(PLAN, told_of_labels(tmp_path), lambda run: tmp_path / run.name, "lora")
    unread = summary["cases"][0]["commonest"]
    assert unread["score"]["each"] == pytest.approx({"1": 6 / 15, "2": 12 / 15}) and unread["score"]["mean"] == pytest.approx(0.6)
    mine = (9 / 15 + 7 / 15) / 2  # the first class to everything
    assert [unread["over"][m]["difference"] for m in ("lora", "local")] == pytest.approx([mine - 0.6] * 2)
    assert unread["over"]["lora"]["better"] == 1
    tables = {title: rows for title, _, rows in terminal(summary)}
    (scores,) = (rows for title, rows in tables.items() if "after the last round" in title)
    assert [row[0] for row in scores] == ["lora", "local", "own commonest label"] and scores[-1][1] == "0.6000 ± 0.283"
    (beside,) = (rows for title, rows in tables.items() if "which reads no text" in title)
    assert [row[:2] for row in beside] == [["lora", f"{mine - 0.6:+.4f}"], ["local", f"{mine - 0.6:+.4f}"]]
    lines = list(csv.DictReader(io.StringIO(as_csv(summary))))
    assert [float(line["commonest_personalised_mean"]) for line in lines] == pytest.approx([0.6, 0.6])
    assert [float(line["personalised_against_commonest_difference"]) for line in lines] == pytest.approx([mine - 0.6] * 2)
    assert r"own commonest label & 0.600 $\pm$ 0.283 & -- & -- \\" in as_tex(summary).splitlines()


def test_there_is_no_such_answer_where_no_label_is_predicted_or_labels_are_not_told(tmp_path: Path) -> None:
    tags, silent = told_of_labels(tmp_path / "a"), told_of_labels(tmp_path / "b")
    tags = {name: Ended({**(run.results or {}), "metric": "entity_f1"}) for name, run in tags.items()}
    for run in silent.values():
        assert run.results is not None
        del run.results["per_device"][1]["labels"]
    for ended, out in ((tags, "a"), (silent, "b")):
        summary = summarise(PLAN, ended, lambda run, out=out: tmp_path / out / run.name, "lora")
        assert summary["cases"][0]["commonest"] is None and "commonest" not in as_tex(summary)
        assert not any("commonest" in str(rows) for _, _, rows in terminal(summary))


def test_the_share_that_is_trained_is_told_where_every_run_tells_it(tmp_path: Path) -> None:
    ended = ended_in(tmp_path)
    for name, how in ended.items():
        if name != "local-seed2":
            how.results["numbers"] = {"model": 1000, "trained": 10 * how.results["seed"], "at_once": 5}  # type: ignore[index]
    lora, local = rows_of(summarise(PLAN, ended, lambda run: tmp_path / run.name, "lora"))
    assert (lora["trained_share"], local["trained_share"]) == (pytest.approx(0.015), None)


def tell_personalising(out: Path, **how: Any) -> dict[str, Ended]:
    """Runs that tell it: lora's devices train nothing, those of local 50·s + t seconds before they predict after round t, with seed s."""
    ended = ended_in(out, **how)
    for name, seed in ((f"{method}-seed{seed}", seed) for method in ("lora", "local") for seed in SEEDS):
        path = out / name / "rounds.jsonl"
        rows = [json.loads(line) for line in path.read_text().splitlines()]
        for row in rows:
            seconds = 0.0 if name.startswith("lora") else 50.0 * seed + row["round"]
            row["personalising"] = None if row["personalised"] is None else {"flops": 1000 * seconds, "device_seconds": seconds}
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        results: Any = json.loads((out / name / "results.json").read_text())
        results["final"]["personalising"] = rows[-1]["personalising"]
        ended[name] = Ended(results)
    return ended


def test_what_is_trained_before_a_prediction_is_in_the_cost_of_the_score_once(tmp_path: Path) -> None:
    """local is above where lora ends after 5 rounds: 95 + 5·20 s, and 55 s (seed 1) or 105 s (seed 2) for the prediction there: 275 s in
    the mean, of lora's 295. What was trained for the evaluation after set-up, and is trained after round 10, is not in it."""
    lora, local = rows_of(summarise(PLAN, tell_personalising(tmp_path, local=1.1), lambda run: tmp_path / run.name, "lora"))
    found = local["reached"]["personalised"]
    assert (found["device_seconds"], found["personalising"], found["bytes_up"]) == (275.0, 80.0, 5_000_000 + 5 * 3_000_000)
    assert found["each"]["1"] == {"round": 5, "device_seconds": 250.0, "bytes_up": 20_000_000, "bytes_down": 40_000_000} | {
        "personalising": 55.0
    }
    assert local["reached"]["global"]["device_seconds"] == 195.0
    assert (lora["reached"]["personalised"]["device_seconds"], lora["reached"]["personalised"]["personalising"]) == (295.0, 0.0)
    over = local["over"]["lora"]["personalised"]
    assert over == {"margin": pytest.approx(0.3), "time_saved": pytest.approx(1 - 275 / 295), "personalising_counted": True}
    told = {key: local["costs"][key] for key in ("device_seconds", "personalising_device_seconds", "personalising_flops")}
    assert told == {"device_seconds": 200.0, "personalising_device_seconds": (60 + 110) / 2, "personalising_flops": 85_000.0}
    assert (lora["costs"]["personalising_device_seconds"], lora["costs"]["personalising_flops"]) == (0.0, 0.0)
    track = track_of("local", [read(tmp_path / f"local-seed{seed}") for seed in SEEDS])
    assert track.axis("device", "personalised")[[0, 5]].tolist() == [95 + 75, 95 + 5 * 20 + 80]
    assert track.axis("device")[[0, 5]].tolist() == [95, 95 + 5 * 20]


def test_what_earlier_runs_do_not_tell_is_not_known(tmp_path: Path) -> None:
    _, local = rows_of(summed(tmp_path, local=1.1))
    found = local["reached"]["personalised"]
    assert (found["device_seconds"], found["personalising"]) == (195.0, None)
    assert local["costs"]["personalising_device_seconds"] is local["costs"]["personalising_flops"] is None
    ended = tell_personalising(tmp_path / "b", local=1.1)
    del ended["local-seed2"].results["final"]["personalising"]  # type: ignore[index]
    assert rows_of(summarise(PLAN, ended, lambda run: tmp_path / "b" / run.name, "lora"))[1]["costs"]["personalising_flops"] is None


def test_no_lead_where_a_seed_or_a_model_is_missing(tmp_path: Path) -> None:
    lora, local = rows_of(summed(tmp_path, without=("local-seed2",)))
    assert lora["over"]["local"] == local["over"]["lora"] == {"personalised": None, "global": None}


def test_a_mean_curve_has_the_deviation_of_its_scores(tmp_path: Path) -> None:
    ended_in(tmp_path)
    runs = [read(tmp_path / f"lora-seed{seed}") for seed in SEEDS]
    track = track_of("lora", runs)
    for t in (0, 5, 10):
        assert track.rows[t]["personalised"] == pytest.approx((runs[0].rows[t]["personalised"] + runs[1].rows[t]["personalised"]) / 2)
        assert track.deviations["personalised"][t] == pytest.approx(0.01 / 2**0.5)
    assert track.rows[1]["personalised"] is None
    assert track.axis("up").tolist()[:3] == [5_000_000, 8_000_000, 11_000_000]


def test_curves_show_every_method_and_the_target_of_their_own_protocol(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Evaluated in rounds 0, 5 and 10, after a set-up of 95 s, 5 MB up and 20 MB down, each round 20 s, 3 MB up and 4 MB down: against time
    (in minutes), uploads and traffic (MB), both protocols' means over two seeds, and across them what lora ends with in the mean: other
    numbers for the two. What is given as the target is the same for both; without a goal there is no line."""
    drawn: list[Axes] = []

    def render(draw: Callable[[Figure], None], *_: Any, **__: Any) -> bytes:
        draw(figure := Figure())
        drawn.extend(figure.axes)
        return b"<svg></svg>"

    def lines_of(summary: dict[str, Any]) -> list[dict[str, np.ndarray]]:
        """Of each picture the points of every line with a name, and of those without one that go from edge to edge."""
        drawn.clear()
        comparison_of(summary, [read(tmp_path / name) for row in rows_of(summary) for name in row["runs"].values()])
        across = [[line for line in ax.lines if line.get_transform() == ax.get_yaxis_transform(which="grid")] for ax in drawn]
        return [
            {str(line.get_label()): np.asarray(line.get_xydata()) for line in ax.lines if not str(line.get_label()).startswith("_")}
            | ({"target": np.array([line.get_ydata() for line in found])} if found else {})
            for ax, found in zip(drawn, across, strict=True)
        ]

    monkeypatch.setattr(figures, "render", render)
    summary = summed(tmp_path)
    told = lines_of(summary)
    titles = [ax.get_title() for ax in drawn]
    assert titles == [f"{p} accuracy against {what}" for what in ("device time", "uploads", "traffic") for p in ("Personalised", "Global")]
    seen, runs = (0, 5, 10), {m: [read(tmp_path / f"{m}-seed{seed}") for seed in SEEDS] for m in ("lora", "local")}
    scores = {(m, p): [sum(run.rows[t][p] for run in of) / 2 for t in seen] for m, of in runs.items() for p in ("personalised", "global")}
    assert scores["lora", "personalised"][-1] > scores["lora", "global"][-1] + 0.01
    places = [[(95 + 20 * t) / 60 for t in seen], [5.0 + 3 * t for t in seen], [25.0 + 7 * t for t in seen]]
    for i, found in enumerate(told):
        xs, p = places[i // 2], ("personalised", "global")[i % 2]
        due = {m: list(zip(xs, scores[m, p], strict=True)) for m in runs} | {"target": [[scores["lora", p][-1]] * 2]}
        assert found.keys() == due.keys()
        for name, points in due.items():
            np.testing.assert_allclose(found[name], points, rtol=1e-12, err_msg=f"{titles[i]}: {name}")
    given = lines_of(summed(tmp_path, target=0.625))
    assert [found["target"].tolist() for found in given] == [[[0.625, 0.625]]] * 6
    summary["cases"][0]["target"]["global"] = dict.fromkeys(("1", "2"))
    assert ["target" in found for found in lines_of(summary)] == [True, False] * 3


def tell_numbers(out: Path) -> dict[str, Ended]:
    """Runs of which lora's tell exact match: in row t of seed s (10·s + t)/100, personalised, and no global one; before training s/100."""
    ended = ended_in(out)
    for seed in SEEDS:
        folder = out / f"lora-seed{seed}"
        rows = [json.loads(line) for line in (folder / "rounds.jsonl").read_text().splitlines()]
        for row in rows:
            share = (10 * seed + row["round"]) / 100 if row["personalised"] is not None else None
            row["exact_match"] = {"personalised": share, "global": None}
        (folder / "rounds.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        results: Any = json.loads((folder / "results.json").read_text())
        for at, t in (("final", 10), ("best", 5)):
            results[at]["exact_match"] = rows[t]["exact_match"]
        results["exact_match"] = {
            "before": seed / 100,
            "after": None,
            "prompts": 3,
            "held": 4,
            "last_number": {"before": 0.0, "after": None},
        }
        (folder / "results.json").write_text(json.dumps(results))
        ended[f"lora-seed{seed}"] = Ended(results)
    return ended


def test_scores_beside_the_headline_are_means_over_seeds_with_a_table_and_columns(tmp_path: Path) -> None:
    """lora's accuracy is .7 and .9 after the last round, .5 and .6 at the best one; local is of a version that tells none."""
    ended = ended_in(tmp_path)
    for seed, final, best in ((1, 0.7, 0.5), (2, 0.9, 0.6)):
        results: Any = ended[f"lora-seed{seed}"].results
        for at, value in (("final", final), ("best", best)):
            results[at]["further"] = {"accuracy": {"personalised": value, "global": None}}
    summary = summarise(PLAN, ended, lambda run: tmp_path / run.name, "lora")
    lora, local = rows_of(summary)
    assert local["further"] is None and set(lora["further"]) == {"accuracy"}
    found = lora["further"]["accuracy"]
    assert (found["final"]["personalised"]["mean"], found["final"]["personalised"]["each"]) == (pytest.approx(0.8), {"1": 0.7, "2": 0.9})
    assert found["best"]["personalised"]["mean"] == pytest.approx(0.55) and found["final"]["global"]["mean"] is None
    (table,) = [(title, rows) for title, _, rows in terminal(summary) if "beside" in title]
    assert table == ("trec, α = 1: test accuracy, beside accuracy", [["lora", "0.8000 ± 0.141", "-", "0.5500 ± 0.071"]])
    mine, other = csv.DictReader(io.StringIO(as_csv(summary)))
    assert float(mine["further_accuracy_final_personalised_mean"]) == pytest.approx(0.8)
    assert mine["further_accuracy_final_global_mean"] == other["further_accuracy_best_personalised_mean"] == ""
    assert "beside" not in as_markdown(summed(tmp_path / "b"))


def test_exact_match_is_a_mean_over_seeds_and_a_curve(tmp_path: Path) -> None:
    summary = summarise(PLAN, tell_numbers(tmp_path), lambda run: tmp_path / run.name, "lora")
    lora, local = rows_of(summary)
    found = lora["exact_match"]
    assert (found["final"]["personalised"]["mean"], found["final"]["personalised"]["each"]) == (pytest.approx(0.25), {"1": 0.2, "2": 0.3})
    assert found["final"]["personalised"]["deviation"] == pytest.approx(0.1 / 2**0.5)
    assert found["best"]["personalised"]["mean"] == pytest.approx(0.2) and found["before"]["mean"] == pytest.approx(0.015)
    assert found["final"]["global"]["mean"] is None and local["exact_match"] is None
    track = track_of("lora", [read(tmp_path / f"lora-seed{seed}") for seed in SEEDS])
    assert (
        track.rows[5]["exact_match"] == {"personalised": pytest.approx(0.2), "global": None}
        and track.rows[1]["exact_match"]["personalised"] is None
    )
    assert track.solved["personalised"][5] == pytest.approx(0.1 / 2**0.5)
    page = write_report([tmp_path / "lora-seed1"], tmp_path / "report.html", summary).read_text()
    assert [page.count(f"Personalised exact match against {what}") for what in ("device time", "uploads", "traffic")] == [1, 1, 1]
    assert "Global exact match" not in page, "nothing is drawn of what nobody has"
    assert page.count("Personalised exact match against rounds") == 1 and "3 of 4" in page


def test_a_page_about_many_runs_shows_some_and_says_so(tmp_path: Path) -> None:
    summary = summed(tmp_path)
    (tmp_path / "summary.json").write_text(json.dumps(summary))
    folders = run_folders([tmp_path])
    assert [f.name for f in folders] == ["lora-seed1", "lora-seed2", "local-seed1", "local-seed2"]
    page = write_report(folders, tmp_path / "report.html", summary_in(tmp_path)).read_text()
    assert "cost to reach what lora ends with" in page
    assert "others have folders of their own" not in page
    other = write_run(tmp_path / "x", "lora", 10, clients=3, seed=1, alpha=0.1)
    assert "1 others have folders" in write_report([*folders, other], tmp_path / "report.html", summary).read_text()
