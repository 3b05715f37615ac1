"""The tables of a comparison, from summaries written by hand."""

from __future__ import annotations

import csv
import io
from typing import Any

import pytest

from fedloom.run.comparison.as_csv import as_csv
from fedloom.run.comparison.as_tex import as_tex, escaped
from fedloom.run.comparison.cells import p_text, paid_text, reached_text, spread_text
from fedloom.run.comparison.tables import as_markdown, leads, terminal

COSTS: dict[str, Any] = dict.fromkeys(
    ("bytes_up", "bytes_down", "setup_bytes_up", "setup_bytes_down", "examples", "device_seconds", "setup_device_seconds"), 1
)
COSTS |= {"personalising_flops": 3e9, "personalising_device_seconds": 7.0}
COSTS |= {"device_seconds": 60.0, "setup_device_seconds": 5.0, "bytes_up": 2_000_000, "setup_bytes_up": 1_000_000}
COSTS |= {"bytes_down": 9_000_000, "setup_bytes_down": 500_000}


def score(mean: float | None, deviation: float | None = 0.01) -> dict[str, Any]:
    return {"mean": mean, "deviation": deviation if mean is not None else None, "count": 2, "each": {}}


def row(method: str, personalised: float, shared: float | None, rank: float, against: Any = None, reached: Any = None) -> dict[str, Any]:
    scores = {"personalised": score(personalised), "global": score(shared)}
    nothing = {"personalised": None, "global": None}
    return {
        "method": method,
        "lr": 0.002,
        "grid": [{"lr": 0.002, "validation": 0.75, "diverged": False}, {"lr": 0.5, "validation": None, "diverged": True}],
        "runs": {"1": f"{method}-seed1", "2": f"{method}-seed2"},
        "scores": {"final": scores, "best": scores},
        "rank": {"personalised": rank, "global": None if shared is None else rank},
        "against": {**nothing, "personalised": against},
        "reached": {**nothing, "personalised": reached},
        "over": {},
        "costs": COSTS,
        "trained_share": 0.01234 if method == "my_method" else None,
    }


def lead(margin: float, time_saved: float | None) -> dict[str, Any]:
    """Of the other protocol a lead that would win."""
    counted = {"personalising_counted": True}
    return {
        "personalised": {"margin": margin, "time_saved": time_saved, **counted},
        "global": {"margin": 9.0, "time_saved": 0.9, **counted},
    }


BETTER = {"difference": 0.1, "low": 0.02, "high": 0.2, "p": 0.0123, "better": 2, "seeds": 2}
WORSE = {**BETTER, "difference": -0.1, "low": -0.2, "high": -0.02, "p": 0.0004}
REACHED: dict[str, Any] = {"device_seconds": 75.0, "bytes_up": 2_000_000, "bytes_down": 6_000_000, "personalising": 7.0}
REACHED |= {"reached": 2, "seeds": 2, "each": {}, "at_start": 0, "saved": 0.25}
HALF: dict[str, Any] = {"device_seconds": None, "bytes_up": None, "bytes_down": None, "personalising": None}
HALF |= {"reached": 1, "seeds": 2, "each": {}, "at_start": 0, "saved": None}


def summary(cases: int = 2, **more: Any) -> dict[str, Any]:
    rows = [row("lora", -0.2, -0.2, 2), row("my_method", 0.9, None, 1, BETTER, REACHED), row("local", -0.3, None, 3, WORSE, HALF)]
    case = {"data": "a/r_te", "alpha": 0.1, "label": "r_te, α = 0.1", "metric": "mcc", "rows": rows}
    case["target"] = {"personalised": {"1": 0.1, "2": 0.3}, "global": {"1": None, "2": None}}
    ranks = {"lora": 2.0, "my_method": 1.5, "local": None}
    return {
        "methods": {"lora": {}, "my_method": {}, "local": {}},
        "seeds": [1, 2],
        "rates": [0.002, 0.5],
        "seed_of_search": 1,
        "cases": [case] * cases,
        "mean_rank": {"personalised": ranks, "global": dict.fromkeys(ranks)},
        "reference": "lora",
        "resamples": 2000,
        "confidence": 0.95,
        "resampled": "devices",
        "target": None,
        **more,
    }


