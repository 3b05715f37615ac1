"""The command line: words in, one call into ``run/`` each, tables and paths out. Nothing is decided or computed here.

Options are generated from the types of ``Experiment`` and of the method that was named, so ``--method.FIELD`` is
always what the method has.
PyTorch and the rest are imported by the command that needs them: ``fedloom --help`` is quick.
"""

from __future__ import annotations

import contextlib
import gc
import importlib.metadata
import io
import os
import re
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import tyro
from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from fedloom.finding import meant
from fedloom.run.terminal import arguments
from fedloom.run.terminal.ending import Terminated, quiet, terminable
from fedloom.run.terminal.overview import COMPARE, HELP, what_it_is

T = TypeVar("T")

FEW = 12
"""Runs of a comparison up to which each has a line of its own at the end."""


class Usage(ValueError):
    """Words that do not make a command, with what would."""


def run(words: Sequence[str]) -> int:
    """One method."""
    (word, *_), rest = _named(words, "fedloom run METHOD", "one method, such as: fedloom run fibecfed")
    with loading():
        from fedloom.run import recipes
        from fedloom.run.loop import run as run_experiment
        from fedloom.run.terminal import options

    recipe = recipes.resolve(word)
    given = _parse(options.for_run(recipe), rest, f"fedloom run {word}", f"Run {recipe.kind.name}: {recipe.kind.paper}.")
    experiment = options.experiment_of(given)
    out = given.out or recipes.default_folder(experiment)
    return _told(out, lambda: run_experiment(experiment, out, given.plain or None, track=given.track))


def compare(words: Sequence[str]) -> int:
    """Several methods."""
    wanted = "methods, such as: fedloom compare lora fibecfed"
    names, rest = _named(words, "fedloom compare METHOD METHOD ...", wanted, several=True, about=f"{COMPARE}\n\n")
    with loading():
        from fedloom.run import recipes
        from fedloom.run.comparison import compare as comparing
        from fedloom.run.comparison.plan import Plan, named_methods, trains_as
        from fedloom.run.comparison.tables import labelled, terminal
        from fedloom.run.terminal import options
        from fedloom.run.terminal.console import results_table

    found = [recipes.resolve(name) for name in names]
    methods = named_methods([recipe.method for recipe in found])
    given = _parse(options.for_compare(), rest, f"fedloom compare {' '.join(names)}", COMPARE)
    if given.lr is not None and given.lrs:
        raise Usage("--lr sets one learning rate for every method and --lrs searches several; give one of them")
    for one in ("alpha", "seed"):
        if vars(given)[f"{one}s"] and any(word.partition("=")[0] == f"--{one}" for word in rest):
            raise Usage(f"--{one} names one and --{one}s several; give one of them")
    if given.share_training and not any(map(trains_as, methods.values())):
        raise Usage(
            "--share-training is for methods that train as another one does, such as lora-finetuned and lora-prior, and of "
            f"{', '.join(methods)} none does; leave it out"
        )
    grid = {"data": given.data, "alphas": given.alphas or (given.alpha,), "seeds": given.seeds or (given.seed,)}
    if not given.data:
        raise Usage("--data names no data set; give one or several")
    start = {"method": next(iter(methods.values())), "data": given.data[0], "alpha": grid["alphas"][0], "seed": grid["seeds"][0]}
    rates = given.lrs or (() if given.lr is None else (given.lr,))
    plan = Plan(options.experiment_of(given, **start), methods, **grid, rates=rates, shared=given.share_training)
    for word, recipe in zip(names, found, strict=True):
        if recipe.experiment and (others := recipes.passed_over(recipe.experiment, [run.experiment for run in plan.every()])):
            print(f"note: of {word} the method alone is taken; {', '.join(others)}", file=sys.stderr)
    out = given.out or recipes.comparison_folder([run.experiment for run in plan.every()], plan.shared)
    ended = comparing.compare(plan, out, given.jobs, given.plain or None, given.reference, given.target, given.track)
    if ended.summary is not None:
        if len(ended.results) <= FEW:
            Console().print(results_table(labelled(ended.results, plan)))
        for title, headers, rows in terminal(ended.summary):
            _show(title, headers, rows)
        print(f"results: {out / 'comparison.json'}, .csv, .md, .tex and {out / 'summary.json'}\nreport:  {ended.report}")
    for name, paragraph in ended.failed.items():
        _complain(f"{name} failed: {paragraph}")
    return 1 if ended.failed else 0


