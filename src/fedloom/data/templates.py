"""Templates and label words by data set: how a classification is put to a language model (``model/cloze.py``).

A masked model's template has its gap before the text, a causal model's at the end. They were written down, not tuned; ``--template`` and
``--label-words`` put others in their place.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import NamedTuple

from fedloom.data.tasks import Classification, DataError


class Known(NamedTuple):
    """For masked models, for causal ones, and by class name the classes' words, in the order of the public set's label ids."""

    masked: str
    causal: str
    words: Mapping[str, str]


class Put(NamedTuple):
    """How a classification is put: for masked models, for causal ones, and the classes' words in the order of its label ids."""

    masked: str
    causal: str
    words: tuple[str, ...]


ENTAILED = {"entailment": "Yes", "not_entailment": "No"}
KNOWN = {
    "trec": Known(
        "This question asks about a {mask} : {text}",
        "{text} This question asks about a {mask}",
        {"ABBR": "abbreviation", "ENTY": "thing", "DESC": "description", "HUM": "person", "LOC": "place", "NUM": "number"},
    ),
    "sst2": Known("It was {mask} : {text}", "{text} It was {mask}", {"negative": "terrible", "positive": "great"}),
    "cola": Known("This sentence is {mask} : {text}", "{text} This sentence is {mask}", {"unacceptable": "wrong", "acceptable": "correct"}),
    "mrpc": Known("{mask} , {text} , {pair}", "{text} {pair} Do they say the same? {mask}", {"not_equivalent": "No", "equivalent": "Yes"}),
    "rte": Known("{mask} , {text} , so {pair}", "{text} So {pair} True? {mask}", ENTAILED),
    "qnli": Known("{mask} , {text} {pair}", "{text} {pair} Does this answer the question? {mask}", ENTAILED),
    "subj": Known("This is {mask} : {text}", "{text} This is {mask}", {"objective": "fact", "subjective": "opinion"}),
    "ag_news": Known(
        "{mask} news : {text}",
        "{text} This is news about {mask}",
        {"World": "world", "Sports": "sports", "Business": "business", "Sci/Tech": "technology"},
    ),
}
"""By a word, or two, of the data set's name."""


def template_for(name: str, task: Classification, template: str = "", words: tuple[str, ...] = ()) -> Put:
    """What the experiment says, else what is known of the data set ``name``, else a plain template and the classes' own names.

    Known words go by the classes' names, whatever their order; if the classes are numbers, by the public set's order of label ids.

    Raises:
        DataError: the classes' names are numbers, and nothing tells words for them.
    """
    called = f"_{re.sub(r'[^a-z0-9]+', '_', name.lower())}_"
    known = next((known for part, known in KNOWN.items() if f"_{part}_" in called), None)
    if known is None or len(known.words) != len(task.classes):
        body = "{text} , {pair}" if len(task.texts) == 2 else "{text}"
        known = Known(f"{{mask}} : {body}", f"{body} : {{mask}}", {})
    found = words or _words(known, task.classes) or tuple(re.split(r"[^\w]+", one.strip().lower())[-1] for one in task.classes)
    if any(word.isdigit() for word in found):
        raise DataError(f"the classes are called {list(task.classes)}; name a word for each with --label-words, in this order")
    return Put(template or known.masked, template or known.causal, found)


def _words(known: Known, classes: Sequence[str]) -> tuple[str, ...]:
    """The known words in the order of ``classes``; none where these have other names."""
    if known.words and all(one.strip().isdigit() for one in classes):
        return tuple(known.words.values())
    by_name = {name.lower(): word for name, word in known.words.items()}
    return tuple(by_name[one.strip().lower()] for one in classes) if all(one.strip().lower() in by_name for one in classes) else ()