def test_the_terminal_has_scores_costs_the_search_and_mean_ranks() -> None:
    tables = terminal(summary())
    assert [len(rows) for _, _, rows in tables] == [3, 2, 3, 2, 3, 3, 3, 3, 6, 3]
    title, headers, rows = tables[0]
    assert title == "r_te, α = 0.1: test mcc after the last round, mean ± standard deviation over 2 seeds"
    assert len(headers) == len(rows[0])
    assert rows[1] == ["my_method", "0.002", "0.9000 ± 0.010", "-", "0.9000 ± 0.010", "1 (-)"]
    title, headers, rows = tables[1]
    assert title == "r_te, α = 0.1: personalised score against lora (paired bootstrap over devices)"
    assert list(headers) == ["method", "difference", "95% interval", "p", "better in"]
    assert rows[0] == ["my_method", "+0.1000", "[+0.0200, +0.2000]", ".012", "2 of 2"]
    assert rows[1][:4] == ["local", "-0.1000", "[-0.2000, -0.0200]", "< .001"]
    title, _, rows = tables[4]
    assert title == "r_te, α = 0.1: cost to reach what lora ends with (personalised; seed by seed; 0.2000 in the mean)"
    assert rows == [
        ["lora", "-", "-", "-", "-"],
        ["my_method", "1 min 15 s", "2.0 MB", "6.0 MB", "25%"],
        ["local", "1 of 2 seeds", "1 of 2 seeds", "1 of 2 seeds", "-"],
    ]
    title, headers, rows = tables[5]
    assert title == "r_te, α = 0.1: cost of the whole run, and the share of the model that adapter and head are"
    assert list(headers) == ["method", "device time", "before a\nprediction", "uploaded", "downloaded", "trained"]
    whole = ["1 min 05 s", "7.0 s", "3.0 MB", "9.5 MB"]
    assert rows == [["lora", *whole, "-"], ["my_method", *whole, "1.23%"], ["local", *whole, "-"]]
    assert tables[8][2][0] == ["r_te, α = 0.1", "lora", "0.7500 ↓", "diverged"]
    assert tables[8][0].endswith("after the last round, seed 1 (↓: best at the lowest rate, a lower one may be better)")
    assert tables[9][2] == [["lora", "2", "-"], ["my_method", "1.5", "-"], ["local", "-", "-"]]


def test_the_best_rate_is_marked_where_it_is_an_end_of_the_grid() -> None:
    told = summary(1)
    rates = (0.01, 0.002, 0.05)
    for row, best in zip(told["cases"][0]["rows"], rates, strict=True):
        row |= {"grid": [{"lr": rate, "validation": 0.5 + (rate == best) / 4, "diverged": False} for rate in rates], "lr": best}
    ((title, _, lines),) = [table for table in terminal(told) if table[0].startswith("Search")]
    assert [line[2:] for line in lines] == [
        ["0.7500", "0.5000", "0.5000"],
        ["0.5000", "0.7500 ↓", "0.5000"],
        ["0.5000", "0.5000", "0.7500 ↑"],
    ]
    assert title.endswith(
        "(↓: best at the lowest rate, a lower one may be better; ↑: best at the highest rate, a higher one may be better)"
    )
    told["cases"][0]["rows"][1]["grid"][2]["validation"] = 0.75
    assert next(lines[1][3] for title, _, lines in terminal(told) if title.startswith("Search")) == "0.7500", "the highest is as good"
    told["cases"][0]["rows"][0] |= {"grid": [{"lr": None, "validation": 0.5, "diverged": False}], "lr": None}
    assert next(lines[0][2:] for title, _, lines in terminal(told) if title.startswith("Search")) == ["0.5000"]


def test_the_global_model_has_tables_of_its_own_where_there_is_one() -> None:
    told = summary(1, rates=[])
    case = told["cases"][0]
    assert not any("global" in title for title, *_ in terminal(told))
    lora, mine, _ = case["rows"]
    mine["against"]["global"], mine["reached"]["global"] = WORSE, {**REACHED, "saved": -0.5}
    lora["reached"]["global"] = {**REACHED, "saved": None}
    case["target"]["global"] = {"1": 0.5, "2": None}
    tables = {title: rows for title, _, rows in terminal(told)}
    against = tables["r_te, α = 0.1: global score against lora (paired bootstrap over devices)"]
    assert [row[:2] for row in against] == [["my_method", "-0.1000"]]
    cost = tables["r_te, α = 0.1: cost to reach what lora ends with (global; 0.5000)"]
    reached = ["1 min 15 s", "2.0 MB", "6.0 MB"]
    assert cost == [["lora", *reached, "-"], ["my_method", *reached, "-50%"], ["local", *["-"] * 4]]
    for protocol in ("personalised", "global"):
        assert any(title.endswith(f"cost to reach a {protocol} score of 0.8") for title, *_ in terminal({**told, "target": 0.8}))