def serve(words: Sequence[str]) -> int:
    """The server of a real federation."""
    (word, *_), rest = _named(words, "fedloom serve METHOD", "one method, such as: fedloom serve fibecfed --certs certs/server")
    with loading():
        from fedloom.run import recipes
        from fedloom.run.deployment.certificates import public_keys
        from fedloom.run.deployment.federation import Patience
        from fedloom.run.deployment.federation import serve as serve_experiment
        from fedloom.run.experiment import EngineSettings
        from fedloom.run.terminal import options

    recipe = recipes.resolve(word)
    given = _parse(options.for_serve(recipe), rest, f"fedloom serve {word}", f"Serve {recipe.kind.name}: {recipe.kind.paper}.")
    devices = len(public_keys(given.certs))
    asked: dict[str, Any] = {"clients": devices, "cohort": given.cohort or given.start_with or devices}
    experiment = options.experiment_of(given, **asked, engine=EngineSettings(overcommit=given.overcommit))
    out = given.out or recipes.default_folder(experiment, served=True)
    patience = Patience(given.wait, given.deadline, given.linger)
    how: dict[str, Any] = {"plain": given.plain or None, "track": given.track, "start_with": given.start_with}
    return _told(out, lambda: serve_experiment(experiment, out, given.certs, given.listen, patience, **how))


def join(words: Sequence[str]) -> int:
    """A device of a real federation."""
    given = _parse(arguments.Join, words, "fedloom join")
    with loading():
        from fedloom.run.deployment.device import folder_of
        from fedloom.run.deployment.greeting import Own
        from fedloom.run.deployment.joining import join as join_federation
    import threading

    def said(text: str) -> None:
        print(f"fedloom: {text}", file=sys.stderr, flush=True)

    recipe, stop = "" if given.recipe is None else str(given.recipe.resolve()), threading.Event()
    own = Own(given.data, given.model, given.text, given.label, given.threads, recipe, given.recompute)
    join_federation(given.server, given.certs, own, folder_of(given.out, given.data), given.deadline, said, stop, given.memory)
    return 0


def certs(words: Sequence[str]) -> int:
    """Certificates and keys."""
    given = _parse(arguments.Certs, words, "fedloom certs")
    from fedloom.run.deployment.certificates import issue, uncertified, without_private

    made = issue(given.folder, given.devices, given.names)
    for path in made:
        print(path)
    if others := uncertified(given.folder, given.names):
        print(
            f"note: the server that is there is not certified for {', '.join(others)}, and devices can't reach it so; to certify it anew, "
            f"delete server.pem and server.key in {given.folder / 'server'} and name all its names (ca.key and the devices' keys stay)",
            file=sys.stderr,
        )
    if elsewhere := without_private(given.folder, given.devices):
        print(
            f"note: of device {', '.join(map(str, elsewhere))} only the public half of the key is here, so nothing was made for it: it has "
            f"its key; to make one anew, delete its K.pub in {given.folder / 'server' / 'devices'}",
            file=sys.stderr,
        )
    print(f"server: fedloom serve METHOD --certs {given.folder / 'server'}")
    print(f"device: fedloom join HOST:PORT DATA --certs {given.folder / 'device-0'}    (its folder, and no other, goes to each)")
    return 0


def status(words: Sequence[str]) -> int:
    """How a federation stands."""
    given = _parse(arguments.Status, words, "fedloom status")
    from fedloom.run.deployment.joining import asked

    _show("", ("", ""), asked(given.server, given.certs))
    return 0


def report(words: Sequence[str]) -> int:
    """A page about runs."""
    from fedloom.run.comparison.compare import run_folders, summary_in
    from fedloom.run.pages.report import write_report

    given = _parse(arguments.Report, words, "fedloom report")
    alone = len(given.folders) == 1
    only = given.folders[0] if alone else Path()
    print(write_report(run_folders(given.folders), given.out or only / "report.html", summary_in(only) if alone else None))
    return 0


