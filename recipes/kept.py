"""Tables of docs/results whose runs lie beside the page: what ``core.py`` and ``federa.py`` have in common.

A table is ``fedloom compare`` with stated methods and settings on several data sets, each in its own slice. Finished runs are put into an
archive a data set (``docs/results/NAME/TASK.zip``), and the page is made anew from these without training. What an archive holds has been
measured and is not run again: take it away to run everything anew. Where other settings are given, nothing is taken from it.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from zipfile import ZIP_LZMA, ZipFile, ZipInfo

from fedloom.cli import main
from fedloom.run.adopt import TAKEN_OVER
from fedloom.run.checkpoint import write_atomically
from fedloom.run.comparison.cells import UNCOUNTED, remark
from fedloom.run.comparison.standing import COMMONEST
from fedloom.run.comparison.statistics import mean_of_all
from fedloom.run.comparison.summary import PROTOCOLS
from fedloom.run.folder import DIVERGED
from fedloom.run.pages.standings import standings
from fedloom.run.reading import full_name

DOCS = Path(__file__).resolve().parents[1] / "docs"
STOPPED = (130, 143)
"""Exit codes of a comparison that was stopped: the tasks after it are not begun then."""
BESIDE = {"--plain", "--jobs", *map(str, range(1, 65))}
"""Words of ``fedloom compare`` that change no run."""
LEVEL = "level: the paired bootstrap over devices does not separate it at 95 % from the method with the highest mean"
"""What the board calls level."""
APART = 0.02
"""Means over three seeds that are no further apart are not taken for an order."""
PICTURE = "standings.svg"
"""File name of the picture of all cells, beside the archives; it is made for a page that shows it."""
NO_SCORES: Mapping[str, Any] = {"mean": None, "count": 0}
FILES = ("experiment.json", "rounds.jsonl", "results.json", DIVERGED)
"""What a run that has ended is known by, without its checkpoint; one that diverged has no results, any other no ``diverged.json``."""


@dataclass(frozen=True)
class Table:
    """One table of the page.

    Attributes:
        name: its archives' folder.
        methods: what is compared, the reference first.
        alphas: label skews, as they are written on the command line.
        seeds, rates: the same for every method, as they are written.
        shape: every task's options, and
        shapes: by task those that come after them, where the later one counts; its keys are the tasks that there are.
        page: the text in which what is told of all tasks goes between ``<!-- NAME -->`` and ``<!-- /NAME -->``; a task's own tables are a
            page beside its archive.
        packaged: tasks whose data set comes with the program; those of all others lie in a folder of their name.
    """

    name: str
    methods: tuple[str, ...]
    alphas: tuple[str, ...]
    seeds: tuple[str, ...]
    rates: tuple[str, ...]
    shape: str
    shapes: Mapping[str, str]
    page: Path
    packaged: tuple[str, ...] = ()

    @property
    def kept(self) -> Path:
        """The folder of its archives."""
        return DOCS / "results" / self.name

    def options(self, task: str) -> str:
        """The options of a task's runs."""
        return f"{self.shape} {self.shapes[task]}".strip()

    def compare(self, task: str, alphas: tuple[str, ...], out: Path, more: list[str]) -> int:
        """Run what is missing of one task; the exit code."""
        data = task if task in self.packaged else f"./{task}"
        grid = ["--alphas", *alphas, "--seeds", *self.seeds, "--lrs", *self.rates]
        return main(["compare", *self.methods, "--data", data, *grid, *self.options(task).split(), "--out", str(out), *more])

    def measured(self, runs: Path) -> tuple[str, ...]:
        """The α of which every method has all runs that the grid asks for, with results or diverged: those of the search, which is the
        first seed's, and one for each further seed, if any of the search has results."""
        found = {place: json.loads((place / "experiment.json").read_text(encoding="utf-8")) for place in ended(runs)}
        first, *others = map(int, self.seeds)

        def whole(alpha: str, method: str) -> bool:
            mine = [(place, e) for place, e in found.items() if (e["alpha"], full_name(e["method"])) == (float(alpha), method)]
            tried, known = [place for place, e in mine if e["seed"] == first], {e["seed"] for _, e in mine}
            learnt = any((place / "results.json").exists() for place in tried)
            return len(tried) >= len(self.rates) and (not learnt or known >= set(others))

        return tuple(alpha for alpha in self.alphas if all(whole(alpha, method) for method in self.methods))

    def tables(self, task: str) -> Path:
        """The page of a task's tables."""
        return self.kept / f"{task}.md"

    def write(self, overall: str) -> None:
        """Put what is told of all tasks between its two marks on the page.

        Raises:
            ValueError: the page has no place for it.
        """
        text = self.page.read_text(encoding="utf-8")
        begin, end = f"<!-- {self.name} -->", f"<!-- /{self.name} -->"
        if text.count(begin) != 1 or text.count(end) != 1:
            raise ValueError(f"{self.page} has no place for {self.name}: it needs one line {begin} and one line {end}")
        told = re.sub(f"{begin}.*{end}", lambda _: f"{begin}\n\n{overall}\n{end}", text, flags=re.DOTALL)
        write_atomically(self.page, told)

    def told(self, task: str, tables: str) -> str:
        """The page of a task's tables: where they are from, and these."""
        return (
            f"# {task}\n\nThe tables of `fedloom compare` for the runs in `{task}.zip`, which lies beside this page, as "
            f"`python recipes/{self.name}.py --page` makes them. What they say, of which commits the runs are and what was asked stands in "
            f"[Results](../{self.page.name}).\n\n{tables}"
        )

    def paged(self) -> int:
        """The tables of every archived task; nothing is trained. The exit code."""
        written, cases, seconds, code = [], [], {}, 0
        with tempfile.TemporaryDirectory() as scratch:
            for kept in sorted(self.kept.glob("*.zip")):
                out = Path(scratch) / kept.stem
                unpack(kept, out)
                alphas = self.measured(out)
                if not alphas:
                    print(f"{kept}: no α has all of its runs yet; left out")
                    continue
                code = max(code, self.compare(kept.stem, alphas, out, ["--plain"]))
                write_atomically(self.tables(kept.stem), self.told(kept.stem, (out / "comparison.md").read_text(encoding="utf-8")))
                written.append(kept.stem)
                mine = json.loads((out / "summary.json").read_text(encoding="utf-8"))["cases"]
                seconds |= hours(out, mine)
                cases += mine
        if cases:
            told = took(seconds, len(self.shapes) * len(self.alphas))
            if f"]({self.name}/{PICTURE})" in self.page.read_text(encoding="utf-8"):
                (self.kept / PICTURE).write_bytes(standings(cases, self.methods))
            self.write(f"{scores(cases, self.methods)}\n{board(cases, self.methods)}\n{told}")
        print(f"written: {self.page}, and the tables of {', '.join(written) or 'nothing'} in {self.kept}")
        return code

    def command(self, description: str | None) -> int:
        """The command line of a recipe that makes this table; the exit code."""
        parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
        parser.add_argument("tasks", nargs="*", metavar="TASK", help=f"what to run, each with tables of its own: {', '.join(self.shapes)}")
        parser.add_argument("--folder", type=Path, help="where the data sets are, each in a folder of its name")
        parser.add_argument("--alphas", nargs="+", choices=self.alphas, default=self.alphas, help="label skews (default: all)")
        where = Path("runs") / self.name
        parser.add_argument("--out", type=Path, default=where, help=f"where runs and tables go (default: {where})")
        parser.add_argument("--keep", action="store_true", help=f"put finished runs into docs/results/{self.name} as well, and run nothing")
        parser.add_argument("--page", action="store_true", help="make the page's tables from what is kept there, and run nothing")
        given, more = parser.parse_known_args()
        unknown = [task for task in given.tasks if task not in self.shapes]
        if unknown or not (given.tasks or given.page):
            parser.error(f"{f'there is no task {unknown[0]}' if unknown else 'no task is named'}; there are {', '.join(self.shapes)}")
        alphas, code = tuple(given.alphas), 0
        place, folder = given.out.resolve(), given.folder and given.folder.resolve()  # before the first change of folder
        for task in given.tasks:
            out = place / (task if alphas == self.alphas else f"{task}-{'-'.join(alphas)}")
            if given.keep:
                keep(out, self.kept / f"{task}.zip")
                continue
            if set(more) <= BESIDE:  # with other settings nothing has been measured yet
                unpack(self.kept / f"{task}.zip", out)
            if folder:
                os.chdir(folder)  # so that an experiment names its data alike wherever the sets are
            code = max(code, self.compare(task, alphas, out, more))
            if code in STOPPED:
                sys.exit(code)
        return max(code, self.paged()) if given.page else code