def test_what_the_start_had_reached_is_no_achievement_and_marked() -> None:
    told = summary(1, rates=[])
    lora, mine, _ = told["cases"][0]["rows"]
    lora["reached"]["personalised"] = {**REACHED, "at_start": 2, "saved": None}
    mine["reached"]["personalised"] = {**REACHED, "at_start": 1, "saved": None, "personalising": None}
    title, _, rows = terminal(told)[2]
    assert rows[:2] == [["lora", *["before round 1"] * 3, "-"], ["my_method", "1 min 15 s†‡", "2.0 MB‡", "6.0 MB‡", "-"]]
    assert title.endswith("which these runs do not tell; ‡: in some seeds before the first round)")
    lora["reached"]["personalised"]["personalising"] = None
    assert terminal(told)[2][2][0][1:3] == ["before round 1†", "before round 1"], "devices may have trained before they predicted"


def test_what_earlier_runs_do_not_tell_of_personalising_is_marked_and_never_a_zero() -> None:
    """A dagger behind each device time that lacks it, said in the title; a dash for the whole run's. None means that nothing is trained."""
    told = summary(1, rates=[])
    lora, mine, local = told["cases"][0]["rows"]
    assert "†" not in as_markdown(told)
    mine["reached"]["personalised"] = {**REACHED, "personalising": None}
    mine["costs"], local["costs"] = ({**COSTS, "personalising_device_seconds": known} for known in (None, 0.0))
    local["reached"]["personalised"] = {key: value for key, value in REACHED.items() if key != "personalising"}
    title, headers, rows = terminal(told)[2]
    assert title.endswith("in the mean) (†: without what devices train before they predict, which these runs do not tell)")
    assert list(headers) == ["method", "device time", "uploaded", "downloaded", "device time\nsaved"]
    assert [row[1] for row in rows] == ["-", "1 min 15 s†", "1 min 15 s†"]
    assert [row[2] for row in rows] == ["-", "2.0 MB", "2.0 MB"], "nothing is sent for it"
    assert [row[4] for row in rows] == ["-", "25%†", "25%†"]
    assert [row[2] for row in terminal(told)[3][2]] == ["7.0 s", "-", "none"]
    lines = list(csv.DictReader(io.StringIO(as_csv(told))))
    assert [line["personalising_device_seconds"] for line in lines] == ["7.0", "", "0.0"]
    mine["reached"]["personalised"] = REACHED
    assert [line["personalised_to_target_personalising_device_seconds"] for line in csv.DictReader(io.StringIO(as_csv(told)))] == [
        "",
        "7.0",
        "",
    ]
    mine["over"], lora["over"] = {"lora": lead(0.2, 0.4)}, {"local": lead(0.3, 0.5)}
    mine["over"]["lora"]["personalised"]["personalising_counted"] = False
    title, _, cells = leads(told)
    assert title.endswith("where the other method ends (†: without what devices train before they predict, which these runs do not tell)")
    assert [line[2:4] for line in cells] == [["+0.3000 (local)", "50% (local)"], ["+0.2000 (lora)", "40%† (lora)"], ["-", "-"]]


def test_the_largest_leads_name_whom() -> None:
    told = summary(1)
    rows = told["cases"][0]["rows"]
    over = {"lora": lead(0.2, 0.4), "local": lead(0.3, None)}
    rows[1]["over"], rows[0]["over"] = over, {"my_method": lead(-0.2, -0.5), "local": {"personalised": None, "global": None}}
    _, headers, cells = leads(told)
    assert cells == [
        ["r_te, α = 0.1", "lora", "-", "-", "+9.0000 (my_method)", "90% (my_method)"],
        ["r_te, α = 0.1", "my_method", "+0.3000 (local)", "40% (lora)", "+9.0000 (lora)", "90% (lora)"],
        ["r_te, α = 0.1", "local", "-", "-", "-", "-"],
    ]
    assert headers[2:] == ("personalised above (whom)", "personalised: device time saved (whom)", *headers[4:]) and len(headers) == 6
    for row in rows:
        row["over"] = {other: {**found, "global": None} for other, found in row["over"].items()}
    _, headers, cells = leads(told)
    assert len(headers) == 4 and cells[1][2:] == ["+0.3000 (local)", "40% (lora)"], "without global models no column of theirs"