def describe(words: Sequence[str]) -> int:
    """What would be run."""
    (word, *_), rest = _named(words, "fedloom describe METHOD", "one method, such as: fedloom describe fibecfed")
    from fedloom.run import recipes
    from fedloom.run.describe import describe as described
    from fedloom.run.terminal import options
    from fedloom.run.terminal.console import partition_table

    recipe = recipes.resolve(word)
    given = _parse(options.for_describe(recipe), rest, f"fedloom describe {word}", "What would be run and what it would cost.")
    found = described(options.experiment_of(given))
    _show("", ("", ""), found.lines)
    Console().print(partition_table(found.counts, found.classes))
    return 0


def partition(words: Sequence[str]) -> int:
    """Who would hold what."""
    from fedloom.run.describe import dealt, draw
    from fedloom.run.terminal import options
    from fedloom.run.terminal.console import partition_table

    bare = [i for i, w in enumerate(words) if w == "--plot" and (i + 1 == len(words) or words[i + 1].startswith("--"))]
    words = [part for i, w in enumerate(words) for part in ([w, "partition.png"] if i in bare else [w])]
    given = _parse(options.for_partition(), words, "fedloom partition", "Which device would hold what. No model is needed.")
    source, made, counts = dealt(options.experiment_of(given, method=None, cohort=1))
    if given.plot is not None:
        draw(counts, source.task.classes, given.plot)
    Console().print(partition_table(counts, source.task.classes))
    for note in source.notes:
        print(f"note: {note}")
    if given.save is not None:
        made.save(given.save)
        print(f"partition: {given.save} (use it with --partition {given.save})")
    if given.shards is not None:
        from fedloom.data.shards import write_shards

        made_there = write_shards(source, made, given.shards)
        print(f"shards:  {given.shards}/0 to {given.shards}/{len(made_there) - 1} (a device: fedloom join HOST:PORT {given.shards}/0)")
    if given.plot is not None:
        print(f"picture: {given.plot}")
    return 0


def methods(words: Sequence[str]) -> int:
    """The methods there are."""
    _parse(arguments.Nothing, words, "fedloom methods", "The methods there are, with the paper of each.")
    from fedloom.client.curricula import all_curricula
    from fedloom.methods import all_methods

    rows = [(name, kind.paper, what_it_is(kind)) for name, kind in all_methods().items()]
    _show("", ("method", "paper", "what it is"), rows)
    print("fedloom run METHOD --help shows a method's settings. A Python file that defines a method is one too.")
    orders = [(name, kind.paper, what_it_is(kind)) for name, kind in all_curricula().items()]
    _show("", ("curriculum", "paper", "what it is"), orders)
    print("fedloom run METHOD+CURRICULUM gives a method a curriculum; with --help it shows the settings of both.")
    return 0


def evaluate(words: Sequence[str]) -> int:
    """A run, evaluated again."""
    from fedloom.data.numbers import EXACT as NUMBERS
    from fedloom.run import recipes
    from fedloom.run.again import evaluate_again
    from fedloom.run.terminal.console import score_text

    given = _parse(arguments.Evaluate, words, "fedloom evaluate")
    experiment = recipes.experiment_in(given.folder, given.recipe)
    found = evaluate_again(experiment, given.folder, recipes.resolve(given.method).kind if given.method else None)
    rows = [(split, score_text(scores["personalised"]), score_text(scores["global"])) for split, scores in found.scores.items()]
    solved = [(split, scores[NUMBERS]) for split, scores in found.scores.items() if NUMBERS in found.scores["test"]]
    rows += [(f"{split}, exact match", score_text(of["personalised"]), score_text(of["global"])) for split, of in solved]
    _show(f"{found.method} after round {found.round}: {found.metric}", ("split", "personalised", "global"), rows)
    if found.recorded is None:
        print("nothing was recorded for this to be compared with")
    else:
        print("equal to what was recorded" if found.equal else f"NOT equal to what was recorded: {found.recorded}")
    return 0 if found.recorded is None or found.equal else 1