def scores(cases: Sequence[Mapping[str, Any]], methods: Sequence[str]) -> str:
    """Markdown: every case's mean test scores after the last round, a table for each protocol; bold are those that are no more than
    :data:`APART` below the highest of their case. Beside the personalised ones stands the answer that reads no text."""
    told = []
    for protocol in PROTOCOLS:
        unread = protocol == "personalised" and any(case.get("commonest") for case in cases)
        lines, shown = [], [m for m in methods if any(final_of(case, m, protocol)["count"] for case in cases)]
        for case in cases:
            each = [final_of(case, method, protocol) for method in shown]
            each = [case["commonest"]["score"] if case.get("commonest") else NO_SCORES, *each] if unread else each
            whole = max(score["count"] for score in each)  # a mean over fewer seeds is no match for one over all
            best = max((score["mean"] for score in each if score["count"] == whole and score["mean"] is not None), default=None)
            lines.append([case["label"], *(score_cell(score, best if score["count"] == whole else None) for score in each)])
        headers = ["", *([COMMONEST] if unread else []), *shown]
        told += [f"**{protocol.capitalize()}, mean over seeds (bold: within {APART:g} of the highest)**", ""]
        told += [f"| {' | '.join(line)} |" for line in (headers, ["---"] * len(headers), *lines)] + [""]
    return "\n".join(told)


