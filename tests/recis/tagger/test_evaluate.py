"""The scorer on hand cases, and the rules of BIO."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from recis.tagger.evaluate import bio_labels, bio_spans, check_spans, score_spans
from recis.tagger.rules import Span


def test_scores_by_hand():
    gold = [[(0, 1, "brand"), (1, 3, "type")], [(0, 2, "brand")], []]
    predicted = [[(0, 1, "brand"), (1, 2, "type")], [Span(start=0, end=2, type="type")], [(0, 1, "brand")]]
    scores = score_spans(gold, predicted, [3, 2, 1])
    assert (scores.micro.correct, scores.micro.predicted, scores.micro.gold) == (1, 4, 3)
    assert (scores.micro.precision, scores.micro.recall, scores.micro.f1) == (1 / 4, 1 / 3, pytest.approx(2 / 7))
    assert scores.per_type["brand"].f1 == pytest.approx(2 * 1 / (2 + 2))
    assert scores.per_type["type"].f1 == 0
    assert scores.word_accuracy == 2 / 6  # "brand type O" against "brand type type", then three words wrong


def test_nothing_scores_nothing():
    scores = score_spans([], [], [])
    assert (scores.micro.precision, scores.micro.recall, scores.micro.f1, scores.word_accuracy) == (0, 0, 0, 0)


def test_lists_of_different_lengths_are_refused():
    with pytest.raises(ValueError, match="must be as long; got 1, 0, 1"):
        score_spans([[]], [], [1])


@given(st.lists(st.sampled_from([("O", 1), ("a", 1), ("a", 2), ("b", 3)]), max_size=5))
def test_labels_and_spans_lead_to_each_other(parts):
    spans, at = [], 0
    for name, length in parts:
        spans += [(at, at + length, name)] if name != "O" else []
        at += length
    assert bio_spans(bio_labels(spans, at)) == (spans, 0)


def test_a_stray_inside_label_is_refused_or_repaired():
    labels = ["I-a", "I-a", "O", "B-a", "I-b"]
    with pytest.raises(ValueError, match="text '7', word 0: 'I-a' follows no a span; repair_bio=True reads it as B-a"):
        bio_spans(labels, text_id="7")
    assert bio_spans(labels, repair_bio=True) == ([(0, 2, "a"), (3, 4, "a"), (4, 5, "b")], 2)


@pytest.mark.parametrize("label", ["B", "X-a", "B-", "a"])
def test_a_label_that_is_no_bio_is_refused(label):
    with pytest.raises(ValueError, match=f"text 't', word 1: label must be O, B-type or I-type; got '{label}'"):
        bio_spans(["O", label], text_id="t")


@pytest.mark.parametrize(
    ("spans", "message"),
    [
        ([(0, 4, "a")], r"span \[0, 4\) must lie inside its 3 tokens"),
        ([(1, 1, "a")], r"span \[1, 1\) must lie inside"),
        ([(0, 2, "a"), (1, 3, "a")], r"span \[1, 3\) overlaps one that ends at 2"),
        ([(0, 1, "c")], "type 'c' is not in the schema"),
    ],
)
def test_gold_spans_that_cannot_be_are_refused_with_the_text(spans, message):
    with pytest.raises(ValueError, match=f"text 'x': {message}"):
        check_spans(spans, 3, text_id="x", types=["a"])