def export(words: Sequence[str]) -> int:
    """A folder that PEFT or transformers loads."""
    from fedloom.run import recipes
    from fedloom.run.deployment.own_model import asked_in, export_own
    from fedloom.run.export import export as exported

    given = _parse(arguments.Export, words, "fedloom export")
    if (place := asked_in(given.folder)) is not None:
        if given.client is not None:
            raise Usage(f"{given.folder} is one device's own; leave --client out")
        whose, loading = export_own(place, given.out, given.merge, given.recipe)
        print(whose)
    else:
        loading = exported(recipes.experiment_in(given.folder, given.recipe), given.folder, given.out, given.client, given.merge)
    print(f"{given.out}\nload it with: {loading}")
    return 0


def doctor(words: Sequence[str]) -> int:
    """Whether this machine has what is needed."""
    _parse(arguments.Nothing, words, "fedloom doctor", "Whether this machine has what is needed. Exit code 1 if it has not.")
    from fedloom.run.terminal.doctor import examine

    found = examine(Path())
    _show("", ("", "", ""), [(f.name, {True: "ok", False: "BAD", None: "-"}[f.ok], f.text) for f in found])
    bad = [f.name for f in found if f.ok is False]
    print(f"mend these: {', '.join(bad)}" if bad else f"fedloom {version()} has what it needs")
    return 1 if bad else 0


RESUMING = ("run", "compare", "serve")
"""Commands that go on where they stopped."""

COMMANDS: Mapping[str, Callable[[Sequence[str]], int]] = {
    command.__name__: command
    for command in (run, compare, serve, join, status, certs, report, describe, partition, methods, evaluate, export, doctor)
}


def main(words: Sequence[str] | None = None) -> int:
    """Run the command that ``words`` (those of the process by default) name, and return the exit code.

    0: done. 1: a run failed. 2: asked wrongly. 130 and 143: stopped by Ctrl-C and by SIGTERM; the same command resumes.
    """
    words = sys.argv[1:] if words is None else list(words)
    try:
        with terminable(), quiet():
            return _dispatch(words)
    except KeyboardInterrupt as stopped:
        kept = "; the same command resumes" if words and words[0] in RESUMING else ""
        _complain(f"stopped{kept}")
        return 143 if isinstance(stopped, Terminated) else 130
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # whoever read our output has enough of it
        return 0
    except Exception as error:
        if os.environ.get("FEDLOOM_TRACEBACK"):
            raise
        if isinstance(error, Usage):
            _complain(str(error))
            return 2
        from fedloom.run.terminal.failures import explain

        explained = explain(error, resumes=bool(words) and words[0] in RESUMING, served=words[:1] == ["serve"])
        if explained is None:  # a fault of the program: where it is must be seen
            raise
        paragraph, code = explained
        _complain(paragraph)
        return code
    finally:
        gc.unfreeze()


@contextlib.contextmanager
def loading() -> Iterator[None]:
    """Imports without garbage collection, which would take a fifth of their time: hardly anything is garbage when it has just been loaded.
    Nor is it looked through later on, as long as the command runs."""
    collects = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        gc.freeze()
        if collects:
            gc.enable()


def _dispatch(words: Sequence[str]) -> int:
    if not words or words[0] in ("-h", "--help", "help"):
        print(HELP, end="")
        return 0 if words else 2
    if words[0] == "--version":
        print(f"fedloom {version()}")
        return 0
    if words[0] not in COMMANDS:
        there = f"There are: {', '.join(COMMANDS)}. fedloom --help shows what each does"
        raise Usage(f"there is no command '{words[0]}'.{meant(words[0], COMMANDS)} {there}")
    return COMMANDS[words[0]](words[1:])


def version() -> str:
    """The installed version."""
    return importlib.metadata.version("fedloom")


