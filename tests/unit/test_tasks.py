"""Scores against figures worked out by hand; columns found by name and by what they hold, or refused."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from sklearn import metrics as theirs

from fedloom.data.tasks import Classification, Column, DataError, choose_columns, metric_for, metric_told


def task(metric="accuracy", classes=("no", "yes"), texts=("text",)):
    return Classification(texts, "label", classes, metric)


def logits_of(predicted, classes=2):
    return np.eye(classes)[predicted] * 3.0 - 1.0


def test_scores_are_those_worked_out_by_hand():
    labels, predicted = np.array([1, 1, 1, 0, 0, 0, 0, 0]), [1, 1, 0, 1, 0, 0, 0, 0]  # tp 2, fp 1, fn 1, tn 4
    logits = logits_of(predicted)
    assert task().scores(labels, logits) == {"accuracy": 0.75}
    assert task("f1").scores(labels, logits) == pytest.approx({"accuracy": 0.75, "f1": 2 / 3})
    mcc = (2 * 4 - 1 * 1) / np.sqrt(3 * 3 * 5 * 5)
    assert task("mcc").scores(labels, logits) == pytest.approx({"accuracy": 0.75, "mcc": mcc})


def test_f1_of_two_classes_is_that_of_class_one_and_of_more_the_mean_over_those_there_are():
    assert task("f1").scores(np.array([0, 0, 1]), logits_of([0, 0, 0]))["f1"] == 0.0
    assert task("f1").scores(np.array([1, 1, 0]), logits_of([1, 1, 1]))["f1"] == pytest.approx(0.8)
    three = task("f1", classes=("a", "b", "c"))
    assert three.scores(np.array([0, 0, 1]), logits_of([0, 0, 1], 3))["f1"] == 1.0, "class c neither occurs nor is predicted"
    assert three.scores(np.array([0, 0, 1]), logits_of([0, 0, 2], 3))["f1"] == pytest.approx(1 / 3), "class c is predicted"


@given(st.integers(2, 5), st.lists(st.tuples(st.integers(0, 4), st.integers(0, 4)), min_size=1, max_size=30))
@pytest.mark.filterwarnings("ignore::UserWarning")
def test_scores_are_those_of_scikit_learn(classes, pairs):
    labels, predicted = np.array(pairs).T % classes
    names = tuple("abcde"[:classes])
    average = {"average": "binary"} if classes == 2 else {"average": "macro"}
    due = {
        "accuracy": theirs.accuracy_score(labels, predicted),
        "mcc": theirs.matthews_corrcoef(labels, predicted),
        "f1": theirs.f1_score(labels, predicted, zero_division=0, **average),
    }
    for metric in ("mcc", "f1"):
        scores = task(metric, classes=names).scores(labels, logits_of(predicted, classes))
        assert scores == pytest.approx({name: due[name] for name in ("accuracy", metric)}, abs=1e-12)


def test_one_label_everywhere_has_scores_and_no_warning():
    assert task("mcc").scores(np.zeros(3, int), logits_of([0, 0, 0])) == {"accuracy": 1.0, "mcc": 0.0}
    assert task("f1").scores(np.zeros(3, int), logits_of([0, 0, 0])) == {"accuracy": 1.0, "f1": 0.0}


@pytest.mark.parametrize(
    ("labels", "logits", "said"),
    [
        (np.zeros(2, int), np.zeros((3, 2)), r"got \(2,\) and \(3, 2\)"),
        (np.zeros(2, int), np.zeros((2, 3)), r"logits \(n, 2\)"),
        (np.zeros((2, 1), int), np.zeros((2, 2)), "labels"),
        (np.zeros(0, int), np.zeros((0, 2)), "n > 0"),
        (np.array([0, 2]), np.zeros((2, 2)), "label 2 is no class; there are 0 to 1"),
        (np.array([-1, 0]), np.zeros((2, 2)), "label -1 is no class"),
        (np.array([0, 1]), np.array([[0.0, 1.0], [np.nan, 0.0]]), "example 1 are not finite"),
        (np.array([0, 1]), np.array([[np.inf, 1.0], [0.0, 0.0]]), "example 0 are not finite"),
    ],
)
def test_what_cannot_be_scored_is_refused(labels, logits, said):
    with pytest.raises(DataError, match=said):
        task().scores(labels, logits)


def test_a_task_is_refused_that_is_no_classification():
    with pytest.raises(DataError, match="no metric 'auc'; there are accuracy, mcc, f1"):
        task("auc")
    with pytest.raises(DataError, match="at least two classes"):
        task(classes=("only",))
    for texts in ((), ("a", "b", "c")):
        with pytest.raises(DataError, match="one text column or two"):
            task(texts=texts)


@pytest.mark.parametrize(
    ("name", "metric"),
    [("cola", "mcc"), ("nyu-mll/glue:cola", "mcc"), ("CoLA", "mcc"), ("chocolate", "accuracy"), ("mrpc", "f1"),
     ("glue_qqp", "f1"), ("trec", "accuracy")],
)  # fmt: skip
def test_the_metric_a_set_is_known_by(name, metric):
    assert metric_for(name) == metric


S, N, C = Column("string", 100, 100), Column("integer", 3, 100), Column("classes", 3, 100)
LOW, ID, NESTED = Column("string", 3, 100), Column("integer", 100, 100), Column("other", 0, 100)


@pytest.mark.parametrize(
    ("columns", "found"),
    [
        ({"text": S, "label": N}, (("text",), "label")),
        ({"sentence1": S, "sentence2": S, "idx": ID, "label": C}, (("sentence1", "sentence2"), "label")),
        ({"question": S, "sentence": S, "label": C}, (("question", "sentence"), "label")),
        ({"sentence": S, "label": C}, (("sentence",), "label")),
        ({"premise": S, "hypothesis": S, "label": C}, (("premise", "hypothesis"), "label")),
        ({"Question": S, "Label": LOW}, (("Question",), "Label")),
        ({"text": S, "coarse_label": C, "fine_label": C}, (("text",), "coarse_label")),
        ({"text": S, "labels": N, "coarse_label": C}, (("text",), "labels")),
        ({"review_body": S, "stars": N, "id": ID}, (("review_body",), "stars")),
        ({"words": S, "kind": LOW, "extra": NESTED}, (("words",), "kind")),
        ({"words": LOW, "label": N}, (("words",), "label")),
        ({"text": S, "topic_id": C, "year": N}, (("text",), "topic_id")),
    ],
)
def test_columns_are_found(columns, found):
    assert choose_columns(columns, (), "") == found


def test_named_columns_are_taken():
    columns = {"text": S, "title": S, "label": N, "topic": LOW}
    assert choose_columns(columns, ("title",), "topic") == (("title",), "topic")
    assert choose_columns(columns, ("title", "text"), "") == (("title", "text"), "label")
    assert choose_columns({"text": LOW, "title": S}, (), "text") == (("title",), "text")


@pytest.mark.parametrize(
    ("columns", "text", "label", "said"),
    [
        ({"text": S, "label": N}, ("body",), "", "no column 'body'; its columns are: text, label"),
        ({"text": S, "label": N}, (), "topic", "no column 'topic'; its columns are: text, label"),
        ({"text": S, "label": N}, ("text",), "text", "must be different columns"),
        ({"text": S, "label": N}, ("text", "text"), "", "must be different columns"),
        ({"text": S, "label": N}, ("label",), "", "no column looks like a label"),
        ({"text": S, "label": N, "n": ID}, ("n",), "", "column 'n' does not hold text"),
        ({"text": S, "a": N, "b": LOW}, (), "", "columns a, b could each be the label; name it with label="),
        ({"text": S, "id": ID}, (), "", "no column looks like a label; .* among: text, id"),
        ({"a": S, "b": S, "label": N}, (), "", "columns a, b could each be the text"),
        ({"tokens": NESTED, "label": N}, (), "", "no column looks like text"),
    ],
)
def test_columns_that_are_missing_or_ambiguous_are_named(columns, text, label, said):
    with pytest.raises(DataError, match=said):
        choose_columns(columns, text, label)


@pytest.mark.parametrize(
    ("metric", "classes", "told"),
    [("f1", ("ham", "spam"), "f1 (of class 'spam')"), ("f1", ("a", "b", "c"), "f1"), ("accuracy", ("ham", "spam"), "accuracy")],
)
def test_of_which_class_f1_is_is_told(metric, classes, told):
    assert metric_told(task(metric, classes)) == told