def final_of(case: Mapping[str, Any], method: str, protocol: str) -> Mapping[str, Any]:
    """A method's score in a case: its mean over ``count`` seeds."""
    return next(row for row in case["rows"] if row["method"] == method)["scores"]["final"][protocol]


def score_cell(score: Mapping[str, Any], best: float | None) -> str:
    """Three decimals, bold where no order can be told from the best."""
    if score["mean"] is None:
        return "-"
    text = f"{score['mean']:.3f}".replace("0.", ".", 1)
    return f"**{text}**" if best is not None and score["mean"] >= best - APART - 1e-9 else text


def board(cases: Sequence[Mapping[str, Any]], methods: Sequence[str]) -> str:
    """Markdown: over all ``cases`` of summaries, how often each method is first or level with it in either protocol, and of the devices
    alone that took part; how often the bootstrap has it above an answer that reads no text; its mean rank; its upload, set-up included, as
    a share of the first method's; and where its personalised score (metric by metric, for what they count is not the same) and its device
    time are furthest ahead of another's."""
    rows = {method: [next(row for row in case["rows"] if row["method"] == method) for case in cases] for method in methods}
    told = [f"**Over {f'all {len(cases)} cells' if len(cases) > 1 else 'the one cell there is'} ({LEVEL})**", ""]
    headers = (
        "method",
        *(f"first or level, {of}" for of in ("personalised", "on devices that took part", "global")),
        "above each device's own commonest label",
        "mean rank",
        "rank, global",
    )
    told += [f"| {' | '.join([*headers, 'uploaded'])} |", "|" + " --- |" * 8]
    for method, mine in rows.items():
        cells = [method]
        has = {p: [case for case, row in zip(cases, mine, strict=True) if row["scores"]["final"][p]["mean"] is not None] for p in PROTOCOLS}
        whole, shared = ([of for case in has[p] if (of := case["first"][p])] for p in PROTOCOLS)
        part = [of for case in has["personalised"] if (of := case.get("took_part") or case["first"]["personalised"])]
        counted = [sum(method in of["level"] for of in each) for each in (whole, part, shared)]
        among = [len(has[p]) for p in ("personalised", "personalised", "global")]
        cells += [f"{level} of {count}" if count else "-" for level, count in zip(counted, among, strict=True)]
        unread = [found for case in cases if (of := case.get("commonest")) and (found := of["over"][method])]
        cells.append(f"{sum(found['low'] > 0 for found in unread)} of {len(unread)}" if unread else "-")
        for protocol in PROTOCOLS:
            rank = mean_of_all([row["rank"][protocol] for row in mine])
            cells.append("-" if rank is None else f"{rank:.1f}")
        sent, most = uploaded(mine), uploaded(rows[methods[0]])
        told.append(f"| {' | '.join([*cells, share_text(sent / most) if sent is not None and most is not None else '-'])} |")
    metrics = sorted({case["metric"] for case in cases})
    lines = []
    for method, mine in rows.items():
        leads = [
            (found, other, case)
            for case, row in zip(cases, mine, strict=True)
            for other, by in row["over"].items()
            if (found := by["personalised"])
        ]
        margins = []
        for metric in metrics:
            among = [(found["margin"], other, case["label"]) for found, other, case in leads if case["metric"] == metric]
            above = max(among, default=None)
            margins.append(f"{above[0]:+.4f} ({above[1]}; {above[2]})" if above and above[0] > 0 else "-")
        times = [(s, other, case["label"], found) for found, other, case in leads if (s := found["time_saved"]) is not None]
        saved = max(times, key=lambda one: one[:3], default=None)
        mark = "" if saved is None or saved[3].get("personalising_counted") else UNCOUNTED
        lines.append([method, *margins, f"{saved[0]:.0%}{mark} ({saved[1]}; {saved[2]})" if saved and saved[0] > 0 else "-"])
    headers = ["method", *(f"{metric} above it, personalised" for metric in metrics), "device time saved to where it ends"]
    told += ["", f"**Furthest ahead of another method{remark(lines)}**", ""]
    told += [f"| {' | '.join(headers)} |", "|" + " --- |" * len(headers)]
    told += [f"| {' | '.join(line)} |" for line in lines]
    return "\n".join(told) + "\n"