def test_markdown_has_every_table_with_as_many_cells_in_each_row() -> None:
    told = summary()
    text = as_markdown(told)
    assert text.count("**") == 2 * (len(terminal(told)) + 1)
    for _, headers, rows in [*terminal(told), leads(told)]:
        for line in rows:
            assert f"| {' | '.join(line)} |" in text.splitlines()
        assert "| " + " | ".join(h.replace("\n", " ") for h in headers) + " |" in text.splitlines()
    told["cases"][0]["rows"][0]["method"] = "a|b"
    assert r"| a\|b |" in as_markdown(told)


def test_a_set_up_is_told_with_the_round_after_which_it_has_paid() -> None:
    told = summary(1)
    costs = {"device_seconds": 90.0, "flops": 1.234e12, "bytes_up": 5_000_000, "bytes_down": 2_000_000, "seeds": 2}
    rows = told["cases"][0]["rows"]
    rows[1]["setup"] = {**costs, "paid_back": {"bytes_up": {"1": 3, "2": 3}, "device_seconds": {"1": None, "2": None}}}
    rows[2]["setup"] = {**costs, "paid_back": None}
    title, headers, lines = terminal(told)[4]
    assert title == "r_te, α = 0.1: set-up, and after which round it has paid for itself against plain LoRA"
    first = ["1 min 30 s", "1.23e+12", "5.0 MB", "2.0 MB"]
    assert lines == [["my_method", *first, "round 3", "never in this run"], ["local", *first, "-", "-"]]
    assert len(headers) == 7
    mine, other = list(csv.DictReader(io.StringIO(as_csv(told))))[1:]
    assert (mine["setup_flops"], mine["setup_paid_back_bytes_up"]) == ("1234000000000.0", "3.0")
    assert mine["setup_paid_back_device_seconds"] == other["setup_paid_back_bytes_up"] == ""
    some = {"paid_back": {"bytes_up": {"1": 7, "2": 4, "3": 5}, "device_seconds": {"1": None, "2": 4, "3": 5}}}
    for seeds, more in ((3, ""), (4, " (told by 3 of 4 seeds)")):
        texts = [paid_text({**some, "seeds": seeds}, key) for key in ("bytes_up", "device_seconds")]
        assert texts == [f"rounds 4 to 7{more}", f"in 2 of 3 seeds{more}"]
    rows[1]["setup"]["seeds"] = 3
    assert list(csv.DictReader(io.StringIO(as_csv(told))))[1]["setup_paid_back_bytes_up"] == "", "a mean over the seeds that tell is none"


def test_a_row_that_lacks_a_seed_says_how_many_it_has() -> None:
    told = summary(1)
    del told["cases"][0]["rows"][2]["runs"]["2"]
    _, headers, rows = terminal(told)[0]
    assert list(headers)[:3] == ["method", "lr", "seeds"]
    assert [row[2] for row in rows] == ["2", "2", "1"]


def test_no_word_is_broken_in_eighty_columns() -> None:
    told = summary(1)
    for row in told["cases"][0]["rows"]:
        row["method"] = "lora-personal-head"
    for row in told["cases"][0]["rows"][:2]:
        row["reached"]["personalised"] = {**REACHED, "at_start": 2, "saved": None}
    for title, headers, rows in terminal(told)[:4]:
        widths = [
            max(len(part) for cell in column for part in cell.removeprefix("-").split("\n")) for column in zip(headers, *rows, strict=True)
        ]
        assert sum(widths) + len(widths) <= 80, (title, widths)


def test_one_case_without_a_search_has_no_table_of_either() -> None:
    tables = terminal(summary(1, rates=[], target=0.8))
    assert len(tables) == 4
    assert not {"lr", "seeds"} & set(tables[0][1])
    assert tables[2][0].endswith("cost to reach a personalised score of 0.8")


def test_a_target_that_no_seed_reached_is_said() -> None:
    assert reached_text({**HALF, "reached": 0}, "bytes_up") == "not reached"
    assert reached_text(None, "bytes_up") == "-"
    assert reached_text({key: value for key, value in REACHED.items() if key != "bytes_down"}, "bytes_down") == "-", "an earlier summary"
    assert spread_text(score(0.5, None)) == "0.5000"
    assert (p_text(0.0005), p_text(0.001), p_text(1.0)) == ("< .001", ".001", "1.000")


