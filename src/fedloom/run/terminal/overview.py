"""What ``fedloom --help`` says, and what the list of methods says of each. Imports next to nothing, so that it is quick."""

import re
import sys

SOURCE = re.compile(r" \((?:[^()]|\([^()]*\))*\d{4}\.\d{5}(?:[^()]|\([^()]*\))*\)")
"""A bracket that cites a paper by its number, of which the list has a column."""


def what_it_is(kind: type) -> str:
    """The first sentence about a method or curriculum, without sources: of its file, or of the class where a file defines several."""
    module = sys.modules[kind.__module__]
    alike = [
        other
        for other in vars(module).values()
        if isinstance(other, type) and other.__module__ == module.__name__ and "paper" in vars(other)
    ]
    text = (kind.__doc__ if len(alike) > 1 else module.__doc__) or kind.__doc__ or ""
    first = " ".join(text.split("\n\n")[0].replace("``", "").split())
    return SOURCE.sub("", first).split(". ")[0].rstrip(".") + "."


HELP = """\
fedloom fine-tunes pre-trained language models across many devices that keep their data, simulated or real.

usage: fedloom COMMAND ...

  run METHOD              one method, in one run folder; stopped, the same command resumes it
  compare METHOD METHOD   methods x data sets x alphas x seeds, learning rates searched alike: one table, one report
  serve METHOD            the same method in a real federation: the server (fedloom certs first)
  join HOST:PORT DATA     a device of it, with data of its own
  status HOST:PORT        who is there, and how far it is
  certs DIR               the certificates and keys of a federation
  report DIR...           an HTML page about runs or a comparison
  describe METHOD         what would be run and what it would cost; trains nothing
  partition               which device would hold what, as a table, a picture, a file
  methods                 the methods and the curricula there are, with the paper of each
  evaluate DIR            the last checkpoint of a run, evaluated again
  export DIR OUT          a folder that plain PEFT (or, merged, transformers) loads
  doctor                  whether this machine has what is needed

Start here. It works offline: questions and encoder are installed with the package.

  fedloom run fibecfed                                       five minutes on two cores
  fedloom run fibecfed --rounds 5 --method.inner.lr 1e-3     other settings
  fedloom run fibecfed --data FOLDER --model FOLDER          your Parquet, CSV or JSON lines; your Hugging Face model
  fedloom compare lora fibecfed local --alpha 0.1            who gains from what, on more skewed devices
  fedloom compare lora fibecfed --seeds 1 2 3 --lrs 5e-4 2e-3 8e-3 --jobs 2      rates searched on validation; two processes
  fedloom export runs/NAME OUT --client 7                    device 7's own model

METHOD+CURRICULUM, such as lora+voc, gives a method's local training a curriculum; fedloom methods lists both.
METHOD may also be a Python file that defines a method (or an Experiment named 'experiment'), or the experiment.json of a run.
fedloom COMMAND --help shows what a command takes; fedloom run METHOD --help adds the settings of that method.
FEDLOOM_TRACEBACK=1 shows where an error came from; FEDLOOM_CACHE names the folder that keeps tokens for the next run.
fedloom --version shows the version.
"""

COMPARE = """\
Run several methods on the same partitions, with the same seeds and the same learning rates to choose from, and tell them apart: mean and
deviation over seeds, ranks, a paired bootstrap over devices against a reference, and what it cost to reach a score.

  fedloom compare lora fibecfed local --seeds 1 2 3                  each method's own learning rate
  fedloom compare lora fibecfed --lrs 5e-4 2e-3 8e-3 --seeds 1 2 3   rates searched on validation, with the first seed
  fedloom compare lora fibecfed --data trec FOLDER --alphas 1 0.1 --jobs 2

Stopped however, the same command goes on; with the same --out and more methods, seeds or rates, finished runs are used as they are.
It writes comparison.json (the results of the table's runs), summary.json (everything computed from them), comparison.csv, comparison.md,
comparison.tex and report.html. How to read them: docs/comparing.md."""