def _told(out: Path, running: Callable[[], dict[str, Any]]) -> int:
    """The end of a run in ``out``: its results, its report, and whether anything was run for them."""
    from fedloom.run.terminal.console import further_text, personalising_text, results_table, solved_text

    before = (out / "results.json").exists()
    results = running()
    if before:
        print(f"{out} holds this run's results already, and nothing was run; delete it, or give another --out, to run anew")
    from fedloom.run.pages.report import write_report  # loads matplotlib, which no run should wait for

    report = write_report([out], out / "report.html")
    Console().print(results_table([results]))
    if results["final"].get("further"):
        print(further_text(results["final"]["further"]))
    if (own := results["final"].get("personalising")) and own["flops"]:
        print(personalising_text(own))
    if results.get("exact_match"):
        print(solved_text(results["exact_match"]))
    print(f"results: {out / 'results.json'}\nreport:  {report}")
    return 0


def _named(words: Sequence[str], usage: str, wanted: str, several: bool = False, about: str = "") -> tuple[list[str], list[str]]:
    """(the names that come first, the options after them). ``about``: what ``--help`` without a name says first."""
    at = next((i for i, word in enumerate(words) if word.startswith("-")), len(words))
    names, rest = list(words[:at]), list(words[at:])
    if not names and rest[:1] in (["-h"], ["--help"]):
        print(f"usage: {usage} [options]\n\n{about}Name {wanted}. With --help after it, its options are shown. fedloom methods lists them.")
        raise SystemExit(0)
    if not names or (len(names) > 1 and not several):
        came = f"{len(names)} came: {' '.join(names)}" if names else f"'{rest[0]}' came first" if rest else "none came"
        raise Usage(f"name {wanted}; {came}. fedloom methods lists them; options come after the name")
    return names, rest


def _parse(kind: type[T], words: Sequence[str], program: str, description: str | None = None) -> T:
    """The options. What the parser has to complain about becomes one paragraph, with the options there are where one is unknown."""
    said = io.StringIO()
    try:
        with contextlib.redirect_stderr(said):
            return tyro.cli(kind, prog=program, description=description, args=list(words), config=CONFIG)
    except SystemExit as ended:
        if not ended.code:
            raise
    _, _, body = said.getvalue().partition("\n")  # without the title of the box
    paragraph = re.sub(r"(?:[\s\u2500-\u257f]|-{2,}(?=\s)|\|)+", " ", body).strip().rstrip(".")
    paragraph = re.sub(r"^Error parsing ([a-z][\w.-]*):", r"Error parsing --\1.*:", paragraph)  # a group of options, not one
    paragraph = re.sub(r"(?<=Perhaps you meant: ).*?(?=\.? For full helptext)", _only_names, paragraph)
    paragraph = re.sub(r"\.? For full helptext,", ". For full helptext,", paragraph)
    listed = f" There are: {' '.join(long_options(kind))}" if "Unrecognized" in paragraph else ""
    raise Usage(f"{paragraph}.{listed}")


def _only_names(found: re.Match[str]) -> str:
    """Of what the parser proposes, which comes with the whole help of each."""
    return " or ".join(dict.fromkeys(re.findall(r"--[a-z][\w.-]*", found[0])))


CONFIG = (tyro.conf.AvoidSubcommands, tyro.conf.FlagCreatePairsOff, tyro.conf.PositionalRequiredArgs)


def long_options(kind: type[Any]) -> list[str]:
    """The long options that ``kind`` gives, as the parser has them."""
    shown, width = io.StringIO(), os.environ.get("COLUMNS")
    os.environ["COLUMNS"] = "80"  # a wider help stands in two columns, of which the second begins no line
    try:
        with contextlib.redirect_stdout(shown), contextlib.suppress(SystemExit):
            tyro.cli(kind, args=["--help"], config=CONFIG)
    finally:
        del os.environ["COLUMNS"]
        os.environ |= {"COLUMNS": width} if width is not None else {}
    return sorted(set(re.findall(r"^\W*(?:-\w, )?(--[a-z][\w.-]*)", shown.getvalue(), re.MULTILINE)))


def _show(title: str, headers: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    if title:
        print(f"\n{title}")
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, padding=(0, 0, 0, 1), show_header=any(headers))
    for header in headers:
        table.add_column(header, overflow="fold")
    for row in rows:
        table.add_row(*(Text(cell) for cell in row))
    Console().print(table)


def _complain(paragraph: str) -> None:
    print(f"fedloom: {' '.join(paragraph.split())}", file=sys.stderr)