def test_csv_has_full_numbers_and_nothing_where_nothing_is_known() -> None:
    lines = list(csv.DictReader(io.StringIO(as_csv(summary()))))
    assert [(line["data"], line["method"]) for line in lines] == [("a/r_te", m) for m in ("lora", "my_method", "local")] * 2
    mine = lines[1]
    assert (mine["final_personalised_mean"], mine["final_global_mean"], mine["lr"], mine["seeds"]) == ("0.9", "", "0.002", "2")
    assert (mine["personalised_against_reference_p"], mine["personalised_to_target_device_seconds"]) == ("0.0123", "75.0")
    moved = [(line["personalised_to_target_bytes_up"], line["personalised_to_target_bytes_down"]) for line in lines[:3]]
    assert moved == [("", ""), ("2000000", "6000000"), ("", "")]
    assert (lines[2]["personalised_to_target_device_seconds"], lines[2]["personalised_to_target_reached"]) == ("", "1")
    assert (mine["personalised_to_target_saved"], mine["personalised_to_target_at_start"], mine["trained_share"]) == (
        "0.25",
        "0",
        "0.01234",
    )
    assert (lines[2]["personalised_to_target_saved"], lines[2]["trained_share"]) == ("", "")
    assert mine["grid"] == "0.002:0.75 0.5:diverged"


@pytest.mark.parametrize(
    ("text", "wanted"),
    [
        ("my_method", r"my\_method"),
        ("50% & more", r"50\% \& more"),
        (r"a\b{c}", r"a\textbackslash{}b\{c\}"),
        ("#1 ~ x^2 $5", r"\#1 \textasciitilde{} x\textasciicircum{}2 \$5"),
        ("α < 1", r"$\alpha$ \textless{} 1"),
        ("1 s†‡", r"1 s\dag{}\ddag{}"),
    ],
)
def test_latex_is_escaped(text: str, wanted: str) -> None:
    assert escaped(text) == wanted


def test_the_tabular_marks_the_best_of_each_column_and_what_the_interval_says() -> None:
    lines = as_tex(summary()).splitlines()
    body = [line for line in lines if line.endswith(r"\\")]
    assert [line.count("&") for line in body[:5]] == [3, 8, 8, 8, 8]
    assert (body[0].count("multicolumn{3}"), body[0].count("multicolumn{2}")) == (2, 1)
    assert body[1] == r"method & " + "personalised & global & rank (global) & " * 2 + r"personalised & global \\"
    assert r"r\_te, $\alpha$ = 0.1" in body[0]
    lora = r"lora & -0.200 $\pm$ 0.010 & \textbf{-0.200 $\pm$ 0.010} & 2 (2) & "
    assert body[2].startswith(lora), "the best of a column may be negative"
    assert body[3].startswith(r"my\_method & \textbf{0.900 $\pm$ 0.010}$^{+}$ & -- & 1 (-) & ")
    assert body[4].startswith(r"local & -0.300 $\pm$ 0.010$^{-}$ & -- & 3 (-) & ")
    assert body[3].endswith(r" & 1.5 & - \\")
    columns = lines[next(i for i, line in enumerate(lines) if "begin{tabular}" in line)]
    assert columns == r"\begin{tabular}{lrrrrrrrr}"


def test_a_single_case_has_ranks_in_its_tabular() -> None:
    body = [line for line in as_tex(summary(1)).splitlines() if line.endswith(r"\\")]
    assert [line.count("&") for line in body[:5]] == [1, 3, 3, 3, 3]
    assert [line.rsplit(" & ", 1)[1] for line in body[1:5]] == [r"rank (global) \\", r"2 (2) \\", r"1 (-) \\", r"3 (-) \\"]


