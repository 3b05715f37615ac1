"""Templates and label words by data set: how a classification is put to a language model (``model/cloze.py``).

A masked model's template has its gap before the text, a causal model's at the end. They were written down, not tuned; ``--template`` and
``--label-words`` put others in their place.
"""

from __future__ import annotations

import re
from typing import NamedTuple

from fedloom.data.tasks import Classification, DataError


class Known(NamedTuple):
    """For masked models, for causal ones, and the classes' words in the order of the label ids."""

    masked: str
    causal: str
    words: tuple[str, ...]


KNOWN = {
    "trec": Known(
        "This question asks about a {mask} : {text}",
        "{text} This question asks about a {mask}",
        ("abbreviation", "description", "thing", "person", "place", "number"),
    ),
    "sst2": Known("It was {mask} : {text}", "{text} It was {mask}", ("terrible", "great")),
    "cola": Known("This sentence is {mask} : {text}", "{text} This sentence is {mask}", ("wrong", "correct")),
    "mrpc": Known("{mask} , {text} , {pair}", "{text} {pair} Do they say the same? {mask}", ("No", "Yes")),
    "rte": Known("{mask} , {text} , so {pair}", "{text} So {pair} True? {mask}", ("Yes", "No")),
    "qnli": Known("{mask} , {text} {pair}", "{text} {pair} Does this answer the question? {mask}", ("Yes", "No")),
    "subj": Known("This is {mask} : {text}", "{text} This is {mask}", ("fact", "opinion")),
    "ag_news": Known("{mask} news : {text}", "{text} This is news about {mask}", ("world", "sports", "business", "technology")),
}
"""By a word of the data set's name. Orders of the labels are those of the public sets: RTE and QNLI count entailment first."""


def template_for(name: str, task: Classification, template: str = "", words: tuple[str, ...] = ()) -> Known:
    """What the experiment says, else what is known of the data set ``name``, else a plain template and the classes' own names.

    Raises:
        DataError: the classes' names are numbers, and nothing tells words for them.
    """
    parts = re.split(r"[^a-z0-9_]+", name.lower())
    known = next((KNOWN[part] for part in parts if part in KNOWN), None)
    if known is None or len(known.words) != len(task.classes):
        body = "{text} , {pair}" if len(task.texts) == 2 else "{text}"
        known = Known(f"{{mask}} : {body}", f"{body} : {{mask}}", ())
    found = words or known.words or tuple(re.split(r"[^\w]+", one.strip().lower())[-1] for one in task.classes)
    if any(word.isdigit() for word in found):
        raise DataError(f"the classes are called {list(task.classes)}; name a word for each with --label-words, in this order")
    return Known(template or known.masked, template or known.causal, found)