def spent(result: Mapping[str, Any]) -> float:
    """The host seconds of a run with its set-up; of one that took another's training over, what it added is not known, and is little."""
    taken = any(note.startswith(TAKEN_OVER) for note in result["notes"])
    return 0.0 if taken else result["host_seconds"] + result["setup_host_seconds"]


def hours(runs: Path, cases: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    """The host seconds of each case's runs that have ended, by its label."""
    found = [(json.loads((place / "experiment.json").read_text(encoding="utf-8"))["alpha"], host_seconds(place)) for place in ended(runs)]
    return {of["label"]: sum(seconds for alpha, seconds in found if alpha == of["alpha"]) for of in cases}


def host_seconds(place: Path) -> float:
    """Those of a run that has ended. Of one that diverged its rounds are known, if there were any, and not its set-up."""
    results, rows = place / "results.json", place / "rounds.jsonl"
    if results.exists():
        return spent(json.loads(results.read_text(encoding="utf-8")))
    return sum(json.loads(line)["host_seconds"] for line in rows.read_text(encoding="utf-8").split("\n")[:-1]) if rows.exists() else 0.0


def took(seconds: Mapping[str, float], cells: int) -> str:
    """Markdown: the host time of all runs of each cell, those of the search included, and together, of so many ``cells`` of the table."""
    each = ", ".join(f"{label}: {of / 3600:.1f} h" for label, of in seconds.items())
    all_in_all = sum(seconds.values())
    return (
        "Host time of all that was trained for a cell, its searches included (what one method took over of another's training counts "
        f"once), with whatever else the machine did meanwhile: {each}. Together "
        f"{all_in_all / 3600:.1f} h ({all_in_all:,.0f} s) for {len(seconds)} of the table's {cells} cells.\n"
    )


def ended(runs: Path) -> list[Path]:
    """The folders of the runs that have ended, with results or because they diverged, in order of names."""
    return sorted({path.parent for file in ("results.json", DIVERGED) for path in runs.glob(f"*/{file}")})


def uploaded(rows: Sequence[Mapping[str, Any]]) -> float | None:
    """Bytes over all of a method's cells, set-up included; None where all of its rates diverged in one."""
    costs = [(row["costs"]["bytes_up"], row["costs"]["setup_bytes_up"]) for row in rows]
    return None if any(None in of for of in costs) else sum(map(sum, costs))


def share_text(share: float) -> str:
    """In whole per cent, and below one to two digits."""
    return f"{share:.0%}" if share >= 0.01 or not share else f"{100 * share:.2g}%"


def keep(runs: Path, kept: Path) -> None:
    """Put the files of every run that has ended into the archive ``kept``, those that it has already included, in order of names. A name
    tells α."""
    unpack(kept, runs)
    found = {}
    for run in ended(runs):
        alpha = f"alpha{json.loads((run / 'experiment.json').read_text(encoding='utf-8'))['alpha']!r}-"
        found[f"{alpha}{run.name.removeprefix(alpha)}"] = run
    kept.parent.mkdir(parents=True, exist_ok=True)
    scratch = kept.with_suffix(".tmp")
    with ZipFile(scratch, "w", ZIP_LZMA) as archive:
        for name, run in sorted(found.items()):
            for file in FILES:
                if (run / file).exists():
                    archive.writestr(ZipInfo(f"{name}/{file}"), (run / file).read_bytes(), ZIP_LZMA)
    os.replace(scratch, kept)


def unpack(kept: Path, runs: Path) -> None:
    """Give ``runs`` every run of the archive that it has not finished itself; what says that it ended comes last.

    Raises:
        ValueError: the archive holds anything but runs.
    """
    if not kept.exists():
        return
    with ZipFile(kept) as archive:
        names = archive.namelist()
        for name in names:
            run, _, file = name.partition("/")
            if file not in FILES or Path(run).name != run:
                raise ValueError(f"{kept} holds {name}, which is no file of a run")
        for run in sorted({name.partition("/")[0] for name in names}):
            if not (runs / run / "results.json").exists():
                (runs / run).mkdir(parents=True, exist_ok=True)
                for file in FILES:
                    if f"{run}/{file}" in names:
                        write_atomically(runs / run / file, archive.read(f"{run}/{file}").decode("utf-8"))