def test_a_second_tabular_has_what_it_cost_to_reach_the_target() -> None:
    """A part for each case; of the global model only where anything of it reaches anything; marks as LaTeX sets them, and said."""
    told = summary(2)
    mine = told["cases"][0]["rows"][1]
    mine["reached"]["personalised"] = {**REACHED, "at_start": 1, "personalising": None}
    lines = as_tex(told).split("\n\n")[1].splitlines()
    said, goals, table = lines[0], lines[1:3], lines[3:]
    assert said.startswith("% ") and "†: without what devices train" in said and "‡: in some seeds before the first round" in said
    assert goals == ["% r_te, α = 0.1: what lora ends with (personalised; seed by seed; 0.2000 in the mean)"] * 2
    case = [
        r"\multicolumn{4}{l}{r\_te, $\alpha$ = 0.1} \\",
        r"lora & - & - & - \\",
        r"my\_method & 1 min 15 s\dag{}\ddag{} & 2.0 MB\ddag{} & 6.0 MB\ddag{} \\",
        r"local & 1 of 2 seeds & 1 of 2 seeds & 1 of 2 seeds \\",
        r"\hline",
    ]
    head = [r"\hline", r" & \multicolumn{3}{c}{personalised} \\", r"method & device time & uploaded & downloaded \\", r"\hline"]
    assert table == [r"\begin{tabular}{lrrr}", *head, *case, *case, r"\end{tabular}"]
    mine["reached"]["global"] = REACHED
    body = [line for line in as_tex(told).split("\n\n")[1].splitlines() if line.endswith(r"\\")]
    assert body[0] == r" & \multicolumn{3}{c}{personalised} & \multicolumn{3}{c}{global} \\"
    assert [line.count("&") for line in body] == [2, 6, *[0, 6, 6, 6] * 2]
    assert body[4].endswith(r" & 1 min 15 s & 2.0 MB & 6.0 MB \\") and body[3].endswith(r" & - & - & - \\")


def test_bold_is_the_highest_of_those_that_have_every_seed() -> None:
    """A mean over fewer seeds is another average: the next highest of two seeds is bold, not one that is as high over one seed, and nothing
    where nobody has both."""
    told = summary(1)
    rows = told["cases"][0]["rows"]
    rows[1]["scores"]["final"] = {**rows[1]["scores"]["final"], "personalised": {**score(0.9), "count": 1}}
    rows[2]["scores"]["final"] = {**rows[2]["scores"]["final"], "personalised": {**score(-0.2), "count": 1}}
    lora, mine, local = [line for line in as_tex(told).splitlines() if line.endswith(r"\\")][2:5]
    assert lora.startswith(r"lora & \textbf{-0.200 ") and r"my\_method & 0.900 " in mine and "textbf" not in mine + local
    for row in rows:
        for of in row["scores"]["final"].values():
            of["count"] = 1
    assert "textbf" not in as_tex(told)


def test_exact_match_has_a_table_columns_and_a_part_of_the_tabular_where_it_is_told() -> None:
    made = summary()
    assert "exact match" not in as_markdown(made) + as_tex(made) and "exact_match" not in as_csv(made)
    lora, mine, local = (dict(of) for of in made["cases"][1]["rows"])
    made["cases"][1] = {**made["cases"][1], "rows": [lora, mine, local]}
    none = score(None)
    lora["exact_match"] = {
        "before": score(0.125),
        "final": {"personalised": score(0.25), "global": score(0.375)},
        "best": {"personalised": score(0.5), "global": none},
    }
    mine["exact_match"] = {"before": score(0.125), "final": (both := {"personalised": score(0.75, None), "global": none}), "best": both}
    (table,) = [(headers, rows) for title, headers, rows in terminal(made) if "exact match" in title]
    assert [" ".join(header.split()) for header in table[0]] == ["method", "before training", "personalised", "global", "personalised best"]
    assert table[1] == [
        ["lora", "0.1250 ± 0.010", "0.2500 ± 0.010", "0.3750 ± 0.010", "0.5000 ± 0.010"],
        ["my_method", "0.1250 ± 0.010", "0.7500", "-", "0.7500"],
    ]
    lines = list(csv.DictReader(io.StringIO(as_csv(made))))
    told = [
        (of["exact_match_before_mean"], of["exact_match_final_global_mean"], of["exact_match_best_personalised_deviation"]) for of in lines
    ]
    assert told == [("", "", "")] * 3 + [("0.125", "0.375", "0.01"), ("0.125", "", ""), ("", "", "")]
    body = [line for line in as_tex(made).splitlines() if line.endswith(r"\\")]
    assert [body[0].count(f"multicolumn{{{width}}}") for width in (3, 2)] == [2, 2] and body[0].count(", exact match}") == 1
    assert {line.count("&") for line in body[1:5]} == {10}
    assert r"& 0.250 $\pm$ 0.010 & \textbf{0.375 $\pm$ 0.010} & 2 & - \\" in body[2]
    assert r"& \textbf{0.750} & -- & " in body[3] and r"& -- & -- & " in body[4]
